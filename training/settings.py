"""Settings from YAML files laid over each other, then dotted overrides, read strictly into frozen dataclasses.

Precedence: default < extended file < file < override. A key that does not exist stops the run with a suggestion.
"""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from training.aliases import renamed

ROOT = Path(__file__).resolve().parent.parent
Kind = TypeVar("Kind")


def load_settings(kind: type[Kind], path: str | Path, overrides: list[str] | None = None) -> Kind:
    """`kind` from a YAML file with `section.key=value` overrides; ValueError says which setting is wrong and how."""
    values = read_yaml(Path(path))
    for override in overrides or []:
        key, found, text = override.partition("=")
        if not found:
            raise ValueError(f"{override!r} is not an override; write section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {override!r} is not YAML") from error
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key} is not a setting: {section} has no parts")
        inner[last] = value
    if clauses := renamed(kind, values):
        raise ValueError("; ".join(clauses))
    return _make(kind, values, "")


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file laid over the one it `extends` (a path beside it). Sections are merged key by key, values replaced.

    A relative path that does not exist in the working folder is read from the project's folder.
    """
    if not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        raise ValueError(f"there is no config file {path}" + _nearest(path))
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings, as key: value")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    merged = read_yaml(path.parent / str(parent), (*seen, path.resolve()))
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _make(kind: Any, value: Any, name: str) -> Any:
    """`value` from YAML as the type `kind`; name is the dotted setting, for messages."""
    if dataclasses.is_dataclass(kind):
        return _make_dataclass(kind, value, name)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _make(next(k for k in typing.get_args(kind) if k is not type(None)), value, name)
    if origin is dict and isinstance(value, dict):
        return {str(k): _make(typing.get_args(kind)[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_make(typing.get_args(kind)[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # PyYAML reads 3e-4 as a string
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return value if isinstance(value, int) else int(number)
        except (ValueError, OverflowError):
            pass
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    raise ValueError(f"{name}={value!r} must be {wanted.get(kind, 'a list' if origin is tuple else 'settings, as key: value')}")


def _make_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must hold settings, as key: value")
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
            raise ValueError(f"{name}{'.' if name else ''}{key} is not a setting; {hint}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ValueError(f"{name} lacks {f.name}")
    prefix = f"{name}." if name else ""
    return kind(**{key: _make(fields[key], part, prefix + key) for key, part in value.items()})


def _nearest(path: Path) -> str:
    names = [found.name for folder in (path, ROOT / path) for found in folder.parent.glob("*.yaml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
