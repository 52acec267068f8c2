"""Experiments as YAML: variants of one command, each trained with the same seeds and budget.

`trials` turns an experiment into runs; lab/run.py executes them, lab/record.py reports them.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ranges import (
    AnyFloat,
    NonEmptyText,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    at_least,
    check_fields,
)
from training.config import RunConfig, load
from training.planning.plan import load_plan
from training.settings import apply_overrides, load_settings, read_yaml
from training.speedrun import SpeedrunRun

PLAN = "scripts.pipeline"
CONFIGS = {  # entry point -> dataclass of its config
    "train.py": RunConfig,
    "train_gpt.py": SpeedrunRun,
    "train_gpt_medium.py": SpeedrunRun,
}
RESERVED = ("steps", "seed", "run", "output_dir", "log_dir", "until", "start_step", "resume_from")
UNTIMED_STEPS = 3  # first steps of a process: compilation and cache warm-up
NAME = re.compile(r"[\w+=][\w.+=-]*")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Variant:
    """Settings of one variant. An empty field takes the experiment's value."""

    config: NonEmptyText | None = None
    overrides: tuple[NonEmptyText, ...] = ()
    command: NonEmptyText | None = None


@dataclass(frozen=True)
class Budget:
    """The length of each run: exactly one of tokens, steps, seconds and own_steps."""

    tokens: PositiveInt | None = None
    steps: PositiveInt | None = None
    seconds: PositiveFloat | None = None  # of training steps, without validation and compilation
    own_steps: bool = False  # the steps of each variant's config
    # With a budget in seconds, short pilot runs of each variant measure the seconds per step.
    pilot_steps: Annotated[int, at_least(8)] = 30
    pilot_rounds: PositiveInt = 3

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set: {"tokens": 1000000}."""
        values = {"tokens": self.tokens, "steps": self.steps, "seconds": self.seconds}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        if self.own_steps:
            return "the steps of its config"
        return ", ".join(f"{value:,g} {name}" for name, value in self.limits.items()) or "the plan"


@dataclass(frozen=True)
class Compare:
    """The compared metric, the baseline variant and the target value."""

    baseline: NonEmptyText
    # A metric of metrics.jsonl, or FILE.json:KEY.KEY, relative to the folder of a run.
    metric: NonEmptyText = "val/loss"
    target: AnyFloat | None = None  # default: the baseline's mean final value
    sigma: PositiveFloat | None = None  # declared sd of a run, for a z-test against the target
    higher_is_better: bool = False
    also: tuple[NonEmptyText, ...] = ()  # more metrics whose final values are reported
    chain: bool = False  # also compare each variant with the previous one

    def __post_init__(self) -> None:
        check_fields(self, "compare")

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, the compared one first."""
        return tuple(dict.fromkeys((self.metric, *self.also)))


@dataclass(frozen=True)
class Experiment:
    """Variants x seeds of one command. ValueError names a wrong setting."""

    name: NonEmptyText
    claim: NonEmptyText  # one sentence: what the experiment is expected to show
    # Name -> overrides, or a Variant.
    variants: dict[str, Variant | tuple[NonEmptyText, ...] | None]
    compare: Compare
    # An entry point, scripts.pipeline, or any command that writes {logs}/metrics.jsonl.
    command: NonEmptyText = "train.py"
    config: NonEmptyText | None = None  # config of the entry point; for scripts.pipeline, the plan
    overrides: tuple[NonEmptyText, ...] = ()  # for all variants
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    ranks: PositiveInt = 1  # processes of a run
    threads: PositiveInt | None = None  # per process; default: all cores, divided by the processes
    validations: PositiveInt = 20  # per run, unless an override sets validation.every
    keep_checkpoints: bool = False  # of finished runs

    def __post_init__(self) -> None:
        check_fields(self)
        for key, name in (("name", self.name), *(("variants", name) for name in self.variants)):
            if not NAME.fullmatch(name):
                raise ValueError(f"{key}: {name!r} must consist of letters, digits and _ . + = -")
        if self.compare.baseline not in self.variants:
            raise ValueError(
                f"compare.baseline={self.compare.baseline!r} is not a variant; "
                f"variants: {', '.join(self.variants) or 'none'}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be different numbers, at least one")
        plans = {self.command_of(name) == PLAN for name in self.variants}
        if plans == {True}:
            if self.budget.limits or self.budget.own_steps:
                raise ValueError("budget has no effect on a plan, which sets its steps; remove it")
            if self.ranks > 1:
                raise ValueError("ranks has no effect on a plan, which sets its own; remove it")
        elif len(self.budget.limits) + self.budget.own_steps != 1:
            limits = [f"{value:,g} {name}" for name, value in self.budget.limits.items()]
            limits += ["own_steps"] * self.budget.own_steps
            raise ValueError(
                f"budget has {', '.join(limits) or 'no limit'}; set exactly one of tokens, steps, "
                "seconds and own_steps"
            )
        elif True in plans:
            raise ValueError("a plan cannot be compared with other commands at a common budget")

    def variant(self, name: str) -> Variant:
        """Return the variant of this name; a list of overrides becomes a Variant."""
        value = self.variants[name]
        if isinstance(value, Variant):
            return value
        return Variant(overrides=value or ())

    def command_of(self, name: str) -> str:
        return self.variant(name).command or self.command

    def overrides_of(self, name: str) -> list[str]:
        """Return a variant's overrides; those of the experiment apply only to its command."""
        variant = self.variant(name)
        return [*(() if variant.command else self.overrides), *variant.overrides]

    def config_of(self, name: str) -> str:
        """Return the config file of a variant; ValueError if it has none."""
        config = self.variant(name).config or self.config
        if config is None:
            raise ValueError(f"variant {name} has no config; set config for all variants")
        return config

    def is_external(self, name: str) -> bool:
        """Return True if a variant runs a command of another code base."""
        return "{logs}" in self.command_of(name)

    def needs_pilot(self, name: str) -> bool:
        """Return True if a pilot must convert a budget in seconds to steps.

        A command of another code base may take the seconds directly."""
        takes_steps = not self.is_external(name) or "{steps}" in self.command_of(name)
        return self.budget.seconds is not None and takes_steps


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment from YAML; ValueError names the wrong setting."""
    return load_settings(Experiment, path, overrides)


@dataclass(frozen=True)
class Trial:
    """One run of an experiment: a variant with a seed."""

    variant: str
    seed: int
    words: tuple[str, ...]  # the command; "python" is the interpreter of this process
    settings: dict[str, Any]  # input of the identity hash
    folder: Path  # metrics.jsonl, output.txt and trial.json
    checkpoints: Path
    working_folder: Path  # working folder of the command
    steps: int | None = None  # None: the plan or the external command decides
    files: dict[str, Any] = field(default_factory=dict)  # YAML files written before the run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> str:
        """Hash of everything that the experiment sets, without the code version."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_trial(
    experiment: Experiment, variant: str, seed: int, step_s: float | None = None
) -> Trial:
    """Make the run of a variant and a seed.

    step_s: seconds per step, measured by the variant's pilots; required for a budget in seconds.
    """
    label, budget = f"{variant}-{seed}", experiment.budget
    steps_of_seconds = round((budget.seconds or 0) / step_s) if step_s else 0
    if experiment.is_external(variant):
        steps = steps_of_seconds if experiment.needs_pilot(variant) else budget.steps
        return _external(experiment, variant, seed, label, steps, experiment.validations)
    if experiment.command_of(variant) == PLAN:
        return _plan(experiment, variant, seed, label)
    run = _read(experiment, variant)
    if budget.tokens:
        steps = _steps_of_tokens(run, budget.tokens)
    elif budget.seconds:
        steps = steps_of_seconds
    elif budget.own_steps:
        steps = run.steps
    else:
        steps = budget.steps or 0
    if steps < 1:
        raise ValueError(f"budget: {budget} is less than one step of variant {variant}; raise it")
    return _training(experiment, variant, seed, label, run, steps)


def pilots(experiment: Experiment, variant: str) -> list[Trial]:
    """Make the short runs without validation that measure a variant's seconds per step."""
    return [_pilot(experiment, variant, i) for i in range(experiment.budget.pilot_rounds)]


def _pilot(experiment: Experiment, variant: str, seed: int) -> Trial:
    label, steps = f"{variant}-{seed}-pilot", experiment.budget.pilot_steps
    if experiment.is_external(variant):
        return _external(experiment, variant, seed, label, steps, validations=0)
    run = _read(experiment, variant)
    return _training(experiment, variant, seed, label, run, steps, validate=False)


def check(experiment: Experiment, variants: Iterable[str]) -> None:
    """ValueError if the config or the overrides of a variant are wrong, before anything runs."""
    for variant in variants:
        if experiment.needs_pilot(variant):
            pilots(experiment, variant)
        else:
            make_trial(experiment, variant, experiment.seeds[0])


def _steps_of_tokens(run: RunConfig, tokens: int) -> int:
    """Return the number of steps closest to `tokens`; the batch size may change on the way."""
    steps = round(tokens / run.data.tokens_per_step)
    if (curve := run.schedules.get("batch_tokens")) is None:
        return steps
    for _ in range(8):  # a curve by fraction depends on the number of steps
        batch = curve.over(max(1, steps))
        steps = round(steps * tokens / max(1, sum(batch.rounded(step) for step in range(steps))))
    return steps


def _folders(experiment: Experiment, label: str) -> tuple[Path, Path]:
    """Return the log folder and the checkpoint folder of a run."""
    return Path("logs/lab", experiment.name, label), Path("checkpoints/lab", experiment.name, label)


def _read(experiment: Experiment, variant: str) -> RunConfig:
    """Resolve the config of a variant, before the experiment sets seed, steps and folders."""
    command, overrides = experiment.command_of(variant), experiment.overrides_of(variant)
    if command not in CONFIGS:
        known = ", ".join([*CONFIGS, PLAN])
        raise ValueError(
            f"command={command!r} is unknown; use {known}, or a command with {{logs}}, the folder "
            "where it writes metrics.jsonl"
        )
    for override in overrides:
        if (key := override.partition("=")[0]) in RESERVED:
            raise ValueError(f"variant {variant}: {key} is set by the experiment; remove it")
    return load_settings(CONFIGS[command], experiment.config_of(variant), overrides)


def _training(
    experiment: Experiment,
    variant: str,
    seed: int,
    label: str,
    run: RunConfig,
    steps: int,
    validate: bool = True,
) -> Trial:
    """Make a run of one of this project's entry points.

    The schedule keeps its proportions: warm-up and decay are scaled by steps / total_steps.
    """
    overrides, schedule = experiment.overrides_of(variant), run.schedule
    scale = steps / schedule.total_steps
    warmup = round(schedule.warmup_steps * scale)
    derived = [
        f"steps={steps}",
        f"schedule.total_steps={steps}",
        f"schedule.warmup_steps={warmup}",
        f"schedule.decay_steps={min(round(schedule.decay_steps * scale), steps - warmup)}",
        f"seed={seed}",
    ]
    if not validate:
        derived += ["validation.every=0", "validation.before=false"]
    elif not any(text.startswith("validation") and "every" in text for text in overrides):
        derived += [f"validation.every={max(1, steps // experiment.validations)}"]
    folder, checkpoints = _folders(experiment, label)
    destination = [
        f"run={experiment.name}-{label}",
        f"output_dir={checkpoints}",
        f"log_dir={folder}",
    ]
    config, command = experiment.config_of(variant), experiment.command_of(variant)
    load_settings(CONFIGS[command], config, [*overrides, *derived, *destination])  # may be refused
    launch = ["-m", "scripts.launch", f"--nproc_per_node={experiment.ranks}"]
    words = ["python", *(launch if experiment.ranks > 1 else []), command, "--config", config]
    settings = {
        "command": command,
        "config": apply_overrides(
            CONFIGS[command], read_yaml(Path(config)), [*overrides, *derived]
        ),
        "ranks": experiment.ranks,
        "threads": experiment.threads,
    }
    words += [*overrides, *derived, *destination]
    return Trial(variant, seed, tuple(words), settings, folder, checkpoints, Path(), steps)


def _plan(experiment: Experiment, variant: str, seed: int, label: str) -> Trial:
    """Make a run of a plan, in a separate working folder with copies of the phases' configs.

    An override applies to every phase; `NAME:key=value` applies to one phase or stage.
    """
    path, overrides = experiment.config_of(variant), experiment.overrides_of(variant)
    plan, values = load_plan(path), read_yaml(Path(path))
    stages = {stage.name for stage in plan.stages}
    configs = {load(phase.config).phase: read_yaml(Path(phase.config)) for phase in plan.phases}
    changes: dict[str, list[str]] = {name: [] for name in (*configs, *stages)}
    for override in overrides:
        owner, colon, setting = override.partition("=")[0].partition(":")
        if colon and owner not in changes:
            raise ValueError(
                f"variant {variant}: {override!r} names {owner}, which is not a phase or stage; "
                f"there are {', '.join(changes)}"
            )
        for name in [owner] if colon else configs:
            changes[name].append(override.removeprefix(f"{owner}:") if colon else override)
        if (setting or owner) in RESERVED:
            raise ValueError(
                f"variant {variant}: {setting or owner} is set by the experiment; remove it"
            )
    for phase, name in zip(plan.phases, configs, strict=True):
        load(phase.config, changes[name])  # may be refused
    files: dict[str, Any] = {
        f"{name}.yaml": apply_overrides(RunConfig, config, [*changes[name], f"seed={seed}"])
        for name, config in configs.items()
    }
    values["phases"] = [
        {**entry, "config": f"{name}.yaml"}
        for entry, name in zip(values["phases"], configs, strict=True)
    ]
    for stage in values.get("stages") or []:
        words = " ".join(shlex.quote(word) for word in [*changes[stage["name"]], f"seed={seed}"])
        stage["commands"] = {
            sentence: f"{command} {words}" if _trains(command) else command
            for sentence, command in stage["commands"].items()
        }
    files["plan.yaml"] = values
    folder, _ = _folders(experiment, label)
    settings = {"command": PLAN, "files": files, "threads": experiment.threads}
    return Trial(
        variant,
        seed,
        ("python", "-m", PLAN, "--plan", "plan.yaml"),
        settings,
        folder,
        folder / "checkpoints",
        folder,
        files=files,
    )


def _trains(command: str) -> bool:
    return re.search(r"\btrain_\w+\.py\b", command) is not None


def _external(
    experiment: Experiment,
    variant: str,
    seed: int,
    label: str,
    steps: int | None,
    validations: int,
) -> Trial:
    """Make a run of another code base's command, with the values of the budget filled in."""
    folder, checkpoints = _folders(experiment, label)
    values = {
        **{name: str(value) for name, value in experiment.budget.limits.items()},
        **({"steps": str(steps)} if steps else {}),
        "validations": str(validations),
        "seed": str(seed),
        "logs": str(folder.absolute()),
        "output": str(checkpoints.absolute()),
        "threads": str(experiment.threads or 1),
    }
    overrides = experiment.overrides_of(variant)
    template = shlex.split(experiment.command_of(variant)) + overrides
    unknown = {name for word in template for name in PLACEHOLDER.findall(word)} - values.keys()
    if unknown:
        raise ValueError(
            f"variant {variant}: {{{min(unknown)}}} in the command is unknown; available: "
            f"{', '.join(values)}"
        )
    words = tuple(PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in template)
    settings = {"command": template, "values": {**values, "logs": "", "output": ""}}
    return Trial(variant, seed, words, settings, folder, checkpoints, Path(), steps)
