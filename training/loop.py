"""The one training loop. A stage hands it where batches come from, what is minimised and what is measured."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training.checkpoint import Checkpoints
from training.config import RunConfig
from training.fsdp_utils import reshard, set_last_micro_batch
from training.guard import StopSignal, check_finite
from training.logger import Log
from training.meter import Meter
from training.objectives import Objective
from training.schedulers import WSDScheduler
from training.state import State

Evaluate = Callable[[torch.nn.Module], dict[str, dict[str, float]]]


def train(
    run: RunConfig,
    state: State,
    loader: Any,
    objective: Objective,
    saves: Checkpoints,
    log: Log,
    evaluate: Evaluate | None = None,
) -> bool:
    """Train until the end of the phase, from wherever state is. False if a signal stopped it before; then it has saved.

    loader.at(place) -> (batches of this rank, weight, tokens) of one step. evaluate(model) -> {source: {metric: value}}.
    """
    model, device = state.model, next(state.model.parameters()).device
    schedule = WSDScheduler(run.schedule, run.optim.lr)
    meter = Meter(run.model, run.data.sequence_length, dist.get_world_size(), device)
    end = state.phase_start + run.steps
    if state.step >= end:
        return True
    model.train()
    log.open(state.step, end, state.phase)
    with StopSignal() as stop:
        while state.step < end:
            meter.start()
            step = loader.at(state.place)
            meter.data_ready()
            lr = schedule(state.step)
            sums, grad_norm = backward(run, model, step, objective)
            sums["stop"] = torch.tensor(float(stop.received > 0), device=device)
            means, stopping = reduce(sums, step.weight)
            check_finite(means["loss"], grad_norm, state.step + 1, state.place)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step, state.place, state.tokens = state.step + 1, state.place + 1, state.tokens + step.tokens
            last = stopping or state.step == end
            metrics = {
                "step": state.step,
                "phase": state.phase,
                **means,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": state.tokens,
                "place": state.place,
                "end": end,
                **meter.stop(step.tokens),
            }
            if evaluate and run.validation.every and not stopping and (last or state.step % run.validation.every == 0):
                metrics |= validate(model, evaluate)
            log.metrics(metrics, last)
            if last or state.step % run.checkpoint.every == 0:
                saves.save(state)
            if stopping:
                break
    log.close()
    return state.step == end


def backward(run: RunConfig, model: Any, step: Any, objective: Objective) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of one step over its micro-batches, clipped. Returns this rank's sums and the global norm before clipping."""
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(step.batches):
        set_last_micro_batch(model, i == len(step.batches) - 1, run.parallel.strategy)
        loss, sums = objective(model, batch)
        (loss / step.weight).backward()  # the shards add gradients up over ranks: no mean of means
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    limit = run.optim.grad_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return totals, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def reduce(sums: dict[str, torch.Tensor], weight: int) -> tuple[dict[str, float], bool]:
    """Sums over ranks divided by the step's weight, and whether any rank was asked to stop; one collective."""
    totals = torch.stack([value.double() for value in sums.values()])
    dist.all_reduce(totals)
    means = dict(zip(sums, totals.tolist(), strict=True))
    stopping = means.pop("stop") > 0
    return {name: value / weight for name, value in means.items()}, stopping


def validate(model: Any, evaluate: Evaluate) -> dict[str, float]:
    """What evaluate measures, flat: "val/loss", "val/<source>/bits_per_byte", ..."""
    model.eval()
    with torch.no_grad():
        results = evaluate(model)
    reshard(model)
    model.train()
    flat = {f"val/{source}/{name}": value for source, values in results.items() for name, value in values.items()}
    return {name.replace("val/all/", "val/"): value for name, value in flat.items()}
