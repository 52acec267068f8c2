"""Laptops: the device of commands, Apple's mps through a stand-in, set-up and check_env."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, one_thread, read_metrics, save_tiny, tiny_config, train_here

import machine
from data.dataloader import Batch, to_device
from evals.engines import load_model
from evals.eval_perplexity import perplexity
from evals.language_model import ScoreRequest
from evals.run import eval_parser
from inference.generation import generate
from inference.kv_cache import Cache, forward
from inference.sampling import Sampling
from models.attention import choose_kernel
from models.hf import load_hf
from models.nanollama import NanoLlama
from scripts import check_env
from train_dpo import PreferenceRun, align
from training import setup
from training.fsdp_utils import ParallelConfig, check_unsharded, compiles, compute_dtype
from training.optimizers import OptimConfig, build_optimizer
from training.preference_losses import evaluate_pairs
from training.settings import load_settings

MPS = torch.device("mps")
HAS_NVIDIA = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
# Of POSIX, so that a Mac has them.
TOOLS = ("sh", "cat", "sed", "grep", "awk", "cksum", "rm", "du", "dirname", "mkdir", "cp")


# the device


@pytest.fixture
def available(monkeypatch):
    """Return a function that makes devices (un)available to torch."""

    def make(cuda: bool = False, mps: bool = False) -> None:
        monkeypatch.delenv(machine.DEVICE, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("mps", [False, True])
def test_the_device_is_cuda_then_mps_then_cpu(cuda, mps, available):
    available(cuda, mps)
    assert machine.default_device() == ("cuda" if cuda else "mps" if mps else "cpu")
    parser = eval_parser("about")
    assert parser.parse_args(["--checkpoint", "x"]).device == machine.default_device()
    assert parser.parse_args(["--checkpoint", "x", "--device", "cpu"]).device == "cpu"


def test_a_variable_replaces_the_device(available, monkeypatch, capsys):
    available(mps=True)
    monkeypatch.setenv(machine.DEVICE, "cpu")
    assert machine.default_device() == "cpu"
    monkeypatch.setenv(machine.DEVICE, "gpu")
    with pytest.raises(ValueError, match=r"NANOLLAMA_DEVICE=gpu is not available .*=cpu$"):
        machine.default_device()
    with pytest.raises(SystemExit) as end:
        eval_parser("about").parse_args(["--checkpoint", "x"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "NANOLLAMA_DEVICE=gpu is not available" in error


def test_one_module_chooses_the_device():
    choice = re.compile(r"[\"']cuda[\"'] if torch\.cuda\.is_available")
    paths = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    chosen = [path for path in paths if choice.search(path.read_text(encoding="utf-8"))]
    assert [path for path in chosen if path.parent.name not in ("benchmarks", "tests")] == []


def test_mps_has_float32_plain_attention_and_one_process(monkeypatch):
    assert compute_dtype(ParallelConfig(), MPS) == torch.float32
    assert not compiles(ParallelConfig(), MPS)
    assert choose_kernel("auto", MPS, torch.float32, masked=True) == "sdpa"
    world = 1
    monkeypatch.setattr("training.fsdp_utils.get_world_size", lambda: world)
    check_unsharded(ParallelConfig(), MPS)
    refused: dict[str, Any] = {"dtype": "bfloat16", "compile": True, "replicas": 2, "experts": 2}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"parallel.{name}={value} is not available on mps"):
            check_unsharded(ParallelConfig(**{name: value}), MPS)
    world = 2
    with pytest.raises(ValueError, match="between 2 ranks; start one process without torchrun"):
        check_unsharded(ParallelConfig(), MPS)


def test_copies_to_mps_wait():
    class Recorder:
        def to(self, device: torch.device, non_blocking: bool) -> tuple[str, bool]:
            return device.type, non_blocking

    source: Any = Recorder()
    assert to_device(source, MPS) == ("mps", False)
    assert to_device(source, torch.device("cuda")) == ("cuda", True)


# the stand-in for mps


def output_of(*command: object) -> str:
    """Run a Python script in another process; return its output."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, env=one_thread(), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_stand_in(*command: object) -> str:
    """Run a Python script on the stand-in; return its output."""
    return output_of(ROOT / "tests" / "stand_in.py", *command)


def test_training_on_the_stand_in_equals_training_on_a_cpu(settings, tmp_path):
    """Also across a resume, and when the CPU continues what the stand-in has begun."""

    def run(name: str, *more: str) -> list[str]:
        places = (f"output_dir={tmp_path / name}", f"log_dir={tmp_path / name}_logs")
        return settings(*places, *more)

    script = (ROOT / "train.py", "--config", ROOT / "configs" / "test_mode.yaml")
    output = on_stand_in(*script, *run("other", "until=3"))
    assert "float32 on 1 stand_in rank(s), not sharded, eager, sdpa attention" in output
    shutil.copytree(tmp_path / "other", tmp_path / "moved")
    assert "resumes at step 3" in on_stand_in(*script, *run("other"))
    assert train_here(run("cpu")) and train_here(run("moved"))
    rows = {name: read_metrics(tmp_path / f"{name}_logs") for name in ("cpu", "other", "moved")}
    steps = {name: [row["step"] for row in rows[name]] for name in rows}
    assert steps == {"cpu": [*range(1, 7)], "other": [*range(1, 7)], "moved": [4, 5, 6]}
    for name in ("other", "moved"):
        for row in rows[name]:
            expected = rows["cpu"][row["step"] - 1]
            keys = {"loss", "grad_norm", "lr"} | {key for key in expected if "val/" in key}
            assert keys <= row.keys()
            for key in keys:
                assert row[key] == pytest.approx(expected[key], rel=2e-4), (name, row["step"], key)


def test_dpo_on_the_stand_in_equals_dpo_on_a_cpu(tmp_path, text_store):
    """With added chat tokens, replayed text, a precomputed reference and validation."""
    base = save_tiny(tmp_path / "base", tiny_config(max_position_embeddings=256), text_store)
    pairs = [{"prompt": f"{i}?", "chosen": f"{i}. " * 3, "rejected": "no"} for i in range(20)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")

    def overrides(name: str) -> list[str]:
        where = tmp_path / name
        source = f"sources: {{a: {{path: {data}}}}}, val_fraction: 0.2"
        return [
            f"preferences={{{source}, cache: {where}_cache}}",
            "data={mix: {a: 1}, sequence_length: 128, pairs_per_step: 4, micro_batch_size: 8}",
            f"replay={{store: {text_store}, mix: {{first: 1}}, share: 0.4}}",
            "optim={lr: 1e-3, weight_decay: 0, z_weight: 0}",
            "parallel={dtype: float32}",
            "checkpoint={every: 3, asynchronous: false}",
            "validation={every: 3, rows: 4}",
            f"init_from={base}",
            "steps=3",
            f"output_dir={where}",
            f"log_dir={where}_logs",
        ]

    config = ROOT / "configs" / "dpo.yaml"
    on_stand_in(ROOT / "train_dpo.py", "--config", config, *overrides("other"))
    run = load_settings(PreferenceRun, config, overrides("cpu"))
    with setup.ranks() as device:
        assert align(run, 0, 1, device) == 0
    cpu, other = (read_metrics(tmp_path / f"{name}_logs") for name in ("cpu", "other"))
    assert len(cpu) == 3 and any(key.startswith("val/") for key in cpu[-1])
    for expected, row in zip(cpu, other, strict=True):
        assert expected.keys() == row.keys()
        keys = {"loss", "grad_norm", "rewards/margins", "replay_loss"}
        for key in keys | {key for key in expected if key.startswith("val/")}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


def test_evaluation_generation_and_hyperball_agree_on_the_stand_in(tmp_path, text_store):
    folder = save_tiny(tmp_path / "step_1", tiny_config(max_position_embeddings=64), text_store)
    code = tmp_path / "figures.py"
    code.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        "import json, pathlib, test_laptops\n"
        f"print(json.dumps(test_laptops.figures(pathlib.Path({str(folder)!r}), 'stand_in')))\n"
    )
    expected, other = figures(folder, "cpu"), json.loads(on_stand_in(code).splitlines()[-1])
    assert other.keys() == expected.keys()
    for name in ("greedy", "sampled"):
        assert other[name] == expected[name]
    for name in ("logprobs", "perplexity", "pairs", "hidden", "adamh", "muonh"):
        assert other[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def figures(folder: Path, device: str) -> dict[str, list[float]]:
    """Scores, generated tokens and updated weights of a model on a device."""
    model = load_hf(folder, device=device)
    prompts = [[5, 6, 7], [8]]
    sampled = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    results: dict[str, list[float]] = {}
    for name, sampling in (("greedy", Sampling()), ("sampled", sampled)):
        rows = generate(model, prompts, 12, sampling=sampling, seed=3, logprobs=True)
        results[name] = [token for row in rows for token in row.tokens]
    engine = load_model(folder, device, batch_size=4).engine
    requests = [ScoreRequest((5, 6, 7), ((8, 9), (10, 11, 12))), ScoreRequest((9,), ((3, 4),))]
    scored = sorted(pair for batch in engine.score(requests) for pair in batch)
    results["logprobs"] = [scored.logprob for _, row in scored for scored in row]
    tokens = torch.arange(96).view(2, 48) % 300
    batch = Batch(tokens, (tokens + 1).clone(), (tokens > 60).int())
    of_all = perplexity(model, {"a": [batch, batch]}, torch.ones(384, dtype=torch.int64))["all"]
    results["perplexity"] = list(of_all.values())

    def objective(model: Any, batch: Batch) -> Any:
        nll = model(batch.tokens, batch.targets, batch.doc_ids).nll
        return nll.sum(), {"loss": nll.sum(), "low": (nll < 5).sum()}

    with torch.no_grad():
        pairs = evaluate_pairs(model, objective, {"a": ([batch], 2)}, lambda sums: sums)
    results["pairs"] = list(pairs["all"].values())
    cache = Cache(model.config, 1, 8, device)
    results["hidden"] = forward(model, tokens[:1, :4].to(device), cache)[0, -1].tolist()
    for optimizer in ("adamw", "muon"):
        config = OptimConfig(name=optimizer, hyperball=True, weight_decay=0.0, lr=0.02)
        trained = NanoLlama(tiny_config(num_hidden_layers=1), seed=1).to(device)
        update = build_optimizer(trained, config)
        for step in range(2):
            objective(trained, Batch(tokens + step, tokens, None).to(torch.device(device)))[
                0
            ].backward()
            update.step()
            update.zero_grad()
        weight = trained.get_parameter("layers.0.mlp.up_proj.weight")
        results[{"adamw": "adamh", "muon": "muonh"}[optimizer]] = weight[0].tolist()
    return results


STRAYS = {
    "float64": "torch.zeros(2, device=device).double()",
    "an operand on the CPU": "torch.zeros(2, device=device) + torch.zeros(2)",
    "a collective": "dist.all_reduce(torch.zeros(2, device=device))",
    "a copy that does not wait": "torch.zeros(2).to(device, non_blocking=True)",
}


def test_the_stand_in_refuses_what_mps_lacks(tmp_path):
    code = tmp_path / "strays.py"
    code.write_text(
        "import torch\nimport torch.distributed as dist\nfrom machine import default_device\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        f"device, strays = default_device(), {STRAYS!r}\n"
        "for name, stray in strays.items():\n    try:\n        eval(stray)\n"
        "    except (TypeError, RuntimeError) as error:\n        print(name)\n"
    )
    assert on_stand_in(code).splitlines() == [*STRAYS]


# set-up


@pytest.fixture
def set_up(tmp_path):
    """Return a function that runs setup.sh with a fake Python and POSIX tools only."""
    for name in ("requirements-core.txt", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(str(shutil.which(name)))

    def tool(name: str, text: str) -> Path:
        path = tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    fake = tool(
        "python",
        'case "$*" in\n'
        '*"-m venv"*) mkdir -p .venv/bin; cp "$FAKE" .venv/bin/python ;;\n'
        '*install*) [ -z "${FAIL:-}" ] || case "$*" in *"$FAIL"*) exit 1 ;; esac\n'
        '    echo "$*" >>"$LOG" ;;\n'
        '*platform*) echo "${MACHINE:-}" ;;\n'
        '*--version*) echo "Python 3.12.1" ;;\n'
        "esac",
    )
    tool("df", 'printf "Filesystem 1024-blocks Used Available\\n/dev/x 9 9 ${FREE:-99000000}\\n"')

    def run(system: str = "Linux x86_64", nvidia: bool = False, **variables: str) -> Any:
        tool(
            "uname",
            f"case $1 in -s) echo {system.split()[0]} ;; *) echo {system.split()[1]} ;; esac",
        )
        (tools / "nvidia-smi").unlink(missing_ok=True)
        if nvidia:
            tool("nvidia-smi", "exit 0")
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        environment = {"PATH": str(tools), "PYTHON": str(fake), "FAKE": str(fake), "LOG": str(log)}
        command = [str(tools / "sh"), str(tmp_path / "scripts" / "setup.sh")]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**environment, **variables}
        )
        installed = log.read_text().splitlines() if log.exists() else []
        return done, [line.split("check ", 1)[-1] for line in installed]

    return run


CORE = "-r requirements-core.txt"
[TORCH] = re.findall(
    r"^torch==\S+", (ROOT / "requirements-core.txt").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.skipif(bool(HAS_NVIDIA), reason="this machine has an NVIDIA driver")
def test_set_up_chooses_the_cpu_build_without_a_driver(set_up):
    done, installed = set_up()
    assert done.returncode == 0 and not done.stderr
    assert "torch: cpu build (no NVIDIA driver found; TORCH_BUILD=cuda" in done.stdout
    assert re.search(r"\d+ packages, about \d.\d GB to download, 1.\d GB on disk", done.stdout)
    assert len(installed) == 2 and installed[1] == CORE
    assert installed[0].endswith(f"--index-url https://download.pytorch.org/whl/cpu {TORCH}")
    assert set_up()[1] == []
    done, installed = set_up(nvidia=True)  # a driver appears: never train on the CPU beside it
    assert installed == [CORE] and "cuda build (this machine has an NVIDIA" in done.stdout
    assert set_up()[1] == []  # a login node of the same cluster


@pytest.mark.skipif(bool(HAS_NVIDIA), reason="this machine has an NVIDIA driver")
def test_set_up_works_without_the_index_of_the_cpu_build(set_up):
    done, installed = set_up(FAIL="--index-url")
    assert done.returncode == 0 and installed == [CORE]
    assert "no CPU build from https://download.pytorch.org" in done.stderr
    assert set_up()[1] == []


def test_a_variable_chooses_the_build_for_later_calls_too(set_up):
    done, installed = set_up(nvidia=True, TORCH_BUILD="cpu")
    assert "torch: cpu build (TORCH_BUILD)." in done.stdout and len(installed) == 2
    assert set_up(nvidia=True)[1] == []
    assert set_up(nvidia=True, TORCH_BUILD="cuda")[1] == [CORE]
    done, installed = set_up(TORCH_BUILD="rocm")
    assert done.returncode == 2 and installed == []
    assert done.stderr == "error: TORCH_BUILD=rocm is unknown; use cpu or cuda, or unset it\n"


def test_set_up_keeps_triton_for_cuda_only(set_up, tmp_path):
    set_up(TORCH_BUILD="cuda")
    (tmp_path / ".venv/lib/python3.12/site-packages/triton").mkdir(parents=True)
    assert set_up()[1] == []
    set_up(TORCH_BUILD="cpu")
    (tmp_path / ".venv/lib/python3.12/site-packages/triton").mkdir(parents=True)
    assert set_up()[1] == ["-m pip uninstall -qq -y triton"]


def test_set_up_on_a_mac(set_up):
    done, installed = set_up("Darwin arm64", MACHINE="Darwin arm64")
    assert done.returncode == 0 and not done.stderr and installed == [CORE]
    assert "size not measured on Darwin arm64" in done.stdout and "build (" not in done.stdout
    done, installed = set_up("Darwin arm64", MACHINE="Darwin x86_64")
    assert done.returncode == 2 and "install an arm64 Python" in done.stderr and not installed


def test_set_up_refuses_a_disk_that_is_too_small(set_up):
    done, installed = set_up(TORCH_BUILD="cpu", FREE="900000")
    assert done.returncode == 2 and installed == [] and done.stderr.count("\n") == 1
    assert "this disk has 0 GB free" in done.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None, reason="for torch's CPU build"
)
def test_the_default_install_is_below_2_gb_without_triton_and_test_tools():
    text = (ROOT / "requirements-core.txt").read_text(encoding="utf-8")
    names = re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
    assert not {"triton", "pytest", "ruff", "mypy"} & set(names)
    assert all("triton" not in line for line in importlib.metadata.requires("torch") or ())
    size = 0
    for name in names:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        paths = [Path(str(path.locate())) for path in files]
        size += sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    [told] = re.findall(r"^# size with cpu: .* (\d\.\d) GB on disk", text, re.MULTILINE)
    assert 0.8 * float(told) < size / 1e9 < min(2.0, 1.1 * float(told))


# check_env


def test_check_env_tells_a_mac_from_a_cpu(available, monkeypatch, capsys):
    available(mps=True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11_500_000_000)
    versions = {"gradio": None}
    monkeypatch.setattr(check_env, "_version", lambda name: versions.get(name, "1.0"))
    check_env.check_machine()
    lines = {line[4:26].strip(): line[27:] for line in capsys.readouterr().out.splitlines()}
    assert lines["GPU"] == "Apple M2 (mps), up to 12 GB, trains in float32 in one process"
    assert lines["gradio (optional)"] == "not installed; for demo_ui.py: requirements-demo.txt"
    assert lines["device of commands"].startswith("mps (") and "GB of memory" in lines["CPU"]


def test_check_env_warns_of_a_windows_disk_and_a_driver_without_cuda(
    available, monkeypatch, tmp_path, capsys
):
    available()
    (tmp_path / "version").write_text("Linux version 6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr(machine, "KERNEL", tmp_path / "version")
    monkeypatch.setattr(Path, "cwd", classmethod(lambda cls: Path("/mnt/c/nanollama")))
    monkeypatch.setattr(check_env, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    check_env.check_machine()
    output = capsys.readouterr().out
    assert "this folder is on a Windows disk, which is slow" in output
    assert "TORCH_BUILD=cuda make setup" in output


def test_check_env_help_lists_the_checks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_env", "--help"])
    with pytest.raises(SystemExit) as end:
        check_env.main()
    output = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word in output for word in ("memory", "disk", "WSL", "alerts", "--plan"))


def test_the_page_says_what_was_not_tried():
    page = (ROOT / "docs" / "laptops.md").read_text(encoding="utf-8")
    assert "not run on a Mac" in page and "not run on WSL" in page
    assert os.path.basename(machine.DEVICE) in page
