"""Work that ranks do together: on the main rank or on all, with one outcome for every rank."""

import errno
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from files import is_full

T = TypeVar("T")


def run_on_rank0(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Collective. Do it on the main rank; every rank gets what it returned, or raises what it raised."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # the others wait for what came of it, whatever that is
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run_on_every_rank(work: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Collective. Do it on all ranks; if it fails on any, it fails so on all."""
    problem: Exception | None = None
    try:
        work()
    except dcp.api.CheckpointException as error:  # torch wraps what happened on each rank
        inner = next(iter(error.failures.values()))[0]
        if isinstance(inner, OSError):
            problem = inner
        elif is_full(inner):
            problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            problem = OSError(errno.EIO, f"the checkpoint was not written: {inner}")
    except Exception as error:
        problem = error
    raise_on_any_rank(problem, group)


def raise_on_any_rank(problem: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Collective. Raise on every rank what the first rank with a problem has; nothing where none has one."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem and _portable(problem), group=group)
    first = next((rank for rank, found in enumerate(problems) if found is not None), None)
    if first is not None:
        raise (
            problem if problem and first == dist.get_rank() else problems[first]
        )  # its own has its traceback


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot travel between processes, one that says what it was."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"on rank {dist.get_rank()}: {type(error).__name__}: {error}")
