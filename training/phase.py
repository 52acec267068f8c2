"""One phase of a run from its start to its last checkpoint: what train.py and train_sft.py have in common."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from training import profiling, setup
from training.checkpoint import Checkpoints, on_main
from training.config import RunConfig, to_dict
from training.fsdp_utils import compute_dtype
from training.logger import Log, held_out_text
from training.loop import Evaluate, train, validate
from training.objectives import Objective
from training.run_folder import claim, locked
from training.state import State

Check = Callable[[RunConfig, State, Checkpoints, Log], None]


class TokenizerFiles(NamedTuple):
    """What checkpoints hold of a tokenizer."""

    folder: Path | None
    special: dict[str, int]  # ids of bos, eos and pad
    known_tokens: int | None = None  # vocabulary of run.init_from, where this tokenizer has more


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
) -> bool:
    """Train from wherever this run is. False if a signal stopped it; it has saved then.

    lines: what the console is told of the data. check: looks at what a complete phase has left.
    """
    with ExitStack() as held:
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
            if to_do:
                profiling.dry_run(run, state, device)
            before = to_do and run.validation.before and state.step == state.phase_start
            if before and evaluate and (found := validate(state.model, evaluate)):
                log.event("measured", f"        before the first step: {held_out_text(found)}", step=state.step, **found)
            with profiling.traced(run, state, device) if profile else nullcontext():
                finished = train(run, state, loader, objective, saves, log, evaluate)
            if check and finished:
                check(run, state, saves, log)
            kind = "stopped" if not finished else "ended" if state.step == state.phase_end else "paused"
            how = {"stopped": "stopped on a signal and saved", "ended": "complete", "paused": "paused"}[kind]
            ends = f"{run.run} {run.phase}: {how} at step {state.step}"
            log.event(kind, ends, step=state.step) if to_do else log.say(ends)
        return finished
