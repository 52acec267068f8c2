"""Conversations as a checkpoint's own chat template renders them, in token ids."""

import json
from pathlib import Path
from typing import Any

from data.bounded_template import BoundedTemplate
from data.chat import neutralise
from evals.language_model import Words

Message = dict[str, Any]


class Chat:
    """The tokenizer of a checkpoint with its chat template; ValueError where it has none, or is damaged."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer

        folder = Words(checkpoint).folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many classes on a damaged tokenizer_config.json
            reason = str(error).split("\n")[0]
            raise ValueError(f"transformers cannot read the tokenizer of {folder}: {reason}") from error
        self.templates: dict[str, BoundedTemplate] = {}
        if not self.tokenizer.chat_template:
            raise ValueError(f"{checkpoint} has no chat template, so it cannot be talked to; give a checkpoint of after SFT")
        self.takes_tools = "tools" in str(self.tokenizer.chat_template)
        self.special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[int, ...]:
        """Ids up to where the assistant's turn begins. No special token can come out of what messages say."""
        plain = [{**message, "content": neutralise(message["content"], self.special)} for message in messages]
        tools = json.loads(neutralise(json.dumps(tools), self.special)) if tools else None
        source = self.tokenizer.get_chat_template(None, tools)
        template = self.templates.setdefault(source, BoundedTemplate(source))
        text = template.render(plain, tools, **self.tokenizer.special_tokens_map)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token(self, text: str) -> int | None:
        """The id of a token, None where the tokenizer has none of that text."""
        index = self.tokenizer.convert_tokens_to_ids(text)
        return None if index is None or index == self.tokenizer.unk_token_id else int(index)
