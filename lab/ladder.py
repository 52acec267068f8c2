"""The speedrun ladder: a sequence of configs (rungs); each extends the previous one.

The comment at the top of a rung's file has fields such as `# Change: ...` and `# Why: ...`, with
indented continuation lines. docs/learning_path.md is written from them (lab/learning_path.py).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import ROOT
from lab.experiment import Budget, Compare, Experiment, Variant
from yaml_file import parse_yaml

FULL = Path("configs/speedrun")
MINIATURE, MEDIUM = FULL / "miniature", FULL / "medium"
VALIDATIONS = {FULL: 20, MINIATURE: 10, MEDIUM: 20}  # 20 take longer than 50 steps of a miniature
COMMANDS = {FULL: "train_gpt.py", MINIATURE: "train_gpt.py", MEDIUM: "train_gpt_medium.py"}
FILE = re.compile(r"(\d\d)_(\w+)\.yaml")
RANGE = re.compile(r"(\d+)(?:-(\d+))?")
LENGTHS = ("total_steps", "decay_steps")  # set by every rung, so not part of its change


@dataclass(frozen=True)
class Rung:
    """One config of a ladder."""

    number: int
    path: Path
    text: str  # of the file
    facts: dict[str, str]  # fields of the comment at the top: "Change" -> text
    values: dict[str, Any]  # what the file itself sets

    @property
    def name(self) -> str:
        """The name of the file, e.g. "04_muon"."""
        return self.path.stem

    @property
    def short_name(self) -> str:
        """The name without the number."""
        return self.name.partition("_")[2]

    @property
    def changes(self) -> dict[str, Any]:
        """Return the settings that the rung changes, without its length."""
        changes = {k: v for k, v in self.values.items() if k not in ("extends", "steps")}
        schedule = changes.pop("schedule", {})
        shape = {key: value for key, value in schedule.items() if key not in LENGTHS}
        return {**changes, "schedule": shape} if shape else changes


def read_ladder(folder: Path) -> list[Rung]:
    """Read the rungs of a folder, in order. ValueError if there are none.

    A folder that does not exist here is looked up in the project.
    """
    present = folder if folder.is_dir() else ROOT / folder
    files = sorted(present.glob("[0-9][0-9]_*.yaml"))
    if not files:
        raise ValueError(
            f"{folder} has no rungs; give a folder with files such as 00_baseline.yaml"
        )
    rungs = []
    for file in files:
        match, text = FILE.fullmatch(file.name), file.read_text(encoding="utf-8")
        if match is None:
            raise ValueError(f"{file} must have a name such as 04_muon.yaml")
        rungs.append(Rung(int(match[1]), folder / file.name, text, _facts(text), parse_yaml(text)))
    return rungs


def _facts(text: str) -> dict[str, str]:
    """Return the `# Key: text` fields of the comment at the top of a file."""
    facts: dict[str, str] = {}
    key = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if match := re.fullmatch(r"# ([A-Z]\w*): (.*)", line):
            key = match[1]
            facts[key] = match[2]
        elif key and line.startswith("#   "):
            facts[key] += f" {line[4:].strip()}"
    return facts


def select_rungs(ladder: Sequence[Rung], words: Sequence[str]) -> list[Rung]:
    """Return the selected rungs and the baseline, in the ladder's order.

    A word is a number, a range such as 0-9, a name, or a comma-separated list of these; no words
    select all rungs. ValueError for an unknown word names the nearest rungs.
    """
    if not words:
        return list(ladder)
    chosen = {ladder[0].name}
    for word in (item for text in words for item in text.split(",") if item):
        match = RANGE.fullmatch(word)
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            named = [rung.name for rung in ladder if first <= rung.number <= last]
        else:
            named = [rung.name for rung in ladder if word in (rung.name, rung.short_name)]
        if not named:
            raise ValueError(_unknown(ladder, word, match))
        chosen.update(named)
    return [rung for rung in ladder if rung.name in chosen]


def _unknown(ladder: Sequence[Rung], word: str, match: re.Match[str] | None) -> str:
    """Return the error message for a word that names no rung."""
    if match:
        number = int(match[1])
        nearest = sorted(ladder, key=lambda rung: abs(rung.number - number))[:3]
        names = [rung.name for rung in sorted(nearest, key=lambda rung: rung.number)]
    else:
        by_name = {name: rung for rung in ladder for name in (rung.name, rung.short_name)}
        close = difflib.get_close_matches(word, by_name, n=5, cutoff=0.3)
        names = list(dict.fromkeys(by_name[name].name for name in close))[:3]
    names = names or [ladder[0].name, ladder[-1].name]
    return (
        f"--rungs {word}: {ladder[0].path.parent} has no such rung; "
        f"nearest: {', '.join(names)}; numbers run from 0 to {ladder[-1].number}"
    )


def ladder_experiment(folder: Path, rungs: Sequence[Rung], seeds: int) -> Experiment:
    """Make the experiment of these rungs: each trains for its config's steps, with each seed.

    The target is the baseline's mean final loss.
    """
    kind = "" if folder == FULL else f"_{folder.name}"
    return Experiment(
        name=f"ladder{kind}",
        claim="Each rung of the speedrun ladder reaches the baseline's loss with fewer tokens.",
        command=COMMANDS[folder],
        variants={rung.name: Variant(config=str(rung.path)) for rung in rungs},
        seeds=tuple(range(seeds)),
        budget=Budget(own_steps=True),
        validations=VALIDATIONS[folder],
        compare=Compare(baseline=rungs[0].name, chain=True),
    )
