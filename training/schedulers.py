"""Schedules: what changes over the steps, as pure functions of the step.

`run_schedules` lists every setting of the model and the optimizer that changes during a run. The loop applies the list
before each step and logs each value under its name. Nothing else changes these settings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim import Optimizer

from ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.state import State


@dataclass(frozen=True)
class ScheduleConfig:
    """Warmup-stable-decay over a whole run, all phases together. Steps are optimizer updates."""

    warmup_steps: NonNegativeInt = 2000
    total_steps: PositiveInt = 230_000
    decay_steps: NonNegativeInt = 23_000
    decay: str = "linear"  # linear, cosine or 1-sqrt
    min_lr: NonNegativeFloat = 0.0
    allow_rise: bool = (
        False  # continue although the rate would rise again after its decay has begun
    )

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if self.decay not in DECAYS:
            raise ValueError(f"schedule.decay={self.decay!r} is not one of {', '.join(DECAYS)}")
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.decay_steps={self.decay_steps} "
                f"do not fit into schedule.total_steps={self.total_steps}"
            )


DECAYS = {  # share of the way from the peak down to min_lr, at share x of the decay
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": math.sqrt,
}


class WSDScheduler:
    """Warmup-stable-decay (arXiv:2404.06395). Called with the number of updates made so far, gives the next one's rate.

    Update 0 has peak / warmup_steps, update warmup_steps - 1 the peak, the last update (total_steps - 1) exactly min_lr,
    and so has every one after it.

    `WSDScheduler(optimizer, warmup_steps, stable_steps, decay_steps)` makes an OptimizerSchedule.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "WSDScheduler":
        wanted = (
            OptimizerSchedule
            if isinstance((*args, None)[0], Optimizer) or "optimizer" in kwargs
            else cls
        )
        return super().__new__(wanted)

    def __init__(self, config: ScheduleConfig, peak: float):
        if config.min_lr > peak:
            raise ValueError(f"schedule.min_lr={config.min_lr} is above optim.lr={peak}")
        self.config, self.peak = config, peak

    def __call__(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return self.peak * (step + 1) / config.warmup_steps
        into_decay = step + 1 - (config.total_steps - config.decay_steps)
        if into_decay <= 0:
            return self.peak
        if into_decay >= config.decay_steps:  # also where decay_steps is 0
            return config.min_lr if config.decay_steps else self.peak
        return self.peak - (self.peak - config.min_lr) * DECAYS[config.decay](
            into_decay / config.decay_steps
        )


class OptimizerSchedule(WSDScheduler):
    """The same schedule in the form of torch.optim.lr_scheduler: it sets the optimizer's rates.

    The peak of a parameter group is its rate when this is made. The rates are set for the first update at once, and by
    step(), to be called after optimizer.step(), for the next.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        stable_steps: int,
        decay_steps: int,
        min_lr: float = 0.0,
        decay: str = "linear",
    ):
        total = warmup_steps + stable_steps + decay_steps
        config = ScheduleConfig(warmup_steps, total, decay_steps, decay, min_lr)
        peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        super().__init__(config, peaks[0])
        self.optimizer, self.rates = optimizer, [WSDScheduler(config, peak) for peak in peaks]
        self.last_epoch = 0  # updates made, by torch's name
        self._set()

    def step(self) -> None:
        self.last_epoch += 1
        self._set()

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_epoch = state["last_epoch"]
        self._set()


class Schedule(NamedTuple):
    """One setting that changes over the steps."""

    name: str  # in metrics.jsonl
    value: Callable[
        [int], float
    ]  # of the number of updates made so far: the value for the next update
    apply: Callable[[float], None]  # set it on the model or the optimizer


def run_schedules(run: "RunConfig", state: "State") -> list[Schedule]:
    """Everything that changes over the steps of this phase: the learning rate, and rope theta where it has a range."""
    rate = WSDScheduler(run.schedule, run.optim.lr)
    first, last = run.theta_range

    def set_rate(value: float) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = value

    # A rollback lowers lr_scale, which the checkpoint keeps.
    schedules = [Schedule("lr", lambda step: rate(step) * state.faults.lr_scale, set_rate)]
    if first != last:
        phase = state.phase_start, state.phase_end
        theta = Schedule(
            "rope_theta",
            lambda step: theta_at(first, last, step, *phase),
            state.model.set_rope_theta,
        )
        schedules.append(theta)
    return schedules


def theta_at(first: float, last: float, step: int, phase_start: int, phase_end: int) -> float:
    """Rope theta of the update after `step` updates: from first to last over the phase, evenly in its logarithm."""
    done = max(0, step - phase_start) / max(1, phase_end - phase_start - 1)
    return first * (last / first) ** done


def apply_schedules(schedules: Sequence[Schedule], step: int) -> dict[str, float]:
    """Set every scheduled setting for the update after `step` updates; the values by name."""
    values = {schedule.name: schedule.value(step) for schedule in schedules}
    for schedule in schedules:
        schedule.apply(values[schedule.name])
    return values
