"""Checkpoints: save by rename after a manifest of checksums is whole, find the newest whole one, load exactly.

`step_N/` is a Hugging Face folder (weights as the forward pass sees them, tokenizer, config) with a `state/` inside:
fp32 weights and the optimizer's moments in torch's distributed format, which loads on any number of ranks, and trainer.json.
All functions that take a State are collective: every rank calls them.
"""

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from files import parse_json, read_object, write_json
from machine import cpus
from models.hf import save_hf
from models.nanollama import ModelConfig
from ranges import PositiveInt, check_fields
from training.checkpoint_writer import Copies, PlannerOfCopies, Writer, local_shards
from training.distributed import raise_on_any_rank, run_on_every_rank, run_on_rank0
from training.safe_pickle import load, read_index
from training.state import State, is_position

MANIFEST = "manifest.json"
TRAINER = "state/trainer.json"
ROLLED_BACK = ".rolled_back"  # suffix of checkpoints that a rollback went behind
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ),
    *("chat_template.jinja", "chat_template_training.jinja"),
)
PATIENCE = timedelta(
    minutes=30
)  # a background save waits so long for a rank that says nothing; one that died it notices at once
HASHING_THREADS = min(8, cpus())


@dataclass(frozen=True)
class CheckpointConfig:
    every: PositiveInt = 1000  # steps; the end of a phase is saved always
    keep: PositiveInt = (
        3  # newest ones kept in a phase's folder; milestones and ends of phases stay too
    )
    milestones: tuple[
        PositiveInt, ...
    ] = ()  # steps of the whole run that are always saved and never deleted
    keep_best: bool = True  # keep the one of lowest held-out loss too; once it is not among the newest, without its state/
    asynchronous: bool | None = (
        None  # write in the background while training goes on; default: on a GPU
    )

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"checkpoint.milestones={list(self.milestones)} must be steps above 0, in rising order"
            )

    def is_due(self, step: int) -> bool:
        """True if this step is saved."""
        return step % self.every == 0 or step in self.milestones


@dataclass
class Snapshot:
    """What one save writes, as it was at one moment."""

    position: dict[str, Any]  # of trainer.json
    config: ModelConfig
    metric: float | None
    milestone: bool
    weights: dict[str, torch.Tensor]  # whole; empty except on the main rank
    tensors: dict[str, Any]  # of model and optimizer; live ones, for their shapes
    copies: dict[
        str, torch.Tensor
    ]  # of this rank's shards of them, by name; empty where training waits for the save


class Checkpointer:
    """The step folders of one phase, under `folder`. As a context, it does not end before what it saves is written.

    dtype: of the exported weights. tokenizer: folder whose files are copied beside them, None for dummy data; special: ids
    of bos, eos and pad for config.json, and further keys of it.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        dtype: torch.dtype,
        tokenizer: Path | None,
        special: dict[str, Any],
    ):
        self.folder, self.config, self.dtype, self.tokenizer, self.special = (
            folder,
            config,
            dtype,
            tokenizer,
            special,
        )
        self._copies = Copies()
        self._group: dist.ProcessGroup | None = (
            None  # of the background: its collectives never meet the loop's
        )
        self._thread: threading.Thread | None = None
        self._step = 0  # that the thread saves
        self._problem: BaseException | None = None  # of the thread

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread:  # others may not be here to agree on how it ended
            self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in the background failed. Once any rank does, all of them call wait()."""
        return self._problem is not None

    def wait(self) -> None:
        """Collective. Until no save is under way. OSError or RuntimeError, on every rank, where it failed on any."""
        if self._thread is None:
            return
        self._thread.join()
        problem, self._thread, self._problem = self._problem, None, None
        error: Exception | None = None
        if problem:
            what = (
                problem.strerror
                if isinstance(problem, OSError) and problem.strerror
                else f"{type(problem).__name__}: {problem}"
            )
            text = f"the checkpoint of step {self._step} was not saved: {what}; the same command goes on from the one before"
            error = (
                OSError(problem.errno, text) if isinstance(problem, OSError) else RuntimeError(text)
            )
            error.__cause__ = problem
        raise_on_any_rank(error)

    def save(self, state: State, metric: float | None = None, milestone: bool = False) -> None:
        """Write `step_N` whole or not at all; metric is its held-out loss, None where it was not measured.

        A milestone, or a step of config.milestones, is never pruned. The same step saved again, as after a signal that
        follows a skipped step, stays a milestone and keeps its metric.

        In the background this returns as soon as everything is copied. An OSError (no space, say) is raised on every rank,
        by this, or in the background by wait(); older folders stay.
        """
        self.wait()
        cuda = next(state.model.parameters()).is_cuda
        in_background = cuda if self.config.asynchronous is None else self.config.asynchronous
        snapshot = self._take(state, metric, milestone, copy=in_background)
        if not in_background:
            self._write(snapshot, None)
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
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
            weights = whole_weights(
                state.model,
                lambda name, whole: self._copies.take(f"whole {name}", whole.to(self.dtype)),
            )
            copies = {
                name: self._copies.take(name, shard) for name, shard in local_shards("", tensors)
            }
            self._copies.finish()
        else:
            weights = whole_weights(state.model)
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
        part = target.with_name(target.name + ".tmp")
        try:
            run_on_rank0(lambda: self._begin(part, snapshot), group)
            planner, writer = PlannerOfCopies(snapshot.copies), Writer(part / "state")
            run_on_every_rank(
                lambda: dcp.save(
                    snapshot.tensors, storage_writer=writer, planner=planner, process_group=group
                ),
                group,
            )
            sums = _checksums(part, group)
            run_on_rank0(lambda: self._publish(part, target, snapshot, sums), group)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        run_on_rank0(lambda: self._prune(target), group)

    def _begin(self, part: Path, snapshot: Snapshot) -> None:
        self._tidy()
        (part / "state").mkdir(parents=True)
        self.check_room(snapshot.config.num_parameters)
        save_hf(part, snapshot.config, snapshot.weights, self.dtype, **self.special)
        for name in TOKENIZER_FILES:
            if self.tokenizer and (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, part / name)
        _write_json(part / TRAINER, snapshot.position)

    def _tidy(self) -> None:
        """Undo what a killed run left half done."""
        for replaced in _leftovers(self.folder, ".replaced"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))
            shutil.rmtree(replaced, ignore_errors=True)
        for leftover in _leftovers(self.folder, ".tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def check_room(self, parameters: int) -> None:
        """OSError where the disk has no room for one more checkpoint: fp32 weights, two moments and the export."""
        self.folder.mkdir(parents=True, exist_ok=True)
        need = parameters * (12 + self.dtype.itemsize)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            text = f"a checkpoint needs {need / 1e9:.2f} GB but {self.folder} has {free / 1e9:.2f} GB free"
            raise OSError(errno.ENOSPC, text + "; free some space or lower checkpoint.keep")

    def _publish(self, part: Path, target: Path, snapshot: Snapshot, sums: dict[str, str]) -> None:
        before = read_manifest(target) or {}
        metric = snapshot.metric if snapshot.metric is not None else before.get("metric")
        milestone = (
            snapshot.milestone
            or before.get("milestone")
            or step_of(target) in self.config.milestones
        )
        _write_json(
            part / MANIFEST,
            {"hash": "sha256", "metric": metric, "milestone": milestone, "files": sums},
        )
        for path in [*part.rglob("*"), part]:
            _sync(path)
        replaced = target.with_name(target.name + ".replaced")
        if target.exists():  # saved before, then gone back to an older one; a kill between the renames is undone by _tidy
            target.rename(replaced)
        part.rename(target)
        _sync(self.folder)
        for old in (replaced, target.with_name(target.name + ROLLED_BACK)):
            shutil.rmtree(old, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Keep the newest, milestones, and the best; of the best, where it is neither, the weights alone.

        Only ever called right after `newest` was published whole. Folders without a readable manifest are not touched.
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
        whole = {newest, *with_state[-self.config.keep :], *milestones}
        measured = {
            path: content["metric"]
            for path, content in manifests.items()
            if content.get("metric") is not None
        }
        best = (
            min(measured, key=measured.__getitem__) if measured and self.config.keep_best else None
        )
        for path, content in manifests.items():
            if path in whole:
                continue
            if path != best:
                doomed = path.rename(
                    path.with_name(path.name + ".tmp")
                )  # never half a folder under a good name
            elif (path / "state").exists():
                files = {
                    name: total
                    for name, total in content["files"].items()
                    if not name.startswith("state/")
                }
                write_json(
                    path / MANIFEST, {**content, "files": files}
                )  # from here on state/ is no part of it
                doomed = path / "state"
            else:
                continue
            shutil.rmtree(doomed, ignore_errors=True)  # what is still read by others goes next time

    def newest(self) -> Path | None:
        """Collective. The newest whole step folder with state/. A damaged one is set aside as `step_N.damaged`."""
        self.wait()
        return run_on_rank0(self._newest)

    def _newest(self) -> Path | None:
        self._tidy()
        return self._first_whole(reversed(step_folders(self.folder)))

    def go_back(self, step: int, phase: str) -> tuple[Path | None, list[str]]:
        """Collective. The newest whole step folder of `phase` at or before `step`, else the oldest, else None.

        Newer folders are set aside as `step_N.rolled_back`, so that no later start resumes from them; each is deleted when
        its step is saved again. Their names are returned too.
        """
        self.wait()
        return run_on_rank0(lambda: self._go_back(step, phase))

    def _go_back(self, step: int, phase: str) -> tuple[Path | None, list[str]]:
        folders = step_folders(self.folder)
        saved_by = {
            path: (read_object(path / TRAINER) or {}).get("phase", phase)
            for path in folders
            if has_state(path)
        }
        of_phase = [path for path in folders if saved_by.get(path) == phase]
        older = [path for path in of_phase if step_of(path) <= step]
        found = self._first_whole([*reversed(older), *of_phase[len(older) :]])
        newer = [
            path for path in folders if found and path.is_dir() and step_of(path) > step_of(found)
        ]
        return found, [self._set_aside(path, ROLLED_BACK).name for path in reversed(newer)]

    def _first_whole(self, folders: Iterable[Path]) -> Path | None:
        for path in folders:
            if not has_state(path):
                continue
            problem = damage(path)
            if problem is None:
                return path
            aside = self._set_aside(path, ".damaged")
            print(f"warning: {path} is damaged ({problem}); set aside as {aside.name}", flush=True)
        return None

    def _set_aside(self, path: Path, suffix: str) -> Path:
        aside = path.with_name(path.name + suffix)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        _sync(self.folder)
        return aside


def load_state(folder: Path, state: State) -> dict[str, Any]:
    """Load weights, moments and position of a step folder into state. Returns its trainer.json."""
    run_on_rank0(lambda: check_whole(folder))
    model, optimizer = get_state_dict(state.model, state.optimizer)
    kept = read_index(folder / "state").state_dict_metadata
    moments: dict[str, Any] = optimizer["state"]  # type: ignore[assignment]
    if any(
        f"optimizer.state.{name}.{kind}" not in kept
        for name, kinds in moments.items()
        for kind in kinds
    ):
        raise ValueError(
            f"{folder} was saved with another optim.name; keep to that, or take its weights only: init_from={folder}"
        )
    # The optimizer's settings are the config's, not the checkpoint's: only moments and counters are loaded.
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups
    ]
    load({"model": model, "optimizer": optimizer}, folder / "state")
    set_state_dict(state.model, state.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    position = read_position(folder)
    state.step, state.tokens = position["step"], position["tokens"]
    return position


def step_folders(folder: Path) -> list[Path]:
    """The step_N folders under `folder`, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def _leftovers(folder: Path, suffix: str) -> list[Path]:
    """Folders step_N<suffix>, which only this module makes; other names are the user's."""
    found = (path for path in folder.glob(f"step_*{suffix}") if path.is_dir())
    return [path for path in found if path.name.removesuffix(suffix)[5:].isdecimal()]


def step_of(folder: Path) -> int:
    """N of a folder step_N."""
    return int(folder.name[5:])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """{"hash", "metric", "milestone", "files": {name: checksum}} of a step folder; None where it has no readable one."""
    try:
        content = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        paths = [Path(name) for name in content["files"]]
        inside = not any(path.is_absolute() or ".." in path.parts for path in paths)
        known = isinstance(content["files"], dict) and isinstance(
            content.get("metric"), int | float | None
        )
        return content if inside and known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def has_state(folder: Path) -> bool:
    """Whether a step folder is one to resume from, as far as its manifest says; also where that cannot be read."""
    manifest = read_manifest(folder)
    return (folder / "state").is_dir() if manifest is None else TRAINER in manifest["files"]


def damage(folder: Path) -> str | None:
    """What is wrong with a step folder, or None where its model and state are in the manifest and have their checksums."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST}"
    sums = manifest["files"]
    for name in sums:
        if not (folder / name).is_file():
            return f"{name} is missing"
    needed = {"config.json", *(path.name for path in folder.glob("*.safetensors"))}
    needed |= (
        {f"state/{path.name}" for path in (folder / "state").glob("*")}
        if TRAINER in sums
        else set()
    )
    if unlisted := sorted(needed - sums.keys()):
        return f"{unlisted[0]} has no checksum in {MANIFEST}"
    found = _hash_files(folder, list(sums), manifest.get("hash", "blake2b"))
    return next((f"{name} has changed" for name in sums if found[name] != sums[name]), None)


def identity(folder: Path) -> str:
    """A hash of the model in a step folder, by its manifest, or in a Hugging Face folder, by its files.

    What resuming needs is left out: the model stays the same when state/ of an old checkpoint is dropped.
    """
    manifest = read_manifest(folder)
    if manifest:
        sums = {
            name: total
            for name, total in manifest["files"].items()
            if not name.startswith("state/")
        }
    else:
        names = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")
        )
        sums = _hash_files(folder, names, "sha256")
    return blake2b(json.dumps(sums, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_position(folder: Path) -> dict[str, Any]:
    """trainer.json of a step folder; ValueError where it is damaged."""
    position = read_object(folder / TRAINER)
    if position is None or not is_position(position):
        raise ValueError(f"{folder / TRAINER} is damaged; take another copy of the checkpoint")
    return position


def read_phase(folder: Path) -> str:
    """The phase that saved a step folder."""
    return read_position(folder)["phase"]


def check_whole(folder: Path) -> None:
    """ValueError where a step folder is damaged or cannot be resumed from."""
    if not has_state(folder):
        raise ValueError(
            f"{folder} has no state/ to resume from; use it as weights only with init_from={folder}"
        )
    problem = damage(folder)
    if problem:
        raise ValueError(f"{folder} is damaged ({problem}); resume from another checkpoint")


def whole_weights(
    model: torch.nn.Module,
    keep: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, whole: whole.cpu(),
) -> dict[str, torch.Tensor]:
    """Collective. The model's whole weights on the CPU of the main rank, under its own names; {} on the others.

    keep(name, whole) -> what is kept of one that is still on the device.
    """
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            weights[name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")] = (
                keep(name, whole)
            )
    return weights


def _checksums(folder: Path, group: dist.ProcessGroup | None) -> dict[str, str]:
    """Collective. Checksum of every file in a folder all ranks see, each rank hashing its share of the bytes."""
    sizes = run_on_rank0(
        lambda: {
            str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()
        },
        group,
    )
    loads = [0] * dist.get_world_size()
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        if rank == dist.get_rank():
            own.append(name)
    mine: list[dict[str, str]] = []
    run_on_every_rank(lambda: mine.append(_hash_files(folder, own, "sha256")), group)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine[0], group=group)
    found = {name: total for share in shares for name, total in share.items()}
    return {name: found[name] for name in sorted(found)}


def _hash_files(folder: Path, names: list[str], kind: str) -> dict[str, str]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing and reading let other threads run
        return dict(
            zip(names, pool.map(lambda name: _checksum(folder / name, kind), names), strict=True)
        )


def _checksum(path: Path, kind: str = "sha256") -> str:
    digest = (
        sha256() if kind == "sha256" else blake2b(digest_size=16)
    )  # blake2b: of manifests that do not name a hash
    block = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
