"""Conversations as a checkpoint's own chat template renders them, in token ids."""

import json
from pathlib import Path
from typing import Any

from data.chat import neutralise
from evals.language_model import Words

Message = dict[str, Any]


class Chat:
    """The tokenizer of a checkpoint with its chat template; ValueError where it has none, or is damaged."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(Words(checkpoint).folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{checkpoint} has no chat template, so it cannot be talked to; give a checkpoint of after SFT")
        self.takes_tools = "tools" in str(self.tokenizer.chat_template)
        self.special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[int, ...]:
        """Ids up to where the assistant's turn begins. No special token can come out of what messages say."""
        plain = [{**message, "content": neutralise(message["content"], self.special)} for message in messages]
        tools = json.loads(neutralise(json.dumps(tools), self.special)) if tools else None
        text = self.tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token(self, text: str) -> int | None:
        """The id of a token, None where the tokenizer has none of that text."""
        index = self.tokenizer.convert_tokens_to_ids(text)
        return None if index is None or index == self.tokenizer.unk_token_id else int(index)
