"""Gather what a plan is to leave, check that its parts agree, and say what is missing and which command makes it.

python -m scripts.deliverables --plan configs/plan_1b.yaml
python -m scripts.deliverables --plan configs/quickstart/plan.yaml --folder results/quickstart

Copies small files and writes relative links to checkpoints. results/... go to --folder (default: where the plan's report
goes); data/, models/ and checkpoints/ stand beside results/, or below another folder. A file that this command did not write
is never overwritten. Exit status 1 if something is missing or two parts disagree.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cli import CommandParser, user_errors
from data.manifest import file_hash
from evals.engines import folder_hash
from evals.report.build import finite, leaves, measured, results_table, texts
from evals.report.targets import LABELS, find
from evals.report.trained import settings, training
from export.gguf import read_config
from files import read_lines, read_object, write_json, write_text
from inference.gguf_tokenizer import read_vocabulary
from models.hf import newest_step
from scripts.export_gguf import target_files
from scripts.model_card import MARK, model_card
from training.checkpoint import identity, step_folders, step_of
from training.planning.plan import Plan, load_plan, scheduled_phases

LEFT_OUT = "by --skip"
RECORD = "deliverables.json"  # sha256 of what this command wrote, by path


@dataclass
class Row:
    """One deliverable: where it is, what is wrong with it ("" for nothing), and the command that makes it."""

    name: str
    problem: str = ""
    command: str = ""
    note: str = ""


@dataclass
class Work:
    """A plan whose deliverables are gathered."""

    plan: Plan
    path: Path
    checkpoint: Path
    folder: Path  # for results/...
    phases: dict[str, Path] = field(default_factory=dict)  # pretraining phase -> its checkpoints
    stages: dict[str, Path] = field(default_factory=dict)  # stage -> its checkpoints
    run: str = ""
    logs: Path = Path()
    store: Path = Path()

    @property
    def results(self) -> Path:
        """Where scripts/pipeline.py keeps measurements and decisions."""
        return Path("results") / self.run

    def named(self, name: str) -> Path:
        """Where a deliverable of that name goes."""
        if name.startswith("results/"):
            return self.folder / name.removeprefix("results/")
        return Path(name) if self.folder == Path("results") else self.folder / name

    def command(self, part: str) -> str:
        """The plan's command that has a word in it, filled in; the pipeline itself where there is none."""
        stages = [command for stage in self.plan.stages for command in stage.commands.values()]
        for command in [*self.plan.before.values(), *stages, *self.plan.after.values()]:
            if part in shlex.split(command):
                return command.format(
                    checkpoint=shlex.quote(str(self.checkpoint)), run=shlex.quote(self.run)
                )
        return f"python -m scripts.pipeline --plan {self.path}"

    def flag(self, module: str, name: str, default: str) -> str:
        """The value of a flag in the plan's command of a module."""
        words = shlex.split(self.command(module))
        return words[words.index(name) + 1] if module in words and name in words[:-1] else default

    def made_by(self) -> list[str]:
        """The plan's stages up to the one that left the checkpoint."""
        names, last = list(self.stages), self.stage()
        return names[: names.index(last) + 1] if last else []

    def stage(self) -> str | None:
        """The stage that left the checkpoint; None for one of pretraining."""
        parent = self.checkpoint.resolve().parent
        return next(
            (name for name, folder in self.stages.items() if folder.resolve() == parent), None
        )

    def logs_of(self, stage: str) -> Path:
        return self.logs / self.stages[stage].name


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument(
        "--checkpoint",
        type=newest_step,
        help="the model that is left (default: of the plan's last stage)",
    )
    parser.add_argument(
        "--folder", type=Path, help="for reports and logs (default: where the plan's report goes)"
    )
    args = parser.parse_args()
    with user_errors():
        work = open_plan(args.plan, args.checkpoint, args.folder)
        rows = gather(work)
        rows += [*report(work), *pictures(work), *ggufs(work), *scores(work)]
        print(table(rows))
        wrong = [row for row in rows if row.problem]
        for row in wrong:
            print(
                f"\n{row.name}: {row.problem}\n    {row.command}"
                if row.command
                else f"\n{row.name}: {row.problem}"
            )
        print(f"\n{len(rows) - len(wrong)} of {len(rows)} deliverables are there and agree")
    raise SystemExit(bool(wrong))


def open_plan(path: Path, checkpoint: Path | None, folder: Path | None) -> Work:
    """The plan and where its parts lie; ValueError where it has no checkpoint yet."""
    plan = load_plan(path)
    runs = [scheduled.run for scheduled in scheduled_phases(plan)]
    stages = {stage.name: Path(stage.leaves) for stage in plan.stages}
    phases = {run.phase: run.checkpoints for run in runs}
    if checkpoint is None:
        left = [folder for folder in [*phases.values(), *stages.values()] if step_folders(folder)]
        if not left:
            raise ValueError(
                f"{path} has left no checkpoint yet; run python -m scripts.pipeline --plan {path}"
            )
        checkpoint = step_folders(left[-1])[-1]
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no config.json")
    work = Work(
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
    work.folder = folder or Path(work.flag("evals.report", "--output", f"results/{work.run}"))
    return work


def gather(work: Work) -> list[Row]:
    """Copy, write and link what lies elsewhere. ValueError, before anything is written, where that would overwrite a file."""
    rows, contents, links = [], dict[Path, bytes](), dict[Path, Path]()
    for name, content, command in small_files(work):
        if content is None:
            rows.append(Row(str(work.named(name)), "missing", command))
        else:
            contents[work.named(name)] = content
    skipped = {
        event.get("stage")
        for event in read_lines(work.logs / "events.jsonl")
        if event["event"] == "skipped_stage"
    }
    for name, folder in checkpoint_links(work):
        place = work.named(name)
        if step_folders(folder):
            links[place] = folder
        elif place.name in skipped:
            rows.append(Row(str(place), note=LEFT_OUT))
        else:
            rows.append(
                Row(
                    str(place),
                    f"missing: {folder} has no checkpoint",
                    f"python -m scripts.pipeline --plan {work.path}",
                )
            )
    record = work.folder / RECORD
    written = (read_object(record) or {}).get("files", {})
    for place, content in contents.items():
        _check_own(place, content, written)
    for place, target in links.items():
        if (place.exists() or place.is_symlink()) and not (
            place.is_symlink() and place.resolve() == target.resolve()
        ):
            raise ValueError(
                f"{place} is not a link to {target}; move it away, then run this again"
            )
    for place, content in contents.items():
        write_text(place, content.decode())
        written[str(place)] = file_hash(place)
    for place, target in links.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()))
    write_json(
        record,
        {"plan": str(work.path), "checkpoint_hash": folder_hash(work.checkpoint), "files": written},
    )
    tokenizer = work.named("models/tokenizer")
    rows += [Row(str(place)) for place in contents if place.parent != tokenizer]
    rows += [
        Row(str(place), note=f"-> {step_folders(target)[-1]}") for place, target in links.items()
    ]
    return [*rows, _tokenizer_row(work, tokenizer)]


def _check_own(place: Path, content: bytes, written: dict[str, str]) -> None:
    """ValueError where a file is there that this command did not write, and that differs from what it would write."""
    if place.is_dir():
        raise ValueError(f"{place} is a folder; move it away, then run this again")
    if (
        place.is_file()
        and place.read_bytes() != content
        and file_hash(place) != written.get(str(place))
    ):
        raise ValueError(
            f"{place} was not written by this command, or was changed since; move it away, then run this again"
        )


def small_files(work: Work) -> Iterator[tuple[str, bytes | None, str]]:
    """Name, content (None: it can't be had yet) and the command that makes it, of each file that is copied or put together."""
    parts = [(phase, work.logs) for phase in work.phases]
    parts += [(stage, work.logs_of(stage)) for stage in work.made_by()]
    train = f"python -m scripts.pipeline --plan {work.path}"
    logs = dict.fromkeys(folder for _, folder in parts)
    told = [
        (folder / "training_log.md").read_text(encoding="utf-8")
        for folder in logs
        if (folder / "training_log.md").is_file()
    ]
    yield "results/training_log.md", "\n".join(told).encode() if told else None, train
    configs = {
        name: settings(folder / f"{_phase(work, name)}.config.yaml") for name, folder in parts
    }
    configs = {name: config for name, config in configs.items() if config}
    content = (
        f"# The resolved config of each phase and stage\n{yaml.safe_dump(configs, sort_keys=False)}"
    )
    yield "results/hyperparameters.yaml", content.encode() if configs else None, train
    off = [
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
    urls += (
        ["none: W&B was off" + ("" if len(off) == len(configs) else f" in {', '.join(off)}")]
        if off
        else []
    )
    yield "results/wandb_run_urls.txt", ("\n".join(urls) + "\n").encode() if urls else None, train
    commits = {
        name: commit(folder / f"{_phase(work, name)}.environment.json") for name, folder in parts
    }
    lines = [f"{name}: {text}" for name, text in commits.items() if text]
    same = set(filter(None, commits.values()))
    lines = [same.pop()] if len(same) == 1 else lines
    yield (
        "results/git_commit_hash.txt",
        ("\n".join(lines) + "\n").encode() if lines else None,
        train,
    )
    prepare = work.command("scripts.prepare_data")
    found = Path(
        work.flag("evals.report", "--contaminated", str(work.store / "contaminated_ids.json"))
    )
    yield "data/contaminated_ids.json", found.read_bytes() if found.is_file() else None, prepare
    folder = work.store / "tokenizer"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".json", ".txt", ".jinja"):
            yield (
                f"models/tokenizer/{path.name}",
                path.read_bytes(),
                work.command("scripts.train_tokenizer"),
            )


def _phase(work: Work, name: str) -> str:
    return work.stages[name].name if name in work.stages else name


def commit(path: Path) -> str:
    """The commit that a phase ran with; "" where that is not known."""
    known = read_object(path)
    if known is None:
        return ""
    if not known.get("git"):
        return "no git checkout"
    return known["git"] + ("" if known.get("git_clean") else " with uncommitted changes")


def checkpoint_links(work: Work) -> Iterator[tuple[str, Path]]:
    """checkpoints/phase1 ... of the last phase whose name begins so, others by their names, and one for each stage."""
    links = {}
    for phase, folder in work.phases.items():
        short = re.match(r"phase\d+", phase)
        links[short.group() if short else phase] = folder
    for name, folder in (links | work.stages).items():
        yield f"checkpoints/{name}", folder


def _tokenizer_row(work: Work, place: Path) -> Row:
    """The tokenizer of pretraining: the shards' own, which the phases' checkpoints must have too."""
    if not (place / "tokenizer.json").is_file():
        return Row(str(place), "missing", work.command("scripts.train_tokenizer"))
    for folder in work.phases.values():
        for step in step_folders(folder)[-1:]:
            if file_hash(step / "tokenizer.json") != file_hash(place / "tokenizer.json"):
                return Row(
                    str(place),
                    f"{step} has another tokenizer",
                    f"python -m scripts.pipeline --plan {work.path}",
                )
    return Row(str(place))


def report(work: Work) -> Iterator[Row]:
    """The report's four files: of this checkpoint, newer than the results and logs, and equal to each other."""
    command = work.command("evals.report")
    path = work.folder / "benchmark_results.json"
    content = read_object(path)
    if content is None or "targets" not in content:
        old = "" if content is None else f": {path} is of an earlier version of the report"
        yield Row(str(path), f"missing{old}", command)
        return
    problem = "; ".join(disagreements(work, content))
    yield Row(str(path), problem, command)
    expected = texts(content)
    for name in ("comparison_table.md", "qualitative_samples.txt", "report.html"):
        file = work.folder / name
        if not file.is_file():
            yield Row(str(file), "missing", command)
        else:
            yield Row(
                str(file),
                ""
                if file.read_text(encoding="utf-8") == expected[name]
                else f"does not say what {path} says",
                command,
            )


def disagreements(work: Work, content: dict[str, Any]) -> Iterator[str]:
    """Where benchmark_results.json differs from the checkpoint, the results files, the logs and the plan."""
    digest = folder_hash(work.checkpoint)
    if content["checkpoint_hash"] != digest:
        yield f"it is about {content['checkpoint']}, not about {work.checkpoint}"
        return
    results = Path(work.flag("evals.report", "--results", str(work.results)))
    evaluations = measured(results, digest)[0]
    if _plain(evaluations) != content["evaluations"]:
        names = [
            name
            for name in evaluations | content["evaluations"]
            if differs(evaluations, content["evaluations"], name)
        ]
        yield f"{results} has other scores of {', '.join(names)}"
    trained = training(work.logs, work.checkpoint)
    if _plain(trained) != content["training"]:
        yield f"its steps, tokens, losses, decisions or commit differ from {work.logs}"
    if _plain(results_table(work.path, results, evaluations, trained)) != content["targets"]:
        yield f"its results table is not that of {work.path}"
    made = {phase["name"]: phase["end"] for phase in trained["phases"]}
    made |= {stage["name"]: stage["steps"] for stage in trained["tuning"]}
    for name, folder in (work.phases | work.stages).items():
        for step in step_folders(folder)[-1:]:
            phase = _phase(work, name)
            if phase in made and step_of(step) != made[phase]:
                yield f"the log of {name} ends at step {made[phase]:,}, its newest checkpoint is {step}"
            config = settings(
                (work.logs_of(name) if name in work.stages else work.logs) / f"{phase}.config.yaml"
            )
            begin = next((part["begin"] for part in trained["phases"] if part["name"] == name), 0)
            if phase in made and config.get("steps") not in (None, made[phase] - begin):
                yield f"hyperparameters.yaml has {config['steps']:,} steps of {name}, its log has {made[phase] - begin:,}"
    decided = work.results / (work.stage() or "none") / "decision.json"
    decision = read_object(decided) or {}
    if decision and decision.get("of") != identity(work.checkpoint):
        yield f"{decided} is about another checkpoint; run the plan again"
    elif decision:
        for metric, estimate in leaves(decision.get("metrics", {})):
            said = find(content["evaluations"], metric)[0]
            if said and said["value"] != estimate["value"]:
                yield f"{metric} is {said['value']:g}, but {estimate['value']:g} in {decided}"
    known = work.named("results/git_commit_hash.txt")
    git = (content["training"] or {}).get("environment", {}).get("git")
    if git and known.is_file() and git not in known.read_text(encoding="utf-8"):
        yield f"its commit {git} is not in {known}"


def differs(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    return _plain(one.get(name)) != other.get(name)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(finite(value)))


def pictures(work: Work) -> Iterator[Row]:
    """The attention picture: of this checkpoint and of the length that the plan asks for."""
    from PIL import Image

    module = "scripts.visualize_attention"
    command = work.command(module)
    if module not in command.split():
        command = f"python -m {module} --checkpoint {work.checkpoint} --output {work.folder / 'attention_visualizations.png'}"
    path = Path(work.flag(module, "--output", str(work.folder / "attention_visualizations.png")))
    if not path.is_file():
        yield Row(str(path), "missing", command)
        return
    with Image.open(path) as image:
        about = dict(getattr(image, "text", {}))
    wanted = work.flag(module, "--input_length", about.get("input_length", "?"))
    if about.get("checkpoint_hash") != folder_hash(work.checkpoint):
        yield Row(str(path), f"is not a picture of {work.checkpoint}", command)
    elif about["input_length"] != wanted:
        yield Row(
            str(path), f"shows {about['input_length']} tokens; the plan asks for {wanted}", command
        )
    else:
        yield Row(str(path), note=f"{about['input_length']} tokens")


def ggufs(work: Work) -> Iterator[Row]:
    """The GGUF files, their parity with the checkpoint, and the model card beside them."""
    module = "scripts.export_gguf"
    command = work.command(module)
    if module not in command.split():
        return
    outfile = work.flag(module, "--outfile", "")
    files = target_files(work.flag(module, "--outtype", "f16,q8_0,q4_k_m"), outfile)
    parity = next(iter(files.values())).parent / "check_gguf.json"
    checks = f"python -m scripts.check_gguf --checkpoint {work.checkpoint} --gguf {' '.join(map(str, files.values()))}"
    checked = read_object(parity) or {}
    of_this = checked.get("checkpoint_hash") == folder_hash(work.checkpoint)
    verdicts = {row["file"]: row for row in checked.get("files", [])} if of_this else {}
    for path in files.values():
        row = verdicts.get(path.name)
        if not path.is_file():
            yield Row(str(path), "missing", command)
        elif (
            row is None
            or row["bytes"] != path.stat().st_size
            or path.stat().st_mtime > parity.stat().st_mtime
        ):
            yield Row(str(path), f"is not compared with {work.checkpoint} yet", checks)
        elif row["verdict"] == "wrong":
            yield Row(str(path), f"is not the same model: {', '.join(row['because'])}", command)
        else:
            yield Row(
                str(path), note=f"{path.stat().st_size / 1e6:.1f} MB, parity {row['verdict']}"
            )
    if all(path.is_file() for path in files.values()):
        yield _card(work, files, outfile, command)


def _card(work: Work, files: dict[str, Path], outfile: str, command: str) -> Row:
    place = list(files.values())[-1].parent / "README.md"
    if not place.is_file():
        return Row(str(place), "missing", command)
    if MARK not in place.read_text(encoding="utf-8"):
        return Row(str(place), note="not written by scripts.export_gguf; not checked")
    name = Path(outfile.replace("{outtype}", "")).stem.strip("-_.")
    vocabulary = read_vocabulary(work.checkpoint, read_config(work.checkpoint).vocab_size)
    wanted = model_card(work.checkpoint, files, name, vocabulary.template, work.logs, work.results)
    problem = (
        ""
        if place.read_text(encoding="utf-8") == wanted
        else "says something else than the results, the logs and the checkpoint"
    )
    return Row(str(place), problem, command)


def scores(work: Work) -> Iterator[Row]:
    """One row for each line of the results table: measured or not."""
    content = read_object(work.folder / "benchmark_results.json") or {}
    for target in content.get("targets", []):
        name = f"score: {target['title']}"
        if target["value"] is not None:
            near = ", ".join(LABELS[tier] for tier in target["near"])
            near = f", within one standard error of {near}" if near else ""
            yield Row(name, note=f"{target['value']:.4g}, {target['status']}{near}")
        else:
            yield Row(name, "not measured", measure_again(work, target))


def measure_again(work: Work, target: dict[str, Any]) -> str:
    """The command that measures the evaluations of a target's stage again; what is current is not repeated."""
    stages = {stage.name: stage for stage in work.plan.stages}
    last = work.stage()
    stage = stages.get(str(last) if target["stage"] == "final" else target["stage"])
    if stage is None or not stage.evals:
        return f"python -m scripts.pipeline --plan {work.path}"
    checkpoint = (
        work.checkpoint if stage.name == last else step_folders(work.stages[stage.name])[-1]
    )
    output = work.results / stage.name / f"{stage.evals[0]}.json"
    return work.plan.evals[stage.evals[0]].format(
        checkpoint=checkpoint, output=output, run=work.run
    )


def table(rows: list[Row]) -> str:
    """The rows as text: name, state, note."""
    width = max(len(row.name) for row in rows)

    def state(row: Row) -> str:
        if row.problem:
            return "missing" if row.problem.startswith(("missing", "not measured")) else "NOT RIGHT"
        return "left out" if row.note == LEFT_OUT else "there"

    return "\n".join(f"{row.name:<{width}}  {state(row):<9}  {row.note}".rstrip() for row in rows)


if __name__ == "__main__":
    main()
