"""Measure this machine: training steps of a run on random tokens, and the machine's peak speeds."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from data.dataloader import Batch, Step
from machine import cpus, synchronize
from training import setup
from training.config import RunConfig
from training.fsdp_utils import compute_dtype
from training.loop import backward, reduce
from training.objectives import next_token
from training.planning.cards import Gpu
from training.planning.roofline import step_bound

DOCUMENT = 170  # mean tokens of a document in the quickstart corpus, about
LEAST_STEPS = 3  # measured steps, after one warm-up step
PEAK_SECONDS = 1.0  # time limit for each of the two peak speeds
MATRIX = 1024  # rows and columns of the matmuls that measure the peak
COPIED = 1 << 28  # bytes of the copy that measures the bandwidth


class Probe(NamedTuple):
    """Measured speeds of this machine."""

    tokens_per_s: float  # median speed of training steps
    step_s: float
    steps: int  # measured
    bound_s: float  # lower bound of this step, from peak and bandwidth
    flops: float  # FLOP/s of matmuls in the dtype of training
    bandwidth: float  # bytes per second of a copy, read and written
    cores: int


def measure(run: RunConfig, seconds: float = 20.0) -> Probe:
    """Train on random tokens for about `seconds` seconds; one rank, all cores.

    The steps are those of training/loop.py, without data, validation, logs and checkpoints.
    """
    with setup.ranks() as device:
        state = setup.build(run, device)
        objective = next_token(run.optim.z_weight)
        step = _random_step(run, device)
        timings: list[float] = []
        begin = time.perf_counter()
        state.model.train()
        while len(timings) <= LEAST_STEPS or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            sums, _ = backward(run, state.model, step, objective)
            reduce(sums, step.loss_denominator)
            state.optimizer.step()
            state.optimizer.zero_grad()
            timings.append(time.perf_counter() - start)
        dtype = compute_dtype(run.parallel, device)
    step_s = median(timings[1:])
    flops, bandwidth = _peak_flops(dtype, device), _bandwidth(device)
    machine = Gpu(0, flops, bandwidth, 1, "", 0, "this machine", "measured")
    bound_s = step_bound(run, 1, machine).seconds
    tokens = run.data.tokens_per_step
    return Probe(tokens / step_s, step_s, len(timings) - 1, bound_s, flops, bandwidth, cpus())


def _random_step(run: RunConfig, device: torch.device) -> Step:
    """Return one step's micro-batches of random tokens, split into documents."""
    data, generator = run.data, torch.Generator().manual_seed(run.seed)
    batches = []
    for _ in range(data.rows // data.micro_batch_size):
        shape = (data.micro_batch_size, data.sequence_length + 1)
        rows = torch.randint(run.model.vocab_size, shape, generator=generator)
        begins = torch.rand(shape[0], shape[1] - 1, generator=generator) < 1 / DOCUMENT
        doc_ids = begins.cumsum(1).int()
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), doc_ids)
        batches.append(batch.to(device))
    return Step(batches, data.tokens_per_step, data.tokens_per_step)


def _peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of the fastest product of two square matrices."""
    left, right = (torch.randn(MATRIX, MATRIX).to(device, dtype) for _ in range(2))
    return 2 * MATRIX**3 / _fastest(lambda: torch.mm(left, right), device)


def _bandwidth(device: torch.device) -> float:
    """Measure the bytes per second of the fastest memory copy, read plus written."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest repetition within PEAK_SECONDS."""
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
