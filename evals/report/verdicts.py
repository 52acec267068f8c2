"""Verdicts on the page: meaning of go, caution and no-go; each gate with limit and change."""

from html import escape
from typing import Any

from evals.report.markup import change_text, chip, direction, named, score, section, table
from evals.report.metric_names import Metric, metric_of

MEANINGS = {
    "go": "every gate is within its go limit; the plan continues.",
    "caution": "a gate is between its go and no-go limits; the plan continues, read its advice.",
    "no-go": "a gate is beyond its no-go limit, or its score is missing; the plan stops.",
}
NOT_QUALITY = (
    "A verdict compares scores with limits that the plan set before training. It is not a mark for "
    "quality: a limit may allow a loss, so read the changes beside it."
)
NO_GATES = "not judged"
NOTHING_JUDGED = "The plan sets no gates here, so nothing was judged."
HEAD = ("Metric", "Outcome", "Score", "Change", "Against", "Limits")
Record = dict[str, Any]


def decisions(report: Record) -> list[Record]:
    """Decisions and forecasts in order of time, each gate with the records of its results.

    From the log of the run; without a log, from the results of the stages.
    """
    stages, training = report.get("stages") or {}, report["training"] or {}
    events = (training.get("gates") or []) + (training.get("forecasts") or [])
    listed = []
    for event in sorted(events, key=lambda event: event["time"]):
        references = event.get("references") or [None] * len(event["gates"])
        pairs = zip(event["gates"], event["values"], references, strict=True)
        gates = [
            {**gate, "value": value, "reference": reference} for gate, value, reference in pairs
        ]
        stage = stages.get(_folder(event)) or {"gates": []}
        if [_identity(gate) for gate in stage["gates"]] == [_identity(gate) for gate in gates]:
            gates = stage["gates"]
        listed.append({**event, "gates": gates, "chances": stage.get("chances")})
    if training:
        return listed
    return [
        {**stage, "step": _step(name, stage)} for name, stage in stages.items() if stage["outcome"]
    ]


def _folder(event: Record) -> str:
    """Folder of a decision's results."""
    if not isinstance(event["step"], int):
        return str(event["step"])
    return f"step_{event['step']}" + ("_average" if event.get("averages") else "")


def _step(name: str, stage: Record) -> int | str:
    return name if stage["step"] is None else stage["step"]


def _identity(gate: Record) -> tuple[Any, ...]:
    return tuple(
        gate.get(name) for name in ("metric", "go", "no_go", "against", "value", "reference")
    )


def milestone(step: int | str) -> str:
    """A milestone's step, or the name of a stage after pretraining."""
    return f"at step {step:,}" if isinstance(step, int) else f"after {step}"


def stage_name(folder: str) -> str:
    """A stage's results folder in words: step_260 as "step 260"."""
    return folder.replace("_", " ")


def outcome(decision: Record) -> str:
    """The recorded outcome; a decision without gates has judged nothing."""
    return str(decision["outcome"]) if decision["gates"] else NO_GATES


def legend() -> str:
    entries = "".join(
        f"<dt>{chip(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in MEANINGS.items()
    )
    return f'<dl class="meanings">{entries}</dl><p class="note">{escape(NOT_QUALITY)}</p>'


def summary(report: Record) -> str:
    """The last decision under the title: verdict, reason, and every loss that it allows."""
    listed = [decision for decision in decisions(report) if not decision.get("averages")]
    if not listed:
        return ""
    last = listed[-1]
    kind, gates = outcome(last), last["gates"]
    passed = sum(gate_outcome(gate) == "go" for gate in gates)
    reason = f"{passed} of {len(gates)} gates within their go limits." if gates else "no gates."
    unknown = sum(gate_outcome(gate) is None for gate in gates)
    reason += f" {unknown} without a recorded outcome." if unknown else ""
    lines = [line for gate in gates if (line := _remark(gate, last.get("chances")))]
    lines += _losses_since(report, last)
    items = "".join(f"<li>{line}</li>" for line in lines)
    body = f"<p>Not within the limit, or worse than before:</p><ul>{items}</ul>" if lines else ""
    title = f"{chip(kind)} <strong>Verdict {escape(milestone(last['step']))}</strong>"
    meaning = f"{kind.capitalize()}: {MEANINGS[kind]} " if kind in MEANINGS else ""
    note = f'<p class="note">{escape(meaning + NOT_QUALITY)} <a href="#gates">All gates</a></p>'
    return f'<div class="verdict">{title}: {reason}{body}{note}</div>'


def _remark(gate: Record, chances: Record | None) -> str:
    """A gate in one line if it is not a go or its score is worse than before; else ""."""
    kind, change, metric = gate_outcome(gate), _change(gate), _metric(gate, chances)
    is_worse = change is not None and direction(metric, change)[0] == "worse"
    if kind == "go" and not is_worse:
        return ""
    against = f", {_against(gate)}: {change_text(metric, change)}" if change else ""
    return (
        f"{_chip(kind)} {named(metric)}: {score(metric, gate)}{against} ({_limits(metric, gate)})"
    )


def _losses_since(report: Record, last: Record) -> list[str]:
    """Scores of the last decision that are worse than at the last milestone of pretraining."""
    stage = (report.get("stages") or {}).get(_folder(last)) or {"metrics": {}}
    lines = []
    for gate in {gate["metric"]: gate for gate in last["gates"]}.values():
        since = (stage["metrics"].get(gate["metric"]) or {}).get("since") or {}
        metric = _metric(gate, last.get("chances"))
        is_new = since.get("against") not in (None, (_change(gate) or {}).get("against"))
        if is_new and direction(metric, since)[0] == "worse":
            where, text = escape(stage_name(since["against"])), change_text(metric, since)
            lines.append(f"{named(metric)}, change since {where}: {text}")
    return lines


def _css(kind: str) -> str:
    return escape(kind.replace(" ", "-"))


def _chip(kind: str | None) -> str:
    return chip(kind or "not recorded")


def _metric(gate: Record, chances: Record | None) -> Metric:
    """The gate's metric; the order of the limits says whether lower is better."""
    return metric_of(gate["metric"], chances)._replace(lower=gate["go"] < gate["no_go"])


def _against(gate: Record) -> str:
    """The stage that a gate's change is measured against."""
    change = _change(gate)
    return f"change against {escape(stage_name(change['against']))}" if change else ""


def _change(gate: Record) -> Record | None:
    """The recorded change; without one, the difference from the recorded reference."""
    if gate.get("change"):
        return gate["change"]
    if gate["value"] is None or gate.get("reference") is None:
        return None
    value = gate["value"] - gate["reference"]
    return {"against": gate["against"], "value": value, "stderr": None, "paired": False}


def gate_outcome(gate: Record) -> str | None:
    """Outcome of one gate; None if its results are gone and it judges a change with an error."""
    if gate.get("outcome"):
        return gate["outcome"]
    value = gate["value"]
    if value is None or (gate.get("against") and gate.get("reference") is None):
        return "no-go"
    if gate.get("against"):
        return None
    sign = 1 if gate["go"] < gate["no_go"] else -1
    if sign * value <= sign * gate["go"]:
        return "go"
    return "no-go" if sign * value > sign * gate["no_go"] else "caution"


def _limits(metric: Metric, gate: Record) -> str:
    """Limits of a gate in the unit of the page."""
    relation, beyond = ("≤", "&gt;") if metric.lower else ("≥", "&lt;")
    sign, of = ("+", "change ") if gate.get("against") else ("", "")
    go, no_go = (metric.text(gate[name], sign) for name in ("go", "no_go"))
    return f"go if {of}{relation} {go}, no-go if {of}{beyond} {no_go}"


def _row(gate: Record, chances: Record | None) -> list[str]:
    """Cells of a gate: metric, outcome, score, change, reference, limits."""
    metric, change = _metric(gate, chances), _change(gate)
    where = escape(stage_name((change or {}).get("against") or gate.get("against") or ""))
    unknown = "unknown" if gate.get("against") else ""
    raw = f"go {gate['go']}, no_go {gate['no_go']}"
    limits = f'<span title="{escape(raw)}">{_limits(metric, gate)}</span>'
    changed = change_text(metric, change) or unknown
    return [
        named(metric),
        _chip(gate_outcome(gate)),
        score(metric, gate),
        changed,
        where,
        limits,
    ]


def gates_section(report: Record) -> str:
    """All decisions and forecasts with the legend; "" without any."""
    cards = []
    for decision in decisions(report):
        kind = outcome(decision)
        remark = decision.get("advice") or "" if kind != "go" else ""
        if decision.get("accepted"):
            remark = f"Accepted: {decision['accepted']}"
        if number := decision.get("averages"):
            remark = f"Average of {number} checkpoints: a forecast of the decay, not a decision."
        rows = [_row(gate, decision.get("chances")) for gate in decision["gates"]]
        title = milestone(decision["step"])
        body = table(f"Gates {title}", HEAD, rows) if rows else f"<p>{NOTHING_JUDGED}</p>"
        time = (decision.get("time") or "")[:16].replace("T", " ")
        cards.append(
            f'<div class="decision {_css(kind)}"><h3>{chip(kind)} '
            f"{escape(title)} <small>{escape(time)}</small></h3>{body}<p>{escape(remark)}</p></div>"
        )
    note = (
        "A gate on a change decides with the error of two independent means, which is larger than "
        "a paired one; a gate on held-out text decides without an error."
    )
    body = legend() + f'<div class="gates">{"".join(cards)}</div>'
    return section("Gates", note, body, "gates") if cards else ""
