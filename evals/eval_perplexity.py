"""Loss, perplexity and bits per byte of held-out text, per source, from a data store or text files.

python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold
python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold --dataset stem-validation
python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold --dataset my_texts.jsonl

The results file of other data and of single sources has their name, and the report never takes
other data for those of the run.

The default data are the validation split of the checkpoint's own run: about --tokens tokens per
source, evenly spread over the split, packed into rows as in training. With --stride, a store is
scored document by document. Texts are always scored that way (.jsonl with `text` and optional
`source`, or .txt). Windows advance by --stride tokens and score each token once. The default
stride is a whole window, as in lm-evaluation-harness; a smaller one gives each token more context.

The standard errors of loss, perplexity and bits per byte are a jackknife over up to 32 blocks of
consecutive rows or documents (evals/text_blocks.py), whose sums are in the results file.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cli import int_at_least, user_errors
from data.dataloader import Batch, stream_batches
from data.tokenizers.bpe import load_tokenizer, token_bytes
from evals.engines import LanguageModel, NanoLlamaEngine, check_checkpoint, load_model
from evals.harness import Estimate, Eval, Item, Read, Sample, Score
from evals.held_out import (
    TOKENS,
    ChosenRows,
    data_hashes,
    documents,
    is_store,
    resolve_data,
    result_name,
    shards_of,
    token_count,
)
from evals.progress import progress
from evals.run import eval_parser, evaluate, output_path, ranks
from evals.text_blocks import SUMS, Sources, blocks_of, figures, stderrs
from files import write_json
from machine import exact, exact_device
from models.losses import IGNORE

VERSION = 2  # of reading and scoring; 2 reads --tokens tokens, 1 read the whole split


@torch.no_grad()
def perplexity(
    model: nn.Module,
    sources: Mapping[str, Iterable[Batch]],
    token_bytes: Tensor,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums,
    row_sums: Mapping[str, list[Tensor]] | None = None,
) -> dict[str, dict[str, float]]:
    """loss (nats per token), perplexity, bits_per_byte and tokens, per source and for "all".

    token_bytes [vocab]: UTF-8 bytes of each token; bits are divided by the bytes of the scored
    targets. all_reduce_sum: sums a tensor over ranks. Ratios are computed from sums over all ranks,
    not averaged. row_sums: if given, the nats, tokens and bytes [B, 3] of the rows of each batch
    of this rank are appended to its lists.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    # nats, tokens, bytes
    everything = torch.zeros(3, dtype=torch.float64, device=exact_device(device))
    results = {}
    for name, batches in sources.items():
        sums = torch.zeros_like(everything)
        for batch in batches:
            batch = batch.to(device)
            valid = batch.targets != IGNORE
            nll = model(batch.tokens, batch.targets, batch.doc_ids).nll
            counts = valid.sum(), token_bytes[batch.targets[valid]].sum()
            sums += torch.stack([exact(nll).double().sum(), *map(exact, counts)])
            if row_sums is not None:
                columns = nll, valid, token_bytes[batch.targets.clamp_min(0)] * valid
                by_row = [exact(column).double().sum(1) for column in columns]
                row_sums[name].append(torch.stack(by_row, 1))
        sums = all_reduce_sum(sums)
        everything += sums
        results[name] = figures(*sums.tolist())
    return {**results, "all": figures(*everything.tolist())}


def replay_figures(
    model: nn.Module,
    sources: Mapping[str, Iterable[Batch]],
    token_bytes: Tensor,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, float]]:
    """Perplexity of pretraining text in SFT or DPO; its total is "replay", not "all"."""
    results = perplexity(model, sources, token_bytes, all_reduce_sum)
    return {"replay": results.pop("all"), **results}


def by_rows(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Score a store in packed rows as in training, over all ranks."""
    engine = model.engine
    if not isinstance(engine, NanoLlamaEngine):
        raise ValueError(
            f"{args.checkpoint} is not a NanoLlama model; give --stride to score a store with it"
        )
    length = args.sequence_length or model.context
    rows = {
        name: ChosenRows(shards, length, args.tokens, args.limit)
        for name, shards in shards_of(args).items()
    }

    def batches(name: str) -> Iterator[Batch]:
        source, size = rows[name], args.batch_size
        with progress(len(source), "row", rank == 0, name) as bar:
            for batch in stream_batches(source, length, size, len(source), rank, world):
                yield batch
                bar.update(min(size * world, len(source) - bar.n))

    def all_reduce_sum(sums: Tensor) -> Tensor:
        if world == 1:
            return sums
        reduced = sums.cpu()  # gloo reduces CPU tensors
        dist.all_reduce(reduced)
        return reduced.to(sums.device)

    sizes = torch.from_numpy(token_bytes(load_tokenizer(args.checkpoint)))
    sources = {name: batches(name) for name in rows}
    row_sums: dict[str, list[Tensor]] = {name: [] for name in rows}
    results = perplexity(engine.model, sources, sizes, all_reduce_sum, row_sums)
    blocks = {}
    for name, sums in row_sums.items():
        all_rows = all_reduce_sum(_among_ranks(torch.stack(sums), rank, world)).flatten(0, 2)
        blocks[name] = blocks_of(all_rows[: len(rows[name])].tolist())  # without padding
    return {
        "task": "perplexity",
        "metrics": {
            source: _estimates(values, blocks if source == "all" else {source: blocks[source]})
            for source, values in results.items()
        },
        "blocks": blocks,
        "n": sum(map(len, rows.values())),
        "version": VERSION,
        "model": model.name,
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
        **_metadata(args, length, {name: source.coverage for name, source in rows.items()}),
    }


def _among_ranks(sums: Tensor, rank: int, world: int) -> Tensor:
    """Place this rank's sums [batches, rows, 3] among zeros for the others.

    Returns [batches, world, rows, 3]: the order of stream_batches. The sum over ranks is exact.
    """
    all_rows = sums.new_zeros(len(sums), world, *sums.shape[1:])
    all_rows[:, rank] = sums
    return all_rows


def _estimates(values: dict[str, float], sources: Sources) -> dict[str, dict[str, float | None]]:
    errors = stderrs(sources)
    return {name: {"value": value, "stderr": errors.get(name)} for name, value in values.items()}


def _metadata(
    args: argparse.Namespace, length: int, coverage: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Metadata of the results file: the data, how they were read and how much was scored."""
    settings = {
        "sequence_length": length,
        "stride": args.stride,
        "tokens_per_source": args.tokens or None,
    }
    data = {"data": str(args.dataset), "data_hashes": data_hashes(args), "coverage": coverage}
    foreign = {"foreign_text": True} if args.foreign else {}
    return {"checkpoint": str(args.checkpoint), **data, **foreign, **settings}


def score(item: Item) -> Score:
    reading = yield Read(item.row["text"], item.row["stride"])
    return {"nats": -reading.logprob, "tokens": reading.tokens, "bytes": reading.bytes}


def aggregate(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """loss, perplexity, bits_per_byte and tokens from sums over documents; subjects are sources."""
    return text_estimates(samples, source_blocks(samples))


def source_blocks(samples: Sequence[Sample]) -> dict[str, dict[str, list[float]]]:
    """Blocks of the documents of each subject."""
    subjects: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        subjects[sample.subject].append(sample)
    return {name: document_blocks(documents) for name, documents in subjects.items()}


def document_blocks(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Blocks of documents in their order."""
    return blocks_of([[sample.scores[name] for name in SUMS] for sample in samples])


def text_estimates(samples: Sequence[Sample], sources: Sources) -> dict[str, Estimate]:
    """Estimates from sums over documents, with standard errors from their blocks."""
    sums = [math.fsum(sample.scores[name] for sample in samples) for name in SUMS]
    if not sums[1]:
        raise ValueError(
            f"every text of {samples[0].subject} is empty; give texts with at least one token"
        )
    errors = stderrs(sources)
    return {name: Estimate(value, errors.get(name)) for name, value in figures(*sums).items()}


def by_documents(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Score texts or a store's documents in windows, over all ranks."""
    model = copy(model)
    model.context = min(model.context, args.sequence_length or model.context)
    items, coverage = documents(args)
    metadata = _metadata(args, model.context, coverage)
    evaluation = Eval(
        "perplexity",
        VERSION,
        items,
        score,
        aggregate=aggregate,
        details=lambda samples: {"blocks": source_blocks(samples)},
        metadata=metadata,
    )
    content = evaluate(evaluation, model, args.output, None, rank, world)
    if content:
        sources = content.pop("subjects", {}) or {
            item.subject: {"metrics": content["metrics"]} for item in evaluation.items[:1]
        }
        content.pop("macro", None)
        content["metrics"] = {
            **{name: source["metrics"] for name, source in sources.items()},
            "all": content["metrics"],
        }
    return content


def measure(
    args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Score the data; rank 0 returns the results and writes them to args.output if given."""
    content = (by_rows if _in_rows(args) else by_documents)(args, model, rank, world)
    if args.output and rank == 0:
        write_json(args.output, content)
    return content if rank == 0 else {}


def inputs(args: argparse.Namespace) -> list[Any]:
    """All inputs of the results except the model. ValueError if no data are found."""
    resolve_data(args)
    data = [args.sources, args.tokens, args.limit, data_hashes(args)]
    return [VERSION, args.sequence_length, args.stride, *data]


def _in_rows(args: argparse.Namespace) -> bool:
    return args.stride is None and is_store(args.dataset)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--dataset",
        help="a data store, a .jsonl or .txt file, a folder of .txt files, or a source or group of "
        "the run's store such as fineweb-edu-validation (default: the whole store of the run)",
    )
    parser.add_argument(
        "--tokens",
        type=token_count,
        default=TOKENS,
        help="tokens to score per source, evenly spread; 0 or all: everything, which --stride "
        f"holds in memory (default: {TOKENS:,})",
    )
    parser.add_argument("--sources", nargs="*", help="sources to score (default: all)")
    parser.add_argument(
        "--sequence_length",
        type=int_at_least(1),
        help="tokens per row or window (default: the model's context)",
    )
    parser.add_argument(
        "--stride",
        type=int_at_least(1),
        help="score documents in windows that advance by this many tokens",
    )
    parser.set_defaults(batch_size=4)
    return parser


def print_results(content: dict[str, Any]) -> None:
    """Print one line per source, with the share of its validation text that was scored."""
    without_error = []
    for name, estimates in content["metrics"].items():
        values = {metric: estimate["value"] for metric, estimate in estimates.items()}
        stderr = estimates["bits_per_byte"]["stderr"]
        error = "" if stderr is None else f" +- {stderr:.3f}"
        without_error += [name] if stderr is None else []
        bits = f"bits per byte {values['bits_per_byte']:.3f}{error}"
        share = _coverage_text(content["coverage"].get(name, {}))
        about = f"({values['tokens']:,.0f} tokens{share})"
        print(f"{name:>12}  perplexity {values['perplexity']:8.2f}  {bits}  {about}")
    if without_error and "blocks" in content:
        print(
            f"note: no standard error for {', '.join(without_error)}: each source needs at least "
            "2 rows or documents"
        )


def _coverage_text(coverage: dict[str, int]) -> str:
    """Scored share of a source, such as " of 780,000,000" or ", 4,000 of 9,000 bytes"."""
    if "available_tokens" in coverage:
        return f" of {coverage['available_tokens']:,}"
    if "available_bytes" in coverage:
        return f", {coverage['bytes']:,} of {coverage['available_bytes']:,} bytes"
    return ""


def main() -> None:
    args = parser().parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        check_checkpoint(args.checkpoint)
        resolve_data(args)
        args.output = output_path(args.output, args.checkpoint, result_name(args))
        model = load_model(args.checkpoint, device, args.dtype, args.batch_size)
        content = measure(args, model, rank, world)
        if rank == 0:
            print_results(content)
            print(f"results written to {args.output}")


if __name__ == "__main__":
    main()
