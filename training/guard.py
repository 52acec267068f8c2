"""Is this step fit to apply, and has someone asked the run to stop?"""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, above, check_fields

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopSignal:
    """Records a signal of SIGNALS; the loop reduces its flags over ranks at each step.

    So all ranks learn of a signal to any of them at the same step, save there, and exit. A second
    SIGTERM or SIGINT kills at once, unless it comes within GRACE seconds: on Ctrl-C a rank gets
    SIGINT from the terminal and from torchrun. A closed terminal (SIGHUP) never interrupts a save.
    SIGHUP stays ignored where it was ignored before: that is how nohup starts a command.
    """

    GRACE = 5.0

    def __init__(self) -> None:
        self.received = 0
        self.at = 0.0

    def __enter__(self) -> "StopSignal":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handled = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self.before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
        elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - self.at > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def flags(self) -> tuple[bool, ...]:
        """One flag for each of SIGNALS: did this rank receive it?"""
        return tuple(self.received == number for number in SIGNALS)


def stop_status(flags: Sequence[bool]) -> int:
    """Exit status of a run that a signal stopped: 128 + its number; 0 if no flag is set."""
    return next((128 + number for number, flag in zip(SIGNALS, flags, strict=True) if flag), 0)


class StepFlags(NamedTuple):
    """What a rank reports beside its metric sums at each step; after the reduction, what any rank reported."""

    save_failed: bool = False
    signals: tuple[bool, ...] = ()  # one for each of SIGNALS


@dataclass(frozen=True)
class FaultConfig:
    """What is done about steps that are not fit to apply: skip them; after some in a row go back; after some of that stop."""

    # A loss or gradient norm this many deviations above the window's mean is a spike; 0: never.
    spike_sigma: NonNegativeFloat = 6.0
    window: PositiveInt = 128  # good steps that mean and deviation are taken over; before it is full nothing is a spike
    bad_in_a_row: PositiveInt = (
        5  # skipped steps after which the run goes back to an earlier checkpoint
    )
    rollback_steps: NonNegativeInt = 0  # at least so many steps back; 0: the newest checkpoint
    max_rollbacks: NonNegativeInt = 3  # more stop the run
    lr_factor: Annotated[float, above(0, most=1)] = (
        0.5  # of the learning rate, at each time it goes back
    )
    grad_clip: NonNegativeFloat = (
        0.5  # after it went back, where that is tighter than optim.grad_clip
    )

    def __post_init__(self) -> None:
        check_fields(self, "faults")


@dataclass
class FaultState:
    """What a run remembers of its good and bad steps; part of the State, so that a resumed run judges as it would have."""

    losses: list[float] = field(default_factory=list)  # of the last good steps
    norms: list[float] = field(default_factory=list)
    bad_batches: list[int] = field(default_factory=list)  # of the bad steps in a row up to now
    excluded_batches: list[int] = field(
        default_factory=list
    )  # places of this phase that are not read again
    skipped: int = 0  # steps, over the whole run
    rollbacks: int = 0
    lr_scale: float = 1.0
    grad_clip: float | None = None  # tightened to; None: as configured
    no_go: str = ""  # what the start-up checks ended the run for, until it is accepted

    def judge(self, loss: float, norm: float, config: FaultConfig) -> str | None:
        """Why a step with this global loss and gradient norm is not to be applied; None, and remembered, where it is fit."""
        for name, value, window in (
            ("loss", loss, self.losses),
            ("gradient norm", norm, self.norms),
        ):
            if not math.isfinite(value):
                return f"{name} {value}"
            if config.spike_sigma and len(window) >= config.window:
                mean = math.fsum(window) / len(window)
                deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
                if value > mean + config.spike_sigma * deviation:
                    return f"{name} {value:.3f}, more than {config.spike_sigma:g} deviations of {deviation:.3f} above {mean:.3f}"
        self.losses, self.norms = (
            [*self.losses, loss][-config.window :],
            [*self.norms, norm][-config.window :],
        )
        self.bad_batches = []
        return None

    def note_bad(self, batch_index: int) -> None:
        """A step was skipped."""
        self.skipped, self.bad_batches = self.skipped + 1, [*self.bad_batches, batch_index]

    def next_batch_index(self, batch_index: int) -> int:
        """The first place from here on that is not left out."""
        while batch_index in self.excluded_batches:
            batch_index += 1
        return batch_index

    def go_back(self, earlier: "FaultState", config: FaultConfig) -> "FaultState":
        """What is remembered after going back to a checkpoint that remembers `earlier`: its windows, and all that was learnt."""
        return replace(
            earlier,
            bad_batches=[],
            excluded_batches=sorted(
                {*earlier.excluded_batches, *self.excluded_batches, *self.bad_batches}
            ),
            skipped=self.skipped,
            rollbacks=self.rollbacks + 1,
            lr_scale=self.lr_scale * config.lr_factor,
            grad_clip=config.grad_clip,
            no_go=self.no_go,
        )

    def other_data(self) -> "FaultState":
        """The same without what holds for the data so far: losses, gradient norms and places."""
        return replace(self, losses=[], norms=[], bad_batches=[], excluded_batches=[])

    def next_phase(self) -> "FaultState":
        """What is carried over a phase border: other data have other losses, and other places."""
        return replace(self.other_data(), no_go="")
