"""Words of texts as 64-bit hashes, vectorised over many documents, and the way back from a word to its characters.

Two texts have the same words if they differ in case, accents, punctuation, layout or typographic form (NFKD) only. Each
character is normalised by itself, so the place of every word in the original text can be found again.
"""

import re
import unicodedata
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NON_ASCII = re.compile(r"[^\x00-\x7f]+")
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
ASCII = bytes(
    byte if byte >= 128 or chr(byte).isalnum() else 32 for byte in bytes(range(256)).lower()
)
# scripts written without spaces: kana, Han and its extensions; Thai, Lao, Myanmar, Khmer
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class _Table(dict):
    """Code point -> what stands in its place: letters and digits, a space, or nothing."""

    def __missing__(self, code: int) -> str:
        self[code] = text = _normal(chr(code))
        return text


def _normal(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # soft hyphens, joiners, directions
        return ""
    plain = unicodedata.normalize("NFKD", character).casefold()
    kept = "".join(
        c if c.isalnum() else "" if unicodedata.category(c)[0] == "M" else " " for c in plain
    )
    if UNSPACED.search(plain) or unicodedata.decomposition(character).startswith(
        ("<super>", "<sub>", "<fraction>")
    ):
        return (
            " " + " ".join(kept) + " " if kept else ""
        )  # each a word: 漢字 is two, x² is what x^2 is
    return kept


TABLE = _Table()


def normalise(text: str) -> bytes:
    """Words in lower case with spaces in place of everything else, in UTF-8."""
    if not text.isascii():
        text = NON_ASCII.sub(lambda run: run.group().translate(TABLE), text)
    return text.encode().translate(ASCII)


def hash_words(texts: list[str]) -> tuple[NDArray, NDArray, NDArray]:
    """Hashes of all words of texts, uint64 [W]; where each begins and ends in its normalised text in bytes, int64 [W, 2];
    the bounds of texts in these, int64 [texts + 1]."""
    parts = [normalise(text) for text in texts]
    data = np.frombuffer(b" ".join([b"", *parts, b""]), dtype=np.uint8)
    begins = np.cumsum([1] + [len(part) + 1 for part in parts])
    letter = data != 32
    edges = np.flatnonzero(letter[1:] != letter[:-1]) + 1
    spots = edges.reshape(-1, 2)
    bounds = np.searchsorted(spots[:, 0], begins)
    powers, inverse = _powers(1 << max(20, (len(data) - 1).bit_length()))
    sums = np.cumsum(
        data * powers[: len(data)]
    )  # a polynomial of the bytes; of a word, by difference
    hashes = (sums[spots[:, 1] - 1] - sums[spots[:, 0] - 1]) * inverse[spots[:, 0]]
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes, spots - np.repeat(begins[:-1], np.diff(bounds))[:, None], bounds


def ngrams(words: NDArray, size: int) -> NDArray:
    """Hash of the n-gram that begins at each word, uint64 [W - size + 1], in every bit of which all its words take part."""
    count = max(0, len(words) - size + 1)
    hashes = words[:count].copy()
    for i in range(1, size):
        hashes *= np.uint64(FACTOR)
        hashes += words[i : i + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes


def character_offsets(text: str, spots: NDArray, first: int, last: int) -> tuple[int, int]:
    """Characters of text from the beginning of its word `first` to the end of its word `last`, given the text's spots."""
    begin, end = int(spots[first, 0]), int(spots[last, 1])
    if text.isascii():
        return begin, end
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = np.ones(len(codes), dtype=np.int64)
    for i in np.flatnonzero(codes >= 128).tolist():
        lengths[i] = len(TABLE[int(codes[i])].encode())
    ends = np.cumsum(lengths)  # bytes up to and with each character
    return int(np.searchsorted(ends, begin, side="right")), int(
        np.searchsorted(ends, end, side="left")
    ) + 1


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[NDArray, NDArray]:
    """FACTOR to the power of 0, 1, ..., and of 0, -1, ..., modulo 2^64."""
    bases = (FACTOR, pow(FACTOR, -1, 1 << 64))
    powers, inverse = (
        np.cumprod(np.append(np.uint64(1), np.full(count - 1, base, dtype=np.uint64)))
        for base in bases
    )
    return powers, inverse
