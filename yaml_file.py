"""Read YAML configs within limits; a damaged or hostile file raises a ValueError.

PyYAML itself keeps the last of two equal keys, expands aliases and merges without a limit, and
raises many types of errors.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml")  # of a config's file
MAX_BYTES = 4 * 2**20
MAX_NODES = 200_000  # values of a document, with aliases expanded
MAX_DEPTH = 50


class UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, but equal keys raise an error."""

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
    """A mapping has the key `problem` twice."""


def parse_yaml(text: str) -> Any:
    """Parse YAML. The ValueError's text follows a file name: "is not YAML: ..."."""
    try:
        value = yaml.load(text, UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML{_reason(error)}") from error
    except RecursionError as error:
        raise ValueError(
            f"is not a config: it is nested more than {MAX_DEPTH} levels deep or refers to itself"
        ) from error
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's constructors: an integer of more than 4,300 digits, a 13th month, !!int ''
        raise ValueError(
            f"holds a value that YAML cannot read ({str(error)[:80]}); quote or shorten it"
        ) from error
    _check_size(value)
    return value


def read_yaml_file(path: Path) -> Any:
    """Read a YAML file; ValueError names the file and the problem."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, but a config has at most {MAX_BYTES:,}; check the path"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _check_size(value: Any) -> None:
    """ValueError if a value exceeds MAX_NODES (aliases expanded) or MAX_DEPTH, or is recursive."""
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for node in level:
            children = [*node.keys(), *node.values()] if isinstance(node, dict) else node
            if isinstance(children, (list, tuple, set)):
                count += len(children)
                if count > MAX_NODES:
                    raise ValueError(
                        f"is not a config: it has more than {MAX_NODES:,} values, "
                        "with its aliases expanded"
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
