"""Test mode: a short run on dummy data, then four checks of its logs and checkpoint."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from files import read_lines
from training import setup
from training.checkpoint import Checkpointer, load_state
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.logger import Log
from training.run_folder import LOCK, unused
from training.state import State

DEFAULT_STEPS = 100


def overrides(steps: int | None) -> list[str]:
    """Return the settings that turn any config into a test run of `steps` steps."""
    steps = DEFAULT_STEPS if steps is None else steps
    if steps < 20:
        raise ValueError(f"--steps {steps} is too few for the loss to fall; use at least 20")
    tenth = steps // 10
    return [
        "run=test_mode",
        "phase=dummy",
        f"steps={steps}",
        f"schedule={{warmup_steps: {tenth}, total_steps: {steps}, decay_steps: {tenth}}}",
        "data.mix={dummy: 1.0}",
        "data.min_document_tokens={}",
        "data.start_epoch={}",
        "data.store=checkpoints/test_mode/data",
        f"checkpoint={{every: {steps // 2}, keep: 2}}",
        f"validation={{every: {steps // 2}, rows: 8}}",
        "log_dir=logs/test_mode",
        "output_dir=checkpoints/test_mode/dummy",
        "resume_from=null",
        "start_step=null",
        "startup.steps=0",
    ]


def clear(run: RunConfig) -> None:
    """Remove the files of an earlier test run, except its locks.

    ValueError if a folder has other files or is in use.
    """
    logs = (
        "metrics.jsonl",
        "events.jsonl",
        "training_log.md",
        "heartbeat",
        "hyperparameters.yaml",
        "git_commit_hash.txt",
        "run.*",
        "metrics_*.jsonl",
        "dummy.*",
        "tensorboard",
        "wandb",
        "wandb.json",
        "wandb_run_urls.txt",
    )
    patterns_of = {
        run.checkpoints: ("step_*", "run.*"),
        run.logs: logs,
        Path(run.data.store): ("tokens",),
    }
    with unused(run.checkpoints, run.logs):
        for folder, patterns in patterns_of.items():
            if not folder.exists():
                continue
            known = {path for pattern in patterns for path in folder.glob(pattern)}
            is_users = folder == run.checkpoints and run.output_dir != "checkpoints/test_mode/dummy"
            if is_users or set(folder.iterdir()) - known:
                raise ValueError(f"{folder} is not empty; use another --output_dir for test mode")
            for path in known:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:  # another process may be waiting for it
                    path.unlink()


def check(run: RunConfig, state: State, checkpointer: Checkpointer, log: Log) -> None:
    """Collective. Log the result of each check; ValueError if one failed."""
    path = run.logs / "metrics.jsonl"
    rows = run_on_rank0(lambda: read_lines(path))
    tenth = max(1, run.steps // 10)
    first, last = (
        sum(row["loss"] for row in window) / tenth for window in (rows[:tenth], rows[-tenth:])
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
        f"all {len(rows)} steps had gradients": len(norms) == run.steps
        and all(0 < norm < math.inf for norm in norms),
        f"the checkpoint {newest} loads back bit for bit": same,
        f"{path} has one row per step": len(rows) == run.steps
        and all(keys <= row.keys() for row in rows),
    }
    for sentence, passed in results.items():
        log.say(f"test mode: {'ok    ' if passed else 'FAILED'}  {sentence}")
    if not all(results.values()):
        raise ValueError("test mode failed; fix the failed check before training on this machine")


def _tensors(state: State) -> list[Any]:
    """Return the tensors of model and optimizer, in a fixed order."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    states: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
    moments = [value for values in states.values() for value in values.values()]
    return [value for value in [*model.values(), *moments] if isinstance(value, torch.Tensor)]


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
