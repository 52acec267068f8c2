"""Runs generated programs in processes with limits on time, memory and files and without a network.

This stops accidents and simple attacks. It is not a security boundary: run untrusted models in a
container or virtual machine as well. A Python audit hook refuses sockets, other processes and
writes outside a scratch folder. If the kernel permits it (`unshare -rn`), a network namespace is
added.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from machine import cpus

CHILD = Path(__file__).with_name("sandbox_child.py")
MEMORY = 1 << 30  # bytes of address space
FILE_BYTES = 1 << 20  # size limit of each written file
START_S = 5  # wall-clock seconds beyond the CPU limit, for start-up and sleeping
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--")


@functools.cache
def namespace() -> tuple[str, ...]:
    """Command prefix that starts a process without network; empty if the kernel forbids it."""
    if not shutil.which(UNSHARE[0]):
        return ()
    done = subprocess.run(
        [*UNSHARE, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30
    )
    return UNSHARE if done.returncode == 0 else ()


def isolation() -> str:
    """Description of the isolation in effect, for the results file."""
    return (
        "network namespace and audit hook"
        if namespace()
        else "audit hook only (no network namespace allowed here)"
    )


def run_program(program: str, timeout: int = 3) -> dict[str, Any]:
    """Run a program: {"passed": True}, or {"passed": False, "error": reason}.

    timeout: CPU seconds.
    """
    nonce = secrets.token_hex(16)
    request = {
        "program": program,
        "nonce": nonce,
        "cpu_s": timeout,
        "memory": MEMORY,
        "file_bytes": FILE_BYTES,
    }
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as report,  # unlike a pipe, subject to the file limit
    ):
        child = subprocess.Popen(
            [*namespace(), sys.executable, "-I", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": scratch,
                "TMPDIR": scratch,
                "OMP_NUM_THREADS": "1",
                "LANG": "C.UTF-8",
            },
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps(request).encode(), timeout + START_S)
        except subprocess.TimeoutExpired:
            return {"passed": False, "error": f"stopped after {timeout + START_S} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
        report.seek(0)
        output = report.read(FILE_BYTES)
    if child.returncode == -signal.SIGXCPU or child.returncode == -signal.SIGKILL:
        return {"passed": False, "error": f"stopped after {timeout} s of CPU time"}
    try:
        result = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return {"passed": False, "error": f"ended with status {child.returncode}"}
    if result.get("nonce") == nonce:
        return {"passed": True}
    return {"passed": False, "error": str(result.get("error", "no report"))}


class Sandbox:
    """Answers Judge requests, whose texts are programs, with the results of run_program."""

    dtype, context = "judge", 0

    def __init__(self, timeout: int):
        self.timeout = timeout
        self.name = f"sandbox, {timeout} s of CPU time, {MEMORY >> 20} MiB; {isolation()}"
        self.hash = hashlib.sha256(self.name.encode() + CHILD.read_bytes()).hexdigest()

    def answer(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        with ThreadPoolExecutor(cpus()) as pool:
            running = {
                pool.submit(run_program, request.text, self.timeout): i
                for i, request in enumerate(requests)
            }
            for done in as_completed(running):
                yield [(running[done], done.result())]
