"""Best-fit rows, long documents, epochs: each token once, equal rows on any ranks, robust plans."""

import errno
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from conftest import VOCAB, read_metrics, train_here, train_ranks
from test_training import losses, same_state

from data import packing
from data.dataloader import PackedDataLoader, Prefetcher, Step, validation_batches
from data.packing import (
    IGNORE,
    LongDocuments,
    best_fit_decreasing,
    document_table,
    load_or_make_plan,
    make_plan,
)
from data.shards import ShardWriter, TokenShards
from data.store import open_shards
from models.losses import IGNORE as LOSS_IGNORE
from models.nanollama import ModelConfig, NanoLlama
from training.config import DataConfig

LENGTH = 64


def write(folder, lengths, shard_tokens=4_000):
    """Write documents of the given lengths: token 0, then numbers unique to the document."""
    with ShardWriter(folder, 1 << 20, "test", {}, shard_tokens) as writer:
        position = 0
        for length in lengths:
            writer.add("train", [0, *range(position + 1, position + length)])
            position += length
    return TokenShards(folder, "train")


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    lengths = {
        name: np.minimum(rng.lognormal(3.5, 1.0, count).astype(int) + 1, 900)
        for name, count in (("a", 500), ("b", 150))
    }
    lengths["a"][:4] = (LENGTH, 2 * LENGTH, 1, LENGTH + 1)
    return {name: write(tmp_path / name, part) for name, part in lengths.items()}


def loader(shards, mix=None, rows=8, micro=2, packing="best_fit", **more):
    return PackedDataLoader(
        shards, mix or {"a": 0.8, "b": 0.2}, LENGTH, rows, micro, seed=5, packing=packing, **more
    )


def epoch(shards, source="a", packing="best_fit"):
    """Return tokens, targets and doc_ids [rows, LENGTH] of one source's first epoch."""
    source_loader = loader(shards, {source: 1.0}, rows=1, micro=1, packing=packing)
    batches = [
        source_loader.at(batch_index).batches[0]
        for batch_index in range(len(source_loader.packed[0]))
    ]
    return [
        torch.cat(parts).numpy() for parts in zip(*(batch[:3] for batch in batches), strict=True)
    ]


def pairs_of(source):
    """Count each (token, target) of an epoch; the target of a document's last token is 0."""
    tokens = np.append(source.read(0, len(source))[0], 0)
    return Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


@pytest.mark.parametrize("minimum", [None, 100])
def test_best_fit_reads_every_token_once_with_its_next_and_pads_the_rest(shards, minimum):
    source = shards["a"] if minimum is None else LongDocuments(shards["a"], minimum)
    tokens, targets, doc_ids = epoch({"a": source})
    real = targets != IGNORE
    assert Counter(zip(tokens[real].tolist(), targets[real].tolist(), strict=True)) == pairs_of(
        source
    )
    # Padding is only at the end of a row.
    assert real.sum() == len(source) and (np.diff(real.astype(int), axis=1) <= 0).all()
    assert (tokens[~real] == 0).all() and IGNORE == LOSS_IGNORE
    assert (doc_ids[:, 0] == 0).all() and np.isin(np.diff(doc_ids, axis=1), (0, 1)).all()
    begins = np.diff(doc_ids, axis=1) == 1
    # A piece of a longer document.
    assert ((np.diff(tokens, axis=1) == 1) | (tokens[:, :-1] == 0) | begins | ~real[:, 1:]).all()
    assert (begins | real[:, 1:] | ~real[:, :-1]).all()  # padding is a document of its own


def test_best_fit_cuts_only_documents_longer_than_a_row(shards):
    tokens, targets, _ = epoch(shards)
    starts, lengths = document_table(shards["a"])
    where = {int(number): row for row, numbers in enumerate(tokens) for number in numbers if number}
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        rows = {where[number] for number in range(start + 1, start + length)}
        assert len(rows) <= -(-length // LENGTH)
    plan, cost = load_or_make_plan(shards["a"], LENGTH, 5)
    assert cost["cut"] == (lengths > LENGTH).mean()
    assert cost["padding"] == pytest.approx((targets == IGNORE).mean()) and cost["padding"] < 0.02
    ends = np.cumsum(lengths)
    across = [
        any(at % LENGTH == 0 for at in range(end - length + 1, end))
        for end, length in zip(ends, lengths, strict=True)
    ]
    assert cost["cut_by_stream"] == np.mean(across) > 2 * cost["cut"]
    assert (
        len(plan.rows) - 1 == len(tokens)
        and len(plan.rows) - 1 <= 1.02 * len(shards["a"]) / LENGTH + 1
    )


def plain_best_fit_decreasing(sizes, capacity):
    """Pack with the textbook algorithm; return the free space of each row."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else capacity) - size)
    return sorted(spaces)


@pytest.mark.parametrize("seed", range(8))
def test_packing_counts_equals_packing_one_by_one(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, int(rng.integers(2, 51)), int(rng.integers(1, 400)))
    counts = np.bincount(sizes, minlength=51)
    groups = best_fit_decreasing(counts.tolist(), 50)
    packed = [
        (50 - sum(size * number for size, number in pattern), rows) for rows, pattern in groups
    ]
    assert sorted(
        space for space, rows in packed for _ in range(rows)
    ) == plain_best_fit_decreasing(sizes.tolist(), 50)
    used = Counter()
    for rows, pattern in groups:
        used.update({size: number * rows for size, number in pattern})
    assert [used[size] for size in range(51)] == counts.tolist()


def test_a_plan_of_many_documents_holds_every_piece_once_whatever_their_order():
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(6, 1.2, 200_000).astype(np.int64) + 1, 200_000)
    starts = np.cumsum(lengths) - lengths
    plan = make_plan(starts, lengths, 4096, seed=0)
    order = np.argsort(plan.starts)
    ends = plan.starts[order] + plan.lengths[order]
    assert (
        (ends[:-1] == plan.starts[order][1:]).all()
        and plan.starts[order][0] == 0
        and ends[-1] == lengths.sum()
    )
    filled = np.add.reduceat(plan.lengths, plan.rows[:-1], dtype=np.int64)
    assert filled.max() <= 4096 and filled.sum() == lengths.sum() and filled.mean() > 4090
    second_plan = make_plan(starts, lengths, 4096, seed=1)
    assert (second_plan.rows == plan.rows).all() and (
        second_plan.starts != plan.starts
    ).mean() > 0.5


CASES = [("stream", None), ("best_fit", None), ("stream", 80), ("best_fit", 80)]


@pytest.mark.parametrize(("packing", "minimum"), CASES)
def test_rows_do_not_depend_on_ranks_micro_batches_or_history(shards, tmp_path, packing, minimum):
    sources = {
        name: part if minimum is None else LongDocuments(part, minimum)
        for name, part in shards.items()
    }
    # Rows with 25 tokens of padding, if they are not cut from a stream.
    sources["c"] = write(tmp_path / "c", [39] * 300)
    options = {"mix": {"a": 0.6, "b": 0.2, "c": 0.2}, "packing": packing}
    batch_index = 130  # beyond the first epoch of a and b
    expected = loader(sources, **options).at(batch_index)
    assert (
        sum(epochs > 1 for epochs in loader(sources, **options).epochs(batch_index).values()) >= 2
    )
    assert (expected.loss_denominator < 8 * LENGTH) == (packing == "best_fit")
    for world in (1, 2, 4):
        for micro in (1, 2, 4):
            if 8 % (world * micro):
                continue
            parts = [
                loader(sources, micro=micro, rank=rank, world=world, **options).at(batch_index)
                for rank in range(world)
            ]
            for field in ("tokens", "targets", "doc_ids"):
                joined = torch.cat(
                    [getattr(batch, field) for part in parts for batch in part.batches]
                )
                assert torch.equal(
                    joined, torch.cat([getattr(batch, field) for batch in expected.batches])
                )
            present = sum(
                int((batch.targets != IGNORE).sum()) for part in parts for batch in part.batches
            )
            assert {(part.loss_denominator, part.tokens) for part in parts} == {(present, present)}
    ahead = Prefetcher(loader(sources, **options), torch.device("cpu"))
    for jump in (3, 4, 130, 131, 130):
        assert torch.equal(
            ahead.at(jump).batches[1].tokens, loader(sources, **options).at(jump).batches[1].tokens
        )


def test_batches_have_the_types_and_layout_of_the_model(shards):
    for batch in loader(shards).at(0).batches:
        assert (
            batch.tokens.dtype == batch.targets.dtype == torch.int64
            and batch.doc_ids.dtype == torch.int32
        )
        assert all(part.shape == (2, LENGTH) and part.is_contiguous() for part in batch[:3])


def test_what_changes_the_rows_changes_the_fingerprint(shards):
    long = {name: LongDocuments(part, 80) for name, part in shards.items()}
    longer = {name: LongDocuments(part, 81) for name, part in shards.items()}
    fingerprints = [
        loader(part, packing=kind).fingerprint
        for part in (shards, long, longer)
        for kind in ("stream", "best_fit")
    ]
    assert len(set(fingerprints)) == 6


def test_the_mixture_is_by_tokens_also_where_rows_of_a_source_are_mostly_padding(tmp_path):
    sources = {
        "half": write(tmp_path / "half", [33] * 3000),
        "full": write(tmp_path / "full", [64] * 3000),
    }
    mixed = loader(sources, {"half": 0.5, "full": 0.5}, rows=50, micro=50)
    steps = [mixed.at(batch_index) for batch_index in range(20)]  # one block
    full_rows = sum(
        int((batch.targets != IGNORE).all(1).sum()) for step in steps for batch in step.batches
    )
    assert full_rows * 64 / sum(step.tokens for step in steps) == pytest.approx(0.5, abs=0.002)


def test_a_packed_row_equals_its_documents_apart(text_store):
    source = open_shards(text_store, {"first": 1.0}, "train", VOCAB)["first"]
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = NanoLlama(config, seed=0)
    rows = PackedDataLoader(
        {"first": source}, {"first": 1.0}, 1024, 8, 8, seed=0, packing="best_fit"
    )
    batch = next(
        batch
        for batch_index in range(99)
        for batch in rows.at(batch_index).batches
        if int(batch.doc_ids.max()) >= 3
    )
    row = int(batch.doc_ids.max(1).values.argmax())
    tokens, targets, doc_ids = (part[row : row + 1] for part in batch[:3])
    with torch.no_grad():
        packed = model(tokens, targets, doc_ids).nll
        pieces = [doc_ids[0] == number for number in doc_ids[0].unique()]
        apart = torch.cat(
            [model(tokens[:, piece], targets[:, piece]).nll for piece in pieces], dim=1
        )
    assert len(pieces) >= 4 and (packed - apart).abs().max() <= 1e-5
    assert (packed[targets == IGNORE] == 0).all() and (packed[targets != IGNORE] > 0).all()


def plan_files(source):
    folder, _ = packing.plan_folder(source, LENGTH, 5)
    return folder, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_plan_is_made_once_by_the_first_of_several_processes(shards, monkeypatch):
    barrier, make, made_plans = Barrier(4), make_plan, []

    def all_at_once(*args):
        made_plans.append(make(*args))
        barrier.wait(timeout=20)  # no process writes before all have missed the cache
        return made_plans[-1]

    monkeypatch.setattr(packing, "make_plan", all_at_once)
    with ThreadPoolExecutor(4) as pool:
        plans = [
            future.result()[0]
            for future in [pool.submit(load_or_make_plan, shards["a"], LENGTH, 5) for _ in range(4)]
        ]
    assert len(made_plans) == 4
    for plan in plans:
        assert all(np.array_equal(one, two) for one, two in zip(plan, plans[0], strict=True))
    folder, _ = plan_files(shards["a"])
    assert list(folder.parent.iterdir()) == [folder]
    assert (
        load_or_make_plan(shards["a"], LENGTH, 5)[0].starts.tolist() == plans[0].starts.tolist()
        and len(made_plans) == 4
    )
    TokenShards(shards["a"].folder, "train").verify()


@pytest.mark.parametrize("damage", ["cut short", "changed", "lost", "no manifest"])
def test_a_damaged_plan_is_made_again(shards, damage, capsys):
    load_or_make_plan(shards["a"], LENGTH, 5)
    folder, before = plan_files(shards["a"])
    content = before["starts.npy"]
    if damage == "cut short":
        (folder / "starts.npy").write_bytes(content[:-9])
    elif damage == "changed":
        (folder / "starts.npy").write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        (folder / {"lost": "rows.npy", "no manifest": "manifest.json"}[damage]).unlink()
    assert capsys.readouterr().err == ""
    expected = epoch(shards)[0]
    assert "is damaged; rebuilding it" in capsys.readouterr().err
    assert plan_files(shards["a"])[1] == before and list(folder.parent.iterdir()) == [folder]
    assert np.array_equal(epoch(shards)[0], expected) and capsys.readouterr().err == ""


def test_a_store_that_cannot_be_written_keeps_its_plan_in_memory_and_a_full_disk_is_an_error(
    shards, monkeypatch
):
    def refuse(number):
        def save(*_):
            raise OSError(number, "refused")

        monkeypatch.setattr(np, "save", save)

    refuse(errno.ENOSPC)
    with pytest.raises(OSError, match="refused"):
        load_or_make_plan(shards["a"], LENGTH, 5)
    refuse(errno.EROFS)
    in_memory = epoch(shards)[0]
    assert not list((shards["a"].folder / "plans").iterdir())
    monkeypatch.undo()
    assert (
        np.array_equal(epoch(shards)[0], in_memory)
        and len(list((shards["a"].folder / "plans").iterdir())) == 1
    )


def test_long_documents_read_as_a_stream_of_their_own(shards):
    long = LongDocuments(shards["a"], 100)
    starts, lengths = document_table(shards["a"])
    texts = [
        shards["a"].read(s, s + n)[0]
        for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
        if n >= 100
    ]
    all_tokens = np.concatenate(texts)
    number = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    assert 10 < long.documents == len(texts) < len(starts) / 2 and len(long) == len(all_tokens)
    for start, stop in [
        (0, len(long)),
        (0, 1),
        (len(texts[0]) - 1, len(texts[0]) + 1),
        (777, 2777),
        (len(long) - 5, len(long)),
    ]:
        tokens, doc_ids = long.read(start, stop)
        assert np.array_equal(tokens, all_tokens[start:stop]) and np.array_equal(
            doc_ids, number[start:stop] - number[start]
        )
        assert tokens.dtype == np.int64 and doc_ids.dtype == np.int32
    tokens, targets, _ = epoch({"a": long}, packing="stream")
    assert sorted(tokens.flatten()) == sorted(all_tokens[: tokens.size]) and set(
        targets.flatten()
    ) <= set(all_tokens)
    every = LongDocuments(shards["a"], 1)
    assert np.array_equal(every.read(5, 2_000)[1], shards["a"].read(5, 2_000)[1])
    assert validation_batches(every, LENGTH, 4, 8)[0].targets.equal(
        validation_batches(shards["a"], LENGTH, 4, 8)[0].targets
    )


def test_too_few_long_documents_are_counted(shards, text_store):
    with pytest.raises(
        ValueError,
        match=r"source b has 0 documents of at least 5,000 tokens, 0 tokens together, too few",
    ):
        loader({**shards, "b": LongDocuments(shards["b"], 5_000)})
    documents = LongDocuments(shards["a"], int(np.sort(document_table(shards["a"])[1])[-2]))
    with pytest.raises(
        ValueError,
        match=rf"has 2 documents of at least [0-9]+ tokens, {len(documents):,} .*lower "
        r"data.min_document",
    ):
        PackedDataLoader({"a": documents}, {"a": 1.0}, 4096, 1, 1, seed=0)
    opened = open_shards(
        text_store, {"first": 1.0, "second": 1.0}, "train", VOCAB, {"second": 3_000}
    )
    assert isinstance(opened["first"], TokenShards) and isinstance(opened["second"], LongDocuments)
    assert (
        document_table(opened["second"].shards)[1].min() < 3_000 <= opened["second"].lengths.min()
    )


def test_settings_of_packing_are_checked():
    for wrong, message in (
        ({"packing": "best-fit"}, "must be stream or best_fit"),
        ({"min_document_tokens": {"b": 9}}, r"data.min_document_tokens.b: data.mix reads a, not b"),
        ({"min_document_tokens": {"a": 0}}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(mix={"a": 1.0}, **wrong)


def test_a_start_says_what_is_read_how_often_and_at_what_cost(shards):
    sources = {"a": LongDocuments(shards["a"], 100), "b": shards["b"]}
    loader_of_two = loader(sources, rows=2)
    rows = {
        name: len(part)
        for name, part in zip(loader_of_two.names, loader_of_two.packed, strict=True)
    }
    steps = int(3.9 * rows["a"] / (2 * loader_of_two.quota[0] / 1000))
    a, b = loader_of_two.describe(steps)
    assert (
        a.startswith("reads a for 3.9")
        and f"{len(sources['a']):,} tokens in {sources['a'].documents} documents of 100 tok" in a
    )
    assert "padding" in b and "documents cut" in b and "% of its tokens" not in b
    assert len(loader_of_two.describe(int(1.1 * steps))) == 3
    assert loader_of_two.describe(int(1.1 * steps))[-1].startswith(
        "warning: a will be read for 4.3 epochs; above 4 epochs"
    )


class Failing:
    fingerprint = ""

    def at(self, batch_index):
        if batch_index == 1:
            raise OSError(errno.EIO, "the disk is gone")
        return Step([], 7, 7)


def test_an_error_while_reading_ahead_reaches_the_loop():
    ahead = Prefetcher(Failing(), torch.device("cpu"))
    assert ahead.at(0).loss_denominator == 7
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.at(1)


def test_for_a_gpu_the_thread_pins_memory_through_that_gpu(shards, monkeypatch):
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: calls.append(len(part)) or part)
    ahead = Prefetcher(loader(shards), torch.device("cuda", 1))
    ahead.pool.submit(ahead._load, 0).result()
    assert calls == [torch.device("cuda", 1), *[2] * 4 * 4]  # four parts of four micro-batches


@pytest.fixture
def uneven_store(text_store, tmp_path):
    """text_store plus documents of 25 to 47 tokens, which leave much padding in rows of 48."""
    store, rng = tmp_path / "store", np.random.default_rng(0)
    shutil.copytree(text_store, store)
    with ShardWriter(
        store / "tokens" / "short",
        VOCAB,
        TokenShards(store / "tokens" / "first", "val").tokenizer,
        {},
    ) as writer:
        for number in range(400):
            text = rng.integers(3, 40, int(rng.integers(24, 47))).tolist()
            writer.add("val" if number % 4 == 0 else "train", [0, *text])
    return store


def test_training_on_best_fit_rows_is_the_same_on_two_ranks_and_after_a_stop(
    settings, uneven_store, tmp_path
):
    shape = (
        "data.packing=best_fit",
        "data.sequence_length=48",
        "data.tokens_per_step=384",
        "checkpoint.every=2",
    )
    packed = (f"data.store={uneven_store}", "data.mix={first: 0.5, short: 0.5}", *shape)

    def run(name, *more):
        return settings(
            *packed, f"output_dir={tmp_path / name}", f"log_dir={tmp_path / name / 'logs'}", *more
        )

    assert train_here(run("straight"))
    for steps in (1, 4, 6):
        assert train_here(run("stopped", f"steps={steps}"))
    assert same_state(tmp_path / "straight" / "step_6", tmp_path / "stopped" / "step_6", tmp_path)
    straight = losses(tmp_path / "straight" / "logs")
    assert losses(tmp_path / "stopped" / "logs") == straight and straight[0] - straight[-1] > 0.1
    done = train_ranks(run("two", "data.micro_batch_size=2"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two" / "logs") == pytest.approx(straight, abs=1e-5)
    rows = read_metrics(tmp_path / "two" / "logs")
    sources = open_shards(uneven_store, {"first": 0.5, "short": 0.5}, "train", VOCAB)
    expected_loader = PackedDataLoader(
        sources, {"first": 0.5, "short": 0.5}, 48, 8, 4, 1337, packing="best_fit"
    )
    assert [row["tokens"] for row in rows] == np.cumsum(
        [expected_loader.at(batch_index).tokens for batch_index in range(6)]
    ).tolist()
    assert rows[-1]["tokens"] < 0.95 * 6 * 384 and all(
        0 <= row["data/wait_frac"] < 1 for row in rows
    )


def test_training_says_how_often_it_reads_and_warns_above_four_epochs(
    settings, text_store, tmp_path, capsys
):
    source = open_shards(text_store, {"second": 1.0}, "train", VOCAB)["second"]
    minimum = int(np.sort(document_table(source)[1])[-2])
    tokens = len(LongDocuments(source, minimum))
    for name, epochs in (("few", 3.5), ("many", 4.5)):
        steps = int(epochs * tokens / 4096)
        long = (
            "data.mix={second: 1}",
            f"data.min_document_tokens={{second: {minimum}}}",
            "checkpoint.every=1000",
        )
        more = (
            f"schedule.total_steps={steps}",
            "validation.every=0",
            f"output_dir={tmp_path / name}",
        )
        more += (
            f"log_dir={tmp_path / name / 'logs'}",
            "data.tokens_per_step=4096",
            "data.micro_batch_size=64",
        )
        assert train_here(settings(*long, *more, "until=1", steps=steps))
        output = capsys.readouterr().out
        times = re.search(
            rf"reads second for ([0-9.]+) epochs: {tokens:,} tokens in 2 documents of "
            rf"{minimum:,} tokens",
            output,
        )
        assert times and abs(float(times[1]) - epochs) < 0.3
        assert bool(
            re.search("warning: second will be read for 4.[0-9] epochs; above 4 epochs", output)
        ) == (name == "many")
