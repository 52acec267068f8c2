"""The byte-level BPE tokenizer: train, load, and what a folder of it holds.

The recipe is one that llama.cpp reproduces exactly under the name "qwen2": no normalizer, no prefix space, single digits,
tokens of at most 16 bytes. Every byte string has an encoding that decodes to itself.
"""

import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from data.tokenizers.tiktoken_export import (
    SETTINGS,
    byte_level,
    load_tiktoken,
    ranks_of,
    write_ranks,
)

BOS = "<|endoftext|>"  # begins every document, and so also ends the one before
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, PAD)
MAX_TOKEN_LENGTH = 16  # bytes; llama-cpp-python drops tokens of more than 32
BLANK = 250_000  # characters; tiktoken's regex engine gives up at 1,000,000 of white space in a row
LONGEST = 2_000_000  # characters; tokenizers' engine gives up at 5,000,000
MAX_VOCABULARY = 1 << 24  # with larger ids, a damaged file would take memory and time without end
MAX_PIECE = 1_000  # characters of a word that training sees together: BPE training takes quadratic time in it
LONG_PIECES = re.compile(
    rf"[^\W\d_]{{{MAX_PIECE},}}|(?:[^\w\s]|_){{{MAX_PIECE},}}|\s{{{MAX_PIECE},}}"
)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class SpecialIds(NamedTuple):
    bos: int
    eos: int  # the same token as bos: a base model ends a document by beginning the next
    pad: int


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """Train on texts; vocab_size counts special tokens and all 256 bytes. ValueError where the texts give fewer tokens."""
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens come first"
        )
    tokenizer = byte_level(models.BPE(), QWEN2_SPLIT)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        max_token_length=MAX_TOKEN_LENGTH,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(
        (piece for text in texts for piece in _cut_long_pieces(text)), trainer
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}; "
            "give more text or ask for a smaller vocab_size"
        )
    return tokenizer


def _cut_long_pieces(text: str) -> Iterator[str]:
    """The text in parts, so that no run of letters, of signs or of white space in it is longer than MAX_PIECE."""
    done = 0
    for match in LONG_PIECES.finditer(text):
        for end in range(match.start() + MAX_PIECE, match.end() + 1, MAX_PIECE):
            yield text[done:end]
            done = end
    yield text[done:]


def sample_texts(sources: Sequence[Iterable[str]], max_bytes: int) -> Iterator[str]:
    """Texts from all sources by turns, the one that gave the fewest bytes next, until max_bytes (UTF-8) or all are read.

    So sources give equal shares, and a small one all it has. The same sources give the same sample. No more is read than is
    yielded, from the front of each source; sample_texts over its parts is a source that is read at many places.
    """
    queue = [(0, i) for i in range(len(sources))]
    iterators = [iter(source) for source in sources]
    left = max_bytes
    while queue and left > 0:
        given, i = queue[0]
        text = next(iterators[i], None)
        if text is None:
            heapq.heappop(queue)
            continue
        size = len(text.encode())
        if size > left:
            text = text.encode()[:left].decode(errors="ignore")
        left -= size
        heapq.heapreplace(queue, (given + size, i))
        yield text


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' AutoTokenizer needs, and a tiktoken export where tiktoken gives the same ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (folder / SETTINGS).unlink(missing_ok=True)
    try:
        write_ranks(ranks_of(tokenizer), folder)
    except ValueError as error:
        print(
            f"warning: {folder} gets no tiktoken export, so encoding with it is slower: {error}",
            flush=True,
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder; ValueError where there is none, or none that can be read."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no tokenizer.json; train one with python -m scripts.train_tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        if (size := vocabulary_size(tokenizer)) > MAX_VOCABULARY:
            raise ValueError(f"its largest id is {size - 1:,}")
        return _with_file_ids(tokenizer, path)
    except BaseException as error:  # tokenizers raises Exception itself, and panics that are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{path} is damaged: it is no tokenizer ({error}); take another copy of it"
        ) from error


def _with_file_ids(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer of a file, with the ids that the file gives to its added tokens.

    tokenizers numbers added tokens that the model's vocabulary lacks from its size on, whatever their ids in the file.
    """
    if not tokenizer.get_added_tokens_decoder():
        return tokenizer
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return (
        tokenizer
        if all(tokenizer.token_to_id(token) == i for token, i in ids.items())
        else _place(content, ids)
    )


def _place(content: dict[str, Any], ids: dict[str, int]) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content with tokens at given ids; ValueError if an id belongs to another token."""
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise ValueError(f"its {content['model'].get('type')} model has no ids for added tokens")
    owners = {index: token for token, index in vocabulary.items()}
    for token, index in ids.items():
        if owners.setdefault(index, token) != token or vocabulary.get(token, index) != index:
            raise ValueError(f"{token!r} and {owners[index]!r} both have the id {index}")
    vocabulary |= ids
    placed = Tokenizer.from_str(json.dumps(content))
    if moved := [token for token, index in ids.items() if placed.token_to_id(token) != index]:
        raise ValueError(f"{moved[0]!r} cannot have the id {ids[moved[0]]}")
    return placed


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that a model needs for a tokenizer: its largest id + 1. With unused ids this is more than its count of tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer with special tokens that it lacks at the ids after its largest one; those it has become special.

    Without unused ids this is what tokenizers' own method does; that one counts tokens, so it can give an id away twice.
    """
    size, added = (
        vocabulary_size(tokenizer),
        [AddedToken(token, special=True, normalized=False) for token in tokens],
    )
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if size == tokenizer.get_vocab_size():
        tokenizer.add_special_tokens(added)
        return tokenizer
    content = json.loads(tokenizer.to_str())
    tokenizer = _place(content, {token: size + i for i, token in enumerate(new)})
    tokenizer.add_special_tokens(added)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of the special tokens; ValueError where the tokenizer lacks one."""
    bos, pad = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if bos is None or pad is None:
        raise ValueError(
            f"the tokenizer lacks {' or '.join(SPECIAL_TOKENS)}; train one with scripts/train_tokenizer.py"
        )
    return SpecialIds(bos, bos, pad)


def special_text(settings: dict[str, Any], key: str) -> str | None:
    """A special token of tokenizer_config.json, such as bos_token: text, {"content": text} or null; ValueError for others."""
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{key} of tokenizer_config.json is {str(value)[:50]!r}, which is not text; correct it"
        )
    return text


def listed_ids(config: dict[str, Any], key: str) -> list[int]:
    """Ids of config.json or generation_config.json, such as eos_token_id: a number, a list or null; ValueError for others."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and 0 <= index < 1 << 31 for index in ids):
        raise ValueError(
            f"{key} of a config file is {str(value)[:50]!r}, which is neither a token id nor a list of them; correct it"
        )
    return ids


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [vocab]; 0 for special tokens. Sums give bits per byte exactly."""
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    special = set(tokenizer.get_added_tokens_decoder())
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = (
            0 if index in special else len(token)
        )  # the byte-level alphabet has one character a byte
    return lengths


class Encoder:
    """Texts to ids the fastest way that is exact: tiktoken where the folder holds its export, else tokenizers.

    Text that looks like a special token is text. tiktoken works in the calling thread; tokenizers takes all cores unless the
    environment says TOKENIZERS_PARALLELISM=false. Can be pickled.
    """

    def __init__(self, folder: str | Path):
        """ValueError where the folder has no tokenizer, one without our special tokens, or the export of another one."""
        self.folder = Path(folder)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.encode_special_tokens = True
        self.tiktoken = load_tiktoken(folder) if (self.folder / SETTINGS).is_file() else None
        self.bos: int = special_ids(self.tokenizer).bos
        self.vocab_size: int = vocabulary_size(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32, without bos."""
        if self.tiktoken is None:
            return self._by_tokenizers(texts)
        by_tiktoken = self.tiktoken.encode_to_numpy
        return [
            self._by_tokenizers([text])[0]
            if _has_blank(text, BLANK)
            else by_tiktoken(text, disallowed_special=())
            for text in texts
        ]

    def _by_tokenizers(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [_cut(text) for text in texts]
        encodings = iter(self.tokenizer.encode_batch_fast([part for cut in parts for part in cut]))
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in cut])
            for cut in parts
        ]

    def __reduce__(self) -> tuple:
        return Encoder, (self.folder,)


def document_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from a document to its ids, bos first, by a tokenizer of tokenizers or of transformers.

    Text that looks like a special token is text. ValueError if the tokenizer has neither bos nor eos.
    """
    if isinstance(tokenizer, Tokenizer):
        bos, own = special_ids(tokenizer).bos, Tokenizer.from_str(tokenizer.to_str())
        own.encode_special_tokens = True
        return lambda text: [bos, *own.encode(text, add_special_tokens=False).ids]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            "the tokenizer has neither bos nor eos; documents need one of them as border"
        )
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return lambda text: [first, *tokenizer(text, **options)["input_ids"]]


def _has_blank(text: str, length: int) -> bool:
    """Are there at least `length` characters of white space in a row? Surely True from 2 * length on."""
    return any(text[i : i + length].isspace() for i in range(0, len(text) - length + 1, length))


def _cut(text: str) -> list[str]:
    """The text; in parts if its blanks are too long for tokenizers too, which costs a token or two at each cut, no byte."""
    return (
        [text[i : i + LONGEST] for i in range(0, len(text), LONGEST)]
        if _has_blank(text, LONGEST)
        else [text]
    )
