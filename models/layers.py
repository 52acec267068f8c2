"""Layers that every model shares: RMSNorm and rotary position embedding."""

import torch
from torch import Tensor, nn

from models.rope import RopeScaling


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv:1910.07467).

    Statistics are computed in fp32 and the output has the input's dtype, as in transformers.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_norm(x, self.eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension of x by its root mean square, in fp32."""
    x_fp32 = x.float()
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables for rotary positions (arXiv:2104.09864), which YaRN may scale.

    The layout is the rotate-half layout of Hugging Face Llama. The tables are fp32 whatever the
    model's dtype, and the state dict leaves them out.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, positions: int, theta: float, scaling: RopeScaling | None = None
    ):
        super().__init__()
        self.scaling = scaling
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, head_dim), persistent=False)
        self.set_theta(theta)

    def set_theta(self, theta: float) -> None:
        """Refill the tables in place, with frequencies theta^(-2i / head_dim), then scaled."""
        head_dim = self.cos.shape[1]
        if self.scaling is not None:
            frequencies = self.scaling.frequencies(head_dim, theta)
            self.set_frequencies(frequencies, self.scaling.rotation_scale)
        else:
            self.set_frequencies(
                theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
            )

    def set_frequencies(self, frequencies: Tensor, scale: float = 1.0) -> None:
        """Refill the tables in place, with radians per position, fp32 [head_dim / 2].

        scale: factor of cosine and sine. Values are computed on the CPU: equal on every device.
        """
        positions = torch.arange(len(self.cos), dtype=torch.float32, device=frequencies.device)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        self.cos.copy_(angles.cos() * scale)
        self.sin.copy_(angles.sin() * scale)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [length, head_dim] of positions 0 to length - 1."""
        return self.cos[:length], self.sin[:length]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, head_dim] by its positions, in fp32. cos and sin are [T, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def default_head_dim(hidden_size: int, heads: int) -> int:
    """Return hidden_size / heads; ValueError if it is not a whole number."""
    if hidden_size % heads:
        raise ValueError(
            f"model.hidden_size={hidden_size} does not divide into {heads} heads; "
            "change one of them or set model.head_dim"
        )
    return hidden_size // heads
