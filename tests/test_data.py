"""Text to tokens to batches: no loss, no repeats, the same on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import VOCAB, library
from pyarrow import parquet
from transformers import AutoTokenizer

from data import manifest
from data.corpus import quickstart_corpus, wheels
from data.dataloader import PackedDataLoader, Prefetcher, validation_batches
from data.pipeline.recipe import Split
from data.shards import ShardWriter, TokenShards
from data.store import open_shards, open_tokenizer
from data.tokenizers.bpe import (
    BOS,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    token_bytes,
    train_tokenizer,
)
from models.hf import save_hf
from models.nanollama import ModelConfig, NanoLlama

HARD = [
    "",
    " ",
    "\n\n  \t x",
    "naïve café — 日本語 🤖👩‍👩‍👧 ﷽",
    "a" * 50,
    "0123456789 3.14e-10",
    "\x00\x7f\r\n",
    f"typed {BOS} text",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three sources in several shards; numbered tokens identify their source and position."""
    folder = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    for source, tokens in (("a", 30_000), ("b", 9_000), ("c", 5_000)):
        with ShardWriter(folder / source, 1 << 20, "test", {}, shard_tokens=4_000) as writer:
            position = 0
            while position < tokens:
                length = int(rng.integers(1, 300))
                writer.add("train", list(range(position, position + length)))
                position += length
    return {name: TokenShards(folder / name, "train") for name in "abc"}


def loader(shards, mix=None, rows=8, micro=2, **more):
    return PackedDataLoader(
        shards, mix or {"a": 0.7, "b": 0.2, "c": 0.1}, 64, rows, micro, seed=5, **more
    )


def test_tokenizer_is_lossless_and_special_text_is_text(text_store):
    tokenizer = load_tokenizer(text_store / "tokenizer")
    tokenizer.encode_special_tokens = True
    lengths = token_bytes(tokenizer)
    for text in [*HARD, "\n".join(text for _, text in library(20))[:50_000]]:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert lengths[ids].sum() == len(text.encode())
        assert special_ids(tokenizer).bos not in ids
    assert (
        tokenizer.get_vocab_size() == VOCAB
        and (lengths > 16).sum() == 0
        and (lengths == 0).sum() == 2
    )
    # Digits are single tokens.
    assert all(len(tokenizer.encode(digits).ids) == len(digits) for digits in ("7", "12", "2026"))


def test_transformers_reads_the_tokenizer_beside_a_model(text_store, tmp_path):
    tokenizer = load_tokenizer(text_store / "tokenizer")
    ids = special_ids(tokenizer)
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    save_hf(
        tmp_path, config, NanoLlama(config, seed=0).state_dict(), torch.float32, **ids._asdict()
    )
    save_tokenizer(tokenizer, tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == ids
    for text in HARD[:-1]:
        assert reference.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
        assert reference.decode(tokenizer.encode(text).ids) == text


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["text"], 100)
    with pytest.raises(ValueError, match="add text or lower vocab_size"):
        train_tokenizer(["text"], 400)


def test_shards_hold_every_token_once(text_store):
    tokenizer = load_tokenizer(text_store / "tokenizer")
    tokenizer.encode_special_tokens = True
    bos, split = special_ids(tokenizer).bos, Split(0.1)
    for name in ("first", "second"):
        expected: dict[str, list[int]] = {"train": [], "val": []}
        starts: dict[str, list[int]] = {"train": [], "val": []}
        for row in parquet.read_table(
            text_store / "documents" / name / "00000.parquet"
        ).to_pylist():
            which = split.of(row["id"])
            starts[which].append(len(expected[which]))
            expected[which] += [bos, *tokenizer.encode(row["text"]).ids]
        for which in ("train", "val"):
            shards = TokenShards(text_store / "tokens" / name, which)
            tokens, doc_ids = shards.read(0, len(shards))
            assert tokens.tolist() == expected[which] and shards.documents == len(starts[which]) > 0
            assert np.flatnonzero(np.diff(doc_ids, prepend=-1)).tolist() == starts[which]
            shards.verify()


def test_reading_across_shards_and_documents(shards):
    assert len(shards["a"].shards) > 3
    for start, stop in ((0, 30_000), (3_990, 4_300), (11_111, 11_112), (25_000, 29_999)):
        tokens, doc_ids = shards["a"].read(start, stop)
        assert len(tokens) == stop - start and doc_ids[0] == 0 and (np.diff(doc_ids) >= 0).all()
        all_tokens, all_docs = shards["a"].read(0, len(shards["a"]))
        assert (tokens == all_tokens[start:stop]).all() and (
            doc_ids == all_docs[start:stop] - all_docs[start]
        ).all()


def test_an_epoch_reads_every_row_once_then_reshuffles(shards):
    source_loader = loader({"c": shards["c"]}, {"c": 1.0}, rows=4, micro=4)
    rows = (len(shards["c"]) - 1) // 64
    firsts = [
        int(row[0])
        for place in range(2 * rows // 4 + 1)
        for row in source_loader.at(place).batches[0].tokens
    ]
    first, second = firsts[:rows], firsts[rows : 2 * rows]
    starts = sorted(int(shards["c"].read(i * 64, i * 64 + 1)[0][0]) for i in range(rows))
    assert sorted(first) == sorted(second) == starts and first != second
    assert source_loader.epochs(rows)["c"] == pytest.approx(4.0)


def test_targets_are_the_next_tokens_and_docs_mark_each_documents_first_token(shards):
    for batch in loader(shards).at(3).batches:
        assert (batch.targets[:, :-1] == batch.tokens[:, 1:]).all()
        for tokens, doc_ids in zip(batch.tokens, batch.doc_ids, strict=True):
            begins = torch.diff(doc_ids) == 1
            # Numbers are consecutive except at document starts.
            assert ((torch.diff(tokens) == 1) | begins).all()
            assert doc_ids[0] == 0 and batch.doc_ids.dtype == torch.int32


def test_batches_do_not_depend_on_ranks_micro_batches_or_history(shards):
    expected = torch.cat([batch.tokens for batch in loader(shards).at(17).batches])
    for world, micro in ((1, 1), (1, 8), (2, 2), (4, 1), (4, 2)):
        parts = [
            loader(shards, micro=micro, rank=rank, world=world).at(17) for rank in range(world)
        ]
        assert torch.equal(
            torch.cat([batch.tokens for part in parts for batch in part.batches]), expected
        )
        assert {part.loss_denominator for part in parts} == {8 * 64}
    ahead = Prefetcher(loader(shards, micro=8), torch.device("cpu"))
    for place in (5, 6, 17, 18, 17):  # in order, with jumps, backwards
        assert torch.equal(
            ahead.at(place).batches[0].tokens, loader(shards, micro=8).at(place).batches[0].tokens
        )
    assert loader(shards).fingerprint != loader(shards, mix={"a": 0.5, "b": 0.5}).fingerprint


def test_the_mixture_holds_by_tokens(shards):
    mixed = loader(shards)
    counts = Counter(int(source) for block in range(3) for source in mixed._block(block)[0])
    assert [counts[i] / 3000 for i in range(3)] == [0.7, 0.2, 0.1]
    early = Counter(int(source) for source in mixed._block(0)[0][:200])
    assert 0.55 < early[0] / 200 < 0.85  # sources are mixed, not consecutive


def test_loader_refuses_what_cannot_be(shards):
    with pytest.raises(ValueError, match=r"8 rows per step do not divide over 3 rank"):
        loader(shards, world=3)
    with pytest.raises(ValueError, match=r"data.mix.b=0"):
        loader(shards, mix={"a": 1.0, "b": 0.0})
    with pytest.raises(ValueError, match="below 1/1000"):
        loader(shards, mix={"a": 1.0, "b": 1e-6})
    with pytest.raises(ValueError, match="too few for one row"):
        PackedDataLoader(shards, {"c": 1.0}, 6000, 1, 1, seed=0)


def test_validation_judges_every_target_once_on_any_number_of_ranks(text_store):
    shards = TokenShards(text_store / "tokens" / "first", "val")
    rows = (len(shards) - 1) // 32
    for world in (1, 2, 3):
        per_rank = [validation_batches(shards, 32, 4, None, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in per_rank}) == 1
        targets = torch.cat([batch.targets.flatten() for batches in per_rank for batch in batches])
        judged = torch.sort(targets[targets != -100]).values
        assert torch.equal(
            judged, torch.sort(torch.from_numpy(shards.read(1, rows * 32 + 1)[0])).values
        )


def test_damaged_and_missing_shards_are_named(tmp_path):
    def write():
        with ShardWriter(tmp_path / "s", 100, "test", {}) as writer:
            writer.add("train", list(range(50)))

    write()
    path = tmp_path / "s" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000.bin is missing or truncated"):
        TokenShards(tmp_path / "s", "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000.bin is missing"):
        TokenShards(tmp_path / "s", "train")
    write()
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"train-00000.bin is damaged"):
        TokenShards(tmp_path / "s", "train").verify()


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        ShardWriter(tmp_path / "s", 100, "test", {}, shard_tokens=10) as writer,
    ):
        writer.add("train", list(range(50)))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no finished token shards"):
        TokenShards(tmp_path / "s", "train")


def test_store_checks_tokenizer_against_model_and_shards(text_store, tmp_path):
    with pytest.raises(ValueError, match=r"has 384 tokens but model.vocab_size=4096"):
        open_tokenizer(text_store, 4096)
    with pytest.raises(ValueError, match="no data store found"):
        open_tokenizer(tmp_path, 384)
    with pytest.raises(ValueError, match=r"has no such source; available: first, second"):
        open_shards(text_store, {"third": 1.0}, "train", VOCAB)
    with pytest.raises(ValueError, match=r"data.mix is empty"):
        open_shards(text_store, {}, "train", VOCAB)


def test_a_wheel_is_pinned_by_its_hash(tmp_path, monkeypatch):
    wheel = wheels.Wheel("some-package", "1.0", "0" * 64)
    (tmp_path / "some_package-1.0-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"pip could not download some-package==1.0"):
        wheels.fetch_wheel(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []
    good = tmp_path / "some_package-1.0-py3-none-any.whl"
    good.write_bytes(b"it")
    assert wheels.fetch_wheel(wheel._replace(sha256=manifest.file_hash(good)), tmp_path) == good


def test_factbook_fields_are_clean_text():
    node = {
        "Geography": {
            "Area": {"text": "<strong>total:</strong> 643,801 sq km &amp; more<br><br>" + "x" * 60},
            "short": {"text": "no"},
        }
    }
    assert list(quickstart_corpus._fields(node, ())) == [
        "Geography - Area: total: 643,801 sq km & more\n" + "x" * 60
    ]
