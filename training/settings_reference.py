"""Reference of settings: type, default, allowed values and meaning, read from the dataclasses.

The meaning of a setting is the comment above its field or at the end of the field's line. The
meaning of a section is the first paragraph of its dataclass's docstring. Commands print both with
--help_settings, and scripts/settings_reference.py writes docs/settings.md.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union

from cli import CommandParser, plain, survive_closed_pipes
from ranges import NonEmpty, OneOf, Range, hints
from training.aliases import NOTES, new_name, plain_name
from training.settings import NoEffect

ENTRY = "NAME"  # placeholder for the name of an entry, as in chat.sources.NAME.path
GENERAL = "Settings outside of sections"
TYPES = {int: ["whole number"], float: ["number"], bool: ["true", "false"], str: ["text"]}
WIDTH = 100  # columns of --help_settings


class Setting(NamedTuple):
    """One setting of a config."""

    name: str  # dotted
    type: str
    default: str  # as in YAML, or "required"
    allowed: str  # "" for every value of the type
    meaning: str


class Section(NamedTuple):
    """A section of a config and its settings, without those of inner sections."""

    name: str  # dotted; "" for the settings outside of sections
    meaning: str
    settings: list[Setting]


def add_settings(parser: CommandParser, kind: type) -> None:
    """Add overrides and --help_settings to the parser of a command with the config `kind`.

    A setting written as a flag is an error; the message shows how to write it.
    """

    class ShowSettings(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, value: Any, flag: Any = None) -> None:
            survive_closed_pipes()
            try:
                print(help_text(kind, value or ""))
            except ValueError as error:
                parser.error(str(error))
            parser.exit()

    about = "print what the settings mean: all, or those of a section such as optim"
    options: dict[str, Any] = {"nargs": "?", "metavar": "SECTION", "default": argparse.SUPPRESS}
    parser.add_argument("--help_settings", action=ShowSettings, help=about, **options)
    about = "any setting, e.g. optim.lr=1e-3"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=about)
    parser.setting_hint = lambda flag: _hint(kind, flag)


def _hint(kind: type, flag: str) -> str | None:
    """Return how to write the setting that a flag names; None if it names none."""
    name, known = plain(flag), _names(sections(kind))
    target = name if name in known else new_name(kind, name)
    if target is None and "." in name:
        target = next(iter(difflib.get_close_matches(name, known, n=1)), None)
    if target is None:
        return None
    if target not in known:
        return f"{target} is a section; --help_settings {target} lists its settings"
    note = NOTES.get(plain_name(name), NOTES.get(target, ""))
    return f"write the setting {target}=VALUE" + (f" ({note})" if note else "")


def sections(kind: type) -> list[Section]:
    """Return the sections of a config's dataclass, without settings that have no effect."""
    return list(_sections(kind, "", GENERAL, _no_effect(kind)))


def _names(parts: list[Section]) -> list[str]:
    return [setting.name for section in parts for setting in section.settings]


def _no_effect(kind: type) -> Mapping[str, NoEffect]:
    return getattr(kind, "NO_EFFECT", {})


def _sections(
    kind: type, name: str, meaning: str, no_effect: Mapping[str, NoEffect]
) -> Iterator[Section]:
    settings, inner = list[Setting](), list[Section]()
    for field in dataclasses.fields(kind):
        key = f"{name}.{field.name}" if name else field.name
        if key in no_effect:
            continue
        hint, comment = hints(kind)[field.name], _comment(kind, field.name)
        dataclass, is_map = _dataclass_in(hint)
        if dataclass is None:
            texts = (_type(hint), _default(field), _allowed(hint), comment)
            settings.append(Setting(key, *texts))
            continue
        about = (inspect.getdoc(dataclass) or "").split("\n\n")[0].replace("\n", " ")
        if is_map or NoneType in typing.get_args(hint):  # optional: the comment says when
            about = " ".join(filter(None, (_sentence(comment), about)))
        inner += _sections(dataclass, f"{key}.{ENTRY}" if is_map else key, about, no_effect)
    if settings:
        yield Section(name, meaning, settings)
    yield from inner


def _dataclass_in(hint: Any) -> tuple[type | None, bool]:
    """Return the dataclass of a section, and whether the section has entries with any name."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not NoneType]
    is_map = typing.get_origin(hint) is dict
    is_optional = len(arguments) == 1 and NoneType in typing.get_args(hint)
    kind = arguments[1] if is_map else arguments[0] if is_optional else hint
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind, is_map
    return None, False


def _comment(kind: type, name: str) -> str:
    """Return the comment of a field; an inherited field has the comment of its base class."""
    bases = (base for base in kind.__mro__ if dataclasses.is_dataclass(base))
    return next(filter(None, (_comments(base).get(name) for base in bases)), "")


@cache
def _comments(kind: type) -> dict[str, str]:
    """Return the comments of the fields that a dataclass declares, without inherited fields."""
    source = textwrap.dedent(inspect.getsource(kind))
    ends, lines = dict[int, str](), dict[int, str]()  # comments after code, and comment lines
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa")):
            is_line = not token.line[: token.start[1]].strip()
            (lines if is_line else ends)[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in lines:
                first -= 1
            above = [lines[line] for line in range(first, node.lineno)]
            comments[node.target.id] = " ".join([*above, ends.get(node.end_lineno or 0, "")])
    return {name: text.strip() for name, text in comments.items()}


def _type(hint: Any) -> str:
    *words, last = _types(hint)
    return f"{', '.join(words)} or {last}" if words else last


def _types(hint: Any) -> list[str]:
    """Return the alternative types of a setting, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _types(arguments[0])
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not NoneType]
        null = ["null"] * (NoneType in arguments)
        return [word for kind in kinds for word in _types(kind)] + null
    if origin is tuple:
        return [f"list of {_plural(_type(arguments[0]))}"]
    if origin is dict:
        return [f"map of names to {_plural(_type(arguments[1]))}"]
    return TYPES[hint]


def _plural(words: str) -> str:
    return words.replace("list of", "lists of") if words.startswith("list of") else f"{words}s"


def _allowed(hint: Any) -> str:
    """Return the rules of a setting's type and of the types in it, in words."""
    texts = []
    for rule in getattr(hint, "__metadata__", ()):
        if isinstance(rule, OneOf):
            texts.append(", ".join(rule.names))
        elif isinstance(rule, (Range, NonEmpty)):
            text = str(rule).removeprefix("must be ").removeprefix("must ")
            text = {"not be negative": "at least 0", "not be empty": "not empty"}.get(text, text)
            texts += [text] * (text != "a finite number")
    texts += map(_allowed, typing.get_args(hint))
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _shown(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _shown(field.default)


def _shown(value: Any) -> str:
    """Format a value as in YAML."""
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_shown, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _sentence(text: str) -> str:
    """Return a comment as a sentence. A first word with a colon is a value and is not changed."""
    first = text.partition(" ")[0]
    is_word = first == "default:" or first.rstrip(",;").isalpha()
    text = text[:1].upper() + text[1:] if is_word else text
    return f"{text.rstrip('.')}." if text else ""


def help_text(kind: type, name: str) -> str:
    """Describe the settings of a section, one setting, or with name="" all settings.

    ValueError for an unknown name.
    """
    parts, name = sections(kind), name.replace("-", "_")
    chosen = list(_chosen(parts, name))
    if not chosen and (target := new_name(kind, name)):
        chosen = list(_chosen(parts, target))
    if not chosen:
        known = [section.name for section in parts if section.name]
        close = difflib.get_close_matches(name, known + _names(parts), n=1, cutoff=0.5)
        advice = f"did you mean {close[0]}?" if close else f"the sections are {', '.join(known)}"
        raise ValueError(f"no section or setting {name}; {advice}")
    return "\n\n".join(_paragraphs(section) for section in chosen)


def _chosen(parts: list[Section], name: str) -> Iterator[Section]:
    for section in parts:
        below = (section.name + ".").startswith(name + ".")
        settings = [x for x in section.settings if below or not name or x.name == name]
        if settings:
            yield section._replace(settings=settings)


def _paragraphs(section: Section) -> str:
    title = f"{section.name}: {section.meaning}" if section.name else section.meaning
    lines = textwrap.wrap(title, WIDTH)
    for setting in section.settings:
        allowed = f": {setting.allowed}" if setting.allowed else ""
        head = f"{setting.name} = {setting.default}    ({setting.type}{allowed})"
        for text, indent in ((head, "  "), (_sentence(setting.meaning), "      ")):
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent=indent,
                subsequent_indent="      ",
                break_long_words=False,
            )
    return "\n".join(lines)


def page(kinds: Mapping[str, type]) -> str:
    """Return docs/settings.md. kinds: command -> config dataclass; the first is the base."""
    base, *others = kinds
    shared = {setting for section in sections(kinds[base]) for setting in section.settings}
    parts = [PAGE_HEAD, f"## {base}", *map(_markdown, sections(kinds[base]))]
    for command in others:
        kind = kinds[command]
        parts_of_kind = sections(kind)
        known = _names(parts_of_kind)
        refused = _no_effect(kind).keys() - _no_effect(kinds[base]).keys()
        missing = sorted(
            setting.name
            for setting in shared
            if setting.name not in known
            and not any((setting.name + ".").startswith(f"{key}.") for key in refused)
        )
        parts += [f"## {command}", f"The settings of {base}, with these differences."]
        if refused:
            names = ", ".join(f"`{name}`" for name in sorted(refused))
            parts.append(_wrapped(f"Without effect, and therefore refused: {names}."))
        if missing:
            names = ", ".join(f"`{name}`" for name in missing)
            parts.append(_wrapped(f"Not settings of this command: {names}."))
        for section in parts_of_kind:
            if new := [setting for setting in section.settings if setting not in shared]:
                parts.append(_markdown(section._replace(settings=new)))
    return "\n\n".join(parts) + "\n"


PAGE_HEAD = """# Settings

Every setting of the training commands. `python -m scripts.settings_reference` writes this page from
the dataclasses; edit the comments beside their fields instead of this page.

In a YAML config, `optim.lr` is the key `lr` of the section `optim`. On the command line, write
`optim.lr=1e-3`. `null` clears a setting. NAME stands for a name of your choice. A config may begin
with `extends: OTHER.yaml`, whose settings it then changes. A line `optim.lr: 1e-3` outside of the
sections of a config is accepted too, unless its section also sets `lr`.
`python train.py --help_settings optim` prints a section, `--help_settings` alone all of them."""


def _markdown(section: Section) -> str:
    """Return a section's heading, meaning and table."""
    head = [f"### `{section.name}`", _wrapped(_escaped(section.meaning))]
    head = head if section.name else [f"### {section.meaning}"]
    rows = ["| Setting | Type | Default | Allowed | Meaning |", "|---|---|---|---|---|"]
    for setting in section.settings:
        required = setting.default == "required"
        default = setting.default if required else f"`{setting.default}`"
        allowed, meaning = _escaped(setting.allowed), _escaped(_sentence(setting.meaning))
        cells = (f"`{setting.name}`", setting.type, default, allowed, meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n\n".join([*head, "\n".join(rows)])


def _escaped(text: str) -> str:
    """Escape characters that Markdown would read as HTML or as the end of a table cell."""
    return text.replace("|", "\\|").replace("<", "\\<")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
