"""A key-value cache, and the model's forward pass over it.

The layers are written out again here over the model's weights, so that the training forward pass
needs no cache argument.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.packed_weights import LayerOps, LinearOps, linear_ops
from models.layers import RMSNorm, apply_rotary
from models.nanollama import GroupedQueryAttention, ModelConfig, NanoLlama


class Cache:
    """Keys and values of `batch` rows, `length` slots each; slot n of a row holds position n.

    keys, values: one tensor [batch, key-value heads, length, head_dim] per layer. lengths: tokens
    cached in each row. Later slots are never attended to, so lowering a length truncates the row.

    A shared prefix is computed once and continued by many rows:

        cache = Cache(model.config, 1, 900)
        forward(model, prefix[None], cache)               # prefix [800]
        rows = cache.expand(64)                           # 64 copies of the 800 tokens
        hidden = forward(model, tokens, rows, lengths)    # tokens [64, T], padded on the right
        nll = token_losses(hidden, model.head_weight, targets).nll  # targets: -100 for padding
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """Allocate an empty cache. ValueError if `length` exceeds the model's context."""
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the model's context of {config.max_position_embeddings}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        shape = (batch, config.num_key_value_heads, length, config.resolved_head_dim)

        def allocate() -> list[Tensor]:
            layers = range(config.num_hidden_layers)
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

        self.config, self.length = config, length
        self.keys, self.values = allocate(), allocate()
        self.lengths = [0] * batch
        self.graph: _CudaGraph | None = None  # decode_compiled's graph for this cache

    def select(self, rows: Sequence[int], length: int | None = None) -> "Cache":
        """Copy rows, in the given order and with repeats, to a new cache of `length` slots."""
        first = self.keys[0]
        new = Cache(self.config, len(rows), length or self.length, first.device, first.dtype)
        new.lengths = [self.lengths[row] for row in rows]
        longest = max(new.lengths, default=0)
        if longest > new.length:
            raise ValueError(
                f"a cache of length {new.length} is too short for rows of {longest} tokens; "
                "raise its length"
            )
        index = torch.tensor(rows, dtype=torch.int64, device=first.device)
        for source, copy in zip(self.keys + self.values, new.keys + new.values, strict=True):
            copy[:, :, :longest] = source[index, :, :longest]
        return new

    def expand(self, rows: int, length: int | None = None) -> "Cache":
        """Copy the only row `rows` times to a new cache of `length` slots."""
        if len(self.lengths) != 1:
            raise ValueError(
                f"expand needs a cache of one row, this one has {len(self.lengths)}; use select"
            )
        return self.select([0] * rows, length)


@torch.no_grad()
def forward(
    model: NanoLlama,
    tokens: Tensor,
    cache: Cache,
    lengths: Sequence[int] | None = None,
    ops: LinearOps | None = None,
) -> Tensor:
    """Append tokens [B, T] to the cache's rows; return the final hidden states [B, T, D].

    lengths: valid tokens of each row; the rest is right padding with any token ids (default: all
    are valid). Padding is not cached or attended to, and its hidden states are meaningless.
    ops: the model's matrix products in another layout (default: its own weights).
    ValueError if the cache is too short.
    """
    rows, length = tokens.shape
    starts = cache.lengths
    end = max(starts) + length
    if rows != len(starts):
        raise ValueError(f"{rows} rows of tokens do not fit a cache of {len(starts)} rows")
    if end > cache.length:
        raise ValueError(
            f"the cache has room for {cache.length} tokens, not for {end}; raise its length"
        )
    device = tokens.device
    aligned = min(starts) == max(starts)
    first = torch.tensor(starts[:1] if aligned else starts, device=device)
    positions = first[:, None] + torch.arange(length, device=device)  # [1 or B, T]
    mask = None
    if end > length and not (aligned and length == 1):
        # [1 or B, 1, T, end]
        mask = torch.arange(end, device=device) <= positions[:, None, :, None]
    counts = [length] * rows if lengths is None else [int(count) for count in lengths]
    valid = None
    if min(counts) < length:
        is_valid = torch.arange(length) < torch.tensor(counts)[:, None]  # [B, T]
        valid = is_valid.flatten().nonzero()[:, 0].to(device)
    x = _trunk(model, ops or linear_ops(model), tokens, cache, positions, mask, end, valid)
    cache.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    return x


@torch.no_grad()
def logits(model: NanoLlama, hidden: Tensor) -> Tensor:
    """Return logits [..., V] of hidden states [..., D], in the model's dtype."""
    return F.linear(hidden, model.head_weight)


def _trunk(
    model: NanoLlama,
    ops: LinearOps,
    tokens: Tensor,
    cache: Cache,
    positions: Tensor,
    mask: Tensor | None,
    end: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Return hidden states [B, T, D] of tokens at positions [1 or B, T]; attend to `end` slots.

    mask [1 or B, 1, T, end]; None: causal over an empty cache, or one token that sees all slots.
    valid [N]: indices of the non-padding tokens among the B * T; padding enters attention only.
    """
    rows, kv_heads = tokens.shape[0], model.config.num_key_value_heads
    row_starts = torch.arange(rows * kv_heads, device=tokens.device) * cache.length
    # Indices into the cache viewed as [B * kv_heads * length, head_dim]
    slots = (row_starts.view(rows, kv_heads, 1) + positions[:, None, :]).flatten()
    # Two of [1 or B, T, 1, head_dim]
    rotary = model.rotary.cos[positions][:, :, None], model.rotary.sin[positions][:, :, None]
    if mask is not None:  # one copy for each query head of a group
        mask = mask.repeat(1, 1, model.config.num_attention_heads // kv_heads, 1)
    # Flat rows [B * T or N, D] make every product a plain matrix product.
    x = model.embed_tokens(tokens.flatten() if valid is None else tokens.flatten()[valid])
    layers: list[Any] = list(model.layers)
    for layer, layer_ops, keys, values in zip(
        layers, ops.layers, cache.keys, cache.values, strict=True
    ):
        normed = _rms_norm(layer.input_layernorm, x)
        x = x + _attention(
            layer.self_attn, layer_ops, normed, rotary, keys, values, slots, mask, end, valid
        )
        normed = _rms_norm(layer.post_attention_layernorm, x)
        x = x + layer_ops.feed_forward(normed)
    return _scatter(_rms_norm(model.norm, x), valid, tokens.numel()).view(*tokens.shape, -1)


def _rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """Apply RMSNorm in fewer operations, equal up to fp32 rounding; twice as fast on a CPU."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (size * size).mul_(1 / x.shape[-1]).add_(norm.eps).rsqrt_()
    return norm.weight * (x * scale).to(x.dtype)


def _scatter(x: Tensor, index: Tensor | None, size: int) -> Tensor:
    """Place rows [N, ...] at their indices of [size, ...]; other rows are 0."""
    return x if index is None else x.new_zeros(size, *x.shape[1:]).index_copy_(0, index, x)


def _attention(
    attention: GroupedQueryAttention,
    ops: LayerOps,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    end: int,
    valid: Tensor | None,
) -> Tensor:
    """Run GroupedQueryAttention over a cache, for x [B * T, D] or its `valid` rows [N, D].

    The query heads that share a key head form one matrix: keys and values are read once and never
    copied. scaled_dot_product_attention(enable_gqa=True) takes 3 to 6 times as long for one bf16
    token on a CPU.
    """
    head_dim, rows, kv_heads = attention.head_dim, keys.shape[0], keys.shape[1]
    length = slots.shape[0] // (rows * kv_heads)
    qkv = _scatter(ops.qkv(x), valid, rows * length).view(rows, length, -1, head_dim)
    qk, v = qkv.split((qkv.shape[2] - kv_heads, kv_heads), dim=2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = qk.split((qk.shape[2] - kv_heads, kv_heads), dim=2)
        qk = torch.cat((_rms_norm(attention.q_norm, q), _rms_norm(attention.k_norm, k)), dim=2)
    qk = apply_rotary(qk, *rotary).transpose(1, 2)  # [B, heads, T, head_dim]
    q, k = qk.split((qk.shape[1] - kv_heads, kv_heads), dim=1)
    v = v.transpose(1, 2)
    keys.view(-1, head_dim).index_copy_(0, slots, k.reshape(-1, head_dim))
    values.view(-1, head_dim).index_copy_(0, slots, v.reshape(-1, head_dim))
    group = q.shape[1] // kv_heads
    if mask is None and length > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        grouped = q.reshape(rows, -1, group * length, head_dim)  # [B, kv_heads, group * T, ...]
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask
        )
        out = out.reshape(q.shape)
    out = out.transpose(1, 2).reshape(rows * length, -1)
    return ops.out(out if valid is None else out[valid])


def _decode(model: NanoLlama, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Return logits [B, V] after one token [B, 1] per row. Shapes are equal from step to step."""
    mask = torch.arange(cache.length, device=tokens.device) <= positions[:, None, :, None]
    ops = linear_ops(model)
    return ops.head(_trunk(model, ops, tokens, cache, positions, mask, cache.length)[:, 0])


@functools.cache
def _compiled_decode() -> Callable[[NanoLlama, Tensor, Tensor, Cache], Tensor]:
    return torch.compile(_decode, fullgraph=True, dynamic=False)


@torch.no_grad()
def decode_compiled(model: NanoLlama, tokens: Tensor, cache: Cache) -> Tensor:
    """Append one token [B] to each row with a compiled step; return logits [B, V].

    On a GPU the step is a CUDA graph that belongs to the cache, and the next call overwrites the
    returned tensor.
    """
    if max(cache.lengths) == cache.length:
        raise ValueError(
            f"the cache has room for {cache.length} tokens, not for one more; raise its length"
        )
    positions = torch.tensor(cache.lengths, device=tokens.device)[:, None]
    # Expert matmuls may copy expert counts to the host, which a CUDA graph cannot capture.
    if tokens.device.type != "cuda" or model.config.kind == "moe":
        scores = _compiled_decode()(model, tokens[:, None], positions, cache)
    else:
        if cache.graph is None:
            cache.graph = _CudaGraph(model, tokens[:, None].clone(), positions, cache)
        scores = cache.graph(tokens, positions)
    cache.lengths = [length + 1 for length in cache.lengths]
    return scores


class _CudaGraph:
    """`_decode` as one CUDA graph with fixed input and output tensors."""

    def __init__(self, model: NanoLlama, tokens: Tensor, positions: Tensor, cache: Cache):
        self.tokens, self.positions = tokens, positions
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):  # running a step again writes the same keys and values
            for _ in range(3):
                _compiled_decode()(model, tokens, positions, cache)
        torch.cuda.current_stream().wait_stream(warmup)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.scores = _compiled_decode()(model, tokens, positions, cache)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions)
        self.graph.replay()
        return self.scores
