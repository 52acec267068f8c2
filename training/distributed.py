"""Run a function on rank 0 or on all ranks; every rank gets the same result or error."""

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
    """Collective. Call `work` on rank 0; every rank returns its result or raises its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def run_on_every_rank(work: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Collective. Call `work` on every rank; an error on any rank is raised on all."""
    problem: Exception | None = None
    try:
        work()
    except dcp.api.CheckpointException as error:  # torch wraps the error of each rank
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
    """Collective. On every rank, raise the problem of the first rank that has one."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem and _portable(problem), group=group)
    first = next((rank for rank, error in enumerate(problems) if error is not None), None)
    if first is not None:
        is_local = problem and first == dist.get_rank()  # keeps its traceback
        raise problem if problem and is_local else problems[first]


def _portable(error: Exception) -> Exception:
    """Return the error if it can be pickled, else a RuntimeError with its text."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"on rank {dist.get_rank()}: {type(error).__name__}: {error}")
