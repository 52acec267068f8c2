"""A suite: several evaluations of one checkpoint with one load of the model; what is current is not measured again."""

import argparse
import hashlib
import json
import shlex
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import distributed as dist

from data.manifest import file_hash
from evals import eval_perplexity
from evals.engines import LanguageModel
from evals.run import evaluate, show
from files import write_json

PASSED_ON = (
    "device",
    "dtype",
    "batch_size",
    "contaminated",
    "cache",
    "run_code",
)  # flags that a suite passes on


def parse(name: str, flags: str, suite: argparse.Namespace, data: str | None) -> argparse.Namespace:
    """The flags of one evaluation as its own command would read them, with what was said for the whole suite."""
    parser = _module(name).parser()
    try:
        args = parser.parse_args(["--checkpoint", str(suite.checkpoint), *shlex.split(flags)])
    except (SystemExit, ValueError) as error:  # ValueError: a quote that does not end
        raise ValueError(f"the suite's flags for {name} are not understood: {flags}") from error
    for flag in PASSED_ON:
        if getattr(suite, flag, None) is not None:
            setattr(args, flag, getattr(suite, flag))
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
    """The results of one evaluation (on rank 0); read from `output` where it has been measured with all the same.

    {"not_measured": why}, on every rank, where its data are missing or it cannot be measured on this model.
    """
    try:
        if name == "perplexity":
            asked = _hash(name, model.hash, model.dtype, eval_perplexity.asked(args))
        else:
            evaluation = _module(name).build(args)
            items = [(item.id, item.row, item.subject) for item in evaluation.items]
            judge = (evaluation.judge.name, evaluation.judge.hash) if evaluation.judge else None
            what = (
                evaluation.task,
                evaluation.version,
                evaluation.shots,
                evaluation.seed,
                evaluation.about,
                model.context,
            )
            report = (
                file_hash(args.contaminated)
                if args.contaminated and args.contaminated.is_file()
                else None
            )
            asked = _hash(model.hash, model.dtype, what, items, report, judge)
        why = None
    except ValueError as error:
        asked, why = "", str(error)
    why = next((said for said in _gather(why, world) if said), None)
    if why is not None:
        return {"not_measured": why}
    if _first(_current(output, asked), world):
        return json.loads(output.read_text(encoding="utf-8")) if rank == 0 else {}
    try:
        if name == "perplexity":
            args.output = None
            found = eval_perplexity.measure(args, model, rank, world)
            if rank == 0:
                write_json(output, {**found, "asked": asked})
        else:
            evaluation = replace(evaluation, about={**evaluation.about, "asked": asked})
            found = evaluate(evaluation, model, output, args.contaminated, rank, world)
    except ValueError as error:  # on all ranks, or when all have given their answers
        found = {"not_measured": str(error)}
    why = _first(found.get("not_measured"), world)
    return {"not_measured": why} if why else found


def tell(name: str, found: dict[str, Any]) -> None:
    """One line a metric."""
    if "not_measured" in found:
        print(f"warning: {name} was not measured: {found['not_measured']}", flush=True)
    else:
        eval_perplexity.show(found) if name == "perplexity" else show(found)


def _module(name: str) -> ModuleType:
    if not name.isidentifier() or find_spec(f"evals.eval_{name}") is None:
        known = ", ".join(
            sorted(
                path.stem.removeprefix("eval_") for path in Path(__file__).parent.glob("eval_*.py")
            )
        )
        raise ValueError(f"there is no evaluation {name!r}; there are {known}")
    return import_module(f"evals.eval_{name}")


def _current(output: Path, asked: str) -> bool:
    try:
        return json.loads(output.read_text(encoding="utf-8")).get("asked") == asked
    except (OSError, ValueError):
        return False


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _first(value: Any, world: int) -> Any:
    """What rank 0 says, on all ranks."""
    return _gather(value, world)[0]


def _gather(value: Any, world: int) -> list[Any]:
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values
