"""Laboratory: settings, identities and resuming of runs, statistics, records."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT, VOCAB, complaint_of
from scipy import stats

from lab import run as lab_run
from lab.comparison import compare_variants
from lab.experiment import UNTIMED_STEPS, Compare, load_experiment, make_trial
from lab.measurements import Measurement, Point, timed_seconds
from lab.record import judgement, write_record
from lab.run import Runner, Slots, plan_trials, run_experiment
from lab.statistics import crossing, estimate, p_below, p_below_with_sigma, paired_difference
from scripts.experiment import main
from training import run_folder
from training.config import load

BASIC = {
    "name": "basic",
    "claim": "B is better than A.",
    "config": str(ROOT / "configs" / "test_mode.yaml"),
    "variants": {"a": None, "b": ["optim.lr=1e-3"]},
    "seeds": [0, 1],
    "budget": {"steps": 50},
    "compare": {"baseline": "a"},
}
# A command of another code base: its loss falls from 4 to 4 - GAIN; it records that it was started.
FAKE = """
import json, sys
from pathlib import Path
logs, seed, gain, steps = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), 10
with open(logs.parent / "started", "a") as file:
    file.write(f"{logs.name}\\n")
if gain < 0:
    sys.exit(f"error: the gain {gain:g} is negative")
with open(logs / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 100 * step, "step_s": 0.5, "loss": 1.0}
        row["val/loss"] = 4 - gain * step / steps + 0.01 * seed
        file.write(json.dumps(row) + "\\n")
"""


def write(folder: Path, name: str = "basic.yaml", **changes) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**BASIC, **changes}))
    return path


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write an experiment of FAKE, where each variant is its gain."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)

    def make(variants: dict, **changes) -> Path:
        return write(
            tmp_path,
            command="python fake.py {logs} {seed}",
            config=None,
            variants={name: [str(gain)] for name, gain in variants.items()},
            **{"budget": {"steps": 10}, **changes},
        )

    return make


def start(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    main()


# statistics


def test_an_interval_is_that_of_scipy_and_of_a_textbook():
    result = estimate([1.0, 2.0, 3.0])
    assert (result.n, result.mean, result.sd) == (3, 2.0, 1.0)
    assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    values = [3.29, 3.27, 3.281, 3.276, 3.279]
    low, high = stats.t.interval(0.95, 4, loc=stats.tmean(values), scale=stats.sem(values))
    assert (estimate(values).low, estimate(values).high) == pytest.approx((low, high), rel=1e-12)
    alone = estimate([2.5])
    assert alone.sd is alone.low is alone.high is None and "no interval" in alone.text()
    assert "[" not in alone.text() and estimate([2.0, 2.0]).text() == "2.0000 (all 2 equal)"
    assert "not finite" in estimate([1.0, math.nan]).text()
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_a_paired_difference_is_that_of_scipy():
    one, two = {0: 3.1, 1: 3.3, 2: 3.2, 9: 1.0}, {2: 3.25, 1: 3.31, 0: 3.18, 5: 1.0}
    result = paired_difference(one, two)
    test = stats.ttest_rel([3.1, 3.3, 3.2], [3.18, 3.31, 3.25])
    interval = test.confidence_interval(0.95)
    assert result is not None and result.n == 3 and result.p == pytest.approx(test.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    single = paired_difference({0: 1.0}, {0: 2.0})
    assert (
        single is not None
        and single.p is None
        and "cannot be distinguished from noise" in judgement(single)
    )
    same = paired_difference(one, one)
    assert same is not None and same.p == 1 and "same values" in judgement(same)


def test_tests_against_a_target_are_those_of_the_speedrun():
    losses = [3.2781, 3.2769, 3.2790, 3.2772]
    expected = stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert p_below(losses, 3.28) == expected < 0.05
    assert p_below(losses, 3.28, higher=True) == pytest.approx(1 - expected)
    assert p_below(losses[:1], 3.28) is None and p_below([1.0, math.nan], 3.28) is None
    # One sd below: 0.158655. Four runs 0.002 below the target have z = -0.004 / 0.0013.
    assert p_below_with_sigma([3.2787], 3.28, 0.0013) == pytest.approx(0.158655, abs=1e-6)
    four = p_below_with_sigma([3.278] * 4, 3.28, 0.0013)
    assert four == pytest.approx(stats.norm.sf(0.004 / 0.0013)) and four < 0.0011


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ([5.0, 4.0, 3.0], 3.5, 250.0),
        ([5.0, 4.0, 3.0], 4.0, 200.0),
        ([5.0, 4.0, 3.0], 2.9, None),
        ([5.0, 4.0, 3.0], 6.0, 100.0),
        ([5.0, 3.0, 4.0], 3.5, 175.0),
        ([5.0, math.nan, 3.0], 3.5, 300.0),
        ([math.nan] * 3, 3.5, None),
    ],
)
def test_a_crossing_is_interpolated_between_its_neighbours(values, target, expected):
    positions = [100, 200, 300]
    assert crossing(positions, values, target) == expected
    negative = [-value for value in values]
    assert crossing(positions, negative, -target, higher=True) == expected


def test_seconds_exclude_the_first_steps_of_each_process():
    rows = [{"step": step, "step_s": 1.0} for step in range(1, 13)]
    for step in (1, 2, 7, 8):
        rows[step - 1]["step_s"] = 60.0
    totals = timed_seconds(rows, [{"event": "begun", "step": 0}, {"event": "resumed", "step": 6}])
    assert totals == [float(step) for step in range(1, 13)]
    late = timed_seconds(rows, [{"event": "begun", "step": 0}])
    assert late[-1] == 10 + 2 * 60  # slow steps elsewhere count


# settings


def test_a_schedule_keeps_its_proportions_at_another_budget(tmp_path):
    schedule = "schedule={warmup_steps: 20, total_steps: 200, decay_steps: 80}"
    experiment = load_experiment(
        write(tmp_path, overrides=[schedule], budget={"tokens": 25_600}, validations=5)
    )
    trial = make_trial(experiment, "b", 1)
    run = load(BASIC["config"], list(trial.words[trial.words.index("--config") + 2 :]))
    assert trial.steps == run.steps == run.schedule.total_steps == 50  # 512 tokens per step
    assert (run.schedule.warmup_steps, run.schedule.decay_steps) == (5, 20)
    assert (run.seed, run.validation.every, run.optim.lr) == (1, 10, 1e-3)
    assert run.logs == trial.folder and run.checkpoints == trial.checkpoints


@pytest.mark.parametrize("by", ["fraction", "steps"])
def test_a_budget_of_tokens_follows_a_growing_batch(tmp_path, by):
    points = "[[0, 256], [0.5, 768]]" if by == "fraction" else "[[0, 256], [40, 768]]"
    curve = f"schedules={{batch_tokens: {{points: {points}, by: {by}, shape: step}}}}"
    experiment = load_experiment(
        write(tmp_path, overrides=[curve], budget={"tokens": 51_200}, variants={"a": None})
    )
    steps = make_trial(experiment, "a", 0).steps
    # 50 steps of 256 and 50 of 768; or 40 of 256, and 53.3 of 768.
    assert steps == (100 if by == "fraction" else 93)


def test_the_identity_holds_what_changes_a_run_and_nothing_else(tmp_path):
    def identity(variant="b", seed=0, **changes) -> str:
        experiment = load_experiment(write(tmp_path, **changes))
        return make_trial(experiment, variant, seed).identity

    same = {identity(), identity(claim="Other."), identity(seeds=[0, 5]), identity(name="other")}
    assert len(same) == 1
    assert identity(overrides=["optim.lr=3e-4"]) == identity()  # the variant's own value stays
    others = [
        identity("a"),
        identity(seed=1),
        identity(budget={"steps": 51}),
        identity(overrides=["optim.beta1=0.8"]),
        identity(threads=2),
        identity(ranks=2),
    ]
    assert len({*others, *same}) == 7


def test_seconds_become_steps_by_rounds_of_pilots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started, failing = [], {"b-0-pilot"}

    def spawn(self, trial, environment):
        started.append(trial.name)
        is_pilot = trial.name.endswith("-pilot")
        assert ("validation.every=0" if is_pilot else "validation.every=6") in trial.words or (
            trial.words[-3:] == ("other", str(trial.steps), "0" if is_pilot else "20")
        )
        rows = [{"step": step, "tokens": step, "val/loss": 3.0} for step in range(1, 9)]
        for row in rows:  # the machine slows down after the first round
            row["step_s"] = 9.0 if row["step"] <= UNTIMED_STEPS else 0.2 + 0.1 * trial.seed
        (trial.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (trial.folder / "output.txt").write_text("error: x")
        return int(trial.name in failing)

    monkeypatch.setattr(Runner, "_spawn", spawn)
    variants = {"a": None, "b": {"command": "python {logs} other {steps} {validations}"}}
    budget = {"seconds": 30, "pilot_steps": 8, "pilot_rounds": 2}
    experiment = load_experiment(write(tmp_path, budget=budget, variants=variants))
    assert len(run_experiment(experiment, ["a", "b"], [0, 1], Slots({}))) == 1
    # b is not run without all its pilots
    assert started == ["a-0-pilot", "b-0-pilot", "a-1-pilot", "b-1-pilot", "a-0", "a-1"]
    failing.clear()
    assert run_experiment(experiment, ["a", "b"], [0, 1], Slots({})) == []
    assert started[6:] == ["b-0-pilot", "b-0", "b-1"]
    # 30 s / the mean of 0.2 and 0.3 s
    assert {trial.steps for trial in plan_trials(experiment, ["a", "b"], [0, 1])} == {120}


def test_a_plan_runs_in_its_own_folder_with_the_changes_of_its_variant(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "name: p\nranks: 1\n"
        f"phases: [{{config: {ROOT}/configs/quickstart/base.yaml}}]\n"
        "stages:\n- name: sft\n  output_dir: checkpoints/q/sft\n  commands:\n"
        "    Data: python -m scripts.generate_chat_data --output_dir x\n"
        "    SFT: python train_sft.py --config c.yaml --base_model {checkpoint}\n"
    )
    variants = {"a": None, "b": ["optim.lr=1e-3", "base:optim.beta1=0.8", "sft:chat.epochs=2"]}
    plan = {"command": "scripts.pipeline", "config": str(tmp_path / "plan.yaml"), "budget": {}}
    path = write(tmp_path, variants=variants, **plan)
    trial = make_trial(load_experiment(path), "b", 7)
    base = trial.files["base.yaml"]
    assert (base["seed"], base["optim"]["lr"], base["optim"]["beta1"]) == (7, "1e-3", 0.8)
    data, sft = trial.files["plan.yaml"]["stages"][0]["commands"].values()
    assert data.endswith("--output_dir x") and sft.endswith("chat.epochs=2 seed=7")
    assert trial.files["plan.yaml"]["phases"] == [{"config": "base.yaml"}]
    assert trial.working_folder == trial.folder and trial.checkpoints.parent == trial.folder
    unknown = write(tmp_path, **{**yaml.safe_load(path.read_text()), "overrides": ["dpo:seed=1"]})
    with pytest.raises(ValueError, match="dpo, which is not a phase or stage; there are base, sft"):
        make_trial(load_experiment(unknown), "a", 0)


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"compare": {"baseline": "c"}}, [], "'c' is not a variant; variants: a, b"),
        ({"budget": {}}, [], "budget has no limit; set exactly one of tokens, steps, seconds"),
        ({"budget": {"steps": 9, "tokens": 9}}, [], "exactly one of tokens, steps, seconds"),
        ({"budget": {"tokens": 100}}, [], "less than one step of variant a"),
        ({"seeds": [1, 1]}, [], "must be different numbers"),
        ({"variants": {"a": ["steps=3"]}}, [], "variant a: steps is set by the experiment"),
        ({"variants": {"a": ["optim.lrr=3"]}}, [], "optim.lrr is not a setting"),
        ({"variants": {"a/b": []}}, [], "'a/b' must consist of letters"),
        ({"variants": {"a": {"overides": []}}}, [], "did you mean 'overrides'?"),
        ({"command": "trainer.py"}, [], "command='trainer.py' is unknown"),
        ({"command": "x {logs} {sed}"}, [], "{sed} in the command is unknown"),
        ({"command": "scripts.pipeline"}, [], "budget has no effect on a plan"),
        ({"config": None}, [], "variant a has no config"),
        ({"command": "x {logs}"}, ["--only", "c"], "--only c: the variants are a, b"),
        ({"command": "x {logs}", "ranks": 2}, ["--devices", "0"], "lists 1 devices"),
        ({}, ["--report_only"], "no run has finished with the present settings"),
        ({}, ["seeds=[-1]"], "seeds[0]=-1 must not be negative"),
    ],
)
def test_bad_input_gives_one_sentence(changes, arguments, sentence, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, **changes)
    assert sentence in complaint_of(main, [path, *arguments], capfd, monkeypatch)
    assert not (tmp_path / "records").exists()


def test_an_experiment_is_needed_and_other_commands_know_its_file(tmp_path, monkeypatch, capfd):
    assert "name the YAML file" in complaint_of(main, [], capfd, monkeypatch)
    with pytest.raises(ValueError, match=r"is an experiment; give it to scripts\.experiment"):
        load(write(tmp_path))


def test_every_experiment_of_the_repository_can_be_read():
    paths = sorted((ROOT / "configs" / "lab").glob("*.yaml"))
    assert paths
    for path in paths:
        experiment = load_experiment(path)
        assert experiment.name == path.stem
        assert all(make_trial(experiment, name, 0, 1.0).words for name in experiment.variants)


# runs


def test_finished_runs_are_not_repeated_and_changed_ones_are(fake, tmp_path, monkeypatch, capsys):
    started = tmp_path / "logs" / "lab" / "basic" / "started"
    start(monkeypatch, fake({"a": 1.0, "b": 2.0}))
    assert started.read_text().split() == ["a-0", "b-0", "a-1", "b-1"]
    start(monkeypatch, fake({"a": 1.0, "b": 2.0}), "--seeds", 1, 2)
    assert started.read_text().split()[4:] == ["a-2", "b-2"]
    changed = [fake({"a": 1.0, "b": 3.0}), "--only", "b"]
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.1)
    with run_folder.locked(started.parent / "b-0"):  # an earlier session's run still saves
        assert "b-0 is in use by" in complaint_of(main, changed, capsys, monkeypatch)
    start(monkeypatch, *changed)
    assert started.read_text().split()[6:] == ["b-0", "b-1"]
    earlier = started.parent / "b-0.old1" / "metrics.jsonl"
    assert json.loads(earlier.read_text().splitlines()[-1])["val/loss"] == 2.0
    assert "its settings have changed" in capsys.readouterr().out
    [record] = (tmp_path / "records").iterdir()
    text = (record / "README.md").read_text()
    assert "better than the baseline: -2.0000 (all 2 equal), paired by seed, n=2" in text


def test_checkpoints_without_a_log_are_not_resumed(fake, tmp_path, monkeypatch, capsys):
    left = tmp_path / "checkpoints" / "lab" / "basic" / "a-0"
    (left / "step_1").mkdir(parents=True)
    start(monkeypatch, fake({"a": 1.0}, seeds=[0]))
    assert (left.with_name("a-0.old1") / "step_1").is_dir() and not left.exists()
    output = capsys.readouterr().out
    assert "a-0: logs/lab/basic/a-0 is missing; the earlier checkpoints are in " in output
    assert "checkpoints/lab/basic/a-0.old1" in output


def test_a_failed_run_is_recorded_tried_again_and_stops_no_other(
    fake, tmp_path, monkeypatch, capfd
):
    path = fake({"a": 1.0, "broken": -1.0, "b": 2.0}, seeds=[0])
    error = complaint_of(main, [path], capfd, monkeypatch)
    assert "1 run(s) failed: broken-0 (error: the gain -1 is negative)" in error
    [record] = (tmp_path / "records").iterdir()
    text = (record / "README.md").read_text()
    assert "Not finished, so not in the tables: broken-0." in text
    assert "broken-0 failed with exit status 1: `error: the gain -1 is negative`" in text
    assert "| b | 1 | 2.0000 (n=1, no interval) |" in text
    complaint_of(main, [path], capfd, monkeypatch)
    started = (tmp_path / "logs" / "lab" / "basic" / "started").read_text().split()
    assert started == ["a-0", "b-0", "broken-0", "broken-0"]


def test_a_command_that_measures_nothing_or_does_not_exist_has_failed(
    fake, monkeypatch, tmp_path, capfd
):
    path = fake({"a": 1.0}, compare={"baseline": "a", "metric": "val/lost"}, seeds=[0])
    error = complaint_of(main, [path], capfd, monkeypatch)
    assert "a-0 measured no val/lost; metrics of its log: val/loss" in error
    missing = write(tmp_path, command="./no_such_program {logs}", seeds=[0])
    assert "No such file" in complaint_of(main, [missing], capfd, monkeypatch)


def test_runs_share_devices_and_cores(monkeypatch):
    monkeypatch.setattr(lab_run, "cpus", lambda: 8)
    slots = Slots({"PATH": "x"}, ["0", "1", "2", "3"], ranks=2)
    names = [slots.free.get_nowait() for _ in range(slots.count)]
    assert names == ["0,1", "2,3"]
    environment = slots.environment_on("2,3")
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("2,3", "2")
    assert Slots({"OMP_NUM_THREADS": "5"}).environment_on(None)["OMP_NUM_THREADS"] == "5"
    assert Slots({"OMP_NUM_THREADS": "5"}, threads=3).environment_on(None)["OMP_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in Slots({}).environment_on(None)


def test_a_variant_may_be_a_command_of_another_code_base(fake, tmp_path, monkeypatch):
    path = fake({"a": 1.0}, overrides=["7"])  # appended to the shared command only
    variant = {"command": "python fake.py {logs} {seed} 2.0 {steps} {output}"}
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "variants": {"a": ["1"], "peer": variant}}))
    experiment = load_experiment(path)
    folder = tmp_path / "logs" / "lab" / "basic"
    assert make_trial(experiment, "a", 5).words[2:] == (str(folder / "a-5"), "5", "7", "1")
    output = tmp_path / "checkpoints" / "lab" / "basic" / "peer-5"
    words = (str(folder / "peer-5"), "5", "2.0", "10", str(output))
    assert make_trial(experiment, "peer", 5).words[2:] == words


def test_two_devices_run_two_at_a_time(fake, tmp_path, monkeypatch):
    start(monkeypatch, fake({"a": 1.0, "b": 2.0}), "--devices", "0,1")
    assert len(list((tmp_path / "logs" / "lab" / "basic").glob("*/trial.json"))) == 4


# records


def measurement(variant: str, seed: int, values: list[float], seconds: float = 1.0) -> Measurement:
    points = [
        Point(step, 100 * step, seconds * step, value) for step, value in enumerate(values, start=1)
    ]
    n = len(values)
    final = {"val/loss": values[-1]}
    return Measurement(variant, seed, {"val/loss": points}, final, n, 100 * n, seconds * n)


def test_a_target_that_is_never_reached_is_said_with_the_loss():
    runs = [measurement("a", seed, [5.0, 4.0, 3.0 + seed / 10]) for seed in (0, 1)]
    runs += [measurement("b", 0, [5.0, 4.5, 3.5]), measurement("b", 1, [4.0, 3.05, 2.5], 2.0)]
    result = compare_variants(Compare(baseline="a"), runs)
    a, b = result.variants
    assert result.target == pytest.approx(3.05)
    assert a.position("tokens") == estimate([300.0, 300.0])
    assert b.reached["tokens"] == {0: None, 1: 200.0} and b.reached["seconds"][1] == 4.0
    assert b.position("tokens") is None and b.ratio["tokens"] is None
    given = compare_variants(Compare(baseline="a", target=3.6, sigma=0.1), runs)
    a, b = given.variants
    assert a.p_target == stats.ttest_1samp([3.0, 3.1], 3.6, alternative="less").pvalue
    assert b.p_sigma == pytest.approx(stats.norm.cdf(-0.6 * math.sqrt(2) / 0.1))
    # Crossings of 3.6: a-0 at 240 of [200, 300], a-1 at 244.4; b-0 at 290, b-1 at 142.1.
    expected = [290 / 240, (100 + 100 * 0.4 / 0.95) / (200 + 100 * 0.4 / 0.9)]
    ratio = b.ratio["tokens"]
    assert ratio is not None and ratio.mean == pytest.approx(sum(expected) / 2)


def test_the_record_names_deviations_and_differences_within_noise(fake, tmp_path, monkeypatch):
    def edit(change):
        for path in sorted((tmp_path / "logs" / "lab" / "basic").glob("*-*/metrics.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            change(path.parent.name, rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def noise(name, rows):
        rows[-1]["val/loss"] += {"b-0": 0.3, "b-1": -0.2}.get(name, 0.0)
        if name == "b-1":
            rows[-1]["step_s"] = 2.0  # 6.5 s instead of 5

    path = fake({"a": 1.0, "b": 1.0}, budget={"seconds": 5})
    start(monkeypatch, path)
    edit(noise)
    start(monkeypatch, path, "--report_only")
    [record] = (tmp_path / "records").iterdir()
    text = (record / "README.md").read_text()
    assert "b: no difference beyond noise: +0.0500 [" in text
    assert "b-1 used 6.5 s of training, +30% against the budget of 5 s" in text
    assert "not reached by 1 of 2 runs (final: 3.3000)" in text
    assert {path.name for path in record.iterdir()} == {
        *("README.md", "configs", "curves.csv", "curves.png", "environment.json"),
        *("experiment.yaml", "result.json", "to_target.png"),
    }
    lines = (record / "curves.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 10 and lines[1] == "a,0,val/loss,1,100,0.500,3.900000"
    assert load_experiment(record / "experiment.yaml") == load_experiment(path)
    assert json.loads((record / "result.json").read_text())["target"] == pytest.approx(3.005)


def test_values_of_result_files_are_compared_too(fake, tmp_path, monkeypatch):
    metrics = ["results.json:needle.4x", "results.json:needle.2x", "lost.json:x"]
    compare = {"baseline": "a", "also": metrics}
    path = fake({"a": 1.0, "b": 2.0}, compare=compare)
    start(monkeypatch, path)
    for seed in (0, 1):
        for name, value in (("a", 0.25), ("b", 0.5 + seed)):
            file = tmp_path / "logs" / "lab" / "basic" / f"{name}-{seed}" / "results.json"
            content = {"4x": {"value": value, "stderr": None}, "2x": value}
            file.write_text(json.dumps({"needle": content}))
    experiment = load_experiment(path)
    trials = plan_trials(experiment, ["a", "b"], [0, 1])
    record = write_record(experiment, trials, "command", tmp_path / "records")
    text = (record / "README.md").read_text()
    assert text.count("| b | 2 | 1.0000 [-5.3531, 7.3531] | +0.7500 [") == 2
    assert "lost.json:x was not measured by a-0, a-1, b-0, b-1." in text


# a real experiment


def test_a_killed_experiment_continues_and_equals_an_uninterrupted_one(text_store, tmp_path):
    overrides = [
        f"data.store={text_store}",
        "data.mix={first: 0.6, second: 0.4}",
        f"model.vocab_size={VOCAB}",
        "schedule={warmup_steps: 2, total_steps: 12, decay_steps: 4}",
        "parallel.dtype=float32",
        "validation={every: 4, rows: 2}",
        "checkpoint.every=2",
    ]
    path = write(
        tmp_path, overrides=overrides, variants={"a": None, "same": []}, budget={"steps": 8}
    )
    command = [sys.executable, "-m", "scripts.experiment", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "logs" / "lab" / "basic"
    checkpoints = tmp_path / "checkpoints" / "lab" / "basic"
    with forked.Process(command, tmp_path, environment) as process:
        end = time.monotonic() + 120
        while not any(checkpoints.glob("a-0/step_*")) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "a-1").exists()
    done = forked.run(command, tmp_path, environment)
    assert done.returncode == 0, done.stderr + done.stdout
    losses = {}
    for name in ("a-0", "a-1", "same-0", "same-1"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert not (checkpoints / name).exists()
    assert losses["a-0"] == losses["same-0"] != losses["a-1"] == losses["same-1"]
    assert len(losses["a-0"]) == 8
    states = [json.loads(path.read_text()) for path in folder.glob("*/trial.json")]
    assert [state["status"] for state in states] == ["finished"] * 4
    [record] = (tmp_path / "records").iterdir()
    assert "same: has the same values as the baseline" in (record / "README.md").read_text()
    resolved = load(record / "configs" / "same.yaml")
    assert resolved.steps == 8 and resolved.data.store == str(text_store)
