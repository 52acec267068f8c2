"""Checkpoints: save by rename after a manifest of checksums is whole, find the newest whole one, load exactly.

`step_N/` is a Hugging Face folder (weights as the forward pass sees them, tokenizer, config) with a `state/` inside:
fp32 weights and AdamW moments in torch's distributed format, which loads on any number of ranks, and trainer.json.
All functions that take a State are collective: every rank calls them.
"""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from models.hf import save_hf
from training.state import State

MANIFEST = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps; the end of a phase is saved always
    keep: int = 3  # newest ones kept in a phase's folder

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every={self.every} and checkpoint.keep={self.keep} must be at least 1")


class Checkpoints:
    """The step folders of one phase, under `folder`.

    dtype: of the exported weights. tokenizer: folder whose files are copied beside them, None for dummy data; special: ids
    of bos, eos and pad for config.json.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, dtype: torch.dtype, tokenizer: Path | None, special: dict[str, int]
    ):
        self.folder, self.config, self.dtype, self.tokenizer, self.special = folder, config, dtype, tokenizer, special

    def save(self, state: State) -> Path:
        """Write `step_N` whole or not at all. OSError (no space, say) is raised on every rank; older folders stay."""
        target = self.folder / f"step_{state.step}"
        part = self.folder / f"step_{state.step}.tmp"
        on_main(lambda: self._make_room(part, state))
        try:
            weights = whole_weights(state.model)  # collective; empty except on the main rank
            on_main(lambda: self._write_hf(part, state, weights))
            model, optimizer = get_state_dict(state.model, state.optimizer)
            on_every(lambda: dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=part / "state"))
            on_main(lambda: _write_json(part / "state" / "trainer.json", state.position()))
            sums = _checksums(part)
            on_main(lambda: self._publish(part, target, sums))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        on_main(self._prune)
        return target

    def _make_room(self, part: Path, state: State) -> None:
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        part.mkdir(parents=True)
        self.check_room(state.model.config.num_parameters)

    def check_room(self, parameters: int) -> None:
        """OSError where the disk has no room for one more checkpoint: fp32 weights, two moments and the export."""
        self.folder.mkdir(parents=True, exist_ok=True)
        need = parameters * (12 + self.dtype.itemsize)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            text = f"a checkpoint needs {need / 1e9:.2f} GB but {self.folder} has {free / 1e9:.2f} GB free"
            raise OSError(errno.ENOSPC, text + "; free some space or lower checkpoint.keep")

    def _write_hf(self, part: Path, state: State, weights: dict[str, torch.Tensor]) -> None:
        save_hf(part, state.model.config, weights, self.dtype, **self.special)
        for name in TOKENIZER_FILES:
            if self.tokenizer and (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, part / name)

    def _publish(self, part: Path, target: Path, sums: dict[str, str]) -> None:
        _write_json(part / MANIFEST, {"files": sums})
        for path in [*part.rglob("*"), part]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if target.exists():  # saved before, then gone back to an older one
            shutil.rmtree(target)
        part.rename(target)

    def _prune(self) -> None:
        for path in step_folders(self.folder)[: -self.config.keep]:
            doomed = path.rename(path.with_name(path.name + ".tmp"))  # never half a folder under a good name
            shutil.rmtree(doomed)

    def newest(self) -> Path | None:
        """The newest whole step folder, the same on all ranks. A damaged one is set aside as `step_N.damaged`."""
        return on_main(self._newest)

    def _newest(self) -> Path | None:
        for path in reversed(step_folders(self.folder)):
            problem = damage(path)
            if problem is None:
                return path
            aside = path.with_name(path.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"warning: {path} is damaged ({problem}); set aside as {aside.name}", flush=True)
        return None


def load_state(folder: Path, state: State) -> dict[str, Any]:
    """Load weights, moments and position of a step folder into state. Returns its trainer.json."""
    on_main(lambda: check_whole(folder))
    model, optimizer = get_state_dict(state.model, state.optimizer)
    # The optimizer's settings are the config's, not the checkpoint's: only moments and counters are loaded.
    settings = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "state")
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    position = json.loads((folder / "state" / "trainer.json").read_text())
    state.step, state.tokens = position["step"], position["tokens"]
    return position


def step_folders(folder: Path) -> list[Path]:
    """The step_N folders under `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def damage(folder: Path) -> str | None:
    """What is wrong with a step folder, or None where every file of its manifest has its checksum."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} has changed"
    return None


def identity(folder: Path) -> str:
    """A hash of all that is in a whole step folder."""
    return _checksum(folder / MANIFEST)


def read_phase(folder: Path) -> str:
    """The phase that saved a step folder."""
    return json.loads((folder / "state" / "trainer.json").read_text())["phase"]


def check_whole(folder: Path) -> None:
    """ValueError where a step folder is damaged or cannot be resumed from."""
    if not (folder / "state").is_dir():
        raise ValueError(f"{folder} has no state/ to resume from; use it as weights only with init_from={folder}")
    problem = damage(folder)
    if problem:
        raise ValueError(f"{folder} is damaged ({problem}); resume from another checkpoint")


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Collective. The model's whole weights on the CPU of the main rank, under its own names; {} on the others."""
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            weights[name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")] = whole.cpu()
    return weights


def on_main(work: Callable[[], T]) -> T:
    """Collective. Do it on the main rank; every rank gets what it returned, or raises what it raised."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # the others wait for what came of it, whatever that is
            outcome[1] = error if _travels(error) else RuntimeError(f"on the main rank: {type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def on_every(work: Callable[[], object]) -> None:
    """Collective. Do it on all ranks; if it fails with OSError on any, it fails so on all."""
    problem: OSError | None = None
    try:
        work()
    except OSError as error:
        problem = error
    except dcp.api.CheckpointException as error:  # torch wraps what happened on each rank
        inner = next(iter(error.failures.values()))[0]
        problem = inner if isinstance(inner, OSError) else OSError(errno.EIO, f"the checkpoint was not written: {inner}")
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found


def _checksums(folder: Path) -> dict[str, str]:
    """Collective. Checksum of every file in a folder all ranks see, each rank hashing its share."""
    names = on_main(lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {name: _checksum(folder / name) for name in names[rank::world]}
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, own)
    return {name: total for share in shares for name, total in share.items()}


def _checksum(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
