"""Loss-spike detection, rollback state and stop signals of a training run."""

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, above, check_fields
from training.ops.watchdog import is_connection_lost

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def without_ignored_sighup(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Return `numbers`, without SIGHUP if this process ignores it, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (ignored and number == signal.SIGHUP)]


class StopSignal:
    """Records the first signal of SIGNALS that this rank receives.

    The loop reduces the flags over ranks at each step, so all ranks save at the same step and exit.
    A second SIGTERM or SIGINT kills at once, unless it comes within GRACE seconds: on Ctrl-C a rank
    gets SIGINT from the terminal and from torchrun. A closed terminal (SIGHUP) never interrupts a
    save. SIGHUP remains ignored if it was ignored before, as under nohup. torchrun sends SIGTERM to
    the other ranks when a rank has failed; a rank that then loses its connection prints no error,
    because the failed rank has printed the cause.
    """

    GRACE = 5.0

    def __init__(self) -> None:
        self.received = 0
        self.time = 0.0  # time of the first signal, monotonic

    def __enter__(self) -> "StopSignal":
        handled = without_ignored_sighup(SIGNALS)
        self.before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.time = number, time.monotonic()
            return
        is_late = time.monotonic() - self.time > self.GRACE
        if number in (signal.SIGTERM, signal.SIGINT) and is_late:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if error and self.received == signal.SIGTERM and is_connection_lost(error):
            os.kill(os.getpid(), signal.SIGTERM)

    def flags(self) -> tuple[bool, ...]:
        """One flag for each of SIGNALS: True if this rank received it."""
        return tuple(self.received == number for number in SIGNALS)


def stop_status(flags: Sequence[bool]) -> int:
    """Exit status of a run that a signal stopped: 128 + its number; 0 if no flag is set."""
    return next((128 + number for number, flag in zip(SIGNALS, flags, strict=True) if flag), 0)


class StepFlags(NamedTuple):
    """Events of one step: on this rank, or, after the reduction, on any rank."""

    save_failed: bool = False
    signals: tuple[bool, ...] = ()  # one per entry of SIGNALS


@dataclass(frozen=True)
class FaultConfig:
    """Policy for bad steps: skip, roll back after several in a row, stop after max_rollbacks."""

    # A loss or gradient norm this many deviations above the window's mean is a spike; 0: never.
    spike_sigma: NonNegativeFloat = 6.0
    # Number of good steps for mean and deviation. Until the window is full, no step is a spike.
    window: PositiveInt = 128
    bad_in_a_row: PositiveInt = 5  # skipped steps before a rollback
    # Minimum distance of a rollback, in steps; 0: to the newest checkpoint.
    rollback_steps: NonNegativeInt = 0
    max_rollbacks: NonNegativeInt = 3  # maximum rollbacks; the next one stops the run
    # Factor on the learning rate at each rollback.
    lr_factor: Annotated[float, above(0, maximum=1)] = 0.5
    # Maximum gradient norm after a rollback, if tighter than optim.grad_clip.
    grad_clip: NonNegativeFloat = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "faults")


@dataclass
class FaultState:
    """Recent losses, skipped batches and rollbacks; saved in checkpoints."""

    losses: list[float] = field(default_factory=list)  # losses of the last good steps
    norms: list[float] = field(default_factory=list)  # gradient norms of the same steps
    bad_batches: list[int] = field(default_factory=list)  # batch indices since the last good step
    excluded_batches: list[int] = field(default_factory=list)  # batch indices of this phase
    skipped: int = 0  # skipped steps over the whole run
    rollbacks: int = 0
    lr_scale: float = 1.0
    grad_clip: float | None = None  # limit after a rollback; None: as configured
    no_go: str = ""  # why the start-up checks ended the run; "" once accepted

    def check_step(self, loss: float, norm: float, config: FaultConfig) -> str | None:
        """Return why a step with this global loss and gradient norm must be skipped, or None.

        A good step enters the windows.
        """
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
                    return (
                        f"{name} {value:.3f}, more than {config.spike_sigma:g} deviations of "
                        f"{deviation:.3f} above {mean:.3f}"
                    )
        self.losses = [*self.losses, loss][-config.window :]
        self.norms = [*self.norms, norm][-config.window :]
        self.bad_batches = []
        return None

    def record_skip(self, batch_index: int) -> None:
        """Count a skipped step and its batch."""
        self.skipped, self.bad_batches = self.skipped + 1, [*self.bad_batches, batch_index]

    def next_batch_index(self, batch_index: int) -> int:
        """Return the first batch index from `batch_index` on that is not excluded."""
        while batch_index in self.excluded_batches:
            batch_index += 1
        return batch_index

    def roll_back(self, earlier: "FaultState", config: FaultConfig) -> "FaultState":
        """Return the state after a rollback to a checkpoint with state `earlier`.

        Windows come from `earlier`; excluded batches and counts include the later ones.
        """
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

    def for_new_data(self) -> "FaultState":
        """Return a copy without losses, gradient norms and batch indices of the old data."""
        return replace(self, losses=[], norms=[], bad_batches=[], excluded_batches=[])

    def next_phase(self) -> "FaultState":
        """Return the state for the start of the next phase, which has different data."""
        return replace(self.for_new_data(), no_go="")
