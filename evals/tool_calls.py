"""Tool calls: functions as JSON schemas, calls read out of text, and held against possible answers as BFCL's AST check does."""

import json
import re
from typing import Any

Call = dict[str, Any]  # {"name", "arguments"}
TYPES = {
    "dict": "object",
    "hashmap": "object",
    "float": "number",
    "double": "number",
    "long": "integer",
    "tuple": "array",
}
TYPES |= {
    "list": "array",
    "arraylist": "array",
    "char": "string",
    "bool": "boolean",
    "int": "integer",
    "byte": "integer",
}
PYTHON = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
TEXT, ITEMS, SIZE = (
    80,
    8,
    10**9,
)  # bounds without which a small model does not close a string, a list, a number


def tools(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """BFCL's functions in OpenAI's form."""
    made = []
    for function in functions:
        parameters = {"type": "object", **_properties(function["parameters"], bounded=False)}
        made.append({"type": "function", "function": {**function, "parameters": parameters}})
    return made


def call_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of one call: its name and arguments, all bounded."""
    options = [
        _object({"name": {"const": f["name"]}, "arguments": schema(f["parameters"])})
        for f in functions
    ]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _properties(spec: dict[str, Any], bounded: bool) -> dict[str, Any]:
    inner = {name: schema(part, bounded) for name, part in spec.get("properties", {}).items()}
    return {
        "properties": inner,
        "required": [name for name in spec.get("required", []) if name in inner],
    }


def schema(spec: dict[str, Any], bounded: bool = True) -> dict[str, Any]:
    """BFCL's type as a JSON schema; bounded: with a most for whatever could go on for ever."""
    kind = TYPES.get(str(spec.get("type")).lower(), str(spec.get("type")).lower())
    if kind not in PYTHON:  # "any"
        kind = "string"
    made: dict[str, Any] = {"type": kind}
    made |= {"description": spec["description"]} if "description" in spec and not bounded else {}
    if spec.get("enum") and all(type(value) is PYTHON[kind] for value in spec["enum"]):
        return {**made, "enum": spec["enum"]}
    if kind == "object" and spec.get("properties"):
        return {
            **made,
            **_properties(spec, bounded),
            **({"additionalProperties": False} if bounded else {}),
        }
    if kind == "array":
        made["items"] = schema(spec.get("items") or {"type": "string"}, bounded)
    if bounded:
        made |= {"string": {"maxLength": TEXT}, "array": {"maxItems": ITEMS}}.get(kind, {})
        made |= {"minimum": -SIZE, "maximum": SIZE} if kind in ("integer", "number") else {}
        made |= {"additionalProperties": False, "properties": {}} if kind == "object" else {}
    return made


def read_calls(text: str, marker: str | None) -> tuple[list[Call], bool]:
    """The calls of a reply, and whether what should be calls is JSON of {"name", "arguments"}.

    marker: each call follows one; without, a reply that begins with a brace or a bracket is a call or a list of them.
    """
    if marker is None:
        bare = re.sub(r"^```\w*\s*|\s*```$", "", text.strip())
        parts = [bare] if bare[:1] in ("{", "[") else []
    else:
        parts = text.split(marker)[1:]
    calls: list[Call] = []
    for part in parts:
        try:
            value, end = json.JSONDecoder().raw_decode(part.strip())
        except (ValueError, RecursionError):
            return calls, False
        rest = part.strip()[end:]
        found = value if isinstance(value, list) else [value]
        if (marker is None and rest.strip()) or not all(_is_call(call) for call in found):
            return calls, False
        calls += found
    return calls, True


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), dict)
    )


def fits(call: Call, functions: list[dict[str, Any]]) -> bool:
    """Is it one of these functions, with all it requires, nothing it does not know, and each argument of its type?"""
    function = next((f for f in functions if f["name"] == call["name"]), None)
    if function is None:
        return False
    spec, given = function["parameters"], call["arguments"]
    known = spec.get("properties", {})
    if not set(spec.get("required", [])) <= set(given) <= set(known):
        return False
    return all(_has_type(value, known[name]) for name, value in given.items())


def _has_type(value: Any, spec: dict[str, Any]) -> bool:
    """bool is no integer; an integer does where a float is due; one level of items."""
    kind = TYPES.get(str(spec.get("type")).lower(), str(spec.get("type")).lower())
    if kind not in PYTHON:
        return True
    if type(value) is not PYTHON[kind] and not (kind == "number" and type(value) is int):
        return False
    inner = spec.get("items")
    if kind != "array" or not inner:
        return True
    return isinstance(value, list) and all(
        _has_type(part, {**inner, "items": None}) for part in value
    )


def matches(
    calls: list[Call],
    possible: list[dict[str, dict[str, list[Any]]]],
    functions: list[dict[str, Any]],
) -> bool:
    """Are these the calls that were due, in any order? possible: BFCL's ground_truth, a list of {name: {argument: values}}."""
    if len(calls) != len(possible) or not all(fits(call, functions) for call in calls):
        return False
    options = [[i for i, truth in enumerate(possible) if _is_right(call, truth)] for call in calls]
    return _assign(options, set())


def _assign(options: list[list[int]], taken: set[int]) -> bool:
    """Can each call have a truth of its own?"""
    if not options:
        return True
    return any(_assign(options[1:], taken | {i}) for i in options[0] if i not in taken)


def _is_right(call: Call, truth: dict[str, dict[str, list[Any]]]) -> bool:
    [(name, arguments)] = truth.items()
    if call["name"] != name or not set(call["arguments"]) <= set(arguments):
        return False
    left_out = set(arguments) - set(call["arguments"])
    if any(
        "" not in arguments[argument] for argument in left_out
    ):  # "" among the values: it may be left out
        return False
    return all(
        any(_same(value, right) for right in arguments[argument])
        for argument, value in call["arguments"].items()
    )


def _same(value: Any, right: Any) -> bool:
    """Texts without case, spaces and punctuation; lists in order; objects whose values are each among several."""
    if isinstance(value, str) and isinstance(right, str):
        return _letters(value) == _letters(right)
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(_same, value, right))
    if isinstance(value, dict) and isinstance(right, dict):
        if not set(value) <= set(right):
            return False
        choices = {key: part if isinstance(part, list) else [part] for key, part in right.items()}
        if any("" not in choices[key] for key in set(right) - set(value)):
            return False
        return all(any(_same(value[key], choice) for choice in choices[key]) for key in value)
    return (
        type(value) is not bool and type(right) is not bool and value == right
    ) or value is right


def _letters(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
