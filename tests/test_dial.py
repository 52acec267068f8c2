"""The dial: bounds of a step, chosen plans that load and fit, monotone choices, refusals."""

import math
import re
import shlex
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import ROOT
from test_plan_commands import lost_milestones
from torch.utils.flop_counter import FlopCounterMode

from data.corpus.sources import HUB_SOURCES
from data.pipeline.recipe import Recipe
from evals.cost import command_tokens
from models.losses import token_loss_sum
from models.nanollama import ModelConfig, NanoLlama
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.config import DataConfig, RunConfig, load
from training.fsdp_utils import ParallelConfig
from training.meter import PEAK_FLOPS, flops_per_token
from training.optimizers import OptimConfig
from training.planning.cards import GPUS, PUBLISHED
from training.planning.cost import check, forecast
from training.planning.cpu_plan import (
    COMMANDS,
    CORPUS,
    QUICKSTART,
    choose_cpu,
    cpu_files,
    mixes,
    stage_names,
)
from training.planning.dial import Request, choose, size_text
from training.planning.dial_data import GOALS
from training.planning.dial_fit import shapes
from training.planning.dial_text import cpu_text, gpu_text
from training.planning.memory import TIGHT, memory
from training.planning.plan import load_plan, scheduled_phases
from training.planning.plan_files import check_name, config_headers, gpu_files, write_plan
from training.planning.probe import Probe, measure
from training.planning.progress import command_count
from training.planning.roofline import efficiency, published_bound, step_bound
from training.settings import load_settings

H100 = GPUS["h100"]
HOURS = {"laptop8": 1, "rtx3060": 24, "rtx4090": 48, "h100": 200, "b200": 1000}
IDLE = Probe(7_000, 2048 / 7_000, 60, 0.15, 4e11, 2e10, 2)


def small_run(level: str = "none", **changes) -> RunConfig:
    """Micro-batches of 4 rows of 64 tokens; no two widths are equal."""
    shape = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 64} | changes
    data = DataConfig(sequence_length=64, tokens_per_step=1024, micro_batch_size=4)
    parallel = ParallelConfig(activation_checkpointing=level)
    return RunConfig(model=ModelConfig(**shape), data=data, parallel=parallel)


@pytest.mark.parametrize(
    "run",
    [
        small_run(),
        small_run(qk_norm=True, tie_word_embeddings=True),
        load(ROOT / "configs/phase1_pretrain.yaml"),
        load(ROOT / "configs/phase2_16k.yaml"),
        load(ROOT / "configs/moe/1b_active.yaml"),
    ],
    ids=["small", "tied", "1b", "16k", "moe"],
)
def test_flops_of_the_operations_are_those_of_the_meter(run):
    operations = step_bound(run, 2, H100).operations
    masked = next(op for op in operations if op.name == "attention")
    total = sum(op.flops for op in operations) + masked.flops  # the meter ignores the mask
    expected = flops_per_token(run.model, run.data.sequence_length) * run.data.tokens_per_step / 2
    assert total == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("level", ["none", "full"])
def test_flops_of_the_products_are_those_that_torch_counts(level):
    """torch counts the products of a real step; "full" runs blocks again, but not the down one."""
    run = small_run(level)
    model = NanoLlama(run.model)
    model.attention = "sdpa"
    rows = torch.randint(run.model.vocab_size, (run.data.rows, 65))
    with FlopCounterMode(display=False) as counter:
        loss, _ = token_loss_sum(model(rows[:, :-1], rows[:, 1:]), 1e-4)
        loss.backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    operations = step_bound(run, 1, H100).operations
    expected = {op.name: op.flops for op in operations if op.name != "attention"}
    assert sum(expected.values()) == pytest.approx(counted)
    extra = sum(op.extra_flops for op in operations if op.name != "attention")
    repeated = expected["attention projections"] + expected["MLP, gate and up"]
    assert extra == pytest.approx(repeated / 3 if level == "full" else 0)


def test_bytes_and_seconds_by_hand():
    run = small_run()
    ops = {op.name: op for op in step_bound(run, 1, H100).operations}
    # 4 micro-batches of 256 tokens, bf16; three products read both factors and write the result.
    down = 2 * 3 * 3 * (1024 * (160 + 96) + 4 * 160 * 96)
    assert ops["MLP, down"].bytes == down
    attention = 2 * 1024 * 3 * 6 * (4 * 16 + 2 * 16)
    assert ops["attention"].bytes == attention
    parameters = run.model.num_parameters
    assert ops["optimizer"].bytes == parameters * (7 * 4 + 12 + 4 + 2)
    assert ops["MLP, down"].seconds(H100) == max(6 * 1024 * 3 * 160 * 96 / 989e12, down / 3.35e12)
    doubled = replace(run, data=replace(run.data, micro_batch_size=8))
    assert step_bound(doubled, 1, H100).seconds < step_bound(run, 1, H100).seconds


def test_collectives_over_the_link():
    run = load(ROOT / "configs/phase1_pretrain.yaml")
    size = run.model.num_parameters
    sent = {}
    for strategy in ("zero2", "zero3", "ddp"):
        changed = replace(run, parallel=replace(run.parallel, strategy=strategy))
        operations = step_bound(changed, 2, H100).operations
        sent[strategy] = sum(op.sent for op in operations)
    assert sent == {
        "zero2": size / 2 * (2 + 4),
        "zero3": size / 2 * (2 * 2 * 1 + 4),  # one micro-batch: in forward and in backward
        "ddp": size / 2 * 8,
    }
    slow = H100._replace(link=1e9)
    assert step_bound(run, 2, slow).seconds > 3.3 > step_bound(run, 2, H100).seconds
    assert not any(op.sent for op in step_bound(run, 1, H100).operations)
    muon = replace(run, optim=OptimConfig(name="muon"))
    assert step_bound(muon, 2, H100).seconds > step_bound(run, 2, H100).seconds


def test_no_published_run_is_faster_than_its_bound():
    for row in PUBLISHED:
        assert published_bound(row) > 1.5 * row.tokens_per_s, row.name
    factors = efficiency()
    assert 1.5 < factors.low < 1.7 < factors.factor < 2.5 < factors.high < 3.5


def test_cards_agree_with_the_meter_and_have_sources():
    for name, gpu in GPUS.items():
        assert "vendor datasheet: NVIDIA" in gpu.source and gpu.capability >= 8.0
        assert 1e10 < gpu.link < gpu.bandwidth < gpu.flops and gpu.over in ("NVLink", "PCIe")
        for key in ("H100", "H200", "A100", "B200"):
            if name.startswith(key.lower()):
                assert gpu.flops == PEAK_FLOPS[key]


CASES = [(gpu, 1, goal, HOURS.get(gpu, 48)) for gpu in GPUS for goal in GOALS]
CASES += [("rtx4090", 4, "chat", 10), ("h100", 3, "code", 30), ("a100-40", 8, "base", 168)]
CASES += [("rtx4090", 1, "base", 0.5), ("l4", 1, "code", 500), ("b200", 8, "chat", 5000)]


@pytest.mark.parametrize(("gpu", "gpus", "goal", "hours"), CASES)
def test_a_chosen_plan_loads_fits_and_ends_in_time(gpu, gpus, goal, hours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = choose(Request(gpu, gpus, hours, goal))
    files = gpu_files(choice, "mine")
    write_plan(Path("configs/mine"), files, config_headers("mine", files, "about"))
    plan = load_plan("configs/mine/plan.yaml")
    phases = scheduled_phases(plan)
    report = forecast(plan, gpu, gpus, price=1.0, evaluation_tokens_of=command_tokens)
    check(report)
    assert lost_milestones(phases) == []
    assert plan.ranks == gpus and phases[-1].run.schedule.total_steps == phases[-1].end
    for phase, described in zip(phases, report["phases"], strict=True):
        need = memory(phase.run, gpus)
        assert need.total == described["memory"]["total"] <= TIGHT * GPUS[gpu].memory
        assert set(phase.run.data.mix) <= set(HUB_SOURCES)
    model = phases[0].run.model
    assert model.hidden_size % 128 == 0 and model.head_dim in (64, 128)
    assert model.hidden_size == model.num_attention_heads * model.head_dim
    tuning = sum(choice.tuning_tokens.values()) * choice.fit.seconds_per_token / 3600
    total = report["total"]["hours"] + tuning + report["evaluations_total"]["hours"]
    assert report["total"]["tokens"] == choice.tokens and 0.7 * total < total <= hours
    if "takes fewer hours" not in "".join(choice.notes):
        assert total > 0.8 * hours and choice.tokens >= 19.9 * model.num_parameters
    assert bool(plan.stages) == (goal == "chat") == Path("configs/mine/sft.yaml").exists()
    for stage, kind in (("sft", SFTConfig), ("dpo", PreferenceRun)) if plan.stages else ():
        run = load_settings(kind, f"configs/mine/{stage}.yaml")
        assert run.run == "mine" and run.data.rows % (gpus * run.data.micro_batch_size) == 0
    recipe = load_settings(Recipe, "configs/mine/data.yaml")
    assert set(recipe.sources) == set(report["sources"])
    assert recipe.store == phases[0].run.data.store
    text = gpu_text(choice, report, 1.0)
    for words in (size_text(choice.tokens), "lower bound", "money", "nats per token"):
        assert words in text


def test_more_hours_never_mean_fewer_tokens_or_a_smaller_model():
    for gpu, gpus, goal in (("rtx4090", 1, "base"), ("laptop8", 1, "chat")):
        grid = [1.3**i for i in range(24)]
        choices = [choose(Request(gpu, gpus, hours, goal)) for hours in grid]
        tokens = [choice.tokens for choice in choices]
        sizes = [choice.fit.run.model.num_parameters for choice in choices]
        steps = [choice.fit.run.data.tokens_per_step for choice in choices]
        # Tokens are whole steps, and a larger model may have larger steps.
        for index in range(1, len(grid)):
            assert tokens[index] > tokens[index - 1] - steps[index], (gpu, grid[index])
        assert sizes == sorted(sizes) and len(set(sizes)) > 10


def test_rates_and_batches_follow_the_step_law():
    """Values of arXiv:2503.04715 computed here: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 tokens."""
    choice = choose(Request("h100", 8, 100))
    model, batch = choice.fit.run.model, choice.fit.run.data.tokens_per_step
    blocks = model.num_parameters - 2 * 32_000 * model.hidden_size
    law = 1.79 * math.exp(-0.713 * math.log(blocks) + 0.307 * math.log(choice.tokens))
    assert choice.lr == pytest.approx(law) and 5e-4 < choice.lr < 2e-3
    best = 0.58 * math.exp(0.571 * math.log(20 * model.num_parameters))
    assert best / 1.42 < batch < best * 1.42 and batch % (8 * 4096) == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request("gtx1080", 1, 48),
            "unknown --gpu gtx1080; available: h100, .*, and cpu. For another card, give one of",
        ),
        (Request("4090", 1, 48), "unknown --gpu 4090; did you mean rtx4090[?]"),
        (Request("rtx4090", 9, 48), "--gpus 9 must be 1 to 8"),
        (Request("rtx4090", 1, 48, "speech"), "unknown --goal speech; available: chat, base"),
        (Request("rtx4090", 1, 0.01), "--hours 0.01 is too few for any model .* use --hours"),
        (Request("rtx3060", 1, 48, parameters=7e9), "does not fit the memory .* is --params"),
        (Request("h100", 1, 48, parameters=1e3), "--params 1000 is outside .* use"),
        (Request("rtx4090", 1, 1, parameters=1e9), "less than 1 token .* use --hours"),
        (Request("rtx4090", 1, 10, tokens=1e11), "--tokens 1e[+]11 takes .* use --hours"),
        (Request("b200", 8, 5000, tokens=1e13), "more than 4 epochs of the data; use --tokens"),
        (Request("rtx4090", 1, 10, tokens=1e3), "less than 20 steps; use"),
    ],
)
def test_what_cannot_work_is_refused_and_the_offer_works(request_, message):
    with pytest.raises(ValueError, match=message) as error:
        choose(request_)
    text = str(error.value)
    assert "\n" not in text and len(text) < 330
    fields = {"hours": "hours", "params": "parameters", "tokens": "tokens"}
    for flag, value in re.findall(r"--(hours|params|tokens) ([\d.e+]+\d)", text):
        offered = replace(request_, **{fields[flag]: float(value)})
        if offered != request_:
            choose(offered)


def test_given_parameters_and_tokens():
    choice = choose(Request("rtx4090", 1, 100, parameters=1e9))
    assert 0.9e9 < choice.fit.run.model.num_parameters < 1.1e9
    assert "tokens per parameter are fewer than 20" in choice.notes[0]
    choice = choose(Request("rtx4090", 1, 100, tokens=4e9))
    assert 3.99e9 < choice.tokens <= 4e9
    assert 0.17e9 < choice.fit.run.model.num_parameters < 0.2e9
    sizes = [model.num_parameters for model in shapes()]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_a_folder_is_never_overwritten(tmp_path):
    folder = tmp_path / "mine"
    files = {"plan.yaml": {"name": "mine"}, "bad.yaml": {"x": object()}}
    with pytest.raises(yaml.YAMLError):
        write_plan(folder, files, dict.fromkeys(files, "about"))
    assert not folder.exists()
    write_plan(folder, {"plan.yaml": {"name": "mine"}}, {"plan.yaml": "about"})
    assert (folder / "plan.yaml").read_text() == "# about\n{name: mine}\n"
    with pytest.raises(ValueError, match="exists, and plans are never overwritten; use another"):
        write_plan(folder, {"plan.yaml": {"name": "other"}}, {"plan.yaml": "about"})
    assert "name: mine" in (folder / "plan.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for name in ("", "a b", "../x", "-x", "x;y"):
        with pytest.raises(ValueError, match="must have letters"):
            check_name(name)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("minutes", [5, 7, 30, 90])
def test_a_plan_for_the_cpu(goal, minutes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = choose_cpu(minutes, goal, IDLE, prepared=False)
    assert sum(choice.seconds.values()) == pytest.approx(60 * minutes, rel=0.02)
    files = cpu_files(choice, "mine")
    write_plan(Path("configs/mine"), files, config_headers("mine", files, "about"))
    plan = load_plan("configs/mine/plan.yaml")
    phases = scheduled_phases(plan)
    assert plan.name == "mine" and plan.ranks == 1 and lost_milestones(phases) == []
    assert {phase.run.phase: phase.run.steps for phase in phases}.items() <= choice.steps.items()
    assert phases[-1].end == phases[-1].run.schedule.total_steps
    assert phases[0].run.data.mix == mixes(goal)["base"] and set(CORPUS) >= set(mixes(goal)["gold"])
    stages = {"sft": SFTConfig, "dpo": PreferenceRun}
    assert [stage.name for stage in plan.stages] == (list(stages) if goal == "chat" else [])
    for stage in plan.stages:
        run = load_settings(stages[stage.name], f"configs/mine/{stage.name}.yaml")
        assert (run.run, run.steps) == ("mine", choice.steps[stage.name])
    assert len(plan.seconds) == command_count(plan)
    base = "corpus tokenizer shards base long_context gold suite gguf curve report"
    names = COMMANDS if goal == "chat" else base.split()
    seconds = dict(zip(names, plan.seconds, strict=True))
    for name in stage_names(goal):
        assert seconds[name] == round(choice.seconds[name], 1)
    assert sum(plan.seconds) == pytest.approx(60 * minutes, rel=0.3)
    if minutes == 5:
        for command in plan.before.values():
            check_command(command)
    shared = r"data/store/quickstart|configs/(data/)?quickstart|dataset quickstart"
    assert "quickstart" not in re.sub(shared, "", str(plan))
    assert "seconds: data 35" in cpu_text(choice, IDLE, 5_796_096, minutes)


@cache
def help_of(module: str) -> str:
    return forked.run([sys.executable, "-m", module, "--help"]).stdout


def check_command(command: str) -> None:
    """The module of a command knows its flags; its configs exist."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    for word in words[3:]:
        if word.startswith("--"):
            assert word in help_of(words[2]), command
        if word.endswith(".yaml"):
            assert Path(word).exists() or (ROOT / word).exists(), command


def test_refusals_of_the_cpu():
    with pytest.raises(ValueError, match=r"1 minutes are too few .* use --minutes") as error:
        choose_cpu(1, "chat", IDLE, prepared=False)
    least = float(str(error.value).split()[-1])
    assert sum(choose_cpu(least, "chat", IDLE, prepared=False).seconds.values()) <= 60 * least
    with pytest.raises(ValueError, match="16 epochs of the packaged text; use --minutes") as error:
        choose_cpu(10_000, "chat", IDLE, prepared=True)
    most = float(re.findall(r"--minutes (\d+)", str(error.value))[0])
    assert "epochs" in choose_cpu(most, "chat", IDLE, prepared=True).notes[0]


def test_a_slower_machine_and_a_prepared_store():
    fast = choose_cpu(10, "chat", IDLE, prepared=False)
    slow = choose_cpu(10, "chat", IDLE._replace(tokens_per_s=5_000), prepared=False)
    assert slow.tokens < 0.75 * fast.tokens and slow.seconds["data"] > fast.seconds["data"]
    prepared = choose_cpu(10, "chat", IDLE, prepared=True)
    assert prepared.tokens > fast.tokens and prepared.seconds["data"] == 0
    later = [choose_cpu(minutes, "chat", IDLE, True).tokens for minutes in range(4, 60)]
    assert later == sorted(later)


def test_the_probe_measures_real_steps():
    small = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1"]
    small += ["data.tokens_per_step=512", "data.micro_batch_size=1"]
    run = load(QUICKSTART / "base.yaml", small)
    probe = measure(run, seconds=0.01)
    assert probe.steps == 3 and probe.tokens_per_s == pytest.approx(512 / probe.step_s)
    assert probe.bound_s < probe.step_s and probe.flops > 1e9 and probe.bandwidth > 1e8


def test_the_command(tmp_path):
    start = [sys.executable, "-m", "scripts.new_plan", "--gpu"]
    command = [*start, "rtx4090", "--hours", "48", "--price", "0.4", "--name", "weekend"]
    done = forked.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "configs/weekend" in done.stdout and "at 0.4 per GPU hour" in done.stdout
    plan = (tmp_path / "configs/weekend/plan.yaml").read_text()
    runs = "# python -m scripts.pipeline --plan configs/weekend/plan.yaml\n# Written by"
    assert plan.startswith(runs)
    again = forked.run(command, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: configs/weekend exists")
    wrong = forked.run([*start, "cpu", "--minutes", "5", "--params", "1e6"], cwd=tmp_path)
    assert wrong.returncode == 2 and "error: --params has no effect with --gpu cpu" in wrong.stderr
    assert [path.name for path in (tmp_path / "configs").iterdir()] == ["weekend"]


def test_the_page_lists_the_cards_and_the_published_runs():
    page = (ROOT / "docs/new_plan.md").read_text(encoding="utf-8")
    for name, gpu in GPUS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        numbers = [f"{gpu.memory / 1e9:.1f}", f"{gpu.flops / 1e12:g}", f"{gpu.bandwidth / 1e9:g}"]
        for number in (*numbers, f"{gpu.link / 1e9:g}", f"{gpu.capability:.1f}"):
            assert f" {number} " in row, (name, number)
    for row in PUBLISHED:
        bound = published_bound(row)
        cells = [row.name, row.gpu, f"{row.sequence_length:,}", f"{row.tokens_per_s:,.0f}"]
        cells += [f"{bound:,.0f}", f"{bound / row.tokens_per_s:.2f}"]
        assert f"| {' | '.join(cells)} |" in page, row.name
    factors = efficiency()
    assert f"{factors.factor:.2f} ({factors.low:.2f} to {factors.high:.2f})" in page
