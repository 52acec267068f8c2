"""Gates of a plan's milestones and stages, and the earlier results that gates compare with."""

from pathlib import Path
from typing import Any

from evals.engines import folder_hash
from evals.report.build import measured
from evals.report.targets import judged_hash
from files import read_object
from training.checkpoint_files import identity, step_folders
from training.planning.gates import Gate, Measured, Verdict, by_name, reference_of
from training.planning.plan import Place, Plan, load_plan, places, scheduled_phases


def gates_of(path: Path, checkpoint: Path, name: str | None) -> tuple[Gate, ...]:
    """Return the gates of a plan's milestone (by step) or stage (by name).

    name: default: from the checkpoint's folder. Raises ValueError for an unknown one.
    """
    plan = load_plan(path)
    milestones = {
        str(milestone.step): milestone for phase in plan.phases for milestone in phase.milestones
    }
    stages = {stage.name: stage for stage in plan.stages}
    name = _name_of(plan, checkpoint, name)
    if name not in milestones | stages:
        steps = ", ".join(milestones) or "none"
        names = f", and stages {', '.join(stages)}" if stages else ""
        raise ValueError(
            f"{path} has no milestone at step {name}; it has milestones at {steps}{names}: "
            "choose one with --at"
        )
    return (milestones | stages)[name].gates


def _name_of(plan: Plan, checkpoint: Path, name: str | None) -> str:
    parent = checkpoint.resolve().parent.name
    stages = [stage.name for stage in plan.stages if Path(stage.output_dir).name == parent]
    return name or (stages[0] if stages else checkpoint.name.removeprefix("step_"))


def references(
    gates: tuple[Gate, ...], path: Path, checkpoint: Path, name: str | None
) -> list[Measured | None]:
    """Return the earlier measurement each gate compares with; None for gates without `against`."""
    if not any(gate.against for gate in gates):
        return [None] * len(gates)
    plan = load_plan(path)
    first = scheduled_phases(plan)[0].run
    name = _name_of(plan, checkpoint, name)
    extensions = read_object(first.logs / "extensions.json") or {}
    candidates = places(plan, scheduled_phases(plan, extensions))
    if name not in [place.name for place in candidates]:  # a step from before an --extend
        candidates = places(plan, scheduled_phases(plan))
    earlier = candidates[: [place.name for place in candidates].index(name)]
    compared = [reference_of(gate, earlier) for gate in gates]
    results = Path("results")
    measurements = {
        place: Measured(place.phase, place.where, results_of(place, results, first.run))
        for place in compared
        if place
    }
    return [measurements[place] if place else None for place in compared]


def results_of(place: Place, results: Path, run: str) -> dict[str, Any]:
    """Return the metrics of a milestone's or stage's checkpoint.

    Reads the decision of scripts.pipeline and every results file under `results`.
    """
    folder = results / run / place.folder
    steps = step_folders(place.checkpoints)
    if place.folder.startswith("step_"):
        checkpoint = place.checkpoints / place.folder
    else:
        checkpoint = steps[-1] if steps else place.checkpoints
    exists = (checkpoint / "config.json").is_file()
    digest = folder_hash(checkpoint) if exists else judged_hash(folder, place.phase)
    decision = read_object(folder / "decision.json") or {}
    is_current = not exists or decision.get("of") == identity(checkpoint)
    decided = decision.get("metrics", {}) if is_current else {}
    tasks = measured(results, digest)[0] if digest else {}
    by_task = [by_name(task, content["metrics"]) for task, content in tasks.items()]
    return {name: values for metrics in [*by_task, decided] for name, values in metrics.items()}


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as the suite's summary stores it."""
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
