"""NanoLlama: a decoder-only transformer with Llama's architecture and Hugging Face parameter names.

    tokens -> embedding -> N x [RMSNorm, attention, +, RMSNorm, SwiGLU, +] -> RMSNorm -> head

The model runs on one device. training/fsdp_utils.py adds sharding, compilation and activation
checkpointing. Shapes: B rows, T tokens, D hidden_size, V vocab_size.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Mask, attend, attention_mask
from models.layers import RMSNorm, RotaryEmbedding, apply_rotary, default_head_dim
from models.losses import TokenLosses, token_losses
from models.moe import KINDS, MoE, MoEConfig, RouterStats, check_moe, router_inputs
from models.rope import RopeScaling
from ranges import NonNegativeFloat, PositiveFloat, at_least, check_fields, one_of

Size = Annotated[int, at_least(1, below=2**31)]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. Field names are those of a Hugging Face config; defaults give 1.1B."""

    vocab_size: Size = 32_000  # rows of the embedding, at least the tokenizer's size
    hidden_size: Size = 2048  # width of the residual stream
    intermediate_size: Size = 5632  # width of the feed-forward network
    num_hidden_layers: Annotated[int, at_least(1, maximum=10_000)] = 22  # number of blocks
    num_attention_heads: Size = 32  # query heads
    num_key_value_heads: Size = 4  # heads of keys and values, each shared by some query heads
    head_dim: Size | None = None  # width of a head; default: hidden_size / num_attention_heads
    max_position_embeddings: Size = 4096  # the context: longest row in tokens
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary embedding
    rope_scaling: RopeScaling | None = None  # default: none; docs/long_context.md
    rms_norm_eps: PositiveFloat = 1e-5  # added to the mean square in each norm
    initializer_range: NonNegativeFloat = 0.02  # standard deviation of initial weights
    tie_word_embeddings: bool = False  # the head uses the embedding's weights
    qk_norm: bool = False  # RMSNorm on each head of q and k: the Qwen3 architecture
    kind: Annotated[str, one_of(*KINDS)] = "dense"  # moe: a mixture of experts in each block
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        check_fields(self, "model")
        check_moe(self.kind, self.moe)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None:
            head_dim = default_head_dim(self.hidden_size, self.num_attention_heads)
            object.__setattr__(self, "head_dim", head_dim)
        if self.resolved_head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even for rotary positions")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.resolved_head_dim, self.rope_theta)

    @property
    def resolved_head_dim(self) -> int:
        """head_dim as a plain int."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def expert_size(self) -> int:
        """Width of one expert."""
        return self.moe.size(self.intermediate_size)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: 1,100,048,384 for the defaults. A tied head counts once."""
        return self._parameters(self.moe.experts)

    @property
    def num_active_parameters(self) -> int:
        """Number of parameters that one token uses: num_parameters without idle experts."""
        return self._parameters(self.moe.top_k)

    def _parameters(self, experts: int) -> int:
        """Number of parameters with `experts` experts in each block of a mixture."""
        d, head_dim = self.hidden_size, self.resolved_head_dim
        projections = 2 * d * head_dim * (self.num_attention_heads + self.num_key_value_heads)
        qk_norms = 2 * head_dim if self.qk_norm else 0
        feed_forward = 3 * d * self.intermediate_size
        if self.kind == "moe":
            feed_forward = 3 * d * (experts * self.expert_size + self.moe.shared_size)
            feed_forward += self.moe.router_parameters(d)
        block = projections + qk_norms + feed_forward + 2 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + d + embeddings


FIELD_ALIASES = {  # field of ModelConfig -> its names in other code bases, accepted by NanoLlama()
    "vocab_size": "n_vocab",
    "hidden_size": "hidden_dim d_model dim n_embd embed_dim",
    "intermediate_size": "ffn_dim intermediate_dim ffn_hidden_size ffn_hidden_dim mlp_dim",
    "num_hidden_layers": "n_layers n_layer num_layers",
    "num_attention_heads": "n_heads n_head num_heads",
    "num_key_value_heads": "n_kv_heads n_kv_head num_kv_heads",
    "max_position_embeddings": "max_seq_len max_position n_ctx n_positions",
    "rope_theta": "rope_base theta",
    "rms_norm_eps": "norm_eps rms_eps layer_norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings tie_weights weight_tying",
}


def make_config(**shape: Any) -> ModelConfig:
    """Build a ModelConfig from its field names or their FIELD_ALIASES.

    The default intermediate_size is Llama's: 8/3 of hidden_size, rounded up to a multiple of 256
    (2048 -> 5632). TypeError for an unknown or repeated name.
    """
    fields = {alias: name for name, aliases in FIELD_ALIASES.items() for alias in aliases.split()}
    values: dict[str, Any] = {}
    for argument, value in shape.items():
        name = fields.get(argument, argument)
        if name not in ModelConfig.__dataclass_fields__ or name in values:
            problem = "is given twice" if name in values else "is not a field of ModelConfig"
            raise TypeError(f"NanoLlama: {argument} {problem}; see models.nanollama.ModelConfig")
        values[name] = value
    if "hidden_size" in values:
        values.setdefault("intermediate_size", -(-8 * values["hidden_size"] // 3) + 255 & -256)
    return ModelConfig(**values)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention; several query heads share one key-value head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.resolved_head_dim
        q_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        per_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(per_head)  # [B, T, heads, head_dim]
        k = self.k_proj(x).view(per_head)
        v = self.v_proj(x).view(per_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, head_dim]
        out = attend(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, T, D]


class SwiGLU(nn.Module):
    """Gated feed-forward network with SiLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward; each adds to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | MoE
        if config.kind == "moe":
            self.mlp = MoE(config.moe, config.hidden_size, config.expert_size, "swiglu", layer)
        else:
            self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        noise_keys: Tensor | None = None,
        trained: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp(normed, noise_keys, trained)
            return x + out, stats
        return x + self.mlp(normed), None


class NanoLlama(nn.Module):
    """The language model: embedding, transformer blocks, final norm, head.

    `NanoLlama(config, seed)` draws the same weights on every machine and for any world size.
    `NanoLlama(vocab_size=32000, n_layers=22, hidden_dim=2048, ...)` calls make_config; seed
    defaults to 0. With a config and no seed, weights stay uninitialized until a checkpoint
    is loaded.
    """

    def __init__(self, config: ModelConfig | None = None, seed: int | None = None, **shape: Any):
        super().__init__()
        if config is None:
            config, seed = make_config(**shape), 0 if seed is None else seed
        elif shape:
            raise TypeError(f"NanoLlama: give a config or {', '.join(shape)}, not both")
        self.config = config
        self.attention = "auto"  # kernel: one of models.attention.KERNELS
        self.compile_head: bool | None = None  # torch.compile for the loss head; None: only on GPUs
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransformerBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = RotaryEmbedding(
            config.resolved_head_dim,
            config.max_position_embeddings,
            config.rope_theta,
            config.rope_scaling,
        )
        if seed is not None:
            self.init_weights(seed)

    @property
    def head_weight(self) -> Tensor:
        """The weight [V, D] that maps hidden states to logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def set_rope_theta(self, theta: float) -> None:
        """Change the base of the rotary embedding in the model and in its config."""
        self.config = replace(self.config, rope_theta=theta)
        self.rotary.set_theta(theta)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize every parameter. Values are drawn on the CPU in `named_parameters` order.

        | parameters           | value                                        |
        |----------------------|----------------------------------------------|
        | *norm.weight         | 1                                            |
        | o_proj, down_proj    | normal, initializer_range / sqrt(2 * layers) |
        | router.noise_weight  | 0                                            |
        | every other matrix   | normal, initializer_range                    |
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("norm.weight", "noise_weight")):
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            assert parameter.ndim >= 2, f"no rule to initialize {name}"
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            values = torch.empty(parameter.shape)
            values.normal_(0.0, residual_std if residual else std, generator=generator)
            parameter.copy_(values)

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
        ValueError if T exceeds max_position_embeddings.
        """
        length = tokens.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the model's context of "
                f"{self.config.max_position_embeddings}; "
                "shorten the input or raise model.max_position_embeddings"
            )
        x = self.embed_tokens(tokens)  # [B, T, D]
        cos, sin = self.rotary(length)  # [T, head_dim]
        mask = attention_mask(doc_ids, x, self.attention)
        noise_keys = trained = None
        if self.training:
            kind, moe = self.config.kind, self.config.moe
            noise_keys, trained = router_inputs(kind, moe, tokens, targets, rows)
        routers: list[RouterStats] = []
        for layer in self.layers:
            x, stats = layer(x, cos, sin, mask, noise_keys, trained)
            if stats is not None:
                routers.append(stats)
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.head_weight)  # [B, T, V]
        losses = token_losses(x, self.head_weight, targets, compiled=self.compile_head)
        return losses._replace(router=RouterStats.stack(routers))
