"""The byte-level BPE tokenizer: train, load, and what a folder of it holds.

The recipe is one that llama.cpp reproduces exactly under the name "qwen2": no normalizer, no prefix space, single digits,
tokens of at most 16 bytes. Every byte string has an encoding that decodes to itself.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS = "<|endoftext|>"  # begins every document, and so also ends the one before
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOS, PAD)
MAX_TOKEN_LENGTH = 16  # bytes; llama-cpp-python drops tokens of more than 32
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class SpecialIds(NamedTuple):
    bos: int
    eos: int  # the same token as bos: a base model ends a document by beginning the next
    pad: int


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Train on texts; vocab_size counts special tokens and all 256 bytes. ValueError where the texts give fewer tokens."""
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens come first")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        max_token_length=MAX_TOKEN_LENGTH,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}; "
            "give more text or ask for a smaller vocab_size"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers' AutoTokenizer needs."""
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
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder; ValueError where there is none."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; train one with python -m scripts.train_tokenizer")
    return Tokenizer.from_file(str(path))


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Ids of the special tokens; ValueError where the tokenizer lacks one."""
    bos, pad = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    if bos is None or pad is None:
        raise ValueError(f"the tokenizer lacks {' or '.join(SPECIAL_TOKENS)}; train one with scripts/train_tokenizer.py")
    return SpecialIds(bos, bos, pad)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [vocab]; 0 for special tokens. Sums give bits per byte exactly."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    special = set(tokenizer.get_added_tokens_decoder())
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in special else len(token)  # the byte-level alphabet has one character a byte
    return lengths
