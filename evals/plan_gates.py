"""Gates of a plan's milestones and stages, and the earlier results that gates compare with."""

from pathlib import Path
from typing import Any

from evals.engines import folder_hash
from evals.report.build import measured
from evals.report.targets import judged_hash
from files import read_object, step_folders
from training.checkpoint_files import model_hash
from training.planning.extensions import read_extensions
from training.planning.gates import Gate, Measured, Verdict, by_name, reference_of
from training.planning.plan import (
    EvaluationPoint,
    Plan,
    ScheduledPhase,
    evaluation_points,
    load_plan,
    scheduled_phases,
)
from training.planning.stages import config_exists


def gates_of(path: Path, checkpoint: Path, name: str | None) -> tuple[Gate, ...]:
    """Return the gates of a plan's milestone (by step) or stage (by name).

    name: default: from the checkpoint's folder. Raises ValueError for an unknown one.
    """
    plan = load_plan(path)
    phases = list(plan.phases)
    if config_exists(phases[0].config):  # on another machine, the plan alone has its own steps
        for scheduled in _with_and_without_extensions(plan)[1:]:
            phases += [entry.phase for entry in scheduled]
    milestones = {str(m.step): m for phase in phases for m in phase.milestones}
    stages = {stage.name: stage for stage in plan.stages}
    name = _name_of(plan, checkpoint, name)
    if name not in milestones | stages:
        raise ValueError(
            f"{name!r} is neither a milestone nor a stage of {path}; choose one with --at "
            f"(milestones: {', '.join(milestones) or 'none'}; stages: "
            f"{', '.join(stages) or 'none'})"
        )
    return (milestones | stages)[name].gates


def _with_and_without_extensions(plan: Plan) -> list[list[ScheduledPhase]]:
    """Return the plan's phases as its configs have them, then as the run was extended (--extend).

    A checkpoint may be of a step before an extension.
    """
    phases = scheduled_phases(plan)
    extensions = read_extensions(phases[0].run.logs)
    return [phases, scheduled_phases(plan, extensions)] if extensions else [phases]


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
    planned, *extended = _with_and_without_extensions(plan)
    name = _name_of(plan, checkpoint, name)
    for phases in (*extended, planned):
        candidates = evaluation_points(plan, phases)
        if name in [point.name for point in candidates]:
            break
    earlier = candidates[: [point.name for point in candidates].index(name)]
    compared = [reference_of(gate, earlier) for gate in gates]
    results = Path("results")
    measurements = {
        point: Measured(point.phase, point.where, results_of(point, results, planned[0].run.run))
        for point in compared
        if point
    }
    return [measurements[point] if point else None for point in compared]


def results_of(point: EvaluationPoint, results: Path, run: str) -> dict[str, Any]:
    """Return the metrics of a milestone's or stage's checkpoint.

    Reads the decision of scripts.pipeline and every results file under `results`.
    """
    folder = results / run / point.folder
    steps = step_folders(point.checkpoints)
    if point.folder.startswith("step_"):
        checkpoint = point.checkpoints / point.folder
    else:
        checkpoint = steps[-1] if steps else point.checkpoints
    exists = (checkpoint / "config.json").is_file()
    digest = folder_hash(checkpoint) if exists else judged_hash(folder, point.phase)
    decision = read_object(folder / "decision.json") or {}
    is_current = not exists or decision.get("of") == model_hash(checkpoint)
    decided = decision.get("metrics", {}) if is_current else {}
    tasks = measured(results, digest)[0] if digest else {}
    by_task = [by_name(task, content["metrics"]) for task, content in tasks.items()]
    return {name: values for metrics in [*by_task, decided] for name, values in metrics.items()}


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as the suite's summary stores it."""
    compared = {
        "reference": verdict.reference,
        "change_stderr": verdict.stderr,
        "compared": verdict.where,
    }
    return {
        **vars(verdict.gate),
        "value": verdict.value,
        "outcome": verdict.outcome,
        **(compared if verdict.gate.against else {}),
    }
