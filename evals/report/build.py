"""What a checkpoint is worth, in one place: figures as JSON, a table beside published models, samples, and one HTML page.

python -m evals.report --checkpoint checkpoints/quickstart/gold/step_430 --logs logs/quickstart

Takes every result under --results that was measured on this very checkpoint (by its hash), the run's logs and gates, and lets the
model write. Leaves benchmark_results.json, comparison_table.md, qualitative_samples.txt and report.html in --output; the page
is made of the JSON alone, needs no network, and can be sent to somebody as it is. --plan: the table begins with the plan's
targets, and which of their tiers each score reaches.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cli import CommandParser, at_least, user_errors
from data.manifest import file_hash, read_json
from evals.engines import LanguageModel, load_model
from evals.eval_needle import grid
from evals.harness import Write
from evals.report.page import count, page
from evals.report.targets import judged, markdown, place_of, read_targets, table
from evals.report.trained import training
from files import write_text
from models.hf import newest_step

PUBLISHED = Path(__file__).with_name("published.yaml")
COLUMNS = {  # column -> (heading, task, metric, chance in percent)
    "mmlu": ("MMLU", "mmlu", "acc", 25.0),
    "gsm8k": ("GSM8K", "gsm8k", "flexible", 0.0),
    "hellaswag": ("HellaSwag", "hellaswag", "acc_norm", 25.0),
    "arc_challenge": ("ARC challenge", "arc", "challenge_acc_norm", 25.0),
    "arc_mean": ("ARC, both parts", "", "", 25.0),
    "piqa": ("PIQA", "choice", "piqa_acc_norm", 50.0),
    "winogrande": ("WinoGrande", "choice", "winogrande_acc", 50.0),
    "boolq": ("BoolQ", "choice", "boolq_acc", 50.0),
    "openbookqa": ("OpenBookQA", "choice", "openbookqa_acc_norm", 25.0),
    "sciq": ("SciQ", "choice", "sciq_acc_norm", 25.0),
    "siqa": ("SIQA", "choice", "siqa_acc", 33.3),
    "commonsense_qa": ("CommonsenseQA", "choice", "commonsense_qa_acc", 20.0),
    "lambada": ("LAMBADA", "lambada", "acc", 0.0),
    "triviaqa": ("TriviaQA", "open_qa", "triviaqa_exact_match", 0.0),
    "nq_open": ("Natural Questions", "open_qa", "nq_open_exact_match", 0.0),
    "humaneval": ("HumanEval", "code", "humaneval_pass@1", 0.0),
    "mbpp": ("MBPP", "code", "mbpp_pass@1", 0.0),
    "ifeval": ("IFEval", "ifeval", "prompt_level_strict_acc", 0.0),
    "truthfulqa": ("TruthfulQA", "truthfulqa", "mc2", None),
    "mt_bench": ("MT-bench, of 10", "mt_bench", "score", None),
}
OUT_OF_TEN = ("mt_bench",)
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "Once upon a time, in a village by the sea,",
    "Question: If a train travels 60 miles in an hour, how far does it travel in three hours?\nAnswer:",
    "The three most important inventions of the nineteenth century were",
    "def fibonacci(n):",
)


def measured(
    results: Path, checkpoint_hash: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Task -> its results on this checkpoint, of the largest number of items, the newest of equals; and what was not measured."""
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for path in sorted(results.rglob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # not ours, or being written
        if (
            not isinstance(read, dict)
            or read.get("checkpoint_hash") != checkpoint_hash
            or "task" not in read
        ):
            continue
        if "not_measured" in read:  # a suite's summary; its evaluations have files of their own
            missing |= read["not_measured"]
        elif (read.get("n") or 0) >= (found.get(read["task"], {}).get("n") or 0):
            found[read["task"]] = {**read, "file": str(path)}
    return found, {name: why for name, why in missing.items() if name not in found}


STAGE_METRICS = (
    "bits_per_byte",
    "acc",
    "acc_norm",
    "choice",
    "preferred",
    "accuracy",
    "strict",
    "flexible",
    "mc2",
)  # their ends


def stages(results: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Place -> metric -> value and stderr, of the places that scripts/pipeline.py judged, as the model went through them."""
    decisions = sorted(results.glob("*/decision.json"), key=lambda path: path.stat().st_mtime)
    found = {}
    for path in decisions:
        metrics = dict(leaves(json.loads(path.read_text(encoding="utf-8")).get("metrics", {})))
        tokens = {
            name.removesuffix("tokens"): {"tokens": value["value"]}
            for name, value in metrics.items()
            if "tokens" in name
        }
        found[path.parent.name] = {
            name: {**estimate, **tokens.get(name.rpartition(".")[0] + ".", {})}
            for name, estimate in metrics.items()
            if name.endswith(STAGE_METRICS)
        }
    return found


def leaves(
    metrics: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Dotted name and estimate (value, stderr, n where it is known) of each number in nested metrics."""
    for name, value in metrics.items():
        if isinstance(value, dict) and "value" in value:
            yield prefix + name, {"stderr": None, **value}
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield prefix + name, {"value": value, "stderr": None}


def contamination(path: Path) -> dict[str, Any]:
    """Per test set: items, how many were too short to be looked for, items and training documents hit."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        sets = {}
        for name, items in read["settings"]["test_sets"].items():
            hits = [
                (document, hit)
                for document, found in read["documents"].items()
                for hit in found
                if hit["test_set"] == name
            ]
            sets[name] = {
                "items": items,
                "too_short": len(read["too_short"].get(name, [])),
                "items_hit": len({hit["test_id"] for _, hit in hits}),
                "documents_hit": len({document for document, _ in hits}),
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a contamination report; give what scripts.prepare_data wrote"
        ) from error
    return {"file": str(path), "sets": sets}


def samples(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """What the model makes of prompts: greedy, and one draw at temperature 0.8."""
    requests = [
        Write(prompt, max_tokens=tokens, temperature=t, top_p=0.95)
        for prompt in prompts
        for t in (0.0, 0.8)
    ]
    answers: dict[int, Any] = {i: answer for batch in model.answer(requests) for i, answer in batch}
    return [
        {
            "prompt": request.prompt,
            "temperature": request.temperature,
            "text": getattr(answers[i], "text", None),
        }
        for i, request in enumerate(requests)
    ]


def needle(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Kind -> lengths, depths and the mean accuracy of each cell, "length/depth", out of eval_needle's samples."""
    if "needle" not in evaluations:
        return {}
    samples = Path(evaluations["needle"]["file"]).with_name(evaluations["needle"]["samples"])
    return {
        kind: {
            "lengths": sorted({length for length, _ in of_kind}),
            "depths": sorted({depth for _, depth in of_kind}),
            "cells": {
                f"{length}/{depth}": sum(tests) / len(tests)
                for (length, depth), tests in of_kind.items()
            },
            "n": sum(map(len, of_kind.values())),
        }
        for kind, of_kind in (grid(samples) if samples.is_file() else {}).items()
    }


def scores(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Column -> value, standard error and shots of our own model, in the units of the published table."""
    found = {}
    for column, (_, task, metric, _) in COLUMNS.items():
        estimate = evaluations.get(task, {}).get("metrics", {}).get(metric)
        if estimate and estimate["value"] is not None:
            scale = 1 if column in OUT_OF_TEN else 100
            error = estimate["stderr"] and estimate["stderr"] * scale
            result = evaluations[task]
            of_set = result.get(column)  # of a task of several sets, which may differ in shots
            shots = (
                of_set["shots"]
                if isinstance(of_set, dict) and "shots" in of_set
                else result.get("shots")
            )
            of = {"task": task, "metric": metric, "shots": shots, "n": count(result, metric)}
            found[column] = {"value": estimate["value"] * scale, "stderr": error, **of}
    return found


def results_table(
    plan: Path,
    results: Path,
    evaluations: dict[str, dict[str, Any]],
    trained: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """The targets of a plan with what was measured. evaluations: of the report's checkpoint; trained: by training()."""
    phases = trained["phases"] if trained else []

    def measured_after(stage: str) -> dict[str, dict[str, Any]]:
        if stage == "final":
            return evaluations
        folder = results / place_of(stage, phases)
        digest = judged(folder, stage)
        return measured(folder, digest)[0] if digest else {}

    return table(read_targets(plan), measured_after)


def published() -> dict[str, Any]:
    """Scores of others: models as in published.yaml, each score as {value, shots}."""
    read = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    for model in read["models"]:
        default = model["from"]["shots"]
        pairs = {
            name: score if isinstance(score, list) else [score, default]
            for name, score in model["scores"].items()
        }
        model["scores"] = {
            name: {"value": value, "shots": shots} for name, (value, shots) in pairs.items()
        }
    return read


TARGETS_NOTE = (
    "Status is the highest tier that the value reaches. A value within one standard error of a border could as well lie on\n"
    "its other side."
)


def comparison(report: dict[str, Any]) -> str:
    """comparison_table.md: the targets and what was reached, then our scores beside published ones.

    Each row of published scores is of one source and harness; each cell says its shots.
    """
    columns = {name: heading for name, (heading, *_) in COLUMNS.items()}
    head = ["Model", "Tokens", *columns.values(), "Harness", "Metric", "Source"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(columns) + "---|---|---|"]
    own = {name: _cell(score) for name, score in report["scores"].items()}
    tokens = f"{report['training']['tokens']:,}" if report.get("training") else "?"
    ours = ["**" + report["name"] + "**", tokens, *(own.get(name, "-") for name in columns)]
    lines.append(
        "| "
        + " | ".join(
            [*ours, "ours, as lm-eval 0.4.13", "acc_norm; MMLU acc; TruthfulQA mc2", "this run"]
        )
        + " |"
    )
    for model in report["published"]["models"]:
        cells = [
            _cell(model["scores"][name]) if name in model["scores"] else "-" for name in columns
        ]
        source = report["published"]["sources"][model["from"]["source"]]
        link = f"[{source['title']}]({source['url']})"
        by = [model["from"]["harness"], model["from"]["metric"], link]
        lines.append("| " + " | ".join([model["name"], model["tokens"], *cells, *by]) + " |")
    targets = ""
    if report["targets"]:
        targets = (
            f"# Results of {report['name']}\n\n{TARGETS_NOTE}\n\n{markdown(report['targets'])}\n"
        )
    note = (
        "Percent; in brackets the shots, `?` where the source does not say, and our n. ± is one standard error. The same\n"
        "model moves by 15 to 30 points between harnesses, prompts and shots: compare rows only where those agree.\n"
    )
    heading = f"{'##' if targets else '#'} {report['name']} beside published models"
    return f"{targets}{heading}\n\n{note}\n" + "\n".join(lines) + "\n"


def _cell(score: dict[str, Any]) -> str:
    error = f" ± {score['stderr']:.1f}" if score.get("stderr") is not None else ""
    value = (
        f"{score['value']:.1f}" if "n" in score else f"{score['value']:g}"
    )  # others' as they are published
    n = f", n {score['n']:,}" if score.get("n") is not None else ""
    return f"{value}{error} ({score['shots']}{n})"


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report shows, as plain JSON."""
    if args.checkpoint.is_file():
        raise ValueError(f"{args.checkpoint} is a file; a report is made of a checkpoint folder")
    model = load_model(args.checkpoint, args.device, args.dtype)
    evaluations, missing = measured(args.results, model.hash)
    trained = training(args.logs, args.checkpoint) if args.logs else None
    return {
        "name": args.name or args.checkpoint.name,
        "checkpoint": str(args.checkpoint),
        "checkpoint_hash": model.hash,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "config": read_json(args.checkpoint / "config.json"),
        "parameters": _parameters(args.checkpoint),
        "targets": results_table(args.plan, args.results, evaluations, trained)
        if args.plan
        else [],
        "scores": scores(evaluations),
        "evaluations": evaluations,
        "not_measured": missing,
        "needle": needle(evaluations),
        "training": trained,
        "stages": stages(args.results),
        "contamination": contamination(args.contaminated) if args.contaminated else None,
        "samples": samples(model, args.prompt, args.max_new_tokens),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.platform(),
            "device": torch.cuda.get_device_name()
            if args.device.startswith("cuda")
            else args.device,
            "dtype": model.dtype,
        },
        "hashes": {
            path.name: file_hash(path)
            for path in sorted(args.checkpoint.iterdir())
            if path.suffix in (".safetensors", ".json")
        },
        "published": published(),
    }


def _parameters(checkpoint: Path) -> int:
    """Numbers in the weights, a tied head once."""
    from safetensors import safe_open

    count = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118 - no mapping
    return count


def texts(report: dict[str, Any]) -> dict[str, str]:
    """The four files by their names. All but the first are made from the first alone."""
    content = json.dumps(finite(report), indent=1) + "\n"
    report = json.loads(content)
    written = [
        f"{s['prompt']}[{s['text']}]\n(temperature {s['temperature']})\n" for s in report["samples"]
    ]
    about = f"{report['name']}, {report['checkpoint']}, {report['made']}. In brackets what the model wrote.\n\n"
    return {
        "benchmark_results.json": content,
        "comparison_table.md": comparison(report),
        "qualitative_samples.txt": about + "\n".join(written),
        "report.html": page(
            report, {name: (heading, chance) for name, (heading, _, _, chance) in COLUMNS.items()}
        ),
    }


def write(report: dict[str, Any], output: Path) -> list[Path]:
    """The four files, in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    files = texts(report)
    for name, text in files.items():
        write_text(output / name, text)
    return [output / name for name in files]


def finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=newest_step)
    parser.add_argument("--name", help="of the model (default: the checkpoint's)")
    parser.add_argument("--logs", type=Path, help="logs/<run>: loss curves, gates, environment")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="where results of this checkpoint are looked for",
    )
    parser.add_argument(
        "--plan", type=Path, help="a plan, whose targets the scores are compared with"
    )
    parser.add_argument(
        "--contaminated", type=Path, help="report of scripts.prepare_data or scripts.decontaminate"
    )
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="what the model continues")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    with user_errors():
        for path in write(build(args), args.output):
            print(f"written to {path}")


if __name__ == "__main__":
    main()
