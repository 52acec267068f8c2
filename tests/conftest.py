"""Fixtures and helpers of all tests: small stores of real text, tiny models, runs of train.py."""

import copy
import gc
import getpass
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
VOCAB = 384
DISK = 2_000_000_000  # bytes; the tests write half as much
torch.set_num_threads(1)
# A worker runs whole files, because fixtures are expensive. The longest files start first.
LONGEST = (
    *("test_fault_table", "test_timeline", "test_quickstart", "test_demo", "test_surroundings"),
    *("test_checkpoint", "test_prepare", "test_nodes", "test_pipeline", "test_evals_benchmarks"),
    *("test_ladder", "test_training", "test_foreign_files", "test_launchers", "test_interrupts"),
    *("test_tokenizer", "test_page", "test_plan", "test_train_gpt", "test_deliverables"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_layer: the fixture `settings` makes a one-layer model")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Put all temporary files into pytest's folder, which it deletes after a run without failures.

    A worker starts its forkserver here, before a test starts one that has imported less.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        forked.forkserver()
        return
    folder = session.config._tmp_path_factory.getbasetemp() / "t"  # type: ignore[attr-defined]
    if (free := shutil.disk_usage(folder.parent).free) < DISK:
        pytest.exit(
            f"{free / 1e9:.1f} GB are free in {folder.parent}, but the tests need "
            f"{DISK / 1e9:.0f}; free some, or set TMPDIR to a folder on another disk",
            returncode=2,
        )
    # Code that torch compiled serves the next run too.
    user = re.sub(r"\W", "_", getpass.getuser())
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}"
    )
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    # multiprocessing would delete its folder again at exit, with a traceback.
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {stem: number for number, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude imported modules from garbage collection: about a million objects, never freed."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code() -> None:
    """Forget what other files compiled: torch compiles a second size symbolically, and slowly."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def yaml_read_once() -> Iterator[None]:
    """Parse equal texts once: a rung of the ladder extends up to fifty files."""
    import yaml_file

    parsed = cache(yaml_file.parse_yaml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_file, "parse_yaml", lambda text: copy.deepcopy(parsed(text)))
        yield


@pytest.fixture(scope="session")
def text_store(tmp_path_factory) -> Path:
    """A store of two sources from the standard library: documents, shards, tokenizer of 384."""
    from data.manifest import file_hash
    from data.pipeline.recipe import Split
    from data.shards import ShardWriter
    from data.tokenizers.bpe import save_tokenizer, special_ids, train_tokenizer

    store, split = tmp_path_factory.mktemp("store"), Split(0.1)
    documents = {
        name: write_documents(store, name, library(120)[half::2])
        for half, name in enumerate(("first", "second"))
    }
    rows = [row for source in documents.values() for row in source]
    texts = [text for id, text in rows if split.of(id) == "train"]
    tokenizer = train_tokenizer(texts, VOCAB)
    save_tokenizer(tokenizer, store / "tokenizer")
    tokenizer.encode_special_tokens = True
    tokenizer_hash = file_hash(store / "tokenizer" / "tokenizer.json")
    for name, source in documents.items():
        with ShardWriter(store / "tokens" / name, VOCAB, tokenizer_hash, inputs={}) as shards:
            for id, text in source:
                shards.add(split.of(id), [special_ids(tokenizer).bos, *tokenizer.encode(text).ids])
    return store


def library(count: int) -> list[tuple[str, str]]:
    """Return ids and texts of the standard library's first `count` modules.

    Leaves out empty modules and those of 20,000 characters or more.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = islice(
        (
            p
            for p in sorted(root.rglob("*.py"))
            if "test" not in str(p) and "site-packages" not in str(p)
        ),
        count,
    )
    modules = (
        (f"python/{path.relative_to(root)}", path.read_text(encoding="utf-8", errors="replace"))
        for path in paths
    )
    return [(id, text) for id, text in modules if text.strip() and len(text) < 20_000]


def write_documents(
    store: Path, source: str, documents: list[tuple[str, str]], parts: int = 1
) -> list[tuple[str, str]]:
    """Write documents to a store in the format of data/corpus/ingest.py; return them."""
    import pyarrow
    from pyarrow import parquet

    from data import manifest

    folder = store / "documents" / source
    folder.mkdir(parents=True)
    entries = []
    for number in range(parts):
        begin, end = (index * len(documents) // parts for index in (number, number + 1))
        rows = documents[begin:end]
        table = pyarrow.table({"id": [id for id, _ in rows], "text": [text for _, text in rows]})
        path = folder / f"{number:05d}.parquet"
        parquet.write_table(table, path, compression="zstd")
        size = sum(len(text.encode()) for _, text in rows)
        entries.append(
            {
                "name": path.name,
                "documents": len(rows),
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
def settings(request, text_store, tmp_path):
    """Overrides of configs/test_mode.yaml for a tiny fp32 run on text_store, output in tmp_path.

    Tests marked one_layer train a model of one layer.
    """

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
            *(
                ["model.num_hidden_layers=1"]
                if request.node.get_closest_marker("one_layer")
                else []
            ),
            *more,
        ]

    return make


def train_here(overrides: list[str]) -> bool:
    """Run pretraining in this process with one rank; return True if the run is complete."""
    from train import pretrain
    from training import setup
    from training.config import load

    run = load(ROOT / "configs" / "test_mode.yaml", overrides)
    with setup.ranks() as device:
        return pretrain(run, 0, 1, device, test=False) == 0


def tiny_config(**changes: Any) -> Any:
    """Return the ModelConfig of random models; the wide initialisation separates their scores."""
    from models.nanollama import ModelConfig

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelConfig(**{"vocab_size": VOCAB, **shape, "initializer_range": 0.2, **changes})


def tiny_mixture(moe: Any, **changes: Any) -> Any:
    """Return the ModelConfig of a smaller model with experts, for tests without text."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.02,
    }
    return tiny_config(**{**shape, "kind": "moe", "moe": moe, **changes})


def save_tiny(folder: Path, config: Any, store: Path, seed: int = 3) -> Path:
    """Save a random model and text_store's tokenizer as a checkpoint; return its folder."""
    from data.tokenizers.bpe import load_tokenizer, save_tokenizer
    from models.hf import save_hf
    from models.nanollama import NanoLlama

    weights = NanoLlama(config, seed=seed).state_dict()
    save_hf(folder, config, weights, torch.float32, bos=0, eos=0, pad=1)
    save_tokenizer(load_tokenizer(store / "tokenizer"), folder)
    return folder


def random_word(rng: random.Random, max_length: int) -> str:
    """A random text of a, b, c and spaces that ends with a full stop."""
    return "".join(rng.choice("abc ") for _ in range(rng.randint(1, max_length))) + "."


def complaint_of(
    main: Callable[[], None], arguments: Sequence[Any], capture: Any, monkeypatch: Any
) -> str:
    """Run a command in this process; return its one-line error. capture: capsys or capfd."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    error = capture.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and "Traceback" not in error
    )
    return error


def command(overrides: list[str], ranks: int) -> list[str]:
    """Return the command line of train.py under scripts.launch with that many ranks."""
    launch = [sys.executable, "-m", "scripts.launch", f"--nproc_per_node={ranks}"]
    return [
        *launch,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs" / "test_mode.yaml"),
        *overrides,
    ]


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory, text_store) -> Path:
    """A random model of the test module's CONFIG with text_store's tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "step_1"
    return save_tiny(folder, request.module.CONFIG, text_store)


@pytest.fixture(scope="module")
def model(checkpoint):
    """The checkpoint, loaded for evaluation."""
    from evals.engines import load_model

    return load_model(checkpoint, batch_size=4)


def train_ranks(overrides: list[str], ranks: int = 2) -> subprocess.CompletedProcess:
    """Run train.py under scripts.launch with that many ranks, in forked processes."""
    return forked.run(command(overrides, ranks), env=one_thread())


def one_thread() -> dict[str, str]:
    """Return this process's environment with one OpenMP thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def read_metrics(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
