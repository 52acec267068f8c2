"""Token shards in the `.bin` format of llm.c and modded-nanogpt.

A file has a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then
the tokens as uint16. It also reads llm.c's variant for Llama 3 (magic 20240801, version 7,
uint32). A split is a set of files that a pattern selects, such as fineweb_train_*.bin, ordered by
name. Document starts are not stored: a document begins with the bos token.
"""

import glob
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shards import allow_open_files
from data.tokenizers.bpe import load_tokenizer, token_bytes
from files import temporary

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
DTYPES: dict[tuple[int, int], np.dtype] = {  # by magic and version
    (MAGIC, VERSION): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
MAX_TOKENS = 2**31 - 1  # the header's count is an int32
SHARD_TOKENS = 100_000_000
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file's content, for the fingerprint
GPT2_BOS = 50256
AGAIN = "delete it, then download or write it again"


class Header(NamedTuple):
    """The content of a shard's header."""

    tokens: int
    dtype: np.dtype


def read_header(path: Path) -> Header:
    """Read and check a shard's header and the file's size; ValueError for a wrong file."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    if len(header) < HEADER_BYTES // 4:
        raise ValueError(
            f"{path} is not a token shard: it has {path.stat().st_size} bytes, less than the "
            f"header of {HEADER_BYTES}; {AGAIN}"
        )
    magic, version, tokens = header[:3].tolist()
    versions = {number for known, number in DTYPES if known == magic}
    if not versions:
        raise ValueError(
            f"{path} is not a token shard: its header begins with {magic}, not {MAGIC}; {AGAIN}"
        )
    if version not in versions:
        raise ValueError(
            f"{path} has version {version} of the shard format; version {versions.pop()} can be "
            f"read; {AGAIN}"
        )
    dtype = DTYPES[magic, version]
    size = HEADER_BYTES + dtype.itemsize * tokens
    if tokens < 1 or path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, not {size}, the size of {tokens} tokens as "
            f"its header counts; {AGAIN}"
        )
    return Header(tokens, dtype)


def read_bin(path: Path) -> np.ndarray:
    """Return a shard's tokens, memory-mapped: uint16 (uint32 in llm.c's variant) [tokens]."""
    header = read_header(path)
    # A plain array: slicing an np.memmap is slow
    return np.memmap(path, header.dtype, "r", HEADER_BYTES, (header.tokens,)).view(np.ndarray)


def write_bin(path: Path, tokens: np.ndarray) -> None:
    """Write a shard atomically. ValueError for no tokens, too many, or ids beyond uint16."""
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(
            f"{path} would have {len(tokens)} tokens; a shard has 1 to {MAX_TOKENS}; change the "
            "number of tokens per shard"
        )
    _check_storable(path, tokens)
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary(path)
    try:
        with open(scratch, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype("<u2", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def _check_storable(path: Path, tokens: np.ndarray) -> None:
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 16):
        worst = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise ValueError(
            f"{path} would have the id {worst}; the format stores ids from 0 to 65535; use a "
            "smaller vocabulary"
        )


class BinWriter:
    """Writes a token stream as shards of equal size; the last one may be shorter.

    path_of(n): path of shard n. first: number of the first shard. Documents continue in the next
    shard, as in modded-nanogpt.
    """

    def __init__(self, path_of: Callable[[int], Path], shard_tokens: int, first: int = 0):
        self.path_of, self.shard = path_of, first
        self.buffer, self.fill = np.empty(shard_tokens, dtype="<u2"), 0

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens; writes each shard as soon as it is full."""
        _check_storable(self.path_of(self.shard), tokens)
        while len(tokens):
            count = min(len(tokens), len(self.buffer) - self.fill)
            self.buffer[self.fill : self.fill + count] = tokens[:count]
            self.fill, tokens = self.fill + count, tokens[count:]
            if self.fill == len(self.buffer):
                self.close()

    def close(self) -> None:
        """Write the buffered tokens, if any, as a shard."""
        if self.fill:
            write_bin(self.path_of(self.shard), self.buffer[: self.fill])
            self.shard, self.fill = self.shard + 1, 0


class BinShards:
    """The shards of one split as one stream of tokens, with the interface of TokenShards.

    pattern: glob of the files. bos: first token of each document. ValueError if no file matches, a
    header is wrong, or a token that is read is outside the vocabulary.
    """

    def __init__(self, pattern: str | Path, vocab_size: int, bos: int = GPT2_BOS):
        self.pattern, self.vocab_size, self.bos = str(pattern), vocab_size, bos
        self.paths = sorted(map(Path, glob.glob(self.pattern)), key=lambda path: path.name)
        if not self.paths:
            raise ValueError(
                f"no token shards match {pattern}; download some with python "
                "data/cached_fineweb10B.py 9, or write some with python -m scripts.write_bin"
            )
        if not 0 <= bos < vocab_size:
            raise ValueError(
                f"the bos id {bos} is outside the vocabulary of {vocab_size}; set the bos id of "
                "the tokenizer that wrote the shards"
            )
        allow_open_files(len(self.paths))
        self.shards = [read_bin(path) for path in self.paths]
        self.bounds = np.cumsum([0, *map(len, self.shards)])
        self.fingerprint = hashlib.sha256(
            repr([(path.name, _sample_hash(path)) for path in self.paths]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        """Return the number of tokens in this split."""
        return int(self.bounds[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, stop) as int64, and doc_ids: documents begun after start."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        pieces = []
        first, last = np.searchsorted(self.bounds, (start + 1, stop)) - 1
        for shard in range(first, last + 1):
            base = int(self.bounds[shard])
            piece = self.shards[shard][max(0, start - base) : stop - base]
            self.check_ids(shard, piece)
            pieces.append(piece)
        tokens = np.concatenate(pieces, dtype=np.int64)
        begins = tokens == self.bos
        begins[0] = False
        return tokens, np.cumsum(begins, dtype=np.int32)

    def check_ids(self, shard: int, tokens: np.ndarray) -> None:
        """ValueError if tokens of a shard are outside the vocabulary."""
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.paths[shard]} has the id {largest}, but the vocabulary has "
                f"{self.vocab_size} tokens; set the vocabulary size of the tokenizer that wrote it"
            )


def bin_token_bytes(folder: Path, vocab_size: int) -> np.ndarray | None:
    """Return the text bytes of each token, int64 [vocab_size]; None without tokenizer/.

    Used for bits per byte. Ids without text, such as vocabulary padding, have 0 bytes.
    ValueError if a token with text is outside the vocabulary.
    """
    if not (folder / "tokenizer").is_dir():
        return None
    lengths = token_bytes(load_tokenizer(folder / "tokenizer"))
    if (needed := int(np.flatnonzero(lengths).max()) + 1) > vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {needed} tokens, more than the vocabulary of "
            f"{vocab_size}; raise model.vocab_size"
        )
    padded = np.zeros(max(vocab_size, len(lengths)), dtype=np.int64)
    padded[: len(lengths)] = lengths
    return padded[:vocab_size]


def _sample_hash(path: Path) -> str:
    """Hash a file's size and evenly spaced samples of it, which takes about a millisecond."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
