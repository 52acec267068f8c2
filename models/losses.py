"""The loss head: per-token negative log-likelihood and logsumexp, computed in chunks of tokens.

Only one chunk's logits exist at a time, forward and backward. The backward pass recomputes them
from the saved logsumexp. This costs one more head matmul (about 2 % of a 1.1B step) and saves
4 bytes * tokens * vocab.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from models.moe import RouterStats

MAX_KEPT_LOGITS = 2**24  # logits kept until backward: 32 MB in bf16, and as much for the gradient
IGNORE = -100  # target without a loss; the value of torch and transformers


class TokenLosses(NamedTuple):
    """Losses per token, in fp32; 0 where the target is IGNORE."""

    nll: Tensor  # [B, T] negative log-likelihood, in nats
    logsumexp: Tensor  # [B, T] log of the softmax normaliser; the z-loss keeps it near 0
    router: "RouterStats | None" = None  # stacked over the L layers with experts


class LossHead(NamedTuple):
    """Settings between `hidden @ weight.T` and the logits. The defaults change nothing."""

    softcap: float = 0.0  # bound of the logits; 0: none
    softcap_kind: str = "tanh"  # one of SOFTCAPS
    vocab_size: int | None = None  # rows of the matrix that are tokens; the rest is padding
    fp8: bool = False  # multiply in float8; needs an NVIDIA GPU (Ada or newer)

    def cap(self, logits: Tensor) -> Tensor:
        """Bound logits smoothly. The kinds are those of the nanoGPT speedrun:

        tanh: c tanh(z / c) (arXiv:2408.00118; records 9 and 18); isru: c z / sqrt(z^2 + c^2)
        (medium record 7); sigmoid: c sigmoid((z + 5) / 7.5) (record 54, with c = 23).
        """
        if not self.softcap:
            return logits
        if self.softcap_kind == "tanh":
            return self.softcap * torch.tanh(logits / self.softcap)
        if self.softcap_kind == "isru":
            return self.softcap * logits * (logits.square() + self.softcap**2).rsqrt()
        return self.softcap * torch.sigmoid((logits + 5) / 7.5)

    def slope(self, capped: Tensor) -> Tensor:
        """Return the derivative of `cap`, from its output."""
        ratio = capped / self.softcap
        if self.softcap_kind == "tanh":
            return 1 - ratio.square()
        if self.softcap_kind == "isru":
            return (1 - ratio.square()).clamp_min(0) ** 1.5
        return capped * (1 - ratio) / 7.5


SOFTCAPS = ("tanh", "isru", "sigmoid")
PLAIN = LossHead()


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, head: LossHead) -> Tensor:
    """Return the logits [chunk, vocab_size] in fp32."""
    if head.fp8:
        logits = _matmul_fp8(h, weight.T, torch.float8_e4m3fn)
        logits = logits if bias is None else logits + bias
    else:
        logits = F.linear(h, weight, bias)
    return head.cap(logits.float()[:, : head.vocab_size])


def _forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor,
    head: LossHead,
) -> tuple[Tensor, Tensor]:
    """Return nll and logsumexp [chunk]. torch.compile fuses the fp32 cast into the reads."""
    logits = _logits(h, weight, bias, head)
    lse = logits.logsumexp(-1)
    return ((lse[:, None] - logits.gather(1, target)) * target_weight).sum(-1), lse


def _backward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor,
    lse: Tensor,
    grad_nll_rows: Tensor,
    grad_lse_rows: Tensor,
    head: LossHead,
) -> Tensor:
    """Return the gradient of one chunk's logits before the softcap, in the weight's dtype.

    d nll = sum over targets of weight * (softmax - onehot), d logsumexp = softmax.
    """
    logits = _logits(h, weight, bias, head)
    slope = head.slope(logits) if head.softcap else None
    probs = logits.sub_(lse[:, None]).exp_()
    grad_targets = grad_nll_rows[:, None] * target_weight  # [chunk, targets]
    grad = probs.mul_((grad_targets.sum(-1) + grad_lse_rows)[:, None])
    if torch.compiler.is_compiling():  # scatter_add_ would write the fp32 logits to memory
        columns = torch.arange(grad.shape[1], device=grad.device)
        for k in range(target.shape[1]):
            is_target = columns == target[:, k : k + 1]
            grad = torch.where(is_target, grad - grad_targets[:, k : k + 1], grad)
    else:
        grad.scatter_add_(1, target, -grad_targets)
    return _before_softcap(grad, slope, len(weight)).to(weight.dtype)


def _before_softcap(grad: Tensor, slope: Tensor | None, rows: int) -> Tensor:
    """Apply the slope of the softcap, and zeros for the padding of the vocabulary."""
    grad = grad if slope is None else grad * slope
    padding = rows - grad.shape[1]
    return F.pad(grad, (0, padding)) if padding else grad


def _matmul_fp8(a: Tensor, b: Tensor, a_dtype: torch.dtype) -> Tensor:
    """Return a [m, k] @ b [k, n] in bfloat16, computed in float8 with one scale per matrix.

    b is rounded to e4m3. k and n must be multiples of 16. Scales come from the largest element of
    this call, so they fit any loss scale.
    """
    rounded, scales = [], []
    for x, dtype in ((a.contiguous(), a_dtype), (b.T.contiguous(), torch.float8_e4m3fn)):
        scale = x.abs().amax().float().clamp_min(1e-30) / torch.finfo(dtype).max
        rounded.append((x.float() / scale).to(dtype))
        scales.append(scale)
    return torch._scaled_mm(
        rounded[0], rounded[1].T, scales[0], scales[1], out_dtype=torch.bfloat16
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use: loading torch.compile takes seconds."""
    return torch.compile(function, fullgraph=True)


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        target_weight: Tensor,
        head: LossHead,
        chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)  # [B, T]
        lse = torch.empty_like(nll)
        flat_nll, flat_lse = nll.view(-1), lse.view(-1)
        losses = _compiled(_forward) if compiled else _forward
        for rows, h in _chunks(hidden, chunk):
            flat_nll[rows], flat_lse[rows] = losses(
                h, weight, bias, target[rows], target_weight[rows], head
            )
        ctx.save_for_backward(hidden, weight, bias, target, target_weight, lse)
        ctx.head, ctx.chunk, ctx.compiled = head, chunk, compiled
        return nll, lse * _counted(target_weight).view_as(lse)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target, target_weight, lse = ctx.saved_tensors
        grad_nll, lse = grad_nll.flatten(), lse.view(-1)
        grad_lse = grad_lse.flatten() * _counted(target_weight)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        flat_grad_hidden = grad_hidden.view(-1, hidden.shape[-1])
        # The sum over chunks is fp32 for bf16 weights too.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        gradient = _compiled(_backward) if ctx.compiled else _backward
        for rows, h in _chunks(hidden, ctx.chunk):
            grad_logits = gradient(
                h,
                weight,
                bias,
                target[rows],
                target_weight[rows],
                lse[rows],
                grad_nll[rows],
                grad_lse[rows],
                ctx.head,
            )
            if ctx.head.fp8:
                e5m2 = torch.float8_e5m2
                flat_grad_hidden[rows] = _matmul_fp8(grad_logits, weight, e5m2)
                grad_weight += _matmul_fp8(grad_logits.T, h, e5m2)
            else:
                flat_grad_hidden[rows] = grad_logits @ weight
                grad_weight += grad_logits.T @ h
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None, None


class _KeptTokenLoss(torch.autograd.Function):
    """Losses of a small batch; all logits stay in memory, in the input's dtype, until backward.

    On a CPU this is a third faster: no recomputation, and one product for the weight's gradient.
    Logits are read in pieces that fit the CPU cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        target_weight: Tensor,
        head: LossHead,
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden.flatten(0, 1), weight, bias)  # [B * T, V]
        tokens = logits[:, : head.vocab_size]
        nll = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)  # [B * T, K]
        for rows in _pieces(logits):
            log_probs = head.cap(tokens[rows].float()).log_softmax(-1)
            nll[rows] = -log_probs.gather(1, target[rows])
        lse = nll[:, 0] + head.cap(tokens.gather(1, target[:, :1]).float()).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, target, target_weight, logits)
        ctx.head = head
        shape = hidden.shape[:2]  # FSDP2 warns of outputs that are views
        nll = (nll.view(*shape, -1) * target_weight.view(*shape, -1)).sum(-1)
        return nll, lse.view(shape) * _counted(target_weight).view(shape)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, target, target_weight, logits = ctx.saved_tensors
        head: LossHead = ctx.head
        grad_targets = grad_nll.flatten()[:, None] * target_weight  # [B * T, K]
        grad_lse = grad_lse.flatten() * _counted(target_weight)
        grad_probs = (grad_targets.sum(-1) + grad_lse)[:, None]
        gradient = torch.empty_like(logits)
        for rows in _pieces(logits):
            capped = head.cap(logits[rows, : head.vocab_size].float())
            grad = capped.softmax(-1).mul_(grad_probs[rows])
            grad.scatter_add_(1, target[rows], -grad_targets[rows])
            slope = head.slope(capped) if head.softcap else None
            gradient[rows] = _before_softcap(grad, slope, len(weight))
        grad_bias = None if bias is None else gradient.sum(0)
        grad_weight = gradient.T @ hidden.flatten(0, 1)
        return (gradient @ weight).view_as(hidden), grad_weight, grad_bias, None, None, None


def _counted(target_weight: Tensor) -> Tensor:
    """Return 1 for tokens with a next-token target [B * T], else 0."""
    return (target_weight[:, 0] != 0).float()


def _pieces(logits: Tensor) -> list[slice]:
    """Split rows into slices of about 1 MB in fp32."""
    size = max(1, 2**18 // logits.shape[1])
    return [slice(begin, begin + size) for begin in range(0, len(logits), size)]


def _chunks(hidden: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of `size` tokens: their slice and their hidden states."""
    flat_hidden = hidden.flatten(0, 1)
    for begin in range(0, len(flat_hidden), size):
        rows = slice(begin, begin + size)
        yield rows, flat_hidden[rows]


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    compiled: bool | None = None,
    *,
    bias: Tensor | None = None,
    head: LossHead = PLAIN,
    target_weights: tuple[float, ...] = (1.0,),
) -> TokenLosses:
    """Compute the losses of `softmax(hidden @ weight.T + bias)` for `targets`, in chunks.

    hidden [B, T, D] and weight [V, D] are differentiable and share a dtype; targets [B, T] int64,
    IGNORE without a loss.
    chunk: tokens whose logits exist at once. Default: 4096 on a GPU; on a CPU all tokens up to
    MAX_KEPT_LOGITS logits, else 256. compiled: torch.compile a chunk's computation (default: on
    CUDA). bias [V], differentiable. head: softcap, padding of the vocabulary, float8.
    target_weights: with targets [B, T, K], nll is the weighted sum over the K targets of a token;
    a token whose first target is IGNORE has loss 0, and the first weight must be above 0.
    ValueError if float8 is not possible here.
    """
    cpu = hidden.device.type == "cpu"
    compiled = hidden.is_cuda if compiled is None else compiled
    target = targets.reshape(hidden.shape[0] * hidden.shape[1], -1)  # [B * T, K]
    target_weight = (target != IGNORE) * (target[:, :1] != IGNORE).float()
    if target_weights != (1.0,):
        target_weight = target_weight * target_weight.new_tensor(target_weights)
    inputs = (hidden, weight, bias, target.clamp_min(0), target_weight, head)
    if head.fp8:
        _check_fp8(hidden, weight)
    if cpu and chunk is None and not compiled and len(target) * len(weight) <= MAX_KEPT_LOGITS:
        return TokenLosses(*_KeptTokenLoss.apply(*inputs))
    chunk = chunk or (256 if cpu else 4096)
    return TokenLosses(*_ChunkedTokenLoss.apply(*inputs, chunk, compiled))


def _check_fp8(hidden: Tensor, weight: Tensor) -> None:
    device = hidden.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ValueError(
            f"model.fp8_head needs an NVIDIA GPU with float8 (Ada, Hopper or newer), not {name}; "
            "remove it"
        )
    sizes = {"tokens": hidden.shape[0] * hidden.shape[1], "vocabulary": len(weight)}
    for name, size in {**sizes, "hidden size": weight.shape[1]}.items():
        if size % 16:
            raise ValueError(
                f"model.fp8_head needs multiples of 16, but the {name} is {size}; "
                "change it (model.vocab_multiple pads the vocabulary) or remove model.fp8_head"
            )


def token_loss_sum(losses: TokenLosses, z_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum cross-entropy plus `z_weight * logsumexp^2` over tokens; return it and its two terms.

    Divide by the number of unmasked targets of the *whole* step (all micro-batches, all ranks); a
    mean of means is a different loss. The terms are detached sums: "loss" in nats, "z_loss" already
    weighted. Ignored tokens add nothing. z-loss: PaLM, arXiv:2204.02311, section 5.
    """
    nll, z = losses.nll.sum(), z_weight * losses.logsumexp.square().sum()
    return nll + z, {"loss": nll.detach(), "z_loss": z.detach()}


def compute_loss_with_z_penalty(logits: Tensor, labels: Tensor, z_weight: float = 1e-4) -> Tensor:
    """Return mean cross-entropy plus `z_weight * logsumexp^2` over labels that are not IGNORE.

    logits [..., V], labels [...] int64. labels[i] is the token that logits[i] predicts. For labels
    equal to the input, as in transformers, pass logits[:, :-1] and labels[:, 1:]. Training calls
    token_losses and token_loss_sum instead, which do not store all logits. ValueError unless the
    labels have the shape of the logits without their last dimension.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {list(logits.shape)} need labels of shape {list(logits.shape[:-1])}, "
            f"not {list(labels.shape)}"
        )
    flat_logits, target = logits.flatten(0, -2).float(), labels.flatten()
    kept = target != IGNORE
    nll = F.cross_entropy(flat_logits, target, ignore_index=IGNORE, reduction="none")
    sums, _ = token_loss_sum(TokenLosses(nll, flat_logits.logsumexp(-1) * kept), z_weight)
    return sums / kept.sum().clamp_min(1)
