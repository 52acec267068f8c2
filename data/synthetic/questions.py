"""Format, split and scoring of generated questions.

An example is a conversation {"id", "source", "messages", "tools" (optional)} with "key", which
identifies the question independently of its wording, and "checks". A check has an assistant turn,
the type and value of its right answer, and plausible wrong messages.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from files import parse_json

Message = dict[str, Any]
Example = dict[str, Any]
Check = dict[str, Any]
Value = TypeVar("Value")
HELDOUT_VALUES = 32  # number of the 256 values of a hash byte
SPLITS = ("train", "heldout")
NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def is_heldout(key: str) -> bool:
    """Return True if a question is in the heldout split.

    It depends only on the key, so that seeds cannot mix the splits.
    """
    return hashlib.sha256(key.encode()).digest()[0] < HELDOUT_VALUES


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, thought: str = "") -> Message:
    return {"role": "assistant", "content": content, **({"thought": thought} if thought else {})}


def call(name: str, arguments: dict[str, Any], thought: str = "") -> Message:
    return {
        **assistant("", thought),
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }


def check(
    turn: int, kind: str, answer: Any, wrong: Sequence[Message], others: Sequence[str] = ()
) -> Check:
    """Return a check of the assistant message at index `turn`.

    kind: type of the answer, number, yes_no, text or call. others: wrong values of a text answer.
    """
    return {
        "turn": turn,
        "type": kind,
        "answer": answer,
        "wrong": list(wrong),
        **({"others": list(others)} if others else {}),
    }


def example(
    kind: str,
    key: str,
    messages: list[Message],
    checks: list[Check],
    tools: list[dict] | None = None,
) -> Example:
    """Return a conversation whose id is a hash of its content."""
    names = [tool["function"]["name"] for tool in tools or ()]
    digest = hashlib.sha256(json.dumps([messages, names], sort_keys=True).encode()).hexdigest()[:16]
    content = {"messages": messages, **({"tools": tools} if tools else {})}
    return {
        "id": f"{kind}-{digest}",
        "source": f"synthetic/{kind}",
        "key": key,
        **content,
        "checks": checks,
    }


def single_turn(
    kind: str,
    key: str,
    question: str,
    answer: tuple[str, Any],
    values: Sequence[Value],
    say: Callable[[Value], Message],
    others: Sequence[str] = (),
) -> Example:
    """Return an example with one question and one reply.

    answer: type and value of the right answer. values: arguments of `say`, the right value first.
    """
    right, *wrong = map(say, values)
    return example(kind, key, [user(question), right], [check(1, *answer, wrong, others)])


def answer_of(text: str, kind: str = "number") -> str:
    """Return the normalised final answer of a reply without its thoughts; "" if it has none.

    number: the last number, without separators. yes_no: the first such word. text: the last line in
    lower case, without punctuation except dots that begin a word. call: the first JSON object with
    a name, keys sorted.
    """
    text = (
        text.rpartition("<|end_thought|>")[2]
        .partition("<|start_thought|>")[0]
        .replace("<|im_end|>", " ")
        .strip()
    )
    if kind == "call":
        return _call_of(text)
    if kind == "number":
        numbers = NUMBER.findall(text)
        return str(Fraction(numbers[-1].replace(",", ""))) if numbers else ""
    if kind == "yes_no":
        word = re.search(r"\b(yes|no)\b", text.lower())
        return word[1] if word else ""
    return _plain(text.splitlines()[-1] if text else "")


def is_right(example: Example, text: str, check: int = -1) -> bool:
    """Return True if a reply gives the right answer; other words may surround it.

    A text answer must not appear together with a wrong answer. A value inside a longer value does
    not count: Southeast Asia is not Asia. The unit of a number must be present. check: index into
    the example's checks; default: the final answer.
    """
    selected = example["checks"][check]
    kind, answer = selected["type"], selected["answer"]
    reply = answer_of(text, kind)
    if kind == "text":
        values = {_plain(value) for value in [answer, *selected.get("others", [])]}
        present = [value for value in values if _within(value, reply)]
        longest = [
            value
            for value in present
            if not any(_within(value, longer) for longer in present if longer != value)
        ]
        return longest == [_plain(answer)]
    if kind == "call":
        return reply == json.dumps(answer, sort_keys=True)
    unit = _plain(re.sub(r"^[-\d,.]+", "", answer)) if kind == "number" else ""
    return reply != "" and reply == answer_of(answer, kind) and _within(unit, _plain(text))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\.?\w+", text.lower()))


def _within(words: str, text: str) -> bool:
    return not words or f" {words} " in f" {text} "


def _call_of(text: str) -> str:
    decoder = json.JSONDecoder()
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        value = value.get("function", value)
        if isinstance(value, dict) and "name" in value:
            arguments = value.get("arguments", {})
            if isinstance(arguments, str):
                try:
                    arguments = parse_json(arguments)
                except ValueError:
                    return ""
            return json.dumps({"name": value["name"], "arguments": arguments}, sort_keys=True)
        return ""
    return ""
