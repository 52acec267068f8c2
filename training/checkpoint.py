"""Checkpoints: save atomically, prune, find the newest complete one, and load exactly.

`step_N/` is a Hugging Face folder: weights in the forward pass's dtype, config and tokenizer. Its
`state/` has fp32 weights and optimizer moments in torch's distributed format, which loads on any
number of ranks, and trainer.json. A folder is renamed to `step_N` once its manifest of checksums is
written. Functions that take a State are collective: every rank calls them.
"""

import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from data.tokenizers.folder import copy_files
from files import read_object, step_folders, step_number, write_json
from models.hf import save_hf, stored_dtype
from models.kinds import AnyConfig
from ranges import PositiveInt, check_fields
from training.checkpoint_files import (
    MANIFEST,
    TRAINER,
    check_complete,
    find_damage,
    has_state,
    hash_files,
    read_manifest,
    read_position,
    step_of,
)
from training.checkpoint_writer import Copies, SnapshotSavePlanner, SyncedFileWriter, local_shards
from training.distributed import raise_on_any_rank, run_on_every_rank, run_on_rank0
from training.safe_pickle import load, read_index
from training.state import State

ROLLED_BACK = ".rolled_back"  # suffix of checkpoints newer than the target of a rollback
SAVE_TIMEOUT = timedelta(minutes=30)  # to wait for a silent rank; a dead rank is noticed at once


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are kept."""

    every: PositiveInt = 1000  # steps between checkpoints; the end of a phase is always saved
    keep: PositiveInt = 3  # newest checkpoints to keep; milestones and ends of phases are kept, too
    # Steps of the whole run that are always saved and never deleted.
    milestones: tuple[PositiveInt, ...] = ()
    # Also keep the checkpoint with the lowest validation loss; only its weights once `keep` newer
    # ones exist.
    keep_best: bool = True
    asynchronous: bool | None = None  # save in the background; default: on a GPU

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"checkpoint.milestones={list(self.milestones)} must be steps, in rising order"
            )

    def is_due(self, step: int) -> bool:
        """True if this step is saved."""
        return step % self.every == 0 or step in self.milestones


@dataclass
class Snapshot:
    """The content of one checkpoint, copied at one step."""

    position: dict[str, Any]  # content of trainer.json
    config: AnyConfig
    metric: float | None  # validation loss
    milestone: bool
    weights: dict[str, torch.Tensor]  # unsharded; empty except on rank 0
    tensors: dict[str, Any]  # live tensors of model and optimizer, for their shapes
    copies: dict[str, torch.Tensor]  # copies of this rank's shards; empty in a blocking save


class Checkpointer:
    """Saves and prunes the step folders of one phase. As a context, it waits for the last save.

    dtype: of the exported weights. tokenizer: folder whose files are copied into checkpoints; None
    for dummy data. config_entries: additional keys of config.json, such as the ids of bos and eos.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        dtype: torch.dtype,
        tokenizer: Path | None,
        config_entries: dict[str, Any],
    ):
        self.folder, self.config, self.dtype = folder, config, dtype
        self.tokenizer, self.config_entries = tokenizer, config_entries
        self._copies = Copies()
        self._group: dist.ProcessGroup | None = None  # of background saves only
        self._thread: threading.Thread | None = None
        self._step = 0  # step that the thread saves
        self._problem: BaseException | None = None  # error of the thread

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread:  # without wait(), since other ranks may not take part in a collective
            self._thread.join()

    @property
    def failed(self) -> bool:
        """True if the background save failed on this rank. If any failed, all ranks call wait()."""
        return self._problem is not None

    def wait(self) -> None:
        """Collective. Wait for the save; OSError or RuntimeError if it failed on any rank."""
        if self._thread is None:
            return
        self._thread.join()
        problem, self._thread, self._problem = self._problem, None, None
        error: Exception | None = None
        if problem:
            reason = problem.strerror if isinstance(problem, OSError) else None
            reason = reason or f"{type(problem).__name__}: {problem}"
            text = (
                f"the checkpoint of step {self._step} was not saved: {reason}; repeat the command "
                "to resume from the checkpoint before it"
            )
            error = (
                OSError(problem.errno, text) if isinstance(problem, OSError) else RuntimeError(text)
            )
            error.__cause__ = problem
        raise_on_any_rank(error)

    def save(self, state: State, metric: float | None = None, milestone: bool = False) -> None:
        """Write `step_N` atomically. metric: validation loss, if measured.

        A milestone, or a step of config.milestones, is never pruned. Saving an existing step again
        keeps its milestone flag, and its metric unless a new one is given.

        A background save returns as soon as all tensors are copied. An OSError (disk full) is
        raised on every rank, by save() or, for a background save, by wait(). Older checkpoints
        remain.
        """
        self.wait()
        cuda = next(state.model.parameters()).is_cuda
        in_background = cuda if self.config.asynchronous is None else self.config.asynchronous
        snapshot = self._take(state, metric, milestone, copy=in_background)
        if not in_background:
            self._write(snapshot, None)
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._step = state.step
        self._thread = threading.Thread(
            target=self._write_in_background, args=(snapshot,), name="checkpoint"
        )
        self._thread.start()

    def _take(self, state: State, metric: float | None, milestone: bool, copy: bool) -> Snapshot:
        model, optimizer = get_state_dict(state.model, state.optimizer)
        tensors = {"model": model, "optimizer": optimizer}
        copies: dict[str, torch.Tensor] = {}
        if copy:
            weights = full_state_dict(
                state.model,
                lambda name, weight: self._copies.take(
                    f"whole {name}", weight.to(stored_dtype(name, self.dtype))
                ),
            )
            copies = {
                name: self._copies.take(name, shard) for name, shard in local_shards("", tensors)
            }
            self._copies.finish()
        else:
            weights = full_state_dict(state.model)
        metric = metric if metric is not None and math.isfinite(metric) else None
        return Snapshot(
            state.position(), state.model.config, metric, milestone, weights, tensors, copies
        )

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot, self._group)
        except BaseException as error:
            self._problem = error

    def _write(self, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        """Collective over group."""
        target = self.folder / f"step_{snapshot.position['step']}"
        scratch = target.with_name(target.name + ".tmp")
        try:
            run_on_rank0(lambda: self._begin(scratch, snapshot), group)
            planner, writer = (
                SnapshotSavePlanner(snapshot.copies),
                SyncedFileWriter(scratch / "state"),
            )
            run_on_every_rank(
                lambda: dcp.save(
                    snapshot.tensors, storage_writer=writer, planner=planner, process_group=group
                ),
                group,
            )
            sums = _checksums(scratch, group)
            run_on_rank0(lambda: self._publish(scratch, target, snapshot, sums), group)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        run_on_rank0(lambda: self._prune(target), group)

    def _begin(self, scratch: Path, snapshot: Snapshot) -> None:
        self._clean_up()
        (scratch / "state").mkdir(parents=True)
        self.check_free_space(snapshot.config.num_parameters)
        save_hf(scratch, snapshot.config, snapshot.weights, self.dtype, **self.config_entries)
        if self.tokenizer:
            copy_files(self.tokenizer, scratch)
        write_json(scratch / TRAINER, snapshot.position)

    def _clean_up(self) -> None:
        """Remove the unfinished save of a killed run."""
        for replaced in _leftovers(self.folder, ".replaced"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))
            shutil.rmtree(replaced, ignore_errors=True)
        for leftover in _leftovers(self.folder, ".tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def check_free_space(self, parameters: int) -> None:
        """OSError if the disk cannot hold another checkpoint: fp32 weights, moments and export."""
        self.folder.mkdir(parents=True, exist_ok=True)
        size = parameters * (12 + self.dtype.itemsize)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {size / 1e9:.2f} GB but {self.folder} has "
                f"{free / 1e9:.2f} GB free; free some space or lower checkpoint.keep",
            )

    def _publish(
        self, scratch: Path, target: Path, snapshot: Snapshot, sums: dict[str, str]
    ) -> None:
        before = read_manifest(target) or {}
        metric = snapshot.metric if snapshot.metric is not None else before.get("metric")
        milestone = (
            snapshot.milestone
            or before.get("milestone")
            or step_of(target) in self.config.milestones
        )
        content = {"hash": "sha256", "metric": metric, "milestone": milestone, "files": sums}
        write_json(scratch / MANIFEST, content)
        for path in [*scratch.rglob("*"), scratch]:
            _sync(path)
        replaced = target.with_name(target.name + ".replaced")
        if target.exists():  # after a rollback; _clean_up undoes a kill between the renames
            target.rename(replaced)
        scratch.rename(target)
        _sync(self.folder)
        for old in (replaced, target.with_name(target.name + ROLLED_BACK)):
            shutil.rmtree(old, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Delete checkpoints except the newest, milestones and the best.

        A best checkpoint that is neither recent nor a milestone keeps its weights only. `newest`
        was just published. Folders without a readable manifest are not deleted.
        """
        manifests = {
            path: content for path in step_folders(self.folder) if (content := read_manifest(path))
        }
        with_state = [path for path, content in manifests.items() if TRAINER in content["files"]]
        listed = self.config.milestones
        milestones = [
            path
            for path in with_state
            if manifests[path].get("milestone") or step_of(path) in listed
        ]
        complete = {newest, *with_state[-self.config.keep :], *milestones}
        measured = {
            path: content["metric"]
            for path, content in manifests.items()
            if content.get("metric") is not None
        }
        best = (
            min(measured, key=measured.__getitem__) if measured and self.config.keep_best else None
        )
        for path, content in manifests.items():
            if path in complete:
                continue
            if path != best:
                # Renamed first, so that step_N is never incomplete.
                removed = path.rename(path.with_name(path.name + ".tmp"))
            elif (path / "state").exists():
                files = {
                    name: total
                    for name, total in content["files"].items()
                    if not name.startswith("state/")
                }
                write_json(path / MANIFEST, {**content, "files": files})
                removed = path / "state"
            else:
                continue
            shutil.rmtree(removed, ignore_errors=True)  # files in use are deleted on the next save

    def newest(self) -> Path | None:
        """Collective. Return the newest complete step folder with state/, or None.

        Damaged folders are renamed to `step_N.damaged`.
        """
        self.wait()
        return run_on_rank0(self._newest)

    def _newest(self) -> Path | None:
        self._clean_up()
        return self._first_complete(reversed(step_folders(self.folder)))

    def roll_back(self, step: int, phase: str) -> tuple[Path | None, list[str]]:
        """Collective. Rename checkpoints newer than the rollback target to `step_N.rolled_back`.

        Returns the target and the new names. The target is the newest complete checkpoint of
        `phase` at or before `step`, else the phase's oldest complete one, else None. Later starts
        ignore renamed folders; each is deleted when its step is saved again.
        """
        self.wait()
        return run_on_rank0(lambda: self._roll_back(step, phase))

    def _roll_back(self, step: int, phase: str) -> tuple[Path | None, list[str]]:
        folders = step_folders(self.folder)
        saved_by = {
            path: (read_object(path / TRAINER) or {}).get("phase", phase)
            for path in folders
            if has_state(path)
        }
        of_phase = [path for path in folders if saved_by.get(path) == phase]
        older = [path for path in of_phase if step_of(path) <= step]
        source = self._first_complete([*reversed(older), *of_phase[len(older) :]])
        newer = [
            path for path in folders if source and path.is_dir() and step_of(path) > step_of(source)
        ]
        return source, [self._set_aside(path, ROLLED_BACK).name for path in reversed(newer)]

    def _first_complete(self, folders: Iterable[Path]) -> Path | None:
        for path in folders:
            if not has_state(path):
                continue
            problem = find_damage(path)
            if problem is None:
                return path
            aside = self._set_aside(path, ".damaged")
            print(f"warning: {path} is damaged ({problem}); renamed to {aside.name}", flush=True)
        return None

    def _set_aside(self, path: Path, suffix: str) -> Path:
        aside = path.with_name(path.name + suffix)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        _sync(self.folder)
        return aside


def load_state(folder: Path, state: State) -> dict[str, Any]:
    """Load weights, moments, step and tokens of a step folder into state; return trainer.json."""
    run_on_rank0(lambda: check_complete(folder))
    model, optimizer = get_state_dict(state.model, state.optimizer)
    entries = read_index(folder / "state").state_dict_metadata
    moments: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
    prefix = "optimizer.state."
    saved: dict[str, set[str]] = {}  # parameter -> kinds of its state
    for entry in entries:
        if entry.startswith(prefix):
            name, _, kind = entry.removeprefix(prefix).rpartition(".")
            saved.setdefault(name, set()).add(kind)
    unused = [name for name in moments if name not in saved]  # parameters without a gradient yet
    if len(unused) == len(moments) or any(
        saved[name] != set(kinds) for name, kinds in moments.items() if name in saved
    ):
        raise ValueError(
            f"{folder} was saved with another optimizer (optim.name, normuon_beta2, adam_every, "
            f"hyperball); use that one, or load its weights only with init_from={folder}"
        )
    # Load only moments and counters: optimizer settings come from the config.
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups
    ]
    loaded = {name: kinds for name, kinds in moments.items() if name in saved}
    load({"model": model, "optimizer": {"state": loaded}}, folder / "state")
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for group, values in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(values)
    for name, parameter in state.model.named_parameters():
        if _plain_name(name) in unused:
            state.optimizer.state.pop(parameter, None)
    position = read_position(folder)
    state.step, state.tokens = position["step"], position["tokens"]
    return position


def same_tokenizer(path: Path, other: Path) -> bool:
    """Return True if two tokenizer.json encode alike, whether or not chat markers are special."""
    if path.read_bytes() == other.read_bytes():
        return True
    contents = [read_object(file) or {"damaged": str(file)} for file in (path, other)]
    for content in contents:
        for token in content.get("added_tokens") or ():
            token.pop("special", None)
    return contents[0] == contents[1]


def full_state_dict(
    model: torch.nn.Module,
    copy: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, weight: weight.cpu(),
) -> dict[str, torch.Tensor]:
    """Collective. Return unsharded weights by name, on rank 0's CPU; {} on other ranks.

    copy(name, weight): moves a weight off the device.
    """
    weights = {}
    for name, value in model.state_dict().items():
        weight = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            weights[_plain_name(name)] = copy(name, weight)
    return weights


def _plain_name(name: str) -> str:
    """Return a parameter name without the prefixes of checkpointing and torch.compile."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _leftovers(folder: Path, suffix: str) -> list[Path]:
    """Return the folders named step_N<suffix>, which only this module creates."""
    folders = (path for path in folder.glob(f"step_*{suffix}") if path.is_dir())
    return [
        path
        for path in folders
        if step_number(path.with_name(path.name.removesuffix(suffix))) is not None
    ]


def _checksums(folder: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Collective. Return checksums of all files in a shared folder; each rank hashes a share."""
    sizes = run_on_rank0(
        lambda: {
            str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()
        },
        group,
    )
    loads = [0] * dist.get_world_size()
    names = []  # for this rank to hash
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        if rank == dist.get_rank():
            names.append(name)
    local: list[dict[str, str]] = []
    run_on_every_rank(lambda: local.append(hash_files(folder, names, "sha256")), group)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, local[0], group=group)
    sums = {name: total for share in shares for name, total in share.items()}
    return {name: sums[name] for name in sorted(sums)}


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
