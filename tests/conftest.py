"""What the tests share: small stores of real text, and ways to run train.py."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
VOCAB = 384
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_store(tmp_path_factory) -> Path:
    """A store of two sources cut from Python's standard library, with a tokenizer of 384 tokens."""
    from data import manifest, prepare, sources

    store = tmp_path_factory.mktemp("store")
    (store / "documents").mkdir()
    documents = [d for d in islice(sources._standard_library(), 120) if len(d.text) < 20_000]
    counts = {}
    for name, part in (("first", documents[::2]), ("second", documents[1::2])):
        path = store / "documents" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document._asdict()) + "\n" for document in part))
        counts[name] = {"sha256": manifest.file_hash(path)}
    manifest.write(store / "documents", {"inputs": {}, "sources": counts})
    split = prepare.Split(0.1)
    assert prepare.train_store_tokenizer(store, VOCAB, split)
    assert prepare.tokenize_store(store, split)
    return store


@pytest.fixture
def settings(text_store, tmp_path):
    """Overrides of configs/test_mode.yaml for a tiny fp32 run on text_store; what it writes goes under tmp_path."""

    def make(*more: str, phase: str = "one", steps: int = 6) -> list[str]:
        return [
            f"data.store={text_store}",
            "data.mix={first: 0.6, second: 0.4}",
            f"model.vocab_size={VOCAB}",
            "schedule={warmup_steps: 2, total_steps: 12, decay_steps: 4}",
            "parallel.dtype=float32",
            "validation={every: 3, rows: 4}",
            "checkpoint.every=3",
            f"phase={phase}",
            f"steps={steps}",
            f"output_dir={tmp_path / 'checkpoints' / phase}",
            f"log_dir={tmp_path / 'logs'}",
            *more,
        ]

    return make


def train_here(overrides: list[str]) -> bool:
    """Run train.py's pretrain in this process, as one rank."""
    from train import pretrain
    from training import setup
    from training.config import load

    run = load(ROOT / "configs" / "test_mode.yaml", overrides)
    with setup.ranks() as device:
        return pretrain(run, 0, 1, device, test=False)


def command(overrides: list[str], ranks: int) -> list[str]:
    launch = [sys.executable, "-m", "scripts.launch", f"--nproc_per_node={ranks}"]
    return [*launch, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "test_mode.yaml"), *overrides]


def train_ranks(overrides: list[str], ranks: int = 2) -> subprocess.CompletedProcess:
    """Run train.py under torchrun with that many ranks."""
    return subprocess.run(command(overrides, ranks), capture_output=True, text=True, cwd=ROOT, env=one_thread())


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
