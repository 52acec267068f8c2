"""Measurements of a finished run: validation curve, training seconds and final values.

Reads metrics.jsonl and events.jsonl, which every entry point writes.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import parse_json, read_lines
from lab.experiment import UNTIMED_STEPS, Trial

AXES = ("tokens", "steps", "seconds")


@dataclass(frozen=True)
class Point:
    """One validation of a run."""

    steps: float
    tokens: float
    seconds: float  # of training, up to this step
    value: float


@dataclass(frozen=True)
class Measurement:
    """The measurements of one run."""

    variant: str
    seed: int
    curves: dict[str, list[Point]]  # metric -> validations, in order of their steps
    final: dict[str, float]  # metric -> last value; NaN if the run did not measure it
    steps: int
    tokens: int
    seconds: float


def metrics_folder(trial: Trial) -> Path:
    """Return the folder of a run's metrics.jsonl; for a plan, that of its pretraining phases."""
    if not trial.files:
        return trial.folder
    folders = sorted(path.parent for path in trial.folder.glob("logs/*/metrics.jsonl"))
    return folders[0] if folders else trial.folder


def measure(trial: Trial, metrics: tuple[str, ...]) -> Measurement:
    """Read a run's logs. ValueError if it has no steps, or no value of the first metric."""
    folder = metrics_folder(trial)
    rows, events = read_lines(folder / "metrics.jsonl"), read_lines(folder / "events.jsonl")
    if not rows:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no steps; run {trial.name} again")
    seconds = timed_seconds(rows, events)
    before = [event for event in events if event.get("event") == "measured"]
    zeros = {"steps": 0.0, "tokens": 0.0, "seconds": 0.0}
    curves = {
        metric: [
            *(Point(**zeros, value=float(event[metric])) for event in before if metric in event),
            *(
                Point(row["step"], row["tokens"], total, float(row[metric]))
                for row, total in zip(rows, seconds, strict=True)
                if metric in row
            ),
        ]
        for metric in metrics
    }
    final = {
        metric: points[-1].value if points else _from_file(trial.folder, metric)
        for metric, points in curves.items()
    }
    if math.isnan(final[metrics[0]]) and not curves[metrics[0]]:
        known = sorted({key for row in rows for key in row if key.startswith("val/")})
        raise ValueError(
            f"{trial.name} measured no {metrics[0]}; metrics of its log: {', '.join(known)}"
        )
    last = rows[-1]
    return Measurement(
        trial.variant, trial.seed, curves, final, last["step"], last["tokens"], seconds[-1]
    )


def timed_seconds(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[float]:
    """Return the cumulative training seconds after each row, [rows].

    Sums step_s, which excludes validation and saving. The first UNTIMED_STEPS steps of each process
    count as median steps, since they include compilation.
    """
    starts = {rows[0]["step"] - 1} | {
        event["step"]
        for event in events
        if event.get("event") in ("begun", "resumed", "rollback") and "step" in event
    }
    untimed = {start + offset for start in starts for offset in range(1, UNTIMED_STEPS + 1)}
    timed = [row["step_s"] for row in rows if row["step"] not in untimed]
    median = statistics.median(timed or [row["step_s"] for row in rows])
    total, totals = 0.0, []
    for row in rows:
        total += median if row["step"] in untimed else row["step_s"]
        totals.append(total)
    return totals


def seconds_per_step(trial: Trial) -> float:
    """Return the mean seconds of a pilot's timed steps."""
    rows = read_lines(trial.folder / "metrics.jsonl")
    timed = [row["step_s"] for row in rows if row["step"] > UNTIMED_STEPS]
    if not timed:
        raise ValueError(
            f"the pilot {trial.name} has only {len(rows)} steps; delete {trial.folder}"
        )
    return statistics.fmean(timed)


def _from_file(folder: Path, metric: str) -> float:
    """Read a metric FILE.json:KEY.KEY from a file of the run; NaN if it is missing.

    Evaluation results hold {"value": ..., "stderr": ...} per metric; this returns the value.
    """
    name, _, keys = metric.partition(":")
    path = folder / name
    if not (keys and path.is_file()):
        return math.nan
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        for key in keys.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        return float(value["value"] if isinstance(value, dict) else value)
    except (ValueError, KeyError, IndexError, TypeError):
        return math.nan
