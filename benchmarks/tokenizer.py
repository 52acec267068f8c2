"""Encoding speed on one core: tokenizers' batch encoder, tiktoken and data.tokenizer.Encoder, side by side in one run.

python -m benchmarks.tokenizer --store data/store/quickstart --output results/benchmarks/tokenizer.json
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cli import user_errors
from data.tokenizers.bpe import Encoder, save_tokenizer, train_tokenizer
from data.tokenizers.compression import store_samples
from data.tokenizers.tiktoken_export import load_tiktoken

BATCH = 256  # documents at once, as in the pipeline
LENGTHS = {"short": (1, 1_000), "medium": (2_000, 5_000), "long": (30_000, 1_000_000)}  # characters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--store", type=Path, default=Path("data/store/quickstart"), help="whose documents are read"
    )
    parser.add_argument(
        "--vocab_size", type=int, help="train a tokenizer of this size; default: the store's"
    )
    parser.add_argument("--megabytes", type=float, default=3.0, help="of text of each length")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        texts = [
            text
            for sample in store_samples(args.store, "all", 20_000_000).values()
            for text in sample
        ]
        folder = args.store / "tokenizer"
        if args.vocab_size:
            folder = Path(scratch) / "tokenizer"
            save_tokenizer(train_tokenizer(texts, args.vocab_size), folder)
        encoder = Encoder(folder)
        result = {
            "versions": {name: version(name) for name in ("tokenizers", "tiktoken")},
            "vocab_size": encoder.vocab_size,
            "runs": args.runs,
            "exact": 0,
            "megabytes_per_s": {},
        }
        for name, (low, high) in LENGTHS.items():
            chosen = choose(
                [text for text in texts if low <= len(text) < high], int(args.megabytes * 1e6)
            )
            result["exact"] += compare(encoder, chosen)
            result["megabytes_per_s"][name] = speeds = measure(
                contestants(folder, encoder), chosen, args.runs
            )
            ratio = speeds["Encoder"] / speeds["tokenizers"]
            figures = ", ".join(f"{way} {speed:.1f}" for way, speed in speeds.items())
            print(
                f"{name:>7} documents, MB/s on one core: {figures}; Encoder / tokenizers = {ratio:.2f}",
                flush=True,
            )
        print(f"the ids of all {result['exact']:,} documents are equal")
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def choose(texts: list[str], max_bytes: int) -> list[str]:
    """Some of the texts, spread over all of them."""
    if not texts:
        raise ValueError("the store has no documents of this length; take another --store")
    order = np.random.default_rng(0).permutation(len(texts))
    sizes = np.cumsum([len(texts[i].encode()) for i in order])
    return [texts[i] for i in order[: max(1, int(np.searchsorted(sizes, max_bytes)))]]


def contestants(folder: Path, encoder: Encoder) -> dict[str, Callable[[Sequence[str]], list]]:
    """Ways to get the ids of a batch of texts, as lists or arrays, whichever a way is faster with."""
    tokenizer, tiktoken = encoder.tokenizer, load_tiktoken(folder)
    return {
        "tokenizers": lambda texts: [
            encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))
        ],
        "tiktoken": lambda texts: [tiktoken.encode_ordinary(text) for text in texts],
        "Encoder": encoder,
    }


def measure(
    ways: dict[str, Callable[[Sequence[str]], list]], texts: list[str], runs: int
) -> dict[str, float]:
    """Median megabytes (UTF-8) a second of each way; the ways take turns, so that a busy moment meets all of them."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, encode in ways.items():
            start = time.perf_counter()
            for i in range(0, len(texts), BATCH):
                encode(texts[i : i + BATCH])
            seconds[way].append(time.perf_counter() - start)
    return {way: size / statistics.median(times) for way, times in seconds.items()}


def compare(encoder: Encoder, texts: list[str]) -> int:
    """How many documents were compared; an error where Encoder and tokenizers give different ids."""
    for ids, encoding in zip(
        encoder(texts), encoder.tokenizer.encode_batch_fast(texts), strict=True
    ):
        assert ids.tolist() == encoding.ids
    return len(texts)


if __name__ == "__main__":
    main()
