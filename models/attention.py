"""Causal attention with grouped heads, document masks and sliding windows, on several kernels.

`attention_mask` builds the kernel's mask once per forward pass; `attend` runs the kernel in each
layer.
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
    """Mask of the variable-length kernels, which take all rows of a batch as one sequence."""

    starts: Tensor  # [documents + 1] int32: first token of each document, then B * T
    longest: int  # tokens of the longest document
    window: tuple[int, int]  # visible tokens to the left and right; -1: all
    kernel: str  # key of VARLEN_KERNELS


class ScoreBias(NamedTuple):
    """Mask of blocked_attention, which adds it to the scores."""

    bias: Tensor  # [B or 1, T, T], 0 or -inf, in the dtype of q


Mask = Tensor | BlockMask | Varlen | ScoreBias | None
# Filled on first use, because importing torch's kernel loads its compiler.
VARLEN_KERNELS: dict[str, Callable[..., Any]] = {}


def choose_kernel(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    masked: bool,
    shape: tuple[int, int, int] = (0, 0, 0),
) -> str:
    """Resolve a name of KERNELS to sdpa, blocks, flex, varlen, FA2, FA3 or FA4 on this device.

    dtype: of q, k and v. masked: documents or a window limit attention. shape: rows, length and
    width of the hidden states. auto: blocks on a CPU, flex on CUDA with a mask, otherwise sdpa.
    sdpa replaces blocks where the probabilities exceed MAX_PROBABILITIES. ValueError if the kernel
    cannot train on this device.
    """
    assert kernel in KERNELS
    cuda = device.type == "cuda"
    if kernel == "auto":
        kernel = "blocks" if device.type == "cpu" else "flex" if masked and cuda else "sdpa"
    problem = ""
    if kernel == "sdpa" and masked and cuda:
        problem = "would store a score for each pair of tokens to mask documents"
    elif kernel == "blocks" and device.type != "cpu":
        problem = f"runs on a CPU only, not on {device.type}"
    elif kernel not in ("sdpa", "blocks") and not cuda:
        problem = f"trains on an NVIDIA GPU only, not on {device.type}"
    elif kernel in ("varlen", "flash") and dtype not in (torch.bfloat16, torch.float16):
        problem = f"computes in bfloat16 only, not {str(dtype).removeprefix('torch.')}"
    elif kernel in ("varlen", "flash") and torch.cuda.get_device_capability(device) < (8, 0):
        problem = f"needs an Ampere GPU or newer, not {torch.cuda.get_device_name(device)}"
    elif kernel == "flash" and _flash_version(device) is None:
        problem = (
            "needs the package flash_attn, flash_attn_interface (FlashAttention-3) or flash-attn-4"
        )
    if problem:
        raise ValueError(f"parallel.attention={kernel} {problem}; set parallel.attention=auto")
    if kernel == "blocks" and shape[0] * shape[1] ** 2 * shape[2] > MAX_PROBABILITIES:
        return "sdpa"
    return _flash_version(device) or kernel if kernel == "flash" else kernel


@cache
def _flash_version(device: torch.device) -> str | None:
    """Return the newest FlashAttention installed for a GPU. varlen_attn runs versions 3 and 4."""
    major = torch.cuda.get_device_capability(device)[0]
    if major == 9 and find_spec("flash_attn_interface"):
        return "FA3"
    package = find_spec("flash_attn")
    if major >= 9 and package and find_spec("flash_attn.cute"):
        return "FA4"
    return "FA2" if package and find_spec("flash_attn.flash_attn_interface") else None


def attention_mask(
    doc_ids: Tensor | None, x: Tensor, kernel: str = "auto", window: int | None = None
) -> Mask:
    """Build the mask under which a token attends to itself and earlier tokens of its document.

    doc_ids [B, T] increases at each document's first token; None: each row is one document.
    x [B, T, D]: the hidden states. kernel: one of KERNELS. window: visible tokens, the token itself
    included; None: all. Returns None for plain causal attention.
    """
    if window is not None and window >= x.shape[1]:
        window = None
    masked = doc_ids is not None or window is not None
    rows, length, width = x.shape
    kernel = choose_kernel(kernel, x.device, x.dtype, masked, (rows, length, width))
    if kernel == "blocks":
        visible = dense_mask(doc_ids, length, x.device, window).view(-1, length, length)
        bias = torch.zeros_like(visible, dtype=x.dtype)
        return ScoreBias(bias.masked_fill_(~visible, -torch.inf))
    if kernel == "sdpa":
        return dense_mask(doc_ids, length, x.device, window) if masked else None
    if kernel == "flex":
        return block_mask(doc_ids, length, x.device, window)
    _load_varlen(kernel)
    return varlen_mask(doc_ids, rows, length, x.device, window, kernel)


def dense_mask(
    doc_ids: Tensor | None, length: int, device: torch.device, window: int | None = None
) -> Tensor:
    """Build a bool mask [B, 1, T, T], or [T, T] without documents. Memory is quadratic in T."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    if doc_ids is None:
        return visible
    return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & visible)[:, None]


def block_mask(
    doc_ids: Tensor | None, length: int, device: torch.device, window: int | None = None
) -> BlockMask:
    """Build FlexAttention's mask, which skips 128 x 128 blocks between different documents."""
    doc_ids = None if doc_ids is None else doc_ids.to(device, non_blocking=True)
    # As a tensor, a window that changes during training does not recompile the kernel.
    width = None if window is None else torch.full((), window, device=device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_window = q >= k if width is None else (q >= k) & (q - k < width)
        return in_window if doc_ids is None else in_window & (doc_ids[b, q] == doc_ids[b, k])

    # Eager create_block_mask materialises T x T.
    compiled = device.type != "cpu"
    create: Any = _compiled(create_block_mask) if compiled else create_block_mask
    rows = None if doc_ids is None else len(doc_ids)
    return create(visible, rows, None, length, length, device=device)


def varlen_mask(
    doc_ids: Tensor | None,
    rows: int,
    length: int,
    device: torch.device,
    window: int | None = None,
    kernel: str = "varlen",
) -> Varlen:
    """Build the mask of the variable-length kernels from each document's first token.

    The host needs the number of documents and the longest length: doc_ids on a GPU cost one
    synchronisation per forward pass, doc_ids on the CPU none.
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
    """Compute softmax attention with grouped heads under a mask from attention_mask.

    q [B, H, T, head_dim]; k and v [B, K, T, head_dim], H a multiple of K. Returns q's shape.
    """
    if isinstance(mask, Varlen):
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, heads, head_dim]
        bounds = (mask.starts, mask.starts, mask.longest, mask.longest)
        out = VARLEN_KERNELS[mask.kernel](*flat, *bounds, window_size=mask.window)
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    if isinstance(mask, ScoreBias):
        return blocked_attention(q, k, v, mask.bias)
    if isinstance(mask, BlockMask):
        # Inside a compiled caller, flex_attention is compiled with the caller.
        eager = torch.compiler.is_compiling() or q.device.type == "cpu"
        flex: Any = flex_attention if eager else _compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    if q.device.type not in ("cpu", "cuda"):  # mps: enable_gqa crashes (torch issue 149132)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


@cache
def _load_varlen(kernel: str) -> None:
    """Import a kernel into VARLEN_KERNELS.

    Its arguments are (q, k, v, starts, starts, longest, longest, window_size=).
    """
    if kernel == "FA2":
        from flash_attn import flash_attn_varlen_func

        VARLEN_KERNELS[kernel] = partial(flash_attn_varlen_func, causal=True)
        return
    from torch.nn.attention.varlen import varlen_attn

    if kernel in ("FA3", "FA4"):
        # varlen_attn then calls this version everywhere in this process.
        torch_attention.activate_flash_attention_impl(kernel)
    # enable_gqa exists from torch 2.12 on; earlier versions accept fewer k and v heads without it.
    supports_flag = "enable_gqa" in (varlen_attn.__kwdefaults__ or {})
    gqa: dict[str, Any] = {"enable_gqa": True} if supports_flag else {}
    VARLEN_KERNELS[kernel] = partial(varlen_attn, **gqa)


def kernel_operators() -> set[Any]:
    """Return the attention operators, whose outputs selective activation checkpointing saves."""
    aten = torch.ops.aten
    operators = {
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
        # The operator exists once its package is imported.
        operator = getattr(getattr(torch.ops, library), name, None)
        if operator is not None:
            operators.add(operator.default)
    return operators


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use: loading torch.compile takes seconds."""
    return torch.compile(function, dynamic=False)
