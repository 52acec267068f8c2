"""Stages of a plan: configs that commands name, averages that stages need, and --skip."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import read_lines, step_folders
from training.settings import ROOT, read_yaml
from yaml_file import SUFFIXES

if TYPE_CHECKING:
    from training.planning.plan import PlanStage, ScheduledPhase

AVERAGE = "scripts.average_checkpoints"


def skipped_stages(logs: Path) -> set[str]:
    """Return the stages that a plan skipped (--skip) and has not used again, from the run's logs.

    A stage is used again when it is trained, and when a call without --skip ends ("used_stage").
    """
    skipped: dict[str, str] = {}  # stage -> time of its newest event
    for event in read_lines(logs / "events.jsonl"):
        if event.get("event") == "skipped_stage":
            skipped[str(event.get("stage"))] = str(event.get("time"))
        elif event.get("event") == "used_stage":
            skipped.pop(str(event.get("stage")), None)
    return {name for name, time in skipped.items() if not _was_trained(logs / name, time)}


def _was_trained(logs: Path, since: str) -> bool:
    return any(
        event.get("event") in ("begun", "resumed") and str(event.get("time")) > since
        for event in read_lines(logs / "events.jsonl")
    )


def final_folder(folders: Mapping[str, Path], logs: Path) -> Path | None:
    """Return the last folder with checkpoints whose stage is not skipped; None without one.

    folders: phase or stage -> its checkpoints, in order of training.
    """
    skipped = skipped_stages(logs)
    trained = [path for name, path in folders.items() if name not in skipped and step_folders(path)]
    return trained[-1] if trained else None


def stage_settings(stage: "PlanStage") -> dict[str, dict[str, Any]]:
    """Return the content of the configs that a stage's commands name."""
    words = {word for command in stage.commands.values() for word in shlex.split(command)}
    return {word: read_yaml(Path(word)) for word in sorted(words) if word.endswith(SUFFIXES)}


def config_exists(name: str) -> bool:
    """Return True if read_yaml would find a config, here or in the project's folder."""
    return any((folder / name).is_file() for folder in (Path(), ROOT))


def evaluation_settings(command: str) -> dict[str, Any]:
    """Return the content of the configs that an evaluation's command names, as JSON values.

    These are YAML files, suites in configs/evals, and the YAML files that a suite lists.
    """
    words = [part for word in shlex.split(command) for part in word.split("=", 1)]
    suites = [name for flag, name in pairwise(words) if flag == "--suite"]
    names = [*words, *(f"configs/evals/{name}{suffix}" for name in suites for suffix in SUFFIXES)]
    contents: dict[str, Any] = {}
    for name in names:  # grows by the files that a suite lists
        if name.endswith(SUFFIXES) and name not in contents and config_exists(name):
            contents[name] = read_yaml(Path(name))
            listed = contents[name].get("evals")
            names += [str(entry) for entry in listed] if isinstance(listed, dict) else []
    return dict(json.loads(json.dumps(contents, default=str)))


def check_average_is_there(stage: "PlanStage", missed: Mapping[Path, str]) -> None:
    """ValueError if a stage's commands or configs name an average that is missing.

    missed: average -> why the plan has no such average.
    """
    texts = f"{stage.commands} {stage_settings(stage)}"
    for average, why in missed.items():
        if not average.is_dir() and re.search(rf"{re.escape(str(average))}(?!\d)", texts):
            raise ValueError(
                f"stage {stage.name} needs {average}, which is missing: {why}; remove the cause "
                "and run the plan again, or name another base model in the stage"
            )


def check_stage_averages(stages: Sequence["PlanStage"], phases: Sequence["ScheduledPhase"]) -> None:
    """ValueError if a phase will not keep the checkpoints that a stage averages.

    A stage that already has a checkpoint is not checked.
    """
    by_folder = {scheduled.run.checkpoints: scheduled for scheduled in phases}
    for stage in stages:
        for command in stage.commands.values():
            words = shlex.split(command)
            if AVERAGE not in words or step_folders(Path(stage.output_dir)):
                continue
            # The command itself reports errors in these flags.
            tokens = [token for word in words for token in word.split("=", 1)]
            flags = {flag.replace("-", "_"): value for flag, value in pairwise(tokens)}
            scheduled = by_folder.get(Path(flags.get("__phase_folder", "")))
            numbers = [flags.get(f"__{name}", "") for name in ("last", "every", "until")]
            if scheduled is None or not all(text.isdecimal() or not text for text in numbers):
                continue
            last, every, until = (int(text) if text else None for text in numbers)
            _check_kept(stage.name, scheduled, last or 5, every or 1, until)


def _check_kept(
    stage: str, scheduled: "ScheduledPhase", last: int, every: int, until: int | None
) -> None:
    """ValueError if fewer than `last` checkpoints of a phase are on disk when it has ended."""
    run, begin, end = scheduled.run, scheduled.begin, scheduled.end
    config = run.checkpoint
    pauses = {milestone.step for milestone in scheduled.phase.milestones}
    saved = [i for i in range(begin + 1, end + 1) if config.is_due(i) or i in pauses or i == end]
    forever = {end, *pauses, *config.milestones}

    def count(steps: Sequence[int]) -> int:
        return sum(step % every == 0 and step <= (until or end) for step in steps)

    where = f"stage {stage} averages the last {last} checkpoints of {run.phase}"
    if count(saved) < last:
        raise ValueError(
            f"{where}, which saves {count(saved)} of them; lower --last or checkpoint.every"
        )
    kept = sorted({*saved[-config.keep :], *(step for step in saved if step in forever)})
    if count(kept) < last:
        needed = next(n for n in range(1, len(saved) + 1) if count(saved[-n:]) >= last)
        raise ValueError(
            f"{where}, but checkpoint.keep={config.keep} leaves {count(kept)} of them at its end; "
            f"set it to {needed}"
        )
