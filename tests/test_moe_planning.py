"""Experts in FLOPs, parameter counts, memory, forecasts, logs, charts and configs."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from sinks import FakeTensorboard, FakeWandb
from test_plan import SMALL, measure, saved_bytes, small_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from evals.report import charts, model_card, trained
from evals.report.page import _routing
from evals.report.runs import open_runs, plot, plot_routing, table
from files import read_lines
from models.kinds import build_model, parameters_text
from models.moe import MoE, MoEConfig
from models.nanollama import ModelConfig
from models.speedrun_config import GPTConfig
from scripts import live_plot
from scripts.write_bin import write_bin_store
from training.config import load
from training.fsdp_utils import ParallelConfig
from training.logger import Log, LogConfig
from training.meter import flops_per_token
from training.optimizers import OptimConfig
from training.planning import memory as memory_model
from training.planning.cards import GPUS
from training.planning.cost import forecast, forecast_loss
from training.planning.forecast_text import forecast_text
from training.planning.memory import (
    CONTEXT,
    activation_bytes,
    memory,
    optimizer_state_bytes,
    sharded_bytes,
)
from training.planning.plan import load_plan
from training.routing import PATIENCE, Routing
from training.settings import load_settings
from training.speedrun import SpeedrunRun

EXPERTS = MoEConfig(experts=5, top_k=2, expert_size=200)
MIXTURE = replace(SMALL, kind="moe", moe=EXPERTS)
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NOISY = MoEConfig(experts=4, top_k=2, expert_size=48, router="noisy_top_k", shared_size=16)


@pytest.fixture(autouse=True)
def _groups_as_on_a_gpu(monkeypatch):
    """The planner counts the memory of GPUs, where groups are not padded."""
    monkeypatch.setattr("models.moe.needs_aligned_groups", lambda x, counts: False)


# parameters and FLOPs


def test_parameters_and_flops_by_hand():
    d, ff, head_dim, vocab, length = 2048, 5632, 64, 32_000, 4096
    attention = 2 * d * head_dim * (32 + 4)
    expert, router = 3 * d * ff // 2, 8 * d
    total = 22 * (attention + 8 * expert + router + 2 * d) + d + 2 * vocab * d
    config = ModelConfig(kind="moe", moe=MoEConfig(experts=8, top_k=2))
    assert config.num_parameters == total == 3_384_207_360
    assert config.num_active_parameters == total - 22 * 6 * expert == 1_100_408_832
    matmul = 22 * (attention + 2 * expert + router) + vocab * d
    assert flops_per_token(config, length) == 6 * matmul + 12 * 22 * d * length
    assert parameters_text(config) == "3,384,207,360 parameters (1,100,408,832 active)"
    assert parameters_text(ModelConfig()) == "1,100,048,384 parameters"
    text = "(1,100.4M active: 2 of 8 experts per token, each of width 2,816, as in Mixtral)"
    assert model_card._active(config).strip() == text and not model_card._active(ModelConfig())
    assert "as in Qwen3 MoE" in model_card._active(replace(config, qk_norm=True))
    biased = replace(config, moe=replace(config.moe, balance="bias"))
    assert "that only NanoLlama reads" in model_card._active(biased)


def multiplications(config, length: int = 32) -> int:
    """FLOPs of matrix products, without attention, of a training step of 2 rows."""

    def forward(x, weight, *_, out_shape):
        return 2 * x[0] * weight[1] * weight[2]

    def backward(grad, x, weight, *_, out_shape):
        return 2 * forward(x, weight, out_shape=None)

    ours = torch.ops.nanollama
    formulas = {ours.grouped_linear: forward, ours.grouped_linear_backward: backward}
    model = build_model(config, seed=0)
    tokens = torch.randint(0, config.vocab_size, (2, length))
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(tokens, tokens)[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.mm, *formulas)
    assert config.kind == "dense" or all(counts[kind] > 0 for kind in kinds)
    return sum(counts.get(kind, 0) for kind in kinds)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("family", ["nanollama", "gpt"])
def test_flops_equal_those_that_torch_counts(family, kind):
    moe = {"kind": "moe", "moe": NOISY} if kind == "moe" else {}
    config = ModelConfig(**TINY, intermediate_size=80, num_key_value_heads=1, **moe)
    if family == "gpt":
        config = GPTConfig(**TINY, biases=False, **moe)
    length = 32
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    expected = 2 * length * (flops_per_token(config, length) - attention)
    assert multiplications(config, length) == expected
    trained_numbers = sum(p.numel() for p in build_model(config, seed=0).parameters())
    assert config.num_parameters == trained_numbers


# memory


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "backend", "moe"),
    [
        ("none", torch.bfloat16, "aot_eager", replace(EXPERTS, router="noisy_top_k")),
        ("selective", torch.bfloat16, "aot_eager", replace(EXPERTS, shared_size=88)),
        ("none", torch.bfloat16, None, replace(EXPERTS, balance="bias", shared_size=88)),
        ("none", torch.float32, None, EXPERTS),
        ("full", torch.bfloat16, None, EXPERTS),
    ],
)
def test_bytes_of_activations(checkpointing, dtype, backend, moe):
    model = replace(MIXTURE, moe=moe)
    estimate = activation_bytes(model, checkpointing, dtype.itemsize, compiled=backend is not None)
    # The casts of the router's weight are counted here, but do not grow with the tokens.
    assert saved_bytes(model, checkpointing, dtype, backend) == pytest.approx(estimate, rel=0.002)


@pytest.mark.parametrize(
    ("checkpointing", "micro_batches"), [("none", 1), ("selective", 1), ("full", 2)]
)
def test_peak_of_a_step(checkpointing, micro_batches, monkeypatch):
    monkeypatch.setattr(memory_model, "CONTEXT", 0)
    monkeypatch.setattr(memory_model, "LOGITS_CHUNK", 256)
    monkeypatch.setattr("models.losses.MAX_KEPT_LOGITS", 0)
    base = small_run(eager("zero2", checkpointing), micro_batches, 2, MIXTURE)
    measured, estimate = measure(base, 2), memory(base, 2)
    assert 0.99 <= estimate.total / measured["peak"] <= 1.18
    assert estimate.totals["optimizer step"] == pytest.approx(measured["update"], rel=0.02)
    assert sharded_bytes(MIXTURE, "zero2", 2) == pytest.approx(measured["parameters"], rel=0.01)
    assert optimizer_state_bytes(MIXTURE, "zero2", 2) == pytest.approx(
        measured["moments"], rel=0.01
    )


def eager(strategy: str = "zero2", checkpointing: str = "none", **more) -> ParallelConfig:
    """Settings of a run in bfloat16 that does not compile."""
    options = {"dtype": "bfloat16", "compile": False, **more}
    return ParallelConfig(strategy=strategy, activation_checkpointing=checkpointing, **options)


def test_bytes_of_muon_with_stacked_matrices():
    optim = OptimConfig(name="muon", normuon_beta2=0.9)
    # The fake group refuses empty messages, so each rank needs every shape.
    model = replace(MIXTURE, num_hidden_layers=4)
    small = small_run(eager(dtype="float32"), 1, 2, model, rows=1, length=16)
    run = replace(small, optim=optim)
    measured, estimate = measure(run, 2), memory(run, 2)
    assert optimizer_state_bytes(model, "zero2", 2, optim) == pytest.approx(
        measured["moments"], rel=0.01
    )
    assert 1 <= (estimate.totals["optimizer step"] - CONTEXT) / measured["update"] <= 1.2


def test_expert_parallelism_gathers_no_experts():
    weights = 3 * SMALL.num_hidden_layers * SMALL.hidden_size * 200 * 6  # of 6 experts
    model = replace(MIXTURE, moe=replace(EXPERTS, experts=6))
    whole, divided = (
        memory(small_run(eager(experts=ranks), 1, 2, model), 2).parts for ranks in (1, 2)
    )
    assert whole["fp32 masters"] == divided["fp32 masters"]
    assert whole["gathered"] - divided["gathered"] == 2 * weights / 2


# forecasts and configs


def test_the_header_of_the_1b_active_config_states_the_forecast(monkeypatch):
    monkeypatch.chdir(ROOT)
    report = forecast(load_plan("configs/moe/plan_1b_active.yaml"), "h100", gpus=2)
    [phase] = report["phases"]
    assert report["fits"] and phase["memory"]["total"] < 0.8 * GPUS["h100"].memory
    header = (ROOT / "configs/moe/1b_active.yaml").read_text(encoding="utf-8")
    for figure in (
        f"{report['parameters']:,} parameters, {report['active_parameters']:,} active",
        f"{phase['memory']['total'] / 1e9:.1f} GB",
        f"{report['total']['hours']:.0f} hours",
        f"{report['disk']['checkpoint'] / 1e9:.0f} GB",
    ):
        assert figure in header, figure
    # The law of dense models gets the active parameters.
    assert phase["loss"]["nats_per_token"] == forecast_loss(1_100_408_832, 184_000 * 131_072)[0]
    text = forecast_text(report)
    assert "3,384,207,360 parameters (1,100,408,832 active), 184,000 steps" in text
    assert max(map(len, text.splitlines())) < 200


def test_each_config_has_the_active_parameters_of_its_dense_model():
    speedrun = ("06_relu2", "configs/moe/speedrun_muon.yaml")
    pairs = [
        (load(ROOT / "configs/quickstart/base.yaml"), load(ROOT / "configs/moe/miniature.yaml")),
        (load(ROOT / "configs/phase1_pretrain.yaml"), load(ROOT / "configs/moe/1b_active.yaml")),
        (
            load_settings(SpeedrunRun, ROOT / "configs/speedrun" / f"{speedrun[0]}.yaml"),
            load_settings(SpeedrunRun, ROOT / speedrun[1]),
        ),
    ]
    for dense, mixture in pairs:
        moe, model = mixture.model.moe, mixture.model
        routers = model.num_hidden_layers * moe.router_parameters(model.hidden_size)
        biases = 0
        if isinstance(model, GPTConfig) and dense.model.biases:
            biases = 5 * model.num_hidden_layers * model.hidden_size
        assert model.num_active_parameters == dense.model.num_parameters + routers - biases
        assert dense.run != mixture.run
    upcycled = load(ROOT / "configs/moe/upcycled.yaml")
    assert upcycled.model.expert_size == upcycled.model.intermediate_size
    default = load_settings(
        SpeedrunRun, ROOT / "configs/speedrun/current.yaml", ["model.kind=moe"], {"run": "muon"}
    )
    assert default.model.num_active_parameters < default.model.num_parameters


@pytest.fixture(scope="module")
def speedrun(text_store, tmp_path_factory):
    """Folder of a short run of configs/moe/speedrun_muon.yaml with a small model, profiled."""
    folder = tmp_path_factory.mktemp("muon")
    write_bin_store(text_store, folder, "text")
    sizes = "vocab_size=384 hidden_size=32 num_hidden_layers=2 num_attention_heads=2"
    command = ["--config", str(ROOT / "configs/moe/speedrun_muon.yaml"), "--steps", "8"]
    command += ["--name", "muon", "--profile"]
    command += [f"model.{size}" for size in sizes.split()]
    command += ["model.max_position_embeddings=32", "data.sequence_length=32", "data.bos_token=0"]
    command += ["data.tokens_per_step=128", "data.micro_batch_size=4", "validation.tokens=256"]
    command += [f"data.train={folder}/*train*.bin", f"data.val={folder}/*val*.bin"]
    command += ["schedule={warmup_steps: 1, total_steps: 8, decay_steps: 4}", "validation.every=4"]
    command += [f"output_dir={folder}/checkpoints", f"log_dir={folder}/logs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt.py", *command])
        with pytest.raises(SystemExit) as end:
            train_gpt.main()
    assert not end.value.code
    return folder / "logs" / "muon" if (folder / "logs" / "muon").is_dir() else folder / "logs"


def test_the_commands_of_the_speedrun_with_experts(speedrun, capsys):
    rows = read_lines(speedrun / "metrics.jsonl")
    for row in rows:
        assert np.array(row["expert_load"]).shape == (2, 8) and row["dropped_tokens"] == 0
        assert np.sum(row["expert_load"], 1) == pytest.approx(8, abs=0.01)
    assert list(speedrun.rglob("*trace*"))
    live_plot.follow(speedrun, 5.0, browser=False)
    assert (speedrun / "live.png").stat().st_size > 5_000


# logs and charts


def a_row(step: int, load: list[list[float]]) -> dict:
    row = {"step": step, "phase": "p", "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "end": 9}
    row |= {"tokens_per_s": 9.0, "tokens": 10 * step, "step_s": 0.1, "expert_load": load}
    return row | {"max_violation": max(map(max, load)) - 1, "router_entropy": 1.0}


def test_an_expert_that_starves_is_named_once(tmp_path, capsys):
    layers = [MoE(replace(NOISY, router="top_k"), 8, 8, "swiglu", i) for i in range(2)]
    log = Log(tmp_path, LogConfig(), True, {"run": "r", "phase": "p"})
    routing = Routing(nn.ModuleList(layers), log)
    equal, starved = [100] * 4, [334, 333, 333, 2]  # 2 of 1,002: 0.8 % of an equal share
    for step in range(2 * PATIENCE):
        rests = step == 50  # one step with tokens begins the count again
        loads = torch.tensor([equal, equal if rests else starved])
        metrics = routing.after_step(step, loads)
        events = read_lines(tmp_path / "events.jsonl")
        assert len(events) == (step >= 50 + PATIENCE), step
    assert metrics["max_violation"] == pytest.approx(4 * 334 / 1002 / 2 - 0.5)
    [event] = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["layer"], event["expert"]) == ("starved", 1, 3)
    assert event["step"] == 50 + PATIENCE and "expert 3 of layer 1" in capsys.readouterr().out


def test_sinks_get_numbers_and_the_log_gets_the_lists(tmp_path, monkeypatch):
    wandb, board = FakeWandb(), FakeTensorboard()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with Log(tmp_path, LogConfig(every=1, wandb_project="p", tensorboard=True), True, {}) as log:
        log.open(0, 9, "p")
        log.metrics(a_row(1, [[0.5, 1.5], [0.2, 1.8]]))
    for name, value in (("experts/load_min", 0.2), ("experts/load_max", 1.8)):
        assert wandb.series(name) == board.scalars[name] == [(1, value)]
    assert not any("expert_load" in name for name in wandb.points[0])
    [row] = read_lines(tmp_path / "metrics.jsonl")
    assert row["expert_load"] == [[0.5, 1.5], [0.2, 1.8]]


def test_charts_of_a_run_with_experts(tmp_path):
    steps = range(1, 241)
    loads = [[[1.0, 1.0, 1.0, 1.0], [4.0 * (s > 120), 0.0, 0.0, 4.0 * (s <= 120)]] for s in steps]
    rows = [a_row(step, load) for step, load in zip(steps, loads, strict=True)]
    event = {"event": "starved", "step": 200, "text": "expert 1 <b> of layer 1"}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    [run] = open_runs([tmp_path])
    assert "240" in table([run])
    plot([run], tmp_path / "loss.png")
    plot_routing([run], tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 5_000
    history = trained.curves(run.rows, run.events)
    routing = history["routing"]
    assert np.array(routing["load"]).shape == (120, 2, 4) and routing["steps"][-1] == 240
    assert np.mean(routing["load"], 0)[1] == pytest.approx([2, 0, 0, 2])
    assert history["incidents"] == {"starved": 1}
    html = _routing({"training": {**history, "tuning": []}})
    # Layer 0 has one colour, that of an equal share; layer 1 has those of none and of 4 shares.
    first, second = re.findall(r"<svg[^>]*shape-rendering.*?</svg>", html)
    colour = {level: charts._load_colour(level) for level in (-8, 0, 8)}
    assert colour[0] in first and first.count("<path") == 1
    assert all(colour[level] in second for level in (-8, 8)) and second.count("<path") == 2
    assert "#" not in re.sub(r"&#\w+;", "", html)  # colours follow the page's light or dark theme
    assert "expert 1 &lt;b&gt; of layer 1" in html and html.count("<polyline") == 2
    dense = [{name: row[name] for name in ("step", "phase", "loss", "tokens")} for row in rows]
    assert trained.curves(dense, [])["routing"] is None


@pytest.mark.parametrize(
    ("load", "level"), [(0.0, -8), (0.25, -8), (0.5, -4), (1.0, 0), (2.0, 4), (9.0, 8)]
)
def test_levels_of_a_load_are_powers_of_two_around_an_equal_share(load, level):
    assert charts.load_level(load) == level
