"""Curves: settings that a config changes over the steps, in its section `schedules`.

training/schedulers.py applies them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from ranges import (
    AnyFloat,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    at_least,
    check,
    check_fields,
    one_of,
)
from training.optimizers import GROUPS, OptimConfig

SHAPES: dict[str, Callable[[float], float]] = {  # share of the change, at fraction x
    "linear": lambda x: x,
    "step": lambda x: 0.0,  # holds the value until the next point
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    # Steep at both ends; modded-nanogpt's windows (records/track_2_medium, 2025).
    "cubic": lambda x: 4 * x**3 - 6 * x**2 + 3 * x,
}


@dataclass(frozen=True)
class Curve:
    """A setting as a function of the run's step: points, and a shape between them.

    Before the first point it has the first value, after the last point the last value. check()
    must accept a curve before `over` and __call__ are used.
    """

    DOTTED_NAMES: ClassVar[bool] = True  # settings.py accepts entries such as lr.embedding

    points: tuple[tuple[AnyFloat, ...], ...] = ()  # [step or fraction, value], in rising order
    # Unit of the first number of a point; fraction: of schedule.total_steps.
    by: Annotated[str, one_of("steps", "fraction")] = "steps"
    shape: Annotated[str, one_of(*SHAPES)] = "linear"  # between two points; step: hold the first

    def __post_init__(self) -> None:
        check_fields(self, "schedules")
        for i, point in enumerate(self.points):
            if not isinstance(point, (tuple, list)):
                raise ValueError(f"schedules.points[{i}]={point} must be two numbers, [x, value]")

    def check(self, key: str, allowed: Any) -> None:
        """ValueError if the curve is not defined or has a value outside `allowed` (ranges.py)."""
        if not self.points:
            raise ValueError(f"{key}.points is empty; list points as [[0, value], [step, value]]")
        for i, point in enumerate(self.points):
            if len(point) != 2:
                raise ValueError(f"{key}.points[{i}]={list(point)} must be two numbers, [x, value]")
            allowed_x = (
                NonNegativeFloat if self.by == "steps" else Annotated[float, at_least(0, maximum=1)]
            )
            check(point[0], allowed_x, f"{key}.points[{i}][0]")
            check(point[1], allowed, f"{key}.points[{i}][1]")
        if any(before[0] >= after[0] for before, after in pairwise(self.points)):
            raise ValueError(
                f"{key}.points must be in rising order of their first numbers, which are "
                f"{', '.join(f'{point[0]:g}' for point in self.points)}"
            )

    def over(self, total_steps: int) -> "Curve":
        """Return the same curve with its points in steps."""
        if self.by == "steps":
            return self
        points = tuple((round(x * total_steps, 6), value) for x, value in self.points)
        return replace(self, points=points, by="steps")

    def __call__(self, step: int) -> float:
        """Return the value for the update with the 0-based index `step`."""
        assert self.by == "steps", "call over() first"
        for (begin, first), (end, last) in pairwise(self.points):
            if step < end:
                x = max(0.0, (step - begin) / (end - begin))
                return first + (last - first) * SHAPES[self.shape](x)
        return self.points[-1][1]

    def rounded(self, step: int) -> int:
        """Return the value rounded to a whole number."""
        return round(self(step))


LENGTH = Annotated[float, at_least(1)]
# Name in the section `schedules` -> range of its values.
SCHEDULED: dict[str, Any] = {
    **{f"lr.{group}": NonNegativeFloat for group in GROUPS},  # factor of the group's learning rate
    "weight_decay": NonNegativeFloat,  # factor of every group's weight decay
    "beta2": Fraction,  # AdamW's groups without another beta2 setting
    **{f"beta2.{group}": Fraction for group in GROUPS},
    "momentum": Fraction,  # Muon's
    "short_window": LENGTH,  # tokens
    "long_window": LENGTH,
    "softcap": PositiveFloat,
    "multi_token.1": NonNegativeFloat,  # loss weight of the second next token
    "multi_token.2": NonNegativeFloat,  # loss weight of the third next token
    "batch_tokens": LENGTH,  # tokens per step over all ranks
    "sequence_length": LENGTH,  # tokens
}
WINDOWS = ("short_window", "long_window")
MULTI_TOKEN = ("multi_token.1", "multi_token.2")
OF_GROUPS = ("lr", "beta2")  # prefixes of group names
OF_LOADER = ("batch_tokens", "sequence_length")
ROUNDED = (*WINDOWS, *OF_LOADER)  # schedules whose values are rounded


def check_curves(curves: Mapping[str, Curve], optim: OptimConfig) -> None:
    """ValueError if a scheduled setting does not exist or has no effect on this optimizer."""
    for name, curve in curves.items():
        if name not in SCHEDULED:
            raise ValueError(
                f"schedules.{name} is not a schedule; there are {', '.join(SCHEDULED)}"
            )
        curve.check(f"schedules.{name}", SCHEDULED[name])
    if "momentum" in curves and optim.name != "muon":
        raise ValueError("schedules.momentum needs optim.name=muon")
    for group, settings in optim.groups.items():
        if settings.beta2 is not None and f"beta2.{group}" in curves:
            raise ValueError(
                f"optim.groups.{group}.beta2 has no effect with schedules.beta2.{group}; remove it"
            )
    if "beta2.matrices" in curves and optim.name == "muon":
        raise ValueError(
            "schedules.beta2.matrices has no effect on Muon, which updates the matrices; remove it"
        )
    if "weight_decay" in curves and optim.uses_hyperball("matrices") and not optim.decays():
        raise ValueError(
            "schedules.weight_decay has no effect with optim.hyperball, where no group decays; "
            "remove it"
        )
    if "multi_token.2" in curves and "multi_token.1" not in curves:
        raise ValueError("schedules.multi_token.2 needs schedules.multi_token.1")
