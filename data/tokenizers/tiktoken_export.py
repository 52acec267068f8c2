"""Export a byte-level BPE tokenizer to tiktoken's rank file: each token's bytes and its id.

tokenizers applies listed merges in order. tiktoken merges any two adjacent tokens that form a
token, lowest id first. They agree if the bytes of each token, merged using only lower ids, give two
tokens, and this pair is the token's listed merge. `merges_of` checks this.
"""

import random
from base64 import b64decode, b64encode
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.manifest import file_hash, read_json
from files import parse_object, write_json

if TYPE_CHECKING:
    import tiktoken

RANKS, SETTINGS = "tokenizer.tiktoken", "tiktoken.json"


class Ranks(NamedTuple):
    """A tokenizer in tiktoken's form.

    pattern: pre-tokenizer. Oniguruma (tokenizers) and fancy-regex (tiktoken) must agree on it.
    """

    pattern: str
    ranks: dict[bytes, int]  # the 256 bytes and the tokens merged from them
    special: dict[str, int]

    def encoding(self, name: str) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
        )


def _alphabet() -> dict[int, str]:
    """Return the printable character of each byte in byte-level vocabularies, as in GPT-2."""
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
    """Return a tokenizer that splits text by a pattern and merges the bytes of the pieces."""
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merge of each multi-byte token, in the order of ids.

    ValueError if a token has none.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            pair = _merge(token, ranks, below=rank)
            if len(pair) != 2:
                raise ValueError(
                    f"token {rank} ({token!r}) is not a merge of two tokens with lower ids"
                )
            merges.append((pair[0], pair[1]))
    return merges


def _merge(piece: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Merge byte pairs with ranks below a bound: lowest rank first, then leftmost."""
    tokens = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        lowest, index = below, -1
        for i in range(len(tokens) - 1):
            rank = ranks.get(tokens[i] + tokens[i + 1], below)
            if rank < lowest:
                lowest, index = rank, i
        if index < 0:
            return tokens
        tokens[index : index + 2] = [tokens[index] + tokens[index + 1]]


def tokenizer_of(export: Ranks) -> Tokenizer:
    """Build a tokenizer with tiktoken's ids; ValueError if merges cannot reproduce them."""
    merges = [(to_letters(a), to_letters(b)) for a, b in merges_of(export.ranks)]
    vocab = {to_letters(token): rank for token, rank in export.ranks.items()} | export.special
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges), export.pattern)
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True)
            for t in sorted(export.special, key=export.special.__getitem__)
        ]
    )
    return tokenizer


def ranks_of(tokenizer: Tokenizer) -> Ranks:
    """Return ranks with which tiktoken reproduces a tokenizer's ids.

    ValueError with the reason if no ranks do. Merges are compared one by one, pre-tokenizers
    only on texts of `fuzz`.
    """
    content = parse_object(tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    pattern = (
        ((content["pre_tokenizer"] or {}).get("pretokenizers") or [{}])[0]
        .get("pattern", {})
        .get("Regex")
    )
    if model["type"] != "BPE" or pattern is None:
        raise ValueError("it is not a byte-level BPE with one pre-tokenizer pattern")
    plain = parse_object(byte_level(models.BPE(), pattern).to_str())
    for section in ("normalizer", "pre_tokenizer", "post_processor"):
        if content[section] != plain[section]:
            raise ValueError(f"its {section} differs from a plain byte-level BPE")
    for key, value in plain["model"].items():
        if key not in ("vocab", "merges") and model[key] != value:
            raise ValueError(f"its {key} differs from a plain byte-level BPE")
    if not all(token["special"] for token in added):
        raise ValueError("it has added tokens that are not special")
    special = {token["content"]: token["id"] for token in added}
    letters = {token: rank for token, rank in model["vocab"].items() if token not in special}
    if set(BYTE) - set(letters) or set("".join(letters)) - set(BYTE):
        raise ValueError("its vocabulary does not consist of the 256 bytes and their merges")
    ranks = {to_bytes(token): rank for token, rank in letters.items()}
    if [[to_letters(a), to_letters(b)] for a, b in merges_of(ranks)] != model["merges"]:
        raise ValueError("it merges a token from another pair than tiktoken")
    export = Ranks(pattern, ranks, special)
    copy, encoding = Tokenizer.from_str(tokenizer.to_str()), export.encoding("export")
    copy.encode_special_tokens = True
    for text in fuzz(copy, count=1000, seed=0):
        if copy.encode(text).ids != encoding.encode_ordinary(text):
            raise ValueError(f"tiktoken splits {text!r} differently")
    return export


def write_ranks(export: Ranks, folder: Path) -> None:
    """Write the rank file and its settings beside their tokenizer.json."""
    lines = [
        b64encode(token) + b" %d\n" % rank
        for token, rank in sorted(export.ranks.items(), key=lambda item: item[1])
    ]
    (folder / RANKS).write_bytes(b"".join(lines))
    settings = {
        "tokenizer_sha256": file_hash(folder / "tokenizer.json"),
        "pattern": export.pattern,
        "special_tokens": export.special,
    }
    write_json(folder / SETTINGS, settings)


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Parse a .tiktoken file: one base64 token and its id per line."""
    return {
        b64decode(token): int(rank)
        for token, rank in (line.split() for line in content.splitlines() if line)
    }


def read_ranks(folder: str | Path) -> Ranks:
    """Read the tiktoken export of a folder.

    ValueError if it is missing or belongs to another tokenizer.json.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not (folder / SETTINGS).is_file() or not (folder / RANKS).is_file():
        raise ValueError(
            f"{folder} lacks {RANKS} or {SETTINGS}; train its tokenizer again or use tokenizer.json"
        )
    settings = read_json(folder / SETTINGS)
    if file_hash(path) != settings.get("tokenizer_sha256"):
        raise ValueError(
            f"{folder / RANKS} does not match the tokenizer.json beside it; delete it and "
            f"{SETTINGS}"
        )
    content = read_json(path)
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    letters = {
        token: rank for token, rank in content["model"]["vocab"].items() if token not in special
    }
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    try:
        export = Ranks(
            settings["pattern"],
            parse_ranks((folder / RANKS).read_bytes()),
            settings["special_tokens"],
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / RANKS} or {SETTINGS} is damaged ({error}); delete both"
        ) from error
    if not isinstance(export.special, dict) or not all(
        type(index) is int for index in export.special.values()
    ):
        raise ValueError(
            f"{folder / SETTINGS} is damaged: its special_tokens have no ids; delete it and {RANKS}"
        )
    if export != Ranks(
        pattern, {to_bytes(token): rank for token, rank in letters.items()}, special
    ):
        raise ValueError(
            f"{folder / RANKS} or {SETTINGS} differs from the tokenizer.json beside it; delete both"
        )
    return export


def load_tiktoken(folder: str | Path) -> "tiktoken.Encoding":
    """Load a folder's tokenizer as a tiktoken.Encoding. ValueError as in read_ranks."""
    return read_ranks(folder).encoding(str(folder))


# Texts on which tokenizers and regular-expression engines are known to differ
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
    """Return test texts of hard fragments, random characters and tokens; deterministic."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(1, 16)):
            kind = rng.random()
            if kind < 0.5:
                pieces.append(rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 2, 5)))
            elif kind < 0.9:
                pieces.append(tokenizer.decode([rng.randrange(tokenizer.get_vocab_size())]))
            else:
                point = rng.randrange(rng.choice((0x80, 0x800, 0xD800, 0x110000)))
                pieces.append("\ufffd" if 0xD800 <= point < 0xE000 else chr(point))
        texts.append("".join(pieces))
    return texts
