"""SpeedrunGPT: GPT-2, and the tricks of the nanoGPT speedrun that its config turns on.

    tokens -> embedding -> N x [norm, attention, +, norm, MLP, +] -> norm -> head

Shapes: B rows, T tokens, D hidden_size, V vocab_size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Mask, attention_mask
from models.layers import RotaryEmbedding
from models.losses import LossHead, TokenLosses, token_losses
from models.moe import RouterStats, router_inputs
from models.speedrun_config import GPTConfig, check_multi_token_weights
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
    PositiveInt,
    check,
)


class SpeedrunGPT(nn.Module):
    """The language model: embedding, blocks, final norm, head.

    `SpeedrunGPT(config, seed)` draws the same weights on every machine and for any world size.
    Without a seed, weights stay uninitialized until a checkpoint is loaded. Schedules change the
    model before a step, only through set_softcap, set_windows and set_multi_token_weights.
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
        """The weight [padded_vocab_size, D] that maps hidden states to logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def set_softcap(self, value: float) -> None:
        """Bound the logits of the next steps by `value`; 0: no bound."""
        check(value, NonNegativeFloat, "softcap")
        self.softcap = float(value)

    def set_windows(self, short: int | None, long: int | None) -> None:
        """Set the attention windows of the next steps, in tokens, current one included; None: all.

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
            projection = projection or kind == "down_proj"  # of experts
            zero = config.zero_init and (projection or module == "lm_head")
            zero = zero or kind == "noise_weight"
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
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        doc_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Return logits [B, T, V] of tokens [B, T]; with targets [B, T], TokenLosses (fp32 [B, T]).

        doc_ids [B, T] numbers each token's document; tokens attend within their own document.
        rows [B]: row numbers in training order, for the router's noise.
        In training mode, nll is the weighted sum over the next tokens (multi_token_weights).
        ValueError if T exceeds max_position_embeddings, or if fp8_head trains without a float8 GPU.
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
        noise_keys = trained = None
        if self.training:
            noise_keys, trained = router_inputs(config.kind, config.moe, tokens, targets, rows)
        routers: list[RouterStats] = []
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
                noise_keys,
                trained,
            )
            x, value, stats = layer(x, inputs)
            if stats is not None:
                routers.append(stats)
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
        losses = token_losses(
            x,
            self.head_weight,
            targets,
            compiled=self.compile_head,
            bias=bias,
            head=head,
            target_weights=weights,
        )
        return losses._replace(router=RouterStats.stack(routers))

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
