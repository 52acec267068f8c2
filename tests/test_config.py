"""Config parsing, learning-rate schedules and gates, including their boundaries."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from data.pipeline.recipe import Recipe
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.config import RunConfig, load, to_dict
from training.optimizers import OptimConfig
from training.planning.gates import Gate, decide, judge
from training.planning.plan import load_plan, scheduled_phases
from training.schedulers import ScheduleConfig, WSDScheduler
from training.settings import load_settings, read_yaml
from training.speedrun import SpeedrunRun


@pytest.mark.parametrize(
    ("kind", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - math.sqrt(0.5)), ("power", 0.25)],
    ids=["linear", "cosine", "1-sqrt", "power"],
)
def test_wsd_endpoints(kind, middle):
    schedule = WSDScheduler(
        ScheduleConfig(warmup_steps=10, total_steps=100, decay_steps=20, decay=kind, min_lr=1e-4),
        1e-2,
    )
    # Warm-up goes from peak / warmup_steps to the peak.
    assert schedule(0) == pytest.approx(1e-3) and schedule(9) == 1e-2
    assert all(schedule(step) == 1e-2 for step in range(9, 80))
    assert schedule(80) < 1e-2
    assert schedule(89) == pytest.approx(1e-4 + (1e-2 - 1e-4) * middle)
    assert schedule(99) == schedule(1000) == 1e-4
    decaying = [schedule(step) for step in range(79, 100)]
    assert decaying == sorted(decaying, reverse=True)


def test_wsd_without_warmup_or_decay_and_down_to_zero():
    assert {WSDScheduler(ScheduleConfig(0, 5, 0), 1.0)(step) for step in range(8)} == {1.0}
    assert WSDScheduler(ScheduleConfig(0, 5, 5, min_lr=0.0), 1.0)(4) == 0.0


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_power_decay_is_the_polynomial_of_torch(power):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=power)
    config = ScheduleConfig(0, 50, 20, "power", decay_power=power)
    schedule = WSDScheduler(config, 1e-2)
    for step in range(29, 50):  # the last stable update, then 20 of the decay
        assert schedule(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        reference.step()
    ours = WSDScheduler(optimizer, 0, 30, 20, decay="power", decay_power=power)
    assert ours.rates[0].config == replace(config, min_lr=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_steps": 60, "total_steps": 100, "decay_steps": 50},
            "do not fit into schedule.total_steps=100",
        ),
        ({"decay": "step"}, "not one of linear, cosine, 1-sqrt, power"),
        ({"decay_power": 3.0}, "schedule.decay_power=3 has no effect with schedule.decay=linear"),
        ({"decay": "power", "decay_power": 0.0}, "schedule.decay_power=0.* must be above 0"),
        ({"warmup_steps": -1}, "must not be negative"),
    ],
)
def test_impossible_schedules(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)


BASE = ROOT / "configs" / "base_1b.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr is not a setting; did you mean 'lr'?"),
        ("optimm.lr=1", "optimm is not a setting; did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr='fast' must be a finite number"),
        ("optim.lr=nan", "optim.lr='nan' must be a finite number"),
        ("optim.grad_clip=.inf", "optim.grad_clip=inf must be a finite number"),
        ("seed=-1", "seed=-1 must be at least 0 and below 2"),
        ("seed=99999999999999999999", "below 2"),
        ("steps=1.5", "steps=1.5 must be a whole number"),
        ("steps=true", "steps=True must be a whole number"),
        ("parallel.compile=3", "parallel.compile=3 must be true or false"),
        ("optim=3", "optim=3 must hold settings"),
        ("optim.lr.x=3", r"optim\.lr\.x is not a setting"),
        ("steps", "'steps' is not an override"),
        ("data.sequence_length=8192", "exceeds the model's context"),
        ("data.sequence_length=1000", "must be a multiple of data.sequence_length"),
        ("model.num_key_value_heads=5", "must be a multiple of"),
        ("parallel.strategy=zero1", "not one of zero2, zero3, ddp"),
        ("faults.lr_factor=0", r"faults.lr_factor=0 must be above 0"),
        ("run=a/b", "must be a plain folder name"),
        ("optim.lr=-1", "must be above 0"),
    ],
)
def test_wrong_settings_say_what_and_how(override, message):
    with pytest.raises(ValueError, match=message):
        load(BASE, [override])


def test_precedence_and_types(tmp_path):
    (tmp_path / "parent.yaml").write_text(
        "optim: {lr: 3e-4, beta2: 0.9}\ndata: {mix: {a: 1, b: 1}}\nsteps: 1e4\n"
    )
    (tmp_path / "child.yaml").write_text(
        "extends: parent.yaml\noptim: {lr: 1e-3}\ndata: {mix: {c: 2}}\n"
    )
    run = load(tmp_path / "child.yaml", ["optim.eps=1e-9", "log.wandb_project=x", "data.mix.d=1"])
    assert run.optim == OptimConfig(lr=1e-3, beta2=0.9, eps=1e-9)
    # A mixture replaces the parent's; the two are not merged.
    assert run.data.mix == {
        "c": 2.0,
        "d": 1.0,
    }
    assert run.steps == 10_000 and isinstance(run.steps, int) and run.log.wandb_project == "x"


def test_dotted_keys_set_one_setting_of_a_section(tmp_path):
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    written("parent.yaml", "chat: {sources: {a: {path: x, split: y}, b: {path: z}}}\n")
    child = "extends: parent.yaml\nchat.sources.a.path: new\noptim.lr: 1e-3\n"
    assert read_yaml(written("child.yaml", child)) == {
        "chat": {"sources": {"a": {"path": "new", "split": "y"}, "b": {"path": "z"}}},
        "optim": {"lr": "1e-3"},
    }
    aliases = "optim: &o {beta1: 0.8}\nother: *o\noptim.lr: 1\nnew.a.b: 2\nnew.a: {c: 3}\n"
    assert read_yaml(written("aliases.yaml", aliases)) == {
        "optim": {"beta1": 0.8, "lr": 1},
        "other": {"beta1": 0.8},
        "new": {"a": {"b": 2, "c": 3}},
    }
    base = written("base.yaml", f"extends: {BASE}\nsteps: 5\noptim.lr: 2.0e-4\n")
    run = load(base, ["optim.beta1=0.5"])
    assert run.optim == replace(load(BASE).optim, lr=2e-4, beta1=0.5) and run.steps == 5
    for text, message in (
        ("data: {mix: {a: 1}}\ndata.mix: {b: 1}", "has the setting data.mix twice, once in its se"),
        ("data.mix: {a: 1}\ndata.mix.a: 2", "has the setting data.mix.a twice"),
        ("data.mix: {a: 1}\ndata.mix: {b: 1}", "has the key 'data.mix' twice"),
        ("optim: 3\noptim.lr: 1", "optim.lr is not a setting: optim is not a section"),
        ("optim.lrr: 1", "optim.lrr is not a setting; did you mean 'lr'"),
        ("optim..lr: 1", "optim..lr is not a setting"),
        (".".join("a" * 60) + ": 1", "a.a.a.* is not a setting"),
    ):
        with pytest.raises(ValueError, match=message):
            load(written("wrong.yaml", text))


def test_extends_in_a_circle_and_missing_files(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"did you mean .*base_1b.yaml"):
        load(ROOT / "configs" / "base_1.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load(tmp_path / "broken.yaml")


RECIPES = sorted(ROOT.glob("configs/data/*.yaml"))
PLANS = sorted(ROOT.glob("configs/**/plan*.yaml"))
SUITES = sorted({*ROOT.glob("configs/evals/*.yaml"), *ROOT.glob("configs/**/suite.yaml")})
CHATS = {
    path: SFTConfig for path in ROOT.glob("configs/**/*.yaml") if path.stem in ("sft", "midtrain")
}
PAIRS = {path: PreferenceRun for path in ROOT.glob("configs/**/dpo.yaml")}
SPEEDRUNS = {*ROOT.glob("configs/speedrun/**/*.yaml"), *ROOT.glob("configs/moe/speedrun*.yaml")}
KINDS = CHATS | PAIRS | dict.fromkeys(SPEEDRUNS, SpeedrunRun)
EXPERIMENTS = sorted(ROOT.glob("configs/lab/*.yaml"))
RUNS = sorted(
    set(ROOT.glob("configs/**/*.yaml")) - {*RECIPES, *PLANS, *SUITES, *KINDS, *EXPERIMENTS}
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_holds_what_its_runs_mix(path):
    recipe = load_settings(Recipe, path)
    runs = [run for run in map(load, RUNS) if run.data.store == recipe.store]
    assert runs and {source for run in runs for source in run.data.mix} <= set(recipe.sources)
    assert {run.model.vocab_size for run in runs} == {recipe.tokenizer.vocab_size}
    assert path.read_text().startswith("# python -m scripts.prepare_data")


@pytest.mark.parametrize("path", [*RUNS, *sorted(KINDS)], ids=lambda path: path.stem)
def test_every_config_reads_and_its_resolved_form_reads_back_equal(path, yaml_read_once, tmp_path):
    kind = KINDS.get(path, RunConfig)
    run = load_settings(kind, path)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(to_dict(run)))
    assert load_settings(kind, tmp_path / "resolved.yaml") == run
    assert path.read_text().startswith("# ")  # the command and its expected result


def test_the_plan_of_the_1b_configs():
    names = ("phase1_pretrain", "phase2_annealing", "phase2_16k", "phase3_crystallization")
    runs = [load(ROOT / "configs" / f"{name}.yaml") for name in names]
    assert [run.steps for run in runs] == [184_000, 10_000, 13_000, 23_000]
    assert [run.data.sequence_length for run in runs] == [4096, 8192, 16_384, 4096]
    assert [run.data.micro_batch_size for run in runs] == [16, 8, 4, 16]
    assert [run.model.rope_theta for run in runs] == [10_000, 10_000, 500_000, 500_000]
    assert {run.data.tokens_per_step for run in runs} == {131_072}
    assert {2 * run.data.micro_batch_size * run.data.sequence_length for run in runs} == {131_072}
    assert {run.schedule for run in runs} == {ScheduleConfig(2000, 230_000, 23_000)}
    assert all(run.model.num_parameters == 1_100_048_384 for run in runs)
    assert RunConfig().model.num_parameters == 1_100_048_384


def test_quickstart_phases_add_up_to_its_schedule():
    runs = [
        scheduled.run
        for scheduled in scheduled_phases(load_plan(ROOT / "configs" / "quickstart" / "plan.yaml"))
    ]
    assert len(runs) == 3 and {sum(run.steps for run in runs)} == {
        run.schedule.total_steps for run in runs
    }
    assert all(5e6 <= run.model.num_parameters <= 10e6 for run in runs)


def test_the_plan_of_the_1b_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = load_plan("configs/plan_1b.yaml")
    phases = scheduled_phases(plan)
    assert [(s.begin, s.end) for s in phases] == [
        (0, 184_000),
        (184_000, 194_000),
        (194_000, 207_000),
        (207_000, 230_000),
    ]
    assert [s.run.rope_theta for s in phases] == [10_000, (10_000, 500_000), 500_000, 500_000]
    longer = scheduled_phases(plan, {"phase1_pretrain": 20_000})
    assert [s.end for s in longer] == [204_000, 214_000, 227_000, 250_000]
    assert [m.step for s in longer for m in s.phase.milestones] == [
        50_000,
        100_000,
        150_000,
        204_000,
        227_000,
        250_000,
    ]
    assert {s.run.schedule.total_steps for s in longer} == {250_000}
    with pytest.raises(ValueError, match="unknown phase phase9; available phases: phase1_pretrain"):
        scheduled_phases(plan, {"phase9": 1})


def test_a_plan_that_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    milestone = {"step": 190_000, "gates": [{"metric": "x", "go": 1, "no_go": 2}]}
    plan = {
        "name": "p",
        "evals": {"perplexity": "true"},
        "phases": [{"config": "configs/phase1_pretrain.yaml"}] * 2,
    }
    for change, message in (
        ({}, "are both phase phase1_pretrain"),
        (
            {"phases": [{"config": "configs/phase1_pretrain.yaml", "milestones": [milestone]}]},
            "milestone 190000 is outside",
        ),
        (
            {"evals": {}, "phases": [{"config": "x", "milestones": [milestone]}]},
            "the plan has no evals",
        ),
        (
            {"phases": [{"config": "x", "milestones": [milestone, milestone]}]},
            "list them in rising order",
        ),
        (
            {
                "phases": [
                    {"config": "configs/quickstart/base.yaml"},
                    {"config": "configs/phase2_16k.yaml"},
                ]
            },
            "make them equal",
        ),
    ):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**plan, **change}))
        with pytest.raises(ValueError, match=message):
            scheduled_phases(load_plan(path))


def test_gates():
    lower, higher = Gate("wiki.bpb", go=2.0, no_go=2.5), Gate("acc", go=0.3, no_go=0.2)
    assert [
        judge(lower, {"wiki": {"bpb": value}}).outcome for value in (1.9, 2.0, 2.2, 2.5, 2.6)
    ] == [*("go", "go", "caution", "caution", "no-go")]
    assert [judge(higher, {"acc": value}).outcome for value in (0.4, 0.3, 0.25, 0.2, 0.1)] == [
        *("go", "go", "caution", "caution", "no-go")
    ]
    for missing in (
        {},
        {"wiki": 3},
        {"wiki": {"bpb": None}},
        {"wiki": {"bpb": math.nan}},
        {"wiki": {"bpb": "1.0"}},
    ):
        assert judge(lower, missing).outcome == "no-go"
    assert "not measured" in str(judge(lower, {}))
    verdicts = [judge(higher, {"acc": value}) for value in (0.4, 0.25)]
    assert decide(verdicts) == "caution" and decide([]) == "no-go"
    with pytest.raises(ValueError, match="set different values"):
        Gate("x", 1.0, 1.0)


def test_paths():
    run = load(BASE)
    assert run.checkpoints == Path("checkpoints/nanollama_1b/phase1_pretrain") and run.logs == Path(
        "logs/nanollama_1b"
    )
