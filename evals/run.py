"""What the evaluation commands share: flags, ranks, one model load, the results file."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from cli import CommandParser, at_least, user_errors
from evals.engines import check_there, load_model
from evals.harness import (
    Cache,
    Eval,
    Model,
    Sample,
    ask,
    contaminated_ids,
    results,
    write_results,
    write_samples,
)
from models.hf import newest_step


def flags(about: str | None, shots: int | None = 0) -> argparse.ArgumentParser:
    """The flags that every evaluation takes; shots None: it has no few-shot examples."""
    parser = CommandParser(about)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=newest_step,
        help="a step or phase folder, a Hugging Face folder, or a .gguf file",
    )
    parser.add_argument(
        "--data",
        help="local .jsonl in the hub's schema, or a folder of <split>.jsonl (default: see above)",
    )
    parser.add_argument(
        "--limit", type=at_least(1), help="only the first N items (of each subject)"
    )
    parser.add_argument(
        "--output", type=Path, help="results file (default: results/<checkpoint>/<task>.json)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as they are stored)",
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=16, help="items, or prompts, at a time"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the few-shot sample")
    parser.add_argument(
        "--contaminated",
        type=Path,
        help="report of scripts.decontaminate or scripts.prepare_data: scores of clean items",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("data/store/wheels"),
        help="where downloaded test sets are kept",
    )
    if shots is not None:
        parser.add_argument(
            "--shots",
            type=at_least(0),
            default=shots,
            help="solved examples before each question (default: %(default)s)",
        )
    return parser


@contextmanager
def ranks(device: str) -> Iterator[tuple[int, int, str]]:
    """Rank, number of ranks and device: of torchrun, where it started this process. Ranks exchange samples only, over gloo."""
    if not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    dist.init_process_group("gloo")
    try:
        local = f"cuda:{dist.get_node_local_rank()}" if device == "cuda" else device
        yield dist.get_rank(), dist.get_world_size(), local
    finally:
        dist.destroy_process_group()


def evaluate(
    evaluation: Eval,
    model: Model,
    output: Path | None,
    contaminated: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Run an evaluation on this rank's part of its items; the results (on rank 0, where they are also written)."""
    kept = output.parent / "answers" if output else None
    judged = Cache(kept, evaluation.judge, rank) if evaluation.judge else None
    mine = slice(len(evaluation.items) * rank // world, len(evaluation.items) * (rank + 1) // world)
    samples, failure = list[Sample](), None
    try:
        items, kept_answers = evaluation.items[mine], Cache(kept, model, rank)
        samples = ask(
            items, evaluation.score, model, kept_answers, rank == 0, evaluation.judge, judged
        )
    except ValueError as error:
        failure = error
    samples = _gather(samples, failure, world)
    found: dict[str, Any] = {}
    if rank == 0:
        ids = (
            contaminated_ids(contaminated, evaluation.test_set or evaluation.task)
            if contaminated
            else None
        )
        failed = [sample.failed for sample in samples if sample.failed]
        if failed:  # scores of a part are no results
            if output:
                output.unlink(missing_ok=True)
                write_samples(output, samples)
            assert evaluation.judge is not None
            raise ValueError(
                f"{evaluation.judge.name} did not judge {len(failed)} of {len(samples)} items of {evaluation.task} "
                f"({failed[0]}); what the model wrote is kept"
                + (f" beside {output}" if output else "")
                + "; the same command again asks only for what is missing"
            )
        found = results(evaluation, samples, model, ids)
        if output:
            write_results(output, found, samples)
    return found


def _gather(samples: list[Sample], failure: ValueError | None, world: int) -> list[Sample]:
    """The samples of all ranks; where one failed, all of them do."""
    parts: list[Any] = [(samples, failure and str(failure))]
    if world > 1:
        parts *= world
        dist.all_gather_object(parts, (samples, failure and str(failure)))
    if failure:
        raise failure
    for number, (_, why) in enumerate(parts):
        if why:
            raise ValueError(f"rank {number} of {world} could not go on: {why}")
    return [sample for part, _ in parts for sample in part]


def output_of(given: Path | None, checkpoint: Path, task: str) -> Path:
    """The results file, --output or results/<checkpoint's path below checkpoints/, else its name>/<task>.json; it can be made."""
    if given:
        if given.is_dir():
            raise ValueError(
                f"--output {given} is a folder; name a file in it, such as {given / task}.json"
            )
        given.parent.mkdir(parents=True, exist_ok=True)
        return given
    parts = checkpoint.resolve().parts
    below = parts[parts.index("checkpoints") + 1 :] if "checkpoints" in parts else parts[-1:]
    return Path("results", *below, f"{task}.json")


def show(found: dict[str, Any]) -> None:
    """One line a metric, and what was left out."""
    for name, estimate in found["metrics"].items():
        error = f" +- {estimate['stderr']:.4f}" if estimate["stderr"] is not None else ""
        clean = ((found["clean"] or {}).get("metrics") or {}).get(name)
        print(
            f"{found['task']} {name}: {estimate['value']:.4f}{error}"
            + (f"  (clean items: {clean['value']:.4f})" if clean else "")
        )
    if found.get("note"):
        print(f"note: {found['note']}")
    left = found["too_long"]["n"]
    if left:
        print(
            f"warning: {left} items do not fit the context of {found['too_long']['context']} tokens and were not scored"
        )


def main(
    parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace], Eval]
) -> Path | None:
    """The body of an evaluation command: `build` makes the evaluation out of the flags. The results file, on rank 0."""
    args = parser.parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        check_there(args.checkpoint)
        evaluation = build(args)
        output = output_of(args.output, args.checkpoint, evaluation.task)
        model = load_model(args.checkpoint, device, args.dtype, args.batch_size)
        found = evaluate(evaluation, model, output, args.contaminated, rank, world)
        if rank == 0:
            show(found)
            print(f"written to {output}")
            return output
    return None
