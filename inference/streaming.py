"""Text of tokens that come one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inference.generation import stream
from models.nanollama import NanoLlama

Decode = Callable[[list[int]], str]


def whole_characters(text: str) -> str:
    """Text that UTF-8 can encode: surrogate pairs are joined, half of one becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextStream:
    """Text that will not change any more: whole characters, and nothing that may be the beginning of a stop string.

    decode makes text of token ids; where bytes are missing to a character it writes U+FFFD, as tokenizers' decode does.
    What `push` and `flush` return, put together, is decode of all tokens up to the first stop string.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()):
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self.decode, self.stop_strings = decode, stop_strings
        self.before: list[
            int
        ] = []  # the last tokens whose text was taken: some decoders treat a first token differently
        self.tokens: list[int] = []  # tokens whose text was not taken yet
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that has become certain by one more token; none once `stopped` says that a stop string came."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._take(self._text())
        text, self.held = text + self.held, ""
        return text

    def _text(self) -> str:
        return self.decode(self.before + self.tokens)[len(self.decode(self.before)) :]

    def _take(self, text: str) -> str:
        """Text before a stop string, or before what may become one."""
        self.before, self.tokens = self.tokens or self.before, []
        text = self.held + text
        found = [at for stop in self.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        sizes = [
            n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])
        ]
        certain = len(text) - max(sizes, default=0)
        self.held = text[certain:]
        return text[:certain]


def stream_text(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decode: Decode,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    **how: Any,
) -> Iterator[tuple[int, str]]:
    """Pairs of a row's number and its next piece of text; further arguments are those of `generation.stream`.

    A row ends at a stop token or a stop string, which are no part of the text, or after max_new_tokens.
    """
    texts = [TextStream(decode, stop_strings) for _ in prompts]

    def ended(row: int, tokens: list[int]) -> bool:
        pieces[row] = "" if tokens[-1] in stop_tokens else texts[row].push(tokens[-1])
        return texts[row].stopped

    pieces: dict[int, str] = {}
    for event in stream(
        model, prompts, max_new_tokens, stop_tokens=stop_tokens, ended=ended, **how
    ):
        piece = pieces.pop(event.row) + (texts[event.row].flush() if event.finish else "")
        if piece:
            yield event.row, piece


def complete(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decode: Decode,
    **how: Any,
) -> list[str]:
    """The texts of all rows; arguments as for `stream_text`."""
    texts = [""] * len(prompts)
    for row, piece in stream_text(model, prompts, max_new_tokens, decode, **how):
        texts[row] += piece
    return texts
