"""Token shards: flat files of token ids with document starts beside them, written once and read through a memory map.

A folder holds, for each split ("train", "val"), `split-00000.bin` (little-endian uint16, or uint32 above 65,536 tokens) and
`split-00000.starts.npy` (where documents begin, never inferred from a token), and manifest.json with counts, sizes and
sha256 of every file, written last. Every document begins with the bos token.
"""

import hashlib
import os
import resource
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from data import manifest

SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardFile:
    """One shard being written. Tokens go straight to the disk; what is under its name is whole (written by rename)."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype):
        self.folder, self.stem, self.dtype = folder, stem, dtype
        self.part = folder / f".{stem}.{os.getpid()}.tmp"
        self.file = open(self.part, "wb")  # noqa: SIM115 - closed by close()
        self.sha256, self.starts, self.tokens = hashlib.sha256(), array("q"), 0

    def add(self, document: np.ndarray) -> None:
        """Append one document's tokens, bos first, of the shard's dtype."""
        data = document.tobytes()
        self.starts.append(self.tokens)
        self.sha256.update(data)
        self.file.write(data)
        self.tokens += len(document)

    def close(self) -> dict:
        """Put the shard in its place; returns its entry for the manifest."""
        _sync(self.file)
        starts = self.part.with_suffix(".starts.tmp")
        with open(starts, "wb") as file:
            np.save(file, np.frombuffer(self.starts, dtype=np.int64))
            _sync(file)
        names = (f"{self.stem}.bin", f"{self.stem}.starts.npy")
        sums = dict(zip(names, (self.sha256.hexdigest(), manifest.file_hash(starts)), strict=True))
        starts.rename(self.folder / names[1])
        self.part.rename(self.folder / names[0])
        return {"stem": self.stem, "tokens": self.tokens, "documents": len(self.starts), "sha256": sums}


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def shards_manifest(vocab_size: int, tokenizer_sha256: str, inputs: dict, splits: dict[str, list[dict]]) -> dict:
    """What manifest.json of a folder of shards holds; splits: the entries of its ShardFiles, in the order of reading."""
    dtype = token_dtype(vocab_size).str
    return {"inputs": inputs, "vocab_size": vocab_size, "dtype": dtype, "tokenizer": tokenizer_sha256, "splits": splits}


class ShardWriter:
    """Writes one folder of shards; use as a context manager. Leaves nothing at `folder` unless it ends without an error."""

    def __init__(self, folder: Path, vocab_size: int, tokenizer_sha256: str, inputs: dict, shard_tokens: int = 100_000_000):
        self.folder, self.part = folder, folder.with_name(folder.name + ".tmp")
        self.content = (vocab_size, tokenizer_sha256, inputs)
        self.dtype, self.shard_tokens = token_dtype(vocab_size), shard_tokens
        self.splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
        self.open: dict[str, ShardFile] = {}

    def __enter__(self) -> "ShardWriter":
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self

    def add(self, split: str, document: list[int]) -> None:
        """Append one document's tokens to a split; its first token must be bos."""
        if split not in self.open:
            self.open[split] = ShardFile(self.part, f"{split}-{len(self.splits[split]):05d}", self.dtype)
        self.open[split].add(np.asarray(document, dtype=self.dtype))
        if self.open[split].tokens >= self.shard_tokens:
            self.splits[split].append(self.open.pop(split).close())

    def __exit__(self, error, *_) -> None:
        if error is None:
            for split in list(self.open):
                self.splits[split].append(self.open.pop(split).close())
            manifest.write(self.part, shards_manifest(*self.content, self.splits))
            shutil.rmtree(self.folder, ignore_errors=True)
            self.part.rename(self.folder)
        else:
            shutil.rmtree(self.part, ignore_errors=True)


def damaged_files(folder: Path, content: dict) -> Iterator[str]:
    """Files that a folder's manifest (its content) tells of and that are absent or have another size."""
    size = np.dtype(content["dtype"]).itemsize
    for shard in (shard for split in content["splits"].values() for shard in split):
        path, starts = folder / f"{shard['stem']}.bin", folder / f"{shard['stem']}.starts.npy"
        if not path.is_file() or path.stat().st_size != shard["tokens"] * size:
            yield path.name
        if not starts.is_file():
            yield starts.name


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, as far as it may: a mapped file keeps one open, and a store has hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + count if hard == resource.RLIM_INFINITY else min(1024 + count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class TokenShards:
    """One split of a folder of shards, as one long stream of tokens."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        content = manifest.read(self.folder)
        if content is None:
            raise ValueError(f"{folder} holds no finished token shards; make them with python -m scripts.prepare_data")
        self.vocab_size: int = content["vocab_size"]
        self.tokenizer: str = content["tokenizer"]
        shards = content["splits"][split]
        dtype = np.dtype(content["dtype"])
        self.shards, self.starts, bounds = [], [], [0]
        for name in damaged_files(self.folder, content):
            raise ValueError(
                f"the shard {self.folder / name} is missing or cut short; put it back or run python -m scripts.prepare_data"
            )
        allow_open_files(4 * len(shards))
        for shard in shards:
            self.shards.append(np.memmap(self.folder / f"{shard['stem']}.bin", dtype=dtype, mode="r"))
            self.starts.append(np.load(self.folder / f"{shard['stem']}.starts.npy", mmap_mode="r"))
            bounds.append(bounds[-1] + shard["tokens"])
        self.bounds = np.asarray(bounds, dtype=np.int64)
        self.documents: int = sum(shard["documents"] for shard in shards)
        self.fingerprint: str = hashlib.sha256(repr([shard["sha256"] for shard in shards]).encode()).hexdigest()

    def __len__(self) -> int:
        """Tokens in this split."""
        return int(self.bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) as int64, and for each the count of documents begun in (start, token]."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        tokens, begins = np.empty(stop - start, dtype=np.int64), np.zeros(stop - start, dtype=np.int32)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self.bounds, at, side="right")) - 1
            base = int(self.bounds[shard])
            end = min(stop, int(self.bounds[shard + 1]))
            tokens[at - start : end - start] = self.shards[shard][at - base : end - base]
            first, last = np.searchsorted(self.starts[shard], (at - base, end - base))
            begins[self.starts[shard][first:last] + (base - start)] = 1
            at = end
        begins[0] = 0
        return tokens, np.cumsum(begins, dtype=np.int32)

    def verify(self) -> None:
        """Compare every file with its checksum; ValueError names the first that differs."""
        content = manifest.read(self.folder)
        assert content is not None
        for split in content["splits"].values():
            for shard in split:
                for name, expected in shard["sha256"].items():
                    if not (self.folder / name).is_file() or manifest.file_hash(self.folder / name) != expected:
                        raise ValueError(f"{self.folder / name} is damaged; delete it and run python -m scripts.prepare_data")
