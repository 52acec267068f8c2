"""Is this step fit to apply, and has someone asked the run to stop?"""

import math
import os
import signal
import time


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; the loop adds the note into its per-step reduction.

    So all ranks learn of a signal to any of them at the same step, save there, and leave. A second signal kills at once,
    unless it comes within GRACE seconds: on Ctrl-C a rank hears from the terminal and from torchrun too.
    """

    GRACE = 5.0

    def __init__(self) -> None:
        self.received = 0
        self.at = 0.0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.received and time.monotonic() - self.at > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self.at = number, time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def check_finite(loss: float, grad_norm: float, step: int, place: int) -> None:
    """ValueError where the global loss or gradient norm is not finite: the update is not applied, nothing is saved."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ValueError(
            f"loss {loss} and gradient norm {grad_norm} at step {step} (data place {place}) are not finite, so the update was "
            "not applied; go on from the last checkpoint with a lower optim.lr or longer schedule.warmup_steps"
        )
