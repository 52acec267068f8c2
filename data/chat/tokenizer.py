"""Add the chat tokens and the chat template to a base model's tokenizer."""

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
from data.chat.template import RESPONSE_TEMPLATE, SHOWN
from data.manifest import file_hash, read_json
from data.tokenizers.bpe import BOS, PAD, add_special_tokens, load_tokenizer
from files import parse_object, remove_stale, temporary, write_json, write_text

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    TEMPLATE,
    TRAINING_TEMPLATE,
)
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
PROBE = {  # uses every feature of the template
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
    """Return a folder's tokenizer with the missing CHAT_TOKENS added, and its new config.

    ValueError if the tokenizer merges text across special tokens: segments are encoded separately.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; give a folder that train.py or save_pretrained wrote"
        )
    tokenizer = load_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer = _with_shown_tokens(add_special_tokens(tokenizer, CHAT_TOKENS))
    names = ("special_tokens_map.json", "tokenizer_config.json")
    names_of_base = {
        key: text for name in names for key, text in _names(read_json(Path(folder) / name)).items()
    }
    bos = BOS if tokenizer.token_to_id(BOS) is not None else names_of_base.get("bos_token")
    bos = None if bos in CHAT_TOKENS else bos
    pad = (
        PAD
        if tokenizer.token_to_id(PAD) is not None
        else names_of_base.get("pad_token") or bos or IM_END
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": bos} if bos else {}),
        "eos_token": IM_END,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "response_template": RESPONSE_TEMPLATE,
    }
    chat = Chat(tokenizer, bos)
    conversation = chat.clean(PROBE)
    tokenizer.encode_special_tokens = False
    ids = tokenizer.encode(chat.render(conversation), add_special_tokens=False).ids
    tokenizer.encode_special_tokens = True
    if ids != chat.encode([conversation])[0].ids.tolist():
        raise ValueError(
            f"the tokenizer of {folder} merges text across special tokens; use a model with a "
            "byte-level BPE"
        )
    tokenizer.encode_special_tokens = False
    return tokenizer, config


def _with_shown_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with SHOWN as added tokens that are not special; ids do not change."""
    content = parse_object(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in SHOWN
    return Tokenizer.from_str(json.dumps(content))


def _names(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens in a tokenizer's config, as plain text."""
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return {
        key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)
    }


def cache_chat_tokenizer(base: Path, cache: Path) -> Path:
    """Write a base model's chat tokenizer to a folder in `cache`, named by its content."""
    scratch = temporary(cache / "tokenizer")
    remove_stale(cache)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        save_chat_tokenizer(scratch, base)
        content = repr([file_hash(scratch / name) for name in FILES])
        folder = cache / f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if not folder.is_dir():
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def save_chat_tokenizer(folder: str | Path, base: str | Path) -> Chat:
    """Write the chat tokenizer of a base model (FILES) to a folder; deterministic."""
    tokenizer, config = chat_tokenizer(base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    ids = {
        name: index_of(tokenizer, config[name])
        for name in ("bos_token", "pad_token")
        if name in config
    }
    stops = [index_of(tokenizer, IM_END), *([ids["bos_token"]] if "bos_token" in ids else [])]
    generation = {**{f"{name}_id": index for name, index in ids.items()}, "eos_token_id": stops}
    write_json(folder / "generation_config.json", generation)
    write_text(folder / TEMPLATE, jinja_template())
    write_text(folder / TRAINING_TEMPLATE, jinja_template(training=True))
    return Chat.from_folder(folder)
