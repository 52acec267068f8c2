"""Schedules: settings that change during a run, as pure functions of the step.

`run_schedules` lists them all. The loop applies the list before each step and logs each value under
its name. Nothing else changes these settings.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from torch.optim import Optimizer

from models.nanollama import NanoLlama
from ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
    one_of,
)
from training.curves import (
    MULTI_TOKEN,
    OF_GROUPS,
    OF_LOADER,
    ROUNDED,
    SCHEDULED,
    WINDOWS,
    Curve,
)
from training.optimizers import GroupConfig, OptimConfig, group_settings

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.state import State


# Fraction of the drop from the peak to min_lr, at fraction x of the decay. power: decay_power.
DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, power: x,
    "cosine": lambda x, power: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x, power: math.sqrt(x),
    "power": lambda x, power: 1 - (1 - x) ** power,  # like torch's PolynomialLR
}


@dataclass(frozen=True)
class ScheduleConfig:
    """Warmup-stable-decay over all phases of a run. Steps are optimizer updates."""

    warmup_steps: NonNegativeInt = 2000  # steps of the linear rise to optim.lr
    total_steps: PositiveInt = 230_000  # steps of all phases: warm-up, stable part and decay
    decay_steps: NonNegativeInt = 23_000  # steps of the decay at the end; 0: no decay
    decay: Annotated[str, one_of(*DECAYS)] = "linear"  # shape of the decay
    min_lr: NonNegativeFloat = 0.0  # learning rate at the end of the decay
    allow_rise: bool = False  # allow the learning rate to rise again after its decay began
    # Exponent of decay=power: min_lr + (peak - min_lr) (1 - x)^decay_power.
    decay_power: PositiveFloat = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        if self.decay != "power" and self.decay_power != 2.0:
            raise ValueError(
                f"schedule.decay_power={self.decay_power:g} has no effect with schedule.decay="
                f"{self.decay}; set schedule.decay=power, or remove it"
            )
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.decay_steps="
                f"{self.decay_steps} do not fit into schedule.total_steps={self.total_steps}"
            )

    @property
    def decay_begin(self) -> int:
        """The last step before the decay."""
        return self.total_steps - self.decay_steps


class WSDScheduler:
    """Warmup-stable-decay (arXiv:2404.06395): 0-based index of an update -> learning rate.

    Update 0 has peak / warmup_steps, update warmup_steps - 1 the peak. With decay_steps > 0, update
    total_steps - 1 and all later ones have exactly min_lr. With decay_steps = 0 the rate stays at
    the peak.

    `WSDScheduler(optimizer, warmup_steps, stable_steps, decay_steps)` returns an OptimizerSchedule.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "WSDScheduler":
        takes_optimizer = isinstance((*args, None)[0], Optimizer) or "optimizer" in kwargs
        return super().__new__(OptimizerSchedule if takes_optimizer else cls)

    def __init__(self, config: ScheduleConfig, peak: float):
        if config.min_lr > peak:
            raise ValueError(f"schedule.min_lr={config.min_lr} is above optim.lr={peak}")
        self.config, self.peak = config, peak

    def __call__(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return self.peak * (step + 1) / config.warmup_steps
        into_decay = step + 1 - config.decay_begin
        if into_decay <= 0:
            return self.peak
        if into_decay >= config.decay_steps:  # including decay_steps=0
            return config.min_lr if config.decay_steps else self.peak
        way = DECAYS[config.decay](into_decay / config.decay_steps, config.decay_power)
        return self.peak - (self.peak - config.min_lr) * way


class OptimizerSchedule(WSDScheduler):
    """Warmup-stable-decay with the interface of torch.optim.lr_scheduler.

    `WSDScheduler(optimizer, warmup_steps, stable_steps, decay_steps)` returns it.
    The peak of a parameter group is its learning rate at construction, which sets the rates of the
    first update. Call step() after optimizer.step() to set the next rates.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        stable_steps: int,
        decay_steps: int,
        min_lr: float = 0.0,
        decay: str = "linear",
        decay_power: float = 2.0,
    ):
        total = warmup_steps + stable_steps + decay_steps
        config = ScheduleConfig(
            warmup_steps, total, decay_steps, decay, min_lr, decay_power=decay_power
        )
        peaks = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        super().__init__(config, peaks[0])
        self.optimizer, self.rates = optimizer, [WSDScheduler(config, peak) for peak in peaks]
        self.last_epoch = 0  # updates made; the name is torch's
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


NEEDS = {  # requirements that a model or loader may not meet
    **dict.fromkeys(WINDOWS, "a model with attention windows"),
    **dict.fromkeys(OF_LOADER, "a loader whose batches change over the steps"),
    "softcap": "a model with a softcap",
    "multi_token": "a model with multi-token prediction",
}
Setter = Callable[[float], None]


class Schedule(NamedTuple):
    """One setting that changes over the steps."""

    name: str  # name in metrics.jsonl
    value: Callable[[int], float]  # number of updates so far -> value for the next update
    apply: Callable[[float], None]  # sets it on the model or the optimizer


def run_schedules(
    run: "RunConfig", state: "State", by_loader: Collection[str] = ()
) -> list[Schedule]:
    """Return the schedules of a phase: learning rate, a rope theta range, and run.schedules.

    by_loader: names that the loader applies itself; they are included only for logging. ValueError
    if the model, the optimizer or the loader of this run lacks a scheduled setting.
    """
    rate = WSDScheduler(run.schedule, run.optim.lr)
    first, last = run.theta_range

    def set_rate(value: float) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = value * group.get("lr_factor", 1.0)

    # A rollback lowers lr_scale, which the checkpoint keeps.
    schedules = [
        *_curve_schedules(run, state, by_loader),  # precedes lr, which uses the groups' factors
        Schedule("lr", lambda step: rate(step) * state.faults.lr_scale, set_rate),
    ]
    if first != last:
        assert isinstance(state.model, NanoLlama)  # SpeedrunRun allows only one value
        phase = state.phase_start, state.phase_end
        theta = Schedule(
            "rope_theta",
            lambda step: theta_at(first, last, step, *phase),
            state.model.set_rope_theta,
        )
        schedules.append(theta)
    return schedules


def _curve_schedules(
    run: "RunConfig", state: "State", by_loader: Collection[str]
) -> list[Schedule]:
    """Return one Schedule for each entry of run.schedules."""
    curves = {name: curve.over(run.schedule.total_steps) for name, curve in run.schedules.items()}
    setters = _setters(run.optim, state, [*curves]) | {name: lambda _: None for name in by_loader}
    schedules = []
    for name in SCHEDULED:  # _together relies on the order of WINDOWS and MULTI_TOKEN
        if (curve := curves.get(name)) is None:
            continue
        if name not in setters:
            kind, _, group = name.partition(".")
            of_group = f"a model with parameters in group {group}"
            need = of_group if kind in OF_GROUPS else NEEDS[kind]
            raise ValueError(f"schedules.{name} needs {need}; remove it")
        schedules.append(Schedule(name, curve.rounded if name in ROUNDED else curve, setters[name]))
    return schedules


@dataclass(frozen=True)
class WholeNumbers:
    """A curve rounded to whole numbers, as a function of the step."""

    curve: Curve  # with points in steps

    def __call__(self, step: int) -> int:
        return self.curve.rounded(step)

    @property
    def definition(self) -> str:
        """Text that identifies the curve."""
        points = [(float(step), float(value)) for step, value in self.curve.points]
        return f"{self.curve.shape}{points}"


@dataclass(frozen=True)
class RowsOfStep:
    """Rows of a step over all ranks, as a function of the phase's batch index.

    ValueError for a step of the phase whose tokens are not whole rows.
    """

    tokens: WholeNumbers  # tokens of a step of the whole run
    start: int  # the phase's first step
    steps: int  # of the phase
    length: int  # tokens of a row

    def __call__(self, batch_index: int) -> int:
        count, length = self.tokens(self.start + batch_index), self.length
        if count % length and batch_index < self.steps:
            raise ValueError(
                f"schedules.batch_tokens is {count} at step {self.start + batch_index}, which is "
                f"not a multiple of data.sequence_length={length}; use shape: step and such "
                "multiples"
            )
        return count // length

    @property
    def definition(self) -> str:
        return f"{self.tokens.definition} from {self.start} by {self.length}"


def of_step(run: "RunConfig", name: str, constant: int) -> int | WholeNumbers:
    """Return a scheduled whole number as a function of the step; `constant` if not scheduled.

    For the loader's settings (OF_LOADER).
    """
    curve = run.schedules.get(name)
    return constant if curve is None else WholeNumbers(curve.over(run.schedule.total_steps))


def rows_of_step(run: "RunConfig") -> int | RowsOfStep:
    """Return the rows of a step over all ranks, for PackedDataLoader.

    ValueError if schedules.batch_tokens is set and the first step of the phase is unknown.
    """
    tokens = of_step(run, "batch_tokens", 0)
    if isinstance(tokens, int):
        return run.data.rows
    if run.resume_from and run.start_step is None:
        raise ValueError(
            "schedules.batch_tokens counts steps of the whole run, but start_step is not set; set "
            "it to the last step of the phase before, or to 0 in the first phase"
        )
    return RowsOfStep(tokens, run.start_step or 0, run.steps, run.data.sequence_length)


def tokens_of_steps(run: "RunConfig", begin: int, end: int) -> int:
    """Return the tokens of the updates with 0-based indices begin to end - 1, padding included."""
    tokens = of_step(run, "batch_tokens", run.data.tokens_per_step)
    return sum(map(tokens, range(begin, end))) if callable(tokens) else tokens * (end - begin)


def _setters(optim: OptimConfig, state: "State", names: list[str]) -> dict[str, Setter]:
    """Return functions that set the scheduled settings of this model and optimizer."""
    model: Any = state.model
    groups: dict[str, Any] = {
        group.get("name", ""): group for group in state.optimizer.param_groups
    }

    def set_factor(key: str, names: list[str], value: float) -> None:
        for name in names:
            groups[name][key] = value * group_settings(optim, name)[key]

    adam = {name for name, group in groups.items() if "betas" in group}
    shared = [  # groups that follow the curve beta2
        name
        for name in adam
        if optim.groups.get(name, GroupConfig()).beta2 is None and f"beta2.{name}" not in names
    ]

    def set_beta2(names: list[str], value: float) -> None:
        for name in names:
            groups[name]["betas"] = (groups[name]["betas"][0], value)

    def set_momentum(value: float) -> None:
        groups["matrices"]["momentum"] = value

    setters: dict[str, Setter] = {
        **{f"lr.{name}": partial(set_factor, "lr_factor", [name]) for name in groups},
        "weight_decay": partial(set_factor, "weight_decay", [*groups]),
        "beta2": partial(set_beta2, shared),
        **{f"beta2.{name}": partial(set_beta2, [name]) for name in adam},
        "momentum": set_momentum,
    }
    if hasattr(model, "set_softcap"):
        setters["softcap"] = model.set_softcap
    if hasattr(model, "set_windows"):
        constant = {name: getattr(model.config, name) for name in WINDOWS}
        setters |= _together(
            [name for name in WINDOWS if name in names],
            lambda values: model.set_windows(*(constant | values).values()),
        )
    if hasattr(model, "set_multi_token_weights"):
        further = [name for name in MULTI_TOKEN if name in names]
        setters |= _together(
            further, lambda values: model.set_multi_token_weights((1.0, *values.values()))
        )
    return setters


def _together(names: Sequence[str], apply: Callable[[dict[str, float]], None]) -> dict[str, Setter]:
    """Return setters of several names; setting the last name calls `apply` with all values."""
    values: dict[str, float] = {}

    def set_value(name: str, value: float) -> None:
        values[name] = value
        if name == names[-1]:
            apply(values)

    return {name: partial(set_value, name) for name in names}


def theta_at(first: float, last: float, step: int, phase_start: int, phase_end: int) -> float:
    """Return rope theta of the update with 0-based index `step`: log-linear over the phase."""
    fraction = max(0, step - phase_start) / max(1, phase_end - phase_start - 1)
    return first * (last / first) ** fraction


def apply_schedules(schedules: Sequence[Schedule], step: int) -> dict[str, float]:
    """Set scheduled settings for the update with 0-based index `step`; return them by name."""
    values = {schedule.name: schedule.value(step) for schedule in schedules}
    for schedule in schedules:
        schedule.apply(values[schedule.name])
    return values
