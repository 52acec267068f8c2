"""The files of a plan that the dial chose: configs of its phases and stages, a recipe, the plan."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from data.corpus.sources import HUB_SOURCES
from files import temporary, write_text
from models.nanollama import ModelConfig
from training.planning.cost import LAW_RANGE, forecast_loss
from training.planning.dial import (
    AVAILABLE,
    DOWNLOAD_MARGIN,
    MIXES,
    Choice,
    long_run,
    source_shares,
)
from training.planning.roofline import efficiency
from training.settings import read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also part of shell commands and paths
Files = dict[str, dict[str, Any]]  # file name -> content

# Limits of the gates: bits per byte / its forecast, within the range of the law and outside of it.
# Before its decay a model has about 5 % more. All three are our judgement.
GO, NO_GO = 1.08, 1.2
FAR_GO, FAR_NO_GO = 1.2, 1.4
BEFORE_DECAY = 1.05


class _Dumper(yaml.SafeDumper):
    """Writes long commands as folded text, and collections of plain values on one line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, ">" if len(text) > 60 else None)


_Dumper.add_representer(str, _text)


def check_new(folder: Path) -> None:
    """ValueError if the folder of a plan exists."""
    if folder.exists():
        raise ValueError(
            f"{folder} exists, and plans are never overwritten; use another --name, or run it: "
            f"python -m scripts.pipeline --plan {folder / 'plan.yaml'}"
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
    """ValueError unless a name is a plain folder name that needs no quotes in a shell."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r} must have letters, digits, '.', '_' and '-' only, such as weekend"
        )


def config_headers(name: str, files: Files, about: str) -> dict[str, str]:
    """First lines of each file: the command that uses it, and what wrote it."""
    commands = {
        "plan.yaml": f"python -m scripts.pipeline --plan configs/{name}/plan.yaml\n{about}",
        "data.yaml": f"python -m scripts.prepare_data --config configs/{name}/data.yaml",
        "sft.yaml": f"python train_sft.py --config configs/{name}/sft.yaml --base_model FOLDER",
        "dpo.yaml": f"python train_dpo.py --config configs/{name}/dpo.yaml --base_model FOLDER",
    }
    return {
        file: commands.get(file, f"python train.py --config configs/{name}/{file}")
        for file in files
    }


def gpu_files(choice: Choice, name: str) -> Files:
    """The files of a plan for GPUs, by name in configs/<name>/."""
    phases = _phases(choice, name)
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
    every = max(50, min(2000, total // 20))
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
                "activation_checkpointing": run.parallel.activation_checkpointing,
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
            "checkpoint": {"every": every, "keep": 3},
            "startup": {
                "steps": min(500, max(20, total // 20)),
                "max_grad_norm": 10,
                "min_tokens_per_s": int(float(f"{slow:.2g}")),
            },
            "validation": {"every": every, "rows": 256},
        }
    }
    previous, begin = "base", steps["base"]
    if long := choice.fit.long_rows:
        configs["long_context"] = {
            "extends": "base.yaml",
            "phase": "long_context",
            "resume_from": "base",
            "start_step": begin,
            "steps": steps["long_context"],
            "rope_theta": 500_000,
            "allow_theta_jump": True,
            "model": {"max_position_embeddings": long},
            "data": {
                "mix": mixes["long_context"],
                "min_document_tokens": {"pg19": long},
                "sequence_length": long,
                "micro_batch_size": long_run(run, long).data.micro_batch_size,
            },
        }
        previous, begin = "long_context", begin + steps["long_context"]
    configs["gold"] = {
        "extends": f"{previous}.yaml",
        "phase": "gold",
        "resume_from": previous,
        "start_step": begin,
        "steps": steps["gold"],
        "allow_theta_jump": False,
        "data": {
            "mix": mixes["gold"],
            "min_document_tokens": {},
            "sequence_length": length,
            "micro_batch_size": rows,
        },
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
    recipe = read_yaml(Path("configs/data/nanollama_1b.yaml"))
    shares = source_shares(choice.request.goal, choice.fit.long_rows)
    sources = {key: value for key, value in recipe["sources"].items() if key in shares}
    return {**recipe, "store": f"data/store/{name}", "sources": sources}


def downloads(choice: Choice) -> dict[str, float]:
    """Source -> tokens to download: those that the plan reads and a margin, or all there are."""
    shares = source_shares(choice.request.goal, choice.fit.long_rows)
    wanted = {name: share * choice.tokens * DOWNLOAD_MARGIN for name, share in shares.items()}
    return {name: min(tokens, AVAILABLE[name]) for name, tokens in wanted.items()}


def _tuning(config: str, choice: Choice, name: str, steps: int, lr: float) -> dict[str, Any]:
    """A config of configs/ with this plan's name, length, rate and memory settings."""
    values = read_yaml(Path(config))
    values |= {"run": name, "steps": steps}
    values["optim"]["lr"] = float(f"{lr:.2g}")
    values["schedule"]["warmup_steps"] = max(1, min(360, steps // 30))
    run = choice.fit.run
    values["parallel"] = {
        "strategy": run.parallel.strategy,
        "activation_checkpointing": run.parallel.activation_checkpointing,
    }
    values["checkpoint"]["every"] = values["validation"]["every"] = max(1, steps // 5)
    return values


def _sft(choice: Choice, name: str) -> dict[str, Any]:
    """SFT on rows of 2,048 tokens, at a tenth of pretraining's rate (our judgement)."""
    run, gpus = choice.fit.run, choice.request.gpus
    values = read_yaml(Path("configs/sft.yaml"))
    length = values["data"]["sequence_length"]
    rows = max(1, values["data"]["tokens_per_step"] // (gpus * length))  # per GPU and step
    rows = 2 ** int(math.log2(rows))
    step = rows * gpus * length
    steps = max(10, int(choice.tuning_tokens["sft"] / step))
    values = _tuning("configs/sft.yaml", choice, name, steps, choice.lr / 10)
    at_once = run.data.micro_batch_size * run.data.sequence_length // length
    values["data"] |= {"tokens_per_step": step, "micro_batch_size": max(1, min(rows, at_once))}
    return values


def _dpo(choice: Choice, name: str) -> dict[str, Any]:
    """DPO at a thousandth of pretraining's rate (our judgement), as SmolLM2-1.7B's 1e-6 is.

    A pair is counted as two rows of 512 tokens. The frozen reference model needs memory as well,
    so a micro-batch has a quarter of pretraining's tokens.
    """
    run, gpus = choice.fit.run, choice.request.gpus
    pairs = 4 * gpus
    steps = max(10, int(choice.tuning_tokens["dpo"] / (pairs * 1024)))
    values = _tuning("configs/dpo.yaml", choice, name, steps, choice.lr / 1000)
    tokens = run.data.micro_batch_size * run.data.sequence_length // 4
    rows = tokens // values["data"]["sequence_length"] // 2 * 2
    values["data"] |= {"pairs_per_step": pairs, "micro_batch_size": max(2, min(8, rows))}
    return values


def _plan(choice: Choice, name: str) -> dict[str, Any]:
    goal, gpus, steps = choice.request.goal, choice.request.gpus, choice.steps
    store, run = f"data/store/{name}", f"checkpoints/{name}"
    python = "python -m scripts.launch --nproc_per_node=" + str(gpus) if gpus > 1 else "python"
    module = f"{python} -m" if gpus > 1 else "python -m"
    before = {
        f"Text: {source}": f"python -m scripts.download_data --dataset {source} --max_tokens "
        f"{tokens:.2g} --output {store}"
        for source, tokens in downloads(choice).items()
    }
    before["Tokenizer"] = f"python -m scripts.train_tokenizer --config configs/{name}/data.yaml"
    before["Shards"] = f"python -m scripts.prepare_data --config configs/{name}/data.yaml"
    suite = (
        f"{module} scripts.run_evals --checkpoint {{checkpoint}} --suite milestone --data "
        f"perplexity={store} --contaminated {store}/contaminated_ids.json --output {{output}}"
    )
    half, base = steps["base"] // 2, steps["base"]
    total = sum(steps.values())
    phases: list[dict[str, Any]] = [
        {
            "config": f"configs/{name}/base.yaml",
            "milestones": [
                _milestone(choice, name, step, BEFORE_DECAY) for step in (half, base) if step
            ],
        }
    ]
    if choice.fit.long_rows:
        phases.append({"config": f"configs/{name}/long_context.yaml"})
    last = _milestone(choice, name, total, 1.0)
    phases.append({"config": f"configs/{name}/gold.yaml", "milestones": [last]})
    plan: dict[str, Any] = {"name": name, "ranks": gpus, "before": before}
    plan["evals"] = {"suite": suite}
    plan["phases"] = phases
    if goal == "chat":
        plan["stages"] = _stages(name, run, python)
    gguf = f"{run}/gguf/{name}-{{{{outtype}}}}.gguf"
    plan["after"] = {
        "Three GGUF files, with a model card": "python -m scripts.export_gguf --checkpoint "
        f"{{checkpoint}} --outtype f16,q8_0,q4_k_m --outfile {gguf}",
        "Loss curve": f"python -m scripts.plot_run logs/{name}",
        "Report": f"python -m evals.report --checkpoint {{checkpoint}} --name {name} --logs "
        f"logs/{name} --results results/{name} --contaminated {store}/contaminated_ids.json "
        f"--output results/{name}",
    }
    return plan


def forecast_bits(parameters: int, tokens: float) -> float:
    """Bits per byte of web text after a decay, by the law of the loss; outside its range a guess.

    The law counts nats per token; a token of fineweb_edu has HUB_SOURCES' bytes.
    """
    nats, _ = forecast_loss(parameters, tokens)
    return nats / math.log(2) / HUB_SOURCES["fineweb_edu"].bytes_per_token


def _milestone(choice: Choice, name: str, step: int, before_decay: float) -> dict[str, Any]:
    """Gates scaled to the size: the forecast of web text with a margin, and HellaSwag's chance."""
    parameters = choice.fit.run.model.num_parameters
    tokens = step * choice.fit.run.data.tokens_per_step
    low, high = LAW_RANGE["parameters"]
    near = low <= parameters <= high and tokens >= LAW_RANGE["tokens"][0]
    go, no_go = (GO, NO_GO) if near else (FAR_GO, FAR_NO_GO)
    bits = forecast_bits(parameters, tokens) * before_decay
    limits = {"go": round(bits * go, 3), "no_go": round(bits * no_go, 3)}
    gates: list[dict[str, Any]] = [{"metric": "fineweb_edu.bits_per_byte", **limits}]
    if parameters >= 100e6 and tokens >= 2e9:  # GPT-2 124M has 0.31; chance is 0.25
        gates.append({"metric": "hellaswag.acc_norm", "go": 0.27, "no_go": 0.25})
    return {
        "step": step,
        "evals": ["suite"],
        "gates": gates,
        "advice": f"look at logs/{name}/metrics.jsonl and docs/log.md; lower optim.lr in "
        f"configs/{name}/base.yaml, then `python -m scripts.pipeline --plan "
        f"configs/{name}/plan.yaml --redo base`",
    }


def _stages(name: str, run: str, python: str) -> list[dict[str, Any]]:
    """SFT and DPO; their gates limit forgetting as those of configs/plan_1b.yaml do."""

    def gates(go: float, no_go: float) -> list[dict[str, Any]]:
        return [
            {"metric": "all.bits_per_byte", "against": "before", "go": go, "no_go": no_go},
            {"metric": "hellaswag.acc_norm", "against": "before", "go": -0.02, "no_go": -0.05},
        ]

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
                "--output data/store/chat",
                "SFT": f"{python} train_sft.py --config configs/{name}/sft.yaml --base_model "
                "{checkpoint}",
            },
            "evals": ["suite"],
            "gates": gates(0.05, 0.15),
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
            "gates": gates(0.02, 0.08),
            "advice": advice("dpo"),
        },
    ]
