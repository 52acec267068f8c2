"""Start-up checks of a phase: first loss, gradient norm and throughput. A no-go ends the run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch

from files import read_lines
from machine import gpu_utilization
from ranges import above, at_least, check_fields
from training.distributed import run_on_rank0
from training.logger import Log
from training.state import State

if TYPE_CHECKING:
    from training.config import RunConfig

NO_GO = 3  # exit status; a plan's gates use the same
OFF = "null turns this check off"
Bound = Annotated[float, above(0, hint=OFF)]
WARM_UP = 10  # steps that throughput and GPU utilization exclude


@dataclass(frozen=True)
class StartupConfig:
    """Bounds on the first steps of a phase. None: not checked."""

    # Steps of the checked window; a shorter phase is checked as a whole; 0: no checks.
    steps: Annotated[int, at_least(0, hint="0 turns the checks off")] = 500
    # Maximum nats between the first loss and ln(vocabulary), in training from scratch.
    loss_margin: Bound | None = 1.0
    # Nats by which the loss must fall over the window, in training from scratch.
    fall: Bound | None = 0.5
    # Maximum of the median gradient norm over the window, before clipping.
    max_grad_norm: Bound | None = None
    min_tokens_per_s: Bound | None = None  # minimum speed over all ranks
    # Minimum use of rank 0's GPU, 0 to 1; needs nvidia-ml-py. Not checked on a CPU.
    min_gpu_utilization: Annotated[float, above(0, maximum=1, hint=OFF)] | None = None
    accept: str | None = None  # reason to continue after a no-go; the log records it

    def __post_init__(self) -> None:
        check_fields(self, "startup")


class BoundedMetric(NamedTuple):
    """A metric of the first steps; without bounds it is only reported."""

    name: str
    value: float | None  # None: not measured, which is a no-go
    least: float | None
    most: float | None
    advice: str  # what to inspect on a no-go

    @property
    def go(self) -> bool:
        low, high = self.least, self.most
        return self.value is not None and (
            (low is None or self.value >= low) and (high is None or self.value <= high)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        bound = " and ".join(f"{word} {_number(x)}" for word, x in bounds if x is not None)
        value = "not measured" if self.value is None else _number(self.value)
        return f"{self.name} {value}" + (f", {bound} required" if bound else "")


def check_startup(run: "RunConfig", state: State, log: Log) -> bool:
    """Check the first step and the end of the window; return True for an unaccepted no-go.

    Collective at these two steps; all other steps return at once. All figures come from
    metrics.jsonl, so a resumed run includes earlier steps and checks each step once.
    """
    done, window = state.step - state.phase_start, _window(run, state)
    checks = [check for check, step in ((_first_step, 1), (_full_window, window)) if done == step]
    if not run.startup.steps or not checks or not _has_bound(run, state, first=done < window):
        return False

    def measure() -> list[BoundedMetric]:
        rows = _rows(run.logs, state)
        return [figure for check in checks for figure in check(run, state, rows)]

    figures = run_on_rank0(measure)
    if not figures:  # the only bound is on a GPU, and this is a CPU
        return False
    bad = [figure for figure in figures if not figure.go]
    accepted = run.startup.accept if bad else None
    outcome = "no-go" if bad else "go"
    text = f"start-up checks at step {state.step:,}: {outcome}"
    text += f", accepted: {accepted}" if accepted else ""
    text += "; " + "; ".join(map(_verdict, figures))
    fields = [{**figure._asdict(), "go": figure.go} for figure in figures]
    log.event("startup", f"        {text}", outcome=outcome, accepted=accepted, figures=fields)
    if bad and not accepted:
        state.faults.no_go = _no_go_text(bad, state.step)
    return bool(state.faults.no_go)


def unmeasured_line(run: "RunConfig", device: torch.device) -> list[str]:
    """Return a line if startup.min_gpu_utilization is set but cannot be measured on a device."""
    if run.startup.min_gpu_utilization is None or not run.startup.steps:
        return []
    if device.type != "cuda":
        return [f"startup.min_gpu_utilization is not checked on {device.type}"]
    if gpu_utilization(device) is None:
        return [
            "warning: GPU utilization cannot be measured, so the start-up checks will end in a "
            "no-go: pip install nvidia-ml-py, or set startup.min_gpu_utilization=null on a GPU "
            "that does not report it (MIG)"
        ]
    return []


def resolve_earlier_no_go(run: "RunConfig", state: State, log: Log) -> bool:
    """Return True if a no-go of an earlier command still blocks training.

    With startup.accept, log that the no-go is accepted, clear state.faults.no_go and return False.
    """
    if state.faults.no_go and run.startup.accept:
        text = f"        accepted: {run.startup.accept}; previous outcome: {state.faults.no_go}"
        log.event("startup", text, outcome="no-go", accepted=run.startup.accept, step=state.step)
        state.faults.no_go = ""
    return bool(state.faults.no_go)


def _window(run: "RunConfig", state: State) -> int:
    return min(run.startup.steps, state.phase_end - state.phase_start)


def _from_scratch(run: "RunConfig", state: State) -> bool:
    return not run.init_from and state.phase_start == 0


def _has_bound(run: "RunConfig", state: State, first: bool) -> bool:
    """Return True if any bound applies; equal on all ranks, as the collective requires."""
    config, scratch = run.startup, _from_scratch(run, state)
    first_loss = scratch and config.loss_margin is not None
    falls = scratch and config.fall is not None and _window(run, state) == config.steps
    bounds = (config.max_grad_norm, config.min_tokens_per_s, config.min_gpu_utilization)
    return first_loss if first else falls or any(x is not None for x in bounds) or first_loss


def _rows(logs: Path, state: State) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of this phase so far."""
    steps = range(state.phase_start + 1, state.step + 1)
    return [row for row in read_lines(logs / "metrics.jsonl") if row.get("step") in steps]


def _first_step(
    run: "RunConfig", state: State, rows: list[dict[str, Any]]
) -> Iterable[BoundedMetric]:
    margin = run.startup.loss_margin
    if margin is not None and _from_scratch(run, state):
        uniform = math.log(run.model.vocab_size)
        advice = "model.initializer_range, and whether the data use this tokenizer"
        loss = _first_loss(state, rows)
        yield BoundedMetric("first loss", loss, uniform - margin, uniform + margin, advice)


def _full_window(
    run: "RunConfig", state: State, rows: list[dict[str, Any]]
) -> Iterable[BoundedMetric]:
    config, warm = run.startup, rows[min(WARM_UP, len(rows) // 2) :]
    is_full = _window(run, state) == config.steps
    if config.fall is not None and is_full and _from_scratch(run, state):
        first, last = _first_loss(state, rows), rows[-max(1, len(rows) // 10) :]
        fall = first - fmean(row["loss"] for row in last) if first is not None else None
        advice = (
            "the loss curve (python -m scripts.plot_run), optim.lr, schedule.warmup_steps and data"
        )
        yield BoundedMetric("fall of the loss", fall, config.fall, None, advice)
    if config.max_grad_norm is not None:
        norm = median(row["grad_norm"] for row in rows) if rows else None
        advice = (
            "grad_norm in metrics.jsonl; a lower optim.lr or a longer schedule.warmup_steps "
            "may help"
        )
        yield BoundedMetric("median gradient norm", norm, None, config.max_grad_norm, advice)
    if config.min_tokens_per_s is not None:
        seconds = sum(row["step_s"] for row in warm)
        tokens = sum(row["step_s"] * row["tokens_per_s"] for row in warm)
        advice = "mfu and data/wait_frac in metrics.jsonl, and the parallel section of the config"
        rate = tokens / seconds if seconds else None
        yield BoundedMetric("tokens/s", rate, config.min_tokens_per_s, None, advice)
    shares = [row["gpu_util"] for row in warm if "gpu_util" in row]
    least = config.min_gpu_utilization
    if shares or (least is not None and _on_gpu(state)):
        advice = "data/wait_frac in metrics.jsonl; the measurement needs nvidia-ml-py"
        share = fmean(shares) if shares else None
        yield BoundedMetric("GPU utilization", share, least, None, advice)


def _on_gpu(state: State) -> bool:
    return next(state.model.parameters()).device.type == "cuda"


def _verdict(figure: BoundedMetric) -> str:
    is_bounded = figure.least is not None or figure.most is not None
    return f"{figure}: {'go' if figure.go else 'no-go'}" if is_bounded else str(figure)


def _first_loss(state: State, rows: list[dict[str, Any]]) -> float | None:
    is_first = bool(rows) and rows[0]["step"] == state.phase_start + 1
    return rows[0]["loss"] if is_first else None


def _no_go_text(bad: list[BoundedMetric], step: int) -> str:
    figures, advice = "; ".join(map(str, bad)), "; ".join(figure.advice for figure in bad)
    return (
        f"no-go at step {step:,} in the start-up checks: {figures}. The run is saved. Inspect "
        f'{advice}. To continue, repeat the command with startup.accept="reason"'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
