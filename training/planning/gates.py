"""Go, caution or no-go: thresholds on metrics, the same for a training step and for a results file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from ranges import AnyFloat, FilledText, check_fields

OUTCOMES = ("go", "caution", "no-go")
BEFORE = "before"  # Gate.against: the milestone or stage that was measured just before


@dataclass(frozen=True)
class Gate:
    """One threshold pair. go < no_go: lower is better (perplexity); go > no_go: higher is better (accuracy).

    With `against` the thresholds apply to the change of the metric since an earlier measurement.
    """

    metric: FilledText  # dotted path into the results, as "wikipedia.bits_per_byte" or "hellaswag.acc_norm"
    go: AnyFloat  # at least this good: go
    no_go: AnyFloat  # worse than this: no-go; in between: caution
    advice: str = ""  # what to do where this gate is not "go", with commands in backquotes
    against: str = ""  # "before", or the name of a stage or phase (its last milestone) that the change is measured from

    def __post_init__(self) -> None:
        check_fields(self, "gate")
        if self.go == self.no_go:
            raise ValueError(
                f"gate {self.metric}: go and no_go are both {self.go}; set them apart, their order is the sense"
            )


class Measured(NamedTuple):
    """Metrics of one milestone or stage."""

    phase: str  # the phase of a milestone, or the name of a stage
    where: str  # in words: "at step 260", "after sft"
    metrics: dict


class Estimate(NamedTuple):
    value: float
    error: float  # standard error; 0 for a metric that is not a mean over items


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    value: float | None
    outcome: str
    reference: float | None = None  # value at gate.against
    error: float = 0.0  # standard error of the change
    where: str = ""  # the place that gate.against stands for, in words

    def __str__(self) -> str:
        gate = self.gate
        sign = "<=" if gate.go < gate.no_go else ">="
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        if not gate.against:
            return f"{gate.metric} = {value} (go {sign} {gate.go}, no-go beyond {gate.no_go}): {self.outcome}"
        if self.value is None or self.reference is None:
            place = self.where or f"{gate.against!r}, which has no results"
            why = (
                ""
                if self.value is None
                else f", but it was not measured {place}, so the change is unknown"
            )
            return f"{gate.metric} = {value}{why}: {self.outcome}"
        error = f" \u00b1 {self.error:.3f}" if self.error else ""
        return (
            f"{gate.metric} = {value}, {self.value - self.reference:+.3f}{error} against {self.reference:.3f} {self.where} "
            f"(go {sign} {gate.go:+}, no-go beyond {gate.no_go:+}): {self.outcome}"
        )


def judge(gate: Gate, results: dict, reference: Measured | None = None) -> Verdict:
    """Judge nested results by one gate. A metric that was not measured, or is not a finite number, is a no-go.

    reference: what a gate with `against` compares with; without its figure the gate is a no-go. A change has a standard
    error, that of two independent means. It is a no-go only if it is beyond `no_go` by more than this error, and a go
    only if it is within `go`, and within `no_go` by more than this error.
    """
    found = estimate(gate.metric, results)
    where = reference.where if reference else ""
    if found is None:
        return Verdict(gate, None, "no-go", where=where)
    sign = 1 if gate.go < gate.no_go else -1
    if not gate.against:
        is_go, is_no_go = (
            sign * found.value <= sign * gate.go,
            sign * found.value > sign * gate.no_go,
        )
        return Verdict(gate, found.value, "go" if is_go else "no-go" if is_no_go else "caution")
    before = estimate(gate.metric, reference.metrics) if reference else None
    if before is None:
        return Verdict(gate, found.value, "no-go", where=where)
    error = math.hypot(found.error, before.error)
    loss = sign * (found.value - before.value)  # above 0: it became worse
    is_go = loss <= sign * gate.go and loss + error <= sign * gate.no_go
    outcome = "go" if is_go else "no-go" if loss - error > sign * gate.no_go else "caution"
    return Verdict(gate, found.value, outcome, before.value, error, where)


def estimate(metric: str, results: dict) -> Estimate | None:
    """A metric in nested results; None if it was not measured or is not a finite number.

    A mean of n items has a standard error of at least 1 / (n + 2), since few equal items have a sample error of 0.
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
    error, n = about.get("stderr") or 0.0, about.get("n")
    return Estimate(number, max(error, 1 / (n + 2)) if n else error)


class OfPhase(Protocol):
    @property
    def phase(self) -> str: ...


P = TypeVar("P", bound=OfPhase)


def reference_of(gate: Gate, earlier: Sequence[P]) -> P | None:
    """What a gate compares with, of the places in order of the plan; None for a gate without `against`."""
    return next(
        (place for place in reversed(earlier) if gate.against in (BEFORE, place.phase)), None
    )


def by_name(name: str, metrics: dict) -> dict:
    """The metrics of one results file as gates name them, so that two tasks may both have an "acc_norm".

    A task's own metrics go under its name; the sources of perplexity and the tasks of a suite bear names already.
    """
    own = any(not isinstance(metric, dict) or "value" in metric for metric in metrics.values())
    return {name: metrics} if own else metrics


def decide(verdicts: list[Verdict]) -> str:
    """The worst outcome of several; "no-go" where there is none to judge."""
    return max((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default="no-go")
