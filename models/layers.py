"""Leaves that every model shares: norm and rotary embedding."""

import torch
from torch import Tensor, nn


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
