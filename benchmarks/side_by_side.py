"""What the benchmarks of single functions share: calls that take turns, so that a busy machine is busy for all, and on what."""

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
    """Median milliseconds of each call over rounds in which each has its turn, after one that is not counted.

    On a CPU those that the process computed, over all its threads: what others do on the machine counts less.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            wait(device)
            began = clock()
            call()
            wait(device)
            times[name].append(1000 * (clock() - began))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(call: Call, device: torch.device) -> float | None:
    """Most GPU memory that a call holds beyond what was held before; None on a CPU, whose allocator keeps what was freed."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def modules() -> list[bytes]:
    """The modules of Python's standard library, those of packages last: real text that every machine has, some 12 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts)
    ]
    return [path.read_bytes() for path in sorted(files, key=lambda path: (len(path.parts), path))]


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpu = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if Path("/proc/cpuinfo").exists()
        else None
    )
    found: dict[str, Any] = {
        "command": " ".join(["python -m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else cpu[1]
        if cpu
        else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def reason(error: BaseException) -> str:
    """Why something was not measured, in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
        :300
    ]


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
