"""Pretraining text in SFT: its rows, its share, exactness, validation loss, mistakes."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, VOCAB, read_metrics, save_tiny, tiny_config

from benchmarks import parity_sft
from data.chat.replay import ReplayConfig, mixture, open_replay
from data.chat.sft import ChatConfig, ChatSource, Conversations, prepare
from data.chat.tokenizer import save_chat_tokenizer
from data.dataloader import BLOCK, PackedDataLoader
from data.packing import IGNORE
from data.store import open_shards
from evals.report.trained import training
from files import read_lines
from train_sft import SFTConfig, finetune
from training import setup
from training.config import DataConfig
from training.planning.cost import forecast, readable_tokens
from training.planning.forecast_text import forecast_text
from training.planning.plan import Plan, PlanPhase
from training.settings import load_settings

LENGTH = 128
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
CONFIG = tiny_config(**SHAPE, max_position_embeddings=256)


@pytest.fixture(scope="module")
def case(tmp_path_factory, text_store) -> Path:
    """A base model with text_store's tokenizer, its chat tokenizer, and 40 conversations."""
    folder = tmp_path_factory.mktemp("replay")
    save_tiny(folder / "base", CONFIG, text_store)
    save_chat_tokenizer(folder / "chat", text_store / "tokenizer")
    turns = [
        [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i}. " * (1 + i % 5)},
        ]
        for i in range(40)
    ]
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def conversations(case) -> dict[str, Conversations]:
    source = {"rows": ChatSource(str(case / "rows.jsonl"))}
    config = ChatConfig(source, cache=str(case / "unit"), val_fraction=0.0)
    folders = prepare(config, source, case / "chat", LENGTH)
    return {name: Conversations(folder, "train") for name, folder in folders.items()}


def loader_of(
    conversations: dict, case: Path, replay: ReplayConfig | None, *shape: int
) -> PackedDataLoader:
    """shape: rows per step, per micro-batch, seed, rank, world."""
    text = open_replay(replay, "train", case / "chat") if replay else {}
    mix = mixture({"rows": 3.0}, replay)
    return PackedDataLoader({**conversations, **text}, mix, LENGTH, *shape)


def stream(store: Path, source: str, split: str) -> np.ndarray:
    """The ids of a split, read from its file."""
    return np.fromfile(store / "tokens" / source / f"{split}-00000.bin", "<u2").astype(np.int64)


def test_rows_of_text_are_trained_on_every_token_within_documents(conversations, case, text_store):
    replay = ReplayConfig(str(text_store), {"first": 1.0}, 0.5)
    loader, ids = (
        loader_of(conversations, case, replay, 16, 4, 0),
        stream(text_store, "first", "train"),
    )
    pieces = {tuple(ids[i : i + LENGTH]): i for i in range(0, len(ids) - LENGTH, LENGTH)}
    of_text = 0
    for batch in (batch for i in range(4) for batch in loader.at(i).batches):
        for tokens, targets, doc_ids in zip(*(t.numpy() for t in batch[:3]), strict=True):
            if (start := pieces.get(tuple(tokens))) is None:
                assert (targets == IGNORE).any()  # a row of conversations
                continue
            of_text += 1
            assert np.array_equal(targets, ids[start + 1 : start + LENGTH + 1])
            begins = np.cumsum(tokens == 0)  # bos is 0 and begins every document
            assert np.array_equal(doc_ids - doc_ids[0], begins - begins[0])
    assert of_text > 10


@pytest.mark.parametrize("share", [0.05, 0.2, 0.9])
def test_the_share_is_right_to_one_row(conversations, case, text_store, share):
    replay = ReplayConfig(str(text_store), {"first": 1.0, "second": 3.0}, share)
    loader = loader_of(conversations, case, replay, 10, 5, 0)
    trained = conversations["rows"].pack(LENGTH, 0).trained.mean() / LENGTH  # of a row's tokens
    parts = {
        "rows": (1 - share) / trained,
        "replay.first": share / 4,
        "replay.second": share * 3 / 4,
    }
    expected = {name: BLOCK * part / sum(parts.values()) for name, part in parts.items()}
    rows = dict.fromkeys(parts, 0)
    for row in range(BLOCK):
        rows[loader.names[loader._locate(row)[0]]] += 1
    for name, count in expected.items():
        assert abs(rows[name] - count) < 1, name
    shares = loader.shares(0, BLOCK // 10)
    one_row = LENGTH / sum(loader.at(i).loss_denominator for i in range(BLOCK // 10))
    assert abs(shares["replay.first"] + shares["replay.second"] - share) < 2 * one_row + 0.01


def test_a_step_is_the_same_for_any_ranks_and_micro_batches(conversations, case, text_store):
    replay = ReplayConfig(str(text_store), {"second": 1.0}, 0.4)
    whole = loader_of(conversations, case, replay, 8, 8, 3).at(7)
    for world, size in ((1, 2), (2, 4), (2, 1), (4, 2)):
        ranks = [loader_of(conversations, case, replay, 8, size, 3, r, world) for r in range(world)]
        steps = [loader.at(7) for loader in ranks]  # the first call, as after a resume
        batches = [batch for step in steps for batch in step.batches]
        for got, expected in zip(
            map(torch.cat, zip(*batches, strict=True)), whole.batches[0], strict=True
        ):
            assert torch.equal(got, expected)
        counted = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        assert {step.loss_denominator for step in steps} == {counted} == {whole.loss_denominator}


def test_without_replay_the_loader_is_that_of_the_conversations(conversations, case):
    plain = PackedDataLoader(conversations, {"rows": 3.0}, LENGTH, 8, 8, 3)
    assert loader_of(conversations, case, None, 8, 8, 3).fingerprint == plain.fingerprint
    assert mixture({"rows": 3.0}, None) == {"rows": 3.0}
    rows = len(plain.packed[0])
    assert plain.steps_of_epochs(2.0, conversations) == -(-2 * rows // 8)


def test_epochs_are_those_of_the_conversations(conversations, case, text_store):
    replay = ReplayConfig(str(text_store), {"first": 1.0}, 0.8)
    loader = loader_of(conversations, case, replay, 8, 8, 3)
    steps = loader.steps_of_epochs(20.0, conversations)
    read = loader.epochs(steps)["rows"]
    assert 20 <= read < 20 + loader.epochs(1)["rows"] * 1.01


# ---- replay in a later phase of pretraining


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_later_phase_reads_on_where_an_earlier_one_stopped(text_store, packing):
    shards = open_shards(text_store, {"first": 1.0, "second": 1.0}, "train", VOCAB)

    def rows_read(mix: dict[str, float], count: int, **more: object) -> list[int]:
        loader = PackedDataLoader(shards, mix, LENGTH, 4, 4, 7, packing=packing, **more)
        places = (loader._locate(row) for row in range(count))
        return [index for source, index in places if loader.names[source] == "first"]

    total = len(
        PackedDataLoader(shards, {"first": 1.0}, LENGTH, 4, 4, 7, packing=packing).packed[0]
    )
    both = rows_read({"first": 1.0}, total)
    assert sorted(both) == list(range(total))
    read = total // 3
    mix = {"first": 0.5, "second": 0.5}
    later = rows_read(mix, total, start_epoch={"first": read / total})
    assert 0.3 * total < len(later) < 0.7 * total
    assert later == both[read : read + len(later)]  # not one row twice
    again = rows_read(mix, total)
    assert again == both[: len(again)]  # the default starts the source again
    loaders = [
        PackedDataLoader(shards, mix, LENGTH, 4, 4, 7, packing=packing, start_epoch=start)
        for start in (None, {}, {"first": 4.5})
    ]
    assert loaders[0].fingerprint == loaders[1].fingerprint != loaders[2].fingerprint
    lines = loaders[2].describe(1)
    assert "from epoch 4.50 on" in lines[0] and "first will be read for 4.5 epochs" in lines[-1]
    with pytest.raises(ValueError, match=r"data.start_epoch.b: data.mix reads a, not b; remove it"):
        DataConfig(mix={"a": 1.0}, start_epoch={"b": 0.5})


def test_the_planner_counts_a_source_over_all_phases(text_store, tmp_path):
    def report(**more: object) -> dict:
        for phase, steps, mix in (
            ("one", 40, {"first": 1}),
            ("two", 10, {"first": 1, "second": 3}),
        ):
            content = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
            content["data"] |= {"store": str(text_store), "mix": mix, "tokens_per_step": 2048}
            content["data"] |= more if phase == "two" else {}
            schedule = {"warmup_steps": 2, "total_steps": 50, "decay_steps": 4}
            content |= {"phase": phase, "steps": steps, "schedule": schedule}
            content["model"]["vocab_size"] = VOCAB
            (tmp_path / f"{phase}.yaml").write_text(yaml.safe_dump(content))
        phases = tuple(PlanPhase(str(tmp_path / f"{phase}.yaml")) for phase in ("one", "two"))
        return forecast(Plan("p", phases), "h100", 1, training_tokens_of=readable_tokens)

    plain = report()
    assert plain["sources"] == {"first": 2048 * (40 + 10 / 4), "second": 2048 * 10 * 3 / 4}
    readable = len(open_shards(text_store, {"first": 1.0}, "train", VOCAB)["first"])
    before = 2048 * 40 / readable
    text = forecast_text(plain)
    assert f"again at its first row (data.start_epoch.first={before:.8g} continues)" in text
    assert text.count("starts again") == 1
    assert "; continues at epoch 0.30" in forecast_text(report(start_epoch={"first": 0.3}))


# ---- whole runs


def overrides(case: Path, store: Path, where: Path, *more: str) -> list[str]:
    chat = (
        f"chat={{sources: {{rows: {{path: {case / 'rows.jsonl'}}}}}, cache: {case / 'cache'}, "
        "val_fraction: 0.2, neftune_alpha: 5, samples: []}"
    )
    replay = f"replay={{store: {store}, mix: {{first: 1, second: 2}}, share: 0.5}}"
    base = parity_sft.overrides(case, LENGTH, 8, 4, chat, "data.mix={rows: 1}", replay, "steps=6")
    settings = [
        "optim.lr=0.01",
        "checkpoint.every=3",
        "validation={every: 3, rows: 4, before: true}",
    ]
    return [*base, *settings, f"log_dir={where / 'logs'}", f"output_dir={where / 'out'}", *more]


def sft_here(*settings: str) -> bool:
    run = load_settings(SFTConfig, ROOT / "configs" / "sft.yaml", list(settings))
    with setup.ranks() as device:
        return finetune(run, 0, 1, device) == 0


def test_micro_batches_and_restarts_change_nothing(case, text_store, tmp_path):
    whole, small, paused = (tmp_path / name for name in ("whole", "small", "paused"))
    assert sft_here(*overrides(case, text_store, whole))
    assert sft_here(*overrides(case, text_store, small, "data.micro_batch_size=2"))
    sft_here(*overrides(case, text_store, paused, "until=3"))
    assert sft_here(*overrides(case, text_store, paused))
    one, two, again = (read_metrics(folder / "logs") for folder in (whole, small, paused))
    keys = (
        "loss",
        "grad_norm",
        "tokens",
        "val/loss",
        "val/replay/loss",
        "val/replay.first/loss",
        "val/replay.second/bits_per_byte",
        "val/replay/trained_share",
    )
    for key in keys:
        values = [row[key] for row in one if key in row]
        assert len(values) in (2, 6)
        assert [row[key] for row in two if key in row] == pytest.approx(values, abs=1e-5, rel=1e-5)
        assert [row[key] for row in again if key in row] == values, key  # bit for bit
    weights = [(folder / "out/step_6/model.safetensors").read_bytes() for folder in (whole, paused)]
    assert weights[0] == weights[1]
    assert one[-1]["val/replay/trained_share"] == pytest.approx(0.5, abs=0.2)
    [before] = [e for e in read_lines(whole / "logs/events.jsonl") if e["event"] == "measured"]
    assert one[-1]["val/replay/loss"] < before["val/replay/loss"]
    plain = tmp_path / "plain"
    sft_here(*overrides(case, text_store, plain, "replay=null", "steps=1"))
    [alone] = [e for e in read_lines(plain / "logs/events.jsonl") if e["event"] == "measured"]
    assert alone["val/loss"] == before["val/loss"]  # that of the conversations
    assert not any("replay" in key for key in alone)
    check_text_loss(whole / "out/step_6", text_store, one[-1]["val/replay.first/loss"])
    check_report(whole)


def check_text_loss(folder: Path, store: Path, logged: float) -> None:
    """Compare the loss of four rows of text with transformers, document by document."""
    from transformers import LlamaForCausalLM

    model, ids = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        stream(store, "first", "val"),
    )
    losses = []
    for start in range(0, 4 * LENGTH, LENGTH):
        row, targets = ids[start : start + LENGTH], ids[start + 1 : start + LENGTH + 1]
        bounds = sorted({0, LENGTH, *np.flatnonzero(row == 0).tolist()})
        for begin, end in pairwise(bounds):
            with torch.no_grad():
                logits = model(torch.from_numpy(row[None, begin:end])).logits[0]
            part = torch.from_numpy(targets[begin:end])
            losses += torch.nn.functional.cross_entropy(logits, part, reduction="none").tolist()
    assert logged == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def check_report(where: Path) -> None:
    """The report's mixture has the text."""
    logs = where / "run"
    logs.mkdir()
    (where / "logs").rename(logs / "sft")
    rows = [{"phase": "base", "step": 1, "loss": 2.0}]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = where / "sft" / "step_6"
    folder.parent.mkdir()
    (where / "out" / "step_6").rename(folder)
    [stage] = training(logs, folder)["tuning"]
    shares = {"rows": 0.5, "replay.first": 0.5 / 3, "replay.second": 1 / 3}
    assert stage["mix"] == pytest.approx(shares)


def test_a_base_model_with_chat_tokens_reads_the_same_text(case, text_store, tmp_path):
    save_chat_tokenizer(tmp_path / "again", case / "chat")  # as after mid-training
    replay = ReplayConfig(str(text_store), {"first": 1.0}, 0.5)
    [source] = open_replay(replay, "val", tmp_path / "again").values()
    assert len(source) == len(stream(text_store, "first", "val"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["replay.mix={third: 1}"],
            "replay.mix.third: .* has no such source; available: first, sec",
        ),
        (["replay.mix={}"], "replay.mix is empty; list at least one source"),
        (["replay.mix={first: 0}"], "replay.mix.first=0 must be above 0"),
        (["replay.mix={first: 1, second: 1e-9}"], "source replay.second is below 1/1000 of the"),
        (["replay.share=0"], "replay.share=0 must be above 0 and below 1; remove the section"),
        (["replay.share=1"], "replay.share=1 must be above 0 and below 1"),
        (["replay.store=nowhere"], "replay.store=nowhere has no tokenizer; give the data store"),
        (["replay={share: 0.1, mix: {first: 1}}"], "replay lacks store"),
        (["replay.sources={}"], "replay.sources is not a setting"),
        (["init_from=BYTES"], "has another tokenizer than the base model; give the data store"),
        (
            ["chat.sources.replay={path: ROWS}", "data.mix={replay: 1}"],
            "data.mix.replay has a name",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(case, text_store, tmp_path, more, message):
    if "BYTES" in more[0]:
        parity_sft.write_case(tmp_path)
    places = {"BYTES": str(tmp_path / "base"), "ROWS": str(case / "rows.jsonl")}
    for name, path in places.items():
        more = [setting.replace(name, path) for setting in more]
    with pytest.raises(ValueError, match=message):
        sft_here(*overrides(case, text_store, tmp_path, *more))
    assert not (tmp_path / "out").exists()
