"""Settings from YAML files laid over each other, then dotted overrides, read strictly into frozen dataclasses.

Precedence: default < extended file < file < override < flag. A key that does not exist stops the run with a suggestion.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from training.aliases import renamed

ROOT = Path(__file__).resolve().parent.parent
Kind = TypeVar("Kind")
OF_COMMANDS = {  # a key of a config -> what the whole file is, and for which command
    "phases": "a plan; give it to scripts.pipeline --plan",
    "chat": "a config of fine-tuning; give it to train_sft.py",
    "preferences": "a config of preference alignment; give it to train_dpo.py",
    "tokenizer": "a data recipe; give it to scripts.prepare_data",
    "evals": "a suite of evaluations; give it to scripts.run_evals --suite",
    "model": "a config of pretraining; give it to train.py",
    "schedule": "a config of pretraining; give it to train.py",
}


def load_settings(
    kind: type[Kind],
    path: str | Path,
    overrides: list[str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Kind:
    """Read `kind` from a YAML file, with `section.key=value` overrides and then flags over it.

    The value of a text setting is taken as typed; any other value is YAML. An empty value, or "null" in
    an override, clears an optional text setting. flags: dotted setting -> value of a command-line flag, None where it
    was not given. ValueError says which setting is wrong and how.
    """
    values = read_yaml(Path(path))
    _check_kind(kind, values, path)
    given = [(*_split(override), False) for override in overrides or []]
    given += [(key, str(value), True) for key, value in (flags or {}).items() if value is not None]
    for key, text, is_flag in given:
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key} is not a setting: {section} has no parts")
        inner[last] = _value(key, text, _setting_type(kind, key), is_flag)
    if clauses := renamed(kind, values):
        raise ValueError("; ".join(clauses))
    return _make(kind, values, "")


def _check_kind(kind: Any, values: dict[str, Any], path: str | Path) -> None:
    """ValueError where a file is the config of another command, by a key that only such a config has."""
    known = {field.name for field in dataclasses.fields(kind)}
    for key, what in OF_COMMANDS.items():
        if key in values and key not in known:
            raise ValueError(f"{path} is {what}")


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not an override; write section.key=value")
    return key, text


def _value(key: str, text: str, kind: Any, is_flag: bool) -> Any:
    """The value of an override or a flag for a setting of type `kind`."""
    if _optional(kind) is str:
        cleared = kind is not str and (not text or (text == "null" and not is_flag))
        return None if cleared else text
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {key + '=' + text!r} is not YAML{_twice(error)}") from error


def _setting_type(kind: Any, key: str) -> Any:
    """The declared type of a dotted setting; None where there is no such setting."""
    for name in key.split("."):
        kind = _optional(kind)
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            return None
    return kind


def _optional(kind: Any) -> Any:
    """X of X | None; any other type as it is."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps only the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    raise _TwiceError(None, None, key.value, key.start_mark)
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _TwiceError(yaml.constructor.ConstructorError):
    """A mapping that holds the key `problem` twice."""


def _twice(error: yaml.YAMLError) -> str:
    if isinstance(error, _TwiceError):
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        return f": it has the key {error.problem!r} twice{line}; remove one"
    return f": {' '.join(str(error).split())}"


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
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML{_twice(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
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
        return None if value is None else _make(_optional(kind), value, name)
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
            raise ValueError(f"{name or 'the config'} lacks {f.name}")
    prefix = f"{name}." if name else ""
    return kind(**{key: _make(fields[key], part, prefix + key) for key, part in value.items()})


def _nearest(path: Path) -> str:
    names = [found.name for folder in (path, ROOT / path) for found in folder.parent.glob("*.yaml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
