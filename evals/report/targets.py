"""The results table: each score beside what the plan aims at, and which tier it reaches (MVP, success, stretch)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli import ROOT
from data.manifest import read_json
from ranges import AnyFloat, FilledText, check, shown
from yaml_file import read_yaml_file

TIERS = ("mvp", "success", "stretch")
LABELS = {"mvp": "MVP", "success": "success", "stretch": "stretch"}
Evaluations = dict[str, dict[str, Any]]  # task -> its results file


def read_targets(plan: Path) -> list[dict[str, Any]]:
    """The targets of a plan (training.curriculum.Target) as plain values, with defaults filled in."""
    try:
        found = read_yaml_file(plan if plan.is_file() else ROOT / plan)
    except OSError as error:
        raise ValueError(f"{plan} cannot be read as a plan; give the YAML file of one") from error
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{plan} must hold a plan, as key: value; it holds {shown(found)}")
    targets = (found or {}).get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
        raise ValueError(
            f"{plan}: targets={shown(targets)} must be a list of settings, as key: value"
        )
    for number, target in enumerate(targets):
        lacking = [name for name in ("metric", "title", *TIERS) if name not in target]
        if lacking:
            raise ValueError(
                f"{plan}: target {shown(target.get('title', target))} lacks {', '.join(lacking)}"
            )
        for name, kind in {
            **dict.fromkeys(TIERS, AnyFloat),
            "metric": FilledText,
            "title": FilledText,
        }.items():
            check(target[name], kind, f"{plan}: targets[{number}].{name}")
    defaults = {"stage": "final", "lower": False, "percent": True, "note": ""}
    return [{**defaults, **target} for target in targets]


def table(
    targets: list[dict[str, Any]], measured_after: Callable[[str], Evaluations]
) -> list[dict[str, Any]]:
    """One row a target: the score with its standard error and n, and its status.

    measured_after(stage): the evaluations of the checkpoint that a stage left, or of the report's own for "final".
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
    """{"status", "near"}: the highest tier that a value reaches, and the tiers whose border is within one standard error."""
    if value is None or value != value:
        return {"status": "not measured", "near": []}
    sign = -1 if target["lower"] else 1
    reached = [tier for tier in TIERS if sign * value >= sign * target[tier]]
    near = [tier for tier in TIERS if stderr and abs(value - target[tier]) <= stderr]
    return {"status": LABELS[reached[-1]] if reached else "missed", "near": near}


def find(
    evaluations: Evaluations, metric: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The estimate that a gate's metric names ("mmlu.acc", "all.perplexity"), and the results it is part of."""
    task, *rest = metric.split(".")
    result = evaluations.get(task)
    if result is None:  # the sources of perplexity have no task before them
        result, rest = evaluations.get("perplexity"), [task, *rest]
    value: Any = (result or {}).get("metrics")
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return (value if isinstance(value, dict) and "value" in value else None), result


def judged(folder: Path, stage: str) -> str | None:
    """The hash of the checkpoint of a stage that was measured in results/<run>/<folder>; None where that is not clear.

    It is the one that scripts/pipeline.py decided on. Without a decision, as after measuring by hand, it is the one
    that all results of this stage's checkpoints there agree on.
    """
    of, hashes = read_json(folder / "decision.json").get("of"), set()
    for path in folder.glob("*.json"):
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # being written
            continue
        if not isinstance(read, dict) or "checkpoint_hash" not in read:
            continue
        if (
            read["of"] == of
            if of and "of" in read
            else Path(str(read.get("checkpoint"))).parent.name == stage
        ):
            hashes.add(read["checkpoint_hash"])
    return hashes.pop() if len(hashes) == 1 else None


def place_of(stage: str, phases: list[dict[str, Any]]) -> str:
    """The folder in results/<run> of what was measured after a stage, or at the end of a pretraining phase."""
    ends = {phase["name"]: phase["end"] for phase in phases}
    return f"step_{ends[stage]}" if stage in ends else stage


def cells(row: dict[str, Any]) -> list[str]:
    """Title, score, standard error, n, the three tiers and the status of a row, as text."""
    scale, digits = (100, 1) if row["percent"] else (1, 2)
    sign = "≤" if row["lower"] else "≥"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    count = "-" if row["n"] is None else f"{row['n']:,} {row['of']}"
    near = ", ".join(LABELS[tier] for tier in row["near"])
    said = row["status"] + (f" (within one standard error of {near})" if near else "")
    title = row["title"] + (" (%)" if row["percent"] else "")
    where = "" if row["stage"] == "final" else f", after {row['stage']}"
    tiers = [f"{sign} {scale * row[tier]:g}" for tier in TIERS]
    return [title + where, number(row["value"]), number(row["stderr"]), count, *tiers, said]


HEAD = (
    "Score",
    "Value",
    "Standard error",
    "n",
    "MVP",
    "Target (success)",
    "ScheduledPhase",
    "Status",
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in markdown, with the notes below it."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * 6 + "---|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    notes = [f"- {row['title']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")
