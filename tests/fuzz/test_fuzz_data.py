"""Token shards and the parts of a document store: flipped bits, cut and swapped files, edited
manifests.
"""

import json
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from data.manifest import load_or_prepare
from data.packing import load_or_make_plan
from data.pipeline.prepare import document_parts, shards_are_current
from data.pipeline.recipe import CleanConfig, Recipe
from data.pipeline.steps import ReadParts
from data.shards import ShardWriter, TokenShards
from fuzz.bases import Files, document_files, files_of, write_files
from fuzz.mutate import Change, change_folder, folder_changes
from fuzz.sandbox import fuzz

VOCABULARY = 100
FOUND_IN_SHARDS = [
    ([("json", "manifest.json", [("drop", ("splits", "train", 0, "tokens"))])], False),
    ([("json", "manifest.json", [("put", ("splits",), "a")])], False),
    ([("bytes", "manifest.json", [("set", 244, b"[" * 3000)])], False),
    (
        [("bytes", "val-00000.starts.npy", [("repeat", 0, 46), ("set", 31, b"\x00\x00\x01\x00")])],
        True,
    ),
]
FOUND_IN_DOCUMENTS = [
    ([("empty", "00000.parquet")], True),
    ([("bytes", "00001.parquet", [("set", 287, b"\x00\x00\x01\x00"), ("insert", 39, b" ")])], True),
    ([("json", "manifest.json", [("put", ("parts",), -4)])], False),
    ([("json", "manifest.json", [("put", ("parts", 0, "name"), "../books/00000.parquet")])], False),
    ([("json", "manifest.json", [("twice", ("parts", 0))])], False),
    ([("json", "manifest.json", [("put", ("parts", 0, "name"), "a\nb")])], True),
]


@cache
def shard_files() -> Files:
    """Files of a shard folder: three for training, one for validation."""
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        with ShardWriter(
            Path(folder) / "s", VOCABULARY, "test", {"made": [1]}, shard_tokens=120
        ) as writer:
            for number in range(12):
                split = "val" if number == 5 else "train"
                writer.add(split, [0, *draw.integers(1, VOCABULARY, 30).tolist()])
        return files_of(Path(folder) / "s")


@cache
def tokens_of(name: str) -> list[int]:
    return np.frombuffer(shard_files()[name], dtype="<u2").tolist()


def seal(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with a manifest whose checksums are right, as a writer with a fault would leave
    them.
    """
    try:
        content = json.loads(files["manifest.json"])
        entries = (
            [entry for split in content["splits"].values() for entry in split]
            if "splits" in content
            else content["parts"]
        )
        for entry in entries:
            if isinstance(entry["sha256"], dict):
                entry["sha256"] = {
                    name: sha256(files[name]).hexdigest() for name in entry["sha256"]
                }
            else:
                entry["sha256"] = sha256(files[entry["name"]]).hexdigest()
        return {**files, "manifest.json": json.dumps(content).encode()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return files


def changed(files: Files) -> st.SearchStrategy[tuple[list[Change], bool]]:
    return st.tuples(folder_changes(files), st.booleans())


@fuzz(
    st.deferred(lambda: changed(shard_files())),
    share=0.14,
    accepted=(0.08, 0.7),
    examples=FOUND_IN_SHARDS,
)
def test_token_shards(case: tuple[list[Change], bool], folder: Path) -> None:
    """Accepted shards hold the tokens that were written; with matching checksums, at least ids
    and offsets in range.
    """
    changes, sealed = case
    files = change_folder(shard_files(), changes)
    write_files(seal(files) if sealed else files, folder / "s")
    assert shards_are_current(folder / "s", {"made": [1]}) in (True, False)
    for split in ("train", "val"):
        shards = TokenShards(folder / "s", split)
        stems = [
            shard["stem"]
            for shard in json.loads((folder / "s" / "manifest.json").read_bytes())["splits"][split]
        ]
        if not len(shards):
            continue
        tokens, documents = shards.read(0, len(shards))
        assert tokens.min() >= 0 and tokens.max() < shards.vocab_size
        assert documents[0] == 0 and documents[-1] < max(shards.documents, 1)
        if not sealed:
            assert tokens.tolist() == [
                token for stem in stems for token in tokens_of(f"{stem}.bin")
            ]
    TokenShards(folder / "s", "train").verify()


@cache
def documents() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return read_store(Path(folder), document_files())


def read_store(folder: Path, files: Files) -> list[Any]:
    """Return id and text of each document, as the cleaning tasks read them."""
    write_files(files, folder / "documents" / "books")
    parts = document_parts(Recipe(str(folder), {"books": CleanConfig()}))
    read = ReadParts(parts)
    return [
        (document.id, document.text)
        for rank in range(len(parts))
        for document in read.run(rank=rank)
    ]


@fuzz(
    st.deferred(lambda: changed(document_files())),
    share=0.05,
    accepted=(0.1, 0.7),
    examples=FOUND_IN_DOCUMENTS,
)
def test_document_store(case: tuple[list[Change], bool], folder: Path) -> None:
    """Accepted parts hold documents that were written; with matching checksums, at least ids and
    texts.
    """
    changes, sealed = case
    files = change_folder(document_files(), changes)
    stored = read_store(folder, seal(files) if sealed else files)
    assert all(isinstance(id, str) and isinstance(text, str) for id, text in stored)
    if not sealed:
        assert set(stored) <= set(documents()) and len(set(stored)) == len(stored)


ARRAYS = ("ids", "starts")


def prepare_rows(folder: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        for array in ARRAYS:
            np.save(folder / f"{split}.{array}.npy", np.arange(20))
    return {"rows": 20}


@cache
def kept_files() -> Files:
    """Files of a cache with prepared rows and a packing plan."""
    with tempfile.TemporaryDirectory() as folder:
        load_or_prepare(Path(folder), "rows", {"a": 1}, ARRAYS, prepare_rows)
        shards = TokenShards(write_files(shard_files(), Path(folder) / "s"), "train")
        load_or_make_plan(shards, 16, 1)
        return files_of(Path(folder))


@cache
def plan_of_shards() -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        return plan_in(write_files(kept_files(), Path(folder)))


def plan_in(cache: Path) -> list[list[int]]:
    return [
        np.asarray(part).tolist()
        for part in load_or_make_plan(TokenShards(cache / "s", "train"), 16, 1)[0]
    ]


@fuzz(st.deferred(lambda: folder_changes(own_files(), most=3)), share=0.04, accepted=(0.9, 1.0))
def test_caches(changes: list[Change], folder: Path) -> None:
    """Damaged caches of prepared rows and packing plans are rebuilt."""
    write_files({**kept_files(), **change_folder(own_files(), changes)}, folder)
    for name in own_files().keys() - change_folder(own_files(), changes).keys():
        (folder / name).unlink()
    rows, report = load_or_prepare(folder, "rows", {"a": 1}, ARRAYS, prepare_rows)
    assert isinstance(report, dict)
    assert all(np.load(rows / f"train.{array}.npy").tolist() == list(range(20)) for array in ARRAYS)
    assert plan_in(folder) == plan_of_shards()


@cache
def own_files() -> Files:
    return {
        name: content
        for name, content in kept_files().items()
        if name.split("/")[0] != "s" or "/plans/" in name
    }


def test_caches_with_changed_manifests() -> None:
    """Manifests of a cache that lack checksums or the report, or that list other files, are not
    trusted.
    """
    for name in sorted(name for name in own_files() if name.endswith("manifest.json")):
        for change in (
            ("drop", ("sha256",)),
            ("put", ("sha256",), {}),
            ("put", ("sha256",), "a"),
            ("drop", ("report",)),
        ):
            with tempfile.TemporaryDirectory() as folder:
                test_caches.check([("json", name, [change])], Path(folder))
