"""Rules of the repository: imports, file lengths, encodings, ruff; and small numerical checks."""

import ast
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.dataloader import Batch
from evals.eval_perplexity import perplexity
from models.nanollama import ModelConfig, NanoLlama
from training.fsdp_utils import ParallelConfig, compute_dtype
from training.loop import train
from training.meter import flops_per_token
from training.optimizers import OptimConfig, build_optimizer, parameter_groups

PARTS = ("models", "inference", "export", "data", "training", "evals", "lab", "demo", "scripts")
LEAVES = {"cli", "files", "machine", "ranges", "yaml_file"}
MAY_IMPORT = {  # besides itself; imports go down these layers only
    "models": {"files", "ranges"},
    "data": LEAVES - {"cli"},
    "inference": {*LEAVES, "models", "data"},
    "export": {*LEAVES, "models", "data", "inference"},
    "training": {*LEAVES, "torchrun_plugin", "models", "data"},
    "evals": {*LEAVES, "models", "data", "inference", "export", "training"},
    "lab": {*LEAVES, "torchrun_plugin", "training"},
    "demo": {*LEAVES, "models", "data", "inference"},
    "scripts": {*LEAVES, *PARTS, "torchrun_plugin"},
}
# Commands inside data/: entry points, which may import cli as well
COMMANDS = {"data/cached_fineweb10B.py", "data/fineweb.py"}
MODULES = {path.stem for path in ROOT.glob("*.py")} | {*PARTS, "tests", "benchmarks"}
FILES = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))] + sorted(
    ROOT.glob("*.py")
)


def imports(path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_direction_of_imports_and_length(path):
    part = path.relative_to(ROOT).parts[0]
    if part in MAY_IMPORT:
        command = str(path.relative_to(ROOT)) in COMMANDS
        allowed = MAY_IMPORT[part] | ({"cli"} if command else set())
        assert (imports(path) & MODULES) - {part} <= allowed
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    readers = ("setup.py", "cli.py", "machine.py", "torchrun_plugin.py")  # of the environment
    if path.name not in readers and part != "scripts":
        assert "os.environ" not in text and "getenv" not in text
    if part == "models":
        assert "distributed" not in text


def test_scripts_are_commands_that_no_other_module_imports():
    importers = [
        str(path.relative_to(ROOT))
        for path in [*FILES, *sorted((ROOT / "benchmarks").glob("*.py"))]
        if "scripts" in imports(path)
    ]
    assert importers == []


def test_the_loop_and_the_entry_point_stay_short():
    assert len(inspect.getsource(train).splitlines()) < 120
    assert len((ROOT / "train.py").read_text().splitlines()) <= 110
    assert len((ROOT / "train_sft.py").read_text().splitlines()) <= 125
    assert len((ROOT / "demo_ui.py").read_text().splitlines()) <= 110


def test_the_core_path_needs_four_packages():
    code = (
        "import sys, training.loop, training.setup, models.hf; "
        "print(sorted(m.split('.')[0] for m in sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    ).stdout
    for heavy in ("transformers", "tokenizers", "matplotlib", "datasets", "wandb", "pandas"):
        assert f"'{heavy}'" not in loaded


def text_opens_without_encoding(source: str) -> list[int]:
    """Return lines with calls that read or write text in the locale's encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or {"encoding", None} & {
            keyword.arg for keyword in node.keywords
        }:
            continue
        name = ast.unparse(node.func)
        values = [
            *node.args[1:2],
            *(keyword.value for keyword in node.keywords if keyword.arg == "mode"),
        ]
        binary = any(
            isinstance(value, ast.Constant) and "b" in str(value.value) for value in values
        )
        opens = name in ("open", "io.open", "os.fdopen") and not binary
        temporary = (
            name.endswith(("NamedTemporaryFile", "TemporaryFile"))
            and "w" in ast.unparse(node)
            and not binary
        )
        runs = name.startswith("subprocess.") and any(
            keyword.arg in ("text", "universal_newlines") for keyword in node.keywords
        )
        if opens or temporary or runs or name.endswith((".read_text", ".write_text")):
            lines.append(node.lineno)
    return lines


def test_text_files_are_utf_8_in_every_locale():
    paths = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *FILES]
    calls = {
        str(path.relative_to(ROOT)): text_opens_without_encoding(path.read_text(encoding="utf-8"))
        for path in paths
    }
    assert {name: lines for name, lines in calls.items() if lines} == {}
    sample = (
        'open("x")\nopen("x", "rb")\nopen("x", "w", encoding="utf-8")\n'
        "path.read_text()\nsubprocess.run([], text=True)\n"
    )
    assert sorted(text_opens_without_encoding(sample)) == [1, 4, 5]


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout


def test_optimizer_groups_cover_every_parameter_once():
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        qk_norm=True,
    )
    model = NanoLlama(config, seed=0)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {
        n: 0.0 if "norm" in n or n == "embed_tokens.weight" else 0.1 for n in names.values()
    }
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_one_update_equals_adamw_by_hand():
    model = NanoLlama(
        ModelConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        ),
        seed=0,
    )
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.5))
    tokens = torch.arange(12)[None]
    model(tokens[:, :-1], tokens[:, 1:]).nll.mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.0 if "norm" in name or "embed" in name else 0.5
        # Adam's first step.
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        assert (p - expected).abs().max() <= 1e-5, name


def test_flops_of_the_1b_model():
    assert [
        round(flops_per_token(ModelConfig(), length) / 1e9, 2)
        for length in (2048, 4096, 8192, 16_384)
    ] == [
        7.31,
        8.42,
        10.64,
        15.06,
    ]


def test_dtype_follows_the_request_else_the_device():
    cpu = torch.device("cpu")
    assert compute_dtype(ParallelConfig(dtype="float32"), cpu) == torch.float32
    assert compute_dtype(ParallelConfig(dtype="bfloat16"), cpu) == torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert compute_dtype(ParallelConfig(), cpu) == torch.bfloat16


def test_perplexity_divides_totals_and_an_untrained_model_knows_nothing():
    config = ModelConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = NanoLlama(config, seed=0)
    generator = torch.Generator().manual_seed(0)

    def batch(ignored):
        tokens = torch.randint(256, (2, 40), generator=generator)
        targets = torch.randint(256, (2, 40), generator=generator)
        targets[:, :ignored] = -100
        return Batch(tokens, targets, torch.zeros(2, 40, dtype=torch.int32))

    batches = {"one": [batch(0), batch(35)], "two": [batch(10)]}
    results = perplexity(model, batches, torch.ones(256, dtype=torch.int64))
    assert [results[name]["tokens"] for name in ("one", "two", "all")] == [90, 60, 150]
    # 256 equally likely bytes
    assert results["all"]["bits_per_byte"] == pytest.approx(8.0, abs=0.02)
    assert results["all"]["loss"] == pytest.approx(
        (90 * results["one"]["loss"] + 60 * results["two"]["loss"]) / 150
    )
    assert results["one"]["perplexity"] == pytest.approx(math.exp(results["one"]["loss"]))
