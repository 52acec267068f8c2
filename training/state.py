"""The state of a training run: model, optimizer, position and fault history."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from models.kinds import AnyModel
from training.faults import FaultState


@dataclass
class State:
    """Everything that a run carries from one update to the next; checkpoints store it.

    step counts updates over the whole run. batch_index counts batches of the current phase,
    including skipped ones.
    """

    model: AnyModel  # sharded by FSDP2
    optimizer: torch.optim.Optimizer
    phase: str
    phase_start: int = 0  # updates made before the phase
    phase_end: int = 0  # updates made when the phase ends
    step: int = 0
    batch_index: int = 0
    tokens: int = 0  # over all phases
    data_fingerprint: str = ""  # the loader's
    faults: FaultState = field(default_factory=FaultState)
    parent: str = ""  # identity of the checkpoint before this phase; "" for none
    lr_schedule: dict[str, Any] = field(default_factory=dict)  # peak and ScheduleConfig
    until: int | None = None  # step at which this command pauses; not saved in checkpoints

    @property
    def end(self) -> int:
        """The step at which this command stops: the end of the phase, or `until` if earlier."""
        return self.phase_end if self.until is None else min(self.phase_end, self.until)

    def position(self) -> dict[str, Any]:
        """The content of trainer.json."""
        return {
            "phase": self.phase,
            "phase_start": self.phase_start,
            "phase_end": self.phase_end,
            "step": self.step,
            "batch_index": self.batch_index,
            "tokens": self.tokens,
            "data": self.data_fingerprint,
            "parent": self.parent,
            "rate": self.lr_schedule,
            "faults": asdict(self.faults),
        }


def is_position(content: dict[str, Any]) -> bool:
    """Return True if an object has the keys and types of State.position; `rate` may be missing."""
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
    """Return True if a saved field of FaultState has a valid type and finite numbers."""
    if name not in expected or (value is None and name != "grad_clip"):
        return False
    if isinstance(expected[name], str) or value is None:
        return isinstance(value, str | None)
    if isinstance(expected[name], list) != isinstance(value, list):
        return False
    integers = isinstance(expected[name], int) or name in ("bad_batches", "excluded_batches")
    numbers = value if isinstance(value, list) else [value]
    return all(
        type(n) is int or (type(n) is float and not integers and math.isfinite(n)) for n in numbers
    )
