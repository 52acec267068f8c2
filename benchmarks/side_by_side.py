"""Shared parts of the function benchmarks: timing in turns, memory, machine, results file."""

import json
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


def median_ms(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each call over rounds in which the calls take turns.

    The first round is not counted. On a CPU the time is this process's CPU time over all threads,
    which other load affects less.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            wait(device)
            start = clock()
            call()
            wait(device)
            times[name].append(1000 * (clock() - start))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(call: Call, device: torch.device) -> float | None:
    """Return the peak GPU memory that a call adds, in MB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def modules() -> list[bytes]:
    """Return the modules of Python's standard library, about 12 MB; those of packages last."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts)
    ]
    return [path.read_bytes() for path in sorted(files, key=lambda path: (len(path.parts), path))]


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return the command, date, device and versions that a figure depends on."""
    cpu = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if Path("/proc/cpuinfo").exists()
        else None
    )
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = cpu[1] if cpu else platform.processor()
    record: dict[str, Any] = {
        "command": " ".join(["python -m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in packages:
        try:
            record[package] = version(package)
        except PackageNotFoundError:
            record[package] = None
    return record


def reason(error: BaseException) -> str:
    """Return the first line of an error, at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
