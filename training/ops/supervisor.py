"""Run a plan's commands: forward signals, and restart failed training stages."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchrun_plugin import LAUNCHER, is_launcher
from training.faults import without_ignored_sighup
from training.ops.watchdog import LOST

# SIGINT reaches the stage from the terminal.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
DRIVER = "NANOLLAMA_DRIVER"  # environment variable: process id of the launcher's parent
ENTRY_POINTS = ("train.py", "train_sft.py", "train_dpo.py", "train_gpt.py", "train_gpt_medium.py")
DEATHS = {  # exit status -> what happened; other statuses are decisions or user errors
    1: "ended with an error",
    LOST: "was lost",
    128 + signal.SIGABRT: "was aborted (SIGABRT), as NCCL does when a peer has died,",
    128 + signal.SIGBUS: "ended with SIGBUS, often for lack of shared memory,",
    128 + signal.SIGKILL: "was killed (SIGKILL), often for lack of memory,",
    128 + signal.SIGSEGV: "crashed (SIGSEGV)",
}


class Supervisor:
    """Runs one command after another and forwards signals, so that a command can save first.

    logs: folder of the run; its metrics.jsonl files show the progress of a stage. restarts: maximum
    per stage; only commands of scripts.launch and of ENTRY_POINTS are restarted. event(kind, text,
    **fields) is called for each restart.
    """

    def __init__(self, logs: Path, restarts: int, event: Callable[..., None]):
        self.logs, self.restarts, self.event = logs, restarts, event
        self.stopped = 0  # signal that ended the last command; 0: none

    def run(self, program: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command and return its exit status; 128 + signal if a signal stopped it."""
        # A stage must end with this process: the next driver would start it again.
        driver = str(os.getpid())
        environment = {**environment, DRIVER: driver, LAUNCHER: driver}
        reached: int | None = None
        for attempt in range(self.restarts + 1):
            before = self._logged()
            status = self._once(program, environment)
            cause = _cause(program, status)
            if self.stopped or cause is None:
                break
            step = self._step(before)
            where = "before its first step" if step is None else f"at step {step:,}"
            if attempt and step == reached:
                self.event(
                    "gave_up",
                    f"{cause} {where} again; the same step failed twice, so it is not restarted",
                    step=step,
                )
                break
            if attempt == self.restarts:
                self.event(
                    "gave_up",
                    f"{cause} {where}; it was restarted {self.restarts} times already",
                    step=step,
                )
                break
            text = (
                f"{cause} {where} (status {status}); restart {attempt + 1} of {self.restarts} from "
                "the newest checkpoint"
            )
            self.event("restarted", text, step=step, status=status)
            reached = step
        return status if status >= 0 else 128 - status

    def _once(self, program: Sequence[str], environment: Mapping[str, str]) -> int:
        self.stopped = 0
        with self._forwarding_signals() as started:
            process = subprocess.Popen(program, env=dict(environment))
            started.append(process)
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the stage received SIGINT too and saves
                self.stopped = signal.SIGINT
                status = process.wait() or 128 + signal.SIGINT
        if status in (
            130,
            143,
            -signal.SIGINT,
            -signal.SIGTERM,
            128 + signal.SIGHUP,
            128 + signal.SIGUSR1,
        ):
            self.stopped = self.stopped or signal.SIGTERM
        return 128 + self.stopped if self.stopped else status

    @contextmanager
    def _forwarding_signals(self) -> Iterator[list[Any]]:
        started: list[Any] = []

        def note(number: int, frame: object) -> None:
            self.stopped = number
            for process in started:
                process.send_signal(number)

        # A handler would also reset an ignored SIGHUP in the child.
        handled = without_ignored_sighup(SIGNALS)
        before = {number: signal.signal(number, note) for number in handled}
        try:
            yield started
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _logged(self) -> dict[Path, tuple[int, int]]:
        """Return time and size of each metrics.jsonl of the run and its stages."""
        stats = {path: path.stat() for path in self.logs.rglob("metrics.jsonl")}
        return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}

    def _step(self, before: dict[Path, tuple[int, int]]) -> int | None:
        """Return the last step in metrics files changed since `before`; None if none changed."""
        changed = [path for path, stat in self._logged().items() if before.get(path) != stat]
        return max(
            (step for path in changed if (step := last_step(path)) is not None), default=None
        )


def _cause(program: Sequence[str], status: int) -> str | None:
    """Return why a command died that can resume; None if it is not to be restarted."""
    what = DEATHS.get(status if status >= 0 else 128 - status)
    by_launch = "scripts.launch" in program
    if not what or not (by_launch or any(Path(word).name in ENTRY_POINTS for word in program)):
        return None
    if not (by_launch or is_launcher(program)):
        return f"the process {what}"
    return f"{'a rank' if status > 0 else 'the launcher'} {what}"


def last_step(path: Path) -> int | None:
    """Return the step of the last complete row of a metrics.jsonl; None if it has none."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return None


def terminate_with_driver(driver: str | None) -> None:
    """Make the kernel send SIGTERM to this process when its driver dies (Linux only)."""
    if driver and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(driver):  # it has died already
            raise SystemExit(128 + signal.SIGTERM)


def terminate_with_launcher(launcher: str | None) -> None:
    """Make the kernel send SIGTERM to this rank when its launcher dies (Linux only).

    A profiler may be the process between them.
    """
    if launcher and (os.getppid() == int(launcher) or not _runs(int(launcher))):
        terminate_with_driver(launcher)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
