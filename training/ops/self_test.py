"""Test mode: a short run on dummy data, then four checks of what it left behind."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from training import setup
from training.checkpoint import Checkpointer, load_state
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.logger import Log
from training.state import State

DEFAULT_STEPS = 100


def overrides(steps: int | None) -> list[str]:
    """Settings that turn any config into a test run of that many steps."""
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 20:
        raise ValueError(f"--steps {steps} is too few to see the loss fall; give at least 20")
    return [
        "run=test_mode",
        "phase=dummy",
        f"steps={steps}",
        f"schedule={{warmup_steps: {steps // 10}, total_steps: {steps}, decay_steps: {steps // 10}}}",
        "data.mix={dummy: 1.0}",
        "data.min_document_tokens={}",
        f"data.store={'checkpoints/test_mode/data'}",
        f"checkpoint={{every: {steps // 2}, keep: 2}}",
        f"validation={{every: {steps // 2}, rows: 8}}",
        "log_dir=logs/test_mode",
        "output_dir=checkpoints/test_mode/dummy",
        "resume_from=null",
        "start_step=null",
        "startup.steps=0",
    ]


def clear(run: RunConfig) -> None:
    """Remove what an earlier test run left; ValueError where the folder holds anything else."""
    logs = (
        "metrics.jsonl",
        "events.jsonl",
        "training_log.md",
        "heartbeat",
        "hyperparameters.yaml",
        "git_commit_hash.txt",
        "run.*",
        "metrics_*.jsonl",
    )
    more = ("dummy.*", "tensorboard", "wandb_run_urls.txt")
    leftovers = {
        run.checkpoints: ("step_*", "run.*"),
        run.logs: (*logs, *more),
        Path(run.data.store): ("tokens",),
    }
    for folder, of_a_test in leftovers.items():
        if folder.exists():
            known = {path for pattern in of_a_test for path in folder.glob(pattern)}
            if set(folder.iterdir()) - known or (
                folder == run.checkpoints and run.output_dir != "checkpoints/test_mode/dummy"
            ):
                raise ValueError(
                    f"{folder} is not empty; give test mode an --output_dir of its own"
                )
            shutil.rmtree(folder)


def check(run: RunConfig, state: State, checkpointer: Checkpointer, log: Log) -> None:
    """Collective. Say for each check whether it held; ValueError where one did not."""
    path = run.logs / "metrics.jsonl"
    rows = run_on_rank0(
        lambda: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    )
    tenth = max(1, run.steps // 10)
    first, last = (
        sum(row["loss"] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:])
    )
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"}
    norms = [row["grad_norm"] for row in rows]
    newest = checkpointer.newest()
    fresh = setup.build(run, next(state.model.parameters()).device, seed=run.seed + 1)
    same = False
    if newest:
        load_state(newest, fresh)
        same = all(
            torch.equal(_local(a), _local(b))
            for a, b in zip(_tensors(state), _tensors(fresh), strict=True)
        )
    results = {
        f"the loss fell, {first:.3f} -> {last:.3f}": last < 0.9 * first,
        f"gradients came in all {len(rows)} steps": len(norms) == run.steps
        and all(0 < norm < math.inf for norm in norms),
        f"the checkpoint {newest} loads back bit for bit": same,
        f"{path} has one row a step": len(rows) == run.steps
        and all(keys <= row.keys() for row in rows),
    }
    for sentence, held in results.items():
        log.say(f"test mode: {'ok    ' if held else 'FAILED'}  {sentence}")
    if not all(results.values()):
        raise ValueError(
            "test mode found a fault; do not train on this machine before it is understood"
        )


def _tensors(state: State) -> list[Any]:
    """Every tensor that resuming needs, in a fixed order."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    states: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
    moments = [value for values in states.values() for value in values.values()]
    return [value for value in [*model.values(), *moments] if isinstance(value, torch.Tensor)]


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
