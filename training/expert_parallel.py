"""Expert parallelism: each rank stores some experts of every layer and receives their tokens.

Ranks exchange hidden states instead of weights (GShard, arXiv:2006.16668).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from models.moe import Experts, MoE, inverse_of, permute
from training.shard_layout import local


class DividedExperts(Experts):
    """Experts as DTensors, divided among the ranks of `group` in consecutive blocks."""

    group: dist.ProcessGroup

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return this rank's experts of gate_proj, up_proj and down_proj."""
        gate_proj, up_proj, down_proj = super().weights()
        return None if gate_proj is None else local(gate_proj), local(up_proj), local(down_proj)

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Collective. Apply each expert, on its rank, to its rows of x [rows, D].

        counts [E]: this rank's rows of each expert; expert 0 has the first counts[0]. A rank may
        send or receive no rows. The gradients of a rank's experts are sums over the rows of all
        ranks. Returns the output and the rows that this rank's experts computed, for all ranks.
        """
        ranks, group = dist.get_world_size(self.group), self.group
        received = torch.empty_like(counts)  # for each rank, its rows per expert of this rank
        dist.all_to_all_single(received, counts, group=group)
        by_rank = torch.stack([counts, received]).view(2, ranks, -1).sum(2)
        sent_rows, received_rows = by_rank.tolist()  # synchronizes with the device
        rows = _AllToAll.apply(x, received_rows, sent_rows, group)
        experts = torch.arange(len(counts) // ranks, device=x.device).repeat(ranks)
        rows_of = experts.repeat_interleave(received, output_size=sum(received_rows))
        order = rows_of.argsort(stable=True)
        inverse = inverse_of(order)
        local_counts = received.view(ranks, -1).sum(0)
        out, computed = super().forward(permute(rows, order, inverse), local_counts)
        out = _AllToAll.apply(permute(out, inverse, order), sent_rows, received_rows, group)
        return out, computed


class _AllToAll(torch.autograd.Function):
    """Send blocks of rows to the ranks of a group; backward returns their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.arguments = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, *ctx.arguments), None, None, None


def divide_experts(layers: nn.Module, ranks: int, mesh: DeviceMesh) -> list[DividedExperts]:
    """Divide the experts of each layer among `ranks` ranks, in place, and return them.

    mesh: replicas x shards, or shards. The weights become DTensors with FSDP2's placement,
    so optimizers and checkpoints treat them like other parameters. With ranks=1 nothing changes.
    ValueError if `ranks` is neither 1 nor the number of shards.
    """
    if ranks == 1:
        return []
    shards = mesh.size(mesh.ndim - 1)
    if ranks != shards:
        raise ValueError(
            f"parallel.experts={ranks} must be 1, or the number of ranks of a replica (ranks / "
            f"parallel.replicas), which is {shards}"
        )
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    divided: list[Any] = [layer.experts for layer in layers.modules() if isinstance(layer, MoE)]
    for experts in divided:
        for name, weight in list(experts.named_parameters()):
            # Every rank has built the full weight, so no broadcast is needed.
            shard = distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None)
            setattr(experts, name, nn.Parameter(shard))
        experts.__class__ = DividedExperts
        experts.group = mesh.get_group(mesh.ndim - 1)
    return divided


def sum_expert_gradients(model: nn.Module) -> None:
    """Collective. Sum the gradients of divided experts over replicas; FSDP2 sums all others.

    Call after the backward pass of the step's last micro-batch.
    """
    for module in model.modules():
        if isinstance(module, DividedExperts):
            for weight in module.parameters():
                mesh: DeviceMesh = weight.device_mesh  # type: ignore[attr-defined]
                if mesh.ndim > 1:
                    dist.all_reduce(local(weight.grad), group=mesh.get_group(0))
