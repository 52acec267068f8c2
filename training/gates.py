"""Go, caution or no-go: thresholds on metrics, the same for a training step and for a results file."""

from dataclasses import dataclass

OUTCOMES = ("go", "caution", "no-go")


@dataclass(frozen=True)
class Gate:
    """One threshold pair. go < no_go: lower is better (perplexity); go > no_go: higher is better (accuracy)."""

    metric: str  # dotted path into the results, as "wikipedia.bits_per_byte" or "hellaswag.acc_norm"
    go: float  # at least this good: go
    no_go: float  # worse than this: no-go; in between: caution
    advice: str = ""  # what to do where this gate is not "go", with commands in backquotes

    def __post_init__(self) -> None:
        if self.go == self.no_go:
            raise ValueError(f"gate {self.metric}: go and no_go are both {self.go}; set them apart, their order is the sense")


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    value: float | None
    outcome: str

    def __str__(self) -> str:
        sign = "<=" if self.gate.go < self.gate.no_go else ">="
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        return f"{self.gate.metric} = {value} (go {sign} {self.gate.go}, no-go beyond {self.gate.no_go}): {self.outcome}"


def judge(gate: Gate, results: dict) -> Verdict:
    """Hold one gate against nested results. What was not measured, or is not a finite number, is a no-go, never a pass."""
    value: object = results
    for key in gate.metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("value")  # an estimate with its standard error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return Verdict(gate, None, "no-go")
    sign = 1 if gate.go < gate.no_go else -1
    if sign * value <= sign * gate.go:
        return Verdict(gate, value, "go")
    return Verdict(gate, value, "no-go" if sign * value > sign * gate.no_go else "caution")


def by_name(name: str, metrics: dict) -> dict:
    """The metrics of one results file as gates name them, so that two tasks may both have an "acc_norm".

    A task's own metrics go under its name; the sources of perplexity and the tasks of a suite bear names already.
    """
    own = any(not isinstance(metric, dict) or "value" in metric for metric in metrics.values())
    return {name: metrics} if own else metrics


def decide(verdicts: list[Verdict]) -> str:
    """The worst outcome of several; "no-go" where there is none to judge."""
    return max((verdict.outcome for verdict in verdicts), key=OUTCOMES.index, default="no-go")
