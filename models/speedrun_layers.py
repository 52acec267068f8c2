"""Layers of the speedrun model: attention, MLP, block, and additions to the embedding.

Shapes: B rows, T tokens, D hidden_size, H num_attention_heads. A layer number counts from 0.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Mask, attend
from models.layers import RMSNorm, RotaryEmbedding, apply_rotary, rms_norm
from models.losses import IGNORE
from models.moe import MoE, RouterStats, activate

if TYPE_CHECKING:
    from models.speedrun_config import GPTConfig

GATE_WIDTH = 12  # channels of the hidden state that a gate reads (record 28)
SIGN_ROWS = 8192  # rows of the bigram embedding's sign table (record 83)
# Initial weights of skips and mixes, by the name of the parameter or its last part.
CONSTANTS = {
    "residual_weights": (1.0, 0.0),  # x, x0
    "bigram_weight": (0.1,),
    "value_residual_weight": (0.5,),
    "value_embedding_weights": (0.5, 0.5),  # v, table
    "skip_weights": (1.0,),
    "backout_weight": (0.5,),
    "smear.weight": (0.0,),
}


class Rotation(NamedTuple):
    """Rotary tables in fp32: [T, head_dim], or [2 * T, head_dim] if there are paired heads."""

    query_cos: Tensor  # the query's tables contain the factor of the attention scale
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


class BlockInputs(NamedTuple):
    """Inputs of a block besides its hidden states. Each is None if its field is off."""

    x0: Tensor  # [B, T, D] the embedding, input of the first block
    starts: Tensor  # [B, T] bool: first tokens of documents
    mask: Mask
    rotation: Rotation | None
    bigram: Tensor | None  # [B, T, D]
    value_embedding: Tensor | None  # [B, T, H * head_dim]
    first_value: Tensor | None  # [B, T, H, head_dim] values of the first attention layer
    noise_keys: Tensor | None  # [B, T] of a noisy router: models.moe.token_keys
    trained: Tensor | None  # [B, T] bool: tokens that routers count


class PlainRMSNorm(nn.Module):
    """RMSNorm without gains."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


def make_norm(config: "GPTConfig") -> nn.Module:
    """Create the normalisation of hidden states that the config names."""
    if config.norm == "layernorm":
        gains, bias = config.norm_gains, config.biases
        return nn.LayerNorm(config.hidden_size, config.norm_eps, gains, bias)
    if config.norm_gains:
        return RMSNorm(config.hidden_size, config.norm_eps)
    return PlainRMSNorm(config.norm_eps)


def rotary_frequencies(config: "GPTConfig", long_window: int | None) -> Tensor:
    """Return the rotary frequencies in radians per position, fp32 [head_dim / 2].

    A rope_fraction below 1 rotates the first channels, from theta^0 to theta^-1 with both ends, and
    keeps the others still (record 17). With config.yarn, a long window other than the config's
    slows down the frequencies that turn less than 32 times in it (YaRN, arXiv:2309.00071, section
    3.2; record 31). The result depends on these two windows only, not on earlier ones.
    """
    half = config.resolved_head_dim // 2
    if config.rope_fraction == 1:
        exponents = torch.arange(half, dtype=torch.float32) / half
    else:
        exponents = torch.linspace(0, 1, round(half * config.rope_fraction))
    frequencies = F.pad(config.rope_theta**-exponents, (0, half - len(exponents)))
    if config.yarn and config.long_window and long_window:
        turns = config.long_window * frequencies / (2 * math.pi)
        blend = ((turns - 1) / (32 - 1)).clamp(0, 1)  # 1: unchanged
        ratio = config.long_window / long_window
        frequencies = frequencies * (ratio + blend * (1 - ratio))
    return frequencies


def query_factor(config: "GPTConfig", long_window: int | None) -> float:
    """Return the query factor that turns the kernel's 1 / sqrt(head_dim) into the config's scale.

    With config.yarn, the scale grows with the long window, as in the speedrun (record 31).
    """
    factor = 1.0
    if config.attention_scale is not None:
        factor = config.attention_scale * config.resolved_head_dim**0.5
    if config.yarn and config.long_window and long_window:
        factor *= 1 + 0.2 * math.log(long_window / config.long_window)
    return factor


def make_rotation(rotary: RotaryEmbedding, length: int, factor: float) -> Rotation:
    """Take the tables of positions 0 to length - 1; queries are multiplied by `factor`."""
    cos, sin = rotary(length)
    if factor == 1:
        return Rotation(cos, sin, cos, sin)
    return Rotation(cos * factor, sin * factor, cos, sin)


class Attention(nn.Module):
    """Causal self-attention with the speedrun's additions."""

    def __init__(self, config: "GPTConfig", layer: int):
        super().__init__()
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads, config.resolved_head_dim
        self.paired = layer in config.paired_head_layers
        self.offset_keys = config.key_offset and config.is_long(layer) and not self.paired
        d, width, bias = config.hidden_size, self.heads * self.head_dim, config.biases
        if config.merged_qkv:
            self.qkv_weight = nn.Parameter(torch.empty(3, width, d))
            self.qkv_bias = nn.Parameter(torch.empty(3 * width)) if bias else None
        else:
            self.q_proj = nn.Linear(d, width, bias=bias)
            self.k_proj = nn.Linear(d, width, bias=bias)
            self.v_proj = nn.Linear(d, width, bias=bias)
        self.o_proj = nn.Linear(width, d, bias=bias)
        if config.value_residual and layer > config.first_attention_layer:
            self.value_residual_weight = nn.Parameter(torch.empty(1))
        if config.value_table(layer) is not None:
            if config.value_embedding_gates:
                self.value_gate = nn.Linear(GATE_WIDTH, self.heads, bias=False)
            else:
                self.value_embedding_weights = nn.Parameter(torch.empty(2))
        if config.attention_gate:
            self.output_gate = nn.Linear(GATE_WIDTH, self.heads, bias=False)

    def forward(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """Return the output [B, T, D] and the values [B, T, H, head_dim] of this layer's tokens."""
        config, (rows, length, _) = self.config, x.shape
        q, k, v = self._project(x)  # each [B, T, H, head_dim]
        if config.qk_norm:
            q, k = rms_norm(q, config.norm_eps), rms_norm(k, config.norm_eps)
        own_value = v
        if config.value_residual and inputs.first_value is not None:
            mix = self.value_residual_weight
            v = (1 - mix) * v + mix * inputs.first_value
        if inputs.value_embedding is not None:
            table = inputs.value_embedding.view_as(v)
            if config.value_embedding_gates:
                v = v + 2 * _gate(self.value_gate, x)[..., None] * table
            else:
                v = self.value_embedding_weights[0] * v + self.value_embedding_weights[1] * table
        if self.paired:  # heads h and h + H / 2 alternate in a sequence of 2 * T (record 58)
            q, k, v = (z.reshape(rows, 2 * length, -1, self.head_dim) for z in (q, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, head_dim]
        if inputs.rotation is None:
            q = q if config.attention_scale is None else q * query_factor(config, None)
        else:
            query_cos, query_sin, key_cos, key_sin = (z[: q.shape[2]] for z in inputs.rotation)
            q = apply_rotary(q, query_cos, query_sin)
            k = apply_rotary(k, key_cos, key_sin)
        if self.offset_keys:
            k = self._offset_keys(k, inputs.starts)
        out = attend(q, k, v, inputs.mask).transpose(1, 2)  # [B, T, H, head_dim]
        out = out.reshape(rows, length, self.heads, self.head_dim)
        if config.attention_gate:
            out = out * _gate(self.output_gate, x)[..., None]
        return self.o_proj(out.flatten(2)), own_value

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        per_head = (*x.shape[:2], self.heads, self.head_dim)
        if self.config.merged_qkv:
            qkv = F.linear(x, self.qkv_weight.flatten(0, 1), self.qkv_bias)  # [B, T, 3 * width]
            return tuple(z.view(per_head) for z in qkv.chunk(3, dim=-1))
        return tuple(proj(x).view(per_head) for proj in (self.q_proj, self.k_proj, self.v_proj))

    def _offset_keys(self, k: Tensor, starts: Tensor) -> Tensor:
        """Take the unrotated channels of k [B, H, T, head_dim] from the token before (record 49).

        A document's first token keeps its own.
        """
        half = self.head_dim // 2
        rotated = round(half * self.config.rope_fraction)
        unrotated = torch.arange(self.head_dim, device=k.device) % half >= rotated
        previous = F.pad(k[:, :, :-1], (0, 0, 1, 0))
        return torch.where(unrotated & ~starts[:, None, :, None], previous, k)


class MLP(nn.Module):
    """Feed-forward network with GELU (tanh form) or squared ReLU (arXiv:2109.08668)."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.activation = config.activation
        width = config.mlp_size
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.biases)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.up_proj(x), self.activation))


class Block(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward; each adds to the residual stream."""

    def __init__(self, config: "GPTConfig", layer: int):
        super().__init__()
        self.attn = self.mlp = None
        if config.embedding_skips:
            self.residual_weights = nn.Parameter(torch.empty(2))  # of x and of x0
        if config.bigram_vocab_size:
            self.bigram_weight = nn.Parameter(torch.empty(1))
        if layer not in config.layers_without_attention:
            self.attn_norm = make_norm(config)
            self.attn = Attention(config, layer)
        if layer not in config.layers_without_mlp:
            self.mlp_norm = make_norm(config)
            self.mlp = _feed_forward(config, layer)
        self.embedding_skips = config.embedding_skips
        self.returns_values = config.value_residual and layer == config.first_attention_layer

    def forward(
        self, x: Tensor, inputs: BlockInputs
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """Return hidden states [B, T, D]; from the layer whose values later layers mix in,
        attention's values [B, T, H, head_dim]; with experts, the router's stats.
        """
        value = stats = None
        if self.embedding_skips:
            x = self.residual_weights[0] * x + self.residual_weights[1] * inputs.x0
        if inputs.bigram is not None:
            x = x + self.bigram_weight * inputs.bigram
        if self.attn is not None:
            out, value = self.attn(self.attn_norm(x), inputs)
            x = x + out
        if self.mlp is not None:
            normed = self.mlp_norm(x)
            if isinstance(self.mlp, MoE):
                out, stats = self.mlp(normed, inputs.noise_keys, inputs.trained)
            else:
                out = self.mlp(normed)
            x = x + out
        # Copied: FSDP2 does not support views as outputs.
        value = value.clone() if value is not None and self.returns_values else None
        return x, value, stats


def _feed_forward(config: "GPTConfig", layer: int) -> MLP | MoE:
    if config.kind == "dense":
        return MLP(config)
    moe, size = config.moe, config.moe.size(config.mlp_size)
    return MoE(moe, config.hidden_size, size, config.activation, layer)


class Smear(nn.Module):
    """Add a gated part of the previous token's embedding (record 34)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(GATE_WIDTH, 1, bias=False)
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [B, T, D]; starts [B, T] marks the first tokens of documents, which stay unchanged."""
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        scale = self.weight * _gate(self.gate, x)
        return x + scale.masked_fill(starts[..., None], 0) * previous


class BigramEmbedding(nn.Module):
    """Embedding of the hash of the current and the previous token (record 62).

    The last row belongs to a document's first token. signs: multiply a row by one of SIGN_ROWS
    fixed vectors of +1 and -1, chosen by both tokens, so that bigrams that share a row differ
    (record 83).
    """

    signs: Tensor | None

    def __init__(self, rows: int, width: int, signs: bool):
        super().__init__()
        self.table = nn.Embedding(rows, width)
        table = None
        if signs:
            generator = torch.Generator().manual_seed(0)
            bits = torch.randint(2, (SIGN_ROWS, width), generator=generator, device="cpu")
            table = (2 * bits - 1).to(torch.int8)
        self.register_buffer("signs", table, persistent=False)

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Return embeddings [B, T, D] of tokens [B, T]."""
        previous = F.pad(tokens[:, :-1], (1, 0))
        rows = self.table.num_embeddings - 1
        hashes = ((36313 * tokens) ^ (27191 * previous)) % rows
        x = self.table(hashes.masked_fill(starts, rows))
        if self.signs is None:
            return x
        return x * self.signs[(tokens ^ previous).masked_fill(starts, 0) % SIGN_ROWS]


def _gate(gate: nn.Linear, x: Tensor) -> Tensor:
    """Return the gate's values in (0, 1) from the first channels of x."""
    return torch.sigmoid(gate(x[..., :GATE_WIDTH]))


def document_starts(tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
    """Mark the first token of each row and of each document: bool [B, T]."""
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    if doc_ids is not None:
        changes = doc_ids[:, 1:] != doc_ids[:, :-1]
        starts[:, 1:] = changes.to(tokens.device, non_blocking=tokens.is_cuda)
    starts[:, 0] = True
    return starts


def next_targets(targets: Tensor, doc_ids: Tensor | None, count: int) -> Tensor:
    """Stack the targets [B, T] of the next `count` tokens: [B, T, count].

    IGNORE beyond the row, and where the predicted token's predecessor is in another document.
    """
    columns = [targets]
    for shift in range(1, count):
        later = F.pad(targets[:, shift:], (0, min(shift, targets.shape[1])), value=IGNORE)
        if doc_ids is not None:
            changed = (doc_ids[:, shift:] != doc_ids[:, :-shift]).to(targets.device)
            later[:, : changed.shape[1]].masked_fill_(changed, IGNORE)
        columns.append(later)
    return torch.stack(columns, -1)
