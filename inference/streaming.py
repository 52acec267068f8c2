"""Incremental detokenisation: text pieces from tokens that arrive one by one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inference.generation import stream
from models.nanollama import NanoLlama

Decode = Callable[[list[int]], str]


def replace_surrogates(text: str) -> str:
    """Make text encodable as UTF-8: join surrogate pairs, replace lone surrogates by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextStream:
    """Decode tokens one by one; return only final text.

    Incomplete characters and possible beginnings of a stop string are withheld. The concatenation
    of all `push` and `flush` results is the decoded text up to the first stop string. decode: token
    ids to text, with U+FFFD for an incomplete character, as in the tokenizers library.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()):
        if not all(stop_strings):
            raise ValueError("a stop string must not be empty")
        self.decode, self.stop_strings = decode, stop_strings
        # Decoded before the new tokens, because some decoders treat the first token specially.
        self.context: list[int] = []
        self.tokens: list[int] = []  # tokens whose text is not yet emitted
        self.withheld = ""  # text that may begin a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now final, "" after a stop string (`stopped`)."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._emit(text)

    def flush(self) -> str:
        """Return the withheld text, after the last token."""
        if self.stopped:
            return ""
        text = self._emit(self._text()) + self.withheld
        self.withheld = ""
        return text

    def _text(self) -> str:
        return self.decode(self.context + self.tokens)[len(self.decode(self.context)) :]

    def _emit(self, text: str) -> str:
        """Return the text before a stop string, or before its possible beginning."""
        self.context, self.tokens = self.tokens or self.context, []
        text = self.withheld + text
        stops = [index for stop in self.stop_strings if (index := text.find(stop)) >= 0]
        if stops:
            self.stopped, self.withheld = True, ""
            return text[: min(stops)]
        prefixes = [
            n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])
        ]
        end = len(text) - max(prefixes, default=0)
        self.withheld = text[end:]
        return text[:end]


def stream_text(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decode: Decode,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Yield (row, next piece of its text). options: further arguments of `generation.stream`.

    A row ends at a stop token, at a stop string, or after max_new_tokens. The text excludes both.
    """
    texts = [TextStream(decode, stop_strings) for _ in prompts]

    def ended(row: int, tokens: list[int]) -> bool:
        pieces[row] = "" if tokens[-1] in stop_tokens else texts[row].push(tokens[-1])
        return texts[row].stopped

    pieces: dict[int, str] = {}
    for event in stream(
        model, prompts, max_new_tokens, stop_tokens=stop_tokens, stopping_criterion=ended, **options
    ):
        piece = pieces.pop(event.row) + (texts[event.row].flush() if event.finish else "")
        if piece:
            yield event.row, piece


def complete(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    decode: Decode,
    **options: Any,
) -> list[str]:
    """Return the complete text of each row; arguments as for `stream_text`."""
    texts = [""] * len(prompts)
    for row, piece in stream_text(model, prompts, max_new_tokens, decode, **options):
        texts[row] += piece
    return texts
