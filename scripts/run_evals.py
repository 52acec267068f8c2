"""Evaluate a checkpoint with a suite of evaluations, loading the model once; optionally judge it.

python -m scripts.run_evals --checkpoint checkpoints/quickstart/gold --suite quick
python -m scripts.launch --nproc_per_node=2 -m scripts.run_evals \\
    --checkpoint checkpoints/quickstart/dpo --suite configs/quickstart/suite.yaml
python -m scripts.run_evals --checkpoint checkpoints/quickstart/gold \\
    --suite configs/quickstart/suite.yaml --gates configs/quickstart/plan.yaml

A suite is configs/evals/<suite>.yaml: names of evaluations, each with its flags. --suite also
accepts the file of your own evaluation (docs/own_evaluation.md), and a suite may list such files.
Run the same command again to resume a killed suite; current results are reused. The checkpoint is
only read, so training may continue meanwhile. An evaluation that fails is reported, and the others
continue; a gate on it is a no-go. A gate with `against` compares with the results of that stage's
newest checkpoint under results/. Exit status 3: a gate says no-go.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from cli import user_errors
from evals.engines import check_checkpoint, load_model
from evals.plan_gates import gates_of, references, verdict_record
from evals.run import output_path, ranks
from evals.suite import measure, parse, report
from evals.suite_config import Suite, open_suite, suite_parser
from files import write_json
from training.planning.gates import by_name, decide, judge

NO_GO = 3


def main() -> None:
    args = suite_parser(__doc__).parse_args()
    with ranks(args.device) as (rank, world, device), user_errors(rank, world):
        args.device = device
        check_checkpoint(args.checkpoint)
        suite, path = open_suite(args.suite)
        gates = gates_of(args.gates, args.checkpoint, args.at) if args.gates else ()
        earlier = references(gates, args.gates, args.checkpoint, args.at)
        data = dict(_data_path(text, suite) for text in args.data)
        parsed = {
            name: parse(name, flags, args, data.get(name)) for name, flags in suite.evals.items()
        }
        # An evaluation of the same name writes its results to <name>.json.
        name = f"{path.stem}.suite" if path.stem in parsed else path.stem
        output = output_path(args.output, args.checkpoint, name)
        summary = run(name, parsed, args, output, rank, world)
        verdicts = [
            judge(gate, summary["metrics"], reference)
            for gate, reference in zip(gates, earlier, strict=True)
        ]
        if rank == 0:
            summary["gates"] = [verdict_record(verdict) for verdict in verdicts]
            summary["outcome"] = decide(verdicts) if verdicts else None
            write_json(output, summary)
            for verdict in verdicts:
                print(f"    {verdict}")
            if verdicts:
                print(f"decision: {summary['outcome'].upper()}")
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
    """Run all evaluations of a suite and write each result beside `output`.

    Returns the summary; its metrics are the same on all ranks.
    """
    model = load_model(args.checkpoint, args.device, args.dtype, args.batch_size or 16)
    summary: dict[str, Any] = {
        "task": name,
        "metrics": {},
        "n": {},
        "not_measured": {},
        "seconds": {},
        "checkpoint": str(args.checkpoint),
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
    }
    for number, (task, flags) in enumerate(parsed.items(), 1):
        if rank == 0:
            print(f"[{number}/{len(parsed)}] {task}", flush=True)
        start = time.monotonic()
        path = output.parent / f"{task}.json"
        if path == output:
            path = output.with_name(f"{task}.results.json")
        results = _broadcast(measure(task, flags, model, path, rank, world), world)
        summary["seconds"][task] = round(time.monotonic() - start, 2)
        if "not_measured" in results:
            summary["not_measured"][task] = results["not_measured"]
        elif clash := summary["metrics"].keys() & by_name(task, results["metrics"]).keys():
            names = ", ".join(sorted(clash))
            raise ValueError(
                f"{task} and another evaluation both have results named {names}; rename one"
            )
        else:
            summary["metrics"] |= by_name(task, results["metrics"])
            summary["n"][task] = results.get("n")
        if rank == 0:
            report(task, results)
    if not summary["metrics"]:
        raise ValueError(
            f"no evaluation of the suite {name} could run: "
            + "; ".join(summary["not_measured"].values())
        )
    return summary


def _broadcast(results: dict[str, Any], world: int) -> dict[str, Any]:
    """Return rank 0's results on all ranks."""
    objects = [results]
    if world > 1:
        torch.distributed.broadcast_object_list(objects)
    return objects[0]


def _data_path(text: str, suite: Suite) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or name not in suite.evals:
        raise ValueError(f"--data {text} must be NAME=PATH with one of {', '.join(suite.evals)}")
    return name, path


if __name__ == "__main__":
    main()
