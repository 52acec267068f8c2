"""All that a run carries from one update to the next."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from training.guard import FaultState


@dataclass
class State:
    """The loop changes it in place; a checkpoint is a copy of it.

    step and place differ on purpose: step counts updates over the whole run, place counts steps' worth of data read from
    the current phase's loader.
    """

    model: Any  # a sharded NanoLlama
    optimizer: torch.optim.Optimizer
    phase: str
    phase_start: int = 0  # step at which the phase began
    phase_end: int = 0  # and at which it ends
    step: int = 0
    batch_index: int = 0
    tokens: int = 0  # seen by the run so far, all phases
    data: str = ""  # the loader's fingerprint
    faults: FaultState = field(default_factory=FaultState)
    parent: str = ""  # identity of the checkpoint that this phase began from, "" for none
    rate: dict[str, Any] = field(
        default_factory=dict
    )  # peak and settings of the learning-rate schedule
    until: int | None = (
        None  # step at which this command pauses; not saved: each command sets its own
    )

    @property
    def end(self) -> int:
        """The step at which this command stops: the end of the phase, or `until` if that comes first."""
        return self.phase_end if self.until is None else min(self.phase_end, self.until)

    def position(self) -> dict[str, Any]:
        """What trainer.json holds."""
        names = (
            "phase",
            "phase_start",
            "phase_end",
            "step",
            "batch_index",
            "tokens",
            "data",
            "parent",
            "rate",
        )
        return {**{name: getattr(self, name) for name in names}, "faults": asdict(self.faults)}


def is_position(content: dict[str, Any]) -> bool:
    """Whether an object has the keys and types that State.position writes. Older ones have no rate."""
    expected = State(None, None, phase="").position()  # type: ignore[arg-type]
    faults = content.get("faults")
    if not isinstance(faults, dict) or not all(
        _is_fault(name, value, expected["faults"]) for name, value in faults.items()
    ):
        return False
    same = all(type(content.get(name, {})) is type(value) for name, value in expected.items())
    numbers = (
        [content[name] for name in ("phase_start", "phase_end", "step", "batch_index", "tokens")]
        if same
        else [-1]
    )
    return min(numbers) >= 0


def _is_fault(name: str, value: Any, expected: dict[str, Any]) -> bool:
    """Whether a field of FaultState holds text, finite numbers or, as grad_clip may, nothing."""
    if name not in expected or (value is None and name != "grad_clip"):
        return False
    if isinstance(expected[name], str) or value is None:
        return isinstance(value, str | None)
    if isinstance(expected[name], list) != isinstance(value, list):
        return False
    whole = isinstance(expected[name], int) or name in ("bad_batches", "excluded_batches")
    numbers = value if isinstance(value, list) else [value]
    return all(
        type(n) is int or (type(n) is float and not whole and math.isfinite(n)) for n in numbers
    )
