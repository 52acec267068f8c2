"""A base model's tokenizer made fit for chat: the chat tokens added after its own, the template beside it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.chat.rendering import (
    CHAT_TOKENS,
    IM_END,
    TEMPLATE,
    TRAINING_TEMPLATE,
    Chat,
    index_of,
    jinja_template,
)
from data.manifest import file_hash, read_json
from data.tokenizers.bpe import BOS, PAD, add_special_tokens, load_tokenizer
from files import sweep, temporary

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    TEMPLATE,
    TRAINING_TEMPLATE,
)
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
PROBE = {  # everything that the template knows
    "messages": [
        {"role": "system", "content": "A system's text."},
        {"role": "user", "content": "How much is 2 + 2?"},
        {
            "role": "assistant",
            "content": "",
            "thought": "ask\n",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": " 4\n"},
        {"role": "assistant", "content": "4.\n\nThat is all"},
        {"role": "user", "content": "1. Thanks"},
        {"role": "assistant", "content": "(you are welcome)"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
        }
    ],
}


def chat_tokenizer(folder: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A folder's tokenizer with CHAT_TOKENS after its own (those it has stay), and its new tokenizer_config.

    ValueError where its texts do not add up at special tokens, so that the template could not be encoded part by part.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no tokenizer.json; give a folder that train.py or save_pretrained wrote"
        )
    tokenizer = load_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer = add_special_tokens(tokenizer, CHAT_TOKENS)
    names = ("special_tokens_map.json", "tokenizer_config.json")
    own = {
        key: text for name in names for key, text in _names(read_json(Path(folder) / name)).items()
    }
    bos = BOS if tokenizer.token_to_id(BOS) is not None else own.get("bos_token")
    bos = None if bos in CHAT_TOKENS else bos
    pad = PAD if tokenizer.token_to_id(PAD) is not None else own.get("pad_token") or bos or IM_END
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": bos} if bos else {}),
        "eos_token": IM_END,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    chat = Chat(tokenizer, bos)
    conversation = chat.clean(PROBE)
    tokenizer.encode_special_tokens = False
    whole = tokenizer.encode(chat.render(conversation), add_special_tokens=False).ids
    tokenizer.encode_special_tokens = True
    if whole != chat.encode([conversation])[0].ids.tolist():
        raise ValueError(
            f"the tokenizer of {folder} splits text across special tokens; take a model with a byte-level BPE"
        )
    tokenizer.encode_special_tokens = False
    return tokenizer, config


def _names(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer's settings name, as plain text."""
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return {
        key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)
    }


def keep_chat_tokenizer(base: Path, cache: Path) -> Path:
    """Folder of a base model's chat tokenizer below `cache`, named by its content."""
    part = temporary(cache / "tokenizer")
    sweep(cache)
    shutil.rmtree(part, ignore_errors=True)
    try:
        save_chat_tokenizer(part, base)
        content = repr([file_hash(part / name) for name in FILES])
        folder = cache / f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if not folder.is_dir():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def save_chat_tokenizer(folder: str | Path, base: str | Path) -> Chat:
    """Write the chat tokenizer of a base model's folder, FILES, into another one; the same base gives the same bytes."""
    tokenizer, config = chat_tokenizer(base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    ids = {
        name: index_of(tokenizer, config[name])
        for name in ("bos_token", "pad_token")
        if name in config
    }
    stops = [index_of(tokenizer, IM_END), *([ids["bos_token"]] if "bos_token" in ids else [])]
    generation = {**{f"{name}_id": index for name, index in ids.items()}, "eos_token_id": stops}
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
    (folder / TEMPLATE).write_text(jinja_template(), encoding="utf-8")
    (folder / TRAINING_TEMPLATE).write_text(jinja_template(training=True), encoding="utf-8")
    return Chat.from_folder(folder)
