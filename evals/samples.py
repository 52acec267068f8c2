"""What a model in training answers, written down as it goes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.chat.rendering import Chat
from inference.generation import generate
from models.nanollama import ModelConfig, NanoLlama


def sample_replies(
    model: NanoLlama, chat: Chat, prompts: Sequence[str], max_new_tokens: int = 128
) -> list[str]:
    """The likeliest reply to each user's message, special tokens shown."""
    asked = [chat.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    room = model.config.max_position_embeddings - max(map(len, asked))
    rows = generate(model, asked, min(max_new_tokens, room), stop_tokens=chat.stop_ids)
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
    """Append what whole weights answer to a Markdown file; a file that cannot be written is a warning."""
    model = NanoLlama(config)
    model.load_state_dict(weights)
    for parameter in model.parameters() if device.type == "cuda" else ():
        parameter.data = parameter.data.to(
            torch.bfloat16
        )  # not model.to(dtype): the rotary tables stay fp32
    model.to(device).eval()
    lines = [f"## {title}", ""]
    for prompt, reply in zip(prompts, sample_replies(model, chat, prompts), strict=True):
        lines += [f"> {prompt}", "", f"```\n{reply}\n```", ""]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:  # samples must not end training before it has saved
        print(
            f"warning: {path} cannot be written ({error.strerror}); the samples of {title} are not kept",
            flush=True,
        )
