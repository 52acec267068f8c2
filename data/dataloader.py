"""PackedDataLoader: the batches of one optimizer step as a pure function of the batch index.

The loader has no iterator state to save. Resuming requests the next batch index, which is
exact, O(1), and independent of the world size. Each source's rows (packing.py) are shuffled anew in
every epoch.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE, LongDocuments, Rows, Source, StreamRows, make_rows
from data.texts import text_of
from data.tokenizers.bpe import document_encoder

BLOCK = 1000  # rows; each block has the mixture's exact proportions, rounded to 1/BLOCK
# Up to here, repeated tokens are nearly as good as new tokens (Muennighoff et al. 2023,
# arXiv:2305.16264).
MAX_EPOCHS = 4
HASHED_STEPS = 1 << 14  # values of a function without a definition that the fingerprint covers
OfStep = Callable[[int], int]  # a number as a function of the step


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, non-blocking where that is safe.

    A non-blocking copy to mps may read freed memory: pytorch/pytorch issue 189690.
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


class Batch(NamedTuple):
    """One micro-batch of one rank. targets[i] is the token after tokens[i] in its document.

    Padding has target IGNORE. doc_ids counts up at each document's first token and at padding;
    None: each row is one document.
    """

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    doc_ids: Tensor | None  # [B, T] int32
    rows: Tensor = torch.empty(0, dtype=torch.int64)  # [B], row numbers in training order

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: field for name, field in self._asdict().items() if field is not None}
        return self._replace(
            **{name: to_device(tensor, device) for name, tensor in tensors.items()}
        )


class Step(NamedTuple):
    """One rank's micro-batches of one optimizer step."""

    batches: list[Batch]
    loss_denominator: int  # targets of the step over all ranks
    tokens: int  # tokens of the step over all ranks, without padding


class Loader(Protocol):
    fingerprint: str  # changes with data, order or mixture

    def at(self, batch_index: int) -> Step: ...


class PackedSource(Protocol):
    """A source that packs its rows itself, such as conversations (chat/sft.py)."""

    fingerprint: str
    documents: int

    def __len__(self) -> int: ...

    def pack(self, length: int, seed: int) -> Rows: ...


class PackedDataLoader:
    """Loads rows of sequence_length tokens, packed with several documents, from a source mixture.

    sources: name -> TokenShards, LongDocuments or PackedSource.
    mix: name -> weight, as a share of the targets that have a loss.
    rows: rows of a step over all ranks, constant or a function of the batch index. Each rank gets
    an equal contiguous share.
    packing: "stream" (concatenate documents) or "best_fit" (cut only documents longer than a row).
    start_epoch: source -> epochs that earlier phases have read; reading continues there.
    Every row of a source is used before any row repeats.

    `PackedDataLoader(dataset, tokenizer, seq_len, batch_size)` returns a TextLoader, an iterable.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PackedDataLoader":
        from_texts = "tokenizer" in kwargs or (len(args) > 1 and not isinstance(args[1], Mapping))
        return super().__new__(TextLoader if from_texts else cls)

    def __init__(
        self,
        sources: Mapping[str, Source | PackedSource],
        mix: dict[str, float],
        sequence_length: int,
        rows: int | OfStep,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        packing: str = "stream",
        start_epoch: Mapping[str, float] | None = None,
    ):
        for name, weight in mix.items():
            if weight <= 0:
                raise ValueError(
                    f"data.mix.{name}={weight} must be above 0; remove the source to exclude it"
                )
        self.sources, self.names = sources, sorted(mix)
        self.length, self.micro_batch_size, self.seed = sequence_length, micro_batch_size, seed
        self.rank, self.world = rank, world
        self.varies, self.rows_of = callable(rows), as_function(rows)
        self.rows = self.rows_at(0)  # of the first step
        self.begins, self.lock = [0], Lock()  # first row of each step if `rows` varies; grows
        self.packed = [self._packed_rows(name, packing) for name in self.names]
        row_weights = [
            mix[name] / rows.share for name, rows in zip(self.names, self.packed, strict=True)
        ]
        self.quota = _largest_remainder(np.array(row_weights), BLOCK)  # rows per block and source
        if (self.quota == 0).any():
            smallest = self.names[int(self.quota.argmin())]
            raise ValueError(
                f"source {smallest} is below 1/{BLOCK} of the mixture's rows; raise its weight"
            )
        shares = dict(zip(self.names, self.quota.tolist(), strict=True))
        hashes = [sources[name].fingerprint for name in self.names]
        text = schedule_text(rows)
        self.fingerprint = f"{hashes} {shares} length={sequence_length} rows={text} seed={seed}"
        if packing != "stream":
            self.fingerprint += f" packing={packing}"
        self.start_epoch = dict(start_epoch or {})
        if self.start_epoch:
            self.fingerprint += f" start_epoch={dict(sorted(self.start_epoch.items()))}"
        # First row of each source, counted over its epochs.
        self.first_rows = [
            round(self.start_epoch.get(name, 0.0) * len(rows))
            for name, rows in zip(self.names, self.packed, strict=True)
        ]
        self._order = lru_cache(maxsize=2 * len(self.names))(self._shuffle)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def rows_at(self, batch_index: int) -> int:
        """Return the rows of a step over all ranks; ValueError if they do not divide evenly."""
        rows = self.rows_of(batch_index)
        if rows < 1 or rows % (self.world * self.micro_batch_size):
            raise ValueError(
                f"{rows} rows per step do not divide over {self.world} rank(s) with micro-batches "
                f"of {self.micro_batch_size}; change data.tokens_per_step"
                f"{' or schedules.batch_tokens' if self.varies else ''}, data.micro_batch_size or "
                "the world size"
            )
        return rows

    def first_row(self, batch_index: int) -> int:
        """Return the first row of a step in the mixture."""
        if not self.varies:
            return batch_index * self.rows
        with self.lock:  # at() may run in several threads
            for i in range(len(self.begins) - 1, batch_index):
                self.begins.append(self.begins[i] + self.rows_at(i))
            return self.begins[batch_index]

    def source_of(self, row: int) -> str:
        """Return the name of the source of a row, numbered as in Batch.rows."""
        return self.names[self._locate(row)[0]]

    def steps_of_epochs(self, epochs: float, names: Collection[str]) -> int:
        """Return the steps for `epochs` passes over all rows of the named sources."""
        chosen = [name in names for name in self.names]
        count = sum(len(self.packed[i]) for i, is_chosen in enumerate(chosen) if is_chosen)
        share = float(self.quota[chosen].sum() / self.quota.sum())  # of the rows of a step
        return math.ceil(epochs * count / (self.rows_at(0) * share))

    def at(self, batch_index: int) -> Step:
        """Return this rank's micro-batches of step `batch_index` >= 0."""
        begin, rows = self.first_row(batch_index), self.rows_at(batch_index)
        step_rows = [self._locate(row) for row in range(begin, begin + rows)]
        target_count = sum(self.packed[source].targets(index) for source, index in step_rows)
        token_count = sum(self.packed[source].tokens(index) for source, index in step_rows)
        rank_rows = rows // self.world
        first = self.rank * rank_rows
        shape = (rank_rows, self.length)
        tokens, targets, doc_ids = (
            np.empty(shape, np.int64),
            np.empty(shape, np.int64),
            np.empty(shape, np.int32),
        )
        for i, (source, index) in enumerate(step_rows[first : first + rank_rows]):
            self.packed[source].fill(index, tokens[i], targets[i], doc_ids[i])
        row_numbers = np.arange(rank_rows) + (begin + first)
        tensors = [torch.from_numpy(array) for array in (tokens, targets, doc_ids, row_numbers)]
        splits = [tensor.split(self.micro_batch_size) for tensor in tensors]
        batches = [Batch(*fields) for fields in zip(*splits, strict=True)]
        return Step(batches, target_count, token_count)

    def shares(self, first: int, last: int) -> dict[str, float]:
        """Return each source's share of the targets in steps [first, last)."""
        sums = dict.fromkeys(self.names, 0)
        for row in range(self.first_row(first), self.first_row(last)):
            source, index = self._locate(row)
            sums[self.names[source]] += self.packed[source].targets(index)
        return {name: count / max(1, sum(sums.values())) for name, count in sums.items()}

    def epochs(self, batch_index: int) -> dict[str, float]:
        """Return the epochs of each source that the first `batch_index` steps read."""
        blocks = self.first_row(batch_index) / BLOCK
        sources = zip(self.names, self.quota, self.packed, strict=True)
        return {name: blocks * int(quota) / len(rows) for name, quota, rows in sources}

    def describe(self, steps: int) -> list[str]:
        """Return one line per source on its epochs in `steps` steps, and warnings.

        A source above MAX_EPOCHS epochs gets a warning. ValueError as in rows_at, for any step.
        """
        lines, warnings = [], []
        for (name, epochs), rows in zip(self.epochs(steps).items(), self.packed, strict=True):
            source = self.sources[name]
            line = (
                f"reads {name} for {epochs:.2f} epochs: {len(source):,} tokens in "
                f"{source.documents:,} documents"
            )
            if isinstance(source, LongDocuments):
                shards = source.shards
                line += (
                    f" of {source.minimum:,} tokens or more "
                    f"({len(source) / len(shards):.1%} of its tokens, "
                    f"{source.documents / shards.documents:.1%} of its documents)"
                )
            start = self.start_epoch.get(name, 0.0)
            line += f", from epoch {start:.2f} on" if start else ""
            lines.append(line + (f"; {rows.report}" if rows.report else ""))
            if (total := start + epochs) > MAX_EPOCHS:
                warnings.append(
                    f"warning: {name} will be read for {total:.1f} epochs; above {MAX_EPOCHS} "
                    "epochs repeated tokens lose value (arXiv:2305.16264): "
                    f"add data, lower the weight of {name} or train for fewer steps"
                )
        return lines + warnings

    def _packed_rows(self, name: str, packing: str) -> Rows:
        source = self.sources[name]
        if not isinstance(source, Source):
            return source.pack(self.length, self.seed)
        _check_enough(name, source, self.length)
        return make_rows(packing, source, self.length, self.seed)

    def _locate(self, row: int) -> tuple[int, int]:
        """Return the source of a row of the mixture, and the row's index within the source."""
        block, offset = divmod(row, BLOCK)
        row_sources, ordinals = self._block(block)
        source = int(row_sources[offset])
        ordinal = block * int(self.quota[source]) + int(ordinals[offset])
        position = self.first_rows[source] + ordinal
        epoch, index = divmod(position, len(self.packed[source]))
        return source, int(self._order(source, epoch)[index])

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's source in a block, and its ordinal among that source's rows."""
        row_sources = np.repeat(np.arange(len(self.names)), self.quota)
        np.random.default_rng((self.seed, 0, block)).shuffle(row_sources)
        ordinals = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quota):
            ordinals[row_sources == source] = np.arange(quota)
        return row_sources, ordinals

    def _shuffle(self, source: int, epoch: int) -> np.ndarray:
        """Return the order of a source's rows in an epoch, seeded by name, seed and epoch."""
        name = int.from_bytes(self.names[source].encode(), "big")
        return (
            np.random.default_rng((self.seed, 1, name, epoch))
            .permutation(len(self.packed[source]))
            .astype(np.uint32)
        )


class TextLoader(PackedDataLoader):
    """Batches of packed rows from texts in order, tokenized on the fly in one process.

    `PackedDataLoader(dataset, tokenizer, seq_len, batch_size)` returns it. Training uses a store.
    dataset: texts, or rows with a text under text_column. tokenizer: from tokenizers or
    transformers. Each document begins with bos, or with eos if there is no bos; rows are cut from
    the concatenated documents. The last incomplete batch is dropped; ValueError if no batch is
    left. Each iteration starts from the first text, if the dataset can be iterated again.
    """

    def __init__(
        self,
        dataset: Iterable[str | Mapping[str, Any]],
        tokenizer: Any,
        seq_len: int,
        batch_size: int,
        text_column: str = "text",
    ):
        if min(seq_len, batch_size) < 1:
            raise ValueError(f"seq_len={seq_len} and batch_size={batch_size} must be at least 1")
        if isinstance(dataset, (str, Mapping)):
            kind = type(dataset).__name__
            raise ValueError(
                f"PackedDataLoader takes texts or rows, not a {kind}; put a single text or row in "
                "a list, or give one split of a data set"
            )
        self.dataset, self.length, self.batch_size = dataset, seq_len, batch_size
        self.text_column, self.encode = text_column, document_encoder(tokenizer)

    def __iter__(self) -> Iterator[Batch]:
        needed, is_empty = self.batch_size * self.length, True
        tokens, doc_ids = np.empty(0, np.int64), np.empty(0, np.int32)
        for number, row in enumerate(self.dataset):
            ids = self.encode(text_of(row, self.text_column))
            tokens = np.concatenate([tokens, np.array(ids, np.int64)])
            doc_ids = np.concatenate([doc_ids, np.full(len(ids), number, np.int32)])
            while len(tokens) > needed:  # one more, as the target of the last token
                flat = (tokens[:needed], tokens[1 : needed + 1], doc_ids[:needed])
                rows = [array.reshape(self.batch_size, self.length).copy() for array in flat]
                rows[2] -= rows[2][:, :1]  # documents count from 0 in each row
                yield Batch(*map(torch.from_numpy, rows))
                tokens, doc_ids, is_empty = tokens[needed:], doc_ids[needed:], False
        if is_empty:
            raise ValueError(
                f"the texts have {len(tokens):,} tokens, but a batch of {self.batch_size} rows of "
                f"{self.length} needs {needed + 1:,}; add texts, or lower batch_size or seq_len"
            )


def validation_batches(
    shards: Source,
    sequence_length: int,
    batch_size: int,
    rows: int | None,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """Return the first `rows` rows (default: all) of a validation split, sharded over ranks.

    Padding rows with ignored targets give every rank the same number of batches; every token
    counts once.
    """
    available = (len(shards) - 1) // sequence_length
    if available < 1:
        raise ValueError(
            f"source {shards.folder.name} has {len(shards):,} validation tokens, too few for one "
            f"row of {sequence_length}; raise val_fraction in the recipe and run "
            "scripts.prepare_data again, cut a few long texts into more documents "
            "(scripts.download_data --document_chars 20000), add data, remove the source from "
            "data.mix, or train without validation (validation.every=0)"
        )
    count = min(rows or available, available)
    return row_batches(
        StreamRows(shards, sequence_length), sequence_length, batch_size, count, rank, world
    )


def row_batches(
    source: Rows, sequence_length: int, batch_size: int, rows: int, rank: int = 0, world: int = 1
) -> list[Batch]:
    """Return the first `rows` rows of a source, sharded over the ranks as in validation_batches."""
    return list(stream_batches(source, sequence_length, batch_size, rows, rank, world))


def stream_batches(
    source: Rows, sequence_length: int, batch_size: int, rows: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Yield the batches of row_batches, with one in memory at a time."""
    for first in range(0, rows, batch_size * world):
        tokens = np.zeros((batch_size, sequence_length), dtype=np.int64)
        targets = np.full((batch_size, sequence_length), IGNORE, dtype=np.int64)
        doc_ids = np.zeros((batch_size, sequence_length), dtype=np.int32)
        for i in range(batch_size):
            row = first + rank * batch_size + i
            if row < rows:
                source.fill(row, tokens[i], targets[i], doc_ids[i])
        yield Batch(*(torch.from_numpy(array) for array in (tokens, targets, doc_ids)))


class Prefetcher:
    """Reads the next step in a thread, pinned for a GPU, while the current one trains."""

    def __init__(self, loader: Loader, device: torch.device):
        self.loader, self.device, self.fingerprint = loader, device, loader.fingerprint
        # Without set_device, the new thread would pin memory through GPU 0 and create a context
        # there.
        initializer = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.pool = ThreadPoolExecutor(1, "prefetch", *initializer)
        self.ahead: tuple[int, Future[Step]] | None = None

    @property
    def position(self) -> int:
        """The batch index after the last batch that at() returned; 0 before the first."""
        return self.ahead[0] if self.ahead else 0

    def _load(self, batch_index: int) -> Step:
        step = self.loader.at(batch_index)
        if self.device.type == "cuda":
            step = step._replace(
                batches=[
                    batch._replace(
                        **{
                            name: tensor.pin_memory()
                            for name, tensor in batch._asdict().items()
                            if tensor is not None
                        }
                    )
                    for batch in step.batches
                ]
            )
        return step

    def at(self, batch_index: int) -> Step:
        ahead = self.ahead
        step = (
            ahead[1].result()
            if ahead is not None and ahead[0] == batch_index
            else self._load(batch_index)
        )
        self.ahead = (batch_index + 1, self.pool.submit(self._load, batch_index + 1))
        return step._replace(batches=[batch.to(self.device) for batch in step.batches])


def as_function(value: int | OfStep) -> OfStep:
    """Return a number as a function of the step."""
    return value if callable(value) else lambda step: value


def schedule_text(value: int | OfStep) -> str:
    """Return a constant as text, or the attribute `definition` of a function of the step.

    Without that attribute, return a hash of the function's first values.
    """
    if not callable(value):
        return str(value)
    if definition := getattr(value, "definition", ""):
        return str(definition)
    values = [value(step) for step in range(HASHED_STEPS)]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _check_enough(name: str, source: Source, length: int) -> None:
    """ValueError if a source does not fill one row."""
    if len(source) > length:
        return
    if isinstance(source, LongDocuments):
        raise ValueError(
            f"source {name} has {source.documents:,} documents of at least {source.minimum:,} "
            f"tokens, {len(source):,} tokens together, too few for one row of {length}; "
            f"lower data.min_document_tokens.{name} or add data"
        )
    raise ValueError(
        f"source {name} has {len(source)} tokens, too few for one row of {length}; "
        "add data or lower data.sequence_length"
    )


def _largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Return integers proportional to weights that sum to total exactly."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]] += 1
    return counts
