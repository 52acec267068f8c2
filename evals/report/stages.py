"""Scores of the stages that a plan judged: changes between stages, and the outcome of each gate."""

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from evals.text_blocks import RATIOS, Sources, change_stderr, figures, total
from files import read_json, read_lines, read_object
from training.planning.gates import Gate, Measured, estimate, judge, reference_of

# Suffixes of the metrics to compare across stages.
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
)
Items = dict[tuple[str, str], dict[str, Any]]  # (subject, id) -> scores
STEP = re.compile(r"step_(\d+)(_average)?")


@dataclass(frozen=True)
class Stage:
    """A judged milestone or stage: decision.json in `folder`, and the results files beside it."""

    folder: Path
    phase: str  # phase of a milestone, or the name of a stage
    decision: dict[str, Any]
    samples: dict[str, Items] = field(default_factory=dict)  # read so far, by task

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def metrics(self) -> dict[str, Any]:
        """Nested metrics, as gates address them."""
        return self.decision.get("metrics") or {}

    @cached_property
    def text_results(self) -> list[dict[str, Any]]:
        """Results files of held-out text that store their blocks."""
        contents = map(read_object, sorted(self.folder.glob("*.json")))
        return [c for c in contents if c and isinstance(c.get("blocks"), dict)]

    def scored_texts(self, key: str, value: float) -> Iterator[tuple[Any, Sources]]:
        """Yield the scored text and its blocks, for each results file with this value of a metric.

        Texts are equal if their data, settings and blocks are.
        """
        group, _, metric = key.rpartition(".")
        for content in self.text_results if metric in RATIOS else ():
            blocks: Sources = content["blocks"]
            if content["task"] == "perplexity" and group in blocks:
                blocks = {group: blocks[group]}
            elif group != content["task"] and (group, content["task"]) != ("all", "perplexity"):
                continue
            if math.isclose(figures(*total(blocks))[metric], value, abs_tol=1e-6):
                settings = [content.get(name) for name in ("sequence_length", "stride")]
                sizes = {name: (sums["tokens"], sums["bytes"]) for name, sums in blocks.items()}
                yield (sorted(content["data_hashes"].values()), settings, sizes), blocks

    def item_scores(self, task: str, metric: str) -> dict[tuple[str, str], float]:
        """(subject, id) -> score of each item in a task's samples file; {} if it is missing."""
        if task not in self.samples:
            self.samples[task] = _read_samples(self.folder, task)
        return {
            item: float(scores[metric])
            for item, scores in self.samples[task].items()
            if isinstance(scores.get(metric), (bool, int, float))
        }


def stages(results: Path, phases: Sequence[dict[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    """Folder name -> outcome, gates and metrics of each decision.json, in the order of training.

    phases: names with first and last step, which give the phase of a milestone. A metric has value,
    stderr, n or tokens, "change" against the stage before it, and after pretraining "since", the
    change against the last milestone. An average of checkpoints is compared, but no later stage is
    compared with it.
    """
    earlier: list[Stage] = []
    reported = {}
    for stage in _judged(results, phases):
        flat = dict(leaves(stage.metrics))
        wanted = [gate["metric"] for gate in stage.decision.get("gates") or []]
        wanted += [key for key in flat if key.endswith(STAGE_METRICS)]
        milestones = [point for point in earlier if STEP.fullmatch(point.name)]
        pretrained = milestones[-1] if milestones and not STEP.fullmatch(stage.name) else None
        metrics: dict[str, dict[str, Any]] = {}
        for key in dict.fromkeys(wanted):
            if key in flat:
                tokens = flat.get(key.rpartition(".")[0] + ".tokens", {}).get("value")
                metrics[key] = {**flat[key], **({"tokens": tokens} if tokens else {})}
                metrics[key]["change"] = change(earlier[-1], stage, key) if earlier else None
                metrics[key]["since"] = change(pretrained, stage, key) if pretrained else None
        chances = {key: flat[key] for key in (f"{key}_chance" for key in metrics) if key in flat}
        reported[stage.name] = {
            **{name: stage.decision.get(name) for name in ("step", "outcome", "accepted")},
            "averages": stage.decision.get("averages"),
            "gates": gate_records(stage, earlier),
            "metrics": metrics,
            "chances": chances,
        }
        if not stage.decision.get("averages"):
            earlier.append(stage)
    return reported


def _judged(results: Path, phases: Sequence[dict[str, Any]]) -> list[Stage]:
    """Milestones by step, then other stages by the time of their decision."""
    found = []
    for path in results.glob("*/decision.json"):
        step = STEP.fullmatch(path.parent.name)
        order = (0.0, float(step[1]), path.parent.name) if step else (1.0, path.stat().st_mtime, "")
        inside = [p["name"] for p in phases if step and p["begin"] < int(step[1]) <= p["end"]]
        phase = (inside or [path.parent.name])[0]
        found.append((order, Stage(path.parent, phase, read_json(path))))
    return [stage for _, stage in sorted(found, key=lambda pair: pair[0])]


def leaves(
    metrics: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield the dotted name and estimate (value, stderr, n if known) of each number in metrics."""
    for name, value in metrics.items():
        if isinstance(value, dict) and "value" in value:
            yield prefix + name, {"stderr": None, **value}
        elif isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield prefix + name, {"value": value, "stderr": None}


def gate_records(stage: Stage, earlier: Sequence[Stage]) -> list[dict[str, Any]]:
    """Each gate with value, n, outcome, and the change against the stage that it is compared with.

    That is the gate's reference, or the stage before for a gate on the value alone. "outcome" is
    None if the recorded values do not come from these results.
    """
    decision, records = stage.decision, []
    thresholds = decision.get("gates") or []
    values = decision.get("values") or [None] * len(thresholds)
    references = decision.get("references") or [None] * len(thresholds)
    for limits, value, reference in zip(thresholds, values, references, strict=True):
        gate = Gate(**limits)
        before = earlier[-1] if earlier else None
        point = reference_of(gate, earlier) if gate.against else before
        compared = Measured(point.phase, point.name, point.metrics) if point else None
        verdict = judge(gate, stage.metrics, compared if gate.against else None)
        is_recorded = (verdict.value, verdict.reference) == (value, reference)
        found = dict(leaves(stage.metrics)).get(gate.metric, {})
        tokens = estimate(gate.metric.rpartition(".")[0] + ".tokens", stage.metrics)
        records.append(
            {
                **limits,
                "value": value,
                "reference": reference,
                "stderr": found.get("stderr"),
                "n": found.get("n"),
                "tokens": tokens.value if tokens else None,
                "outcome": verdict.outcome if is_recorded else None,
                "change": change(point, stage, gate.metric) if point and is_recorded else None,
            }
        )
    return records


def change(before: Stage, after: Stage, key: str) -> dict[str, Any] | None:
    """Change of a metric between two stages; None if either lacks it.

    "stderr": of the mean difference if both scored the same items ("paired"), else of two
    independent means; at least 1 / (n + 2), as for gates. For bits per byte: paired if both scored
    the same blocks of the same text. None if a result has no error.
    """
    old, new = (estimate(key, stage.metrics) for stage in (before, after))
    if old is None or new is None:
        return None
    counts = [dict(leaves(stage.metrics)).get(key, {}).get("n") or 0 for stage in (before, after)]
    record: dict[str, Any] = {"against": before.name, "value": new.value - old.value}
    differences = _differences(before, after, key, (old.value, new.value))
    if differences:
        n = len(differences)
        spread = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
        return {**record, "stderr": max(spread, 1 / (n + 2)), "n": n, "paired": True}
    texts = product(before.scored_texts(key, old.value), after.scored_texts(key, new.value))
    for (old_text, old_blocks), (new_text, new_blocks) in texts:
        if old_text == new_text:
            stderr = change_stderr(old_blocks, new_blocks, key.rpartition(".")[2])
            return {**record, "stderr": stderr, "n": None, "paired": stderr is not None}
    stderr = math.hypot(old.stderr, new.stderr) if old.stderr and new.stderr else None
    return {**record, "stderr": stderr, "n": int(min(counts)) or None, "paired": False}


def _differences(
    before: Stage, after: Stage, key: str, values: tuple[float, float]
) -> list[float] | None:
    """Difference of each item's score; None if items differ or do not give the reported values."""
    task, _, metric = key.rpartition(".")
    old, new = (stage.item_scores(task, metric) for stage in (before, after))
    if not old or old.keys() != new.keys():
        return None
    for scores, value in zip((old, new), values, strict=True):
        if not math.isclose(math.fsum(scores.values()) / len(scores), value, abs_tol=1e-6):
            return None
    return [new[item] - old[item] for item in old]


def _read_samples(folder: Path, task: str) -> Items:
    name = (read_object(folder / f"{task}.json") or {}).get("samples")
    rows = read_lines(folder / name) if isinstance(name, str) else []
    return {
        (str(row.get("subject")), str(row.get("id"))): row["scores"]
        for row in rows
        if isinstance(row.get("scores"), dict) and not row.get("too_long")
    }
