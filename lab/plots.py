"""Plots of an experiment: curves with 95 % bands, and bars of the tokens to a target value."""

import math
from pathlib import Path
from typing import Any

from lab.comparison import Comparison
from lab.measurements import Measurement
from lab.statistics import estimate


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_curves(comparison: Comparison, output: Path) -> None:
    """Plot the metric against tokens: mean over seeds, with the 95 % interval as a band."""
    from matplotlib.ticker import EngFormatter

    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    late: list[float] = []
    for number, (name, runs) in enumerate(comparison.runs.items()):
        tokens, means, lows, highs = mean_curve(runs, comparison.compare.metric)
        if not tokens:
            continue
        color, points = f"C{number % 10}", min(3, len(tokens) - 1)
        axis.plot(tokens, means, "o-", color=color, markersize=3, label=f"{name} (n={len(runs)})")
        axis.fill_between(tokens, lows, highs, color=color, alpha=0.2, linewidth=0)
        late += [*lows[points:], *highs[points:]]
    if comparison.target is not None and late:
        axis.axhline(comparison.target, color="0.4", linestyle=":", label="target")
        late.append(comparison.target)
    late = [value for value in late if math.isfinite(value)]
    if late:  # the first validations are far above the rest
        margin = 0.08 * (max(late) - min(late)) or 0.1
        axis.set_ylim(min(late) - margin, max(late) + margin)
        axis.legend(fontsize=8)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("tokens")
    axis.set_ylabel(comparison.compare.metric)
    axis.set_title("mean over seeds, band: 95 % interval", fontsize=9)
    axis.grid(alpha=0.25)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def mean_curve(
    runs: list[Measurement], metric: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return tokens, mean, low and high of the validations that all runs have in common."""
    curves = [{point.tokens: point.value for point in run.curves[metric]} for run in runs]
    tokens = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = [estimate([curve[position] for curve in curves]) for position in tokens]
    means = [point.mean for point in points]
    lows = [point.mean if point.low is None else point.low for point in points]
    highs = [point.mean if point.high is None else point.high for point in points]
    return tokens, means, lows, highs


def plot_to_target(comparison: Comparison, output: Path) -> None:
    """Plot bars of the tokens, and of the seconds, that each variant needs to reach the target.

    If a seed of a variant misses the target, its bar is hatched and shows the full budget.
    """
    from matplotlib.ticker import EngFormatter

    pyplot = _pyplot()
    height = 1.6 + 0.4 * len(comparison.variants)
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(10, height), layout="constrained")
    for axis, name in zip(axes, ("tokens", "seconds"), strict=True):
        for row, variant in enumerate(comparison.variants):
            position = variant.position(name)
            color = f"C{row % 10}"
            if position is None:
                length = variant.seconds.mean if name == "seconds" else variant.tokens
                axis.barh(row, length, color="none", edgecolor=color, hatch="//")
                axis.text(length, row, " not reached", va="center", fontsize=7)
                continue
            error = None
            if position.low is not None and position.high is not None:
                error = [[position.mean - position.low], [position.high - position.mean]]
            axis.barh(row, position.mean, color=color, alpha=0.7, xerr=error, capsize=3)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        unit = "seconds of training" if name == "seconds" else name
        axis.set_xlabel(f"{unit} to {comparison.compare.metric} {comparison.target:.4g}")
        axis.grid(alpha=0.25, axis="x")
    names = [f"{variant.name} (n={len(variant.seeds)})" for variant in comparison.variants]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
