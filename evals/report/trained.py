"""What the logs of a run say about a checkpoint: its stages back to pretraining, curves, held-out losses and decisions."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import read_json
from files import read_lines
from yaml_file import read_yaml_file

POINTS = 400  # of a curve, at most
Rows = list[dict[str, Any]]


def training(logs: Path, checkpoint: Path) -> dict[str, Any]:
    """Pretraining and the stages after it that led to a checkpoint, from metrics.jsonl, events.jsonl and configs.

    "tuning" lists the stages after pretraining (mid-training, SFT, DPO) in order; [] for a pretraining checkpoint.
    """
    tuned, rows, events = story(logs, checkpoint)
    if not rows:
        raise ValueError(
            f"{logs / 'metrics.jsonl'} has no metrics; give the --logs of the run, or none"
        )
    gates = [event for event in events if event["event"] == "gate"]
    return {
        "logs": str(logs),
        "tokens": rows[-1].get("tokens"),
        **curves(rows, events),
        "gates": [
            {
                name: gate.get(name)
                for name in (
                    "time",
                    "step",
                    "outcome",
                    "accepted",
                    "gates",
                    "values",
                    "references",
                    "advice",
                )
            }
            for gate in gates
        ],
        "environment": next(
            (read_json(path) for path in sorted(logs.glob("*.environment.json"))[-1:]), {}
        ),
        "corpus": corpus(settings(path) for path in sorted(logs.glob("*.config.yaml"))),
        "tuning": tuned,
    }


def corpus(configs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Store -> sha256 of its documents, and the origin of each source: a Python release for text that comes with Python."""
    stores = {
        Path(data["store"]): None
        for config in configs
        if (data := config.get("data") or {}).get("store")
    }
    found = {}
    for store in stores:
        hashes = read_json(store / "report.json").get("inputs", {}).get("documents")
        if hashes:
            origins = {
                name: read_json(store / "documents" / name / "manifest.json").get("origin")
                for name in hashes
            }
            digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
            found[str(store)] = {"sha256": digest, "sources": hashes, "origins": origins}
    return found


def story(logs: Path, checkpoint: Path) -> tuple[Rows, Rows, Rows]:
    """Of a checkpoint: its stages after pretraining; rows of pretraining; and events, with the decisions about both."""
    tuned, base = lineage(logs, checkpoint)
    rows, events = history(logs, base)
    if tuned:
        names = {stage["name"] for stage in tuned}
        decided = [
            event for event in read_lines(logs / "events.jsonl") if event.get("step") in names
        ]
        events = [event for event in events if not isinstance(event.get("step", 0), str)] + decided
    return tuned, rows, events


def history(logs: Path, checkpoint: Path) -> tuple[Rows, Rows]:
    """Rows of metrics.jsonl and of events.jsonl up to a checkpoint's step.

    All of them where these logs do not know the checkpoint's phase.
    """
    rows, events = (read_lines(logs / f"{name}.jsonl") for name in ("metrics", "events"))
    at = position(checkpoint)
    if not str(at["step"]).isdecimal() or all(row.get("phase") != at["phase"] for row in rows):
        return rows, events
    last = int(at["step"])
    events = [
        event
        for event in events
        if isinstance(event.get("step", 0), int) and event.get("step", 0) <= last
    ]
    return [row for row in rows if row["step"] <= last], events


def position(checkpoint: Path) -> dict[str, Any]:
    """Phase and step of a checkpoint: from state/trainer.json, without it from the folder's name, <phase>/step_N."""
    folder = checkpoint.resolve()
    named = {"phase": folder.parent.name, "step": folder.name.removeprefix("step_")}
    return {**named, **read_json(folder / "state" / "trainer.json")}


def lineage(logs: Path, checkpoint: Path) -> tuple[Rows, Path]:
    """The stages after pretraining that led to a checkpoint, first to last, and the checkpoint that they started from.

    A stage keeps its logs in logs/<run>/<phase>; its config there names the checkpoint that it started from.
    """
    stages: Rows = []
    while True:
        at = position(checkpoint)
        name = str(at["phase"])
        folder = logs / name
        if name in (stage["name"] for stage in stages) or not (folder / "metrics.jsonl").is_file():
            return stages, checkpoint
        config = settings(folder / f"{name}.config.yaml")
        stages.insert(0, stage(folder, name, at["step"], config))
        base = config.get("init_from") or config.get("resume_from")
        if not base:
            return stages, checkpoint
        checkpoint = Path(base)


def stage(folder: Path, name: str, step: Any, config: dict[str, Any]) -> dict[str, Any]:
    """One stage after pretraining, up to a step: what it trained on, and its curves."""
    last = int(step) if str(step).isdecimal() else None
    rows, events = (read_lines(folder / f"{kind}.jsonl") for kind in ("metrics", "events"))
    rows = [row for row in rows if last is None or row["step"] <= last]
    first: Rows = [
        {"step": event["step"], **event} for event in events if event["event"] == "measured"
    ][-1:]
    measured = [row for row in first + rows if "val/loss" in row]
    return {
        "name": name,
        "started_from": config.get("init_from") or config.get("resume_from"),
        "tokens": rows[-1].get("tokens") if rows else None,
        "lr": config.get("optim", {}).get("lr"),
        "mix": config.get("data", {}).get("mix") or {},
        "sources": {key: part.get("path") for key, part in _sources(config).items()},
        "row": config.get("data", {}).get("sequence_length"),
        **curves(rows, [event for event in events if last is None or event.get("step", 0) <= last]),
        "held_out": [{"step": row["step"], "loss": row["val/loss"]} for row in measured],
        "preferred": [
            {"step": row["step"], "share": row["val/rewards/accuracies"]}
            for row in measured
            if "val/rewards/accuracies" in row
        ],
        "gates": [],
    }


def _sources(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Where the data of SFT or DPO come from, by the name in data.mix."""
    return (config.get("chat") or config.get("preferences") or {}).get("sources") or {}


def curves(rows: Rows, events: Rows) -> dict[str, Any]:
    """Steps, hours, losses, phases and incidents of one metrics.jsonl."""
    steps, losses = [row["step"] for row in rows], [float(row["loss"]) for row in rows]
    window = max(1, len(rows) // POINTS)
    phases = phases_of(rows)
    kinds = ("skipped", "rollback", "stuck")
    return {
        "steps": steps[-1] if steps else 0,
        "hours": sum(row.get("step_s", 0.0) for row in rows) / 3600,
        "curve": [[steps[i], losses[i]] for i in range(0, len(rows), window)],
        "smooth": _smooth(steps, losses, phases, window),
        "held_out": [
            {"step": row["step"], "loss": row["val/loss"]} for row in rows if "val/loss" in row
        ],
        "phases": phases,
        "incidents": {
            kind: n for kind in kinds if (n := sum(event["event"] == kind for event in events))
        },
    }


def phases_of(rows: Sequence[dict[str, Any]]) -> Rows:
    """Name, begin and end, in steps, and tokens of each phase in metrics.jsonl."""
    phases: Rows = []
    before, last = 0, 0
    for row in rows:
        if not phases or phases[-1]["name"] != row["phase"]:
            phases.append({"name": row["phase"], "begin": row["step"] - 1})
            before = last
        last = row.get("tokens") or last
        phases[-1] |= {"end": row["step"], "tokens": last - before}
    return phases


def _smooth(steps: list[int], losses: list[float], phases: Rows, window: int) -> list[list[float]]:
    """Centred running means, afresh in each phase of other text."""
    reach = max(2, len(steps) // 100)
    values, found = np.array(losses), []
    for phase in phases:
        inside = [i for i, step in enumerate(steps) if phase["begin"] < step <= phase["end"]]
        for i in inside[::window]:
            near = values[max(inside[0], i - reach) : min(inside[-1], i + reach) + 1]
            near = near[np.isfinite(near)]
            if len(near):
                found.append([steps[i], float(near.mean())])
    return found


def settings(path: Path) -> dict[str, Any]:
    """A resolved config that a run left beside its log; {} where there is none."""
    found = read_yaml_file(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
