"""Held-out loss, perplexity and bits per byte, per source: of a data store's shards, or of texts.

python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold
python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold --dataset stem-validation
python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold --dataset texts.jsonl --stride 128

Without --dataset the held-out split of the run's own data store is scored: about --tokens tokens of each source, evenly
spread over the split, in rows as in training. With --stride a store is read document by document. Texts (.jsonl with
`text`, and `source` if there are several; .txt) always are: in windows that move by --stride tokens, each token scored
once. The default stride is a whole window, as in lm-evaluation-harness; a smaller one gives each token more context.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cli import at_least, user_errors
from data.dataloader import Batch, stream_batches
from data.tokenizers.bpe import load_tokenizer, token_bytes
from evals.engines import LanguageModel, NanoLlamaEngine, check_there, load_model
from evals.harness import Estimate, Eval, Item, Read, Sample, Score
from evals.held_out import (
    TOKENS,
    ChosenRows,
    data_hashes,
    documents,
    find_data,
    is_store,
    shards_of,
    token_count,
)
from evals.progress import progress
from evals.run import evaluate, flags, output_of, ranks
from files import write_json
from models.losses import IGNORE

VERSION = 2  # of how texts are read and scored; 2: --tokens, where 1 read all of a split


@torch.no_grad()
def perplexity(
    model: nn.Module,
    sources: Mapping[str, Iterable[Batch]],
    bytes_of: Tensor,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, dict[str, float]]:
    """Per source, and over all targets of all sources as "all": loss (nats a token), perplexity, bits_per_byte, tokens.

    bytes_of [vocab]: bytes of text a token stands for; bits are divided by the bytes of the very targets that were scored.
    total: adds a tensor up over ranks. Totals are divided, never ratios averaged.
    """
    device = next(model.parameters()).device
    bytes_of = bytes_of.to(device)
    everything = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    results = {}
    for name, batches in sources.items():
        sums = torch.zeros_like(everything)
        for batch in batches:
            batch = batch.to(device)
            valid = batch.targets != IGNORE
            nll = model(batch.tokens, batch.targets, batch.doc_ids).nll
            sums += torch.stack(
                [nll.double().sum(), valid.sum(), bytes_of[batch.targets[valid]].sum()]
            )
        sums = total(sums)
        everything += sums
        results[name] = _figures(*sums.tolist())
    return {**results, "all": _figures(*everything.tolist())}


def _figures(nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}


def by_rows(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """The results of a store, read in rows as in training, over ranks."""
    engine = model.engine
    if not isinstance(engine, NanoLlamaEngine):
        raise ValueError(
            f"{args.checkpoint} is not read as a NanoLlama; give --stride, which reads a store with any model"
        )
    length = args.sequence_length or model.context
    rows = {
        name: ChosenRows(shards, length, args.tokens, args.limit)
        for name, shards in shards_of(args).items()
    }

    def batches(name: str) -> Iterator[Batch]:
        of_source, shape = rows[name], (length, args.batch_size)
        with progress(len(of_source), "row", rank == 0, name) as bar:
            for batch in stream_batches(of_source, *shape, len(of_source), rank, world):
                yield batch
                bar.update(min(args.batch_size * world, len(of_source) - bar.n))

    def total(sums: Tensor) -> Tensor:
        if world > 1:
            sums = sums.cpu()  # ranks speak over gloo
            dist.all_reduce(sums)
        return sums.to(engine.device)

    bytes_of = torch.from_numpy(token_bytes(load_tokenizer(args.checkpoint)))
    figures = perplexity(engine.model, {name: batches(name) for name in rows}, bytes_of, total)
    return {
        "task": "perplexity",
        "metrics": {source: _estimates(of_source) for source, of_source in figures.items()},
        "n": sum(map(len, rows.values())),
        "version": VERSION,
        "model": model.name,
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
        **_about(args, length, {name: of_source.coverage for name, of_source in rows.items()}),
    }


def _estimates(figures: dict[str, float]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": value, "stderr": None} for name, value in figures.items()}


def _about(
    args: argparse.Namespace, length: int, coverage: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What else the results file says: which data were read, how, and how much of them."""
    how = {
        "sequence_length": length,
        "stride": args.stride,
        "tokens_per_source": args.tokens or None,
    }
    data = {"data": str(args.dataset), "data_hashes": data_hashes(args), "coverage": coverage}
    return {"checkpoint": str(args.checkpoint), **data, **how}


def score(item: Item) -> Score:
    reading = yield Read(item.row["text"], item.row["stride"])
    return {"nats": -reading.logprob, "tokens": reading.tokens, "bytes": reading.bytes}


def totals(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """loss, perplexity, bits_per_byte and tokens out of sums over documents."""
    sums = [
        math.fsum(sample.scores[name] for sample in samples) for name in ("nats", "tokens", "bytes")
    ]
    if not sums[1]:
        raise ValueError(
            f"every text of {samples[0].subject} is empty; give texts that can be scored"
        )
    return {name: Estimate(value, None) for name, value in _figures(*sums).items()}


def by_documents(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """The results of texts or of a store's documents, in windows, over ranks."""
    model = copy(model)
    model.context = min(model.context, args.sequence_length or model.context)
    items, coverage = documents(args)
    about = _about(args, model.context, coverage)
    evaluation = Eval("perplexity", VERSION, items, score, totals=totals, about=about)
    found = evaluate(evaluation, model, args.output, None, rank, world)
    if found:
        parts = found.pop("subjects", {}) or {
            s.subject: {"metrics": found["metrics"]} for s in evaluation.items[:1]
        }
        found.pop("macro", None)
        found["metrics"] = {
            **{name: part["metrics"] for name, part in parts.items()},
            "all": found["metrics"],
        }
    return found


def measure(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """The results (on rank 0), which also go to args.output."""
    found = (by_rows if _in_rows(args) else by_documents)(args, model, rank, world)
    if args.output and rank == 0:
        write_json(args.output, found)
    return found if rank == 0 else {}


def asked(args: argparse.Namespace) -> list[Any]:
    """All that the figures depend on, but for the model; ValueError where there are no data."""
    find_data(args)
    what = [args.sources, args.tokens, args.limit, data_hashes(args)]
    return [VERSION, args.sequence_length, args.stride, *what]


def _in_rows(args: argparse.Namespace) -> bool:
    return args.stride is None and is_store(args.dataset)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=None)
    about = "a data store, a .jsonl or .txt file, a folder of .txt files, or a source of the run's store"
    parser.add_argument(
        "--dataset", help=f"{about}, such as fineweb-edu-validation (default: that store)"
    )
    about = "to score of each source, evenly spread; 0 or all: everything, in memory where --stride is given"
    parser.add_argument(
        "--tokens", type=token_count, default=TOKENS, help=f"{about} (default: {TOKENS:,})"
    )
    parser.add_argument("--sources", nargs="*", help="which sources of it (default: all)")
    parser.add_argument(
        "--sequence_length",
        type=at_least(1),
        help="tokens a row or window (default: the model's context)",
    )
    parser.add_argument(
        "--stride", type=at_least(1), help="read documents in windows that move by so many tokens"
    )
    parser.set_defaults(batch_size=4)
    return parser


def show(found: dict[str, Any]) -> None:
    """Print one line per source, with how much of its held-out text was scored."""
    for name, estimates in found["metrics"].items():
        figures = {metric: estimate["value"] for metric, estimate in estimates.items()}
        text = (
            f"perplexity {figures['perplexity']:8.2f}  bits per byte {figures['bits_per_byte']:.3f}"
        )
        there = _share_of(found["coverage"].get(name, {}))
        print(f"{name:>12}  {text}  ({figures['tokens']:,.0f} tokens{there})")


def _share_of(coverage: dict[str, int]) -> str:
    """How much of a source that is: " of 780,000,000", ", 4,000 of 9,000 bytes"."""
    if "available_tokens" in coverage:
        return f" of {coverage['available_tokens']:,}"
    if "available_bytes" in coverage:
        return f", {coverage['bytes']:,} of {coverage['available_bytes']:,} bytes"
    return ""


def main() -> None:
    args = parser().parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        check_there(args.checkpoint)
        find_data(args)
        args.output = output_of(args.output, args.checkpoint, "perplexity")
        found = measure(
            args, load_model(args.checkpoint, device, args.dtype, args.batch_size), rank, world
        )
        if rank == 0:
            show(found)
            print(f"written to {args.output}")


if __name__ == "__main__":
    main()
