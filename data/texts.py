"""Texts that callers of the short forms pass: strings, or rows with a text."""

from collections.abc import Mapping
from typing import Any


def text_of(row: Any, column: str = "text") -> str:
    """Return a text, or the text in a column of a row; ValueError if it has none."""
    text = row.get(column) if isinstance(row, Mapping) else row
    if isinstance(text, str):
        return text
    if isinstance(row, Mapping):
        raise ValueError(f"a row has no text under {column!r}; it has {', '.join(map(str, row))}")
    raise ValueError(f"a text is a {type(row).__name__}; give texts, or rows with a {column!r}")
