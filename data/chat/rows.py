"""Read rows (JSON objects) of conversations and pairs from files and hub data sets."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.documents import Skipped
from data.corpus.local_files import (
    ROW_SUFFIXES,
    file_type,
    find_files,
    rows_at_once,
    zstd_error,
)
from data.corpus.readers import hub_complaint
from data.corpus.sources import HUB, hub_set
from data.corpus.tables import MORE_THAN_ARRAY, arrow_batches, csv_rows, json_rows
from files import parse_json


class Row(NamedTuple):
    """A JSON object and its origin."""

    where: str  # file:line
    value: dict[str, Any]


def read_rows(
    path: str, split: str = "train", config: str | None = None
) -> Iterator[Row | Skipped]:
    """Return the rows of local files, or of a split of a hub data set, as JSON objects."""
    if path.startswith(HUB):
        return _hub_rows(path, split, config)
    if split != "train" or config:
        raise ValueError(
            f"split and config select rows of a hub data set; remove them for the local path {path}"
        )
    return _file_rows(path)


def input_files(path: str) -> dict[str, Path]:
    """Return the local files of a path, by name; {} for the hub. ValueError if none exists."""
    if path.startswith(HUB):
        return {}
    return find_files(path, ROW_SUFFIXES)


def _file_rows(path: str) -> Iterator[Row | Skipped]:
    for name, file in input_files(path).items():
        kind = file_type(name)
        if kind in (".parquet", ".arrow"):
            yield from _parquet(name, file) if kind == ".parquet" else _arrow(name, file)
            continue
        number = 0
        try:
            read_file = _csv if kind in (".csv", ".tsv") else _json
            for number, row in read_file(name, file):  # noqa: B007 `number` is used below
                yield row
        except (EOFError, OSError, zlib.error, zstd_error()):
            yield Skipped("rest of the file truncated or damaged", f"{name}:{number + 1}")


def _json(name: str, file: Path) -> Iterator[tuple[int, Row | Skipped]]:
    """Yield numbered rows of JSON lines, or of a file that is one JSON array, like Alpaca's."""
    for number, line in enumerate(json_rows(file), 1):
        if isinstance(line, str) and line != MORE_THAN_ARRAY:
            raise ValueError(
                f"{file} is not a JSON array; fix it, or write one row per line as .jsonl"
            )
        if isinstance(line, str):
            yield number, Skipped(line, f"{name}:{number}")
        elif line.strip():
            yield number, _parse(line, f"{name}:{number}")


def _csv(name: str, file: Path) -> Iterator[tuple[int, Row | Skipped]]:
    """Yield numbered rows of a .csv or .tsv table; the header is row 1. "" is a missing value.

    A value that is a JSON array of objects is parsed: the messages of a conversation.
    """
    for number, row in enumerate(csv_rows(file), 2):
        where = f"{name}:{number}"
        if isinstance(row, str):
            yield number, Skipped(row, where)
        elif any(not value.isascii() and _has_surrogates(value) for value in row.values()):
            yield number, Skipped("invalid UTF-8", where)
        else:
            values = {key: _json_value(value) for key, value in row.items() if value}
            yield number, Row(where, values)


def _json_value(text: str) -> Any:
    """Parse a JSON array of objects; any other text is returned unchanged."""
    if text.startswith("["):
        with suppress(ValueError):
            value = parse_json(text)
            if value and all(isinstance(item, dict) for item in value):
                return value
    return text


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _parse(line: bytes, where: str) -> Row | Skipped:
    try:
        value = parse_json(line.decode())
    except UnicodeDecodeError:
        return Skipped("invalid UTF-8", where)
    except ValueError:
        return Skipped("invalid JSON", where)
    return Row(where, value) if isinstance(value, dict) else Skipped("not a JSON object", where)


def _parquet(name: str, file: Path) -> Iterator[Row | Skipped]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(
                batch_size=rows_at_once(table, group), row_groups=[group]
            ):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}:{number}", _present(value))
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        yield Skipped("rest of the file damaged", f"{name}:{number + 1}")


def _arrow(name: str, file: Path) -> Iterator[Row | Skipped]:
    import pyarrow as pa

    number = 0
    try:
        with arrow_batches(file) as (_, batches):
            for batch in batches:
                for i in range(batch.num_rows):  # one row in memory at a time
                    number += 1
                    [value] = batch.slice(i, 1).to_pylist()
                    yield Row(f"{name}:{number}", _present(value))
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        yield Skipped("rest of the file damaged", f"{name}:{number + 1}")


def _hub_rows(path: str, split: str, config: str | None) -> Iterator[Row | Skipped]:
    name, named_config, revision = hub_set(path) or (path.removeprefix(HUB), None, None)
    if named_config and config not in (None, named_config):
        raise ValueError(f"{path} and config: {config} name two configs; remove one")
    config = config or named_config
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
        for number, value in enumerate(rows, 1):
            yield Row(f"{name}:{number}", _present(dict(value)))
    except Exception as error:
        raise ValueError(hub_complaint(error, name)) from error


def _present(value: Any) -> Any:
    """Return a table value without null keys: Arrow structs have the keys of all rows."""
    if isinstance(value, dict):
        return {key: _present(field) for key, field in value.items() if field is not None}
    if isinstance(value, bytes):  # a binary column may contain text
        with suppress(UnicodeDecodeError):
            return value.decode()
    return [_present(field) for field in value] if isinstance(value, list) else value
