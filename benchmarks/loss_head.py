"""Measure the loss head, forward and backward: ours, full logits, torch's fused one and Liger's.

    python -m benchmarks.loss_head           # CPU: the quickstart's head; GPU: the 1.1B model's
    python -m benchmarks.loss_head --tokens 65536 --output benchmarks/results/loss_head.json

The loss is the sum of cross-entropy over tokens; a tenth of them are ignored. Errors are relative
to the largest value in double precision on the same inputs. "z": whether a contender returns the
logsumexp that the z-loss needs, as ours does.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.side_by_side import machine, median_ms, peak_mb, reason, write
from cli import CommandParser, user_errors
from models.losses import IGNORE, token_losses
from training.fsdp_utils import DTYPES

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(
    hidden: Tensor, weight: Tensor, targets: Tensor, compiled: bool, chunk: int | None = None
) -> Tensor:
    return token_losses(hidden[None], weight, targets[None], chunk, compiled).nll.sum()


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(hidden, weight).float(), targets, ignore_index=IGNORE, reduction="sum"
    )


def torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor, chunked: bool) -> Tensor:
    """torch.nn.functional.linear_cross_entropy; needs torch 2.13 or newer."""
    options: dict[str, Any] = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return F.linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE, reduction="sum", **options
    )


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum")(
        weight, hidden, targets
    )


CONTENDERS: dict[str, tuple[Loss, bool]] = {  # loss, whether it supports the z-loss
    "ours, eager": (partial(ours, compiled=False), True),
    "ours, compiled": (partial(ours, compiled=True), True),
    "full logits": (full_logits, True),
    "full logits, compiled": (torch.compile(full_logits), True),
    "linear_cross_entropy": (partial(torch_fused, chunked=False), False),
    "linear_cross_entropy, chunked": (partial(torch_fused, chunked=True), False),
    "liger": (liger, True),
}


def errors(
    loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], exact: list[Tensor]
) -> dict[str, float]:
    hidden, weight, targets = inputs
    value = loss(hidden, weight, targets)
    values = [value.detach(), *torch.autograd.grad(value, (hidden, weight))]
    shares = [
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(values, exact, strict=True)
    ]
    return dict(zip(("loss", "hidden", "weight"), shares, strict=True))


def in_double(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> list[Tensor]:
    """Return loss and gradients in double precision, computed in chunks of tokens."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    for chunk_ids in torch.arange(len(h), device=h.device).split(chunk):
        loss = F.cross_entropy(
            F.linear(h[chunk_ids], w), targets[chunk_ids], ignore_index=IGNORE, reduction="sum"
        )
        loss.backward()
        total += loss.detach()
    assert h.grad is not None and w.grad is not None
    return [total, h.grad, w.grad]


def measure(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (
        (torch.randn(vocabulary, width, generator=generator) / width**0.5)
        .to(device, dtype)
        .requires_grad_()
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.1] = IGNORE
    inputs = (hidden, weight, targets.to(device))
    exact = in_double(*inputs)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, (loss, z) in CONTENDERS.items():
        rows[name] = {"name": name, "z": z}
        try:
            torch.compiler.reset()
            rows[name]["error"] = errors(loss, inputs, exact)
        except Exception as error:  # not installed or unsupported: reported in the row
            rows[name]["not measured"] = reason(error)
            continue
        calls[name] = lambda loss=loss: torch.autograd.grad(  # type: ignore[misc]
            loss(*inputs), (hidden, weight)
        )
    del exact
    for name, call in calls.items():
        call()  # recompiles, since torch.compiler.reset() dropped the graph
        rows[name]["peak_mb"] = peak_mb(call, device)
    for name, each in median_ms(calls, rounds, device).items():
        rows[name]["ms"] = each
    for row in rows.values():
        if "ms" in row:
            row["time / ours, eager"] = row["ms"] / rows["ours, eager"]["ms"]
    return list(rows.values())


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = CommandParser(__doc__)
    parser.add_argument("--tokens", type=int, default=65_536 if cuda else 2048)
    parser.add_argument("--width", type=int, default=2048 if cuda else 256)
    parser.add_argument("--vocabulary", type=int, default=32_000 if cuda else 4096)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16"] if cuda else ["bfloat16", "float32"],
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(args.threads)
    with user_errors():
        result = {
            "task": "loss_head",
            "machine": machine(device, "liger-kernel", "triton"),
            **vars(args) | {"output": None},
        }
        for name in args.dtypes:
            shape = (args.tokens, args.width, args.vocabulary)
            rows = result[name] = measure(*shape, DTYPES[name], device, args.rounds)
            print(f"{name}, {args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary}")
            for row in rows:
                if "ms" not in row:
                    print(f"{row['name']:>30}  not measured: {row['not measured']}")
                    continue
                error = ", ".join(f"{name} {share:.1e}" for name, share in row["error"].items())
                peak = f"{row['peak_mb']:9.0f} MB" if row["peak_mb"] else ""
                print(
                    f"{row['name']:>30} {row['ms']:8.2f} ms {row['time / ours, eager']:6.2f} x "
                    f"{peak}  errors: {error}"
                )
            write(args.output, result)  # after each dtype, in case the time runs out


if __name__ == "__main__":
    main()
