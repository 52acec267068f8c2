"""Commands in processes forked from one that has imported torch; so are the Python processes that they start.

A process keeps its place in the tree: the parent of a rank is its launcher, whose parent is the driver. fork takes the place
of fork and exec, so a command costs no imports.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

PRELOADED = (
    *(
        "train",
        "train_sft",
        "train_dpo",
        "scripts.pipeline",
        "scripts.launch",
        "scripts.export_gguf",
    ),
    *(
        "scripts.prepare_data",
        "scripts.train_tokenizer",
        "scripts.download_data",
        "evals.eval_perplexity",
    ),
    *("torch._dynamo", "torch.distributed.checkpoint", "transformers.utils.chat_template_utils"),
    *("training.run_folder", "benchmarks.faulty_train"),
)
STATES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
plain_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked", "test_fault_table", *PRELOADED])
    return context


class Forked:
    """A command, given as what follows `python`: the part of Popen that benchmarks/fault_sites.py uses."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], output: Path):
        arguments = (command, str(folder), {**os.environ, **environment}, str(output))
        output.touch()
        self.process = forkserver().Process(target=_first, args=arguments)
        self.process.start()

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode


def _first(command: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(folder)
    run_python([sys.executable, *command], environment)


def run_python(argv: list[str], environment: dict[str, str]) -> None:
    """Become `python ...` and end this process."""
    status: Any = 1
    try:
        for number in STATES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(
                    number,
                    signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
                )
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        sys.orig_argv = argv
        subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
        from benchmarks.fault_points import install
        from training import run_folder

        run_folder.PATIENCE = float(environment.get("LOCK_PATIENCE", "5"))
        install(argv)
        status = _main([word for word in argv[1:] if word != "-u"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _main(words: list[str]) -> int:
    warnings.filterwarnings("ignore", message=".*found in sys.modules")
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _execute_child(
    self: Any,
    args: Any,
    executable: Any,
    preexec: Any,
    close: Any,
    passed: Any,
    cwd: Any,
    env: Any,
    *more: Any,
):
    """Popen's own, but for a Python script or module, which is forked and not executed."""
    words = [os.fspath(word) for word in args] if not isinstance(args, str) else [args]
    if words[0] != sys.executable or "-c" in words[:3]:
        return plain_child(self, args, executable, preexec, close, passed, cwd, env, *more)
    _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, session, _ = (
        more
    )
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if not self.pid:
        try:
            if session:
                os.setsid()
            for source, target in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2)):
                if source not in (-1, target):
                    os.dup2(source, target)
            os.closerange(3, 1 << 12)
            if cwd:
                os.chdir(cwd)
            run_python(words, dict(os.environ if env is None else env))
        finally:
            os._exit(1)
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    return None
