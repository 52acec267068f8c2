"""One phase of a run from its start to its last checkpoint: what train.py and train_sft.py have in common."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from files import FULL, is_full, no_room
from training import profiling, setup
from training.checkpoint import Checkpoints
from training.config import RunConfig, to_dict
from training.distributed import on_main
from training.fsdp_utils import compute_dtype
from training.logger import Log, held_out_text
from training.loop import Evaluate, train, validate
from training.objectives import Objective
from training.run_folder import claim, locked
from training.startup import NO_GO
from training.state import State

FULL_SAID = tuple(os.strerror(code) for code in FULL)
Check = Callable[[RunConfig, State, Checkpoints, Log], None]


class TokenizerFiles(NamedTuple):
    """What checkpoints hold of a tokenizer."""

    folder: Path | None
    special: dict[str, int]  # ids of bos, eos and pad
    known_tokens: int | None = None  # vocabulary of run.init_from, where this tokenizer has more


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


def run_phase(
    run: RunConfig,
    device: torch.device,
    loader: Any,
    objective: Objective,
    evaluate: Evaluate | None,
    tokenizer: TokenizerFiles,
    lines: Iterable[str] = (),
    profile: bool = False,
    check: Check | None = None,
) -> int:
    """Train from wherever this run is. Returns the exit status of train(): 0 where it came to its end.

    lines: what the console is told of the data. check: looks at what a complete phase has left.
    """
    with ExitStack() as held, _full_disk(run):
        on_main(lambda: held.enter_context(locked(run.checkpoints, run.logs)))
        saves = Checkpoints(run.checkpoints, run.checkpoint, compute_dtype(run.parallel, device), *tokenizer[:2])
        log = Log(run.logs, run.log, dist.get_rank() == 0, to_dict(run), setup.secrets(run.log.alerts.secrets))
        state = setup.build(run, device, known_tokens=tokenizer.known_tokens)
        grown = tokenizer.known_tokens is not None
        restored, source = setup.restore_or_init(run, state, saves, loader.fingerprint, grown)
        begins = f"{run.run} {run.phase}: {restored}"
        to_do = state.step < min(state.phase_end, run.until or state.phase_end)
        if to_do:
            if set_aside := on_main(lambda: claim(run, source)):
                log.event("set_aside", set_aside)
            log.event("begun" if state.step == state.phase_start else "resumed", begins, step=state.step)
        else:
            log.say(begins)
        log.say(setup.describe(run, device))
        for line in lines:
            log.say(line)
        if to_do and dist.get_rank() == 0:
            setup.write_run_files(run, device)
        with log, profiling.out_of_memory(run, device):
            if to_do and not state.faults.no_go:
                profiling.dry_run(run, state, device)
            before = to_do and run.validation.before and state.step == state.phase_start
            if before and evaluate and (found := validate(state.model, evaluate)):
                log.event("measured", f"        before the first step: {held_out_text(found)}", step=state.step, **found)
            with profiling.traced(run, state, device) if profile else nullcontext():
                status = train(run, state, loader, objective, saves, log, evaluate)
            if check and not status:
                check(run, state, saves, log)
            kind = "stopped" if status else "ended" if state.step == state.phase_end else "paused"
            why = "the start-up checks" if status == NO_GO else "a signal"
            how = {"stopped": f"stopped by {why} and saved", "ended": "complete", "paused": "paused"}[kind]
            ends = f"{run.run} {run.phase}: {how} at step {state.step}"
            log.event(kind, ends, step=state.step) if to_do else log.say(ends)
        if state.faults.no_go and dist.get_rank() == 0:
            print(f"error: {state.faults.no_go}", file=sys.stderr, flush=True)
        return status
