"""Write a checkpoint's state/ from copies of this rank's shards, one synced file per rank."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.tensor import DTensor


class Copies:
    """Copies of tensors on the CPU, pinned for GPU tensors. The next save reuses the memory."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of value; complete after finish(), valid until the next take() of name."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(
                value.shape, dtype=value.dtype, pin_memory=value.is_cuda
            )
        return self.buffers[name].copy_(value.detach(), non_blocking=value.is_cuda)

    def finish(self) -> None:
        if any(buffer.is_pinned() for buffer in self.buffers.values()):
            torch.cuda.synchronize()


class SnapshotSavePlanner(dcp.DefaultSavePlanner):
    """Save planner that writes the snapshot's copies of tensors; without copies, live tensors."""

    def __init__(self, copies: dict[str, torch.Tensor]):
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.copies[index.fqn] if index.fqn in self.copies else super().lookup_object(index)


class SyncedFileWriter(dcp.FileSystemWriter):
    """Storage writer with one synced file per rank.

    With several writing threads torch 2.13 reports the error of only one.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, per_thread_copy_ahead=0)  # copying ahead would wait for the GPU

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no random id, so that equal states give equal bytes


def local_shards(prefix: str, tree: dict[str, Any]) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield this rank's shards of the tensors in nested dicts, with their names in DCP."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from local_shards(f"{prefix}{key}.", value)
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value.to_local() if isinstance(value, DTensor) else value
