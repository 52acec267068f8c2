"""The training loop: schedules, clock, end, flags, rope theta over phases, refused settings."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
import test_dpo
import test_meter
import torch
import yaml
from conftest import ROOT, read_metrics, train_here
from test_dpo import case as pairs_case  # noqa: F401
from test_meter import clock  # noqa: F401
from test_rollbacks import FAR, spoil  # noqa: F401
from test_sft import case, sft_here  # noqa: F401
from test_sft import settings as sft_settings  # noqa: F401

from data.dataloader import Batch, Prefetcher, Step
from models.hf import read_hf_config
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training import meter, setup
from training.config import RunConfig, load, to_dict
from training.faults import StepFlags
from training.logger import Log
from training.loop import reduce, train
from training.objectives import next_token
from training.ops import profiling
from training.ops.watchdog import COMPUTES, READS
from training.planning.plan import load_plan, scheduled_phases
from training.preference_losses import DPOConfig, preference
from training.schedulers import Schedule, run_schedules, theta_at
from training.settings import load_settings
from training.state import State

TEST_MODE = ROOT / "configs" / "test_mode.yaml"


# The loop


def test_every_schedule_is_applied_before_its_step_and_logged_under_its_name(clock, tmp_path):  # noqa: F811
    """The forward pass and the metrics see learning rate, rope theta and a stage's own schedule."""
    more = [
        "parallel.dtype=float32",
        "schedule={warmup_steps: 3, total_steps: 9, decay_steps: 2}",
        "steps=6",
    ]
    more += [
        "rope_theta=[10000, 40000]",
        "validation.every=0",
        f"log_dir={tmp_path}",
        f"output_dir={tmp_path}",
    ]
    run, seen, inner = load(TEST_MODE, more), [], next_token(0.0)

    def schedules(run: RunConfig, state: State) -> list[Schedule]:
        def set_decay(value: float) -> None:
            state.optimizer.param_groups[0]["weight_decay"] = value

        return [
            *run_schedules(run, state),
            Schedule("weight_decay", lambda step: 0.01 * (step + 1), set_decay),
        ]

    class Loader:
        def at(self, place):
            text = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(place))
            return Step(
                [Batch(text[:, :-1], text[:, 1:], torch.zeros(2, 16, dtype=torch.int32))], 32, 32
            )

    with setup.ranks() as device:
        state = setup.build(run, device)
        state.phase_end = 6

        def objective(model, batch):
            clock.spend(1.0)
            groups = state.optimizer.param_groups
            seen.append((groups[0]["lr"], model.config.rope_theta, groups[0]["weight_decay"]))
            assert len({group["lr"] for group in groups}) == 1
            return inner(model, batch)

        log, checkpointer = test_meter.Log(clock), test_meter.Saves(clock)
        assert (
            train(run, state, Loader(), objective, checkpointer, log, make_schedules=schedules) == 0
        )
    assert seen == [(row["lr"], row["rope_theta"], row["weight_decay"]) for row in log.rows]
    rates, thetas, decays = zip(*seen, strict=True)
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert thetas[0] == 10_000 and thetas[-1] == pytest.approx(40_000)
    assert [b / a for a, b in pairwise(thetas)] == pytest.approx([4**0.2] * 5)
    assert decays == pytest.approx([0.01 * n for n in range(1, 7)])


def test_a_constant_is_no_schedule(settings, tmp_path):
    assert train_here(settings("validation.every=0", steps=2))
    assert all("rope_theta" not in row for row in read_metrics(tmp_path / "logs"))


def test_flags_are_reduced_beside_the_metrics():
    """Flags do not depend on the metrics and the loss denominator."""
    raised = StepFlags(save_failed=True, signals=(False, True))
    with setup.ranks():
        for loss, weight in ((8.0, 4), (float("nan"), 1_000_000)):
            means, flags, _ = reduce({"loss": torch.tensor(loss)}, weight, raised)
            assert means["loss"] == pytest.approx(loss / weight, nan_ok=True)
            assert flags == raised and all(
                type(flag) is bool for flag in (flags.save_failed, *flags.signals)
            )
        assert reduce({"loss": torch.tensor(1.0)}, 1)[1] == StepFlags(False, ())


def test_one_clock_times_and_limits_each_step(clock, tmp_path, monkeypatch):  # noqa: F811
    """The time limit covers data and computation of each step, and is off between steps."""
    calls = []

    class Watch:
        def __init__(self, seconds, folder):
            calls.append((seconds, folder.name))

        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *_):
            calls.append("exit")

        def begin(self, step, what):
            calls.append((step, what, clock.now))

        def pause(self):
            calls.append(("pause", clock.now))

    monkeypatch.setattr(meter, "HangWatchdog", Watch)
    rows = test_meter.run_with(clock, tmp_path)
    first, *inner, last = calls[1:]
    assert calls[0] == (load(TEST_MODE).parallel.timeout_s, "hang") and (first, last) == (
        "enter",
        "exit",
    )
    for row, (begin, compute, rest) in zip(rows, zip(*[iter(inner)] * 3, strict=True), strict=True):
        assert begin[:2] == (row["step"], READS) and compute[:2] == (row["step"], COMPUTES)
        assert (
            compute[2] - begin[2] == test_meter.DATA and rest[1] - compute[2] == test_meter.COMPUTE
        )
    tree = ast.parse((ROOT / "training" / "loop.py").read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"Meter", "HangWatchdog", "time"}


@pytest.mark.parametrize(("until", "end"), [(None, 9), (4, 4), (9, 9), (50, 9)])
def test_a_command_has_one_end(until, end):
    state = State(None, None, phase="one", phase_end=9, until=until)  # type: ignore[arg-type]
    assert state.end == end and "until" not in state.position()


def test_after_a_rollback_the_end_and_the_saved_theta_are_exact(
    settings,
    tmp_path,
    spoil,  # noqa: F811
    monkeypatch,
):
    """The log keeps the command's end; the repeated checkpoint has the theta of its step."""
    ends, folder = [], tmp_path / "checkpoints" / "one"
    opened = Log.open
    monkeypatch.setattr(
        Log,
        "open",
        lambda self, step, end, phase: (ends.append(end), opened(self, step, end, phase))[1],
    )
    ramp, saved = "rope_theta=[10000, 90000]", {}
    save = setup.Checkpointer.save

    def watched(self, state, *arguments, **more):
        saved.setdefault(state.step, []).append(state.model.config.rope_theta)
        save(self, state, *arguments, **more)

    monkeypatch.setattr(setup.Checkpointer, "save", watched)
    spoil({5, 6})
    assert train_here(settings(*FAR, ramp, "until=8", steps=9))
    assert ends == [8, 8] and len(saved[2]) == 2
    expected = {step: theta_at(10_000, 90_000, step - 1, 0, 9) for step in saved}
    assert saved == {step: [expected[step]] * len(thetas) for step, thetas in saved.items()}
    assert {row["end"] for row in read_metrics(tmp_path / "logs")} == {8}
    assert train_here(settings(*FAR, ramp, steps=9))
    assert read_hf_config(folder / "step_9").rope_theta == pytest.approx(90_000)


def test_no_call_that_changes_a_run_hides_in_a_text():
    acts = {
        "restore_or_init",
        "train",
        "run_phase",
        "load_state",
        "claim",
        "build",
        "save",
        "roll_back",
        "run_on_rank0",
    }
    for path in [
        *ROOT.glob("train*.py"),
        ROOT / "training/fine_tuning.py",
        *(ROOT / "training").glob("*.py"),
    ]:
        texts = [
            n
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.JoinedStr)
        ]
        calls = [
            ast.unparse(n.func) for text in texts for n in ast.walk(text) if isinstance(n, ast.Call)
        ]
        assert not {call.rpartition(".")[2] for call in calls} & acts, path


def test_the_prefetcher_says_where_it_is():
    class Loader:
        fingerprint = "x"

        def at(self, place):
            return Step([], 1, 1)

    loader = Prefetcher(Loader(), torch.device("cpu"))
    assert loader.position == 0
    loader.at(0), loader.at(7)
    assert loader.position == 8


# Rope theta


@pytest.mark.parametrize(
    ("setting", "range_of_theta"),
    [("20000", (20_000, 20_000)), ("[10000, 5e5]", (10_000, 500_000)), ("null", (10_000, 10_000))],
)
def test_rope_theta_is_one_key(setting, range_of_theta, tmp_path):
    run = load(TEST_MODE, [f"rope_theta={setting}"])
    assert run.theta_range == range_of_theta and run.model.rope_theta == range_of_theta[0]
    content = to_dict(run)
    assert "rope_theta" not in content["model"] and "rope_theta_end" not in content
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert load(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rope_theta=5", "model.rope_theta is rope_theta here"),
        (
            "rope_theta_end=5",
            r"rope_theta_end is rope_theta here \(\[first, last\] over the phase\)",
        ),
        ("rope_theta=0", "rope_theta=0 must be above 0"),
        ("rope_theta=[10000, -1]", r"rope_theta\[1\]=-1 must be above 0"),
        (
            "rope_theta=[1, 2, 3]",
            r"rope_theta=\[1.0, 2.0, 3.0\] must be one number or two, \[first, last\]",
        ),
        ("rope_theta=[5]", r"rope_theta=\[5.0\] must be one number or two"),
        ("rope_theta=high", "rope_theta='high' must be a finite number"),
    ],
)
def test_other_ways_to_set_theta_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load(TEST_MODE, [override])


def test_theta_is_checked_where_phases_meet(settings, tmp_path):
    """Theta is checked between two phases, on a resume, and against a new run's base model."""
    one, two = tmp_path / "checkpoints" / "one", f"resume_from={tmp_path / 'checkpoints' / 'one'}"
    quiet = ("validation.every=0", "checkpoint.every=2")
    assert train_here(settings(*quiet, "rope_theta=[10000, 40000]", steps=4))
    message = (
        r"rope theta would jump: .*step_4 was trained with 40,000, "
        r"but rope_theta={} is {} there; set rope_theta to 40000"
    )
    for theta, text, asked in (
        ("10000", "10,000", "10,000"),
        ("[50000, 60000]", "50,000 to 60,000", "50,000"),
    ):
        with pytest.raises(ValueError, match=message.format(text, asked)):
            train_here(settings(*quiet, two, f"rope_theta={theta}", phase="two", steps=2))
    with pytest.raises(
        ValueError,
        match=r"step_4 was trained with 40,000, but rope_theta=10,000 to 90,000 is 90,000",
    ):
        train_here(settings(*quiet, "rope_theta=[10000, 90000]", steps=4))
    with pytest.raises(
        ValueError, match=r"step_4 was trained with 40,000, but rope_theta=10,000 is 10,000"
    ):
        start = f"init_from={one / 'step_4'}", "rope_theta=10000"
        train_here(settings(*quiet, *start, "run=other", phase="three", steps=2))
    assert train_here(settings(*quiet, two, "rope_theta=[40000, 50000]", phase="two", steps=2))
    jump = ("rope_theta=9000", "allow_theta_jump=true", f"log_dir={tmp_path / 'four'}")
    assert train_here(settings(*quiet, two, *jump, phase="four", steps=2))
    assert read_hf_config(tmp_path / "checkpoints" / "four" / "step_6").rope_theta == 9000


def test_a_plan_whose_thetas_do_not_meet_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {
        **yaml.safe_load(TEST_MODE.read_text(encoding="utf-8")),
        "schedule": {"warmup_steps": 1, "total_steps": 20},
    }
    base["schedule"]["decay_steps"] = 2

    def plan(**second) -> list:
        for phase, more in (("one", {"rope_theta": [10_000, 40_000]}), ("two", second)):
            content = {**base, "phase": phase, "steps": 10, **more}
            Path(f"{phase}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        phases = [{"config": "one.yaml"}, {"config": "two.yaml"}]
        Path("plan.yaml").write_text(
            yaml.safe_dump({"name": "p", "phases": phases}), encoding="utf-8"
        )
        return scheduled_phases(load_plan("plan.yaml"))

    for second in ({}, {"rope_theta": 10_000}, {"rope_theta": [10_000, 40_000]}):
        with pytest.raises(
            ValueError,
            match=r"rope_theta ends at 40,000 in one.yaml and begins at 10,000 in two.yaml",
        ):
            plan(**second)
    for second in (
        {"rope_theta": 40_000},
        {"rope_theta": [40_000, 1e6]},
        {"rope_theta": 1, "allow_theta_jump": True},
    ):
        assert len(plan(**second)) == 2


# SFT and DPO


SHARED = [
    (
        "model.hidden_size=64",
        "model.hidden_size has no effect in SFT and DPO: the base model .init_from. sets the shape",
    ),
    ("model.max_position_embeddings=4096", "model.max_position_embeddings has no effect"),
    ("model.rope_theta=10000", "model.rope_theta is rope_theta here"),
    (
        "schedule.total_steps=100",
        "schedule.total_steps has no effect in SFT and DPO: the schedule ends with steps",
    ),
    ("schedule.decay_steps=0", "schedule.decay_steps has no effect"),
    ("data.store=data/store/x", "data.store has no effect"),
    ("data.packing=best_fit", "data.packing has no effect"),
]
PAIRS = [
    (
        "data.tokens_per_step=8192",
        "data.tokens_per_step has no effect in DPO: set data.pairs_per_step instead",
    ),
    ("optim.z_weight=0.1", "optim.z_weight has no effect in DPO"),
    ("data.micro_batch_size=3", "data.micro_batch_size=3 must be even in DPO"),
    ("validation.batch_size=5", "validation.batch_size=5 must be even in DPO"),
    (
        "dpo={loss: simpo, reference_cache: x}",
        "dpo.reference_cache has no effect with dpo.reference=none",
    ),
    ("dpo={margin: 1.0}", "dpo.margin=1 has no effect with dpo.loss=sigmoid"),
]


@pytest.mark.parametrize(
    ("kind", "name", "override", "message"),
    [(SFTConfig, "sft", *row) for row in SHARED]
    + [(PreferenceRun, "dpo", *row) for row in SHARED + PAIRS],
)
def test_settings_of_no_effect_are_refused_in_sft_and_dpo(kind, name, override, message):
    with pytest.raises(ValueError, match=message):
        load_settings(kind, ROOT / "configs" / f"{name}.yaml", [override])


def test_the_command_refuses_in_one_sentence(tmp_path, capfd, monkeypatch):
    from conftest import complaint_of

    import train_sft

    config = ["--config", ROOT / "configs" / "sft.yaml", "--base_model", tmp_path]
    message = complaint_of(
        train_sft.main, [*config, "model={num_hidden_layers: 4}"], capfd, monkeypatch
    )
    assert message.startswith("error: model.num_hidden_layers has no effect in SFT and DPO")


def test_what_asks_for_nothing_is_accepted():
    for kind, name in ((SFTConfig, "sft"), (PreferenceRun, "dpo")):
        load_settings(
            kind,
            ROOT / "configs" / f"{name}.yaml",
            ["data.min_document_tokens={}", "optim.z_weight=0", "model={}"],
        )


def test_the_written_config_of_sft_reads_back_and_names_its_theta(sft_settings, case, tmp_path):  # noqa: F811
    """It has no refused setting and has the base's theta; the log reports a shortened warm-up."""
    assert sft_here(*sft_settings(tmp_path, "schedule.warmup_steps=5", "chat.samples=[]"))
    path = tmp_path / "logs" / "sft.config.yaml"
    again, content = (
        load_settings(SFTConfig, path),
        yaml.safe_load(path.read_text(encoding="utf-8")),
    )
    assert (
        "model" not in content and not {"total_steps", "decay_steps"} & content["schedule"].keys()
    )
    assert again.rope_theta == read_hf_config(case / "base").rope_theta == again.model.rope_theta
    second_folder = tmp_path / "other"
    with pytest.raises(ValueError, match=r"rope theta would jump: .*base was trained with 10,000"):
        sft_here(*sft_settings(second_folder, "rope_theta=20000"))
    assert sft_here(*sft_settings(second_folder, "rope_theta=[10000, 20000]", "chat.samples=[]"))
    assert read_hf_config(second_folder / "out" / "step_6").rope_theta == pytest.approx(20_000)


def test_what_sft_and_dpo_change_is_said(capfd, pairs_case, tmp_path):  # noqa: F811
    more = ("schedule.warmup_steps=5", "data.micro_batch_size=16", "steps=2", "validation.every=0")
    assert test_dpo.dpo_here(*test_dpo.settings(pairs_case, tmp_path, *more))
    output = capfd.readouterr().out
    assert "warm-up: 0 steps, a tenth of the run, instead of schedule.warmup_steps=5" in output
    assert (
        "micro-batches: 8 rows, the rank's share of a step, "
        "instead of data.micro_batch_size=16" in output
    )


# Dry run


def objectives_of_the_dry_run(monkeypatch) -> list:
    """A list to which each later dry run appends its objective and batches."""
    calls, real = [], profiling.backward

    def watched(run, model, step, objective):
        calls.append((objective, step.batches))
        return real(run, model, step, objective)

    monkeypatch.setattr(profiling, "backward", watched)
    return calls


def test_dpo_dry_runs_its_own_objective_on_its_largest_batch(pairs_case, tmp_path, monkeypatch):  # noqa: F811
    calls = objectives_of_the_dry_run(monkeypatch)
    assert test_dpo.dpo_here(
        *test_dpo.settings(pairs_case, tmp_path, "dpo={loss: ipo, beta: 0.2}", "steps=1")
    )
    [(objective, [batch])] = calls
    expected = preference(DPOConfig(loss="ipo", beta=0.2))
    assert objective.func is expected.func and objective.keywords == expected.keywords
    assert (
        batch.tokens.shape == (8, 256)
        and batch.answer_positions.shape == (8, 256)
        and batch.counted.shape == (4,)
    )


def test_sft_dry_runs_with_its_noise(sft_settings, tmp_path, monkeypatch):  # noqa: F811
    calls = objectives_of_the_dry_run(monkeypatch)
    assert sft_here(*sft_settings(tmp_path, "steps=1", "validation.every=0", "chat.samples=[]"))
    assert {objective.__name__ for objective, _ in calls} == {"noisy"}
    assert all(
        batch.rows.shape == (batch.tokens.shape[0],) for _, batches in calls for batch in batches
    )
