"""torchrun and accelerate launch: one-sentence errors for users, and the same training."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
from conftest import ROOT, one_thread, train_here
from test_training import losses, wait_for_a_step
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing import api

import torchrun_plugin
from evals.run import ranks
from training.ops import watchdog

pytestmark = pytest.mark.one_layer

BIN = Path(sys.executable).parent


def launch_forked(*command: object, where: Path) -> subprocess.CompletedProcess:
    """Do what `launch` does with a launcher and ranks that are forked: torch is imported once."""
    return forked.run([sys.executable, *command], cwd=where, env=one_thread())


def launch(*command: object, where: Path = ROOT) -> subprocess.CompletedProcess:
    line = [str(part) for part in command]
    return subprocess.run(line, capture_output=True, text=True, cwd=where, env=one_thread())


def test_torchrun_ends_with_the_ranks_sentence_and_status(tmp_path):
    """The ranks run a script that does not import torch, to be fast."""
    line = ["--nproc_per_node=2", ROOT / "scripts" / "plot_run.py", "nope"]
    done = launch(BIN / "torchrun", *line, where=tmp_path)
    assert done.returncode == 2, done.stderr
    message = "error: nope/metrics.jsonl has no metrics yet; train first"
    assert done.stderr.splitlines()[-1] == message and "Traceback" not in done.stderr


def test_accelerate_and_torch_distributed_run_do_so_too(tmp_path):
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for launcher in (
        [BIN / "accelerate", "launch", *flags],
        ["-m", "torch.distributed.run", "--nproc_per_node=2"],
    ):
        if launcher[0] == BIN / "accelerate" and not launcher[0].exists():
            continue
        line = [*launcher, ROOT / "train_sft.py", "--config", "nope.yaml"]
        done = launch_forked(*line, where=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == "error: config file nope.yaml not found"
        assert "Traceback" not in done.stderr


def test_a_wrong_script_or_number_of_processes_is_one_sentence(tmp_path):
    launcher = [sys.executable, "-m", "scripts.launch"]
    for flags, message in (
        (
            ["--nproc_per_node=2", "trian.py"],
            "error: script trian.py not found; the entry points are train.py,",
        ),
        (
            ["--nproc_per_node=two", "train.py"],
            "error: a flag of torchrun is wrong: Unsupported nproc_per_node value: two\n",
        ),
        (["--nnodes=a:b", "train.py"], "error: a flag of torchrun is wrong: invalid literal"),
        (["--nproc_per_node=0", "train.py"], "error: a flag of torchrun is wrong: --nproc_per_"),
        (["--nproc_per_node=2", "train.py", "--nope"], "error: unknown flag --nope; "),
    ):
        done = forked.run([*launcher, *flags], cwd=tmp_path, env=one_thread())
        assert (
            done.returncode == 2
            and done.stderr.startswith(message)
            and done.stderr.count("\n") == 1
        ), done.stderr
    done = launch(BIN / "torchrun", "--nproc_per_node=2", "train.py", where=tmp_path)
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "can't open file" in done.stderr.splitlines()[-1]
    )


SLOW = """
import os, runpy, sys, time
from torch import distributed as dist

def slow(*arguments, join=dist.init_process_group, **options):
    join(*arguments, **options)
    store = dist.distributed_c10d._get_default_store()
    if os.environ["RANK"] == "0":
        store.set("address", "0")
    else:  # as if this rank still read the others' addresses
        time.sleep(0.5)
        store.get("address")

dist.init_process_group = slow
command = sys.argv.pop(1)
runpy.run_module(command, run_name="__main__")
"""


def test_a_user_error_right_after_joining_is_one_sentence(tmp_path):
    """Rank 0 must not exit while another rank needs its store.

    With --monitor-interval the launcher gives the other rank time to print a traceback.
    """
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    line = ["-m", "scripts.launch", "--nproc_per_node=2", "--monitor-interval=1.5", script]
    line += ["scripts.run_evals", "--suite", "quick", "--checkpoint", "nope"]
    done = launch_forked(*line, where=tmp_path)
    assert done.returncode == 2, done.stderr
    message = "error: checkpoint nope does not exist; check the path\n"
    assert done.stderr == message


def test_a_rank_that_never_joins_is_one_sentence(monkeypatch, capsys):
    """The evaluations' group; init_process_group fails as it does without its rank 0."""
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    for error in (
        dist.DistNetworkError("Connection reset by peer\nframe #0: c10::Error"),
        RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error"),
    ):
        monkeypatch.setattr(dist, "init_process_group", raising(error))
        with pytest.raises(SystemExit, match=str(watchdog.LOST)), ranks("cpu"):
            pass
        text = capsys.readouterr().err
        assert text.startswith("error: rank 1 lost its connection to another rank")
        assert str(error).splitlines()[0] in text and "frame" not in text


def raising(error: Exception):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


def test_scripts_of_others_keep_torchruns_own_behaviour(tmp_path):
    (tmp_path / "other.py").write_text("raise SystemExit(5)\n")
    done = launch(BIN / "torchrun", "--nproc_per_node=2", "other.py", where=tmp_path)
    assert done.returncode == 1 and "ChildFailedError" in done.stderr and "Traceback" in done.stderr
    assert "exitcode  : 5" in done.stderr and "plugin" not in done.stderr


def test_a_rank_that_is_killed_is_named(tmp_path):
    code = "import os, signal, sys; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\n"
    package = tmp_path / "ours.py"
    package.write_text(code)
    driver = (
        "import sys, runpy, pathlib, torchrun_plugin;"
        "torchrun_plugin.ROOT = pathlib.Path.cwd();"
        "sys.argv = ['torchrun', '--nproc_per_node=2', 'ours.py'];"
        "sys.orig_argv = ['python', *sys.argv];"
        "from torch.distributed.run import main; main()"
    )
    done = launch(sys.executable, "-c", driver, where=tmp_path)
    assert done.returncode == 137, done.stderr
    message = "error: rank 1 was ended by signal 9; signal 9 often means out of memory"
    assert done.stderr.splitlines()[-1] == message


def test_which_command_lines_are_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    ours, theirs = str(ROOT / "train.py"), str(tmp_path / "mine.py")
    for line, expected in (
        (["torchrun", "--nproc_per_node=2", ours, "--config", "x"], True),
        (["torchrun", theirs, ours], False),
        (["torchrun", "-m", "scripts.run_evals"], True),
        (["torchrun", "--module", "torch.distributed.run"], False),
        (["torchrun", "-m", "no.such.module"], False),
        (["torchrun", "--no-python", "train"], False),
    ):
        assert torchrun_plugin.starts_our_script(line[1:]) is expected, line
    (tmp_path / "scripts").mkdir()  # another project with a package of the same name
    (tmp_path / "scripts" / "run_evals.py").write_text("")
    assert not torchrun_plugin.starts_our_script(["-m", "scripts.run_evals"])
    for line, expected in (
        (["python", "/x/bin/torchrun", "a.py"], True),
        (["python", "-m", "torch.distributed.run", "a.py"], True),
        (["python", "/x/bin/accelerate", "launch", "a.py"], True),
        (["python", ours, "torchrun"], False),
        (["python", "-m", "pytest", "x"], False),
    ):
        assert torchrun_plugin.is_launcher(line) is expected, line


def test_the_plugin_never_breaks_another_launcher():
    """In a process that is not a launcher it changes nothing and returns a handler to torch."""
    code = (
        "import sys, logging, torch.distributed.elastic.rendezvous as r;"
        "from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry as known;"
        "assert 'nanollama' in known._registry, list(known._registry);"
        "assert sys.excepthook is sys.__excepthook__ and logging.root.manager.disable == 0"
    )
    done = launch(sys.executable, "-c", code)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_accelerate_launch_trains_as_one_process_does(settings, tmp_path):
    """Two CPU processes: --multi_gpu is accelerate's name for torchrun; --cpu would start one."""
    pytest.importorskip("accelerate", reason="no accelerate: pip install -r requirements.txt")
    assert train_here(settings(f"log_dir={tmp_path / 'one'}", f"output_dir={tmp_path / 'c1'}"))
    more = settings(
        "data.micro_batch_size=2", f"log_dir={tmp_path / 'two'}", f"output_dir={tmp_path / 'c2'}"
    )
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = [ROOT / "train.py", "--config", "configs/test_mode.yaml", *more]
    done = launch_forked(BIN / "accelerate", "launch", *flags, *script, where=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert "on 2 cpu rank(s)" in done.stdout, done.stdout


def test_sigterm_to_plain_torchrun_saves_and_gives_its_status(settings, tmp_path):
    more = settings("schedule.total_steps=5000", "checkpoint.every=4000", steps=4000)
    line = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    line += ["--config", ROOT / "configs" / "test_mode.yaml", *more, "data.micro_batch_size=2"]
    environment = {**one_thread(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    process = forked.Process([sys.executable, *line], tmp_path, environment)
    wait_for_a_step(tmp_path / "logs")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "checkpoints" / "one").glob("step_*/manifest.json"))) == 1


class InterruptedLock:
    """A lock that lets a signal arrive just after it was taken."""

    def __init__(self, lock, number: int):
        self.lock, self.number = lock, number
        self.locked, self.release = lock.locked, lock.release

    def acquire(self, *arguments) -> bool:
        taken = self.lock.acquire(*arguments)
        if self.number:
            number, self.number = self.number, 0
            signal.raise_signal(number)
        return taken


@pytest.mark.parametrize("ours", [True, False])
def test_a_signal_never_leaves_the_lock_of_a_popen_taken(ours):
    """torch's own handler does: its launcher then never sees that the rank has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGALRM)}
    handler = api._terminate_process_handler
    signal.signal(signal.SIGHUP, torchrun_plugin.outside_popen(handler) if ours else handler)
    try:
        with subprocess.Popen(["true"]) as process:
            lock = process._waitpid_lock
            process._waitpid_lock = InterruptedLock(lock, signal.SIGHUP)
            with pytest.raises(api.SignalException) as caught:
                process.wait(20)
                time.sleep(20)
            left_taken, process._waitpid_lock = lock.locked(), threading.Lock()
        assert caught.value.sigval == signal.SIGHUP
        assert left_taken is not ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_each_of_two_signals_is_handled():
    seen = []
    before = signal.getsignal(signal.SIGALRM)
    handle = torchrun_plugin.outside_popen(lambda number, frame: seen.append(number))
    try:
        with subprocess.Popen(["true"]) as process, process._waitpid_lock:
            exec(
                compile("handle(1, frame()); handle(15, frame())", subprocess.__file__, "exec"),
                {"handle": handle, "frame": sys._getframe, "self": process},
            )
            assert seen == []
        time.sleep(0.1)
        assert seen == [1, 15]
    finally:
        signal.signal(signal.SIGALRM, before)
