"""Read rows from CSV, JSON and Arrow files in bounded memory; choose the text column."""

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.corpus.local_files import MAX_LINE, file_type, read_lines, utf8_blocks
from files import parse_json

CHAT_COLUMNS = {"messages", "conversations"}
TEXT_COLUMNS = ("text", "content", "document", "body", "article", "raw_content", "markdown")
NOT_CSV = "not CSV (quotes)"
TOO_LONG_ROW = "a row with more fields than the header; quote text that contains the separator"
NOT_ROWS = "neither a JSON array nor JSON lines"
MORE_THAN_ARRAY = "text after the end of the JSON array"
SIGNS, QUOTES = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


def choose_column(columns: Mapping[str, bool], id_column: str = "") -> str | None:
    """Return the column with the documents' text; None if it is not evident.

    columns: name -> True if its values are text. Chooses the first of TEXT_COLUMNS, in any case, or
    the only text column other than `id_column`. Conversations have no such only column.
    """
    if "text" in columns:
        return "text"  # of any type: a wrong type is a separate error
    texts = [name for name, is_text in columns.items() if is_text and name != id_column]
    for wanted in TEXT_COLUMNS:
        if matches := [name for name in texts if name.lower() == wanted]:
            return matches[0]
    return texts[0] if len(texts) == 1 and not CHAT_COLUMNS & columns.keys() else None


def csv_rows(path: Path) -> Iterator[dict[str, str] | str]:
    """Yield a row after the header as a dict, or the reason why a row cannot be read.

    The separator of a .csv file is the most frequent of , ; | and tab in its header. Bytes that are
    not UTF-8 become lone surrogates.
    """
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in read_lines(path))
    first = next(lines, "")
    separator = "\t" if file_type(path.name) == ".tsv" else max(",;\t|", key=first.count)
    csv.field_size_limit(MAX_LINE)

    def with_first() -> Iterator[str]:
        yield first
        yield from lines

    rows = csv.reader(with_first(), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error:
            yield NOT_CSV
            continue
        if row is None:
            return
        if header is None:
            header = [name.strip() for name in row]
        elif len(row) > len(header):
            yield TOO_LONG_ROW
        elif row:
            yield dict(zip(header, row, strict=False))


def json_rows(path: Path) -> Iterator[bytes | str]:
    """Yield the rows of a file as JSON: lines, or the elements of an array in a .json file.

    A str is the reason why the rest cannot be read. Blank lines are yielded, to count lines.
    """
    checked = file_type(path.name) == ".jsonl"
    if not checked and _is_array(path):
        yield from _array_elements(path)
        return
    for line in read_lines(path):
        if not checked and line.strip():
            checked = True
            try:
                parse_json(line)
            except ValueError:
                yield NOT_ROWS
                return
        yield line


def _is_array(path: Path) -> bool:
    """Return True if a file's first character other than white space is [."""
    for block in utf8_blocks(path):
        if begin := block.lstrip():
            return begin.startswith(b"[")
    return False


def _array_elements(path: Path) -> Iterator[bytes | str]:
    """Yield the elements of a JSON array, cut at commas and brackets outside strings."""
    pieces: list[bytes] = []
    depth = size = position = 0
    quoted = ended = False
    for block in utf8_blocks(path):
        begin = 0
        while not ended and (match := (QUOTES if quoted else SIGNS).search(block, position)):
            position, sign = match.end(), match[0]
            if sign == b"\\":
                position += 1  # the next character is escaped
            elif sign == b'"':
                quoted = not quoted
            elif sign in b"[{":
                depth += 1
                begin = position if depth == 1 else begin
            elif sign in b"]}":
                depth -= 1
                ended = depth == 0
            if ended or (sign == b"," and depth == 1):
                element = b"".join((*pieces, block[begin : match.start()]))
                pieces, size, begin = [], 0, position
                if element.strip():
                    yield element
        if ended and block[begin:].strip():
            yield MORE_THAN_ARRAY
            return
        position = max(0, position - len(block))
        if depth:
            pieces.append(block[begin:])
            size += len(block) - begin
        if size > MAX_LINE:
            raise ValueError(
                f"an element of the JSON array in {path} has more than {MAX_LINE:,} bytes; write "
                "one object per document"
            )
    if not ended:
        raise EOFError("the JSON array has no end")


@contextmanager
def arrow_batches(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Open an Arrow file, in stream or file format; return its schema and batches.

    The file is memory-mapped.
    """
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            with pa.ipc.open_file(source) as file:
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
                yield file.schema, batches
            return
        source.seek(0)
        with pa.ipc.open_stream(source) as stream:
            yield stream.schema, iter(stream)


def is_text(type_: Any) -> bool:
    """Return True if an Arrow type holds text, or bytes that may be text."""
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        return is_text(type_.value_type)
    text_types = (
        *("string", "large_string", "string_view"),
        *("binary", "large_binary", "binary_view", "null"),
    )
    return str(type_) in text_types or pa.types.is_fixed_size_binary(type_)


def text_columns(schema: Any) -> dict[str, bool]:
    """Return the columns of an Arrow schema, and whether their values are text."""
    return {field.name: is_text(field.type) for field in schema}


def row_columns(row: Mapping[str, Any]) -> dict[str, bool]:
    """Return the columns of a row, and whether its value is text and not a number."""
    return {
        name: isinstance(value, str) and not re.fullmatch(r"\s*[-+]?[\d.,]+\s*", value)
        for name, value in row.items()
    }
