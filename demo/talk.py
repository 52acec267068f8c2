"""The demo's conversations: a turn is filled piece by piece while the model generates it."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.chat.tools import TOOLS
from data.chat.trained_chat import offered
from inference.chat_formats import ChatFormat, CompletionFormat
from inference.chat_session import CUT, ChatSession
from inference.open_model import open_model, trained_chat
from inference.runners import Runner
from inference.sampling import Sampling

Steps = Generator[None, None, None]
Pieces = Generator[tuple[str, str], None, None]  # (kind, text) of ChatSession.ask


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one turn."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512  # per reply
    seed: int = 0
    system: str = ""
    tools: bool = True


@dataclass
class Turn:
    """A user's message and the model's answer, with timings."""

    text: str
    parts: list[tuple[str, str]] = field(default_factory=list)  # (kind, text) of ChatSession.ask
    messages: list[dict[str, Any]] = field(default_factory=list)  # for later turns; [] if it failed
    seed: int = 0
    context_tokens: int = 0  # context usage
    tokens: int = 0  # generated tokens
    prefill_seconds: float = 0.0  # until the first token of each reply, summed over replies
    decode_seconds: float = 0.0  # for all tokens after the first ones
    decode_tokens: int = 0  # number of these tokens

    def add(self, kind: str, text: str) -> None:
        """Append a piece; consecutive pieces of thought or content are joined."""
        if self.parts and self.parts[-1][0] == kind and kind in ("thought", "content"):
            text = self.parts.pop()[1] + text
        self.parts.append((kind, text))


class ChatModel:
    """A model with its chat format and tools. A base model continues the user's text."""

    def __init__(
        self, name: str, runner: Runner, chat: ChatFormat, tools: Sequence[dict[str, Any]] = TOOLS
    ):
        """tools: offered in turns with tools switched on."""
        self.name, self.runner, self.chat, self.tools = name, runner, chat, tools
        self.context = runner.context
        self.is_base = isinstance(chat, CompletionFormat)

    def answer(
        self,
        turn: Turn,
        before: Sequence[Turn],
        settings: GenerationSettings,
        stopped: Callable[[], bool],
    ) -> Steps:
        """Fill a turn that follows the turns `before`; yield after each piece.

        A ValueError ends the turn with a note. stopped: polled after each token; True ends it.
        """
        turn.seed = settings.seed
        try:
            with closing(self._ask(turn, before, settings, stopped)) as pieces:
                for kind, text in pieces:
                    if kind == "note" and stopped():
                        text = "stopped" if text == CUT else "stopped; the turn is discarded"
                    turn.add(kind, text)
                    yield
        except ValueError as error:
            turn.add("note", str(error))

    def _ask(
        self,
        turn: Turn,
        before: Sequence[Turn],
        settings: GenerationSettings,
        stopped: Callable[[], bool],
    ) -> Pieces:
        session = ChatSession(
            self.chat,
            lambda prompt: self._generate(prompt, turn, settings, stopped),
            settings.system,
            self.tools if settings.tools else [],
        )
        session.messages += [message for earlier in before for message in earlier.messages]
        first_new = len(session.messages)
        yield from session.ask(turn.text)
        turn.messages = session.messages[first_new:]

    def _generate(
        self,
        prompt: list[int],
        turn: Turn,
        settings: GenerationSettings,
        stopped: Callable[[], bool],
    ) -> Iterator[int]:
        """Yield the tokens of one reply; count and time them in the turn."""
        turn.context_tokens = len(prompt)
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"{len(prompt)} tokens fill the context of {self.context}; "
                "clear the conversation or write less"
            )
        tokens = self.runner.generate(
            prompt,
            min(settings.max_new_tokens, room),
            settings.sampling,
            settings.seed,
            self.chat.stop_ids,
        )
        start, is_first = time.perf_counter(), True
        for token in tokens:
            elapsed = time.perf_counter() - start
            turn.tokens += 1
            turn.context_tokens += 1
            if is_first:
                turn.prefill_seconds += elapsed
            else:
                turn.decode_seconds += elapsed
                turn.decode_tokens += 1
            yield token
            if stopped():
                return
            start, is_first = time.perf_counter(), False


def round_robin(generators: Sequence[Steps]) -> Steps:
    """Advance each generator in turn until all have ended, then close them."""
    active = list(generators)
    try:
        while active:
            for generator in list(active):
                try:
                    next(generator)
                except StopIteration:
                    active.remove(generator)
                yield
    finally:
        for generator in generators:
            generator.close()


def title(path: Path) -> str:
    """Return a model's display name: the file name, or the path below checkpoints/."""
    parts = path.resolve().parts
    if path.is_file():
        return path.name
    start = parts.index("checkpoints") + 1 if "checkpoints" in parts else -2
    return "/".join(parts[start:])


def open_chat_model(path: Path, context: int | None, tools: list[str] | None = None) -> ChatModel:
    """Load a folder or GGUF file. tools: names to offer (default: the tools of chat training)."""
    chat, runner = open_model(path, context)
    return ChatModel(title(path), runner, chat, offered(trained_chat(path), tools))
