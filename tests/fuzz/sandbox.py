"""Run a check on many inputs in a forked process that may crash or hang.

An input passes if the check accepts it or refuses it in one sentence, as the project's commands
do. A failure is a traceback, a signal, more than SECONDS, or a leftover file or process.
"""

import io
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings

from cli import user_errors

INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))  # total of all fuzzers
SECONDS = 10  # limit per input
MEMORY = 4 << 30  # bytes that the process may map after its start
ACCEPTED, REFUSED = "accepted", "refused"
Check = Callable[[Any, Path], None]


class Sandbox:
    """A process that runs check(input, folder) for one input after another; folder is empty and
    temporary.
    """

    def __init__(self, check: Check, folder: Path):
        self.check, self.folder = check, folder
        self.process: Any = None

    def run(self, given: Any) -> str:
        """Run the check; return ACCEPTED, REFUSED or a description of the failure."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, child_pipe = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(child_pipe, self.pipe, self.check, self.folder)
            )
            self.process.start()
            child_pipe.close()
        self.pipe.send(given)
        ready = self.pipe.poll(SECONDS)
        with suppress(EOFError, ConnectionResetError):
            if ready:
                return self.pipe.recv()
        self.process.join(1)
        code = self.process.exitcode
        self.stop()
        return f"the process ended with status {code}" if ready else f"took more than {SECONDS} s"

    def stop(self) -> None:
        """Kill the process and its children."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def finish(self) -> str:
        """Wait for the process to end; return its leftovers, or ""."""
        if self.process is None:
            return ""
        process = self.process
        self.pipe.send(None)
        process.join(SECONDS)
        leftovers = _session(process.pid)
        code = process.exitcode
        self.stop()
        return (
            ""
            if code == 0 and not leftovers
            else f"status {code}, processes left behind: {leftovers}"
        )


def _session(leader: int) -> list[str]:
    """Return the processes in the session of a process that has ended."""
    end, processes = time.monotonic() + 2, [""]
    while processes and time.monotonic() < end:  # a killed process is listed until it is reaped
        processes = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, fields = path.read_text(encoding="utf-8", errors="replace").rsplit(")", 1)
                if fields.split()[3] == str(leader) and fields.split()[0] != "Z":
                    processes.append(name)
        time.sleep(0.05 if processes else 0)
    return processes


def _serve(pipe: Any, parents: Any, check: Check, folder: Path) -> None:
    os.setsid()
    parents.close()
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    while (value := pipe.recv()) is not None:
        outcome = _outcome(check, value, folder)
        # Torch's cache.
        left = [
            path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")
        ]
        pipe.send(f"left files in the temporary folder: {left}" if left else outcome)
    pipe.close()


def _outcome(check: Check, given: Any, folder: Path) -> str:
    stderr = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            redirect_stdout(io.StringIO()),
            redirect_stderr(stderr),
            user_errors(),
        ):
            check(given, Path(scratch))
        return ACCEPTED
    except SystemExit as end:
        text = stderr.getvalue()
        sentence = re.fullmatch(r"(.*\n)*?error: [^\n]+\n", text)
        return REFUSED if end.code == 2 and sentence else f"not one sentence: {text!r}"
    except BaseException:
        return traceback.format_exc()


def fuzz(
    inputs: Any,
    share: float,
    examples: Sequence[Any] = (),
    accepted: tuple[float, float] = (0.05, 0.95),
) -> Callable[[Check], Any]:
    """Decorator: a check(input, folder) becomes a test of it on `share` of INPUTS.

    inputs: a hypothesis strategy. examples: inputs that failed once. accepted: bounds of the share
    of accepted inputs; they ensure that the fuzzer reaches code behind the first refusal.
    """

    def decorate(check: Check) -> Any:
        count = max(1, round(share * INPUTS))

        def test(record_property: Callable[[str, str], None]) -> None:
            outcomes: dict[str, int] = {}
            failures: dict[str, Any] = {}
            # Thousands of small files.
            memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            folder = tempfile.TemporaryDirectory(dir=memory, prefix="fuzz-")
            sandbox = Sandbox(check, Path(folder.name))

            def run(value: Any) -> None:
                outcome = sandbox.run(value)
                if outcome not in (ACCEPTED, REFUSED):
                    kind = _kind(outcome)
                    if kind not in failures or len(repr(value)) < len(repr(failures[kind][0])):
                        failures[kind] = value, outcome
                    outcome = "failed"
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

            run.__name__ = run.__qualname__ = check.__name__  # derandomised inputs depend on it
            body = _profile(count)(given(inputs)(run))
            for value in examples:
                body = example(value)(body)
            started = time.monotonic()
            try:
                body()
                leftovers = sandbox.finish()
            finally:
                sandbox.stop()
                folder.cleanup()
            number, seconds = sum(outcomes.values()), time.monotonic() - started
            record_property(
                f"fuzz {check.__name__}", f"{number} inputs, {outcomes}, {seconds:.0f} s"
            )
            report = "\n\n".join(f"{value!r}\n{outcome}" for value, outcome in failures.values())
            assert not failures, f"{len(failures)} kinds of failure\n{report}"
            assert not leftovers, leftovers
            accepted_share = outcomes.get(ACCEPTED, 0) / number
            assert accepted[0] <= accepted_share <= accepted[1], (
                f"{accepted_share:.0%} of {number} inputs were accepted"
            )

        test.check = check  # type: ignore[attr-defined]
        test.__name__, test.__doc__, test.__module__ = (
            check.__name__,
            check.__doc__,
            check.__module__,
        )
        return test

    return decorate


def _profile(count: int) -> settings:
    """Return hypothesis settings for so many inputs: fixed ones in tests, new ones in long runs."""
    return settings(
        max_examples=count,
        derandomize=INPUTS <= 2000,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def _kind(outcome: str) -> str:
    """Return a failure's cause: its error class and the project's last line in the traceback."""
    lines = re.findall(r'File "(.*)", line (\d+)', outcome)
    project_lines = [
        f"{path}:{number}"
        for path, number in lines
        if "site-packages" not in path and "/lib/python" not in path
    ]
    return f"{outcome.strip().splitlines()[-1].split(':')[0][:60]} {project_lines[-1:]}"
