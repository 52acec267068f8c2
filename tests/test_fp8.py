"""Float8 matmuls, emulated on the CPU if torchao is installed; the error without it."""

import pytest
import torch
from conftest import train_here

from models.nanollama import ModelConfig, NanoLlama
from training import fp8, fsdp_utils

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
)


def test_without_a_gpu_or_torchao_a_sentence_says_so(monkeypatch):
    layers = NanoLlama(CONFIG, seed=0).layers
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"parallel.fp8 needs torchao, which is not installed; pip install torchao"
    ):
        fp8.convert_to_fp8(layers, CPU)
    monkeypatch.setattr(fp8, "find_spec", lambda name: name)
    with pytest.raises(
        ValueError, match=r"parallel.fp8 needs an NVIDIA GPU with float8; the device is cpu"
    ):
        fp8.convert_to_fp8(layers, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(
        ValueError, match=r"parallel.fp8 needs a GPU with float8 \(Ada, Hopper or newer\), not A100"
    ):
        fp8.convert_to_fp8(layers, torch.device("cuda"))


def test_emulated_float8_is_near_and_trains_through_the_whole_run(settings, monkeypatch):
    pytest.importorskip("torchao", reason="needs torchao (requirements-gpu.txt)")
    plain, rounded = NanoLlama(CONFIG, seed=0), NanoLlama(CONFIG, seed=0)
    names = fp8.convert_to_fp8(rounded.layers, CPU, emulate=True)
    assert len(names) == 2 * 7 and not any("norm" in name for name in names)
    assert plain.state_dict().keys() == rounded.state_dict().keys()
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (plain, rounded):
        model(tokens[:, :-1], tokens[:, 1:]).nll.mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 1e-3 < apart < 0.2

    monkeypatch.setattr(
        fsdp_utils,
        "convert_to_fp8",
        lambda layers, device: fp8.convert_to_fp8(layers, device, emulate=True),
    )
    more = (
        "parallel.fp8=true",
        "parallel.activation_checkpointing=selective",
        "parallel.dtype=bfloat16",
    )
    assert train_here(settings(*more, steps=3))
    assert train_here(settings(*more, steps=6))  # resumes from the checkpoint
