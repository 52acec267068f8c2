"""Tool calls: JSON schemas of functions, parsing of calls, and BFCL's AST check."""

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
# Bounds of schemas; without them a small model may never end a string, list or number.
MAX_CHARACTERS, MAX_ITEMS, MAX_NUMBER = 80, 8, 10**9


def tools(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert BFCL's functions to OpenAI's tool format."""
    converted = []
    for function in functions:
        parameters = {"type": "object", **_properties(function["parameters"], bounded=False)}
        converted.append({"type": "function", "function": {**function, "parameters": parameters}})
    return converted


def call_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON schema of one call to any of the functions, with bounded arguments."""
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
    properties = {name: schema(s, bounded) for name, s in spec.get("properties", {}).items()}
    required = [name for name in spec.get("required", []) if name in properties]
    return {"properties": properties, "required": required}


def schema(spec: dict[str, Any], bounded: bool = True) -> dict[str, Any]:
    """Convert a BFCL type to a JSON schema. bounded: limit the size of every value."""
    kind = TYPES.get(str(spec.get("type")).lower(), str(spec.get("type")).lower())
    if kind not in PYTHON:  # "any"
        kind = "string"
    result: dict[str, Any] = {"type": kind}
    if "description" in spec and not bounded:
        result["description"] = spec["description"]
    if spec.get("enum") and all(type(value) is PYTHON[kind] for value in spec["enum"]):
        return {**result, "enum": spec["enum"]}
    if kind == "object" and spec.get("properties"):
        closed = {"additionalProperties": False} if bounded else {}
        return {**result, **_properties(spec, bounded), **closed}
    if kind == "array":
        result["items"] = schema(spec.get("items") or {"type": "string"}, bounded)
    if bounded:
        bounds: dict[str, dict[str, Any]] = {
            "string": {"maxLength": MAX_CHARACTERS},
            "array": {"maxItems": MAX_ITEMS},
            "integer": {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
            "number": {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
            "object": {"additionalProperties": False, "properties": {}},
        }
        result |= bounds.get(kind, {})
    return result


def read_calls(text: str, marker: str | None) -> tuple[list[Call], bool]:
    """Parse a reply's calls; also return whether all are well-formed {"name", "arguments"}.

    marker: text that precedes each call. Without one, a reply that begins with a brace or a
    bracket is a call or a list of calls.
    """
    if marker is None:
        unfenced = re.sub(r"^```\w*\s*|\s*```$", "", text.strip())
        sections = [unfenced] if unfenced[:1] in ("{", "[") else []
    else:
        sections = text.split(marker)[1:]
    calls: list[Call] = []
    for section in sections:
        try:
            value, end = json.JSONDecoder().raw_decode(section.strip())
        except (ValueError, RecursionError):
            return calls, False
        rest = section.strip()[end:]
        parsed = value if isinstance(value, list) else [value]
        if (marker is None and rest.strip()) or not all(_is_call(call) for call in parsed):
            return calls, False
        calls += parsed
    return calls, True


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), dict)
    )


def fits(call: Call, functions: list[dict[str, Any]]) -> bool:
    """Whether a call names a known function with required, known and correctly typed arguments."""
    function = next((f for f in functions if f["name"] == call["name"]), None)
    if function is None:
        return False
    spec, arguments = function["parameters"], call["arguments"]
    properties = spec.get("properties", {})
    if not set(spec.get("required", [])) <= set(arguments) <= set(properties):
        return False
    return all(_has_type(value, properties[name]) for name, value in arguments.items())


def _has_type(value: Any, spec: dict[str, Any]) -> bool:
    """Whether a value has the type. bool is not int; int is accepted as float."""
    kind = TYPES.get(str(spec.get("type")).lower(), str(spec.get("type")).lower())
    if kind not in PYTHON:
        return True
    if type(value) is not PYTHON[kind] and not (kind == "number" and type(value) is int):
        return False
    item_spec = spec.get("items")
    if kind != "array" or not item_spec:
        return True
    return isinstance(value, list) and all(
        _has_type(item, {**item_spec, "items": None}) for item in value
    )


def matches(
    calls: list[Call],
    possible: list[dict[str, dict[str, list[Any]]]],
    functions: list[dict[str, Any]],
) -> bool:
    """Whether the calls are the expected ones, in any order.

    possible: BFCL's ground_truth, a list of {name: {argument: accepted values}}.
    """
    if len(calls) != len(possible) or not all(fits(call, functions) for call in calls):
        return False
    options = [
        [i for i, truth in enumerate(possible) if _is_correct(call, truth)] for call in calls
    ]
    return _assign(options, set())


def _assign(options: list[list[int]], used: set[int]) -> bool:
    """Whether each call can be matched to a different expected call."""
    if not options:
        return True
    return any(_assign(options[1:], used | {i}) for i in options[0] if i not in used)


def _is_correct(call: Call, truth: dict[str, dict[str, list[Any]]]) -> bool:
    [(name, arguments)] = truth.items()
    if call["name"] != name or not set(call["arguments"]) <= set(arguments):
        return False
    omitted = set(arguments) - set(call["arguments"])
    if any("" not in arguments[argument] for argument in omitted):  # "" marks an optional argument
        return False
    return all(
        any(_same(value, accepted) for accepted in arguments[argument])
        for argument, value in call["arguments"].items()
    )


def _same(value: Any, expected: Any) -> bool:
    """Equality as in BFCL: texts ignore case, spaces and punctuation; lists are ordered.

    Each value of an expected object is a list of accepted values.
    """
    if isinstance(value, str) and isinstance(expected, str):
        return _normalise(value) == _normalise(expected)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        if not set(value) <= set(expected):
            return False
        accepted = {k: v if isinstance(v, list) else [v] for k, v in expected.items()}
        if any("" not in accepted[key] for key in set(expected) - set(value)):
            return False
        return all(any(_same(value[key], choice) for choice in accepted[key]) for key in value)
    if type(value) is bool or type(expected) is bool:
        return value is expected
    return value == expected or value is expected


def _normalise(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
