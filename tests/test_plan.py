"""The planner: its memory counts equal a CPU run's; errors; forecasts of epochs, disk and loss."""

import json
import math
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import forked
import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import ROOT, train_here
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from data.dataloader import PackedDataLoader
from data.store import open_shards
from models.losses import token_loss_sum
from models.nanollama import ModelConfig, NanoLlama
from training.config import DataConfig, RunConfig, load, to_dict
from training.fsdp_utils import ParallelConfig, _keep_matmuls, set_last_micro_batch, wrap_model_fsdp
from training.meter import flops_per_token
from training.optimizers import OptimConfig, build_optimizer
from training.planning import memory as memory_model
from training.planning.cards import GPUS
from training.planning.cost import _downloaded, check, forecast, forecast_loss, readable_tokens
from training.planning.forecast_text import forecast_text
from training.planning.memory import (
    CONTEXT,
    activation_bytes,
    memory,
    optimizer_state_bytes,
    parameter_shapes,
    sharded_bytes,
    suggest_fitting_settings,
)
from training.planning.plan import Plan, PlanPhase, load_plan

SMALL = ModelConfig(  # no two widths are equal, and 3 ranks do not divide them
    vocab_size=2000,
    hidden_size=160,
    intermediate_size=448,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
)


class LiveBytes(TorchDispatchMode):
    """Counts live bytes, and their peak, of tensors created inside or passed to watch()."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def watch(self, tensor: torch.Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        alive = {
            key: storage for key, ref in self.storages.items() if (storage := ref()) is not None
        }
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.watch(value)
        self.peak = max(self.peak, self.now())
        return out


@contextmanager
def pretended_ranks(world: int):
    """Simulate rank 0 of `world` ranks: values are wrong, but every tensor has its real size."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_bytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().nbytes()


def small_run(
    parallel: ParallelConfig,
    micro_batches: int,
    ranks: int,
    model: ModelConfig = SMALL,
    rows: int = 4,
    length: int = 256,
) -> RunConfig:
    tokens = ranks * micro_batches * rows * length
    data = DataConfig(sequence_length=length, micro_batch_size=rows, tokens_per_step=tokens)
    return RunConfig(model=model, data=data, parallel=parallel)


def measure(run: RunConfig, ranks: int) -> dict[str, int]:
    """Return one rank's bytes: parameters, optimizer state, peaks of a step and of its update."""
    with pretended_ranks(ranks):
        model = wrap_model_fsdp(NanoLlama(run.model, seed=0), run.parallel, torch.device("cpu"))
        model.attention = "sdpa"  # a GPU keeps no probabilities
        optimizer, live = build_optimizer(model, run.optim), LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.watch(tensor)
        shape = (run.data.micro_batch_size, run.data.sequence_length)
        steps = run.data.rows // ranks // run.data.micro_batch_size
        for _ in range(2):  # the first step creates the optimizer's state
            live.peak = 0
            with live:
                batches = [torch.randint(0, run.model.vocab_size, shape) for _ in range(steps)]
                for i, tokens in enumerate(batches):
                    set_last_micro_batch(model, i == steps - 1, run.parallel.strategy)
                    loss, sums = token_loss_sum(model(tokens, tokens), 1e-4)
                    loss.backward()
                    del loss, sums
                step_peak, live.peak = live.peak, 0
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad()
        parameters = sum(local_bytes(parameter) for parameter in model.parameters())
        moments = sum(
            local_bytes(value) for state in optimizer.state.values() for value in state.values()
        )
        return {
            "parameters": parameters,
            "moments": moments,
            "peak": step_peak,
            "update": live.peak,
        }


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "ddp"])
def test_bytes_of_parameters_and_optimizer_state(strategy, ranks):
    model = replace(SMALL, tie_word_embeddings=ranks == 2, qk_norm=strategy == "ddp")
    parallel = ParallelConfig(strategy=strategy, dtype="bfloat16", compile=False)
    measured = measure(small_run(parallel, 1, ranks, model, rows=1, length=16), ranks)
    assert sharded_bytes(model, strategy, ranks) == pytest.approx(measured["parameters"], rel=0.01)
    assert optimizer_state_bytes(model, strategy, ranks) == pytest.approx(
        measured["moments"], rel=0.01
    )
    if strategy == "ddp" or ranks == 1:
        assert sharded_bytes(model, strategy, ranks) == 4 * model.num_parameters


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_bytes_of_muon(strategy, ranks):
    parallel = ParallelConfig(strategy=strategy, dtype="float32", compile=False)
    # The fake group refuses empty messages, so each rank needs every shape.
    model = replace(SMALL, num_hidden_layers=4)
    small = small_run(parallel, 1, ranks, model, rows=1, length=16)
    run = replace(small, optim=OptimConfig(name="muon"))
    measured, estimate = measure(run, ranks), memory(run, ranks)
    assert optimizer_state_bytes(model, strategy, ranks, run.optim) == pytest.approx(
        measured["moments"], rel=0.01
    )
    assert 1 <= (estimate.totals["optimizer step"] - CONTEXT) / measured["update"] <= 1.2


@pytest.mark.parametrize(
    ("strategy", "checkpointing", "dtype", "micro_batches"),
    [
        ("zero2", "none", "bfloat16", 1),
        ("zero2", "selective", "bfloat16", 1),
        ("zero2", "full", "bfloat16", 1),
        ("zero2", "none", "bfloat16", 3),
        ("zero2", "none", "float32", 1),
        ("zero3", "none", "bfloat16", 1),
        ("zero3", "full", "bfloat16", 2),
        ("ddp", "selective", "float32", 2),
    ],
)
def test_peak_of_an_eager_step(strategy, checkpointing, dtype, micro_batches, monkeypatch):
    monkeypatch.setattr(memory_model, "CONTEXT", 0)
    monkeypatch.setattr(memory_model, "LOGITS_CHUNK", 256)  # the CPU's backend
    monkeypatch.setattr("models.losses.MAX_KEPT_LOGITS", 0)  # a GPU never keeps logits
    parallel = ParallelConfig(
        strategy=strategy, activation_checkpointing=checkpointing, dtype=dtype, compile=False
    )
    run = small_run(parallel, micro_batches, 2)
    measured, estimate = measure(run, 2), memory(run, 2)
    assert 0.99 <= estimate.total / measured["peak"] <= 1.12
    assert estimate.totals["optimizer step"] == pytest.approx(measured["update"], rel=0.02)


def saved_bytes(
    model: ModelConfig, checkpointing: str, dtype: torch.dtype, backend: str | None
) -> float:
    """Return bytes per token that autograd saves for one block's backward pass.

    Parameters and rotary tables are not counted.
    """
    tokens, network = 2 * model.max_position_embeddings, NanoLlama(model, seed=0)
    block = network.layers[0]
    if checkpointing != "none":
        keep = (
            {"context_fn": partial(create_selective_checkpoint_contexts, _keep_matmuls)}
            if checkpointing == "selective"
            else {}
        )
        block = checkpoint_wrapper(block, **keep)
    if backend:
        torch._dynamo.reset()
        block.compile(fullgraph=True, backend=backend)
    block.to(dtype)
    cos, sin = network.rotary(model.max_position_embeddings)
    given = (*block.parameters(), *block.buffers(), cos, sin)
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    keys = None
    if model.moe.router == "noisy_top_k":
        keys = torch.arange(tokens).view(2, -1)
    saved: dict[int, torch.Tensor] = {}

    def keep_sight(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(
        2, model.max_position_embeddings, model.hidden_size, dtype=dtype, requires_grad=True
    )
    with torch.autograd.graph.saved_tensors_hooks(keep_sight, lambda tensor: tensor):
        block(x * 1, cos, sin, None, keys)  # not a leaf, as between blocks
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "backend", "qk_norm"),
    [
        (
            "none",
            torch.bfloat16,
            "aot_eager",
            False,
        ),  # the graphs and the partition that inductor gets on a GPU
        ("none", torch.bfloat16, "aot_eager", True),
        ("none", torch.float32, "aot_eager", False),
        ("selective", torch.bfloat16, "aot_eager", False),
        ("selective", torch.bfloat16, "aot_eager", True),
        ("full", torch.bfloat16, "aot_eager", False),
        ("none", torch.bfloat16, None, False),
        ("none", torch.bfloat16, None, True),
        ("none", torch.float32, None, True),
        ("full", torch.bfloat16, None, False),
    ],
)
def test_bytes_of_activations(checkpointing, dtype, backend, qk_norm):
    model = replace(SMALL, qk_norm=qk_norm)
    estimate = activation_bytes(model, checkpointing, dtype.itemsize, compiled=backend is not None)
    assert saved_bytes(model, checkpointing, dtype, backend) == pytest.approx(
        estimate, rel=0.04 if checkpointing == "full" else 0.001
    )


def test_the_1b_model_by_hand():
    model = ModelConfig()
    assert activation_bytes(model, "none") == 6 * 4096 + 2 * 512 + 3 * 11_264 + 136 == 59_528
    assert activation_bytes(model, "selective") == 4 * 4096 + 2 * 512 + 2 * 11_264 + 128
    assert activation_bytes(model, "full") == 4096
    assert sharded_bytes(model, "zero2", 2) == 2 * model.num_parameters
    assert optimizer_state_bytes(model, "ddp", 2) == 8 * model.num_parameters + 4 * (22 * 9 + 3)
    hidden = 22 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 5632)
    muon = optimizer_state_bytes(model, "ddp", 2, OptimConfig(name="muon"))
    assert muon == 8 * model.num_parameters - 4 * hidden + 4 * (22 * 2 + 3)


@pytest.fixture
def plan_1b(monkeypatch) -> Plan:
    monkeypatch.chdir(ROOT)
    return load_plan("configs/plan_1b.yaml")


def test_plan_1b_on_two_h100(plan_1b):
    report = forecast(plan_1b, "h100", mfu=0.4, price=2.5)
    check(report)
    assert (
        report["gpus"] == 2
        and report["total"]["steps"] == 230_000
        and report["total"]["tokens"] == 230_000 * 131_072
    )
    first, ramp, long, gold = report["phases"]
    assert [(phase["begin"], phase["end"]) for phase in report["phases"]] == [
        (0, 184_000),
        (184_000, 194_000),
        (194_000, 207_000),
        (207_000, 230_000),
    ]
    assert first["lr"] == [1e-3 / 2000, 1e-3] and gold["lr"] == [1e-3 * (1 - 1 / 23_000), 0.0]
    assert ramp["rope_theta"] == [10_000, 500_000] and long["rope_theta"] == [500_000, 500_000]
    assert sum(report["sources"].values()) == pytest.approx(report["total"]["tokens"])
    assert report["sources"]["pg19"] == 23_000 * 131_072 / 2
    hours = 184_000 * 131_072 * flops_per_token(ModelConfig(), 4096) / (2 * 989e12 * 0.4) / 3600
    assert first["hours"] == pytest.approx(hours) and first["cost"] == pytest.approx(
        hours * 2 * 2.5
    )
    assert (
        long["flops_per_token"]["palm"] - long["flops_per_token"]["causal"]
        == 6 * 22 * 2048 * 16_384
    )
    counters = 26 * 4 * len(parameter_shapes(ModelConfig()))  # AdamW's steps
    # Phases and three stages.
    assert report["disk"]["checkpoints"] == (26 * 14 + 7 * 2) * 1_100_048_384 + counters
    # Tokens downloaded, not tokens read.
    assert report["disk"]["tokens"] == 2 * (26e9 + 1.8e9 + 8e9 + 3 * 1.1e9)
    text = forecast_text(report)
    for words in (
        "fineweb_edu: 24.12B tokens",
        "10,000 to 500,000",
        "not measured on a GPU",
        "arXiv:2404.10102",
        "assumed",
    ):
        assert words in text


@pytest.mark.parametrize("gpu", ["a100-40", "l40s", "rtx4090"])
def test_what_does_not_fit_is_refused_and_the_advice_fits(plan_1b, gpu):
    report = forecast(plan_1b, gpu)
    with pytest.raises(ValueError, match=r"needs 7.* GB per GPU, but a GPU has"):
        check(report)
    run = load("configs/phase1_pretrain.yaml")
    advice = suggest_fitting_settings(run, 2, GPUS[gpu])
    assert advice and all(
        option.split(" (")[0] in report["phases"][0]["problem"] for option in advice
    )
    for option in advice:
        settings = [word for word in option.split(" (")[0].split() if "=" in word]
        changed = load("configs/phase1_pretrain.yaml", settings)
        assert memory(changed, 2).total <= 0.92 * GPUS[gpu].memory
        # The next larger size does not fit.
        if len(settings) == 1 and "micro_batch_size" in settings[0]:
            doubled = load(
                "configs/phase1_pretrain.yaml",
                [f"data.micro_batch_size={2 * changed.data.micro_batch_size}"],
            )
            assert memory(doubled, 2).total > 0.92 * GPUS[gpu].memory


def test_nothing_fits_and_wrong_arguments(plan_1b):
    run = load(
        "configs/phase1_pretrain.yaml", ["model.hidden_size=8192", "model.num_hidden_layers=80"]
    )
    assert suggest_fitting_settings(run, 2, GPUS["rtx4090"]) == []
    for arguments, message in (
        ({"gpu": "h1000"}, "unknown --gpu h1000; did you mean h100[?] available: h100, h200"),
        ({"gpu": "h100", "gpus": 3}, "32 rows per step do not divide into micro-batches of"),
        ({"gpu": "h100", "mfu": 45.0}, "--mfu 45 must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            forecast(plan_1b, **arguments)


def test_epochs_of_a_store_over_phases(settings, text_store, tmp_path):
    values = {"first": 0.6, "second": 0.4}
    paths = []
    for phase, steps, more in (
        ("one", 100, {}),
        ("two", 2500, {"min_document_tokens": {"first": 2000}}),
    ):
        base = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
        base["model"]["vocab_size"] = 384
        data = {**base["data"], "store": str(text_store), "mix": values, **more}
        schedule = {"warmup_steps": 2, "total_steps": 2600, "decay_steps": 4}
        paths.append(tmp_path / f"{phase}.yaml")
        paths[-1].write_text(
            yaml.safe_dump(
                {**base, "data": data, "schedule": schedule, "phase": phase, "steps": steps}
            )
        )
    report = forecast(
        Plan("small", tuple(PlanPhase(str(path)) for path in paths)),
        "h100",
        training_tokens_of=readable_tokens,
    )
    so_far = dict.fromkeys(values, 0.0)
    for path, phase in zip(paths, report["phases"], strict=True):
        data = load(path).data
        shards = open_shards(data.store, data.mix, "train", 384, data.min_document_tokens)
        loader = PackedDataLoader(
            shards, data.mix, data.sequence_length, data.rows, data.micro_batch_size, 0
        )
        for name, epochs in loader.epochs(phase["steps"]).items():
            so_far[name] += epochs
            assert phase["sources"][name]["epochs"] == pytest.approx(epochs, rel=0.01)
            assert phase["sources"][name]["epochs_so_far"] == pytest.approx(so_far[name], rel=0.01)
    # Far below the range that the law was fitted on.
    assert report["phases"][0]["loss"] is None and "no forecast" in forecast_text(report)
    warned = {name for name, epochs in so_far.items() if epochs > 4}
    assert (
        warned
        and {
            name
            for name in values
            if any(f"two: {name} is read for" in text for text in report["warnings"])
        }
        == warned
    )
    (tmp_path / "two.yaml").write_text(
        (tmp_path / "two.yaml").read_text().replace("first: 2000", "first: 200000")
    )
    with pytest.raises(ValueError, match="two: first has no document of 200000 tokens or more"):
        forecast(
            Plan("small", tuple(PlanPhase(str(path)) for path in paths)),
            "h100",
            training_tokens_of=readable_tokens,
        )


def test_bytes_of_a_checkpoint(settings, tmp_path):
    shape = (
        "model={vocab_size: 384, hidden_size: 384, intermediate_size: 1024, "
        "num_hidden_layers: 4, num_attention_heads: 4, "
    )
    overrides = settings(
        shape + "num_key_value_heads: 2, max_position_embeddings: 64}",
        "validation.every=0",
        steps=1,
    )
    train_here(overrides)
    run = load(ROOT / "configs" / "test_mode.yaml", overrides)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(run)))
    estimate = forecast(Plan("small", (PlanPhase(str(path)),), ranks=1), "h100")["disk"][
        "checkpoint"
    ]
    files = [
        file for file in (tmp_path / "checkpoints" / "one" / "step_1").rglob("*") if file.is_file()
    ]
    assert estimate == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)


def test_the_law_of_the_loss():
    assert forecast_loss(70_000_000_000, 1.4e12)[0] == pytest.approx(
        1.8172 + 482.01 / 5928 + 2085.43 / 27_560, abs=0.003
    )
    # Chinchilla's budget; its authors and the newer fit find about 20 tokens/parameter optimal.
    flops = 5.76e23
    sizes = [int(10 ** (9 + i / 200)) for i in range(600)]
    best = min(sizes, key=lambda size: forecast_loss(size, flops / (6 * size))[0])
    assert 15 < flops / (6 * best) / best < 30
    loss, error = forecast_loss(1_100_048_384, 30e9)
    longer, narrower = forecast_loss(1_100_048_384, 3e12)
    assert longer < loss and 0.03 < narrower < error < 0.4 and math.exp(loss) < 13


def test_the_command():
    command = [
        sys.executable,
        "-m",
        "scripts.plan",
        "configs/plan_1b.yaml",
        "--gpu",
        "rtx4090",
        "--json",
    ]
    done = forked.run(command)
    report = json.loads(done.stdout)
    assert done.returncode == 2 and not report["fits"] and report["gpus"] == 2
    assert (
        done.stderr.startswith("error: phase1_pretrain needs")
        and "data.micro_batch_size=" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", ["--max_tokens 2e9", "--max-tokens 2e9", "--max_tokens=2e9"])
def test_the_limit_of_a_download_is_read_in_any_spelling(limit):
    command = f"python -m scripts.download_data --dataset pg19 fineweb_edu {limit}"
    assert _downloaded(command) == {"pg19": 2e9, "fineweb_edu": 2e9}
