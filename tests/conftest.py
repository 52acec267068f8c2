"""What the tests share: small stores of real text, and ways to run train.py."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
VOCAB = 384
torch.set_num_threads(1)
# Workers take whole files, so that what a file's fixtures run is run once (pytest 9.2 ignores xdist_group); these first, so that
# none is left over at the end.
LONG = (
    *(
        "test_timeline",
        "test_quickstart",
        "test_nodes",
        "test_training",
        "test_fault_table",
        "test_demo",
    ),
    *("test_prepare", "test_pipeline", "test_checkpoint"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def text_store(tmp_path_factory) -> Path:
    """A store of two sources cut from Python's standard library, with a tokenizer of 384 tokens and shards."""
    from data.manifest import file_hash
    from data.pipeline.recipe import Split
    from data.shards import ShardWriter
    from data.tokenizers.bpe import save_tokenizer, special_ids, train_tokenizer

    store, split = tmp_path_factory.mktemp("store"), Split(0.1)
    documents = {
        name: write_documents(store, name, library(120)[half::2])
        for half, name in enumerate(("first", "second"))
    }
    texts = [text for part in documents.values() for id, text in part if split.of(id) == "train"]
    tokenizer = train_tokenizer(texts, VOCAB)
    save_tokenizer(tokenizer, store / "tokenizer")
    tokenizer.encode_special_tokens = True
    for name, part in documents.items():
        made_by = file_hash(store / "tokenizer" / "tokenizer.json")
        with ShardWriter(store / "tokens" / name, VOCAB, made_by, inputs={}) as shards:
            for id, text in part:
                shards.add(split.of(id), [special_ids(tokenizer).bos, *tokenizer.encode(text).ids])
    return store


def library(count: int) -> list[tuple[str, str]]:
    """Ids and texts of the first modules of Python's standard library, but for long ones."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = islice(
        (
            p
            for p in sorted(root.rglob("*.py"))
            if "test" not in str(p) and "site-packages" not in str(p)
        ),
        count,
    )
    found = (
        (f"python/{path.relative_to(root)}", path.read_text(errors="replace")) for path in paths
    )
    return [(id, text) for id, text in found if text.strip() and len(text) < 20_000]


def write_documents(
    store: Path, source: str, documents: list[tuple[str, str]], parts: int = 1
) -> list[tuple[str, str]]:
    """Put documents into a store as data/corpus/ingest.py leaves them; returns them."""
    import pyarrow
    from pyarrow import parquet

    from data import manifest

    folder = store / "documents" / source
    folder.mkdir(parents=True)
    entries = []
    for number in range(parts):
        mine = documents[number * len(documents) // parts : (number + 1) * len(documents) // parts]
        table = pyarrow.table({"id": [id for id, _ in mine], "text": [text for _, text in mine]})
        path = folder / f"{number:05d}.parquet"
        parquet.write_table(table, path, compression="zstd")
        size = sum(len(text.encode()) for _, text in mine)
        entries.append(
            {
                "name": path.name,
                "documents": len(mine),
                "bytes": size,
                "sha256": manifest.file_hash(path),
            }
        )
    manifest.write(
        folder,
        {"inputs": {}, "licence": "PSF-2.0", "origin": "test", "parts": entries, "skipped": {}},
    )
    return documents


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
    """Run train.py's pretrain in this process, as one rank. True if it is complete."""
    from train import pretrain
    from training import setup
    from training.config import load

    run = load(ROOT / "configs" / "test_mode.yaml", overrides)
    with setup.ranks() as device:
        return pretrain(run, 0, 1, device, test=False) == 0


def tiny_config(**changes: Any) -> Any:
    """The ModelConfig of the evaluations' random models; so wide an initialisation sets options far apart."""
    from models.nanollama import ModelConfig

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelConfig(**{"vocab_size": VOCAB, **shape, "initializer_range": 0.2, **changes})


def save_tiny(folder: Path, config: Any, store: Path) -> Path:
    """A checkpoint of that shape with random weights and the tokenizer of text_store; returns its folder."""
    from data.tokenizers.bpe import load_tokenizer, save_tokenizer
    from models.hf import save_hf
    from models.nanollama import NanoLlama

    save_hf(
        folder, config, NanoLlama(config, seed=3).state_dict(), torch.float32, bos=0, eos=0, pad=1
    )
    save_tokenizer(load_tokenizer(store / "tokenizer"), folder)
    return folder


def complaint_of(
    main: Callable[[], None], arguments: Sequence[Any], capture: Any, monkeypatch: Any
) -> str:
    """The one line with which a command, run in this process, ends on a user's mistake. capture: capsys or capfd."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capture.readouterr().err
    assert (
        end.value.code == 2
        and said.startswith("error: ")
        and said.count("\n") == 1
        and "Traceback" not in said
    )
    return said


def command(overrides: list[str], ranks: int) -> list[str]:
    launch = [sys.executable, "-m", "scripts.launch", f"--nproc_per_node={ranks}"]
    return [
        *launch,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs" / "test_mode.yaml"),
        *overrides,
    ]


def train_ranks(overrides: list[str], ranks: int = 2) -> subprocess.CompletedProcess:
    """Run train.py under torchrun with that many ranks."""
    return subprocess.run(
        command(overrides, ranks), capture_output=True, text=True, cwd=ROOT, env=one_thread()
    )


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
