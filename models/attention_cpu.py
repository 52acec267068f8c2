"""Causal attention for a CPU as plain products over blocks of queries, backward too, for rows whose probabilities fit in memory.

torch's fused kernel computes at about an eighth of a core's bf16 peak for rows of 256; oneDNN's batched products at most of it.
"""

import torch
from torch import Tensor

BLOCK = 128  # queries whose scores are made at once, over the keys up to the last of them
MAX_PROBABILITIES = (
    2**30
)  # rows * length^2 * width of which the probabilities are kept: 32 MB a layer in bf16, for heads of 64


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """Softmax attention with grouped heads: q [B, H, T, head_dim], k and v [B, K, T, head_dim], H a multiple of K.

    added [B or 1, T, T], in q's dtype, is 0 where a token may look and -inf elsewhere, which all later tokens must be.
    """
    return _Blocked.apply(q, k, v, added)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        (rows, heads, length, size), groups = q.shape, k.shape[1]
        each = heads // groups
        ctx.shapes = q.shape, k.shape
        q, k, v = (_fold(x, groups) for x in (q, k, v))
        out, probs = [], []
        for begin, end in _blocks(length):
            part = slice(begin * each, end * each)
            bias = added[:, None, begin:end, None, :end].expand(rows, groups, -1, each, -1)
            scores = bias.clone(memory_format=torch.contiguous_format).view(
                rows * groups, -1, end
            )  # reshape may give a view
            scores.baddbmm_(q[:, part], k[:, :end].mT, alpha=size**-0.5)
            probs.append(scores.softmax(-1))
            out.append(probs[-1] @ v[:, :end])
        ctx.save_for_backward(q, k, v, *probs)
        return _unfold(torch.cat(out, 1), *ctx.shapes[0])

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *probs = ctx.saved_tensors
        (_, heads, length, size), groups = ctx.shapes[0], ctx.shapes[1][1]
        each, grad = heads // groups, _fold(grad, groups)
        of_q, of_k, of_v = (
            [],
            torch.zeros_like(k, dtype=torch.float32),
            torch.zeros_like(v, dtype=torch.float32),
        )
        for (begin, end), p in zip(_blocks(length), probs, strict=True):
            part = slice(begin * each, end * each)
            of_v[:, :end] += p.mT @ grad[:, part]
            of_scores = torch._softmax_backward_data(grad[:, part] @ v[:, :end].mT, p, -1, p.dtype)
            of_k[:, :end] += of_scores.mT @ q[:, part]
            of_q.append(of_scores @ k[:, :end])
        of_k *= size**-0.5
        return (
            _unfold(torch.cat(of_q, 1).mul_(size**-0.5), *ctx.shapes[0]),
            *(_unfold(x.to(k.dtype), *ctx.shapes[1]) for x in (of_k, of_v)),
            None,
        )


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]


def _fold(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, head_dim] -> [B * K, T * H / K, head_dim]: query heads that share a key become neighbouring rows."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _unfold(x: Tensor, rows: int, heads: int, length: int, size: int) -> Tensor:
    """Back to [B, H, T, head_dim]; in memory [B, T, H, head_dim], as the projections read it."""
    x = x.view(rows, -1, length, heads * rows // len(x), size).transpose(
        1, 2
    )  # [B, T, K, H / K, head_dim]
    return x.reshape(rows, length, heads, size).transpose(1, 2)
