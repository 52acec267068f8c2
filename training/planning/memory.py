"""GPU memory of a training step, by category, and settings that make a run fit.

Weights, gradients, moments and saved activations follow from the model's shapes; tests compare them
with a run on a CPU. The overhead of a GPU is an assumption. GPU memory has not been measured yet.
"""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from models.nanollama import ModelConfig, NanoLlama
from training.config import RunConfig
from training.muon import ROUND, second_moment_shape
from training.optimizers import OptimConfig, group_of
from training.planning.cards import Gpu

# Bytes that torch does not count, assumed (CUDA context and kernels, NCCL, cuBLAS, block rounding)
CONTEXT = 2.0e9
TIGHT = 0.92  # share of a GPU's memory above which a run may not fit in practice
LOGITS_CHUNK = 4096  # tokens; models/losses.py on a GPU


@cache
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter, from a model on the meta device."""
    with torch.device("meta"):
        return {
            name: tuple(parameter.shape) for name, parameter in NanoLlama(model).named_parameters()
        }


def sharded_bytes(model: ModelConfig, strategy: str, gpus: int) -> int:
    """Return the fp32 bytes of the largest shard. FSDP2 splits first dimensions, rounded up."""
    shards = 1 if strategy == "ddp" else gpus
    return sum(
        4 * -(-shape[0] // shards) * math.prod(shape[1:])
        for shape in parameter_shapes(model).values()
    )


def hidden_shapes(model: ModelConfig) -> list[tuple[int, ...]]:
    """Return the shapes of the matrices and stacks of matrices that Muon updates."""
    return [
        shape
        for name, shape in parameter_shapes(model).items()
        if group_of(name, torch.empty(shape, device="meta")) == "matrices"
    ]


def optimizer_state_bytes(
    model: ModelConfig, strategy: str, gpus: int, optim: OptimConfig | None = None
) -> int:
    """Return the bytes of the optimizer state on one GPU.

    AdamW: two fp32 moments and an fp32 step per tensor; with optim.adam_every, also a gradient sum
    and its count. Muon: one moment per matrix. NorMuon: also second moments per row or column,
    replicated on every GPU. optim: default AdamW.
    """
    optim = optim or OptimConfig()
    sums = optim.adam_every > 1
    hidden = hidden_shapes(model) if optim.name == "muon" else []
    shards = 1 if strategy == "ddp" else gpus
    matrices = sum(4 * -(-shape[0] // shards) * math.prod(shape[1:]) for shape in hidden)
    others = sharded_bytes(model, strategy, gpus) - matrices
    adamw = (2 + sums) * others
    adamw += 4 * (1 + sums) * (len(parameter_shapes(model)) - len(hidden))
    second_moments = sum(4 * math.prod(second_moment_shape(shape)) for shape in hidden)
    normuon = second_moments if optim.normuon_beta2 else 0
    return adamw + matrices + normuon


def update_bytes(model: ModelConfig, gpus: int, optimizer: str, size: int = 2) -> int:
    """Return an update's peak temporary bytes: AdamW 0, Muon 9x the largest round of a rank."""
    shapes = hidden_shapes(model) if optimizer == "muon" else []
    per_rank = {shape: -(-shapes.count(shape) // gpus) for shape in shapes}
    return max(
        (
            9 * size * math.prod(shape) * min(max(1, ROUND // math.prod(shape)), count)
            for shape, count in per_rank.items()
        ),
        default=0,
    )


def activation_bytes(
    model: ModelConfig, checkpointing: str, size: int = 2, compiled: bool = True
) -> int:
    """Return the bytes per token that a block saves for backward: 59,528 for 1.1B in bf16.

    size: bytes per number. none, compiled: block input, both norm outputs, q, k, v as attention
    sees them, attention output, o_proj output, gate, up and their product; fp32 logsumexp per head
    and two norm statistics. selective: block input, outputs of all matmuls but the last, attention
    output and logsumexp. full: block input. Eager norms also save an fp32 and a normalized copy.
    """
    d, heads = model.hidden_size, model.num_attention_heads
    width, kv = heads * model.resolved_head_dim, model.num_key_value_heads * model.resolved_head_dim
    attention = size * (2 * width + 2 * kv) + 4 * heads  # q, k, v, output, logsumexp
    # Numbers and bytes of statistics of the q and k norms.
    normed_heads = (
        (width + kv, 4 * (heads + model.num_key_value_heads)) if model.qk_norm else (0, 0)
    )
    if checkpointing == "full":
        return size * d
    feed_forward = feed_forward_bytes(model, checkpointing, size, compiled)
    if checkpointing == "selective":
        return size * 2 * d + attention + feed_forward
    if compiled:
        norms = size * normed_heads[0] + normed_heads[1] + 8
        return size * 3 * d + attention + norms + feed_forward
    norm = 4 + size  # per normalized number: fp32 copy and result
    norms = 2 * (norm * d + 4) + norm * normed_heads[0] + normed_heads[1]
    return size * d + attention + norms + feed_forward


def feed_forward_bytes(
    model: ModelConfig, checkpointing: str, size: int = 2, compiled: bool = True
) -> int:
    """Return the bytes per token that a feed-forward network saves for backward, with its input.

    size, checkpointing: see activation_bytes; not for "full". Dense: the input, gate, up, their
    product, and eagerly silu(gate). With experts, a token has a row of these for each of its top_k
    experts; their inputs and outputs are copies, sorted by expert. The router keeps its input in
    fp32, scores and probabilities of all experts, and three int64 indices per chosen expert.
    """
    d, moe = model.hidden_size, model.moe
    hidden = {"selective": 2}.get(checkpointing, 3 if compiled else 4)  # gate, up, product, silu
    if model.kind == "dense":
        last_matmul = 0 if compiled or checkpointing == "none" else size * d
        inputs = size * d if checkpointing == "none" else 0
        return inputs + size * hidden * model.intermediate_size + last_matmul
    widths = size * hidden * (moe.top_k * model.expert_size + moe.shared_size)
    noisy = moe.router == "noisy_top_k"
    if checkpointing == "selective":  # scores, size and keys of the noise, outputs of experts
        router = 4 * moe.experts + noisy * (4 * moe.experts + 8)
        last_matmul = size * d if moe.shared_size and not compiled else 0
        return router + size * moe.top_k * d + widths + last_matmul
    router = 4 * d + 8 * moe.experts + 28 * moe.top_k + 4 + noisy * 8 * moe.experts
    if not compiled:
        router += size * moe.top_k + 4 + (4 * d if noisy and size == 2 else 0)
    shared_input = size * d if moe.shared_size and size == 2 else 0  # in fp32, the router's
    return router + size * 2 * moe.top_k * d + widths + shared_input


def _size(model: ModelConfig, prefix: str) -> int:
    """Return the number of parameters whose names begin with `prefix`."""
    shapes = parameter_shapes(model).items()
    return sum(math.prod(shape) for name, shape in shapes if name.startswith(prefix))


class Memory(NamedTuple):
    """Bytes on one GPU at the moment of peak memory."""

    peak_at: str  # part of the step, such as "loss head"
    parts: dict[str, float]  # bytes by category, at the peak
    totals: dict[str, float]  # bytes at each part of the step

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def micro_batches(run: RunConfig, gpus: int) -> int:
    """Return the micro-batches per step and GPU; ValueError if the rows do not divide."""
    rows, size = run.data.rows, run.data.micro_batch_size
    if rows % (gpus * size):
        raise ValueError(
            f"{run.phase}: {rows} rows per step do not divide into micro-batches of {size} on "
            f"{gpus} GPUs; change data.tokens_per_step, data.micro_batch_size or --gpus"
        )
    return rows // (gpus * size)


def memory(run: RunConfig, gpus: int) -> Memory:
    """Return the peak memory of a training step on each of `gpus` GPUs, by category.

    Activations fall and gradients rise evenly over the backward pass, so the peak is at one of its
    ends or in the optimizer. A block's working memory in backward is an estimate; the rest follows
    from shapes and from the parameters that FSDP2 keeps gathered. Tokens are assumed to be balanced
    over the ranks of parallel.experts.
    """
    model, parallel = run.model, run.parallel
    size = 4 if parallel.dtype == "float32" else 2  # all GPUs here compute in bf16
    compiled = parallel.compile is not False
    d, vocab, layers = model.hidden_size, model.vocab_size, model.num_hidden_layers
    tokens = run.data.micro_batch_size * run.data.sequence_length
    shard = sharded_bytes(model, parallel.strategy, gpus)
    # With expert parallelism, a rank has a share of each block's experts; FSDP shards the rest.
    experts = _size(model, "layers.0.mlp.experts.") if parallel.experts > 1 else 0
    local_experts = experts // parallel.experts
    block = _size(model, "layers.0.") - experts
    sharded = model.num_parameters - layers * experts
    root = sharded - layers * block  # FSDP group of embedding, last norm and head
    shards = 1 if parallel.strategy == "ddp" else gpus

    def saved(checkpointing: str) -> int:
        return activation_bytes(model, checkpointing, size, compiled)

    always = {
        "fp32 masters": shard,
        "moments": optimizer_state_bytes(model, parallel.strategy, gpus, run.optim),
        "rotary tables": 8 * model.max_position_embeddings * model.resolved_head_dim,
        "CUDA context (assumed)": CONTEXT,
    }
    # Unsharded fp32 gradients until the last micro-batch.
    accumulated = 4 * (sharded + layers * local_experts) if micro_batches(run, gpus) > 1 else 0
    gathered = size * (sharded if parallel.strategy != "zero3" else root + min(2, layers) * block)
    # Casts of a rank's experts; without checkpointing they are saved for backward.
    cast_layers = layers if parallel.activation_checkpointing == "none" else 1
    gathered += size * cast_layers * local_experts
    blocks = tokens * layers * saved(parallel.activation_checkpointing)
    # The last norm is eager; the head reads its output.
    last_norm = tokens * ((4 + 2 * size) * d + 4 if size == 2 else 12 * d + 4)
    # Losses and logsumexp; ids, targets and document ids of the step.
    losses = tokens * 12 + 20 * run.data.tokens_per_step // gpus
    chunks = -(-tokens // LOGITS_CHUNK)
    logits = (
        min(tokens, LOGITS_CHUNK)
        * vocab
        * ((12 if size == 2 else 8) if chunks > 1 else (6 if size == 2 else 4))
    )
    head = {"logits chunk": logits, "head gradient": 4 * vocab * d + size * tokens * d}
    # Gradients of block output, gate, up and their product; or of the inputs of experts, twice.
    working = tokens * size * (d + 3 * model.intermediate_size)
    if model.kind == "moe":
        experts = model.moe.top_k * max(3 * model.expert_size, 2 * d)
        working = tokens * size * (d + experts + 3 * model.moe.shared_size)
    if not compiled:
        working = max(working, tokens * (20 + size) * d)  # a norm's backward, in fp32
    recomputed = saved("none") - saved(parallel.activation_checkpointing)
    # Gradients of one block: from its matmuls, sent, and received.
    reduced = block * (size + 4 + 4 / shards) + local_experts * (size + 4)
    points: dict[str, dict[str, float]] = {
        "loss head": {
            "gradients": accumulated,
            "gathered": gathered,
            "activations": blocks + last_norm + losses,
            **head,
        },
        "last norm": {
            "gradients": accumulated + size * vocab * d,
            "gathered": gathered,
            "activations": blocks + last_norm - tokens * 2 * size * d + losses,
            "norm in backward": tokens * (20 if size == 2 else 16) * d,
        },
        "last block": {
            "gradients": accumulated + size * vocab * d + reduced,
            "gathered": gathered,
            "activations": blocks + losses,
            "block in backward": working + tokens * max(0, recomputed),
        },
        "end of backward": {
            "gradients": max(shard, accumulated) + root * (size + 4 + 4 / shards),
            # In the last micro-batch, blocks are freed one by one.
            "gathered": gathered if accumulated else size * root,
            "activations": losses,
        },
        # Fused AdamW and clipping work in place; Muon does not.
        "optimizer step": {"gradients": shard},
    }
    if rounds := update_bytes(model, gpus, run.optim.name, size):
        points["optimizer step"]["Newton-Schulz"] = rounds
    totals = {name: sum(always.values()) + sum(parts.values()) for name, parts in points.items()}
    peak = max(totals, key=lambda name: totals[name])
    return Memory(peak, {**always, **points[peak]}, totals)


def suggest_fitting_settings(run: RunConfig, gpus: int, gpu: Gpu) -> list[str]:
    """Return settings with which a run fits, as typed, the smallest change first."""

    def fits(changed: RunConfig) -> float | None:
        needed = memory(changed, gpus).total
        return needed if needed <= TIGHT * gpu.memory else None

    data, parallel = run.data, run.parallel
    rows = data.rows // gpus
    sizes = [size for size in range(data.micro_batch_size - 1, 0, -1) if rows % size == 0]
    levels: tuple[str, ...] = ("none", "selective", "full")
    levels = levels[levels.index(parallel.activation_checkpointing) + 1 :]
    strategies = [] if parallel.strategy == "zero3" or gpus == 1 else ["zero3"]
    knobs = [
        [{"data.micro_batch_size": str(size)} for size in sizes],
        [{"parallel.activation_checkpointing": level} for level in levels],
        [{"parallel.strategy": strategy} for strategy in strategies],
    ]
    fitting = []
    for options in knobs:  # one setting: its first value that fits
        for option in options:
            if needed := fits(_changed(run, option)):
                fitting.append(f"{_typed(option)} ({needed / 1e9:.1f} GB)")
                break
    if fitting:
        return fitting
    for level in ["", *levels]:  # several settings together
        for size in [0, *sizes]:
            for strategy in ["", *strategies]:
                option = {
                    "data.micro_batch_size": str(size or data.micro_batch_size),
                    "parallel.activation_checkpointing": level or parallel.activation_checkpointing,
                    "parallel.strategy": strategy or parallel.strategy,
                }
                if needed := fits(_changed(run, option)):
                    return [f"{_typed(option)} together ({needed / 1e9:.1f} GB)"]
    return []


def _changed(run: RunConfig, option: dict[str, str]) -> RunConfig:
    for key, value in option.items():
        section, name = key.split(".")
        setting = {name: int(value) if value.isdigit() else value}
        run = replace(run, **{section: replace(getattr(run, section), **setting)})
    return run


def _typed(option: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in option.items())
