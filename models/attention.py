"""Attention: softmax over earlier tokens of the same document, with grouped heads, by one of several kernels.

`attention_mask` decides once a forward pass what may be seen, in the form that the kernel takes; `attend` runs it in each layer.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.attention_cpu import MAX_PROBABILITIES, blocked_attention

KERNELS = ("auto", "sdpa", "blocks", "flex", "varlen", "flash")


class Varlen(NamedTuple):
    """All rows of a batch end to end, as kernels for documents of any length take them."""

    starts: Tensor  # [documents + 1] int32: where each begins among the B * T tokens, and where the last ends
    longest: int  # tokens of the longest document
    window: tuple[int, int]  # how many tokens are seen to the left and to the right; -1: all
    kernel: str  # key of VARLEN_KERNELS


class Added(NamedTuple):
    """What blocked_attention adds to the scores: 0 or -inf."""

    scores: Tensor  # [B or 1, T, T], in the dtype of q


Mask = Tensor | BlockMask | Varlen | Added | None
VARLEN_KERNELS: dict[
    str, Callable[..., Any]
] = {}  # filled on first use, since torch's loads its compiler with it


def choose_kernel(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    masked: bool,
    shape: tuple[int, int, int] = (0, 0, 0),
) -> str:
    """The kernel to use for q, k, v of this dtype on this device: sdpa, blocks, flex, varlen, or FA2, FA3, FA4 for flash.

    masked: there are documents or a window. shape: rows, length and width of the hidden states. auto takes blocks on a CPU,
    sdpa where there is nothing to mask, else flex; blocks gives way to sdpa where it would keep too much.
    Raises ValueError where the wanted one cannot train here.
    """
    assert wanted in KERNELS
    cuda = device.type == "cuda"
    if wanted == "auto":
        wanted = "blocks" if device.type == "cpu" else "flex" if masked and cuda else "sdpa"
    refusal = ""
    if wanted == "sdpa" and masked and cuda:
        refusal = "would build the scores of all pairs of tokens to mask documents"
    elif wanted == "blocks" and device.type != "cpu":
        refusal = f"is for a CPU, and this is {device.type}"
    elif wanted not in ("sdpa", "blocks") and not cuda:
        refusal = f"trains on an NVIDIA GPU only, and this is {device.type}"
    elif wanted in ("varlen", "flash") and dtype not in (torch.bfloat16, torch.float16):
        refusal = f"computes in bfloat16 only, not {str(dtype).removeprefix('torch.')}"
    elif wanted in ("varlen", "flash") and torch.cuda.get_device_capability(device) < (8, 0):
        refusal = f"needs an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}"
    elif wanted == "flash" and _flash_version(device) is None:
        refusal = (
            "needs the package flash_attn, flash_attn_interface (FlashAttention-3) or flash-attn-4"
        )
    if refusal:
        raise ValueError(f"parallel.attention={wanted} {refusal}; take parallel.attention=auto")
    if wanted == "blocks" and shape[0] * shape[1] ** 2 * shape[2] > MAX_PROBABILITIES:
        return "sdpa"
    return _flash_version(device) or wanted if wanted == "flash" else wanted


@cache
def _flash_version(device: torch.device) -> str | None:
    """The newest FlashAttention installed for a GPU; 3 and 4 take the place of torch's kernel behind varlen_attn."""
    major = torch.cuda.get_device_capability(device)[0]
    if major == 9 and find_spec("flash_attn_interface"):
        return "FA3"
    package = find_spec("flash_attn")
    if major >= 9 and package and find_spec("flash_attn.cute"):
        return "FA4"
    return "FA2" if package and find_spec("flash_attn.flash_attn_interface") else None


def attention_mask(
    doc_ids: Tensor | None, x: Tensor, wanted: str = "auto", window: int | None = None
) -> Mask:
    """What a token may attend to: earlier tokens of its own document, of which the last `window` with itself (None: all).

    docs [B, T] counts up at each document's first token; None: each row is one. x [B, T, ...] has the device and dtype of the
    hidden states. wanted: one of KERNELS. None stands for plain causal attention.
    """
    if window is not None and window >= x.shape[1]:
        window = None
    masked = doc_ids is not None or window is not None
    kernel = choose_kernel(wanted, x.device, x.dtype, masked, (x.shape[0], x.shape[1], x.shape[2]))
    if kernel == "blocks":
        seen = dense_mask(doc_ids, x.shape[1], x.device, window).view(-1, x.shape[1], x.shape[1])
        return Added(torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -torch.inf))
    if kernel == "sdpa":
        return dense_mask(doc_ids, x.shape[1], x.device, window) if masked else None
    if kernel == "flex":
        return block_mask(doc_ids, x.shape[1], x.device, window)
    _load(kernel)
    return varlen_mask(doc_ids, x.shape[0], x.shape[1], x.device, window, kernel)


def dense_mask(
    doc_ids: Tensor | None, length: int, device: torch.device, window: int | None = None
) -> Tensor:
    """A bool tensor [B, 1, T, T], or [T, T] without documents: exact everywhere, and quadratic in memory."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return (
        seen if doc_ids is None else ((doc_ids[:, :, None] == doc_ids[:, None, :]) & seen)[:, None]
    )


def block_mask(
    doc_ids: Tensor | None, length: int, device: torch.device, window: int | None = None
) -> BlockMask:
    """FlexAttention's: whole blocks of 128 x 128 between documents are skipped."""
    doc_ids = None if doc_ids is None else doc_ids.to(device, non_blocking=True)

    def seen(b, h, q, k):
        near = q >= k if window is None else (q >= k) & (q - k < window)
        return near if doc_ids is None else near & (doc_ids[b, q] == doc_ids[b, k])

    create = (
        create_block_mask if device.type == "cpu" else _compiled(create_block_mask)
    )  # eager builds T x T
    return create(
        seen, None if doc_ids is None else len(doc_ids), None, length, length, device=device
    )


def varlen_mask(
    doc_ids: Tensor | None,
    rows: int,
    length: int,
    device: torch.device,
    window: int | None = None,
    kernel: str = "varlen",
) -> Varlen:
    """Where documents begin, in the batch laid end to end.

    The number of documents and the longest are needed on the host, so docs on a GPU are waited for, once a forward pass;
    docs on the CPU are not.
    """
    left = -1 if window is None else window - 1
    if doc_ids is None:
        starts = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
        return Varlen(starts, length, (left, 0), kernel)
    first = torch.ones_like(doc_ids, dtype=torch.bool)
    first[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=doc_ids.numel())
    longest = int(starts.diff().max())
    return Varlen(starts.int().to(device, non_blocking=True), longest, (left, 0), kernel)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention with grouped heads: q [B, H, T, head_dim], k and v [B, K, T, head_dim], H a multiple of K."""
    if isinstance(mask, Varlen):
        joined = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, heads, head_dim]
        bounds = (mask.starts, mask.starts, mask.longest, mask.longest)
        out = VARLEN_KERNELS[mask.kernel](*joined, *bounds, window_size=mask.window)
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    if isinstance(mask, Added):
        return blocked_attention(q, k, v, mask.scores)
    if isinstance(mask, BlockMask):
        eager = (
            torch.compiler.is_compiling() or q.device.type == "cpu"
        )  # a compiled caller compiles it with itself
        flex = flex_attention if eager else _compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


@cache
def _load(kernel: str) -> None:
    """Have VARLEN_KERNELS[kernel] take (q, k, v, starts, starts, longest, longest, window_size=)."""
    if kernel == "FA2":
        from flash_attn import flash_attn_varlen_func

        VARLEN_KERNELS[kernel] = partial(flash_attn_varlen_func, causal=True)
        return
    from torch.nn.attention.varlen import varlen_attn

    if kernel in ("FA3", "FA4"):
        torch_attention.activate_flash_attention_impl(
            kernel
        )  # from now on what varlen_attn calls, in this process
    # torch 2.12 began to ask whether fewer heads of k and v are meant; before, they were taken as they came
    grouped: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
    )
    VARLEN_KERNELS[kernel] = partial(varlen_attn, **grouped)


def kernel_operators() -> set[Any]:
    """The operators whose outputs are attention's: what selective activation checkpointing keeps."""
    aten = torch.ops.aten
    found = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
    for library, name in (
        ("torch_attn", "_varlen_attn"),
        ("flash_attn", "_flash_attn_varlen_forward"),
    ):
        operator = getattr(
            getattr(torch.ops, library), name, None
        )  # there once its package is imported
        if operator is not None:
            found.add(operator.default)
    return found


@cache
def _compiled(function):
    return torch.compile(
        function, dynamic=False
    )  # not at import: torch.compile takes seconds to load
