"""Untrusted checkpoints run no code: index, entries, manifest and position."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, complaint_of, train_here
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from scripts import verify_checkpoint
from training.checkpoint_files import find_damage, read_manifest, read_position
from training.safe_pickle import load, read_index
from training.state import State, is_position


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hashes_nested() -> bytes:
    """A pickle whose key is a tuple of 40 levels, whose hash takes 2**40 steps."""
    levels = b"K\x00\x85" + b"q\x01h\x01\x86" * 40
    return b"\x80\x02}" + levels + b"K\x01s."


def pickles(marker: Path) -> dict[str, bytes]:
    touch = f"touch {marker}"
    calls = {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, f"__import__('os').system({touch!r})"),
        "torch.load": Calls(torch.load, str(marker)),
        "a pickle in a list": [{"key": Calls(os.system, touch)}],
        "an index around it": Calls(dict, [("state_dict_metadata", Calls(os.system, touch))]),
        "subprocess": Calls(subprocess.getoutput, touch),
        "getattr": Calls(getattr, TensorProperties, "create_from_tensor"),
    }
    files = {
        name: pickle.dumps(call, protocol=protocol)
        for name, call in calls.items()
        for protocol in (2, 4)
    }
    files["an old protocol"] = pickle.dumps(calls["os.system"], protocol=0)
    files["attributes of a class"] = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}(X\x01\x00\x00\x00aK\x01ub."
    )
    files["a key that takes ages"] = hashes_nested()
    files["a persistent id"] = b"\x80\x02X\x01\x00\x00\x00aQ."
    files |= {
        "nothing": b"",
        "not a pickle": b"\x89PNG",
        "cut": pickle.dumps({"a": [1] * 99})[:40],
        "a dict": pickle.dumps({}),
    }
    return files


@pytest.fixture(scope="module")
def checkpoint(text_store, tmp_path_factory) -> Path:
    """The folder step_2 of a tiny run."""
    root = tmp_path_factory.mktemp("foreign")
    overrides = [
        f"data.store={text_store}",
        "data.mix={first: 1}",
        "model.vocab_size=384",
        "parallel.dtype=float32",
        "phase=one",
    ]
    overrides += [
        "schedule={warmup_steps: 2, total_steps: 12, decay_steps: 4}",
        "validation={every: 2, rows: 2}",
        "steps=2",
    ]
    assert train_here(
        [*overrides, f"output_dir={root / 'one'}", f"log_dir={root / 'logs'}", "checkpoint.every=2"]
    )
    return root / "one" / "step_2"


def replace(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a step folder and update its checksum in the manifest."""
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    assert manifest
    manifest["files"][name] = sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def verdict(folder: Path, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["x", str(folder)])
    with pytest.raises(SystemExit) as end:
        verify_checkpoint.main()
    assert end.value.code == 1
    return capsys.readouterr().out


def test_a_pickle_in_the_index_runs_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    marker, folder = tmp_path / "ran", tmp_path / "step_2"
    shutil.copytree(checkpoint, folder)
    assert read_index(folder / "state").state_dict_metadata
    for name, content in pickles(marker).items():
        started = time.monotonic()
        replace(folder, "state/.metadata", content)
        with pytest.raises(ValueError, match="is not a checkpoint's index"):
            read_index(folder / "state")
        assert not marker.exists() and time.monotonic() - started < 5, name
        assert find_damage(folder) is None and "DAMAGED" in verdict(folder, capsys, monkeypatch)
    assert not marker.exists()
    assert not hasattr(sys.modules["torch.distributed.checkpoint.metadata"].Metadata, "a")


def test_resuming_from_a_malicious_checkpoint_is_refused(
    checkpoint, settings, tmp_path, capsys, monkeypatch
):
    import train

    marker, folder = tmp_path / "ran", tmp_path / "step_2"
    shutil.copytree(checkpoint, folder)
    replace(folder, "state/.metadata", pickle.dumps(Calls(os.system, f"touch {marker}")))
    overrides = settings("data.mix={first: 1}", f"resume_from={folder}", phase="two", steps=4)
    arguments = ["--config", ROOT / "configs" / "test_mode.yaml", *overrides]
    message = complaint_of(train.main, arguments, capsys, monkeypatch)
    assert ".system, which is not part of a checkpoint's index" in message and not marker.exists()


def test_entries_that_are_no_tensors_run_nothing(tmp_path):
    marker = tmp_path / "ran"
    dcp.save(
        {"a": torch.ones(3), "lr": Calls(os.system, f"touch {marker}")},
        checkpoint_id=tmp_path / "state",
        no_dist=True,
    )
    assert not marker.exists()
    with pytest.raises(ValueError, match="lr in the checkpoint's state/ is not plain data"):
        load({"a": torch.zeros(3), "lr": 0}, tmp_path / "state", no_dist=True)
    assert not marker.exists()
    dcp.save(
        {"a": torch.ones(3), "lr": {"b": (1, 2.5)}}, checkpoint_id=tmp_path / "good", no_dist=True
    )
    content = {"a": torch.zeros(3), "lr": {"b": None}}
    load(content, tmp_path / "good", no_dist=True)
    assert content["a"].tolist() == [1, 1, 1] and content["lr"] == {"b": (1, 2.5)}


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    dcp.save({"a": torch.ones(3, 4), "n": 1}, checkpoint_id=tmp_path / "state", no_dist=True)
    path = tmp_path / "state" / ".metadata"
    content = path.read_bytes()

    def outside(index):
        index.storage_data[MetadataIndex("a", [0, 0])].relative_path = "../other"

    def long(index):
        index.storage_data[MetadataIndex("n")].length = 1 << 40

    def wide(index):
        index.state_dict_metadata["a"].size = torch.Size([3, 1 << 40])

    def negative(index):
        index.state_dict_metadata["a"].chunks[0].offsets = torch.Size([-1, 0])

    def packed(index):
        index.storage_data[MetadataIndex("n")].transform_descriptors = ["stream.zstd"]

    def typed(index):
        index.state_dict_metadata["a"].properties = None

    def lost(index):
        index.storage_data.pop(MetadataIndex("n"))

    changes = {
        outside: "not a plain file",
        long: "shorter",
        wide: "elements",
        negative: "outside",
        packed: "not a plain file",
    }
    for change, words in {**changes, typed: "no shape, dtype", lost: "no bytes"}.items():
        index = read_index(tmp_path / "state")
        index.storage_meta = None
        change(index)
        path.write_bytes(pickle.dumps(index))
        with pytest.raises(ValueError, match=words):
            read_index(tmp_path / "state")
        path.write_bytes(content)


def test_flipped_bytes_in_an_index_are_refused_or_harmless(checkpoint, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(checkpoint / "state", state)
    original, draw = (state / ".metadata").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (state / ".metadata").write_bytes(content)
        try:
            read_index(state)
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_damaged_manifest_or_position_is_told_of(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "step_2"
    shutil.copytree(checkpoint, folder)
    position = read_position(folder)
    assert is_position(position) and is_position(State(None, None, "x").position())
    for changed in (
        {**position, "step": "2"},
        {**position, "faults": [1]},
        {**position, "tokens": -1},
        {"step": 2},
        [],
    ):
        replace(folder, "state/trainer.json", json.dumps(changed).encode())
        assert "trainer.json is damaged" in verdict(folder, capsys, monkeypatch)
    manifest = read_manifest(folder)
    for changed in (
        {**manifest, "metric": "low"},
        {**manifest, "files": {"../../x": "0"}},
        {**manifest, "files": [1]},
        [],
    ):
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert read_manifest(folder) is None and "no readable manifest.json" in verdict(
            folder, capsys, monkeypatch
        )
