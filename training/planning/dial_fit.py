"""Fit a model to GPUs: the fastest settings of its phases and stages that fit the memory."""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from models.nanollama import ModelConfig, make_config
from training.config import DataConfig, RunConfig
from training.fsdp_utils import ParallelConfig
from training.planning.cards import GPUS, Gpu
from training.planning.dial_data import LONG_SHARE
from training.planning.memory import TIGHT, memory
from training.planning.roofline import efficiency, step_bound
from training.settings import ROOT, read_yaml

TOKENS_PER_PARAMETER = 20  # about compute-optimal (arXiv:2203.15556)
ASPECT = (48, 72)  # width / layers; loss hardly depends on it (arXiv:2001.08361, figure 5)
MAX_WIDTH = 5120
LONG_CONTEXT_FROM = 300_000_000  # minimum parameters of a plan with long rows: our judgement
LONG_ROWS_FROM = 1_000_000_000  # minimum parameters for rows of 4,096 instead of 2,048
MAX_MICRO_BATCH = 65_536  # tokens; matmuls are not faster with more
MAX_RATE = 3e-3  # the highest rate of public recipes of this kind (DCLM, arXiv:2406.11794)
PAIRS_PER_GPU = 4  # of a DPO step: our judgement
LEVELS = ("none", "selective", "full")  # activation checkpointing, from fastest to slowest


class Fit(NamedTuple):
    """A model on some GPUs: the runs of its phases and stages, and the time per token."""

    run: RunConfig  # run of the base phase
    long_run: RunConfig | None  # run of the long-context phase, if any
    tuning: dict[str, RunConfig]  # stage -> its batches and memory settings; {} without stages
    wanted_rows: int  # length of long rows by the model's size; 0: none
    seconds_per_token: float  # mean over the phases, times the factor of published runs

    @property
    def needed_tokens(self) -> float:
        """Return the tokens of a compute-optimal run."""
        return TOKENS_PER_PARAMETER * self.run.model.num_parameters

    @property
    def long_rows(self) -> int:
        """Return the row length of the long-context phase; 0 without one."""
        return self.long_run.data.sequence_length if self.long_run else 0


@cache
def shapes() -> tuple[ModelConfig, ...]:
    """Return Llama shapes in rising order of parameters; widths are multiples of 128."""
    configs = []
    for width in (*range(256, 2048, 128), *range(2048, MAX_WIDTH + 1, 256)):
        head_dim = 64 if width < 2048 else 128
        heads = width // head_dim
        group = next(n for n in (4, 3, 2, 1) if heads % n == 0)
        for layers in range(-(-width // ASPECT[1]), width // ASPECT[0] + 1):
            configs.append(
                make_config(
                    hidden_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    num_key_value_heads=heads // group,
                    # 0.02 is usual at width 2048; narrower models need more (docs/log.md).
                    initializer_range=round(min(0.05, width**-0.5), 3),
                )
            )
    return tuple(sorted(configs, key=lambda model: model.num_parameters))


def batch_tokens(tokens: float) -> float:
    """Return the best tokens per step for a run of `tokens` tokens: Step Law (arXiv:2503.04715)."""
    return float(0.58 * tokens**0.571)


def learning_rate(model: ModelConfig, tokens: float) -> float:
    """Return AdamW's best peak rate: Step Law (arXiv:2503.04715), at most MAX_RATE.

    The law counts parameters without embedding and head; it was fitted on 60M to 1B parameters.
    """
    blocks = model.num_parameters - 2 * model.vocab_size * model.hidden_size
    return float(min(MAX_RATE, 1.79 * blocks**-0.713 * tokens**0.307))


def fit(
    model: ModelConfig, name: str, gpus: int, goal: str, tokens: float | None = None
) -> Fit | None:
    """Return the fastest settings with which a model fits the GPUs `name`; None if none fit.

    tokens: pretraining tokens, which determine the batch; default: compute-optimal.
    """
    length, long_rows = _row_lengths(model)
    unit = gpus * (long_rows or length)  # a step has whole rows on every GPU in every phase
    wanted = batch_tokens(tokens or TOKENS_PER_PARAMETER * model.num_parameters)
    batch = unit * 2 ** max(0, round(math.log2(wanted / unit)))
    return _fit(model, name, gpus, goal == "chat", batch)


def _row_lengths(model: ModelConfig) -> tuple[int, int]:
    """Return the row lengths of the base phase and of the long-context phase (0: none)."""
    length = 4096 if model.num_parameters >= LONG_ROWS_FROM else 2048
    return length, 4 * length if model.num_parameters >= LONG_CONTEXT_FROM else 0


@cache
def _fit(model: ModelConfig, name: str, gpus: int, tuned: bool, batch: int) -> Fit | None:
    """Fit settings to batches of `batch` tokens. tuned: SFT and DPO must also fit the memory."""
    gpu = GPUS[name]
    length, long_rows = _row_lengths(model)
    context = replace(model, max_position_embeddings=long_rows or length)
    options = []
    for strategy in ("zero2", "zero3") if gpus > 1 else ("zero2",):
        for level in LEVELS:
            parallel = ParallelConfig(strategy=strategy, activation_checkpointing=level)
            data = DataConfig(sequence_length=length, tokens_per_step=batch, micro_batch_size=1)
            run = RunConfig(model=context, data=data, parallel=parallel)
            fitting = _largest_micro_batch(run, gpus, gpu)
            tuning = _tuning_runs(run, gpus, gpu) if tuned else {}
            if fitting and tuning is not None:
                seconds = phase_seconds(fitting, gpus, gpu) / batch
                options.append((seconds, fitting, tuning))
    if not options:
        return None
    seconds, fastest, tuning = min(options, key=lambda option: option[0])
    long_run = None
    if long_rows:
        data = replace(fastest.data, sequence_length=long_rows, micro_batch_size=1)
        limit = max(1, fastest.data.micro_batch_size * length // long_rows)
        long_run = _with_lightest_level(replace(fastest, data=data), gpus, gpu, limit)
    if long_run:
        longer = phase_seconds(long_run, gpus, gpu) / batch
        seconds += LONG_SHARE * (longer - seconds)
    elif long_rows:
        short = replace(model, max_position_embeddings=length)
        fastest = replace(fastest, model=short)
        tuning = {stage: replace(run, model=short) for stage, run in tuning.items()}
    return Fit(fastest, long_run, tuning, long_rows, seconds)


def _largest_micro_batch(
    run: RunConfig, gpus: int, gpu: Gpu, most: int | None = None
) -> RunConfig | None:
    """Return the run with the largest micro-batch that fits, in powers of 2; None if none fits.

    The smallest candidate is the run's micro-batch. most: maximum rows; default: MAX_MICRO_BATCH
    tokens.
    """
    fitting = None
    rows = run.data.micro_batch_size
    most = most or max(rows, MAX_MICRO_BATCH // run.data.sequence_length)
    while rows <= min(run.data.rows // gpus, most):
        wider = replace(run, data=replace(run.data, micro_batch_size=rows))
        if memory(wider, gpus).total > TIGHT * gpu.memory:
            break
        fitting, rows = wider, 2 * rows
    return fitting


def _with_lightest_level(
    run: RunConfig, gpus: int, gpu: Gpu, most: int | None = None
) -> RunConfig | None:
    """Return the run with the least activation checkpointing that fits, from its level up."""
    level = run.parallel.activation_checkpointing
    for heavier in LEVELS[LEVELS.index(level) :]:
        parallel = replace(run.parallel, activation_checkpointing=heavier)
        if fitting := _largest_micro_batch(replace(run, parallel=parallel), gpus, gpu, most):
            return fitting
    return None


def _tuning_runs(run: RunConfig, gpus: int, gpu: Gpu) -> dict[str, RunConfig] | None:
    """Return SFT and DPO runs with the model of a run; None if a row or a pair does not fit.

    Rows are as long as in configs/sft.yaml and configs/dpo.yaml. A DPO pair has two rows. The
    reference model is freed before the policy is built (training/reference.py) and needs less
    memory: it has no gradients, moments or saved activations.
    """
    sft, dpo = (tuning_data(stage) for stage in ("sft", "dpo"))
    rows = 2 ** int(math.log2(max(1, sft["tokens_per_step"] // (gpus * sft["sequence_length"]))))
    sizes = {"sft": (rows, 1, sft), "dpo": (2 * PAIRS_PER_GPU, 2, dpo)}
    runs = {}
    for stage, (rows, least, data) in sizes.items():
        length = data["sequence_length"]
        batches = DataConfig(
            sequence_length=length, tokens_per_step=rows * gpus * length, micro_batch_size=least
        )
        fitting = _with_lightest_level(replace(run, data=batches), gpus, gpu)
        if fitting is None:
            return None
        runs[stage] = fitting
    return runs


@cache
def tuning_data(stage: str) -> dict[str, int]:
    """Return the data section of configs/sft.yaml or configs/dpo.yaml."""
    section: dict[str, int] = read_yaml(ROOT / "configs" / f"{stage}.yaml")["data"]
    return section


def phase_seconds(run: RunConfig, gpus: int, gpu: Gpu) -> float:
    """Return the seconds of a step: its bound times the factor of published runs."""
    return step_bound(run, gpus, gpu).seconds * efficiency().factor
