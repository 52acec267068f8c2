"""Apply float8, activation checkpointing, torch.compile per block and FSDP2 to a model, in order.

On mps (Apple silicon), torch has no collectives, so the model remains a plain float32 module of one
process.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from machine import COMPLETE, DEVICE, default_device
from models.attention import KERNELS, kernel_operators
from models.moe import MoEConfig, unaligned
from ranges import PositiveInt, above, check_fields, one_of
from training.expert_parallel import DividedExperts, divide_experts
from training.fp8 import convert_to_fp8

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Model = TypeVar("Model", bound=nn.Module)
RECOMPILATIONS = 32  # compilations per block: row lengths, numbers of rows, training and evaluation


@dataclass(frozen=True)
class ParallelConfig:
    """Sharding, precision, compilation, attention kernel and activation checkpointing.

    All choices but the precision (dtype, fp8) give equal results up to rounding.
    """

    # zero2: parameters stay gathered from forward to backward. zero3: they are gathered again in
    # backward. ddp: every rank has all parameters.
    strategy: Annotated[str, one_of("zero2", "zero3", "ddp")] = "zero2"
    # Dtype of forward and backward: bfloat16, float32, or auto (bfloat16 where it is native and
    # FSDP2 can keep fp32 masters: not on mps).
    dtype: Annotated[str, one_of("auto", *DTYPES)] = "auto"
    # Recompute activations in backward, to save memory. selective: keep the outputs of matmuls and
    # fused attention. full: keep the inputs of blocks only.
    activation_checkpointing: Annotated[str, one_of("none", "selective", "full")] = "none"
    compile: bool | None = None  # torch.compile per block and loss head; default: on CUDA
    # Attention kernel: sdpa, blocks (CPU), flex, varlen, flash (FlashAttention 2-4); auto: the
    # fastest that fits, models/attention.py.
    attention: Annotated[str, one_of(*KERNELS)] = "auto"
    fp8: bool = False  # float8 matmuls in the blocks, with torchao
    replicas: PositiveInt = 1  # HSDP: model copies, each on neighbouring ranks; e.g. one per node
    # Expert parallelism: ranks among which each layer's experts are divided. 1, or the ranks of a
    # replica: tokens are sent to the experts, which are never gathered. Checkpoints are the same.
    experts: PositiveInt = 1
    # Seconds that ranks wait for each other in a step before the run ends; the first step may take
    # half an hour more.
    timeout_s: Annotated[float, above(0, maximum=1e9)] = 300

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
        if self.strategy == "ddp" and self.replicas > 1:
            raise ValueError(
                f"parallel.replicas={self.replicas} has no effect with parallel.strategy=ddp, "
                "where every rank is a replica; remove it, or use parallel.strategy=zero2"
            )
        if self.strategy == "ddp" and self.experts > 1:
            raise ValueError(
                f"parallel.experts={self.experts} cannot be used with parallel.strategy=ddp, where "
                "every rank has all experts; remove it, or use parallel.strategy=zero2"
            )

    def check_model(self, kind: str, moe: MoEConfig) -> None:
        """ValueError if these settings do not suit a model of this kind, dense or moe."""
        if kind == "dense" and self.experts > 1:
            raise ValueError(
                f"parallel.experts={self.experts} has no effect with model.kind=dense; "
                "remove it, or set model.kind=moe"
            )
        if kind == "moe" and self.fp8:
            raise ValueError(
                "parallel.fp8 cannot be used with model.kind=moe, because torch has no grouped "
                "product in float8 for training; remove it"
            )
        if moe.experts % self.experts:
            raise ValueError(
                f"model.moe.experts={moe.experts} cannot be divided equally among "
                f"parallel.experts={self.experts} ranks; use a multiple of {self.experts} experts"
            )


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    """Return True if blocks are compiled: parallel.compile, by default only on a GPU."""
    return device.type == "cuda" if config.compile is None else config.compile


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward: parallel.dtype; auto: bfloat16 if native.

    Without FSDP2 (mps), it is the float32 of the master weights.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type not in COMPLETE:
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def wrap_model_fsdp(
    model: Model, config: ParallelConfig | None = None, device: torch.device | None = None
) -> Model:
    """Shard a model with `.layers` in place over all ranks of the default group.

    Parameters stay fp32 masters. FSDP2 gathers them in the compute dtype, and reduces gradients in
    fp32 by *summing*: divide the loss by the loss denominator of the whole step before backward.
    DDP and HSDP do the same, with all or some ranks as replicas.
    Defaults: ParallelConfig(), and this rank's GPU or the CPU. Without a config and a process
    group, it creates a group of torchrun's ranks, or of this process only.
    On a device without collectives (mps), the model is not sharded; ValueError for settings that
    need it.
    """
    device = device or _device()
    if config is None:
        config = ParallelConfig()
        _join(device)
    shards = device.type in COMPLETE
    if not shards:
        check_unsharded(config, device)
    mesh = _mesh(config, device) if shards else None
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    model.to(device)
    if config.fp8:
        convert_to_fp8(layers, device)
    if config.activation_checkpointing != "none":
        options: dict[str, Any] = {}  # torch.compile rejects an empty context_fn for "full"
        if config.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matmuls)
        for i, block in enumerate(layers):
            layers[i] = checkpoint_wrapper(block, **options)
    if mesh is None:
        return model
    divided = divide_experts(layers, config.experts, mesh)
    if compiles(config, device):
        _compile_blocks(layers, divided)
    dtype = compute_dtype(config, device)
    check_alignment(model, dtype, device)
    # Inputs are not cast: hidden states already have the dtype, and rotary tables must stay fp32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored = {weight for experts in divided for weight in experts.parameters()}
    for module in (*layers, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=config.strategy == "zero3",
            ignored_params=ignored or None,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    return model


def check_ranks(device: torch.device, world: int) -> None:
    """ValueError for several ranks on a device without collectives."""
    if device.type not in COMPLETE and world > 1:
        raise ValueError(
            f"torch cannot exchange {device.type} tensors between {world} ranks; start one "
            f"process without torchrun, or set {DEVICE}=cpu"
        )


def check_unsharded(config: ParallelConfig, device: torch.device) -> None:
    """ValueError for several ranks, or for settings that need FSDP2."""
    check_ranks(device, get_world_size())
    refused: dict[str, tuple[object, object]] = {
        "dtype": (config.dtype == "bfloat16", "float32"),
        "compile": (config.compile, "false"),
        "replicas": (config.replicas > 1, 1),
        "experts": (config.experts > 1, 1),
    }
    for name, (is_set, allowed) in refused.items():
        if is_set:
            raise ValueError(
                f"parallel.{name}={getattr(config, name)} is not available on {device.type}, where "
                f"the model is one plain float32 module; set parallel.{name}={allowed}"
            )


def check_alignment(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError if a GPU's grouped matmul does not support the widths of the experts."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (weight := unaligned(model)):
        raise ValueError(
            f"{weight}: in bfloat16 on a GPU the widths of experts must be multiples of 8; change "
            "model.moe.expert_size, model.moe.shared_size or model.hidden_size, or train more "
            "slowly with parallel.dtype=float32"
        )


def _compile_blocks(layers: nn.ModuleList, divided: list[DividedExperts]) -> None:
    """Compile each block as one graph; divided experts are left out and split it in two.

    All blocks share the code of one forward(), and torch fails after 8 compilations of the same
    code. A model may have more kinds of blocks than that.
    """
    limits, limit = torch._dynamo.config, RECOMPILATIONS * len(layers)
    limits.recompile_limit = max(limits.recompile_limit, limit)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limit)
    for experts in divided:
        experts.forward = torch.compiler.disable(experts.forward)  # type: ignore[method-assign]
    for block in layers:
        block.compile(fullgraph=not divided)


def _device() -> torch.device:
    """Return this rank's GPU, or the CPU."""
    device = torch.device(default_device())
    local = dist.get_node_local_rank(fallback_rank=0)
    return torch.device("cuda", local) if device.type == "cuda" else device


def _join(device: torch.device) -> None:
    """Create the default process group unless it exists."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """Return the mesh replicas x shards. Shards are neighbouring ranks, if possible on one node."""
    world = get_world_size()
    replicas = world if config.strategy == "ddp" else config.replicas
    if world % replicas:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"parallel.replicas={replicas} does not divide {world} rank(s); use one of {divisors}"
        )
    if replicas == 1 and config.strategy != "ddp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard")
    )


def set_last_micro_batch(model: nn.Module, last: bool, strategy: str) -> None:
    """Call before each backward: gradients are reduced only after the step's last micro-batch.

    Until then zero2 keeps parameters gathered. Without FSDP2 (mps), this does nothing.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last or strategy == "zero3")


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, as needed after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keep_matmuls(context, operator, *args, **kwargs) -> CheckpointPolicy:
    aten = torch.ops.aten
    saved = {aten.mm.default, aten._grouped_mm.default, torch.ops.nanollama.grouped_linear.default}
    saved |= {aten._scaled_mm.default, aten.max.default}  # float8
    keep = operator in saved or operator in kernel_operators()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
