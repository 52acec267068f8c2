"""Checkpoints of a plan's phases that the plan renames, and settings that changed after training.

A phase cannot continue from a checkpoint that was trained for another plan: another base model, or
a learning rate or rope theta of a shorter schedule.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from files import read_object, step_folders
from training.checkpoint_files import TRAINER, model_hash, step_of
from training.config import RunConfig, to_dict
from training.planning.plan import ScheduledPhase
from training.run_folder import IDENTITY, unused
from training.schedulers import ScheduleConfig, WSDScheduler
from training.state import is_position
from yaml_file import read_yaml_file

SECTIONS = ("model", "data", "optim", "schedule")  # with settings that shape the model
SETTINGS = ("steps", "seed", "rope_theta", "schedules")
DO_NOT_SHAPE = ("data.store", "data.micro_batch_size", "data.accept_changed", "schedule.allow_rise")


class Renewal(NamedTuple):
    """Checkpoints to rename, with the reason."""

    folder: Path  # of a phase
    why: str
    steps: Sequence[Path] = ()  # its step folders to rename; (): the whole folder


def renewals(
    phases: Sequence[ScheduledPhase],
    number: int,
    extensions: Mapping[str, int],
    redo: Collection[str],
) -> list[Renewal]:
    """Return the checkpoints to rename before phases[number] trains.

    extensions: phase -> steps by which it was extended. redo: phases to repeat. Phases after one
    that is repeated or now longer are repeated too. ValueError if an extension would start again
    from step 0.
    """
    scheduled, run = phases[number], phases[number].run
    positions = {
        folder: position
        for folder in step_folders(run.checkpoints)
        if (position := read_object(folder / TRAINER)) and is_position(position)
    }
    newest = list(positions.values())[-1] if positions else {}
    earlier = step_folders(phases[number - 1].run.checkpoints) if number else []
    if run.phase in redo:
        own = [Renewal(run.checkpoints, f"{run.phase} is repeated (--redo)")]
    elif (
        earlier
        and newest.get("phase") == run.phase
        and newest["parent"] not in ("", model_hash(earlier[-1]))
    ):
        why = f"{run.phase} did not start from {earlier[-1]} and is repeated"
        own = [Renewal(run.checkpoints, why)]
    elif newest and extensions:
        own = _theta_renewal(scheduled, newest, extensions) or _decay_renewal(scheduled, positions)
    else:
        own = []
    listed = list[Renewal]()
    if own or newest.get("phase_end", scheduled.end) < scheduled.end:
        # Training this phase removes the later metrics from the log. The last phase comes first: if
        # this is interrupted, no later phase lacks its source.
        listed = [
            Renewal(phase.run.checkpoints, f"{phase.run.phase} follows {run.phase} and is repeated")
            for phase in reversed(phases[number + 1 :])
        ]
    return [renewal for renewal in listed + own if step_folders(renewal.folder)]


def _theta_renewal(
    scheduled: ScheduledPhase, position: Mapping[str, Any], extensions: Mapping[str, int]
) -> list[Renewal]:
    """Return the folder of an extended phase over whose steps rope theta changes."""
    run, steps = scheduled.run, position["phase_end"] - position["phase_start"]
    if run.phase not in extensions or len(set(run.theta_range)) == 1 or steps == run.steps:
        return []
    _check_begin(scheduled, scheduled.begin, "rope theta changes over its steps")
    why = (
        f"rope theta changes over the steps of {run.phase}, which now has {run.steps:,} instead"
        f" of {steps:,}; the phase is repeated from step {scheduled.begin:,}"
    )
    return [Renewal(run.checkpoints, why)]


def _decay_renewal(
    scheduled: ScheduledPhase, positions: Mapping[Path, dict[str, Any]]
) -> list[Renewal]:
    """Return the checkpoints of a phase whose learning rate decayed before an extension."""
    run = scheduled.run
    decayed = {
        folder for folder, where in positions.items() if _decayed_otherwise(where, run.schedule)
    }
    if not decayed:
        return []
    last_kept = [where["step"] for folder, where in positions.items() if folder not in decayed]
    resume = max(last_kept, default=scheduled.begin)
    expected = max(run.schedule.decay_begin, scheduled.begin)
    _check_begin(scheduled, resume, f"no checkpoint before its decay (step {expected:,}) was kept")
    # A best checkpoint without state has no position; it is as old as those around it.
    folders = step_folders(run.checkpoints)
    steps = [
        folder
        for folder in folders
        if folder in decayed or (folder not in positions and step_of(folder) > resume)
    ]
    why = (
        f"the learning rate of {folders[-1]} decayed for a shorter schedule; the decay is repeated"
    )
    if repeated := max(0, expected - resume):
        why += (
            f" from step {resume:,}, with {repeated:,} step{'s' * (repeated > 1)} before it, "
            f"because no checkpoint of step {expected:,} was kept"
        )
    return [Renewal(run.checkpoints, why, steps if len(steps) < len(folders) else ())]


def _decayed_otherwise(position: Mapping[str, Any], schedule: ScheduleConfig) -> bool:
    """Return True if a checkpoint was trained with a learning rate that `schedule` lacks."""
    rate = position.get("rate") or {}
    total, decay = rate.get("total_steps"), rate.get("decay_steps")
    if total is None or decay is None:
        return False  # an older version
    changed = (total, decay) != (schedule.total_steps, schedule.decay_steps)
    return bool(changed and position["step"] > min(total - decay, schedule.decay_begin))


def _check_begin(scheduled: ScheduledPhase, step: int, why: str) -> None:
    """ValueError if an extension would start again from step 0."""
    phase = scheduled.run.phase
    if step == 0:
        raise ValueError(
            f"the extension would start {phase} again from step 0, because {why}; "
            f"add --redo {phase} to accept that"
        )


def check_phases(
    phases: Sequence[ScheduledPhase], extensions: Mapping[str, int], redo: Collection[str]
) -> None:
    """ValueError if a phase cannot continue. Renames nothing; arguments as for renewals()."""
    for number, scheduled in enumerate(phases):
        if renewals(phases, number, extensions, redo):
            return  # this phase and those after it are trained again
        check_settings(scheduled)


def set_aside(renewal: Renewal) -> Path:
    """Move the checkpoints to <folder>.old<n>; return that folder.

    A new folder of the phase keeps the identity of its run (training/run_folder.py), so that the
    log folder still belongs to it.
    """
    folder = renewal.folder
    number = next(
        n for n in range(1, 1000) if not folder.with_name(f"{folder.name}.old{n}").exists()
    )
    aside = folder.with_name(f"{folder.name}.old{number}")
    with unused(folder):
        if renewal.steps:
            aside.mkdir()
            for step in renewal.steps:
                step.rename(aside / step.name)
            return aside
        folder.rename(aside)
    if (aside / IDENTITY).is_file():
        folder.mkdir()
        shutil.copyfile(aside / IDENTITY, folder / IDENTITY)
    return aside


def check_settings(scheduled: ScheduledPhase) -> None:
    """ValueError if a finished phase was trained with other settings than its config has now.

    It compares the settings that shape the model, with the config that the training logged. A
    schedule may differ if it has the same learning rates at the steps of the phase.
    """
    run, folders = scheduled.run, step_folders(scheduled.run.checkpoints)
    path = run.logs / f"{run.phase}.config.yaml"
    if not folders or step_of(folders[-1]) < scheduled.end or not path.is_file():
        return
    if not isinstance(logged := read_yaml_file(path), dict):
        return
    planned = yaml.safe_load(yaml.safe_dump(to_dict(run)))
    before, now = _shaping(logged), _shaping(planned)
    # The log of an older version may lack a setting.
    changed = [key for key, value in now.items() if key in before and before[key] != value]
    if changed and _same_rates(logged, scheduled):
        changed = [key for key in changed if not key.startswith("schedule.") and key != "optim.lr"]
    if _base_changed(logged, run, read_object(folders[-1] / TRAINER) or {}):
        changed.append("init_from")
    if changed:
        names = ", ".join(changed[:-1]) + " and " * (len(changed) > 1) + changed[-1]
        raise ValueError(
            f"{run.phase} was trained with another {names} than {scheduled.phase.config} has now; "
            f"repeat it with --redo {run.phase}, or undo the change"
        )


def _shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that shape the model, by dotted name."""
    flat = {key: values[key] for key in SETTINGS if key in values}
    for section in SECTIONS:
        inner = values.get(section) or {}
        flat |= {f"{section}.{key}": value for key, value in inner.items()}
    return {key: value for key, value in flat.items() if key not in DO_NOT_SHAPE}


def _same_rates(logged: Mapping[str, Any], scheduled: ScheduledPhase) -> bool:
    """Return True if a logged config has the phase's learning rate at each of its steps."""
    run, known = scheduled.run, ScheduleConfig.__dataclass_fields__
    try:
        schedule = {key: value for key, value in logged["schedule"].items() if key in known}
        before = WSDScheduler(ScheduleConfig(**schedule), logged["optim"]["lr"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    now = WSDScheduler(run.schedule, run.optim.lr)
    return all(before(step) == now(step) for step in range(scheduled.begin, scheduled.end))


def _base_changed(logged: Mapping[str, Any], run: RunConfig, position: Mapping[str, Any]) -> bool:
    """Return True if a phase that began from init_from has another one now."""
    base, parent = run.init_from, position.get("parent")
    if not base or base == logged.get("init_from") or position.get("phase_start"):
        return False
    return Path(base).is_dir() and parent not in ("", None, model_hash(Path(base)))
