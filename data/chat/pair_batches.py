"""Batches of preference pairs: chosen and rejected answers packed into rows with little padding.

Each answer with its prompt is a document. A step has a fixed number of pairs, which is its loss
denominator. A batch is a pure function of the batch index.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import manifest
from data.chat.preferences import ARRAYS
from data.chat.replay import ReplayConfig, ReplayRows
from data.dataloader import PackedDataLoader, Step, to_device
from data.packing import IGNORE, Source


class PairBatch(NamedTuple):
    """n pairs as 2n documents: n chosen, then n rejected.

    answer_positions: positions of each answer's tokens in the flat targets, padded with R * L.
    """

    tokens: Tensor  # [R, L] int64
    targets: Tensor  # [R, L] int64, IGNORE except for answers
    doc_ids: Tensor  # [R, L] int32
    answer_positions: Tensor  # [2n, longest answer] int64
    reference: Tensor  # [2n] fp32, log-probabilities of the answers under the reference model
    counted: Tensor  # [n] fp32, 0 for a padding pair, else 1
    # [n] fp32, weight of a chosen token in the SFT term: the step's pairs / its chosen tokens
    sft_weight_per_token: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(to_device(tensor, device) for tensor in self))


PairKey = tuple[str, int]  # source and index of a pair
# Returns this rank's batches, each with the keys of its counted pairs.
BatchFactory = Callable[[], Iterable[tuple[list[PairKey], "PairBatch"]]]
Reference = Callable[[list[PairKey], PairBatch], Tensor]  # [2n] fp32 for the pairs of a batch


class Pairs:
    """One split of a prepared source (preferences.py)."""

    def __init__(self, folder: Path, split: str):
        content = manifest.read(folder)
        assert content is not None, folder
        self.report, self.fingerprint = content["report"], content["sha256"][split]
        self.ids, self.starts, self.prompts = (
            np.load(folder / f"{split}.{array}.npy", mmap_mode="r") for array in ARRAYS
        )
        self.documents = 2 * len(self.prompts)
        self.answer_tokens = len(self.ids) - 2 * int(self.prompts.sum())  # of all pairs

    def __len__(self) -> int:
        """Return the number of input tokens; each answer's last token is only a target."""
        return len(self.ids) - self.documents

    def read(self, index: int) -> tuple[list[np.ndarray], int]:
        """Return the token ids of both documents, chosen first, and their prompt's length."""
        first, second, end = self.starts[2 * index : 2 * index + 3].tolist()
        chosen, rejected = self.ids[first:second], self.ids[second:end]
        return [chosen.astype(np.int64), rejected.astype(np.int64)], int(self.prompts[index])

    def chosen_tokens(self, index: int) -> int:
        """Return the number of tokens of a pair's chosen answer."""
        return int(self.starts[2 * index + 1] - self.starts[2 * index] - self.prompts[index])

    def tokens(self, index: int) -> int:
        """Return the number of input tokens of a pair's two documents."""
        return int(self.starts[2 * index + 2] - self.starts[2 * index]) - 2

    def pack(self, length: int, seed: int) -> "PairRows":
        return PairRows(self)


class PairRows:
    """Adapter: PackedDataLoader mixes and orders pairs like rows."""

    share = 1.0  # mixture weights count pairs

    def __init__(self, source: Pairs):
        self.source, self.tokens = source, source.tokens
        self.report = f"{len(self):,} pairs"

    def __len__(self) -> int:
        return len(self.source.prompts)

    def targets(self, index: int) -> int:
        return 1

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        raise AssertionError("pairs have no rows of a fixed length")


class PairLoader(PackedDataLoader):
    """Loads steps of `pairs` pairs from a mixture; each rank gets an equal contiguous share.

    micro_batch_size: pairs per micro-batch. multiple: row lengths are multiples of this. reference:
    None for zeros. text: see add_text.
    """

    text: ReplayRows | None = None
    text_share = 0.0  # share of the trained tokens

    def __init__(
        self,
        sources: dict[str, Pairs],
        mix: dict[str, float],
        length: int,
        pairs: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        multiple: int = 1,
        reference: Reference | None = None,
    ):
        if pairs % (world * micro_batch_size):
            raise ValueError(
                f"{pairs} pairs per step do not divide over {world} rank(s) with micro-batches of "
                f"{micro_batch_size}; change --batch_size (data.pairs_per_step), "
                "data.micro_batch_size (two rows per pair) or the world size"
            )
        super().__init__(sources, mix, length, pairs, micro_batch_size, seed, rank, world)
        self.pairs, self.multiple, self.reference = sources, multiple, reference

    def add_text(self, text: dict[str, Source], replay: ReplayConfig) -> None:
        """Add micro-batches of text to each step, about replay.share of its trained tokens."""
        mean = sum(
            int(quota) / self.quota.sum() * self.pairs[name].answer_tokens / len(rows)
            for name, quota, rows in zip(self.names, self.quota, self.packed, strict=True)
        )
        answers = mean * self.rows  # tokens of a step
        tokens = answers * replay.share / (1 - replay.share)
        shape = (tokens, self.length, self.seed, self.rank, self.world)
        self.text = ReplayRows(text, replay.mix, *shape)
        self.text_share = self.text.tokens / (self.text.tokens + answers)
        self.fingerprint += f" text={self.text.rows.fingerprint}"

    def at(self, batch_index: int) -> Step:
        """Return this rank's micro-batches of a step; the loss denominator is its pairs."""
        names = self._step_names(batch_index)
        tokens = sum(self.pairs[name].tokens(index) for name, index in names)
        batches: list[Any] = [batch for _, batch in self._rank_batches(names)]
        if self.text:
            largest = 2 * self.micro_batch_size * self.length
            text, text_tokens = self.text.at(batch_index, self.rows, largest)
            batches, tokens = batches + text, tokens + text_tokens
        return Step(batches, self.rows, tokens)

    def shares(self, first: int, last: int) -> dict[str, float]:
        """Return each source's share of the trained tokens in steps [first, last)."""
        counts = dict.fromkeys(self.names, 0)
        for name, index in (key for step in range(first, last) for key in self._step_names(step)):
            pairs = self.pairs[name]
            counts[name] += pairs.tokens(index) + 2 - 2 * int(pairs.prompts[index])
        text = (last - first) * self.text.tokens if self.text else 0
        total = max(1, text + sum(counts.values()))
        shares = {name: count / total for name, count in counts.items()}
        if self.text:
            of_text = self.text.rows.shares(first, last).items()
            shares |= {name: share * text / total for name, share in of_text}
        return shares

    def describe(self, steps: int) -> list[str]:
        """Return lines on the pairs and the text that `steps` steps read."""
        lines = super().describe(steps)
        if self.text:
            lines += [
                f"replayed text: {self.text.tokens:,} tokens a step in rows of "
                f"{self.text.length:,}, {self.text_share:.1%} of the trained tokens",
                *self.text.rows.describe(steps),
            ]
        return lines

    def steps(self, count: int) -> Iterator[tuple[list[PairKey], BatchFactory]]:
        """Yield all pairs of each of the first `count` steps, and a function of its batches."""
        for batch_index in range(count):
            names = self._step_names(batch_index)
            yield names, partial(self._rank_batches, names)

    def _step_names(self, batch_index: int) -> list[PairKey]:
        located = (
            self._locate(row)
            for row in range(batch_index * self.rows, (batch_index + 1) * self.rows)
        )
        return [(self.names[source], index) for source, index in located]

    def _rank_batches(self, step_names: list[PairKey]) -> Iterator[tuple[list[PairKey], PairBatch]]:
        chosen = sum(self.pairs[name].chosen_tokens(index) for name, index in step_names)
        sft_weight_per_token = self.rows / chosen
        share, size = self.rows // self.world, self.micro_batch_size
        for first in range(self.rank * share, (self.rank + 1) * share, size):
            names = step_names[first : first + size]
            batch = make_batch(
                self.pairs, names, sft_weight_per_token, self.length, self.multiple, self.reference
            )
            yield names, batch


def make_batch(
    pairs: dict[str, Pairs],
    names: list[PairKey],
    sft_weight_per_token: float,
    length: int,
    multiple: int = 1,
    reference: Reference | None = None,
    counted: int | None = None,
) -> PairBatch:
    """Return a batch of named pairs in rows of at most `length` tokens.

    counted: number of leading pairs that count; the rest are padding (default: all count).
    """
    arrays = [pairs[name].read(index) for name, index in names]
    documents = [(ids[side], prompt) for side in (0, 1) for ids, prompt in arrays]
    lengths = [len(ids) - 1 for ids, _ in documents]
    rows, width = assign_to_rows(lengths, length, multiple)
    shape = (len(rows), width)
    tokens, targets, doc_ids = (
        np.zeros(shape, np.int64),
        np.full(shape, IGNORE, np.int64),
        np.zeros(shape, np.int32),
    )
    longest = max(len(ids) - prompt for ids, prompt in documents)
    answer_positions = np.full((len(documents), longest), tokens.size, np.int64)
    for row, row_documents in enumerate(rows):
        start = 0
        for count, document in enumerate(row_documents):
            ids, prompt = documents[document]
            end = start + lengths[document]
            first = start + prompt - 1  # the token before the answer predicts its first token
            tokens[row, start:end], doc_ids[row, start:end] = ids[:-1], count
            targets[row, first:end] = ids[prompt:]
            answer_positions[document, : end - first] = row * width + np.arange(first, end)
            start = end
        doc_ids[row, start:] = len(row_documents)
    counts = np.zeros(len(names), np.float32)
    counts[:counted] = 1
    zeros = np.zeros(len(documents), np.float32)
    scale = np.full(len(names), sft_weight_per_token, np.float32)
    fields = (tokens, targets, doc_ids, answer_positions, zeros, counts, scale)
    batch = PairBatch(*map(torch.from_numpy, fields))
    return batch._replace(reference=reference(names, batch)) if reference else batch


def assign_to_rows(
    lengths: list[int], max_length: int, multiple: int = 1
) -> tuple[list[list[int]], int]:
    """Assign documents to rows; return the documents of each row and the row length.

    Each document, longest first, is placed in the emptiest row. Rows are nearly equal, little
    longer than the longest document and at most max_length tokens, so attention costs little.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for count in range(-(-sum(lengths) // lengths[order[0]]), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for document in order:
            row = filled.index(min(filled))
            rows[row].append(document)
            filled[row] += lengths[document]
        if max(filled) <= max_length:
            break
    return rows, min(max_length, -(-max(filled) // multiple) * multiple)


class ValidationPairs:
    """Batches of `size` pairs over all ranks: the first max_pairs of each validation split.

    Every rank gets the same number of batches; padding pairs do not count.
    """

    def __init__(
        self,
        pairs: dict[str, Pairs],
        max_pairs: int,
        size: int,
        length: int,
        rank: int = 0,
        world: int = 1,
        multiple: int = 1,
    ):
        self.pairs = {name: source for name, source in pairs.items() if source.documents}
        self.numbers = {
            name: min(max_pairs, len(source.prompts)) for name, source in self.pairs.items()
        }
        self.size, self.shape, self.rank, self.world = size, (length, multiple), rank, world

    def batches(self, reference: Reference | None = None) -> dict[str, tuple[list[PairBatch], int]]:
        """Return source -> (this rank's batches, number of pairs over all ranks)."""
        return {
            name: ([batch for _, batch in self._source_batches(name, reference)], number)
            for name, number in self.numbers.items()
        }

    def steps(self) -> Iterator[tuple[list[PairKey], BatchFactory]]:
        """Yield items like PairLoader.steps, once per source."""
        for name, number in self.numbers.items():
            yield [(name, index) for index in range(number)], partial(self._source_batches, name)

    def _source_batches(
        self, name: str, reference: Reference | None = None
    ) -> Iterator[tuple[list[PairKey], PairBatch]]:
        number, source = self.numbers[name], self.pairs[name]
        sft_weight_per_token = number / sum(source.chosen_tokens(index) for index in range(number))
        for first in range(0, number, self.size * self.world):
            start = first + self.rank * self.size
            indices = range(start, start + self.size)
            names = [(name, index if index < number else 0) for index in indices]
            counted = sum(index < number for index in indices)
            batch = make_batch(
                self.pairs, names, sft_weight_per_token, *self.shape, reference, counted
            )
            yield names[:counted], batch
