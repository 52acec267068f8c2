"""Reading documents from a place that can be written down: local files, files of the hub, the packaged corpus.

A reader yields Document or Skipped. Its `position` (JSON) always says where to go on after what it yielded last, so that
reading can be taken up by another process; `inputs` (JSON) is all that the documents depend on.
"""

import glob
import inspect
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.manifest import file_hash
from data.sources import Document, HubSource

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
BLOCK = 1 << 16  # bytes read from a compressed file at once
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
        self, documents: Callable[[], Iterator[Document]], inputs: dict, licence: str, origin: str, bytes_per_token: float
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


def find_files(where: str) -> dict[str, Path]:
    """Data files of a path, a folder (with all below it) or a glob, sorted; their names below it. ValueError for none."""
    root = Path(where)
    if root.is_dir():
        found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.name.endswith(SUFFIXES)}
    else:
        paths = [Path(path) for path in sorted(glob.glob(where, recursive=True)) if path.endswith(SUFFIXES)]
        above = Path(os.path.commonpath([path.parent for path in paths])) if paths else root
        found = {path.relative_to(above).as_posix(): path for path in paths}
    if not found:
        raise ValueError(f"there is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file at {where}; check the path")
    return found


class FileReader:
    """Local parquet and JSON-lines files. What cannot be read in them is skipped and named; a missing column is refused.

    Files count as unchanged while name, size and time of change are. The checksum of a .gz stands at its end: what is garbled
    within it may be read before the file is named as damaged.
    """

    bytes_per_token = 4.0
    licence = "not stated"

    def __init__(self, where: str, text_column: str = "text", id_column: str = "id"):
        self.files = find_files(where)
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
        return int(sum(size * (PARQUET_SHARE if name.endswith(".jsonl") else 1.2) for name, size in self.sizes.items()))

    def read(self) -> Generator[Document | Skipped, None, None]:
        names = list(self.files)
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
                    yield self._at(number, parse_line(line, f"{name}:{number}", self.text_column, self.id_column))
        except (EOFError, OSError, zlib.error, zstd_error()) as error:
            yield self._at(number, Skipped("rest of the file cut off or damaged", f"{name}:{number + 1} ({_first_line(error)})"))

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
                raise ValueError(f"{path} has no column {self.text_column}, only {', '.join(columns)}; give --text_column")
            wanted = [self.text_column, *({self.id_column} & set(columns))]
            end = 0
            for group in range(file.num_row_groups):
                start, end = end, end + file.metadata.row_group(group).num_rows
                if end <= before:
                    continue
                number = start
                try:
                    for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=wanted):
                        for row in batch.to_pylist():
                            number += 1
                            if number > before:
                                text, own = row[self.text_column], row.get(self.id_column)
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

    def __init__(self, source: HubSource, revision: str | None = None, recorded: dict | None = None):
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
        return {"row": self.rows, "state": self.data.state_dict() if self.data is not None else self.state}

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        self.rows, self.state = position["row"], position["state"]

    def disk_bytes(self) -> int | None:
        return int(sum(self._list_files().values()) * 1.2)

    def read(self) -> Generator[Document | Skipped, None, None]:
        source, name = self.source, self.source.repo.rsplit("/", 1)[-1] if self._is_local() else self.source.repo
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
        how: dict[str, Any] = {"columns": columns} if self._is_parquet() else {"encoding_errors": "replace"}
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
                    self.files = {f"hf://{path}": entry["size"] for path, entry in sorted(entries.items())}
                except Exception as error:
                    raise self._explained(error) from error
            if not self.files:
                raise ValueError(f"{self.origin} has no files {self.source.files}; give another commit with --revision")
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
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in HUB_PACKAGES:
            return error
        return ValueError(hub_complaint(error, self.source.repo, self.source.gated))


def hub_complaint(error: Exception, repo: str, gated: bool = False) -> str:
    """One sentence on why the hub did not give what was asked for, and what to do."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    chain: list[BaseException] = [error]  # the hub's file system wraps what the hub said
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def any_is(kind: type[Exception]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    again = "run the same command again: it goes on where it stopped"
    refused = any(getattr(getattr(link, "response", None), "status_code", None) in (401, 403) for link in chain)
    if any_is(GatedRepoError) or (gated and refused):
        return f"{repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, run `hf auth login`, then {again}"
    if any_is(RevisionNotFoundError):
        return f"{repo} has no such revision; give another with --revision"
    if any_is(OfflineModeIsEnabled):
        return f"{repo} lies on the hub and HF_HUB_OFFLINE is set; unset it and {again}"
    return f"the hub did not give {repo} ({type(error).__name__}: {_first_line(error)}); when it does, {again}"


def parse_line(line: bytes | str, where: str, text_column: str, id_column: str) -> Document | Skipped:
    """The document on one line of JSON."""
    import orjson

    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)  # takes lone surrogates
        except (ValueError, RecursionError):
            return Skipped("not JSON", where)
    if not isinstance(row, dict):
        return Skipped("not a JSON object", where)
    return to_document(row.get(text_column), row.get(id_column), where)


def to_document(text: object, own: object, where: str) -> Document | Skipped:
    """The document of one row; its id is its own, else where it stands."""
    if not isinstance(text, str) or not text.strip():
        return Skipped("no text", where)
    return Document(where if own is None else str(own), text)


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file without their ends. A last line without an end is one too, unless the file is cut off."""
    begun = b""
    for block in _blocks(path):
        first, *rest = block.split(b"\n")
        begun += first
        for line in rest:
            yield begun
            begun = line
    if begun:
        yield begun


def _blocks(path: Path) -> Iterator[bytes]:
    """Content of a plain, .gz or .zst file. EOFError where a compressed one ends too early."""
    with open(path, "rb") as file:
        if path.suffix == ".jsonl":
            while block := file.read(BLOCK * 16):
                yield block
            return
        decoder = _decoder(path.suffix)
        while block := file.read(BLOCK):
            while block:
                if decoder.eof:
                    decoder = _decoder(path.suffix)  # files may hold several streams
                yield decoder.decompress(block)
                block = decoder.unused_data
        if not decoder.eof:
            raise EOFError("the compressed file ends too early")


def _decoder(suffix: str):
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _code_hash(function: Callable) -> str:
    """Hash of the module of a selection, so that another selection gives another source."""
    return file_hash(Path(inspect.getfile(function)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
