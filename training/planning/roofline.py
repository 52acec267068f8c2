"""Lower bound on the time of a training step: each operation at a GPU's peak or full bandwidth.

The roofline model (Williams et al. 2009, doi.org/10.1145/1498765.1498785): an operation takes at
least FLOPs / peak and at least bytes / bandwidth. Operations run one after the other; collectives
are hidden behind them. Real steps are slower, by a factor that `efficiency` takes from published
throughputs. Each row counts as one document; a document mask would reduce attention.
"""

import math
from functools import cache
from statistics import median
from typing import NamedTuple

from models.losses import MAX_KEPT_LOGITS
from models.nanollama import ModelConfig
from training.config import DataConfig, RunConfig
from training.fsdp_utils import ParallelConfig
from training.muon import newton_schulz_flops
from training.planning.cards import GPUS, PUBLISHED, Gpu, Published
from training.planning.memory import LOGITS_CHUNK, hidden_shapes, micro_batches


class Operation(NamedTuple):
    """Work of one kind in a training step, on one GPU."""

    name: str
    flops: float = 0.0  # FLOPs as in training/meter.py, with only the causal half of attention
    extra_flops: float = 0.0  # recomputation and Newton-Schulz, not counted by meter.py
    bytes: float = 0.0  # read from and written to GPU memory
    sent: float = 0.0  # bytes sent to other GPUs

    def seconds(self, gpu: Gpu) -> float:
        """Return the minimum seconds of the operation."""
        work = (self.flops + self.extra_flops) / gpu.flops
        return max(work, self.bytes / gpu.bandwidth, self.sent / gpu.link)


class StepBound(NamedTuple):
    """The operations of one step on each GPU, and the minimum time of the step."""

    operations: tuple[Operation, ...]
    gpu: Gpu

    @property
    def seconds(self) -> float:
        """Return the minimum seconds of a step; collectives overlap with all but the optimizer."""
        compute = sum(op.seconds(self.gpu) for op in self.operations if not op.sent)
        optimizer = sum(op.seconds(self.gpu) for op in self.operations if op.name == OPTIMIZER)
        link = sum(op.seconds(self.gpu) for op in self.operations if op.sent)
        return max(compute, link + optimizer)

    def largest(self, count: int = 5) -> list[tuple[Operation, float]]:
        """Return the operations with the most seconds, and their seconds."""
        timed = [(op, op.seconds(self.gpu)) for op in self.operations]
        return sorted(timed, key=lambda pair: -pair[1])[:count]


OPTIMIZER = "optimizer"


def step_bound(run: RunConfig, gpus: int, gpu: Gpu) -> StepBound:
    """Return the bound of a step on each of `gpus` GPUs; ValueError if the rows do not divide."""
    operations = [
        *_block_operations(run, gpus),
        _attention(run, gpus),
        *_head_operations(run, gpus),
        *_parameter_operations(run, gpus),
    ]
    return StepBound(tuple(operations), gpu)


def _number_size(run: RunConfig) -> int:
    """Return the bytes per number in forward and backward; all cards use bf16."""
    return 4 if run.parallel.dtype == "float32" else 2


def _tokens(run: RunConfig, gpus: int) -> float:
    """Return the tokens of one GPU in a step."""
    return run.data.tokens_per_step / gpus


class _Products(NamedTuple):
    """Matmuls of a step with weights [k, n], forward and backward: tokens x k x n each."""

    size: int  # bytes per number
    tokens: float  # tokens of the step
    passes: float  # number of times the weights are read: micro-batches, or their chunks
    forwards: int = 1  # 2 if backward recomputes the forward product

    def of(self, name: str, shapes: list[tuple[int, int]], extra: float = 0.0) -> Operation:
        """Return one operation for all weights. extra: additional bytes."""
        weights = sum(k * n for k, n in shapes)
        activations = self.tokens * sum(k + n for k, n in shapes)
        products = 2 + self.forwards  # the gradients of inputs and weights, and the forward pass
        return Operation(
            name,
            flops=6 * self.tokens * weights,
            extra_flops=2 * self.tokens * weights * (self.forwards - 1),
            bytes=self.size * products * (activations + self.passes * weights) + extra,
        )


def _block_operations(run: RunConfig, gpus: int) -> list[Operation]:
    """Return the matmuls and elementwise operations of all blocks.

    Numbers per token that fused kernels read and write, forward + backward: each of two norms with
    its residual addition, 4 + 4 widths; rotary embedding, 2 + 2 widths of q and k; SwiGLU, 3 + 5 of
    its width. Activation checkpointing repeats the forward operations; "full" also repeats the
    matmuls except the last, whose output backward does not read.
    """
    model, layers = run.model, run.model.num_hidden_layers
    level, size = run.parallel.activation_checkpointing, _number_size(run)
    tokens, passes = _tokens(run, gpus), micro_batches(run, gpus)
    again = 1 if level == "full" else 0
    products = _Products(size, tokens, passes, 1 + again)
    d, width, kv = _widths(model)
    projections = [(d, width), (d, kv), (d, kv), (width, d)]
    hidden = model.intermediate_size
    widened, narrowed = [(d, hidden)] * 2, [(hidden, d)]
    experts_bytes, active = 0.0, float(hidden)
    if model.kind == "moe":
        moe, expert = model.moe, model.expert_size
        chosen = moe.top_k * expert + moe.shared_size  # feed-forward width that one token uses
        widened, narrowed, active = [(d, chosen)] * 2, [(chosen, d)], chosen
        idle = 3 * d * (moe.experts - moe.top_k) * expert  # weights of experts beyond top_k
        experts_bytes = size * 3 * passes * idle * layers
        widened.append((d, moe.experts))  # the router
    # Every kind of checkpointing repeats the elementwise operations of the forward pass.
    repeated = 0 if level == "none" else 1
    elementwise = layers * size * tokens
    down = _Products(size, tokens, passes)
    return [
        products.of("attention projections", projections * layers),
        products.of("MLP, gate and up", widened * layers, experts_bytes),
        down.of("MLP, down", narrowed * layers),
        Operation("norms and residuals", bytes=elementwise * 2 * d * (8 + 4 * repeated)),
        Operation("rotary embedding", bytes=elementwise * (width + kv) * (4 + 2 * repeated)),
        Operation("SwiGLU", bytes=elementwise * active * (8 + 3 * repeated)),
    ]


def _widths(model: ModelConfig) -> tuple[int, int, int]:
    """Return the widths of the residual stream, q and k."""
    head_dim = model.resolved_head_dim
    return (
        model.hidden_size,
        head_dim * model.num_attention_heads,
        head_dim * model.num_key_value_heads,
    )


def _attention(run: RunConfig, gpus: int) -> Operation:
    """Return fused causal attention, whose backward recomputes the scores (arXiv:2307.08691)."""
    _, width, kv = _widths(run.model)
    tokens, layers = _tokens(run, gpus), run.model.num_hidden_layers
    forward = 2 * layers * width * run.data.sequence_length * tokens  # half of all pairs
    recomputed = forward / 2
    if run.parallel.activation_checkpointing == "full":
        recomputed += forward
    # Forward reads q, k, v and writes the output. Backward reads these and the output's gradient,
    # and writes the gradients of q, k and v.
    moved = layers * tokens * _number_size(run) * (6 * width + 6 * kv)
    return Operation("attention", 3 * forward, recomputed, moved)


def _head_operations(run: RunConfig, gpus: int) -> list[Operation]:
    """Return embedding and loss head, which computes logits in chunks (models/losses.py)."""
    model, size = run.model, _number_size(run)
    tokens, passes = _tokens(run, gpus), micro_batches(run, gpus)
    micro_batch = tokens / passes
    kept = micro_batch * model.vocab_size <= MAX_KEPT_LOGITS
    chunks = passes * math.ceil(micro_batch / LOGITS_CHUNK)
    products = _Products(size, tokens, chunks, 1 if kept else 2)
    # Logits are read for the loss, and again for their gradient.
    logits = size * tokens * model.vocab_size * 2
    d = model.hidden_size
    rows = size * tokens * d * 4  # of the embedding, read and written, forward and backward
    return [
        products.of("loss head", [(d, model.vocab_size)], logits),
        Operation("embedding", bytes=rows + size * passes * d * model.vocab_size),
    ]


def _parameter_operations(run: RunConfig, gpus: int) -> list[Operation]:
    """Return gradient accumulation, collectives and the optimizer: work per parameter.

    AdamW reads the parameter, its gradient and two moments in fp32 and writes all but the gradient.
    Clipping reads the gradient, scales it and writes it. The parameter is then cast.
    """
    model, strategy, size = run.model, run.parallel.strategy, _number_size(run)
    parameters, passes = model.num_parameters, micro_batches(run, gpus)
    shard = parameters / (1 if strategy == "ddp" else gpus)
    accumulated = parameters * (passes * (size + 8) if passes > 1 else size + 4)
    clipping = 12 if run.optim.grad_clip else 4
    muon = 0.0
    if run.optim.name == "muon":
        muon = sum(newton_schulz_flops(shape) for shape in hidden_shapes(model)) / gpus
    operations = [
        Operation("gradient accumulation", bytes=accumulated),
        Operation(OPTIMIZER, extra_flops=muon, bytes=shard * (28 + clipping + 4 + size)),
    ]
    if gpus > 1:
        shares = (gpus - 1) / gpus  # share of the data that a ring sends
        gathers = {"zero2": 1, "zero3": 2 * passes, "ddp": 0}[strategy]
        reductions = 2 if strategy == "ddp" else 1
        sent = shares * parameters * size * gathers
        operations += [
            Operation("reduction of gradients", sent=shares * parameters * 4 * reductions),
            *([Operation("gathering of parameters", sent=sent)] if gathers else []),
        ]
    return operations


class Efficiency(NamedTuple):
    """Ratio of real step time to its bound, over published throughputs."""

    factor: float  # median
    low: float
    high: float


def published_bound(row: Published) -> float:
    """Return the tokens per second and GPU that the bound allows for a published run."""
    shape = {"max_position_embeddings": max(4096, row.sequence_length)} | row.model
    data = DataConfig(
        sequence_length=row.sequence_length,
        tokens_per_step=row.gpus * row.rows * row.sequence_length
        * max(1, row.tokens_per_step // (row.gpus * row.rows * row.sequence_length)),
        micro_batch_size=row.rows,
    )  # fmt: skip
    run = RunConfig(model=ModelConfig(**shape), data=data, parallel=ParallelConfig())
    seconds = step_bound(run, row.gpus, GPUS[row.gpu]).seconds
    return data.tokens_per_step / seconds / row.gpus


@cache
def efficiency() -> Efficiency:
    """Return the ratio of bound to published throughput: median, minimum and maximum."""
    factors = [published_bound(row) / row.tokens_per_s for row in PUBLISHED]
    return Efficiency(median(factors), min(factors), max(factors))
