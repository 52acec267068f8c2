"""torch.compile of the blocks: what compiles again, and what must not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_mixture
from torch import Tensor

from models.losses import LossHead, _backward, _forward
from models.moe import MoEConfig
from models.nanollama import NanoLlama
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from training import setup
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp

CPU = torch.device("cpu")
COMPILED = ParallelConfig(dtype="float32", compile=True)
MOE = MoEConfig(experts=5, router="noisy_top_k", balance="bias")
LLAMA = tiny_mixture(MOE)


class Counter:
    """A backend that compiles nothing and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


@pytest.fixture
def counter(monkeypatch) -> Counter:
    """Let modules compile with a Counter."""
    backend, stock = Counter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, **more: stock(block, backend=backend, **more)
    )
    torch._dynamo.reset()
    return backend


GPT = GPTConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    kind="moe",
    moe=MOE,
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return random tokens and targets [4, 16]."""
    text = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], text[:, 1:]


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["NanoLlama", "SpeedrunGPT"])
def test_other_routes_do_not_compile_again(config, counter):
    with setup.ranks():
        model = NanoLlama(config, 0) if config is LLAMA else SpeedrunGPT(config, 0)
        model.compile_head = False
        wrapped = wrap_model_fsdp(model, COMPILED, CPU)
        routes = []
        for step in range(3):
            losses = wrapped(*batch(step))
            losses.nll.sum().backward()
            routes.append(losses.router.counts)
            with torch.no_grad():  # from the second step on all tokens choose two experts
                for layer in wrapped.layers:
                    layer.mlp.router.bias.copy_(torch.tensor([9.0, 0, 0, 8.0, 0]))
        assert routes[2].tolist() == [[64, 0, 0, 64, 0]] * 2 and (routes[0] > 0).all()
        assert counter.graphs == 1  # blocks of one structure share it


class Sum(torch.nn.Module):
    """A block that adds 1 for each of its parts."""

    def __init__(self, parts: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.parts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        for part in self.parts:
            x = part(x) + 1
        return x


def test_34_structures_of_blocks_compile(counter):
    """torch's limit of 8 counts per code, and blocks share the code of forward()."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(map(Sum, range(34)))
    with setup.ranks(), torch._dynamo.config.patch(recompile_limit=8):
        wrap_model_fsdp(model, COMPILED, CPU)
        x = torch.zeros(2)
        for layer in model.layers:
            x = layer(x)
    assert x.tolist() == [561.0, 561.0] and counter.graphs == 34


def test_scheduled_windows_and_softcaps_do_not_compile_again(counter):
    dense = replace(GPT, kind="dense", moe=MoEConfig(), window_pattern="SL", short_window=4)
    with setup.ranks():
        model = SpeedrunGPT(dense, 0)
        model.compile_head = False
        wrapped = wrap_model_fsdp(model, COMPILED, CPU)
        for window in (2, 3, 5, 8, None):
            model.set_windows(window, window and 2 * window)
            wrapped(*batch(0)).nll.sum().backward()
    assert counter.graphs == 1
    hidden, weight, ones = torch.ones(4, 8), torch.ones(64, 8), torch.ones(4, 1)
    target = torch.zeros(4, 1, dtype=torch.int64)
    forward, backward = (
        torch.compile(function, backend=counter, fullgraph=True)
        for function in (_forward, _backward)
    )
    for cap in (30.0, 29.0, 28.5, 20.0, 15.0):
        head = LossHead(cap)
        _, lse = forward(hidden, weight, None, target, ones, head)
        backward(hidden, weight, None, target, ones, lse, ones[:, 0], ones[:, 0], head)
    assert counter.graphs == 1 + 2 * 2  # one for the first value, one for all others
