"""Scan training files for benchmark items, and short rows for items that they resemble."""

import json
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.corpus.ingest import open_reader
from data.corpus.local_files import find_files
from data.corpus.quickstart_corpus import quickstart_sources
from data.corpus.readers import FileReader, Skipped
from data.corpus.sources import HUB_SOURCES, Document
from data.decontamination.index import EXCERPT, Hit, Index, Settings, build_index
from data.decontamination.report import to_json
from data.decontamination.test_sets import Item, load_test_sets
from data.decontamination.words import hash_words, ngrams
from files import write_text

PERMUTATIONS = 64  # of MinHash


def decontaminate(
    train: list[str],
    tests: list[str],
    output: Path,
    cache: Path,
    settings: Settings,
    rows: bool = False,
    workers: int = 1,
) -> tuple[Index, dict[str, Any]]:
    """Scan training data for test sets; write the report to `output`; return index and report.

    train: files, folders, sources of a store (STORE:SOURCE), or known names streamed from the hub.
    tests: arguments of load_test_sets. rows: also report similar_rows. workers: processes; each
    scans one file at a time.
    """
    sets = load_test_sets(tests, cache)
    known_names = [name for name in train if name in HUB_SOURCES or name in quickstart_sources()]
    files = [(name, Path(name)) for name in known_names]
    files += _files([where for where in train if where not in known_names])
    index = build_index(sets, settings)
    hits: list[Hit] = []
    seen: Counter[str] = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch, ExitStack() as stack:
        mapped: Callable = map
        if workers > 1:
            index.save(Path(scratch) / "index")
            index.folder = Path(scratch) / "index"
            context = multiprocessing.get_context("spawn")
            mapped = stack.enter_context(ProcessPoolExecutor(min(workers, len(files)), context)).map
        scans = mapped(partial(_scan_file, index), files)
        for file_hits, counts in tqdm(scans, desc="scan", unit="file", total=len(files)):
            hits += file_hits
            seen.update(counts)
        index.folder = None
    scanned = seen.pop("documents")
    if not scanned:
        reasons = (
            ", ".join(f"{count} x {reason}" for reason, count in seen.items()) or "they are empty"
        )
        raise ValueError(
            f"no document could be read from {', '.join(train)} ({reasons}); check these files"
        )
    if rows:
        known = {hit[:3] for hit in hits}
        texts = (
            (d.id, d.text) for file in files for d in _documents(file) if isinstance(d, Document)
        )
        hits += [hit for hit in similar_rows(texts, sets, settings) if hit[:3] not in known]
    report = to_json(index, hits)
    report["settings"].update(train_datasets=train, documents=scanned, skipped=dict(seen))
    write_text(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return index, report


def _files(train: list[str]) -> list[tuple[str, Path]]:
    """Return (name, path) of all training files; equal names are replaced by the paths."""
    files = [(name, path) for text in train for name, path in find_files(_data_path(text)).items()]
    count = Counter(name for name, _ in files)
    return [(name if count[name] == 1 else str(path), path) for name, path in files]


def _documents(file: tuple[str, Path]) -> Iterator[Document | Skipped]:
    """Yield a file's documents with download_data's ids.

    A row without an id gets <name>:<line>.
    """
    name, path = file
    if not path.exists():
        yield from open_reader(name, Path("data/store/nanollama"))[1].read()
        return
    reader = FileReader(str(path))
    reader.files = {name: path}
    reader.settings = reader.settings._replace(alone=False)  # count what cannot be read
    yield from reader.read()


def _scan_file(index: Index, file: tuple[str, Path]) -> tuple[list[Hit], Counter[str]]:
    """Return a file's hits, its number of documents, and its skipped rows by reason."""
    counts: Counter[str] = Counter(documents=0)

    def documents() -> Iterator[tuple[str, str]]:
        for document in _documents(file):
            if isinstance(document, Document):
                counts["documents"] += 1
                yield document.id, document.text
            else:
                counts[document.reason] += 1

    return [hit._replace(source=file[0]) for hit in index.scan(documents())], counts


def _data_path(name: str) -> str:
    """Return the path of training data. STORE:SOURCE means the documents of a source in a store."""
    store, colon, source = name.rpartition(":")
    if not colon or Path(name).exists():
        return name
    folder = Path(store) / "documents" / source
    if not folder.is_dir():
        raise ValueError(
            f"{name}: {folder} does not exist; download the source first or give a path"
        )
    return str(folder)


def similar_rows(
    rows: Iterable[tuple[str, str]], sets: dict[str, list[Item]], settings: Settings
) -> Iterator[Hit]:
    """Yield the hits of short (id, text) rows that resemble an item.

    The words may be rearranged. datasketch's MinHash LSH finds candidates; the score is the Jaccard
    index of the sets of word pairs. Index.scan finds items inside longer rows.
    """
    from datasketch import MinHash, MinHashLSH

    variants = [
        (name, item.id, text)
        for name, items in sets.items()
        for item in items
        for text in dict.fromkeys(item.variants)
    ]
    lsh = MinHashLSH(threshold=settings.similarity, num_perm=PERMUTATIONS)
    blank = MinHash(num_perm=PERMUTATIONS, hashfunc=int)

    def shingles(texts: list[str]) -> Iterator[tuple[NDArray, Any]]:
        words, _, bounds = hash_words(texts)
        for begin, end in pairwise(bounds):
            pairs = np.unique(ngrams(words[begin:end], 2) >> np.uint64(32))
            sketch = blank.copy()
            sketch.update_batch(pairs)
            yield pairs, sketch

    known = {}
    for start in range(0, len(variants), 1000):
        texts = [text for *_, text in variants[start : start + 1000]]
        for i, (pairs, sketch) in enumerate(shingles(texts), start):
            if len(pairs) >= settings.minimum_words - 1:
                known[i] = pairs
                lsh.insert(i, sketch)
    for train_id, text in rows:
        [(pairs, sketch)] = shingles([text])
        best: dict[tuple[str, str], float] = {}
        for i in lsh.query(sketch):
            common = len(np.intersect1d(pairs, known[i], assume_unique=True))
            score = common / (len(pairs) + len(known[i]) - common)
            item = variants[i][:2]
            best[item] = max(score, best.get(item, 0.0))
        for (name, test_id), score in sorted(best.items()):
            if score >= settings.similarity:
                yield Hit(
                    train_id,
                    name,
                    test_id,
                    round(score, 4),
                    (0, len(text)),
                    "minhash",
                    text[:EXCERPT],
                )
