"""Forecast of a plan's evaluations: forward FLOPs of the tokens they read and write, and hours.

training/planning/cost.py adds it to its forecast; evals/cost.py provides the token counts.
"""

import shlex
from collections.abc import Callable, Iterator
from typing import Any

from models.nanollama import ModelConfig
from training.config import RunConfig
from training.meter import flops_per_token
from training.planning.plan import Plan, ScheduledPhase

WRITING_MFU = 0.01  # assumed: decoding is bound by weight reads and launches, not by matmuls

Tokens = tuple[float, float, int]  # read, written (maximum), tokens per row
# (command, run of its checkpoint, number of sources in the plan) -> processes of the command, and
# evaluation -> its token counts; None if unknown.
EvaluationTokens = Callable[[str, RunConfig, int], tuple[int, dict[str, list[Tokens] | None]]]


def forward_flops(model: ModelConfig, tokens: float, length: int) -> float:
    """Return the FLOPs of a forward pass: a third of a training step (training/meter.py)."""
    return tokens * flops_per_token(model, length) / 3


def forecast_evaluations(
    plan: Plan,
    scheduled: list[ScheduledPhase],
    evaluation_tokens_of: EvaluationTokens,
    peak: float,
    gpus: int,
    mfu: float,
) -> list[dict[str, Any]]:
    """Return one entry per evaluated milestone and stage, and one for the end of the plan.

    peak: FLOP/s of a GPU. A command uses one of the `gpus` per process.
    """
    sources = len({name for entry in scheduled for name in entry.run.data.mix})
    entries = []
    for where, run, commands in _measured(plan, scheduled):
        evals: list[dict[str, Any]] = []
        for command in commands:
            processes, tokens = evaluation_tokens_of(command, run, sources)
            speed = min(processes, gpus) * peak
            for name, work in tokens.items():
                cost = {} if work is None else _cost(run.model, work, speed, mfu)
                evals.append({"name": name, "known": work is not None, **cost})
        if evals:
            known = [cost for cost in evals if cost["known"]]
            total = {key: sum(cost[key] for cost in known) for key in ("flops", "hours")}
            entries.append({"where": where, "evals": evals, **total})
    return entries


def _measured(
    plan: Plan, scheduled: list[ScheduledPhase]
) -> Iterator[tuple[str, RunConfig, list[str]]]:
    """Yield (where, run of the checkpoint, evaluation commands) for each evaluation point."""
    for entry in scheduled:
        for milestone in entry.phase.milestones:
            names = milestone.evals or tuple(plan.evals)
            where = f"{entry.run.phase} {milestone.step:,}"
            commands = [plan.evals[name] for name in names]
            yield where, entry.run, commands
            if milestone.averages:
                yield f"{where}, average", entry.run, commands
    last = scheduled[-1].run
    for stage in plan.stages:
        yield stage.name, last, [plan.evals[name] for name in stage.evals]
    evals = [command for command in plan.after.values() if _is_evaluation(command)]
    yield "at the end", last, evals


def _is_evaluation(command: str) -> bool:
    return any(
        word.startswith("evals.eval_") or word == "scripts.run_evals"
        for word in shlex.split(command)
    )


def _cost(model: ModelConfig, work: list[Tokens], speed: float, mfu: float) -> dict[str, float]:
    read = sum(forward_flops(model, tokens, length) for tokens, _, length in work)
    written = sum(forward_flops(model, tokens, length) for _, tokens, length in work)
    return {
        "read": sum(counts[0] for counts in work),
        "written": sum(counts[1] for counts in work),
        "flops": read + written,
        "hours": (read / mfu + written / WRITING_MFU) / speed / 3600,
    }
