"""Shared parts of the evaluation commands: flags, ranks, model loading and the results file."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed as dist

from cli import CommandParser, int_at_least, user_errors
from evals.engines import check_checkpoint, load_model
from evals.harness import (
    Cache,
    Eval,
    Responder,
    Sample,
    contaminated_ids,
    results,
    run_items,
    write_results,
    write_samples,
)
from machine import add_device, rank_and_world
from models.hf import resolve_checkpoint
from training.process_group import process_group


def add_max_new_tokens(
    parser: argparse.ArgumentParser, about: str, default: int | None = None
) -> None:
    """Add --max_new_tokens, the limit of one answer, as args.max_tokens."""
    kind = int_at_least(1)
    parser.add_argument(
        "--max_new_tokens", dest="max_tokens", type=kind, default=default, help=about
    )


def eval_parser(description: str | None, shots: int | None = 0) -> argparse.ArgumentParser:
    """A parser with the common flags. shots: default of --shots; None omits the flag."""
    parser = CommandParser(description)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a step or phase folder, a Hugging Face folder, or a .gguf file",
    )
    parser.add_argument(
        "--data",
        help="local .jsonl in the hub dataset's schema, or a folder of <split>.jsonl "
        "(default: see above)",
    )
    parser.add_argument(
        "--limit", type=int_at_least(1), help="evaluate only the first N items (per subject)"
    )
    parser.add_argument(
        "--output", type=Path, help="results file (default: results/<checkpoint>/<task>.json)"
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: as stored)",
    )
    parser.add_argument(
        "--batch_size", type=int_at_least(1), default=16, help="items or prompts per batch"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the few-shot sampler")
    parser.add_argument(
        "--contaminated",
        type=Path,
        help="report of scripts.decontaminate or scripts.prepare_data; adds scores of clean items",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/store/wheels"),
        help="folder for downloaded test sets",
    )
    if shots is not None:
        parser.add_argument(
            "--shots",
            type=int_at_least(0),
            default=shots,
            help="solved examples before each question (default: %(default)s)",
        )
    return parser


@contextmanager
def ranks(device: str) -> Iterator[tuple[int, int, str]]:
    """Rank, world size and device of this process; rank 0 of 1 unless torchrun started it.

    Ranks exchange only samples, over gloo.
    """
    if not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    rank, world = rank_and_world()
    local = f"cuda:{dist.get_node_local_rank()}" if device == "cuda" else device
    with process_group("gloo", rank, world):
        yield rank, world, local


def evaluate(
    evaluation: Eval,
    model: Responder,
    output: Path | None,
    contaminated: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Run an evaluation on this rank's share of the items; rank 0 writes and returns the results.

    Other ranks return {}. ValueError on every rank if one rank fails, and on rank 0 if the judge
    left items unanswered.
    """
    folder = output.parent / "answers" if output else None
    judge_cache = Cache(folder, evaluation.judge, rank) if evaluation.judge else None
    count = len(evaluation.items)
    items = evaluation.items[count * rank // world : count * (rank + 1) // world]
    samples, failure = list[Sample](), None
    try:
        cache = Cache(folder, model, rank)
        samples = run_items(
            items, evaluation.score, model, cache, rank == 0, evaluation.judge, judge_cache
        )
    except ValueError as error:
        failure = error
    samples = _gather(samples, failure, world)
    content: dict[str, Any] = {}
    if rank == 0:
        ids = (
            contaminated_ids(contaminated, evaluation.test_set or evaluation.task)
            if contaminated
            else None
        )
        failed = [sample.failed for sample in samples if sample.failed]
        if failed:  # scores over a subset would be misleading
            if output:
                output.unlink(missing_ok=True)
                write_samples(output, samples)
            assert evaluation.judge is not None
            raise ValueError(
                f"{evaluation.judge.name} did not judge {len(failed)} of {len(samples)} items of "
                f"{evaluation.task} ({failed[0]}); "
                + (f"the model's answers are saved beside {output}; " if output else "")
                + "run the command again to judge the missing items"
            )
        content = results(evaluation, samples, model, ids)
        if output:
            write_results(output, content, samples)
    return content


def _gather(samples: list[Sample], failure: ValueError | None, world: int) -> list[Sample]:
    """The samples of all ranks in item order. ValueError on every rank if any rank failed."""
    by_rank: list[Any] = [(samples, failure and str(failure))]
    if world > 1:
        by_rank *= world
        dist.all_gather_object(by_rank, (samples, failure and str(failure)))
    if failure:
        raise failure
    for rank, (_, reason) in enumerate(by_rank):
        if reason:
            raise ValueError(f"rank {rank} of {world} failed: {reason}")
    return [sample for rank_samples, _ in by_rank for sample in rank_samples]


def output_path(output: Path | None, checkpoint: Path, task: str) -> Path:
    """The results file: --output, else results/<checkpoint>/<task>.json.

    <checkpoint> is the path below checkpoints/, or the folder's name. The folder of --output is
    created; ValueError if --output is a folder itself.
    """
    if output:
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; give a file: {output / task}.json")
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    parts = checkpoint.resolve().parts
    below = parts[parts.index("checkpoints") + 1 :] if "checkpoints" in parts else parts[-1:]
    return Path("results", *below, f"{task}.json")


def print_results(content: dict[str, Any]) -> None:
    """Print one line per metric, notes, and the number of items that were not scored."""
    for name, estimate in content["metrics"].items():
        error = f" +- {estimate['stderr']:.4f}" if estimate["stderr"] is not None else ""
        clean = ((content["clean"] or {}).get("metrics") or {}).get(name)
        chance = content.get("chance", {}).get(name)
        about = [
            *([f"n {estimate['n']:,}"] if estimate.get("n") else []),
            *([f"chance {chance:.4f}"] if chance is not None else []),
            *([f"clean items: {clean['value']:.4f}"] if clean else []),
        ]
        text = f"{content['task']} {name}: {estimate['value']:.4f}{error}"
        print(text + (f"  ({', '.join(about)})" if about else ""))
    if content.get("note"):
        print(f"note: {content['note']}")
    too_long = content["too_long"]
    if too_long["n"]:
        print(
            f"warning: {too_long['n']} items exceed the context of {too_long['context']} tokens "
            "and were not scored"
        )


def main(
    parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace], Eval]
) -> Path | None:
    """Run an evaluation command; rank 0 returns the path of the results file, other ranks None.

    build: makes the evaluation from the parsed flags.
    """
    args = parser.parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        check_checkpoint(args.checkpoint)
        evaluation = build(args)
        output = output_path(args.output, args.checkpoint, evaluation.task)
        model = load_model(args.checkpoint, device, args.dtype, args.batch_size)
        content = evaluate(evaluation, model, output, args.contaminated, rank, world)
        if rank == 0:
            print_results(content)
            print(f"results written to {output}")
            return output
    return None
