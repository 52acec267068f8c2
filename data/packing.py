"""How a source becomes rows: cut from one stream end to end, or packed best-fit so that only documents longer than a row are cut.

Whatever the packing, the target of a token is the token after it in its document, and bos after the document's last token.
A best-fit plan is a pure function of (shards, row length, seed). It is made once, kept beside the shards and memory-mapped.
"""

import errno
import hashlib
import shutil
import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data import manifest
from data.shards import TokenShards
from files import sweep, temporary

IGNORE = -100  # target without a loss; models.losses.IGNORE
PACKINGS = ("stream", "best_fit")
ALGORITHM = 1  # goes up when the same inputs give another plan
Pattern = tuple[
    tuple[int, int], ...
]  # what lies in a row: (piece length, number of such pieces), longest first


def document_table(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """Where each document of a split begins in its stream, and how many tokens it has: two int64 [documents]."""
    bases = shards.bounds[:-1].tolist()
    begins = [np.asarray(starts) + base for starts, base in zip(shards.starts, bases, strict=True)]
    starts = np.concatenate([np.empty(0, dtype=np.int64), *begins])
    return starts, np.diff(starts, append=len(shards))


class LongDocuments:
    """The documents of a split with at least `minimum` tokens, read as TokenShards are; no token is copied."""

    def __init__(self, shards: TokenShards, minimum: int):
        self.shards, self.minimum = shards, minimum
        self.folder, self.vocab_size, self.tokenizer = (
            shards.folder,
            shards.vocab_size,
            shards.tokenizer,
        )
        starts, lengths = document_table(shards)
        kept = lengths >= minimum
        self.starts, self.lengths = starts[kept], lengths[kept]
        self.ends = np.cumsum(self.lengths)  # in this view's own stream
        self.documents, self.tokens = len(self.starts), int(self.lengths.sum())
        self.fingerprint = f"{shards.fingerprint} of {minimum} tokens or more"

    def __len__(self) -> int:
        """Tokens in these documents."""
        return self.tokens

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of these documents end to end, as int64, and for each the count of documents begun after start."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        tokens, doc_ids = (
            np.empty(stop - start, dtype=np.int64),
            np.empty(stop - start, dtype=np.int32),
        )
        first = document = int(np.searchsorted(self.ends, start, side="right"))
        at = start
        while at < stop:
            end = int(self.ends[document])
            source = int(self.starts[document]) + int(self.lengths[document]) - (end - at)
            part = slice(at - start, min(end, stop) - start)
            tokens[part] = self.shards.read(source, source + part.stop - part.start)[0]
            doc_ids[part] = document - first
            at, document = end, document + 1
        return tokens, doc_ids


Source = TokenShards | LongDocuments


class Rows(Protocol):
    """The rows of `length` tokens of one source, numbered from 0."""

    share: float  # of a row that has a loss, on average; in pretraining all but padding
    report: str  # what the packing costs, for the console; "" where there is nothing to say

    def __len__(self) -> int: ...

    def targets(self, index: int) -> int:
        """Targets of a row that have a loss."""
        ...

    def tokens(self, index: int) -> int:
        """Tokens of a row that are no padding."""
        ...

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        """Write a row into three arrays of `length`."""
        ...


def make_rows(packing: str, source: Source, length: int, seed: int) -> Rows:
    assert packing in PACKINGS, packing
    return (
        BestFitRows(source, length, seed) if packing == "best_fit" else StreamRows(source, length)
    )


class StreamRows:
    """Rows cut from the documents end to end, without padding; a remainder shorter than a row at the end is never used."""

    share, report = 1.0, ""

    def __init__(self, source: Source, length: int):
        self.source, self.length, self.count = source, length, (len(source) - 1) // length

    def __len__(self) -> int:
        return self.count

    def targets(self, index: int) -> int:
        return self.length

    tokens = targets

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        start = index * self.length
        text, begun = self.source.read(start, start + self.length + 1)
        tokens[:], targets[:], doc_ids[:] = text[:-1], text[1:], begun[:-1]


class Plan(NamedTuple):
    """Which pieces of documents lie in which row. Every token of the source is in exactly one piece."""

    starts: np.ndarray  # int64 [pieces], in the stream of the shards, in the order of rows
    lengths: np.ndarray  # uint16 or uint32 [pieces]
    rows: np.ndarray  # int64 [rows + 1], first piece of each row


class BestFitRows:
    """Rows of whole documents, and of the pieces of those longer than a row (Ding et al. 2024, arXiv:2404.10830).

    Each piece is a document of its own in `docs`; what is left of a row is padding: token 0, target IGNORE, one more document.
    """

    def __init__(self, source: Source, length: int, seed: int):
        self.length = length
        self.plan, cost = keep_plan(source, length, seed)
        self.filled = np.add.reduceat(
            self.plan.lengths, self.plan.rows[:-1], dtype=np.int64
        ).astype(np.uint32)  # [rows]
        self.share = 1 - cost["padding"]
        self.report = (
            f"best-fit rows, {cost['padding']:.2%} padding, {cost['cut']:.1%} of documents cut "
            f"(end to end: {cost['cut_by_stream']:.1%})"
        )
        self.shards = source.shards if isinstance(source, LongDocuments) else source
        self.files = [
            file.view(np.ndarray) for file in self.shards.shards
        ]  # slicing a memmap itself is slow
        self.bounds: list[int] = self.shards.bounds.tolist()
        self.bos = int(self.shards.read(0, 1)[0][0])

    def __len__(self) -> int:
        return len(self.filled)

    def targets(self, index: int) -> int:
        return int(self.filled[index])

    tokens = targets

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        first, last = self.plan.rows[index : index + 2].tolist()
        at = count = 0
        for start, length in zip(
            self.plan.starts[first:last].tolist(),
            self.plan.lengths[first:last].tolist(),
            strict=True,
        ):
            text, end = self._read(start, length + 1), at + length
            tokens[at:end], targets[at:end], doc_ids[at:end] = text[:-1], text[1:], count
            at, count = end, count + 1
        tokens[at:], targets[at:], doc_ids[at:] = 0, IGNORE, count

    def _read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the shards; bos after the very last."""
        shard = bisect_right(self.bounds, start) - 1
        base, end = self.bounds[shard], start + length
        if end <= self.bounds[shard + 1]:
            return self.files[shard][start - base : end - base]
        text = self.shards.read(start, min(end, len(self.shards)))[0]
        return text if len(text) == length else np.append(text, self.bos)


def best_fit_decreasing(counts: Sequence[int], capacity: int) -> list[tuple[int, Pattern]]:
    """Pack counts[n] pieces of n tokens, longest first, each into the row with the least space left that holds it.

    Returns groups of like rows: how many, and what lies in each. Rows with equal space are kept together, so the work
    depends on the capacity (and little more than linearly on it), not on the number of pieces.
    """
    groups: dict[int, list[tuple[int, Pattern]]] = {}  # by the space left in each of their rows
    spaces = 0  # bit n is set where there are rows with n tokens of space

    def put(space: int, rows: int, pattern: Pattern) -> None:
        nonlocal spaces
        groups.setdefault(space, []).append((rows, pattern))
        spaces |= 1 << space

    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            holding = spaces >> length
            if holding:
                space = length + (holding & -holding).bit_length() - 1
                rows, pattern = groups[space].pop()
                if not groups[space]:
                    spaces ^= 1 << space
            else:
                space, rows, pattern = capacity, -(-left // (capacity // length)), ()
            each = (
                space // length
            )  # the row that took one is then the tightest, until it holds no more
            full = min(rows, left // each)
            if full:
                put(space - each * length, full, (*pattern, (length, each)))
                left, rows = left - full * each, rows - full
            if rows and left:
                put(space - left * length, 1, (*pattern, (length, left)))
                left, rows = 0, rows - 1
            if rows:
                put(space, rows, pattern)
    return [group for space in sorted(groups) for group in groups[space]]


def cut_into_pieces(
    starts: np.ndarray, lengths: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents, as start and size: whole rows of those longer than a row, then what is left of each document."""
    whole, rest = np.divmod(lengths, capacity)
    long, short = np.flatnonzero(whole), np.flatnonzero(rest)
    many = whole[long]
    nth = np.arange(many.sum()) - np.repeat(
        np.cumsum(many) - many, many
    )  # of the pieces of one document
    begins = np.concatenate(
        [np.repeat(starts[long], many) + nth * capacity, starts[short] + whole[short] * capacity]
    )
    kind = np.dtype("<u2" if capacity < 1 << 16 else "<u4")
    return begins, np.concatenate(
        [np.full(len(nth), capacity, dtype=kind), rest[short].astype(kind)]
    )


def lay_out(groups: list[tuple[int, Pattern]], kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The size of each piece, row after row, and the first piece of each row, of groups of like rows."""
    rows = np.array([rows for rows, _ in groups])
    sizes = np.array([size for _, pattern in groups for size, _ in pattern], dtype=kind)
    patterns = np.repeat(
        sizes, [number for _, pattern in groups for _, number in pattern]
    )  # one row of each group
    many = np.array([sum(number for _, number in pattern) for _, pattern in groups])  # pieces in it
    counts = np.repeat(many, rows)
    first = np.concatenate([[0], np.cumsum(counts)])
    at = np.repeat(np.repeat(np.cumsum(many) - many, rows) - first[:-1], counts) + np.arange(
        first[-1]
    )
    return patterns[at], first


def make_plan(starts: np.ndarray, lengths: np.ndarray, capacity: int, seed: int) -> Plan:
    """Pack documents, given by start and length in tokens, into rows of `capacity`. seed: which of like pieces go together."""
    begins, sizes = cut_into_pieces(starts, lengths, capacity)
    groups = best_fit_decreasing(np.bincount(sizes, minlength=capacity + 1).tolist(), capacity)
    slots, rows = lay_out(groups, sizes.dtype)
    shuffled = np.random.default_rng((seed, 2)).permutation(len(sizes))
    by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    placed = np.empty(len(sizes), dtype=np.int64)
    placed[np.argsort(slots, kind="stable")] = begins[by_size]
    return Plan(placed, slots, rows)


def plan_cost(plan: Plan, lengths: np.ndarray, capacity: int) -> dict[str, float]:
    """Shares: `padding` of the plan's rows, and documents `cut` by it and `cut_by_stream`, rows cut from them end to end."""
    ends = np.cumsum(lengths)
    across = (ends - lengths) // capacity != (ends - 1) // capacity
    rows = len(plan.rows) - 1
    padding = 1 - int(lengths.sum()) / (rows * capacity)
    return {
        "padding": padding,
        "cut": float((lengths > capacity).mean()),
        "cut_by_stream": float(across.mean()),
    }


def plan_folder(source: Source, length: int, seed: int) -> tuple[Path, dict]:
    """Where the plan of a source is kept, and the inputs that it is a function of."""
    inputs = {"source": source.fingerprint, "length": length, "seed": seed, "algorithm": ALGORITHM}
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]
    return source.folder / "plans" / f"best_fit-{length}-{seed}-{key}", inputs


def keep_plan(source: Source, length: int, seed: int) -> tuple[Plan, dict[str, float]]:
    """The plan of a source and its cost, memory-mapped from beside its shards; made and written there where absent or damaged.

    Several processes may do so at once: each writes a folder of its own, the first to rename it wins, and all are equal.
    Where the store cannot be written, the plan stays in memory.
    """
    folder, inputs = plan_folder(source, length, seed)
    there = folder.exists()
    found = _read_plan(folder, inputs)
    if found:
        return found
    if there:
        print(
            f"warning: the packing plan {folder} is damaged; it is made again",
            file=sys.stderr,
            flush=True,
        )
    starts, lengths = (
        (source.starts, source.lengths)
        if isinstance(source, LongDocuments)
        else document_table(source)
    )
    plan = make_plan(starts, lengths, length, seed)
    cost = plan_cost(plan, lengths, length)
    try:
        _write_plan(folder, plan, {"inputs": inputs, "cost": cost}, replace=there)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return _read_plan(folder, inputs) or (plan, cost)


def _write_plan(folder: Path, plan: Plan, content: dict, replace: bool) -> None:
    own = temporary(folder)
    sweep(folder.parent)
    shutil.rmtree(own, ignore_errors=True)
    try:
        if replace:
            with suppress(FileNotFoundError):  # another process has just taken it away
                folder.rename(own)
                shutil.rmtree(own)
        own.mkdir(parents=True)
        for name, part in plan._asdict().items():
            np.save(own / f"{name}.npy", part)
        files = {path.name: manifest.file_hash(path) for path in sorted(own.glob("*.npy"))}
        manifest.write(own, {**content, "sha256": files})
        own.rename(folder)
    except OSError as error:
        shutil.rmtree(own, ignore_errors=True)
        if error.errno not in (
            errno.ENOTEMPTY,
            errno.EEXIST,
        ):  # another process was first, with the same plan
            raise


def _read_plan(folder: Path, inputs: dict) -> tuple[Plan, dict[str, float]] | None:
    """A whole plan, or None where it is absent, was made from other inputs or differs from its checksums."""
    content = manifest.read(folder)
    try:
        if content is None or content["inputs"] != inputs:
            return None
        sums = content["sha256"]
        if set(sums) != {f"{name}.npy" for name in Plan._fields}:
            return None
        if any(manifest.file_hash(folder / name) != expected for name, expected in sums.items()):
            return None
        parts = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in Plan._fields
        )
        return Plan(*parts), content["cost"]
    except (OSError, KeyError, TypeError, AttributeError):
        return None
