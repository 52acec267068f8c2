"""Float8 matmuls in the linear layers of the blocks, with torchao and one scale per tensor.

Weights and optimizer moments keep their dtypes.
"""

from importlib.util import find_spec

import torch
from torch import nn


def convert_to_fp8(layers: nn.Module, device: torch.device, emulate: bool = False) -> list[str]:
    """Replace the large linear layers in `layers` by torchao's Float8Linear in place.

    Returns the names of the converted layers. Parameters keep names and dtypes, so checkpoints do
    not change. Layers of at most 1,024 outputs (k_proj and v_proj of the 1.1B model) are skipped:
    torchao measured no speed-up for them. emulate (for tests): round to float8
    and multiply in fp32, on any device, in each layer whose sizes are multiples of 16.
    ValueError if torchao is missing or the device does not support float8.
    """
    if find_spec("torchao") is None:
        raise ValueError(
            "parallel.fp8 needs torchao, which is not installed; pip install torchao==0.18.0, "
            "or remove parallel.fp8"
        )
    if not emulate:
        _check_device(device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    converted = []

    def should_convert(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module.in_features % 16 or module.out_features % 16:
            return False
        if module.out_features <= 1024 and not emulate:
            return False
        converted.append(name)
        return True

    convert_to_float8_training(
        layers, module_filter_fn=should_convert, config=Float8LinearConfig(emulate=emulate)
    )
    return converted


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"parallel.fp8 needs an NVIDIA GPU with float8; the device is {device.type}. Remove it"
        )
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "parallel.fp8 needs a GPU with float8 (Ada, Hopper or newer), not "
            f"{torch.cuda.get_device_name(device)}; remove it"
        )
