"""Curves of the section `schedules`: their values, where they are applied, and exact resuming."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, train_here
from test_muon import state_of
from torch.distributed.tensor import distribute_tensor

from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from training import setup
from training.checkpoint import CheckpointConfig, Checkpointer, load_state
from training.config import RunConfig, load, to_dict
from training.curves import OF_GROUPS, SCHEDULED, Curve
from training.optimizers import GroupConfig, OptimConfig, build_optimizer
from training.schedulers import (
    ScheduleConfig,
    WSDScheduler,
    apply_schedules,
    of_step,
    run_schedules,
)
from training.settings import load_settings
from training.state import State

TEST_MODE = ROOT / "configs" / "test_mode.yaml"
EVERY_KEY = [  # every optimizer option and every schedule of the dense model
    "optim={name: muon, muon_scale: spectral, muon_coefficients: quintic12, normuon_beta2: 0.9, "
    "nesterov: false, cautious_decay: true, adam_every: 2, groups: {embedding: {lr: 8.0}, "
    "head: {beta1: 0.8, weight_decay: 0.2}, vectors: {beta2: 0.99}, matrices: {lr: 4.0}}}",
    "schedules={momentum: {points: [[0, 0.85], [4, 0.95]]}, beta2: {points: [[0, 0.9], [6, 0.99]]},"
    " weight_decay: {points: [[0, 1], [1, 0]], by: fraction, shape: cosine}, "
    "lr.embedding: {points: [[0, 1], [3, 0.5]], shape: step}}",
]


def state_for(run: RunConfig, model: torch.nn.Module) -> State:
    return State(model, build_optimizer(model, run.optim), phase="p", phase_end=run.steps)


def gpt_run(**changes) -> tuple[RunConfig, State, SpeedrunGPT]:
    model = SpeedrunGPT(
        GPTConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            short_window=4,
            long_window=8,
            window_pattern="SL",
            tie_word_embeddings=False,
        ),
        seed=0,
    )
    run = replace(
        load(TEST_MODE, ["schedule={warmup_steps: 0, total_steps: 100, decay_steps: 0}"]), **changes
    )
    return run, state_for(run, model), model


# ---- values


def test_a_curve_meets_its_points_and_is_constant_outside():
    points = ((10, 0.85), (30, 0.95), (40, 0.5))
    for shape in ("linear", "step", "cosine", "cubic"):
        curve = Curve(points, shape=shape)
        assert [curve(step) for step in (0, 9, 10)] == [0.85] * 3
        assert curve(30) == 0.95 and [curve(step) for step in (40, 41, 10**9)] == [0.5] * 3
        middle = {"linear": 0.9, "step": 0.85, "cosine": 0.9, "cubic": 0.9}[shape]
        assert curve(20) == pytest.approx(middle)
        values = [curve(step) for step in range(10, 31)]
        assert values == sorted(values)
    assert [Curve(points, shape="step")(step) for step in (29, 30, 39, 40)] == [
        *(0.85, 0.95),
        *(0.95, 0.5),
    ]
    assert Curve(((5, 3.0),))(0) == Curve(((5, 3.0),))(9) == 3.0


def test_shapes_are_the_formulas_of_their_sources():
    at = 0.3
    assert Curve(((0, 2), (10, 4)), shape="cubic")(3) == pytest.approx(
        2 + 2 * (4 * at**3 - 6 * at**2 + 3 * at)  # modded-nanogpt's windows
    )
    momentum = Curve(((0, 0.85), (300, 0.95)))
    for step in (0, 150, 299, 300, 1000):  # Muon's warm-up in modded-nanogpt
        fraction = min(step / 300, 1)
        assert momentum(step) == pytest.approx((1 - fraction) * 0.85 + fraction * 0.95)
    decay = Curve(((0, 1e-3), (76, 1e-3), (96, 0.0)), shape="cosine")
    reference = WSDScheduler(ScheduleConfig(0, 96, 20, "cosine"), 1e-3)
    for step in range(96):  # WSD reaches the end with its last update
        assert decay(step + 1) == pytest.approx(reference(step), abs=1e-12)


def test_fractions_are_of_the_whole_run():
    curve = Curve(((0.55, 1.0), (1, 0.0)), by="fraction", shape="step")
    assert [curve.over(100)(step) for step in (54, 55, 99, 100)] == [1.0, 1.0, 1.0, 0.0]
    steps = Curve(((0.55, 2.0), (0.6, 0.0)), by="fraction").over(100)
    assert steps(55) == 2.0 and steps(60) == 0.0
    windows = Curve(((0, 128), (10, 1792)))
    assert [windows.rounded(step) for step in (0, 1, 10)] == [128, 294, 1792]


# ---- applied


def test_every_schedule_sets_its_setting_and_is_listed_under_its_name():
    values = {
        "lr.embedding": (1.0, 3.0),
        "weight_decay": (1.0, 0.0),
        "beta2": (0.9, 0.99),
        "beta2.embedding": (0.95, 0.999),
        "momentum": (0.85, 0.95),
        "short_window": (2, 6),
        "long_window": (4, 12),
        "softcap": (30, 15),
        "multi_token.1": (0.5, 0.0),
        "multi_token.2": (0.25, 0.0),
        "batch_tokens": (512, 1024),
        "sequence_length": (16, 32),
    }
    curves = {name: Curve(((0, a), (10, b))) for name, (a, b) in values.items()}
    groups = {"embedding": GroupConfig(lr=8.0), "vectors": GroupConfig(beta2=0.999)}
    optim = OptimConfig(name="muon", lr=1e-3, weight_decay=0.2, groups=groups)
    run, state, model = gpt_run(optim=optim, schedules=curves)
    schedules = run_schedules(run, state, by_loader=("batch_tokens", "sequence_length"))
    for step, end in ((0, 0), (10, 1), (0, 0)):  # a rollback goes back
        logged = apply_schedules(schedules, step)
        assert logged == {"lr": 1e-3} | {name: pair[end] for name, pair in values.items()}
        by_name = {group["name"]: group for group in state.optimizer.param_groups}
        assert by_name["embedding"]["lr"] == pytest.approx(8e-3 * values["lr.embedding"][end])
        assert by_name["head"]["lr"] == by_name["matrices"]["lr"] == 1e-3
        assert by_name["matrices"]["momentum"] == values["momentum"][end]
        assert by_name["matrices"]["weight_decay"] == pytest.approx(0.2 * (1 - end))
        assert by_name["head"]["betas"] == (0.9, values["beta2"][end])
        assert by_name["vectors"]["betas"] == (0.9, 0.999)  # its own
        assert by_name["embedding"]["betas"] == (0.9, values["beta2.embedding"][end])
        assert model.windows == {"S": (2, 6)[end], "L": (4, 12)[end]}
        assert model.softcap == values["softcap"][end]
        assert model.multi_token_weights == ((1.0, 0.5, 0.25), (1.0, 0.0, 0.0))[end]


def test_windows_are_set_together_once_a_step(monkeypatch):
    calls = []
    run, state, model = gpt_run(schedules={"long_window": Curve(((0, 8), (2, 10)))})
    monkeypatch.setattr(model, "set_windows", lambda *windows: calls.append(windows))
    schedules = run_schedules(run, state)
    for step in range(3):
        apply_schedules(schedules, step)
    assert calls == [(4, 8), (4, 9), (4, 10)]  # the short window is the config's


def test_a_loader_gets_a_constant_or_a_function_of_the_step():
    curve = Curve(((0, 512), (0.5, 1024)), by="fraction", shape="step")
    run, *_ = gpt_run(schedules={"batch_tokens": curve})
    tokens = of_step(run, "batch_tokens", 256)
    assert callable(tokens) and [tokens(step) for step in (0, 49, 50)] == [512, 512, 1024]
    assert of_step(run, "sequence_length", 64) == 64


def test_a_run_without_schedules_has_the_learning_rate_only():
    run, state, _ = gpt_run()
    assert [schedule.name for schedule in run_schedules(run, state)] == ["lr"]


# ---- refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("momentum", r"schedules.momentum needs optim.name=muon"),
        ("softcap", r"schedules.softcap needs a model with a softcap"),
        ("long_window", r"schedules.long_window needs a model with attention windows"),
        ("multi_token.1", r"schedules.multi_token.1 needs a model with multi-token prediction"),
        ("lr.value_embeddings", r"needs a model with parameters in group value_embeddings"),
        ("sequence_length", r"schedules.sequence_length needs a loader whose batches change"),
    ],
)
def test_a_schedule_that_this_run_cannot_apply_is_refused_at_the_start(name, message, settings):
    value = {"sequence_length": 64, "long_window": 8, "softcap": 15}.get(name, 0.5)
    with pytest.raises(ValueError, match=message):
        train_here(settings(f"schedules={{{name}: {{points: [[0, {value}]]}}}}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedules.momentun.points=[[0, 1]]",
            "schedules.momentun is not a schedule; there are lr",
        ),
        ("schedules.lr.heads.points=[[0, 1]]", "schedules.lr.heads is not a schedule"),
        ("schedules.beta2.points=[]", "schedules.beta2.points is empty; list points as"),
        ("schedules.beta2={}", "schedules.beta2.points is empty"),
        ("schedules.beta2.points=3", "schedules.beta2.points=3 must be a list"),
        (
            "schedules.beta2.points=[[1]]",
            r"schedules.beta2.points\[0\]=\[1.0\] must be two numbers",
        ),
        ("schedules.beta2.points=[[0, 1]]", r"points\[0\]\[1\]=1 must be at least 0 and below 1"),
        ("schedules.beta2.points=[[-1, 0]]", r"points\[0\]\[0\]=-1 must not be negative"),
        ("schedules.beta2={points: [[2, 0]], by: fraction}", r"\[0\]\[0\]=2 must be .*at most 1"),
        ("schedules.beta2.points=[[3, 0], [3, 0]]", "must be in rising order .* which are 3, 3"),
        ("schedules.beta2={points: [[3, 0]], by: epochs}", "by='epochs' is not one of steps, frac"),
        ("schedules.beta2={points: [[3, 0]], shape: wavy}", "shape='wavy' is not one of linear"),
        ("schedules.beta2={points: [[3, 0]], form: step}", "schedules.beta2.form is not a setting"),
        (
            "schedules.multi_token.2.points=[[0, 1]]",
            "schedules.multi_token.2 needs schedules.multi",
        ),
    ],
)
def test_wrong_curves_are_refused_in_one_sentence(override, message):
    with pytest.raises(ValueError, match=message) as error:
        load(TEST_MODE, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("optim.groups.matrices.beta2=0.9", "optim.groups.matrices.beta2 has no effect with sched"),
        ("optim.name=muon", "schedules.beta2.matrices has no effect on Muon, which updates the"),
    ],
)
def test_a_curve_of_a_group_without_effect_is_refused(optim, message):
    with pytest.raises(ValueError, match=message):
        load(TEST_MODE, [optim, "schedules.beta2.matrices.points=[[0, 0.9]]"])


def test_dotted_names_in_files_and_overrides_mean_the_same(tmp_path):
    (tmp_path / "parent.yaml").write_text(
        "schedules:\n  lr.head: {points: [[0, 1], [9, 2]]}\n  beta2: {points: [[0, 0.5]]}\n",
        encoding="utf-8",
    )
    (tmp_path / "child.yaml").write_text(
        "extends: parent.yaml\nschedules: {lr.vectors: {points: [[0, 3]]}}\n", encoding="utf-8"
    )
    run = load(tmp_path / "child.yaml", ["schedules.lr.head.shape=step"])
    assert run.schedules == {
        "lr.head": Curve(((0.0, 1.0), (9.0, 2.0)), shape="step"),
        "beta2": Curve(((0.0, 0.5),)),
        "lr.vectors": Curve(((0.0, 3.0),)),
    }
    copy = tmp_path / "copy.yaml"
    copy.write_text(json.dumps(to_dict(run)), encoding="utf-8")
    assert load_settings(RunConfig, copy) == run


def test_every_documented_name_is_a_schedule():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.split("## Optimizer and schedules")[1].split("\n## ")[0]
    of_groups = {name for name in SCHEDULED if name.startswith(tuple(f"{k}." for k in OF_GROUPS))}
    names = {*SCHEDULED} - of_groups | {f"{kind}.GROUP" for kind in OF_GROUPS}
    assert {name for name in names if f"`{name}`" not in section} == set()


# ---- in a run


def test_a_run_with_every_key_resumes_bit_for_bit(settings, tmp_path):
    def where(name: str) -> list[str]:
        return [*EVERY_KEY, f"output_dir={tmp_path / name / 'c'}", f"log_dir={tmp_path / name}"]

    assert train_here(settings(*where("straight")))
    for until in ("until=3", "until=5", "seed=1337"):  # both between two updates of AdamW
        train_here(settings(*where("stopped"), until))
    one, two = (
        state_of(tmp_path / name / "c" / "step_6", tmp_path / "s.pt")
        for name in ("straight", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    kinds = {name.rsplit(".", 1)[-1] for name in one}
    assert {"second_moment", "momentum_buffer", "gradient_sum", "summed", "exp_avg"} < kinds
    straight, stopped = (read_metrics(tmp_path / name) for name in ("straight", "stopped"))
    names = ("loss", "lr", "momentum", "beta2", "weight_decay", "lr.embedding")
    assert [[row[name] for name in names] for row in straight] == [
        [row[name] for name in names] for row in stopped
    ]
    assert [row["lr.embedding"] for row in straight] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert straight[0]["loss"] - straight[-1]["loss"] > 0.1


@pytest.mark.parametrize("every_option", [False, True])
def test_a_parameter_without_gradients_until_a_checkpoint_resumes_bit_for_bit(
    every_option, tmp_path
):
    run = load(TEST_MODE, ["parallel.dtype=float32", *EVERY_KEY[:every_option]])

    def step(state: State, seed: int, unused: str = "none") -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in state.model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if unused not in name:
                parameter.grad = distribute_tensor(
                    values, parameter.device_mesh, parameter.placements
                )
        state.optimizer.step()
        state.optimizer.zero_grad()

    with setup.ranks() as device:
        first, second = setup.build(run, device), setup.build(run, device)
        step(first, 0, unused="_proj")
        checkpoint = CheckpointConfig(asynchronous=False)
        special = {"bos": 0, "eos": 0, "pad": 0}
        Checkpointer(tmp_path, checkpoint, torch.float32, None, special).save(first)
        load_state(tmp_path / "step_0", second)
        assert len(first.optimizer.state) == len(second.optimizer.state)
        for state in (first, second):
            step(state, 1)
        pairs = zip(first.model.named_parameters(), second.model.parameters(), strict=True)
        for (name, one), two in pairs:
            assert torch.equal(one.full_tensor(), two.full_tensor()), name


def test_a_later_phase_may_have_other_groups_and_schedules(settings, tmp_path):
    first = settings("steps=3", phase="one")
    assert train_here(first)
    later = [
        f"resume_from={tmp_path / 'checkpoints' / 'one'}",
        "optim.groups.embedding.lr=8",
        "schedules.beta2.points=[[0, 0.9]]",
    ]
    assert train_here(settings(*later, phase="two", steps=3))
    rows = read_metrics(Path(tmp_path / "logs"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["beta2"] == 0.9 and rows[-1]["loss"] < rows[0]["loss"]
