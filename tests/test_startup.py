"""Start-up checks: go, no-go with its exit status, an accepted no-go, a resumed run."""

import math
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ROOT, VOCAB, command, one_thread, read_metrics
from test_faults import equal, events, weights

import train
from training import startup
from training.config import load
from training.meter import Meter
from training.startup import NO_GO

QUIET = ("validation.every=0", "checkpoint={every: 100, keep: 2}")


@pytest.fixture
def start(monkeypatch, capfd):
    """Run train.py in this process; check its exit status; return its stderr.

    start.output: the stdout of the last run.
    """

    def start(overrides: list[str], status: int = 0) -> str:
        config = str(ROOT / "configs" / "test_mode.yaml")
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", config, *overrides])
        with pytest.raises(SystemExit) as end:
            train.main()
        start.output, errors = capfd.readouterr()  # type: ignore[attr-defined]
        assert (end.value.code or 0) == status, errors
        return errors

    return start


def figures(logs: Path) -> list[tuple[int, str, dict[str, float | None]]]:
    """Step, outcome and values of the start-up events, in order."""
    return [
        (
            event["step"],
            event["outcome"],
            {figure["name"]: figure["value"] for figure in event["figures"]},
        )
        for event in events(logs, "startup")
        if "figures" in event
    ]


def test_a_go_is_an_event_and_is_judged_once_over_a_resume(settings, tmp_path, start):
    bounds = "{steps: 5, fall: 0.01, max_grad_norm: 99, min_tokens_per_s: 1}"
    for until in (3, 5, 6):
        start(settings(*QUIET, f"startup={bounds}", f"until={until}"))
    logs, rows = tmp_path / "logs", read_metrics(tmp_path / "logs")
    [(one, outcome_1, first), (five, outcome_5, window)] = figures(logs)
    assert (one, outcome_1, five, outcome_5) == (1, "go", 5, "go")
    assert first == {"first loss": rows[0]["loss"]} and abs(rows[0]["loss"] - math.log(VOCAB)) < 1
    assert list(window) == ["fall of the loss", "median gradient norm", "tokens/s"]
    assert window["fall of the loss"] == pytest.approx(rows[0]["loss"] - rows[4]["loss"])
    assert window["median gradient norm"] == median(row["grad_norm"] for row in rows[:5])
    timed = rows[2:5]  # without the first half
    seconds = sum(row["step_s"] for row in timed)
    assert window["tokens/s"] == pytest.approx(3 * 512 / seconds)
    text = (logs / "training_log.md").read_text()
    assert "start-up checks at step 1: go; first loss" in text and "at most 99 required: go" in text


def test_a_no_go_saves_ends_with_status_3_and_goes_on_only_when_accepted(settings, tmp_path, start):
    alert_file = tmp_path / "told"
    alert = f"log.alerts.command=cat >> {alert_file}"
    bad = [*QUIET, alert, "startup={steps: 4, fall: null, max_grad_norm: 1.0e-6}"]
    errors = start(settings(*bad), NO_GO)
    logs, saved = tmp_path / "logs", tmp_path / "checkpoints" / "one"
    assert errors.startswith("error: no-go at step 4 in the start-up checks: median gradient norm ")
    assert errors.count("\n") == 1 and "grad_norm in metrics.jsonl" in errors
    assert 'repeat the command with startup.accept="reason"' in errors
    assert [(step, outcome) for step, outcome, _ in figures(logs)] == [(1, "go"), (4, "no-go")]
    assert [path.name for path in saved.glob("step_*")] == ["step_4"]
    [stopped] = events(logs, "stopped")
    assert stopped["text"].endswith("stopped by the start-up checks and saved at step 4")
    assert alert_file.read_text().count("startup at step") == 2  # the go does not silence the no-go
    assert start(settings(*bad), NO_GO) == errors
    assert len(read_metrics(logs)) == 4  # it trains no step
    start(settings(*bad, "startup.accept=a small model"))
    accepted = events(logs, "startup")[-1]
    assert accepted["accepted"] == "a small model" and "median gradient norm" in accepted["text"]
    plain = [f"output_dir={tmp_path / 'plain'}", f"log_dir={tmp_path / 'plain_logs'}"]
    start(settings(*QUIET, *plain))
    assert len(read_metrics(logs)) == 6 and equal(weights(saved, 6), weights(tmp_path / "plain", 6))
    assert not events(tmp_path / "plain_logs", "startup")  # steps: 0 in test_mode.yaml


def test_a_wrong_first_loss_ends_the_run_after_one_step(settings, tmp_path, start):
    wrong = "startup={steps: 4, loss_margin: 1.0e-9}"
    errors = start(settings(*QUIET, wrong), NO_GO)
    assert (
        "no-go at step 1 in the start-up checks: first loss 5.9" in errors
        and "model.initializer_range" in errors
    )
    assert (tmp_path / "checkpoints" / "one" / "step_1" / "state").is_dir()
    again = [f"output_dir={tmp_path / 'b'}", f"log_dir={tmp_path / 'lb'}"]
    start(settings(*QUIET, *again, wrong, "startup.accept=known", "startup.fall=0.01"))
    outcomes = [(step, outcome) for step, outcome, _ in figures(tmp_path / "lb")]
    assert outcomes == [(1, "no-go"), (4, "go")]


def test_a_run_from_other_weights_is_not_asked_for_its_loss(settings, tmp_path, start):
    start(settings(*QUIET, steps=3))
    base = tmp_path / "checkpoints" / "one"
    strict = "startup={steps: 50, loss_margin: 1.0e-9, fall: 90, max_grad_norm: 99}"
    for name, source, end in (
        ("weights", f"init_from={base / 'step_3'}", 2),
        ("phase", f"resume_from={base}", 5),
    ):
        start(settings(*QUIET, strict, source, f"log_dir={tmp_path / name}", phase=name, steps=2))
        [(step, outcome, values)] = figures(tmp_path / name)  # the phase is shorter than the window
        assert (step, outcome, list(values)) == (end, "go", ["median gradient norm"])


def test_gpu_utilization_is_reported_bounded_and_named_where_it_is_unknown(
    settings, tmp_path, start, monkeypatch
):
    asked = "startup={steps: 2, fall: null, min_gpu_utilization: 0.5}"
    start(settings(*QUIET, asked))  # a CPU: one line, and not a failure
    assert [list(values) for _, _, values in figures(tmp_path / "logs")] == [["first loss"]]
    assert start.output.count("startup.min_gpu_utilization is not checked on cpu") == 1

    run = load(ROOT / "configs" / "test_mode.yaml", [asked])
    unbounded = load(ROOT / "configs" / "test_mode.yaml", ["startup={steps: 2, fall: null}"])
    state = SimpleNamespace(phase_start=9, phase_end=20, model=SimpleNamespace())
    rows = [{"step": step, "gpu_util": 0.4} for step in range(10, 22)]
    [idle] = startup._full_window(run, state, rows)
    assert not idle.go and str(idle) == "GPU utilization 0.4, at least 0.5 required"
    [reported] = startup._full_window(unbounded, state, rows)
    assert reported.go and startup._verdict(reported) == "GPU utilization 0.4"

    state.model.parameters = lambda: iter([torch.empty(0, device="meta")])
    assert list(startup._full_window(run, state, rows[:0])) == []
    monkeypatch.setattr(startup, "_on_gpu", lambda state: True)
    [unknown] = startup._full_window(run, state, rows[:0])
    assert not unknown.go and "GPU utilization not measured" in str(unknown)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 1 / 0)
    [line] = startup.unmeasured_line(run, torch.device("cuda"))
    assert "pip install nvidia-ml-py" in line and not startup.unmeasured_line(
        unbounded, torch.device("cuda")
    )
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 0)
    assert not startup.unmeasured_line(run, torch.device("cuda"))


def test_a_no_go_ends_all_ranks_under_the_launcher(settings, tmp_path):
    bad = settings(*QUIET, "data.micro_batch_size=2", "startup={steps: 2, fall: 90}")
    done = forked.run(command(bad, 2), env=one_thread(), timeout=120)
    assert done.returncode == NO_GO, done.stderr
    assert done.stderr.count("error:") == 1 and "fall of the loss" in done.stderr
    assert (tmp_path / "checkpoints" / "one" / "step_2" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("startup.steps=-1", "startup.steps=-1 must not be negative; 0 turns the checks off"),
        ("startup.fall=0", r"startup.fall=0.* must be above 0; null turns this check off"),
        (
            "startup.min_gpu_utilization=90",
            r"must be above 0 and at most 1; null turns this check off",
        ),
        ("startup.max_norm=3", "max_norm.* is not a setting"),
    ],
)
def test_wrong_bounds(override, message):
    with pytest.raises(ValueError, match=message):
        load(ROOT / "configs" / "test_mode.yaml", [override])


def test_every_phase_of_the_1b_model_has_the_floor_of_the_plan():
    phases = sorted((ROOT / "configs").glob("phase*.yaml"))
    checks = {path.stem: load(path).startup for path in phases}
    floors = {(check.min_tokens_per_s, check.min_gpu_utilization) for check in checks.values()}
    assert len(checks) >= 3 and floors == {(20_000, 0.8)}, checks


def test_gpu_utilization_is_sampled_and_absent_where_it_cannot_be_read(monkeypatch):
    model = load(ROOT / "configs" / "test_mode.yaml").model
    meter = Meter(model, 64, 1, torch.device("cpu"), every=3)
    assert "gpu_util" not in meter.stop(512)
    meter.samples, asked = True, []

    def utilization(device):
        asked.append(device)
        if len(asked) > 2:
            raise ModuleNotFoundError("pynvml")
        return 87

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    samples = [meter._gpu_utilization() for _ in range(15)]
    assert samples == [{"gpu_util": 0.87} if step in (3, 6) else {} for step in range(1, 16)]
    assert len(asked) == 3  # not again after it failed
