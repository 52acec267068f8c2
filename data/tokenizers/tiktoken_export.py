"""Rank files, tiktoken's form of a byte-level BPE: the bytes of each token and its id, which is also the order of merging.

tokenizers merges given pairs in order, tiktoken any two neighbours that make a token, lowest id first. The two agree on every
piece of text if each token, merged from its bytes by lower ids alone, comes down to just two parts and that pair is its merge;
`merges_of` checks this token by token. Then, of whatever a piece is merged, a token is only ever made from its own pair.
"""

import json
import random
from base64 import b64decode, b64encode
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.manifest import file_hash, read_json

if TYPE_CHECKING:
    import tiktoken

RANKS, SETTINGS = "tokenizer.tiktoken", "tiktoken.json"


class Ranks(NamedTuple):
    pattern: str  # cuts text into pieces; both engines, Oniguruma (tokenizers) and fancy-regex (tiktoken), must read it alike
    ranks: dict[bytes, int]  # all 256 bytes and the tokens merged from them
    special: dict[str, int]

    def encoding(self, name: str) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )


def _alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in tokenizers' vocabularies, as GPT-2 has it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


LETTER = _alphabet()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def to_letters(token: bytes) -> str:
    return "".join(LETTER[byte] for byte in token)


def to_bytes(letters: str) -> bytes:
    return bytes(BYTE[letter] for letter in letters)


def byte_level(model: models.BPE, pattern: str) -> Tokenizer:
    """A tokenizer that cuts text by a pattern and merges the bytes of the pieces, nothing else."""
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token of two bytes and more, in the order of their ids; ValueError where one has none."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _merge(token, ranks, below=rank)
            if len(parts) != 2:
                raise ValueError(
                    f"token {rank} ({token!r}) is not two tokens of lower id put together"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _merge(piece: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair merging with the ranks below a bound: the lowest first, of equal ones the leftmost."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        lowest, at = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < lowest:
                lowest, at = rank, i
        if at < 0:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def tokenizer_of(given: Ranks) -> Tokenizer:
    """The tokenizer that gives tiktoken's ids; ValueError where merges by pairs cannot."""
    merges = [(to_letters(a), to_letters(b)) for a, b in merges_of(given.ranks)]
    vocab = {to_letters(token): rank for token, rank in given.ranks.items()} | given.special
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges), given.pattern)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in sorted(given.special, key=given.special.__getitem__)]
    )
    return tokenizer


def ranks_of(tokenizer: Tokenizer) -> Ranks:
    """The ranks with which tiktoken gives the ids of a tokenizer; ValueError, saying why, where it would give others.

    Merges are compared one by one, the cutting of text by `fuzz` alone.
    """
    content = json.loads(tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    pattern = (
        ((content["pre_tokenizer"] or {}).get("pretokenizers") or [{}])[0]
        .get("pattern", {})
        .get("Regex")
    )
    if model["type"] != "BPE" or pattern is None:
        raise ValueError("it is not a byte-level BPE that cuts text by one pattern")
    plain = json.loads(byte_level(models.BPE(), pattern).to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if content[part] != plain[part]:
            raise ValueError(f"its {part} is not that of a plain byte-level BPE")
    for key, value in plain["model"].items():
        if key not in ("vocab", "merges") and model[key] != value:
            raise ValueError(f"its {key} is not that of a plain byte-level BPE")
    if not all(token["special"] for token in added):
        raise ValueError("it has added tokens that are not special")
    special = {token["content"]: token["id"] for token in added}
    letters = {token: rank for token, rank in model["vocab"].items() if token not in special}
    if set(BYTE) - set(letters) or set("".join(letters)) - set(BYTE):
        raise ValueError("its vocabulary is not made of the 256 bytes")
    ranks = {to_bytes(token): rank for token, rank in letters.items()}
    if [[to_letters(a), to_letters(b)] for a, b in merges_of(ranks)] != model["merges"]:
        raise ValueError("it makes a token from another pair than tiktoken would")
    given = Ranks(pattern, ranks, special)
    whole, other = Tokenizer.from_str(tokenizer.to_str()), given.encoding("export")
    whole.encode_special_tokens = True
    for text in fuzz(whole, count=1000, seed=0):
        if whole.encode(text).ids != other.encode_ordinary(text):
            raise ValueError(f"tiktoken cuts {text!r} at other places")
    return given


def write_ranks(given: Ranks, folder: Path) -> None:
    """Write the rank file and what it takes to use it, beside the tokenizer.json it belongs to."""
    lines = [
        b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(given.ranks.items(), key=lambda item: item[1])
    ]
    (folder / RANKS).write_bytes(b"".join(lines))
    settings = {
        "tokenizer_sha256": file_hash(folder / "tokenizer.json"),
        "pattern": given.pattern,
        "special_tokens": given.special,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Tokens and ids of a .tiktoken file: a line each, base64 and number."""
    return {
        b64decode(token): int(rank)
        for token, rank in (line.split() for line in content.splitlines() if line)
    }


def read_ranks(folder: str | Path) -> Ranks:
    """The tiktoken export of a tokenizer folder; ValueError where it has none, or that of another tokenizer.json."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not (folder / SETTINGS).is_file() or not (folder / RANKS).is_file():
        raise ValueError(
            f"{folder} holds no {RANKS} and {SETTINGS}; train its tokenizer again or use tokenizer.json"
        )
    settings = read_json(folder / SETTINGS)
    if file_hash(path) != settings.get("tokenizer_sha256"):
        raise ValueError(
            f"{folder / RANKS} belongs to another tokenizer.json than lies beside it; delete it and {SETTINGS}"
        )
    content = read_json(path)
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    letters = {
        token: rank for token, rank in content["model"]["vocab"].items() if token not in special
    }
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    try:
        given = Ranks(
            settings["pattern"],
            parse_ranks((folder / RANKS).read_bytes()),
            settings["special_tokens"],
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / RANKS} or {SETTINGS} is damaged ({error}); delete both"
        ) from error
    if not isinstance(given.special, dict) or not all(
        type(index) is int for index in given.special.values()
    ):
        raise ValueError(
            f"{folder / SETTINGS} is damaged: its special_tokens have no ids; delete it and {RANKS}"
        )
    if given != Ranks(pattern, {to_bytes(token): rank for token, rank in letters.items()}, special):
        raise ValueError(
            f"{folder / RANKS} or {SETTINGS} differs from the tokenizer.json beside it; delete both"
        )
    return given


def load_tiktoken(folder: str | Path) -> "tiktoken.Encoding":
    """The tokenizer of a folder as a tiktoken.Encoding with the same ids; ValueError as in read_ranks."""
    return read_ranks(folder).encoding(str(folder))


# What tokenizers are known to differ on, and what regular expressions are.
FRAGMENTS = (
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "\x0b",
        "\x0c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
        "\u3000",
        "\u200b",
    ),
    *(
        "a",
        "B",
        "Z",
        "the",
        " The",
        "HELLO",
        "ǅ",
        "ß",
        "\u017f",
        "\u212a",
        "é",
        "e\u0301",
        "ʰ",
        "ª",
        "q" * 30,
        "\u0301",
    ),
    *(
        "'s",
        "'S",
        "'t",
        "'LL",
        "'ll",
        "'Ve",
        "'rE",
        "'d",
        "'\u017f",
        "\u2019s",
        "'",
        "''",
        "'m ",
        "' s",
    ),
    *("0", "7", "12", "2026", "12345678", "٣", "Ⅷ", "²", "½", "१२", "1,000.5"),
    *(
        ".",
        "...",
        "!?",
        "/",
        "//",
        "{\n",
        "});\n",
        "#",
        "__init__",
        "->",
        "==",
        "\\n",
        "$x^2$",
        "-" * 40,
        "=" * 5,
        '"',
        "§",
        "€",
    ),
    *(
        "漢字",
        "日本語のテキスト",
        "한국어",
        "العربية",
        "עִברִית",
        "हिन्दी",
        "ไทย",
        "русский",
        "Ελληνικά",
        "\U0001d518\U0001d52b",
        "𐍈",
        "\U0002f800",
    ),
    *(
        "🙂",
        "👩‍👩‍👧",
        "🇩🇪",
        "👍🏽",
        "\ufe0f",
        "\ufeff",
        "\ufffd",
        "\x00",
        "\x07",
        "\x1b[0m",
        "\x1c",
        "\x7f",
        "\x80",
        "\ue000",
    ),
    *(
        "<|endoftext|>",
        "<|pad|>",
        "<|im_start|>",
        "<|",
        "|>",
        "</s>",
        "[INST]",
        "\uffff",
        "\U0002f800",
        "\U0010ffff",
    ),
)


def fuzz(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Hard texts, the same for the same seed: hard fragments, random characters and the tokenizer's own tokens in a row."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 16)):
            kind = rng.random()
            if kind < 0.5:
                parts.append(rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 2, 5)))
            elif kind < 0.9:
                parts.append(tokenizer.decode([rng.randrange(tokenizer.get_vocab_size())]))
            else:
                point = rng.randrange(rng.choice((0x80, 0x800, 0xD800, 0x110000)))
                parts.append("\ufffd" if 0xD800 <= point < 0xE000 else chr(point))
        texts.append("".join(parts))
    return texts
