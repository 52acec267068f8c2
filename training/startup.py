"""Checks of the first steps of a phase: first loss, gradient norm, throughput. A no-go ends the run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from files import read_lines
from ranges import above, at_least, check_fields
from training.distributed import run_on_rank0
from training.logger import Log
from training.state import State

if TYPE_CHECKING:
    from training.config import RunConfig

NO_GO = 3  # exit status, the same as that of a plan's gates
OFF = "null turns this check off"
Bound = Annotated[float, above(0, hint=OFF)]
WARM_UP = (
    10  # steps that throughput and GPU utilization leave out: clocks and caches settle in them
)


@dataclass(frozen=True)
class StartupConfig:
    """Bounds on the first steps of a phase. None: not checked."""

    # Length of the window; a shorter phase is its own window; 0: no checks.
    steps: Annotated[int, at_least(0, hint="0 turns the checks off")] = 500
    loss_margin: Bound | None = (
        1.0  # nats between the first loss and ln(vocabulary); from scratch only
    )
    fall: Bound | None = (
        0.5  # nats that the loss must fall over the whole window; from scratch only
    )
    max_grad_norm: Bound | None = None  # bound on the median over the window, before clipping
    min_tokens_per_s: Bound | None = None  # over all ranks
    min_gpu_utilization: Annotated[float, above(0, most=1, hint=OFF)] | None = (
        None  # of rank 0's GPU, 0 to 1; needs nvidia-ml-py
    )
    accept: str | None = None  # reason to continue after a no-go; it is recorded

    def __post_init__(self) -> None:
        check_fields(self, "startup")


class Figure(NamedTuple):
    """One measured value with its bounds, and what to look at if it is outside them."""

    name: str
    value: float | None  # None: not measured, which is a no-go
    least: float | None
    most: float | None
    advice: str

    @property
    def go(self) -> bool:
        low, high = self.least, self.most
        return self.value is not None and (
            (low is None or self.value >= low) and (high is None or self.value <= high)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        asked = " and ".join(f"{word} {_number(x)}" for word, x in bounds if x is not None)
        value = "not measured" if self.value is None else _number(self.value)
        return f"{self.name} {value}, {asked} required"


def check_startup(run: "RunConfig", state: State, log: Log) -> bool:
    """Judge the first step and the end of the window. True for a no-go that nobody accepted.

    Collective at those two steps; every other step costs nothing. All figures are read from
    metrics.jsonl, so a resumed run finds those of the steps before, and a step is judged once.
    """
    done, window = state.step - state.phase_start, _window(run, state)
    wanted = [part for part, step in ((_of_first_step, 1), (_of_window, window)) if done == step]
    if not run.startup.steps or not wanted or not _asks(run, state, first=done < window):
        return False

    def judged() -> list[Figure]:
        rows = _rows(run.logs, state)
        return [figure for part in wanted for figure in part(run, state, rows)]

    figures = run_on_rank0(judged)
    bad = [figure for figure in figures if not figure.go]
    accepted = run.startup.accept if bad else None
    text = f"start-up checks at step {state.step:,}: {'no-go' if bad else 'go'}"
    text += f", accepted: {accepted}" if accepted else ""
    text += "; " + "; ".join(f"{figure}: {'go' if figure.go else 'no-go'}" for figure in figures)
    plain = [{**figure._asdict(), "go": figure.go} for figure in figures]
    outcome = "no-go" if bad else "go"
    log.event("startup", f"        {text}", outcome=outcome, accepted=accepted, figures=plain)
    if bad and not accepted:
        state.faults.no_go = _sentence(bad, state.step)
    return bool(state.faults.no_go)


def refused(run: "RunConfig", state: State, log: Log) -> bool:
    """True if the start-up checks ended this run before and nobody has accepted that yet."""
    if state.faults.no_go and run.startup.accept:
        text = f"        accepted: {run.startup.accept}; it was: {state.faults.no_go}"
        log.event("startup", text, outcome="no-go", accepted=run.startup.accept, step=state.step)
        state.faults.no_go = ""
    return bool(state.faults.no_go)


def _window(run: "RunConfig", state: State) -> int:
    return min(run.startup.steps, state.phase_end - state.phase_start)


def _from_scratch(run: "RunConfig", state: State) -> bool:
    return not run.init_from and state.phase_start == 0


def _asks(run: "RunConfig", state: State, first: bool) -> bool:
    """True if any bound applies; the same on all ranks, so that they enter the collective together."""
    config, scratch = run.startup, _from_scratch(run, state)
    at_first = scratch and config.loss_margin is not None
    falls = scratch and config.fall is not None and _window(run, state) == config.steps
    others = (config.max_grad_norm, config.min_tokens_per_s, config.min_gpu_utilization)
    return at_first if first else falls or any(x is not None for x in others) or at_first


def _rows(logs: Path, state: State) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl for the steps of this phase so far."""
    steps = range(state.phase_start + 1, state.step + 1)
    return [row for row in read_lines(logs / "metrics.jsonl") if row.get("step") in steps]


def _of_first_step(run: "RunConfig", state: State, rows: list[dict[str, Any]]) -> Iterable[Figure]:
    margin = run.startup.loss_margin
    if margin is not None and _from_scratch(run, state):
        uniform = math.log(run.model.vocab_size)
        advice = "model.initializer_range, and whether the tokenizer is the one of the data"
        yield Figure(
            "first loss", _first_loss(state, rows), uniform - margin, uniform + margin, advice
        )


def _of_window(run: "RunConfig", state: State, rows: list[dict[str, Any]]) -> Iterable[Figure]:
    config, warm = run.startup, rows[min(WARM_UP, len(rows) // 2) :]
    if (
        config.fall is not None
        and _from_scratch(run, state)
        and _window(run, state) == config.steps
    ):
        first, last = _first_loss(state, rows), rows[-max(1, len(rows) // 10) :]
        fall = first - fmean(row["loss"] for row in last) if first is not None else None
        advice = "the loss curve (python -m scripts.plot_run), optim.lr, schedule.warmup_steps and the data"
        yield Figure("fall of the loss", fall, config.fall, None, advice)
    if config.max_grad_norm is not None:
        norm = median(row["grad_norm"] for row in rows) if rows else None
        advice = "grad_norm in metrics.jsonl; a lower optim.lr or a longer schedule.warmup_steps may help"
        yield Figure("median gradient norm", norm, None, config.max_grad_norm, advice)
    if config.min_tokens_per_s is not None:
        seconds = sum(row["step_s"] for row in warm)
        tokens = sum(row["step_s"] * row["tokens_per_s"] for row in warm)
        advice = "mfu and data/wait_frac in metrics.jsonl, and the parallel section of the config"
        rate = tokens / seconds if seconds else None
        yield Figure("tokens/s", rate, config.min_tokens_per_s, None, advice)
    if config.min_gpu_utilization is not None:
        shares = [row["gpu_util"] for row in warm if "gpu_util" in row]
        advice = "data/wait_frac in metrics.jsonl; without nvidia-ml-py nothing is measured"
        share = fmean(shares) if shares else None
        yield Figure("GPU utilization", share, config.min_gpu_utilization, None, advice)


def _first_loss(state: State, rows: list[dict[str, Any]]) -> float | None:
    found = bool(rows) and rows[0]["step"] == state.phase_start + 1
    return rows[0]["loss"] if found else None


def _sentence(bad: list[Figure], step: int) -> str:
    what, look = "; ".join(map(str, bad)), "; ".join(figure.advice for figure in bad)
    return (
        f"the start-up checks say no-go at step {step:,}: {what}; the run is saved; look at {look}; to "
        'continue, give the same command with startup.accept="reason"'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
