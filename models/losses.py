"""The loss head: per-token negative log-likelihood and logsumexp, computed in chunks of tokens.

Only one chunk's logits exist at a time, forward and backward. The backward pass recomputes them
from the saved logsumexp. This costs one more head matmul (about 2 % of a 1.1B step) and saves
4 bytes * tokens * vocab.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_KEPT_LOGITS = 2**24  # logits kept until backward: 32 MB in bf16, and as much for the gradient
IGNORE = -100  # target without a loss; the value of torch and transformers


class TokenLosses(NamedTuple):
    """Losses per token, in fp32; 0 where the target is IGNORE."""

    nll: Tensor  # [B, T] negative log-likelihood, in nats
    logsumexp: Tensor  # [B, T] log of the softmax normaliser; the z-loss keeps it near 0


def _forward(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return nll and logsumexp [chunk]. torch.compile fuses the fp32 cast into the reads."""
    logits = F.linear(h, weight).float()  # [chunk, V]
    lse = logits.logsumexp(-1)
    return lse - logits.gather(1, target[:, None]).squeeze(1), lse


def _backward(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    grad_nll_rows: Tensor,
    grad_lse_rows: Tensor,
) -> Tensor:
    """Return the gradient of one chunk's logits, in the weight's dtype.

    d nll = softmax - onehot, d logsumexp = softmax.
    """
    probs = F.linear(h, weight).float().sub_(lse[:, None]).exp_()
    grad = probs.mul_((grad_nll_rows + grad_lse_rows)[:, None])
    if torch.compiler.is_compiling():  # scatter_add_ would write the fp32 logits to memory
        is_target = torch.arange(grad.shape[1], device=grad.device) == target[:, None]
        grad = torch.where(is_target, grad - grad_nll_rows[:, None], grad)
    else:
        grad.scatter_add_(1, target[:, None], -grad_nll_rows[:, None])
    return grad.to(weight.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use: loading torch.compile takes seconds."""
    return torch.compile(function, fullgraph=True)


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)  # [B, T]
        lse = torch.empty_like(nll)
        flat_nll, flat_lse = nll.view(-1), lse.view(-1)
        losses = _compiled(_forward) if compiled else _forward
        for rows, h, target, valid in _chunks(hidden, targets, chunk):
            chunk_nll, flat_lse[rows] = losses(h, weight, target)
            flat_nll[rows] = chunk_nll * valid
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk, ctx.compiled = chunk, compiled
        return nll, lse * (targets != IGNORE)

    @staticmethod
    def backward(
        ctx: Any, grad_nll: Tensor, grad_lse: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_nll, grad_lse, lse = grad_nll.flatten(), grad_lse.flatten(), lse.view(-1)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        flat_grad_hidden = grad_hidden.view(-1, hidden.shape[-1])
        # The sum over chunks is fp32 for bf16 weights too.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gradient = _compiled(_backward) if ctx.compiled else _backward
        for rows, h, target, valid in _chunks(hidden, targets, ctx.chunk):
            grad_logits = gradient(
                h, weight, target, lse[rows], grad_nll[rows] * valid, grad_lse[rows] * valid
            )
            flat_grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


class _KeptTokenLoss(torch.autograd.Function):
    """The losses of few tokens: keeps all logits, in the hidden states' dtype, until backward.

    On a CPU this is a third faster: no recomputation, and one product for the weight's gradient.
    Logits are read in pieces that fit the CPU cache.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden.flatten(0, 1), weight)  # [B * T, V]
        nll = torch.empty(len(logits), dtype=torch.float32, device=hidden.device)
        target = targets.flatten().clamp_min(0)[:, None]
        for rows in _pieces(logits):
            nll[rows] = -logits[rows].float().log_softmax(-1).gather(1, target[rows]).squeeze(1)
        lse = nll + logits.gather(1, target).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, logits)
        valid = targets != IGNORE
        return nll.view_as(targets) * valid, lse.view_as(targets) * valid

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, logits = ctx.saved_tensors
        target = targets.flatten().clamp_min(0)[:, None]  # [B * T, 1], as all columns below
        valid = (targets != IGNORE).flatten()[:, None]
        grad_nll = grad_nll.flatten()[:, None] * valid
        grad_lse = grad_lse.flatten()[:, None] * valid
        gradient = torch.empty_like(logits)
        for rows in _pieces(logits):
            probs = logits[rows].float().softmax(-1).mul_(grad_nll[rows] + grad_lse[rows])
            gradient[rows] = probs.scatter_add_(1, target[rows], -grad_nll[rows])
        return (gradient @ weight).view_as(hidden), gradient.T @ hidden.flatten(0, 1), None


def _pieces(logits: Tensor) -> list[slice]:
    """Split rows into slices of about 1 MB in fp32."""
    size = max(1, 2**18 // logits.shape[1])
    return [slice(begin, begin + size) for begin in range(0, len(logits), size)]


def _chunks(
    hidden: Tensor, targets: Tensor, size: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield chunks of `size` tokens: slice, hidden states, targets (0 for IGNORE), valid mask."""
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    for begin in range(0, len(flat_targets), size):
        rows = slice(begin, begin + size)
        yield rows, flat_hidden[rows], flat_targets[rows].clamp_min(0), flat_targets[rows] != IGNORE


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> TokenLosses:
    """Losses of `softmax(hidden @ weight.T)` for `targets`, differentiable in hidden and weight.

    hidden [B, T, D] and weight [V, D] share a dtype; targets [B, T] int64, IGNORE without a loss.
    chunk: tokens whose logits exist at once. Default: 4096 on a GPU; on a CPU all tokens up to
    MAX_KEPT_LOGITS logits, else 256. compiled: torch.compile a chunk's computation (default: on a
    GPU).
    """
    cpu = hidden.device.type == "cpu"
    compiled = not cpu if compiled is None else compiled
    if cpu and chunk is None and not compiled and targets.numel() * len(weight) <= MAX_KEPT_LOGITS:
        return TokenLosses(*_KeptTokenLoss.apply(hidden, weight, targets))
    chunk = chunk or (256 if cpu else 4096)
    return TokenLosses(*_ChunkedTokenLoss.apply(hidden, weight, targets, chunk, compiled))


@overload
def compute_loss_with_z_penalty(
    losses: TokenLosses, labels: float
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def compute_loss_with_z_penalty(
    losses: Tensor, labels: Tensor, z_weight: float = ...
) -> Tensor: ...


def compute_loss_with_z_penalty(
    losses: TokenLosses | Tensor, labels: Tensor | float, z_weight: float = 1e-4
) -> tuple[Tensor, dict[str, Tensor]] | Tensor:
    """Cross-entropy plus `z_weight * logsumexp^2` (PaLM, arXiv:2204.02311, section 5). Two forms:

    (losses, z_weight), the form of training: returns the sum over tokens and its two terms. Divide
    by the number of unmasked targets of the *whole* step (all micro-batches, all ranks); a mean of
    means is a different loss. The terms are detached sums: "loss" in nats, "z_loss" already
    weighted. Ignored tokens add nothing.

    (logits, labels): returns the mean over labels that are not IGNORE. logits [..., V], labels
    [...] int64. labels[i] is the token that logits[i] predicts. For labels equal to the input, as
    in transformers, pass logits[:, :-1] and labels[:, 1:].
    """
    if isinstance(losses, TokenLosses):
        nll, z = losses.nll.sum(), labels * losses.logsumexp.square().sum()
        return nll + z, {"loss": nll.detach(), "z_loss": z.detach()}
    assert isinstance(labels, Tensor)
    logits, target = losses.flatten(0, -2).float(), labels.flatten()
    nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    z = z_weight * logits.logsumexp(-1).mul(target != IGNORE).square().sum()
    return (nll + z) / (target != IGNORE).sum().clamp_min(1)
