"""Valid small inputs that the fuzzers start from, each built once in a process."""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from conftest import VOCAB, library, save_tiny, tiny_config, write_documents

from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import save_tokenizer, train_tokenizer

Files = Mapping[str, bytes]


def files_of(folder: Path) -> Files:
    """Return {relative path: content} of all files in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_files(files: Files, folder: Path) -> Path:
    """Write files_of's files into a folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@cache
def texts() -> list[tuple[str, str]]:
    return library(40)


@cache
def tokenizer_files() -> Files:
    """Files of a tokenizer with VOCAB tokens and its tiktoken export."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_tokenizer((text for _, text in texts()), VOCAB), Path(folder))
        return files_of(Path(folder))


@cache
def document_files() -> Files:
    """Files of a document-store source in two parts."""
    with tempfile.TemporaryDirectory() as folder:
        short = [(id, text[:400]) for id, text in texts()[:12]]
        write_documents(Path(folder), "books", short, parts=2)
        return files_of(Path(folder) / "documents" / "books")


@cache
def chat_files() -> Files:
    """Files of a chat checkpoint with random weights, a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as folder:
        store = write_files(tokenizer_files(), Path(folder) / "store" / "tokenizer").parent
        model = Path(folder) / "model"
        save_tiny(
            model,
            tiny_config(
                vocab_size=392, max_position_embeddings=128, hidden_size=16, intermediate_size=32
            ),
            store,
        )
        save_chat_tokenizer(model, store / "tokenizer")
        return files_of(model)
