"""Where time and memory go: a dry run of the largest step, a trace of a few steps, and what to do when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from training.config import RunConfig
from training.loop import backward
from training.objectives import Objective, next_token
from training.state import State

WAIT, WARMUP, ACTIVE = (
    1,
    2,
    3,
)  # steps: the first compiles, the next warm the profiler up, these are traced
HISTORY = 100_000  # allocations and frees that a memory snapshot remembers with their stacks


class ZeroBatch(NamedTuple):
    """Rows of zeros as one micro-batch."""

    tokens: torch.Tensor  # [B, T] int64
    targets: torch.Tensor  # [B, T] int64
    doc_ids: torch.Tensor  # [B, T] int32
    rows: torch.Tensor  # [B] int64


def dry_run(
    run: RunConfig,
    state: State,
    device: torch.device,
    objective: Objective | None = None,
    largest: Any = None,
) -> float:
    """Collective. Run the largest step on zeros, without its update, so that too little memory shows before training.

    objective: of the stage (default: next token). largest: its largest micro-batch, a NamedTuple with `tokens` and `docs`
    (default: a ZeroBatch of micro_batch_size rows). Gradients are dropped and nothing random is drawn, so nothing changes.
    Returns the peak in GB (0 on a CPU).

    Two micro-batches where a step has more, since gradients then wait whole for the last one; AdamW's moments, which a new
    run has not made yet, are stood in for. Kernels that take starts of documents see two counts of them, since they are
    compiled anew when the count first changes.
    """
    data, model, cuda = run.data, state.model, device.type == "cuda"
    if largest is None:
        zeros = torch.zeros(
            data.micro_batch_size, data.sequence_length, dtype=torch.int64, device=device
        )
        largest = ZeroBatch(zeros, zeros, zeros.int(), torch.arange(len(zeros), device=device))
    halves = largest.doc_ids.clone()
    halves[:, halves.shape[1] // 2 :] = 1
    batches = [largest, largest._replace(doc_ids=halves)]
    several = data.rows // dist.get_world_size() // data.micro_batch_size > 1
    ways = (
        [batches]
        if several
        else [
            [each] for each in batches[: 2 if run.parallel.attention in ("varlen", "flash") else 1]
        ]
    )
    moments = []
    if cuda and not state.optimizer.state:
        own = sum(part.to_local().numel() for part in model.parameters())
        moments = [torch.empty(2 * own, device=device)]
    model.train()
    with memory_history(cuda):
        for way in ways:
            step = SimpleNamespace(batches=way, weight=largest.tokens.numel())
            backward(run, model, step, objective or next_token(run.optim.z_weight))
            state.optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else 0.0
    del moments
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


@contextmanager
def out_of_memory(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into a ValueError that says which setting to change, after writing a snapshot of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        path = snapshot(
            run.logs / "profile" / f"{run.phase}.out_of_memory.rank{dist.get_rank()}.pickle", device
        )
        raise ValueError(
            f"rank {dist.get_rank()} has no memory left{_use(device)} for micro-batches of {run.data.micro_batch_size} rows of "
            f"{run.data.sequence_length} tokens: {advice(run, dist.get_world_size())}"
            + (f"; https://pytorch.org/memory_viz shows what {path} holds" if path else "")
        ) from error


def advice(run: RunConfig, world: int) -> str:
    """What to change when memory runs out, the cheapest first; none of it changes what is computed."""
    data, parallel = run.data, run.parallel
    share = data.rows // world
    smaller = [rows for rows in range(1, data.micro_batch_size) if share % rows == 0]
    ways = (
        [f"data.micro_batch_size={max(smaller)} (a step stays {data.tokens_per_step:,} tokens)"]
        if smaller
        else []
    )
    if parallel.activation_checkpointing != "full":
        ways.append(
            f"parallel.activation_checkpointing={'selective' if parallel.activation_checkpointing == 'none' else 'full'}"
        )
    if parallel.strategy != "zero3" and world > 1:
        ways.append("parallel.strategy=zero3")
    return (
        "set " + ", or ".join(ways)
        if ways
        else "this model needs more GPUs, or ones with more memory"
    )


@contextmanager
def traced(run: RunConfig, state: State, device: torch.device) -> Iterator[None]:
    """Trace ACTIVE steps of the training inside, on every rank, into logs/<run>/profile/; rank 0 prints the slowest operators.

    Writes <phase>.rank<r>.trace.json.gz (for https://ui.perfetto.dev) and, on a GPU, .memory.pickle. Nothing else changes.
    """
    rank, folder, cuda = dist.get_rank(), run.logs / "profile", device.type == "cuda"
    need = WAIT + WARMUP + ACTIVE
    left = state.end - state.step
    if left < need:
        raise ValueError(
            f"--profile needs {need} steps and {left} are left of {run.phase}; profile an earlier part of it"
        )
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: profile) -> None:
        trace = folder / f"{run.phase}.rank{rank}.trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        snapshot(folder / f"{run.phase}.rank{rank}.memory.pickle", device)
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        if rank == 0:
            print(table(profiler, cuda), f"traced {ACTIVE} steps: {trace}", sep="\n", flush=True)

    what = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with (
        memory_history(cuda),
        profile(
            activities=what, schedule=plan, on_trace_ready=write, record_shapes=True
        ) as profiler,
    ):
        hook = state.optimizer.register_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            hook.remove()


def table(profiler: profile, cuda: bool, rows: int = 12) -> str:
    """The operators that take longest by their own time: share, milliseconds and calls a step."""
    time = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total  # noqa: E731
    events = sorted(
        (e for e in profiler.key_averages() if not e.key.startswith("ProfilerStep")),
        key=time,
        reverse=True,
    )
    total = sum(time(event) for event in events) or 1
    lines = [
        f"{'share':>6} {'ms/step':>9} {'calls/step':>10}  operator ({'GPU' if cuda else 'CPU'} time of its own)"
    ]
    for event in events[:rows]:
        per_step = time(event) / 1e3 / ACTIVE
        lines.append(
            f"{time(event) / total:>6.1%} {per_step:>9.2f} {event.count / ACTIVE:>10.1f}  {event.key[:80]}"
        )
    return "\n".join(lines)


@contextmanager
def memory_history(cuda: bool) -> Iterator[None]:
    """Remember allocations with their stacks, for a snapshot; on a GPU only."""
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    yield
    if cuda:  # not after an error: its snapshot is still to be written
        torch.cuda.memory._record_memory_history(enabled=None)


def snapshot(path: Path, device: torch.device) -> Path | None:
    """Write what the GPU's memory holds; None on a CPU."""
    if device.type != "cuda":
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    return path


def _use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are taken)"
