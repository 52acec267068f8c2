"""A key-value cache and text generation on it.

The trunk is written out a second time here, over the model's own leaves, so that training's forward knows of no cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers import apply_rotary
from models.nanollama import GroupedQueryAttention, ModelConfig, NanoLlama


class Cache:
    """Keys and values of `batch` rows with room for `length` tokens each; slot n of a row holds its token at position n.

    keys, values: one tensor [batch, key-value heads, length, head_dim] per layer. lengths: how many tokens of each row
    are held; what lies in later slots is never attended to, and setting a length back forgets what came after it.

    A shared prefix is computed once and continued by many rows:

        cache = Cache(model.config, 1, 900)
        forward(model, prefix[None], cache)                         # prefix [800]
        rows = cache.expand(64)                                     # 64 copies, at 800 tokens each
        hidden = forward(model, tokens, rows, lengths)              # tokens [64, T], padded on the right to T
        nll = token_losses(hidden, head(model), targets).nll        # models/losses.py; targets -100 where padding
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """Empty, of the model's dtype. ValueError where `length` exceeds the model's context."""
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens exceed the model's context of {config.max_position_embeddings}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        shape = (batch, config.num_key_value_heads, length, config.heads_size)
        self.config, self.length = config, length
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * batch

    def select(self, rows: Sequence[int], length: int | None = None) -> "Cache":
        """A new cache of these rows, in this order, repeated where named twice; with room for `length` tokens if given."""
        first = self.keys[0]
        new = Cache(self.config, len(rows), self.length if length is None else length, first.device, first.dtype)
        new.lengths = [self.lengths[row] for row in rows]
        held = max(new.lengths, default=0)
        if held > new.length:
            raise ValueError(f"a cache for {new.length} tokens cannot take rows of {held}; give it more length")
        index = torch.tensor(rows, dtype=torch.int64, device=first.device)
        for old, copy in zip(self.keys + self.values, new.keys + new.values, strict=True):
            copy[:, :, :held] = old[index, :, :held]
        return new

    def expand(self, rows: int, length: int | None = None) -> "Cache":
        """A new cache of `rows` copies of the only row, with room for `length` tokens if given."""
        if len(self.lengths) != 1:
            raise ValueError(f"only a cache of one row expands, this one has {len(self.lengths)}; use select")
        return self.select([0] * rows, length)


@torch.no_grad()
def forward(model: NanoLlama, tokens: Tensor, cache: Cache, lengths: Sequence[int] | None = None) -> Tensor:
    """Continue every row of the cache by its tokens [B, T]; returns the normed hidden states [B, T, D] for `logits`.

    lengths: how many of the T tokens of each row count, the rest being padding on the right, of any value in the
    vocabulary (default: all). The cache then holds that many more. Padding is not attended to; its own output is void.
    ValueError where the longest row of the cache has no room for T more.
    """
    rows, length = tokens.shape
    starts = cache.lengths
    end = max(starts) + length
    if rows != len(starts):
        raise ValueError(f"{rows} rows of tokens do not fit a cache of {len(starts)} rows")
    if end > cache.length:
        raise ValueError(f"the cache has room for {cache.length} tokens, not for {end}; make it longer")
    even = min(starts) == max(starts)
    first = torch.tensor(starts[:1] if even else starts, device=tokens.device)
    positions = first[:, None] + torch.arange(length, device=tokens.device)  # [1 or B, T]
    mask = None
    if end > length and not (even and length == 1):
        mask = torch.arange(end, device=tokens.device) <= positions[:, None, :, None]  # [1 or B, 1, T, end]
    x = _trunk(model, tokens, cache, positions, mask, end)
    counts = [length] * rows if lengths is None else [int(count) for count in lengths]
    cache.lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    return x


def head(model: NanoLlama) -> Tensor:
    """The matrix [V, D] that makes logits of hidden states."""
    return model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


@torch.no_grad()
def logits(model: NanoLlama, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], in the model's dtype."""
    return F.linear(hidden, head(model))


def _trunk(model: NanoLlama, tokens: Tensor, cache: Cache, positions: Tensor, mask: Tensor | None, end: int) -> Tensor:
    """Hidden states [B, T, D]. positions [1 or B, T] are where the tokens go; `end` slots are looked at, by mask.

    mask [1 or B, 1, T, end] is None where it is causal from an empty cache, or where T is 1 and all slots count.
    """
    rows, heads = tokens.shape[0], model.config.num_key_value_heads
    lines = torch.arange(rows * heads, device=tokens.device).view(rows, heads, 1) * cache.length
    slots = (lines + positions[:, None, :]).flatten()  # of the cache as [B * heads * slots, head_dim]
    cos, sin = model.rotary.cos[positions][:, None], model.rotary.sin[positions][:, None]  # [1 or B, 1, T, head_dim]
    if mask is not None:
        mask = mask.repeat(1, 1, model.config.num_attention_heads // heads, 1)  # for the queries of a group in one matrix
    x = model.embed_tokens(tokens)
    layers: list[Any] = list(model.layers)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        x = x + _attention(layer.self_attn, layer.input_layernorm(x), cos, sin, keys, values, slots, mask, end)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)


def _attention(
    attention: GroupedQueryAttention,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    end: int,
) -> Tensor:
    """GroupedQueryAttention.forward over a cache.

    The query heads that share a key head are rows of one matrix, so that keys and values are read once and never copied;
    scaled_dot_product_attention(enable_gqa=True) takes 3 to 6 times as long for one token in bf16 on a CPU.
    """
    rows, length, size = x.shape[0], x.shape[1], attention.head_dim
    q, k, v = (proj(x).view(rows, length, -1, size) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = apply_rotary(q.transpose(1, 2), cos, sin), apply_rotary(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
    keys.view(-1, size).index_copy_(0, slots, k.reshape(-1, size))
    values.view(-1, size).index_copy_(0, slots, v.reshape(-1, size))
    group = q.shape[1] // k.shape[1]
    if mask is None and length > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        grouped = q.reshape(rows, -1, group * length, size)  # [B, key-value heads, group * T, head_dim]
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        out = out.reshape(q.shape)
    return attention.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
