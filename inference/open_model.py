"""Load a model for chat, with its chat template, from a checkpoint folder or a GGUF file."""

from pathlib import Path

from data.chat.trained_chat import ChatDefaults, read_chat_defaults
from inference.chat_formats import ChatFormat, open_chat_format
from inference.gguf_tokenizer import tokenizer_folder
from inference.runners import GgufRunner, Runner, TorchRunner
from machine import default_device
from models.hf import check_model_folder


def open_model(path: Path, context: int | None) -> tuple[ChatFormat, Runner]:
    """Return the chat format and the runner of a GGUF file or checkpoint folder.

    context: tokens of a conversation (default: the length of the chat training rows).
    Raises ValueError for any other path.
    """
    check_context(context)
    if path.suffix == ".gguf":
        return open_chat_format(path), GgufRunner(path, context or trained_context(path))
    check_model_folder(path)
    length = context or trained_context(path)
    return open_chat_format(path), TorchRunner(path, default_device(), length)


def trained_chat(model: Path) -> ChatDefaults | None:
    """Return the chat settings a model was trained with; None if its folder or file has none."""
    return read_chat_defaults(tokenizer_folder(model))


def trained_context(model: Path) -> int | None:
    """Return the row length of chat training, in tokens; None: use the model's full context."""
    trained = trained_chat(model)
    return trained.context if trained else None


def check_context(context: int | None) -> None:
    if context is not None and context < 1:
        raise ValueError(f"--context {context} must be at least 1")
