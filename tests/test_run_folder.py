"""A phase starts at its plan's step; no start erases another run's files."""

import json
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT, complaint_of, read_metrics, train_here

import train
from training import run_folder
from training.config import load
from training.ops import self_test
from training.run_folder import locked

pytestmark = pytest.mark.one_layer


def complaint(capfd, monkeypatch, overrides: list[str]) -> str:
    return complaint_of(
        train.main,
        ["--config", ROOT / "configs" / "test_mode.yaml", *overrides],
        capfd,
        monkeypatch,
    )


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_later_phase_does_not_start_from_scratch(settings, tmp_path, capfd, monkeypatch):
    """Its config must name the phase that it continues and its first step."""
    second = settings("resume_from=one", "start_step=6", phase="two", steps=2)
    assert "two continues one, but" in complaint(capfd, monkeypatch, second)
    message = complaint(capfd, monkeypatch, [*second, "resume_from=null"])
    assert "two begins at step 6 of the run, but no checkpoint to continue was found" in message
    assert not (tmp_path / "logs" / "metrics.jsonl").exists()
    assert train_here(settings())
    before = (tmp_path / "logs" / "metrics.jsonl").read_text()
    message = complaint(
        capfd, monkeypatch, [*second, f"resume_from={tmp_path / 'checkpoints' / 'one' / 'step_3'}"]
    )
    assert (
        "step_3 is at step 3; continue from a checkpoint of step 6, or set start_step=3" in message
    )
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "logs" / "two.config.yaml").exists()
    assert train_here(second)
    assert steps(tmp_path / "logs" / "metrics.jsonl") == list(range(1, 9))
    # The phase keeps its first step.
    assert "began" not in complaint(capfd, monkeypatch, [*second, "start_step=4"])
    hyperparameters = (tmp_path / "logs" / "hyperparameters.yaml").read_text()
    assert hyperparameters.startswith("one:") and "\ntwo:" in hyperparameters
    # No start removes metrics whose checkpoints exist.
    folder, before = tmp_path / "checkpoints", (tmp_path / "logs" / "metrics.jsonl").read_text()
    fork = settings(f"resume_from={folder / 'one' / 'step_3'}", phase="fork", steps=2)
    message = complaint(capfd, monkeypatch, fork)
    assert "fork would start at step 3 and remove later metrics" in message
    message = complaint(capfd, monkeypatch, settings(steps=7))
    assert f"but two has {folder / 'two' / 'step_8'}; set another log_dir, or move" in message
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == before
    assert train_here([*fork, f"log_dir={tmp_path / 'fork'}"])
    (folder / "two").rename(folder / "away")
    assert train_here(settings(steps=7))
    assert steps(tmp_path / "logs" / "metrics.jsonl") == list(range(1, 8))


@pytest.mark.parametrize("form", ["name", "phase folder", "step folder"])
def test_resume_from_takes_a_name_a_phase_folder_or_a_step_folder(settings, tmp_path, form):
    assert train_here(settings())
    folder = tmp_path / "checkpoints" / "one"
    earlier = {"name": "one", "phase folder": str(folder), "step folder": str(folder / "step_6")}[
        form
    ]
    assert train_here(settings(f"resume_from={earlier}", "start_step=6", phase="two", steps=2))
    assert steps(tmp_path / "logs" / "metrics.jsonl") == list(range(1, 9))


def test_the_1b_phases_say_what_they_continue():
    """Each later phase of both plans has a complete config."""
    for folder, names in (
        (
            "configs",
            ("phase1_pretrain", "phase2_annealing", "phase2_16k", "phase3_crystallization"),
        ),
        ("configs/quickstart", ("base", "long_context", "gold")),
    ):
        runs = [load(ROOT / folder / f"{name}.yaml") for name in names]
        step = 0
        for before, run in zip([None, *runs], runs, strict=False):
            assert run.resume_from == (before.phase if before else None)
            assert run.start_step == (step if before else None)
            assert run.resume_folder == (before.checkpoints if before else None)
            step += run.steps


def test_two_output_folders_with_one_run_name_do_not_share_a_log(
    settings, tmp_path, capfd, monkeypatch
):
    first, second = (
        settings(f"output_dir={tmp_path / name}", steps=3) for name in ("exp1", "exp2")
    )
    assert train_here(first)
    rows = read_metrics(tmp_path / "logs")
    message = complaint(capfd, monkeypatch, second)
    assert (
        f"is the log of another run with checkpoints in {tmp_path / 'exp1'}; set another name"
        in message
    )
    assert read_metrics(tmp_path / "logs") == rows
    assert train_here([*second, f"log_dir={tmp_path / 'other'}"])
    phase = settings(
        f"resume_from={tmp_path / 'exp1'}", f"output_dir={tmp_path / 'a'}", phase="two", steps=2
    )
    assert train_here(phase)
    message = complaint(capfd, monkeypatch, [*phase, f"output_dir={tmp_path / 'b'}"])
    assert f"is the log of two in {tmp_path / 'a'}" in message
    assert steps(tmp_path / "logs" / "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_the_log_of_a_run_whose_checkpoints_are_gone_is_kept_under_another_name(
    settings, tmp_path, capfd
):
    assert train_here(settings(steps=3))
    rows = read_metrics(tmp_path / "logs")
    (tmp_path / "checkpoints" / "one").rename(tmp_path / "away")
    assert train_here(settings("seed=5", steps=2))
    assert (
        "belongs to an earlier run without checkpoints; renamed to metrics_until_"
        in capfd.readouterr().out
    )
    (old_log,) = (tmp_path / "logs").glob("metrics_until_*.jsonl")
    assert [json.loads(line) for line in old_log.read_text().splitlines()] == rows
    assert steps(tmp_path / "logs" / "metrics.jsonl") == [1, 2]


def test_steps_that_a_start_redoes_stay_in_a_file_of_their_own(settings, tmp_path):
    assert train_here(settings(steps=6))
    folder = tmp_path / "checkpoints" / "one"
    (folder / "step_6").rename(tmp_path / "away")
    assert train_here(settings(steps=6))
    assert steps(tmp_path / "logs" / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / "logs" / "metrics_redone.jsonl") == [4, 5, 6]


HOLD = """
import sys, time
from pathlib import Path
from training.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_in_a_folder_and_a_killed_one_leaves_no_lock(
    settings, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.2)
    for folder in (tmp_path / "checkpoints" / "one", tmp_path / "logs"):
        holder = forked.Process([sys.executable, "-c", HOLD, folder])
        while holder.stdout() != "held\n":
            assert holder.poll() is None, holder.stderr()
            time.sleep(0.01)
        message = complaint(capfd, monkeypatch, settings())
        assert (
            f"{folder} is in use by process {holder.pid} on " in message
            and "wait, stop it" in message
        )
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(folder):
            pass
    assert train_here(settings())


def test_test_mode_deletes_no_folder_that_is_in_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.1)
    run = load(ROOT / "configs" / "test_mode.yaml", self_test.overrides(20))
    step, row = run.checkpoints / "step_10" / "config.json", run.logs / "metrics.jsonl"
    tokens = Path(run.data.store) / "tokens" / "dummy"
    for path in (step, row, tokens):
        path.parent.mkdir(parents=True)
        path.touch()
    for folder in (run.checkpoints, run.logs):
        with locked(folder), pytest.raises(ValueError, match=f"^{folder} is in use by process "):
            self_test.clear(run)
        assert step.is_file() and row.is_file() and tokens.is_file()
    self_test.clear(run)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run.lock"} and not tokens.parent.exists() and not step.parent.exists()


def test_a_finished_stage_does_not_ignore_a_new_base(settings, tmp_path, capfd, monkeypatch):
    """Another base in the same folder is refused at every stage; the same base trains nothing."""
    for seed in (1, 2):
        where = [
            f"output_dir={tmp_path / f'base{seed}'}",
            f"log_dir={tmp_path / f'l{seed}'}",
            f"seed={seed}",
        ]
        assert train_here(settings(*where, steps=2))
    tuned = settings(f"init_from={tmp_path / 'base1' / 'step_2'}", phase="tuned", steps=2)
    assert train_here(tuned) and train_here(tuned)
    message = complaint(capfd, monkeypatch, [*tuned, f"init_from={tmp_path / 'base2' / 'step_2'}"])
    assert "was trained from another base model than" in message and "move" in message


def test_finished_phases_keep_the_config_they_were_trained_with(settings, tmp_path):
    assert train_here(settings(steps=3))
    before = (tmp_path / "logs" / "one.config.yaml").read_bytes()
    assert train_here(settings("optim.lr=0.5", "schedule.allow_rise=true", steps=3))
    assert (tmp_path / "logs" / "one.config.yaml").read_bytes() == before
