"""A conversation that goes on: the user asks, the model thinks, calls tools that are really run, and answers."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from data.chat.rendering import Reply
from data.chat.tools import run_tool

MAX_CALLS = 6  # rounds of tool calls in a turn


class Talk(Protocol):
    """How a model is talked to: data.chat.Chat, or one of inference/chat_formats.py."""

    @property
    def stop_ids(self) -> list[int]: ...

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]: ...

    def parse(self, ids: Sequence[int], partial: bool = False) -> Reply: ...


class Session:
    """One conversation. `messages` can be read, kept and put back; an unfinished turn leaves none of its messages."""

    def __init__(
        self,
        chat: Talk,
        speak: Callable[[list[int]], Iterator[int]],
        system: str = "",
        tools: Sequence[dict[str, Any]] = (),
        run: Callable[[str, Any], str] = run_tool,
    ):
        """speak: token ids of a prompt -> those of the reply, one by one. run: a tool's name and arguments -> its result."""
        self.chat, self.speak, self.tools, self.run = chat, speak, list(tools), run
        self.messages: list[dict[str, Any]] = (
            [{"role": "system", "content": system}] if system else []
        )

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """The turn that answers a text, in pieces of ("thought" | "content" | "call" | "result" | "note", text) as they come."""
        before = len(self.messages)
        whole = False
        if text != text.encode(errors="replace").decode():
            raise ValueError("the text is not valid Unicode: it holds half a character")
        try:
            self.messages.append({"role": "user", "content": text})
            whole = yield from self._answer()
        finally:
            if not whole:
                del self.messages[before:]

    def _answer(self) -> Generator[tuple[str, str], None, bool]:
        """Replies and tools by turns; returns whether the conversation can go on from there."""
        for _ in range(MAX_CALLS):
            reply = yield from self._reply()
            if reply.broken or not (reply.content or reply.thought or reply.tool_calls):
                said = (
                    f"a tool call that cannot be read: {reply.broken[0][:200]}"
                    if reply.broken
                    else "the model said nothing"
                )
                yield "note", f"{said}; the turn is forgotten"
                return False
            self.messages.append(reply.message())
            if not reply.tool_calls:
                if not reply.ended:
                    yield "note", "the reply is cut here: it has as many tokens as were asked for"
                return True
            for call in reply.tool_calls:
                result = self.run(call["function"]["name"], call["function"]["arguments"])
                yield "result", result
                self.messages.append({"role": "tool", "content": result})
        yield (
            "note",
            f"the model called tools {MAX_CALLS} times without an answer; the turn is forgotten",
        )
        return False

    def _reply(self) -> Generator[tuple[str, str], None, Reply]:
        """One reply in pieces; returns it."""
        said: list[int] = []
        shown = Reply("", "", [], [], False)
        for token in self.speak(self.chat.prompt(self.messages, self.tools or None)):
            said.append(token)
            reply = self.chat.parse(said, partial=True)
            yield from _news(shown, reply)
            shown = reply
        reply = self.chat.parse(said)
        yield from _news(shown, reply)
        return reply


def _news(old: Reply, new: Reply) -> Iterator[tuple[str, str]]:
    for kind, before, after in (
        ("thought", old.thought, new.thought),
        ("content", old.content, new.content),
    ):
        if after != before:
            yield kind, after[len(before) :] if after.startswith(before) else f"\n{after}"
    for call in new.tool_calls[len(old.tool_calls) :]:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in call["function"]["arguments"].items()
        )
        yield "call", f"{call['function']['name']}({arguments})"
