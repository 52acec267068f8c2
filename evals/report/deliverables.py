"""Deliverables of a plan: copy small files, link checkpoints, list what is missing.

The file names under results/, data/, models/ and checkpoints/ are fixed. A file that this module
did not write is never overwritten. evals/report/deliverable_checks.py compares the contents.
"""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cli import flag_value
from data.manifest import file_hash
from evals.engines import folder_hash
from evals.report.trained import settings
from files import read_object, step_folders, write_json, write_text
from models.hf import check_model_folder
from training.planning.plan import Plan, load_plan, scheduled_phases
from training.planning.stages import final_folder, skipped_stages

SKIPPED = "by --skip"
RECORD = "deliverables.json"  # path -> sha256 of each written file


@dataclass
class Deliverable:
    """A file, link or score that a plan produces. problem: "" if it is correct."""

    name: str
    problem: str = ""
    command: str = ""  # creates it again
    note: str = ""


@dataclass
class PlanOutputs:
    """A plan and the folders that it writes to."""

    plan: Plan
    path: Path
    checkpoint: Path
    folder: Path  # destination of results/...
    phases: dict[str, Path] = field(default_factory=dict)  # pretraining phase -> checkpoints
    stages: dict[str, Path] = field(default_factory=dict)  # stage -> checkpoints
    run: str = ""
    logs: Path = Path()
    store: Path = Path()

    @property
    def results(self) -> Path:
        """The folder in which scripts/pipeline.py writes evaluations and decisions."""
        return Path("results") / self.run

    def destination(self, name: str) -> Path:
        """Return the path of a deliverable, given its name, e.g. results/report.html."""
        if name.startswith("results/"):
            return self.folder / name.removeprefix("results/")
        return Path(name) if self.folder == Path("results") else self.folder / name

    @property
    def pipeline(self) -> str:
        return f"python -m scripts.pipeline --plan {self.path}"

    def command(self, word: str) -> str:
        """Return the plan's command that contains a word; without one, the pipeline's command."""
        stages = [command for stage in self.plan.stages for command in stage.commands.values()]
        for command in [*self.plan.before.values(), *stages, *self.plan.after.values()]:
            if word in shlex.split(command):
                return command.format(
                    checkpoint=shlex.quote(str(self.checkpoint)), run=shlex.quote(self.run)
                )
        return self.pipeline

    def flag(self, module: str, name: str, default: str) -> str:
        """Return the value of a flag in the plan's command of a module."""
        words = shlex.split(self.command(module))
        return (flag_value(words, name) if module in words else None) or default

    def stages_used(self) -> list[str]:
        """Return the stages up to the one that wrote the checkpoint, without skipped ones."""
        names, last = list(self.stages), self.stage()
        names = names[: names.index(last) + 1] if last else []
        return [name for name in names if name not in self.skipped]

    @property
    def skipped(self) -> set[str]:
        """The skipped stages; a stage whose checkpoint is the final model is in use."""
        return skipped_stages(self.logs) - {self.stage() or ""}

    def stage(self) -> str | None:
        """Return the stage that wrote the checkpoint; None for a pretraining phase."""
        parent = self.checkpoint.resolve().parent
        return next(
            (name for name, folder in self.stages.items() if folder.resolve() == parent), None
        )

    def logs_of(self, stage: str) -> Path:
        return self.logs / self.stages[stage].name


def open_plan(path: Path, checkpoint: Path | None, folder: Path | None) -> PlanOutputs:
    """Load a plan and find its folders; raise ValueError if it has no checkpoint yet."""
    plan = load_plan(path)
    runs = [scheduled.run for scheduled in scheduled_phases(plan)]
    stages = {stage.name: Path(stage.output_dir) for stage in plan.stages}
    phases = {run.phase: run.checkpoints for run in runs}
    if checkpoint is None:
        trained = final_folder(phases | stages, runs[0].logs)
        if trained is None:
            raise ValueError(
                f"{path} has no checkpoint yet; run python -m scripts.pipeline --plan {path}"
            )
        checkpoint = step_folders(trained)[-1]
    check_model_folder(checkpoint)
    outputs = PlanOutputs(
        plan,
        path,
        checkpoint,
        Path(),
        phases,
        stages,
        runs[0].run,
        runs[0].logs,
        Path(runs[-1].data.store),
    )
    outputs.folder = folder or Path(
        outputs.flag("evals.report", "--output_dir", f"results/{outputs.run}")
    )
    return outputs


def gather(outputs: PlanOutputs) -> list[Deliverable]:
    """Copy files and link checkpoints into the destination folders.

    Raises ValueError, before writing anything, if that would overwrite a foreign file.
    """
    deliverables, contents, links = [], dict[Path, bytes](), dict[Path, Path]()
    for name, content, command in small_files(outputs):
        if content is None:
            deliverables.append(Deliverable(str(outputs.destination(name)), "missing", command))
        else:
            contents[outputs.destination(name)] = content
    skipped = outputs.skipped
    obsolete: list[Path] = []  # links to the checkpoints of skipped stages
    for name, folder in checkpoint_links(outputs):
        path = outputs.destination(name)
        if path.name in skipped:
            deliverables.append(Deliverable(str(path), note=SKIPPED))
            obsolete += [path] if path.is_symlink() and path.resolve() == folder.resolve() else []
        elif step_folders(folder):
            links[path] = folder
        else:
            deliverables.append(
                Deliverable(
                    str(path),
                    f"missing: {folder} has no checkpoint",
                    outputs.pipeline,
                )
            )
    record = outputs.folder / RECORD
    written = (read_object(record) or {}).get("files", {})
    for path, content in contents.items():
        _check_written_by_us(path, content, written)
    for path, target in links.items():
        if (path.exists() or path.is_symlink()) and not (
            path.is_symlink() and path.resolve() == target.resolve()
        ):
            raise ValueError(
                f"{path} is not a link to {target}; move it away, then run this command again"
            )
    for path, content in contents.items():
        write_text(path, content.decode())
        written[str(path)] = file_hash(path)
    for path in obsolete:
        path.unlink()
    for path, target in links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
    write_json(
        record,
        {
            "plan": str(outputs.path),
            "checkpoint_hash": folder_hash(outputs.checkpoint),
            "files": written,
        },
    )
    tokenizer = outputs.destination("models/tokenizer")
    deliverables += [Deliverable(str(path)) for path in contents if path.parent != tokenizer]
    deliverables += [
        Deliverable(str(path), note=f"-> {step_folders(target)[-1]}")
        for path, target in links.items()
    ]
    return [*deliverables, _check_tokenizer(outputs, tokenizer)]


def _check_written_by_us(path: Path, content: bytes, written: dict[str, str]) -> None:
    """Raise ValueError for a file that differs and that this command did not write."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; move it away, then run this command again")
    if (
        path.is_file()
        and path.read_bytes() != content
        and file_hash(path) != written.get(str(path))
    ):
        raise ValueError(
            f"{path} was not written by this command, or was changed since; "
            "move it away, then run this command again"
        )


def small_files(outputs: PlanOutputs) -> Iterator[tuple[str, bytes | None, str]]:
    """Yield (name, content, command) of each copied or assembled file; content None: missing."""
    log_folders = [(phase, outputs.logs) for phase in outputs.phases]
    log_folders += [(stage, outputs.logs_of(stage)) for stage in outputs.stages_used()]
    train = outputs.pipeline
    logs = dict.fromkeys(folder for _, folder in log_folders)
    training_logs = [
        (folder / "training_log.md").read_text(encoding="utf-8")
        for folder in logs
        if (folder / "training_log.md").is_file()
    ]
    text = "\n".join(training_logs)
    yield "results/training_log.md", text.encode() if training_logs else None, train
    configs = {
        name: settings(folder / f"{config_name(outputs, name)}.config.yaml")
        for name, folder in log_folders
    }
    configs = {name: config for name, config in configs.items() if config}
    content = (
        f"# The resolved config of each phase and stage\n{yaml.safe_dump(configs, sort_keys=False)}"
    )
    yield "results/hyperparameters.yaml", content.encode() if configs else None, train
    without_wandb = [
        name
        for name, config in configs.items()
        if not (config.get("log") or {}).get("wandb_project")
    ]
    files = [folder / "wandb_run_urls.txt" for folder in logs]
    urls = [
        line
        for path in files
        if path.is_file()
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    ]
    names = ", ".join(without_wandb)
    urls += (
        ["none: W&B was off" + ("" if len(without_wandb) == len(configs) else f" in {names}")]
        if without_wandb
        else []
    )
    yield "results/wandb_run_urls.txt", ("\n".join(urls) + "\n").encode() if urls else None, train
    commits = {
        name: commit(folder / f"{config_name(outputs, name)}.environment.json")
        for name, folder in log_folders
    }
    lines = [f"{name}: {text}" for name, text in commits.items() if text]
    unique = set(filter(None, commits.values()))
    lines = [unique.pop()] if len(unique) == 1 else lines
    yield (
        "results/git_commit_hash.txt",
        ("\n".join(lines) + "\n").encode() if lines else None,
        train,
    )
    contaminated = Path(
        outputs.flag("evals.report", "--contaminated", str(outputs.store / "contaminated_ids.json"))
    )
    ids = contaminated.read_bytes() if contaminated.is_file() else None
    yield "data/contaminated_ids.json", ids, outputs.command("scripts.prepare_data")
    folder = outputs.store / "tokenizer"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".json", ".txt", ".jinja"):
            yield (
                f"models/tokenizer/{path.name}",
                path.read_bytes(),
                outputs.command("scripts.train_tokenizer"),
            )


def config_name(outputs: PlanOutputs, name: str) -> str:
    return outputs.stages[name].name if name in outputs.stages else name


def commit(path: Path) -> str:
    """Return the git commit of a phase's environment.json; "" if unknown."""
    environment = read_object(path)
    if environment is None:
        return ""
    if not environment.get("git"):
        return "no git checkout"
    return environment["git"] + (
        "" if environment.get("git_clean") else " with uncommitted changes"
    )


def checkpoint_links(outputs: PlanOutputs) -> Iterator[tuple[str, Path]]:
    """Yield (link, folder) for each phase and stage.

    phase1_pretrain and phase1_... share the link checkpoints/phase1: the last phase wins.
    """
    links = {}
    for phase, folder in outputs.phases.items():
        short = re.match(r"phase\d+", phase)
        links[short.group() if short else phase] = folder
    for name, folder in (links | outputs.stages).items():
        yield f"checkpoints/{name}", folder


def _check_tokenizer(outputs: PlanOutputs, path: Path) -> Deliverable:
    """Check that the phases' checkpoints have the tokenizer of the token shards."""
    if not (path / "tokenizer.json").is_file():
        return Deliverable(str(path), "missing", outputs.command("scripts.train_tokenizer"))
    for folder in outputs.phases.values():
        for step in step_folders(folder)[-1:]:
            if file_hash(step / "tokenizer.json") != file_hash(path / "tokenizer.json"):
                return Deliverable(
                    str(path),
                    f"{step} has a different tokenizer",
                    outputs.pipeline,
                )
    return Deliverable(str(path))


def table(deliverables: list[Deliverable]) -> str:
    """Return the deliverables as aligned text: name, state, note."""
    width = max(len(item.name) for item in deliverables)

    def state(item: Deliverable) -> str:
        if item.problem:
            return "missing" if item.problem.startswith(("missing", "not measured")) else "WRONG"
        return "skipped" if item.note == SKIPPED else "present"

    return "\n".join(
        f"{item.name:<{width}}  {state(item):<7}  {item.note}".rstrip() for item in deliverables
    )
