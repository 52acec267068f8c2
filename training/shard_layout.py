"""Where FSDP2 keeps a parameter: this rank's shard, and the layout of all shards over the ranks."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardLayout(NamedTuple):
    """Placement of a matrix: FSDP2 shards its rows over `shards` ranks, in each of `replicas`.

    replica, shard: coordinates of this rank. The process groups are None without that dimension.
    "Rows" are slices along the first dimension; a row of a stack of matrices is one matrix.
    """

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    replica_group: dist.ProcessGroup | None = None
    shard_group: dist.ProcessGroup | None = None

    @classmethod
    def from_tensor(cls, matrix: Tensor) -> "ShardLayout":
        if not isinstance(matrix, DTensor):
            return cls()
        mesh = matrix.device_mesh
        assert matrix.placements in ((Shard(0),), (Replicate(), Shard(0))), (
            f"optimizers of matrices do not support placements {matrix.placements}"
        )
        shard_group = mesh.get_group(mesh.ndim - 1)
        if mesh.ndim == 1:
            return cls(1, mesh.size(), 0, mesh.get_local_rank(0), None, shard_group)
        return cls(
            mesh.size(0),
            mesh.size(1),
            mesh.get_local_rank(0),
            mesh.get_local_rank(1),
            mesh.get_group(0),
            shard_group,
        )

    def rows(self, total: int) -> list[int]:
        """Return the rows of each shard. FSDP2 rounds up: the last shards may have fewer."""
        shard_rows = -(-total // self.shards)
        return [max(0, min(shard_rows, total - shard * shard_rows)) for shard in range(self.shards)]

    def span(self, total: int) -> slice:
        """Return the rows of this rank."""
        rows = self.rows(total)
        begin = sum(rows[: self.shard])
        return slice(begin, begin + rows[self.shard])
