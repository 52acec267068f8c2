"""Gates: thresholds on metrics with the outcomes go, caution and no-go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from files import read_object
from ranges import AnyFloat, NonEmptyText, check_fields

OUTCOMES = ("go", "caution", "no-go")
BEFORE = "before"  # Gate.against: the milestone or stage measured just before


@dataclass(frozen=True)
class Gate:
    """A pair of thresholds on a metric.

    go < no_go: lower is better (perplexity). go > no_go: higher is better (accuracy).
    With `against`, they apply to the change of the metric since an earlier measurement.
    """

    metric: NonEmptyText  # dotted path into the results, e.g. "hellaswag.acc_norm"
    go: AnyFloat  # at least this good: go
    no_go: AnyFloat  # worse than this: no-go; in between: caution
    advice: str = ""  # advice after a caution or no-go, with commands in backquotes
    against: str = ""  # "before", or the name of an earlier stage or phase (its last milestone)

    def __post_init__(self) -> None:
        check_fields(self, "gate")
        if self.go == self.no_go:
            raise ValueError(
                f"gate {self.metric}: go and no_go are both {self.go}; set different values, "
                "whose order says whether lower or higher is better"
            )


class Measured(NamedTuple):
    """Metrics of one milestone or stage."""

    phase: str  # the phase of a milestone, or the name of a stage
    where: str  # description: "at step 260", "after sft"
    metrics: dict


class Estimate(NamedTuple):
    """A metric with its standard error."""

    value: float
    stderr: float  # 0 if the results have none
    items: int = 0  # items averaged; 0 if the value is not a mean over items


@dataclass(frozen=True)
class Verdict:
    """The outcome of one gate."""

    gate: Gate
    value: float | None
    outcome: str
    reference: float | None = None  # value at gate.against
    stderr: float = 0.0  # standard error of the change
    where: str = ""  # gate.against in words

    def __str__(self) -> str:
        gate = self.gate
        sign = "<=" if gate.go < gate.no_go else ">="
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        if not gate.against:
            bounds = f"(go {sign} {gate.go}, no-go beyond {gate.no_go})"
            return f"{gate.metric} = {value} {bounds}: {self.outcome}"
        if self.value is None or self.reference is None:
            place = self.where or f"{gate.against!r}, which has no results"
            unknown = f", but it was not measured {place}, so the change is unknown"
            return f"{gate.metric} = {value}{unknown * (self.value is not None)}: {self.outcome}"
        stderr = f" \u00b1 {self.stderr:.3f}" if self.stderr else ""
        change = f"{self.value - self.reference:+.3f}{stderr}"
        return (
            f"{gate.metric} = {value}, {change} against {self.reference:.3f} {self.where} "
            f"(go {sign} {gate.go:+}, no-go beyond {gate.no_go:+}): {self.outcome}"
        )


def judge(gate: Gate, results: dict, reference: Measured | None = None) -> Verdict:
    """Apply a gate to nested results. A missing or non-finite metric is a no-go.

    reference: earlier measurement for a gate with `against`; if its metric is missing, the gate is
    a no-go. Let d be the worsening and e its standard error, of two independent means. No-go if d -
    e > no_go; go if d <= go and d + e <= no_go; otherwise caution (signs for a metric where lower
    is better). e is 0 for figures of held-out text: both models read the same text, so the error of
    independent texts is far too large for their difference.
    """
    now = estimate(gate.metric, results)
    where = reference.where if reference else ""
    if now is None:
        return Verdict(gate, None, "no-go", where=where)
    sign = 1 if gate.go < gate.no_go else -1
    if not gate.against:
        is_go, is_no_go = sign * now.value <= sign * gate.go, sign * now.value > sign * gate.no_go
        return Verdict(gate, now.value, "go" if is_go else "no-go" if is_no_go else "caution")
    before = estimate(gate.metric, reference.metrics) if reference else None
    if before is None:
        return Verdict(gate, now.value, "no-go", where=where)
    stderr = math.hypot(now.stderr, before.stderr) if now.items and before.items else 0.0
    loss = sign * (now.value - before.value)  # above 0: worse
    is_go = loss <= sign * gate.go and loss + stderr <= sign * gate.no_go
    outcome = "go" if is_go else "no-go" if loss - stderr > sign * gate.no_go else "caution"
    return Verdict(gate, now.value, outcome, before.value, stderr, where)


def estimate(metric: str, results: dict) -> Estimate | None:
    """Read a metric from nested results; None if it is missing or not finite.

    The standard error of a mean of n items is at least 1 / (n + 2), because the sample error of a
    few equal items is 0.
    """
    value: object = results
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    about = value if isinstance(value, dict) else {}  # an estimate with its standard error
    number = about.get("value") if about else value
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ):
        return None
    stderr, n = about.get("stderr") or 0.0, about.get("n")
    return Estimate(number, max(stderr, 1 / (n + 2)) if n else stderr, n or 0)


class OfPhase(Protocol):
    @property
    def phase(self) -> str: ...


P = TypeVar("P", bound=OfPhase)


def reference_of(gate: Gate, earlier: Sequence[P]) -> P | None:
    """Return the earlier milestone or stage that a gate compares with, or None.

    earlier: all earlier points, in plan order."""
    return next(
        (point for point in reversed(earlier) if gate.against in (BEFORE, point.phase)), None
    )


def by_name(name: str, metrics: dict) -> dict:
    """Nest one results file's metrics under its evaluation's name, as gates address them.

    For example {"hellaswag": {"acc_norm": ...}}. Metrics that are already nested, such as sources
    of perplexity and tasks of a suite, are unchanged.
    """
    flat = any(not isinstance(metric, dict) or "value" in metric for metric in metrics.values())
    return {name: metrics} if flat else metrics


def decide(verdicts: list[Verdict]) -> str:
    """Return the worst outcome; "no-go" without verdicts."""
    return max((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default="no-go")


def judge_all(
    gates: Sequence[Gate], metrics: dict, references: Sequence[Measured | None]
) -> tuple[list[Verdict], str]:
    """Return the verdict of each gate and the overall outcome; "go" without gates."""
    verdicts = [
        judge(gate, metrics, reference) for gate, reference in zip(gates, references, strict=True)
    ]
    return verdicts, decide(verdicts) if verdicts else "go"


def read_metrics(names: Sequence[str], folder: Path) -> dict:
    """Read the metrics of the named evaluations from a folder, keyed as gates address them."""
    contents = [(name, read_object(folder / f"{name}.json")) for name in names]
    metrics = [by_name(name, content["metrics"]) for name, content in contents if content]
    return {name: values for one_eval in metrics for name, values in one_eval.items()}


def thresholds(gates: Sequence[Gate]) -> list[dict]:
    """Return the gates as a decision stores them: thresholds without advice."""
    return [
        {
            "metric": gate.metric,
            "go": gate.go,
            "no_go": gate.no_go,
            **({"against": gate.against} if gate.against else {}),
        }
        for gate in gates
    ]
