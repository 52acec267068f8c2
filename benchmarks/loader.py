"""How fast batches come, and how long a loader takes to start. Synthetic tokens in documents of web-like lengths.

    python -m benchmarks.loader                           # about a minute; needs 1 GB of disk and 3 GB of memory
    python -m benchmarks.loader --output results/loader.json

Tokens a second are those of `loader.at(place)` in one thread, from a warm page cache, medians over places. The share of a
step is against one of --tokens_per_step at --training_rate tokens a second.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cli import user_errors
from data import manifest
from data.dataloader import PackedDataLoader, Prefetcher
from data.packing import LongDocuments, keep_plan
from data.shards import ShardWriter, TokenShards

VOCAB, MIX = 32_000, {"web": 0.5, "code": 0.3, "maths": 0.2}
MEDIAN_TOKENS = {"web": 600, "code": 400, "maths": 900}  # of a document; lognormal, sigma 1.05


def document_lengths(documents: int, median: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(median), 1.05, documents), 20, 200_000).astype(np.int64)


def write_source(folder: Path, tokens: int, median: int, seed: int) -> None:
    """A source of random tokens."""
    rng = np.random.default_rng(seed)
    lengths = document_lengths(4 * tokens // median, median, seed)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    with ShardWriter(folder, VOCAB, "synthetic", {}) as writer:
        for length in lengths.tolist():
            writer.add("train", rng.integers(1, VOCAB, length, dtype=np.uint16))


def write_huge_source(folder: Path, documents: int) -> None:
    """A source whose tokens are a hole in a file: only where its documents begin is real."""
    folder.mkdir()
    lengths = document_lengths(documents, 600, seed=9)
    np.save(folder / "train-00000.starts.npy", np.cumsum(lengths) - lengths)
    tokens = int(lengths.sum())
    with open(folder / "train-00000.bin", "wb") as file:
        file.truncate(2 * tokens)
    shard = {"stem": "train-00000", "tokens": tokens, "documents": documents, "sha256": {}}
    content = {
        "inputs": {},
        "vocab_size": VOCAB,
        "dtype": "<u2",
        "tokenizer": "synthetic",
        "splits": {"train": [shard]},
    }
    manifest.write(folder, content)


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_batches(folder: Path, tokens_per_step: int, rate: float, places: int) -> list[dict]:
    """Each packing and row length: median seconds of at(place), and of what is left to wait for with a Prefetcher."""
    step_s, results = tokens_per_step / rate, []
    shards = {name: TokenShards(folder / name, "train") for name in MIX}
    for source in shards.values():
        source.read(0, len(source))  # into the page cache
    long = {name: LongDocuments(source, 4096) for name, source in shards.items()}
    for length in (4096, 16_384):
        for label, sources, packing in (
            ("stream", shards, "stream"),
            ("best_fit", shards, "best_fit"),
            ("stream, documents of 4,096+", long, "stream"),
            ("best_fit, documents of 4,096+", long, "best_fit"),
        ):
            rows = tokens_per_step // length
            loader = PackedDataLoader(sources, MIX, length, rows, rows, seed=0, packing=packing)
            loader.at(0)
            times = [seconds(lambda: loader.at(batch_index)) for batch_index in range(places)]
            ahead, waits = Prefetcher(loader, torch.device("cpu")), []
            for batch_index in range(places // 4):
                waits.append(seconds(lambda: ahead.at(batch_index)))
                time.sleep(0.03)  # a step, if a short one
            at = statistics.median(times)
            wait = statistics.median(waits[1:])
            results.append(
                {
                    "sequence_length": length,
                    "rows": label,
                    "tokens_per_s": tokens_per_step / at,
                    "slowest_tenth_tokens_per_s": tokens_per_step / float(np.quantile(times, 0.9)),
                    "share_of_step": at / step_s,
                    "share_of_step_prefetched": wait / step_s,
                    "reports": [part.report for part in loader.packed],
                }
            )
    return results


def measure_start(folder: Path, rows: int, documents: int) -> dict[str, float]:
    """Seconds of what a start or a resume costs at full size."""
    write_huge_source(folder / "huge", documents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = TokenShards(folder / "huge", "train")
    costs = {
        "open_shards_s": seconds(lambda: TokenShards(folder / "huge", "train")),
        f"shuffle_{rows}_rows_s": seconds(
            lambda: np.random.default_rng(0).permutation(rows).astype(np.uint32)
        ),
        "long_documents_s": seconds(lambda: LongDocuments(source, 4096)),
        f"plan_{documents}_documents_s": seconds(lambda: keep_plan(source, 4096, 0)),
        "open_plan_s": seconds(lambda: keep_plan(source, 4096, 0)),
        "plan_mb": sum(path.stat().st_size for path in source.folder.glob("plans/*/*.npy")) / 1e6,
        "plan_peak_memory_gb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        * 1024
        / 1e9,
    }
    return costs | {f"plan_{name}": share for name, share in keep_plan(source, 4096, 0)[1].items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens a source")
    parser.add_argument(
        "--documents",
        type=int,
        default=25_000_000,
        help="documents of the plan whose making is timed",
    )
    parser.add_argument(
        "--shuffled_rows", type=int, default=6_000_000, help="rows of the shuffle that is timed"
    )
    parser.add_argument("--places", type=int, default=200, help="steps measured")
    parser.add_argument("--tokens_per_step", type=int, default=131_072)
    parser.add_argument(
        "--training_rate",
        type=float,
        default=70_000,
        help="tokens a second of the training to be fed",
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        start = measure_start(
            Path(folder), args.shuffled_rows, args.documents
        )  # first, while the peak of memory is its own
        for seed, name in enumerate(MIX):
            write_source(Path(folder) / name, args.tokens, MEDIAN_TOKENS[name], seed)
        batches = measure_batches(
            Path(folder), args.tokens_per_step, args.training_rate, args.places
        )
    for row in batches:
        print(
            f"{row['sequence_length']:>6} tokens a row, {row['rows']:<30} {row['tokens_per_s'] / 1e6:6.1f} M tokens/s "
            f"(slowest tenth {row['slowest_tenth_tokens_per_s'] / 1e6:.1f}), {row['share_of_step']:.3%} of a step, "
            f"{row['share_of_step_prefetched']:.4%} with prefetch"
        )
    for name, value in start.items():
        print(f"{name:>32} {value:10.4g}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"task": "loader", "batches": batches, "start": start}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
