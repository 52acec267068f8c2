"""Talking to models that do not speak by our template (chat.py): by one of their own, or by continuing what was typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.chat.bounded_template import BoundedTemplate
from data.chat.folder_templates import template_of
from data.chat.rendering import Chat, Reply, neutralise
from data.chat.template import is_our_template
from data.manifest import read_json
from data.tokenizers.bpe import listed_ids, load_tokenizer
from inference.gguf_tokenizer import tokenizer_folder


class TemplateChat:
    """A folder's own chat template, rendered in bounds (bounded_template.py). Its replies are text: tools are not offered."""

    def __init__(self, folder: Path):
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = load_tokenizer(folder)
        try:
            self.renderer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
            self.template = BoundedTemplate(template_of(folder) or "")
        except (
            Exception
        ) as error:  # transformers raises many classes on a damaged tokenizer_config.json
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"transformers cannot read the tokenizer or chat template of {folder}: {reason}"
            ) from error
        self.special = [
            token.content
            for token in self.tokenizer.get_added_tokens_decoder().values()
            if token.special
        ]
        self.stop_ids = sorted({*borders(folder)[1], self.renderer.eos_token_id} - {None})

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids up to where the assistant's turn begins; special tokens come from the template only, not from what messages say.
        ValueError where the template refuses them."""
        plain = [
            {**message, "content": neutralise(message["content"], self.special)}
            for message in messages
        ]
        text = self.template.render(plain, **self.renderer.special_tokens_map)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.rstrip("\ufffd") if partial else text
        return Reply("", text.strip(), [], [], not set(ids).isdisjoint(self.stop_ids))


class Continuation:
    """A base model: it goes on with what was typed last, and is told of nothing else."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        self.bos, self.stop_ids = borders(folder)

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        return [
            *self.bos,
            *self.tokenizer.encode(messages[-1]["content"], add_special_tokens=False).ids,
        ]

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply:
        """What was written, as an answer that is whole at any length."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Reply("", text.rstrip("\ufffd") if partial else text, [], [], True)


def open_chat(checkpoint: Path) -> Chat | TemplateChat | Continuation:
    """How the model of a folder or a .gguf file is talked to; ValueError where it has no tokenizer that can be read."""
    folder = tokenizer_folder(checkpoint)
    template = template_of(folder)
    if not template:
        return Continuation(folder)
    if not is_our_template(template):
        return TemplateChat(folder)
    try:
        return Chat.from_folder(folder)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def borders(folder: Path) -> tuple[list[int], list[int]]:
    """The token that begins a text, if any, and those that end one, by a folder's config files."""
    config = {**read_json(folder / "config.json"), **read_json(folder / "generation_config.json")}
    return listed_ids(config, "bos_token_id")[:1], listed_ids(config, "eos_token_id")
