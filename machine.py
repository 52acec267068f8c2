"""This machine: CPU cores, memory, the ranks of torchrun, and the device of commands.

Devices: cuda, mps (Apple silicon) and cpu. torch's mps has neither float64 nor collectives:
docs.pytorch.org/docs/stable/notes/mps.html, github.com/pytorch/pytorch/issues/189853.
"""

import argparse
import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
KERNEL = Path("/proc/version")
DEVICE = "NANOLLAMA_DEVICE"  # environment variable that overrides default_device
COMPLETE = ("cpu", "cuda")  # device types with float64 and collectives


def default_device() -> str:
    """Return the device of commands without --device: cuda, else mps, else cpu.

    The environment variable NANOLLAMA_DEVICE overrides it. ValueError if that is not available.
    """
    import torch

    if chosen := os.environ.get(DEVICE):
        if missing(chosen):
            raise ValueError(
                f"{DEVICE}={chosen} is not available here; unset it, or set {DEVICE}=cpu"
            )
        return chosen
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the world size, as set by torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def missing(device: str) -> str:
    """Return why torch cannot use a device, as one sentence; "" if it can."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].split(". ")[0]
    return ""


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device: a device of torch, or auto (the default) for default_device()."""

    def device(text: str) -> str:
        try:
            return default_device() if text == "auto" else text
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    about = "of torch, e.g. cpu (default: a GPU if there is one)"
    parser.add_argument("--device", type=device, default="auto", help=about)


def device_name(device: "torch.device") -> str:
    """Return the name of a device's hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} (mps)"
    return platform.processor() or "cpu"


def gpu_utilization(device: "torch.device") -> float | None:
    """Return the share of the last second in which a GPU ran kernels; None if unknown.

    It is unknown without nvidia-ml-py, and on a part of a GPU (MIG).
    """
    import torch

    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # the driver's library raises its own types
        return None


def exact_device(device: "torch.device") -> "torch.device":
    """Return the device for float64 and collectives: `device` itself, or the CPU for mps."""
    import torch

    return device if device.type in COMPLETE else torch.device("cpu")


def exact(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the tensor on its exact_device, where it can be converted to float64."""
    return tensor.to(exact_device(tensor.device))


def synchronize(device: "torch.device") -> None:
    """Wait until a device has finished its queued work, so that timings include it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory() -> int:
    """Return the bytes of this machine's main memory; 0 if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def is_wsl() -> bool:
    """Return True in the Windows Subsystem for Linux."""
    return any("microsoft" in line.lower() for line in _lines(KERNEL))


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
