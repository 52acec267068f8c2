"""A tokenizer folder: tokenizer.json, its tiktoken export, settings and templates."""

from pathlib import Path

from hypothesis import strategies as st

from data.chat.rendering import Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.store import open_tokenizer
from data.tokenizers.bpe import Encoder
from fuzz.bases import chat_files, tokenizer_files, write_files
from fuzz.mutate import Change, change_folder, folder_changes
from fuzz.sandbox import fuzz
from inference.chat_formats import open_chat_format
from inference.gguf_tokenizer import read_vocabulary

WORDS = (
    "type",
    "BPE",
    "WordPiece",
    "Unigram",
    "byte_fallback",
    "ignore_merges",
    "chat_template",
    "lstrip",
    "normalizer",
    "NFC",
)
FOUND_IN_STORE = [
    [("json", "tiktoken.json", [("put", ("special_tokens", "<|endoftext|>"), 0.0)])],
    [("json", "tokenizer.json", [("put", ("model", "continuing_subword_prefix"), "trim_offsets")])],
]
FOUND = [
    [("json", "tokenizer.json", [("put", ("model", "vocab", "1"), 2147483648)])],
    [("json", "tokenizer.json", [("drop", ("added_tokens", 0))])],
    [("json", "tokenizer_config.json", [("put", ("bos_token",), 2)])],
    [
        ("empty", "chat_template.jinja"),
        ("json", "generation_config.json", [("put", ("eos_token_id", 0), ["a", 1])]),
    ],
    [("json", "tokenizer_config.json", [("put", ("eos_token",), ["a"])])],
]
HELLO = [{"role": "user", "content": "Hello <|im_end|> 12"}]


@fuzz(
    st.deferred(lambda: folder_changes(tokenizer_files(), words=WORDS)),
    share=0.05,
    accepted=(0.05, 0.8),
    examples=FOUND_IN_STORE,
)
def test_tokenizer_of_a_store(changes: list[Change], folder: Path) -> None:
    """Accepted tokenizers give ids below the vocabulary's size."""
    write_files(change_folder(tokenizer_files(), changes), folder / "tokenizer")
    encoder = Encoder(folder / "tokenizer")
    known = open_tokenizer(folder, encoder.vocab_size)
    assert known.token_bytes.min() >= 0 and len(known.token_bytes) == encoder.vocab_size
    ids = encoder(["a text of 12 words, and\n\nmore é"])[0]
    assert not len(ids) or int(ids.max()) < encoder.vocab_size


@fuzz(
    st.deferred(lambda: folder_changes(chat_folder(), words=WORDS)),
    share=0.05,
    accepted=(0.1, 0.9),
    examples=FOUND,
)
def test_chat_tokenizer(changes: list[Change], folder: Path) -> None:
    """Accepted folders can be talked to, made fit for chat and exported, or are refused by each
    in a sentence.
    """
    write_files(change_folder(chat_folder(), changes), folder / "chat")
    chat = open_chat_format(folder / "chat")
    ids = chat.prompt(HELLO)
    assert all(type(id) is int for id in [*ids, *chat.stop_ids])
    chat.parse([0, 5, 9, *ids])
    checkpoint = save_chat_tokenizer(folder / "made", folder / "chat")
    assert isinstance(checkpoint, Chat) and checkpoint.prompt(HELLO)
    vocabulary = read_vocabulary(folder / "chat", 2000)
    assert len(vocabulary.tokens) == len(vocabulary.types) == 2000
    assert all(0 <= id < 2000 for id in vocabulary.ids.values())


def chat_folder() -> dict[str, bytes]:
    return {
        name: content for name, content in chat_files().items() if not name.endswith(".safetensors")
    }
