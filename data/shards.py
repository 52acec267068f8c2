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
from tokenize import TokenError
from typing import IO

import numpy as np

from data import manifest
from data.verified import damaged

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
        return {
            "stem": self.stem,
            "tokens": self.tokens,
            "documents": len(self.starts),
            "sha256": sums,
        }


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def shards_manifest(
    vocab_size: int, tokenizer_sha256: str, inputs: dict, splits: dict[str, list[dict]]
) -> dict:
    """What manifest.json of a folder of shards holds; splits: the entries of its ShardFiles, in the order of reading."""
    dtype = token_dtype(vocab_size).str
    return {
        "inputs": inputs,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "tokenizer": tokenizer_sha256,
        "splits": splits,
    }


class ShardWriter:
    """Writes one folder of shards; use as a context manager. Leaves nothing at `folder` unless it ends without an error."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        tokenizer_sha256: str,
        inputs: dict,
        shard_tokens: int = 100_000_000,
    ):
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
            self.open[split] = ShardFile(
                self.part, f"{split}-{len(self.splits[split]):05d}", self.dtype
            )
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


def read_shards_manifest(folder: Path) -> dict:
    """manifest.json of a folder of shards; ValueError where it has none, or one whose keys have other types."""
    content = manifest.read(folder)
    if content is None:
        raise ValueError(
            f"{folder} holds no finished token shards; make them with python -m scripts.prepare_data"
        )
    try:
        whole = (
            type(content["vocab_size"]) is int
            and content["dtype"] in ("<u2", "<u4")
            and set(SPLITS) <= set(content["splits"])
        )
        whole = whole and isinstance(content["tokenizer"], str)
        for shard in (shard for split in content["splits"].values() for shard in split):
            names = {f"{shard['stem']}.bin", f"{shard['stem']}.starts.npy"}
            counts = shard["tokens"], shard["documents"]
            whole = (
                whole
                and Path(shard["stem"]).name == shard["stem"]
                and set(shard["sha256"]) == names
            )
            whole = whole and all(type(count) is int and count >= 0 for count in counts)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{folder / manifest.NAME} is damaged; run python -m scripts.prepare_data again"
        )
    return content


def _read_starts(folder: Path, shard: dict) -> np.ndarray:
    """Where the documents of a shard begin, memory-mapped; ValueError unless they rise from 0 and lie in it."""
    path = folder / f"{shard['stem']}.starts.npy"
    problem = ""
    try:
        starts = np.load(path, mmap_mode="r")
        if starts.dtype != np.int64 or starts.shape != (shard["documents"],):
            problem = f"it has {starts.shape} {starts.dtype}, not {shard['documents']} int64"
        elif len(starts) and (
            starts[0] != 0 or starts[-1] >= shard["tokens"] or not (starts[1:] > starts[:-1]).all()
        ):
            problem = f"its offsets do not rise from 0 to below {shard['tokens']}"
    except (
        ValueError,
        EOFError,
        SyntaxError,
        TokenError,
    ) as error:  # numpy parses a header as Python
        problem = str(error).split("\n")[0]
    if problem:
        raise ValueError(
            f"{path} is damaged: {problem}; delete it and run python -m scripts.prepare_data"
        )
    return starts


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
        content = read_shards_manifest(self.folder)
        self.vocab_size: int = content["vocab_size"]
        self.tokenizer: str = content["tokenizer"]
        shards = content["splits"][split]
        dtype = np.dtype(content["dtype"])
        self.shards, self.starts, bounds = [], [], [0]
        for name in damaged_files(self.folder, content):
            raise ValueError(
                f"the shard {self.folder / name} is missing or cut short; put it back or run python -m scripts.prepare_data"
            )
        self._verify(split, content)
        allow_open_files(4 * len(shards))
        for shard in shards:
            self.shards.append(
                np.memmap(self.folder / f"{shard['stem']}.bin", dtype=dtype, mode="r")
            )
            self.starts.append(_read_starts(self.folder, shard))
            bounds.append(bounds[-1] + shard["tokens"])
        self.bounds = np.asarray(bounds, dtype=np.int64)
        self.documents: int = sum(shard["documents"] for shard in shards)
        self.fingerprint: str = hashlib.sha256(
            repr([shard["sha256"] for shard in shards]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Tokens in this split."""
        return int(self.bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) as int64, and for each the count of documents begun in (start, token]."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        tokens, begins = (
            np.empty(stop - start, dtype=np.int64),
            np.zeros(stop - start, dtype=np.int32),
        )
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
        """Compare every file of all splits with its checksum and ids with the vocabulary; ValueError names the first fault."""
        content = read_shards_manifest(self.folder)
        for split in content["splits"]:
            self._verify(split, content)

    def _verify(self, split: str, content: dict) -> None:
        """ValueError where a file of a split has changed or holds ids beyond the vocabulary; files are read once."""
        dtype, size = np.dtype(content["dtype"]), content["vocab_size"]

        def too_large(path: Path) -> str | None:
            if path.suffix != ".bin" or not path.stat().st_size:
                return None
            largest = int(np.memmap(path, dtype=dtype, mode="r").max())
            return (
                None
                if largest < size
                else f"it holds the id {largest}, but the vocabulary has {size}"
            )

        sums = {
            name: total
            for shard in content["splits"][split]
            for name, total in shard["sha256"].items()
        }
        if problem := damaged(self.folder, sums, too_large):
            raise ValueError(f"{problem}; delete it and run python -m scripts.prepare_data")
