"""The console of training: one line per log.every steps, or a progress bar on a terminal."""

import io
import re
import sys

import pytest

from training import console
from training.console import StepTimes, clock, duration
from training.logger import Log, LogConfig

ROW = {
    "phase": "base",
    "loss": 3.2154,
    "lr": 3e-4,
    "grad_norm": 0.851,
    "tokens_per_s": 12_345.6,
    "end": 200,
    "data/wait_frac": 0.001,
}


@pytest.fixture
def now(monkeypatch):
    """The time of the console, which only the test advances."""
    seconds = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds[0])
    return seconds


def take_steps(log: Log, now: list[float], steps: range, seconds: float, **more) -> None:
    for step in steps:
        now[0] += seconds
        log.metrics({**ROW, "step": step, "step_s": seconds, **more})


def test_a_line_has_metrics_step_time_elapsed_and_time_left(tmp_path, now, capsys):
    with Log(tmp_path, LogConfig(every=2), True, {}) as log:
        log.open(0, 200, "base")
        take_steps(log, now, range(1, 5), 0.5)
        now[0] += 100  # validation and saving: in the elapsed time, not in the time left
        take_steps(log, now, range(5, 7), 0.5)
    assert capsys.readouterr().out.splitlines() == [
        "step      2/200  base  loss 3.215  lr 3.0e-04  grad 0.85  12,346 tok/s  500 ms/step  "
        "0:00:01 elapsed",
        "step      4/200  base  loss 3.215  lr 3.0e-04  grad 0.85  12,346 tok/s  500 ms/step  "
        "0:00:02 elapsed",
        "step      6/200  base  loss 3.215  lr 3.0e-04  grad 0.85  12,346 tok/s  500 ms/step  "
        "0:01:43 elapsed  0:01:37 left",
    ]


def test_the_time_left_is_the_median_of_recent_steps(now):
    times = StepTimes()
    times.add(600.0)  # compiles
    for _ in range(3):
        times.add(2.0)
    assert times.left(10) is None  # too few steps
    times.add(3.0)
    assert times.left(10) == 20.0
    assert times.left(0) is None  # the last step
    for _ in range(console.RECENT):
        times.add(4.0)  # longer rows: the steps before count no more
    assert times.left(10) == 40.0


def test_a_resumed_run_measures_its_own_steps(tmp_path, now, capsys):
    with Log(tmp_path, LogConfig(every=10), True, {}) as log:
        log.open(0, 200, "base")
        take_steps(log, now, range(1, 101), 9.0)
    capsys.readouterr()
    with Log(tmp_path, LogConfig(every=1), True, {}) as log:
        log.open(100, 200, "base")
        take_steps(log, now, range(101, 106), 1.0)
        log.open(102, 200, "base")  # a rollback: the same process
        take_steps(log, now, range(103, 104), 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert all(" left" not in line for line in lines[:4])
    assert lines[4].endswith("1.00 s/step  0:00:05 elapsed  0:01:35 left")
    assert lines[5].endswith("1.00 s/step  0:00:06 elapsed  0:01:37 left")


def test_waiting_and_mfu_are_shown_and_a_row_without_a_time_is_no_error(tmp_path, now, capsys):
    with Log(tmp_path, LogConfig(every=1), True, {}) as log:
        log.open(0, 200, "base")
        log.metrics({**ROW, "step": 1, "mfu": 0.412, "data/wait_frac": 0.25})
    assert capsys.readouterr().out.endswith(
        "12,346 tok/s  25% waiting for data  mfu 41.2%  0:00:00 elapsed\n"
    )


def test_a_terminal_shows_the_times_in_front_of_the_metrics(tmp_path, now, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Log(tmp_path, LogConfig(every=10), True, {}) as log:
        log.open(0, 200, "base")
        assert log.bar is not None
        log.bar.mininterval = 0.0
        take_steps(log, now, range(1, 7), 2.0)
    last = re.split(r"[\r\n]+", terminal.getvalue().strip())[-1]
    assert re.match(
        r"base: +3%\|.*\| 6/200, 2.00 s/step  0:00:12 elapsed  0:06:28 left  loss", last
    )


def test_times_as_text():
    assert [duration(seconds) for seconds in (0.0042, 0.4344, 1.0, 12.345)] == [
        "4 ms",
        "434 ms",
        "1.00 s",
        "12.35 s",
    ]
    assert [clock(seconds) for seconds in (59.6, 3723, 90_000)] == [
        "0:01:00",
        "1:02:03",
        "1 day, 1:00:00",
    ]
