"""Held-out loss, perplexity and bits per byte, per source: of a data store's shards, or of texts.

python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold/step_300 --dataset data/store/quickstart
python -m evals.eval_perplexity --checkpoint checkpoints/quickstart/gold/step_300 --dataset texts.jsonl --stride 128

A store's held-out tokens are read in rows as in training. With --stride they are read document by document, and texts
(.jsonl with `text`, and `source` if there are several) always are: in windows that move by --stride tokens, each token scored
once. The default stride is a whole window, as lm-evaluation-harness reads; a smaller one gives tokens more to go by.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from data.dataloader import Batch, validation_batches
from data.evalsets import read_jsonl
from data.gguf_tokenizer import tokenizer_folder
from data.manifest import file_hash
from data.shards import TokenShards
from data.tokenizer import load_tokenizer, token_bytes
from entrypoint import at_least, user_errors
from evals.engines import LanguageModel, NanoLlamaEngine, load_model
from evals.harness import Estimate, Eval, Item, Read, Sample, Score
from evals.run import evaluate, flags, output_of, ranks
from models.losses import IGNORE

VERSION = 1  # of how texts are read and scored


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
            nll = model(batch.tokens, batch.targets, batch.docs).nll
            sums += torch.stack([nll.double().sum(), valid.sum(), bytes_of[batch.targets[valid]].sum()])
        sums = total(sums)
        everything += sums
        results[name] = _figures(*sums.tolist())
    return {**results, "all": _figures(*everything.tolist())}


def _figures(nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}


def by_rows(args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The results of a store, read in rows as in training, over ranks."""
    engine = model.engine
    if not isinstance(engine, NanoLlamaEngine):
        raise ValueError(f"{args.checkpoint} is not read as a NanoLlama; give --stride, which reads a store with any model")
    length = args.sequence_length or model.context
    sources = {n: validation_batches(s, length, args.batch_size, args.limit, rank, world) for n, s in shards_of(args).items()}

    def total(sums: Tensor) -> Tensor:
        if world > 1:
            sums = sums.cpu()  # ranks speak over gloo
            dist.all_reduce(sums)
        return sums.to(engine.device)

    bytes_of = torch.from_numpy(token_bytes(load_tokenizer(args.checkpoint)))
    figures = perplexity(engine.model, sources, bytes_of, total)
    rows = sum((batch.targets != IGNORE).any(1).sum() for batches in sources.values() for batch in batches)
    return {
        "task": "perplexity",
        "metrics": {source: _estimates(of_source) for source, of_source in figures.items()},
        "n": int(total(torch.as_tensor(rows))),
        "version": VERSION,
        "model": model.name,
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
        **_about(args, length),
    }


def _estimates(figures: dict[str, float]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": value, "stderr": None} for name, value in figures.items()}


def _about(args: argparse.Namespace, length: int) -> dict[str, Any]:
    """What else the results file says: how the data were read, and which they were."""
    how = {"sequence_length": length, "stride": args.stride}
    return {"checkpoint": str(args.checkpoint), "data": str(args.dataset), "data_hashes": data_hashes(args), **how}


def shards_of(args: argparse.Namespace) -> dict[str, TokenShards]:
    """Held-out shards of the sources that were asked for; ValueError where there are none, or of another tokenizer."""
    present = sorted(path.name for path in (args.dataset / "tokens").glob("*") if path.is_dir())
    unknown = set(args.sources or []) - set(present)
    if unknown or not present:
        raise ValueError(f"{args.dataset} has no source {' '.join(sorted(unknown))}; it has: {', '.join(present) or 'none'}")
    found = {name: TokenShards(args.dataset / "tokens" / name, "val") for name in args.sources or present}
    for shards in found.values():
        if not _made_with(args.checkpoint, shards, args.dataset / "tokenizer"):
            raise ValueError(f"{shards.folder} was made with another tokenizer than {args.checkpoint} has; tokenize it again")
    return found


def _made_with(checkpoint: Path, shards: TokenShards, tokenizer: Path) -> bool:
    """Has text the ids of the shards? A GGUF file, and a tokenizer grown by chat tokens, has their vocabulary, not that file."""
    own = tokenizer_folder(checkpoint)
    if shards.tokenizer == file_hash(own / "tokenizer.json"):
        return True
    if not (tokenizer / "tokenizer.json").is_file() or shards.tokenizer != file_hash(tokenizer / "tokenizer.json"):
        return False
    of_store, grown = (load_tokenizer(folder).get_vocab() for folder in (tokenizer, own))
    return of_store.items() <= grown.items()


def score(item: Item) -> Score:
    reading = yield Read(item.row["text"], item.row["stride"])
    return {"nats": -reading.logprob, "tokens": reading.tokens, "bytes": reading.bytes}


def totals(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """loss, perplexity, bits_per_byte and tokens out of sums over documents."""
    sums = [math.fsum(sample.scores[name] for sample in samples) for name in ("nats", "tokens", "bytes")]
    if not sums[1]:
        raise ValueError(f"every text of {samples[0].subject} is empty; give texts that can be scored")
    return {name: Estimate(value, None) for name, value in _figures(*sums).items()}


def documents(args: argparse.Namespace) -> Iterator[Item]:
    """Documents of a store's held-out shards, with the bos that begins them, or the texts of a .jsonl file."""
    if args.dataset.is_file():
        counts: dict[str, int] = {}
        for number, row in enumerate(read_jsonl(args.dataset), 1):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"row {number} of {args.dataset} has no text; mend or remove the line")
            source = str(row.get("source", args.dataset.stem))
            counts[source] = counts.get(source, 0) + 1
            if counts[source] <= (args.limit or counts[source]) and source in (args.sources or [source]):
                yield Item(str(row.get("id", number)), {"text": row["text"], "stride": args.stride}, source)
        return
    for source, shards in shards_of(args).items():
        tokens, numbers = shards.read(0, len(shards))
        edges = [0, *((numbers[1:] != numbers[:-1]).nonzero()[0] + 1).tolist(), len(tokens)]
        for i, (begin, end) in enumerate(pairwise(edges)):
            if end - begin > 1 and i < (args.limit or i + 1):
                yield Item(f"{source}/{i}", {"text": tuple(tokens[begin:end].tolist()), "stride": args.stride}, source)


def by_documents(args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The results of texts or of a store's documents, in windows, over ranks."""
    model = copy(model)
    model.context = min(model.context, args.sequence_length or model.context)
    about = _about(args, model.context)
    evaluation = Eval("perplexity", VERSION, list(documents(args)), score, totals=totals, about=about)
    found = evaluate(evaluation, model, args.output, None, rank, world)
    if found:
        parts = found.pop("subjects", {}) or {s.subject: {"metrics": found["metrics"]} for s in evaluation.items[:1]}
        found.pop("macro", None)
        found["metrics"] = {**{name: part["metrics"] for name, part in parts.items()}, "all": found["metrics"]}
    return found


def measure(args: argparse.Namespace, model: LanguageModel, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The results (on rank 0), which also go to args.output."""
    found = (by_rows if _in_rows(args) else by_documents)(args, model, rank, world)
    if args.output and rank == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    return found if rank == 0 else {}


def asked(args: argparse.Namespace) -> list[Any]:
    """All that the figures depend on, but for the model; ValueError where there are no data."""
    find_data(args)
    return [VERSION, args.sources, args.sequence_length, args.stride, args.limit, data_hashes(args)]


def data_hashes(args: argparse.Namespace) -> dict[str, str]:
    """sha256 of a file of texts, or of the manifest of each source's shards, which holds theirs."""
    files = [args.dataset] if args.dataset.is_file() else [s.folder / "manifest.json" for s in shards_of(args).values()]
    return {str(path): file_hash(path) for path in files}


def find_data(args: argparse.Namespace) -> None:
    """Let --data stand for --dataset; ValueError where there is nothing."""
    args.dataset = args.dataset or (Path(args.data) if args.data else None)
    if args.dataset is None or not args.dataset.exists():
        raise ValueError(f"there is no data at {args.dataset}; give --dataset a store or a .jsonl file of texts")


def _in_rows(args: argparse.Namespace) -> bool:
    return args.stride is None and args.dataset.is_dir()


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=None)
    parser.add_argument("--dataset", type=Path, help="a data store, or a .jsonl file of texts; the same as --data")
    parser.add_argument("--sources", nargs="*", help="which sources of it (default: all)")
    parser.add_argument("--sequence_length", type=at_least(1), help="tokens a row or window (default: the model's context)")
    parser.add_argument("--stride", type=at_least(1), help="read documents in windows that move by so many tokens")
    parser.set_defaults(batch_size=4)
    return parser


def show(found: dict[str, Any]) -> None:
    for name, estimates in found["metrics"].items():
        figures = {metric: estimate["value"] for metric, estimate in estimates.items()}
        text = f"perplexity {figures['perplexity']:8.2f}  bits per byte {figures['bits_per_byte']:.3f}"
        print(f"{name:>12}  {text}  ({figures['tokens']:,.0f} tokens)")


def main() -> None:
    args = parser().parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        find_data(args)
        args.output = output_of(args.output, args.checkpoint, "perplexity")
        found = measure(args, load_model(args.checkpoint, device, args.dtype, args.batch_size), rank, world)
        if rank == 0:
            show(found)
            print(f"written to {args.output}")


if __name__ == "__main__":
    main()
