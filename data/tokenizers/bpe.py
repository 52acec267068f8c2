"""Train, save and load byte-level BPE tokenizers.

llama.cpp reproduces the pre-tokenizer exactly as "qwen2": no normalizer, no prefix space, single
digits. Tokens have at most 16 bytes. Every byte string round-trips.
"""

import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from data.manifest import read_json
from data.tokenizers.tiktoken_export import (
    SETTINGS,
    byte_level,
    load_tiktoken,
    ranks_of,
    write_ranks,
)
from files import parse_object, write_json

BOS = "<|endoftext|>"  # begins every document and so ends the previous one
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, PAD)
END_OF_TEXT = (BOS, "<|end_of_text|>", "</s>")  # names of a token that ends documents
TURN_MARKERS = (  # turn markers of chat formats; a chat model's config may name one as bos or eos
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
)
MAX_TOKEN_LENGTH = 16  # bytes; llama-cpp-python drops tokens of more than 32
BLANK = 250_000  # characters; tiktoken's regex engine fails at 1,000,000 of white space in a row
LONGEST = 2_000_000  # characters; tokenizers' engine fails at 5,000,000
MAX_VOCABULARY = 1 << 24  # bounds the memory and time that a damaged file takes
MAX_PIECE = 1_000  # characters of a word in training; BPE training is quadratic in this length
LONG_PIECES = re.compile(
    rf"[^\W\d_]{{{MAX_PIECE},}}|(?:[^\w\s]|_){{{MAX_PIECE},}}|\s{{{MAX_PIECE},}}"
)
MARKER = re.compile(r"<\|.*\|>")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # byte tokens of SentencePiece's byte fallback
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SpecialIds(NamedTuple):
    """Ids of the special tokens."""

    bos: int
    eos: int  # equals bos: a base model ends a document by beginning the next
    pad: int


class DocumentTokens(NamedTuple):
    """Ids of the tokens around each document of token shards."""

    first: int
    last: int | None  # None: a document ends where the next begins


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE. vocab_size includes special tokens and the 256 bytes.

    ValueError if the texts do not yield enough tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size={vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need {256 + len(SPECIAL_TOKENS)}"
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
            f"the texts yield {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
            "add text or lower vocab_size"
        )
    return tokenizer


def _cut_long_pieces(text: str) -> Iterator[str]:
    """Cut a text so that no run of letters, signs or white space exceeds MAX_PIECE."""
    done = 0
    for match in LONG_PIECES.finditer(text):
        for end in range(match.start() + MAX_PIECE, match.end() + 1, MAX_PIECE):
            yield text[done:end]
            done = end
    yield text[done:]


def sample_texts(sources: Sequence[Iterable[str]], max_bytes: int) -> Iterator[str]:
    """Interleave texts of all sources in equal shares of UTF-8 bytes, up to max_bytes.

    Always continues with the source with the fewest yielded bytes; a small source may run out.
    Deterministic. Reads each source from its start, only as far as needed; nest sample_texts over a
    source's parts to sample it at many positions.
    """
    queue = [(0, i) for i in range(len(sources))]
    iterators = [iter(source) for source in sources]
    left = max_bytes
    while queue and left > 0:
        yielded, i = queue[0]
        text = next(iterators[i], None)
        if text is None:
            heapq.heappop(queue)
            continue
        size = len(text.encode())
        if size > left:
            text = text.encode()[:left].decode(errors="ignore")
        left -= size
        heapq.heapreplace(queue, (yielded + size, i))
        yield text


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of AutoTokenizer, and a tiktoken export if it gives the same ids."""
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
    write_json(folder / "tokenizer_config.json", config)
    (folder / SETTINGS).unlink(missing_ok=True)
    try:
        write_ranks(ranks_of(tokenizer), folder)
    except ValueError as error:
        print(
            f"warning: no tiktoken export of {folder}, encoding will be slower: {error}",
            flush=True,
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder; ValueError if it is missing or damaged."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; for a model folder, copy the model's there; for a "
            "data store, run scripts.prepare_data with tokenizer.folder=FOLDER or --train_tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        if (size := vocabulary_size(tokenizer)) > MAX_VOCABULARY:
            raise ValueError(f"its largest id is {size - 1:,}")
        return _with_file_ids(tokenizer, path)
    except BaseException as error:  # tokenizers' Rust panics are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{path} is damaged: it is not a tokenizer ({error}); restore it from a copy"
        ) from error


def _with_file_ids(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Return the tokenizer of a file, with the file's ids of added tokens.

    tokenizers renumbers added tokens that the model's vocabulary lacks, starting at its size.
    """
    if not tokenizer.get_added_tokens_decoder():
        return tokenizer
    content = parse_object(path.read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    if all(tokenizer.token_to_id(token) == index for token, index in ids.items()):
        return tokenizer
    return _with_ids(content, ids)


def _with_ids(content: dict[str, Any], ids: dict[str, int]) -> Tokenizer:
    """Build a tokenizer from tokenizer.json's content, with tokens at given ids.

    ValueError if two tokens get the same id.
    """
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise ValueError(f"its {content['model'].get('type')} model has no ids for added tokens")
    owners = {index: token for token, index in vocabulary.items()}
    for token, index in ids.items():
        if owners.setdefault(index, token) != token or vocabulary.get(token, index) != index:
            raise ValueError(f"{token!r} and {owners[index]!r} both have the id {index}")
    vocabulary |= ids
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if moved := [token for token, index in ids.items() if tokenizer.token_to_id(token) != index]:
        raise ValueError(f"{moved[0]!r} cannot have the id {ids[moved[0]]}")
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the embedding rows a tokenizer needs: its largest id + 1, unused ids included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Make tokens special; missing tokens get the ids after the largest id.

    tokenizers' method starts at the number of tokens, which may be a used id if ids have gaps.
    """
    size = vocabulary_size(tokenizer)
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if size == tokenizer.get_vocab_size():
        tokenizer.add_special_tokens(added)
        return tokenizer
    content = parse_object(tokenizer.to_str())
    tokenizer = _with_ids(content, {token: size + i for i, token in enumerate(new)})
    tokenizer.add_special_tokens(added)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Return the ids of the special tokens; ValueError if the tokenizer lacks one."""
    bos, pad = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if bos is None or pad is None:
        raise ValueError(
            f"the tokenizer lacks {' or '.join(SPECIAL_TOKENS)}; train one with "
            "python -m scripts.train_tokenizer"
        )
    return SpecialIds(bos, bos, pad)


def special_names(folder: Path) -> dict[str, str]:
    """Return the special tokens, such as bos_token, that a folder's config files name."""
    files = ("special_tokens_map.json", "tokenizer_config.json")  # the later file takes priority
    texts = {
        key: text
        for settings in (read_json(folder / name) for name in files)
        for key in ("bos_token", "eos_token", "pad_token")
        if (text := special_text(settings, key))
    }
    return texts


def document_tokens(folder: Path, tokenizer: Tokenizer) -> DocumentTokens:
    """Return the tokens that separate documents for a folder's tokenizer.

    A document begins with bos and ends with eos, if these differ. Without bos, it begins with eos
    and has no token at its end. Turn markers of chat formats do not separate documents; END_OF_TEXT
    replaces a turn marker. ValueError if the tokenizer has none of these tokens.
    """
    names = special_names(folder)
    for key, token in names.items():
        if tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"{folder}: {key} is {token!r}, which tokenizer.json lacks; correct "
                "tokenizer_config.json"
            )
    known = [names.get("eos_token"), *END_OF_TEXT]
    ids = [tokenizer.token_to_id(token) for token in known if token and token not in TURN_MARKERS]
    last = next((index for index in ids if index is not None), None)
    bos = names.get("bos_token")
    first = tokenizer.token_to_id(bos) if bos and bos not in TURN_MARKERS else last
    if first is None:
        raise ValueError(
            f"the tokenizer of {folder} has no bos or eos token to separate documents; name one in "
            "its tokenizer_config.json"
        )
    return DocumentTokens(first, None if last == first else last)


def config_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ids of bos, eos and pad for config.json; eos is a list if several tokens end text.

    Without a bos in the folder's config, bos is the first token of documents. pad may be None.
    """
    names, documents = special_names(folder), document_tokens(folder, tokenizer)
    bos, eos, pad = (
        None if (token := names.get(key)) is None else tokenizer.token_to_id(token)
        for key in ("bos_token", "eos_token", "pad_token")
    )
    end = documents.first if documents.last is None else documents.last
    stops = list(dict.fromkeys([end if eos is None else eos, end]))
    return {
        "bos": documents.first if bos is None else bos,
        "eos": stops if len(stops) > 1 else stops[0],
        "pad": pad,
    }


def special_text(settings: dict[str, Any], key: str) -> str | None:
    """Return a special token of tokenizer_config.json, given as text, {"content": text} or null."""
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{key} of tokenizer_config.json is {str(value)[:50]!r}; it must be text")
    return text


def listed_ids(config: dict[str, Any], key: str) -> list[int]:
    """Return the token ids of a config file, such as eos_token_id: a number, a list or null."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and 0 <= index < 1 << 31 for index in ids):
        raise ValueError(
            f"{key} of a config file is {str(value)[:50]!r}; it must be a token id or a list of "
            "token ids"
        )
    return ids


def token_bytes(tokenizer: Tokenizer, rows: int | None = None) -> np.ndarray:
    """Return the text bytes of each token, int64 [vocab]; 0 for special tokens and markers.

    rows: rows of the model's embedding; rows without a token have 0 bytes. The counts make bits per
    byte exact, for byte-level and SentencePiece vocabularies. A space that SentencePiece inserts
    before a text counts as a byte.
    """
    lengths = np.zeros(rows or vocabulary_size(tokenizer), dtype=np.int64)
    added = tokenizer.get_added_tokens_decoder()
    content = parse_object(tokenizer.to_str())
    steps = content["decoder"] or {}
    is_byte_level = "ByteLevel" in [step["type"] for step in (steps, *steps.get("decoders", ()))]
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            is_text = not added[index].special and not MARKER.fullmatch(token)
            lengths[index] = len(token.encode()) if is_text else 0
        elif is_byte_level:
            lengths[index] = len(token)  # the byte-level alphabet has one character per byte
        elif content["model"].get("byte_fallback") and BYTE_TOKEN.fullmatch(token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode())
    return lengths


class Encoder:
    """Encode texts with tiktoken if the folder has its export, else with tokenizers; same ids.

    Special tokens in texts are encoded as plain text. `documents` are the tokens that separate
    documents. tiktoken runs in the calling thread; tokenizers uses all cores unless
    TOKENIZERS_PARALLELISM=false. Can be pickled.
    """

    def __init__(self, folder: str | Path):
        """ValueError if tokenizer or special tokens are missing or the export differs."""
        self.folder = Path(folder)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()  # which a folder may have saved
        self.tokenizer.no_padding()
        self.tiktoken = load_tiktoken(folder) if (self.folder / SETTINGS).is_file() else None
        self.documents = document_tokens(self.folder, self.tokenizer)
        self.vocab_size: int = vocabulary_size(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, uint32, without special tokens."""
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
        pieces = [_cut(text) for text in texts]
        flat = [piece for text_pieces in pieces for piece in text_pieces]
        encodings = iter(self.tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in text_pieces])
            for text_pieces in pieces
        ]

    def __reduce__(self) -> tuple:
        return Encoder, (self.folder,)


def document_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function that encodes a document, bos first.

    tokenizer: from tokenizers or transformers. Special tokens in texts are encoded as plain text.
    ValueError without bos and eos.
    """
    if isinstance(tokenizer, Tokenizer):
        bos, copy = special_ids(tokenizer).bos, Tokenizer.from_str(tokenizer.to_str())
        copy.encode_special_tokens = True
        return lambda text: [bos, *copy.encode(text, add_special_tokens=False).ids]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            "the tokenizer has neither bos nor eos; documents need one of them as separator"
        )
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return lambda text: [first, *tokenizer(text, **options)["input_ids"]]


def _has_blank(text: str, length: int) -> bool:
    """Return True if an aligned block of `length` characters is white space.

    This detects every run of at least 2 * length.
    """
    return any(text[i : i + length].isspace() for i in range(0, len(text) - length + 1, length))


def _cut(text: str) -> list[str]:
    """Cut a text into pieces if its white space is too long for tokenizers.

    Each cut may add a token or two; no byte is lost.
    """
    if not _has_blank(text, LONGEST):
        return [text]
    return [text[i : i + LONGEST] for i in range(0, len(text), LONGEST)]
