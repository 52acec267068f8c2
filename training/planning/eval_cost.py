"""What the evaluations of a plan will cost: forward FLOPs of the tokens they read and write, and hours.

training/planning/cost.py adds this to its forecast; scripts/plan.py says what each command reads.
"""

import shlex
from collections.abc import Callable, Iterator
from typing import Any

from models.nanollama import ModelConfig
from training.config import RunConfig
from training.meter import flops_per_token
from training.planning.plan import Plan, ScheduledPhase

WRITING_MFU = (
    0.01  # assumed: writing token by token waits for weights and launches, not for matmuls
)

Tokens = tuple[float, float, int]  # read, written (at most), tokens of a row
# A command, the run that made its checkpoint and how many sources the plan has -> processes of the command, and
# name of each evaluation -> its parts; None for one whose tokens are not known.
Reads = Callable[[str, RunConfig, int], tuple[int, dict[str, list[Tokens] | None]]]


def forward_flops(model: ModelConfig, tokens: float, length: int) -> float:
    """Of a forward pass: a third of a training step's, in the convention of training/meter.py."""
    return tokens * flops_per_token(model, length) / 3


def forecast_evaluations(
    plan: Plan, parts: list[ScheduledPhase], reads: Reads, peak: float, gpus: int, mfu: float
) -> list[dict[str, Any]]:
    """One entry per milestone and stage that is measured, and one for evaluations after the last stage.

    peak: FLOP/s of a GPU. A command runs on as many of the `gpus` as it starts processes.
    """
    sources = len({name for part in parts for name in part.run.data.mix})
    entries = []
    for where, run, commands in _measured(plan, parts):
        evals: list[dict[str, Any]] = []
        for command in commands:
            processes, found = reads(command, run, sources)
            speed = min(processes, gpus) * peak
            for name, work in found.items():
                cost = {} if work is None else _cost(run.model, work, speed, mfu)
                evals.append({"name": name, "known": work is not None, **cost})
        if evals:
            known = [cost for cost in evals if cost["known"]]
            total = {key: sum(cost[key] for cost in known) for key in ("flops", "hours")}
            entries.append({"where": where, "evals": evals, **total})
    return entries


def _measured(
    plan: Plan, parts: list[ScheduledPhase]
) -> Iterator[tuple[str, RunConfig, list[str]]]:
    """Where the plan measures a checkpoint, the run that made it, and the commands that measure it."""
    for part in parts:
        for milestone in part.phase.milestones:
            names = milestone.evals or tuple(plan.evals)
            yield (
                f"{part.run.phase} {milestone.at:,}",
                part.run,
                [plan.evals[name] for name in names],
            )
    last = parts[-1].run
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
        "read": sum(part[0] for part in work),
        "written": sum(part[1] for part in work),
        "flops": read + written,
        "hours": (read / mfu + written / WRITING_MFU) / speed / 3600,
    }
