"""Conversations as a checkpoint's own chat template renders them, in token ids."""

import json
from pathlib import Path
from typing import Any

from data.chat.bounded_template import BoundedTemplate
from data.chat.folder_templates import choose, read_templates
from data.chat.rendering import neutralise
from evals.language_model import EvalTokenizer

Message = dict[str, Any]
TEXTS = ("content", "thought")  # of a message


class Chat:
    """The tokenizer of a checkpoint with its chat template; ValueError where it has none, or is damaged."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer

        folder = EvalTokenizer(checkpoint).folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (
            Exception
        ) as error:  # transformers raises many classes on a damaged tokenizer_config.json
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"transformers cannot read the tokenizer of {folder}: {reason}"
            ) from error
        self.templates: dict[str, BoundedTemplate] = {}
        self.named = read_templates(folder)
        if not self.named:
            raise ValueError(
                f"{checkpoint} has no chat template, so it cannot be talked to; give a checkpoint of after SFT"
            )
        choose(self.named)
        self.takes_tools = any("tools" in template for template in self.named.values())
        self.special = [
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        ]

    def prompt(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Ids up to where the assistant's turn begins. No special token can come out of what messages say."""
        return self._ids(self._render(messages, tools))

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """Ids of the last message, an assistant's, after prompt() of those before it, up to and with the end of the turn.

        Its plain content if the template renders the turn otherwise in a conversation than after a prompt.
        """
        begun = self._render(messages[:-1], tools)
        whole = self._render(messages, tools, add_generation_prompt=False)
        text = (
            whole.removeprefix(begun)
            if whole.startswith(begun)
            else neutralise(messages[-1]["content"], self.special)
        )
        ids = self._ids(text)
        end = self.tokenizer.eos_token_id
        return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, **variables: Any
    ) -> str:
        """The text of a conversation; a thought is also given as reasoning_content, the name that most templates know."""
        texts = [
            {name: neutralise(message[name], self.special) for name in TEXTS if name in message}
            for message in messages
        ]
        plain = [{**message, **text} for message, text in zip(messages, texts, strict=True)]
        plain = [{**m, "reasoning_content": m["thought"]} if m.get("thought") else m for m in plain]
        tools = json.loads(neutralise(json.dumps(tools), self.special)) if tools else None
        source = choose(self.named, tools)
        assert source is not None
        template = self.templates.setdefault(source, BoundedTemplate(source))
        return template.render(plain, tools, **self.tokenizer.special_tokens_map, **variables)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token(self, text: str) -> int | None:
        """The id of a token, None where the tokenizer has none of that text."""
        index = self.tokenizer.convert_tokens_to_ids(text)
        return None if index is None or index == self.tokenizer.unk_token_id else int(index)
