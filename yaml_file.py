"""YAML of configs, read within bounds: a file that is damaged or hostile ends in one ValueError.

PyYAML itself keeps only the last of two equal keys, expands aliases and merges without a limit, and
raises errors of many kinds from its constructors.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 4 * 2**20
MAX_NODES = 200_000  # of a document, aliases expanded
MAX_DEPTH = 50


class UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps only the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    raise _TwiceError(None, None, key.value, key.start_mark)
                keys.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"merges give more than {MAX_NODES:,} keys"
            )


class _TwiceError(yaml.constructor.ConstructorError):
    """A mapping that holds the key `problem` twice."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. ValueError says why there is none; read_yaml_file puts the file's name before it."""
    try:
        value = yaml.load(text, UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML{_reason(error)}") from error
    except RecursionError as error:
        raise ValueError(
            f"is not a config: it is nested more than {MAX_DEPTH} levels deep or refers to itself"
        ) from error
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        # of PyYAML's constructors: an integer of more than 4,300 digits, the 13th month, !!int ''
        raise ValueError(
            f"holds a value that YAML cannot read ({str(error)[:80]}); write it in quotes or shorten it"
        ) from error
    _check_size(value)
    return value


def read_yaml_file(path: Path) -> Any:
    """The value of a YAML file; ValueError names the file and says what is wrong with it."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config has at most {MAX_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _check_size(value: Any) -> None:
    """ValueError if a value has more than MAX_NODES parts with aliases expanded, is deeper than MAX_DEPTH, or holds itself."""
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for part in level:
            children = [*part.keys(), *part.values()] if isinstance(part, dict) else part
            if isinstance(children, (list, tuple, set)):
                count += len(children)
                if count > MAX_NODES:
                    raise ValueError(
                        f"is not a config: it has more than {MAX_NODES:,} values, with its aliases expanded"
                    )
                inner += children
        level = inner
        if not level:
            return
    raise ValueError(
        f"is not a config: it is nested more than {MAX_DEPTH} levels deep or refers to itself"
    )


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, _TwiceError):
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        return f": it has the key {error.problem!r} twice{line}; remove one"
    return f": {' '.join(str(error).split())}"
