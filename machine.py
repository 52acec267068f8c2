"""CPU cores available to this process."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def cpus() -> int:
    """Return the number of usable CPU cores: the minimum of CPU affinity and cgroup quota."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """Return the CPU quotas, in cores, of this cgroup and its parents (cgroup v1 and v2)."""
    quotas = []
    for line in _lines(OWN_CGROUPS):
        _, controllers, cgroup = line.split(":", 2)
        folder = CGROUPS / controllers if controllers else CGROUPS
        if controllers and "cpu" not in controllers.split(","):
            continue
        relative = Path(cgroup.lstrip("/"))
        for path in [relative, *relative.parents]:
            quotas += _quota(folder / path)
    return quotas


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
