"""Measure attention kernels, forward and backward, by length, with and without documents.

    python -m benchmarks.attention                    # the CPU's kernels, or all kernels of the GPU
    python -m benchmarks.attention --lengths 4096 --output benchmarks/results/attention.json

Milliseconds and TFLOP/s in bf16; kernels take turns. Query heads of 64 and key heads 8:1 (on a GPU
the 1.1B model's 32 and 4). FLOPs count unmasked pairs: 4 * heads * 64 per pair forward, 2.5 times
that backward. Document lengths are web-like (lognormal, median 600 tokens, sigma 1.05). "mask_ms"
is the time of the block mask and document starts, computed once per forward pass of the model.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.side_by_side import machine, median_ms, reason, wait, write
from cli import CommandParser, user_errors
from models.attention import Mask, ScoreBias, attend, attention_mask, dense_mask

SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
# flash last: it may replace torch's kernel
GPU = ("sdpa", "sdpa cudnn", "sdpa flash", "flex", "varlen", "flash")
CPU = ("blocks", "sdpa", "math")


def documents(rows: int, length: int) -> Tensor:
    """Return document ids, [rows, length] int32."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(600), 1.05, rows * length // 20), 20, 200_000).astype(
        np.int64
    )
    starts = np.zeros(rows * length, np.int32)
    ends = np.cumsum(lengths)
    starts[ends[ends < rows * length]] = 1
    return torch.from_numpy(starts.reshape(rows, length).cumsum(1, dtype=np.int32))


def seen_pairs(doc_ids: Tensor | None, rows: int, length: int) -> int:
    """Return the number of unmasked (query, key) pairs."""
    if doc_ids is None:
        return rows * length * (length + 1) // 2
    return sum(
        int(n) * (int(n) + 1) // 2
        for row in doc_ids
        for n in row.unique_consecutive(return_counts=True)[1]
    )


def run(
    qkv: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    mask: Mask,
    backend: SDPBackend | None,
    function: Callable,
) -> Any:
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        out = function(*qkv, mask)
        return torch.autograd.grad(out, qkv, grad)


def measure(
    length: int, packed: bool, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    rows = max(1, args.tokens // length)
    heads, groups = (32, 4) if device.type == "cuda" else (8, 1)
    doc_ids = documents(rows, length) if packed else None
    pairs = seen_pairs(doc_ids, rows, length)
    on_device = None if doc_ids is None else doc_ids.to(device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, length, h, 64) for h in (heads, groups, groups, heads)]
    tensors = [
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).transpose(1, 2)
        for shape in shapes
    ]
    qkv, grad = tuple(x.requires_grad_() for x in tensors[:3]), tensors[3]
    hidden = torch.empty(rows, length, heads * 64, dtype=torch.bfloat16, device=device)
    results, calls = [], {}
    for name in GPU if device.type == "cuda" else CPU:
        result: dict[str, Any] = {
            "length": length,
            "rows": rows,
            "documents": packed,
            "kernel": name,
        }
        results.append(result)
        try:
            if name in SDPA and packed and device.type == "cuda":
                raise ValueError("supports documents only with a dense mask")
            kernel = "sdpa" if name in SDPA else name
            make = partial(attention_mask, on_device, hidden, kernel)
            mask = dense_mask(on_device, length, device) if name == "math" and packed else make()
            if name == "blocks" and not isinstance(mask, ScoreBias):
                raise ValueError("sdpa replaces it at this size")
            call = partial(run, qkv, grad, mask, SDPA.get(name), attend)
            call()
            wait(device)
        except Exception as error:  # not installed or unsupported: reported in the row
            result["not measured"] = reason(error)
            continue
        result["mask_ms"] = median_ms({"mask": make}, 5, device)["mask"]
        calls[name] = call
    flops = 3.5 * 4 * heads * 64 * pairs
    for name, ms in median_ms(calls, args.rounds, device).items():
        result = next(result for result in results if result["kernel"] == name)
        result |= {"ms": ms, "tflop_per_s": flops / ms / 1e9}
    return results


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16_384] if cuda else [256, 1024]
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=65_536 if cuda else 2048,
        help="tokens per batch",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if cuda else "cpu")
    with user_errors():
        rows: list[dict[str, Any]] = []
        result = {
            "task": "attention",
            "machine": machine(device, "flash-attn", "flash-attn-3", "flash-attn-4"),
            "rows": rows,
        }
        for length in args.lengths:
            for packed in (False, True):
                for row in measure(length, packed, args, device):
                    rows.append(row)
                    kind = "documents" if packed else "rows"
                    head = f"{length:>6} x {row['rows']:<3} {kind:<10} {row['kernel']:<11}"
                    figures = "{ms:9.2f} ms {tflop_per_s:8.2f} TFLOP/s, mask {mask_ms:.2f} ms"
                    missing = f"not measured: {row.get('not measured')}"
                    print(head, figures.format(**row) if "ms" in row else missing, flush=True)
                write(args.output, result)  # after each case, in case the time runs out
    if cuda:
        print("flash: the newest installed FlashAttention of 2, 3 and 4")


if __name__ == "__main__":
    main()
