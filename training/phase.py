"""One phase of a run from its start to its last checkpoint: the common part of pretraining, SFT and DPO."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from files import FULL, is_full, no_room
from training import setup
from training.checkpoint import Checkpointer
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.fsdp_utils import compute_dtype
from training.logger import Log, held_out_text
from training.loop import Evaluate, MakeSchedules, train, validate
from training.objectives import Objective
from training.ops import profiling
from training.run_folder import claim, locked
from training.schedulers import run_schedules
from training.startup import NO_GO
from training.state import State

FULL_SAID = tuple(os.strerror(code) for code in FULL)
Check = Callable[[RunConfig, State, Checkpointer, Log], None]


class TokenizerFiles(NamedTuple):
    """What checkpoints hold of a tokenizer."""

    folder: Path | None
    special: dict[str, Any]  # ids of bos, eos and pad; further keys of config.json
    new_tokens: range | None = None  # ids that the tokenizer of run.init_from lacks


@contextmanager
def _full_disk(run: RunConfig) -> Iterator[None]:
    """Turn a full disk, however a library reports it, into one sentence; checkpoints that were saved stay."""
    try:
        yield
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.errno in FULL else None
        if not is_full(error) or (said and said not in FULL_SAID):  # our own error, with a sentence
            raise
        todo = "free some space and run the same command again: it continues from the newest checkpoint"
        raise no_room(run.checkpoints, error, todo) from error


@dataclass(frozen=True)
class Stage:
    """What differs between pretraining, SFT and DPO: the plain values that run_phase hands to the loop."""

    loader: Any  # loader.at(place) gives the batches of one step; loader.fingerprint names its data
    objective: Objective
    tokenizer: TokenizerFiles
    evaluate: Evaluate | None = None
    make_schedules: MakeSchedules = run_schedules
    data_lines: Sequence[str] = ()  # printed at the start: what the data are
    largest_batch: Any = (
        None  # zeros in the shape of the largest micro-batch; default: rows of tokens
    )
    check: Check | None = None  # looks at what a complete phase has left


def run_phase(run: RunConfig, device: torch.device, stage: Stage, profile: bool = False) -> int:
    """Train from wherever this run is. Returns the exit status of train(), 0 if it reached the end of the command.

    profile: trace some steps.
    """
    with ExitStack() as held, _full_disk(run):
        run_on_rank0(lambda: held.enter_context(locked(run.checkpoints, run.logs)))
        tokenizer, dtype = stage.tokenizer, compute_dtype(run.parallel, device)
        checkpointer = Checkpointer(
            run.checkpoints, run.checkpoint, dtype, tokenizer.folder, tokenizer.special
        )
        log = Log(
            run.logs,
            run.log,
            dist.get_rank() == 0,
            asdict(run),
            setup.secrets(run.log.alerts.secrets),
        )
        state = setup.build(run, device, new_tokens=tokenizer.new_tokens)
        grown = tokenizer.new_tokens is not None
        restored, source = setup.restore_or_init(
            run, state, checkpointer, stage.loader.fingerprint, grown
        )
        begins, to_do = f"{run.run} {run.phase}: {restored}", state.step < state.end
        if to_do:
            if set_aside := run_on_rank0(lambda: claim(run, source)):
                log.event("set_aside", set_aside)
            log.event(
                "begun" if state.step == state.phase_start else "resumed", begins, step=state.step
            )
        else:
            log.say(begins)
        for line in (setup.describe(run, device), *stage.data_lines):
            log.say(line)
        if to_do and dist.get_rank() == 0:
            setup.write_run_files(run, device)
        with log, profiling.out_of_memory(run, device):
            if to_do and not state.faults.no_go:
                profiling.dry_run(run, state, device, stage.objective, stage.largest_batch)
            if (
                to_do
                and run.validation.before
                and stage.evaluate
                and state.step == state.phase_start
            ):
                _measure_before(state, log, stage.evaluate)
            with profiling.traced(run, state, device) if profile else nullcontext():
                objective, schedules = stage.objective, stage.make_schedules
                status = train(
                    run,
                    state,
                    stage.loader,
                    objective,
                    checkpointer,
                    log,
                    stage.evaluate,
                    schedules,
                )
            if stage.check and not status:
                stage.check(run, state, checkpointer, log)
            _report_end(run, state, log, status, to_do)
        if state.faults.no_go and dist.get_rank() == 0:
            print(f"error: {state.faults.no_go}", file=sys.stderr, flush=True)
        return status


def _measure_before(state: State, log: Log, evaluate: Evaluate) -> None:
    """Log the held-out metrics of the model before its first step."""
    if metrics := validate(state.model, evaluate):
        text = f"        before the first step: {held_out_text(metrics)}"
        log.event("measured", text, step=state.step, **metrics)


def _report_end(run: RunConfig, state: State, log: Log, status: int, to_do: bool) -> None:
    """Say whether the phase is stopped, complete or paused; an event if this command trained."""
    kind = "stopped" if status else "ended" if state.step == state.phase_end else "paused"
    reason = "the start-up checks" if status == NO_GO else "a signal"
    outcome = {
        "stopped": f"stopped by {reason} and saved",
        "ended": "complete",
        "paused": "paused",
    }[kind]
    text = f"{run.run} {run.phase}: {outcome} at step {state.step}"
    log.event(kind, text, step=state.step) if to_do else log.say(text)
