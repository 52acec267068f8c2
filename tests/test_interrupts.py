"""Signals that save and end a run; closed output pipes and terminals."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import ROOT, command, one_thread, read_metrics
from test_faults import events
from test_launchers import BIN
from test_training import wait_for, wait_for_a_step

import train
from files import read_lines
from training import faults
from training.checkpoint_files import find_damage
from training.faults import StopSignal
from training.logger import Log, LogConfig
from training.ops.supervisor import Supervisor

pytestmark = pytest.mark.one_layer

QUIET = ("validation.every=0", "checkpoint={every: 100, keep: 2}")
CONFIG = ROOT / "configs" / "test_mode.yaml"
LONG = ("schedule.total_steps=5000", "validation.every=0", "checkpoint={every: 4000, keep: 2}")


@pytest.fixture
def at_each_step(monkeypatch):
    """at_each_step(hook): call hook(place) before each step's batch is read."""
    loader = train.Prefetcher

    def watch(hook: Callable[[int], object]) -> None:
        class Watched(loader):
            def at(self, place):
                hook(place)
                return super().at(place)

        monkeypatch.setattr(train, "Prefetcher", Watched)

    return watch


def status_of(overrides: list[str], monkeypatch) -> int:
    """Run train.py in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIG), *overrides])
    with pytest.raises(SystemExit) as end:
        train.main()
    return int(end.value.code or 0)


def is_whole(tmp_path: Path, step: int) -> bool:
    """Return True if a run's metrics and checkpoint are complete up to that step."""
    rows = [row["step"] for row in read_metrics(tmp_path / "logs")]
    folder = tmp_path / "checkpoints" / "one" / f"step_{step}"
    return rows == list(range(1, step + 1)) and find_damage(folder) is None


# Signals


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 129), ("SIGUSR1", 138), ("SIGTERM", 143)])
def test_a_signal_saves(settings, tmp_path, at_each_step, monkeypatch, name, status):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    at_each_step(lambda place: place == 2 and signal.raise_signal(number))
    assert status_of(settings(*QUIET), monkeypatch) == status
    assert is_whole(tmp_path, 3) and signal.getsignal(number) == before
    [stopped] = events(tmp_path / "logs", "stopped")
    assert stopped["text"].endswith("stopped by a signal and saved at step 3")
    at_each_step(lambda place: None)
    assert status_of(settings(*QUIET), monkeypatch) == 0 and is_whole(tmp_path, 6)


def test_under_nohup_sighup_changes_nothing(settings, tmp_path, at_each_step, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_each_step(lambda place: signal.raise_signal(signal.SIGHUP))
        assert status_of(settings(*QUIET), monkeypatch) == 0 and is_whole(tmp_path, 6)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_a_driver_and_its_command_ignore_sighup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    code = "import os, signal; [os.kill(p, signal.SIGHUP) for p in (os.getppid(), os.getpid())]"
    try:
        driver = Supervisor(tmp_path, 0, print)
        assert driver.run([sys.executable, "-c", code], os.environ) == driver.stopped == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_a_second_sigterm_or_sigint_interrupts_the_save(monkeypatch):
    killed = []
    monkeypatch.setattr(faults.os, "kill", lambda process, number: killed.append(number))
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.time -= stop.GRACE + 1
        # Each once; an unhandled signal would kill the process.
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.raise_signal(number)
        assert killed == [] and faults.stop_status(stop.flags()) == 129
        signal.raise_signal(signal.SIGTERM)
        assert killed == [signal.SIGTERM]


LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize(
    ("number", "message", "ends"),
    [
        (signal.SIGTERM, LOST, True),
        (signal.SIGTERM, "shape mismatch", False),
        (signal.SIGUSR1, LOST, False),
    ],
)
def test_a_rank_that_torchrun_ends_says_nothing_of_its_lost_connection(
    monkeypatch, number, message, ends
):
    killed = []
    monkeypatch.setattr(faults.os, "kill", lambda process, number: killed.append(number))
    with pytest.raises(RuntimeError), StopSignal():
        signal.raise_signal(number)
        raise RuntimeError(message)
    assert killed == [signal.SIGTERM] * ends


def test_sigusr1_to_the_launcher_saves_on_both_ranks(settings, tmp_path):
    more = settings(*LONG, "data.micro_batch_size=2", steps=4000)
    with forked.Process(command(more, 2), env=one_thread()) as process:
        wait_for_a_step(tmp_path / "logs")
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 138 and "Traceback" not in errors, errors
    assert is_whole(tmp_path, len(read_metrics(tmp_path / "logs")))


RANK = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def save(number, frame):
    pathlib.Path(f"saved_{rank}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGUSR1, save)
pathlib.Path(f"ready_{rank}").touch()
time.sleep(60)
"""


def test_sigusr1_to_plain_torchrun_reaches_the_ranks(tmp_path):
    """The ranks do not train, to be fast; ROOT makes the plug-in accept their script."""
    (tmp_path / "rank.py").write_text(RANK)
    line = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "rank.py"]
    code = (
        "import pathlib, sys, torchrun_plugin;"
        "torchrun_plugin.ROOT = pathlib.Path.cwd();"
        f"sys.argv = {line}; sys.orig_argv = ['python', *sys.argv];"
        "from torch.distributed.run import main; main()"
    )
    options = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **options) as process:
        for rank in (0, 1):
            wait_for(tmp_path / f"ready_{rank}", 60)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 138 and "Traceback" not in errors, errors
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


# Closed outputs


def start(line: list[str], *streams: str, nohup: bool = False) -> Any:
    """Start a Python command with these files as stdin, stdout and stderr."""
    arguments = (line, one_thread(), streams, nohup)
    process = forked.forkserver().Process(target=forked.run_with_streams, args=arguments)
    process.start()
    return process


def test_a_reader_that_ends_does_not_end_the_run(settings, tmp_path):
    """As in `train.py | head -2`: later lines are lost, files are complete, the status is 0."""
    line = [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG)]
    line += settings(*QUIET, "log.every=1", "schedule.total_steps=60", steps=20)
    (tmp_path / "stderr").touch()
    os.mkfifo(tmp_path / "stdout")
    reading = os.open(tmp_path / "stdout", os.O_RDONLY | os.O_NONBLOCK)  # waits for no writer
    process = start(line, "/dev/null", str(tmp_path / "stdout"), str(tmp_path / "stderr"))
    assert select.select([reading], [], [], 120)[0]
    os.set_blocking(reading, True)
    with open(reading) as reader:
        assert all(reader.readline() for _ in range(2))
    process.join(120)
    assert process.exitcode == 0 and (tmp_path / "stderr").read_text() == ""
    assert is_whole(tmp_path, 20) and len(events(tmp_path / "logs", "ended")) == 1


@pytest.mark.parametrize("nohup", [False, True], ids=["terminal", "nohup"])
def test_a_terminal_that_is_closed(settings, tmp_path, nohup):
    """SIGHUP saves and ends the run; under nohup it continues, and writes to the terminal fail."""
    master, slave = pty.openpty()
    line = [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG)]
    line += settings(*LONG, steps=60 if nohup else 4000)
    process = start(line, *[os.ttyname(slave)] * 3, nohup=nohup)
    wait_for_a_step(tmp_path / "logs")
    os.close(slave)
    assert b"parameters" in os.read(master, 1 << 16)
    os.close(master)
    process.join(120)
    assert process.exitcode == (0 if nohup else 129)
    assert is_whole(tmp_path, 60 if nohup else len(read_metrics(tmp_path / "logs")))


GUARDED = """
import os, subprocess, sys
from cli import user_errors
print("before")
with user_errors():
    for number in range(9):
        print(number, file=sys.STREAM, flush=True)
    os.write(sys.STREAM.fileno(), b"from C")
    subprocess.run([sys.executable, "-c", "print(1)"], check=True)
    print("in the buffer until exit")
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_print_libraries_children_and_the_flush_at_exit_outlive_the_reader(stream, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    code = GUARDED.replace("STREAM", stream)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **streams)
    os.close(writer)
    assert done.returncode == 0 and b"Error" not in (done.stdout or b"") + (done.stderr or b"")


def test_output_that_is_not_buffered_stays_so(monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    script = "print('out'), print('err', file=sys.stderr), os.kill(os.getpid(), 9)"
    code = f"import os, sys\nfrom cli import user_errors\nwith user_errors(): {script}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_a_full_disk_behind_stdout_is_still_an_error():
    with open("/dev/full", "w") as full:
        code = "from cli import user_errors\nwith user_errors(): print('x', flush=True)"
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **streams)
    assert done.returncode != 0 and b"No space left on device" in done.stderr


def test_an_event_is_in_both_files_before_the_console_is_told(tmp_path, monkeypatch):
    written = []

    def console(self, text: str) -> None:
        text_file = (tmp_path / "training_log.md").read_text()
        written.append((read_lines(tmp_path / "events.jsonl"), text_file))
        raise OSError("the console is gone")

    monkeypatch.setattr(Log, "say", console)
    with pytest.raises(OSError, match="gone"):
        Log(tmp_path, LogConfig(), True, {}).event("gate", "decision: go", step=4)
    [([event], text)] = written
    assert event["text"] == "decision: go" and "**gate**: decision: go" in text
