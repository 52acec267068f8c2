"""The plan of a whole run: its phases in order, the milestones inside them, and what is done before and after.

A plan is data. scripts/pipeline.py carries it out, training/planning/cost.py says beforehand what it will cost.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ranges import AnyFloat, FilledText, NonNegativeInt, PositiveInt, check_fields
from training.config import PHASES_DIFFER, RunConfig, load
from training.planning.gates import BEFORE, Gate
from training.settings import load_settings


@dataclass(frozen=True)
class Milestone:
    """A step at which training pauses, is measured and judged; it goes on exactly as if it had not paused."""

    at: PositiveInt  # step of the whole run, at most the end of the phase
    evals: tuple[str, ...] = ()  # of Plan.evals; default: all of them
    gates: tuple[Gate, ...] = ()
    advice: str = ""  # what a no-go or a caution asks for, in one sentence

    def __post_init__(self) -> None:
        check_fields(self, "milestone")


@dataclass(frozen=True)
class PlanPhase:
    config: FilledText  # a run's config, relative to the working folder
    milestones: tuple[Milestone, ...] = ()  # in order of their steps


@dataclass(frozen=True)
class PlanStage:
    """What comes after the phases: commands that make a checkpoint of the one before; it is judged as a milestone is."""

    name: FilledText
    leaves: FilledText  # folder whose newest checkpoint is {checkpoint} from here on
    commands: dict[str, FilledText]  # sentence -> command
    evals: tuple[str, ...] = ()  # of Plan.evals; default: none
    gates: tuple[Gate, ...] = ()
    advice: str = ""


@dataclass(frozen=True)
class Target:
    """One line of the results table (evals/report/targets.py): a score and the values that three tiers ask for."""

    metric: FilledText  # dotted path into the results, as a gate's
    title: str
    mvp: AnyFloat  # the least that is worth showing
    success: AnyFloat  # what the plan aims at
    scheduled: AnyFloat
    stage: str = (
        "final"  # the phase or stage that it is measured after; "final": the model that is left
    )
    lower: bool = False  # lower is better
    percent: bool = True  # the metric is a share, and shown in percent
    note: str = ""  # where the three values come from

    def __post_init__(self) -> None:
        check_fields(self, "target")
        tiers = (self.mvp, self.success, self.scheduled)
        if list(tiers) != sorted(tiers, reverse=self.lower):
            order = "fall" if self.lower else "rise"
            raise ValueError(
                f"target {self.metric}: mvp, success and stretch are {tiers}; they must {order}"
            )


@dataclass(frozen=True)
class Plan:
    name: FilledText
    phases: tuple[PlanPhase, ...]
    stages: tuple[PlanStage, ...] = ()  # SFT, DPO
    ranks: PositiveInt = 2  # processes, one a GPU
    restarts: NonNegativeInt = (
        3  # times that a stage which died is started again from its newest checkpoint
    )
    # sentence -> command, run before the first phase: data, tokenizer
    before: dict[str, FilledText] = field(default_factory=dict)
    # sentence -> command, run at the end; {checkpoint} is the final checkpoint
    after: dict[str, FilledText] = field(default_factory=dict)
    # name -> command that measures {checkpoint} and writes {"metrics": ...} to {output}
    evals: dict[str, FilledText] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()  # the results table of evals/report/build.py

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.phases:
            raise ValueError("a plan needs phases; list at least one, as phases: [{config: FILE}]")
        for stage in self.stages:
            self._check_evals(f"stage {stage.name}", stage.evals)
            if stage.gates and not stage.evals:
                raise ValueError(f"stage {stage.name} has gates; name the evals that measure them")
        for phase in self.phases:
            steps = [milestone.at for milestone in phase.milestones]
            if steps != sorted(set(steps)):
                raise ValueError(
                    f"the milestones of {phase.config} are at {steps}; put them in order, each step once"
                )
            for milestone in phase.milestones:
                if milestone.gates and not self.evals:
                    raise ValueError(
                        f"milestone {milestone.at} has gates, but the plan has no evals to measure them with"
                    )
                self._check_evals(f"milestone {milestone.at}", milestone.evals)

    def _check_evals(self, where: str, evals: tuple[str, ...]) -> None:
        for name in evals:
            if name not in self.evals:
                raise ValueError(
                    f"{where}: {name} is not one of the plan's evals: {', '.join(self.evals) or 'none'}"
                )


@dataclass(frozen=True)
class ScheduledPhase:
    """A phase of a plan as it will run: where it begins and ends in steps of the whole run."""

    phase: PlanPhase
    run: RunConfig
    begin: int
    end: int


def load_plan(path: str | Path) -> Plan:
    """A plan from YAML; ValueError says which setting is wrong."""
    return load_settings(Plan, path)


def scheduled_phases(plan: Plan, longer: dict[str, int] | None = None) -> list[ScheduledPhase]:
    """The plan's phases on one line of steps. longer: phase -> steps that it runs on after what its config says.

    Steps that are added move the learning-rate schedule's end, the phase's end and all that comes later by as many. In a
    phase that decays they make the decay longer; its begin stays. ValueError where phases do not fit each other (another
    schedule, run, model shape or batch), begin elsewhere than their start_step, or have milestones outside.
    """
    longer, at = longer or {}, 0
    found: list[ScheduledPhase] = []
    runs = [load(phase.config) for phase in plan.phases]
    unknown = set(longer) - {run.phase for run in runs}
    if unknown:
        known = ", ".join(run.phase for run in runs)
        raise ValueError(f"{', '.join(sorted(unknown))} is no phase of the plan; there are {known}")
    added, slower, end = sum(longer.values()), 0, 0
    for planned in runs:
        end += planned.steps
        if end > planned.schedule.total_steps - planned.schedule.decay_steps:
            slower += longer.get(planned.phase, 0)
    for phase, planned in zip(plan.phases, runs, strict=True):
        shift = sum(longer.get(scheduled.run.phase, 0) for scheduled in found)
        extra = longer.get(planned.phase, 0)
        schedule = planned.schedule
        overrides = [
            f"steps={planned.steps + extra}",
            f"schedule.total_steps={schedule.total_steps + added}",
        ]
        overrides += [f"schedule.decay_steps={schedule.decay_steps + slower}"]
        if found:
            _check_follows(runs[len(found) - 1], planned, found[-1].phase.config, phase.config)
        if planned.start_step is not None:
            _check_start(planned, at - shift, found[-1].run.phase if found else None, phase.config)
            overrides += [f"start_step={at}"]
        run = load(phase.config, overrides)
        planned_end = at - shift + planned.steps  # a milestone at the phase's end moves with it
        moved = tuple(
            replace(m, at=m.at + shift + (extra if m.at == planned_end else 0))
            for m in phase.milestones
        )
        for milestone in moved:
            if not at < milestone.at <= at + run.steps:
                raise ValueError(
                    f"milestone {milestone.at} lies outside {run.phase}, steps {at} to {at + run.steps}"
                )
        found.append(ScheduledPhase(PlanPhase(phase.config, moved), run, at, at + run.steps))
        at += run.steps
    total = found[-1].run.schedule.total_steps
    if at > total:
        raise ValueError(
            f"the phases take {at} steps but the learning rate is spent at schedule.total_steps={total}"
        )
    places(plan, found)
    return found


class Place(NamedTuple):
    """A milestone or stage that a plan measures, in the order of the plan."""

    name: str  # as --at names it: a step, or a stage
    folder: str  # in results/<run>
    phase: str  # the phase, or the stage itself
    checkpoints: Path  # folder of its step folders
    gates: tuple[Gate, ...]

    @property
    def where(self) -> str:
        return f"at step {self.name}" if self.name.isdecimal() else f"after {self.name}"


def places(plan: Plan, found: list[ScheduledPhase]) -> list[Place]:
    """What a plan measures, in order; found: its phases, by scheduled_phases(). ValueError for a gate with an unknown `against`."""
    listed: list[Place] = []
    for scheduled in found:
        phase, folder = scheduled.run.phase, scheduled.run.checkpoints
        listed += [
            Place(str(m.at), f"step_{m.at}", phase, folder, m.gates)
            for m in scheduled.phase.milestones
        ]
    listed += [
        Place(stage.name, stage.name, stage.name, Path(stage.leaves), stage.gates)
        for stage in plan.stages
        if stage.evals
    ]
    for number, place in enumerate(listed):
        known = [earlier.phase for earlier in listed[:number]]
        for gate in place.gates:
            if gate.against and gate.against not in ([BEFORE, *known] if known else []):
                options = (
                    ", ".join(dict.fromkeys([BEFORE, *known]))
                    if known
                    else "nothing, since it is the first"
                )
                raise ValueError(
                    f"{place.where}: {gate.metric} is against {gate.against}; it can be against {options}"
                )
    return listed


def _check_start(run: RunConfig, begin: int, before: str | None, config: str) -> None:
    """ValueError where a config names another first step, or another phase to continue, than its place in the plan."""
    if run.start_step != begin:
        raise ValueError(
            f"start_step is {run.start_step} in {config}, but the phases before it end at step {begin}"
        )
    if (
        before
        and run.resume_from not in (None, before)
        and Path(str(run.resume_from)).name == run.resume_from
    ):
        raise ValueError(
            f"resume_from is {run.resume_from} in {config}, but the plan has {before} before it"
        )


def _check_follows(before: RunConfig, after: RunConfig, first: str, second: str) -> None:
    """ValueError where a phase cannot go on from the one before."""
    if before.phase == after.phase:
        raise ValueError(
            f"{first} and {second} are both phase {before.phase}; give one another name"
        )
    pairs = {
        "run": (before.run, after.run),
        "schedule": (before.schedule, after.schedule),
        "data.tokens_per_step": (before.data.tokens_per_step, after.data.tokens_per_step),
        "optim.lr": (before.optim.lr, after.optim.lr),
    }
    for name in vars(before.model):
        if name not in PHASES_DIFFER:
            pairs[f"model.{name}"] = (getattr(before.model, name), getattr(after.model, name))
    for name, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"{name} is {one} in {first} and {other} in {second}; make them agree")
    end, begin = before.theta_range[1], after.theta_range[0]
    if end != begin and not after.allow_theta_jump:
        raise ValueError(
            f"rope_theta ends at {end:,.0f} in {first} and begins at {begin:,.0f} in {second}; make them meet, or set "
            f"allow_theta_jump: true in {second}"
        )
