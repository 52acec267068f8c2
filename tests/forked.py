"""Run Python commands in processes forked from one that has already imported torch.

A forked command saves 2-4 s of imports; the Python processes that it starts are forked too. The
process tree stays as with exec: the parent of a rank is its launcher, whose parent is the driver.
"""

import atexit
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = ("train", "train_sft", "train_dpo", "train_gpt", "training.run_folder")
SCRIPTS = (
    "pipeline launch export_gguf prepare_data train_tokenizer download_data run_evals experiment"
)
TORCH = (
    *("_dynamo", "_inductor.config", "_functorch.partitioners"),
    *("distributed.checkpoint", "distributed.run", "onnx"),
)
TESTS = ("forked", "miniature", "test_checkpoint", "test_fault_table", "test_pipeline")
PRELOADED = (
    *ENTRY_POINTS,
    *(f"scripts.{name}" for name in SCRIPTS.split()),
    *(f"torch.{name}" for name in TORCH),
    *("evals.eval_perplexity", "benchmarks.faulty_train", "data.pipeline.steps"),
    *("transformers.utils.chat_template_utils", "transformers.generation.utils", "xgrammar"),
    *("matplotlib.pyplot", *TESTS),
    "preloaded",  # last: it freezes what the others have imported
)
STATES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)


def _renew_thread_pool() -> None:
    """Replace torch's thread pool, which does not survive a fork, before autograd's threads do.

    Two of them would race (torch 2.13 with CUDA): "pool INTERNAL ASSERT FAILED".
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


os.register_at_fork(after_in_child=_renew_thread_pool)
original_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def forkserver() -> Any:
    """Start a forkserver that has imported PRELOADED, once per process; return its context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = dict(os.environ)
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Process:
    """A Python command: the part of Popen(stdout=PIPE, stderr=PIPE, text=True) that tests use.

    The process leads its own session.
    """

    def __init__(self, command: Sequence[Any], cwd: Path = ROOT, env: dict[str, str] | None = None):
        self.words = [str(word) for word in command]
        assert self.words[0] == sys.executable, self.words
        environment = dict(os.environ if env is None else env)
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.outputs:
            path.touch()
        arguments = (self.words, str(cwd), environment, *map(str, self.outputs))
        self.process = forkserver().Process(target=_first, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def stdout(self) -> str:
        """Return the standard output up to now."""
        return self.outputs[0].read_text(encoding="utf-8", errors="replace")

    def stderr(self) -> str:
        """Return the standard error up to now."""
        return self.outputs[1].read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended and the forkserver has reaped it
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> list[str]:
        """Wait for the end; return stdout and stderr. Kills the session when the time is over."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            raise
        texts = [self.stdout(), self.stderr()]
        self.folder.cleanup()
        return texts


def run(
    command: Sequence[Any],
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Do what subprocess.run(capture_output=True, text=True) does, for a Python command."""
    process = Process(command, cwd, env)
    stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(process.words, process.wait(), stdout, stderr)


class Forked:
    """A Python command without `python`: the part of Popen that benchmarks/fault_sites.py uses."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], output: Path):
        output.touch()
        words, environment = [sys.executable, *command], {**os.environ, **environment}
        arguments = (words, str(folder), environment, str(output), str(output))
        self.process = forkserver().Process(target=_first, args=arguments)
        self.process.start()

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode


def _first(
    words: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str
) -> None:
    os.setsid()
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    run_python(words, environment)


def run_with_streams(
    words: list[str], environment: dict[str, str], paths: Sequence[str], nohup: bool = False
) -> None:
    """Run a Python command in a new session whose standard streams are these files.

    A terminal becomes the session's controlling terminal. nohup: ignore SIGHUP.
    """
    os.setsid()
    for number, path in enumerate(paths):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    os.chdir(ROOT)
    run_python(words, environment)


def run_python(argv: list[str], environment: dict[str, str]) -> None:
    """Run the command `python ...` in this process and end the process with its status."""
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
        for inherited in weakref.finalize._registry.values():  # type: ignore[attr-defined]
            inherited.atexit = False  # else temporary folders of the parent are deleted
        _name_frozen_frames()
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        sys.orig_argv = argv
        subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
        import torchrun_plugin
        from benchmarks.fault_points import install
        from training import run_folder

        torchrun_plugin.plug_in()  # torch calls it during its import, which was before the fork

        run_folder.LOCK_TIMEOUT = float(environment.get("LOCK_PATIENCE", "5"))
        install(argv)
        status = _main([word for word in argv[1:] if word != "-u"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _name_frozen_frames() -> None:
    """Spare inspect.stack a search of all modules (2 s in torchrun) for each frame of these files.

    inspect looks their names up as paths in the working folder.
    """
    for name in ("<frozen runpy>", "<string>"):
        inspect.modulesbyfile[os.path.abspath(name)] = "runpy"  # type: ignore[attr-defined]


def _main(words: list[str]) -> int:
    warnings.filterwarnings("ignore", message=".*found in sys.modules")
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        try:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        except SystemExit as end:
            return int(end.code or 0)
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
    """Popen._execute_child, but fork a Python script or module instead of executing it."""
    words = [os.fspath(word) for word in args] if not isinstance(args, str) else [args]
    _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, session, _ = (
        more
    )
    # Execute pip, and helpers that read requests from a pipe and limit their own memory.
    executed = "-c" in words[:3] or words[1:3] == ["-m", "pip"] or p2cwrite != -1
    if words[0] != sys.executable or executed:
        return original_execute_child(
            self, args, executable, preexec, close, passed, cwd, env, *more
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
            tracker = resource_tracker._resource_tracker  # its pipe is closed; start another
            tracker._fd = tracker._pid = None  # type: ignore[attr-defined]
            if cwd:
                os.chdir(cwd)
            run_python(words, dict(os.environ if env is None else env))
        finally:
            os._exit(1)
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    return None
