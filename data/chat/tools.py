"""Executable tools for models: arithmetic, dates, units and facts about countries.

Results are exact, work is bounded, and no code is evaluated. TOOLS has the JSON schemas in OpenAI's
format. run_tool accepts any name and arguments; errors are returned as text, too.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.chat.factbook import ATTRIBUTES, article, find_country, load_countries
from files import parse_json

WHEELS = Path("data/store/wheels")
MAX_EXPRESSION = 200  # characters
MAX_BITS = 1024  # bits of numerator or denominator, about 300 digits
MAX_PLACES = 12  # decimal places; longer decimals become fractions
MAX_VALUE = 10**15
ARITHMETIC: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
SPELLINGS = {"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-", "^": "**"}

# The value of each unit in the first unit of its kind
UNITS: dict[str, dict[str, Fraction]] = {
    "length": {
        "metre": Fraction(1),
        "kilometre": Fraction(1000),
        "centimetre": Fraction(1, 100),
        "millimetre": Fraction(1, 1000),
        "mile": Fraction("1609.344"),
        "yard": Fraction("0.9144"),
        "foot": Fraction("0.3048"),
        "inch": Fraction("0.0254"),
    },
    "mass": {
        "kilogram": Fraction(1),
        "gram": Fraction(1, 1000),
        "tonne": Fraction(1000),
        "pound": Fraction("0.45359237"),
        "ounce": Fraction("0.028349523125"),
    },
    "volume": {
        "litre": Fraction(1),
        "millilitre": Fraction(1, 1000),
        "gallon": Fraction("3.785411784"),
    },
    "time": {
        "second": Fraction(1),
        "minute": Fraction(60),
        "hour": Fraction(3600),
        "day": Fraction(86_400),
        "week": Fraction(604_800),
    },
    "area": {
        "square metre": Fraction(1),
        "square kilometre": Fraction(10**6),
        "hectare": Fraction(10_000),
    },
}
TEMPERATURES = ("celsius", "fahrenheit", "kelvin")
ALIASES = {
    **{
        "m": "metre",
        "km": "kilometre",
        "cm": "centimetre",
        "mm": "millimetre",
        "mi": "mile",
        "yd": "yard",
        "ft": "foot",
    },
    **{
        "in": "inch",
        "kg": "kilogram",
        "g": "gram",
        "t": "tonne",
        "lb": "pound",
        "oz": "ounce",
        "l": "litre",
    },
    **{
        "ml": "millilitre",
        "s": "second",
        "min": "minute",
        "h": "hour",
        "feet": "foot",
        "inches": "inch",
    },
    **{"c": "celsius", "f": "fahrenheit", "k": "kelvin"},
}
PLURALS = {"foot": "feet", "inch": "inches"}


def _schema(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    properties = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": properties},
    }


_TEXT = {"type": "string"}
_DATE = {"type": "string", "description": "YYYY-MM-DD"}
TOOLS: list[dict[str, Any]] = [
    _schema("calculator", "Compute an arithmetic expression exactly.", expression=_TEXT),
    _schema("weekday", "Which day of the week is a date?", date=_DATE),
    _schema("days_between", "How many days is it from start to end?", start=_DATE, end=_DATE),
    _schema("add_days", "Which date is so many days later?", date=_DATE, days={"type": "integer"}),
    _schema(
        "convert", "Convert a value between units.", value={"type": "number"}, unit=_TEXT, to=_TEXT
    ),
    _schema(
        "lookup",
        "A fact about a country.",
        country=_TEXT,
        attribute={"type": "string", "enum": list(ATTRIBUTES)},
    ),
]


class ToolError(Exception):
    """An error that a tool returns as its answer."""


def run_tool(name: str, arguments: Any, wheels: Path = WHEELS) -> str:
    """Run a tool call; return its result as text, or "error: ...".

    wheels: folder of `lookup`'s facts.
    """
    functions: dict[str, Callable[..., str]] = {
        "calculator": calculator,
        "weekday": weekday,
        "days_between": days_between,
        "add_days": add_days,
        "convert": convert,
        "lookup": lambda country, attribute: lookup(country, attribute, wheels),
    }
    try:
        if not isinstance(name, str) or name not in functions:
            raise ToolError(f"unknown tool {str(name)[:40]!r}; known: {', '.join(functions)}")
        return functions[name](**_checked(name, arguments))
    except ToolError as error:
        return f"error: {error}"


def _checked(name: str, arguments: Any) -> dict[str, Any]:
    """Check arguments (an object or its JSON text) against the tool's schema; else ToolError."""
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError:
            raise ToolError("the arguments are not JSON") from None
    if not isinstance(arguments, dict):
        raise ToolError("the arguments must be a JSON object")
    schema = next(
        tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name
    )
    properties = schema["properties"]
    if set(arguments) != set(properties):
        raise ToolError(f"{name} takes {', '.join(properties)}")
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
    }
    for key, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, types[properties[key]["type"]]):
            raise ToolError(f"{key} must be of type {properties[key]['type']}")
    return arguments


def calculator(expression: str) -> str:
    """Compute an expression of numbers, + - * / // % ** and parentheses exactly.

    ToolError if the expression is invalid or its numbers exceed the bounds.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"the expression is longer than {MAX_EXPRESSION} characters")
    text = "".join(SPELLINGS.get(character, character) for character in expression).strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if not text or re.search(r"[^0-9.+\-*/%() ]", text):
        raise ToolError("an expression has only numbers, + - * / // % ** and parentheses")
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError("the expression is not well formed") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    return show_number(value)


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # The source text is exact, unlike a binary float
        value = Fraction(ast.get_source_segment(text, node) or "")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, text) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        value = _power(_value(node.left, text), _value(node.right, text))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        value = ARITHMETIC[type(node.op)](_value(node.left, text), _value(node.right, text))
    else:
        raise ToolError("the expression is not arithmetic")
    if _bits(value) > MAX_BITS:
        raise ToolError("the numbers become too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent must be a whole number")
    if abs(exponent) > MAX_BITS or _bits(base) * abs(exponent) > 2 * MAX_BITS:
        raise ToolError("the numbers become too large")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    return max(abs(value.numerator), value.denominator).bit_length()


def show_number(value: Fraction) -> str:
    """Format a number: integer, decimal of at most 12 places, or fraction with rounded value."""
    if value.denominator == 1:
        return str(value.numerator)
    if 10**MAX_PLACES % value.denominator == 0:
        scaled = value * 10**MAX_PLACES
        sign, digits = "-" * (scaled < 0), str(abs(scaled.numerator)).rjust(MAX_PLACES + 1, "0")
        return f"{sign}{digits[:-MAX_PLACES]}.{digits[-MAX_PLACES:]}".rstrip("0")
    return f"{value.numerator}/{value.denominator} (about {rounded(value)})"


def rounded(value: Fraction) -> str:
    """Round half to even to 4 places, or to 4 significant digits below 0.001; no trailing zeros."""
    if 0 < abs(value) < Fraction(1, 1000):
        digits = f"{float(value):.4g}"
        return f"{Decimal(digits):f}" if abs(value) > Fraction(1, 10**MAX_PLACES) else digits
    return show_number(Fraction(round(value * 10**4), 10**4))


def _date(text: str) -> date:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        raise ToolError(f"{text[:20]!r} is not a date of the form YYYY-MM-DD")
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ToolError(f"there is no date {text}") from None


def weekday(date: str) -> str:
    """Return the English name of the day of the week."""
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    return days[_date(date).weekday()]


def days_between(start: str, end: str) -> str:
    """Return the days from start to end, negative if the end is earlier."""
    return str((_date(end) - _date(start)).days)


def add_days(date: str, days: int) -> str:
    """Return the date `days` days later (earlier if negative)."""
    try:
        return (_date(date) + timedelta(days=days)).isoformat()
    except OverflowError:
        raise ToolError("the result is not between the years 1 and 9999") from None


def convert(value: float, unit: str, to: str) -> str:
    """Convert a value to another unit; return it rounded (see rounded), with the unit's name."""
    if not (math.isfinite(value) if isinstance(value, float) else True) or abs(value) > MAX_VALUE:
        raise ToolError(f"the value must be between -{MAX_VALUE:.0e} and {MAX_VALUE:.0e}")
    exact = Fraction(Decimal(str(value)))
    old, new = _unit(unit), _unit(to)
    if old in TEMPERATURES and new in TEMPERATURES:
        celsius = _to_celsius(exact, old)
        if celsius < Fraction("-273.15"):
            raise ToolError("there is no temperature below absolute zero")
        result = _from_celsius(celsius, new)
    else:
        kinds = [kind for kind in UNITS.values() if old in kind and new in kind]
        if not kinds:
            raise ToolError(f"{old} cannot be converted to {new}")
        result = exact * kinds[0][old] / kinds[0][new]
    number = rounded(result)
    return f"{number} {unit_name(new, number)}"


def _unit(name: str) -> str:
    plain = name.strip().lower().removeprefix("degrees ")
    spelled = re.sub(r"(met|lit)er", r"\1re", plain)
    known = [unit for kind in UNITS.values() for unit in kind] + list(TEMPERATURES)
    for candidate in (plain, spelled, spelled.removesuffix("s")):
        unit = ALIASES.get(candidate, candidate)
        if unit in known:
            return unit
    raise ToolError(f"unknown unit {name[:20]!r}; known: {', '.join(known)}")


def unit_name(unit: str, number: str) -> str:
    """Return a unit's name after a number: 1 mile, 2 miles, 3 degrees Celsius, 4 kelvin."""
    if unit in TEMPERATURES:
        return unit if unit == "kelvin" else f"degrees {unit.capitalize()}"
    return unit if number == "1" else PLURALS.get(unit, unit + "s")


def _to_celsius(value: Fraction, unit: str) -> Fraction:
    return {
        "celsius": value,
        "kelvin": value - Fraction("273.15"),
        "fahrenheit": (value - 32) * Fraction(5, 9),
    }[unit]


def _from_celsius(value: Fraction, unit: str) -> Fraction:
    return {
        "celsius": value,
        "kelvin": value + Fraction("273.15"),
        "fahrenheit": value * Fraction(9, 5) + 32,
    }[unit]


def lookup(country: str, attribute: str, wheels: Path = WHEELS) -> str:
    """Look up a fact about a country in the World Factbook in `wheels`; never download it."""
    if attribute not in ATTRIBUTES:
        raise ToolError(f"unknown attribute {attribute[:20]!r}; known: {', '.join(ATTRIBUTES)}")
    try:
        countries = load_countries(wheels, download=False)
    except (ValueError, OSError) as error:
        raise ToolError(f"the facts cannot be read: {error}") from None
    match = find_country(countries, country)
    if match is None:
        raise ToolError(f"no country named {country[:40]!r} is known")
    if attribute not in match.facts:
        raise ToolError(f"the {attribute} of {article(match.name)} is not known")
    return match.facts[attribute]
