"""Join and leave the process group of torchrun's ranks; a lost rank is one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from training.ops.watchdog import exit_if_peer_lost


@contextmanager
def process_group(backend: str, rank: int, world: int, **options: Any) -> Iterator[None]:
    """Join the default process group and leave it at the end.

    Exits with status 75 and one sentence if another rank is lost. That includes the connecting,
    which fails if another rank has already ended.
    """
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, **options)
        # Rank 0 hosts the store. Without this collective it could exit with a user error while
        # other ranks still connect. CPU tensors use gloo, in a group with NCCL too.
        dist.all_reduce(torch.zeros(1))
        yield
        sys.stdout.flush()  # torchrun may end this rank as soon as another exits
        # The barrier keeps sockets open while other ranks need them. With gloo it may fail on a
        # peer that has already passed it, which is harmless.
        with suppress(RuntimeError):
            dist.barrier()
    except BaseException as error:
        if world == 1 and dist.is_initialized():
            dist.destroy_process_group()  # with more ranks, it could wait for a stuck collective
        elif world > 1:
            exit_if_peer_lost(error, rank)
        raise
    dist.destroy_process_group()
