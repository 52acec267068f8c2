"""Write a store's tokens as .bin shards of the speedrun, with the store's tokenizer beside them.

python -m scripts.write_bin --store data/store/quickstart --output_dir data/quickstart_bin
python -m scripts.write_bin --store data/store/quickstart --output_dir data/quickstart_bin \\
    --mix wikipedia=0.5 factbook=0.25 code=0.25 --max_document 256

Shuffles the documents of all sources together; each occurs once. --mix selects sources and sets
their shares of the training tokens: larger sources are reduced until the scarcest source has its
share. --max_document cuts longer training documents into pieces and shuffles the pieces, because a
long document could fill a small batch. The validation split has all held-out documents of the
selected sources, uncut. The result depends only on the store and the flags. Existing shards of the
same name are replaced.
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import CommandParser, int_at_least, user_errors
from data.bin_shards import SHARD_TOKENS, BinWriter
from data.packing import document_table
from data.shards import TokenShards
from data.store import open_shards
from data.tokenizers.bpe import document_tokens, load_tokenizer, vocabulary_size


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="data store with tokens/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--mix",
        nargs="+",
        type=_share,
        metavar="SOURCE=SHARE",
        help="share of each source in training; default: every source, all of its documents",
    )
    parser.add_argument(
        "--max_document",
        type=int_at_least(2),
        help="cut training documents into pieces of this many tokens, with bos; default: uncut",
    )
    parser.add_argument("--name", help="prefix of the files; default: the store's name")
    parser.add_argument("--shard_tokens", type=int_at_least(1), default=SHARD_TOKENS)
    parser.add_argument(
        "--seed", type=int_at_least(0), default=0, help="seed of the document order"
    )
    args = parser.parse_args()
    with user_errors():
        counts = write_bin_store(
            args.store,
            args.output_dir,
            args.name or args.store.resolve().name,
            dict(args.mix) if args.mix else None,
            args.shard_tokens,
            args.seed,
            args.max_document,
        )
        for split, (tokens, pieces) in counts.items():
            unit = "pieces of documents" if args.max_document and split == "train" else "documents"
            print(f"{split:>5} {tokens:>14,} tokens in {pieces:,} {unit}")
        vocab_size, bos = _vocabulary(args.store)
        print(f"wrote {args.output_dir}; vocabulary of {vocab_size:,} tokens, bos id {bos}")


def write_bin_store(
    store: Path,
    output: Path,
    name: str,
    mix: dict[str, float] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
    max_document: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Write <output>/<name>_{train,val}_NNNNNN.bin and tokenizer/.

    Returns split -> (tokens, pieces). A piece is a document, or part of a document if max_document
    is set. ValueError if the vocabulary exceeds uint16, a source is missing or a split has no
    document.
    """
    vocab_size, bos = _vocabulary(store)
    if vocab_size > 1 << 16:
        raise ValueError(
            f"the tokenizer of {store} has {vocab_size:,} tokens; .bin shards hold ids up to "
            "65,535; train a smaller tokenizer"
        )
    folders = sorted(path for path in (store / "tokens").glob("*") if path.is_dir())
    present = {folder.name: 1.0 for folder in folders if folder.suffix != ".tmp"}
    counts = {}
    for split, first in (("val", 0), ("train", 1)):
        shards = open_shards(store, mix or present, split, vocab_size)
        sources = {key: source for key, source in shards.items() if isinstance(source, TokenShards)}
        train = split == "train"
        pieces = _shuffled_pieces(
            sources,
            mix if train else None,
            max_document if train else None,
            np.random.default_rng(seed),
        )
        if not pieces:
            raise ValueError(
                f"the {split} split of {store} has no documents; add text or change --mix"
            )
        writer = BinWriter(
            lambda number: output / f"{name}_{split}_{number:06d}.bin", shard_tokens, first
        )
        for piece in pieces:
            text, _ = sources[piece.source].read(piece.start, piece.stop)
            writer.add(np.concatenate([[bos], text]) if piece.needs_bos else text)
        writer.close()
        for path in sorted(output.glob(f"{name}_{split}_*.bin")):
            if path >= writer.path_of(writer.shard):  # left by an earlier call
                path.unlink()
        tokens = sum(piece.stop - piece.start + piece.needs_bos for piece in pieces)
        counts[split] = (tokens, len(pieces))
    shutil.copytree(store / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    return counts


class Piece(NamedTuple):
    """A document, or part of a document, in the stream of a source's split."""

    source: str
    start: int  # position of its first token
    stop: int
    needs_bos: bool  # True if it begins within a document


def _shuffled_pieces(
    sources: dict[str, TokenShards],
    mix: dict[str, float] | None,
    max_document: int | None,
    rng: np.random.Generator,
) -> list[Piece]:
    """Select documents, cut those longer than max_document, and shuffle the pieces."""
    # Tokens of the mixture at which the scarcest source is exhausted.
    total = min(len(source) / mix[name] for name, source in sources.items()) if mix else np.inf
    pieces = []
    for name, source in sources.items():
        starts, lengths = document_table(source)
        order = rng.permutation(len(starts))
        if mix:
            used = np.cumsum(lengths[order]) <= total * mix[name] + 0.5
            order = order[used]
        for start, length in zip(starts[order].tolist(), lengths[order].tolist(), strict=True):
            end = start + length
            size = max_document or length
            pieces.append(Piece(name, start, min(start + size, end), False))
            for first in range(start + size, end, max(1, size - 1)):  # one token is the bos
                pieces.append(Piece(name, first, min(first + size - 1, end), True))
    return [pieces[i] for i in rng.permutation(len(pieces))]


def _vocabulary(store: Path) -> tuple[int, int]:
    """Return vocabulary size and bos id of a store's tokenizer."""
    tokenizer = load_tokenizer(store / "tokenizer")
    return vocabulary_size(tokenizer), document_tokens(store / "tokenizer", tokenizer).first


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be SOURCE=SHARE with a share above 0")
    return name, value


if __name__ == "__main__":
    main()
