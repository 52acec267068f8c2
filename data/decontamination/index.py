"""Find items of evaluation sets in training text: the test side is indexed, the training side streamed past it once.

Texts are normalised and cut into hashed words. Every 5-gram that a document shares with an item lays the item over the
document; words that then stand in the same places, weighted by their information, are the score. So a copy of 40 words in
a book counts like one alone, and a word changed here and there costs no more than that word. Memory: one batch of text.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decontamination.test_sets import Item
from data.decontamination.words import character_offsets, hash_words, ngrams

BATCH = 1 << 20  # characters of text scanned together
OVERHEAD = 64  # characters that a text counts for beyond its own, so that a batch is not of millions of empty ones
PIECE = 1 << 20  # characters; a longer document is scanned in pieces that overlap
WORD = 1000  # characters in which a border between words is looked for
LOAD = 64  # bits of the filter for each n-gram
SMALL = (
    1 << 12
)  # words; in a test set of fewer, a word that stands there once is worth 12 bits all the same
MANY = 1 << 20  # places of the index that one batch may point to before ...
OVERLAID = 1 << 22  # words of items laid over text at once
OFTEN = 64  # ... an n-gram is looked up so often only in each text
MAX_LISTED_IDS = 50  # training ids that a report lists
EXCERPT = 200  # characters of a hit that are kept for the report


@dataclass(frozen=True)
class Settings:
    """When a document holds an item."""

    ngram: int = 5  # words that must agree in a row before an item is looked at
    coverage: float = 0.65  # share of an item's information that a document must hold
    exact_ngram: int = (
        13  # so many words in a row are a hit by themselves, the published convention
    )
    minimum_words: int = (
        8  # shorter variants are not judged; below exact_ngram they count only when whole
    )
    minimum_information: float = (
        60.0  # bits that must agree; less is what common phrases agree in by chance
    )
    common_items: int = 12  # what stands in more items than this is template text, and no evidence
    minimum_run: int = 3  # words in a row that count once an item is laid over a document
    slack: int = 10  # words put in or left out between two matching parts
    similarity: float = 0.5  # Jaccard index of word pairs from which a short row is like an item


class Hit(NamedTuple):
    train_id: str
    test_set: str
    test_id: str
    score: float  # share of the item's information found
    span: tuple[int, int]  # characters of the training text
    rule: str  # exact, coverage, 13-gram or minhash
    excerpt: str  # of the training text, from the span's start
    source: str = ""  # or file, that the training text is of


def build_index(sets: dict[str, list[Item]], settings: Settings = Settings()) -> "Index":
    """Index test sets, by name. Items without a variant that can be judged are in `too_short` of the index."""
    assert settings.ngram <= settings.minimum_words <= settings.exact_ngram
    names = list(sets)
    items: list[tuple[int, str, str]] = []
    texts: list[str] = []
    owner: list[int] = []  # item of each variant
    for which, name in enumerate(names):
        for item in sets[name]:
            variants = dict.fromkeys(item.variants)
            owner += [len(items)] * len(variants)
            items.append((which, item.id, max(item.variants, key=len, default="")[: 2 * EXCERPT]))
            texts += variants
    if not texts:
        raise ValueError("the test sets hold no items; give at least one with text")
    hashed = [hash_words(texts[i : i + 1000]) for i in range(0, len(texts), 1000)]
    words = np.concatenate([part[0] for part in hashed])
    bounds = np.append(0, np.cumsum(np.concatenate([np.diff(part[2]) for part in hashed])))
    item_of = np.array(owner, dtype=np.int32)
    variant_of = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(bounds))
    _, kinds, counts = np.unique(words, return_inverse=True, return_counts=True)
    weights = -np.log2(counts / max(SMALL, len(words)))[kinds].astype(np.float32)

    def item_counts(size: int) -> tuple[NDArray, NDArray]:
        """Of the n-gram that begins at each word: its hash, and in how many items it stands (0: crosses a variant's end)."""
        found = np.zeros(len(words), dtype=np.uint64)
        frequency = np.zeros(len(words), dtype=np.int64)
        starts = np.flatnonzero(np.arange(len(words)) + size <= bounds[1:][variant_of])
        if len(starts):
            found[starts] = ngrams(words, size)[starts]
            distinct, which = np.unique(found[starts], return_inverse=True)
            pairs = np.sort(which * len(items) + item_of[variant_of[starts]])
            pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])] // len(
                items
            )  # each n-gram once an item
            frequency[starts] = np.bincount(pairs, minlength=len(distinct))[which]
        return found, frequency

    grams, frequency = item_counts(settings.ngram)
    rare = (frequency > 0) & (frequency <= settings.common_items)
    weights[~_spread(rare, settings.ngram)] = 0  # words that stand in template text only
    template = item_counts(settings.exact_ngram)[1] > settings.common_items

    lengths, information = np.diff(bounds), np.zeros(len(texts))
    np.add.at(information, variant_of, weights)
    whole = np.zeros(len(texts), dtype=np.uint64)
    np.add.at(
        whole,
        variant_of,
        words * (2 * (np.arange(len(words)) - bounds[:-1][variant_of]) + 1).astype(np.uint64),
    )
    _, same, copies = np.unique(whole, return_inverse=True, return_counts=True)
    enough = (information >= settings.minimum_information) | (lengths >= settings.exact_ngram)
    judged = (lengths >= settings.minimum_words) & enough & (copies[same] <= settings.common_items)

    posted = (
        rare.copy()
    )  # and where a stretch has no rare n-gram, but is no template as a whole, its rarest
    scheduled = np.minimum(lengths, settings.exact_ngram)[variant_of]
    starts = np.flatnonzero(
        judged[variant_of]
        & (np.arange(len(words)) + scheduled <= bounds[1:][variant_of])
        & ~template
    )
    before = np.append(0, np.cumsum(rare))
    for at in starts[
        before[starts + scheduled[starts] - settings.ngram + 1] == before[starts]
    ].tolist():
        inside = slice(at, at + int(scheduled[at]) - settings.ngram + 1)
        if not posted[inside].any():
            posted[at + int(frequency[inside].argmin())] = True
    places = np.flatnonzero(posted & judged[variant_of])
    places = places[np.argsort(grams[places], kind="stable")].astype(np.int32)
    distinct, first = np.unique(grams[places], return_index=True)

    bits = max(20, int(len(distinct) * LOAD - 1).bit_length())
    seen = np.zeros(1 << bits, dtype=bool)
    seen[distinct >> np.uint64(64 - bits)] = True
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
        "filter": np.packbits(seen, bitorder="little"),
    }
    checked = np.zeros(len(items), dtype=bool)
    checked[item_of[judged]] = True
    too_short = {
        name: [items[i][1] for i in np.flatnonzero(~checked) if names[items[i][0]] == name]
        for name in names
    }
    return Index(settings, {name: len(sets[name]) for name in names}, too_short, arrays, items)


class Index:
    """Test sets, indexed. One saved in a folder is memory-mapped by load, and pickled as its path: workers share it.

    sizes: items of each set. too_short: ids of items that cannot be judged, by set.
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
        """(number of the set, id, beginning of the text) of each item; read when the first hit asks for it."""
        assert self.folder is not None
        return json.loads((self.folder / "items.json").read_text(encoding="utf-8"))

    def save(self, folder: Path) -> None:
        """Write the index as a folder, by rename."""
        part = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, array in self.arrays.items():
            np.save(part / f"{name}.npy", array)
        (part / "items.json").write_text(json.dumps(self.items), encoding="utf-8")
        about = {
            "settings": asdict(self.settings),
            "sizes": self.sizes,
            "too_short": self.too_short,
            "arrays": list(self.arrays),
        }
        (part / "index.json").write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @classmethod
    def load(cls, folder: Path, mmap: bool = True) -> "Index":
        """The index of a folder; ValueError where there is none, or one of another version of this code."""
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            arrays = {
                name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None))
                for name in about["arrays"]
            }
            index = cls(Settings(**about["settings"]), about["sizes"], about["too_short"], arrays)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} holds no decontamination index that can be read; build it again"
            ) from error
        index.folder = folder
        return index

    def __reduce__(self):
        if self.folder is not None:
            return Index.load, (self.folder,)
        return Index, (self.settings, self.sizes, self.too_short, self.arrays, self.items)

    def scan(self, documents: Iterable[tuple[str, str]]) -> Iterator[Hit]:
        """Hits of (id, text) documents, in their order. An item that stands twice in a document is two hits."""
        for _, hits in groupby(self._scan(documents), key=lambda found: found[0]):
            yield from _merge([hit for _, hit in hits])

    def _scan(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[int, Hit]]:
        batch: list[
            tuple[int, str, int, str]
        ] = []  # number of the document, id, offset of the piece, the piece
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
        """Characters that pieces of a document share: twice the longest item, at a generous 12 characters a word."""
        return 24 * int(np.diff(self.arrays["bounds"]).max())

    @cached_property
    def _shift(self) -> np.uint64:
        return np.uint64(64 - (8 * len(self.arrays["filter"])).bit_length() + 1)

    def _scan_batch(self, batch: list[tuple[int, str, int, str]]) -> Iterator[tuple[int, Hit]]:
        words, spots, bounds = hash_words([piece for *_, piece in batch])
        at, place = self._lookup(ngrams(words, self.settings.ngram), bounds)
        for text, item, score, first, last, rule in self._judge(words, bounds, at, place):
            number, train_id, offset, piece = batch[text]
            begin, end = character_offsets(
                piece, spots[bounds[text] : bounds[text + 1]], first, last
            )
            which, test_id, _ = self.items[item]
            span = (offset + begin, offset + end)
            yield (
                number,
                Hit(
                    train_id,
                    self.names[which],
                    test_id,
                    round(score, 4),
                    span,
                    rule,
                    piece[begin:end][:EXCERPT],
                ),
            )

    def _lookup(self, grams: NDArray, bounds: NDArray) -> tuple[NDArray, NDArray]:
        """Word of the text and place in the index of every n-gram that both have; a text's n-gram can have many places."""
        slots = grams >> self._shift
        bits = self.arrays["filter"][slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(
            np.uint8
        )
        maybe = np.flatnonzero(bits & 1)
        known, firsts = self.arrays["grams"], self.arrays["firsts"]
        at = np.minimum(np.searchsorted(known, grams[maybe]), len(known) - 1)
        same = known[at] == grams[maybe] if len(known) else np.zeros(0, dtype=bool)
        at, maybe = at[same], maybe[same]
        counts = firsts[at + 1] - firsts[at]
        if counts.sum() > MANY:  # a text that says the same over and over
            text = np.searchsorted(bounds, maybe, side="right")
            order = np.lexsort((maybe, at, text))
            differs = (
                np.arange(len(order)) < OFTEN
            )  # from what stands OFTEN places before: this is no further repeat
            for key in (at[order], text[order]):
                differs[OFTEN:] |= key[OFTEN:] != key[:-OFTEN]
            kept = np.sort(order[differs])
            at, maybe, counts = at[kept], maybe[kept], counts[kept]
        return np.repeat(maybe, counts), self.arrays["places"][_ranges(firsts[at], counts)].astype(
            np.int64
        )

    def _judge(
        self, words: NDArray, bounds: NDArray, at: NDArray, place: NDArray
    ) -> Iterator[tuple[int, int, float, int, int, str]]:
        """(document, item, score, first word, last word, rule) of what is found, by document, from shared n-grams:
        word `at` of the batch begins what word `place` of the index does."""
        arrays, settings = self.arrays, self.settings
        document = np.searchsorted(bounds, at, side="right") - 1
        inside = at + settings.ngram <= bounds[document + 1]
        at, place, document = at[inside], place[inside], document[inside]
        if not len(at):
            return
        # A variant laid over a document so that word i of the index falls on word i + shift of the batch.
        shift_range = len(words) + len(arrays["words"]) + settings.slack + 1
        variant = arrays["variant_of"][place].astype(np.int64)
        keys = (document * len(arrays["item_of"]) + variant) * shift_range + (
            at - place + len(arrays["words"])
        )
        keys, where = np.unique(keys, return_index=True)
        variant, document, shift = variant[where], document[where], (at - place)[where]
        new = np.append(
            True, np.diff(keys) > settings.slack
        )  # overlays of a variant close to each other: one candidate
        borders = np.append(np.flatnonzero(new), len(keys))
        laid = np.append(0, np.cumsum(np.diff(arrays["bounds"])[variant]))[
            borders
        ]  # words, up to each candidate
        start = 0
        while start < len(borders) - 1:  # usually all at once
            stop = max(
                start + 1, int(np.searchsorted(laid, laid[start] + OVERLAID, side="right")) - 1
            )
            part = slice(borders[start], borders[stop])
            yield from self._weigh(
                words, bounds, variant[part], document[part], shift[part], new[part]
            )
            start = stop

    def _weigh(
        self,
        words: NDArray,
        bounds: NDArray,
        variant: NDArray,
        document: NDArray,
        shift: NDArray,
        new: NDArray,
    ) -> Iterator[tuple[int, int, float, int, int, str]]:
        """_judge's findings from overlays of variants over documents; new: where a candidate's first overlay is."""
        arrays, settings = self.arrays, self.settings
        begin = np.maximum(arrays["bounds"][variant], bounds[document] - shift)
        end = np.minimum(arrays["bounds"][variant + 1], bounds[document + 1] - shift)
        counts = end - begin
        overlaid = _ranges(begin, counts)  # words of the index, all overlays one after the other
        equal = np.append(
            arrays["words"][overlaid] == words[overlaid + np.repeat(shift, counts)], False
        )
        edges = np.append(0, np.cumsum(counts))
        left = np.repeat(edges[1:], counts) - np.arange(len(overlaid))  # words left in the overlay
        total = np.append(0, np.cumsum(equal[:-1]))
        kept = _spread(_runs(equal, left, settings.minimum_run), settings.minimum_run)
        long = _runs(equal, left, settings.exact_ngram) & ~arrays["template"][overlaid]
        matched = np.add.reduceat(np.where(kept, arrays["weights"][overlaid], 0), edges[:-1])
        lengths = np.diff(arrays["bounds"])[variant]
        whole = np.diff(total[edges]) == lengths
        has_long = np.logical_or.reduceat(long, edges[:-1])
        information = arrays["information"][variant]

        first = np.flatnonzero(new)
        enough = np.add.reduceat(matched, first) >= settings.coverage * information[first]
        short = lengths[first] < settings.exact_ngram
        any_whole = np.logical_or.reduceat(whole, first)
        candidates = np.flatnonzero(
            any_whole | (~short & (enough | np.logical_or.reduceat(has_long, first)))
        )
        stops = np.append(first[1:], len(new))
        for candidate in candidates:
            group = slice(first[candidate], stops[candidate])
            best = group.start + int(matched[group].argmax())
            if any_whole[candidate]:
                best = group.start + int(whole[group].argmax())
            start, length = int(arrays["bounds"][variant[best]]), int(lengths[best])
            near = [
                i
                for i in range(group.start, group.stop)
                if abs(shift[i] - shift[best]) <= length // 4 + settings.slack
            ]
            covered = np.zeros(length, dtype=bool)
            firsts, lasts = [], []
            for i in [best] if any_whole[candidate] else near:
                mask = kept[edges[i] : edges[i + 1]]
                covered[begin[i] - start : end[i] - start] |= mask
                ones = np.flatnonzero(mask)
                if not len(ones):
                    continue  # only the hash of an n-gram was the same
                firsts.append(int(begin[i] + ones[0] + shift[i]))
                lasts.append(int(begin[i] + ones[-1] + shift[i]))
            weights = arrays["weights"][start : start + length]
            score = float(weights[covered].sum()) / max(float(weights.sum()), 1e-9)
            _, once = np.unique(arrays["words"][start : start + length][covered], return_index=True)
            held = float(
                weights[covered][once].sum()
            )  # a word said twice, as in tables of numbers, tells no more
            if any_whole[candidate]:
                rule, score = "exact", 1.0
            elif score >= settings.coverage and held >= settings.minimum_information:
                rule = "coverage"
            elif has_long[near].any() and held >= settings.minimum_information:
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


def to_json(index: Index, hits: Iterable[Hit]) -> dict[str, Any]:
    """{"documents": {train_id: [hit, ...]}, "too_short": {test_set: [id, ...]}, "settings": {...}}"""
    documents: dict[str, list[dict]] = {}
    for hit in hits:
        entry = hit._asdict()
        documents.setdefault(entry.pop("train_id"), []).append({**entry, "span": list(hit.span)})
    return {
        "documents": documents,
        "too_short": index.too_short,
        "settings": {**asdict(index.settings), "test_sets": index.sizes},
    }


def report(index: Index, found: dict[str, Any], examples: int = 3) -> str:
    """What to_json says, in Markdown: a table of test sets, examples side by side, and the training ids that were hit."""
    entries = [(train_id, hit) for train_id, hits in found["documents"].items() for hit in hits]
    lines = [
        "| test set | items | checked | too short | items hit | training documents hit | rules |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in index.sizes.items():
        mine = [(train_id, hit) for train_id, hit in entries if hit["test_set"] == name]
        short = len(index.too_short[name])
        rules = Counter(hit["rule"] for _, hit in mine)
        counts = (
            size,
            size - short,
            short,
            len({hit["test_id"] for _, hit in mine}),
            len({train_id for train_id, _ in mine}),
        )
        told = ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common())
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} | {told or '-'} |")
    texts = (
        {(index.names[which], test_id): text for which, test_id, text in index.items}
        if entries
        else {}
    )
    for name in index.sizes:
        mine = sorted(
            ((train_id, hit) for train_id, hit in entries if hit["test_set"] == name),
            key=lambda pair: -pair[1]["score"],
        )
        if mine:
            lines += [
                "",
                f"### {name}",
                "",
                "| training document | score | in training | test item | in the test set |",
                "|---|---|---|---|---|",
            ]
        for train_id, hit in mine[:: max(1, len(mine) // examples)][:examples]:
            cells = (
                train_id,
                f"{hit['score']:.2f} {hit['rule']}",
                hit["excerpt"],
                hit["test_id"],
                texts[name, hit["test_id"]][:EXCERPT],
            )
            lines.append(
                "| "
                + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
                + " |"
            )
    for name in index.sizes:
        ids = sorted({train_id for train_id, hit in entries if hit["test_set"] == name})
        if ids:
            more = f" and {len(ids) - MAX_LISTED_IDS:,} more" if len(ids) > MAX_LISTED_IDS else ""
            lines += [
                "",
                f"Training documents that hold items of {name} ({len(ids):,}): {', '.join(ids[:MAX_LISTED_IDS])}{more}",
            ]
    return "\n".join(lines)


def cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Text without these spans of characters, each widened to the borders of words."""
    rest, at = "", 0
    for begin, end in [*sorted(spans), (len(text), len(text))]:
        while at < begin < len(text) and text[begin - 1].isalnum() and text[begin].isalnum():
            begin -= 1
        while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
            end += 1
        part = text[at : max(at, begin)]
        if (
            rest and part and rest[-1].isspace() == part[0].isspace()
        ):  # one space between words, not two and not none
            part = part.removeprefix(" ") if part[0].isspace() else " " + part
        rest, at = rest + part, max(at, end)
    return rest


def _pieces(text: str, overlap: int) -> Iterator[tuple[int, str]]:
    """A text in pieces that end between words, each with its offset; what fits into `overlap` is whole in one of them."""

    def border(at: int) -> int:
        """The end of the first space at or before a character; the character itself where none is near."""
        return next((i for i in range(at, max(0, at - WORD), -1) if text[i - 1].isspace()), at)

    begin = 0
    while len(text) - begin > PIECE + overlap:
        end = border(begin + PIECE + overlap)
        yield begin, text[begin:end]
        begin = border(end - overlap)
    yield begin, text[begin:]


def _merge(hits: list[Hit]) -> list[Hit]:
    """Hits of one document, each place and item once: the best of its variants, with a span over all that overlap."""
    kept: list[Hit] = []
    for hit in sorted(hits, key=lambda hit: (hit.test_set, hit.test_id, hit.span)):
        last = kept[-1] if kept else None
        if last and last[1:3] == hit[1:3] and hit.span[0] < last.span[1]:
            better = max(last, hit, key=lambda hit: (hit.score, hit.rule == "exact"))
            kept[-1] = better._replace(
                span=(last.span[0], max(last.span[1], hit.span[1])), excerpt=last.excerpt
            )
        else:
            kept.append(hit)
    return sorted(kept, key=lambda hit: (hit.span, hit.test_set, hit.test_id))


def _ranges(first: NDArray, counts: NDArray) -> NDArray:
    """first[0], first[0] + 1, ... counts[0] of them, then those of first[1], ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + counts, counts)


def _runs(equal: NDArray, left: NDArray, size: int) -> NDArray:
    """Where a run of `size` equal words begins. equal has one more element than left, the words left in each overlay."""
    total = np.append(0, np.cumsum(equal))
    stop = np.minimum(np.arange(len(left)) + size, len(left))
    return (total[stop] - total[: len(left)] == size) & (left >= size)


def _spread(starts: NDArray, size: int) -> NDArray:
    """Every word of the n-grams that begin where starts is true."""
    spread = starts.copy()
    for i in range(1, size):
        spread[i:] |= starts[: len(starts) - i]
    return spread
