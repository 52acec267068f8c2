"""The training loop of every stage: pretraining, annealing, SFT and DPO.

A stage passes a loader, an objective, schedules and an evaluation function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from machine import exact
from training.checkpoint import Checkpointer, load_state
from training.config import RunConfig
from training.expert_parallel import sum_expert_gradients
from training.faults import FaultState, StepFlags, StopSignal, stop_status
from training.fsdp_utils import reshard, set_last_micro_batch
from training.logger import Log
from training.meter import StepClock
from training.objectives import Objective
from training.routing import Routing
from training.schedulers import Schedule, apply_schedules, run_schedules
from training.startup import NO_GO, check_startup, resolve_earlier_no_go
from training.state import State

if TYPE_CHECKING:
    from data.dataloader import Loader, Step

STORE_TIMEOUT = timedelta(seconds=60)  # a failed rank waits this long for the others to fail
Metrics = dict[str, float | int | str | list[list[float]]]
Evaluate = Callable[[nn.Module], dict[str, dict[str, float]]]
MakeSchedules = Callable[[RunConfig, State], list[Schedule]]


def train(
    run: RunConfig,
    state: State,
    loader: Loader,
    objective: Objective,
    checkpointer: Checkpointer,
    log: Log,
    evaluate: Evaluate | None = None,
    make_schedules: MakeSchedules = run_schedules,
) -> int:
    """Train from state.step to state.end, save, and return an exit status.

    0: reached the end. 128 + signal: stopped by a signal. 3: stopped by the start-up checks.
    evaluate(model) returns {source: {metric: value}}.
    """
    if resolve_earlier_no_go(run, state, log):
        return NO_GO
    if state.step >= state.end:
        return 0
    model = state.model
    schedules, signal_status, no_go = make_schedules(run, state), 0, False
    routing = Routing(model, log, run.steps)
    model.train()
    with (
        StopSignal() as stop,
        StepClock(run, next(model.parameters()).device) as clock,
        checkpointer,  # waits for the last save on exit
    ):
        log.open(state.step, state.end, state.phase)
        while state.step < state.end:
            clock.begin(state.step + 1)
            scheduled = apply_schedules(schedules, state.step)
            batch_index = state.faults.next_batch_index(state.batch_index)
            step = loader.at(batch_index)
            clock.data_ready()
            sums, grad_norm = backward(run, model, step, objective, state.faults.grad_clip)
            rank_flags = StepFlags(checkpointer.failed, stop.flags())
            means, flags, loads = reduce(sums, step.loss_denominator, rank_flags)
            clock.computed()

            signal_status = stop_status(flags.signals)
            if flags.save_failed:
                checkpointer.wait()  # raises the save's error on every rank
            state.batch_index = batch_index + 1
            if problem := state.faults.check_step(means["loss"], grad_norm, run.faults):
                state.optimizer.zero_grad()
                skip(run, state, checkpointer, log, batch_index, problem, schedules)
                if signal_status:
                    checkpointer.save(state)
                    break
                continue

            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step, state.tokens = state.step + 1, state.tokens + step.tokens
            last = bool(signal_status) or state.step == state.end
            metrics: Metrics = {
                "step": state.step,
                "phase": state.phase,
                **means,
                **scheduled,
                "grad_norm": grad_norm,
                "tokens": state.tokens,
                "batch_index": state.batch_index,
                "end": state.end,
                **clock.metrics(step.tokens),
                **routing.after_step(state.step, loads),
            }

            val_loss: float | None = None
            if evaluate and not signal_status and run.validation.is_due(state.step, last):
                try:
                    measured = validate(model, evaluate)
                except Exception:
                    save_after_failure(state, checkpointer, log, metrics)
                    raise
                metrics |= measured
                val_loss = measured.get("val/loss")
            log.metrics(metrics, last)
            no_go = check_startup(run, state, log)
            if last or no_go or run.checkpoint.is_due(state.step):
                checkpointer.save(state, val_loss, milestone=state.step == state.end)
            if signal_status or no_go:
                break
    return NO_GO if no_go else 0 if state.step == state.end else signal_status


def skip(
    run: RunConfig,
    state: State,
    checkpointer: Checkpointer,
    log: Log,
    batch_index: int,
    problem: str,
    schedules: Sequence[Schedule],
) -> None:
    """Record a skipped step; after faults.bad_in_a_row of them, roll back to an earlier checkpoint.

    Restores the scheduled settings of the last applied step, so that a checkpoint saves those.
    A rollback saves its checkpoint again, with the excluded batches and the lower learning rate.
    ValueError after faults.max_rollbacks, or if the phase has no checkpoint.
    """
    faults, policy = state.faults, run.faults
    faults.record_skip(batch_index)
    apply_schedules(schedules, state.step - 1)
    where = f"step {state.step + 1} (batch index {batch_index})"
    log.event(
        "skipped",
        f"        {where} was skipped: {problem}",
        step=state.step + 1,
        batch_index=batch_index,
        problem=problem,
    )
    skips = len(faults.bad_batches)
    if skips < policy.bad_in_a_row:
        return
    if faults.rollbacks >= policy.max_rollbacks:
        raise ValueError(
            f"{problem} at {where}: {skips} bad steps in a row after {faults.rollbacks} rollbacks. "
            "Compare the skipped batches in events.jsonl, then continue from the last checkpoint "
            "with a lower optim.lr"
        )
    source, newer = checkpointer.roll_back(state.step - policy.rollback_steps, state.phase)
    if source is None:
        raise ValueError(
            f"{problem} at {where}: {skips} bad steps in a row, and {state.phase} has no "
            "checkpoint to roll back to. Restart it with a lower optim.lr, a longer "
            "schedule.warmup_steps or a smaller checkpoint.every"
        )
    failed_step, position = state.step, load_state(source, state)
    state.batch_index = position["batch_index"]
    state.faults = faults.roll_back(FaultState(**position["faults"]), policy)
    apply_schedules(schedules, state.step - 1)
    checkpointer.save(state)
    log.open(state.step, state.end, state.phase)
    aside = f"; newer checkpoints are now {', '.join(newer)}" if newer else ""
    log.event(
        "rollback",
        f"        rolled back {failed_step - state.step} steps to {source}{aside}; "
        f"the learning rate is now {state.faults.lr_scale:g} of the schedule's",
        step=state.step,
        batch_index=state.batch_index,
        excluded_batches=faults.bad_batches,
        set_aside=newer,
        lr_scale=state.faults.lr_scale,
        grad_clip=state.faults.grad_clip,
    )


def backward(
    run: RunConfig,
    model: nn.Module,
    step: Step,
    objective: Objective,
    grad_clip: float | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Compute one step's gradients over its micro-batches and clip them.

    Returns this rank's metric sums and the global gradient norm before clipping. grad_clip: a
    second limit beside run.optim.grad_clip; the smaller limit applies.
    """
    totals: dict[str, Tensor] = {}
    for i, batch in enumerate(step.batches):
        set_last_micro_batch(model, i == len(step.batches) - 1, run.parallel.strategy)
        loss, sums = objective(model, batch)
        # FSDP sums gradients over ranks, so each rank divides by the denominator of the whole step.
        (loss / step.loss_denominator).backward()  # type: ignore[no-untyped-call]
        for name, value in sums.items():  # batches may have different metrics
            totals[name] = totals.get(name, 0) + value
    sum_expert_gradients(model)
    limit = min(run.optim.grad_clip or float("inf"), grad_clip or float("inf"))
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return totals, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def reduce(
    sums: dict[str, Tensor], loss_denominator: int, flags: StepFlags | None = None
) -> tuple[dict[str, float], StepFlags, Tensor | None]:
    """Collective. Return metrics (sums over ranks / loss denominator), flags and expert loads.

    A returned flag is set if any rank set it. Loads: "expert_counts" over all ranks, int64 [L, E]
    on the CPU; None without experts. One all-reduce carries everything, counts exactly in float64.
    """
    flags = flags or StepFlags()
    sums = {name: exact(value) for name, value in sums.items()}  # mps has no float64, collectives
    loads = sums.get("expert_counts")
    scalars = {name: value for name, value in sums.items() if name != "expert_counts"}
    values = torch.stack([value.double() for value in scalars.values()])
    counts = values.new_tensor([float(flag) for flag in (flags.save_failed, *flags.signals)])
    totals = torch.cat([values, counts, *([] if loads is None else [loads.flatten().double()])])
    dist.all_reduce(totals)
    reduced: list[float] = totals.tolist()
    save_failed, *signals = reduced[len(values) : len(values) + len(counts)]
    if loads is not None:
        flat = torch.tensor(reduced[len(values) + len(counts) :], dtype=torch.float64)
        loads = flat.long().view(loads.shape)
    pairs = zip(scalars, reduced[: len(values)], strict=True)
    means = {name: total / loss_denominator for name, total in pairs}
    return means, StepFlags(save_failed > 0, tuple(count > 0 for count in signals)), loads


def save_after_failure(
    state: State, checkpointer: Checkpointer, log: Log, metrics: Metrics
) -> None:
    """Save a step whose validation failed on every rank, so that a restart continues after it.

    If only some ranks failed, nothing is saved. Ranks synchronize through the store, because a rank
    that did not fail may be waiting in a collective of the validation.
    """
    log.metrics(metrics, True)
    keys = [
        f"validation of step {state.step} failed on rank {rank}"
        for rank in range(dist.get_world_size())
    ]
    store = dist.distributed_c10d._get_default_store()
    store.set(keys[dist.get_rank()], "1")
    try:
        store.wait(keys, STORE_TIMEOUT)
    except RuntimeError:  # dist.DistStoreError: a rank did not fail
        return
    reshard(state.model)
    checkpointer.save(state, milestone=state.step == state.end)
    checkpointer.wait()


def validate(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate the model; return {"val/loss": ..., "val/<source>/bits_per_byte": ...}."""
    model.eval()
    with torch.no_grad():
        results = evaluate(model)
    reshard(model)
    model.train()
    flat = {
        f"val/{source}/{name}": value
        for source, values in results.items()
        for name, value in values.items()
    }
    return {name.replace("val/all/", "val/"): value for name, value in flat.items()}
