"""Reads a run's logs: a checkpoint's stages, loss curves and gate decisions."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.chat.replay import PairReplayConfig, ReplayConfig, mixture
from data.manifest import read_json
from files import read_lines
from training.checkpoint_files import TRAINER, read_position
from yaml_file import read_yaml_file

POINTS = 400  # maximum number of points per curve
HEATMAP_COLUMNS, HEATMAP_CELLS = 120, 20_000  # of the experts' load
Rows = list[dict[str, Any]]


def training(logs: Path, checkpoint: Path) -> dict[str, Any]:
    """Training history of a checkpoint from metrics.jsonl, events.jsonl and configs.

    "tuning" lists the stages after pretraining (mid-training, SFT, DPO) in order. ValueError if the
    logs have no metrics.
    """
    tuned, rows, events = read_history(logs, checkpoint)
    if not rows:
        raise ValueError(
            f"{logs / 'metrics.jsonl'} has no metrics; give the --logs of the run or omit --logs"
        )
    return {
        "logs": str(logs),
        "tokens": rows[-1].get("tokens"),
        **curves(rows, events),
        "gates": decisions(events, "gate"),
        "forecasts": decisions(events, "forecast"),
        "environment": next(
            (read_json(path) for path in sorted(logs.glob("*.environment.json"))[-1:]), {}
        ),
        "corpus": corpus(settings(path) for path in sorted(logs.glob("*.config.yaml"))),
        "tuning": tuned,
    }


def decisions(events: Rows, kind: str) -> Rows:
    """Decisions of a plan ("gate"), or those of averages at milestones ("forecast")."""
    names = ["time", "step", "outcome", "accepted", "gates", "values", "references", "advice"]
    names += ["averages"] * (kind == "forecast")
    return [{name: event.get(name) for name in names} for event in events if event["event"] == kind]


def corpus(configs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per data store: sha256 of its documents, and the origin of each source.

    The origin of text from a Python installation is the Python release.
    """
    stores = {
        Path(data["store"]): None
        for config in configs
        if (data := config.get("data") or {}).get("store")
    }
    by_store = {}
    for store in stores:
        hashes = read_json(store / "report.json").get("inputs", {}).get("documents")
        if hashes:
            origins = {
                name: read_json(store / "documents" / name / "manifest.json").get("origin")
                for name in hashes
            }
            digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
            by_store[str(store)] = {"sha256": digest, "sources": hashes, "origins": origins}
    return by_store


def read_history(logs: Path, checkpoint: Path) -> tuple[Rows, Rows, Rows]:
    """Stages of a checkpoint after pretraining, metric rows of pretraining, and events of both."""
    tuned, base = lineage(logs, checkpoint)
    rows, events = read_pretraining(logs, base)
    if tuned:
        names = {stage["name"] for stage in tuned}
        all_events = read_lines(logs / "events.jsonl")
        decisions = [event for event in all_events if event.get("step") in names]
        events = [event for event in events if not isinstance(event.get("step", 0), str)]
        events += decisions
    return tuned, rows, events


def read_pretraining(logs: Path, checkpoint: Path) -> tuple[Rows, Rows]:
    """Rows of metrics.jsonl and events.jsonl up to a checkpoint's step.

    All rows if the logs do not have the checkpoint's phase.
    """
    rows, events = (read_lines(logs / f"{name}.jsonl") for name in ("metrics", "events"))
    phase, step = checkpoint_position(checkpoint)
    if not step.isdecimal() or all(row.get("phase") != phase for row in rows):
        return rows, events
    last = int(step)
    events = [
        event
        for event in events
        if isinstance(event.get("step", 0), int) and event.get("step", 0) <= last
    ]
    return [row for row in rows if row["step"] <= last], events


def checkpoint_position(checkpoint: Path) -> tuple[str, str]:
    """Phase and step of a checkpoint, from state/trainer.json or else the path <phase>/step_N."""
    folder = checkpoint.resolve()
    if (folder / TRAINER).is_file():
        position = read_position(folder)
        return position["phase"], str(position["step"])
    return folder.parent.name, folder.name.removeprefix("step_")


def lineage(logs: Path, checkpoint: Path) -> tuple[Rows, Path]:
    """Stages of a checkpoint after pretraining, in order, and the pretraining checkpoint.

    A stage's logs are in logs/<run>/<phase>; the config there names the checkpoint it started from.
    """
    stages: Rows = []
    while True:
        name, step = checkpoint_position(checkpoint)
        folder = logs / name
        if name in (stage["name"] for stage in stages) or not (folder / "metrics.jsonl").is_file():
            return stages, checkpoint
        config = settings(folder / f"{name}.config.yaml")
        stages.insert(0, stage(folder, name, step, config))
        base = config.get("init_from") or config.get("resume_from")
        if not base:
            return stages, checkpoint
        checkpoint = Path(base)


def stage(folder: Path, name: str, step: str, config: dict[str, Any]) -> dict[str, Any]:
    """One stage after pretraining, up to a step: its data and curves."""
    last = int(step) if step.isdecimal() else None
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
        "mix": _mix(config),
        "sources": {key: source.get("path") for key, source in _sources(config).items()},
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


def _mix(config: dict[str, Any]) -> dict[str, float]:
    """The mixture of SFT or DPO, with the replayed text."""
    kind = PairReplayConfig if "preferences" in config else ReplayConfig
    replay = kind(**config["replay"]) if config.get("replay") else None
    return mixture(config.get("data", {}).get("mix") or {}, replay)


def _sources(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Data sources of SFT or DPO, by their names in data.mix."""
    return (config.get("chat") or config.get("preferences") or {}).get("sources") or {}


def curves(rows: Rows, events: Rows) -> dict[str, Any]:
    """Steps, hours, losses, learning rates, phases and incidents of one metrics.jsonl."""
    steps, losses = [row["step"] for row in rows], [float(row["loss"]) for row in rows]
    window = max(1, len(rows) // POINTS)
    phases = phases_of(rows)
    kinds = ("skipped", "rollback", "stuck", "starved")
    return {
        "steps": steps[-1] if steps else 0,
        "hours": sum(row.get("step_s", 0.0) for row in rows) / 3600,
        "curve": [[steps[i], losses[i]] for i in range(0, len(rows), window)],
        "smooth": _smooth(steps, losses, phases, window),
        "learning_rate": [[row["step"], row["lr"]] for row in rows[::window] if "lr" in row],
        "held_out": [
            {"step": row["step"], "loss": row["val/loss"]} for row in rows if "val/loss" in row
        ],
        "phases": phases,
        "routing": routing(rows),
        "starved": [event.get("text", "") for event in events if event["event"] == "starved"],
        "incidents": {
            kind: n for kind in kinds if (n := sum(event["event"] == kind for event in events))
        },
    }


def routing(rows: Rows) -> dict[str, Any] | None:
    """Load of the experts, maximum violation and router entropy over the steps; None without.

    Each is a mean over equal windows of steps: "steps" (the last of each window) and "load"
    [windows][layers][experts], 1 for an equal share; "max_violation" and "entropy" [windows].
    """
    rows = [row for row in rows if "expert_load" in row]
    if not rows:
        return None
    cells = len(rows[-1]["expert_load"]) * len(rows[-1]["expert_load"][0])
    count = min(len(rows), max(20, min(HEATMAP_COLUMNS, HEATMAP_CELLS // cells)))
    windows = [[rows[i] for i in part] for part in np.array_split(np.arange(len(rows)), count)]
    means = {
        key: [
            np.mean([np.asarray(row[key], float) for row in window], 0).tolist()
            for window in windows
        ]
        for key in ("expert_load", "max_violation", "router_entropy")
    }
    return {
        "steps": [window[-1]["step"] for window in windows],
        "load": means["expert_load"],
        "max_violation": means["max_violation"],
        "entropy": means["router_entropy"],
    }


def phases_of(rows: Sequence[dict[str, Any]]) -> Rows:
    """Name, first and last step, and tokens of each phase in metrics.jsonl."""
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
    """Centred running means as [step, loss]; they do not cross phases, whose texts differ."""
    radius = max(2, len(steps) // 100)
    values, points = np.array(losses), []
    for phase in phases:
        inside = [i for i, step in enumerate(steps) if phase["begin"] < step <= phase["end"]]
        for i in inside[::window]:
            near = values[max(inside[0], i - radius) : min(inside[-1], i + radius) + 1]
            near = near[np.isfinite(near)]
            if len(near):
                points.append([steps[i], float(near.mean())])
    return points


def settings(path: Path) -> dict[str, Any]:
    """The resolved config that a run wrote beside its log; {} if the file is missing."""
    config = read_yaml_file(path) if path.is_file() else None
    return config if isinstance(config, dict) else {}
