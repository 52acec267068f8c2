"""Ranges of settings, declared beside their types, and the functions that check them.

A field of a config dataclass declares its range in its type: `steps: PositiveInt = 1000`, or
`lr_factor: Annotated[float, above(0, maximum=1)] = 0.5`. training/settings.py checks values from
YAML, overrides and flags. `check_fields` checks a dataclass that code creates.
"""

import math
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

MAX_INT = 2**63  # integers of configs reach torch and numpy as int64
MAX_SHOWN = 80  # characters of a value in an error message


@dataclass(frozen=True)
class Range:
    """Allowed values of a number; never NaN or infinite."""

    minimum: float = -math.inf
    maximum: float = math.inf
    open_minimum: bool = False  # minimum itself is not allowed
    open_maximum: bool = False  # maximum itself is not allowed
    hint: str = ""  # what to do about a value outside the range

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, Integral):
            if not -MAX_INT < int(value) < MAX_INT:
                return False
        elif not math.isfinite(value):
            return False
        high_enough = value > self.minimum if self.open_minimum else value >= self.minimum
        low_enough = value < self.maximum if self.open_maximum else value <= self.maximum
        return bool(high_enough and low_enough)

    def __str__(self) -> str:
        words = (
            (("at least", "above")[self.open_minimum], self.minimum),
            (("at most", "below")[self.open_maximum], self.maximum),
        )
        bounds = [f"{word} {_number(bound)}" for word, bound in words if math.isfinite(bound)]
        text = (
            "must not be negative"
            if bounds == ["at least 0"]
            else f"must be {' and '.join(bounds)}"
        )
        return text if bounds else "must be a finite number"


@dataclass(frozen=True)
class NonEmpty:
    """Text that must not be empty or blank."""

    hint: str = ""

    def __contains__(self, value: Any) -> bool:
        return bool(value.strip())

    def __str__(self) -> str:
        return "must not be empty"


@dataclass(frozen=True)
class OneOf:
    """Text that must be one of these names."""

    names: tuple[str, ...]
    hint: str = ""

    def __contains__(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"is not one of {', '.join(self.names)}"


def one_of(*names: str) -> OneOf:
    """Return the rule that text must be one of these names."""
    return OneOf(names)


def at_least(
    minimum: float, *, maximum: float = math.inf, below: float | None = None, hint: str = ""
) -> Range:
    """Return the range minimum <= x <= maximum, or minimum <= x < below."""
    return Range(
        minimum, maximum if below is None else below, open_maximum=below is not None, hint=hint
    )


def above(
    minimum: float, *, maximum: float = math.inf, below: float | None = None, hint: str = ""
) -> Range:
    """Return the range minimum < x <= maximum, or minimum < x < below."""
    return Range(minimum, maximum if below is None else below, True, below is not None, hint)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, above(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
AnyFloat = Annotated[float, Range()]
Fraction = Annotated[float, at_least(0, below=1)]
NonEmptyText = Annotated[str, NonEmpty()]
WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def check(value: Any, hint: Any, name: str) -> None:
    """ValueError if a value or an element of it is outside the range of the type `hint`."""
    rules = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if rules else hint
    for rule in rules:
        if isinstance(rule, (Range, NonEmpty, OneOf)):
            if not _is_kind(value, kind):
                raise ValueError(
                    f"{name}={shown(value)} must be {WORDS.get(kind, 'of another type')}"
                )
            if value not in rule:
                hint = f"; {rule.hint}" if rule.hint else ""
                raise ValueError(f"{name}={shown(value)} {violation(value, rule)}{hint}")
    if rules:
        return
    origin, types = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        for key, inner in value.items():
            check(inner, types[1], f"{name}.{key}")
    elif origin is tuple and isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            check(inner, types[0], f"{name}[{index}]")
    elif value is not None and type(None) in types:
        check(value, member(types, value), name)


def member(types: tuple[Any, ...], value: Any) -> Any:
    """Choose from X | tuple[X, ...] | None by value: the tuple for a list or tuple, else X."""
    tuples = [
        kind
        for kind in types
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple))
    ]
    return next(kind for kind in [*tuples, *types] if kind is not type(None))


def check_fields(config: Any, section: str = "") -> None:
    """ValueError if a field of a config dataclass is outside its range.

    section: the config's dotted name, for the message.
    """
    for name, hint in hints(type(config)).items():
        if name in config.__dataclass_fields__:
            check(getattr(config, name), hint, f"{section}.{name}" if section else name)


def hints(kind: Any) -> dict[str, Any]:
    """Return the declared types of a class, with their ranges."""
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind, include_extras=True)
    return _HINTS[kind]


_HINTS: dict[Any, dict[str, Any]] = {}


def shown(value: Any) -> str:
    """Format a value for an error message, in at most MAX_SHOWN characters."""
    try:
        text = f"{value:.15g}" if isinstance(value, float) else repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits
        text = "a value that is too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _is_kind(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral) and not math.isfinite(value)


def violation(value: Any, rule: Range | NonEmpty | OneOf) -> str:
    """Return what is wrong with a value that breaks a rule, e.g. "must be at least 1"."""
    if _is_infinite(value):
        return "must be a finite number"
    if (
        isinstance(rule, Range)
        and isinstance(value, Integral)
        and int(value) >= MAX_INT
        and not math.isfinite(rule.maximum)
    ):
        return "must be below 2**63"
    return str(rule)


def _number(value: float) -> str:
    power = int(value).bit_length() - 1 if value == int(value) and value > 0 else 0
    if power > 20 and value == 2**power:
        return f"2**{power}"
    return str(int(value)) if value == int(value) and abs(value) < MAX_INT else f"{value:g}"
