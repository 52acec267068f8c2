"""Strict reading of settings from YAML files and dotted overrides into frozen dataclasses.

Precedence: default < extended file < file < override < flag. An unknown key is an error with a
suggestion.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from ranges import WORDS, check, hints, member, shown
from training.aliases import renamed
from yaml_file import MAX_DEPTH, SUFFIXES, parse_yaml, read_yaml_file

ROOT = Path(__file__).resolve().parent.parent
MAX_EXTENDS = 100
Kind = TypeVar("Kind")
CONFIG_KINDS = {  # key of only one kind of config -> that kind and its command
    "phases": "a plan; give it to scripts.pipeline --plan",
    "chat": "a config of fine-tuning; give it to train_sft.py",
    "preferences": "a config of preference alignment; give it to train_dpo.py",
    "tokenizer": "a data recipe; give it to scripts.prepare_data",
    "evals": "a suite of evaluations; give it to scripts.run_evals --suite",
    "variants": "an experiment; give it to scripts.experiment",
    "model": "a config of pretraining; give it to train.py",
    "schedule": "a config of pretraining; give it to train.py",
}


def load_settings(
    kind: type[Kind],
    path: str | Path,
    overrides: list[str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Kind:
    """Read `kind` from a YAML file, then apply `section.key=value` overrides, then flags.

    A text setting takes its value as typed; any other value is YAML. An empty value, or "null" in
    an override, clears an optional text setting. flags: dotted setting -> value of a command-line
    flag; None if unset. ValueError names the wrong setting and the reason.
    """
    values = read_yaml(Path(path))
    _check_kind(kind, values, path)
    apply_overrides(kind, values, overrides or [], flags)
    if clauses := renamed(kind, values):
        raise ValueError("; ".join(clauses))
    _check_effect(getattr(kind, "NO_EFFECT", {}), values)
    return _make(kind, values, "")


def apply_overrides(
    kind: type,
    values: dict[str, Any],
    overrides: Sequence[str],
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Set overrides, then flags, in the values of a file, as load_settings does. Changes `values`.

    Returns `values`.
    """
    changes = [(*_split(override), False) for override in overrides]
    changes += [
        (key, str(value), True) for key, value in (flags or {}).items() if value is not None
    ]
    for key, text, is_flag in changes:
        _set(values, key, _value(key, text, _setting_type(kind, key), is_flag))
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values; a missing section is created."""
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{key} is not a setting: {section} is not a section")
    inner[last] = value


class NoEffect(NamedTuple):
    """The reason why a command rejects a setting or section."""

    reason: str
    harmless: tuple[Any, ...] = ()  # values that are accepted, because they change nothing


def _check_effect(no_effect: Mapping[str, NoEffect], values: dict[str, Any]) -> None:
    """ValueError if the config has a setting that the command would ignore."""
    for key, (reason, harmless) in no_effect.items():
        section, name = _section_of(key, values)
        value = section.get(name)
        if name in section and value not in harmless and value != {}:
            setting = f"{key}.{next(iter(value))}" if isinstance(value, dict) else key
            raise ValueError(f"{setting} {reason}")


def without_no_effect(no_effect: Mapping[str, NoEffect], values: dict[str, Any]) -> dict[str, Any]:
    """Remove settings that load_settings would reject. Changes `values`."""
    for key, (_, harmless) in no_effect.items():
        section, name = _section_of(key, values)
        if section.get(name) not in harmless:
            section.pop(name, None)
    return values


def _section_of(key: str, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the section of a dotted key, {} if missing, and the last word of the key."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values = inner if isinstance(inner, dict) else {}
    return values, last


def _check_kind(kind: Any, values: dict[str, Any], path: str | Path) -> None:
    """ValueError if a file is the config of another command."""
    known = {field.name for field in dataclasses.fields(kind)}
    for key, description in CONFIG_KINDS.items():
        if key in values and key not in known:
            raise ValueError(f"{path} is {description}")


def _split(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not an override; write section.key=value")
    return key, text


def _value(key: str, text: str, kind: Any, is_flag: bool) -> Any:
    """Return the value of an override or a flag for a setting of type `kind`."""
    if _optional(kind) is str:
        cleared = kind is not str and (not text or (text == "null" and not is_flag))
        return None if cleared else text
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the value of {shown(key + '=' + text)} {error}") from error


def _setting_type(kind: Any, key: str) -> Any:
    """Return the declared type of a dotted setting; None if it does not exist."""
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
    """Return X for X | None; other types are returned unchanged."""
    if type(None) in typing.get_args(kind):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, merged over the file that it `extends` (a path relative to it).

    Sections are merged key by key. A dotted key, as in `data.mix: {web: 1}`, sets one setting of a
    section, at any depth, and leaves its others. A relative path that does not exist in the working
    folder is read from the project's folder.
    """
    if not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        raise ValueError(f"config file {path} not found" + _nearest(path))
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself")
    values = read_yaml_file(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings, as key: value; it holds {shown(values)}")
    parent = values.pop("extends", None)
    dotted = _pop_dotted(values, path)
    if parent is None:
        return _set_dotted(values, dotted)
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends={shown(parent)} must be the path of one config")
    if len(seen) == MAX_EXTENDS:
        raise ValueError(f"{path} extends more than {MAX_EXTENDS} configs in a chain; merge some")
    merged = read_yaml(path.parent / parent, (*seen, path.resolve()))
    for key, value in values.items():
        are_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if are_sections else value
    return _set_dotted(merged, dotted)


def _pop_dotted(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Remove the dotted keys of a file from its values and return them, shortest first.

    ValueError if the file has a setting twice. A key with an empty word stays, as an unknown one.
    """
    words = {key: key.split(".") for key in values if isinstance(key, str) and "." in key}
    valid = [key for key in words if all(words[key]) and len(words[key]) <= MAX_DEPTH]
    dotted = {key: values.pop(key) for key in sorted(valid, key=lambda key: len(words[key]))}
    nested = _without_aliases(values) if dotted else {}
    for key, value in dotted.items():
        section, name = _section_of(key, nested)
        if name in section:
            raise ValueError(
                f"{path} has the setting {key} twice, once in its section; remove one of them"
            )
        _set(nested, key, _without_aliases(value))
    return dotted


def _set_dotted(values: dict[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file with its dotted keys set."""
    values = _without_aliases(values) if dotted else values
    for key, value in dotted.items():
        _set(values, key, _without_aliases(value))
    return values


def _without_aliases(value: Any) -> Any:
    """Return a value whose sections are copies: a YAML alias is one object in several places."""
    if not isinstance(value, dict):
        return value
    return {key: _without_aliases(inner) for key, inner in value.items()}


def _make(kind: Any, value: Any, name: str) -> Any:
    """Convert a YAML value to the type `kind` and check its range. name: dotted setting."""
    if dataclasses.is_dataclass(kind):
        return _make_dataclass(kind, value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        converted = _make(arguments[0], value, name)
        check(converted, kind, name)
        return converted
    if type(None) in arguments:  # X | None
        inner = member(arguments, value)
        cleared = value is None or (value == "" and _plain(inner) is str)
        return None if cleared else _make(inner, value, name)
    if origin is dict and isinstance(value, dict):
        value = _joined(arguments[1], value)
        return {_key(k, name): _make(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_make(arguments[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if (
        kind in (int, float)
        and isinstance(value, (int, float, str))
        and not isinstance(value, bool)
    ):
        number = _number(value)
        if kind is float and math.isfinite(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    elif kind is str and isinstance(value, str):
        return _text(value, name)
    elif kind is bool and isinstance(value, bool):
        return value
    words = "a list" if origin is tuple else WORDS.get(kind, "settings, as key: value")
    raise ValueError(f"{name}={shown(value)} must be {words}")


def _joined(kind: Any, entries: dict[Any, Any]) -> dict[Any, Any]:
    """Flatten a section with dotted names, {"a": {"b": {...}}}, to {"a.b": {...}}."""
    if not getattr(kind, "DOTTED_NAMES", False):
        return entries
    joined: dict[Any, Any] = {}
    for name, value in entries.items():
        flat = {name: value}
        if isinstance(value, dict) and value and not value.keys() & hints(kind).keys():
            flat = {f"{name}.{key}": inner for key, inner in value.items()}
        for key, inner in flat.items():
            both = isinstance(inner, dict) and isinstance(joined.get(key), dict)
            joined[key] = {**joined[key], **inner} if both else inner
    return joined


def _plain(kind: Any) -> Any:
    """Return a type without its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _number(value: int | float | str) -> int | float:
    """Parse a number or its text, since YAML reads 3e-4 as text; NaN if invalid or too large."""
    try:
        if isinstance(value, str):
            value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        float(value)
        return value
    except (ValueError, OverflowError):
        return math.nan


def _key(key: Any, name: str) -> str:
    """Return an entry's name, as in data.mix; ValueError for a bare no, on or 1."""
    if not isinstance(key, str):
        raise ValueError(
            f"{name} has the entry {shown(key)}, which YAML does not read as text; put it in quotes"
        )
    return _text(key, f"an entry of {name}")


def _text(value: str, name: str) -> str:
    """Return the text; ValueError if a path, a log or a config cannot contain it."""
    if "\0" in value or (
        not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
    ):
        raise ValueError(f"{name}={shown(value)} has a NUL character or is not UTF-8 text")
    return value


def _make_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={shown(value)} must hold settings, as key: value")
    fields = {f.name: hints(kind)[f.name] for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(fields)}"
            path = f"{name}{'.' if name else ''}{key if isinstance(key, str) else shown(key)}"
            raise ValueError(f"{path[:200]} is not a setting; {hint}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ValueError(f"{name or 'the config'} lacks {f.name}")
    prefix = f"{name}." if name else ""
    return kind(**{key: _make(fields[key], entry, prefix + key) for key, entry in value.items()})


def _nearest(path: Path) -> str:
    files = [file for place in (path, ROOT / path) for file in place.parent.glob("*")]
    names = [file.name for file in files if file.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
