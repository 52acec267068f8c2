"""Read the metrics of one or more runs; plot them as curves, list them as a Markdown table."""

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from files import read_lines, temporary

MARKS = {  # event kind or gate outcome -> (marker, colour) on the loss curve
    "go": ("D", "#2ca02c"),
    "caution": ("D", "#ffbf00"),
    "no-go": ("D", "#d62728"),
    "extend": (">", "#2ca02c"),
    "skipped": ("x", "#d62728"),
    "rollback": ("v", "#d62728"),
    "stuck": ("s", "#9467bd"),
    "starved": ("1", "#8c564b"),
    "failed": ("X", "black"),
    "stopped": ("P", "0.5"),
}


@dataclass(frozen=True)
class Run:
    """The metrics and events of a run."""

    name: str
    rows: list[dict[str, Any]]  # metrics.jsonl
    events: list[dict[str, Any]]
    redone: list[dict[str, Any]]  # metrics_redone.jsonl: steps that were repeated later

    def column(self, key: str) -> np.ndarray:
        """Return a metric of every step, [steps]; NaN if a step lacks it."""
        return np.array([float(row.get(key, math.nan)) for row in self.rows])

    def smooth(self, key: str) -> np.ndarray:
        """Return the centred running mean of the running median, [steps].

        This removes spikes without lag. The windows do not cross phases, whose texts differ.
        """
        import pandas

        values = pandas.Series(self.column(key)).replace([np.inf, -np.inf], np.nan)
        window = {
            "window": 1 + 2 * int(np.clip(len(values) / 100, 2, 100)),
            "center": True,
            "min_periods": 1,
        }
        smoothed = [
            values[a:b].rolling(**window).median().rolling(**window).mean()
            for _, a, b in self.phases()
        ]
        return np.concatenate(smoothed)

    def measured(self, key: str) -> list[tuple[int, int, float, str]]:
        """Return (step, tokens, value, phase) of each step with a validation metric."""
        return [
            (row["step"], row["tokens"], float(row[key]), row["phase"])
            for row in self.rows
            if key in row
        ]

    def sources(self) -> list[str]:
        """Return the names of the validation sources, in the order of first measurement."""
        keys = dict.fromkeys(
            key
            for row in self.rows
            for key in row
            if key.startswith("val/") and key.count("/") == 2
        )
        return list(dict.fromkeys(key.split("/")[1] for key in keys))

    def phases(self) -> list[tuple[str, int, int]]:
        """Return (phase, first row, row after the last) of each phase."""
        spans, begin = [], 0
        for phase, rows in groupby(self.rows, key=lambda row: row["phase"]):
            end = begin + sum(1 for _ in rows)
            spans.append((phase, begin, end))
            begin = end
        return spans


def open_runs(folders: list[Path]) -> list[Run]:
    """Read runs, named by their folders, or by full paths if the names collide.

    Raises ValueError for a run without metrics.
    """
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        rows = read_lines(folder / "metrics.jsonl")
        if not rows:
            raise ValueError(f"{folder / 'metrics.jsonl'} has no metrics yet; train first")
        events, redone = (
            read_lines(folder / f"{kind}.jsonl") for kind in ("events", "metrics_redone")
        )
        runs.append(Run(name if names.count(name) == 1 else str(folder), rows, events, redone))
    return runs


def table(runs: list[Run]) -> str:
    """Return a Markdown table, one column per run. A skipped update counts once."""
    sources = list(dict.fromkeys(source for run in runs for source in run.sources()))
    columns = [_figures(run, sources) for run in runs]
    lines = ["| | " + " | ".join(run.name for run in runs) + " |", "|---|" + "---:|" * len(runs)]
    lines += [
        f"| {name} | " + " | ".join(column[name] for column in columns) + " |"
        for name in columns[0]
    ]
    return "\n".join(lines) + "\n"


def _figures(run: Run, sources: list[str]) -> dict[str, str]:
    losses = run.measured("val/loss")
    finite = [point for point in losses if math.isfinite(point[2])]
    best = min(finite, key=lambda point: point[2]) if finite else None
    speed, seconds = run.column("tokens_per_s"), run.column("step_s")
    skipped = {
        (event.get("phase"), event.get("batch_index", event.get("step")))
        for event in run.events
        if event["event"] == "skipped"
    }
    figures = {
        "last step, phase": f"{run.rows[-1]['step']:,}, {run.rows[-1]['phase']}",
        "tokens": f"{run.rows[-1].get('tokens', math.nan):,}",
        "hours in steps": f"{np.nansum(seconds) / 3600:.2f}",
        "tokens/s, median": f"{np.nanmedian(speed):,.0f}",
        "training loss, smoothed": f"{run.smooth('loss')[-1]:.3f}",
        "validation loss, last": f"{losses[-1][2]:.3f}" if losses else "-",
        "validation loss, best": f"{best[2]:.3f} (step {best[0]:,}, {best[3]})" if best else "-",
    }
    for source in sources:
        bits = run.measured(f"val/{source}/bits_per_byte")
        figures[f"bits per byte, {source}"] = f"{bits[-1][2]:.3f}" if bits else "-"
    figures["skipped updates"] = str(len(skipped))
    figures["roll-backs"] = str(sum(event["event"] == "rollback" for event in run.events))
    return figures


def _attempts(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split rows where the step number jumps: each part is one attempt of the run."""
    attempts: list[list[dict[str, Any]]] = []
    for row in rows:
        if not attempts or row["step"] != attempts[-1][-1]["step"] + 1:
            attempts.append([])
        attempts[-1].append(row)
    return attempts


def plot(runs: list[Run], output: Path) -> None:
    """Plot loss, validation loss, learning rate, gradient norm and tokens per second by step.

    Several runs are also plotted by tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    single = len(runs) == 1
    panels = ("training loss", "validation loss", "learning rate", "gradient norm", "tokens/s")
    scales = ("step",) if single else ("step", "tokens")
    figure, grid = plt.subplots(
        5,
        len(scales),
        sharex="col",
        sharey="row",
        squeeze=False,
        figsize=(3 + 6 * len(scales), 13),
        height_ratios=[3, 3, 1.3, 1.3, 1.3],
        layout="constrained",
    )
    named = [i for i, run in enumerate(runs) if i == 0 or not _same_phases(run, runs[0])]
    levels = [3 * named[::-1].index(i) if i in named else None for i in range(len(runs))]
    for axes, scale in zip(grid.T, scales, strict=True):
        for i, run in enumerate(runs):
            color, x = f"C{i}", run.column(scale)
            for axis, key in ((axes[0], "loss"), (axes[3], "grad_norm"), (axes[4], "tokens_per_s")):
                axis.plot(
                    x,
                    run.column(key),
                    color=color,
                    alpha=0.3 if single else 0.15,
                    linewidth=0.6,
                    zorder=1,
                )
                axis.plot(x, run.smooth(key), color=color, linewidth=1.5, zorder=3, label=run.name)
            axes[2].plot(x, run.column("lr"), color=color, linewidth=1.4)
            for rows in _attempts(run.redone):
                redone = [[row[key] for row in rows] for key in (scale, "lr")]
                axes[2].plot(*redone, "--", color="0.4", linewidth=1.2, label="repeated later")
            _plot_validation(axes[1], run, scale, color, single)
            _mark_phases(axes, run, x, "0.3" if len(named) == 1 else color, levels[i])
        for run in runs:
            _mark_events(axes[0], run, run.column(scale))
        axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
        axes[-1].set_xlabel(scale)
    axes = grid[:, 0]
    axes[3].set_yscale("log")
    axes[3].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[3].yaxis.set_major_formatter("{x:g}")
    axes[3].yaxis.set_minor_formatter(NullFormatter())
    axes[4].yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis, name in zip(axes, panels, strict=True):
        axis.set_ylabel(name)
    _limit(axes[0], [run.column("loss") for run in runs])
    _limit(axes[4], [run.column("tokens_per_s") for run in runs], floor=0.0)
    for axis in axes[:3]:
        labels = axis.get_legend_handles_labels()
        handles = {name: handle for handle, name in zip(*labels, strict=True)}  # one entry a name
        if handles:
            axis.legend(handles.values(), handles.keys(), fontsize=8)
    for axis in grid.flat:
        axis.grid(alpha=0.25)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def plot_losses(run: Run, output: Path, target: float | None = None) -> None:
    """Plot training and validation loss against tokens. target: a loss to mark with a line.

    Replaces the PNG file atomically.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    tokens, losses = run.column("tokens"), run.column("loss")
    # With multi-token prediction, the training loss sums the weighted losses of several tokens.
    label = f"training loss{', all predicted tokens' if 'multi_token.1' in run.rows[-1] else ''}"
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axis.plot(tokens, losses, color="C0", alpha=0.3, linewidth=0.6)
    axis.plot(tokens, run.smooth("loss"), color="C0", linewidth=1.5, label=label)
    limits, title = [losses], f"{run.name}, step {run.rows[-1]['step']:,}"
    if measured := run.measured("val/loss"):
        values = [point[2] for point in measured]
        axis.plot([point[1] for point in measured], values, "o-", color="C1", markersize=4)
        axis.lines[-1].set_label("validation loss")
        limits.append(np.array(values))
        title += f": validation loss {values[-1]:.4f}"
    if target is not None:
        axis.axhline(target, color="0.4", linestyle=":", label=f"target {target:g}")
        limits.append(np.array([target]))
    _limit(axis, limits)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel="tokens", ylabel="loss, nats per token", title=title)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    scratch = temporary(output)
    figure.savefig(scratch, dpi=110, format="png")
    scratch.replace(output)
    plt.close(figure)


def has_experts(run: Run) -> bool:
    """Whether a run logged the load of experts."""
    return any("expert_load" in row for row in run.rows)


def plot_routing(runs: list[Run], output: Path) -> None:
    """Plot the load of each expert over the steps, one column per run, and two curves of routing.

    Runs without experts are left out; ValueError if none has any.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [run for run in runs if has_experts(run)]
    if not runs:
        raise ValueError("no run has experts; train one with model.kind=moe")
    loaded = {run.name: [row for row in run.rows if "expert_load" in row] for run in runs}
    layers = max(len(rows[-1]["expert_load"]) for rows in loaded.values())
    figure, grid = plt.subplots(
        layers + 2,
        len(runs),
        sharex="col",
        sharey="row",
        squeeze=False,
        figsize=(2 + 5.5 * len(runs), 4 + 0.8 * layers),
        height_ratios=[1.0] * layers + [2.0, 2.0],
        layout="constrained",
    )
    for axes, run in zip(grid.T, runs, strict=True):
        rows = loaded[run.name]
        steps = [row["step"] for row in rows]
        for layer, loads in enumerate(zip(*(row["expert_load"] for row in rows), strict=True)):
            levels = np.log2(np.clip(np.array(loads).T, 0.25, 4.0))  # [E, steps]; 0: equal share
            extent = (steps[0] - 0.5, steps[-1] + 0.5, len(levels) - 0.5, -0.5)
            style = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
            image = axes[layer].imshow(levels, cmap="PuOr_r", vmin=-2, vmax=2, **style)
            axes[layer].set(yticks=[], ylabel=str(layer))
        for axis, key in zip(axes[layers:], ("max_violation", "router_entropy"), strict=True):
            axis.plot(steps, [row[key] for row in rows], alpha=0.5, linewidth=0.8)
            axis.grid(alpha=0.25)
        axes[0].set_title(run.name)
        axes[-1].set_xlabel("step")
    grid[layers, 0].set_ylabel("maximum\nviolation")
    grid[layers + 1, 0].set_ylabel("router entropy,\nnats")
    bar = figure.colorbar(image, ax=list(grid[:layers].flat), ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "equal share", "2", "4 or more"])
    figure.suptitle("load of the experts (rows), by layer")
    scratch = temporary(output)
    figure.savefig(scratch, dpi=110, format="png")
    scratch.replace(output)
    plt.close(figure)


def _plot_validation(axis: Any, run: Run, scale: str, color: str, single: bool) -> None:
    """Plot one validation line per phase, as phases differ in text; a single run: per source."""
    column = ("step", "tokens").index(scale)
    keys = (
        {source: f"val/{source}/loss" for source in run.sources()}
        if single
        else {run.name: "val/loss"}
    )
    for i, (name, key) in enumerate(keys.items()):
        style = {
            "color": f"C{i + 1}" if single else color,
            "markersize": 4,
            "linewidth": 1.2,
            "label": name,
        }
        for _, points in groupby(run.measured(key), key=lambda point: point[3]):
            line = list(points)
            x, y = [point[column] for point in line], [point[2] for point in line]
            axis.plot(x, y, "o-", **style)


def _mark_phases(axes: Any, run: Run, x: np.ndarray, color: str, level: int | None) -> None:
    """Draw a dotted line where a phase begins, and its name above the top panel.

    The names alternate between three heights, which keeps those of short phases apart.
    """
    for i, (phase, begin, end) in enumerate(run.phases()):
        if begin:
            for axis in axes:
                axis.axvline(
                    (x[begin - 1] + x[begin]) / 2, color=color, linestyle=":", linewidth=1.2
                )
        if level is not None:
            middle, height = (x[begin] + x[end - 1]) / 2, 1.02 + 0.05 * (level + i % 3)
            axes[0].text(
                middle,
                height,
                phase,
                transform=axes[0].get_xaxis_transform(),
                ha="center",
                fontsize=8,
                color=color,
            )


def _same_phases(run: Run, other: Run) -> bool:
    """Whether a run's phases begin where the other's do; then one set of labels is enough."""
    begins = [
        [(phase, each.rows[begin]["step"]) for phase, begin, _ in each.phases()]
        for each in (run, other)
    ]
    return begins[0] == begins[1][: len(begins[0])]


def _mark_events(axis: Any, run: Run, x: np.ndarray) -> None:
    """Mark the steps of events on the smoothed loss."""
    steps, losses = run.column("step"), run.smooth("loss")
    for kind, (marker, color) in MARKS.items():
        events = [event for event in run.events if kind in (event["event"], event.get("outcome"))]
        marked = [event["step"] for event in events if isinstance(event.get("step"), int)]
        if marked:
            rows = np.clip(np.searchsorted(steps, marked), 0, len(steps) - 1)
            style = {"marker": marker, "color": color, "s": 42, "zorder": 5, "label": kind}
            axis.scatter(x[rows], losses[rows], **style)


def _limit(axis: Any, values: list[np.ndarray], floor: float | None = None) -> None:
    """Set y limits that ignore the largest 0.5 % of the values."""
    finite = np.concatenate([column[np.isfinite(column)] for column in values])
    if len(finite):
        low, high = np.quantile(finite, [0.0, 0.995])
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin if floor is None else floor, high + margin)
