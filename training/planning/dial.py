"""The dial: from a GPU and hours to a model, its batches, rates and phases, as plain values.

`choose` makes the decision; training/planning/plan_files.py writes it as configs. Rules and their
sources are in docs/new_plan.md.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from models.nanollama import ModelConfig
from training.planning.cards import check_gpu
from training.planning.cost import MAX_EPOCHS, forecast_loss
from training.planning.dial_data import (
    GOALS,
    available_tokens,
    download_tokens,
    phase_shares,
    round_down,
    round_up,
)
from training.planning.dial_fit import TOKENS_PER_PARAMETER, Fit, fit, learning_rate, shapes

LEAST_TOKENS_PER_PARAMETER = 1  # minimum with --params: our judgement
LEAST_STEPS = 20
RESERVE = 0.05  # of the hours, for evaluations, checkpoints and restarts: our judgement
# Stages of goal chat: share of the hours, and maximum useful tokens: our judgement.
TUNING = {"sft": (0.06, 100e6), "dpo": (0.03, 30e6)}


@dataclass(frozen=True)
class Request:
    """The user's request. tokens, parameters: None lets `choose` decide."""

    gpu: str
    gpus: int
    hours: float
    goal: str = "chat"
    tokens: float | None = None
    parameters: float | None = None


class Choice(NamedTuple):
    """A chosen plan. Steps are optimizer updates; tokens are pretraining tokens."""

    request: Request
    fit: Fit
    steps: dict[str, int]  # phase -> steps
    lr: float
    tuning_tokens: dict[str, float]  # stage -> tokens; {} without SFT and DPO
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(self.steps.values()) * self.fit.run.data.tokens_per_step

    @property
    def downloads(self) -> dict[str, float]:
        """Return source -> tokens to download."""
        step_tokens = self.fit.run.data.tokens_per_step
        phase_tokens = {phase: steps * step_tokens for phase, steps in self.steps.items()}
        return download_tokens(self.request.goal, phase_tokens)


def tuning_tokens(fitted: Fit, hours: float, goal: str) -> dict[str, float]:
    """Return the tokens of SFT and DPO in a plan of `hours` hours."""
    if goal != "chat":
        return {}
    seconds = 3600 * hours / fitted.seconds_per_token
    return {stage: min(most, share * seconds) for stage, (share, most) in TUNING.items()}


def affordable_tokens(fitted: Fit, hours: float, goal: str) -> float:
    """Return the pretraining tokens in `hours` hours, besides SFT, DPO and the reserve."""
    seconds = 3600 * hours * (1 - RESERVE)
    tuning = sum(tuning_tokens(fitted, hours, goal).values())
    return seconds / fitted.seconds_per_token - tuning


def needed_hours(fitted: Fit, tokens: float, goal: str) -> float:
    """Return the hours that `tokens` pretraining tokens need, with SFT, DPO and the reserve."""
    low, high = 0.0, 1.0
    while affordable_tokens(fitted, high, goal) < tokens:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if affordable_tokens(fitted, middle, goal) < tokens:
            low = middle
        else:
            high = middle
    return high


def choose(request: Request) -> Choice:
    """Choose model, tokens, batch and rates; ValueError names the nearest request that works."""
    check_request(request)
    if request.parameters:
        fitted = _given_parameters(request)
    elif request.tokens:
        fitted = _given_tokens(request)
    else:
        fitted = _given_hours(request)
    available = available_tokens(request.goal, fitted.long_rows)
    larger = math.inf
    if request.tokens:
        _check_tokens(request, fitted, available)
    else:
        if not request.parameters:
            larger = _next_needed_tokens(request, fitted)
        fitted = _with_batch(request, fitted, min(available, larger))
    affordable = affordable_tokens(fitted, request.hours, request.goal)
    tokens = request.tokens or min(affordable, available, larger)
    total = max(LEAST_STEPS, int(tokens / fitted.run.data.tokens_per_step))
    shares = phase_shares(fitted.long_rows)
    steps = {name: max(1, round(total * share)) for name, share in shares.items()}
    steps["base"] += total - sum(steps.values())
    notes = []
    if tokens == larger < 0.9 * min(affordable, available):
        notes.append(
            f"the plan ends at {size_text(larger)} tokens, where the next larger model becomes "
            "optimal, and takes fewer hours than requested; --params uses all hours"
        )
    if tokens == available < affordable:
        notes.append(
            f"the plan ends at {size_text(available)} tokens, {MAX_EPOCHS} epochs of the rarest "
            "source, and takes fewer hours than requested"
        )
    if tokens < 0.9 * fitted.needed_tokens:
        notes.append(_few_tokens_note(request, fitted, tokens, tokens == available < affordable))
    if fitted.wanted_rows > fitted.long_rows:
        notes.append(
            f"no long-context phase: rows of {fitted.wanted_rows:,} tokens do not fit the memory, "
            f"so the context is {fitted.run.data.sequence_length:,} tokens and longer documents "
            "are split; use more memory or a smaller --params to get that phase"
        )
    tokens = total * fitted.run.data.tokens_per_step
    rate = learning_rate(fitted.run.model, tokens)
    tuning = tuning_tokens(fitted, request.hours, request.goal)
    return Choice(request, fitted, steps, rate, tuning, tuple(notes))


def _fit(request: Request, model: ModelConfig, tokens: float | None = None) -> Fit | None:
    """Return the fit of a model on the request's GPUs, with the batch for --tokens or `tokens`."""
    return fit(model, request.gpu, request.gpus, request.goal, request.tokens or tokens)


def _with_batch(request: Request, fitted: Fit, most: float) -> Fit:
    """Return the fit whose batch suits the tokens that it trains on, at most `most`.

    Tokens determine the batch, the batch the speed, and the speed the tokens. Starting from a batch
    for too few tokens, both only rise.
    """
    while True:
        tokens = min(affordable_tokens(fitted, request.hours, request.goal), most)
        again = _fit(request, fitted.run.model, tokens)
        batch = fitted.run.data.tokens_per_step
        if again is None or again.run.data.tokens_per_step <= batch:
            return fitted
        fitted = again


def _few_tokens_note(request: Request, fitted: Fit, tokens: float, data_end: bool) -> str:
    """Return a note on the limit that keeps a plan below the compute-optimal tokens."""
    size = fitted.run.model.num_parameters
    few = f"{tokens / size:.1f} tokens per parameter are fewer than {TOKENS_PER_PARAMETER}"
    if request.tokens:
        if request.parameters:
            return f"{few}, as --params and --tokens request"
        return f"{few}: --tokens {request.tokens:g} is too few even for the smallest shape"
    if data_end:
        return f"{few}, because the data end; no smaller model has a lower loss on the same data"
    free = Request(request.gpu, request.gpus, request.hours, request.goal)
    better = _largest(free, lambda fitted: _is_optimal(fitted, free))
    if better is None:
        return f"{few}, and no shape can reach that in these hours; more hours lower the loss"
    budget = min(
        affordable_tokens(better, request.hours, request.goal),
        available_tokens(request.goal, better.long_rows),
    )
    other = better.run.model.num_parameters
    theirs, ours = (forecast_loss(*pair)[0] for pair in ((other, budget), (size, tokens)))
    if theirs >= ours:
        return f"{few}; more hours lower the loss"
    return (
        f"{few}: in these hours {size_text(other)} parameters reach a lower loss, {theirs:.2f} "
        f"instead of {ours:.2f} nats per token by Hoffmann's law; omit --params to get them"
    )


def check_request(request: Request) -> None:
    """ValueError for an unknown GPU or goal, or numbers out of range."""
    check_gpu(request.gpu, ", and cpu")
    if request.goal not in GOALS:
        raise ValueError(f"unknown --goal {request.goal}; available: {', '.join(GOALS)}")
    if not 1 <= request.gpus <= 8:
        raise ValueError(f"--gpus {request.gpus} must be 1 to 8, the GPUs of one machine")
    if not request.hours > 0:
        raise ValueError(f"--hours {request.hours:g} must be above 0")


def _given_hours(request: Request) -> Fit:
    """Return the largest model that is compute-optimal within the hours and the data."""
    fitted = _largest(request, lambda fitted: _is_optimal(fitted, request))
    if fitted is None:
        first = _smallest(request)
        least = round_up(needed_hours(first, first.needed_tokens, request.goal))
        raise ValueError(
            f"--hours {request.hours:g} is too few for any model on {_gpus(request)}: the "
            f"smallest ({size_text(first.run.model.num_parameters)} parameters, "
            f"{size_text(first.needed_tokens)} tokens) needs about {least:g}; use --hours {least:g}"
        )
    return fitted


def _is_optimal(fitted: Fit, request: Request) -> bool:
    """Return True if hours and data allow TOKENS_PER_PARAMETER."""
    available = available_tokens(request.goal, fitted.long_rows)
    affordable = affordable_tokens(fitted, request.hours, request.goal)
    return fitted.needed_tokens <= min(affordable, available)


def _largest(request: Request, passes: Callable[[Fit], bool] = lambda fitted: True) -> Fit | None:
    """Return the largest shape that fits the memory and passes; None if there is none.

    Uses bisection. A shape that passes still passes with more hours, so the size never falls.
    """

    def fails(model: ModelConfig) -> bool:
        fitted = _fit(request, model)
        return fitted is None or not passes(fitted)

    index = bisect_left(shapes(), True, key=fails) - 1
    return _fit(request, shapes()[index]) if index >= 0 else None


def _smallest(request: Request) -> Fit:
    """Return the smallest shape, which fits every GPU of the table."""
    fitted = _fit(request, shapes()[0])
    assert fitted is not None
    return fitted


def _next_needed_tokens(request: Request, fitted: Fit) -> float:
    """Return the tokens at which the next larger shape becomes optimal; infinity if there is none.

    This limit keeps tokens from falling when more hours allow a larger model.
    """
    ladder = shapes()
    sizes = [model.num_parameters for model in ladder]
    index = sizes.index(fitted.run.model.num_parameters) + 1
    if index == len(ladder) or _fit(request, ladder[index]) is None:
        return math.inf
    return float(TOKENS_PER_PARAMETER * sizes[index])


def _given_parameters(request: Request) -> Fit:
    """Return the shape nearest to --params; ValueError if it exceeds the memory or the hours."""
    assert request.parameters
    ladder = shapes()
    target = math.log(request.parameters)
    model = min(ladder, key=lambda shape: abs(math.log(shape.num_parameters) - target))
    smallest, largest = ladder[0].num_parameters, ladder[-1].num_parameters
    if not 0.8 * smallest <= request.parameters <= 1.2 * largest:
        raise ValueError(
            f"--params {request.parameters:g} is outside the sizes of this command; use "
            f"{smallest:.1e} to {largest:.1e}"
        )
    least = float(LEAST_TOKENS_PER_PARAMETER * model.num_parameters)
    fitted = _fit(request, model, least)
    if fitted is None:
        best = _largest(request) or _smallest(request)
        raise ValueError(
            f"--params {request.parameters:g} does not fit the memory of {_gpus(request)}; the "
            f"largest model that fits is --params {round_down(best.run.model.num_parameters):g}"
        )
    if affordable_tokens(fitted, request.hours, request.goal) < least:
        best = _largest(request, lambda fitted: _is_optimal(fitted, request)) or _smallest(request)
        hours = round_up(needed_hours(fitted, least, request.goal))
        raise ValueError(
            f"--params {request.parameters:g} gets less than {LEAST_TOKENS_PER_PARAMETER} token "
            f"per parameter in {request.hours:g} hours; use --hours {hours:g} or more, or "
            f"--params {round_down(best.run.model.num_parameters):g}"
        )
    return fitted


def _given_tokens(request: Request) -> Fit:
    """Return the shape for --tokens at TOKENS_PER_PARAMETER, or the largest within the hours."""
    tokens = request.tokens
    assert tokens

    def passes(fitted: Fit) -> bool:
        affordable = affordable_tokens(fitted, request.hours, request.goal)
        return fitted.needed_tokens <= tokens <= affordable

    return _largest(request, passes) or _smallest(request)


def _check_tokens(request: Request, fitted: Fit, available: float) -> None:
    """ValueError if --tokens needs more hours or data than available."""
    assert request.tokens
    least = LEAST_STEPS * fitted.run.data.tokens_per_step
    if request.tokens < least:
        raise ValueError(
            f"--tokens {request.tokens:g} is less than {LEAST_STEPS} steps; use --tokens {least}"
        )
    if request.tokens > available:
        raise ValueError(
            f"--tokens {request.tokens:g} is more than {MAX_EPOCHS} epochs of the data; use "
            f"--tokens {round_down(available):g}"
        )
    affordable = affordable_tokens(fitted, request.hours, request.goal)
    if affordable < request.tokens:
        hours = round_up(needed_hours(fitted, request.tokens, request.goal))
        raise ValueError(
            f"--tokens {request.tokens:g} takes {hours:g} hours on {_gpus(request)} with "
            f"{size_text(fitted.run.model.num_parameters)} parameters; use --hours {hours:g} or "
            f"--tokens {_most_tokens(request, fitted):g}"
        )


def _most_tokens(request: Request, fitted: Fit) -> float:
    """Return the tokens that the hours allow, with the batch for these tokens."""
    while True:
        tokens = round_down(affordable_tokens(fitted, request.hours, request.goal))
        smaller = fit(fitted.run.model, request.gpu, request.gpus, request.goal, tokens)
        assert smaller is not None
        if affordable_tokens(smaller, request.hours, request.goal) >= tokens:
            return tokens
        fitted = smaller


def _gpus(request: Request) -> str:
    return f"{request.gpus} x {request.gpu}"


def size_text(count: float) -> str:
    """Format a number of parameters or tokens: 291M, 5.84B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
