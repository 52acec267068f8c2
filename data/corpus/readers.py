"""Readers of documents from local files, hub data sets and the quickstart corpus.

A reader yields Document or Skipped. `position` (JSON) is the state after the last yielded row, from
which another process can resume. `inputs` (JSON) determine the documents.
"""

import inspect
import re
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

from data.corpus.documents import (
    FileDocuments,
    FileSettings,
    Skipped,
    conversation_hint,
    first_line,
    parse_line,
    row_document,
    to_document,
)
from data.corpus.local_files import list_files
from data.corpus.sources import Document, HubSource
from data.corpus.tables import choose_column, row_columns
from data.manifest import file_hash

HUB_PACKAGES = ("huggingface_hub", "datasets", "httpx", "httpx2", "aiohttp", "pyarrow")
REVISION = "after @ in its address, or with --revision of scripts.download_data"
# Disk bytes per byte of text, an upper estimate: 0.25 to 0.42 in the quickstart corpus
PARQUET_SHARE = 0.6


class Reader(Protocol):
    """Reads one source's documents; resumable."""

    inputs: dict[str, Any]
    position: dict[str, Any]
    licence: str
    origin: str
    bytes_per_token: float
    notes: dict[str, str]  # chosen text column -> where it was chosen first

    def disk_bytes(self) -> int | None:
        """Return an upper estimate of the source's bytes as zstd parquet; None if unknown."""
        ...

    def read(self) -> Generator[Document | Skipped, None, None]:
        """Read from `position` on. ValueError if the source is unavailable; it says what to do."""
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
        self.notes: dict[str, str] = {}

    def disk_bytes(self) -> int | None:
        return None

    def read(self) -> Generator[Document, None, None]:
        before = self.position["documents"]
        for count, document in enumerate(self.documents()):
            if count >= before:
                self.position = {"documents": count + 1}
                yield document


class FileReader:
    """Reads local files of the types in local_files.SUFFIXES. Skips and reports unreadable rows.

    A missing column is a ValueError. excluded: folders to ignore, such as the store's output.
    split: of a folder written by save_to_disk. document_chars: cut text files, see text_pieces.
    Files with equal name, size and modification time count as unchanged. A .gz file has its
    checksum at the end: damaged rows may be read before the damage is reported.
    """

    bytes_per_token = 4.0
    licence = "not stated"

    def __init__(
        self,
        where: str,
        text_column: str | None = None,
        id_column: str = "id",
        excluded: Collection[Path] = (),
        split: str | None = None,
        document_chars: int | None = None,
    ):
        self.files, self.left_out = list_files(where, excluded, split)
        self.settings = FileSettings(text_column, id_column, document_chars, len(self.files) == 1)
        self.origin = where
        stats = {name: path.stat() for name, path in self.files.items()}
        self.sizes = {name: stat.st_size for name, stat in stats.items()}
        self.inputs: dict[str, Any] = {
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "text_column": text_column,
            "id_column": id_column,
        }
        if document_chars:
            self.inputs["document_chars"] = document_chars
        self.position = {"file": 0, "row": 0}
        self.notes: dict[str, str] = {}

    def disk_bytes(self) -> int | None:
        """Return the estimate; .gz, .zst and .parquet files are already compressed."""
        packed = (".gz", ".zst", ".parquet")
        return int(
            sum(
                size * (1.2 if name.lower().endswith(packed) else PARQUET_SHARE)
                for name, size in self.sizes.items()
            )
        )

    def read(self) -> Generator[Document | Skipped, None, None]:
        names = list(self.files)
        if self.position == {"file": 0, "row": 0}:
            yield from (Skipped(reason, name) for name, reason in self.left_out.items())
        while self.position["file"] < len(names):
            number = self.position["file"]
            name = names[number]
            file = FileDocuments(name, self.files[name], self.settings, self.notes.setdefault)
            for row, document in file.read(self.position["row"]):
                self.position = {"file": number, "row": row}
                yield document
            self.position = {"file": number + 1, "row": 0}


class HubReader:
    """Streams one hub source with `datasets`; caches nothing.

    Reads files by pattern, and only the used columns of parquet files. Without a pattern, it reads
    the source's config and split. recorded: inputs of an earlier run on the same store; its commit
    is reused for the same requested revision. Resuming within a file reads that file from its
    start.
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
        if not source.files:
            self.inputs |= {"config": source.config, "split": source.split}
            # Another config or split is another source.
            self.origin = f"{source.repo}:{source.config or 'default'}:{source.split}@{commit}"
        self.rows = 0
        self.notes: dict[str, str] = {}
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
        return int(sum(self._list_files().values()) * 1.2) if self.source.files else None

    def read(self) -> Generator[Document | Skipped, None, None]:
        source = self.source
        name = source.repo.rsplit("/", 1)[-1] if self._is_local() else source.repo
        id_column, column = source.id_column or "", source.text_column
        for row in self._stream():
            self.rows += 1
            where = f"{name}/{self.rows}"
            if not source.files:
                column = column or self._choose_column(row, id_column)
                document = row_document(row, where, column, id_column)
            elif self._is_parquet():
                document = to_document(row[column], row.get(id_column), where)
            elif not row["text"].strip():
                continue
            else:
                document = parse_line(row["text"], where, column, id_column)
            if isinstance(document, Document) and source.keep and not source.keep(document.text):
                document = Skipped("not in the selection", "")
            yield document

    def _choose_column(self, row: dict[str, Any], id_column: str) -> str:
        column = choose_column(row_columns(row), id_column)
        if column is None:
            raise ValueError(
                f"{self.origin} has no column text, only {', '.join(row)}; give --text_column"
                f"{conversation_hint(row)}"
            )
        if column != "text":
            self.notes[column] = self.origin
        return column

    def _stream(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all files: the used columns of parquet, or lines as "text"."""
        try:
            from datasets import load_dataset

            self.data = load_dataset(**self._load_options(), streaming=True)
            if self.state:
                self.data.load_state_dict(self.state)
            yield from self.data
        except Exception as error:
            raise self._explained(error) from error

    def _load_options(self) -> dict[str, Any]:
        """Return the arguments of load_dataset."""
        source = self.source
        if not source.files:
            commit = None if self._is_local() else self.inputs["revision"]
            names = {"path": source.repo, "name": source.config, "split": source.split}
            return {**names, "revision": commit}
        options: dict[str, Any] = {"data_files": list(self._list_files()), "split": "train"}
        if self._is_parquet():
            columns = [source.text_column, *({source.id_column} - {None})]
            return {"path": "parquet", "columns": columns, **options}
        return {"path": "text", "encoding_errors": "replace", **options}

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
                    f"{self.origin} has no files {self.source.files}; correct the pattern, or "
                    f"give another commit {REVISION}"
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
        """Return a ValueError that says what to do for a hub error; other errors unchanged.

        `datasets` raises ValueError for an unknown config or split.
        """
        choice = isinstance(error, ValueError) and not self.source.files
        if not (
            choice
            or isinstance(error, OSError)
            or type(error).__module__.split(".")[0] in HUB_PACKAGES
        ):
            return error
        complaint = hub_complaint(error, self.source.repo, self.source.gated)
        for setting, wanted in (
            ("config", f"read hf://{self.source.repo}:CONFIG with"),
            ("split", "give --split with"),
        ):
            complaint = complaint.replace(f"set {setting} of the source to", wanted)
        return ValueError(complaint)


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
        return f"{repo} has no such revision; give another {REVISION}"
    if any_is(RepositoryNotFoundError):
        return (
            f"the hub has no public data set {repo}; check its name, or run `hf auth login` if it "
            "is private"
        )
    if any_is(RemoteEntryNotFoundError):
        return f"{repo} lacks a file ({first_line(error)}); check its name, configuration and split"
    if choice := _choice(chain, repo):
        return choice
    if any_is(OfflineModeIsEnabled):
        return f"{repo} is on the hub but HF_HUB_OFFLINE is set; unset it and {again}"
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"downloading {repo} from the hub failed ({reason}); when the hub is available, {again}"


def _choice(chain: list[BaseException], repo: str) -> str | None:
    """Return which split or config to set if the error is an unknown split or config; else None."""
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


def _code_hash(function: Callable) -> str:
    """Hash the function's module, because a changed selection makes a different source."""
    return file_hash(Path(inspect.getfile(function)))
