"""A model that always gives the same reply: each token's successor is written into its weights."""

from itertools import pairwise
from pathlib import Path

import torch
from conftest import tiny_config

from data.chat.rendering import IM_END, Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from models.hf import save_hf
from models.nanollama import NanoLlama

CALL = '{"name":"f","arguments":{"x":1}}'  # no token twice
THINKS = "<|start_thought|>Add them<|end_thought|>It is four."
CALLS = f"<|start_thought|>Add them<|end_thought|>See<|tool_call|>{CALL}"


def scripted_model(folder: Path, reply: str) -> Chat:
    """Write a checkpoint whose greedy reply is `reply`, in which no token occurs twice."""
    filler = " ".join("αβγδεζηθικλμνξ"[i : i + 6] * 3 for i in range(9))  # fills the vocabulary
    save_tokenizer(train_tokenizer([f"{reply}assistant\n"] * 20 + [filler], 330), folder / "base")
    chat = save_chat_tokenizer(folder, folder / "base")
    chat.tokenizer.encode_special_tokens = False
    ids = chat.tokenizer.encode(f"assistant\n{reply}{IM_END}", add_special_tokens=False).ids[-64:]
    chat.tokenizer.encode_special_tokens = True
    assert len(set(ids)) == len(ids), chat.tokenizer.decode_batch([[i] for i in ids])
    config = tiny_config(
        vocab_size=chat.tokenizer.get_vocab_size(),
        hidden_size=len(ids) + -len(ids) % 4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    weights = {name: torch.zeros_like(w) for name, w in NanoLlama(config).state_dict().items()}
    weights["norm.weight"].fill_(1.0)
    for position, (token, following) in enumerate(pairwise(ids)):
        weights["embed_tokens.weight"][token, position] = 1.0
        weights["lm_head.weight"][following, position] = 5.0
    save_hf(folder, config, weights, torch.float32, **chat.config_ids)
    return chat
