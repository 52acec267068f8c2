"""The console line of a training step: metrics, step time, elapsed time and time left."""

import time
from collections import deque
from datetime import timedelta
from statistics import median
from typing import Any

RECENT = 50  # steps whose median gives the time left
MIN_STEPS = 5  # steps before the time left is shown: the first steps compile and fill caches


class StepTimes:
    """Step times of this process, without the steps before a resume."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.recent = deque[float](maxlen=RECENT)

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)

    def left(self, steps: int) -> float | None:
        """Estimate the seconds that `steps` steps take, without validation and saving.

        None if too few steps were timed, or if `steps` is 0.
        """
        known = steps > 0 and len(self.recent) >= MIN_STEPS
        return steps * median(self.recent) if known else None

    def text(self, steps: int) -> str:
        """Return the time of the last step, the elapsed time, and the time of `steps` more steps.

        The elapsed time includes validation and saving.
        """
        parts = [f"{duration(self.recent[-1])}/step"] if self.recent else []
        parts.append(f"{clock(time.monotonic() - self.began)} elapsed")
        left = self.left(steps)
        return "  ".join([*parts, *([f"{clock(left)} left"] if left is not None else [])])


def metrics_text(values: dict[str, Any]) -> str:
    """Format the metrics of a step: loss, learning rate, gradient norm and speed."""
    text = f"loss {values['loss']:.3f}  lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  "
    text += f"{values['tokens_per_s']:,.0f} tok/s"
    if values.get("data/wait_frac", 0) >= 0.01:
        text += f"  {values['data/wait_frac']:.0%} waiting for data"
    if "mfu" in values:
        text += f"  mfu {values['mfu']:.1%}"
    return text


def duration(seconds: float) -> str:
    """Format the duration of a step, in ms or s."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def clock(seconds: float) -> str:
    """Format a longer duration, e.g. "0:02:05"."""
    return str(timedelta(seconds=round(seconds)))
