"""Reading documents from a place that can be written down: local files, files of the hub, the packaged corpus.

A reader yields Document or Skipped. Its `position` (JSON) always says where to go on after what it yielded last, so that
reading can be taken up by another process; `inputs` (JSON) is all that the documents depend on.
"""

import inspect
import json
import re
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.corpus.local_files import SUFFIXES, list_files, read_lines, rows_at_once, zstd_error
from data.corpus.sources import Document, HubSource
from data.manifest import file_hash

NOT_JSON, NOT_UTF8, NOT_OBJECT = "not JSON", "not UTF-8 text", "not a JSON object"
ARRAY, NO_COLUMN = "a JSON array; one object a line is read", "no column with text"
UNREADABLE = (
    NOT_JSON,
    NOT_UTF8,
    NOT_OBJECT,
    ARRAY,
    NO_COLUMN,
)  # rows that count against ingest's max_bad
NOT_READ = f"another file than {', '.join(SUFFIXES)}"
HUB_PACKAGES = ("huggingface_hub", "datasets", "httpx", "httpx2", "aiohttp", "pyarrow")
PARQUET_SHARE = 0.6  # bytes on the disk for a byte of text, an upper estimate: 0.25 to 0.42 in the quickstart corpus


class Skipped(NamedTuple):
    reason: str
    where: str  # file:line, or "" where naming them would say nothing


class Reader(Protocol):
    inputs: dict[str, Any]
    position: dict[str, Any]
    licence: str
    origin: str
    bytes_per_token: float

    def disk_bytes(self) -> int | None:
        """What all of it will take on the disk at most, as zstd parquet; None where that is not known."""
        ...

    def read(self) -> Generator[Document | Skipped, None, None]:
        """Go on from `position`. ValueError, with what to do, where the source cannot be had."""
        ...


class CorpusReader:
    """Documents of a function that always gives the same ones."""

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
    """Local parquet and JSON-lines files. What cannot be read in them is skipped and named; a missing column is refused.

    excluded: folders that are not read, such as the output of the store itself.

    Files count as unchanged while name, size and time of change are. The checksum of a .gz stands at its end: what is garbled
    within it may be read before the file is named as damaged.
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
            read = self._parquet if name.endswith(".parquet") else self._lines
            yield from read(name, self.files[name], self.position["row"])
            self.position = {"file": self.position["file"] + 1, "row": 0}

    def _lines(self, name: str, path: Path, before: int) -> Iterator[Document | Skipped]:
        number = 0
        try:
            for line in read_lines(path):
                number += 1
                if number > before and line.strip():
                    yield self._at(
                        number,
                        parse_line(line, f"{name}:{number}", self.text_column, self.id_column),
                    )
        except (EOFError, OSError, zlib.error, zstd_error()) as error:
            yield self._at(
                number,
                Skipped(
                    "rest of the file cut off or damaged",
                    f"{name}:{number + 1} ({_first_line(error)})",
                ),
            )

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
                    f"{path} has no column {self.text_column}, only {', '.join(columns)}; give --text_column"
                )
            kind = file.schema_arrow.field(self.text_column).type
            if not _is_text(kind):
                raise ValueError(
                    f"column {self.text_column} of {path} holds {kind}, not text; give --text_column"
                )
            wanted = [self.text_column, *({self.id_column} & set(columns))]
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if end <= before:
                    continue
                number = start
                try:
                    size = rows_at_once(file, group)
                    for batch in file.iter_batches(
                        batch_size=size, row_groups=[group], columns=wanted
                    ):
                        columns = [batch.column(column) for column in wanted]
                        for i in range(batch.num_rows):  # one text in memory at a time
                            number += 1
                            if number > before:
                                text, own = (
                                    columns[0][i].as_py(),
                                    columns[-1][i].as_py() if len(columns) > 1 else None,
                                )
                                yield self._at(number, to_document(text, own, f"{name}:{number}"))
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    where = f"{name}:{number + 1}-{end} ({_first_line(error)})"
                    yield self._at(end, Skipped("unreadable rows", where))

    def _at(self, row: int, yielded: Document | Skipped) -> Document | Skipped:
        self.position = {"file": self.position["file"], "row": row}
        return yielded


class HubReader:
    """Files of one hub source, streamed by `datasets`; nothing but the wanted columns is fetched, nothing is cached.

    recorded: inputs of an earlier run on the same store, whose commit is kept where it was asked for under the same name.
    To go on in the middle of a file, that file is read again from its start.
    """

    def __init__(
        self, source: HubSource, revision: str | None = None, recorded: dict | None = None
    ):
        self.source, asked = source, revision or source.revision
        self.licence, self.bytes_per_token = source.licence, source.bytes_per_token
        self.inputs: dict[str, Any] = {"repo": source.repo, "asked": asked}
        if recorded and {**recorded, **self.inputs} == recorded:
            commit = recorded["revision"]
        else:
            commit = asked if re.fullmatch(r"[0-9a-f]{40}", asked) else self._commit_of(asked)
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
        source, name = (
            self.source,
            self.source.repo.rsplit("/", 1)[-1] if self._is_local() else self.source.repo,
        )
        own = source.id_column or ""
        for row in self._stream():
            self.rows += 1
            where = f"{name}/{self.rows}"
            if self._is_parquet():
                document = to_document(row[source.text_column], row.get(own), where)
            elif not row["text"].strip():
                continue
            else:
                document = parse_line(row["text"], where, source.text_column, own)
            if isinstance(document, Document) and source.keep and not source.keep(document.text):
                document = Skipped("not in the selection", "")
            yield document

    def _stream(self) -> Iterator[dict[str, Any]]:
        """Rows of all files: the wanted columns of parquet, or lines as "text"."""
        files = list(self._list_files())
        columns = [self.source.text_column, *({self.source.id_column} - {None})]
        how: dict[str, Any] = (
            {"columns": columns} if self._is_parquet() else {"encoding_errors": "replace"}
        )
        try:
            from datasets import load_dataset

            kind = "parquet" if self._is_parquet() else "text"
            self.data = load_dataset(kind, data_files=files, split="train", streaming=True, **how)
            if self.state:
                self.data.load_state_dict(self.state)
            yield from self.data
        except Exception as error:
            raise self._explained(error) from error

    def _list_files(self) -> dict[str, int]:
        """Files of the source in order, as `datasets` takes them, with their sizes in bytes."""
        if self.files is None:
            if self._is_local():
                found = sorted(Path(self.source.repo).glob(self.source.files))
                self.files = {str(path): path.stat().st_size for path in found}
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
                    f"{self.origin} has no files {self.source.files}; give another commit with --revision"
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
        """What the user can do about an error of the hub, as ValueError; an error of ours is returned as it is."""
        if (
            not isinstance(error, OSError)
            and type(error).__module__.split(".")[0] not in HUB_PACKAGES
        ):
            return error
        return ValueError(hub_complaint(error, self.source.repo, self.source.gated))


def hub_complaint(error: Exception, repo: str, gated: bool = False) -> str:
    """One sentence on why the hub did not give what was asked for, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = [error]  # the hub's file system wraps what the hub said
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def any_is(kind: type[Exception]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    again = "run the same command again: it goes on where it stopped"
    refused = any(
        getattr(getattr(link, "response", None), "status_code", None) in (401, 403)
        for link in chain
    )
    if any_is(GatedRepoError) or (gated and refused):
        return f"{repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, run `hf auth login`, then {again}"
    if any_is(RevisionNotFoundError):
        return f"{repo} has no such revision; give another with --revision"
    if any_is(RepositoryNotFoundError):
        return f"the hub has no public data set {repo}; check its name, or run `hf auth login` if it is private"
    if any_is(RemoteEntryNotFoundError):
        return (
            f"{repo} lacks a file ({_first_line(error)}); check its name, configuration and split"
        )
    if choice := _choice(chain, repo):
        return choice
    if any_is(OfflineModeIsEnabled):
        return f"{repo} lies on the hub and HF_HUB_OFFLINE is set; unset it and {again}"
    return f"the hub did not give {repo} ({type(error).__name__}: {_first_line(error)}); when it does, {again}"


def _is_text(kind: Any) -> bool:
    """Whether an arrow type holds text, or bytes that may be text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    named = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "null",
    )
    return str(kind) in named or pa.types.is_fixed_size_binary(kind)


def _choice(chain: list[BaseException], repo: str) -> str | None:
    """What to set where the split or the config of a data set is not one that it has."""
    kinds = {
        "split": r"(?:Bad split: |Unknown split \")(?P<asked>[^\". ]+).*?(?P<known>\[.*?\])",
        "config": r"(?:Config name is missing|BuilderConfig '(?P<asked>.*?)' not found).*?(?P<known>\[.*?\])",
    }
    for error in map(str, chain):
        for key, pattern in kinds.items():
            if found := re.search(pattern, error, re.DOTALL):
                asked = f"no {key} {found['asked']}" if found["asked"] else f"several {key}s"
                known = ", ".join(re.findall(r"'(.*?)'", found["known"]))
                return f"{repo} has {asked}; set {key} of the source to one of {known}"
    return None


def parse_line(
    line: bytes | str, where: str, text_column: str, id_column: str
) -> Document | Skipped:
    """The document on one line of JSON."""
    import orjson

    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(
                line if isinstance(line, str) else line.decode()
            )  # takes lone surrogates
        except UnicodeDecodeError:
            return Skipped(NOT_UTF8, where)
        except (ValueError, RecursionError):
            return Skipped(NOT_JSON, where)
    if not isinstance(row, dict):
        rows = isinstance(row, list) and row and isinstance(row[0], dict)
        return Skipped(ARRAY if rows else NOT_OBJECT, where)
    if text_column not in row:
        return Skipped(NO_COLUMN, where)
    return to_document(row[text_column], row.get(id_column), where)


def to_document(text: object, own: object, where: str) -> Document | Skipped:
    """The document of one row; without an id of its own it is named by its place. Bytes are read as UTF-8."""
    try:
        text, own = (part.decode() if isinstance(part, bytes) else part for part in (text, own))
    except UnicodeDecodeError:
        return Skipped(NOT_UTF8, where)
    if not isinstance(text, str | None):
        return Skipped(NO_COLUMN, where)
    if not text or not text.strip():
        return Skipped("no text", where)
    return Document(where if own is None else str(own), text)


def _code_hash(function: Callable) -> str:
    """Hash of the module of a selection, so that another selection gives another source."""
    return file_hash(Path(inspect.getfile(function)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
