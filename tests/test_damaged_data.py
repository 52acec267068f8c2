"""Damaged token shards, prepared rows and tiktoken exports are detected before training."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.manifest import file_hash, load_or_prepare
from data.shards import ShardWriter, TokenShards
from data.tokenizers.bpe import load_tokenizer
from data.tokenizers.tiktoken_export import (
    RANKS,
    SETTINGS,
    load_tiktoken,
    ranks_of,
    read_ranks,
    write_ranks,
)


def shards(folder: Path) -> Path:
    draw = random.Random(0)
    with ShardWriter(folder, 100, "test", {}) as writer:
        for split in ("train", "train", "train", "val"):
            writer.add(split, [0, *(draw.randrange(1, 100) for _ in range(50))])
    return folder


class Touches:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.starts.npy"])
@pytest.mark.parametrize("place", [2, 60, -1])
def test_a_flipped_bit_in_a_shard_is_found_when_it_is_opened(tmp_path, name, place):
    folder = shards(tmp_path / "s")
    TokenShards(folder, "train")
    flip(folder / name, place)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        TokenShards(folder, "train")
    TokenShards(folder, "val")


def test_files_that_did_not_change_are_hashed_once(tmp_path, monkeypatch):
    import hashlib

    folder = shards(tmp_path / "s")
    read = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or file_digest(file, kind)
    )
    for _ in range(3):
        TokenShards(folder, "train")
        TokenShards(folder, "val").verify()
    assert len(read) == len(set(read)) == 4
    os.utime(folder / "train-00000.bin")
    TokenShards(folder, "train")
    assert len(read) == 5


def test_ids_beyond_the_vocabulary_and_offsets_that_fall_are_refused(tmp_path):
    def sums(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        for shard in content["splits"]["train"]:
            shard["sha256"] = {name: file_hash(folder / name) for name in shard["sha256"]}
        (folder / "manifest.json").write_text(json.dumps(content))

    folder = shards(tmp_path / "a")
    tokens = np.fromfile(folder / "train-00000.bin", dtype="<u2")
    tokens[7] = 100
    tokens.tofile(folder / "train-00000.bin")
    sums(folder)
    with pytest.raises(ValueError, match="has the id 100, but the vocabulary has 100"):
        TokenShards(folder, "train")
    for number, starts in enumerate(
        ([0, 60, 50], [1, 51, 102], [0, 51, 153], [0, 51], [0.0, 51.0, 102.0])
    ):
        folder = shards(tmp_path / f"b{number}")
        np.save(folder / "train-00000.starts.npy", np.array(starts))
        sums(folder)
        with pytest.raises(ValueError, match=r"starts.npy is damaged"):
            TokenShards(folder, "train")
    folder = shards(tmp_path / "c")
    np.save(
        folder / "train-00000.starts.npy",
        np.array([Touches(tmp_path / "ran")] * 3),
        allow_pickle=True,
    )
    sums(folder)
    with pytest.raises(ValueError, match=r"starts.npy is damaged"):
        TokenShards(folder, "train")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_manifest_of_shards_is_told_of(tmp_path):
    folder = shards(tmp_path / "s")
    content = json.loads((folder / "manifest.json").read_text())
    shard = content["splits"]["train"][0]
    for changed in (
        {**content, "dtype": "O"},
        {**content, "vocab_size": "100"},
        {**content, "splits": {"train": [shard]}},
        {
            **content,
            "splits": {**content["splits"], "train": [{**shard, "stem": "../s/train-00000"}]},
        },
        {**content, "splits": {**content["splits"], "train": [{**shard, "tokens": -1}]}},
        {**content, "splits": {**content["splits"], "train": [{**shard, "sha256": {}}]}},
        {"inputs": {}},
    ):
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"manifest.json is damaged"):
            TokenShards(folder, "train")


def test_a_damaged_cache_of_prepared_rows_is_made_again(tmp_path, capsys):
    prepared = []

    def prepare(folder: Path) -> dict:
        prepared.append(folder)
        for split in ("train", "val"):
            np.save(folder / f"{split}.ids.npy", np.arange(9))
        return {}

    for _ in range(2):
        folder, _ = load_or_prepare(tmp_path, "rows", {"a": 1}, ["ids"], prepare)
    assert len(prepared) == 1
    for harm in (lambda path: flip(path, -3), lambda path: path.unlink()):
        harm(folder / "train.ids.npy")
        load_or_prepare(tmp_path, "rows", {"a": 1}, ["ids"], prepare)
        assert "prepared again" in capsys.readouterr().out
        assert np.load(folder / "train.ids.npy").tolist() == list(range(9))
    assert len(prepared) == 3


def test_a_tiktoken_export_that_differs_from_its_tokenizer_is_refused(text_store, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(text_store / "tokenizer" / "tokenizer.json", source)
    ranks = ranks_of(load_tokenizer(source))
    write_ranks(ranks, source)
    assert read_ranks(source) == ranks

    def change(name: str, old: bytes, new: bytes):
        def harm(folder: Path) -> None:
            content = (folder / name).read_bytes()
            assert old in content
            (folder / name).write_bytes(content.replace(old, new, 1))

        return harm

    last = b" %d\n" % max(ranks.ranks.values())
    for number, harm in enumerate(
        (
            change(RANKS, last, b" 70000\n"),
            change(RANKS, last, b" x\n"),
            lambda folder: (folder / RANKS).write_bytes((folder / RANKS).read_bytes()[:-30]),
            change(SETTINGS, b"\\\\p{L}", b"\\\\p{N}"),
            change(SETTINGS, b"<|pad|>", b"<|pat|>"),
            lambda folder: (folder / SETTINGS).write_text("[]"),
            lambda folder: (folder / RANKS).write_bytes(b""),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        harm(folder)
        with pytest.raises(ValueError, match=r"damaged|differs from|does not match"):
            load_tiktoken(folder)
