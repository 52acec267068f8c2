"""Logs and results of a plausible run of the quickstart plan, and its report, without a model."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from evals.report.build import finite, measured, published, scores, stages
from evals.report.trained import training

PHASES = {"base": (0, 180), "long_context": (180, 220), "gold": (220, 260)}
GATES = {
    "step_260": [{"metric": "stem.bits_per_byte", "go": 2.7, "no_go": 3.0}],
    "sft": [
        {"metric": "chat.acc", "go": 0.06, "no_go": 0.02},
        {"metric": "all.bits_per_byte", "go": 1.2, "no_go": 1.6, "against": "before"},
        {"metric": "hellaswag.acc_norm", "go": -0.15, "no_go": -0.3, "against": "before"},
    ],
    "dpo": [
        {"metric": "chat.acc", "go": 0.06, "no_go": 0.02},
        {"metric": "pairs.preferred", "go": 0.0, "no_go": -0.1, "against": "before"},
        {"metric": "all.bits_per_byte", "go": 0.15, "no_go": 0.4, "against": "before"},
    ],
}
BITS = {"step_260": (2.31, 2.7), "sft": (3.2, 3.65), "dpo": (3.24, 3.7)}  # stem, all
CORRECT = {  # share of right items: chat questions, preference pairs, HellaSwag
    "step_260": {"chat": 0.0, "hellaswag": 0.29},
    "sft": {"chat": 0.22, "pairs": 0.56, "hellaswag": 0.33},
    "dpo": {"chat": 0.25, "pairs": 0.53, "hellaswag": 0.25},
}
ITEMS = {"chat": (32, "acc"), "pairs": (200, "preferred"), "hellaswag": (24, "acc_norm")}
TURN = [
    {"kind": "thought", "text": "I should <b>multiply</b>."},
    {"kind": "call", "text": "calculator(expression='17 * 23')"},
    {"kind": "result", "text": "391 & nothing <i>else</i>"},
    {"kind": "content", "text": "17 times 23 is 391."},
]


def append_line(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_run(place: Path) -> None:
    """Write results/STAGE/ and logs/ of three phases, SFT and DPO."""
    (place / "logs").mkdir(parents=True)
    random.seed(0)
    before: dict[str, float] = {}
    for number, (name, gates) in enumerate(GATES.items()):
        metrics = _results(place / "results" / name, name)
        values, references = [], []
        for gate in gates:
            task, metric = gate["metric"].split(".")
            values.append(metrics[task][metric]["value"])
            references.append(before.get(gate["metric"]) if "against" in gate else None)
        step = int(name[5:]) if name.startswith("step_") else name
        outcome = {"step_260": "go", "sft": "go", "dpo": "caution"}[name]
        decision = {"step": step, "outcome": outcome, "accepted": None, "gates": gates}
        decision |= {"values": values, "references": references}
        event = {"event": "gate", "time": f"2026-11-29T0{number}:00:00", **decision}
        advice = "see `docs/dpo.md`" if outcome != "go" else ""
        append_line(place / "logs" / "events.jsonl", {**event, "advice": advice})
        content = {**decision, "of": name, "metrics": metrics}
        (place / "results" / name / "decision.json").write_text(json.dumps(content))
        before |= {f"{t}.{m}": v["value"] for t, group in metrics.items() for m, v in group.items()}
    _log(place / "logs", PHASES, 4.2, 8e-4)
    for name, base in (("sft", "gold/step_260"), ("dpo", "sft/step_80")):
        folder = place / "logs" / name
        _log(folder, {name: (0, 80)}, 2.5 if name == "sft" else 0.69, 3e-5)
        config = {"phase": name, "init_from": base, "optim": {"lr": 3e-5}}
        config |= {"data": {"mix": {"facts": 0.6, "arithmetic": 0.4}, "sequence_length": 256}}
        (folder / f"{name}.config.yaml").write_text(yaml.safe_dump(config))


def _log(folder: Path, phases: dict[str, tuple[int, int]], start: float, lr: float) -> None:
    folder.mkdir(exist_ok=True)
    last = max(end for _, end in phases.values())
    for phase, (begin, end) in phases.items():
        for step in range(begin + 1, end + 1):
            loss = start / (1 + step) ** 0.12 + random.gauss(0, 0.03)
            rate = lr * min(1, step / 20) * (1 + math.cos(math.pi * step / last)) / 2
            row = {"step": step, "phase": phase, "loss": loss, "lr": rate, "step_s": 1.1}
            row |= {"tokens": 8192 * step}
            row |= {"val/loss": loss + 0.1} if step % 20 == 0 else {}
            append_line(folder / "metrics.jsonl", row)


def _results(folder: Path, name: str) -> dict[str, Any]:
    """Write the results files of a stage; return its metrics as a decision stores them."""
    folder.mkdir(parents=True)
    of = {"checkpoint_hash": name, "shots": 0}
    metrics: dict[str, Any] = {}
    for task, share in CORRECT[name].items():
        n, metric = ITEMS[task]
        right = [float((7 * i) % n < share * n) for i in range(n)]
        mean = sum(right) / n
        stderr = math.sqrt(mean * (1 - mean) / (n - 1))
        metrics[task] = {metric: {"value": mean, "stderr": stderr, "n": n}}
        lines = [{"id": str(i), "subject": "", "scores": {metric: s}} for i, s in enumerate(right)]
        for line in lines:
            append_line(folder / f"{task}.samples.jsonl", line)
        content = {"task": task, "metrics": metrics[task], "n": n, **of}
        content["samples"] = f"{task}.samples.jsonl"
        (folder / f"{task}.json").write_text(json.dumps(content))
    for source, bits in zip(("stem", "all"), BITS[name], strict=True):
        values = {"bits_per_byte": bits, "perplexity": 2 ** (3 * bits), "tokens": 65536.0}
        metrics[source] = {key: {"value": value, "stderr": None} for key, value in values.items()}
    text = {source: metrics[source] for source in ("stem", "all")}
    content = {"task": "perplexity", "metrics": text, "n": 256, **of}
    (folder / "perplexity.json").write_text(json.dumps(content))
    return metrics


def example_report(place: Path, name: str = "quickstart") -> dict[str, Any]:
    """The report of the DPO model of write_run, as benchmark_results.json stores it."""
    trained = training(place / "logs", place / "dpo" / "step_80")
    evaluations, missing = measured(place / "results", "dpo")
    samples: list[dict[str, Any]] = [
        {"prompt": "What is 17 * 23?", "temperature": 0.0, "text": "391", "turn": TURN},
        {"prompt": "The capital of", "temperature": 0.8, "text": " France is <u>Paris</u>."},
    ]
    report = {
        "name": name,
        "checkpoint": "checkpoints/quickstart/dpo/step_80",
        "checkpoint_hash": "0" * 64,
        "made": "2026-11-29 12:00 UTC",
        "config": {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256},
        "parameters": 5_800_000,
        "targets": [],
        "scores": scores(evaluations),
        "evaluations": evaluations,
        "not_measured": missing | {"mt_bench": "no judge"},
        "needle": {
            "single": {
                "lengths": [128, 256],
                "depths": [0.0, 1.0],
                "cells": {"128/0.0": 0.5, "128/1.0": 1.0, "256/0.0": 0.0},
                "tests": {"128/0.0": 2, "128/1.0": 4, "256/0.0": 3},
                "n": 9,
            }
        },
        "training": trained,
        "stages": stages(place / "results", trained["phases"]),
        "contamination": None,
        "samples": samples,
        "environment": {"python": "3.11", "device": "cpu"},
        "hashes": {"model.safetensors": "1" * 64},
        "published": published(),
    }
    return json.loads(json.dumps(finite(report)))
