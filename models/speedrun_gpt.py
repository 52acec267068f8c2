"""SpeedrunGPT: GPT-2 124M, and the tricks of the nanoGPT speedrun as fields of its config.

    tokens -> embedding -> N x [norm, attention, +, norm, MLP, +] -> norm -> head

The defaults are GPT-2 as in Hugging Face. Each trick is one field, off by default, with the record
of github.com/KellerJordan/modded-nanogpt that introduced it (track 1; M: track 2, the medium
model). Shapes: B rows, T tokens, D hidden_size, V vocab_size.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Mask, attention_mask
from models.layers import RotaryEmbedding, default_head_dim
from models.losses import SOFTCAPS, LossHead, TokenLosses, token_losses
from models.speedrun_layers import (
    CONSTANTS,
    GATE_WIDTH,
    BigramEmbedding,
    Block,
    BlockInputs,
    Smear,
    document_starts,
    make_norm,
    make_rotation,
    next_targets,
    query_factor,
    rotary_frequencies,
)
from ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    above,
    at_least,
    check,
    check_fields,
    one_of,
)

Size = Annotated[int, at_least(1, below=2**31)]
Layer = NonNegativeInt  # number of a layer, from 0


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a SpeedrunGPT and its tricks. Defaults give GPT-2 with 124M parameters."""

    vocab_size: Size = 50_257
    hidden_size: Size = 768
    num_hidden_layers: Annotated[int, at_least(1, maximum=10_000)] = 12
    num_attention_heads: Size = 12
    head_dim: Size | None = None  # default: hidden_size / num_attention_heads
    max_position_embeddings: Size = 1024
    mlp_ratio: PositiveFloat = 4.0  # width of the MLP / hidden_size
    initializer_range: NonNegativeFloat = 0.02
    # gpt2: normal, initializer_range; fan_in: normal, sqrt(0.33 / inputs), tables with 1 (2)
    init: Annotated[str, one_of("gpt2", "fan_in")] = "gpt2"
    zero_init: bool = False  # output projections and an untied head start at 0 (5)

    positions: Annotated[str, one_of("learned", "rotary")] = "learned"  # rotary (2)
    rope_theta: PositiveFloat = 10_000.0  # 1,024 from record 17 on
    rope_fraction: Annotated[float, above(0, maximum=1)] = 1.0  # rotated share of a head; 0.5 (17)
    yarn: bool = False  # frequencies and attention scale follow the long window (31)
    norm: Annotated[str, one_of("layernorm", "rmsnorm")] = "layernorm"  # rmsnorm (2)
    norm_gains: bool = True  # false: norms without weights (2)
    norm_eps: PositiveFloat = 1e-5
    biases: bool = True  # of norms and linear layers of the blocks; false (2)
    activation: Annotated[str, one_of("gelu", "relu2")] = "gelu"  # relu2 (5)

    vocab_multiple: PositiveInt = 1  # pads the vocabulary to a multiple; 128 (5)
    tie_word_embeddings: bool = True  # false: separate head (8)
    head_bias: bool = False  # track 3's baseline has one
    embedding_norm: bool = False  # norm after the embedding (8)
    softcap: NonNegativeFloat = 0.0  # bound of the logits; 0: none; 30 (9), 15 (18), 23 (54)
    # tanh (9), isru (M7), sigmoid (54).
    softcap_kind: Annotated[str, one_of(*SOFTCAPS)] = "tanh"
    fp8_head: bool = False  # head in float8 during training, on a GPU (19)
    multi_token_weights: tuple[NonNegativeFloat, ...] = (1.0,)  # of the next tokens' losses (53)

    qk_norm: bool = False  # RMSNorm without gains on each head of q and k (5)
    attention_scale: PositiveFloat | None = None  # default: 1 / sqrt(head_dim); 0.12 (20)
    merged_qkv: bool = False  # one parameter [3, H * head_dim, D] for q, k and v (20)
    attention_gate: bool = False  # gate per head, from the first 12 channels (28)
    key_offset: bool = False  # unrotated key channels of long layers come one token later (49)
    paired_head_layers: tuple[Layer, ...] = ()  # pairs of heads attend to each other (58)
    layers_without_attention: tuple[Layer, ...] = ()  # (17)
    layers_without_mlp: tuple[Layer, ...] = ()  # (30)
    # Visible tokens, itself included; null: all. Paired heads count two positions a token.
    long_window: Size | None = None  # (13)
    short_window: Size | None = None  # (20)
    window_pattern: str = "L"  # L (long) or S (short) per layer, repeated, e.g. LSSS (20)

    embedding_skips: bool = False  # each block starts from a mix of x and the embedding (9)
    value_residual: bool = False  # values are mixed with those of the first layer (9)
    unet_skips: bool = False  # the first half's outputs are added in the second half, mirrored (11)
    skips: tuple[tuple[Layer, ...], ...] = ()  # pairs [from, to]: output added before a layer (45)
    skip_gates: bool = False  # gates of skips read the embedding (55)
    # Table that is mixed into the values of each layer, -1: none, [] for no tables. All different:
    # full (14); mirrored: U-net (15); [0, 1, 2, -1, ..., 0, 1, 2]: sparse (17).
    value_embeddings: tuple[Annotated[int, at_least(-1)], ...] = ()
    value_embedding_gates: bool = False  # gate per head instead of two weights (55)
    smear: bool = False  # adds a gated part of the previous token's embedding (34)
    backout_layer: Layer | None = None  # subtracts part of this layer's output before the head (40)
    bigram_vocab_size: NonNegativeInt = 0  # rows of a hashed bigram embedding; 0: none (62)
    bigram_signs: bool = False  # signs tell bigrams of one row apart (83)

    kind = "speedrun_gpt"  # the model that builds this config; not a field

    def __post_init__(self) -> None:
        check_fields(self, "model")
        for name, value in list(vars(self).items()):  # lists of a JSON file
            if isinstance(value, (list, tuple)):
                value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
                object.__setattr__(self, name, value)
        if self.head_dim is None:
            head_dim = default_head_dim(self.hidden_size, self.num_attention_heads)
            object.__setattr__(self, "head_dim", head_dim)
        if problem := self._problem():
            raise ValueError(f"model.{problem}")
        check_multi_token_weights(self.multi_token_weights)

    def _problem(self) -> str:
        """Describe the first field that contradicts another one; empty if there is none."""
        layers, rotary = self.num_hidden_layers, self.positions == "rotary"
        for name in ("paired_head_layers", "layers_without_attention", "layers_without_mlp"):
            for layer in getattr(self, name):
                if layer >= layers:
                    return f"{name} has layer {layer}, but the layers are 0 to {layers - 1}"
        for pair in self.skips:
            if len(pair) != 2 or not pair[0] < pair[1] < layers:
                return f"skips has {list(pair)}; give pairs [from, to] with from < to < {layers}"
        if self.backout_layer is not None and self.backout_layer >= layers:
            return f"backout_layer={self.backout_layer} must be below {layers}, the layers"
        if not self.window_pattern or set(self.window_pattern) - {"L", "S"}:
            return f"window_pattern={self.window_pattern!r} must consist of the letters L and S"
        tables = [table for table in self.value_embeddings if table >= 0]
        if self.value_embeddings and len(self.value_embeddings) != layers:
            return (
                f"value_embeddings has {len(self.value_embeddings)} entries for {layers} layers; "
                "give one per layer, -1 for none"
            )
        if set(tables) != set(range(len(set(tables)))):
            return f"value_embeddings={list(self.value_embeddings)} skips a table number"
        for layer in self.layers_without_attention:
            if layer in self.layers_without_mlp:
                return f"layers_without_attention and layers_without_mlp both have layer {layer}"
            if layer in self.paired_head_layers or self.value_table(layer) is not None:
                return (
                    f"layers_without_attention has layer {layer}; remove it from "
                    "model.paired_head_layers and model.value_embeddings"
                )
        partial = rotary and self.rope_fraction < 1
        channels = round(self.resolved_head_dim // 2 * self.rope_fraction)
        gates = self.attention_gate or self.smear or self.skip_gates or self.value_embedding_gates
        odd = self.num_attention_heads % 2 or self.hidden_size % 2
        impossible = (
            (rotary and self.resolved_head_dim % 2, "head_dim must be even for rotary positions"),
            (partial and not channels, f"rope_fraction={self.rope_fraction:g} is too small"),
            (self.yarn and not rotary, "yarn needs model.positions=rotary"),
            (self.yarn and not self.long_window, "yarn needs model.long_window"),
            (
                self.key_offset and not partial,
                "key_offset needs model.positions=rotary and model.rope_fraction below 1",
            ),
            (
                self.short_window and "S" not in self.window_pattern,
                "short_window has no effect without an S in model.window_pattern",
            ),
            (
                self.paired_head_layers and odd,
                "paired_head_layers needs an even number of heads and an even hidden size",
            ),
            (
                gates and self.hidden_size < GATE_WIDTH,
                f"hidden_size={self.hidden_size} must be at least {GATE_WIDTH} for gates",
            ),
            (self.head_bias and self.tie_word_embeddings, "head_bias needs an untied head"),
            (self.skip_gates and not self.skip_pairs, "skip_gates needs model.skips or unet_skips"),
            (
                self.value_embedding_gates and not tables,
                "value_embedding_gates needs model.value_embeddings",
            ),
            (
                self.bigram_signs and not self.bigram_vocab_size,
                "bigram_signs needs model.bigram_vocab_size",
            ),
            (self.bigram_vocab_size == 1, "bigram_vocab_size=1 is too small; use at least 2"),
        )
        return next((text for problem, text in impossible if problem), "")

    @property
    def resolved_head_dim(self) -> int:
        """head_dim as a plain int."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables: vocab_size, rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def first_attention_layer(self) -> int:
        """The first layer with attention; num_hidden_layers if none has any."""
        return min(set(range(self.num_hidden_layers + 1)) - set(self.layers_without_attention))

    @property
    def skip_pairs(self) -> list[tuple[int, int]]:
        """Pairs (from, to): the output of one layer is added to the input of a later one."""
        middle = self.num_hidden_layers // 2
        unet = [(middle - 1 - i, middle + i) for i in range(middle)] if self.unet_skips else []
        return unet + [(pair[0], pair[1]) for pair in self.skips]

    def is_long(self, layer: int) -> bool:
        """Whether a layer has the long window."""
        return self.window_pattern[layer % len(self.window_pattern)] == "L"

    def value_table(self, layer: int) -> int | None:
        """The value embedding of a layer, or None."""
        table = self.value_embeddings[layer] if self.value_embeddings else -1
        return None if table < 0 else table

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: 124,439,808 for the defaults. A tied head counts once."""
        return sum(_parameter_sizes(self).values())

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs per token in rows of `length` tokens, by the PaLM convention.

        6 per matmul parameter, and 12 * width * visible tokens for each attention layer, not halved
        for the causal mask. Windows are the config's.
        """
        matrices = ("proj.weight", "qkv_weight", "gate.weight")
        sizes = _parameter_sizes(self).items()
        matmul = sum(size for name, size in sizes if name.endswith(matrices))
        visible = 0
        for layer in set(range(self.num_hidden_layers)) - set(self.layers_without_attention):
            window = self.long_window if self.is_long(layer) else self.short_window
            visible += min(length, window or length)
        head = self.padded_vocab_size * self.hidden_size
        width = self.num_attention_heads * self.resolved_head_dim
        return 6 * (matmul + head) + 12 * width * visible


@cache
def _parameter_sizes(config: GPTConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = SpeedrunGPT(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def check_multi_token_weights(weights: tuple[float, ...]) -> None:
    """ValueError unless the weights are finite, none is negative and the first is above 0."""
    check(weights, tuple[NonNegativeFloat, ...], "model.multi_token_weights")
    if not weights or not weights[0] > 0:
        raise ValueError(
            f"model.multi_token_weights={list(weights)} must begin with a weight above 0, "
            "that of the next token"
        )


class SpeedrunGPT(nn.Module):
    """The language model: embedding, blocks, final norm, head.

    `SpeedrunGPT(config, seed)` draws the same weights on every machine and for any world size.
    Without a seed, weights are left for a checkpoint to fill. Schedules change the model through
    set_softcap, set_windows and set_multi_token_weights, before a step, and through nothing else.
    """

    def __init__(self, config: GPTConfig, seed: int | None = None):
        super().__init__()
        d, rows = config.hidden_size, config.padded_vocab_size
        self.config = config
        self.attention = "auto"  # kernel: one of models.attention.KERNELS
        self.compile_head: bool | None = None  # torch.compile for the loss head; None: on a GPU
        self.softcap = config.softcap
        self.multi_token_weights = config.multi_token_weights
        self.embed_tokens = nn.Embedding(rows, d)
        learned = config.positions == "learned"
        self.position_embed = nn.Embedding(config.max_position_embeddings, d) if learned else None
        self.smear = Smear() if config.smear else None
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        bigrams = config.bigram_vocab_size
        self.bigram_embed = BigramEmbedding(bigrams, d, config.bigram_signs) if bigrams else None
        width = config.num_attention_heads * config.resolved_head_dim
        tables = len(set(config.value_embeddings) - {-1})
        self.value_embeds = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        skips = len(config.skip_pairs)
        self.skip_weights = nn.Parameter(torch.empty(skips)) if skips else None
        self.skip_gate = nn.Linear(GATE_WIDTH, skips, bias=False) if config.skip_gates else None
        backout = config.backout_layer is not None
        self.backout_weight = nn.Parameter(torch.empty(1)) if backout else None
        self.norm = make_norm(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(d, rows, bias=config.head_bias)
        self.rotary = None
        if not learned:
            positions = config.max_position_embeddings * (2 if config.paired_head_layers else 1)
            self.rotary = RotaryEmbedding(config.resolved_head_dim, positions, config.rope_theta)
        self.windows = {"S": config.short_window, "L": config.long_window}
        self._rotate(config.long_window)
        if seed is not None:
            self.init_weights(seed)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [padded_vocab_size, D] that turns hidden states into logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def set_softcap(self, value: float) -> None:
        """Bound the logits of the next steps by `value`; 0: no bound."""
        check(value, NonNegativeFloat, "softcap")
        self.softcap = float(value)

    def set_windows(self, short: int | None, long: int | None) -> None:
        """Let tokens of the next steps see `short` or `long` tokens, itself included; None: all.

        With config.yarn, the rotary tables and the attention scale follow the long window.
        """
        for name, window in (("short_window", short), ("long_window", long)):
            check(window, PositiveInt | None, name)
        if self.config.yarn and long != self.windows["L"]:
            self._rotate(long)
        self.windows = {"S": short, "L": long}

    def _rotate(self, long_window: int | None) -> None:
        self.query_factor = query_factor(self.config, long_window)
        if self.rotary is not None:
            self.rotary.set_frequencies(rotary_frequencies(self.config, long_window))

    def set_multi_token_weights(self, weights: tuple[float, ...]) -> None:
        """Weight the losses of the next token, the one after it, and so on, in the next steps."""
        check_multi_token_weights(tuple(weights))
        self.multi_token_weights = tuple(float(weight) for weight in weights)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter. Values are drawn on the CPU in `named_parameters` order.

        | parameters                  | gpt2                               | fan_in            |
        |-----------------------------|------------------------------------|-------------------|
        | norm weights; biases        | 1; 0                               | 1; 0              |
        | gates, bigram table         | 0                                  | 0                 |
        | weights of skips and mixes  | CONSTANTS                          | CONSTANTS         |
        | token tables                | normal, initializer_range          | normal, 1         |
        | tied head, positions        | normal, initializer_range          | the same          |
        | o_proj, down_proj           | normal, range / sqrt(2 * layers)   | normal, as below  |
        | other matrices              | normal, initializer_range          | sqrt(0.33/inputs) |

        zero_init: o_proj, down_proj and an untied head are 0.
        """
        config, generator = self.config, torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            *_, module, kind = ["", *name.split(".")]
            constant = CONSTANTS.get(name if name in CONSTANTS else kind)
            projection = module in ("o_proj", "down_proj")
            if self.skip_gate is not None and name == "skip_weights":
                constant = (-1.5,)
            if kind == "weight" and module.endswith("norm"):
                constant = (1.0,)
            zero = config.zero_init and (projection or module == "lm_head")
            if zero or kind in ("bias", "qkv_bias") or module.endswith(("gate", "table")):
                constant = (0.0,)
            if constant is not None:
                parameter.copy_(torch.tensor(constant).expand(parameter.shape))
                continue
            assert parameter.ndim >= 2, f"no rule to initialise {name}"
            table = name.startswith(("embed_tokens", "value_embeds"))
            std = config.initializer_range
            if config.init == "fan_in" and not name.startswith("position_embed"):
                tied = name == "embed_tokens.weight" and self.lm_head is None
                std = std if tied else 1.0 if table else (0.33 / parameter.shape[-1]) ** 0.5
            elif projection:
                std /= (2 * config.num_hidden_layers) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor | TokenLosses:
        """Return logits [B, T, V] of tokens [B, T]; with targets [B, T], TokenLosses (fp32 [B, T]).

        doc_ids [B, T] numbers each token's document; tokens attend within their own document.
        In training mode, nll is the weighted sum over the next tokens (multi_token_weights).
        ValueError if T exceeds max_position_embeddings, or fp8_head trains without such a GPU.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the model's context of {config.max_position_embeddings}; "
                "shorten the input or raise model.max_position_embeddings"
            )
        starts = document_starts(tokens, doc_ids)  # [B, T]
        x = self.embed_tokens(tokens)  # [B, T, D]
        if self.position_embed is not None:
            x = x + self.position_embed.weight[:length]
        if self.smear is not None:
            x = self.smear(x, starts)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        bigram = None if self.bigram_embed is None else self.bigram_embed(tokens, starts)
        value_embeddings = [table(tokens) for table in self.value_embeds]
        masks = self._masks(x, doc_ids)
        rotation = None
        if self.rotary is not None:
            positions = 2 * length if config.paired_head_layers else length
            rotation = make_rotation(self.rotary, positions, self.query_factor)
        x0, first_value = x, None
        sources = {source for source, _ in config.skip_pairs} | {config.backout_layer}
        outputs: dict[int, Tensor] = {}  # of the layers that a later one reads
        for i, layer in enumerate(self.layers):
            for skip, (source, target) in enumerate(config.skip_pairs):
                if target == i:
                    x = x + self._skip_weight(skip, x0) * outputs[source]
            table = config.value_table(i)
            inputs = BlockInputs(
                x0,
                starts,
                masks[i],
                rotation,
                bigram,
                None if table is None else value_embeddings[table],
                first_value,
            )
            x, value = layer(x, inputs)
            if i in sources:
                outputs[i] = x
            if config.value_residual and first_value is None:
                first_value = value
        if config.backout_layer is not None and self.backout_weight is not None:
            x = x - self.backout_weight * outputs[config.backout_layer]
        x = self.norm(x)
        bias = None if self.lm_head is None else self.lm_head.bias
        fp8 = config.fp8_head and self.training
        head = LossHead(self.softcap, config.softcap_kind, config.vocab_size, fp8)
        if targets is None:
            logits = F.linear(x, self.head_weight, bias)[..., : config.vocab_size]
            return head.cap(logits.float()).to(logits.dtype) if self.softcap else logits
        weights = self.multi_token_weights if self.training else (1.0,)
        if len(weights) > 1:
            targets = next_targets(targets, doc_ids, len(weights))
        return token_losses(
            x,
            self.head_weight,
            targets,
            compiled=self.compile_head,
            bias=bias,
            head=head,
            target_weights=weights,
        )

    def _masks(self, x: Tensor, doc_ids: Tensor | None) -> list[Mask]:
        """Build the attention mask of each layer; layers of one kind share theirs."""
        config, (rows, length, width) = self.config, x.shape
        kinds = [
            (i in config.paired_head_layers, self.windows["L" if config.is_long(i) else "S"])
            for i in range(config.num_hidden_layers)
        ]
        used = {kinds[i] for i in range(len(kinds)) if i not in config.layers_without_attention}
        masks: dict[tuple[bool, int | None], Mask] = {}
        for paired, window in used:
            hidden, documents = x, doc_ids
            if paired:
                hidden = x.new_empty(rows, 2 * length, width // 2)
                documents = None if doc_ids is None else doc_ids.repeat_interleave(2, dim=1)
            masks[paired, window] = attention_mask(documents, hidden, self.attention, window)
        return [masks.get(kind) for kind in kinds]

    def _skip_weight(self, skip: int, x0: Tensor) -> Tensor:
        """The factor of a skip: a weight, or with gates [B, T, 1] in (0, 2)."""
        assert self.skip_weights is not None
        weight = self.skip_weights[skip]
        if self.skip_gate is None:
            return weight
        gate = F.linear(x0[..., :GATE_WIDTH], self.skip_gate.weight[skip : skip + 1])
        return 2 * torch.sigmoid(weight) * torch.sigmoid(gate)
