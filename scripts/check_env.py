"""Check this machine for training, and print a line for each check.

python -m scripts.check_env                               # exit status 1: cannot run the quickstart
python -m scripts.check_env --plan configs/plan_1b.yaml   # exit status 1: cannot run this plan

Checks Python and the packages, the build of torch, the device that commands use (cuda, mps or cpu)
with its memory and dtype, CPU cores, memory, free disk, WSL, and the alerts of the config. On CUDA,
it also checks the C compiler, NCCL, access between GPUs and /dev/shm. For a plan of 1B parameters
or more, it also checks the number of GPUs, the disk, the packages of evaluations and the login to
the Hugging Face hub.
NANOLLAMA_DEVICE=cpu overrides the device of all commands.
"""

import os
import platform
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import get_token

from cli import CommandParser, user_errors
from data.corpus.sources import HUB_SOURCES, sources_of
from machine import cpus, default_device, device_name, is_wsl, memory
from models.nanollama import ModelConfig
from training.config import RunConfig, load
from training.fsdp_utils import ParallelConfig, compute_dtype
from training.planning.cost import forecast
from training.planning.plan import Plan, load_plan

PLAN_1B = "configs/plan_1b.yaml"
LARGE = 1e9  # parameters; larger models need one GPU per rank and MIN_DISK_GB
MIN_DISK_GB = 500  # minimum; the forecast of the plan may require more
QUICKSTART_GB = 2
NEEDED = (
    "torch",
    "numpy",
    "PyYAML",
    "safetensors",
    "tokenizers",
    "transformers",
    "tqdm",
    "matplotlib",
)
EVALUATION = ("xgrammar", "alt-profanity-check", "langdetect", "nltk")  # for a plan's suites
OPTIONAL = {  # package -> what needs it, with the file that installs it
    "wandb": "charts in W&B: requirements.txt",
    "gradio": "demo_ui.py: requirements-demo.txt",
    "flash-attn": "its attention kernels: requirements-gpu.txt",
    "torchao": "float8: requirements-gpu.txt",
}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--plan", help=f"check for this plan (default: report on {PLAN_1B} only)")
    args = parser.parse_args()
    with user_errors():
        plan = load_plan(args.plan or PLAN_1B)
        run = load(plan.phases[0].config)
    problems = check_machine()
    for name, state in alerts(run).items():
        print(f"ok  {name:<22} {state}")
    missing = missing_for(plan, run)
    print(f"ready for: quickstart {verdict(problems)}")
    size = run.model.num_parameters
    if size >= LARGE:
        print(f"           {size / 1e9:.1f}B plan {verdict(problems + missing)}")
        least, most, free = disk_gb(plan)
        if least <= free < most:
            print(
                f"warning: {free:.0f} GB of disk are free here; the {size / 1e9:.1f}B plan needs "
                f"{least} to {most} GB, depending on how well its text compresses"
            )
    for problem in problems + (missing if args.plan else []):
        print(f"to do: {problem}")
    if not args.plan:
        print("what fits: python -m scripts.new_plan --gpu cpu --minutes 30 measures this machine,")
        print("           then writes a plan for it; --gpu NAME is for a GPU (docs/new_plan.md)")
    raise SystemExit(1 if problems or (args.plan and missing) else 0)


def verdict(missing: list[str]) -> str:
    return f"no: {'; '.join(missing)}" if missing else "yes"


def missing_for(plan: Plan, run: RunConfig) -> list[str]:
    """Return a plan's requirements that this machine lacks; [] for models that fit a CPU."""
    if run.model.num_parameters < LARGE:
        return []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [f"needs {plan.ranks} GPUs ({gpus} found)"] if gpus < plan.ranks else []
    least, most, free = disk_gb(plan)
    if free < least:
        size = f"{least} to {most} GB of disk, depending on how well its text compresses"
        size = size if least < most else f"{most} GB of disk"
        missing.append(f"needs {size} ({free:.0f} GB free here)")
    if absent := [name for name in EVALUATION if _version(name) is None]:
        packages = ", ".join(absent)
        missing.append(f"needs {packages} for its evaluations (pip install -r requirements.txt)")
    gated = [
        name
        for name in gated_sources(plan)
        if not (Path(run.data.store) / "documents" / name).is_dir()
    ]
    if gated and get_token() is None:
        sets = ", ".join(
            f"https://huggingface.co/datasets/{HUB_SOURCES[name].repo}" for name in gated
        )
        missing.append(
            f"needs a login to the Hugging Face hub (accept the terms of {sets}, "
            "then run hf auth login)"
        )
    return missing


def disk_gb(plan: Plan) -> tuple[int, int, float]:
    """Return the disk that a plan needs without text, with uncompressed text, and the free disk.

    In GB. The text is stored compressed, so the plan needs a size between the first two.
    """
    disk = forecast(plan, "h100")["disk"]
    least = disk["checkpoints"] + disk["tokens"]
    needs = [max(MIN_DISK_GB, round(size / 1e9)) for size in (least, least + disk["text"])]
    return needs[0], needs[1], shutil.disk_usage(".").free / 1e9


def gated_sources(plan: Plan) -> list[str]:
    """Return the sources of a plan whose terms must be accepted on the hub."""
    words = [word for command in plan.before.values() for word in command.split()]
    return [
        name
        for word in words
        for name in sources_of(word)
        if name in HUB_SOURCES and HUB_SOURCES[name].gated
    ]


def alerts(run: RunConfig) -> dict[str, str]:
    """Return the state of each alert: on if its environment variables are set."""
    config = run.log.alerts
    off = config.off(os.environ)
    states = {name: f"off (set {off[name]})" if name in off else "on" for name in config.needs}
    states |= {name: "on" for name in ("command", "wandb") if getattr(config, name)}
    return {f"alert: {name}": state for name, state in states.items()} or {
        "alerts": "none in the config"
    }


def check_machine() -> list[str]:
    """Print a line for each check; return the problems to fix first."""
    problems = []

    def line(name: str, value: object, problem: str | None = None) -> None:
        print(f"{'!!' if problem else 'ok'}  {name:<22} {value}")
        if problem:
            problems.append(problem)

    old = sys.version_info < (3, 11)
    line("python", platform.python_version(), "Python 3.11 or newer is needed" if old else None)
    for name in NEEDED:
        installed = _version(name)
        line(name, installed or "not installed", None if installed else f"pip install {name}")
    release = torch.__version__.split("+")[0].split(".")
    if tuple(map(int, release[:2])) < (2, 11):
        line("torch", torch.__version__, "torch 2.11 or newer is needed")
    for name, use in OPTIONAL.items():
        line(f"{name} (optional)", _version(name) or f"not installed; for {use}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            dtype = str(compute_dtype(ParallelConfig(), torch.device("cuda", i))).removeprefix(
                "torch."
            )
            line(
                f"GPU {i}",
                f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, trains in {dtype}",
            )
        pynvml = _version("nvidia-ml-py")
        line("nvidia-ml-py", pynvml or "not installed; pip install it to measure GPU utilization")
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        required = (("a C compiler", compiler), (str(header), header.is_file()))
        missing = " and ".join(name for name, present in required if not present)
        advice = f"torch.compile on a GPU needs {missing}; install them (gcc, python3-dev)"
        line("compiler", compiler or "none", advice if missing else None)
        line("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        if torch.cuda.device_count() > 1:
            pairs = [
                (i, j)
                for i in range(torch.cuda.device_count())
                for j in range(torch.cuda.device_count())
                if i != j
            ]
            direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
            line(
                "GPU to GPU",
                f"direct for {direct} of {len(pairs)} pairs; others use slow host memory",
            )
            shared = shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else 0.0
            small = (
                "NCCL needs /dev/shm of 1 GB or more; start the container with --shm-size=8g"
                if shared < 1
                else None
            )
            line("/dev/shm", f"{shared:.1f} GB", small)
    elif torch.backends.mps.is_available():
        limit = torch.mps.recommended_max_memory() / 1e9
        name = device_name(torch.device("mps"))
        line("GPU", f"{name}, up to {limit:.0f} GB, trains in float32 in one process")
    else:
        line("GPU", "none: the quickstart and all tests run on the CPU, the 1.1B model needs a GPU")
    if has_nvidia_driver() and not torch.backends.cuda.is_built():
        line("torch build", "for CPUs, despite an NVIDIA driver; run TORCH_BUILD=cuda make setup")
    dtype = str(compute_dtype(ParallelConfig(), torch.device("cpu"))).removeprefix("torch.")
    line("CPU", f"{cpus()} cores, {memory() / 1e9:.0f} GB of memory, trains in {dtype}")
    try:
        line("device of commands", f"{default_device()} (NANOLLAMA_DEVICE=cpu uses the CPU)")
    except ValueError as error:
        line("device of commands", "none", str(error))
    if is_wsl():
        slow = "this folder is on a Windows disk, which is slow; clone into ~ instead"
        line("WSL", slow if Path.cwd().is_relative_to("/mnt") else "yes, on a Linux disk")
    free = shutil.disk_usage(".").free / 1e9
    few = f"the quickstart needs {QUICKSTART_GB} GB of free disk" if free < QUICKSTART_GB else None
    line("disk", f"{free:.0f} GB free here", few)
    parameters = ModelConfig().num_parameters
    gigabytes = parameters * 14 / 1e9
    print(
        f"    a training checkpoint of the {parameters / 1e9:.1f}B model takes {gigabytes:.1f} GB"
    )
    return problems


def has_nvidia_driver() -> bool:
    """Return True if an NVIDIA driver is installed, by the rule of scripts/setup.sh."""
    paths = ("/proc/driver/nvidia", "/usr/lib/wsl/lib/nvidia-smi")
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, paths))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
