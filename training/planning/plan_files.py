"""The files of a plan that the dial chose: configs of its phases and stages, a recipe, the plan."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from files import temporary, write_text
from models.nanollama import ModelConfig
from training.config import RunConfig
from training.planning.cards import GPUS
from training.planning.dial import Choice
from training.planning.dial_data import DOWNLOAD_MARGIN, MIXES, source_shares
from training.planning.dial_fit import PAIRS_PER_GPU, phase_seconds
from training.planning.dial_gates import milestone_gates, runs_humaneval, stage_gates
from training.planning.roofline import efficiency
from training.settings import ROOT, read_yaml
from yaml_file import SUFFIXES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also part of shell commands and paths
Files = dict[str, dict[str, Any]]  # file name -> content

SAVE_SECONDS = 1200.0  # between checkpoints, by the forecast: our judgement
LEAST_SAVES = 3  # of a phase or stage, however short
PAIR_TOKENS = 1024  # mean of a DPO pair, two answers with their prompts: our judgement
OUTPUTS = ("checkpoints", "logs", "results", "data/store")  # a plan writes to <output>/<name>
# Names that a config uses: of a run, of a plan, or of a folder that it writes.
USED = re.compile(rf"(?:^(?:run|name): *|\b(?:{'|'.join(OUTPUTS)})/)([\w.-]+)", re.MULTILINE)


class _Dumper(yaml.SafeDumper):
    """Writes long commands as folded text, and collections of plain values on one line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, ">" if len(text) > 60 else None)


_Dumper.add_representer(str, _text)


def check_new(folder: Path) -> None:
    """ValueError if the folder of a plan exists."""
    if folder.exists():
        plan = folder / "plan.yaml"
        run = f", or run it: python -m scripts.pipeline --plan {plan}" if plan.exists() else ""
        raise ValueError(
            f"{folder} exists, and plans are never overwritten; use another --name{run}"
        )


def write_plan(folder: Path, files: Files, headers: dict[str, str]) -> None:
    """Write the files of a plan into a new folder, whole or not at all.

    headers: file -> first lines, as comments. ValueError if the folder exists.
    """
    check_new(folder)
    scratch = temporary(folder)
    try:
        for name, content in files.items():
            text = yaml.dump(
                content, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=96
            )
            header = "".join(f"# {line}\n" for line in headers[name].splitlines())
            write_text(scratch / name, header + text)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_name(name: str) -> None:
    """ValueError unless a name is new and a plain folder name that needs no quotes in a shell.

    A plan of another's name would read its checkpoints and add to its logs, results or text.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r} must have letters, digits, '.', '_' and '-' only, such as weekend"
        )
    check_new(Path("configs") / name)
    files = {file for root in (Path(), ROOT) for file in (root / "configs").rglob("*")}
    configs = [file for file in files if file.suffix in SUFFIXES]
    for path in sorted(configs, key=lambda path: (len(path.parts), path)):
        shown = path.relative_to(ROOT) if path.is_absolute() else path
        is_beside = name == Path(shown.parts[1]).stem  # configs/<name>/ or configs/<name>.yaml
        if is_beside or name in USED.findall(path.read_text(encoding="utf-8")):
            raise ValueError(f"--name {name} is in use by {shown}; use another --name")
    for folder in (Path(output) / name for output in OUTPUTS):
        if folder.exists():
            raise ValueError(
                f"--name {name} is in use: {folder} exists; use another --name, or move it away"
            )


def config_headers(
    name: str, files: Files, about: str, notes: tuple[str, ...] = ()
) -> dict[str, str]:
    """First lines of each file: the command that uses it; in the plan and its first phase `notes`.

    about: what wrote the plan.
    """
    commands = {
        "plan.yaml": f"python -m scripts.pipeline --plan configs/{name}/plan.yaml\n{about}",
        "data.yaml": f"python -m scripts.prepare_data --config configs/{name}/data.yaml",
        "sft.yaml": f"python train_sft.py --config configs/{name}/sft.yaml --base_model FOLDER",
        "dpo.yaml": f"python train_dpo.py --config configs/{name}/dpo.yaml --base_model FOLDER",
    }
    headers = {
        file: commands.get(file, f"python train.py --config configs/{name}/{file}")
        for file in files
    }
    wrapped = [line for note in notes for line in textwrap.wrap(f"Note: {note}", 96)]
    for file in ("plan.yaml", "base.yaml"):
        headers[file] = "\n".join([headers[file], *wrapped])
    return headers


def save_interval(step_seconds: float, steps: int) -> int:
    """Steps between checkpoints: about SAVE_SECONDS, and at least LEAST_SAVES in all steps."""
    return max(1, min(round(SAVE_SECONDS / step_seconds), steps // LEAST_SAVES))


def _intervals(step_seconds: float, steps: int, validate: int) -> dict[str, dict[str, int]]:
    """Sections with the intervals of checkpoints and of validation, in steps.

    validate: wanted steps between validations. They are a multiple of those between checkpoints,
    since only a checkpoint with a validation loss can be the best.
    """
    every = save_interval(step_seconds, steps)
    return {
        "checkpoint": {"every": every},
        "validation": {"every": every * max(1, round(validate / every))},
    }


def continue_sources(phases: Sequence[dict[str, Any]], stored: Mapping[str, float]) -> None:
    """Set data.start_epoch of the later phases: they continue sources that earlier ones read.

    phases: configs in order, with steps of equal tokens; they are changed. stored: source ->
    training tokens in the store. A phase with min_document_tokens of a source selects documents
    anew, so it has no position to continue at and does not move that of the others.
    """
    step_tokens = phases[0]["data"]["tokens_per_step"]
    epochs: dict[str, float] = {}  # source -> epoch up to which the phases so far read it
    for number, config in enumerate(phases):
        data = config["data"]
        tokens, weights = config["steps"] * step_tokens, sum(data["mix"].values())
        sources = data["mix"].keys() - data.get("min_document_tokens", {}).keys()
        if number:  # an empty mapping replaces that of the phase which the config extends
            data["start_epoch"] = {
                source: float(f"{epochs[source]:.8g}") for source in sorted(sources & epochs.keys())
            }
        for source in sources:
            used = tokens * data["mix"][source] / weights
            epochs[source] = epochs.get(source, 0.0) + used / stored[source]


def gpu_files(choice: Choice, name: str) -> Files:
    """The files of a plan for GPUs, by name in configs/<name>/.

    data.start_epoch assumes that filters and held-out documents take all of DOWNLOAD_MARGIN. If
    they take less, a later phase skips some unread text rather than repeat text.
    """
    phases = _phases(choice, name)
    least = {source: tokens / DOWNLOAD_MARGIN for source, tokens in choice.downloads.items()}
    continue_sources(list(phases.values()), least)
    files: Files = {f"{phase}.yaml": content for phase, content in phases.items()}
    files["data.yaml"] = _recipe(choice, name)
    if choice.tuning_tokens:
        files |= {"sft.yaml": _sft(choice, name), "dpo.yaml": _dpo(choice, name)}
    files["plan.yaml"] = _plan(choice, name)
    return files


def _phases(choice: Choice, name: str) -> Files:
    """Configs of the pretraining phases; each extends the one before."""
    run, steps = choice.fit.run, choice.steps
    data, total, mixes = run.data, sum(steps.values()), MIXES[choice.request.goal]
    length, rows = data.sequence_length, data.micro_batch_size
    level = run.parallel.activation_checkpointing
    gpus, gpu = choice.request.gpus, GPUS[choice.request.gpu]

    def intervals(run: RunConfig, phase: str) -> dict[str, dict[str, int]]:
        validate = max(50, min(2000, total // 20))
        return _intervals(phase_seconds(run, gpus, gpu), steps[phase], validate)

    saves = intervals(run, "base")
    # Plain torchrun must keep the plan's milestones too; a phase's last step is kept anyway.
    pauses = [step for step in _milestones(choice) if step < steps["base"]]
    factors = efficiency()  # half of the slowest published run's speed stops a phase
    slow = factors.factor / factors.high / choice.fit.seconds_per_token / 2
    configs: Files = {
        "base": {
            "run": name,
            "phase": "base",
            "steps": steps["base"],
            "rope_theta": 10_000,
            "model": _shape(run.model, length),
            "parallel": {
                "strategy": run.parallel.strategy,
                "activation_checkpointing": level,
            },
            "data": {
                "store": f"data/store/{name}",
                "mix": mixes["base"],
                "sequence_length": length,
                "tokens_per_step": data.tokens_per_step,
                "micro_batch_size": rows,
            },
            "optim": {"lr": float(f"{choice.lr:.3g}")},
            "schedule": {
                "warmup_steps": max(1, min(2000, total // 50)),
                "total_steps": total,
                "decay_steps": steps["gold"],
            },
            "checkpoint": {**saves["checkpoint"], "keep": 3, "milestones": pauses},
            "startup": {
                "steps": min(500, max(20, total // 20)),
                "max_grad_norm": 10,
                "min_tokens_per_s": int(float(f"{slow:.2g}")),
            },
            "validation": {**saves["validation"], "rows": 256},
        }
    }
    previous, begin = "base", steps["base"]
    if longer := choice.fit.long_run:
        long = longer.data.sequence_length
        configs["long_context"] = {
            "extends": "base.yaml",
            "phase": "long_context",
            "resume_from": "base",
            "start_step": begin,
            "steps": steps["long_context"],
            "rope_theta": 500_000,
            "allow_theta_jump": True,
            "model": {"max_position_embeddings": long},
            "parallel": {"activation_checkpointing": longer.parallel.activation_checkpointing},
            "data": {
                "mix": mixes["long_context"],
                "min_document_tokens": {"pg19": long},
                "sequence_length": long,
                "micro_batch_size": longer.data.micro_batch_size,
            },
            **intervals(longer, "long_context"),
        }
        previous, begin = "long_context", begin + steps["long_context"]
    configs["gold"] = {
        "extends": f"{previous}.yaml",
        "phase": "gold",
        "resume_from": previous,
        "start_step": begin,
        "steps": steps["gold"],
        "allow_theta_jump": False,
        "parallel": {"activation_checkpointing": level},
        "data": {
            "mix": mixes["gold"],
            "min_document_tokens": {},
            "sequence_length": length,
            "micro_batch_size": rows,
        },
        **intervals(run, "gold"),
    }
    return configs


def _shape(model: ModelConfig, length: int) -> dict[str, Any]:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    names = (*sizes, *heads, "initializer_range")
    shape = {name: getattr(model, name) for name in names}
    return {**shape, "max_position_embeddings": length}


def _recipe(choice: Choice, name: str) -> dict[str, Any]:
    """Data recipe: the 1.1B plan's cleaning of the sources that this plan reads."""
    recipe = read_yaml(ROOT / "configs/data/nanollama_1b.yaml")
    shares = source_shares(choice.request.goal, choice.fit.long_rows)
    sources = {key: value for key, value in recipe["sources"].items() if key in shares}
    return {**recipe, "store": f"data/store/{name}", "sources": sources}


def _tuning(choice: Choice, name: str, stage: str, lr: float, step_tokens: int) -> dict[str, Any]:
    """A stage's config in configs/ with this plan's name, batches, rate and memory settings.

    step_tokens: of a step, for its time. Its micro-batch is the largest that fits the memory.
    """
    run = choice.fit.tuning[stage]
    steps = max(10, int(choice.tuning_tokens[stage] / step_tokens))
    values = read_yaml(ROOT / "configs" / f"{stage}.yaml")
    values |= {"run": name, "steps": steps}
    values["optim"]["lr"] = float(f"{lr:.2g}")
    values["schedule"]["warmup_steps"] = max(1, min(360, steps // 30))
    values["parallel"] = {
        "strategy": run.parallel.strategy,
        "activation_checkpointing": run.parallel.activation_checkpointing,
    }
    values["data"]["micro_batch_size"] = run.data.micro_batch_size
    seconds = step_tokens * choice.fit.seconds_per_token
    for section, interval in _intervals(seconds, steps, steps // 5).items():
        values[section] |= interval
    return values


def _sft(choice: Choice, name: str) -> dict[str, Any]:
    """SFT at a tenth of pretraining's rate (our judgement)."""
    step_tokens = choice.fit.tuning["sft"].data.tokens_per_step
    values = _tuning(choice, name, "sft", choice.lr / 10, step_tokens)
    values["data"]["tokens_per_step"] = step_tokens
    return values


def _dpo(choice: Choice, name: str) -> dict[str, Any]:
    """DPO at a thousandth of pretraining's rate (our judgement), as SmolLM2-1.7B's 1e-6 is."""
    pairs = PAIRS_PER_GPU * choice.request.gpus
    values = _tuning(choice, name, "dpo", choice.lr / 1000, pairs * PAIR_TOKENS)
    values["data"]["pairs_per_step"] = pairs
    return values


def _plan(choice: Choice, name: str) -> dict[str, Any]:
    goal, gpus, steps = choice.request.goal, choice.request.gpus, choice.steps
    store, run = f"data/store/{name}", f"checkpoints/{name}"
    python = "python -m scripts.launch --nproc_per_node=" + str(gpus) if gpus > 1 else "python"
    module = f"{python} -m" if gpus > 1 else "python -m"
    before = {
        f"Text: {source}": f"python -m scripts.download_data --dataset {source} --max_tokens "
        f"{tokens:g} --output_dir {store}"
        for source, tokens in choice.downloads.items()
    }
    before["Tokenizer"] = f"python -m scripts.train_tokenizer --config configs/{name}/data.yaml"
    before["Shards"] = f"python -m scripts.prepare_data --config configs/{name}/data.yaml"
    suite = (
        f"{module} scripts.run_evals --checkpoint {{checkpoint}} --suite milestone --data "
        f"perplexity={store} --contaminated {store}/contaminated_ids.json --output {{output}}"
    )
    total = sum(steps.values())
    phases: list[dict[str, Any]] = [
        {
            "config": f"configs/{name}/base.yaml",
            "milestones": [_milestone(choice, name, step) for step in _milestones(choice)],
        }
    ]
    if choice.fit.long_rows:
        phases.append({"config": f"configs/{name}/long_context.yaml"})
    last = _milestone(choice, name, total)
    if runs_humaneval(choice):
        last["evals"].append("code")
    phases.append({"config": f"configs/{name}/gold.yaml", "milestones": [last]})
    plan: dict[str, Any] = {"name": name, "ranks": gpus, "before": before}
    plan["evals"] = {"suite": suite}
    if runs_humaneval(choice):  # it runs programs that the model writes, in evals/sandbox.py
        plan["evals"]["code"] = (
            f"{module} evals.eval_code --checkpoint {{checkpoint}} --tasks humaneval --run_code "
            "--output {output}"
        )
    plan["phases"] = phases
    if goal == "chat":
        plan["stages"] = _stages(name, run, python)
    gguf = f"{run}/gguf/{name}-{{{{outtype}}}}.gguf"
    plan["after"] = {
        "Three GGUF files, with a model card": "python -m scripts.export_gguf --checkpoint "
        f"{{checkpoint}} --outtype f16,q8_0,q4_k_m --output {gguf}",
        "Loss curve": f"python -m scripts.plot_run logs/{name}",
        "Report": f"python -m evals.report --checkpoint {{checkpoint}} --name {name} --logs "
        f"logs/{name} --results results/{name} --contaminated {store}/contaminated_ids.json "
        f"--output_dir results/{name}",
    }
    return plan


def _milestones(choice: Choice) -> list[int]:
    """Steps of the base phase's milestones: its middle and its end."""
    base = choice.steps["base"]
    return [step for step in (base // 2, base) if step]


def _milestone(choice: Choice, name: str, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "evals": ["suite"],
        "gates": milestone_gates(choice, step),
        "advice": f"look at logs/{name}/metrics.jsonl and docs/log.md; lower optim.lr in "
        f"configs/{name}/base.yaml, then `python -m scripts.pipeline --plan "
        f"configs/{name}/plan.yaml --redo base`",
    }


def _stages(name: str, run: str, python: str) -> list[dict[str, Any]]:
    """SFT and DPO with their gates."""

    def advice(stage: str) -> str:
        return (
            f"lower optim.lr in configs/{name}/{stage}.yaml, then `python -m scripts.pipeline "
            f"--plan configs/{name}/plan.yaml --redo {stage}`"
        )

    return [
        {
            "name": "sft",
            "output_dir": f"{run}/sft",
            "commands": {
                "Conversations with verified answers": "python -m scripts.generate_chat_data "
                "--output_dir data/store/chat",
                "SFT": f"{python} train_sft.py --config configs/{name}/sft.yaml --base_model "
                "{checkpoint}",
            },
            "evals": ["suite"],
            "gates": stage_gates(0.05, 0.15),
            "advice": advice("sft"),
        },
        {
            "name": "dpo",
            "output_dir": f"{run}/dpo",
            "commands": {
                "DPO": f"{python} train_dpo.py --config configs/{name}/dpo.yaml --base_model "
                "{checkpoint}"
            },
            "evals": ["suite"],
            "gates": stage_gates(0.02, 0.08),
            "advice": advice("dpo"),
        },
    ]
