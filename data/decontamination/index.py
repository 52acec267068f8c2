"""Find benchmark items in training text: index the items, then stream the training text once.

Texts are normalised and hashed by word. Each 5-gram that a document shares with an item aligns the
item with the document. The score is the share of the item's words that match in the alignment,
weighted by their information. A copy of 40 words scores the same alone and within a book. A changed
word lowers the score only by its weight. Memory: one batch of text.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decontamination.test_sets import Item
from data.decontamination.words import character_offsets, hash_words, ngrams
from files import parse_json, write_text

BATCH = 1 << 20  # characters of text scanned together
OVERHEAD = 64  # characters added to each text's length: bounds the number of texts in a batch
PIECE = 1 << 20  # characters; a longer document is scanned in overlapping pieces
MAX_WORD = 1000  # characters to search for a word boundary
FILTER_BITS = 64  # bits of the filter per n-gram
MIN_TOTAL = 1 << 12  # words; in a smaller test set, a word that occurs once has 12 bits
MAX_MATCHES = 1 << 20  # index positions that one batch may match without MAX_REPEATS
MAX_REPEATS = 64  # above MAX_MATCHES, each text looks up an n-gram at most this often
MAX_ALIGNED = 1 << 22  # item words aligned with text at once
EXCERPT = 200  # characters of a hit in the report


@dataclass(frozen=True)
class Settings:
    """Thresholds for a hit."""

    ngram: int = 5  # consecutive equal words that align an item with a document
    coverage: float = 0.65  # share of an item's information that a document must contain
    exact_ngram: int = 13  # consecutive equal words that suffice, the published convention
    # Shorter variants are not searched; below exact_ngram, only complete copies count.
    minimum_words: int = 8
    minimum_information: float = 60.0  # bits that must match; common phrases match in fewer
    common_items: int = 12  # an n-gram in more items than this is template text and is ignored
    minimum_run: int = 3  # consecutive equal words that count within an alignment
    slack: int = 10  # words inserted or deleted between two matching runs
    similarity: float = 0.5  # minimum Jaccard index of word pairs for similar rows


class Hit(NamedTuple):
    train_id: str
    test_set: str
    test_id: str
    score: float  # share of the item's information in the document
    span: tuple[int, int]  # character range in the training text
    rule: str  # exact, coverage, 13-gram or minhash
    excerpt: str  # start of the span's text
    source: str = ""  # source or file of the training text


def build_index(sets: dict[str, list[Item]], settings: Settings = Settings()) -> "Index":
    """Index named test sets. `too_short` of the index lists items without a searchable variant."""
    assert settings.ngram <= settings.minimum_words <= settings.exact_ngram
    names = list(sets)
    items: list[tuple[int, str, str]] = []
    texts: list[str] = []
    owner: list[int] = []  # item of each variant
    for number, name in enumerate(names):
        for item in sets[name]:
            variants = dict.fromkeys(item.variants)
            owner += [len(items)] * len(variants)
            items.append((number, item.id, max(item.variants, key=len, default="")[: 2 * EXCERPT]))
            texts += variants
    if not texts:
        raise ValueError("the test sets have no items; give at least one with text")
    chunks = [hash_words(texts[i : i + 1000]) for i in range(0, len(texts), 1000)]
    words = np.concatenate([hashes for hashes, _, _ in chunks])
    bounds = np.append(0, np.cumsum(np.concatenate([np.diff(ends) for _, _, ends in chunks])))
    item_of = np.array(owner, dtype=np.int32)
    variant_of = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(bounds))
    order, groups = _sort_into_groups(words)
    weights = np.empty(len(words), dtype=np.float32)
    weights[order] = -np.log2(np.bincount(groups) / max(MIN_TOTAL, len(words)))[groups]

    def item_counts(size: int, candidates: NDArray) -> tuple[NDArray, NDArray]:
        """Hash and item count of the n-gram at each candidate; 0 if it crosses a variant's end."""
        grams = np.zeros(len(words), dtype=np.uint64)
        frequency = np.zeros(len(words), dtype=np.int64)
        starts = candidates[candidates + size <= bounds[1:][variant_of[candidates]]]
        if len(starts):
            grams[starts] = ngrams(words, size)[starts]
            # Items are in order within the group of an n-gram; it counts once per item
            in_order, group = _sort_into_groups(grams[starts])
            new = (np.diff(group) > 0) | (np.diff(item_of[variant_of[starts[in_order]]]) != 0)
            frequency[starts[in_order]] = np.bincount(group[np.append(True, new)])[group]
        return grams, frequency

    grams, frequency = item_counts(settings.ngram, np.arange(len(words)))
    rare = (frequency > 0) & (frequency <= settings.common_items)
    weights[~_spread(rare, settings.ngram)] = 0  # words that occur only in template text
    # The shorter n-gram at the start of a template is at least as common: ngram <= exact_ngram
    common = np.flatnonzero(frequency > settings.common_items)
    template = item_counts(settings.exact_ngram, common)[1] > settings.common_items

    lengths = np.diff(bounds)
    information = np.bincount(variant_of, weights, minlength=len(texts))
    positions = (np.arange(len(words)) - bounds[:-1][variant_of]).astype(np.uint64)
    sums = np.append(np.uint64(0), np.cumsum(words * (2 * positions + 1)))
    text_hashes = sums[bounds[1:]] - sums[bounds[:-1]]
    _, inverse, copies = np.unique(text_hashes, return_inverse=True, return_counts=True)
    enough = (information >= settings.minimum_information) | (lengths >= settings.exact_ngram)
    unique = copies[inverse] <= settings.common_items
    searchable = (lengths >= settings.minimum_words) & enough & unique

    # Index the rare n-grams, and the rarest n-gram of each window without one that is not template
    indexed = rare.copy()
    windows = np.minimum(lengths, settings.exact_ngram)[variant_of]
    starts = np.flatnonzero(
        searchable[variant_of]
        & (np.arange(len(words)) + windows <= bounds[1:][variant_of])
        & ~template
    )
    rare_before = np.append(0, np.cumsum(rare))
    ends = starts + windows[starts] - settings.ngram + 1
    for start in starts[rare_before[ends] == rare_before[starts]].tolist():
        window = slice(start, start + int(windows[start]) - settings.ngram + 1)
        if not indexed[window].any():
            indexed[start + int(frequency[window].argmin())] = True
    places = np.flatnonzero(indexed & searchable[variant_of])
    places = places[np.argsort(grams[places], kind="stable")].astype(np.int32)
    distinct, first = np.unique(grams[places], return_index=True)

    bits = max(20, int(len(distinct) * FILTER_BITS - 1).bit_length())
    filter_bits = np.zeros(1 << bits, dtype=bool)
    filter_bits[distinct >> np.uint64(64 - bits)] = True
    arrays = {
        "words": words,
        "weights": weights,
        "template": template,
        "variant_of": variant_of,
        "bounds": bounds,
        "information": information.astype(np.float32),
        "item_of": item_of,
        "grams": distinct,
        "firsts": np.append(first, len(places)).astype(np.int64),
        "places": places,
        "filter": np.packbits(filter_bits, bitorder="little"),
    }
    checked = np.zeros(len(items), dtype=bool)
    checked[item_of[searchable]] = True
    too_short = {
        name: [items[i][1] for i in np.flatnonzero(~checked) if names[items[i][0]] == name]
        for name in names
    }
    return Index(settings, {name: len(sets[name]) for name in names}, too_short, arrays, items)


def _sort_into_groups(keys: NDArray) -> tuple[NDArray, NDArray]:
    """Return the stable order that sorts keys, and the group of each sorted key, from 0."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return order, np.append(0, np.cumsum(ordered[1:] != ordered[:-1]))[: len(keys)]


class Index:
    """Indexed test sets. A saved index is memory-mapped and pickled as its path for workers.

    sizes: number of items per set. too_short: ids of unsearchable items per set.
    """

    def __init__(
        self,
        settings: Settings,
        sizes: dict[str, int],
        too_short: dict[str, list[str]],
        arrays: dict[str, NDArray],
        items: list[tuple[int, str, str]] | None = None,
    ):
        self.settings, self.sizes, self.too_short, self.arrays = settings, sizes, too_short, arrays
        self.names = list(sizes)
        self.folder: Path | None = None
        if items is not None:
            self.items = items

    @cached_property
    def items(self) -> list[tuple[int, str, str]]:
        """(number of the set, id, start of the text) of each item; loaded at the first hit."""
        assert self.folder is not None
        return parse_json((self.folder / "items.json").read_text(encoding="utf-8"))

    def save(self, folder: Path) -> None:
        """Write the index as a folder, atomically."""
        scratch = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name, array in self.arrays.items():
            np.save(scratch / f"{name}.npy", array)
        header = {
            "settings": asdict(self.settings),
            "sizes": self.sizes,
            "too_short": self.too_short,
            "arrays": list(self.arrays),
        }
        write_text(scratch / "items.json", json.dumps(self.items))
        write_text(scratch / "index.json", json.dumps(header))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)

    @classmethod
    def load(cls, folder: Path, mmap: bool = True) -> "Index":
        """Load an index; ValueError if it is missing or of another version of this code."""
        try:
            header = parse_json((folder / "index.json").read_text(encoding="utf-8"))
            arrays = {
                name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None))
                for name in header["arrays"]
            }
            settings = Settings(**header["settings"])
            index = cls(settings, header["sizes"], header["too_short"], arrays)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} has no readable decontamination index; build it again"
            ) from error
        index.folder = folder
        return index

    def __reduce__(self):
        if self.folder is not None:
            return Index.load, (self.folder,)
        return Index, (self.settings, self.sizes, self.too_short, self.arrays, self.items)

    def scan(self, documents: Iterable[tuple[str, str]]) -> Iterator[Hit]:
        """Yield the hits in (id, text) documents, in order.

        An item that occurs twice gives two hits.
        """
        for _, group in groupby(self._scan(documents), key=lambda pair: pair[0]):
            yield from _merge([hit for _, hit in group])

    def _scan(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[int, Hit]]:
        batch: list[tuple[int, str, int, str]] = []  # document number, id, piece offset, piece
        size = 0
        for number, (train_id, text) in enumerate(documents):
            for offset, piece in _pieces(text, self.overlap):
                batch.append((number, train_id, offset, piece))
                size += len(piece) + OVERHEAD
                if size >= BATCH:
                    yield from self._scan_batch(batch)
                    batch, size = [], 0
        yield from self._scan_batch(batch)

    @cached_property
    def overlap(self) -> int:
        """Return the characters that adjacent pieces share: twice the longest item, 12 per word."""
        return 24 * int(np.diff(self.arrays["bounds"]).max())

    @cached_property
    def _shift(self) -> np.uint64:
        return np.uint64(64 - (8 * len(self.arrays["filter"])).bit_length() + 1)

    def _scan_batch(self, batch: list[tuple[int, str, int, str]]) -> Iterator[tuple[int, Hit]]:
        words, spots, bounds = hash_words([piece for *_, piece in batch])
        position, place = self._lookup(ngrams(words, self.settings.ngram), bounds)
        for text, item, score, first, last, rule in self._align(words, bounds, position, place):
            number, train_id, offset, piece = batch[text]
            begin, end = character_offsets(
                piece, spots[bounds[text] : bounds[text + 1]], first, last
            )
            set_number, test_id, _ = self.items[item]
            span = (offset + begin, offset + end)
            yield (
                number,
                Hit(
                    train_id,
                    self.names[set_number],
                    test_id,
                    round(score, 4),
                    span,
                    rule,
                    piece[begin:end][:EXCERPT],
                ),
            )

    def _lookup(self, grams: NDArray, bounds: NDArray) -> tuple[NDArray, NDArray]:
        """Return all pairs of words, of batch and index, at which a shared n-gram begins."""
        slots = grams >> self._shift
        offsets = (slots & np.uint64(7)).astype(np.uint8)
        bits = self.arrays["filter"][slots >> np.uint64(3)] >> offsets
        position = np.flatnonzero(bits & 1)
        known, firsts = self.arrays["grams"], self.arrays["firsts"]
        entry = np.minimum(np.searchsorted(known, grams[position]), len(known) - 1)
        equal = known[entry] == grams[position] if len(known) else np.zeros(0, dtype=bool)
        entry, position = entry[equal], position[equal]
        counts = firsts[entry + 1] - firsts[entry]
        if counts.sum() > MAX_MATCHES:  # very repetitive text: skip repeats beyond MAX_REPEATS
            text = np.searchsorted(bounds, position, side="right")
            order = np.lexsort((position, entry, text))
            selected = np.arange(len(order)) < MAX_REPEATS
            for key in (entry[order], text[order]):
                selected[MAX_REPEATS:] |= key[MAX_REPEATS:] != key[:-MAX_REPEATS]
            rows = np.sort(order[selected])
            entry, position, counts = entry[rows], position[rows], counts[rows]
        places = self.arrays["places"][_ranges(firsts[entry], counts)].astype(np.int64)
        return np.repeat(position, counts), places

    def _align(
        self, words: NDArray, bounds: NDArray, position: NDArray, index_word: NDArray
    ) -> Iterator[tuple[int, int, float, int, int, str]]:
        """Yield the hits as (document, item, score, first word, last word, rule), by document.

        A shared n-gram begins at word `position` of the batch and word `index_word` of the index.
        """
        arrays, settings = self.arrays, self.settings
        document = np.searchsorted(bounds, position, side="right") - 1
        inside = position + settings.ngram <= bounds[document + 1]
        position, index_word, document = position[inside], index_word[inside], document[inside]
        if not len(position):
            return
        # An alignment matches word i of the index with word i + shift of the batch
        shift_range = len(words) + len(arrays["words"]) + settings.slack + 1
        variant = arrays["variant_of"][index_word].astype(np.int64)
        keys = (document * len(arrays["item_of"]) + variant) * shift_range + (
            position - index_word + len(arrays["words"])
        )
        keys, first = np.unique(keys, return_index=True)
        variant, document, shift = variant[first], document[first], (position - index_word)[first]
        # Close alignments of a variant form one candidate
        new = np.append(True, np.diff(keys) > settings.slack)
        borders = np.append(np.flatnonzero(new), len(keys))
        # Aligned words before each candidate
        aligned = np.append(0, np.cumsum(np.diff(arrays["bounds"])[variant]))[borders]
        start = 0
        while start < len(borders) - 1:  # usually one iteration
            limit = aligned[start] + MAX_ALIGNED
            stop = max(start + 1, int(np.searchsorted(aligned, limit, side="right")) - 1)
            chunk = slice(borders[start], borders[stop])
            yield from self._score(
                words, bounds, variant[chunk], document[chunk], shift[chunk], new[chunk]
            )
            start = stop

    def _score(
        self,
        words: NDArray,
        bounds: NDArray,
        variant: NDArray,
        document: NDArray,
        shift: NDArray,
        new: NDArray,
    ) -> Iterator[tuple[int, int, float, int, int, str]]:
        """Score alignments of variants with documents. new: True if a candidate begins."""
        arrays, settings = self.arrays, self.settings
        begin = np.maximum(arrays["bounds"][variant], bounds[document] - shift)
        end = np.minimum(arrays["bounds"][variant + 1], bounds[document + 1] - shift)
        counts = end - begin
        aligned = _ranges(begin, counts)  # words of the index, concatenated over alignments
        equal = np.append(
            arrays["words"][aligned] == words[aligned + np.repeat(shift, counts)], False
        )
        edges = np.append(0, np.cumsum(counts))
        remaining = np.repeat(edges[1:], counts) - np.arange(len(aligned))  # in the alignment
        total = np.append(0, np.cumsum(equal[:-1]))
        matching = _spread(_runs(equal, remaining, settings.minimum_run), settings.minimum_run)
        long = _runs(equal, remaining, settings.exact_ngram) & ~arrays["template"][aligned]
        matched = np.add.reduceat(np.where(matching, arrays["weights"][aligned], 0), edges[:-1])
        lengths = np.diff(arrays["bounds"])[variant]
        complete = np.diff(total[edges]) == lengths
        has_long = np.logical_or.reduceat(long, edges[:-1])
        information = arrays["information"][variant]

        first = np.flatnonzero(new)
        enough = np.add.reduceat(matched, first) >= settings.coverage * information[first]
        short = lengths[first] < settings.exact_ngram
        any_complete = np.logical_or.reduceat(complete, first)
        candidates = np.flatnonzero(
            any_complete | (~short & (enough | np.logical_or.reduceat(has_long, first)))
        )
        stops = np.append(first[1:], len(new))
        for candidate in candidates:
            group = slice(first[candidate], stops[candidate])
            best = group.start + int(matched[group].argmax())
            if any_complete[candidate]:
                best = group.start + int(complete[group].argmax())
            start, length = int(arrays["bounds"][variant[best]]), int(lengths[best])
            near = [
                i
                for i in range(group.start, group.stop)
                if abs(shift[i] - shift[best]) <= length // 4 + settings.slack
            ]
            covered = np.zeros(length, dtype=bool)
            firsts, lasts = [], []
            for i in [best] if any_complete[candidate] else near:
                mask = matching[edges[i] : edges[i + 1]]
                covered[begin[i] - start : end[i] - start] |= mask
                positions = np.flatnonzero(mask)
                if not len(positions):
                    continue  # a hash collision of an n-gram
                firsts.append(int(begin[i] + positions[0] + shift[i]))
                lasts.append(int(begin[i] + positions[-1] + shift[i]))
            weights = arrays["weights"][start : start + length]
            score = float(weights[covered].sum()) / max(float(weights.sum()), 1e-9)
            # A repeated word, as in tables of numbers, adds no information.
            _, distinct = np.unique(
                arrays["words"][start : start + length][covered], return_index=True
            )
            matched_bits = float(weights[covered][distinct].sum())
            if any_complete[candidate]:
                rule, score = "exact", 1.0
            elif score >= settings.coverage and matched_bits >= settings.minimum_information:
                rule = "coverage"
            elif has_long[near].any() and matched_bits >= settings.minimum_information:
                rule = f"{settings.exact_ngram}-gram"
            else:
                continue
            offset = int(bounds[document[best]])
            yield (
                int(document[best]),
                int(arrays["item_of"][variant[best]]),
                score,
                min(firsts) - offset,
                max(lasts) - offset,
                rule,
            )


def cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Remove character ranges from a text, each widened to word boundaries."""
    result, position = "", 0
    for begin, end in [*sorted(spans), (len(text), len(text))]:
        while position < begin < len(text) and text[begin - 1].isalnum() and text[begin].isalnum():
            begin -= 1
        while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
            end += 1
        piece = text[position : max(position, begin)]
        if result and piece and result[-1].isspace() == piece[0].isspace():
            # Join words with exactly one space
            piece = piece.removeprefix(" ") if piece[0].isspace() else " " + piece
        result, position = result + piece, max(position, end)
    return result


def _pieces(text: str, overlap: int) -> Iterator[tuple[int, str]]:
    """Yield a text's pieces as (offset, piece), cut between words.

    Adjacent pieces share `overlap` characters.
    """

    def border(end: int) -> int:
        """Return the position after the last space before `end`; `end` without a space nearby."""
        nearby = range(end, max(0, end - MAX_WORD), -1)
        return next((i for i in nearby if text[i - 1].isspace()), end)

    begin = 0
    while len(text) - begin > PIECE + overlap:
        end = border(begin + PIECE + overlap)
        yield begin, text[begin:end]
        begin = border(end - overlap)
    yield begin, text[begin:]


def _merge(hits: list[Hit]) -> list[Hit]:
    """Merge one document's overlapping hits of an item into the best hit, with the joint span."""
    merged: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (hit.test_set, hit.test_id, hit.span)):
        last = merged[-1] if merged else None
        if last and last[1:3] == hit[1:3] and hit.span[0] < last.span[1]:
            better = max(last, hit, key=lambda hit: (hit.score, hit.rule == "exact"))
            merged[-1] = better._replace(
                span=(last.span[0], max(last.span[1], hit.span[1])), excerpt=last.excerpt
            )
        else:
            merged.append(hit)
    return sorted(merged, key=lambda hit: (hit.span, hit.test_set, hit.test_id))


def _ranges(first: NDArray, counts: NDArray) -> NDArray:
    """Concatenate ranges: counts[i] integers from first[i] on, for each i."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + counts, counts)


def _runs(equal: NDArray, remaining: NDArray, size: int) -> NDArray:
    """Return where runs of `size` equal words begin, as booleans.

    remaining: number of words to the end of the alignment; `equal` has one more element.
    """
    total = np.append(0, np.cumsum(equal))
    stop = np.minimum(np.arange(len(remaining)) + size, len(remaining))
    return (total[stop] - total[: len(remaining)] == size) & (remaining >= size)


def _spread(starts: NDArray, size: int) -> NDArray:
    """Mark every word of the n-grams that begin where `starts` is true."""
    spread = starts.copy()
    for i in range(1, size):
        spread[i:] |= starts[: len(starts) - i]
    return spread
