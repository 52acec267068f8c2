"""What this process may use of its machine."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def cpus() -> int:
    """CPU cores that this process may use, at least 1: its affinity (cpuset, taskset), bounded by the cgroup's quota."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """CPU quotas in cores of this process's cgroup and of those above it, for cgroup v2 and v1."""
    found = []
    for line in _lines(OWN_CGROUPS):
        _, kinds, own = line.split(":", 2)
        folder = CGROUPS / kinds if kinds else CGROUPS
        if kinds and "cpu" not in kinds.split(","):
            continue
        relative = Path(own.lstrip("/"))
        for path in [relative, *relative.parents]:
            found += _quota(folder / path)
    return found


def _quota(folder: Path) -> list[float]:
    words = " ".join(_lines(folder / "cpu.max")).split()  # v2: "200000 100000" or "max 100000"
    if not words:  # v1: -1 without a quota
        words = [
            line for name in ("quota", "period") for line in _lines(folder / f"cpu.cfs_{name}_us")
        ]
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
        return [int(words[0]) / int(words[1])]
    return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
