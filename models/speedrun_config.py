"""The config of SpeedrunGPT: GPT-2 124M, and the tricks of the nanoGPT speedrun as fields.

The defaults are GPT-2 as in Hugging Face. Each trick is one field, off by default, with the record
of github.com/KellerJordan/modded-nanogpt that introduced it (track 1; M: track 2, the medium
model).
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import torch

from models.layers import default_head_dim
from models.losses import SOFTCAPS
from models.moe import KINDS, MoEConfig, check_moe
from models.speedrun_layers import GATE_WIDTH
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
    """Shape of a SpeedrunGPT; the defaults are GPT-2 124M. (5): added by record 5."""

    vocab_size: Size = 50_257  # rows of the embedding
    hidden_size: Size = 768  # width of the residual stream
    num_hidden_layers: Annotated[int, at_least(1, maximum=10_000)] = 12  # number of blocks
    num_attention_heads: Size = 12  # heads of queries, keys and values
    head_dim: Size | None = None  # width of a head; default: hidden_size / num_attention_heads
    max_position_embeddings: Size = 1024  # the context: longest row in tokens
    mlp_ratio: PositiveFloat = 4.0  # width of the MLP / hidden_size
    initializer_range: NonNegativeFloat = 0.02  # standard deviation of initial weights
    # gpt2: normal, initializer_range; fan_in: normal, sqrt(0.33 / inputs), tables with 1 (2)
    init: Annotated[str, one_of("gpt2", "fan_in")] = "gpt2"
    zero_init: bool = False  # output projections and an untied head start at 0 (5)

    # How positions are encoded; rotary (2).
    positions: Annotated[str, one_of("learned", "rotary")] = "learned"
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary embedding; 1,024 from record 17 on
    rope_fraction: Annotated[float, above(0, maximum=1)] = 1.0  # rotated share of a head; 0.5 (17)
    yarn: bool = False  # frequencies and attention scale follow the long window (31)
    norm: Annotated[str, one_of("layernorm", "rmsnorm")] = "layernorm"  # kind of norms; rmsnorm (2)
    norm_gains: bool = True  # false: norms without weights (2)
    norm_eps: PositiveFloat = 1e-5  # added to the variance in each norm
    biases: bool = True  # norms and linear layers of the blocks have biases; false (2)
    activation: Annotated[str, one_of("gelu", "relu2")] = "gelu"  # activation of the MLP; relu2 (5)

    vocab_multiple: PositiveInt = 1  # pads the vocabulary to a multiple; 128 (5)
    tie_word_embeddings: bool = True  # false: the head has separate weights (8)
    head_bias: bool = False  # bias of the head; track 3's baseline has one
    embedding_norm: bool = False  # norm after the embedding (8)
    softcap: NonNegativeFloat = 0.0  # bound of the logits; 0: none; 30 (9), 15 (18), 23 (54)
    # Function of the softcap: tanh (9), isru (M7), sigmoid (54).
    softcap_kind: Annotated[str, one_of(*SOFTCAPS)] = "tanh"
    fp8_head: bool = False  # head in float8 during training, on a GPU (19)
    # Weights of the losses of the next tokens (53).
    multi_token_weights: tuple[NonNegativeFloat, ...] = (1.0,)

    qk_norm: bool = False  # RMSNorm without gains on each head of q and k (5)
    # Factor of q @ k; default: 1 / sqrt(head_dim); 0.12 (20)
    attention_scale: PositiveFloat | None = None
    merged_qkv: bool = False  # one parameter [3, H * head_dim, D] for q, k and v (20)
    attention_gate: bool = False  # gate per head, from the first 12 channels (28)
    key_offset: bool = False  # unrotated key channels of long layers come one token later (49)
    paired_head_layers: tuple[Layer, ...] = ()  # layers whose heads attend in pairs (58)
    layers_without_attention: tuple[Layer, ...] = ()  # layers with an MLP only (17)
    layers_without_mlp: tuple[Layer, ...] = ()  # layers with attention only (30)
    # Visible tokens, itself included; null: all. Paired heads count two positions a token (13).
    long_window: Size | None = None
    short_window: Size | None = None  # visible tokens of the layers marked S (20)
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

    kind: Annotated[str, one_of(*KINDS)] = "dense"  # moe: experts, without biases, for each MLP
    moe: MoEConfig = field(default_factory=MoEConfig)

    model_type = "speedrun_gpt"  # in config.json; not a field

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if isinstance(self.moe, dict):  # from a JSON file
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        check_moe(self.kind, self.moe)
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
    def mlp_size(self) -> int:
        """Width of an MLP."""
        return max(1, round(self.mlp_ratio * self.hidden_size))

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: 124,439,808 for the defaults. A tied head counts once."""
        return sum(_parameter_sizes(self).values())

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that one token uses: num_parameters without idle experts."""
        return sum(self._active(name, n) for name, n in _parameter_sizes(self).items())

    def _active(self, name: str, size: int) -> int:
        """Return how many elements of a parameter one token uses."""
        return size * self.moe.top_k // self.moe.experts if ".experts." in name else size

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs per token in rows of `length` tokens, by the PaLM convention.

        6 per matmul parameter, and 12 * width * visible tokens for each attention layer, not halved
        for the causal mask. Windows are the config's.
        """
        matrices: tuple[str, ...] = ("proj.weight", "qkv_weight", "gate.weight", "router.weight")
        matrices += ("router.noise_weight",)
        matrices += ("experts.up_proj", "experts.down_proj", "shared.up_proj", "shared.down_proj")
        sizes = _parameter_sizes(self).items()
        matmul = sum(self._active(name, n) for name, n in sizes if name.endswith(matrices))
        visible = 0
        for layer in set(range(self.num_hidden_layers)) - set(self.layers_without_attention):
            window = self.long_window if self.is_long(layer) else self.short_window
            visible += min(length, window or length)
        head = self.padded_vocab_size * self.hidden_size
        width = self.num_attention_heads * self.resolved_head_dim
        return 6 * (matmul + head) + 12 * width * visible


@cache
def _parameter_sizes(config: GPTConfig) -> dict[str, int]:
    from models.speedrun_gpt import SpeedrunGPT

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
