"""Pack a source's documents into rows of fixed length: as one stream, or best-fit.

Stream packing concatenates the documents and cuts the stream into rows. Best-fit packing cuts only
documents longer than a row. A token's target is the next token of its document; the last
token's target is bos. A best-fit plan is a pure function of (shards, row length, seed), cached
beside the shards and memory-mapped.
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
from files import remove_stale, temporary

IGNORE = -100  # target without a loss; models.losses.IGNORE
PACKINGS = ("stream", "best_fit")
ALGORITHM = 1  # version; increment when the same inputs give a different plan
# The pieces of a row: (piece length, number of such pieces), longest first
Pattern = tuple[tuple[int, int], ...]


def document_table(shards: TokenShards) -> tuple[np.ndarray, np.ndarray]:
    """Return start and length in tokens of each document of a split: two int64 [documents]."""
    bases = shards.bounds[:-1].tolist()
    begins = [np.asarray(starts) + base for starts, base in zip(shards.starts, bases, strict=True)]
    starts = np.concatenate([np.empty(0, dtype=np.int64), *begins])
    return starts, np.diff(starts, append=len(shards))


class LongDocuments:
    """View of the documents with at least `minimum` tokens, with the interface of TokenShards."""

    def __init__(self, shards: TokenShards, minimum: int):
        self.shards, self.minimum = shards, minimum
        self.folder, self.vocab_size, self.tokenizer = (
            shards.folder,
            shards.vocab_size,
            shards.tokenizer,
        )
        starts, lengths = document_table(shards)
        selected = lengths >= minimum
        self.starts, self.lengths = starts[selected], lengths[selected]
        self.ends = np.cumsum(self.lengths)  # starts in this view's stream
        self.documents, self.tokens = len(self.starts), int(self.lengths.sum())
        self.fingerprint = f"{shards.fingerprint} of {minimum} tokens or more"

    def __len__(self) -> int:
        """Return the number of tokens in these documents."""
        return self.tokens

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, stop) as int64, and doc_ids.

        doc_ids count the documents that began after start.
        """
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        tokens, doc_ids = (
            np.empty(stop - start, dtype=np.int64),
            np.empty(stop - start, dtype=np.int32),
        )
        first = document = int(np.searchsorted(self.ends, start, side="right"))
        position = start
        while position < stop:
            end = int(self.ends[document])
            source = int(self.starts[document]) + int(self.lengths[document]) - (end - position)
            piece = slice(position - start, min(end, stop) - start)
            tokens[piece] = self.shards.read(source, source + piece.stop - piece.start)[0]
            doc_ids[piece] = document - first
            position, document = end, document + 1
        return tokens, doc_ids


Source = TokenShards | LongDocuments


class Rows(Protocol):
    """The rows of one source, of `length` tokens, numbered from 0."""

    share: float  # mean share of a row's tokens that have a loss; in pretraining, all but padding
    report: str  # cost of the packing, for the console, or ""

    def __len__(self) -> int: ...

    def targets(self, index: int) -> int:
        """Return the number of a row's targets that have a loss."""
        ...

    def tokens(self, index: int) -> int:
        """Return the number of a row's tokens without padding."""
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
    """Rows cut from the concatenated documents, without padding; a partial last row is dropped."""

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
        ids, documents = self.source.read(start, start + self.length + 1)
        tokens[:], targets[:], doc_ids[:] = ids[:-1], ids[1:], documents[:-1]


class PackingPlan(NamedTuple):
    """Assigns pieces of documents to rows. Every token of the source is in exactly one piece."""

    starts: np.ndarray  # int64 [pieces], positions in the shards' stream, in row order
    lengths: np.ndarray  # uint16 or uint32 [pieces]
    rows: np.ndarray  # int64 [rows + 1], first piece of each row


class BestFitRows:
    """Rows of whole documents and of pieces of longer documents (Ding et al., arXiv:2404.10830).

    Each piece has its own id in doc_ids. Padding has token 0, target IGNORE and one more id.
    """

    def __init__(self, source: Source, length: int, seed: int):
        self.length = length
        self.plan, cost = load_or_make_plan(source, length, seed)
        row_tokens = np.add.reduceat(self.plan.lengths, self.plan.rows[:-1], dtype=np.int64)
        self.row_tokens = row_tokens.astype(np.uint32)  # [rows]
        self.share = 1 - cost["padding"]
        self.report = (
            f"best-fit rows, {cost['padding']:.2%} padding, {cost['cut']:.1%} of documents cut "
            f"(end to end: {cost['cut_by_stream']:.1%})"
        )
        self.shards = source.shards if isinstance(source, LongDocuments) else source
        # Plain arrays: slicing an np.memmap is slow
        self.files = [file.view(np.ndarray) for file in self.shards.shards]
        self.bounds: list[int] = self.shards.bounds.tolist()
        self.bos = int(self.shards.read(0, 1)[0][0])

    def __len__(self) -> int:
        return len(self.row_tokens)

    def targets(self, index: int) -> int:
        return int(self.row_tokens[index])

    tokens = targets

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        first, last = self.plan.rows[index : index + 2].tolist()
        begin = count = 0
        for start, length in zip(
            self.plan.starts[first:last].tolist(),
            self.plan.lengths[first:last].tolist(),
            strict=True,
        ):
            ids, end = self._read(start, length + 1), begin + length
            tokens[begin:end], targets[begin:end], doc_ids[begin:end] = ids[:-1], ids[1:], count
            begin, count = end, count + 1
        tokens[begin:], targets[begin:], doc_ids[begin:] = 0, IGNORE, count

    def _read(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length) of the shards; bos follows the last token."""
        shard = bisect_right(self.bounds, start) - 1
        base, end = self.bounds[shard], start + length
        if end <= self.bounds[shard + 1]:
            return self.files[shard][start - base : end - base]
        ids = self.shards.read(start, min(end, len(self.shards)))[0]
        return ids if len(ids) == length else np.append(ids, self.bos)


def best_fit_decreasing(counts: Sequence[int], capacity: int) -> list[tuple[int, Pattern]]:
    """Pack counts[n] pieces of n tokens, longest first, each into the fullest row that holds it.

    Returns groups of equal rows as (number of rows, pattern). Rows with equal free space are packed
    together: the time is nearly linear in the capacity and independent of the number of pieces.
    """
    groups: dict[int, list[tuple[int, Pattern]]] = {}  # by the free space of their rows
    spaces = 0  # bit n is set if a row has n tokens of free space

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
            # A row that received a piece is now the fullest, so fill it with as many as it holds.
            per_row = space // length
            full = min(rows, left // per_row)
            if full:
                put(space - per_row * length, full, (*pattern, (length, per_row)))
                left, rows = left - full * per_row, rows - full
            if rows and left:
                put(space - left * length, 1, (*pattern, (length, left)))
                left, rows = 0, rows - 1
            if rows:
                put(space, rows, pattern)
    return [group for space in sorted(groups) for group in groups[space]]


def cut_into_pieces(
    starts: np.ndarray, lengths: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return start and size of each piece: first row-sized pieces, then the remainders."""
    full_pieces, remainders = np.divmod(lengths, capacity)
    long, short = np.flatnonzero(full_pieces), np.flatnonzero(remainders)
    counts = full_pieces[long]
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.concatenate(
        [
            np.repeat(starts[long], counts) + index * capacity,
            starts[short] + full_pieces[short] * capacity,
        ]
    )
    dtype = np.dtype("<u2" if capacity < 1 << 16 else "<u4")
    return begins, np.concatenate(
        [np.full(len(index), capacity, dtype=dtype), remainders[short].astype(dtype)]
    )


def lay_out(groups: list[tuple[int, Pattern]], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return each piece's size in row order, and each row's first piece.

    groups: equal rows as (number of rows, pattern).
    """
    rows = np.array([rows for rows, _ in groups])
    sizes = np.array([size for _, pattern in groups for size, _ in pattern], dtype=dtype)
    repeats = [number for _, pattern in groups for _, number in pattern]
    patterns = np.repeat(sizes, repeats)  # one row of each group
    group_pieces = np.array([sum(number for _, number in pattern) for _, pattern in groups])
    counts = np.repeat(group_pieces, rows)
    first = np.concatenate([[0], np.cumsum(counts)])
    group_starts = np.repeat(np.cumsum(group_pieces) - group_pieces, rows)
    index = np.repeat(group_starts - first[:-1], counts) + np.arange(first[-1])
    return patterns[index], first


def make_plan(starts: np.ndarray, lengths: np.ndarray, capacity: int, seed: int) -> PackingPlan:
    """Pack documents, given by start and length in tokens, into rows of `capacity` tokens.

    seed: shuffles pieces of equal size among the rows.
    """
    begins, sizes = cut_into_pieces(starts, lengths, capacity)
    groups = best_fit_decreasing(np.bincount(sizes, minlength=capacity + 1).tolist(), capacity)
    slots, rows = lay_out(groups, sizes.dtype)
    shuffled = np.random.default_rng((seed, 2)).permutation(len(sizes))
    by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    placed = np.empty(len(sizes), dtype=np.int64)
    placed[np.argsort(slots, kind="stable")] = begins[by_size]
    return PackingPlan(placed, slots, rows)


def plan_cost(plan: PackingPlan, lengths: np.ndarray, capacity: int) -> dict[str, float]:
    """Return shares: padding tokens, documents cut by the plan, documents cut by stream packing."""
    ends = np.cumsum(lengths)
    cut_by_stream = (ends - lengths) // capacity != (ends - 1) // capacity
    rows = len(plan.rows) - 1
    padding = 1 - int(lengths.sum()) / (rows * capacity)
    return {
        "padding": padding,
        "cut": float((lengths > capacity).mean()),
        "cut_by_stream": float(cut_by_stream.mean()),
    }


def plan_folder(source: Source, length: int, seed: int) -> tuple[Path, dict]:
    """Return the folder of a source's plan, and the inputs that determine the plan."""
    inputs = {"source": source.fingerprint, "length": length, "seed": seed, "algorithm": ALGORITHM}
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]
    return source.folder / "plans" / f"best_fit-{length}-{seed}-{key}", inputs


def load_or_make_plan(
    source: Source, length: int, seed: int
) -> tuple[PackingPlan, dict[str, float]]:
    """Return a source's plan and its cost, memory-mapped from beside its shards.

    Makes and writes a missing or damaged plan. Concurrent processes write equal plans to temporary
    folders, and the first rename succeeds. In a read-only store, the plan remains in memory.
    """
    folder, inputs = plan_folder(source, length, seed)
    exists = folder.exists()
    if cached := _read_plan(folder, inputs):
        return cached
    if exists:
        print(
            f"warning: the packing plan {folder} is damaged; rebuilding it",
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
        _write_plan(folder, plan, {"inputs": inputs, "cost": cost}, replace=exists)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return _read_plan(folder, inputs) or (plan, cost)


def _write_plan(folder: Path, plan: PackingPlan, content: dict, replace: bool) -> None:
    scratch = temporary(folder)
    remove_stale(folder.parent)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if replace:
            with suppress(FileNotFoundError):  # another process has just moved it
                folder.rename(scratch)
                shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
        for name, array in plan._asdict().items():
            np.save(scratch / f"{name}.npy", array)
        files = {path.name: manifest.file_hash(path) for path in sorted(scratch.glob("*.npy"))}
        manifest.write(scratch, {**content, "sha256": files})
        scratch.rename(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process wrote it first
            raise


def _read_plan(folder: Path, inputs: dict) -> tuple[PackingPlan, dict[str, float]] | None:
    """Return a plan and its cost; None if missing, damaged or made from other inputs."""
    content = manifest.read(folder)
    try:
        if content is None or content["inputs"] != inputs:
            return None
        sums = content["sha256"]
        if set(sums) != {f"{name}.npy" for name in PackingPlan._fields}:
            return None
        if any(manifest.file_hash(folder / name) != expected for name, expected in sums.items()):
            return None
        arrays = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in PackingPlan._fields
        )
        return PackingPlan(*arrays), content["cost"]
    except (OSError, KeyError, TypeError, AttributeError):
        return None
