"""Charts of the report as HTML and inline SVG. Curves scale with the page; labels do not."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

Points = Sequence[Sequence[float]]
LOAD_LEVELS = 8  # colours of loads on each side of an equal share


def loss_chart(training: dict[str, Any]) -> str:
    """Training loss by step, raw and smoothed, with phases, validation losses and gates."""
    held_out = [[point["step"], point["loss"]] for point in training["held_out"]]
    values = [y for _, y in [*training["smooth"], *held_out] if y is not None and math.isfinite(y)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = low - 0.05 * (high - low), high + 0.02 * (high - low)
    high = high if high > low else low + 1
    last = training["steps"]

    def x(step: float) -> float:
        return 100 * step / last

    def y(loss: float) -> float:
        return 100 * (high - loss) / (high - low)

    def line(points: Points, colour: str, width: float) -> str:
        places = " ".join(
            f"{x(s):.2f},{y(v):.2f}" for s, v in points if v is not None and math.isfinite(v)
        )
        style = f"stroke:var(--{colour});stroke-width:{width}px;fill:none;stroke-linejoin:round"
        return f'<polyline points="{places}" style="{style}" vector-effect="non-scaling-stroke"/>'

    thin = 'style="stroke:var(--line)" vector-effect="non-scaling-stroke"'
    grid = "".join(
        f'<line x1="0" x2="100" y1="{y(tick):.2f}" y2="{y(tick):.2f}" {thin}/>'
        for tick in ticks(low, high)
    )
    bands = "".join(
        f'<div class="band" style="left:{x(phase["begin"]):.2f}%;'
        f'width:{x(phase["end"] - phase["begin"]):.2f}%">'
        f"<i>{escape(phase['name'])}</i></div>"
        for phase in training["phases"]
    )
    dots = "".join(
        f'<span class="dot" style="left:{x(s):.2f}%;top:{y(v):.2f}%" '
        f'title="validation loss at step {s:,}: {v:.3f}"></span>'
        for s, v in held_out
        if math.isfinite(v)
    )
    gates = "".join(
        f'<span class="gate {outcome}" style="left:{x(gate["step"]):.2f}%" '
        f'title="{outcome} at step {gate["step"]:,}"></span>'
        for gate, outcome in ((gate, escape(gate["outcome"])) for gate in training["gates"])
        if isinstance(gate["step"], int)  # stages after pretraining have a name instead
    )
    finals = [value for _, value in training["smooth"]][-1:]
    ends = f", {finals[0]:.3f} at the end" if finals and finals[0] is not None else ""
    svg = _svg(
        f"training loss, nats per token, over {last:,} steps{ends}",
        f"{grid}{line(training['curve'], 'accent-soft', 1)}"
        f"{line(training['smooth'], 'accent', 2.5)}",
    )
    ys = "".join(f'<i style="top:{y(tick):.2f}%">{tick:g}</i>' for tick in ticks(low, high))
    xs = "".join(f'<i style="left:{x(tick):.2f}%">{tick:,.0f}</i>' for tick in ticks(0, last, 4))
    legend = (
        '<div class="legend"><span><i class="raw"></i>loss per step</span>'
        "<span><i></i>smoothed</span>"
        '<span><i class="round"></i>validation loss</span>'
        + ('<span><i class="decided"></i>gate</span>' if gates else "")
        + "</div>"
    )
    area = f'<div class="area">{bands}{svg}{dots}{gates}</div>'
    return (
        f'<div class="plot"><div class="y">{ys}</div>{area}<div class="x">{xs}</div></div>{legend}'
    )


def _svg(title: str, shapes: str) -> str:
    """An image that fills its area. title: the alternative text."""
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{shapes}</svg>'
    )


def load_chart(steps: Sequence[int], loads: Sequence[Sequence[Sequence[float]]]) -> str:
    """Heatmap of the load of experts, one panel per layer, experts as rows, steps as columns.

    loads [columns][layers][experts]; 1 is an equal share. Colours are by powers of 2 around it.
    """
    panels = []
    for layer, columns in enumerate(zip(*loads, strict=True)):  # columns [columns][experts]
        runs: dict[int, list[str]] = {}  # level -> rectangles
        for expert, row in enumerate(zip(*columns, strict=True)):
            levels, begin = [load_level(load) for load in row], 0
            for end in range(1, len(levels) + 1):
                if end == len(levels) or levels[end] != levels[begin]:
                    width = end - begin
                    path = f"M{begin} {expert}h{width}v1h-{width}z"
                    runs.setdefault(levels[begin], []).append(path)
                    begin = end
        paths = "".join(
            f'<path d="{"".join(parts)}" style="fill:{_load_colour(level)}"/>'
            for level, parts in sorted(runs.items())
        )
        experts = len(columns[0])
        worst = max(map(max, columns))
        panels.append(
            f'<div class="head">layer {layer}</div>'
            f'<svg viewBox="0 0 {len(columns)} {experts}" preserveAspectRatio="none" role="img" '
            f'shape-rendering="crispEdges" style="height:{min(max(6 * experts, 28), 120)}px" '
            f'aria-label="load of the experts of layer {layer}, at most {worst:.2f}">{paths}</svg>'
        )
    ends = f"<div></div><div>step {steps[0]:,} to {steps[-1]:,}</div>"
    legend = "".join(
        f'<span><i style="background:{_load_colour(level)};height:12px"></i>{name}</span>'
        for level, name in (
            (-LOAD_LEVELS, "a quarter or less"),
            (-LOAD_LEVELS // 2, "half"),
            (0, "equal share"),
            (LOAD_LEVELS // 2, "twice"),
            (LOAD_LEVELS, "4 times or more"),
        )
    )
    return f'<div class="load">{"".join(panels)}{ends}</div><div class="legend">{legend}</div>'


def load_level(load: float) -> int:
    """Level of a load on a scale of powers of 2: 0 for 1, -LOAD_LEVELS or LOAD_LEVELS at 4x."""
    power = math.log2(load) if load > 0 else -math.inf
    return round(LOAD_LEVELS / 2 * min(max(power, -2.0), 2.0))


def _load_colour(level: int) -> str:
    colour = "var(--warm)" if level > 0 else "var(--accent)"
    return f"color-mix(in srgb, {colour} {100 * abs(level) / LOAD_LEVELS:.0f}%, var(--faint))"


def line_chart(name: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """A curve of one metric by step."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    span = f", from {finite[0]:.3g} to {finite[-1]:.3g}" if finite else ""
    low, high = low - margin, high + margin
    places = " ".join(
        f"{100 * step / steps[-1]:.2f},{100 * (high - value) / (high - low):.2f}"
        for step, value in zip(steps, values, strict=True)
        if value is not None and math.isfinite(value)
    )
    style = "stroke:var(--accent);stroke-width:2px;fill:none;stroke-linejoin:round"
    shapes = f'<polyline points="{places}" style="{style}" vector-effect="non-scaling-stroke"/>'
    ys = "".join(
        f'<i style="top:{100 * (high - tick) / (high - low):.2f}%">{tick:g}</i>'
        for tick in ticks(low, high, 3)
    )
    xs = "".join(
        f'<i style="left:{100 * tick / steps[-1]:.2f}%">{tick:,.0f}</i>'
        for tick in ticks(0, steps[-1], 4)
    )
    return (
        f'<p class="curve">{escape(name)}</p><div class="plot low"><div class="y">{ys}</div>'
        f'<div class="area">{_svg(f"{name} by step{span}", shapes)}</div>'
        f'<div class="x">{xs}</div></div>'
    )


def bar(name: str, value: str, number: float, top: float, **more: Any) -> str:
    """A bar of a number from 0 to `top`, with ± one standard error. name, value: HTML.

    more: about, a text below the name; stderr; chance, the score of guessing; refs, (name, value)
    pairs of other models.
    """

    def place(point: float) -> float:
        return 100 * min(max(point, 0.0), top) / top

    parts = [f'<div class="fill" style="width:{place(number):.2f}%"></div>']
    refs = sorted(more.get("refs", ()), key=lambda ref: ref[1])
    parts += [
        f'<span class="ref" style="left:{place(point):.2f}%" '
        f'title="{escape(model)}: {point:g}"></span>'
        for model, point in refs
    ]
    chance = more.get("chance")
    if chance:
        parts.append(
            f'<span class="chance" style="left:{place(chance):.2f}%" '
            f'title="chance: {chance:.1f}"></span>'
        )
    if stderr := more.get("stderr"):
        begin, end = place(number - stderr), place(number + stderr)
        parts.append(
            f'<span class="err" style="left:{begin:.2f}%;width:{end - begin:.2f}%"></span>'
        )
    ends = ""
    if refs:
        chosen = [refs[0], refs[-1]] if place(refs[-1][1]) - place(refs[0][1]) > 34 else [refs[-1]]
        labels = "".join(
            f'<i style="left:{min(max(place(point), 14), 84):.2f}%">{escape(model)} {point:g}</i>'
            for model, point in chosen
        )
        ends = f'<div class="ends">{labels}</div>'
    return (
        f'<div class="bar"><div class="what"><b>{name}</b>'
        f"<span>{escape(more.get('about', ''))}</span></div>"
        f'<div class="track">{"".join(parts)}</div><div class="val">{value}</div>{ends}</div>'
    )


def heatmap(
    kind: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    cells: dict[str, float],
    tests: dict[str, int],
) -> str:
    """A table of depth by length. cells: "length/depth" -> accuracy from 0 to 1; tests: its n."""

    def cell(place: str) -> str:
        if place not in cells:
            return "<td></td>"
        about = f" <small>n {tests[place]:,}</small>" if place in tests else ""
        colour = heat_colour(cells[place])
        return (
            f'<td class="cell" style="background:{colour}">'
            f'<span class="score">{cells[place]:.2f}{about}</span></td>'
        )

    heads = "".join(f'<th scope="col">{length:,}</th>' for length in lengths)
    rows = "".join(
        f'<tr><th scope="row">{100 * depth:.0f} %</th>'
        + "".join(cell(f"{length}/{depth}") for length in lengths)
        + "</tr>"
        for depth in depths
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(kind)}">'
        f'<table class="heat"><caption>{escape(kind)}</caption>'
        f'<thead><tr><th scope="col">depth</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def heat_colour(share: float) -> str:
    """From red (0) to green (1); light in both themes, for dark text."""
    return f"hsl({8 + 125 * share:.0f} 62% {68 - 8 * share:.0f}%)"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next((size * m for m in (1, 2, 5) if size * m >= raw), size * 10)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
