"""HTML parts of the report: sections, tables, scores with n and standard error, changes."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from evals.report.metric_names import Metric

NOISE = 1.96  # standard errors; a smaller change is within noise (95 %)
ERRORS = (
    "Everywhere on this page, ± is one standard error; for bits per byte, over blocks of the text. "
    "A score without ± has no error in its results file. The error of a change is that of the mean "
    "difference if both stages scored the same items or the same text (paired), else that of two "
    "independent means; for a mean over n items it is at least 1 / (n + 2). Within noise: less "
    "than 1.96 standard errors."
)


def section(title: str, note: str, body: str, anchor: str = "") -> str:
    name = f' id="{anchor}"' if anchor else ""
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section{name}><h2>{escape(title)}</h2>{about}{body}</section>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], own: int = -1) -> str:
    """A table of HTML cells that scrolls inside its own container; first cells are row headers.

    own: index of a row to highlight.
    """
    header = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = ""
    for number, (first, *cells) in enumerate(rows):
        body += '<tr class="own">' if number == own else "<tr>"
        body += f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
        body += "</tr>"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{header}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def listing(pairs: dict[str, Any]) -> str:
    entries = (
        f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>"
        for name, value in pairs.items()
    )
    return f"<dl>{''.join(entries)}</dl>"


def chip(outcome: str) -> str:
    kind = escape(outcome.replace(" ", "-"))
    return f'<span class="chip {kind}">{escape(outcome.upper())}</span>'


def named(metric: Metric) -> str:
    """A metric's name, with its key as a tooltip."""
    return f'<span title="{escape(metric.key)}">{escape(metric.title)}</span>'


def score(metric: Metric, estimate: dict[str, Any] | None) -> str:
    """A value with its standard error and n. estimate: value, stderr, n or tokens."""
    value = (estimate or {}).get("value")
    if estimate is None or value is None:
        return '<span class="score">not measured</span>'
    about = count(estimate.get("n"), estimate.get("tokens"))
    if estimate.get("stderr") == 0:
        about += ", all alike"
    return (
        f'<span class="score">{metric.text(value)}{error(metric, estimate.get("stderr"))} '
        f"<small>{about}</small></span>"
    )


def error(metric: Metric, stderr: float | None) -> str:
    """± one standard error; one significant digit where the metric's format would show 0.000."""
    if stderr is None:
        return ""
    is_small = not metric.share and 0 < stderr < 0.0005
    return f" ± {stderr:.1g}" if is_small else f" ± {metric.text(stderr)}"


def count(n: int | None, tokens: float | None = None) -> str:
    """Number of items or tokens of a score, or that it is unknown."""
    if tokens:
        return f"{tokens:,.0f} tokens"
    return "n not recorded" if n is None else f"n {n:,}"


def change_text(metric: Metric, change: dict[str, Any] | None) -> str:
    """A change with its error and whether it is better or worse; bold only beyond noise."""
    if not change:
        return ""
    kind, word = direction(metric, change)
    number = f"{metric.text(change['value'], '+')}{error(metric, change['stderr'])}"
    number = f"<b>{number}</b>" if kind in ("better", "worse") and change["stderr"] else number
    paired = ", paired" if change["paired"] else ""
    return f'<span class="change {kind}">{number} <small>{word}{paired}</small></span>'


def direction(metric: Metric, change: dict[str, Any]) -> tuple[str, str]:
    """Class and words of a change: better, worse, equal, or within noise."""
    value, stderr = change["value"], change["stderr"]
    if value == 0:
        return "equal", "unchanged"
    if stderr is not None and abs(value) < NOISE * stderr:
        return "noise", "within noise"
    return ("worse", "▼ worse") if (value > 0) == metric.lower else ("better", "▲ better")


def short(number: float) -> str:
    """A number with a suffix: 1,100,048,384 as 1.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
