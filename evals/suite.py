"""Runs several evaluations of one checkpoint with one model load; reuses current results."""

import argparse
import hashlib
import json
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import distributed as dist

from data.manifest import file_hash
from evals import eval_own, eval_perplexity
from evals.engines import LanguageModel
from evals.run import evaluate, print_results
from files import write_json

# Flags of the suite that override those of each evaluation.
SHARED_FLAGS = ("device", "dtype", "batch_size", "contaminated", "cache", "run_code")


def parse(name: str, flags: str, suite: argparse.Namespace, data: str | None) -> argparse.Namespace:
    """Parse the flags of one evaluation, then apply the flags of the whole suite.

    The smaller --limit applies. ValueError if the evaluation or a flag is unknown.
    """
    parser = _module(name, flags).parser()
    try:
        args = parser.parse_args(["--checkpoint", str(suite.checkpoint), *shlex.split(flags)])
    except (SystemExit, ValueError) as error:  # ValueError: a quote that does not end
        raise ValueError(f"the suite's flags for {name} are invalid: {flags}") from error
    for flag in SHARED_FLAGS:
        if getattr(suite, flag, None) is not None:
            setattr(args, flag, getattr(suite, flag))
    if is_own(args) and (defined := eval_own.definition(args.config).name) != name:
        raise ValueError(f"the suite lists {args.config} as {name}, but its name is {defined}")
    args.data = data or args.data
    if data and hasattr(args, "dataset"):
        args.dataset = data
    limits = [limit for limit in (args.limit, suite.limit) if limit is not None]
    args.limit = min(limits, default=None)
    return args


def measure(
    name: str,
    args: argparse.Namespace,
    model: LanguageModel,
    output: Path,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """The results of one evaluation, on rank 0; other ranks return {}.

    `output` is reused if it was measured with the same model, data and settings. Returns
    {"not_measured": reason} on every rank if data are missing or the model cannot be evaluated.
    """
    try:
        if name == "perplexity":
            fingerprint = _hash(name, model.hash, model.dtype, eval_perplexity.inputs(args))
        else:
            evaluation = (eval_own if is_own(args) else _module(name)).build(args)
            items = [(item.id, item.row, item.subject) for item in evaluation.items]
            judge = (evaluation.judge.name, evaluation.judge.hash) if evaluation.judge else None
            settings = (
                evaluation.task,
                evaluation.version,
                evaluation.shots,
                evaluation.seed,
                evaluation.metadata,
                model.context,
            )
            report_hash = (
                file_hash(args.contaminated)
                if args.contaminated and args.contaminated.is_file()
                else None
            )
            fingerprint = _hash(model.hash, model.dtype, settings, items, report_hash, judge)
        reason = None
    except ValueError as error:
        fingerprint, reason = "", str(error)
    reason = next((message for message in _gather(reason, world) if message), None)
    if reason is not None:
        return {"not_measured": reason}
    if _from_rank0(_is_current(output, fingerprint), world):
        return json.loads(output.read_text(encoding="utf-8")) if rank == 0 else {}
    try:
        if name == "perplexity":
            args.output = None
            content = eval_perplexity.measure(args, model, rank, world)
            if rank == 0:
                write_json(output, {**content, "asked": fingerprint})
        else:
            metadata = {**evaluation.metadata, "asked": fingerprint}
            evaluation = replace(evaluation, metadata=metadata)
            content = evaluate(evaluation, model, output, args.contaminated, rank, world)
    except ValueError as error:  # raised on all ranks, or on rank 0 after the last collective
        content = {"not_measured": str(error)}
    reason = _from_rank0(content.get("not_measured"), world)
    return {"not_measured": reason} if reason else content


def report(name: str, content: dict[str, Any]) -> None:
    """Print one line per metric, or the reason why the evaluation was not measured."""
    if "not_measured" in content:
        print(f"warning: {name} was not measured: {content['not_measured']}", flush=True)
    elif name == "perplexity":
        eval_perplexity.print_results(content)
    else:
        print_results(content)


def is_own(args: argparse.Namespace) -> bool:
    """Are these the flags of an evaluation that the user defines in a file?"""
    return hasattr(args, "config")


def _module(name: str, flags: str = "") -> ModuleType:
    known = eval_own.built_in_names()
    if name in known:
        return import_module(f"evals.eval_{name}")
    if flags.startswith("--config "):
        return eval_own
    raise ValueError(
        f"unknown evaluation {name!r}; available: {', '.join(known)}, and the .yaml file of an "
        "evaluation of your own"
    )


def _is_current(output: Path, fingerprint: str) -> bool:
    try:
        return json.loads(output.read_text(encoding="utf-8")).get("asked") == fingerprint
    except (OSError, ValueError):
        return False


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _from_rank0(value: Any, world: int) -> Any:
    """Broadcast rank 0's value to all ranks."""
    return _gather(value, world)[0]


def _gather(value: Any, world: int) -> list[Any]:
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values
