"""Readers of documents from local files, hub data sets and the quickstart corpus.

A reader yields Document or Skipped. `position` (JSON) is the state after the last yielded row, from
which another process can resume. `inputs` (JSON) determine the documents.
"""

import inspect
import re
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.corpus.local_files import SUFFIXES, list_files, read_lines, rows_at_once, zstd_error
from data.corpus.sources import Document, HubSource
from data.manifest import file_hash
from files import parse_json

NOT_JSON, NOT_UTF8, NOT_OBJECT = "not JSON", "not UTF-8 text", "not a JSON object"
ARRAY, NO_COLUMN = "a JSON array; write one object per line", "no column with text"
UNREADABLE = (NOT_JSON, NOT_UTF8, NOT_OBJECT, ARRAY, NO_COLUMN)  # count against ingest's max_bad
NOT_READ = f"file type other than {', '.join(SUFFIXES)}"
HUB_PACKAGES = ("huggingface_hub", "datasets", "httpx", "httpx2", "aiohttp", "pyarrow")
# Disk bytes per byte of text, an upper estimate: 0.25 to 0.42 in the quickstart corpus
PARQUET_SHARE = 0.6


class Skipped(NamedTuple):
    """A row or file that a reader skipped."""

    reason: str
    where: str  # file:line, or "" for rows that need no listing


class Reader(Protocol):
    """Reads one source's documents; resumable."""

    inputs: dict[str, Any]
    position: dict[str, Any]
    licence: str
    origin: str
    bytes_per_token: float

    def disk_bytes(self) -> int | None:
        """Return an upper estimate of the source's bytes as zstd parquet; None if unknown."""
        ...

    def read(self) -> Generator[Document | Skipped, None, None]:
        """Read from `position` on. ValueError, with what to do, if the source is unavailable."""
        ...


class CorpusReader:
    """Reads the documents of a deterministic function."""

    def __init__(
        self,
        documents: Callable[[], Iterator[Document]],
        inputs: dict,
        licence: str,
        origin: str,
        bytes_per_token: float,
    ):
        self.documents, self.inputs, self.licence, self.origin = documents, inputs, licence, origin
        self.bytes_per_token = bytes_per_token
        self.position = {"documents": 0}

    def disk_bytes(self) -> int | None:
        return None

    def read(self) -> Generator[Document, None, None]:
        before = self.position["documents"]
        for count, document in enumerate(self.documents()):
            if count >= before:
                self.position = {"documents": count + 1}
                yield document


class FileReader:
    """Reads local parquet and JSON-lines files. Skips and reports unreadable rows.

    A missing column is a ValueError. excluded: folders to ignore, such as the store's output. Files
    with equal name, size and modification time count as unchanged. A .gz file has its checksum at
    the end: damaged rows may be read before the damage is reported.
    """

    bytes_per_token = 4.0
    licence = "not stated"

    def __init__(
        self,
        where: str,
        text_column: str = "text",
        id_column: str = "id",
        excluded: Collection[Path] = (),
    ):
        self.files, self.not_read = list_files(where, excluded)
        self.text_column, self.id_column, self.origin = text_column, id_column, where
        stats = {name: path.stat() for name, path in self.files.items()}
        self.sizes = {name: stat.st_size for name, stat in stats.items()}
        self.inputs: dict[str, Any] = {
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "text_column": text_column,
            "id_column": id_column,
        }
        self.position = {"file": 0, "row": 0}

    def disk_bytes(self) -> int | None:
        return int(
            sum(
                size * (PARQUET_SHARE if name.endswith(".jsonl") else 1.2)
                for name, size in self.sizes.items()
            )
        )

    def read(self) -> Generator[Document | Skipped, None, None]:
        names = list(self.files)
        if self.position == {"file": 0, "row": 0}:
            yield from (Skipped(NOT_READ, name) for name in self.not_read)
        while self.position["file"] < len(names):
            name = names[self.position["file"]]
            read_file = self._parquet if name.endswith(".parquet") else self._lines
            yield from read_file(name, self.files[name], self.position["row"])
            self.position = {"file": self.position["file"] + 1, "row": 0}

    def _lines(self, name: str, path: Path, before: int) -> Iterator[Document | Skipped]:
        number = 0
        try:
            for line in read_lines(path):
                number += 1
                if number > before and line.strip():
                    where = f"{name}:{number}"
                    document = parse_line(line, where, self.text_column, self.id_column)
                    yield self._with_position(number, document)
        except (EOFError, OSError, zlib.error, zstd_error()) as error:
            where = f"{name}:{number + 1} ({_first_line(error)})"
            skipped = Skipped("rest of the file truncated or damaged", where)
            yield self._with_position(number, skipped)

    def _parquet(self, name: str, path: Path, before: int) -> Iterator[Document | Skipped]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            yield Skipped("unreadable file", f"{name} ({_first_line(error)})")
            return
        with file:
            columns = file.schema_arrow.names
            if self.text_column not in columns:
                raise ValueError(
                    f"{path} has no column {self.text_column}, only {', '.join(columns)}; "
                    "give --text_column"
                )
            type_ = file.schema_arrow.field(self.text_column).type
            if not _is_text(type_):
                raise ValueError(
                    f"column {self.text_column} of {path} has type {type_}, not text; "
                    "give --text_column"
                )
            selected = [self.text_column, *({self.id_column} & set(columns))]
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if end <= before:
                    continue
                number = start
                try:
                    size = rows_at_once(file, group)
                    for batch in file.iter_batches(
                        batch_size=size, row_groups=[group], columns=selected
                    ):
                        texts, *ids = (batch.column(column) for column in selected)
                        for i in range(batch.num_rows):  # one text in memory at a time
                            number += 1
                            if number > before:
                                row_id = ids[0][i].as_py() if ids else None
                                where = f"{name}:{number}"
                                document = to_document(texts[i].as_py(), row_id, where)
                                yield self._with_position(number, document)
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    where = f"{name}:{number + 1}-{end} ({_first_line(error)})"
                    yield self._with_position(end, Skipped("unreadable rows", where))

    def _with_position(self, row: int, result: Document | Skipped) -> Document | Skipped:
        """Record the position after a row; returns the row's result."""
        self.position = {"file": self.position["file"], "row": row}
        return result


class HubReader:
    """Streams one hub source with `datasets`; downloads only the used columns and caches nothing.

    recorded: inputs of an earlier run on the same store; its commit is reused for the same
    requested revision. Resuming within a file reads that file again from its start.
    """

    def __init__(
        self, source: HubSource, revision: str | None = None, recorded: dict | None = None
    ):
        self.source, requested = source, revision or source.revision
        self.licence, self.bytes_per_token = source.licence, source.bytes_per_token
        self.inputs: dict[str, Any] = {"repo": source.repo, "asked": requested}
        if recorded and {**recorded, **self.inputs} == recorded:
            commit = recorded["revision"]
        else:
            commit = (
                requested
                if re.fullmatch(r"[0-9a-f]{40}", requested)
                else self._commit_of(requested)
            )
        self.origin = f"{source.repo}@{commit}"
        self.inputs |= {
            "revision": commit,
            "files": source.files,
            "text_column": source.text_column,
            "id_column": source.id_column,
            "keep": _code_hash(source.keep) if source.keep else None,
        }
        self.rows = 0
        self.state: dict | None = None  # of `datasets`
        self.data: Any = None
        self.files: dict[str, int] | None = None

    @property
    def position(self) -> dict[str, Any]:
        return {
            "row": self.rows,
            "state": self.data.state_dict() if self.data is not None else self.state,
        }

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        self.rows, self.state = position["row"], position["state"]

    def disk_bytes(self) -> int | None:
        return int(sum(self._list_files().values()) * 1.2)

    def read(self) -> Generator[Document | Skipped, None, None]:
        source = self.source
        name = source.repo.rsplit("/", 1)[-1] if self._is_local() else source.repo
        id_column = source.id_column or ""
        for row in self._stream():
            self.rows += 1
            where = f"{name}/{self.rows}"
            if self._is_parquet():
                document = to_document(row[source.text_column], row.get(id_column), where)
            elif not row["text"].strip():
                continue
            else:
                document = parse_line(row["text"], where, source.text_column, id_column)
            if isinstance(document, Document) and source.keep and not source.keep(document.text):
                document = Skipped("not in the selection", "")
            yield document

    def _stream(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all files: the used columns of parquet, or lines as "text"."""
        files = list(self._list_files())
        columns = [self.source.text_column, *({self.source.id_column} - {None})]
        parquet = self._is_parquet()
        options: dict[str, Any] = (
            {"columns": columns} if parquet else {"encoding_errors": "replace"}
        )
        try:
            from datasets import load_dataset

            builder = "parquet" if parquet else "text"
            self.data = load_dataset(
                builder, data_files=files, split="train", streaming=True, **options
            )
            if self.state:
                self.data.load_state_dict(self.state)
            yield from self.data
        except Exception as error:
            raise self._explained(error) from error

    def _list_files(self) -> dict[str, int]:
        """Return the source's files in order, as paths for `datasets`, with sizes in bytes."""
        if self.files is None:
            if self._is_local():
                paths = sorted(Path(self.source.repo).glob(self.source.files))
                self.files = {str(path): path.stat().st_size for path in paths}
            else:
                try:
                    from huggingface_hub import HfFileSystem

                    root = f"datasets/{self.origin}/"
                    entries: Any = HfFileSystem().glob(root + self.source.files, detail=True)
                    self.files = {
                        f"hf://{path}": entry["size"] for path, entry in sorted(entries.items())
                    }
                except Exception as error:
                    raise self._explained(error) from error
            if not self.files:
                raise ValueError(
                    f"{self.origin} has no files {self.source.files}; give another commit with "
                    "--revision"
                )
        return self.files

    def _commit_of(self, revision: str) -> str:
        if self._is_local():
            return revision
        try:
            from huggingface_hub import HfApi

            return HfApi().dataset_info(self.source.repo, revision=revision).sha or revision
        except Exception as error:
            raise self._explained(error) from error

    def _is_local(self) -> bool:
        return Path(self.source.repo).is_dir()

    def _is_parquet(self) -> bool:
        return self.source.files.endswith(".parquet")

    def _explained(self, error: Exception) -> Exception:
        """Return a ValueError that says what to do for a hub error; other errors unchanged."""
        if (
            not isinstance(error, OSError)
            and type(error).__module__.split(".")[0] not in HUB_PACKAGES
        ):
            return error
        return ValueError(hub_complaint(error, self.source.repo, self.source.gated))


def hub_complaint(error: Exception, repo: str, gated: bool = False) -> str:
    """Explain a hub error in one sentence: its cause and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = [error]  # the hub's file system wraps the hub's error
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def any_is(kind: type[Exception]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    again = "run the same command again to continue"
    refused = any(
        getattr(getattr(link, "response", None), "status_code", None) in (401, 403)
        for link in chain
    )
    if any_is(GatedRepoError) or (gated and refused):
        return (
            f"{repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, "
            f"run `hf auth login`, then {again}"
        )
    if any_is(RevisionNotFoundError):
        return f"{repo} has no such revision; give another with --revision"
    if any_is(RepositoryNotFoundError):
        return (
            f"the hub has no public data set {repo}; check its name, or run `hf auth login` if it "
            "is private"
        )
    if any_is(RemoteEntryNotFoundError):
        return (
            f"{repo} lacks a file ({_first_line(error)}); check its name, configuration and split"
        )
    if choice := _choice(chain, repo):
        return choice
    if any_is(OfflineModeIsEnabled):
        return f"{repo} is on the hub but HF_HUB_OFFLINE is set; unset it and {again}"
    reason = f"{type(error).__name__}: {_first_line(error)}"
    return f"downloading {repo} from the hub failed ({reason}); when the hub is available, {again}"


def _is_text(type_: Any) -> bool:
    """Return True if an Arrow type holds text, or bytes that may be text."""
    import pyarrow as pa

    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    text_types = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "null",
    )
    return str(type_) in text_types or pa.types.is_fixed_size_binary(type_)


def _choice(chain: list[BaseException], repo: str) -> str | None:
    """Say which split or config to set if the error is an unknown one; else None."""
    known_list = r".*?(?P<known>\[.*?\])"
    patterns = {
        "split": r"(?:Bad split: |Unknown split \")(?P<name>[^\". ]+)" + known_list,
        "config": r"(?:Config name is missing|BuilderConfig '(?P<name>.*?)' not found)"
        + known_list,
    }
    for error in map(str, chain):
        for key, pattern in patterns.items():
            if match := re.search(pattern, error, re.DOTALL):
                problem = f"no {key} {match['name']}" if match["name"] else f"several {key}s"
                known = ", ".join(re.findall(r"'(.*?)'", match["known"]))
                return f"{repo} has {problem}; set {key} of the source to one of {known}"
    return None


def parse_line(
    line: bytes | str, where: str, text_column: str, id_column: str
) -> Document | Skipped:
    """Parse one line of JSON as a document."""
    import orjson

    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Unlike orjson, json accepts lone surrogates
            row = parse_json(line if isinstance(line, str) else line.decode())
        except UnicodeDecodeError:
            return Skipped(NOT_UTF8, where)
        except ValueError:
            return Skipped(NOT_JSON, where)
    if not isinstance(row, dict):
        rows = isinstance(row, list) and row and isinstance(row[0], dict)
        return Skipped(ARRAY if rows else NOT_OBJECT, where)
    if text_column not in row:
        return Skipped(NO_COLUMN, where)
    return to_document(row[text_column], row.get(id_column), where)


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
        return Skipped("no text", where)
    return Document(where if row_id is None else str(row_id), text)


def _code_hash(function: Callable) -> str:
    """Hash of the function's module: a changed selection is another source."""
    return file_hash(Path(inspect.getfile(function)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
