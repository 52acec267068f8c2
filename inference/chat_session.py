"""A conversation with a model that may think and call tools; tool calls are executed."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from data.chat.rendering import Reply
from data.chat.tools import run_tool
from inference.chat_formats import ChatFormat

MAX_CALL_ROUNDS = 6  # rounds of tool calls in a turn
CUT = "the reply stopped at the token limit"


class ChatSession:
    """One conversation. `messages` are in OpenAI's format; a failed turn adds none."""

    def __init__(
        self,
        chat: ChatFormat,
        generate: Callable[[list[int]], Iterator[int]],
        system: str = "",
        tools: Sequence[dict[str, Any]] = (),
        run: Callable[[str, Any], str] = run_tool,
    ):
        """generate: prompt tokens -> reply tokens. run: tool name, arguments -> result."""
        self.chat, self.generate, self.tools, self.run = chat, generate, list(tools), run
        self.messages: list[dict[str, Any]] = (
            [{"role": "system", "content": system}] if system else []
        )

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """Answer a message; yield (kind, text) pieces as they arrive.

        kind: "thought", "content", "call" (tool call), "result" (its result) or "note" (a problem).
        """
        before = len(self.messages)
        complete = False
        if text != text.encode(errors="replace").decode():
            raise ValueError("the text is not valid Unicode: it contains a lone surrogate")
        try:
            self.messages.append({"role": "user", "content": text})
            complete = yield from self._answer()
        finally:
            if not complete:
                del self.messages[before:]

    def _answer(self) -> Generator[tuple[str, str], None, bool]:
        """Alternate replies and tool results until an answer; return True if the turn completed."""
        for _ in range(MAX_CALL_ROUNDS):
            reply = yield from self._reply()
            if reply.broken:
                yield "note", f"invalid tool call: {reply.broken[0][:200]}; the turn is discarded"
                return False
            if not (reply.content or reply.thought or reply.tool_calls):
                yield "note", "the reply is empty; the turn is discarded"
                return False
            before = sum(len(message.get("tool_calls", ())) for message in self.messages)
            message = reply.message(before)
            self.messages.append(message)
            if not reply.tool_calls:
                if not reply.ended:
                    yield "note", CUT
                return True
            for call, named in zip(reply.tool_calls, message["tool_calls"], strict=True):
                result = self.run(call["function"]["name"], call["function"]["arguments"])
                yield "result", result
                self.messages.append(
                    {"role": "tool", "tool_call_id": named["id"], "content": result}
                )
        yield (
            "note",
            f"no answer after {MAX_CALL_ROUNDS} rounds of tool calls; the turn is discarded",
        )
        return False

    def _reply(self) -> Generator[tuple[str, str], None, Reply]:
        """Generate one reply; yield its pieces and return it."""
        tokens: list[int] = []
        shown = Reply("", "", [], [], False)
        for token in self.generate(self.chat.prompt(self.messages, self.tools or None)):
            tokens.append(token)
            reply = self.chat.parse(tokens, partial=True)
            yield from _difference(shown, reply)
            shown = reply
        reply = self.chat.parse(tokens)
        yield from _difference(shown, reply)
        return reply


def _difference(old: Reply, new: Reply) -> Iterator[tuple[str, str]]:
    """Yield the pieces that `new` adds to `old`."""
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
