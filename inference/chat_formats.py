"""Chat formats: turn a conversation into prompt tokens and reply tokens into text.

| format           | used for                                    |
|------------------|---------------------------------------------|
| Chat             | models trained with our chat template       |
| TemplateFormat   | models with another chat template           |
| CompletionFormat | base models, which continue the user's text |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data.chat.bounded_template import BoundedTemplate
from data.chat.folder_templates import template_of
from data.chat.rendering import Chat, Reply, marker_tokens, neutralise
from data.chat.template import is_our_template
from data.manifest import read_json
from data.tokenizers.bpe import listed_ids, load_tokenizer
from inference.gguf_tokenizer import tokenizer_folder


class ChatFormat(Protocol):
    """Convert messages to prompt tokens, and reply tokens to text."""

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a reply."""
        ...

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Render messages and tool schemas as token ids, up to the start of the reply."""
        ...

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply:
        """Parse a reply's tokens. partial: more tokens will follow."""
        ...


class TemplateFormat:
    """The chat template of another model's folder, rendered within limits; no tool calls."""

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = load_tokenizer(folder)
        try:
            self.renderer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
            self.template = BoundedTemplate(template_of(folder) or "")
        except Exception as error:  # damaged files raise many exception classes in transformers
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"transformers cannot read the tokenizer or chat template of {folder}: {reason}"
            ) from error
        self.special = marker_tokens(self.tokenizer.get_added_tokens_decoder().values())
        _, stop_ids = bos_and_stop_ids(folder)
        self.stop_ids = sorted({*stop_ids, self.renderer.eos_token_id} - {None})

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Render messages. Only the template adds special tokens, never the text of a message.

        ValueError if the template rejects the messages.
        """
        safe = [
            {**message, "content": neutralise(message["content"], self.special)}
            for message in messages
        ]
        text = self.template.render(safe, **self.renderer.special_tokens_map)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.rstrip("\ufffd") if partial else text
        return Reply("", text.strip(), [], [], not set(ids).isdisjoint(self.stop_ids))


class CompletionFormat:
    """Format of a base model, which continues the last message and sees no other message."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        # Special tokens in the user's text are encoded as text.
        self.tokenizer.encode_special_tokens = True
        self.bos, self.stop_ids = bos_and_stop_ids(folder)

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        text = messages[-1]["content"]
        return [*self.bos, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply:
        """Return the text as a finished reply: a continuation is complete at any length."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Reply("", text.rstrip("\ufffd") if partial else text, [], [], True)


def open_chat_format(checkpoint: Path) -> ChatFormat:
    """Open the chat format of a folder or .gguf file; ValueError without a usable tokenizer."""
    folder = tokenizer_folder(checkpoint)
    template = template_of(folder)
    if not template:
        return CompletionFormat(folder)
    if not is_our_template(template):
        return TemplateFormat(folder)
    try:
        return Chat.from_folder(folder)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def bos_and_stop_ids(folder: Path) -> tuple[list[int], list[int]]:
    """Read the bos token ([] or one id) and the end-of-text tokens from a folder's config files."""
    config = {**read_json(folder / "config.json"), **read_json(folder / "generation_config.json")}
    return listed_ids(config, "bos_token_id")[:1], listed_ids(config, "eos_token_id")
