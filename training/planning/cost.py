"""What a plan will cost before it runs: steps, tokens, memory, disk, hours and a forecast of the loss. Needs no GPU and no data.

Bytes of weights, gradients, moments and saved activations are counted from the model's shapes, and tests compare them with a
run on a CPU; what a GPU adds to them is assumed and says so. GPU memory has not been measured yet.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.nanollama import ModelConfig, NanoLlama
from training.checkpoint import CheckpointConfig
from training.config import RunConfig
from training.meter import PEAK_FLOPS, flops_per_token
from training.muon import ROUND
from training.planning.eval_cost import Reads, forecast_evaluations
from training.planning.plan import Plan, ScheduledPhase, scheduled_phases
from training.schedulers import WSDScheduler
from training.settings import read_yaml

MAX_EPOCHS = 4  # up to here repeated tokens are nearly as good as new ones (arXiv:2305.16264)
TEXT_BYTES = 4.0  # UTF-8 bytes a token of ours stands for, about: docs/performance.md
CONTEXT = 2.0e9  # bytes; assumed for what torch does not count: CUDA context and kernels, NCCL, cuBLAS, rounding of blocks
TIGHT = 0.92  # of a GPU's memory; a plan that needs more may not fit although it does on paper
LOGITS_CHUNK = 4096  # tokens; models/losses.py on a GPU


class Gpu(NamedTuple):
    """memory: bytes that CUDA reports to torch. flops: peak of dense bf16 matmuls with fp32 accumulation."""

    memory: float
    flops: float


# Memory: the "total capacity" of torch's out-of-memory messages in public issues, in GiB (B200: pytorch/ao pull request 4002).
# Peaks: NVIDIA's data sheets of H100 SXM, H200 SXM, A100 and HGX B200 (half of the figure with sparsity), L40S, and the Ada
# architecture whitepaper for the RTX 4090.
GPUS = {
    "h100": Gpu(79.1 * 2**30, PEAK_FLOPS["H100"]),
    "h200": Gpu(139.8 * 2**30, PEAK_FLOPS["H200"]),
    "a100-80": Gpu(79.1 * 2**30, PEAK_FLOPS["A100"]),
    "a100-40": Gpu(39.4 * 2**30, PEAK_FLOPS["A100"]),
    "l40s": Gpu(44.4 * 2**30, 362.05e12),
    "rtx4090": Gpu(23.6 * 2**30, 165.2e12),
    "b200": Gpu(178.3 * 2**30, PEAK_FLOPS["B200"]),
}


# ---- memory of one GPU


@cache
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, from the model itself, built without memory."""
    with torch.device("meta"):
        return {
            name: tuple(parameter.shape) for name, parameter in NanoLlama(model).named_parameters()
        }


def sharded_bytes(model: ModelConfig, strategy: str, gpus: int) -> int:
    """fp32 bytes of all parameters on the GPU that holds most: FSDP2 splits first dimensions, rounded up; ddp splits nothing."""
    shards = 1 if strategy == "ddp" else gpus
    return sum(
        4 * -(-shape[0] // shards) * math.prod(shape[1:])
        for shape in parameter_shapes(model).values()
    )


def hidden_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Of the matrices that Muon updates, where optim.name says so."""
    return [
        shape
        for name, shape in parameter_shapes(model).items()
        if name.startswith("layers.") and len(shape) == 2
    ]


def moment_bytes(model: ModelConfig, strategy: str, gpus: int, optimizer: str = "adamw") -> int:
    """Bytes of the optimizer's state on one GPU: two fp32 moments, and an fp32 step a tensor; of Muon's matrices one moment."""
    adamw = 2 * sharded_bytes(model, strategy, gpus) + 4 * len(parameter_shapes(model))
    shards = 1 if strategy == "ddp" else gpus
    hidden = hidden_shapes(model) if optimizer == "muon" else []
    return adamw - sum(4 * -(-rows // shards) * columns + 4 for rows, columns in hidden)


def update_bytes(model: ModelConfig, gpus: int, optimizer: str, size: int = 2) -> int:
    """What an update holds on one GPU for a while, at most: AdamW nothing, Muon nine times what one rank's largest round has."""
    shapes = hidden_shapes(model) if optimizer == "muon" else []
    counts = {
        shape: -(-shapes.count(shape) // gpus) for shape in shapes
    }  # that one rank makes orthogonal
    return max(
        (
            9 * size * (r * c) * min(max(1, ROUND // (r * c)), count)
            for (r, c), count in counts.items()
        ),
        default=0,
    )


def activation_bytes(
    model: ModelConfig, checkpointing: str, size: int = 2, compiled: bool = True
) -> int:
    """Bytes a token that one block keeps from forward to backward, with `size` bytes a number; 59,528 for the 1.1B model in bf16.

    none, compiled: block input, both norm outputs, q, k, v as attention sees them, attention output, o_proj output, gate, up
    and their product; fp32 logsumexp a head and two norm statistics. selective: block input, outputs of all matmuls but the last,
    attention output and logsumexp. full: block input. Eager, each norm keeps an fp32 copy and a normalised one, and so on.
    """
    d, ff, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    width, kv = heads * model.resolved_head_dim, model.num_key_value_heads * model.resolved_head_dim
    attention = size * (2 * width + 2 * kv) + 4 * heads  # q, k, v, output, logsumexp
    normed_heads = (
        (width + kv, 4 * (heads + model.num_key_value_heads)) if model.qk_norm else (0, 0)
    )  # numbers, statistics
    if checkpointing == "full":
        return size * d
    if checkpointing == "selective":
        return (
            size * (2 * d + 2 * ff) + attention + (0 if compiled else size * d)
        )  # eager keeps the last matmul's output too
    if compiled:
        return size * (4 * d + 3 * ff) + attention + 8 + size * normed_heads[0] + normed_heads[1]
    norm = (
        4 + size
    )  # of a number that is normed: its fp32 copy and the normalised value; the input itself in fp32
    outputs = (
        size * 2 * d + size * 4 * ff + attention
    )  # of the norms; gate, silu(gate), up and their product
    return 2 * (norm * d + 4) + outputs + norm * normed_heads[0] + normed_heads[1]


class Memory(NamedTuple):
    """Bytes on one GPU at the moment that needs most."""

    moment: str
    parts: dict[str, float]  # at that moment
    moments: dict[str, float]  # total at each moment

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def micro_batches(run: RunConfig, gpus: int) -> int:
    """Micro-batches of a step on each GPU; ValueError where rows do not divide."""
    rows, size = run.data.rows, run.data.micro_batch_size
    if rows % (gpus * size):
        raise ValueError(
            f"{run.phase}: {rows} rows a step do not divide over {gpus} GPUs with micro-batches of {size}; change "
            "data.tokens_per_step, data.micro_batch_size or --gpus"
        )
    return rows // (gpus * size)


def memory(run: RunConfig, gpus: int) -> Memory:
    """What a training step needs on each of `gpus` GPUs, by part, at the moment that needs most.

    Activations fall and gradients rise evenly over the backward pass, so the peak is at one of its ends, or in the optimizer.
    The block's working memory in backward is an estimate; everything else follows from shapes and from what FSDP2 keeps.
    """
    model, parallel = run.model, run.parallel
    size = 4 if parallel.dtype == "float32" else 2  # all GPUs here compute in bf16
    compiled = parallel.compile is not False
    d, vocab, layers = model.hidden_size, model.vocab_size, model.num_hidden_layers
    tokens = run.data.micro_batch_size * run.data.sequence_length
    held = sharded_bytes(model, parallel.strategy, gpus)
    block = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(model).items()
        if name.startswith("layers.0.")
    )
    root = model.num_parameters - layers * block  # embedding, last norm and head: one FSDP group
    shards = 1 if parallel.strategy == "ddp" else gpus

    def kept(checkpointing: str) -> int:
        return activation_bytes(model, checkpointing, size, compiled)

    always = {
        "fp32 masters": held,
        "moments": moment_bytes(model, parallel.strategy, gpus, run.optim.name),
        "rotary tables": 8 * model.max_position_embeddings * model.resolved_head_dim,
        "CUDA context (assumed)": CONTEXT,
    }
    accumulated = (
        4 * model.num_parameters if micro_batches(run, gpus) > 1 else 0
    )  # whole, fp32, until the last micro-batch
    gathered = size * (
        model.num_parameters if parallel.strategy != "zero3" else root + min(2, layers) * block
    )
    blocks = tokens * layers * kept(parallel.activation_checkpointing)
    last_norm = tokens * (
        (4 + 2 * size) * d + 4 if size == 2 else 12 * d + 4
    )  # eager; its output is what the head reads
    losses = (
        tokens * 12 + 20 * run.data.tokens_per_step // gpus
    )  # nll, logsumexp; ids, targets and documents of the step
    chunks = -(-tokens // LOGITS_CHUNK)
    logits = (
        min(tokens, LOGITS_CHUNK)
        * vocab
        * ((12 if size == 2 else 8) if chunks > 1 else (6 if size == 2 else 4))
    )
    head = {"logits chunk": logits, "head gradient": 4 * vocab * d + size * tokens * d}
    working = (
        tokens * size * (d + 3 * model.intermediate_size)
    )  # gradients of block output, gate, up and their product
    if not compiled:
        working = max(working, tokens * (20 + size) * d)  # a norm's backward, in fp32
    recomputed = kept("none") - kept(parallel.activation_checkpointing)
    reduced = block * (
        size + 4 + 4 / shards
    )  # gradients of one block, as its matmuls leave them, as they are sent, as they come
    moments: dict[str, dict[str, float]] = {
        "loss head": {
            "gradients": accumulated,
            "gathered": gathered,
            "activations": blocks + last_norm + losses,
            **head,
        },
        "last norm": {
            "gradients": accumulated + size * vocab * d,
            "gathered": gathered,
            "activations": blocks + last_norm - tokens * 2 * size * d + losses,
            "norm in backward": tokens * (20 if size == 2 else 16) * d,
        },
        "last block": {
            "gradients": accumulated + size * vocab * d + reduced,
            "gathered": gathered,
            "activations": blocks + losses,
            "block in backward": working + tokens * max(0, recomputed),
        },
        "end of backward": {
            "gradients": max(held, accumulated) + root * (size + 4 + 4 / shards),
            "gathered": gathered
            if accumulated
            else size * root,  # the last micro-batch gives blocks up as it goes
            "activations": losses,
        },
        "optimizer step": {
            "gradients": held
        },  # fused AdamW and clipping work in place; Muon does not
    }
    if rounds := update_bytes(model, gpus, run.optim.name, size):
        moments["optimizer step"]["Newton-Schulz"] = rounds
    totals = {name: sum(always.values()) + sum(parts.values()) for name, parts in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    return Memory(peak, {**always, **moments[peak]}, totals)


def what_fits(run: RunConfig, gpus: int, gpu: Gpu) -> list[str]:
    """Settings that would let a run fit, each as one would type it, the least change first; empty where none would."""

    def fits(changed: RunConfig) -> float | None:
        needed = memory(changed, gpus).total
        return needed if needed <= TIGHT * gpu.memory else None

    data, parallel = run.data, run.parallel
    rows = data.rows // gpus
    sizes = [size for size in range(data.micro_batch_size - 1, 0, -1) if rows % size == 0]
    levels: tuple[str, ...] = ("none", "selective", "full")
    levels = levels[levels.index(parallel.activation_checkpointing) + 1 :]
    strategies = [] if parallel.strategy == "zero3" or gpus == 1 else ["zero3"]
    knobs = [
        [{"data.micro_batch_size": str(size)} for size in sizes],
        [{"parallel.activation_checkpointing": level} for level in levels],
        [{"parallel.strategy": strategy} for strategy in strategies],
    ]
    found = []
    for options in knobs:  # one knob: the first value that fits
        for option in options:
            if needed := fits(_changed(run, option)):
                found.append(f"{_typed(option)} ({needed / 1e9:.1f} GB)")
                break
    if found:
        return found
    for level in ["", *levels]:  # several knobs together
        for size in [0, *sizes]:
            for strategy in ["", *strategies]:
                option = {
                    "data.micro_batch_size": str(size or data.micro_batch_size),
                    "parallel.activation_checkpointing": level or parallel.activation_checkpointing,
                    "parallel.strategy": strategy or parallel.strategy,
                }
                if needed := fits(_changed(run, option)):
                    return [f"{_typed(option)} together ({needed / 1e9:.1f} GB)"]
    return []


def _changed(run: RunConfig, option: dict[str, str]) -> RunConfig:
    for key, value in option.items():
        section, name = key.split(".")
        part = getattr(run, section)
        run = replace(
            run, **{section: replace(part, **{name: int(value) if value.isdigit() else value})}
        )
    return run


def _typed(option: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in option.items())


# ---- forecast of the loss

# Loss in nats a token = E + A / N^alpha + B / D^beta, of N parameters and D tokens: form and data of Hoffmann et al. 2022
# (arXiv:2203.15556, approach 3), values (and their standard errors) as fitted again by Besiroglu et al. 2024 (arXiv:2404.10102).
LAW_HOLDS = {"parameters": (70e6, 16e9), "tokens": (5e9, 500e9)}  # what its runs had
LOSS_LAW = {
    "E": (1.8172, 0.03),
    "A": (482.01, 124.58),
    "B": (2085.43, 1293.23),
    "alpha": (0.3478, 0.02),
    "beta": (0.3658, 0.02),
}


def forecast_loss(parameters: int, tokens: float) -> tuple[float, float]:
    """Nats a token after `tokens` tokens with the learning rate decayed, and an error: the standard errors as if independent.

    The errors of A and alpha, and of B and beta, go together, so the law fits its own runs better than that. Those had another
    tokenizer and other text, a part of the error that the figure does not hold.
    """
    value = {name: pair[0] for name, pair in LOSS_LAW.items()}
    error = {name: pair[1] for name, pair in LOSS_LAW.items()}
    of_size = value["A"] * parameters ** -value["alpha"]
    of_data = value["B"] * tokens ** -value["beta"]
    terms = (
        error["E"],
        of_size * error["A"] / value["A"],
        of_size * math.log(parameters) * error["alpha"],
        of_data * error["B"] / value["B"],
        of_data * math.log(tokens) * error["beta"],
    )
    return value["E"] + of_size + of_data, math.hypot(*terms)


# ---- the whole plan

Readable = Callable[
    [RunConfig], dict[str, int]
]  # source -> training tokens that this phase can read of it, if they are there


def forecast(
    plan: Plan,
    gpu: str,
    gpus: int | None = None,
    mfu: float = 0.45,
    price: float | None = None,
    readable: Readable | None = None,
    reads: Reads | None = None,
) -> dict[str, Any]:
    """What a plan will cost on `gpus` GPUs (default: the plan's ranks), as plain values; check() says whether it fits.

    mfu: share of the peak that is reached, in the convention of training/meter.py; assumed. price: of one GPU for an hour.
    reads: what each evaluation reads; without it evaluations are left out. Their hours are not in "total".
    """
    gpus = plan.ranks if gpus is None else gpus
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu} is not one of {', '.join(GPUS)}")
    if gpus < 1 or not 0 < mfu <= 1 or (price is not None and price < 0):
        raise ValueError(
            "--gpus must be at least 1, --mfu above 0 and at most 1, --price not negative"
        )
    parts = scheduled_phases(plan)
    phases = list(_phases(parts, GPUS[gpu], gpus, mfu, price, readable))
    run = parts[0].run
    sources: dict[str, float] = defaultdict(float)
    for phase in phases:
        for name, source in phase["sources"].items():
            sources[name] += source["tokens"]
    total = {
        key: sum(phase[key] for phase in phases) for key in ("steps", "tokens", "flops", "hours")
    }
    measured = forecast_evaluations(plan, parts, reads, GPUS[gpu].flops, gpus, mfu) if reads else []
    measuring = {key: math.fsum(entry[key] for entry in measured) for key in ("flops", "hours")}
    return {
        "plan": plan.name,
        "gpu": gpu,
        "gpus": gpus,
        "gpu_memory": GPUS[gpu].memory,
        "gpu_peak_flops": GPUS[gpu].flops,
        "mfu": mfu,
        "parameters": run.model.num_parameters,
        "phases": phases,
        "total": {**total, "cost": None if price is None else total["hours"] * gpus * price},
        "evaluations": measured,
        "evaluations_total": {
            **measuring,
            "cost": None if price is None else measuring["hours"] * gpus * price,
        },
        "sources": dict(sources),
        "disk": _disk(plan, parts, total["tokens"]),
        "loss_law": {
            name: {"value": value, "standard_error": error}
            for name, (value, error) in LOSS_LAW.items()
        },
        "warnings": [f"{phase['phase']}: {text}" for phase in phases for text in phase["warnings"]],
        "fits": not any(phase["problem"] for phase in phases),
    }


def check(report: dict[str, Any]) -> None:
    """ValueError where a phase of a forecast does not fit its GPU."""
    problems = [phase["problem"] for phase in report["phases"] if phase["problem"]]
    if problems:
        raise ValueError("; ".join(problems))


def _phases(
    parts: list[ScheduledPhase],
    gpu: Gpu,
    gpus: int,
    mfu: float,
    price: float | None,
    readable: Readable | None,
) -> Iterator[dict[str, Any]]:
    epochs: dict[str, float] = defaultdict(float)  # of each source, over the phases so far
    for part in parts:
        run, steps = part.run, part.end - part.begin
        model, data = run.model, run.data
        tokens = steps * data.tokens_per_step
        found = readable(run) if readable else {}
        warnings, sources = [], {}
        for name, weight in data.mix.items():
            asked = tokens * weight / sum(data.mix.values())
            have = found.get(name)
            if have == 0:
                least = data.min_document_tokens.get(name)
                raise ValueError(
                    f"{run.phase}: {name} holds no document of {least} tokens or more; lower data.min_document_tokens.{name}"
                )
            if have:
                epochs[name] += asked / have
                if epochs[name] > MAX_EPOCHS:
                    warnings.append(
                        f"{name} will have been read {epochs[name]:.1f} times; above {MAX_EPOCHS} epochs repeated tokens teach "
                        f"less and less (arXiv:2305.16264): add data, lower data.mix.{name} or take fewer steps"
                    )
            sources[name] = {
                "tokens": asked,
                "least_document": data.min_document_tokens.get(name),
                "readable": have,
                "epochs": asked / have if have else None,
                "epochs_so_far": epochs[name] if have else None,
            }
        need, accumulation = memory(run, gpus), micro_batches(run, gpus)
        problem = None
        if need.total > gpu.memory:
            problem = f"{run.phase} needs {need.total / 1e9:.1f} GB on each GPU and there are {gpu.memory / 1e9:.1f}; "
            options = what_fits(run, gpus, gpu)
            problem += (
                f"set {' or '.join(options)}"
                if options
                else "no setting makes it fit: take more or larger GPUs"
            )
        elif need.total > TIGHT * gpu.memory:
            warnings.append(
                f"{need.total / gpu.memory:.0%} of the GPU's memory; that figure was not measured on a GPU: try "
                "train.py --test_mode with this shape first, and keep a smaller data.micro_batch_size ready"
            )
        flops = flops_per_token(model, data.sequence_length)
        attention = (
            12
            * model.num_hidden_layers
            * model.num_attention_heads
            * model.resolved_head_dim
            * data.sequence_length
        )
        hours = tokens * flops / (gpus * gpu.flops * mfu) / 3600
        rate = WSDScheduler(run.schedule, run.optim.lr)
        seen = {"parameters": model.num_parameters, "tokens": part.end * data.tokens_per_step}
        known = all(low <= seen[name] <= high for name, (low, high) in LAW_HOLDS.items())
        loss, error = forecast_loss(seen["parameters"], seen["tokens"])
        yield {
            "phase": run.phase,
            "begin": part.begin,
            "end": part.end,
            "steps": steps,
            "tokens": tokens,
            "sequence_length": data.sequence_length,
            "micro_batch_size": data.micro_batch_size,
            "micro_batches": accumulation,
            "strategy": run.parallel.strategy,
            "activation_checkpointing": run.parallel.activation_checkpointing,
            "sources": sources,
            "lr": [rate(part.begin), rate(part.end - 1)],
            "rope_theta": list(run.theta_range),
            "flops_per_token": {"palm": flops, "causal": flops - attention / 2},
            "flops": tokens * flops,
            "memory": {
                "moment": need.moment,
                "total": need.total,
                "parts": need.parts,
                "moments": need.moments,
            },
            "hours": hours,
            "cost": None if price is None else hours * gpus * price,
            "loss": {"nats_per_token": loss, "error": error, "perplexity": math.exp(loss)}
            if known
            else None,
            "warnings": warnings,
            "problem": problem,
        }


def _disk(plan: Plan, parts: list[ScheduledPhase], tokens: int) -> dict[str, float]:
    """Bytes on disk: checkpoints as training/checkpoint.py writes them, of phases and stages; token shards; downloaded text.

    Text and shards are of the tokens that the plan downloads, at least of those that it trains on.
    """
    model = parts[0].run.model
    weights = model.num_parameters * (4 if parts[0].run.parallel.dtype == "float32" else 2)
    one = (
        model.num_parameters * 4 + moment_bytes(model, "ddp", 1, parts[0].run.optim.name) + weights
    )
    saved = one  # the newest, while it is being written
    for part in parts:
        kept = {milestone.at for milestone in part.phase.milestones} | set(
            part.run.checkpoint.milestones
        )
        milestones = sum(part.begin < step < part.end for step in kept)
        saved += one * milestones + _kept(part.run.checkpoint, part.end - part.begin, one, weights)
    for stage in plan.stages:
        for command in stage.commands.values():
            if config := re.search(r"--config (\S+)", command):
                content = read_yaml(Path(config[1]))
                saved += _kept(
                    CheckpointConfig(**content.get("checkpoint", {})),
                    content.get("steps", 1),
                    one,
                    weights,
                )
    tokens = max(tokens, sum(_downloaded(command) for command in plan.before.values()))
    return {
        "checkpoint": one,
        "checkpoints": saved,
        "tokens": tokens * (2 if model.vocab_size <= 1 << 16 else 4),
        "text": tokens * TEXT_BYTES,
    }


def _kept(keeps: CheckpointConfig, steps: int, one: int, weights: int) -> int:
    """Bytes of the checkpoints that stay of a phase or stage, without milestones."""
    return one * min(keeps.keep, -(-steps // keeps.every)) + (weights if keeps.keep_best else 0)


def _downloaded(command: str) -> int:
    """Tokens that a command of scripts.download_data fetches at most; 0 for another command, or one without a limit."""
    words = command.split()
    if (
        "scripts.download_data" not in words
        or "--max_tokens" not in words
        or "--dataset" not in words
    ):
        return 0
    names = itertools.takewhile(
        lambda word: not word.startswith("--"), words[words.index("--dataset") + 1 :]
    )
    return int(float(words[words.index("--max_tokens") + 1])) * len(list(names))
