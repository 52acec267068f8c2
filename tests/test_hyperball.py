"""Hyperball (AdamH, MuonH): equal to its formula in fp64, constant norms, ranks, exact resuming."""

import os
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_metrics, train_here
from test_muon import Stacked, gradient
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from models.nanollama import NanoLlama
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from training.config import load
from training.curves import Curve, check_curves
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp
from training.muon import POLAR_EXPRESS
from training.optimizers import GroupConfig, OptimConfig, build_optimizer

ADAMH = OptimConfig(lr=2e-2, weight_decay=0.0, beta2=0.9, hyperball=True)
MUONH = replace(ADAMH, name="muon")
NORMUONH = replace(MUONH, normuon_beta2=0.9)
OF_HEAD = replace(  # the matrices keep Muon and its decay; AdamH sums the gradients of two steps
    MUONH,
    weight_decay=0.3,
    adam_every=2,
    groups={"matrices": GroupConfig(hyperball=False), "head": GroupConfig(weight_decay=0.0)},
)
CONFIGS = {"adamh": ADAMH, "muonh": MUONH, "normuonh": NORMUONH, "head only": OF_HEAD}
SHAPES = {"bank": (3, 4, 6), "tall": (8, 5), "wide": (5, 8)}
HEAD = "lm_head.weight"


class Matrices(nn.Module):
    """Matrices, a stack of matrices of different norms, a head and a vector."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(gradient(name, torch.Size(shape), 99)))
        self.bank.data *= torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
        self.lm_head = nn.Linear(6, 7, bias=False)
        self.lm_head.weight.data = gradient(HEAD, self.lm_head.weight.shape, 99)
        self.norm = nn.Parameter(torch.ones(4))


def train_steps(model: nn.Module, config: OptimConfig, steps: int) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, config)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        optimizer.step()
    return optimizer


def norms_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Frobenius norms in fp64, of each matrix of a stack."""
    return {
        name: parameter.detach().double().square().sum((-2, -1)).sqrt()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }


def adam_updates(gradients: list[np.ndarray], beta2: float) -> list[np.ndarray]:
    """Adam's update of each step, without learning rate (Kingma and Ba, arXiv:1412.6980)."""
    m, v, updates = 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g**2
        updates.append(m / (1 - 0.9**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8))
    return updates


def muon_updates(gradients: list[np.ndarray], beta2: float = 0.0) -> list[np.ndarray]:
    """Muon's update of each step by singular values; with beta2, NorMuon's."""
    momentum, second, updates = 0.0, 0.0, []
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        u, s, vt = np.linalg.svd(0.95 * momentum + 0.05 * g, full_matrices=False)
        s = s / np.linalg.norm(s)
        for a, b, c in POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        update = u * s @ vt
        if beta2:
            axis = 1 if len(g) >= len(g[0]) else 0
            second = beta2 * second + (1 - beta2) * (update**2).mean(axis, keepdims=True)
            update = update / np.sqrt(second)
        updates.append(update)
    return updates


def on_the_sphere(start: np.ndarray, updates: list[np.ndarray], lr: float) -> np.ndarray:
    """The formula of the paper: W <- R Normalize(W - lr R Normalize(U)), R = |W_0|."""
    weight, radius = start, np.linalg.norm(start)
    for update in updates:
        weight = weight - lr * radius * update / np.linalg.norm(update)
        weight = radius * weight / np.linalg.norm(weight)
    return weight


# ---- the update


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("name", ["adamh", "muonh", "normuonh"])
def test_updates_are_the_formula_in_double_precision(name, steps):
    model, start = Matrices(), Matrices()
    train_steps(model, CONFIGS[name], steps)
    for key in (*SHAPES, HEAD):
        first, last = (m.get_parameter(key).detach().double().numpy() for m in (start, model))
        shape = first.shape
        gradients = [
            gradient(key, torch.Size(shape), step).double().numpy() for step in range(steps)
        ]
        for i in range(shape[0] if first.ndim == 3 else 1):
            own = [g[i] if first.ndim == 3 else g for g in gradients]
            before, after = (w[i] if first.ndim == 3 else w for w in (first, last))
            if name == "adamh" or key == HEAD:  # also MuonH's head
                updates = adam_updates(own, 0.9)
            else:
                updates = muon_updates(own, 0.9 if name == "normuonh" else 0.0)
            expected = on_the_sphere(before, updates, 2e-2)
            tolerance = 2e-6 * np.linalg.norm(before)
            assert np.abs(after - expected).max() <= tolerance, (key, i)
            assert np.abs(after - before).max() > 100 * tolerance
    assert torch.equal(model.norm, plain_adam(start.norm, steps))


def plain_adam(parameter: nn.Parameter, steps: int) -> torch.Tensor:
    optimizer = torch.optim.AdamW([parameter], 2e-2, (0.9, 0.9), weight_decay=0.0, fused=True)
    for step in range(steps):
        parameter.grad = gradient("norm", parameter.shape, step)
        optimizer.step()
    return parameter


@pytest.mark.parametrize("name", ["adamh", "muonh", "normuonh"])
def test_norms_stay_those_of_the_start_over_50_steps(name):
    model = Stacked()
    before = norms_of(model)
    optimizer = train_steps(model, replace(CONFIGS[name], lr=0.1), 50)
    after = norms_of(model)
    constant = [key for key in before if key != "model.embed_tokens.weight"]
    for key in constant:
        assert torch.allclose(after[key], before[key], rtol=3e-7, atol=0), key
        norm = optimizer.state[model.get_parameter(key)]["initial_norm"]
        assert norm.dtype == torch.float32 and norm.shape == (before[key].numel(),)
        assert torch.allclose(norm.double(), before[key].flatten(), rtol=1.2e-7, atol=0), key
    assert not torch.allclose(after["model.embed_tokens.weight"], before[key], rtol=1e-3)


@pytest.mark.parametrize("name", ["adamh", "muonh"])
def test_the_path_scales_with_the_initial_weights(name):
    """lr is relative: from weights 4 times as large, all later weights are 4 times as large."""
    one, four = Matrices(), Matrices()
    for key in (*SHAPES, HEAD):
        four.get_parameter(key).data *= 4
    train_steps(one, CONFIGS[name], 5)
    train_steps(four, CONFIGS[name], 5)
    for key in (*SHAPES, HEAD):
        assert torch.equal(4 * one.get_parameter(key), four.get_parameter(key)), key


@pytest.mark.parametrize("name", ["adamh", "muonh", "normuonh"])
def test_a_matrix_without_a_gradient_signal_stays_bit_for_bit(name):
    model, start = Matrices(), Matrices()
    optimizer = build_optimizer(model, CONFIGS[name])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(key)), key


# ---- groups


def test_hyperball_is_of_matrices_and_head_and_a_tied_table_keeps_adam():
    gpt = GPTConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        merged_qkv=True,
    )
    for tied in (False, True):
        model = SpeedrunGPT(replace(gpt, tie_word_embeddings=tied), seed=0)
        groups = build_optimizer(model, MUONH).param_groups
        constant = {group["name"] for group in groups if group.get("hyperball")}
        assert constant == ({"matrices"} if tied else {"matrices", "head"})
        assert not any(group["weight_decay"] for group in groups)
    before = norms_of(model)["layers.0.attn.qkv_weight"]
    optimizer = train_steps(model, MUONH, 3)
    after = norms_of(model)["layers.0.attn.qkv_weight"]
    assert before.shape == (3,) and torch.allclose(before, after, rtol=3e-7, atol=0)  # q, k, v
    plain = build_optimizer(Matrices(), OptimConfig()).param_groups
    assert not any("hyperball" in group for group in plain) and optimizer.state


def test_a_group_can_be_left_out():
    groups = {group["name"]: group for group in build_optimizer(Matrices(), OF_HEAD).param_groups}
    assert groups["head"]["hyperball"] and groups["head"]["weight_decay"] == 0
    assert "hyperball" not in groups["matrices"] and groups["matrices"]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            r"optim.weight_decay=0.1 has no effect with optim.hyperball, .*; set optim.weight_dec",
        ),
        (
            ["optim.weight_decay=0", "optim.groups.head.weight_decay=0.2"],
            r"optim.groups.head.weight_decay=0.2 has no effect .*; set optim.groups.head.weight_d",
        ),
        (
            ["optim.weight_decay=0", "optim.name=muon", "optim.muon_scale=spectral"],
            "optim.muon_scale=spectral has no effect with .*; set optim.muon_scale=rms",
        ),
        (
            ["optim.weight_decay=0", "optim.groups.vectors.hyperball=true"],
            "optim.groups.vectors.hyperball: Hyperball is for matrices and head; remove it",
        ),
        (
            ["optim.weight_decay=0", "optim.cautious_decay=true"],
            "optim.cautious_decay=true has no effect with optim.hyperball, .* no group decays",
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(ROOT / "configs" / "base_1b.yaml", ["optim.hyperball=true", *overrides])


def test_a_schedule_of_the_decay_needs_a_group_that_decays():
    curves = {"weight_decay": Curve(((0, 1.0), (10, 0.0)))}
    check_curves(curves, OF_HEAD)
    with pytest.raises(ValueError, match=r"schedules.weight_decay has no effect with"):
        check_curves(curves, MUONH)


def test_a_zero_matrix_is_refused_at_the_start():
    gpt = GPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, zero_init=True)
    model = SpeedrunGPT(replace(gpt, vocab_size=50), seed=0)
    message = r"keeps the norm of layers.0.attn.o_proj.weight, which is 0, .*; initialize it"
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, MUONH)
    model = Matrices()
    model.bank.data[1] = 0  # one matrix of a stack
    with pytest.raises(ValueError, match=r"norm of bank, .* set optim.groups.matrices.hyperball=f"):
        build_optimizer(model, ADAMH)


# ---- ranks and resuming


def sharded(rank: int, world: int, folder: Path) -> None:
    """Save the weights and norms after 3 updates, for each config and sharding of the model."""
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    for kind, config in CONFIGS.items():
        for strategy in ("zero3", "hsdp"):
            model = Stacked()
            if strategy == "hsdp":
                mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
                for module in (*model.layers, model):
                    fully_shard(module, mesh=mesh)
            else:
                parallel = ParallelConfig(strategy=strategy, dtype="float32")
                wrap_model_fsdp(model, parallel, torch.device("cpu"))
            optimizer = build_optimizer(model, config)
            for step in range(3):
                for name, p in model.named_parameters():
                    whole = gradient(name, p.shape, step)
                    p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
                optimizer.step()
            weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
            norms = {
                name: optimizer.state[p]["initial_norm"]
                for name, p in model.named_parameters()
                if "initial_norm" in optimizer.state[p]
            }
            if rank == 0:
                torch.save((weights, norms), folder / f"{kind} {strategy}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at exit


def test_four_ranks_equal_one(tmp_path):
    context = forked.forkserver()
    processes = [context.Process(target=sharded, args=(rank, 4, tmp_path)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    for kind, config in CONFIGS.items():
        model = Stacked()
        optimizer = train_steps(model, config, 3)
        for strategy in ("zero3", "hsdp"):
            weights, norms = torch.load(tmp_path / f"{kind} {strategy}.pt")
            assert "model.lm_head.weight" in norms and ("bank" in norms) == (kind != "head only")
            for name, parameter in model.named_parameters():
                assert (weights[name] - parameter).abs().max() <= 1e-6, (kind, strategy, name)
                if name in norms:
                    expected = optimizer.state[parameter]["initial_norm"]
                    assert torch.allclose(norms[name], expected, rtol=2e-7, atol=0)


@pytest.mark.one_layer
@pytest.mark.parametrize("name", ["adamh", "muonh"])
def test_a_run_resumes_bit_for_bit_and_keeps_its_norms_over_phases(name, settings, tmp_path):
    optim = "{lr: 0.02, weight_decay: 0, hyperball: true, groups: {head: {lr: 0.5}}, name: "
    optim = f"optim={optim}{'muon' if name == 'muonh' else 'adamw'}}}"

    def of(run: str, phase: str, *more: str) -> list[str]:
        folders = [f"output_dir={tmp_path / run / phase}", f"log_dir={tmp_path / run / 'logs'}"]
        return settings(optim, "validation.every=0", *folders, *more, phase=phase)

    for run, stops in (("straight", []), ("stopped", ["until=4"])):
        for stop in stops:
            train_here(of(run, "one", stop))
        assert train_here(of(run, "one"))
        second = [f"resume_from={tmp_path / run / 'one'}"]
        for stop in stops and ["until=8"]:
            train_here(of(run, "two", *second, stop))
        assert train_here(of(run, "two", *second))
    read = (tmp_path / run / "two" / "step_12" for run in ("straight", "stopped"))
    one, two = (read_state(folder, tmp_path / "s.pt") for folder in read)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / run / "logs")]
        for run in ("straight", "stopped")
    ]
    assert losses[0] == losses[1] and losses[0][0] - losses[0][-1] > 0.1
    run_config = load(ROOT / "configs" / "test_mode.yaml", of("x", "one"))
    initial = NanoLlama(run_config.model, seed=run_config.seed)
    norms = {key: norm for key, norm in one.items() if key.endswith("initial_norm")}
    assert len(norms) == 8
    for key, norm in norms.items():
        weight = initial.get_parameter(key.removesuffix(".initial_norm"))
        assert norm.item() == pytest.approx(weight.detach().double().norm().item(), rel=1.2e-7)

    plain = [optim.replace("weight_decay: 0, hyperball: true, ", ""), "steps=8"]
    with pytest.raises(ValueError, match=r"another optimizer \(optim.name, .*, hyperball\); use"):
        assert train_here(of("plain", "one", *plain))
        train_here(of("plain", "one", "steps=9"))
    with pytest.raises(ValueError, match="another optimizer"):  # nor may a later phase drop it
        train_here(of(run, "three", f"resume_from={tmp_path / run / 'two'}", plain[0]))


def read_state(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint by name."""
    dcp_to_torch_save(folder / "state", scratch)
    content = torch.load(scratch, weights_only=True)
    states = content["optimizer"]["state"].items()
    flat = {f"{name}.{kind}": value for name, kinds in states for kind, value in kinds.items()}
    return {**content["model"], **flat}
