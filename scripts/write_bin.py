"""Write a store's tokens as .bin shards of the speedrun, with the store's tokenizer beside them.

python -m scripts.write_bin --store data/store/quickstart --output data/quickstart_bin
python -m scripts.write_bin --store data/store/quickstart --output data/quickstart_bin \\
    --mix wikipedia=0.6 code=0.4

Shuffles the documents of all sources together; each occurs once, uncut. --mix sets the share of
each source in the tokens: larger sources are reduced until the scarcest one has its share. The
result is a function of the store and the flags alone. Existing shards of the same name are
replaced.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from cli import CommandParser, int_at_least, user_errors
from data.bin_shards import SHARD_TOKENS, BinWriter
from data.packing import document_table
from data.shards import TokenShards
from data.store import open_shards
from data.tokenizers.bpe import load_tokenizer, special_ids, vocabulary_size


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="data store with tokens/")
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--mix",
        nargs="+",
        type=_share,
        metavar="SOURCE=SHARE",
        help="share of each source in the tokens; default: every source, all of its documents",
    )
    parser.add_argument("--name", help="prefix of the files; default: the store's name")
    parser.add_argument("--shard_tokens", type=int_at_least(1), default=SHARD_TOKENS)
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="of the order of documents")
    args = parser.parse_args()
    with user_errors():
        counts = write_bin_store(
            args.store,
            args.output,
            args.name or args.store.resolve().name,
            dict(args.mix) if args.mix else None,
            args.shard_tokens,
            args.seed,
        )
        for split, (tokens, documents) in counts.items():
            print(f"{split:>5} {tokens:>14,} tokens in {documents:,} documents")
        vocab_size, bos = _vocabulary(args.store)
        print(f"wrote {args.output}; vocabulary of {vocab_size:,} tokens, bos id {bos}")


def write_bin_store(
    store: Path,
    output: Path,
    name: str,
    mix: dict[str, float] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
) -> dict[str, tuple[int, int]]:
    """Write <output>/<name>_{train,val}_NNNNNN.bin and tokenizer/; tokens and documents by split.

    ValueError if the vocabulary exceeds uint16, a source is missing or a split has no document.
    """
    vocab_size, _ = _vocabulary(store)
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
        order = _shuffled_documents(sources, mix, np.random.default_rng(seed))
        if not order:
            raise ValueError(
                f"the {split} split of {store} has no documents; add text or change --mix"
            )
        writer = BinWriter(
            lambda number: output / f"{name}_{split}_{number:06d}.bin", shard_tokens, first
        )
        for source, start, length in order:
            writer.add(sources[source].read(start, start + length)[0])
        writer.close()
        for path in sorted(output.glob(f"{name}_{split}_*.bin")):
            if path >= writer.path_of(writer.shard):  # of an earlier call
                path.unlink()
        counts[split] = (sum(length for *_, length in order), len(order))
    shutil.copytree(store / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    return counts


def _shuffled_documents(
    sources: dict[str, TokenShards], mix: dict[str, float] | None, rng: np.random.Generator
) -> list[tuple[str, int, int]]:
    """Source, start and length of each selected document, shuffled."""
    # Tokens of the mixture at which the scarcest source is used up
    total = min(len(source) / mix[name] for name, source in sources.items()) if mix else np.inf
    chosen = []
    for name, source in sources.items():
        starts, lengths = document_table(source)
        order = rng.permutation(len(starts))
        if mix:
            used = np.cumsum(lengths[order]) <= total * mix[name] + 0.5
            order = order[used]
        pairs = zip(starts[order].tolist(), lengths[order].tolist(), strict=True)
        chosen += [(name, start, length) for start, length in pairs]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _vocabulary(store: Path) -> tuple[int, int]:
    """Vocabulary size and bos id of a store's tokenizer."""
    tokenizer = load_tokenizer(store / "tokenizer")
    return vocabulary_size(tokenizer), special_ids(tokenizer).bos


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
