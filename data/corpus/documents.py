"""Read the documents of one local file of any accepted type."""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.local_files import (
    MAX_LINE,
    TEXT_SUFFIXES,
    EncodingError,
    file_type,
    read_lines,
    rows_at_once,
    utf8_blocks,
    zstd_error,
)
from data.corpus.sources import Document
from data.corpus.tables import (
    CHAT_COLUMNS,
    MORE_THAN_ARRAY,
    NOT_CSV,
    TOO_LONG_ROW,
    arrow_batches,
    choose_column,
    csv_rows,
    json_rows,
    row_columns,
    text_columns,
)
from files import parse_json

NOT_JSON, NOT_UTF8, NOT_OBJECT = "not JSON", "not UTF-8 text", "not a JSON object"
ARRAY, NO_COLUMN = "a JSON array; write one object per line", "no column with text"
CONVERSATION = "a conversation, which train_sft.py reads"
# Reasons that count against ingest's max_bad
UNREADABLE = (
    *(NOT_JSON, NOT_UTF8, NOT_OBJECT, ARRAY, NO_COLUMN, CONVERSATION),
    *(NOT_CSV, TOO_LONG_ROW, MORE_THAN_ARRAY),
)
DAMAGED = "rest of the file truncated or damaged"
NO_TEXT = "no text"
# Reasons of whole files
ENCODING = "files that are neither UTF-8 nor UTF-16 with a byte-order mark; iconv converts them"
BINARY = "files with binary content"
UNREADABLE_FILE, UNREADABLE_ROWS = "unreadable file", "unreadable rows"
NO_TEXT_COLUMN = "tables without an evident column of text; --text_column names one"
MAX_KEYS = 200  # characters of a row's keys in a message


class LongDocumentError(ValueError):
    """A text file is too long for one document."""


class Skipped(NamedTuple):
    """A row or file that a reader skipped."""

    reason: str
    where: str  # file:line, or "" for rows that need no listing


Numbered = tuple[int, Document | Skipped]


class FileSettings(NamedTuple):
    """How files are read."""

    text_column: str | None = None  # None: chosen by tables.choose_column
    id_column: str = "id"
    document_chars: int | None = None  # cut text files into documents of about this length
    alone: bool = True  # True: an unreadable file is an error; False: it is skipped


class FileDocuments:
    """The documents of one file. `chosen` is called with an automatically chosen column."""

    def __init__(
        self, name: str, path: Path, settings: FileSettings, chosen: Callable[[str, str], object]
    ):
        self.name, self.path, self.settings, self.chosen = name, path, settings, chosen
        self.column = settings.text_column

    def read(self, before: int = 0) -> Iterator[Numbered]:
        """Yield the number of each row after row `before`, with its document or Skipped.

        A damaged file yields the rows before the damage, then Skipped.
        """
        kind = file_type(self.name)
        try:
            if kind in (".parquet", ".arrow"):
                yield from self._parquet(before) if kind == ".parquet" else self._arrow(before)
                return
            number = 0
            text = self.path.name.lower().endswith(TEXT_SUFFIXES)
            rows = self._text if text else self._csv if kind in (".csv", ".tsv") else self._json
            try:
                for number, document in rows():
                    if number > before:
                        yield number, document
            except (EOFError, OSError, zlib.error, zstd_error()) as error:
                where = f"{self.name}:{number + 1} ({first_line(error)})"
                yield number, Skipped(DAMAGED, where)
        except EncodingError:
            if self.settings.alone:
                raise
            yield before, Skipped(ENCODING, self.name)
        except _NoTextColumn as error:
            if self.settings.alone or self.settings.text_column:
                raise ValueError(str(error)) from error
            yield before, Skipped(NO_TEXT_COLUMN, f"{self.name} ({', '.join(error.columns)})")

    def _where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def _text(self) -> Iterator[Numbered]:
        """Yield the whole file as one document, or pieces of it."""
        if self.settings.document_chars:
            pieces = enumerate(text_pieces(self.path, self.settings.document_chars), 1)
            for number, piece in pieces:
                yield number, self._text_document(piece, f"{self.name}#{number}")
            return
        content = bytearray()
        for block in utf8_blocks(self.path):
            content += block
            if len(content) > MAX_LINE:
                raise LongDocumentError(
                    f"{self.path} is one document of more than {MAX_LINE:,} bytes; cut it with "
                    "--document_chars 20000"
                )
        yield 1, self._text_document(bytes(content), self.name)

    def _text_document(self, content: bytes, where: str) -> Document | Skipped:
        if b"\0" in content:
            return Skipped(BINARY, where)
        document = to_document(content, None, where)
        undecodable = isinstance(document, Skipped) and document.reason == NOT_UTF8
        return Skipped(ENCODING, where) if undecodable else document

    def _csv(self) -> Iterator[Numbered]:
        for number, row in enumerate(csv_rows(self.path), 2):  # the header is row 1
            where = self._where(number)
            if isinstance(row, str):
                yield number, Skipped(row, where)
                continue
            column = self._column(row_columns(row))
            document = row_document(row, where, column, self.settings.id_column)
            if isinstance(document, Document) and not _is_unicode(document):
                document = Skipped(NOT_UTF8, where)
            yield number, document

    def _json(self) -> Iterator[Numbered]:
        in_array = file_type(self.name) == ".json"
        for number, line in enumerate(json_rows(self.path), 1):
            where = self._where(number)
            if isinstance(line, str):
                yield number, Skipped(line, where if line == MORE_THAN_ARRAY else self.name)
            elif line.strip():
                yield number, self._json_document(line, where, in_array)

    def _json_document(self, line: bytes, where: str, in_array: bool) -> Document | Skipped:
        value = parse_value(line, where)
        if isinstance(value, str) and in_array:
            return to_document(value, None, where)
        if isinstance(value, dict) and self.column is None:
            try:
                self._column(row_columns(value))
            except _NoTextColumn:
                return without_text(value, where)
        return row_document(value, where, self.column or "text", self.settings.id_column)

    def _column(self, columns: Mapping[str, bool]) -> str:
        """Return the text column, chosen at the first row; _NoTextColumn if it is missing.

        columns: of a row or table, as in choose_column.
        """
        if self.column is None:
            column = choose_column(columns, self.settings.id_column)
            if column is None:
                raise _NoTextColumn(self.path, "text", columns)
            self.column = column
            if column != "text":
                self.chosen(column, self.name)
        return self.column

    def _table_columns(self, schema: Any) -> list[str]:
        """Return the columns of a table to read: text and, if present, id."""
        columns = text_columns(schema)
        column = self._column(columns)
        if column not in columns:
            raise _NoTextColumn(self.path, column, columns)
        if not columns[column]:
            raise ValueError(
                f"column {column} of {self.path} has type {schema.field(column).type}, not text; "
                "give --text_column"
            )
        return [column, *({self.settings.id_column} & set(columns))]

    def _batch(self, batch: Any, columns: list[str], start: int) -> Iterator[Numbered]:
        """Yield a record batch's documents, one text in memory at a time. start: rows before it."""
        texts, *ids = (batch.column(column) for column in columns)
        for i in range(batch.num_rows):
            number = start + i + 1
            row_id = ids[0][i].as_py() if ids else None
            yield number, to_document(texts[i].as_py(), row_id, self._where(number))

    def _parquet(self, before: int) -> Iterator[Numbered]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            yield before, Skipped(UNREADABLE_FILE, f"{self.name} ({first_line(error)})")
            return
        with file:
            columns = self._table_columns(file.schema_arrow)
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if end <= before:
                    continue
                number = start
                try:
                    size = rows_at_once(file, group)
                    for batch in file.iter_batches(
                        batch_size=size, row_groups=[group], columns=columns
                    ):
                        rows = self._batch(batch, columns, number)
                        for number, document in rows:
                            if number > before:
                                yield number, document
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    where = f"{self.name}:{number + 1}-{end} ({first_line(error)})"
                    yield end, Skipped(UNREADABLE_ROWS, where)

    def _arrow(self, before: int) -> Iterator[Numbered]:
        import pyarrow as pa

        number = 0
        try:
            with arrow_batches(self.path) as (schema, batches):
                columns = self._table_columns(schema)
                for batch in batches:
                    if number + batch.num_rows <= before:
                        number += batch.num_rows
                        continue
                    rows = self._batch(batch, columns, number)
                    for number, document in rows:
                        if number > before:
                            yield number, document
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            where = f"{self._where(number + 1)} ({first_line(error)})"
            yield number, Skipped(DAMAGED, where)


class _NoTextColumn(Exception):
    """The text column of a table is missing or ambiguous."""

    def __init__(self, path: Path, column: str, columns: Mapping[str, bool]):
        self.columns = list(columns)
        super().__init__(
            f"{path} has no column {column}, only {', '.join(columns)}; give --text_column"
            f"{conversation_hint(columns)}"
        )


def text_pieces(path: Path, chars: int) -> Iterator[bytes]:
    """Cut a text file into pieces of `chars` to 2 * `chars` bytes; the last may be shorter.

    A piece ends at the first empty line after `chars` bytes, else at the end of a line, else at a
    space or within a word. Joined pieces are the text.
    """
    lines: list[bytes] = []
    size = 0
    for line in read_lines(path):
        for text in _cut_line(line + b"\n", chars):
            if size + len(text) > 2 * chars and size:
                yield b"".join(lines)
                lines, size = [], 0
            lines.append(text)
            size += len(text)
            if size >= chars and not text.strip():
                yield b"".join(lines)
                lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _cut_line(line: bytes, size: int) -> Iterator[bytes]:
    """Cut a line of more than `size` bytes at spaces, or between characters."""
    while len(line) > size:
        end = line.rfind(b" ", 0, size) + 1 or size
        while end > 1 and line[end : end + 1] and 0x80 <= line[end] < 0xC0:
            end -= 1  # within a UTF-8 character
        yield line[:end]
        line = line[end:]
    if line:
        yield line


def parse_line(
    line: bytes | str, where: str, text_column: str, id_column: str
) -> Document | Skipped:
    """Parse one line of JSON as a document."""
    return row_document(parse_value(line, where), where, text_column, id_column)


def parse_value(line: bytes | str, where: str) -> Any:
    """Parse JSON; Skipped if it is not JSON."""
    import orjson

    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Unlike orjson, json accepts lone surrogates
            return parse_json(line if isinstance(line, str) else line.decode())
        except UnicodeDecodeError:
            return Skipped(NOT_UTF8, where)
        except ValueError:
            return Skipped(NOT_JSON, where)


def row_document(row: Any, where: str, text_column: str, id_column: str) -> Document | Skipped:
    """Return a JSON object as a document, or Skipped for another value."""
    if isinstance(row, Skipped):
        return row
    if not isinstance(row, dict):
        rows = isinstance(row, list) and row and isinstance(row[0], dict)
        return Skipped(ARRAY if rows else NOT_OBJECT, where)
    if not isinstance(row.get(text_column, 0), str | bytes | None):
        return without_text(row, where)
    return to_document(row[text_column], row.get(id_column), where)


def without_text(row: Mapping[str, Any], where: str) -> Skipped:
    """Return a row without a column of text as Skipped; `where` then lists its keys."""
    keys = ", ".join(row)
    listed = keys if len(keys) <= MAX_KEYS else f"{keys[:MAX_KEYS]}..."
    reason = CONVERSATION if CHAT_COLUMNS & row.keys() else NO_COLUMN
    return Skipped(reason, f"{where} (keys: {listed or 'none'})")


def conversation_hint(columns: Collection[str]) -> str:
    """Return which command reads conversations, if the columns hold some; else ""."""
    hint = ", or give conversations to train_sft.py (docs/sft.md)"
    return hint if CHAT_COLUMNS & set(columns) else ""


def to_document(text: object, row_id: object, where: str) -> Document | Skipped:
    """Return a row as a document. Bytes are decoded as UTF-8.

    The id is `where` if row_id is None.
    """
    try:
        text, row_id = (
            value.decode() if isinstance(value, bytes) else value for value in (text, row_id)
        )
    except UnicodeDecodeError:
        return Skipped(NOT_UTF8, where)
    if not isinstance(text, str | None):
        return Skipped(NO_COLUMN, where)
    if not text or not text.strip():
        return Skipped(NO_TEXT, where)
    return Document(where if row_id is None else str(row_id), text)


def _is_unicode(document: Document) -> bool:
    try:
        return bool((document.id + document.text).encode())
    except UnicodeEncodeError:
        return False


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, of at most 200 characters."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
