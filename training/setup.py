"""Start a run: process group, device, environment, and a restored or initialized State.

This is the only module of training/ that reads os.environ.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import yaml

from files import step_folders, write_json, write_text
from machine import COMPLETE, default_device, device_name, rank_and_world
from models.attention import choose_kernel
from models.hf import download_advice, load_weights, read_config
from models.kinds import build_model, parameters_text
from torchrun_plugin import LAUNCHER
from training.checkpoint import Checkpointer, load_state
from training.checkpoint_files import find_damage, has_state, model_hash, read_phase
from training.config import RunConfig, to_dict
from training.distributed import run_on_rank0
from training.faults import FaultState
from training.fsdp_utils import check_ranks, compiles, compute_dtype, wrap_model_fsdp
from training.ops.supervisor import terminate_with_launcher
from training.optimizers import build_optimizer
from training.process_group import process_group
from training.schedulers import theta_at
from training.source_checks import (
    check_fits,
    check_function,
    check_rate,
    check_theta,
    check_tokenizer,
    rope_scaling_change,
)
from training.state import State
from yaml_file import read_yaml_file

ROOT = Path(__file__).resolve().parent.parent


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of returning it to the kernel.

    Without this, a 5.8M-parameter step has 8,700 page faults. No effect on other C libraries.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD: larger blocks get their own mapping and are returned. 32 MB is glibc's own
    # maximum. Without it, blocks of changing lengths fragment the heap: a DPO run of 135M
    # parameters grew from 6 to 11 GB per rank.
    if set_option and set_option(-3, 1 << 25):
        set_option(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@contextmanager
def ranks() -> Iterator[torch.device]:
    """Join torchrun's process group (or a group of one rank) and yield this rank's device."""
    rank, world = rank_and_world()
    terminate_with_launcher(os.environ.get(LAUNCHER))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(default_device())
    check_ranks(device, world)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise ValueError(
                f"rank {local} has no GPU: this machine has {gpus}; "
                f"use torchrun --nproc_per_node={gpus}"
            )
        # Rows of varying length fragment the allocator's segments.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # A rank exits instead of waiting for a dead peer.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        # Flight Recorder, which training/ops/watchdog.py dumps.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    with process_group(backend, rank, world, timeout=timedelta(minutes=60), store=store):
        yield device


def exit_process(status: int) -> NoReturn:
    """End this process once its work is done and its files are closed.

    With several ranks this skips the interpreter's clean-up. During it, torch 2.13's gloo threads
    sometimes abort the process ("terminate called without an active exception", 1 of 24 exits on
    a busy machine), and torchrun would report a finished run as failed.
    """
    if rank_and_world()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def has_compiler(device: torch.device) -> bool:
    """Return True if torch.compile finds its compiler: C for Triton on a GPU, C++ on a CPU."""
    variable, names = (
        ("CC", ("gcc", "clang", "cc"))
        if device.type == "cuda"
        else ("CXX", ("g++", "clang++", "c++"))
    )
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *names))


def build(
    run: RunConfig, device: torch.device, seed: int | None = None, new_tokens: range | None = None
) -> State:
    """Build a sharded model and its optimizer at step 0.

    Weights come from the seed (default: run.seed) or from run.init_from. new_tokens: ids missing
    from the tokenizer of run.init_from. Every rank builds the whole model before it is sharded,
    so weights do not depend on the world size.
    """
    run.parallel.check_model(run.model.kind, run.model.moe)
    model = build_model(run.model, run.seed if seed is None else seed)
    dtype = compute_dtype(run.parallel, device)
    choose_kernel(run.parallel.attention, device, dtype, masked=True)  # ValueError if unavailable
    if compiles(run.parallel, device) and not has_compiler(device):
        raise ValueError(
            "torch.compile needs a compiler: install gcc (on a CPU also g++), "
            "or set parallel.compile=false"
        )
    model.attention, model.compile_head = run.parallel.attention, run.parallel.compile
    if run.init_from:
        rows = read_config(Path(run.init_from)).vocab_size
        if new_tokens is None and rows < run.model.vocab_size:  # see training/continued.py
            new_tokens = range(rows, run.model.vocab_size)
        load_weights(model, Path(run.init_from), new_tokens)
    wrapped = wrap_model_fsdp(model, run.parallel, device)
    return State(
        wrapped,
        build_optimizer(wrapped, run.optim, dtype),
        phase=run.phase,
        phase_end=run.steps,
        until=run.until,
    )


def restore_or_init(
    run: RunConfig,
    state: State,
    checkpointer: Checkpointer,
    fingerprint: str,
    tokenizer_extended: bool = False,
) -> tuple[str, Path | None]:
    """Set `state` to the start of this run. Returns a description and the source folder, if any.

    The first source that exists applies:
    1. A complete checkpoint in this phase's folder: resume it.
    2. resume_from: continue with its weights, moments and step. A new phase starts at batch 0.
    3. init_from: its weights, at step 0.
    4. From scratch.

    tokenizer_extended: the tokenizer is init_from's with added tokens. ValueError if the phase
    would not begin at start_step, or if a checkpoint does not belong to this run.
    """
    latest = checkpointer.newest()
    earlier = run_on_rank0(lambda: _find_earlier(run, required=latest is None))
    source = latest or earlier
    state.data_fingerprint = fingerprint
    state.lr_schedule = {"peak": run.optim.lr, **vars(run.schedule)}
    run_on_rank0(lambda: checkpointer.check_free_space(run.model.num_parameters))
    _check_end(run, state)
    base = run_on_rank0(lambda: model_hash(Path(str(run.init_from)))) if run.init_from else ""
    if source is None and run.init_from and not tokenizer_extended:
        check_tokenizer(Path(run.init_from), checkpointer.tokenizer)
    if source is None:
        _check_start(run, 0, None)
        if run.init_from:
            check_function(run, Path(run.init_from))
            check_theta(run, Path(run.init_from), run.theta_range[0])
        state.parent = base
        if base:
            allowed = run.allow_rope_scaling_change
            change = rope_scaling_change(run, Path(str(run.init_from)), allowed)
            if new := run.model.vocab_size - read_config(Path(str(run.init_from))).vocab_size:
                change += f"; the embedding grows by {new} rows"
            return f"starts from the weights of {run.init_from}{change}", None
        return f"starts from scratch, seed {run.seed}", None
    check_fits(run, source, checkpointer.tokenizer)
    position = load_state(source, state)
    if position["phase"] != run.phase:
        if Path(run.resume_from or "") != source and position["phase_end"] > position["step"]:
            raise ValueError(
                f"{source} is step {state.step} of {position['phase']}, which ends at step "
                f"{position['phase_end']}; finish that phase, or branch off in a run of its own: "
                f"resume_from={source} start_step={state.step} run=NAME"
            )
        _check_start(run, state.step, source)
        state.batch_index, state.phase_start, state.parent = 0, state.step, model_hash(source)
        state.faults = FaultState(**position["faults"]).next_phase()
        _check_end(run, state)
        check_rate(run, position)
        check_theta(run, source, run.theta_range[0])
        change = rope_scaling_change(run, source, run.allow_rope_scaling_change)
        start = f"begins at step {state.step}, after {position['phase']}, from {source}"
        return start + change, source
    state.batch_index, state.phase_start = position["batch_index"], position["phase_start"]
    state.parent = position["parent"]
    state.faults = FaultState(**position["faults"])
    _check_start(run, state.phase_start, source)
    _check_end(run, state)
    phase = state.phase_start, state.phase_end
    check_theta(run, source, theta_at(*run.theta_range, state.step - 1, *phase))
    rope_scaling_change(run, source, allowed=False)
    changed = position["data"] != fingerprint
    if changed and state.step >= state.phase_end:
        raise ValueError(
            f"the data, their mixture or the batch size changed since {run.phase} was completed "
            f"in {source}; undo the change, or move {source.parent} away to train it again "
            "(scripts.pipeline --redo does)"
        )
    if changed and not run.data.accept_changed:
        raise ValueError(
            f"the data, their mixture or the batch size changed since {source} was saved, so "
            "text would be repeated or skipped; undo the change, or set data.accept_changed=true"
        )
    is_phase_start = earlier and read_phase(earlier) != run.phase
    if latest and earlier and is_phase_start and model_hash(earlier) != state.parent:
        raise ValueError(
            f"{latest} did not start from {earlier} but from another checkpoint; move "
            f"{latest.parent} away to restart this phase, or remove resume_from to continue it"
        )
    if latest and base and state.parent not in ("", base):
        raise ValueError(
            f"{latest} was trained from another base model than {run.init_from}; move "
            f"{latest.parent} away to restart, or choose another output_dir"
        )
    check_rate(run, position)
    restored = f"resumes at step {state.step} from {source}"
    if changed:
        state.faults = state.faults.for_new_data()
        restored += (
            "; its data changed (data.accept_changed), so the loss may jump; spike detection "
            f"starts again after {run.faults.window} steps"
        )
    return restored, source


def _find_earlier(run: RunConfig, required: bool) -> Path | None:
    """Return the checkpoint of resume_from, or None; ValueError if it is required and missing."""
    folder = run.resume_folder
    if folder is None:
        return None
    is_phase = folder.name == run.resume_from  # a name, not a path
    checkpoint = find_checkpoint(folder, required and not is_phase)
    if checkpoint is None and required:
        raise ValueError(
            f"{run.phase} continues {folder.name}, but {folder} has no complete checkpoint; "
            f"train {folder.name} first, or set --resume_from to a checkpoint folder"
        )
    return checkpoint


def _check_start(run: RunConfig, step: int, source: Path | None) -> None:
    """ValueError if a phase does not begin at start_step."""
    if run.start_step in (None, step):
        return
    if source is None:
        raise ValueError(
            f"{run.phase} begins at step {run.start_step:,} of the run, but no "
            "checkpoint to continue was found; set --resume_from, or start a separate run with "
            "start_step=0 run=NAME"
        )
    raise ValueError(
        f"{run.phase} begins at step {run.start_step:,} of the run (start_step), but {source} is "
        f"at step {step:,}; continue from a checkpoint of step {run.start_step:,}, or set "
        f"start_step={step}"
    )


def _check_end(run: RunConfig, state: State) -> None:
    """Set state.phase_end; ValueError if the learning-rate schedule ends before it."""
    state.phase_end = state.phase_start + run.steps
    if state.phase_end > run.schedule.total_steps:
        raise ValueError(
            f"{run.phase} ends at step {state.phase_end}, but the learning-rate schedule ends at "
            f"schedule.total_steps={run.schedule.total_steps}; raise it or lower steps"
        )


def find_checkpoint(path: Path, required: bool) -> Path | None:
    """Return `path` if it is a step folder, else the newest complete step folder in it.

    None if there is none; ValueError if one is required.
    """
    if (path / "config.json").is_file():
        return path
    folders = reversed(step_folders(path)) if path.is_dir() else ()
    newest = next(
        (folder for folder in folders if has_state(folder) and find_damage(folder) is None), None
    )
    if newest is None and required:
        advice = download_advice(path) or "use a step_N folder or the folder of a phase"
        raise ValueError(f"{path} has no complete checkpoint; {advice}")
    return newest


def run_summary(run: RunConfig, device: torch.device) -> str:
    """Describe the run in one line, with every "auto" resolved."""
    dtype = compute_dtype(run.parallel, device)
    world = dist.get_world_size()
    shape = run.data.micro_batch_size, run.data.sequence_length, run.model.hidden_size
    kernel = choose_kernel(run.parallel.attention, device, dtype, masked=True, shape=shape)
    modes = [run.parallel.strategy if device.type in COMPLETE else "not sharded"]
    modes += ["compiled" if compiles(run.parallel, device) else "eager", kernel + " attention"]
    modes += ["float8"] * run.parallel.fp8
    rows = "scheduled rows" if "batch_tokens" in run.schedules else str(run.data.rows)
    return (
        f"{parameters_text(run.model)}, {str(dtype).removeprefix('torch.')} on "
        f"{world} {device.type} rank(s), {', '.join(modes)}; "
        f"{run.steps:,} steps of {rows} x {run.data.sequence_length} tokens, "
        f"{run.positions_text}"
    )


def all_reduce_sum(sums: torch.Tensor) -> torch.Tensor:
    """Collective. Sum a tensor over all ranks."""
    dist.all_reduce(sums)
    return sums


def git_output(*arguments: str, folder: Path = ROOT) -> str:
    """Return git's output in a folder (default: this project); "" without git or a checkout."""
    try:
        process = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return ""
    return process.stdout.decode(errors="replace").strip() if process.returncode == 0 else ""


def environment(device: torch.device) -> dict[str, object]:
    """Return code version, library versions and hardware of this run."""
    commit, changes = (
        git_output("rev-parse", "--verify", "-q", "HEAD"),
        git_output("status", "--porcelain"),
    )
    return {
        "git": commit or None,
        "git_clean": not changes if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "device": device_name(device),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_run_files(run: RunConfig, device: torch.device) -> None:
    """Write config, environment and commit of this phase into the log folder.

    Each phase has <phase>.config.yaml, which can be run again, and <phase>.environment.json.
    hyperparameters.yaml has the configs of all phases by name, git_commit_hash.txt the commit of
    the last start.
    """
    values, config_name = environment(device), f"{run.phase}.config.yaml"
    write_text(run.logs / config_name, yaml.safe_dump(to_dict(run), sort_keys=False))
    configs = sorted(
        run.logs.glob("*.config.yaml"),
        key=lambda path: (path.name == config_name, path.stat().st_mtime),
    )
    phases = {path.name.removesuffix(".config.yaml"): read_yaml_file(path) for path in configs}
    write_text(run.logs / "hyperparameters.yaml", yaml.safe_dump(phases, sort_keys=False))
    write_json(run.logs / f"{run.phase}.environment.json", values)
    changes = "" if values["git_clean"] else " with uncommitted changes"
    commit = f"{values['git']}{changes}" if values["git"] else "no git checkout"
    write_text(run.logs / "git_commit_hash.txt", commit + "\n")


def secrets(names: Iterable[str]) -> dict[str, str]:
    """Read environment variables; unset variables are omitted."""
    return {name: os.environ[name] for name in names if name in os.environ}
