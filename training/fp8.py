"""Matmuls in float8 (torchao, one scale a tensor): the linear layers of the blocks, weights and moments as they were."""

from importlib.util import find_spec

import torch
from torch import nn


def convert_to_fp8(layers: nn.Module, device: torch.device, emulate: bool = False) -> list[str]:
    """Swap the large linear layers in `layers` for torchao's Float8Linear, in place; returns their names.

    Parameters keep names and dtype, so checkpoints do not change. Layers stay as they are that float8 does not make faster:
    up to 1,024 outputs (k_proj, v_proj of the 1.1B model), by torchao's measurements. emulate: round as float8 does and
    multiply in fp32, on any device, every layer whose sizes are multiples of 16: for tests. Raises ValueError where this
    device cannot.
    """
    if find_spec("torchao") is None:
        raise ValueError(
            "parallel.fp8 needs torchao, which is not installed; pip install torchao==0.18.0, or leave fp8 out"
        )
    if not emulate:
        _check_device(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted = []

    def chosen(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module.in_features % 16 or module.out_features % 16:
            return False
        if module.out_features <= 1024 and not emulate:
            return False
        converted.append(name)
        return True

    convert_to_float8_training(
        layers, module_filter_fn=chosen, config=Float8LinearConfig(emulate=emulate)
    )
    return converted


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"parallel.fp8 needs an NVIDIA GPU with float8, and this is {device.type}; leave it out"
        )
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"parallel.fp8 needs a GPU with float8 (Ada, Hopper or newer), not {torch.cuda.get_device_name(device)}; leave it out"
        )
