"""Muon equals torch's, singular values in fp64 and its unsharded form; and in a training run."""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_metrics, train_here, train_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from models.nanollama import ModelConfig, NanoLlama
from training import muon
from training.config import load
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp
from training.muon import (
    POLAR_EXPRESS,
    QUINTIC,
    QUINTIC12,
    Muon,
    ShardLayout,
    balance,
    newton_schulz_flops,
    orthogonalize,
    second_moment_shape,
    update_scale,
)
from training.optimizers import GroupConfig, OptimConfig, build_optimizer

MODEL = ModelConfig(  # rows: 18, 6 and 50, so that 4 ranks hold 2, 2, 2 and 0 of the 6
    vocab_size=32,
    hidden_size=18,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
)
CONFIG = OptimConfig(name="muon", lr=2e-2, weight_decay=0.3)
EVERY_OPTION = replace(
    CONFIG,
    groups={
        "embedding": GroupConfig(lr=8.0, beta2=0.99),
        "head": GroupConfig(beta1=0.5, weight_decay=0.0),
    },
    cautious_decay=True,
    adam_every=2,
    nesterov=False,
    muon_scale="spectral",
    muon_coefficients="quintic12",
    normuon_beta2=0.9,
)
CONFIGS = {"default": CONFIG, "every option": EVERY_OPTION}
STEPS = 3


class Stacked(torch.nn.Module):
    """The model with stacks of matrices: 5 [4, 6] and 2 [7, 3], uneven over 2 and more ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = NanoLlama(MODEL, seed=0)
        self.layers = self.model.layers  # FSDP units
        generator = torch.Generator().manual_seed(5)
        for name, shape in (("bank", (5, 4, 6)), ("qkv", (2, 7, 3))):
            values = torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(values))


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def polynomial(s: torch.Tensor, coefficients) -> torch.Tensor:
    """Apply the Newton-Schulz steps to singular values."""
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def whole_updates(
    config: OptimConfig = CONFIG, model: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Return the weights after STEPS updates on one process, without sharding."""
    model = model or NanoLlama(MODEL, seed=0)
    optimizer = build_optimizer(model, config)
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# ---- the update itself


@pytest.mark.parametrize(
    ("coefficients", "low", "high", "cosine"),
    [
        (QUINTIC, 0.68, 1.21, 0.97),
        (POLAR_EXPRESS, 0.84, 1.15, 0.985),
        (QUINTIC12, 0.998, 1.002, 0.9999),
    ],
)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_singular_values_come_near_one_and_vectors_stay(coefficients, low, high, cosine, shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(
        torch.randn(3, *shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    # The smallest singular value is a hundredth of the largest.
    s = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    actual = orthogonalize((u * s @ v).float(), coefficients).double()
    values = torch.linalg.svdvals(actual)
    assert low <= values.min() and values.max() <= high
    polar = u @ v  # the factor that more steps would end at
    assert (
        (actual * polar).sum((1, 2)) / actual.norm(dim=(1, 2)) / polar.norm(dim=(1, 2))
    ).min() > cosine
    expected = u * polynomial(s / s.norm(), coefficients) @ v
    assert (
        actual - expected
    ).abs().max() <= 1e-4  # fp32, steepened 970-fold where singular values are small


def test_orthogonalize_knows_no_scale_sign_side_or_neighbour():
    x = torch.randn(3, 20, 33, generator=torch.Generator().manual_seed(1))
    actual = orthogonalize(x)
    assert (orthogonalize(1000 * x) - actual).abs().max() <= 1e-4
    assert torch.equal(orthogonalize(-x), -actual)
    assert (orthogonalize(x.mT) - actual.mT).abs().max() <= 1e-5
    assert (orthogonalize(x[1:2]) - actual[1]).abs().max() <= 1e-5
    x[0], x[1, 7:] = 0, 0
    actual = orthogonalize(x)
    assert (
        actual.isfinite().all()
        and not actual[0].any()
        and not actual[1, 7:].any()
        and actual[1, :7].any()
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_a_step_equals_torch_muon_bit_for_bit(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [ours], "weight_decay": 0.1, "muon": True},
        {"params": [torch.nn.Parameter(torch.zeros(3))]},
    ]
    # torch's implementation.
    optimizer = Muon(groups, 1e-2, momentum=0.9, coefficients=QUINTIC, dtype=torch.bfloat16)
    for step in range(4):
        theirs.grad = ours.grad = gradient("w", start.shape, step)
        reference.step()
        optimizer.step()
        assert torch.equal(theirs, ours)
    assert (theirs - start).abs().max() > 1e-3


def test_updates_equal_a_plain_loop_and_the_rest_is_adamw_bit_for_bit():
    model = NanoLlama(MODEL, seed=0)
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain = NanoLlama(MODEL, seed=0)
    adamw = build_optimizer(plain, replace(CONFIG, name="adamw"))
    actual = whole_updates()
    for step in range(STEPS):
        for name, parameter in plain.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        adamw.step()
    by_adamw = dict(plain.named_parameters())
    for name, start in initial.items():
        if not name.startswith("layers.") or start.ndim == 1:
            assert torch.equal(actual[name], by_adamw[name]), name
            continue
        weight, momentum = start.double(), torch.zeros_like(start, dtype=torch.float64)
        for step in range(STEPS):
            slope = gradient(name, start.shape, step).double()
            momentum = 0.95 * momentum + 0.05 * slope
            u, s, v = torch.linalg.svd(0.95 * momentum + 0.05 * slope, full_matrices=False)
            update = u * polynomial(s / s.norm(), POLAR_EXPRESS) @ v
            rms = update.square().mean().sqrt() * 0.2 * max(start.shape) ** 0.5
            assert 0.15 <= rms <= 0.23, name  # about the size of an AdamW update
            weight = (
                weight * (1 - CONFIG.lr * 0.3) - CONFIG.lr * 0.2 * max(start.shape) ** 0.5 * update
            )
        assert (actual[name] - weight).abs().max() <= 1e-6, name


def test_every_parameter_is_in_one_group_and_only_matrices_of_blocks_are_muons():
    for tied in (False, True):
        model = NanoLlama(replace(MODEL, tie_word_embeddings=tied, qk_norm=True), seed=0)
        groups = build_optimizer(model, CONFIG).param_groups
        names = {parameter: name for name, parameter in model.named_parameters()}
        hidden = {
            names[parameter] for group in groups if group["muon"] for parameter in group["params"]
        }
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        assert (
            hidden == {name for name in names.values() if name.split(".")[-2] in kinds}
            and len(hidden) == 21
        )
        assert sorted(names[p] for group in groups for p in group["params"]) == sorted(
            names.values()
        )
        assert {group["weight_decay"] for group in groups if group["muon"]} == {0.3}


def test_rounds_and_missing_gradients_change_nothing(monkeypatch):
    expected = whole_updates()
    monkeypatch.setattr(muon, "ROUND", 1)  # each matrix separately
    for name, weight in whole_updates().items():
        assert (weight - expected[name]).abs().max() <= 1e-6
    model = NanoLlama(MODEL, seed=0)
    optimizer = build_optimizer(model, CONFIG)
    optimizer.step()
    assert not optimizer.state and torch.equal(
        model.layers[0].mlp.up_proj.weight, NanoLlama(MODEL, seed=0).layers[0].mlp.up_proj.weight
    )


def test_work_is_balanced_and_counted():
    # Shapes of the 1.1B model.
    shapes = [(2048, 2048)] * 44 + [(256, 2048)] * 44 + [(5632, 2048)] * 44 + [(2048, 5632)] * 22
    assert sum(map(newton_schulz_flops, shapes)) == pytest.approx(4.83e13, rel=0.01)
    for ranks in (1, 2, 8):
        loads = [0] * ranks
        for shape, owner in zip(shapes, balance(shapes, ranks), strict=True):
            loads[owner] += newton_schulz_flops(shape)
        assert max(loads) <= 1.05 * sum(loads) / ranks
    assert [ShardLayout(shards=4).rows(total) for total in (6, 8, 9, 1)] == [
        [2, 2, 2, 0],
        [2, 2, 2, 2],
        [3, 3, 3, 0],
        [1, 0, 0, 0],
    ]


# ---- variants


def options(shape: tuple[int, ...], **settings) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """Return a random matrix, or a stack of them, and its Muon with torch's default AdamW."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.nn.Parameter(torch.randn(shape, generator=generator))
    groups = [
        {"params": [matrix], "weight_decay": 0.1, "muon": True},
        {"params": [torch.nn.Parameter(torch.zeros(3))]},
    ]
    return matrix, Muon(groups, 1e-2, **settings)


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_size_of_an_update(shape, scale, beta2):
    matrix, optimizer = options(shape, scale=scale, normuon_beta2=beta2)
    before, matrix.grad = matrix.detach().clone(), gradient("w", matrix.shape, 0)
    optimizer.step()
    update = ((1 - 1e-3) * before - matrix).detach() / 1e-2
    rms = 0.2 if scale == "rms" else max(1, shape[0] / shape[1]) ** 0.5 / max(shape) ** 0.5
    assert update.square().mean().sqrt() == pytest.approx(rms, rel=0.2)
    assert update_scale((7, *shape), scale) == update_scale(shape, scale)
    if beta2:  # each row, or column of a wide matrix, has the same size in the first update
        sizes = update.norm(dim=0 if shape[0] < shape[1] else 1)
        assert len(sizes) == max(shape) and sizes.std() / sizes.mean() < 1e-3


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (3, 9, 5), (3, 5, 9)])
def test_normuon_is_its_definition_in_double_precision(shape):
    matrix, optimizer = options(shape, normuon_beta2=0.9)
    weight = matrix.detach().double()
    momentum, second = torch.zeros_like(weight), 0.0
    axis = -1 if shape[-2] >= shape[-1] else -2
    for step in range(4):
        matrix.grad = gradient("w", matrix.shape, step)
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * matrix.grad.double()
        u, s, v = torch.linalg.svd(
            0.95 * momentum + 0.05 * matrix.grad.double(), full_matrices=False
        )
        values = polynomial(s / s.norm(dim=-1, keepdim=True), POLAR_EXPRESS)
        update = u * values[..., None, :] @ v
        second = 0.9 * second + 0.1 * update.square().mean(axis, keepdim=True)
        scaled = update / second.sqrt()
        scaled *= update.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True)
        weight = weight * (1 - 1e-3) - 1e-2 * 0.2 * max(shape[-2:]) ** 0.5 * scaled
        assert (matrix - weight).abs().max() <= 1e-6
    assert optimizer.state[matrix]["second_moment"].shape == second_moment_shape(shape)


@pytest.mark.parametrize("settings", [{}, {"normuon_beta2": 0.9, "scale": "spectral"}])
def test_a_stack_is_its_matrices_one_by_one(settings):
    stack, optimizer = options((3, 6, 10), **settings)
    singles = []
    for i in range(3):
        matrix, single = options((6, 10), **settings)
        matrix.data.copy_(stack[i])
        singles.append((matrix, single))
    for step in range(3):
        stack.grad = gradient("w", stack.shape, step)
        optimizer.step()
        for i, (matrix, single) in enumerate(singles):
            matrix.grad = stack.grad[i].clone()
            single.step()
            assert (stack[i] - matrix).abs().max() <= 1e-6


def test_cautious_decay_is_of_weights_that_the_update_shrinks():
    (cautious, ours), (plain, theirs) = options((8, 6), cautious=True), options((8, 6))
    start = plain.detach().clone()
    for matrix, optimizer in ((cautious, ours), (plain, theirs)):
        matrix.grad = gradient("w", matrix.shape, 0)
        optimizer.step()
    spared = (start * (start * (1 - 1e-3) - plain) < 0).detach()
    assert 10 < spared.sum() < 40
    difference = (cautious - plain).detach()
    assert (difference - torch.where(spared, 1e-3 * start, 0.0)).abs().max() <= 1e-7


def test_decay_without_a_gradient_signal_is_exact():
    for settings in ({}, {"cautious": True}, {"normuon_beta2": 0.9}):
        matrix, optimizer = options((8, 6), **settings)
        before, matrix.grad = matrix.detach().clone(), torch.zeros(8, 6)
        optimizer.step()
        assert torch.equal(matrix, before * (1 - 1e-2 * 0.1))


def test_without_nesterov_the_momentum_itself_is_orthogonalized():
    matrix, optimizer = options((8, 6), nesterov=False)
    before, momentum = matrix.detach().clone(), torch.zeros(8, 6)
    for step in range(2):
        before = matrix.detach().clone()
        matrix.grad = gradient("w", matrix.shape, step)
        momentum.lerp_(matrix.grad, 0.05)
        optimizer.step()
    update = orthogonalize(momentum[None])[0]
    expected = before * (1 - 1e-3) - 1e-2 * 0.2 * 8**0.5 * update
    assert (matrix - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=moun", "optim.name='moun' is not one of adamw, muon"),
        ("optim.momentum=1", r"optim.momentum=1 must be at least 0 and below 1"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(ValueError, match=message):
        load(ROOT / "configs" / "base_1b.yaml", [override])


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Muon takes matrices, not parameters of shape \(3,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))], "muon": True}], 1e-3)


# ---- over ranks


def sharded(rank: int, world: int, folder: Path) -> None:
    """Save the weights after STEPS updates, for each sharding of the model and each config."""
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world,
        store=dist.FileStore(str(folder / f"store{world}"), world),
    )
    # zero3 differs from zero2 in the forward pass only.
    strategies = ("zero2", "hsdp") if world == 4 else ("zero3", "ddp")
    for strategy, kind in product(strategies, CONFIGS):
        model = NanoLlama(MODEL, seed=0) if kind == "default" else Stacked()
        if strategy == "hsdp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for module in (*model.layers, model):
                fully_shard(module, mesh=mesh)
        else:
            wrap_model_fsdp(
                model, ParallelConfig(strategy=strategy, dtype="float32"), torch.device("cpu")
            )
        optimizer = build_optimizer(model, CONFIGS[kind])
        seen: list[int] = []
        real = muon.orthogonalize
        muon.orthogonalize = lambda x, *arguments: seen.append(len(x)) or real(x, *arguments)
        for step in range(STEPS):
            for name, p in model.named_parameters():
                p.grad = distribute_tensor(
                    gradient(name, p.shape, step), p.device_mesh, p.placements
                )
            optimizer.step()
        muon.orthogonalize = real
        work = torch.tensor(sum(seen))
        dist.all_reduce(work)
        weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(
                {"weights": weights, "orthogonalized": int(work), "kind": kind},
                folder / f"{world} {strategy} {kind}.pt",
            )
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at exit


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_whole_and_no_rank_does_what_another_does(world, tmp_path):
    processes = [
        forked.forkserver().Process(target=sharded, args=(rank, world, tmp_path))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    expected = {"default": whole_updates(), "every option": whole_updates(EVERY_OPTION, Stacked())}
    files = list(tmp_path.glob("*.pt"))
    assert [process.exitcode for process in processes] == [0] * world and len(files) == 4
    for file in files:
        actual = torch.load(file)
        matrices = 21 if actual["kind"] == "default" else 21 + 5 + 2
        assert actual["orthogonalized"] == matrices * STEPS, file.name
        for name, weight in expected[actual["kind"]].items():
            assert (actual["weights"][name] - weight).abs().max() <= 1e-6, (file.name, name)


# ---- a run


def state_of(step_folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(step_folder / "state", scratch)
    content = torch.load(scratch, weights_only=True)
    flat = {
        f"{name}.{kind}": value
        for name, kinds in content["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    assert sum(name.endswith("momentum_buffer") for name in flat) == 14
    return {**content["model"], **flat}


def test_a_run_resumes_bit_for_bit_on_fewer_ranks_too_and_keeps_its_optimizer(settings, tmp_path):
    def where(name: str) -> list[str]:
        return [
            "optim.name=muon",
            f"output_dir={tmp_path / name / 'c'}",
            f"log_dir={tmp_path / name}",
        ]

    assert train_here(settings(*where("straight")))
    for until in ("until=2", "until=5", "seed=1337"):
        train_here(settings(*where("stopped"), until))
    one, two = (
        state_of(tmp_path / name / "c" / "step_6", tmp_path / "s.pt")
        for name in ("straight", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    curve = [row["loss"] for row in read_metrics(tmp_path / "straight")]
    assert (
        curve == [row["loss"] for row in read_metrics(tmp_path / "stopped")]
        and curve[0] - curve[-1] > 0.1
    )

    done = train_ranks(settings(*where("ranks"), "until=3"), 2)
    assert done.returncode == 0, done.stderr
    train_here(settings(*where("ranks")))
    assert [row["loss"] for row in read_metrics(tmp_path / "ranks")] == pytest.approx(
        curve, abs=1e-5
    )

    for name, other in (("adamw", "straight"), ("muon", "adamw")):
        again = [f"optim.name={name}", f"log_dir={tmp_path / 'l'}"]
        if name == "muon":
            assert train_here(settings("optim.name=adamw", *where("adamw")[1:], "steps=1"))
        with pytest.raises(
            ValueError,
            match=r"was saved with another optimizer \(optim.name, .*; use that one, or load its",
        ):
            train_here(settings(*where(other)[1:], *again))
