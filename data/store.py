"""Open a data store for training: its tokenizer and token shards, checked against the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import manifest
from data.corpus.sources import sources_of
from data.manifest import file_hash
from data.packing import LongDocuments, Source
from data.shards import ShardWriter, TokenShards
from data.tokenizers.bpe import config_ids, load_tokenizer, token_bytes, vocabulary_size

DUMMY = "dummy"  # source of a store without text; also its tokenizer hash


class StoreTokenizer(NamedTuple):
    """A store's tokenizer as training uses it. folder is None for dummy data."""

    folder: Path | None
    special: dict[str, Any]  # ids of bos, eos and pad for config.json
    token_bytes: np.ndarray  # int64 [vocab], text bytes per token


def open_tokenizer(store: str | Path, vocab_size: int, padded: bool = False) -> StoreTokenizer:
    """Return the tokenizer of a store; ValueError if the model's vocabulary size differs.

    padded: the model may have more rows than the tokenizer has tokens, like published models.
    """
    folder = Path(store) / "tokenizer"
    if not folder.is_dir() and (Path(store) / "tokens" / DUMMY).is_dir():
        return StoreTokenizer(
            None, {}, np.ones(vocab_size, dtype=np.int64)
        )  # every token counts as a byte
    if not folder.is_dir():
        raise ValueError(
            f"no data store found at {store}; create one with python -m scripts.download_data, "
            "train_tokenizer and prepare_data"
        )
    tokenizer = load_tokenizer(folder)
    size = vocabulary_size(tokenizer)
    if padded and size > vocab_size:
        raise ValueError(
            f"the tokenizer of {store} has {size} tokens but the model has {vocab_size}; tokenize "
            "the text with the model's own tokenizer (tokenizer.folder in the recipe)"
        )
    if size != vocab_size and not padded:
        is_copy = "folder" in ((manifest.read(folder) or {}).get("inputs") or {})
        hint = ", or continue the model of that tokenizer with --init_from FOLDER" * is_copy
        raise ValueError(
            f"the tokenizer of {store} has {size} tokens but "
            f"model.vocab_size={vocab_size}; make them equal{hint}"
        )
    lengths = token_bytes(tokenizer, vocab_size)
    return StoreTokenizer(folder, config_ids(folder, tokenizer), lengths)


def open_shards(
    store: str | Path,
    mix: dict[str, float],
    split: str,
    vocab_size: int,
    min_document_tokens: Mapping[str, int] | None = None,
    section: str = "data.mix",
) -> dict[str, Source]:
    """Open one split of every source in a mixture.

    ValueError if a source is missing or was made with another tokenizer. min_document_tokens:
    source -> minimum length of the documents that are read, in tokens. section: the setting of the
    mixture, for messages.
    """
    present = sorted(
        path.name
        for path in (Path(store) / "tokens").glob("*")
        if path.is_dir() and path.suffix != ".tmp"
    )
    if not mix:
        raise ValueError(
            f"{section} is empty; list at least one source of {store}: "
            f"{', '.join(present) or 'it has none'}"
        )
    tokenizer = Path(store) / "tokenizer" / "tokenizer.json"
    expected = file_hash(tokenizer) if tokenizer.is_file() else DUMMY
    shards: dict[str, Source] = {}
    for name in mix:
        if name not in present:
            members = ", ".join(sources_of(name))
            hint = f"; use {members} for {name}" if members != name else ""
            raise ValueError(
                f"{section}.{name}: {store} has no such source; "
                f"available: {', '.join(present) or 'none'}{hint}"
            )
        source = TokenShards(Path(store) / "tokens" / name, split)
        if source.tokenizer != expected or source.vocab_size > vocab_size:
            raise ValueError(
                f"the shards of {name} do not match the store's tokenizer or "
                f"model.vocab_size={vocab_size}; run python -m scripts.prepare_data again"
            )
        if split == "train" and not len(source):
            raise ValueError(
                f"source {name} has no training documents; lower val_fraction in the recipe or "
                f"see {Path(store) / 'report.json'} for removed documents, then run python -m "
                "scripts.prepare_data again"
            )
        minimum = (min_document_tokens or {}).get(name)
        shards[name] = source if minimum is None else LongDocuments(source, minimum)
    return shards


def write_dummy_store(store: Path, vocab_size: int, tokens: int, seed: int) -> None:
    """Write a store with one source, "dummy".

    Each token has a fixed successor; 10 % of the tokens are random instead. A working model learns
    it: the loss falls from ln(vocab_size) to about 0.7 nats.
    """
    rng = np.random.default_rng(seed)
    states = min(64, vocab_size - 1)
    successors = 1 + rng.permutation(states)  # of token 1 + i; 0 is bos
    with ShardWriter(store / "tokens" / DUMMY, vocab_size, DUMMY, inputs={}) as shards:
        written = 0
        while written < tokens:
            length = int(rng.integers(32, 512))
            surprises = np.where(rng.random(length) < 0.1, rng.integers(1, states + 1, length), 0)
            walk = [int(rng.integers(1, states + 1))]
            for surprise in surprises:
                walk.append(int(surprise or successors[walk[-1] - 1]))
            shards.add("val" if written < tokens // 10 else "train", [0, *walk])
            written += len(walk) + 1
