"""A stand-in for Apple's mps device: like mps it has no float64, collectives or foreign operands.

    python tests/stand_in.py train.py --config configs/test_mode.yaml    # runs a command on it

torch lets Python define one device. Its tensors hold tensors of the CPU, whose operators compute.
Everything outside the kernels is as on a Mac: code that forgets to move a tensor, or makes a
float64 one, fails.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"
DEVICE = "stand_in:0"
# Operators that accept a source or indices on the CPU, also on mps.
MOVES = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
make_tensor = torch.tensor


class StandIn(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "StandIn":
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a tensor of {NAME} to {held.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class Device(TorchDispatchMode):
    """Sends operators that create tensors of the device, or take them, to `compute`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # composite operators arrive whole in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU, with the rules of the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, StandIn)]
    named = kwargs.get("device")
    if not ours and (named is None or torch.device(named).type != NAME):
        return func(*args, **kwargs)
    if func.namespace == "c10d":
        raise RuntimeError(f"{func}: {NAME} has no collectives")
    foreign = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, StandIn)]
    name = func.overloadpacket.__name__
    if ours and foreign and name not in MOVES:
        raise RuntimeError(f"{func}: expected all tensors to be on {NAME}, but found one on cpu")
    waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
    if kwargs.get("pin_memory") or not (waits or len(ours) == len(tensors) > 1):
        raise RuntimeError(f"{func}: {NAME} has no pinned memory, and its copies must wait")
    result_is_ours = named is None or torch.device(named).type == NAME
    if named is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    operands: dict[int, torch.Tensor] = {}

    def hold(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        raw = value.held if isinstance(value, StandIn) else value
        operands[id(raw)] = value
        return raw

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in operands:
            return operands.get(id(value), value)
        return StandIn(value) if result_is_ours else value

    held_args, held_kwargs = tree_map(hold, (args, kwargs))
    with torch.inference_mode(False):  # a view of an ordinary tensor is one, also in that mode
        return tree_map(wrap, func(*held_args, **held_kwargs))


def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """torch.tensor, which would fill its result below __torch_dispatch__."""
    made = make_tensor(data, *args, **kwargs)
    return made if device is None else made.to(device)


@contextmanager
def registered() -> Iterator[None]:
    """Register the device in this process, and make it the default of all commands."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.tensor = tensor
    os.environ["NANOLLAMA_DEVICE"] = NAME
    with Device():
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with registered():
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
