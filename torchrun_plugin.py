"""Make torchrun print no traceback of its own, so that a rank's error message is the last line.

torch loads the entry points of the group "torchrun.handlers" in the launcher's process; this
project's is `plug_in` (pyproject.toml). Scripts of other projects are not affected.
scripts/launch.py uses the same functions.
"""

import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent
LAUNCHERS = ("torchrun", "accelerate", "accelerate-launch")
LAUNCHER_MODULES = ("torch.distributed.run", "accelerate.commands.launch")
LAUNCHER = "NANOLLAMA_LAUNCHER"  # environment variable: the launcher's process id, for its ranks
# torch's functions that read and check its flags
FLAG_READERS = {"config_from_args", "parse_min_max_nnodes", "__post_init__"}
REASONS = {
    6: "NCCL aborts a rank with signal 6 when another rank is gone",
    9: "signal 9 often means out of memory",
}


def plug_in() -> Callable[..., Any]:
    """Prepare the launcher if it starts one of our scripts; return torch's static rendezvous.

    torch registers the returned handler as the rendezvous backend "nanollama", which is unused.
    """
    if is_launcher(sys.orig_argv) and starts_our_script(sys.orig_argv[1:]):
        prepare()
        sys.excepthook = exit_quietly
    return static_rendezvous


def static_rendezvous(parameters: Any) -> Any:
    """Return torch's "static" rendezvous; imported late, because torch is still loading."""
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler

    return create_rdzv_handler(parameters)


def is_launcher(argv: Sequence[str]) -> bool:
    """Return True for the command line (sys.orig_argv) of torchrun or of accelerate launch."""
    programs = [Path(argument).name for argument in argv[:2]]
    module = any(argument in LAUNCHER_MODULES for argument in argv[:4])
    return module or any(program in LAUNCHERS for program in programs)


def starts_our_script(arguments: Sequence[str]) -> bool:
    """Return True if the first script (or the module after -m) that the launcher names is ours."""
    for previous, argument in zip(("", *arguments), arguments, strict=False):
        if argument in LAUNCHER_MODULES:
            continue
        if previous in ("-m", "--module"):
            return is_ours(_module_file(argument))
        if argument.endswith(".py"):  # a name without a file in this folder refers to our script
            return is_ours(Path(argument)) or (
                not Path(argument).exists() and is_ours(ROOT / Path(argument).name)
            )
    return False


def is_ours(path: Path) -> bool:
    """Return True for a file of this project that is not an installed package of another."""
    path = path.resolve()
    return path.is_file() and path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _module_file(name: str) -> Path:
    """Return the file that `python -m name` runs, from the working folder or this project.

    Nothing is imported: an import would run other projects' code in the launcher.
    """
    path = Path(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else ROOT / path


def prepare() -> None:
    """Give ranks time to save after a signal, and keep the launcher itself quiet."""
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # torchrun would kill after 30 s
    # By default torchrun dies of SIGUSR1, and ends a nohup run when its terminal closes.
    handled = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        handled.remove("SIGHUP")
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(handled))
    # torch 2.13 keeps one store across restarts, with the addresses of dead ranks. With this
    # setting rank 0 opens a new store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    api = import_module("torch.distributed.elastic.multiprocessing.api")  # torch is still loading
    stop = api._terminate_process_handler
    api._terminate_process_handler = outside_popen(stop)  # type: ignore[attr-defined]
    logging.disable(logging.ERROR)  # the launcher's own log; what ranks print is untouched


def outside_popen(handler: Callable[[int, FrameType | None], None]) -> Callable[..., None]:
    """Return a signal handler that calls `handler`, but never while a Popen holds its lock.

    torchrun's handler raises. Raised between the line of subprocess.py that takes the lock and its
    try block, the exception leaves the lock taken: no poll() sees the process end any more, and
    torchrun waits 600 s for ranks that have ended. A signal that comes then is handled 10 ms later,
    by SIGALRM.
    """
    waiting: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            waiting.append(number)
        first = waiting.pop(0) if waiting and not _in_popen(frame) else None
        if waiting:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        if first is not None:
            handler(first, frame)

    signal.signal(signal.SIGALRM, handle)
    return handle


def _in_popen(frame: FrameType | None) -> bool:
    """Return True if the frame or a caller is a method of a Popen whose lock is taken."""
    while frame:
        if frame.f_code.co_filename == subprocess.__file__:
            lock = getattr(frame.f_locals.get("self"), "_waitpid_lock", None)
            if lock and lock.locked():
                return True
        frame = frame.f_back
    return False


def exit_status(error: BaseException) -> int | None:
    """Return the exit status for an error of torchrun, None for any other error.

    It is the status of the first failed rank, or 128 + the number of the signal that ended it; 2
    for a wrong flag.
    """
    name = type(error).__name__  # compared by name, because importing torch here is circular
    if name == "ChildFailedError":
        failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
        rank, first = min(failures.items(), key=lambda failed: failed[1].timestamp)
        if first.exitcode > 0:
            return first.exitcode
        number = -first.exitcode
        reason = f"; {REASONS[number]}" if number in REASONS else ""
        print(f"error: rank {rank} was ended by signal {number}{reason}", file=sys.stderr)
        return 128 + number
    if name == "SignalException":  # passed on to the ranks, which have saved
        return 128 + int(error.sigval)  # type: ignore[attr-defined]
    functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if isinstance(error, (ValueError, AssertionError)) and functions & FLAG_READERS:
        reason = str(error) or "--nproc_per_node and --monitor_interval must be above 0"
        print(f"error: a flag of torchrun is wrong: {reason}", file=sys.stderr)
        return 2
    return None


def exit_quietly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Exit with the failed rank's status and without a traceback; an excepthook."""
    status = exit_status(error)
    if status is None:
        sys.__excepthook__(kind, error, trace)
    else:
        raise SystemExit(status)
