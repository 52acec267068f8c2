"""train_gpt.py end to end: learning, resuming, ranks, signals, the target, and wrong input."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, complaint_of, one_thread, read_metrics, train_here
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import functional as F

import train
import train_gpt
import train_sft
from data.bin_loader import BinValidation
from data.bin_shards import HEADER_BYTES, BinShards
from evals import eval_perplexity
from models.hf import load_weights, read_config
from models.kinds import build_model
from scripts import chat, export_gguf, live_plot, run_evals
from scripts.write_bin import write_bin_store
from training.ops import profiling
from training.run_folder import locked

VOCAB, STEPS = 384, 10
CONFIG = {
    "run": "gpt",
    "steps": STEPS,
    "model": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **{"positions": "rotary", "yarn": True, "norm": "rmsnorm", "norm_gains": False},
        **{"biases": False, "activation": "relu2", "tie_word_embeddings": False},
        **{"embedding_norm": True, "qk_norm": True, "merged_qkv": True, "zero_init": True},
        **{"softcap": 15, "multi_token_weights": [1.0, 0.5], "vocab_multiple": 128},
        **{"long_window": 16, "short_window": 8, "window_pattern": "SL"},
        **{"embedding_skips": True, "value_residual": True, "unet_skips": True},
        **{"value_embeddings": [0, -1, 0], "smear": True, "backout_layer": 1},
        **{"paired_head_layers": [1], "attention_gate": True, "bigram_vocab_size": 64},
    },
    "data": {
        "bos_token": 0,
        "alignment": "bos",
        "document_mask": True,
        "max_document": 48,
        "sequence_length": 64,
        "tokens_per_step": 512,
        "micro_batch_size": 4,
    },
    "optim": {"name": "muon", "lr": 0.01, "z_weight": 0, "normuon_beta2": 0.95},
    "schedule": {"warmup_steps": 2, "total_steps": STEPS, "decay_steps": 4},
    "schedules": {
        "momentum": {"points": [[0, 0.85], [6, 0.95]]},
        "short_window": {"points": [[0, 4], [8, 8]], "shape": "step"},
        "long_window": {"points": [[0, 16], [8, 64]], "shape": "cubic"},
        "batch_tokens": {"points": [[0, 256], [4, 512]], "shape": "step"},
        "sequence_length": {"points": [[0, 32], [6, 64]], "shape": "step"},
        "multi_token.1": {"points": [[0, 0.5], [7, 0]]},
        "lr.embedding": {"points": [[0, 1], [5, 4]]},
    },
    "parallel": {"dtype": "float32"},
    "validation": {"every": 5, "tokens": 1024},
    "checkpoint": {"every": 5},
    "startup": {"steps": 0},
}
PLAIN = "schedules={}"


@pytest.fixture(scope="module")
def shards(text_store, tmp_path_factory) -> Path:
    """The text store as .bin shards with their tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    write_bin_store(text_store, folder, "text")
    return folder


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory) -> Path:
    data = {"train": f"{shards}/*train*.bin", "val": f"{shards}/*val*.bin"}
    path = tmp_path_factory.mktemp("config") / "gpt.yaml"
    content = {**CONFIG, "data": CONFIG["data"] | data}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    places = [f"output_dir={folder / 'checkpoints'}", f"log_dir={folder / 'logs'}"]
    return ["--config", str(config), *places, *more]


def train_ranks(config: Path, folder: Path, *more: str, ranks: int = 1):
    """Run the command with that many processes."""
    launch = ["-m", "scripts.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    script = [str(ROOT / "train_gpt.py"), *arguments(config, folder, *more)]
    return forked.run([sys.executable, *launch, *script], env=one_thread())


def gpt(config: Path, folder: Path, monkeypatch, *more: str) -> int:
    """Run the command in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *arguments(config, folder, *more)])
    with pytest.raises(SystemExit) as end:
        train_gpt.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    """A run of STEPS steps on one rank, with every schedule of the model and the loader."""
    folder = tmp_path_factory.mktemp("trained")
    done = train_ranks(config, folder, "target_loss=3.28")
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


def state_of(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of the last checkpoint."""
    dcp_to_torch_save(folder / "checkpoints" / f"step_{STEPS}" / "state", scratch)
    content = torch.load(scratch, weights_only=True)
    moments = {
        f"{name}.{kind}": value
        for name, kinds in content["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    return {**content["model"], **moments}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of each file except locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


# Training


def test_it_learns_and_logs_schedules_and_bits_per_byte(trained):
    rows = read_metrics(trained / "logs")
    assert len(rows) == STEPS
    # zero_init: equal probabilities at first; both targets count, the second with half a weight
    assert rows[0]["loss"] > 1.3 * math.log(VOCAB)
    last = rows[-1]
    assert last["val/loss"] < rows[4]["val/loss"] < math.log(VOCAB) - 0.5
    assert [row["momentum"] for row in rows[:7:6]] == [0.85, 0.95]
    assert [row["batch_tokens"] for row in rows[3:5]] == [256, 512]
    assert [row["sequence_length"] for row in rows[5:7]] == [32, 64]
    assert last["tokens"] == 4 * 256 + 6 * 512
    assert (rows[0]["long_window"], last["long_window"]) == (16, 64)
    # Bits per byte and nats per token differ by the bytes per token of the text alone.
    bytes_per_token = last["val/loss"] / math.log(2) / last["val/bits_per_byte"]
    assert 1 < bytes_per_token < 4
    assert last["val/tokens"] == 1024


def test_the_validation_loss_is_cross_entropy_of_the_logits(trained, shards):
    """Computed again from the checkpoint, with the windows of the last step."""
    step = trained / "checkpoints" / f"step_{STEPS}"
    model = build_model(read_config(step))
    load_weights(model, step)
    model.eval().set_windows(8, 64)
    validation = BinValidation(BinShards(f"{shards}/*val*.bin", VOCAB, 0), 1024, 64, 4)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(batch.tokens, None, batch.doc_ids).mT, batch.targets)
            for batch in validation
        ]
    logged = read_metrics(trained / "logs")[-1]["val/loss"]
    assert float(sum(losses)) / len(losses) == pytest.approx(logged, rel=1e-5)


def test_the_summary_is_true_and_nothing_warns(trained, config, tmp_path, monkeypatch, capsys):
    text = (trained / "output").read_text(encoding="utf-8")
    assert "arning" not in text and "theta 10,000" in text
    assert "target loss 3.28: not reached; the last loss is" in text
    learned = ["model.positions=learned", "model.yarn=false", PLAIN, "steps=1"]
    assert gpt(config, tmp_path, monkeypatch, *learned, "target_loss=9") == 0
    said = capsys.readouterr()
    assert "learned positions" in said.out and "theta" not in said.out
    assert "target loss 9: reached with" in said.out and "arning" not in said.err


def test_without_a_tokenizer_there_are_no_bits_per_byte(shards, config, tmp_path, monkeypatch):
    for path in shards.glob("*.bin"):
        (tmp_path / path.name).symlink_to(path)
    data = [f"data.train={tmp_path}/*train*.bin", f"data.val={tmp_path}/*val*.bin"]
    assert gpt(config, tmp_path, monkeypatch, PLAIN, "steps=1", *data) == 0
    [row] = read_metrics(tmp_path / "logs")
    assert "val/loss" in row and "val/bits_per_byte" not in row


def test_a_resumed_run_equals_an_uninterrupted_one(trained, config, tmp_path, monkeypatch):
    """Paused by `until` and stopped by a signal, in the middle of the schedules."""
    assert gpt(config, tmp_path, monkeypatch, "until=5") == 0

    class Stopped(train_gpt.Prefetcher):
        def at(self, batch_index):
            if batch_index == 6:
                signal.raise_signal(signal.SIGTERM)
            return super().at(batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "Prefetcher", Stopped)
        assert gpt(config, tmp_path, patch) == 128 + signal.SIGTERM
    saved = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert "step_7" in saved and "step_8" not in saved
    assert gpt(config, tmp_path, monkeypatch) == 0
    measured = ("end", "tokens_per_s", "step_s", "data/wait_frac", "memory_gb")
    rows, others = (
        [{name: row[name] for name in row.keys() - measured} for row in read_metrics(run / "logs")]
        for run in (trained, tmp_path)
    )
    assert rows == others
    states = state_of(trained, tmp_path / "one.pt"), state_of(tmp_path, tmp_path / "two.pt")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_the_same_steps(trained, config, tmp_path, ranks):
    done = train_ranks(config, tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stdout + done.stderr
    for one, many in zip(
        read_metrics(trained / "logs"), read_metrics(tmp_path / "logs"), strict=True
    ):
        assert many["tokens"] == one["tokens"]
        for name in {"loss", "grad_norm", "val/loss"} & one.keys():
            assert many[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


# Commands beside it


def test_profiling_writes_a_trace_where_it_says(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "ACTIVE", 1)
    more = ["--experiment_name", "traced", "--enable_profiling", "steps=4", "validation.every=0"]
    assert gpt(config, tmp_path, monkeypatch, PLAIN, *more, "data.tokens_per_step=256") == 0
    [line] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("traced 1 ste")]
    trace = Path(line.removeprefix("traced 1 steps: "))
    assert trace == tmp_path / "logs" / "profile" / "train.rank0.trace.json.gz"
    assert "aten::mm" in gzip.decompress(trace.read_bytes()).decode("utf-8")


def test_live_plot_waits_follows_and_ends_with_the_run(trained, tmp_path, capsys, monkeypatch):
    folder, source, images = tmp_path / "later", trained / "logs", []
    rows = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)

    def sleep(seconds: float) -> None:
        if not folder.is_dir():  # the run starts
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("metrics.jsonl"))
            (folder / "metrics.jsonl").write_text("".join(rows[:2]), encoding="utf-8")
            process.enter_context(locked(folder))
            return
        images.append((folder / "live.png").read_bytes())
        if len(images) == 1:
            (folder / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
        else:
            process.close()

    monkeypatch.setattr(live_plot.time, "sleep", sleep)
    with ExitStack() as process:
        live_plot.follow(folder, 5.0, browser=False)
    assert len(images) == 2 and images[0] != images[1]
    assert all(image.startswith(b"\x89PNG") for image in images)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"waiting for the first step of {folder}")
    assert said[-1] == f"later is not training; last step: {STEPS}"
    assert live_plot.target_of(folder, "train") == 3.28
    assert 'src="live.png"' in (folder / "live.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        ("1", ["--steps", "3"], ["train_gpt.py", "--steps", "3"]),
        ("1", ["train_gpt_medium.py", "a.b=1"], ["train_gpt_medium.py", "a.b=1"]),
        ("4", [], ["-m", "scripts.launch", "--nproc_per_node=4", "train_gpt.py"]),
        ("", [], ["-m", "scripts.launch", "--nproc_per_node=8", "train_gpt.py"]),  # of the machine
        ("two", [], "error: GPUS=two must be a number of GPUs, such as 8"),
        ("0", [], "error: GPUS=0 must be a number of GPUs, such as 8"),
        ("1", ["train.py"], "error: train.py is not train_gpt.py or train_gpt_medium.py"),
    ],
)
def test_run_sh_starts_one_process_per_gpu(gpus, words, expected, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 8 || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "GPUS": gpus}
    done = subprocess.run(
        [ROOT / "run.sh", *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    if isinstance(expected, str):
        assert done.returncode == 2 and done.stderr.startswith(expected)
    else:
        assert done.stdout.replace(f"{ROOT}/", "").split() == expected, done.stderr


# Wrong input


def damaged(shard: Path, name: str) -> bytes:
    """Return a shard's bytes with one fault."""
    content = bytearray(shard.read_bytes())
    header = np.frombuffer(content, "<i4", 3)  # a view of the bytes
    if name == "magic":
        header[0] = 7
    elif name == "version":
        header[1] = 9
    elif name == "count":
        header[2] += 1
    else:
        np.frombuffer(content, "<u2", offset=HEADER_BYTES)[5] = VOCAB
    return bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("magic", "is not a token shard: its header begins with 7, not 20240520"),
        ("version", "has version 9 of the shard format; version 1 can be read"),
        ("count", "tokens as its header counts"),
        ("token", f"has the id {VOCAB}, but the vocabulary has {VOCAB} tokens"),
    ],
)
def test_damaged_shards_are_refused(
    split, fault, said, shards, config, trained, tmp_path, capsys, monkeypatch
):
    [shard] = shards.glob(f"*_{split}_*.bin")
    (tmp_path / shard.name).write_bytes(damaged(shard, fault))
    before = contents(trained)
    data = f"data.{split}={tmp_path}/*.bin"
    message = complaint_of(
        train_gpt.main, arguments(config, trained, data, "steps=11"), capsys, monkeypatch
    )
    assert said in message and str(tmp_path / shard.name) in message
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("data.train=/nowhere/*.bin", "no token shards match /nowhere/*.bin; download some"),
        ("data.speed=9", "data.speed"),
        ("rung=9", "rung"),
        ("data.alignment=sequential", "data.max_document=48 needs data.alignment=bos"),
        ("data.alignment=best", "alignment='best' must be one of sequential, bos"),
        ("data.store=data/store/x", "data.store has no effect on .bin shards"),
        ("data.mix={text: 1.0}", "data.mix.text has no effect on .bin shards"),
        ("validation.rows=4", "validation.rows has no effect on .bin shards"),
        ("validation.tokens=1000", "1,000 validation tokens must be a multiple of"),
        ("data.bos_token=384", "the bos id 384 is outside the vocabulary of 384"),
        ("model.vocab_size=300", "300"),
        ("rope_theta=[1, 2]", "must be one number in a speedrun"),
        ("target_loss=-1", "target_loss=-1"),
        ("schedules.batch_tokens={points: [[0, 100]]}", "do not divide over 1 rank(s)"),
        ("schedules.sequence_length={points: [[0, 128]]}", "sequence_length=128 exceeds"),
        ("validation.sequence_length=128", "validation.sequence_length=128 exceeds"),
        ("schedules.softcaps={points: [[0, 1]]}", "schedules.softcaps is not a schedule"),
    ],
)
def test_wrong_settings_are_refused(settings, said, config, trained, capsys, monkeypatch):
    before = contents(trained)
    message = complaint_of(
        train_gpt.main, arguments(config, trained, settings), capsys, monkeypatch
    )
    assert said in message and contents(trained) == before


def test_ranks_that_do_not_divide_the_batch_are_refused(config, tmp_path):
    done = train_ranks(config, tmp_path, ranks=3)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "256 tokens in rows of 32 do not divide over 3 rank(s)" in error
    assert not list(tmp_path.rglob("step_*"))


def test_a_config_that_does_not_exist_is_named(trained, capsys, monkeypatch):
    missing = ["--config", "configs/speedrun/99_missing.yaml"]
    message = complaint_of(train_gpt.main, missing, capsys, monkeypatch)
    assert "configs/speedrun/99_missing.yaml" in message


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (chat.main, ["--model"]),
        (export_gguf.main, ["--outfile", "model-{outtype}.gguf", "--checkpoint"]),
        (eval_perplexity.main, ["--dataset", "texts.txt", "--checkpoint"]),
        (run_evals.main, ["--suite", "full", "--checkpoint"]),
        (train_sft.main, ["--config", ROOT / "configs" / "sft.yaml", "--base_model"]),
    ],
    ids=["chat", "export", "evaluation", "suite", "sft"],
)
def test_other_commands_refuse_the_model(main, flags, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("text", encoding="utf-8")
    before = contents(trained)
    step = trained / "checkpoints" / f"step_{STEPS}"
    message = complaint_of(main, [*flags, step], capsys, monkeypatch)
    assert "the model is a SpeedrunGPT, which only train_gpt.py reads" in message
    assert contents(trained) == before


def test_both_kinds_of_models_refuse_each_other(
    trained, config, settings, tmp_path, capsys, monkeypatch
):
    assert train_here(settings("steps=2", "checkpoint.every=2", "validation.every=0"))
    llama = tmp_path / "checkpoints" / "one" / "step_2"
    steps = f"{trained}/checkpoints/step_{STEPS}"
    mine, test_mode = tmp_path / "mine", ["--config", ROOT / "configs" / "test_mode.yaml"]
    for main, words, said in (
        (train_gpt.main, arguments(config, mine, f"resume_from={llama}"), "which train.py trains"),
        (train_gpt.main, arguments(config, mine, f"init_from={llama}"), "differ in"),
        (
            train.main,
            [*test_mode, *settings(f"resume_from={steps}", phase="two")],
            "which train_gpt.py trains",
        ),
    ):
        assert said in complaint_of(main, words, capsys, monkeypatch)
    assert json.loads((llama / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
