"""What this machine has for training: Python, torch, GPUs, bf16, memory, disk. Exit status 1 where something is missing.

python -m scripts.check_env
"""

import os
import platform
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from models.nanollama import ModelConfig
from training.fsdp_utils import ParallelConfig, compute_dtype

NEEDED = ("torch", "numpy", "PyYAML", "safetensors", "tokenizers", "transformers", "tqdm", "matplotlib")
OPTIONAL = ("wandb", "flash-attn", "torchao")


def main() -> None:
    problems = []

    def line(name: str, value: object, problem: str | None = None) -> None:
        print(f"{'!!' if problem else 'ok'}  {name:<22} {value}")
        if problem:
            problems.append(problem)

    old = sys.version_info < (3, 11)
    line("python", platform.python_version(), "Python 3.11 or newer is needed" if old else None)
    for name in NEEDED:
        found = _version(name)
        line(name, found or "not installed", None if found else f"pip install {name}")
    too_old = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11)
    if too_old:
        line("torch", torch.__version__, "torch 2.11 or newer is needed")
    for name in OPTIONAL:
        line(f"{name} (optional)", _version(name) or "not installed")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            dtype = str(compute_dtype(ParallelConfig(), torch.device("cuda", i))).removeprefix("torch.")
            line(f"GPU {i}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, trains in {dtype}")
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        wanting = [what for what, there in (("a C compiler", compiler), (str(header), header.is_file())) if not there]
        needs = f"torch.compile on a GPU needs {' and '.join(wanting)}; install them (gcc, python3-dev)"
        line("compiler", compiler or "none", needs if wanting else None)
        line("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        if torch.cuda.device_count() > 1:
            pairs = [(i, j) for i in range(torch.cuda.device_count()) for j in range(torch.cuda.device_count()) if i != j]
            direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
            line("GPU to GPU", f"direct for {direct} of {len(pairs)} pairs; the others go through the host's memory, slowly")
            shared = shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else 0.0
            small = "NCCL needs /dev/shm of 1 GB or more; start the container with --shm-size=8g" if shared < 1 else None
            line("/dev/shm", f"{shared:.1f} GB", small)
    else:
        line("GPU", "none: the quickstart and all tests run on the CPU, the 1.1B model needs a GPU")
    dtype = str(compute_dtype(ParallelConfig(), torch.device("cpu"))).removeprefix("torch.")
    line("CPU", f"{os.cpu_count()} cores, trains in {dtype}")
    free = shutil.disk_usage(".").free / 1e9
    line("disk", f"{free:.0f} GB free here", "the quickstart needs 2 GB of free disk" if free < 2 else None)
    parameters = ModelConfig().num_parameters
    print(f"    a training checkpoint of the {parameters / 1e9:.1f}B model takes {parameters * 14 / 1e9:.1f} GB")
    for problem in problems:
        print(f"to do: {problem}")
    raise SystemExit(1 if problems else 0)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
