"""Pretraining text in DPO: its rows, loss and gradient, exactness, validation loss, mistakes."""

import json
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT, one_thread, read_metrics, save_tiny, tiny_config
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

from data.chat.pair_batches import PairLoader, Pairs
from data.chat.preferences import PairSource, PreferenceConfig, prepare
from data.chat.replay import PairReplayConfig, open_replay
from data.chat.tokenizer import save_chat_tokenizer
from data.packing import IGNORE
from data.tokenizers.bpe import load_tokenizer, vocabulary_size
from evals.report.trained import _mix
from files import read_lines
from models.nanollama import NanoLlama
from train_dpo import PreferenceRun, align
from train_sft import SFTConfig
from training import setup
from training.preference_losses import DPOConfig, preference, with_text
from training.settings import load_settings

LENGTH = 128
CONFIG = tiny_config(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, max_position_embeddings=256
)


@pytest.fixture(scope="module")
def case(tmp_path_factory, text_store) -> Path:
    """A base model with text_store's tokenizer and chat tokens, and 40 pairs."""
    folder = tmp_path_factory.mktemp("dpo_replay")
    save_chat_tokenizer(folder / "chat", text_store / "tokenizer")
    save_tiny(folder / "base", CONFIG, text_store)
    rows = "".join(
        json.dumps({"prompt": f"{i}?", "chosen": f"{i}. " * (1 + i % 4), "rejected": "no"}) + "\n"
        for i in range(40)
    )
    (folder / "pairs.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(case) -> dict[str, Pairs]:
    source = {"many": PairSource(str(case / "pairs.jsonl"))}
    config = PreferenceConfig(source, cache=str(case / "unit"), val_fraction=0.0)
    folders = prepare(config, source, case / "chat", LENGTH)
    return {name: Pairs(folder, "train") for name, folder in folders.items()}


def loader_of(pairs, case, replay, size: int, rank: int = 0, world: int = 1) -> PairLoader:
    """Steps of 4 pairs, in micro-batches of `size`."""
    loader = PairLoader(pairs, {"many": 1.0}, LENGTH, 4, size, 3, rank, world)
    if replay:
        loader.add_text(open_replay(replay, "train", case / "chat"), replay)
    return loader


def text_of(step) -> list[torch.Tensor]:
    """Tokens, targets and documents of a step's text, without padding rows."""
    fields = zip(
        *(batch[:3] for batch in step.batches if hasattr(batch, "weight_per_token")), strict=True
    )
    tokens, targets, doc_ids = map(torch.cat, fields)
    rows = (targets != IGNORE).any(1)
    return [tokens[rows], targets[rows], doc_ids[rows]]


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
def test_the_text_of_a_step_depends_on_its_index_alone(pairs, case, text_store, share):
    replay = PairReplayConfig(str(text_store), {"first": 1.0, "second": 3.0}, share)
    loader = loader_of(pairs, case, replay, 4)
    tokens, targets, doc_ids = text_of(loader.at(7))
    assert (targets != IGNORE).all() and targets.numel() == loader.text.tokens
    for world, size in ((1, 1), (2, 2), (4, 1)):
        loaders = [loader_of(pairs, case, replay, size, rank, world) for rank in range(world)]
        steps = [one.at(7) for one in loaders]  # the first call, as after a resume
        assert len({len(step.batches) for step in steps}) == 1  # as collectives need
        parts = [torch.cat(part) for part in zip(*map(text_of, steps[: len(tokens)]), strict=True)]
        assert all(map(torch.equal, parts, (tokens, targets, doc_ids)))
        assert {step.tokens for step in steps} == {loader.at(7).tokens}
    # The share is of trained tokens, to half of the 64 tokens of a row.
    shares = loader.shares(0, 10)
    assert sum(shares.values()) == pytest.approx(1)
    of_text = shares["replay.first"] + shares["replay.second"]
    answers = loader.text.tokens / of_text * (1 - of_text)
    asked = max(64, share / (1 - share) * answers)
    assert abs(loader.text.tokens - asked) <= 32 * len(tokens) + 5
    assert of_text == pytest.approx(loader.text_share, abs=0.02)
    line = f"replayed text: {loader.text.tokens:,} tokens a step in rows of {tokens.shape[1]}"
    assert any(text.startswith(line) for text in loader.describe(5))
    plain = loader_of(pairs, case, None, 4)
    assert plain.fingerprint != loader.fingerprint and plain.at(0).tokens < loader.at(0).tokens


def test_loss_and_gradient_equal_a_sum_written_out(pairs, case, text_store):
    """Pairs one by one and text document by document, from whole logits."""
    replay = PairReplayConfig(str(text_store), {"first": 1.0}, 0.9, 0.7)
    model = grown(case)
    config = DPOConfig(beta=0.3, reference="none", sft_weight=0.2)
    loader = loader_of(pairs, case, replay, 2)
    step, objective = loader.at(2), with_text(preference(config), replay.weight)
    sums: dict[str, float] = {}
    for batch in step.batches:
        loss, values = objective(model, batch)
        (loss / step.loss_denominator).backward()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value) / step.loss_denominator
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}

    model.zero_grad()
    of_pairs, chosen_nll, chosen_tokens = [], [], 0
    for name, index in loader._step_names(2):
        logps = []
        documents, prompt = pairs[name].read(index)
        for ids in map(torch.from_numpy, documents):
            logits = log_softmax(model(ids[None, :-1])[0].float(), -1)
            logps.append(logits[torch.arange(prompt - 1, len(ids) - 1), ids[prompt:]].sum())
        of_pairs.append(-logsigmoid(0.3 * (logps[0] - logps[1])))
        chosen_nll.append(-logps[0])
        chosen_tokens += len(documents[0]) - prompt
    text = []
    for tokens, targets, doc_ids in zip(*text_of(step), strict=True):
        for document in doc_ids.unique():
            part = doc_ids == document
            text.append(
                cross_entropy(model(tokens[part][None])[0].float(), targets[part], reduction="none")
            )
    mean = torch.cat(text).mean()
    total = torch.stack(of_pairs).mean() + 0.2 * sum(chosen_nll) / chosen_tokens + 0.7 * mean
    total.backward()
    assert sums["loss"] == pytest.approx(total.item(), abs=1e-5)
    assert sums["replay_loss"] == pytest.approx(mean.item(), abs=1e-5)
    for name, weight in model.named_parameters():
        assert (weight.grad - gradients[name]).abs().max() < 1e-5, name


def grown(case: Path) -> NanoLlama:
    """A model with rows for the chat tokens."""
    size = vocabulary_size(load_tokenizer(case / "chat"))
    return NanoLlama(tiny_config(**{**vars(CONFIG), "vocab_size": size}), seed=0)


# ---- whole runs


def settings(case: Path, where: Path, *more: str) -> list[str]:
    return [
        f"preferences={{sources: {{many: {{path: {case / 'pairs.jsonl'}}}}}, "
        f"cache: {case / 'cache'}, val_fraction: 0.2}}",
        "data={mix: {many: 1}, sequence_length: 128, pairs_per_step: 4, micro_batch_size: 8}",
        *(f"init_from={case / 'base'}", "steps=6", "parallel={dtype: float32}"),
        "optim={lr: 1e-2, weight_decay: 0, z_weight: 0}",
        "checkpoint={every: 3, asynchronous: false}",
        "validation={every: 3, rows: 5, before: true}",
        *(f"log_dir={where / 'logs'}", f"output_dir={where / 'out'}", *more),
    ]


def replay_of(store: Path) -> str:
    return f"replay={{store: {store}, mix: {{first: 1, second: 2}}, share: 0.9, weight: 2}}"


def dpo_here(*overrides: str) -> bool:
    run = load_settings(PreferenceRun, ROOT / "configs" / "dpo.yaml", list(overrides))
    with setup.ranks() as device:
        return align(run, 0, 1, device) == 0


def test_ranks_micro_batches_and_restarts_change_nothing(case, text_store, tmp_path):
    whole, split, paused, plain = (
        tmp_path / name for name in ("whole", "split", "paused", "plain")
    )
    replay = replay_of(text_store)
    assert dpo_here(*settings(case, whole, replay))
    command = [sys.executable, "-m", "scripts.launch", "--nproc_per_node=2"]
    command += [str(ROOT / "train_dpo.py"), "--config", str(ROOT / "configs" / "dpo.yaml")]
    command += settings(case, split, replay, "data.micro_batch_size=2")
    done = forked.run(command, env=one_thread())
    assert done.returncode == 0, done.stderr
    dpo_here(*settings(case, paused, replay, "until=3"))
    assert dpo_here(*settings(case, paused, replay))
    one, two, again = (read_metrics(folder / "logs") for folder in (whole, split, paused))
    keys = [key for key in one[-1] if key.startswith(("loss", "replay", "grad_norm", "val/"))]
    assert {"replay_loss", "val/replay.first/loss", "val/replay/trained_share"} <= set(keys)
    for key in [*keys, "tokens"]:
        values = [row[key] for row in one if key in row]
        assert [row[key] for row in again if key in row] == values, key  # bit for bit
        others = [row[key] for row in two if key in row]
        assert others == pytest.approx(values, abs=1e-4, rel=1e-5), key
    weights = [(folder / "out/step_6/model.safetensors").read_bytes() for folder in (whole, paused)]
    assert weights[0] == weights[1]
    [before] = [e for e in read_lines(whole / "logs/events.jsonl") if e["event"] == "measured"]
    assert one[-1]["val/replay/loss"] < before["val/replay/loss"]
    assert one[-1]["val/replay/trained_share"] == pytest.approx(0.9, abs=0.05)
    assert one[0]["loss"] == pytest.approx(0.6931472 + 2 * one[0]["replay_loss"], abs=1e-5)
    # Without the section, DPO is what it was.
    assert dpo_here(*settings(case, plain))
    alone = read_metrics(plain / "logs")
    assert not any("replay" in key or "trained_share" in key for key in alone[-1])
    assert [row["loss"] for row in alone] == pytest.approx(GOLDEN, abs=2e-5)
    [measured] = [e for e in read_lines(plain / "logs/events.jsonl") if e["event"] == "measured"]
    assert measured["val/loss"] == before["val/loss"]  # of pairs alone


# Losses of DPO before it had replay, on one CPU core.
GOLDEN = [0.6931471824, 0.5913784503, 0.3668256998, 0.4366796612, 0.2084627449, 0.2898276150]


def test_the_report_names_the_text(text_store):
    section = {"store": str(text_store), "mix": {"first": 1.0}, "share": 0.2, "weight": 2.0}
    config = {"preferences": {}, "data": {"mix": {"many": 1.0}}, "replay": section}
    assert _mix(config) == {"many": 0.8, "replay.first": 0.2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["replay.weight=0"], "replay.weight=0 must be above 0"),
        (["replay.share=0"], "replay.share=0 must be above 0 and below 1; remove the section"),
        (["replay.mix={third: 1}"], "replay.mix.third: .* has no such source; available: first"),
        (["replay.mix={}"], "replay.mix is empty; list at least one source"),
        (["replay.store=nowhere"], "replay.store=nowhere has no tokenizer; give the data store"),
        (["replay={share: 0.1, mix: {first: 1}}"], "replay lacks store"),
        (
            ["preferences.sources.replay={path: ROWS}", "data.mix={replay: 1}"],
            "data.mix.replay has a name of the replayed text; rename the source",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(case, text_store, tmp_path, more, message):
    more = [text.replace("ROWS", str(case / "pairs.jsonl")) for text in more]
    with pytest.raises(ValueError, match=message):
        dpo_here(*settings(case, tmp_path, replay_of(text_store), *more))
    assert not (tmp_path / "out").exists()


def test_sft_has_no_weight_of_text(text_store):
    with pytest.raises(ValueError, match=r"replay.weight is not a setting"):
        load_settings(SFTConfig, ROOT / "configs" / "sft.yaml", [replay_of(text_store)])
