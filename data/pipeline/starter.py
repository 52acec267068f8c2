"""Choose a starter recipe for a user's text: validation share, vocabulary, filters, steps.

scripts/new_recipe.py writes the files. The rules and their sources are in docs/own_data.md.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models

from data import manifest
from data.pipeline.recipe import Split
from data.tokenizers.bpe import sample_texts, train_tokenizer
from files import parse_object

FRACTIONS = (0.02, 0.05, 0.1, 0.2)  # validation shares; the first that suffices is used
LEAST_HELD_OUT = 20_000  # bytes of each source: 16 rows of 256 tokens of up to 5 bytes
MOST_HELD_OUT = 0.3  # of a source's bytes: our judgement
LEAST_BYTES = 100_000  # minimum bytes of all text; less has no visible effect: our judgement
LARGE = 100_000_000  # minimum bytes to filter text and search it for benchmark items: our judgement
PIECES = 50  # documents into which a source's text files are cut if they are too few
PIECE_CHARS = (1_000, 20_000)  # shortest and longest of these documents

VOCABULARIES = (512, 1024, 2048, 4096)  # the quickstart's model has the last
SAMPLE = 2_000_000  # bytes of text that vocabularies are compared on
# Choose the largest BPE vocabulary in which this share of the tokens occurs this often in the text
# (Gowda and May, arXiv:2004.02334).
FREQUENT_SHARE, FREQUENT = 0.95, 100

MAX_EPOCHS = 4  # up to here, repeated tokens are nearly as good as new tokens (arXiv:2305.16264)
LEAST_STEPS = 40  # our judgement


class SourceSize(NamedTuple):
    """Text of a source: in total, and held out at each of FRACTIONS."""

    documents: int
    size: int  # UTF-8 bytes
    held_out: tuple[tuple[int, int], ...]  # (documents, bytes)

    def suffices(self, number: int) -> bool:
        """Return True if fraction `number` gives enough text for both validation and training."""
        return LEAST_HELD_OUT <= self.held_out[number][1] <= MOST_HELD_OUT * self.size

    def choices(self) -> int:
        """Return how many of FRACTIONS suffice."""
        return sum(self.suffices(number) for number in range(len(FRACTIONS)))


class Vocabulary(NamedTuple):
    """A vocabulary and the figures that it was chosen by."""

    size: int
    bytes_per_token: float
    frequent: float  # share of its tokens that occur FREQUENT times in the training text


def source_texts(store: Path, source: str) -> Iterator[tuple[str, str]]:
    """Yield the ids and texts of a source's documents."""
    from data.pipeline.steps import read_documents  # slow: datatrove

    folder = store / "documents" / source
    record = manifest.read(folder)
    assert record is not None
    for part in record["parts"]:
        for document in read_documents(folder / part["name"]):
            yield document.id, document.text


def source_size(documents: Iterable[tuple[str, str]]) -> SourceSize:
    """Measure documents, given as id and text."""
    splits = [Split(fraction) for fraction in FRACTIONS]
    held_out = [[0, 0] for _ in FRACTIONS]
    count = size = 0
    for document_id, text in documents:
        length = len(text.encode())
        count, size = count + 1, size + length
        for number, split in enumerate(splits):
            if split.of(document_id) == "val":
                held_out[number][0] += 1
                held_out[number][1] += length
    return SourceSize(count, size, tuple((documents, size) for documents, size in held_out))


def choose_fraction(sizes: Sequence[SourceSize]) -> float | None:
    """Return the smallest of FRACTIONS that suffices for every source; None if none does."""
    for number, fraction in enumerate(FRACTIONS):
        if all(size.suffices(number) for size in sizes):
            return fraction
    return None


def piece_chars(size: int) -> int:
    """Return the document length for cutting text files of `size` bytes in total."""
    shortest, longest = PIECE_CHARS
    return min(longest, max(shortest, size // PIECES // 1000 * 1000))


def choose_vocabulary(
    sources: Sequence[Iterable[str]], size: int, vocab_size: int | None = None
) -> Vocabulary:
    """Return the largest of VOCABULARIES with enough frequent tokens, or the smallest.

    sources: training texts per source, `size` bytes in total; a sample is read. vocab_size: use and
    measure this size. ValueError if the texts do not yield enough tokens.
    """
    texts = list(sample_texts(sources, SAMPLE))
    tokenizer = _largest_tokenizer(texts, (vocab_size,) if vocab_size else VOCABULARIES[::-1])
    words: Counter[str] = Counter()
    for text in texts:
        assert tokenizer.pre_tokenizer is not None
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    largest = tokenizer.get_vocab_size()
    candidates = [candidate for candidate in VOCABULARIES if candidate < largest]
    for candidate in (largest, *([] if vocab_size else reversed(candidates))):
        vocabulary = _measured(tokenizer, candidate, words, size)
        if vocabulary.frequent >= FREQUENT_SHARE:
            break
    return vocabulary


def _largest_tokenizer(texts: Sequence[str], candidates: Sequence[int]) -> Tokenizer:
    """Train the first vocabulary for which there is enough text."""
    for candidate in candidates[:-1]:
        with suppress(ValueError):
            return train_tokenizer(texts, candidate)
    return train_tokenizer(texts, candidates[-1])


def _measured(tokenizer: Tokenizer, size: int, words: Counter[str], total: int) -> Vocabulary:
    """Measure the first `size` tokens of a BPE vocabulary, whose merges are in training order.

    words: words of a sample, with their counts. total: bytes of the training text.
    """
    content = parse_object(tokenizer.to_str())["model"]
    vocabulary = {token: index for token, index in content["vocab"].items() if index < size}
    merges = [(left, right) for left, right in content["merges"] if left + right in vocabulary]
    model = models.BPE(vocab=vocabulary, merges=merges)
    counts: Counter[int] = Counter()
    for word, count in words.items():
        for token in model.tokenize(word):
            counts[token.id] += count
    # Every vocabulary has the bytes and special tokens, frequent or not; one character is one byte.
    special = tokenizer.get_added_tokens_decoder()
    learned = [
        index for token, index in vocabulary.items() if len(token) > 1 and index not in special
    ]
    sampled = sum(len(word) * count for word, count in words.items())
    scale = max(1.0, total / max(1, sampled))
    frequent = sum(counts[index] * scale >= FREQUENT for index in learned)
    return Vocabulary(size, sampled / max(1, sum(counts.values())), frequent / max(1, len(learned)))


def choose_steps(tokens: float, tokens_per_step: int, limit: int) -> int:
    """Return the steps of MAX_EPOCHS epochs, at most `limit` but at least LEAST_STEPS."""
    return max(LEAST_STEPS, min(limit, int(MAX_EPOCHS * tokens / tokens_per_step)))
