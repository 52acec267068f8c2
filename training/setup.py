"""Ranks, device and environment of a run, and the State it starts from. The only reader of os.environ."""

import ctypes
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml

from files import write_text
from models.attention import choose_kernel
from models.hf import load_weights, read_hf_config
from models.nanollama import NanoLlama
from torchrun_plugin import LAUNCHER
from training.checkpoint import (
    Checkpointer,
    damage,
    has_state,
    identity,
    load_state,
    read_phase,
    step_folders,
)
from training.config import PHASES_DIFFER, RunConfig, to_dict
from training.distributed import run_on_rank0
from training.fsdp_utils import compiles, compute_dtype, wrap_model_fsdp
from training.guard import FaultState
from training.ops.supervisor import end_with_launcher
from training.ops.watchdog import leave_if_lost
from training.optimizers import build_optimizer
from training.schedulers import ScheduleConfig, WSDScheduler, theta_at
from training.state import State
from yaml_file import read_yaml_file

ROOT = Path(__file__).resolve().parent.parent


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun set them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next step; what goes back to the kernel comes again page by page.

    A 5.8M-parameter step has 8,700 page faults without this. Other systems and C libraries stay as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD: larger blocks have a mapping of their own, which goes back whole. 32 MB is the most that glibc takes by
    # itself; kept without a limit, blocks of changing lengths split the heap (a DPO run of 135M grew from 6 to 11 GB a rank)
    if set_option and set_option(-3, 1 << 25):
        set_option(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@contextmanager
def ranks() -> Iterator[torch.device]:
    """The process group that torchrun describes (or one rank alone), and this rank's device."""
    rank, world = rank_and_world()
    end_with_launcher(os.environ.get(LAUNCHER))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {local} has no GPU: torchrun started more ranks than {torch.cuda.device_count()} GPUs"
            )
        os.environ.setdefault(
            "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
        )  # rows of changing length fragment it
        os.environ.setdefault(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"
        )  # a rank whose peer is gone ends instead of waiting
        os.environ.setdefault(
            "TORCH_FR_BUFFER_SIZE", "2000"
        )  # Flight Recorder, read by training/ops/watchdog.py
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    try:  # a rank that has already ended on a mistake is missed while connecting, too
        dist.init_process_group(
            backend, world_size=world, rank=rank, timeout=timedelta(minutes=60), store=store
        )
        yield device
        sys.stdout.flush()  # torchrun may end this rank as soon as another has left
        with suppress(
            RuntimeError
        ):  # no rank takes its sockets away while another still needs them; gloo's barrier may find
            dist.barrier()  # its peer gone although that one has passed it, and then all is done
    except BaseException as error:
        if world == 1 and dist.is_initialized():
            dist.destroy_process_group()  # with several, others may be in a collective for good: do not wait for them
        elif world > 1:
            leave_if_lost(error, rank)
        raise
    dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """End this process after its work is done and its files are closed.

    With several ranks, skip the interpreter's own clean-up: in it, threads of torch 2.13's gloo abort the process now and
    then ("terminate called without an active exception", 1 of 24 exits on a busy machine), and torchrun would report a
    finished run as failed.
    """
    if rank_and_world()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def has_compiler(device: torch.device) -> bool:
    """Is there what torch.compile calls: a C compiler for Triton on a GPU, a C++ one on a CPU?"""
    variable, names = (
        ("CC", ("gcc", "clang", "cc"))
        if device.type == "cuda"
        else ("CXX", ("g++", "clang++", "c++"))
    )
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *names))


def build(
    run: RunConfig, device: torch.device, seed: int | None = None, new_tokens: range | None = None
) -> State:
    """A sharded model and its optimizer, with weights from the seed (default run.seed) or from run.init_from, at step 0.

    new_tokens: ids that the tokenizer of run.init_from lacks.
    Every rank builds the whole model from the seed before it is sharded, so weights do not depend on the world size.
    """
    model = NanoLlama(run.model, seed=run.seed if seed is None else seed)
    choose_kernel(
        run.parallel.attention, device, compute_dtype(run.parallel, device), masked=True
    )  # or a sentence why not
    if compiles(run.parallel, device) and not has_compiler(device):
        raise ValueError(
            "torch.compile needs a compiler: install gcc (and g++ for a CPU), or set parallel.compile=false"
        )
    model.attention, model.compile_head = run.parallel.attention, run.parallel.compile
    if run.init_from:
        load_weights(model, Path(run.init_from), new_tokens)
    wrapped = wrap_model_fsdp(model, run.parallel, device)
    return State(
        wrapped,
        build_optimizer(wrapped, run.optim),
        phase=run.phase,
        phase_end=run.steps,
        until=run.until,
    )


def restore_or_init(
    run: RunConfig, state: State, checkpointer: Checkpointer, fingerprint: str, grown: bool = False
) -> tuple[str, Path | None]:
    """Set state to where this run begins. Returns a sentence on it, and the step folder it continues from, if any.

    1. this phase's own folder holds a whole checkpoint: continue it (the same command line restarts a run);
    2. resume_from: take over weights, moments and step; in another phase the data begin at place 0;
    3. init_from: weights only, step 0;  4. from scratch.

    grown: the tokenizer is that of init_from with more tokens, not the same one. ValueError where the phase would begin
    at another step than start_step, or continue anything but what it was made from.
    """
    own = checkpointer.newest()
    earlier = run_on_rank0(lambda: _find_earlier(run, required=own is None))
    source = own or earlier
    state.data, state.rate = fingerprint, {"peak": run.optim.lr, **vars(run.schedule)}
    run_on_rank0(lambda: checkpointer.check_room(run.model.num_parameters))
    _check_end(run, state)
    base = run_on_rank0(lambda: identity(Path(str(run.init_from)))) if run.init_from else ""
    if source is None and run.init_from and not grown:
        _check_tokenizer(Path(run.init_from), checkpointer.tokenizer)
    if source is None:
        _check_start(run, 0, None)
        if run.init_from:
            _check_theta(run, Path(run.init_from), run.theta_range[0])
        state.parent = base
        return (
            f"starts from the weights of {run.init_from}"
            if base
            else f"starts from scratch, seed {run.seed}"
        ), None
    _check_fits(run, source, checkpointer.tokenizer)
    position = load_state(source, state)
    if position["phase"] != run.phase:
        if Path(run.resume_from or "") != source and position["phase_end"] > position["step"]:
            raise ValueError(
                f"{source} is step {state.step} of {position['phase']}, which goes on to {position['phase_end']}; finish it "
                f"first, or branch off there with resume_from={source}"
            )
        _check_start(run, state.step, source)
        state.batch_index, state.phase_start, state.parent = 0, state.step, identity(source)
        state.faults = FaultState(**position["faults"]).next_phase()
        _check_end(run, state)
        _check_rate(run, position)
        _check_theta(run, source, run.theta_range[0])
        return f"begins at step {state.step}, after {position['phase']}, from {source}", source
    state.batch_index, state.phase_start, state.parent = (
        position["batch_index"],
        position["phase_start"],
        position["parent"],
    )
    state.faults = FaultState(**position["faults"])
    _check_start(run, state.phase_start, source)
    _check_end(run, state)
    _check_theta(
        run, source, theta_at(*run.theta_range, state.step - 1, state.phase_start, state.phase_end)
    )
    changed = position["data"] != fingerprint
    if changed and not run.data.accept_changed:
        raise ValueError(
            f"the data, their mixture or the batch changed since {source} was saved, so going on would repeat or skip text; "
            "undo the change, or set data.accept_changed=true"
        )
    if own and earlier and read_phase(earlier) != run.phase and identity(earlier) != state.parent:
        raise ValueError(
            f"{own} did not begin from {earlier} but from another checkpoint; move {own.parent} away to begin this phase "
            "again, or leave out resume_from to go on with it"
        )
    if own and base and state.parent not in ("", base):
        raise ValueError(
            f"{own} was made from another base model than {run.init_from}; move {own.parent} away to start again "
            "from this one, or choose another output_dir"
        )
    _check_rate(run, position)
    begins = f"goes on at step {state.step} from {source}"
    if changed:
        state.faults = state.faults.other_data()
        begins += (
            "; its data changed (data.accept_changed), so a jump of the loss is expected: steps are compared with earlier "
            f"ones again after {run.faults.window} steps"
        )
    return begins, source


def _find_earlier(run: RunConfig, required: bool) -> Path | None:
    """The checkpoint that resume_from points to; None without one, ValueError where it is required and missing."""
    folder = run.earlier
    if folder is None:
        return None
    named = (
        folder.name == run.resume_from
    )  # else the user gave a path, and find_checkpoint's own message fits
    found = find_checkpoint(folder, required and not named)
    if found is None and required:
        raise ValueError(
            f"{run.phase} continues {folder.name}, but {folder} holds no whole checkpoint; train {folder.name} first, "
            "or give --resume_from with the folder of a checkpoint"
        )
    return found


def _check_start(run: RunConfig, step: int, source: Path | None) -> None:
    """ValueError where a phase that must begin at start_step would begin, or began, at another step."""
    if run.start_step in (None, step):
        return
    begin = f"{run.phase} begins at step {run.start_step:,} of the run"
    if source is None:
        raise ValueError(
            f"{begin}, and there is no checkpoint to continue; give --resume_from, or start it as a run of its own with "
            "start_step=0 run=NAME"
        )
    raise ValueError(
        f"{begin} (start_step), but {source} would make it begin at step {step:,}; continue from a checkpoint of step "
        f"{run.start_step:,}, or set start_step={step}"
    )


def _check_rate(run: RunConfig, position: dict[str, Any]) -> None:
    """ValueError where the learning rate had begun to decay and this run would raise it again."""
    saved, step = dict(position.get("rate") or {}), position["step"]
    if not saved or run.schedule.allow_rise:
        return
    known = {
        name: value for name, value in saved.items() if name in ScheduleConfig.__dataclass_fields__
    }
    try:
        stable = known["total_steps"] - known["decay_steps"]
        used = WSDScheduler(ScheduleConfig(**known), saved["peak"])(step - 1)  # by the last update
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "the learning-rate schedule in the checkpoint's trainer.json is damaged; take another copy of the checkpoint"
        ) from error
    now = WSDScheduler(run.schedule, run.optim.lr)(step)
    if step > stable and now > 1.01 * used:
        raise ValueError(
            f"the learning rate would rise from {used:.1e} to {now:.1e} at step {step}, after its decay had begun; to "
            "train longer continue from a checkpoint before the decay (scripts.pipeline --extend does), or set "
            "schedule.allow_rise=true"
        )


def _check_theta(run: RunConfig, source: Path, expected: float) -> None:
    """ValueError if the weights of source were trained last with another rope theta than `expected`."""
    trained = read_hf_config(source).rope_theta
    if not run.allow_theta_jump and not math.isclose(trained, expected, rel_tol=1e-6):
        raise ValueError(
            f"rope theta would jump: {source} was trained with {trained:,.0f}, but rope_theta={run.theta_text} asks for "
            f"{expected:,.0f} there; set rope_theta to {trained:.10g}, or to [{trained:.10g}, last] to change it over the "
            "phase, or set allow_theta_jump=true"
        )


def _check_end(run: RunConfig, state: State) -> None:
    """Set where the phase ends; ValueError where the learning-rate schedule ends before."""
    state.phase_end = state.phase_start + run.steps
    if state.phase_end > run.schedule.total_steps:
        raise ValueError(
            f"{run.phase} ends at step {state.phase_end} but the learning rate is spent at schedule.total_steps="
            f"{run.schedule.total_steps}; raise that or take fewer steps"
        )


def find_checkpoint(path: Path, required: bool) -> Path | None:
    """A step folder, or the newest whole one in a folder of them; None, or ValueError if required, where there is none."""
    if (path / "config.json").is_file():
        return path
    folders = reversed(step_folders(path)) if path.is_dir() else ()
    newest = next(
        (folder for folder in folders if has_state(folder) and damage(folder) is None), None
    )
    if newest is None and required:
        raise ValueError(
            f"{path} holds no whole checkpoint; give a step_N folder or the folder of one phase"
        )
    return newest


def _check_fits(run: RunConfig, source: Path, tokenizer: Path | None) -> None:
    """ValueError where a checkpoint has another shape or tokenizer than the run. Length and theta may differ."""
    saved, wanted = read_hf_config(source), run.model
    for name in vars(wanted):
        if name in PHASES_DIFFER:
            continue
        if getattr(saved, name) != getattr(wanted, name):
            raise ValueError(
                f"{source} has model.{name}={getattr(saved, name)} but the config says {getattr(wanted, name)}; "
                "make them agree or choose another output_dir"
            )
    _check_tokenizer(source, tokenizer)


def _check_tokenizer(source: Path, tokenizer: Path | None) -> None:
    """ValueError where a folder of weights has a tokenizer, and not the data's."""
    own = source / "tokenizer.json"
    if (
        tokenizer
        and own.is_file()
        and own.read_bytes() != (tokenizer / "tokenizer.json").read_bytes()
    ):
        raise ValueError(
            f"{source} was trained with another tokenizer than {tokenizer}; use its data or start from others"
        )


def describe(run: RunConfig, device: torch.device) -> str:
    """One line on what will run, with every "auto" resolved."""
    dtype = compute_dtype(run.parallel, device)
    world = dist.get_world_size()
    shape = run.data.micro_batch_size, run.data.sequence_length, run.model.hidden_size
    kernel = choose_kernel(run.parallel.attention, device, dtype, masked=True, shape=shape)
    how = ["compiled" if compiles(run.parallel, device) else "eager", kernel + " attention"]
    return (
        f"{run.model.num_parameters:,} parameters, {str(dtype).removeprefix('torch.')} on {world} {device.type} rank(s), "
        f"{run.parallel.strategy}, {', '.join(how + ['float8'] * run.parallel.fp8)}; {run.steps:,} steps of {run.data.rows} x "
        f"{run.data.sequence_length} tokens, "
        f"theta {run.theta_text}"
    )


def all_reduce_sum(sums: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks."""
    dist.all_reduce(sums)
    return sums


def _git(*arguments: str) -> str:
    """What git prints about this project's folder; "" if git is not installed, or the folder is not a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def environment(device: torch.device) -> dict[str, object]:
    """What a result depends on besides the config: code, versions, hardware."""
    commit, changes = _git("rev-parse", "--verify", "-q", "HEAD"), _git("status", "--porcelain")
    return {
        "git": commit or None,
        "git_clean": not changes if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_run_files(run: RunConfig, device: torch.device) -> None:
    """Write beside the log what this phase runs with: its config, which can be run again as it is, environment and commit.

    hyperparameters.yaml holds the config of every phase in this log, by name; git_commit_hash.txt the commit of the last
    start. <phase>.config.yaml and <phase>.environment.json stay for each phase.
    """
    found, own = environment(device), f"{run.phase}.config.yaml"
    write_text(run.logs / own, yaml.safe_dump(to_dict(run), sort_keys=False))
    configs = sorted(
        run.logs.glob("*.config.yaml"), key=lambda path: (path.name == own, path.stat().st_mtime)
    )
    phases = {path.name.removesuffix(".config.yaml"): read_yaml_file(path) for path in configs}
    write_text(run.logs / "hyperparameters.yaml", yaml.safe_dump(phases, sort_keys=False))
    write_text(run.logs / f"{run.phase}.environment.json", json.dumps(found, indent=2) + "\n")
    commit = (
        f"{found['git']}{'' if found['git_clean'] else ' with uncommitted changes'}"
        if found["git"]
        else "no git checkout"
    )
    write_text(run.logs / "git_commit_hash.txt", commit + "\n")


def secrets(names: Iterable[str]) -> dict[str, str]:
    """Values of those environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}
