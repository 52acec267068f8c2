"""Run one phase, from its start to its last checkpoint; shared by pretraining, SFT and DPO."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from cli import print_error
from files import FULL, disk_full_error, is_full
from training import setup
from training.checkpoint import Checkpointer
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.fsdp_utils import compute_dtype
from training.logger import Log, validation_text
from training.loop import Evaluate, MakeSchedules, train, validate
from training.objectives import Objective
from training.ops import profiling
from training.run_folder import claim, locked
from training.schedulers import run_schedules
from training.startup import NO_GO, unmeasured_line
from training.state import State

if TYPE_CHECKING:
    from data.dataloader import Loader

FULL_MESSAGES = tuple(os.strerror(code) for code in FULL)
Check = Callable[[RunConfig, State, Checkpointer, Log], None]


class TokenizerFiles(NamedTuple):
    """The tokenizer that checkpoints contain."""

    folder: Path | None
    config_entries: dict[str, Any]  # ids of bos, eos and pad, and other keys of config.json
    new_tokens: range | None = None  # ids missing from the tokenizer of run.init_from


@contextmanager
def _full_disk(run: RunConfig) -> Iterator[None]:
    """Turn any library's full-disk error into one sentence. Saved checkpoints remain."""
    try:
        yield
    except Exception as error:
        message = error.strerror if isinstance(error, OSError) and error.errno in FULL else None
        is_ours = message and message not in FULL_MESSAGES  # already a full sentence
        if not is_full(error) or is_ours:
            raise
        todo = "free some space and repeat the command; it continues from the newest checkpoint"
        raise disk_full_error(run.checkpoints, error, todo) from error


@dataclass(frozen=True)
class Stage:
    """Arguments that a training stage (pretraining, SFT or DPO) passes to run_phase."""

    loader: "Loader"
    objective: Objective
    tokenizer: TokenizerFiles
    evaluate: Evaluate | None = None
    make_schedules: MakeSchedules = run_schedules
    data_lines: Sequence[str] = ()  # description of the data, printed at the start
    largest_batch: Any = None  # zeros in the largest micro-batch's shape; default: rows of tokens
    check: Check | None = None  # called after a complete phase


def run_phase(run: RunConfig, device: torch.device, stage: Stage, profile: bool = False) -> int:
    """Restore or initialize the run, train the phase, and return the exit status of train().

    profile: trace some steps.
    """
    with ExitStack() as locks, _full_disk(run):
        run_on_rank0(lambda: locks.enter_context(locked(run.checkpoints, run.logs)))
        tokenizer, dtype = stage.tokenizer, compute_dtype(run.parallel, device)
        checkpointer = Checkpointer(
            run.checkpoints, run.checkpoint, dtype, tokenizer.folder, tokenizer.config_entries
        )
        secrets = setup.secrets(run.log.alerts.secrets)
        log = Log(run.logs, run.log, dist.get_rank() == 0, asdict(run), secrets)
        state = setup.build(run, device, new_tokens=tokenizer.new_tokens)
        tokenizer_extended = tokenizer.new_tokens is not None
        restored, source = setup.restore_or_init(
            run, state, checkpointer, stage.loader.fingerprint, tokenizer_extended
        )
        origin, will_train = f"{run.run} {run.phase}: {restored}", state.step < state.end
        at_start = state.step == state.phase_start
        if will_train:
            if set_aside := run_on_rank0(lambda: claim(run, source, state.step)):
                log.event("set_aside", set_aside)
            log.event("begun" if at_start else "resumed", origin, step=state.step)
        else:
            log.say(origin)
        lines = (setup.run_summary(run, device), *stage.data_lines, *unmeasured_line(run, device))
        for line in lines:
            log.say(line)
        if will_train and dist.get_rank() == 0:
            setup.write_run_files(run, device)

        with log, profiling.out_of_memory(run, device):
            if will_train and not state.faults.no_go:
                profiling.dry_run(run, state, device, stage.objective, stage.largest_batch)
            if will_train and at_start and run.validation.before and stage.evaluate:
                _measure_before(state, log, stage.evaluate)
            with profiling.traced(run, state, device) if profile else nullcontext():
                status = train(
                    run,
                    state,
                    stage.loader,
                    stage.objective,
                    checkpointer,
                    log,
                    stage.evaluate,
                    stage.make_schedules,
                )
            if stage.check and not status:
                stage.check(run, state, checkpointer, log)
            _report_end(run, state, log, status, will_train)
        if state.faults.no_go and dist.get_rank() == 0:
            print_error(state.faults.no_go)
        return status


def _measure_before(state: State, log: Log, evaluate: Evaluate) -> None:
    """Log the validation metrics of the model before its first step."""
    if metrics := validate(state.model, evaluate):
        text = f"        before the first step: {validation_text(metrics)}"
        log.event("measured", text, step=state.step, **metrics)


def _report_end(run: RunConfig, state: State, log: Log, status: int, trained: bool) -> None:
    """Log that the phase is stopped, complete or paused; as an event if this command trained."""
    kind = "stopped" if status else "ended" if state.step == state.phase_end else "paused"
    reason = "the start-up checks" if status == NO_GO else "a signal"
    outcome = {
        "stopped": f"stopped by {reason} and saved",
        "ended": "complete",
        "paused": "paused",
    }[kind]
    text = f"{run.run} {run.phase}: {outcome} at step {state.step}"
    log.event(kind, text, step=state.step) if trained else log.say(text)
