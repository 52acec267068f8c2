"""The plan of a whole run: phases, milestones, stages, and commands before and after them.

A plan is data: training/planning/pipeline.py executes it, training/planning/cost.py estimates it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from ranges import (
    AnyFloat,
    NonEmptyText,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    at_least,
    check_fields,
)
from training.config import PHASES_DIFFER, RunConfig, fixed, load, scaling_of
from training.planning.gates import BEFORE, Gate
from training.planning.stages import check_stage_averages
from training.settings import load_settings


@dataclass(frozen=True)
class Milestone:
    """A step at which training pauses for evaluations and gates, without changing the run."""

    step: PositiveInt  # step of the whole run, at most the end of the phase
    evals: tuple[str, ...] = ()  # of Plan.evals; default: all of them
    gates: tuple[Gate, ...] = ()
    advice: str = ""  # one sentence of advice after a no-go or a caution
    # Also evaluate the average of this many last checkpoints: a forecast, without decision.
    averages: Annotated[int, at_least(2)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "milestone")


@dataclass(frozen=True)
class PlanPhase:
    """A pretraining phase of a plan."""

    config: NonEmptyText  # a run's config, relative to the working folder
    milestones: tuple[Milestone, ...] = ()  # in order of their steps


@dataclass(frozen=True)
class PlanStage:
    """A stage after the phases (SFT, DPO): commands that train the previous checkpoint further.

    Its gates work like those of a milestone.
    """

    name: NonEmptyText
    output_dir: NonEmptyText  # its newest checkpoint is {checkpoint} in later stages
    commands: dict[str, NonEmptyText]  # description -> command
    evals: tuple[str, ...] = ()  # of Plan.evals; default: none
    gates: tuple[Gate, ...] = ()
    advice: str = ""


@dataclass(frozen=True)
class Target:
    """One row of the results table (evals/report/targets.py): a metric and three target values."""

    metric: NonEmptyText  # dotted path into the results, as for a gate
    title: str
    mvp: AnyFloat  # minimum viable value
    success: AnyFloat  # goal of the plan
    stretch: AnyFloat
    stage: str = "final"  # measured after this phase or stage; "final": the final model
    lower: bool = False  # lower is better
    percent: bool = True  # the metric is a fraction, shown in percent
    note: str = ""  # source of the three values

    def __post_init__(self) -> None:
        check_fields(self, "target")
        tiers = (self.mvp, self.success, self.stretch)
        if list(tiers) != sorted(tiers, reverse=self.lower):
            order = "fall" if self.lower else "rise"
            raise ValueError(
                f"target {self.metric}: mvp, success and stretch are {tiers}; they must {order}"
            )


@dataclass(frozen=True)
class Plan:
    """A whole run: data preparation, phases, stages, evaluations and exports."""

    name: NonEmptyText
    phases: tuple[PlanPhase, ...]
    stages: tuple[PlanStage, ...] = ()  # mid-training, SFT, DPO
    ranks: PositiveInt = 2  # processes, one per GPU
    restarts: NonNegativeInt = 3  # of a failed stage, from its newest checkpoint
    # description -> command, run before the first phase: data, tokenizer
    before: dict[str, NonEmptyText] = field(default_factory=dict)
    # description -> command, run at the end; {checkpoint} is the final checkpoint
    after: dict[str, NonEmptyText] = field(default_factory=dict)
    # name -> command that measures {checkpoint} and writes {"metrics": ...} to {output}
    evals: dict[str, NonEmptyText] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()  # the results table of evals/report/build.py
    seconds: tuple[PositiveFloat, ...] = ()  # expected seconds per command, for the time left
    # commands to suggest after the last one; {checkpoint} is the folder of the final checkpoint
    next: tuple[NonEmptyText, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.phases:
            raise ValueError("phases is empty; list at least one, as phases: [{config: FILE}]")
        for stage in self.stages:
            self._check_evals(f"stage {stage.name}", stage.evals)
            if stage.gates and not stage.evals:
                raise ValueError(f"stage {stage.name} has gates but no evals; list its evals")
        for phase in self.phases:
            steps = [milestone.step for milestone in phase.milestones]
            if steps != sorted(set(steps)):
                raise ValueError(
                    f"milestones of {phase.config} have steps {steps}; list them in rising order"
                )
            for milestone in phase.milestones:
                if milestone.gates and not self.evals:
                    raise ValueError(
                        f"milestone {milestone.step} has gates, but the plan has no evals; add some"
                    )
                self._check_evals(f"milestone {milestone.step}", milestone.evals)

    def _check_evals(self, where: str, evals: tuple[str, ...]) -> None:
        for name in evals:
            if name not in self.evals:
                known = ", ".join(self.evals) or "none"
                raise ValueError(f"{where}: unknown eval {name}; available evals: {known}")


@dataclass(frozen=True)
class ScheduledPhase:
    """A phase of a plan with its position in the whole run."""

    phase: PlanPhase
    run: RunConfig
    begin: int  # step of the whole run
    end: int


def load_plan(path: str | Path) -> Plan:
    """Read a plan from YAML; ValueError names the wrong setting."""
    return load_settings(Plan, path)


def scheduled_phases(plan: Plan, extra_steps: dict[str, int] | None = None) -> list[ScheduledPhase]:
    """Place the plan's phases in the whole run.

    extra_steps: phase -> steps added to those of its config. They move the end of the phase, the
    end of the learning-rate schedule and everything later. In a phase where the rate decays they
    extend the decay, which begins at the same step; checkpoint.milestones keeps that step.
    ValueError if phases differ in schedule, run or model shape, do not begin at their start_step,
    or have milestones outside their steps. They may differ in data.tokens_per_step: steps are
    updates of any size.
    """
    extra_steps, begin = extra_steps or {}, 0
    scheduled: list[ScheduledPhase] = []
    configs = [load(phase.config) for phase in plan.phases]
    unknown = set(extra_steps) - {config.phase for config in configs}
    if unknown:
        known = ", ".join(config.phase for config in configs)
        raise ValueError(f"unknown phase {', '.join(sorted(unknown))}; available phases: {known}")
    added, added_decay, end = sum(extra_steps.values()), 0, 0
    for config in configs:
        end += config.steps
        if end > config.schedule.decay_begin:
            added_decay += extra_steps.get(config.phase, 0)
    for phase, config in zip(plan.phases, configs, strict=True):
        previous = scheduled[-1] if scheduled else None
        shift = sum(extra_steps.get(earlier.run.phase, 0) for earlier in scheduled)
        extra = extra_steps.get(config.phase, 0)
        schedule, batch = config.schedule, config.schedules.get("batch_tokens")
        if added and batch and batch.by == "fraction":
            raise ValueError(
                f"{phase.config} has schedules.batch_tokens by fraction, so more steps would "
                "change the batches of earlier steps; give its points by steps to extend a phase"
            )
        overrides = [
            f"steps={config.steps + extra}",
            f"schedule.total_steps={schedule.total_steps + added}",
            f"schedule.decay_steps={schedule.decay_steps + added_decay}",
        ]
        if previous:
            before = configs[len(scheduled) - 1]
            _check_follows(before, config, previous.phase.config, phase.config)
        if config.start_step is not None:
            name = previous.run.phase if previous else None
            _check_start(config, begin - shift, name, phase.config)
            overrides += [f"start_step={begin}"]
        run = load(phase.config, overrides)
        end = begin + run.steps
        if begin < (stable := run.schedule.decay_begin) < end:  # an extension continues there
            kept = tuple(sorted({*run.checkpoint.milestones, stable}))
            run = replace(run, checkpoint=replace(run.checkpoint, milestones=kept))
        planned_end = begin - shift + config.steps  # a milestone at the phase's end moves with it
        moved = tuple(
            replace(m, step=m.step + shift + (extra if m.step == planned_end else 0))
            for m in phase.milestones
        )
        for milestone in moved:
            if not begin < milestone.step <= end:
                raise ValueError(
                    f"milestone {milestone.step} is outside {run.phase}, steps {begin} to {end}"
                )
            _check_averages(milestone, moved, run, begin)
        scheduled.append(ScheduledPhase(PlanPhase(phase.config, moved), run, begin, end))
        begin = end
    total = scheduled[-1].run.schedule.total_steps
    if begin > total:
        raise ValueError(
            f"the phases have {begin} steps, but the learning-rate schedule ends at "
            f"schedule.total_steps={total}; raise it or lower steps"
        )
    evaluation_points(plan, scheduled)
    check_stage_averages(plan.stages, scheduled)
    return scheduled


class EvaluationPoint(NamedTuple):
    """A milestone or stage of a plan that is evaluated."""

    name: str  # value of --at: a step or a stage
    folder: str  # under results/<run>
    phase: str  # the phase, or the stage itself
    checkpoints: Path  # folder of its step folders
    gates: tuple[Gate, ...]

    @property
    def where(self) -> str:
        return f"at step {self.name}" if self.name.isdecimal() else f"after {self.name}"


def evaluation_points(plan: Plan, phases: list[ScheduledPhase]) -> list[EvaluationPoint]:
    """Return the evaluated milestones and stages of a plan, in order.

    phases: from scheduled_phases(). ValueError for a gate with an unknown `against`.
    """
    listed: list[EvaluationPoint] = []
    for scheduled in phases:
        phase, folder = scheduled.run.phase, scheduled.run.checkpoints
        listed += [
            EvaluationPoint(str(m.step), f"step_{m.step}", phase, folder, m.gates)
            for m in scheduled.phase.milestones
        ]
    listed += [
        EvaluationPoint(stage.name, stage.name, stage.name, Path(stage.output_dir), stage.gates)
        for stage in plan.stages
        if stage.evals
    ]
    for number, point in enumerate(listed):
        known = [earlier.phase for earlier in listed[:number]]
        for gate in point.gates:
            if gate.against and gate.against not in ([BEFORE, *known] if known else []):
                options = ", ".join(dict.fromkeys([BEFORE, *known])) if known else "none (first)"
                raise ValueError(
                    f"{point.where}: gate {gate.metric} has against={gate.against}; "
                    f"available: {options}"
                )
    return listed


def _check_averages(
    milestone: Milestone, milestones: tuple[Milestone, ...], run: RunConfig, begin: int
) -> None:
    """ValueError if the phase will not have all checkpoints that a milestone averages."""
    count, config, step = milestone.averages, run.checkpoint, milestone.step
    if count is None:
        return
    where = f"milestone {step} averages the last {count} checkpoints of {run.phase}"
    if config.keep < count:
        raise ValueError(f"{where}, but checkpoint.keep is {config.keep}; set it to {count}")
    pauses = {other.step for other in milestones}
    saved = sum(config.is_due(i) or i in pauses for i in range(begin + 1, step + 1))
    if saved < count:
        raise ValueError(
            f"{where}, which saves {saved} by then; lower averages or checkpoint.every"
        )
    if len(set(run.theta_range)) > 1:
        raise ValueError(f"{where}, in which rope theta changes; remove averages there")


def _check_start(run: RunConfig, begin: int, before: str | None, config: str) -> None:
    """ValueError if start_step or resume_from of a config contradict its position in the plan."""
    if run.start_step != begin:
        raise ValueError(
            f"start_step is {run.start_step} in {config}, but the phases before it end at step "
            f"{begin}; make them equal"
        )
    is_name = Path(str(run.resume_from)).name == run.resume_from
    if before and is_name and run.resume_from != before:
        raise ValueError(
            f"resume_from is {run.resume_from} in {config}, but the phase before it is {before}"
        )


def _check_follows(before: RunConfig, after: RunConfig, first: str, second: str) -> None:
    """ValueError if a phase cannot continue the previous phase."""
    if before.phase == after.phase:
        raise ValueError(f"{first} and {second} are both phase {before.phase}; rename one of them")
    pairs = {
        "run": (before.run, after.run),
        "schedule": (before.schedule, after.schedule),
        "optim.lr": (before.optim.lr, after.optim.lr),
    }
    for name in vars(before.model):
        if name not in PHASES_DIFFER:
            pairs[f"model.{name}"] = (fixed(before.model, name), fixed(after.model, name))
    for name, (left, right) in pairs.items():
        if left != right:
            raise ValueError(
                f"{name} is {left} in {first} and {right} in {second}; make them equal"
            )
    end, begin = before.theta_range[1], after.theta_range[0]
    if end != begin and not after.allow_theta_jump:
        raise ValueError(
            f"rope_theta ends at {end:,.0f} in {first} and begins at {begin:,.0f} in {second}; "
            f"make them equal, or set allow_theta_jump: true in {second}"
        )
    scalings = [scaling_of(run.model) or "none" for run in (before, after)]
    if scalings[0] != scalings[1] and not after.allow_rope_scaling_change:
        raise ValueError(
            f"model.rope_scaling is {scalings[0]} in {first} and {scalings[1]} in {second}; make "
            f"them equal, or set allow_rope_scaling_change: true in {second}"
        )
