"""BinLoader: rows of a plain greedy loop on any ranks; schedules, epochs, bad input."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data.bin_loader import MAX_OPEN, BinLoader, BinValidation
from data.bin_shards import BinShards, write_bin
from data.dataloader import Prefetcher
from models.losses import IGNORE

VOCAB, BOS = 1 << 16, 7
TOKENS, LENGTH, LIMIT = 8 * 96, 96, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of documents with lengths from 1 to 300; the second begins within a document."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("shards")
    for shard, size in enumerate((9_000, 7_001, 11_017), 1):
        tokens = rng.integers(8, VOCAB, size)
        lengths = np.minimum(rng.lognormal(3, 1.2, size).astype(int) + 1, 300)
        lengths[:4] = (LIMIT, LENGTH + 1, 1, 1)
        starts = np.cumsum(lengths) - lengths + (5 if shard == 2 else 0)
        tokens[starts[starts < size]] = BOS
        write_bin(folder / f"text_train_{shard:06d}.bin", tokens)
    write_bin(folder / "text_val_000000.bin", rng.integers(8, VOCAB, 2_000))
    return folder


@pytest.fixture(scope="module")
def shards(folder):
    return BinShards(folder / "text_train_*.bin", VOCAB, BOS)


def rows_of(step):
    """All rows of a step as [rows, length + 1] numpy arrays of token ids, and their doc_ids."""
    tokens = torch.cat([batch.tokens for batch in step.batches])
    targets = torch.cat([batch.targets for batch in step.batches])
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    rows = torch.cat([tokens, targets[:, -1:]], dim=1).numpy()
    if step.batches[0].doc_ids is None:
        return rows, None
    return rows, torch.cat([batch.doc_ids for batch in step.batches]).numpy()


def greedy_steps(shards, steps, tokens_at, length_at, limit_at):
    """The rows of each step, and the length of each document in a row, by a loop over tokens."""
    shard, position, made = 0, 0, []
    while len(made) < steps:
        tokens = shards.shards[shard].tolist()
        starts = [i for i, token in enumerate(tokens) if token == BOS]
        step, length = len(made), length_at(len(made))
        rows, next_start = [], position
        for _ in range(tokens_at(step) // length):
            row, pieces = [], []
            while len(row) <= length and next_start < len(starts):
                begin = starts[next_start]
                end = starts[next_start + 1] if next_start + 1 < len(starts) else len(tokens)
                piece = tokens[begin:end][: limit_at(step)][: length + 1 - len(row)]
                row, pieces = row + piece, [*pieces, len(piece)]
                next_start += 1
            if len(row) == length + 1:
                rows.append((row, pieces))
        if len(rows) == tokens_at(step) // length:
            made.append(rows)
            position = next_start
        else:
            shard, position = (shard + 1) % len(shards.shards), 0
    return made


def test_aligned_rows_are_those_of_a_greedy_loop(shards):
    loader = BinLoader(shards, TOKENS, LENGTH, max_document=LIMIT)
    steps = greedy_steps(shards, 40, lambda _: TOKENS, lambda _: LENGTH, lambda _: LIMIT)
    assert loader.epoch(39) >= 1  # so the loop has passed every shard's end
    for step, expected in enumerate(steps):
        rows, doc_ids = rows_of(loader.at(step))
        assert rows.tolist() == [row for row, _ in expected]
        assert (rows[:, 0] == BOS).all() and rows.shape[1] == LENGTH + 1
        for ids, (_, pieces) in zip(doc_ids, expected, strict=True):
            assert ids.tolist() == np.repeat(np.arange(len(pieces)), pieces)[:LENGTH].tolist()
            assert np.bincount(ids).max() <= LIMIT


def test_sequential_rows_are_contiguous_and_disjoint(shards):
    loader = BinLoader(shards, TOKENS, LENGTH, alignment="sequential", micro_batch_tokens=LENGTH)
    expected = [
        shard[start : start + TOKENS + 1].astype(np.int64)
        for shard in shards.shards
        for start in range(0, len(shard) - TOKENS, TOKENS)
    ]
    for step, tokens in enumerate([*expected, *expected[:2]]):
        assert loader.epoch(step) == step // len(expected)
        rows, doc_ids = rows_of(loader.at(step))
        windows = np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[::LENGTH]
        assert np.array_equal(rows, windows)
        begins = (rows[:, :-1] == BOS).cumsum(axis=1)
        assert np.array_equal(doc_ids, begins - begins[:, :1])


@pytest.mark.parametrize("alignment", ["bos", "sequential"])
@pytest.mark.parametrize("extra, steps_per_shard", [(0, 1), (1, 2), (2, 2)])
def test_the_last_step_of_a_shard_needs_one_token_more(tmp_path, alignment, extra, steps_per_shard):
    """Shards of 2 x 3 rows of 10 tokens, in documents of 11 (bos: the row's 10 and a target)."""
    size = 6 * 11 + extra - 1 if alignment == "bos" else 6 * 10 + extra
    tokens = np.where(np.arange(size) % 11 == 0, BOS, 9)
    for number in range(8):
        write_bin(tmp_path / f"t_{number}.bin", tokens + (tokens != BOS) * number)
    loader = BinLoader(BinShards(tmp_path / "t_*.bin", VOCAB, BOS), 30, 10, alignment=alignment)
    for step in range(8 * steps_per_shard + 1):
        assert loader.at(step).batches[0].tokens.max() == 9 + step // steps_per_shard % 8
        assert loader.step_start(step).visit == step // steps_per_shard
    assert len(loader.indexes) <= MAX_OPEN + 2


def staged(*values):
    """Three stages of 6, 9 and further steps."""
    return lambda step: values[0 if step < 6 else 1 if step < 15 else 2]


@pytest.mark.parametrize("alignment", ["bos", "sequential"])
def test_every_number_of_ranks_reads_the_same_stream(shards, alignment):
    tokens, length = staged(8 * 96, 16 * 64, 8 * 128), staged(96, 64, 128)
    limits = {"max_document": staged(40, 64, 300)} if alignment == "bos" else {}
    alone = BinLoader(shards, tokens, length, alignment=alignment, **limits)
    if limits:
        greedy = greedy_steps(shards, 30, tokens, length, limits["max_document"])
    for world in (1, 2, 4, 8):
        ranks = [
            BinLoader(shards, tokens, length, rank, world, 200, alignment, **limits)
            for rank in range(world)
        ]
        assert {rank.fingerprint for rank in ranks} == {alone.fingerprint}
        for step in (*range(20), 29):
            expected, parts = alone.at(step), [rank.at(step) for rank in ranks]
            merged = expected._replace(batches=[b for part in parts for b in part.batches])
            for got, wanted in zip(rows_of(merged), rows_of(expected), strict=True):
                assert np.array_equal(got, wanted)
            numbers = torch.cat([batch.rows for batch in merged.batches])
            assert torch.equal(numbers, expected.batches[0].rows)
            assert {part.loss_denominator for part in parts} == {tokens(step)}
            assert expected.tokens == sum(batch.tokens.numel() for batch in merged.batches)
            assert max(batch.tokens.numel() for batch in merged.batches) <= 200
            if limits:
                assert rows_of(merged)[0].tolist() == [row for row, _ in greedy[step]]


def test_row_numbers_count_all_rows_of_earlier_steps(shards):
    loader = BinLoader(shards, staged(8 * 96, 16 * 64, 8 * 128), staged(96, 64, 128))
    numbers = [loader.at(step).batches[0].rows for step in range(20)]
    assert torch.equal(torch.cat(numbers), torch.arange(6 * 8 + 9 * 16 + 5 * 8))


@pytest.mark.parametrize("options", [{"max_document": LIMIT}, {"alignment": "sequential"}])
def test_a_step_depends_on_its_index_alone(shards, options):
    loader = BinLoader(shards, TOKENS, LENGTH, **options)
    steps = [rows_of(loader.at(step))[0] for step in range(45)]
    for step in (44, 0, 31, 17, 44):
        assert np.array_equal(rows_of(loader.at(step))[0], steps[step])
        resumed = BinLoader(shards, TOKENS, LENGTH, **options)
        prefetched = Prefetcher(resumed, torch.device("cpu"))
        assert np.array_equal(rows_of(prefetched.at(step))[0], steps[step])
        assert np.array_equal(rows_of(resumed.at(0))[0], steps[0])


def test_spans_are_disjoint_and_in_order(shards):
    """Each token of the first shard is unique but for bos: rows must use increasing positions."""
    position = {int(token): i for i, token in enumerate(shards.shards[0])}
    loader = BinLoader(shards, TOKENS, LENGTH, max_document=LIMIT)
    unique = np.isin(shards.shards[0], np.flatnonzero(np.bincount(shards.shards[0]) == 1))
    last = -1
    for step in range(20):
        if loader.step_start(step).visit:
            break
        for row in rows_of(loader.at(step))[0]:
            places = [position[token] for token in row.tolist() if unique[position[token]]]
            assert places[0] > last and all(a < b for a, b in pairwise(places))
            last = places[-1]
    assert step > 3


def test_without_a_mask_there_are_no_doc_ids(shards):
    masked = BinLoader(shards, TOKENS, LENGTH)
    plain = BinLoader(shards, TOKENS, LENGTH, document_mask=False)
    step = Prefetcher(plain, torch.device("cpu")).at(3)
    assert all(batch.doc_ids is None for batch in step.batches)
    assert np.array_equal(rows_of(step)[0], rows_of(masked.at(3))[0])
    assert plain.fingerprint != masked.fingerprint


def test_the_fingerprint_changes_with_the_stream(shards, folder):
    def fingerprint(tokens=TOKENS, length=LENGTH, source=shards, **options):
        return BinLoader(source, tokens, length, **options).fingerprint

    first = BinShards(folder / "text_train_000001.bin", VOCAB, BOS)
    prints = [
        fingerprint(),
        fingerprint(2 * TOKENS),
        fingerprint(length=48),
        fingerprint(max_document=50),
        fingerprint(alignment="sequential"),
        fingerprint(source=first),
        fingerprint(staged(TOKENS, TOKENS, 2 * TOKENS)),
        fingerprint(staged(TOKENS, 2 * TOKENS, 2 * TOKENS)),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint() == prints[0]
    assert fingerprint(staged(TOKENS, TOKENS, 2 * TOKENS)) == prints[6]


def test_a_new_epoch_is_announced_and_described(shards, capsys):
    loader = BinLoader(shards, TOKENS, LENGTH, alignment="sequential")
    per_epoch = sum((len(shard) - 1) // TOKENS for shard in shards.shards)
    for step in range(2 * per_epoch + 2):
        loader.at(step)
    epochs = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in epochs] == [
        f"step {per_epoch}",
        f"step {2 * per_epoch}",
    ]
    assert "epoch 2 of " in epochs[0] and "read again" in epochs[0]
    [line] = loader.describe(per_epoch)
    assert "for 1.00 epochs: 27,018 tokens in 3 shard(s)" in line
    assert "will be read for 5.0 epochs" in loader.describe(5 * per_epoch)[1]
    BinLoader(shards, TOKENS, LENGTH, 1, 2, alignment="sequential").at(per_epoch)
    assert capsys.readouterr().out == ""


def test_the_estimate_of_epochs_is_near_the_real_one(shards):
    loader = BinLoader(shards, TOKENS, LENGTH, max_document=LIMIT)
    steps = next(step for step in range(500) if loader.epoch(step) == 4)
    epochs = float(loader.describe(steps)[0].split("for about ")[1].split()[0])
    assert epochs == pytest.approx(4, rel=0.15)


def test_validation_reads_the_first_tokens_once_on_any_ranks(folder):
    source = BinShards(folder / "text_val_*.bin", VOCAB, BOS)
    tokens = source.shards[0][: 10 * 96 + 1].astype(np.int64)
    for world in (1, 3):
        parts = [list(BinValidation(source, 960, 96, 2, rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        rows = [
            (row, target)
            for batches in zip(*parts, strict=True)
            for batch in batches
            for row, target in zip(batch.tokens, batch.targets, strict=True)
            if (target != IGNORE).all()
        ]
        assert torch.cat([row for row, _ in rows]).numpy().tolist() == tokens[:-1].tolist()
        assert torch.cat([row for _, row in rows]).numpy().tolist() == tokens[1:].tolist()
    validation = BinValidation(source, 960, 96, 4, document_mask=False)
    assert [len(list(validation)) for _ in range(2)] == [3, 3]  # can be iterated again
    assert all(batch.doc_ids is None for batch in validation)
    for count, said in (
        (961, "961 validation tokens must be a multiple of the row length 96"),
        (96 * 30, "has 2,000 tokens, but validation needs 2,880 and one more"),
    ):
        with pytest.raises(ValueError, match=said):
            BinValidation(source, count, 96, 2)


@pytest.mark.parametrize(
    "arguments, options, said",
    [
        ((100, 96), {}, "step 0: 100 tokens in rows of 96 do not divide over 1 rank"),
        ((3 * 96, 96, 0, 2), {}, "288 tokens in rows of 96 do not divide over 2 rank"),
        ((96, 96), {"micro_batch_tokens": 95}, "a row of 96 tokens does not fit into a micro-b"),
        ((96, 96), {"alignment": "random"}, "alignment='random' must be one of sequential, bos"),
        ((96, 96), {"alignment": "sequential", "max_document": 9}, "max_document has no effect"),
        ((96, 96), {"max_document": 0}, "documents of at most 0 tokens must be at least 1"),
        ((0, 96), {}, "0 tokens per step, rows of 96 tokens .* must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shards, arguments, options, said):
    with pytest.raises(ValueError, match=said):
        BinLoader(shards, *arguments, **options)


def test_a_step_that_no_shard_holds_is_refused(shards):
    for alignment in ("sequential", "bos"):
        loader = BinLoader(shards, staged(960, 20 * 960, 960), 96, alignment=alignment)
        loader.at(5)
        with pytest.raises(ValueError, match=r"step 6 needs 200 rows of 96 tokens, more than any"):
            loader.at(6)
        with pytest.raises(ValueError, match="step 6 needs"):
            loader.at(20)
    with pytest.raises(ValueError, match="step 15: 1,000 tokens in rows of 96 do not divide"):
        BinLoader(shards, staged(960, 960, 1000), 96).describe(20)


def test_wrong_ids_in_a_shard_are_refused(folder):
    small = BinShards(folder / "text_train_*.bin", 500, BOS)
    for alignment in ("sequential", "bos"):
        with pytest.raises(ValueError, match=r"000001.bin has the id \d+, but the vocabulary has"):
            BinLoader(small, 96, 96, alignment=alignment)
    without = BinShards(folder / "text_val_*.bin", VOCAB, 3)
    with pytest.raises(ValueError, match="has no document: the bos id 3 does not occur"):
        BinLoader(without, 96, 96)
    rows, doc_ids = rows_of(BinLoader(without, 96, 96, alignment="sequential").at(0))
    assert not doc_ids.any() and rows[0].tolist() == without.shards[0][:97].tolist()
