"""Sharding, put on a model from outside, in a fixed order: float8, activation checkpointing, compile per block, FSDP2."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.attention import KERNELS, kernel_operators
from ranges import PositiveInt, above, check_fields
from training.fp8 import convert_to_fp8

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks; none of it changes what is computed, beyond rounding."""

    strategy: str = "zero2"  # zero2: parameters stay whole from forward to backward; zero3: gathered twice; ddp: not sharded
    dtype: str = "auto"  # of parameters and activations in forward and backward: bfloat16, float32, or what the device has
    activation_checkpointing: str = (
        "none"  # none, selective (keep matmuls and fused attention), full
    )
    compile: bool | None = (
        None  # each block and the loss head with torch.compile; default: on a GPU
    )
    attention: str = "auto"  # sdpa, blocks (CPU), flex, varlen, flash (FlashAttention 2 - 4, if there); auto: models/attention.py
    fp8: bool = False  # matmuls of the blocks in float8, with torchao
    replicas: PositiveInt = (
        1  # HSDP: that many whole copies, each sharded over neighbouring ranks; best one a machine
    )
    # A step (not the first) in which ranks wait longer for each other ends the run.
    timeout_s: Annotated[float, above(0, most=1e9)] = 300

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
        for name, allowed in (
            ("strategy", ("zero2", "zero3", "ddp")),
            ("dtype", ("auto", *DTYPES)),
            ("activation_checkpointing", ("none", "selective", "full")),
            ("attention", KERNELS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"parallel.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.strategy == "ddp" and self.replicas > 1:
            raise ValueError(
                "with parallel.strategy=ddp every rank is a replica; leave out parallel.replicas, or take zero2"
            )


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    """Are blocks compiled: as asked for, else on a GPU."""
    return device.type == "cuda" if config.compile is None else config.compile


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward: as asked for, else bfloat16 where the device computes in it, else float32."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def wrap_model_fsdp(
    model: nn.Module, config: ParallelConfig | None = None, device: torch.device | None = None
) -> nn.Module:
    """Shard a model that has `.layers`, in place, over all ranks of the default group. Parameters stay fp32 masters.

    Gathers in the compute dtype, reduces gradients in fp32, and *sums* them over ranks: whoever calls backward divides by
    the weight of the whole step. DDP and HSDP are the same machinery with some or all ranks as replicas.
    Defaults: ParallelConfig(), and this rank's GPU or the CPU. Without a config and a process group it makes a group: of
    torchrun's ranks, or of this process alone.
    """
    device = device or _device()
    if config is None:
        config = ParallelConfig()
        _join(device)
    mesh = _mesh(config, device)
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    model.to(device)
    if config.fp8:
        convert_to_fp8(layers, device)
    if config.activation_checkpointing != "none":
        keep: dict[
            str, Any
        ] = {}  # torch.compile refuses a context_fn that does nothing, so "full" has none
        if config.activation_checkpointing == "selective":
            keep["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matmuls)
        for i, block in enumerate(layers):
            layers[i] = checkpoint_wrapper(block, **keep)
    if compiles(config, device):
        for block in layers:
            block.compile(fullgraph=True)
    dtype = compute_dtype(config, device)
    # No cast of inputs: hidden states already have the dtype, and the rotary tables must stay fp32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*layers, model):
        fully_shard(
            module, mesh=mesh, mp_policy=precision, reshard_after_forward=config.strategy == "zero3"
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    return model


def _device() -> torch.device:
    """This rank's GPU, or the CPU."""
    local = dist.get_node_local_rank(fallback_rank=0)
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _join(device: torch.device) -> None:
    """Make the default process group, if there is none."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """Ranks as replicas x shards; ranks of one machine are neighbours, so a replica does not leave it if it fits there."""
    world = get_world_size()
    replicas = world if config.strategy == "ddp" else config.replicas
    if world % replicas:
        fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"parallel.replicas={replicas} does not divide {world} rank(s); take one of {fitting}"
        )
    if replicas == 1 and config.strategy != "ddp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard")
    )


def set_last_micro_batch(model: FSDPModule, last: bool, strategy: str) -> None:
    """Before each backward: reduce gradients only after the step's last one; until then zero2 keeps parameters gathered."""
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last or strategy == "zero3")


def reshard(model: nn.Module) -> None:
    """Give up gathered parameters, as after a forward pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keep_matmuls(context, operator, *args, **kwargs) -> CheckpointPolicy:
    aten = torch.ops.aten
    kept = {
        aten.mm.default,
        aten._scaled_mm.default,
        aten.max.default,
    }  # the last two: of float8, and the maxima of its scales
    keep = operator in kept or operator in kernel_operators()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
