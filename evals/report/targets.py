"""Results table: scores beside the plan's targets and the tier reached (MVP, success, stretch)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli import ROOT
from data.manifest import read_json
from ranges import AnyFloat, NonEmptyText, check, shown
from yaml_file import read_yaml_file

TIERS = ("mvp", "success", "stretch")
LABELS = {"mvp": "MVP", "success": "success", "stretch": "stretch"}
Evaluations = dict[str, dict[str, Any]]  # task -> its results file


def read_targets(plan: Path) -> list[dict[str, Any]]:
    """Read the targets of a plan (training.planning.plan.Target) as dicts with defaults."""
    try:
        content = read_yaml_file(plan if plan.is_file() else ROOT / plan)
    except OSError as error:
        raise ValueError(f"{plan} cannot be read; give the YAML file of a plan") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{plan} must be a plan of key: value lines, not {shown(content)}")
    targets = (content or {}).get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
        raise ValueError(f"{plan}: targets={shown(targets)} must be a list of key: value settings")
    for number, target in enumerate(targets):
        missing = [name for name in ("metric", "title", *TIERS) if name not in target]
        if missing:
            raise ValueError(
                f"{plan}: target {shown(target.get('title', target))} lacks {', '.join(missing)}"
            )
        for name, kind in {
            **dict.fromkeys(TIERS, AnyFloat),
            "metric": NonEmptyText,
            "title": NonEmptyText,
        }.items():
            check(target[name], kind, f"{plan}: targets[{number}].{name}")
    defaults = {"stage": "final", "lower": False, "percent": True, "note": ""}
    return [{**defaults, **target} for target in targets]


def table(
    targets: list[dict[str, Any]], measured_after: Callable[[str], Evaluations]
) -> list[dict[str, Any]]:
    """One row per target: the score with standard error and n, and its status.

    measured_after(stage): evaluations of the stage's last checkpoint; "final" is the report's own.
    """
    return [_row(target, measured_after(target["stage"])) for target in targets]


def _row(target: dict[str, Any], evaluations: Evaluations) -> dict[str, Any]:
    row = {**target, "value": None, "stderr": None, "n": None, "of": None, "shots": None}
    estimate, result = find(evaluations, target["metric"])
    if estimate and result and isinstance(estimate.get("value"), (int, float)):
        siblings = find(evaluations, target["metric"].rpartition(".")[0] + ".tokens")[0]
        row |= {
            "value": estimate["value"],
            "stderr": estimate.get("stderr"),
            "shots": result.get("shots"),
        }
        row |= {"n": int(siblings["value"]), "of": "tokens"} if siblings else {}
        row |= {} if siblings else {"n": estimate.get("n") or result.get("n"), "of": "items"}
    return {**row, **status(target, row["value"], row["stderr"])}


def status(target: dict[str, Any], value: float | None, stderr: float | None) -> dict[str, Any]:
    """{"status", "near"}: the highest tier reached, and the tiers within one standard error."""
    if value is None or value != value:
        return {"status": "not measured", "near": []}
    sign = -1 if target["lower"] else 1
    reached = [tier for tier in TIERS if sign * value >= sign * target[tier]]
    near = [tier for tier in TIERS if stderr and abs(value - target[tier]) <= stderr]
    return {"status": LABELS[reached[-1]] if reached else "missed", "near": near}


def find(
    evaluations: Evaluations, metric: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Estimate of a metric such as "mmlu.acc" or "all.perplexity", and its results file."""
    task, *rest = metric.split(".")
    result = evaluations.get(task)
    if result is None:  # metrics of perplexity start with a source instead of a task
        result, rest = evaluations.get("perplexity"), [task, *rest]
    value: Any = (result or {}).get("metrics")
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return (value if isinstance(value, dict) and "value" in value else None), result


def judged_hash(folder: Path, stage: str) -> str | None:
    """Hash of the stage's checkpoint measured in results/<run>/<folder>; None if ambiguous.

    This is the checkpoint of scripts/pipeline.py's decision. Without a decision, all results of the
    stage's checkpoints in the folder must agree.
    """
    decided, hashes = read_json(folder / "decision.json").get("of"), set()
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # being written
            continue
        if not isinstance(content, dict) or "checkpoint_hash" not in content:
            continue
        if decided and "of" in content:
            matches = content["of"] == decided
        else:
            matches = Path(str(content.get("checkpoint"))).parent.name == stage
        if matches:
            hashes.add(content["checkpoint_hash"])
    return hashes.pop() if len(hashes) == 1 else None


def stage_folder(stage: str, phases: list[dict[str, Any]]) -> str:
    """Folder in results/<run> of a stage's results; a pretraining phase uses its last step."""
    ends = {phase["name"]: phase["end"] for phase in phases}
    return f"step_{ends[stage]}" if stage in ends else stage


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells as text: title, score, standard error, n, three tiers and status."""
    scale, digits = (100, 1) if row["percent"] else (1, 2)
    sign = "≤" if row["lower"] else "≥"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    count = "-" if row["n"] is None else f"{row['n']:,} {row['of']}"
    near = ", ".join(LABELS[tier] for tier in row["near"])
    state = row["status"] + (f" (within one standard error of {near})" if near else "")
    title = row["title"] + (" (%)" if row["percent"] else "")
    stage = "" if row["stage"] == "final" else f", after {row['stage']}"
    tiers = [f"{sign} {scale * row[tier]:g}" for tier in TIERS]
    return [title + stage, number(row["value"]), number(row["stderr"]), count, *tiers, state]


HEAD = ("Score", "Value", "Standard error", "n", "MVP", "Target (success)", "Stretch", "Status")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, followed by its notes."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * 6 + "---|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    notes = [f"- {row['title']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
