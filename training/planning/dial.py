"""The dial: from a GPU and hours to a model, its batches, rates and phases, as plain values.

`choose` decides; training/planning/plan_files.py writes the decision as configs. Rules and their
sources are in docs/new_plan.md.
"""

import difflib
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from models.nanollama import ModelConfig, make_config
from training.config import DataConfig, RunConfig
from training.fsdp_utils import ParallelConfig
from training.planning.cards import GPUS, Gpu
from training.planning.cost import MAX_EPOCHS
from training.planning.memory import TIGHT, memory
from training.planning.roofline import efficiency, step_bound

TOKENS_PER_PARAMETER = 20  # compute-optimal, about (arXiv:2203.15556)
LEAST_TOKENS_PER_PARAMETER = 1  # with --params; fewer are refused: our judgement
ASPECT = (48, 72)  # width / layers; loss hardly depends on it (arXiv:2001.08361, figure 5)
MAX_WIDTH = 5120
LONG_CONTEXT_FROM = 300_000_000  # parameters; smaller plans have no long rows: our judgement
LONG_ROWS_FROM = 1_000_000_000  # parameters with rows of 4,096 instead of 2,048
MAX_MICRO_BATCH = 65_536  # tokens; more do not make products faster
MAX_RATE = 3e-3  # the highest rate of public recipes of this kind (DCLM, arXiv:2406.11794)
LONG_SHARE, DECAY_SHARE = 0.05, 0.2  # of the tokens; 10-20 % of decay is enough (arXiv:2405.18392)
RESERVE = 0.05  # of the hours, for evaluations, checkpoints and restarts: our judgement
DOWNLOAD_MARGIN = 1.1  # downloaded / trained tokens: filters and held-out documents take the rest
# Stages of goal chat: share of the hours, and tokens after which more are not useful: our judgement
TUNING = {"sft": (0.06, 100e6), "dpo": (0.03, 30e6)}
GOALS = ("chat", "base", "code")

# Tokens of each source: the sample's name (fineweb_edu), its paper (open_web_math,
# arXiv:2310.06786), or what the 1.1B plan downloads; the set itself may have more.
AVAILABLE = {
    "fineweb_edu": 100e9,
    "pg19": 1.8e9,
    "the_stack_python": 8e9,
    "open_web_math": 14.7e9,
    "stackexchange": 1.1e9,
    "stem_wiki": 1.1e9,
}
# Web text stays in the late phases: replaying it keeps what was learned (arXiv:2603.04964).
TEXT_MIXES = {
    "base": {"fineweb_edu": 1.0},
    "long_context": {"fineweb_edu": 0.5, "pg19": 0.5},
    "gold": {"fineweb_edu": 0.5, "open_web_math": 0.2, "stackexchange": 0.15, "stem_wiki": 0.15},
}
CODE_MIXES = {
    "base": {"the_stack_python": 0.5, "fineweb_edu": 0.45, "stackexchange": 0.05},
    "long_context": {"the_stack_python": 0.5, "fineweb_edu": 0.25, "pg19": 0.25},
    "gold": {
        **{"the_stack_python": 0.5, "fineweb_edu": 0.25, "stackexchange": 0.15},
        "open_web_math": 0.1,
    },
}
MIXES = {"chat": TEXT_MIXES, "base": TEXT_MIXES, "code": CODE_MIXES}


@dataclass(frozen=True)
class Request:
    """What the user asks for. tokens, parameters: chosen if None."""

    gpu: str
    gpus: int
    hours: float
    goal: str = "chat"
    tokens: float | None = None
    parameters: float | None = None


class Fit(NamedTuple):
    """A model on some GPUs: the run of its base phase, and the time per token of the phases."""

    run: RunConfig
    long_rows: int  # length of the rows of the long-context phase; 0: no such phase
    seconds_per_token: float  # mean over the phases, with the factor of published runs

    @property
    def needed_tokens(self) -> float:
        """Tokens of a compute-optimal run."""
        return TOKENS_PER_PARAMETER * self.run.model.num_parameters


class Choice(NamedTuple):
    """A chosen plan. Steps are optimizer updates; tokens those of pretraining."""

    request: Request
    fit: Fit
    steps: dict[str, int]  # phase -> steps
    lr: float
    tuning_tokens: dict[str, float]  # stage -> tokens; {} without SFT and DPO
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(self.steps.values()) * self.fit.run.data.tokens_per_step


@cache
def shapes() -> tuple[ModelConfig, ...]:
    """Llama shapes in rising order of their parameters: widths are multiples of 128."""
    found = []
    for width in (*range(256, 2048, 128), *range(2048, MAX_WIDTH + 1, 256)):
        head_dim = 64 if width < 2048 else 128
        heads = width // head_dim
        group = next(n for n in (4, 3, 2, 1) if heads % n == 0)
        for layers in range(-(-width // ASPECT[1]), width // ASPECT[0] + 1):
            found.append(
                make_config(
                    hidden_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=heads // group,
                    # 0.02 is usual at width 2048; narrower models need more (docs/log.md).
                    initializer_range=round(min(0.05, width**-0.5), 3),
                )
            )
    return tuple(sorted(found, key=lambda model: model.num_parameters))


def batch_tokens(tokens: float) -> float:
    """Best tokens per step for a run of `tokens` tokens: Step Law (arXiv:2503.04715)."""
    return float(0.58 * tokens**0.571)


def learning_rate(model: ModelConfig, tokens: float) -> float:
    """Best peak rate of AdamW: Step Law (arXiv:2503.04715), at most MAX_RATE.

    The law counts parameters without embedding and head. Its runs had 60M to 1B of them.
    """
    blocks = model.num_parameters - 2 * model.vocab_size * model.hidden_size
    return float(min(MAX_RATE, 1.79 * blocks**-0.713 * tokens**0.307))


@cache
def fit(model: ModelConfig, name: str, gpus: int) -> Fit | None:
    """The fastest settings with which a model fits the GPUs `name`; None if there are none."""
    gpu = GPUS[name]
    length = 4096 if model.num_parameters >= LONG_ROWS_FROM else 2048
    long_rows = 4 * length if model.num_parameters >= LONG_CONTEXT_FROM else 0
    unit = gpus * (long_rows or length)  # a step has whole rows on every GPU in every phase
    wanted = batch_tokens(TOKENS_PER_PARAMETER * model.num_parameters)
    batch = unit * 2 ** max(0, round(math.log2(wanted / unit)))
    context = replace(model, max_position_embeddings=long_rows or length)
    options = []
    for strategy in ("zero2", "zero3") if gpus > 1 else ("zero2",):
        for level in ("none", "selective", "full"):
            parallel = ParallelConfig(strategy=strategy, activation_checkpointing=level)
            data = DataConfig(sequence_length=length, tokens_per_step=batch, micro_batch_size=1)
            run = RunConfig(model=context, data=data, parallel=parallel)
            if fitting := _largest_micro_batch(run, gpus, gpu):
                options.append((_seconds_per_token(fitting, gpus, gpu, long_rows), fitting))
    if not options:
        return None
    seconds, fastest = min(options, key=lambda option: option[0])
    if long_rows and memory(long_run(fastest, long_rows), gpus).total > TIGHT * gpu.memory:
        long_rows = 0
        fastest = replace(fastest, model=replace(model, max_position_embeddings=length))
        seconds = _seconds_per_token(fastest, gpus, gpu, 0)
    return Fit(fastest, long_rows, seconds)


def _largest_micro_batch(run: RunConfig, gpus: int, gpu: Gpu) -> RunConfig | None:
    """The run with the largest micro-batch that fits, in powers of 2; None if one row does not."""
    fitting = None
    rows = 1
    limit = min(run.data.rows // gpus, max(1, MAX_MICRO_BATCH // run.data.sequence_length))
    while rows <= limit:
        wider = replace(run, data=replace(run.data, micro_batch_size=rows))
        if memory(wider, gpus).total > TIGHT * gpu.memory:
            break
        fitting, rows = wider, 2 * rows
    return fitting


def long_run(run: RunConfig, rows: int) -> RunConfig:
    """The long-context phase of a base phase: rows of another length, as many tokens at once."""
    size = max(1, run.data.micro_batch_size * run.data.sequence_length // rows)
    return replace(run, data=replace(run.data, sequence_length=rows, micro_batch_size=size))


def _seconds_per_token(run: RunConfig, gpus: int, gpu: Gpu, long_rows: int) -> float:
    """Mean over the phases: bound of a step x factor of published runs / tokens of a step."""
    seconds = step_bound(run, gpus, gpu).seconds
    if long_rows:
        longer = step_bound(long_run(run, long_rows), gpus, gpu).seconds
        seconds += LONG_SHARE * (longer - seconds)
    return seconds * efficiency().factor / run.data.tokens_per_step


def tuning_tokens(fitted: Fit, hours: float, goal: str) -> dict[str, float]:
    """Tokens of SFT and DPO in a plan of `hours` hours."""
    if goal != "chat":
        return {}
    seconds = 3600 * hours / fitted.seconds_per_token
    return {stage: min(most, share * seconds) for stage, (share, most) in TUNING.items()}


def affordable_tokens(fitted: Fit, hours: float, goal: str) -> float:
    """Tokens of pretraining in `hours` hours, beside SFT, DPO and the reserve."""
    seconds = 3600 * hours * (1 - RESERVE)
    tuning = sum(tuning_tokens(fitted, hours, goal).values())
    return seconds / fitted.seconds_per_token - tuning


def needed_hours(fitted: Fit, tokens: float, goal: str) -> float:
    """Hours in which `tokens` tokens of pretraining are affordable."""
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


def available_tokens(goal: str, long_rows: int) -> float:
    """Most tokens of a plan: no source is read for more than MAX_EPOCHS epochs."""
    shares = source_shares(goal, long_rows)
    return min(MAX_EPOCHS * AVAILABLE[name] / share for name, share in shares.items())


def phase_shares(long_rows: int) -> dict[str, float]:
    """Share of each phase in the tokens."""
    long = {"long_context": LONG_SHARE} if long_rows else {}
    return {"base": 1 - DECAY_SHARE - sum(long.values()), **long, "gold": DECAY_SHARE}


def source_shares(goal: str, long_rows: int) -> dict[str, float]:
    """Share of each source in the tokens of all phases."""
    shares: dict[str, float] = {}
    for phase, share in phase_shares(long_rows).items():
        for name, weight in MIXES[goal][phase].items():
            shares[name] = shares.get(name, 0.0) + share * weight
    return shares


def choose(request: Request) -> Choice:
    """Choose model, tokens, batch and rates; ValueError names the nearest request that works."""
    check_request(request)
    if request.parameters:
        fitted = _given_parameters(request)
    elif request.tokens:
        fitted = _given_tokens(request)
    else:
        fitted = _given_hours(request)
    affordable = affordable_tokens(fitted, request.hours, request.goal)
    available = available_tokens(request.goal, fitted.long_rows)
    tokens, notes = min(affordable, available), []
    if request.tokens:
        _check_tokens(request, fitted, available)
        tokens = request.tokens
    elif not request.parameters:
        larger = _next_needed_tokens(request, fitted)
        if larger < 0.9 * tokens:
            notes.append(
                f"the plan ends at {size_text(larger)} tokens, with which the next larger model "
                "begins, and takes fewer hours than asked for; --params uses them all"
            )
        tokens = min(tokens, larger)
    if tokens == available:
        notes.append(
            f"the data end at {available / 1e9:.0f}B tokens, {MAX_EPOCHS} epochs of the rarest "
            "source: the plan takes fewer hours than asked for"
        )
    if (ratio := tokens / fitted.run.model.num_parameters) < 0.9 * TOKENS_PER_PARAMETER:
        notes.append(
            f"{ratio:.1f} tokens per parameter are fewer than {TOKENS_PER_PARAMETER}: a smaller "
            "model would reach a lower loss in these hours"
        )
    total = max(20, int(tokens / fitted.run.data.tokens_per_step))
    shares = phase_shares(fitted.long_rows)
    steps = {name: max(1, round(total * share)) for name, share in shares.items()}
    steps["base"] += total - sum(steps.values())
    tokens = total * fitted.run.data.tokens_per_step
    rate = learning_rate(fitted.run.model, tokens)
    tuning = tuning_tokens(fitted, request.hours, request.goal)
    return Choice(request, fitted, steps, rate, tuning, tuple(notes))


def check_request(request: Request) -> None:
    """ValueError for an unknown GPU or goal, or numbers out of range."""
    if request.gpu not in GPUS:
        close = difflib.get_close_matches(request.gpu.lower(), GPUS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"unknown --gpu {request.gpu}; {hint}available: {', '.join(GPUS)}, and cpu"
        )
    if request.goal not in GOALS:
        raise ValueError(f"unknown --goal {request.goal}; available: {', '.join(GOALS)}")
    if not 1 <= request.gpus <= 8:
        raise ValueError(f"--gpus {request.gpus} must be 1 to 8, the GPUs of one machine")
    if not request.hours > 0:
        raise ValueError(f"--hours {request.hours:g} must be above 0")


def _given_hours(request: Request) -> Fit:
    """The largest model that is compute-optimal within the hours and the data."""
    fitted = _largest(request, lambda fit: _is_optimal(fit, request, request.hours))
    if fitted is None:
        first = _smallest(request)
        least = _round_up(needed_hours(first, first.needed_tokens, request.goal))
        raise ValueError(
            f"--hours {request.hours:.2g} is too few for any model on {_gpus(request)}: the "
            f"smallest ({size_text(first.run.model.num_parameters)} parameters, "
            f"{size_text(first.needed_tokens)} tokens) needs about {least:g}; use --hours {least:g}"
        )
    return fitted


def _is_optimal(fitted: Fit, request: Request, hours: float) -> bool:
    """Whether hours and data allow TOKENS_PER_PARAMETER."""
    available = available_tokens(request.goal, fitted.long_rows)
    affordable = affordable_tokens(fitted, hours, request.goal)
    return fitted.needed_tokens <= min(affordable, available)


def _largest(request: Request, passes: Callable[[Fit], bool]) -> Fit | None:
    """The largest shape that fits the memory and passes; None if there is none.

    Bisection: with more hours every shape passes that passed before, so the size never falls.
    """

    def fails(model: ModelConfig) -> bool:
        fitted = fit(model, request.gpu, request.gpus)
        return fitted is None or not passes(fitted)

    index = bisect_left(shapes(), True, key=fails) - 1
    return fit(shapes()[index], request.gpu, request.gpus) if index >= 0 else None


def _smallest(request: Request) -> Fit:
    """The smallest shape; every GPU of the table has memory for it."""
    fitted = fit(shapes()[0], request.gpu, request.gpus)
    assert fitted is not None
    return fitted


def _next_needed_tokens(request: Request, fitted: Fit) -> float:
    """Tokens with which the next larger shape begins; without one, unlimited.

    The limit keeps tokens from falling when more hours bring a larger model.
    """
    ladder = shapes()
    sizes = [model.num_parameters for model in ladder]
    index = sizes.index(fitted.run.model.num_parameters) + 1
    if index == len(ladder) or fit(ladder[index], request.gpu, request.gpus) is None:
        return math.inf
    return float(TOKENS_PER_PARAMETER * sizes[index])


def _given_parameters(request: Request) -> Fit:
    """The shape nearest to --params; ValueError if it does not fit the memory or the hours."""
    assert request.parameters
    ladder = shapes()
    wanted = math.log(request.parameters)
    model = min(ladder, key=lambda shape: abs(math.log(shape.num_parameters) - wanted))
    smallest, largest = ladder[0].num_parameters, ladder[-1].num_parameters
    if not 0.8 * smallest <= request.parameters <= 1.2 * largest:
        raise ValueError(
            f"--params {request.parameters:g} is outside of the shapes of this command; use "
            f"{smallest:.1e} to {largest:.1e}"
        )
    fitted = fit(model, request.gpu, request.gpus)
    if fitted is None:
        best = _largest(request, lambda fit: _sees_enough(fit, request)) or _smallest(request)
        raise ValueError(
            f"--params {request.parameters:g} does not fit the memory of {_gpus(request)}; the "
            f"largest model that fits is --params {_round_down(best.run.model.num_parameters):g}"
        )
    if not _sees_enough(fitted, request):
        least = LEAST_TOKENS_PER_PARAMETER * model.num_parameters
        optimal = _largest(request, lambda fit: _is_optimal(fit, request, request.hours))
        best = optimal or _smallest(request)
        hours = _round_up(needed_hours(fitted, least, request.goal))
        raise ValueError(
            f"--params {request.parameters:g} sees less than {LEAST_TOKENS_PER_PARAMETER} token "
            f"per parameter in {request.hours:g} hours; use --hours {hours:g} or more, or "
            f"--params {_round_down(best.run.model.num_parameters):g}"
        )
    return fitted


def _sees_enough(fitted: Fit, request: Request) -> bool:
    """Whether the hours allow LEAST_TOKENS_PER_PARAMETER."""
    least = LEAST_TOKENS_PER_PARAMETER * fitted.run.model.num_parameters
    return affordable_tokens(fitted, request.hours, request.goal) >= least


def _given_tokens(request: Request) -> Fit:
    """The shape for --tokens at TOKENS_PER_PARAMETER, or the largest smaller one in the hours."""
    tokens = request.tokens
    assert tokens

    def passes(fitted: Fit) -> bool:
        affordable = affordable_tokens(fitted, request.hours, request.goal)
        return fitted.needed_tokens <= tokens <= affordable

    return _largest(request, passes) or _smallest(request)


def _check_tokens(request: Request, fitted: Fit, available: float) -> None:
    """ValueError if --tokens needs more hours, or more data, than there are."""
    assert request.tokens
    least = 20 * fitted.run.data.tokens_per_step
    if request.tokens < least:
        raise ValueError(f"--tokens {request.tokens:g} is less than 20 steps; use {least:g}")
    if request.tokens > available:
        raise ValueError(
            f"--tokens {request.tokens:g} is more than {MAX_EPOCHS} epochs of the data; use "
            f"--tokens {_round_down(available):g}"
        )
    affordable = affordable_tokens(fitted, request.hours, request.goal)
    if affordable < request.tokens:
        hours = _round_up(needed_hours(fitted, request.tokens, request.goal))
        raise ValueError(
            f"--tokens {request.tokens:g} take {hours:g} hours on {_gpus(request)} with "
            f"{size_text(fitted.run.model.num_parameters)} parameters; use --hours {hours:g} or "
            f"--tokens {_round_down(affordable):g}"
        )


def _gpus(request: Request) -> str:
    return f"{request.gpus} x {request.gpu}"


def size_text(count: float) -> str:
    """Format a number of parameters or tokens: 291M, 5.84B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _round_up(number: float) -> float:
    """Round up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.ceil(number / unit) * unit:.3g}")


def _round_down(number: float) -> float:
    """Round down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return float(f"{math.floor(number / unit) * unit:.3g}")
