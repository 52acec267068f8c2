"""Scaling forecast of an experiment: its runs, the held-out largest run, chart and report.

The law is training/planning/scaling_law.py. `scripts/forecast.py` is the command.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from files import read_lines, read_object
from lab.run import FINISHED, STATE
from training.config import RunConfig
from training.planning.scaling_law import (
    CONFIDENCE,
    PARAMETERS,
    Interval,
    Run,
    ScalingLaw,
    fit,
    non_embedding_parameters,
)
from training.settings import load_settings

CURVES = "curves.csv"  # file in a record folder


class HeldOut(NamedTuple):
    """The runs with the most compute, and their forecast by a law fitted without them."""

    runs: list[Run]
    law: ScalingLaw
    predicted: float
    interval: Interval  # of the mean over the same number of seeds
    measured: float

    @property
    def is_inside(self) -> bool:
        """Return True if the measured mean lies within the interval."""
        return self.interval[0] <= self.measured <= self.interval[1]


def read_runs(folder: Path, metric: str) -> list[Run]:
    """Read the finished runs of logs/lab/NAME or of a record folder, smallest compute first.

    ValueError if no run in the folder measured the metric.
    """
    is_record = (folder / CURVES).is_file()
    runs = _of_record(folder, metric) if is_record else _of_logs(folder, metric)
    if not runs:
        raise ValueError(
            f"{folder} has no finished run with {metric}; give logs/lab/NAME or a folder of "
            "records/ that scripts.experiment wrote, and check --metric"
        )
    return sorted(runs, key=lambda run: (run.compute, run.seed))


def _of_logs(folder: Path, metric: str) -> list[Run]:
    runs = []
    for path in sorted(folder.glob(f"*/{STATE}")):
        state, logs = read_object(path) or {}, path.parent
        configs = sorted(logs.glob("*.config.yaml"))
        name = f"{state.get('variant')}-{state.get('seed')}"
        # Pilots and runs with earlier settings have other folder names.
        if state.get("status") != FINISHED or logs.name != name or not configs:
            continue
        rows = [row for row in read_lines(logs / "metrics.jsonl") if metric in row]
        if rows:
            loss, tokens = float(rows[-1][metric]), int(rows[-1]["tokens"])
            size = _size(configs[-1])
            runs.append(Run(state["variant"], state["seed"], size, tokens, loss))
    return runs


def _of_record(folder: Path, metric: str) -> list[Run]:
    last = {}
    with open(folder / CURVES, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] == metric:
                last[row["variant"], int(row["seed"])] = row
    sizes = {name: _size(folder / "configs" / f"{name}.yaml") for name, _ in last}
    return [
        Run(name, seed, sizes[name], round(float(row["tokens"])), float(row["value"]))
        for (name, seed), row in last.items()
    ]


def _size(config: Path) -> int:
    """Return the non-embedding parameters of a resolved config of train.py."""
    return non_embedding_parameters(load_settings(RunConfig, config).model)


def hold_out_largest(runs: Sequence[Run], draws: int, metric: str) -> HeldOut:
    """Fit the law without the runs with the most compute, and forecast those runs."""
    largest = max(runs, key=lambda run: run.compute).cell
    held_out = [run for run in runs if run.cell == largest]
    law = fit([run for run in runs if run.cell != largest], draws, metric)
    mean = math.fsum(run.loss for run in held_out) / len(held_out)
    return HeldOut(held_out, law, law.loss(*largest), law.interval(*largest, len(held_out)), mean)


def forecast_values(source: Path, runs: Sequence[Run], held_out: HeldOut, law: ScalingLaw) -> Any:
    """Return the content of forecast.json. law: fitted to all runs."""
    largest = held_out.runs[0]
    return {
        "source": str(source),
        "runs": [run._asdict() for run in runs],
        "held_out": {
            "name": largest.name,
            "parameters": largest.parameters,
            "tokens": largest.tokens,
            "seeds": [run.seed for run in held_out.runs],
            "predicted": held_out.predicted,
            "interval": list(held_out.interval),
            "measured": held_out.measured,
            "inside": held_out.is_inside,
        },
        "constants": law.constants,
        "intervals": {name: list(pair) for name, pair in law.parameter_intervals().items()},
        "prior_share": law.prior_share,
        "law": law.as_json(),
    }


def held_out_lines(held_out: HeldOut) -> list[str]:
    """Return the comparison of the held-out runs as lines for the console."""
    largest, law = held_out.runs[0], held_out.law
    low, high = held_out.interval
    n, d = law.factors(*largest.cell)
    seeds = ", ".join(str(run.seed) for run in held_out.runs)
    return [
        f"held out   {largest.name}: {_count(largest.parameters)} parameters, "
        f"{_count(largest.tokens)} tokens, seeds {seeds}; {n:.2f} x the largest size and "
        f"{d:.2f} x the most tokens of the fitted runs",
        f"predicted  {held_out.predicted:.4f} [{low:.4f}, {high:.4f}], {CONFIDENCE:.0%} interval "
        f"of the mean over {len(held_out.runs)} seeds, fitted without them",
        f"measured   {held_out.measured:.4f}: "
        f"{'inside' if held_out.is_inside else 'OUTSIDE'} the interval",
    ]


def law_lines(law: ScalingLaw) -> list[str]:
    """Return the law with its intervals as lines for the console."""
    shares, intervals = law.prior_share, law.parameter_intervals()
    lines = []
    for name, value in zip(PARAMETERS, law.best, strict=True):
        low, high = intervals[name]
        share = f"{shares[name]:.0%} of the prior's width"
        lines.append(f"{name:<10} {value:.4g} [{low:.4g}, {high:.4g}], {share}")
    constants = ", ".join(f"{name} {value:.4g}" for name, value in law.constants.items())
    return [*lines, f"constants  {constants}"]


def report(source: Path, held_out: HeldOut, law: ScalingLaw, runs: Sequence[Run]) -> str:
    """Return the forecast as markdown, beside forecast.json and forecast.png."""
    lines = [
        f"# Scaling forecast of {source.name}",
        "",
        f"L(N, D) = E + A / N^alpha + B / D^beta, fitted to {len(runs)} runs: N non-embedding "
        f"parameters, D tokens, L {law.metric}. Method and limits: docs/forecast.md.",
        "",
        "## Held-out largest run",
        "",
        *(f"- {line}" for line in held_out_lines(held_out)),
        "",
        "## Law of all runs",
        "",
        "`size` and `data` are the terms A / N^alpha and B / D^beta at "
        f"{_count(law.reference[0])} parameters and {_count(law.reference[1])} tokens.",
        "",
        "| parameter | value | 95 % interval | width / the prior's |",
        "|---|---:|---:|---:|",
    ]
    shares, intervals = law.prior_share, law.parameter_intervals()
    for name, value in zip(PARAMETERS, law.best, strict=True):
        low, high = intervals[name]
        lines.append(f"| {name} | {value:.4g} | {low:.4g} to {high:.4g} | {shares[name]:.0%} |")
    lines += [
        "",
        f"Noise of one run: {law.seed_sd:.2%}. Misfit of a pair's mean beyond that: "
        f"{law.misfit_sd:.2%}.",
        "",
        "## Runs",
        "",
        "| variant | parameters | tokens | FLOPs | seeds | mean | law |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (parameters, tokens), members in _by_cell(runs).items():
        mean = math.fsum(run.loss for run in members) / len(members)
        lines.append(
            f"| {members[0].name} | {_count(parameters)} | {_count(tokens)} | "
            f"{members[0].compute:.2e} | {len(members)} | {mean:.4f} | "
            f"{law.loss(parameters, tokens):.4f} |"
        )
    return "\n".join([*lines, "", "![forecast.png](forecast.png)", ""])


def plot(held_out: HeldOut, runs: Sequence[Run], output: Path) -> None:
    """Plot the runs against their tokens with the law of the fitted sizes and its 95 % band.

    Stars mark the held-out runs; the bar is their predicted interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    law, largest = held_out.law, held_out.runs[0]
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    last = max(run.tokens for run in runs)
    grid = np.geomspace(min(run.tokens for run in runs), last, 40)
    sizes = sorted({run.parameters for run in runs})
    for number, size in enumerate(sizes):
        color = f"C{number % 10}"
        fitted = [run for run in runs if run.parameters == size and run.cell != largest.cell]
        tokens, losses = [run.tokens for run in fitted], [run.loss for run in fitted]
        axis.plot(tokens, losses, "o", color=color, markersize=4, label=_count(size))
        axis.plot(grid, [law.loss(size, d) for d in grid], color=color, linewidth=1)
        lows, highs = zip(*(law.interval(size, d) for d in grid), strict=True)
        axis.fill_between(grid, lows, highs, color=color, alpha=0.12, linewidth=0)
    color = f"C{sizes.index(largest.parameters) % 10}"
    low, high = held_out.interval
    axis.errorbar(
        largest.tokens,
        held_out.predicted,
        [[held_out.predicted - low], [high - held_out.predicted]],
        color=color,
        capsize=5,
        label="predicted",
    )
    for run in held_out.runs:
        label = "held out, measured" if run is largest else None
        axis.plot(run.tokens, run.loss, "*", color=color, markersize=11, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(EngFormatter(sep=""))
    axis.set_xlabel("tokens")
    axis.set_ylabel(law.metric)
    axis.set_title("law without the held-out runs, band: 95 % interval", fontsize=9)
    axis.legend(title="non-embedding parameters", fontsize=8, title_fontsize=8)
    axis.grid(alpha=0.25)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _by_cell(runs: Sequence[Run]) -> dict[tuple[int, int], list[Run]]:
    cells: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        cells[run.cell].append(run)
    return cells


def _count(value: float) -> str:
    return f"{value / 1e6:.2f}M"
