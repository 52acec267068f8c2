"""Token shards: flat files of token ids, with document starts beside them, read by memory map.

For each split ("train", "val") a folder holds:
split-00000.bin          token ids, little-endian uint16 (uint32 for vocabularies above 65,536)
split-00000.starts.npy   document starts, int64; they are never inferred from tokens
manifest.json            counts, sizes and sha256 of every file, written last
Every document begins with the bos token.
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
from data.verified import find_damaged_file

SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16, or uint32 for a vocabulary above 65,536."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardFile:
    """Writes one shard: tokens are streamed to disk, and close() publishes the files by rename."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype):
        self.folder, self.stem, self.dtype = folder, stem, dtype
        self.temporary = folder / f".{stem}.{os.getpid()}.tmp"
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed by close()
        self.sha256, self.starts, self.tokens = hashlib.sha256(), array("q"), 0

    def add(self, document: np.ndarray) -> None:
        """Append one document's tokens, bos first, in the shard's dtype."""
        data = document.tobytes()
        self.starts.append(self.tokens)
        self.sha256.update(data)
        self.file.write(data)
        self.tokens += len(document)

    def close(self) -> dict:
        """Publish the shard; return its manifest entry."""
        _sync(self.file)
        starts = self.temporary.with_suffix(".starts.tmp")
        with open(starts, "wb") as file:
            np.save(file, np.frombuffer(self.starts, dtype=np.int64))
            _sync(file)
        names = (f"{self.stem}.bin", f"{self.stem}.starts.npy")
        sums = dict(zip(names, (self.sha256.hexdigest(), manifest.file_hash(starts)), strict=True))
        starts.rename(self.folder / names[1])
        self.temporary.rename(self.folder / names[0])
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
    """Return a shard folder's manifest content.

    splits: entries of ShardFile.close, in reading order.
    """
    dtype = token_dtype(vocab_size).str
    return {
        "inputs": inputs,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "tokenizer": tokenizer_sha256,
        "splits": splits,
    }


class ShardWriter:
    """Context manager that writes a folder of shards. `folder` appears only on success."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        tokenizer_sha256: str,
        inputs: dict,
        shard_tokens: int = 100_000_000,
    ):
        self.folder, self.temporary = folder, folder.with_name(folder.name + ".tmp")
        self.content = (vocab_size, tokenizer_sha256, inputs)
        self.dtype, self.shard_tokens = token_dtype(vocab_size), shard_tokens
        self.splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
        self.open: dict[str, ShardFile] = {}

    def __enter__(self) -> "ShardWriter":
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self

    def add(self, split: str, document: list[int]) -> None:
        """Append one document's tokens to a split; its first token must be bos."""
        if split not in self.open:
            self.open[split] = ShardFile(
                self.temporary, f"{split}-{len(self.splits[split]):05d}", self.dtype
            )
        self.open[split].add(np.asarray(document, dtype=self.dtype))
        if self.open[split].tokens >= self.shard_tokens:
            self.splits[split].append(self.open.pop(split).close())

    def __exit__(self, error, *_) -> None:
        if error is None:
            for split in list(self.open):
                self.splits[split].append(self.open.pop(split).close())
            manifest.write(self.temporary, shards_manifest(*self.content, self.splits))
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


def damaged_files(folder: Path, content: dict) -> Iterator[str]:
    """Yield the files in a manifest's content that are missing or have another size."""
    size = np.dtype(content["dtype"]).itemsize
    for shard in (shard for split in content["splits"].values() for shard in split):
        path, starts = folder / f"{shard['stem']}.bin", folder / f"{shard['stem']}.starts.npy"
        if not path.is_file() or path.stat().st_size != shard["tokens"] * size:
            yield path.name
        if not starts.is_file():
            yield starts.name


def read_shards_manifest(folder: Path) -> dict:
    """Read the manifest of a shard folder; ValueError if it is missing or malformed."""
    content = manifest.read(folder)
    if content is None:
        raise ValueError(
            f"{folder} has no finished token shards; create them with python -m "
            "scripts.prepare_data"
        )
    try:
        valid = (
            type(content["vocab_size"]) is int
            and content["dtype"] in ("<u2", "<u4")
            and set(SPLITS) <= set(content["splits"])
        )
        valid = valid and isinstance(content["tokenizer"], str)
        for shard in (shard for split in content["splits"].values() for shard in split):
            names = {f"{shard['stem']}.bin", f"{shard['stem']}.starts.npy"}
            counts = shard["tokens"], shard["documents"]
            valid = (
                valid
                and Path(shard["stem"]).name == shard["stem"]
                and set(shard["sha256"]) == names
            )
            valid = valid and all(type(count) is int and count >= 0 for count in counts)
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(
            f"{folder / manifest.NAME} is damaged; run python -m scripts.prepare_data again"
        )
    return content


def _read_starts(folder: Path, shard: dict) -> np.ndarray:
    """Return a shard's document starts, memory-mapped; ValueError unless they increase from 0."""
    path = folder / f"{shard['stem']}.starts.npy"
    problem = ""
    try:
        starts = np.load(path, mmap_mode="r")
        if starts.dtype != np.int64 or starts.shape != (shard["documents"],):
            problem = f"it has {starts.shape} {starts.dtype}, not {shard['documents']} int64"
        elif len(starts) and (
            starts[0] != 0 or starts[-1] >= shard["tokens"] or not (starts[1:] > starts[:-1]).all()
        ):
            problem = f"its offsets do not increase from 0 to below {shard['tokens']}"
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
    """Raise the soft limit of open files for `count` memory maps, within the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 1024 + count if hard == resource.RLIM_INFINITY else min(1024 + count, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class TokenShards:
    """One split of a shard folder, read as one stream of tokens."""

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
                f"the shard {self.folder / name} is missing or truncated; restore it or run "
                "python -m scripts.prepare_data"
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
        """Return the number of tokens in this split."""
        return int(self.bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, stop) as int64, and doc_ids.

        doc_ids count the documents that began after start.
        """
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        tokens, begins = (
            np.empty(stop - start, dtype=np.int64),
            np.zeros(stop - start, dtype=np.int32),
        )
        position = start
        while position < stop:
            shard = int(np.searchsorted(self.bounds, position, side="right")) - 1
            base = int(self.bounds[shard])
            end = min(stop, int(self.bounds[shard + 1]))
            tokens[position - start : end - start] = self.shards[shard][
                position - base : end - base
            ]
            first, last = np.searchsorted(self.starts[shard], (position - base, end - base))
            begins[self.starts[shard][first:last] + (base - start)] = 1
            position = end
        begins[0] = 0
        return tokens, np.cumsum(begins, dtype=np.int32)

    def verify(self) -> None:
        """Verify the checksums and token ids of all splits; ValueError names the first error."""
        content = read_shards_manifest(self.folder)
        for split in content["splits"]:
            self._verify(split, content)

    def _verify(self, split: str, content: dict) -> None:
        """ValueError if a file of a split has changed or has ids beyond the vocabulary."""
        dtype, size = np.dtype(content["dtype"]), content["vocab_size"]

        def too_large(path: Path) -> str | None:
            if path.suffix != ".bin" or not path.stat().st_size:
                return None
            largest = int(np.memmap(path, dtype=dtype, mode="r").max())
            return (
                None
                if largest < size
                else f"it has the id {largest}, but the vocabulary has {size}"
            )

        sums = {
            name: checksum
            for shard in content["splits"][split]
            for name, checksum in shard["sha256"].items()
        }
        if problem := find_damaged_file(self.folder, sums, too_large):
            raise ValueError(f"{problem}; delete it and run python -m scripts.prepare_data")
