"""BinLoader: batches of `.bin` shards as a pure function of the batch index, without shuffling.

Two ways to cut rows, as in modded-nanogpt:
- sequential: rows follow each other without a gap (records 1 to 25).
- bos: each row begins with a document, documents are cut to max_document tokens, and the row's last
  document is cut to fit (record 26 on). The rest of a cut document is not read.
A step reads one shard; a shard's tail that is too short for a step is skipped. A step has the same
rows for any number of ranks and micro-batches. They equal those of modded-nanogpt on 8 GPUs.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import NamedTuple

import numpy as np
import torch

from data.bin_shards import BinShards
from data.dataloader import (
    MAX_EPOCHS,
    Batch,
    OfStep,
    Step,
    as_function,
    schedule_text,
    stream_batches,
)
from data.packing import StreamRows

ALIGNMENTS = ("sequential", "bos")
MAX_OPEN = 4  # shards whose document index stays in memory


class Shape(NamedTuple):
    """The batch of one step over all ranks."""

    rows: int
    length: int  # tokens of a row
    max_document: int  # maximum tokens of a document in a row


class StepStart(NamedTuple):
    """Where a step begins. `start` is a token (sequential) or a document (bos) of the shard."""

    visit: int  # number of shards read so far, over all epochs
    start: int
    row: int  # rows of all earlier steps


class DocumentIndex:
    """The documents of one shard: first token and length. The last one may end in the next shard.

    Tokens before the first document are not read. required: whether the rows need documents.
    """

    def __init__(self, shards: BinShards, number: int, required: bool):
        """ValueError if a token is outside the vocabulary or a required document is missing."""
        tokens = shards.shards[number]
        shards.check_ids(number, tokens)
        self.starts = np.flatnonzero(tokens == shards.bos)
        if required and not len(self.starts):
            raise ValueError(
                f"{shards.paths[number]} has no document: the bos id {shards.bos} does not occur; "
                "set the bos id of the tokenizer that wrote it"
            )
        self.lengths = np.diff(self.starts, append=len(tokens))
        self.following: dict[tuple[int, int], list[int]] = {}  # by row length, max_document

    def next_row(self, length: int, max_document: int) -> list[int]:
        """Return, for each document i, the first document after a row that begins with i.

        The value is above len(self.starts) if the shard ends before length + 1 tokens.
        """
        key = (length, max_document)
        if key not in self.following:
            ends = np.cumsum(np.minimum(self.lengths, max_document))
            begins = ends - np.minimum(self.lengths, max_document)
            self.following[key] = (np.searchsorted(ends, begins + length + 1) + 1).tolist()
        return self.following[key]

    def row_starts(self, document: int, shape: Shape) -> list[int] | None:
        """Return the first documents of a step's rows and of the next row; None if too short."""
        following, documents = self.next_row(shape.length, shape.max_document), [document]
        for _ in range(shape.rows):
            if documents[-1] >= len(following):
                return None
            documents.append(following[documents[-1]])
        return documents if documents[-1] <= len(following) else None


class BinLoader:
    """Loads the steps of a speedrun; has the interface of PackedDataLoader.

    tokens, length: tokens of a step over all ranks and of a row, constant or functions of the step.
    micro_batch_tokens: maximum tokens of a micro-batch; default: all of the rank's tokens.
    alignment: sequential or bos. max_document: maximum tokens of a document (bos only),
    constant or a function of the step; default: no limit. document_mask: number the documents of a
    row in doc_ids; if off, doc_ids is None and a row is one document to the model. After the last
    shard, reading starts again with the first; rank 0 prints where an epoch begins.
    """

    def __init__(
        self,
        shards: BinShards,
        tokens: int | OfStep,
        length: int | OfStep,
        rank: int = 0,
        world: int = 1,
        micro_batch_tokens: int | None = None,
        alignment: str = "bos",
        max_document: int | OfStep | None = None,
        document_mask: bool = True,
    ):
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment={alignment!r} must be one of {', '.join(ALIGNMENTS)}")
        if alignment == "sequential" and max_document is not None:
            raise ValueError(
                "max_document has no effect on sequential rows; remove it or set alignment=bos"
            )
        self.shards, self.rank, self.world = shards, rank, world
        self.tokens_at, self.length_at = as_function(tokens), as_function(length)
        limit = len(shards) if max_document is None else max_document
        self.max_document_at = as_function(limit)
        self.micro_batch_tokens = micro_batch_tokens
        self.aligned, self.document_mask = alignment == "bos", document_mask
        self.pool = ThreadPoolExecutor(1, "shard_index")
        self.indexes: dict[int, Future[DocumentIndex]] = {}
        self.lock = RLock()  # at() may run in several threads
        self.step_starts = [StepStart(0, 0, 0)]  # of the steps so far; grows
        self.announced = 0  # epochs whose beginning was printed
        settings = [schedule_text(value) for value in (tokens, length, limit)]
        self.fingerprint = (
            f"{shards.fingerprint} {alignment} tokens={settings[0]} length={settings[1]}"
            f" max_document={settings[2]} bos={shards.bos} mask={document_mask}"
        )
        self.shape(0)
        self.index(0)

    def shape(self, step: int) -> Shape:
        """Return rows and row length of a step; ValueError if they do not divide over the ranks."""
        tokens, length = self.tokens_at(step), self.length_at(step)
        limit = self.max_document_at(step)
        if min(tokens, length, limit) < 1:
            raise ValueError(
                f"step {step}: {tokens} tokens per step, rows of {length} tokens and documents of "
                f"at most {limit} tokens must be at least 1"
            )
        rows = tokens // length
        if tokens % length or rows % self.world:
            raise ValueError(
                f"step {step}: {tokens:,} tokens in rows of {length:,} do not divide over "
                f"{self.world} rank(s); make the tokens per step a multiple of the row length "
                "times the ranks"
            )
        if self.micro_batch_tokens is not None and length > self.micro_batch_tokens:
            raise ValueError(
                f"step {step}: a row of {length:,} tokens does not fit into a micro-batch of "
                f"{self.micro_batch_tokens:,} tokens; raise data.micro_batch_size"
            )
        return Shape(rows, length, limit)

    def at(self, batch_index: int) -> Step:
        """Return this rank's micro-batches of step `batch_index` >= 0."""
        shape, step_start = self.shape(batch_index), self.step_start(batch_index)
        number, count = self._shard(step_start), shape.rows // self.world
        tokens, index, first = self.shards.shards[number], self.index(number), self.rank * count
        rows = np.empty((count, shape.length + 1), dtype=np.int64)
        doc_ids = np.zeros((count, shape.length), dtype=np.int32)
        if self.aligned:
            documents = index.row_starts(step_start.start, shape)
            assert documents is not None
            bounds = documents[first : first + count + 1]
            _fill_aligned(rows, doc_ids, tokens, index, bounds, shape.max_document)
        else:
            for i in range(count):
                start = step_start.start + (first + i) * shape.length
                rows[i] = tokens[start : start + shape.length + 1]
            begins = rows[:, 1:-1] == self.shards.bos
            np.cumsum(begins, axis=1, dtype=np.int32, out=doc_ids[:, 1:])
        self._announce(batch_index, step_start)
        inputs, targets = (np.ascontiguousarray(ids) for ids in (rows[:, :-1], rows[:, 1:]))
        numbers = np.arange(count) + (step_start.row + first)
        size = self._micro_batch_rows(count, shape.length)
        fields = [torch.from_numpy(array) for array in (inputs, targets, doc_ids, numbers)]
        batches = [Batch(*pieces) for pieces in zip(*(f.split(size) for f in fields), strict=True)]
        if not self.document_mask:
            batches = [batch._replace(doc_ids=None) for batch in batches]
        tokens_of_step = shape.rows * shape.length
        return Step(batches, tokens_of_step, tokens_of_step)

    def epoch(self, batch_index: int) -> int:
        """Return the epoch that a step reads, from 0."""
        return self.step_start(batch_index).visit // len(self.shards.shards)

    def describe(self, steps: int) -> list[str]:
        """Return a line on the epochs that `steps` steps read, and a warning above MAX_EPOCHS.

        bos: an estimate from the first shard. ValueError if a step does not divide over the ranks.
        """
        shapes = [self.shape(step) for step in range(steps)]
        shares = {shape: self._share_read(shape) for shape in set(shapes)}
        tokens = sum(shape.rows * shape.length / shares[shape] for shape in shapes)
        epochs = tokens / len(self.shards)
        about = "about " if self.aligned or len(shares) > 1 else ""
        line = (
            f"reads {self.shards.pattern} for {about}{epochs:.2f} epochs: {len(self.shards):,} "
            f"tokens in {len(self.shards.shards)} shard(s), in order"
        )
        if self.aligned:
            unread = 1 - min(shares.values())
            line += f"; up to {unread:.1%} of the tokens are cut from long and last documents"
        if epochs <= MAX_EPOCHS:
            return [line]
        warning = (
            f"warning: {self.shards.pattern} will be read for {epochs:.1f} epochs; above "
            f"{MAX_EPOCHS} epochs repeated tokens lose value (arXiv:2305.16264): add shards or "
            "train for fewer steps"
        )
        return [line, warning]

    def step_start(self, batch_index: int) -> StepStart:
        """Return where a step begins: after the previous step, in a shard with room for it."""
        with self.lock:
            while len(self.step_starts) <= batch_index + 1:
                step = len(self.step_starts) - 1
                step_start, end = self._fit(self.step_starts[step], self.shape(step), step)
                self.step_starts[step] = step_start
                self.step_starts.append(
                    StepStart(step_start.visit, end, step_start.row + self.shape(step).rows)
                )
            return self.step_starts[batch_index]

    def index(self, number: int) -> DocumentIndex:
        """Return the document index of a shard; the next index is built in the background."""
        with self.lock:
            needed = (number, (number + 1) % len(self.shards.shards))
            for shard in needed:
                if shard not in self.indexes:
                    self.indexes[shard] = self.pool.submit(
                        DocumentIndex, self.shards, shard, self.aligned
                    )
            for shard in [shard for shard in self.indexes if shard not in needed][:-MAX_OPEN]:
                del self.indexes[shard]
            future = self.indexes[number]
        return future.result()

    def _fit(self, step_start: StepStart, shape: Shape, step: int) -> tuple[StepStart, int]:
        """Return the start of a step, in this shard or a later one, and where the step ends."""
        for _ in range(len(self.shards.shards) + 1):
            if (end := self._end(step_start, shape)) is not None:
                return step_start, end
            step_start = StepStart(step_start.visit + 1, 0, step_start.row)
        longest = max(map(len, self.shards.shards))
        raise ValueError(
            f"step {step} needs {shape.rows} rows of {shape.length:,} tokens, more than any shard "
            f"of {self.shards.pattern} holds (the longest has {longest:,} tokens); lower the "
            "tokens per step or write longer shards"
        )

    def _end(self, step_start: StepStart, shape: Shape) -> int | None:
        """Return where a step ends, by its start; None if the shard is too short."""
        if self.aligned:
            documents = self.index(self._shard(step_start)).row_starts(step_start.start, shape)
            return None if documents is None else documents[-1]
        end = step_start.start + shape.rows * shape.length
        return end if end < len(self.shards.shards[self._shard(step_start)]) else None

    def _shard(self, step_start: StepStart) -> int:
        return step_start.visit % len(self.shards.shards)

    def _micro_batch_rows(self, rows: int, length: int) -> int:
        """Return the maximum rows of a micro-batch that divide the rank's rows evenly."""
        most = rows if self.micro_batch_tokens is None else self.micro_batch_tokens // length
        return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)

    def _share_read(self, shape: Shape) -> float:
        """Return the share of a shard's tokens that rows of this shape read."""
        if not self.aligned:
            used = [
                (len(shard) - 1) // (shape.rows * shape.length) * shape.rows * shape.length
                for shard in self.shards.shards
            ]
            return max(1, sum(used)) / len(self.shards)
        index, row, count = self.index(0), 0, 0
        following = index.next_row(shape.length, shape.max_document)
        while row < len(following) and following[row] <= len(following):
            row, count = following[row], count + 1
        return min(1.0, max(1, count) * shape.length / len(self.shards.shards[0]))

    def _announce(self, batch_index: int, step_start: StepStart) -> None:
        epoch = step_start.visit // len(self.shards.shards)
        if epoch > self.announced and self.rank == 0:
            print(
                f"step {batch_index:,}: epoch {epoch + 1} of {self.shards.pattern} (its tokens are "
                "read again)",
                flush=True,
            )
        self.announced = max(self.announced, epoch)


class BinValidation:
    """Batches of sequential rows from the first `tokens` tokens of a validation split.

    tokens: a multiple of `length`; the speedrun's validation reads 10,485,760. rows: rows of a
    batch on one rank. Can be iterated again; reads one batch at a time.
    """

    def __init__(
        self,
        shards: BinShards,
        tokens: int,
        length: int,
        rows: int,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = True,
    ):
        if tokens < 1 or tokens % length:
            raise ValueError(
                f"{tokens:,} validation tokens must be a multiple of the row length {length:,}"
            )
        if tokens >= len(shards):
            raise ValueError(
                f"{shards.pattern} has {len(shards):,} tokens, but validation needs {tokens:,} and "
                "one more; lower the validation tokens"
            )
        self.source = StreamRows(shards, length)  # type: ignore[arg-type]  # reads as TokenShards
        self.count, self.length, self.rows = tokens // length, length, rows
        self.rank, self.world, self.document_mask = rank, world, document_mask
        shards.read(0, tokens + 1)  # checks the ids

    def __iter__(self) -> Iterator[Batch]:
        shape = (self.length, self.rows, self.count, self.rank, self.world)
        for batch in stream_batches(self.source, *shape):
            yield batch if self.document_mask else batch._replace(doc_ids=None)


def _fill_aligned(
    rows: np.ndarray,
    doc_ids: np.ndarray,
    tokens: np.ndarray,
    index: DocumentIndex,
    documents: list[int],
    max_document: int,
) -> None:
    """Fill rows [rows, length + 1] and doc_ids [rows, length] with whole and cut documents.

    documents [rows + 1]: the first document of each row and of the next row.
    """
    for row, ids, first, last in zip(rows, doc_ids, documents[:-1], documents[1:], strict=True):
        begin = 0
        for document in range(first, last):
            start = index.starts[document]
            length = min(index.lengths[document], max_document, len(row) - begin)
            row[begin : begin + length] = tokens[start : start + length]
            ids[begin : begin + length] = document - first
            begin += length
        assert begin == len(row), (begin, len(row))
