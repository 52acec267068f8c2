"""Renders conversations to token ids with a checkpoint's own chat template."""

import json
from pathlib import Path
from typing import Any

from data.chat.bounded_template import BoundedTemplate
from data.chat.folder_templates import choose, read_templates
from data.chat.rendering import marker_tokens, neutralise
from evals.language_model import EvalTokenizer

Message = dict[str, Any]
TEXTS = ("content", "thought")  # text fields of a message


class CheckpointChat:
    """A checkpoint's tokenizer and chat template; ValueError if either is missing or damaged."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer

        folder = EvalTokenizer(checkpoint).folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a damaged tokenizer_config.json raises many exception types
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"transformers cannot read the tokenizer of {folder}: {reason}"
            ) from error
        self.templates: dict[str, BoundedTemplate] = {}
        self.named = read_templates(folder)
        if not self.named:
            raise ValueError(f"{checkpoint} has no chat template; use a checkpoint from SFT or DPO")
        choose(self.named)
        self.takes_tools = any("tools" in template for template in self.named.values())
        self.special = marker_tokens(self.tokenizer.added_tokens_decoder.values())

    def prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids up to the assistant's turn; message texts cannot yield special tokens."""
        return self._ids(self._render(messages, tools))

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Token ids of the last (assistant) message including its end token, without the prompt.

        Falls back to the plain content if the template renders the turn differently after a prompt.
        """
        prompt = self._render(messages[:-1], tools)
        conversation = self._render(messages, tools, add_generation_prompt=False)
        text = (
            conversation.removeprefix(prompt)
            if conversation.startswith(prompt)
            else neutralise(messages[-1]["content"], self.special)
        )
        ids = self._ids(text)
        end = self.tokenizer.eos_token_id
        return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, **variables: Any
    ) -> str:
        """Render a conversation; thoughts are also passed as reasoning_content, the common name."""
        texts = [
            {name: neutralise(message[name], self.special) for name in TEXTS if name in message}
            for message in messages
        ]
        escaped = [{**message, **text} for message, text in zip(messages, texts, strict=True)]
        escaped = [
            {**m, "reasoning_content": m["thought"]} if m.get("thought") else m for m in escaped
        ]
        tools = json.loads(neutralise(json.dumps(tools), self.special)) if tools else None
        source = choose(self.named, tools)
        assert source is not None
        template = self.templates.setdefault(source, BoundedTemplate(source))
        return template.render(escaped, tools, **self.tokenizer.special_tokens_map, **variables)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token(self, text: str) -> int | None:
        """The id of a token; None if the tokenizer does not have it."""
        index = self.tokenizer.convert_tokens_to_ids(text)
        return None if index is None or index == self.tokenizer.unk_token_id else int(index)
