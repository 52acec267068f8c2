"""The loss head: negative log-likelihood and logsumexp of each token, without ever building [tokens, vocab] logits.

The logits of one chunk of tokens exist at a time, forward and backward; the backward pass computes them again from the
saved logsumexp, which costs one more head matmul (about 2 % of a 1.1B step) and saves 4 bytes * tokens * vocab.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_KEPT_LOGITS = 2**24  # logits; 32 MB in bf16, and their gradient as much again
IGNORE = -100  # a target with this value has no loss; same value as torch and transformers


class TokenLosses(NamedTuple):
    """Per token, fp32, 0 where the target is ignored."""

    nll: Tensor  # [B, T] negative log-likelihood, in nats
    logsumexp: Tensor  # [B, T] log of the softmax normaliser, which z-loss keeps near 0


def _forward(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """nll and logsumexp [chunk] of one chunk. The cast to fp32 is in here: compiled, it is part of what reads the logits."""
    logits = F.linear(h, weight).float()  # [chunk, V]
    normaliser = logits.logsumexp(-1)
    return normaliser - logits.gather(1, target[:, None]).squeeze(1), normaliser


def _backward(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    grad_nll_rows: Tensor,
    grad_lse_rows: Tensor,
) -> Tensor:
    """Gradient of one chunk's logits, in the weight's dtype: d nll = softmax - onehot, d logsumexp = softmax."""
    grad = (
        F.linear(h, weight)
        .float()
        .sub_(lse[:, None])
        .exp_()
        .mul_((grad_nll_rows + grad_lse_rows)[:, None])
    )
    if (
        torch.compiler.is_compiling()
    ):  # the same sum in one pass; scattering would need the fp32 logits in memory
        here = torch.arange(grad.shape[1], device=grad.device) == target[:, None]
        grad = torch.where(here, grad - grad_nll_rows[:, None], grad)
    else:
        grad.scatter_add_(1, target[:, None], -grad_nll_rows[:, None])
    return grad.to(weight.dtype)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(
        function, fullgraph=True
    )  # not at import: torch.compile takes seconds to load


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, compiled: bool):
        nll = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)  # [B, T]
        lse = torch.empty_like(nll)
        flat_nll, flat_lse = nll.view(-1), lse.view(-1)
        losses = _compiled(_forward) if compiled else _forward
        for part, h, target, valid in _chunks(hidden, targets, chunk):
            found, flat_lse[part] = losses(h, weight, target)
            flat_nll[part] = found * valid
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk, ctx.compiled = chunk, compiled
        return nll, lse * (targets != IGNORE)

    @staticmethod
    def backward(ctx, grad_nll: Tensor, grad_lse: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_nll, grad_lse, lse = grad_nll.flatten(), grad_lse.flatten(), lse.view(-1)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        flat_grad_hidden = grad_hidden.view(-1, hidden.shape[-1])
        grad_weight = torch.zeros_like(
            weight, dtype=torch.float32
        )  # summed over chunks in fp32 also for bf16 weights
        gradient = _compiled(_backward) if ctx.compiled else _backward
        for part, h, target, valid in _chunks(hidden, targets, ctx.chunk):
            grad_logits = gradient(
                h, weight, target, lse[part], grad_nll[part] * valid, grad_lse[part] * valid
            )
            flat_grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


class _KeptTokenLoss(torch.autograd.Function):
    """The same for so few tokens that their logits, in the hidden states' dtype, may stay until backward: on a CPU a third
    faster, since they are not computed again and the weight's gradient is one product. Logits are read in pieces for the cache.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor):
        logits = F.linear(hidden.flatten(0, 1), weight)  # [B * T, V]
        nll = torch.empty(len(logits), dtype=torch.float32, device=hidden.device)
        target = targets.flatten().clamp_min(0)[:, None]
        for part in _pieces(logits):
            nll[part] = -logits[part].float().log_softmax(-1).gather(1, target[part]).squeeze(1)
        lse = nll + logits.gather(1, target).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, logits)
        valid = targets != IGNORE
        return nll.view_as(targets) * valid, lse.view_as(targets) * valid

    @staticmethod
    def backward(ctx, grad_nll: Tensor, grad_lse: Tensor):
        hidden, weight, targets, logits = ctx.saved_tensors
        target, valid = (
            targets.flatten().clamp_min(0)[:, None],
            (targets != IGNORE).flatten()[:, None],
        )
        grad_nll_rows, grad_lse_rows = (
            grad_nll.flatten()[:, None] * valid,
            grad_lse.flatten()[:, None] * valid,
        )
        gradient = torch.empty_like(logits)
        for part in _pieces(logits):
            probs = logits[part].float().softmax(-1).mul_(grad_nll_rows[part] + grad_lse_rows[part])
            gradient[part] = probs.scatter_add_(1, target[part], -grad_nll_rows[part])
        return (gradient @ weight).view_as(hidden), gradient.T @ hidden.flatten(0, 1), None


def _pieces(logits: Tensor) -> list[slice]:
    """Rows that fill about 1 MB in fp32."""
    size = max(1, 2**18 // logits.shape[1])
    return [slice(at, at + size) for at in range(0, len(logits), size)]


def _chunks(
    hidden: Tensor, targets: Tensor, size: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Consecutive tokens of all rows: where they are, their hidden states, targets with 0 for IGNORE, and which count."""
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    for at in range(0, len(flat_targets), size):
        part = slice(at, at + size)
        yield part, flat_hidden[part], flat_targets[part].clamp_min(0), flat_targets[part] != IGNORE


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> TokenLosses:
    """Losses of `softmax(hidden @ weight.T)` against `targets`, differentiable in `hidden` and `weight`.

    hidden [B, T, D] and weight [V, D] share a dtype; targets [B, T] int64, IGNORE where there is no loss.
    chunk: tokens whose logits exist at once (default: 4096; on a CPU all where they are at most KEPT numbers, else 256).
    compiled: what is done to a chunk's logits, with torch.compile (default: on a GPU).
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
    """Cross-entropy plus `z_weight * logsumexp^2` (PaLM, arXiv:2204.02311, section 5), in two forms.

    (losses, z_weight), as training uses it: the sum over tokens, and its two parts. Divide by the count of unmasked targets
    of the *whole* step (all micro-batches, all ranks); a mean of means is a different loss. The parts are detached sums:
    "loss" in nats, "z_loss" already weighted. Ignored tokens add nothing to either.

    (logits, labels): the mean over labels that are not IGNORE, as one scalar. logits [..., V], labels [...] int64. Labels are
    aligned: labels[i] is the token that logits[i] predict. For labels equal to the input (as transformers takes them) pass
    logits[:, :-1] and labels[:, 1:].
    """
    if isinstance(losses, TokenLosses):
        nll, z = losses.nll.sum(), labels * losses.logsumexp.square().sum()
        return nll + z, {"loss": nll.detach(), "z_loss": z.detach()}
    assert isinstance(labels, Tensor)
    logits, target = losses.flatten(0, -2).float(), labels.flatten()
    nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    z = z_weight * logits.logsumexp(-1).mul(target != IGNORE).square().sum()
    return (nll + z) / (target != IGNORE).sum().clamp_min(1)
