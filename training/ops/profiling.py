"""Profiling: a dry run of the largest step, a trace of a few steps, and out-of-memory advice."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from data.dataloader import Step
from training.config import RunConfig
from training.loop import backward
from training.objectives import Objective, next_token
from training.state import State

WAIT, WARMUP, ACTIVE = 1, 2, 3  # steps: compilation, warm-up of the profiler, traced steps
HISTORY = 100_000  # allocations and frees in a memory snapshot, with their stacks
MPS_FULL = "MPS backend out of memory"  # torch raises it as a plain RuntimeError


class ZeroBatch(NamedTuple):
    """A micro-batch of zeros."""

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
    """Collective. Run the largest step without an update, to detect a lack of memory early.

    Its tokens are zeros; for a mixture of experts they are 0, 1, 2, ..., to use all experts.

    objective: of the stage (default: next token). largest: its largest micro-batch, a NamedTuple
    with `tokens` and `doc_ids` (default: a ZeroBatch of micro_batch_size rows). It
    drops gradients and draws no random numbers, so training is unchanged. Returns the peak in GB
    (CPU: 0).

    With gradient accumulation the step has two micro-batches, since unsharded gradients wait for
    the last one. A new run has no AdamW moments yet; a placeholder takes their
    memory. Varlen and flash kernels recompile when the number of documents first changes, so
    they run once with one document per row and once with two.
    """
    data, model, cuda = run.data, state.model, device.type == "cuda"
    if largest is None:
        zeros = torch.zeros(
            data.micro_batch_size, data.sequence_length, dtype=torch.int64, device=device
        )
        largest = ZeroBatch(zeros, zeros, zeros.int(), torch.arange(len(zeros), device=device))
    if run.model.kind == "moe":
        zeros = largest.tokens
        count = torch.arange(zeros.numel(), device=zeros.device, dtype=zeros.dtype)
        largest = largest._replace(tokens=(count % run.model.vocab_size).view_as(zeros))
    halves = largest.doc_ids.clone()
    halves[:, halves.shape[1] // 2 :] = 1
    batches = [largest, largest._replace(doc_ids=halves)]
    accumulates = data.rows // dist.get_world_size() // data.micro_batch_size > 1
    takes_offsets = run.parallel.attention in ("varlen", "flash")
    steps = [batches] if accumulates else [[batch] for batch in batches[: 1 + takes_offsets]]
    moments = []
    if cuda and not state.optimizer.state:
        parameters: list[Any] = list(model.parameters())
        size = sum(parameter.to_local().numel() for parameter in parameters)
        moments = [torch.empty(2 * size, device=device)]
    model.train()
    tokens = largest.tokens.numel()
    with memory_history(cuda):
        for micro_batches in steps:
            step = Step(micro_batches, tokens, tokens)
            backward(run, model, step, objective or next_token(run.optim.z_weight))
            state.optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if cuda else 0.0
    del moments
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


@contextmanager
def out_of_memory(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error into a ValueError that names the setting to change.

    Writes a memory snapshot first, on CUDA.
    """
    try:
        yield
    except RuntimeError as error:  # includes torch.OutOfMemoryError
        if not isinstance(error, torch.OutOfMemoryError) and MPS_FULL not in str(error):
            raise
        rank = dist.get_rank()
        path = run.logs / "profile" / f"{run.phase}.out_of_memory.rank{rank}.pickle"
        written = snapshot(path, device)
        viewer = f"; open {path} at https://pytorch.org/memory_viz" if written else ""
        raise ValueError(
            f"rank {rank} is out of memory{_use(device)} with micro-batches of "
            f"{run.data.micro_batch_size} rows of {run.data.sequence_length} tokens: "
            f"{advice(run, dist.get_world_size())}{viewer}"
        ) from error


def advice(run: RunConfig, world: int) -> str:
    """Return settings that save memory without changing results, the cheapest first."""
    data, parallel = run.data, run.parallel
    rows_per_rank = data.rows // world
    smaller = [rows for rows in range(1, data.micro_batch_size) if rows_per_rank % rows == 0]
    options = []
    if smaller:
        size = f"data.micro_batch_size={max(smaller)}"
        options.append(f"{size} (a step stays {data.tokens_per_step:,} tokens)")
    if parallel.activation_checkpointing != "full":
        level = "selective" if parallel.activation_checkpointing == "none" else "full"
        options.append(f"parallel.activation_checkpointing={level}")
    if parallel.strategy != "zero3" and world > 1:
        options.append("parallel.strategy=zero3")
    return "set " + ", or ".join(options) if options else "use more GPUs, or GPUs with more memory"


@contextmanager
def traced(run: RunConfig, state: State, device: torch.device) -> Iterator[None]:
    """Trace ACTIVE training steps on every rank into logs/<run>/profile/.

    Writes <phase>.rank<r>.trace.json.gz (for https://ui.perfetto.dev) and, on a GPU,
    <phase>.rank<r>.memory.pickle. Rank 0 prints the slowest operators.
    """
    rank, folder, cuda = dist.get_rank(), run.logs / "profile", device.type == "cuda"
    needed = WAIT + WARMUP + ACTIVE
    remaining = state.end - state.step
    if remaining < needed:
        raise ValueError(
            f"--profile needs {needed} steps, but {run.phase} has {remaining} left; "
            "profile it earlier"
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

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    steps = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with (
        memory_history(cuda),
        profile(
            activities=activities, schedule=steps, on_trace_ready=write, record_shapes=True
        ) as profiler,
    ):
        hook = state.optimizer.register_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            hook.remove()


def table(profiler: profile, cuda: bool, rows: int = 12) -> str:
    """Return a table of the operators with the largest self time: share, ms and calls per step."""
    time = lambda event: event.self_device_time_total if cuda else event.self_cpu_time_total  # noqa: E731
    events = sorted(
        (e for e in profiler.key_averages() if not e.key.startswith("ProfilerStep")),
        key=time,
        reverse=True,
    )
    total = sum(time(event) for event in events) or 1
    header = f"{'share':>6} {'ms/step':>9} {'calls/step':>10}"
    lines = [f"{header}  operator ({'GPU' if cuda else 'CPU'} self time)"]
    for event in events[:rows]:
        per_step, calls = time(event) / 1e3 / ACTIVE, event.count / ACTIVE
        share = time(event) / total
        lines.append(f"{share:>6.1%} {per_step:>9.2f} {calls:>10.1f}  {event.key[:80]}")
    return "\n".join(lines)


@contextmanager
def memory_history(cuda: bool) -> Iterator[None]:
    """Record allocations with their stacks for a snapshot; on a GPU only."""
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    yield
    if cuda:  # after an error the record is kept for a snapshot
        torch.cuda.memory._record_memory_history(enabled=None)


def snapshot(path: Path, device: torch.device) -> Path | None:
    """Write a snapshot of the GPU's memory; None on a CPU."""
    if device.type != "cuda":
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    return path


def _use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB in use)"
