"""Causal attention for CPUs: batched matrix products over blocks of queries, forward and backward.

The probabilities stay in memory until backward. torch's fused kernel reaches about an eighth of a
core's bf16 peak for rows of 256 tokens; oneDNN's batched products reach most of it.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries per block; a block's scores cover the keys up to its last query
# Limit on rows * length^2 * width. 2**30 keeps 32 MB of bf16 probabilities a layer for head_dim 64.
MAX_PROBABILITIES = 2**30


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Compute softmax attention with grouped heads in blocks of queries.

    q [B, H, T, head_dim]; k and v [B, K, T, head_dim], H a multiple of K. bias [B or 1, T, T], in
    q's dtype, is added to the scores: 0 where a token may attend, else -inf. It must be causal.
    """
    return _BlockedAttention.apply(q, k, v, bias)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        (rows, heads, length, head_dim), kv_heads = q.shape, k.shape[1]
        queries_per_key = heads // kv_heads
        ctx.shapes = q.shape, k.shape
        q, k, v = (_fold(x, kv_heads) for x in (q, k, v))
        out, probs = [], []
        for begin, end in _blocks(length):
            block = slice(begin * queries_per_key, end * queries_per_key)
            block_bias = bias[:, None, begin:end, None, :end]
            block_bias = block_bias.expand(rows, kv_heads, -1, queries_per_key, -1)
            # clone, because the next line writes in place and reshape may return a view
            scores = block_bias.clone(memory_format=torch.contiguous_format)
            scores = scores.view(rows * kv_heads, -1, end)
            scores.baddbmm_(q[:, block], k[:, :end].mT, alpha=head_dim**-0.5)
            probs.append(scores.softmax(-1))
            out.append(probs[-1] @ v[:, :end])
        ctx.save_for_backward(q, k, v, *probs)
        return _unfold(torch.cat(out, 1), *ctx.shapes[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probs = ctx.saved_tensors
        (_, heads, length, head_dim), kv_heads = ctx.shapes[0], ctx.shapes[1][1]
        queries_per_key = heads // kv_heads
        grad = _fold(grad, kv_heads)
        grad_q = []
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        for (begin, end), p in zip(_blocks(length), probs, strict=True):
            block = slice(begin * queries_per_key, end * queries_per_key)
            grad_v[:, :end] += p.mT @ grad[:, block]
            grad_p = grad[:, block] @ v[:, :end].mT
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_k[:, :end] += grad_scores.mT @ q[:, block]
            grad_q.append(grad_scores @ k[:, :end])
        scale = head_dim**-0.5
        return (
            _unfold(torch.cat(grad_q, 1).mul_(scale), *ctx.shapes[0]),
            _unfold(grad_k.mul_(scale).to(k.dtype), *ctx.shapes[1]),
            _unfold(grad_v.to(v.dtype), *ctx.shapes[1]),
            None,
        )


def _blocks(length: int) -> list[tuple[int, int]]:
    """Return (begin, end) of each block of queries."""
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, head_dim] -> [B * K, T * H / K, head_dim]; queries of one key are adjacent."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _unfold(x: Tensor, rows: int, heads: int, length: int, head_dim: int) -> Tensor:
    """Undo _fold: [B, H, T, head_dim], in memory [B, T, H, head_dim] for the output projection."""
    x = x.view(rows, -1, length, heads * rows // len(x), head_dim)  # [B, K, T, H / K, head_dim]
    return x.transpose(1, 2).reshape(rows, length, heads, head_dim).transpose(1, 2)
