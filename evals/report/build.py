"""Report on a checkpoint: results as JSON, a comparison table, samples and one HTML page.

python -m evals.report --checkpoint checkpoints/quickstart/dpo --logs logs/quickstart

Collects every result under --results that was measured on this checkpoint (matched by hash) and
the logs and gates of its run, and generates samples. Writes benchmark_results.json,
comparison_table.md, qualitative_samples.txt and report.html to --output_dir. The page contains only
the JSON's data and needs no network. With --plan, the table starts with the plan's targets and the
tier that each score reaches.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cli import CommandParser, int_at_least, user_errors
from data.manifest import file_hash, read_json
from evals.engines import load_model
from evals.eval_needle import grid
from evals.report.metric_names import COLUMNS
from evals.report.page import items, page
from evals.report.samples import as_text, samples
from evals.report.stages import stages
from evals.report.targets import judged_hash, markdown, read_targets, stage_folder, table
from evals.report.trained import training
from files import read_object, write_text
from machine import add_device
from models.hf import read_config, resolve_checkpoint
from training.planning.gates import by_name

PUBLISHED = Path(__file__).with_name("published.yaml")
OUT_OF_TEN = ("mt_bench",)


def measured(
    results: Path, checkpoint_hash: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results of a checkpoint by task, and {evaluation: reason} of those not measured.

    Of several results of a task, one that a plan's decision recorded is used; without one, the one
    with the most sources of text, then with the most items; of equals, the newest. Perplexity of
    text that is not the run's counts only if the plan recorded it.
    """
    by_task: dict[str, dict[str, Any]] = {}
    ranks: dict[str, tuple[bool, int, int]] = {}
    missing: dict[str, str] = {}
    for path in sorted(results.rglob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # another file, or a file being written
        if not isinstance(content, dict) or "task" not in content:
            continue
        if content.get("checkpoint_hash") != checkpoint_hash:
            continue
        task = content["task"]
        if "not_measured" in content:  # a suite's summary; each evaluation has its own file
            missing |= content["not_measured"]
            continue
        is_recorded = _is_recorded(path, content)
        rank = (is_recorded, len(content.get("coverage") or ()), content.get("n") or 0)
        counts = is_recorded or not content.get("foreign_text")
        if counts and rank >= ranks.get(task, rank):
            by_task[task], ranks[task] = {**content, "file": str(path)}, rank
    return by_task, {name: reason for name, reason in missing.items() if name not in by_task}


def _is_recorded(path: Path, content: dict[str, Any]) -> bool:
    """Did a plan's decision in the same folder record the metrics of a results file?"""
    recorded = (read_object(path.with_name("decision.json")) or {}).get("metrics") or {}
    names = (path.stem, content["task"])  # of an evaluation in the plan, and in a suite
    metrics = content.get("metrics") or {}
    return any(recorded | by_name(name, metrics) == recorded for name in names)


def contamination(path: Path) -> dict[str, Any]:
    """Per test set: items, items too short to search for, and items and training documents hit."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        sets = {}
        for name, items in report["settings"]["test_sets"].items():
            hits = [
                (document, hit)
                for document, document_hits in report["documents"].items()
                for hit in document_hits
                if hit["test_set"] == name
            ]
            sets[name] = {
                "items": items,
                "too_short": len(report["too_short"].get(name, [])),
                "items_hit": len({hit["test_id"] for _, hit in hits}),
                "documents_hit": len({document for document, _ in hits}),
            }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a contamination report; give one of scripts.prepare_data"
        ) from error
    return {"file": str(path), "sets": sets}


def needle(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per needle kind: lengths, depths and the mean accuracy of each "length/depth" cell."""
    if "needle" not in evaluations:
        return {}
    samples = Path(evaluations["needle"]["file"]).with_name(evaluations["needle"]["samples"])
    return {
        kind: {
            "lengths": sorted({length for length, _ in tests_by_cell}),
            "depths": sorted({depth for _, depth in tests_by_cell}),
            "cells": {
                f"{length}/{depth}": sum(tests) / len(tests)
                for (length, depth), tests in tests_by_cell.items()
            },
            "tests": {f"{a}/{b}": len(tests) for (a, b), tests in tests_by_cell.items()},
            "n": sum(map(len, tests_by_cell.values())),
        }
        for kind, tests_by_cell in (grid(samples) if samples.is_file() else {}).items()
    }


def scores(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Our model's value, standard error, shots and n per column, in the table's units."""
    by_column = {}
    for column, (_, task, metric, _) in COLUMNS.items():
        estimate = evaluations.get(task, {}).get("metrics", {}).get(metric)
        if estimate and estimate["value"] is not None:
            scale = 1 if column in OUT_OF_TEN else 100
            error = estimate["stderr"] and estimate["stderr"] * scale
            result = evaluations[task]
            test_set = result.get(column)  # the sets of one task may differ in shots
            shots = (test_set if isinstance(test_set, dict) else {}).get(
                "shots", result.get("shots")
            )
            by_column[column] = {
                "value": estimate["value"] * scale,
                "stderr": error,
                "task": task,
                "metric": metric,
                "shots": shots,
                "n": items(result, metric),
            }
    return by_column


def results_table(
    plan: Path,
    results: Path,
    evaluations: dict[str, dict[str, Any]],
    trained: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Rows of a plan's targets with measured scores.

    evaluations: of the report's checkpoint. trained: the value of training().
    """
    phases = trained["phases"] if trained else []

    def measured_after(stage: str) -> dict[str, dict[str, Any]]:
        if stage == "final":
            return evaluations
        folder = results / stage_folder(stage, phases)
        digest = judged_hash(folder, stage)
        return measured(folder, digest)[0] if digest else {}

    return table(read_targets(plan), measured_after)


def published() -> dict[str, Any]:
    """Published models from published.yaml, each score as {value, shots}."""
    content = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    for model in content["models"]:
        default = model["from"]["shots"]
        pairs = {
            name: score if isinstance(score, list) else [score, default]
            for name, score in model["scores"].items()
        }
        model["scores"] = {
            name: {"value": value, "shots": shots} for name, (value, shots) in pairs.items()
        }
    return content


TARGETS_NOTE = (
    "Status is the highest tier that the value reaches. A value within one standard error of a\n"
    "tier's border may belong to the neighbouring tier."
)


def comparison(report: dict[str, Any]) -> str:
    """comparison_table.md: targets with measured scores, then our scores beside published ones.

    Each published row has one source and harness; each cell states its shots.
    """
    columns = {name: heading for name, (heading, *_) in COLUMNS.items()}
    head = ["Model", "Tokens", *columns.values(), "Harness", "Metric", "Source"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(columns) + "---|---|---|"]
    scored = {name: _cell(score) for name, score in report["scores"].items()}
    tokens = f"{report['training']['tokens']:,}" if report.get("training") else "?"
    row = ["**" + report["name"] + "**", tokens, *(scored.get(name, "-") for name in columns)]
    row += ["ours, as lm-eval 0.4.13", "acc_norm; MMLU acc; TruthfulQA mc2", "this run"]
    lines.append("| " + " | ".join(row) + " |")
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
        "Percent. Brackets give the shots (`?` if the source does not state them) and our n; ± is\n"
        "one standard error. Scores of one model differ by 15 to 30 points between harnesses,\n"
        "prompts and shots: compare only rows that agree in those.\n"
    )
    heading = f"{'##' if targets else '#'} {report['name']} beside published models"
    return f"{targets}{heading}\n\n{note}\n" + "\n".join(lines) + "\n"


def _cell(score: dict[str, Any]) -> str:
    error = f" ± {score['stderr']:.1f}" if score.get("stderr") is not None else ""
    # Published values keep their digits.
    value = f"{score['value']:.1f}" if "n" in score else f"{score['value']:g}"
    n = f", n {score['n']:,}" if score.get("n") is not None else ""
    return f"{value}{error} ({score['shots']}{n})"


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the content of the report as JSON values."""
    if args.checkpoint.is_file():
        raise ValueError(f"{args.checkpoint} is a file; give a checkpoint folder")
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
        "active_parameters": _active_parameters(args.checkpoint),
        "targets": results_table(args.plan, args.results, evaluations, trained)
        if args.plan
        else [],
        "scores": scores(evaluations),
        "evaluations": evaluations,
        "not_measured": missing,
        "needle": needle(evaluations),
        "training": trained,
        "stages": stages(args.results, trained["phases"] if trained else ()),
        "contamination": contamination(args.contaminated) if args.contaminated else None,
        "samples": samples(model, args.checkpoint, args.prompt, args.max_new_tokens),
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
    """Number of parameters; a tied head counts once."""
    from safetensors import safe_open

    count = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            count += sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)
    return count


def _active_parameters(checkpoint: Path) -> int | None:
    """Number of parameters that a token uses, of a mixture of experts; None of other models."""
    try:
        config = read_config(checkpoint)
    except ValueError:  # a model that transformers runs
        return None
    return config.num_active_parameters if config.kind == "moe" else None


def texts(report: dict[str, Any]) -> dict[str, str]:
    """File name -> content of the four files. All are derived from the JSON content."""
    content = json.dumps(finite(report), indent=1) + "\n"
    report = json.loads(content)
    written = [as_text(sample) for sample in report["samples"]]
    header = (
        f"{report['name']}, {report['checkpoint']}, {report['made']}. "
        "Brackets enclose the generated text.\n\n"
    )
    return {
        "benchmark_results.json": content,
        "comparison_table.md": comparison(report),
        "qualitative_samples.txt": header + "\n".join(written),
        "report.html": page(
            report, {name: (heading, chance) for name, (heading, _, _, chance) in COLUMNS.items()}
        ),
    }


def write(report: dict[str, Any], output: Path) -> list[Path]:
    """Write the four files to `output`; return their paths."""
    output.mkdir(parents=True, exist_ok=True)
    files = texts(report)
    for name, text in files.items():
        write_text(output / name, text)
    return [output / name for name in files]


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=resolve_checkpoint)
    parser.add_argument("--name", help="model name (default: the checkpoint's)")
    parser.add_argument(
        "--logs", type=Path, help="logs/<run>, for loss curves, gates and environment"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="folder to search for results of this checkpoint",
    )
    parser.add_argument("--plan", type=Path, help="a plan with targets to compare the scores with")
    parser.add_argument(
        "--contaminated", type=Path, help="report of scripts.prepare_data or scripts.decontaminate"
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="prompts of the samples; user messages for a chat model (default: built-in ones)",
    )
    parser.add_argument("--max_new_tokens", type=int_at_least(1), default=60)
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    args = parser.parse_args()
    with user_errors():
        for path in write(build(args), args.output_dir):
            print(f"written to {path}")


if __name__ == "__main__":
    main()
