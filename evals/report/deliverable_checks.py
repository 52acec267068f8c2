"""Checks of a plan's deliverables: the report, pictures, GGUF files and scores must agree."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.engines import folder_hash
from evals.report.build import finite, measured, results_table, texts
from evals.report.deliverables import Deliverable, PlanOutputs, config_name
from evals.report.model_card import MARK, model_card
from evals.report.stages import leaves
from evals.report.targets import LABELS, find
from evals.report.trained import settings, training
from export.gguf_plan import read_config
from export.targets import model_name, target_files
from files import read_object, step_folders
from inference.gguf_tokenizer import read_vocabulary
from training.checkpoint_files import model_hash, step_of


def report(outputs: PlanOutputs) -> Iterator[Deliverable]:
    """Check the report's four files against the checkpoint, results, logs and each other."""
    command = outputs.command("evals.report")
    path = outputs.folder / "benchmark_results.json"
    content = read_object(path)
    if content is None or not _is_current(content):
        old = "" if content is None else f": an earlier version of the report wrote {path}"
        yield Deliverable(str(path), f"missing{old}", command)
        return
    problem = "; ".join(disagreements(outputs, content))
    yield Deliverable(str(path), problem, command)
    expected = texts(content)
    for name in ("comparison_table.md", "qualitative_samples.txt", "report.html"):
        file = outputs.folder / name
        if not file.is_file():
            yield Deliverable(str(file), "missing", command)
        else:
            same = file.read_text(encoding="utf-8") == expected[name]
            yield Deliverable(str(file), "" if same else f"differs from {path}", command)


def _is_current(content: dict[str, Any]) -> bool:
    """Whether this version of the report wrote the content."""
    stages = content.get("stages", {}).values()
    return "targets" in content and all("gates" in stage for stage in stages)


def disagreements(outputs: PlanOutputs, content: dict[str, Any]) -> Iterator[str]:
    """Yield where benchmark_results.json differs from the checkpoint, results, logs or plan."""
    digest = folder_hash(outputs.checkpoint)
    if content["checkpoint_hash"] != digest:
        yield f"it reports {content['checkpoint']}, not {outputs.checkpoint}"
        return
    results = Path(outputs.flag("evals.report", "--results", str(outputs.results)))
    evaluations = measured(results, digest)[0]
    if _plain(evaluations) != content["evaluations"]:
        names = [
            name
            for name in evaluations | content["evaluations"]
            if differs(evaluations, content["evaluations"], name)
        ]
        yield f"{results} has different scores of {', '.join(names)}"
    trained = training(outputs.logs, outputs.checkpoint)
    if _plain(trained) != content["training"]:
        yield f"its steps, tokens, losses, decisions or commit differ from {outputs.logs}"
    if _plain(results_table(outputs.path, results, evaluations, trained)) != content["targets"]:
        yield f"its results table differs from {outputs.path}"
    last_steps = {phase["name"]: phase["end"] for phase in trained["phases"]}
    last_steps |= {stage["name"]: stage["steps"] for stage in trained["tuning"]}
    for name, folder in (outputs.phases | outputs.stages).items():
        for step in step_folders(folder)[-1:]:
            phase = config_name(outputs, name)
            if phase in last_steps and step_of(step) != last_steps[phase]:
                yield (
                    f"the log of {name} ends at step {last_steps[phase]:,}, "
                    f"its newest checkpoint is {step}"
                )
            config = settings(
                (outputs.logs_of(name) if name in outputs.stages else outputs.logs)
                / f"{phase}.config.yaml"
            )
            begin = next((row["begin"] for row in trained["phases"] if row["name"] == name), 0)
            steps = last_steps.get(phase, 0) - begin
            if phase in last_steps and config.get("steps") not in (None, steps):
                yield (
                    f"hyperparameters.yaml has {config['steps']:,} steps of {name}, "
                    f"its log has {steps:,}"
                )
    decision_path = outputs.results / (outputs.stage() or "none") / "decision.json"
    decision = read_object(decision_path) or {}
    if decision and decision.get("of") != model_hash(outputs.checkpoint):
        yield f"{decision_path} judges another checkpoint; run the plan again"
    elif decision:
        for metric, estimate in leaves(decision.get("metrics", {})):
            reported = find(content["evaluations"], metric)[0]
            if reported and reported["value"] != estimate["value"]:
                yield (
                    f"{metric} is {reported['value']:g}, "
                    f"but {estimate['value']:g} in {decision_path}"
                )
    commits = outputs.destination("results/git_commit_hash.txt")
    git = (content["training"] or {}).get("environment", {}).get("git")
    if git and commits.is_file() and git not in commits.read_text(encoding="utf-8"):
        yield f"its commit {git} is not in {commits}"


def differs(current: dict[str, Any], reported: dict[str, Any], name: str) -> bool:
    return _plain(current.get(name)) != reported.get(name)


def _plain(value: Any) -> Any:
    """Return the value as it is after a round trip through JSON."""
    return json.loads(json.dumps(finite(value)))


def pictures(outputs: PlanOutputs) -> Iterator[Deliverable]:
    """Check the attention picture: its checkpoint, and the length that the plan asks for."""
    from PIL import Image

    module = "scripts.visualize_attention"
    default = outputs.folder / "attention_visualizations.png"
    command = outputs.command(module)
    if module not in command.split():
        command = f"python -m {module} --checkpoint {outputs.checkpoint} --output {default}"
    path = Path(outputs.flag(module, "--output", str(default)))
    if not path.is_file():
        yield Deliverable(str(path), "missing", command)
        return
    with Image.open(path) as image:
        metadata = dict(getattr(image, "text", {}))
    length = outputs.flag(module, "--input_length", metadata.get("input_length", "?"))
    if metadata.get("checkpoint_hash") != folder_hash(outputs.checkpoint):
        yield Deliverable(str(path), f"does not show {outputs.checkpoint}", command)
    elif metadata["input_length"] != length:
        yield Deliverable(
            str(path),
            f"shows {metadata['input_length']} tokens; the plan asks for {length}",
            command,
        )
    else:
        yield Deliverable(str(path), note=f"{metadata['input_length']} tokens")


def ggufs(outputs: PlanOutputs) -> Iterator[Deliverable]:
    """Check the GGUF files, their parity with the checkpoint, and the model card."""
    module = "scripts.export_gguf"
    command = outputs.command(module)
    if module not in command.split():
        return
    outfile = outputs.flag(module, "--output", "")
    files = target_files(outputs.flag(module, "--outtype", "f16,q8_0,q4_k_m"), outfile)
    parity = next(iter(files.values())).parent / "check_gguf.json"
    paths = " ".join(map(str, files.values()))
    check = f"python -m scripts.check_gguf --checkpoint {outputs.checkpoint} --gguf {paths}"
    checked = read_object(parity) or {}
    is_current = checked.get("checkpoint_hash") == folder_hash(outputs.checkpoint)
    verdicts = {row["file"]: row for row in checked.get("files", [])} if is_current else {}
    for path in files.values():
        row = verdicts.get(path.name)
        if not path.is_file():
            yield Deliverable(str(path), "missing", command)
        elif (
            row is None
            or row["bytes"] != path.stat().st_size
            or path.stat().st_mtime > parity.stat().st_mtime
        ):
            yield Deliverable(str(path), f"is not compared with {outputs.checkpoint} yet", check)
        elif row["verdict"] == "wrong":
            yield Deliverable(
                str(path), f"is a different model: {', '.join(row['because'])}", command
            )
        else:
            yield Deliverable(
                str(path), note=f"{path.stat().st_size / 1e6:.1f} MB, parity {row['verdict']}"
            )
    if all(path.is_file() for path in files.values()):
        yield _card(outputs, files, outfile, command)


def _card(outputs: PlanOutputs, files: dict[str, Path], outfile: str, command: str) -> Deliverable:
    path = list(files.values())[-1].parent / "README.md"
    if not path.is_file():
        return Deliverable(str(path), "missing", command)
    if MARK not in path.read_text(encoding="utf-8"):
        return Deliverable(str(path), note="not written by scripts.export_gguf; not checked")
    name = model_name(outfile)
    vocabulary = read_vocabulary(outputs.checkpoint, read_config(outputs.checkpoint).vocab_size)
    card = model_card(
        outputs.checkpoint, files, name, vocabulary.template, outputs.logs, outputs.results
    )
    same = path.read_text(encoding="utf-8") == card
    problem = "" if same else "differs from the results, the logs and the checkpoint"
    return Deliverable(str(path), problem, command)


def scores(outputs: PlanOutputs) -> Iterator[Deliverable]:
    """Yield one deliverable for each score of the results table."""
    content = read_object(outputs.folder / "benchmark_results.json") or {}
    for target in content.get("targets", []):
        name = f"score: {target['title']}"
        if target["value"] is not None:
            near = ", ".join(LABELS[tier] for tier in target["near"])
            near = f", within one standard error of {near}" if near else ""
            yield Deliverable(name, note=f"{target['value']:.4g}, {target['status']}{near}")
        else:
            yield Deliverable(name, "not measured", measure_again(outputs, target))


def measure_again(outputs: PlanOutputs, target: dict[str, Any]) -> str:
    """Return the command that measures the evaluations of a target's stage again."""
    stages = {stage.name: stage for stage in outputs.plan.stages}
    last = outputs.stage()
    stage = stages.get(str(last) if target["stage"] == "final" else target["stage"])
    if stage is None or not stage.evals:
        return outputs.pipeline
    checkpoint = (
        outputs.checkpoint if stage.name == last else step_folders(outputs.stages[stage.name])[-1]
    )
    output = outputs.results / stage.name / f"{stage.evals[0]}.json"
    return outputs.plan.evals[stage.evals[0]].format(
        checkpoint=checkpoint, output=output, run=outputs.run
    )
