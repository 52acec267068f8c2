"""Forecast of a plan: steps, tokens, memory, disk space, hours and loss; without GPU or data."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli import flag_value
from data import manifest
from data.corpus.sources import sources_of
from data.packing import LongDocuments
from data.shards import TokenShards
from models.kinds import parameters_text
from training.checkpoint import CheckpointConfig
from training.config import RunConfig
from training.meter import flops_per_token
from training.planning.cards import GPUS, Gpu, check_gpu
from training.planning.eval_cost import EvaluationTokens, forecast_evaluations
from training.planning.memory import (
    TIGHT,
    memory,
    micro_batches,
    optimizer_state_bytes,
    suggest_fitting_settings,
)
from training.planning.plan import Plan, ScheduledPhase, scheduled_phases
from training.planning.roofline import efficiency, step_bound
from training.schedulers import WSDScheduler, tokens_of_steps
from training.settings import read_yaml

POSITION_ERROR = 1e-6  # of an epoch, because figures in configs and texts are rounded
MAX_EPOCHS = 4  # up to here, repeated tokens are nearly as good as new tokens (arXiv:2305.16264)
TEXT_BYTES = 4.0  # UTF-8 bytes per token of our tokenizer, about: docs/performance.md


# Loss in nats per token = E + A / N^alpha + B / D^beta, for N parameters and D tokens: form and
# data of Hoffmann et al. 2022 (arXiv:2203.15556, approach 3), values and standard errors as
# refitted by Besiroglu et al. 2024 (arXiv:2404.10102).
LAW_RANGE = {"parameters": (70e6, 16e9), "tokens": (5e9, 500e9)}  # of its runs
LOSS_LAW = {
    "E": (1.8172, 0.03),
    "A": (482.01, 124.58),
    "B": (2085.43, 1293.23),
    "alpha": (0.3478, 0.02),
    "beta": (0.3658, 0.02),
}


def forecast_loss(parameters: int, tokens: float) -> tuple[float, float]:
    """Return the loss in nats per token after `tokens` tokens and a decay, and its error.

    parameters: of a dense model.
    The error combines the standard errors as if they were independent. The errors of A and alpha,
    and of B and beta, are correlated, so the law fits its own runs better. The law's runs had a
    different tokenizer and different text, which the error does not include.
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


# Run of a phase -> {source: training tokens that the phase can read}, for sources that exist.
TrainingTokens = Callable[[RunConfig], dict[str, int]]


def readable_tokens(run: RunConfig) -> dict[str, int]:
    """Return source -> training tokens that the phase can read, for sources in its store."""
    tokens = {}
    for name in run.data.mix:
        folder = Path(run.data.store) / "tokens" / name
        if manifest.read(folder) is not None:
            shards = TokenShards(folder, "train")
            minimum = run.data.min_document_tokens.get(name)
            tokens[name] = len(shards if minimum is None else LongDocuments(shards, minimum))
    return tokens


def forecast(
    plan: Plan,
    gpu: str,
    gpus: int | None = None,
    mfu: float | None = None,
    price: float | None = None,
    training_tokens_of: TrainingTokens | None = None,
    evaluation_tokens_of: EvaluationTokens | None = None,
) -> dict[str, Any]:
    """Forecast the cost of a plan on `gpus` GPUs (default: the plan's ranks), as plain values.

    mfu: assumed, in the convention of training/meter.py; by default hours are the bound of
    training/planning/roofline.py times its factor. price: per GPU and hour.
    training_tokens_of: counts the tokens in a phase's store. evaluation_tokens_of: counts those of
    an evaluation; without it evaluations are excluded. Their hours are not in "total". Call check()
    on the result to test whether the plan fits.
    """
    gpus = plan.ranks if gpus is None else gpus
    check_gpu(gpu)
    if gpus < 1:
        raise ValueError(f"--gpus {gpus} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu:g} must be above 0 and at most 1")
    if price is not None and not price >= 0:
        raise ValueError(f"--price {price:g} must be at least 0")
    scheduled = scheduled_phases(plan)
    phases = list(_phases(scheduled, GPUS[gpu], gpus, mfu, price, training_tokens_of))
    run = scheduled[0].run
    sources: dict[str, float] = defaultdict(float)
    for phase in phases:
        for name, source in phase["sources"].items():
            sources[name] += source["tokens"]
    total = {
        key: sum(phase[key] for phase in phases)
        for key in ("steps", "tokens", "flops", "hours", "bound_hours")
    }
    measured = []
    peak = GPUS[gpu].flops
    reached = total["flops"] / (3600 * total["hours"] * gpus * peak)
    if evaluation_tokens_of:
        measured = forecast_evaluations(plan, scheduled, evaluation_tokens_of, peak, gpus, reached)
    measuring = {key: math.fsum(entry[key] for entry in measured) for key in ("flops", "hours")}
    return {
        "plan": plan.name,
        "gpu": gpu,
        "gpus": gpus,
        "gpu_memory": GPUS[gpu].memory,
        "gpu_peak_flops": GPUS[gpu].flops,
        "mfu": reached,
        "efficiency": None if mfu else efficiency()._asdict(),
        "parameters": run.model.num_parameters,
        "active_parameters": run.model.num_active_parameters,
        "parameters_text": parameters_text(run.model),
        "phases": phases,
        "total": {**total, "cost": None if price is None else total["hours"] * gpus * price},
        "evaluations": measured,
        "evaluations_total": {
            **measuring,
            "cost": None if price is None else measuring["hours"] * gpus * price,
        },
        "sources": dict(sources),
        "disk": _disk(plan, scheduled, phases, sources),
        "loss_law": {
            name: {"value": value, "standard_error": error}
            for name, (value, error) in LOSS_LAW.items()
        },
        "warnings": [f"{phase['phase']}: {text}" for phase in phases for text in phase["warnings"]],
        "fits": not any(phase["problem"] for phase in phases),
    }


def check(report: dict[str, Any]) -> None:
    """ValueError if a phase of a forecast does not fit its GPU."""
    problems = [phase["problem"] for phase in report["phases"] if phase["problem"]]
    if problems:
        raise ValueError("; ".join(problems))


def _phases(
    scheduled: list[ScheduledPhase],
    gpu: Gpu,
    gpus: int,
    mfu: float | None,
    price: float | None,
    training_tokens_of: TrainingTokens | None,
) -> Iterator[dict[str, Any]]:
    epochs: dict[str, float] = defaultdict(float)  # of each source, over the phases so far
    # (source, minimum length of its documents) -> epoch up to which the phases so far read it.
    # Another minimum selects other documents, so its epochs are not comparable.
    ends: dict[tuple[str, int | None], float] = defaultdict(float)
    read: set[tuple[str, int | None]] = set()  # of the phases so far
    trained = 0  # tokens of the phases so far, whose batches may differ
    for entry in scheduled:
        run, steps = entry.run, entry.end - entry.begin
        model, data = run.model, run.data
        tokens = tokens_of_steps(run, entry.begin, entry.end)
        trained += tokens
        available = training_tokens_of(run) if training_tokens_of else {}
        warnings, sources = [], {}
        for name, weight in data.mix.items():
            used = tokens * weight / sum(data.mix.values())
            have, least = available.get(name), data.min_document_tokens.get(name)
            start, selection = data.start_epoch.get(name, 0.0), (name, least)
            is_reread = ends[selection] > start + POSITION_ERROR
            if have == 0:
                raise ValueError(
                    f"{run.phase}: {name} has no document of {least} tokens or more; lower "
                    f"data.min_document_tokens.{name}"
                )
            if have:
                epochs[name] += used / have
                if epochs[name] > MAX_EPOCHS:
                    warnings.append(
                        f"{name} is read for {epochs[name]:.1f} epochs; above {MAX_EPOCHS}, "
                        "repeated tokens lose value (arXiv:2305.16264): add data, lower "
                        f"data.mix.{name} or lower steps"
                    )
            sources[name] = {
                "tokens": used,
                "least_document": least,
                "readable": have,
                "epochs": used / have if have else None,
                "epochs_so_far": epochs[name] if have else None,
                "read_before": selection in read,
                "selected_anew": selection not in read and name in {source for source, _ in read},
                "start_epoch": start,
                "unread_from": ends[selection] if is_reread else None,
            }
            if have:
                ends[selection] = max(ends[selection], start + used / have)
        read |= {(name, data.min_document_tokens.get(name)) for name in data.mix}
        need, accumulation = memory(run, gpus), micro_batches(run, gpus)
        problem = None
        if need.total > gpu.memory:
            options = suggest_fitting_settings(run, gpus, gpu)
            todo = f"set {' or '.join(options)}" if options else "use more or larger GPUs"
            problem = (
                f"{run.phase} needs {need.total / 1e9:.1f} GB per GPU, but a GPU has "
                f"{gpu.memory / 1e9:.1f}; {todo}"
            )
        elif need.total > TIGHT * gpu.memory:
            warnings.append(
                f"{need.total / gpu.memory:.0%} of the GPU's memory, by an estimate that was not "
                "measured on a GPU: try train.py --test_mode with this shape first, and have a "
                "smaller data.micro_batch_size ready"
            )
        flops = flops_per_token(model, data.sequence_length)
        attention = (
            12
            * model.num_hidden_layers
            * model.num_attention_heads
            * model.resolved_head_dim
            * data.sequence_length
        )
        bound_hours = tokens / data.tokens_per_step * step_bound(run, gpus, gpu).seconds / 3600
        hours = bound_hours * efficiency().factor
        if mfu:
            hours = tokens * flops / (gpus * gpu.flops * mfu) / 3600
        rate = WSDScheduler(run.schedule, run.optim.lr)
        # For a mixture of experts, the law forecasts a dense model with its active parameters.
        size = model.num_active_parameters
        seen = {"parameters": size, "tokens": trained}
        known = all(low <= seen[name] <= high for name, (low, high) in LAW_RANGE.items())
        loss, error = forecast_loss(seen["parameters"], seen["tokens"])
        yield {
            "phase": run.phase,
            "begin": entry.begin,
            "end": entry.end,
            "steps": steps,
            "tokens": tokens,
            "sequence_length": data.sequence_length,
            "micro_batch_size": data.micro_batch_size,
            "micro_batches": accumulation,
            "strategy": run.parallel.strategy,
            "activation_checkpointing": run.parallel.activation_checkpointing,
            "sources": sources,
            "lr": [rate(entry.begin), rate(entry.end - 1)],
            "rope_theta": list(run.theta_range),
            "flops_per_token": {"palm": flops, "causal": flops - attention / 2},
            "flops": tokens * flops,
            "memory": {
                "moment": need.peak_at,
                "total": need.total,
                "parts": need.parts,
                "moments": need.totals,
            },
            "hours": hours,
            "bound_hours": bound_hours,
            "cost": None if price is None else hours * gpus * price,
            "loss": {"nats_per_token": loss, "error": error, "perplexity": math.exp(loss)}
            if known
            else None,
            "warnings": warnings,
            "problem": problem,
        }


def _disk(
    plan: Plan,
    scheduled: list[ScheduledPhase],
    phases: list[dict[str, Any]],
    trained: dict[str, float],
) -> dict[str, float]:
    """Bytes on disk: checkpoints of phases and stages, token shards and downloaded text.

    phases: their forecasts. trained: source -> tokens over all phases. Text and shards have the
    tokens that the plan downloads of a source, however often it reads them. Without a limit on the
    download, they have the tokens of the store, or at most the tokens that the plan reads.
    """
    model = scheduled[0].run.model
    weights = model.num_parameters * (4 if scheduled[0].run.parallel.dtype == "float32" else 2)
    moments = optimizer_state_bytes(model, "ddp", 1, scheduled[0].run.optim)
    size = model.num_parameters * 4 + moments + weights  # of one checkpoint
    saved = size  # the newest, while it is being written
    for entry in scheduled:
        steps = {milestone.step for milestone in entry.phase.milestones} | set(
            entry.run.checkpoint.milestones
        )
        milestones = sum(entry.begin < step < entry.end for step in steps)
        averages = sum(milestone.averages is not None for milestone in entry.phase.milestones)
        saved += size * milestones + weights * averages
        saved += _kept_bytes(entry.run.checkpoint, entry.end - entry.begin, size, weights)
    for stage in plan.stages:
        for command in stage.commands.values():
            if match := re.search(r"--config (\S+)", command):
                content = read_yaml(Path(match[1]))
                config = CheckpointConfig(**content.get("checkpoint", {}))
                saved += _kept_bytes(config, content.get("steps", 1), size, weights)
    stored = trained | _readable(phases)
    for command in plan.before.values():
        stored |= _downloaded(command)
    tokens = sum(stored.values())
    return {
        "checkpoint": size,
        "checkpoints": saved,
        "tokens": tokens * (2 if model.vocab_size <= 1 << 16 else 4),
        "text": tokens * TEXT_BYTES,
    }


def _kept_bytes(config: CheckpointConfig, steps: int, size: int, weights: int) -> int:
    """Return the bytes of the checkpoints that a phase or stage keeps, without milestones."""
    best = weights if config.keep_best else 0
    return size * min(config.keep, -(-steps // config.every)) + best


def _readable(phases: list[dict[str, Any]]) -> dict[str, int]:
    """Source -> training tokens in the store, for phases that read documents of any length."""
    return {
        name: source["readable"]
        for phase in phases
        for name, source in phase["sources"].items()
        if source["readable"] and not source["least_document"]
    }


def _downloaded(command: str) -> dict[str, float]:
    """Source -> limit of a scripts.download_data command; {} for others or without a limit."""
    words = command.split()
    limit = flag_value(words, "--max_tokens")
    if "scripts.download_data" not in words or limit is None or "--dataset" not in words:
        return {}
    names = itertools.takewhile(
        lambda word: not word.startswith("--"), words[words.index("--dataset") + 1 :]
    )
    return {source: float(limit) for name in names for source in sources_of(name)}
