"""Turns of a conversation with one model, filled piece by piece while it speaks; what a page shows of them is in page.py."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.chat.tools import TOOLS
from inference.chat_formats import Continuation
from inference.chat_session import Session, Talk
from inference.runners import Runner
from inference.sampling import Sampling

Steps = Generator[None, None, None]
Pieces = Generator[tuple[str, str], None, None]


@dataclass(frozen=True)
class GenerationSettings:
    """What a turn is asked with."""

    sampling: Sampling = field(default_factory=Sampling)
    new: int = 512  # tokens of one reply at most
    seed: int = 0
    system: str = ""
    tools: bool = True


@dataclass
class Turn:
    """What a user typed and what came of it."""

    text: str
    parts: list[tuple[str, str]] = field(
        default_factory=list
    )  # ("thought" | "content" | "call" | "result" | "note", text)
    messages: list[dict[str, Any]] = field(
        default_factory=list
    )  # what the model is told of it later; none if it went wrong
    seed: int = 0
    held: int = 0  # tokens of the context in use
    tokens: int = 0  # that the model said
    first: float = 0.0  # seconds until the first token of each reply, together
    seconds: float = 0.0  # for the tokens after it
    later: int = 0  # how many those are

    def add(self, kind: str, text: str) -> None:
        """A piece more; pieces of thought and content are joined."""
        if self.parts and self.parts[-1][0] == kind and kind in ("thought", "content"):
            text = self.parts.pop()[1] + text
        self.parts.append((kind, text))


class ChatModel:
    """A model that can be talked to: by a chat template, or, of a base model, one that continues what was typed."""

    def __init__(
        self, name: str, runner: Runner, chat: Talk, tools: Sequence[dict[str, Any]] = TOOLS
    ):
        """tools: what a conversation offers while tools are on."""
        self.name, self.runner, self.context, self.chat, self.tools = (
            name,
            runner,
            runner.context,
            chat,
            tools,
        )
        self.is_base = isinstance(chat, Continuation)

    def answer(
        self,
        turn: Turn,
        before: Sequence[Turn],
        how: GenerationSettings,
        stopped: Callable[[], bool],
    ) -> Steps:
        """Fill a turn that follows others; yields after each token and each piece. A mistake ends it with a note."""
        turn.seed = how.seed
        try:
            with closing(self._ask(turn, before, how, stopped)) as said:
                for kind, text in said:
                    if kind == "note" and stopped():
                        text = "stopped" if "cut here" in text else "stopped; the turn is forgotten"
                    turn.add(kind, text)
                    yield
        except ValueError as error:
            turn.add("note", str(error))

    def _ask(
        self,
        turn: Turn,
        before: Sequence[Turn],
        how: GenerationSettings,
        stopped: Callable[[], bool],
    ) -> Pieces:
        stop = self.chat.stop_ids
        tools = self.tools if how.tools else []
        session = Session(
            self.chat,
            lambda prompt: self._speak(prompt, turn, how, stop, stopped),
            how.system,
            tools,
        )
        session.messages += [message for earlier in before for message in earlier.messages]
        known = len(session.messages)
        yield from session.ask(turn.text)
        turn.messages = session.messages[known:]

    def _speak(
        self,
        prompt: list[int],
        turn: Turn,
        how: GenerationSettings,
        stop: Sequence[int],
        stopped: Callable[[], bool],
    ) -> Iterator[int]:
        """The tokens of one reply, counted and timed."""
        turn.held = len(prompt)
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"{len(prompt)} tokens fill the context of {self.context}; clear the conversation or write less"
            )
        begun, first = time.perf_counter(), True
        for token in self.runner.speak(prompt, min(how.new, room), how.sampling, how.seed, stop):
            took = time.perf_counter() - begun
            turn.tokens, turn.held = turn.tokens + 1, turn.held + 1
            if first:
                turn.first += took
            else:
                turn.seconds, turn.later = turn.seconds + took, turn.later + 1
            yield token
            if stopped():
                return
            begun, first = time.perf_counter(), False


def in_turns(many: Sequence[Steps]) -> Steps:
    """A step of each by turns, until all have ended; all are closed at the end."""
    alive = list(many)
    try:
        while alive:
            for one in list(alive):
                try:
                    next(one)
                except StopIteration:
                    alive.remove(one)
                yield
    finally:
        for one in many:
            one.close()


def title(path: Path) -> str:
    """What tells a model from others: the file, or the folders down from checkpoints/."""
    parts = path.resolve().parts
    if path.is_file():
        return path.name
    return "/".join(
        parts[parts.index("checkpoints") + 1 :] if "checkpoints" in parts else parts[-2:]
    )
