"""The one training loop. A stage hands it a loader, an objective, schedules and an evaluation."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training.checkpoint import Checkpointer, load_state
from training.config import RunConfig
from training.fsdp_utils import reshard, set_last_micro_batch
from training.guard import FaultState, StepFlags, StopSignal, stop_status
from training.logger import Log
from training.meter import StepClock
from training.objectives import Objective
from training.schedulers import Schedule, apply_schedules, run_schedules
from training.startup import NO_GO, check_startup, refused
from training.state import State

FAILED_TOGETHER = timedelta(seconds=60)  # that a rank whose validation failed waits for the others
Evaluate = Callable[[torch.nn.Module], dict[str, dict[str, float]]]
MakeSchedules = Callable[[RunConfig, State], list[Schedule]]


def train(
    run: RunConfig,
    state: State,
    loader: Any,
    objective: Objective,
    checkpointer: Checkpointer,
    log: Log,
    evaluate: Evaluate | None = None,
    make_schedules: MakeSchedules = run_schedules,
) -> int:
    """Train from the step of `state` to state.end. Saves before it returns an exit status:

    0: reached the end; 128 + signal: stopped by a signal; 3: stopped by the start-up checks.
    loader.at(place) -> (batches of this rank, weight, tokens) of one step. evaluate(model) -> {source: {metric: value}}.
    """
    if refused(run, state, log):
        return NO_GO
    if state.step >= state.end:
        return 0
    model, device = state.model, next(state.model.parameters()).device
    schedules, stopping, no_go = make_schedules(run, state), 0, False
    model.train()
    with (
        StopSignal() as stop,
        StepClock(run, device) as clock,
        checkpointer,
    ):  # leaves when the last save is written
        log.open(state.step, state.end, state.phase)
        while state.step < state.end:
            clock.begin(state.step + 1)
            scheduled = apply_schedules(schedules, state.step)
            batch_index = state.faults.next_batch_index(state.batch_index)
            step = loader.at(batch_index)
            clock.data_ready()
            sums, grad_norm = backward(run, model, step, objective, state.faults.grad_clip)
            means, flags = reduce(sums, step.weight, StepFlags(checkpointer.failed, stop.flags()))
            clock.computed()
            stopping = stop_status(flags.signals)
            if flags.save_failed:
                checkpointer.wait()  # raises what went wrong, on every rank
            state.batch_index = batch_index + 1
            problem = state.faults.judge(means["loss"], grad_norm, run.faults)
            if problem:
                state.optimizer.zero_grad()
                skip(run, state, checkpointer, log, batch_index, problem, schedules)
                if stopping:
                    checkpointer.save(state)
                    break
                continue
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step, state.tokens = state.step + 1, state.tokens + step.tokens
            last = bool(stopping) or state.step == state.end
            metrics: dict[str, Any] = {
                "step": state.step,
                "phase": state.phase,
                **means,
                **scheduled,
                "grad_norm": grad_norm,
                "tokens": state.tokens,
                "batch_index": state.batch_index,
                "end": state.end,
                **clock.figures(step.tokens),
            }
            if (
                evaluate
                and run.validation.every
                and not stopping
                and (last or state.step % run.validation.every == 0)
            ):
                try:
                    metrics |= validate(model, evaluate)
                except Exception:
                    save_after_failure(state, checkpointer, log, metrics)
                    raise
            log.metrics(metrics, last)
            no_go = check_startup(run, state, log)
            if last or no_go or run.checkpoint.is_due(state.step):
                checkpointer.save(state, metrics.get("val/loss"), milestone=state.step == state.end)
            if stopping or no_go:
                break
    return NO_GO if no_go else 0 if state.step == state.end else stopping


def skip(
    run: RunConfig,
    state: State,
    checkpointer: Checkpointer,
    log: Log,
    batch_index: int,
    problem: str,
    schedules: Sequence[Schedule],
) -> None:
    """Record a step that was not applied; after too many in a row go back to an earlier checkpoint.

    Scheduled settings return to those of the last applied step, so that a checkpoint saved now is exact.
    That checkpoint is saved again with what was learned since: which batches to leave out, the lower
    learning rate. ValueError if the run went back too often, or this phase has no checkpoint.
    """
    faults, policy = state.faults, run.faults
    faults.note_bad(batch_index)
    apply_schedules(schedules, state.step - 1)
    where = f"step {state.step + 1} (batch index {batch_index})"
    log.event(
        "skipped",
        f"        {where} was not applied: {problem}",
        step=state.step + 1,
        batch_index=batch_index,
        problem=problem,
    )
    if len(faults.bad_batches) < policy.bad_in_a_row:
        return
    if faults.rollbacks >= policy.max_rollbacks:
        raise ValueError(
            f"{problem} at {where}, {len(faults.bad_batches)} bad steps in a row, and the run went back {faults.rollbacks} times "
            "already: look at events.jsonl for what they share, then go on from the last checkpoint with a lower optim.lr"
        )
    earlier, newer = checkpointer.go_back(state.step - policy.rollback_steps, state.phase)
    if earlier is None:
        raise ValueError(
            f"{problem} at {where}, {len(faults.bad_batches)} bad steps in a row, and {state.phase} has no checkpoint to go back "
            "to; begin it again with a lower optim.lr, a longer schedule.warmup_steps or a smaller checkpoint.every"
        )
    failed_at, position = state.step, load_state(earlier, state)
    state.batch_index, state.faults = (
        position["batch_index"],
        faults.go_back(FaultState(**position["faults"]), policy),
    )
    apply_schedules(schedules, state.step - 1)
    checkpointer.save(state)
    log.open(state.step, state.end, state.phase)
    aside = f"; set aside {', '.join(newer)}" if newer else ""
    log.event(
        "rollback",
        f"        went back {failed_at - state.step} steps to {earlier}{aside}; "
        f"the learning rate is now {state.faults.lr_scale:g} of the schedule's",
        step=state.step,
        batch_index=state.batch_index,
        excluded_batches=faults.bad_batches,
        set_aside=newer,
        lr_scale=state.faults.lr_scale,
        grad_clip=state.faults.grad_clip,
    )


def backward(
    run: RunConfig, model: Any, step: Any, objective: Objective, grad_clip: float | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of one step over its micro-batches, clipped. Returns this rank's sums and the global norm before clipping.

    grad_clip: tighter than run.optim.grad_clip, where not None.
    """
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(step.batches):
        set_last_micro_batch(model, i == len(step.batches) - 1, run.parallel.strategy)
        loss, sums = objective(model, batch)
        (loss / step.weight).backward()  # the shards add gradients up over ranks: no mean of means
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    limit = min(run.optim.grad_clip or float("inf"), grad_clip or float("inf"))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return totals, float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def reduce(
    sums: dict[str, torch.Tensor], weight: int, flags: StepFlags | None = None
) -> tuple[dict[str, float], StepFlags]:
    """Metric sums over ranks divided by the step's weight, and beside them the flags that any rank has set.

    Both travel in one collective; only the metric sums are divided.
    """
    flags = flags or StepFlags()
    values = torch.stack([value.double() for value in sums.values()])
    raised = values.new_tensor([float(flag) for flag in (flags.save_failed, *flags.signals)])
    totals = torch.cat([values, raised])
    dist.all_reduce(totals)
    added, (save_failed, *signals) = (
        part.tolist() for part in totals.split([len(values), len(raised)])
    )
    means = {name: total / weight for name, total in zip(sums, added, strict=True)}
    return means, StepFlags(save_failed > 0, tuple(count > 0 for count in signals))


def save_after_failure(
    state: State, checkpointer: Checkpointer, log: Log, metrics: dict[str, Any]
) -> None:
    """Save the step whose validation failed, so that a restart continues after it. Nothing where only some ranks failed.

    Ranks meet in the store, not in a collective: one that did not fail may wait in validation's own.
    """
    log.metrics(metrics, True)
    ranks = [
        f"validation of step {state.step} failed on rank {rank}"
        for rank in range(dist.get_world_size())
    ]
    store = dist.distributed_c10d._get_default_store()
    store.set(ranks[dist.get_rank()], "1")
    try:
        store.wait(ranks, FAILED_TOGETHER)
    except RuntimeError:  # dist.DistStoreError: a rank did not fail
        return
    reshard(state.model)
    checkpointer.save(state, milestone=state.step == state.end)
    checkpointer.wait()


def validate(model: Any, evaluate: Evaluate) -> dict[str, float]:
    """What evaluate measures, flat: "val/loss", "val/<source>/bits_per_byte", ..."""
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
