"""PackedDataLoader: the batches of one step as a pure function of `place`, the step's number in the data.

Nothing is iterated, so there is no state to save: to resume is to ask for the next place, at once and exactly, on any
number of ranks. The rows of each source (packing.py) come in an order shuffled per source and epoch.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.packing import IGNORE, LongDocuments, Rows, Source, StreamRows, make_rows
from data.tokenizers.bpe import document_encoder

BLOCK = 1000  # rows in which the mixture holds exactly; weights are honoured to 1/BLOCK
MAX_EPOCHS = 4  # up to here repeated tokens are nearly as good as new ones (Muennighoff et al. 2023, arXiv:2305.16264)


class Batch(NamedTuple):
    """One micro-batch of one rank. targets[i] is the token after tokens[i] in its document, or IGNORE where that is padding."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    doc_ids: (
        Tensor  # [B, T] int32, counts up at each document's first token, and where padding begins
    )
    rows: Tensor = torch.empty(
        0, dtype=torch.int64
    )  # [B], numbers of these rows in the order of training

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Step(NamedTuple):
    """The share of one rank in one optimizer step."""

    batches: list[Batch]
    weight: int  # targets in the whole step, over all ranks: what the summed loss is divided by
    tokens: int  # tokens in the whole step, over all ranks, without padding


class Loader(Protocol):
    fingerprint: str  # changes when the data, their order or their mixture change

    def at(self, batch_index: int) -> Step: ...


class PackedSource(Protocol):
    """A source that makes its own rows, as conversations do (sft.py)."""

    fingerprint: str
    documents: int

    def __len__(self) -> int: ...

    def pack(self, length: int, seed: int) -> Rows: ...


class PackedDataLoader:
    """Rows of sequence_length tokens from a mixture of sources, several documents in each.

    sources: name -> TokenShards, LongDocuments of them, or PackedSource. mix: name -> weight, by targets with a loss. rows:
    rows in one step over all ranks; rank r of world gets an equal contiguous part of them, cut into micro-batches. packing:
    "stream" (documents end to end) or "best_fit" (only documents longer than a row are cut). No row is repeated before every
    row of its source has been used.

    `PackedDataLoader(dataset, tokenizer, seq_len, batch_size)` makes a TextLoader, which iterates.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PackedDataLoader":
        of_texts = "tokenizer" in kwargs or (len(args) > 1 and not isinstance(args[1], Mapping))
        return super().__new__(TextLoader if of_texts else cls)

    def __init__(
        self,
        sources: Mapping[str, Source | PackedSource],
        mix: dict[str, float],
        sequence_length: int,
        rows: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        packing: str = "stream",
    ):
        if rows % (world * micro_batch_size):
            raise ValueError(
                f"{rows} rows a step do not divide over {world} rank(s) with micro-batches of {micro_batch_size}; "
                "change data.tokens_per_step, data.micro_batch_size or the number of ranks"
            )
        for name, weight in mix.items():
            if weight <= 0:
                raise ValueError(
                    f"data.mix.{name}={weight} must be above 0; leave out what is not to be read"
                )
        self.sources, self.names = sources, sorted(mix)
        self.length, self.rows, self.micro_batch_size, self.seed = (
            sequence_length,
            rows,
            micro_batch_size,
            seed,
        )
        self.rank, self.world = rank, world
        self.packed = [self._rows_of(name, packing) for name in self.names]
        weights = [
            mix[name] / rows.share for name, rows in zip(self.names, self.packed, strict=True)
        ]  # of rows, not tokens
        self.quota = _largest_remainder(np.array(weights), BLOCK)  # rows a block per source
        if (self.quota == 0).any():
            raise ValueError(
                f"data.mix.{self.names[int(self.quota.argmin())]} is below 1/{BLOCK} of the mixture; raise it"
            )
        shares = dict(zip(self.names, self.quota.tolist(), strict=True))
        hashes = [sources[name].fingerprint for name in self.names]
        self.fingerprint = f"{hashes} {shares} length={sequence_length} rows={rows} seed={seed}"
        if packing != "stream":
            self.fingerprint += f" packing={packing}"
        self._order = lru_cache(maxsize=2 * len(self.names))(self._shuffle)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def at(self, batch_index: int) -> Step:
        """This rank's micro-batches of step `place` >= 0."""
        of_step = [
            self._locate(row)
            for row in range(batch_index * self.rows, (batch_index + 1) * self.rows)
        ]
        weight = sum(self.packed[source].targets(index) for source, index in of_step)
        filled = sum(self.packed[source].tokens(index) for source, index in of_step)
        share = self.rows // self.world
        shape = (share, self.length)
        tokens, targets, doc_ids = (
            np.empty(shape, np.int64),
            np.empty(shape, np.int64),
            np.empty(shape, np.int32),
        )
        for i, (source, index) in enumerate(of_step[self.rank * share : (self.rank + 1) * share]):
            self.packed[source].fill(index, tokens[i], targets[i], doc_ids[i])
        numbers = np.arange(share) + (batch_index * self.rows + self.rank * share)
        whole = [torch.from_numpy(part) for part in (tokens, targets, doc_ids, numbers)]
        batches = [
            Batch(*parts)
            for parts in zip(*(part.split(self.micro_batch_size) for part in whole), strict=True)
        ]
        return Step(batches, weight, filled)

    def shares(self, first: int, last: int) -> dict[str, float]:
        """Share of each source in the targets of the steps [first, last)."""
        sums = dict.fromkeys(self.names, 0)
        for row in range(first * self.rows, last * self.rows):
            source, index = self._locate(row)
            sums[self.names[source]] += self.packed[source].targets(index)
        return {name: count / max(1, sum(sums.values())) for name, count in sums.items()}

    def epochs(self, batch_index: int) -> dict[str, float]:
        """How often each source has been read through, after `place` steps."""
        blocks = batch_index * self.rows / BLOCK
        each = zip(self.names, self.quota, self.packed, strict=True)
        return {name: blocks * int(quota) / len(rows) for name, quota, rows in each}

    def describe(self, steps: int) -> list[str]:
        """One line a source on what `steps` steps read of it, and a warning where that is more than MAX_EPOCHS epochs."""
        lines, warnings = [], []
        for (name, epochs), rows in zip(self.epochs(steps).items(), self.packed, strict=True):
            source = self.sources[name]
            line = f"reads {name} {epochs:.2f} times over: {len(source):,} tokens in {source.documents:,} documents"
            if isinstance(source, LongDocuments):
                every = source.shards
                line += (
                    f" of {source.minimum:,} tokens or more ({len(source) / len(every):.1%} of its tokens, "
                    f"{source.documents / every.documents:.1%} of its documents)"
                )
            lines.append(line + (f"; {rows.report}" if rows.report else ""))
            if epochs > MAX_EPOCHS:
                warnings.append(
                    f"warning: {name} will be read {epochs:.1f} times; above {MAX_EPOCHS} epochs repeated tokens teach less and "
                    f"less (arXiv:2305.16264): add data, lower data.mix.{name} or take fewer steps"
                )
        return lines + warnings

    def _rows_of(self, name: str, packing: str) -> Rows:
        source = self.sources[name]
        if not isinstance(source, Source):
            return source.pack(self.length, self.seed)
        _check_enough(name, source, self.length)
        return make_rows(packing, source, self.length, self.seed)

    def _locate(self, row: int) -> tuple[int, int]:
        """Source of a row of the mixture, and which of that source's rows it is."""
        block, inside = divmod(row, BLOCK)
        which, ordinal = self._block(block)
        source = int(which[inside])
        nth = block * int(self.quota[source]) + int(ordinal[inside])
        epoch, index = divmod(nth, len(self.packed[source]))
        return source, int(self._order(source, epoch)[index])

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row of a block, and how many rows of that source came before it in the block."""
        which = np.repeat(np.arange(len(self.names)), self.quota)
        np.random.default_rng((self.seed, 0, block)).shuffle(which)
        ordinal = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quota):
            ordinal[which == source] = np.arange(quota)
        return which, ordinal

    def _shuffle(self, source: int, epoch: int) -> np.ndarray:
        """Order of a source's rows in an epoch. Keyed by the source's name, so that other sources do not change it."""
        name = int.from_bytes(self.names[source].encode(), "big")
        return (
            np.random.default_rng((self.seed, 1, name, epoch))
            .permutation(len(self.packed[source]))
            .astype(np.uint32)
        )


class TextLoader(PackedDataLoader):
    """Batches of packed rows from texts in order, in one process; training reads a store instead (see PackedDataLoader).

    dataset: texts, or rows with a text under text_column. tokenizer: of tokenizers or of transformers. Documents begin with
    bos (eos if there is no bos) and are packed end to end, tokenized on the fly. The last incomplete batch
    is dropped. Each iteration starts from the first text, if the dataset can be iterated again.
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
        self.dataset, self.length, self.batch_size = dataset, seq_len, batch_size
        self.text_column, self.encode = text_column, document_encoder(tokenizer)

    def __iter__(self) -> Iterator[Batch]:
        needed = self.batch_size * self.length
        tokens, doc_ids = np.empty(0, np.int64), np.empty(0, np.int32)
        for number, row in enumerate(self.dataset):
            ids = self.encode(row if isinstance(row, str) else row[self.text_column])
            tokens = np.concatenate([tokens, np.array(ids, np.int64)])
            doc_ids = np.concatenate([doc_ids, np.full(len(ids), number, np.int32)])
            while len(tokens) > needed:  # one more: the target of the last
                parts = (tokens[:needed], tokens[1 : needed + 1], doc_ids[:needed])
                shaped = [part.reshape(self.batch_size, self.length).copy() for part in parts]
                shaped[2] -= shaped[2][:, :1]  # in each row documents count from 0
                yield Batch(*map(torch.from_numpy, shaped))
                tokens, doc_ids = tokens[needed:], doc_ids[needed:]


def validation_batches(
    shards: Source,
    sequence_length: int,
    batch_size: int,
    rows: int | None,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """The first `rows` rows (default: all) of a held-out split, split over ranks; every rank gets equally many batches.

    Rows past the end are filled with ignored targets, so ranks make the same calls and every token is judged once.
    """
    whole = (len(shards) - 1) // sequence_length
    wanted = min(rows or whole, whole)
    if wanted < 1:
        raise ValueError(
            f"source {shards.folder.name} has {len(shards):,} held-out tokens, too few for one row of {sequence_length}; raise "
            "val_fraction in the recipe and run scripts.prepare_data again, add data, leave the source out of data.mix, or "
            "train without validation (validation.every=0)"
        )
    return row_batches(
        StreamRows(shards, sequence_length), sequence_length, batch_size, wanted, rank, world
    )


def row_batches(
    source: Rows, sequence_length: int, batch_size: int, rows: int, rank: int = 0, world: int = 1
) -> list[Batch]:
    """The first `rows` rows of a source, split over ranks; see validation_batches."""
    return list(stream_batches(source, sequence_length, batch_size, rows, rank, world))


def stream_batches(
    source: Rows, sequence_length: int, batch_size: int, rows: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The same, one batch in memory at a time."""
    for first in range(0, rows, batch_size * world):
        tokens = np.zeros((batch_size, sequence_length), dtype=np.int64)
        targets = np.full((batch_size, sequence_length), IGNORE, dtype=np.int64)
        doc_ids = np.zeros((batch_size, sequence_length), dtype=np.int32)
        for i in range(batch_size):
            row = first + rank * batch_size + i
            if row < rows:
                source.fill(row, tokens[i], targets[i], doc_ids[i])
        yield Batch(*(torch.from_numpy(part) for part in (tokens, targets, doc_ids)))


class Prefetcher:
    """A loader that has the next place ready: it is read in a thread while the current one trains, pinned for a GPU."""

    def __init__(self, loader: Loader, device: torch.device):
        self.loader, self.device, self.fingerprint = loader, device, loader.fingerprint
        cuda = (
            device.type == "cuda"
        )  # a new thread would pin memory through GPU 0, and open a context there
        start = (torch.cuda.set_device, (device,)) if cuda else (None, ())
        self.pool = ThreadPoolExecutor(1, "prefetch", *start)
        self.ahead: tuple[int, Future[Step]] | None = None

    @property
    def position(self) -> int:
        """The place after the last one that at() gave; 0 before the first."""
        return self.ahead[0] if self.ahead else 0

    def _load(self, batch_index: int) -> Step:
        step = self.loader.at(batch_index)
        if self.device.type == "cuda":
            step = step._replace(
                batches=[
                    type(batch)(*(part.pin_memory() for part in batch)) for batch in step.batches
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


def _check_enough(name: str, source: Source, length: int) -> None:
    """ValueError where a source does not fill a row."""
    if len(source) > length:
        return
    if isinstance(source, LongDocuments):
        raise ValueError(
            f"source {name} has {source.documents:,} documents of at least {source.minimum:,} tokens, {len(source):,} tokens "
            f"together, too few for one row of {length}; lower data.min_document_tokens.{name} or add data"
        )
    raise ValueError(
        f"source {name} has {len(source)} tokens, too few for one row of {length}; add data or shorten data.sequence_length"
    )


def _largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to weights that add up to total exactly."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]] += 1
    return counts
