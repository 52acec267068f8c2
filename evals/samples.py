"""Writes sample replies of a model in training to a Markdown and a .jsonl file."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.chat.rendering import Chat
from inference.generation import generate
from models.nanollama import ModelConfig, NanoLlama


def check_samples(prompts: Sequence[str], chat: Chat, context: int) -> None:
    """ValueError if a prompt of chat.samples does not fit the template or the context."""
    for text in prompts:
        try:
            tokens = len(chat.prompt([{"role": "user", "content": text}]))
        except ValueError as error:
            raise ValueError(
                f"chat.samples: invalid prompt {text[:40]!r} ({error}); change or remove it"
            ) from None
        if tokens >= context:
            raise ValueError(
                f"chat.samples: {text[:40]!r} leaves no room for a reply: {tokens} tokens with "
                f"the template, context {context}; shorten it"
            )


def sample_replies(
    model: NanoLlama, chat: Chat, prompts: Sequence[str], max_new_tokens: int = 128
) -> list[str]:
    """Greedy replies to user messages, with special tokens shown."""
    encoded = [chat.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    available = model.config.max_position_embeddings - max(map(len, encoded))
    rows = generate(model, encoded, min(max_new_tokens, available), stop_tokens=chat.stop_ids)
    return [chat.tokenizer.decode(row.tokens, skip_special_tokens=False) for row in rows]


def write_samples(
    path: Path,
    title: str,
    config: ModelConfig,
    weights: dict[str, Tensor],
    chat: Chat,
    prompts: Sequence[str],
    device: torch.device,
) -> None:
    """Append replies of unsharded weights to a Markdown file, and to a .jsonl file beside it.

    A failed write is only a warning.
    """
    model = NanoLlama(config)
    model.load_state_dict(weights)
    for parameter in model.parameters() if device.type == "cuda" else ():
        parameter.data = parameter.data.to(torch.bfloat16)  # keeps the rotary tables in fp32
    model.to(device).eval()
    lines, rows = [f"## {title}", ""], ""
    for prompt, reply in zip(prompts, sample_replies(model, chat, prompts), strict=True):
        lines += [f"> {prompt}", "", f"```\n{reply}\n```", ""]
        rows += json.dumps({"title": title, "prompt": prompt, "reply": reply}) + "\n"
    texts = {path: "\n".join(lines) + "\n", path.with_suffix(".jsonl"): rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file_path, text in texts.items():
            with open(file_path, "a", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:  # a failed sample must not stop training
        print(
            f"warning: {path} cannot be written ({error.strerror}); samples of {title} are lost",
            flush=True,
        )
