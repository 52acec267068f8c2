"""Hash the words of many texts to 64 bits, vectorised, and map words back to characters.

Texts have equal words if they differ only in case, accents, punctuation, layout or typographic form
(NFKD). Each character is normalised alone, so every word can be located in the original text.
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
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


class _Table(dict):
    """Code point -> its replacement: letters and digits, a space, or nothing."""

    def __missing__(self, code: int) -> str:
        self[code] = text = _normal(chr(code))
        return text


def _normal(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # soft hyphens, joiners, directions
        return ""
    plain = unicodedata.normalize("NFKD", character).casefold()
    letters = "".join(
        c if c.isalnum() else "" if unicodedata.category(c)[0] == "M" else " " for c in plain
    )
    if UNSPACED.search(plain) or unicodedata.decomposition(character).startswith(
        ("<super>", "<sub>", "<fraction>")
    ):
        # Each character is a word: 漢字 has two, x² equals x^2
        return " " + " ".join(letters) + " " if letters else ""
    return letters


TABLE = _Table()


def normalise(text: str) -> bytes:
    """Return the lower-case words in UTF-8; a space replaces every other character."""
    if not text.isascii():
        text = NON_ASCII.sub(lambda run: run.group().translate(TABLE), text)
    return text.encode().translate(ASCII)


def hash_words(texts: list[str]) -> tuple[NDArray, NDArray, NDArray]:
    """Hash all words of the texts.

    Returns word hashes, uint64 [W]; each word's begin and end in its normalised text in bytes,
    int64 [W, 2]; each text's range of words as bounds, int64 [texts + 1].
    """
    normalised = [normalise(text) for text in texts]
    data = np.frombuffer(b" ".join([b"", *normalised, b""]), dtype=np.uint8)
    begins = np.cumsum([1] + [len(text) + 1 for text in normalised])
    letter = data != 32
    edges = np.flatnonzero(letter[1:] != letter[:-1]) + 1
    spots = edges.reshape(-1, 2)
    bounds = np.searchsorted(spots[:, 0], begins)
    powers, inverse = _powers(1 << max(20, (len(data) - 1).bit_length()))
    # A polynomial of the bytes; differences give a word's polynomial
    sums = np.cumsum(data * powers[: len(data)])
    hashes = (sums[spots[:, 1] - 1] - sums[spots[:, 0] - 1]) * inverse[spots[:, 0]]
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes, spots - np.repeat(begins[:-1], np.diff(bounds))[:, None], bounds


def ngrams(words: NDArray, size: int) -> NDArray:
    """Return the hash of the n-gram that begins at each word, uint64 [W - size + 1]."""
    count = max(0, len(words) - size + 1)
    hashes = words[:count].copy()
    for i in range(1, size):
        hashes *= np.uint64(FACTOR)
        hashes += words[i : i + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes


def character_offsets(text: str, spots: NDArray, first: int, last: int) -> tuple[int, int]:
    """Return the character range of words `first` to `last` of a text.

    spots: the text's words from hash_words.
    """
    begin, end = int(spots[first, 0]), int(spots[last, 1])
    if text.isascii():
        return begin, end
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = np.ones(len(codes), dtype=np.int64)
    for i in np.flatnonzero(codes >= 128).tolist():
        lengths[i] = len(TABLE[int(codes[i])].encode())
    ends = np.cumsum(lengths)  # bytes up to and including each character
    start = int(np.searchsorted(ends, begin, side="right"))
    return start, int(np.searchsorted(ends, end, side="left")) + 1


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[NDArray, NDArray]:
    """Return the powers 0, 1, ... and 0, -1, ... of FACTOR modulo 2^64."""
    bases = (FACTOR, pow(FACTOR, -1, 1 << 64))
    powers, inverse = (
        np.cumprod(np.append(np.uint64(1), np.full(count - 1, base, dtype=np.uint64)))
        for base in bases
    )
    return powers, inverse
