"""benchmarks/equal_minutes.py without a peer's code: its clock, files, validation and errors."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCAB, complaint_of
from torch.nn import functional as F

from benchmarks import equal_minutes, equal_minutes_peers
from benchmarks.equal_minutes_peers import (
    PEERS,
    Peer,
    PeerRun,
    TrainerSettings,
    build_peer,
    cosine,
    definitions_of,
    import_from,
    read_settings,
    trapezoid,
)
from lab.experiment import UNTIMED_STEPS, Trial, check, load_experiment, make_trial
from lab.measurements import measure
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from scripts.write_bin import write_bin_store
from train_gpt import make_evaluate
from training import setup
from training.config import load
from training.speedrun import BinDataConfig, BinValidationConfig, SpeedrunRun

SHAPE = GPTConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def bins(text_store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bins")
    write_bin_store(text_store, folder, "text")
    return folder


@pytest.fixture
def run():
    """The quickstart's config for a small model on the test's text."""
    quickstart = load(equal_minutes.CONFIG)
    data = replace(quickstart.data, sequence_length=32, tokens_per_step=256)
    model = replace(
        quickstart.model, vocab_size=VOCAB, hidden_size=32, head_dim=8, num_hidden_layers=1
    )
    return replace(quickstart, model=model, data=data)


class Clock:
    """Simulates time.perf_counter; a peer's step and the validation advance it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def toy_peer(clock: Clock) -> tuple[Peer, list[list[float]]]:
    """A peer whose steps take 0.5 s, but 9 s at its start; and the losses of its training."""
    model, training = SpeedrunGPT(SHAPE, seed=0), []

    def losses(tokens, targets):
        logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")

    def train(work: PeerRun) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(index, tokens, targets):
            loss = losses(tokens, targets).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            training.append(loss.item())
            clock.now += 0.5 if index >= UNTIMED_STEPS else 9.0
            return loss.detach()

        work.follow(step)

    return Peer(model, losses, train), training


def test_the_lab_reads_the_seconds_without_start_and_validation(bins, run, tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    peer, training = toy_peer(clock)
    loader, evaluate = equal_minutes.open_data(bins, run)
    values = []

    def slow(peer):
        clock.now += 100
        values.append(evaluate(peer))
        return values[-1]

    summary = equal_minutes.train_peer(peer, loader, slow, 12, 3, tmp_path)
    assert summary["steps"] == len(training) == 12 and summary["tokens_per_s"] == pytest.approx(
        256 / 0.5
    )
    trial = Trial("toy", 0, (), {}, tmp_path, tmp_path, tmp_path)
    measured = measure(trial, ("val/loss", "val/bits_per_byte"))
    assert measured.seconds == pytest.approx(6.0) and measured.tokens == 12 * 256
    assert [point.steps for point in measured.curves["val/loss"]] == [4, 8, 12]
    assert measured.final["val/bits_per_byte"] == values[-1]["bits_per_byte"]
    assert values[-1]["loss"] < values[0]["loss"]


def test_validation_is_that_of_train_gpt(bins, run, monkeypatch):
    peer, _ = toy_peer(Clock(monkeypatch))
    _, evaluate = equal_minutes.open_data(bins, run)
    measured = evaluate(peer)
    tokens = int(measured["tokens"])
    speedrun = SpeedrunRun(
        model=SHAPE,
        data=BinDataConfig(
            val=str(bins / "text_val_*.bin"), bos_token=0, sequence_length=32, tokens_per_step=256
        ),
        validation=BinValidationConfig(tokens=tokens, every=1),
    )
    with setup.ranks():
        ours = make_evaluate(speedrun, 0, 1)(peer.model)["all"]
    assert measured == pytest.approx(ours, rel=1e-6)
    assert 0 < measured["bits_per_byte"] < 20 and tokens % 32 == 0


def test_a_peer_trains_to_the_end(bins, run, tmp_path):
    loader, evaluate = equal_minutes.open_data(bins, run)
    peer, settings = build_peer("hf_trainer", ["compile=false"], None, run, seed=0)
    assert settings == TrainerSettings(compile=False)
    before = evaluate(peer)["loss"]
    summary = equal_minutes.train_peer(peer, loader, evaluate, 30, 1, tmp_path)
    assert summary["loss"] < before and summary["val_tokens"] > 0
    total, non_embedding = summary["parameters"], summary["non_embedding_parameters"]
    assert total == run.model.num_parameters
    assert total - non_embedding == 2 * VOCAB * run.model.hidden_size


def test_only_the_definitions_of_a_script_are_executed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import math\nraise SystemExit\ndef area(r):\n    return math.pi * r * r\n")
    assert definitions_of(script).area(1) == pytest.approx(3.14159, abs=1e-5)
    assert import_from(tmp_path.parent, tmp_path.name).__name__ == tmp_path.name
    assert str(tmp_path.parent) not in sys.path


def test_the_commit_of_a_checkout(tmp_path):
    assert equal_minutes.checkout_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    assert len(equal_minutes.checkout_commit(tmp_path)) == 40


def test_parameters_without_embedding_and_head():
    total, embedded = equal_minutes.parameters(SpeedrunGPT(SHAPE, seed=0), VOCAB)
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(7, 4),
            "mlp": torch.nn.Linear(4, 5),
            "head": torch.nn.Linear(4, 7),
        }
    )
    assert equal_minutes.parameters(model, 7) == (28 + 25 + 35, 28 + 35)
    assert 0 < embedded < total


def test_schedules():
    rates = [trapezoid(index, 100, 10, 0.5, 0.1) for index in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[50]
    assert rates[75] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["momentum=1"], "'momentum=1' is not a setting of hf_trainer; its settings: lr="),
        (["lr=0"], "lr=0 must be above 0"),
        (["lr=fast"], "lr='fast' must be a finite number"),
        (["warmup_steps=1.5"], "warmup_steps=1.5 must be a whole number"),
        (["compile=maybe"], "compile must be true or false"),
    ],
)
def test_a_wrong_setting_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_settings("hf_trainer", TrainerSettings, words)


@pytest.mark.parametrize("peer", ["nanochat", "modded_nanogpt", "nanogpt"])
def test_a_missing_checkout_is_one_sentence(peer, bins, tmp_path, monkeypatch, capsys):
    words = [peer, "--data", bins, "--logs", tmp_path / "logs", "--source", tmp_path]
    sentence = complaint_of(equal_minutes.main, words, capsys, monkeypatch)
    assert "has no" in sentence and "clone https://github.com/" in sentence
    assert not (tmp_path / "logs").exists()


def test_a_missing_package_is_one_sentence(bins, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(equal_minutes_peers.PACKAGES, "litgpt", (("absent_package",), "install it"))
    words = ["litgpt", "--data", bins, "--logs", tmp_path / "logs"]
    sentence = complaint_of(equal_minutes.main, words, capsys, monkeypatch)
    assert "litgpt needs the package absent_package" in sentence


def test_the_experiment_is_accepted():
    experiment = load_experiment(ROOT / "configs" / "lab" / "equal_minutes.yaml")
    names = {
        trial.words[3]
        for variant in experiment.variants
        if experiment.is_external(variant)
        for trial in [make_trial(experiment, variant, 0, step_s=0.3)]
    }
    assert names == set(PEERS)
    check(experiment, experiment.variants)
