"""Experts divided among ranks: the same losses, gradients, updates and checkpoints as without."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_metrics, tiny_mixture, train_here, train_ranks
from safetensors.torch import load_file
from torch import Tensor

from data.dataloader import Batch, Step
from models.moe import MoEConfig
from models.nanollama import ModelConfig
from training import expert_parallel, loop, setup
from training.checkpoint import full_state_dict
from training.config import DataConfig, RunConfig, load
from training.fsdp_utils import ParallelConfig
from training.objectives import next_token
from training.optimizers import OptimConfig

WORLD, ROWS, LENGTH, STEPS = 4, 8, 16, 3
CONFIG = tiny_mixture(MoEConfig(experts=4, shared_size=8, router="noisy_top_k", balance="bias"))
PLAIN = ParallelConfig(dtype="float32", compile=False)
FOUR = replace(PLAIN, experts=4, activation_checkpointing="full")
REPLICAS = replace(PLAIN, experts=2, replicas=2, strategy="zero3")
ADAMW = OptimConfig(lr=3e-3)
MUON = replace(ADAMW, name="muon")
NORMUON = replace(MUON, normuon_beta2=0.9)
OPTIMIZERS = {"adamw": ADAMW, "muon": MUON, "normuon": NORMUON}
UNEVEN = tiny_mixture(MoEConfig(experts=3, shared_size=8, expert_size=12, balance="bias"))


def trace(
    parallel: ParallelConfig,
    micro: int,
    optim: OptimConfig,
    collapsed: bool,
    config: ModelConfig = CONFIG,
) -> dict[str, Tensor]:
    """Return losses, gradient norms and loads of each step, and the last gradients and weights.

    collapsed: a large bias sends every token to the first two experts.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    data = DataConfig(sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH, micro_batch_size=micro)
    run = RunConfig(model=config, data=data, optim=optim, parallel=parallel)
    state = setup.build(run, torch.device("cpu"), seed=0)
    for layer in state.model.layers:
        if collapsed:
            layer.get_submodule("mlp.router").bias += torch.tensor([9.0, 8.0, 0.0, 0.0])
    result: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(64, (ROWS, LENGTH + 1), generator=generator)
        shares = tokens.chunk(world)[rank].split(micro)
        batches = [Batch(share[:, :-1], share[:, 1:], None) for share in shares]
        targets = ROWS * LENGTH
        sums, norm = loop.backward(
            run, state.model, Step(batches, targets, targets), next_token(1e-2)
        )
        means, _, loads = loop.reduce(sums, targets)
        assert loads is not None
        metrics = [means[name] for name in ("loss", "balance_loss", "router_z_loss")]
        result |= {f"metrics {step}": torch.tensor([*metrics, norm]), f"loads {step}": loads}
        if step == STEPS - 1:
            for name, weight in state.model.named_parameters():
                plain_name = name.replace("_checkpoint_wrapped_module.", "")
                result[f"gradient {plain_name}"] = weight.grad.full_tensor()
        state.optimizer.step()
        state.optimizer.zero_grad()
    return result | {name: value.clone() for name, value in full_state_dict(state.model).items()}


def doubled_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return expert_parallel._AllToAll.apply(2 * grad, *ctx.arguments), None, None, None


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


def save_uneven(rank: int, folder: Path) -> None:
    """Write the trace of a model on two ranks whose first dimensions FSDP2 pads."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    traces = {name: trace(PLAIN, 2, optim, False, UNEVEN) for name, optim in OPTIMIZERS.items()}
    if rank == 0:
        torch.save(traces, folder / "traces.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at exit


def test_fewer_experts_than_ranks_and_a_shared_expert_change_nothing(tmp_path):
    """One rank has the whole shared expert [1, I, D]; of three experts, one rank has two."""
    processes = [
        forked.forkserver().Process(target=save_uneven, args=(rank, tmp_path)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    with setup.ranks():
        alone = {name: trace(PLAIN, 4, optim, False, UNEVEN) for name, optim in OPTIMIZERS.items()}
    for process in processes:
        process.join(280)
        assert process.exitcode == 0
    for name, expected in torch.load(tmp_path / "traces.pt").items():
        assert expected.keys() == alone[name].keys()
        assert distance(expected, alone[name]) <= 1e-5, name


def compare(rank: int, folder: Path) -> None:
    """Write the distances of runs with divided experts from runs without them."""
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    distances = {}
    for name, optim, collapsed, cases in (
        ("adamw", ADAMW, False, [(FOUR, 1), (REPLICAS, 2)]),
        ("muon", MUON, False, [(FOUR, 2)]),
        ("normuon", NORMUON, False, [(REPLICAS, 1)]),
        ("collapsed", MUON, True, [(FOUR, 1)]),
    ):
        expected = trace(PLAIN, 2, optim, collapsed)
        for parallel, micro in cases:
            actual = trace(parallel, micro, optim, collapsed)
            distances[f"{name}, {parallel.experts} ranks"] = distance(expected, actual)
            idle = not expected["loads 0"][:, 2:].any()
            assert idle == collapsed and torch.equal(expected["loads 2"], actual["loads 2"])
    expected = trace(PLAIN, 2, ADAMW, False)
    for name, owner, attribute, fault in (
        ("doubled", expert_parallel._AllToAll, "backward", staticmethod(doubled_backward)),
        ("not summed", loop, "sum_expert_gradients", lambda model: None),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, fault)
            distances[f"fault: {name}"] = distance(expected, trace(REPLICAS, 2, ADAMW, False))
    if rank == 0:
        torch.save(distances, folder / "distances.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at exit


def test_divided_experts_change_nothing(tmp_path):
    """Losses, gradients and weights over three steps; also if some ranks receive no token."""
    context = forked.forkserver()
    processes = [context.Process(target=compare, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
        assert process.exitcode == 0
    distances = torch.load(tmp_path / "distances.pt")
    assert len(distances) == 5 + 2
    for name, value in distances.items():
        assert value > 1e-3 if name.startswith("fault") else value <= 1e-5, (name, value)


@pytest.mark.one_layer
def test_runs_and_checkpoints_do_not_depend_on_ranks_and_divided_experts(settings, tmp_path):
    """One rank, two, and two with divided experts; each checkpoint continues with the other."""

    def arguments(name: str, *more: str) -> list[str]:
        return settings(
            "model.kind=moe",
            "model.moe={experts: 4, router: noisy_top_k, balance: bias}",
            "optim.name=muon",
            "data.micro_batch_size=2",
            f"output_dir={tmp_path / name}",
            f"log_dir={tmp_path / name / 'logs'}",
            *more,
        )

    def on_two_ranks(name: str, *more: str) -> None:
        done = train_ranks(arguments(name, *more))
        assert done.returncode == 0, done.stderr

    assert train_here(arguments("one"))
    on_two_ranks("two")
    assert train_here(arguments("joined", "until=3"))
    on_two_ranks("joined", "parallel.experts=2")
    on_two_ranks("divided", "parallel.experts=2", "until=3")
    assert train_here(arguments("divided"))
    expected = read_metrics(tmp_path / "one" / "logs")
    biases = load_file(tmp_path / "one" / "step_6" / "model.safetensors")
    for name in ("two", "joined", "divided"):
        rows = read_metrics(tmp_path / name / "logs")
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert row["expert_load"] == other["expert_load"]
        assert rows[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], abs=1e-5)
        weights = load_file(tmp_path / name / "step_6" / "model.safetensors")
        for key in (key for key in biases if key.endswith("router.bias")):
            assert torch.equal(weights[key], biases[key]) and biases[key].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.experts=2"], "parallel.experts=2 has no effect with model.kind=dense; remove"),
        (
            ["model={kind: moe}", "parallel={experts: 2, strategy: ddp}"],
            "parallel.experts=2 cannot be used with parallel.strategy=ddp, where every rank has",
        ),
        (
            ["model={kind: moe, moe: {experts: 6}}", "parallel.experts=4"],
            "model.moe.experts=6 cannot be divided equally among parallel.experts=4 ranks; use a",
        ),
        (
            ["model={kind: moe}", "parallel.fp8=true"],
            "parallel.fp8 cannot be used with model.kind=moe, because torch has no grouped product",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(ROOT / "configs" / "test_mode.yaml", overrides)


def test_the_number_of_ranks_must_fit(settings):
    message = (
        r"parallel.experts=2 must be 1, or the number of ranks of a replica \(ranks / "
        r"parallel.replicas\), which is 1"
    )
    with pytest.raises(ValueError, match=message):
        train_here(settings("model.kind=moe", "parallel.experts=2"))
