"""Preference pairs as batches: chosen and rejected laid end to end into rows, each a document of its own, hardly any padding.

A step has a fixed number of pairs, which is what its summed loss is divided by; a batch is a pure function of its place.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import manifest
from data.chat.preferences import PARTS
from data.dataloader import PackedDataLoader, Step
from data.packing import IGNORE


class PairBatch(NamedTuple):
    """n pairs, as 2n documents: first the n chosen, then the n rejected."""

    tokens: Tensor  # [R, L] int64
    targets: Tensor  # [R, L] int64, IGNORE but for the answers
    doc_ids: Tensor  # [R, L] int32
    places: Tensor  # [2n, longest answer] int64, where in the flat targets each answer's tokens are; R * L fills up
    reference: Tensor  # [2n] fp32, log-probabilities of the answers under the reference model
    counted: Tensor  # [n] fp32, 1; 0 for a pair that only fills up
    per_token: Tensor  # [n] fp32, pairs of the whole step for each token of its chosen answers

    def to(self, device: torch.device) -> "PairBatch":
        return PairBatch(*(part.to(device, non_blocking=True) for part in self))


Name = tuple[str, int]  # source, and which of its pairs
Make = Callable[
    [], Iterable[tuple[list[Name], "PairBatch"]]
]  # batches of this rank, and the pairs of each that count
Reference = Callable[[list[Name], PairBatch], Tensor]  # [2n] fp32 for the pairs of a batch


class Pairs:
    """One split of a prepared source (preferences.py)."""

    def __init__(self, folder: Path, split: str):
        content = manifest.read(folder)
        assert content is not None, folder
        self.report, self.fingerprint = content["report"], content["sha256"][split]
        self.ids, self.starts, self.prompts = (
            np.load(folder / f"{split}.{part}.npy", mmap_mode="r") for part in PARTS
        )
        self.documents = 2 * len(self.prompts)

    def __len__(self) -> int:
        """Tokens, each answer's last one left out, which is only a target."""
        return len(self.ids) - self.documents

    def read(self, index: int) -> tuple[list[np.ndarray], int]:
        """Ids of a pair, chosen and rejected, and the length of their prompt."""
        first, second, end = self.starts[2 * index : 2 * index + 3].tolist()
        return [
            self.ids[first:second].astype(np.int64),
            self.ids[second:end].astype(np.int64),
        ], int(self.prompts[index])

    def chosen_tokens(self, index: int) -> int:
        return int(self.starts[2 * index + 1] - self.starts[2 * index] - self.prompts[index])

    def tokens(self, index: int) -> int:
        """Of both documents, without their last tokens."""
        return int(self.starts[2 * index + 2] - self.starts[2 * index]) - 2

    def pack(self, length: int, seed: int) -> "PairRows":
        return PairRows(self)


class PairRows:
    """Pairs in the place of a PackedSource's rows, so that the mixture and its order are PackedDataLoader's."""

    share = 1.0  # a mixture of pairs is by pairs

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
    """Steps of `pairs` pairs over all ranks from a mixture of sources; rank r of world gets an equal contiguous part of them.

    micro_batch_size: pairs at once. multiple: of which rows' length is one. reference: None for zeros.
    """

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
                f"{pairs} pairs a step do not divide over {world} rank(s) with micro-batches of {micro_batch_size}; "
                "change --batch_size (data.pairs_per_step), data.micro_batch_size (two rows a pair) or the number of ranks"
            )
        super().__init__(sources, mix, length, pairs, micro_batch_size, seed, rank, world)
        self.pairs, self.multiple, self.reference = sources, multiple, reference

    def at(self, batch_index: int) -> Step:
        """This rank's micro-batches of step `place` >= 0; the weight is the pairs of the whole step."""
        of_step = self._of_step(batch_index)
        tokens = sum(self.pairs[name].tokens(index) for name, index in of_step)
        batches = [batch for _, batch in self._mine(of_step)]
        return Step(batches, self.rows, tokens)  # type: ignore[arg-type]  # the loop and the Prefetcher take any batch

    def steps(self, count: int) -> Iterator[tuple[list[Name], Make]]:
        """Of the first steps, the pairs over all ranks, and what makes the batches of this one."""
        for batch_index in range(count):
            of_step = self._of_step(batch_index)
            yield of_step, partial(self._mine, of_step)

    def _of_step(self, batch_index: int) -> list[Name]:
        located = (
            self._locate(row)
            for row in range(batch_index * self.rows, (batch_index + 1) * self.rows)
        )
        return [(self.names[source], index) for source, index in located]

    def _mine(self, of_step: list[Name]) -> Iterator[tuple[list[Name], PairBatch]]:
        per_token = self.rows / sum(
            self.pairs[name].chosen_tokens(index) for name, index in of_step
        )
        share, size = self.rows // self.world, self.micro_batch_size
        for first in range(self.rank * share, (self.rank + 1) * share, size):
            names = of_step[first : first + size]
            yield (
                names,
                make_batch(
                    self.pairs, names, per_token, self.length, self.multiple, self.reference
                ),
            )


def make_batch(
    pairs: dict[str, Pairs],
    names: list[Name],
    per_token: float,
    length: int,
    multiple: int = 1,
    reference: Reference | None = None,
    counted: int | None = None,
) -> PairBatch:
    """The batch of named pairs in rows of at most `length` tokens; the first `counted` of them count (default: all)."""
    read = [pairs[name].read(index) for name, index in names]
    documents = [(ids[which], prompt) for which in (0, 1) for ids, prompt in read]
    lengths = [len(ids) - 1 for ids, _ in documents]
    rows, width = lay_out(lengths, length, multiple)
    shape = (len(rows), width)
    tokens, targets, doc_ids = (
        np.zeros(shape, np.int64),
        np.full(shape, IGNORE, np.int64),
        np.zeros(shape, np.int32),
    )
    longest = max(len(ids) - prompt for ids, prompt in documents)
    places = np.full((len(documents), longest), tokens.size, np.int64)
    for row, inside in enumerate(rows):
        at = 0
        for count, document in enumerate(inside):
            ids, prompt = documents[document]
            end, first = (
                at + lengths[document],
                at + prompt - 1,
            )  # the token before the answer predicts its first
            tokens[row, at:end], doc_ids[row, at:end], targets[row, first:end] = (
                ids[:-1],
                count,
                ids[prompt:],
            )
            places[document, : end - first] = row * width + np.arange(first, end)
            at = end
        doc_ids[row, at:] = len(inside)
    counts = np.zeros(len(names), np.float32)
    counts[:counted] = 1
    zeros, scale = np.zeros(len(documents), np.float32), np.full(len(names), per_token, np.float32)
    batch = PairBatch(
        *(
            torch.from_numpy(part)
            for part in (tokens, targets, doc_ids, places, zeros, counts, scale)
        )
    )
    return batch._replace(reference=reference(names, batch)) if reference else batch


def lay_out(lengths: list[int], most: int, multiple: int = 1) -> tuple[list[list[int]], int]:
    """Documents of each row, and how long rows are: hardly longer than the longest document, and at most `most`.

    Each document goes, longest first, where there is most room, so rows end nearly even. Attention that looks at whole rows
    has no long ones to look at.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for count in range(-(-sum(lengths) // lengths[order[0]]), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for document in order:
            row = filled.index(min(filled))
            rows[row].append(document)
            filled[row] += lengths[document]
        if max(filled) <= most:
            break
    return rows, min(most, -(-max(filled) // multiple) * multiple)


class HeldOutPairs:
    """The first `most` pairs of each held-out split, in batches of `size` pairs split over ranks.

    Every rank gets equally many batches; what fills the last ones up does not count.
    """

    def __init__(
        self,
        pairs: dict[str, Pairs],
        most: int,
        size: int,
        length: int,
        rank: int = 0,
        world: int = 1,
        multiple: int = 1,
    ):
        self.pairs = {name: source for name, source in pairs.items() if source.documents}
        self.numbers = {name: min(most, len(source.prompts)) for name, source in self.pairs.items()}
        self.size, self.shape, self.rank, self.world = size, (length, multiple), rank, world

    def batches(self, reference: Reference | None = None) -> dict[str, tuple[list[PairBatch], int]]:
        """By source, the batches of this rank and the number of pairs over all ranks."""
        return {
            name: ([batch for _, batch in self._of(name, reference)], number)
            for name, number in self.numbers.items()
        }

    def steps(self) -> Iterator[tuple[list[Name], Make]]:
        """As PairLoader.steps, one a source."""
        for name, number in self.numbers.items():
            yield [(name, index) for index in range(number)], partial(self._of, name)

    def _of(
        self, name: str, reference: Reference | None = None
    ) -> Iterator[tuple[list[Name], PairBatch]]:
        number, source = self.numbers[name], self.pairs[name]
        per_token = number / sum(source.chosen_tokens(index) for index in range(number))
        for first in range(0, number, self.size * self.world):
            mine = range(first + self.rank * self.size, first + (self.rank + 1) * self.size)
            names = [(name, index if index < number else 0) for index in mine]
            counted = sum(index < number for index in mine)
            yield (
                names[:counted],
                make_batch(self.pairs, names, per_token, *self.shape, reference, counted),
            )
