"""Leaves that every model shares: norm, rotary embedding, attention kernel and its document mask."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask | None


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): statistics in fp32, output in the input's dtype, as transformers does it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for rotary positions (arXiv:2104.09864), rotate-half layout as in Hugging Face Llama.

    The tables are fp32 whatever the model's dtype, and are no part of the state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, positions: int, theta: float):
        super().__init__()
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, head_dim), persistent=False)
        self.set_theta(theta)

    def set_theta(self, theta: float) -> None:
        """Fill the tables in place, with values that are computed on the CPU: the same on every device."""
        positions, head_dim = self.cos.shape
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, head_dim] by position, in fp32; cos and sin are [T, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def document_mask(docs: Tensor | None, block: bool | None = None) -> Mask:
    """What a token may attend to: earlier tokens of its own document. docs [B, T] numbers the document of each token.

    None stands for plain causal attention. On a CPU the mask is a bool tensor [B, 1, T, T]; elsewhere (or with
    block=True) a FlexAttention BlockMask, which skips whole blocks between documents.
    """
    if docs is None:
        return None
    rows, length = docs.shape
    if block if block is not None else docs.device.type != "cpu":

        def same_document(b, h, q, k):
            return (q >= k) & (docs[b, q] == docs[b, k])

        create = create_block_mask if docs.device.type == "cpu" else _compiled(create_block_mask)  # eager builds T x T
        return create(same_document, rows, None, length, length, device=docs.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=docs.device).tril()
    return ((docs[:, :, None] == docs[:, None, :]) & causal)[:, None]


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False)  # not at import: torch.compile takes seconds to load


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention with grouped heads: q [B, H, T, head_dim], k and v [B, K, T, head_dim], H a multiple of K."""
    if isinstance(mask, BlockMask):
        eager = torch.compiler.is_compiling() or q.device.type == "cpu"  # a compiled caller compiles it with itself
        flex = flex_attention if eager else _compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
