"""Questions with known answers: the form of a generated conversation, which ones are held out, and who is right.

An example is a conversation {"id", "source", "messages", "tools" (optional)} with "key" (what is asked, whatever the words) and
"checks": each names an assistant turn, the type and value of its right answer, and plausible wrong messages in its place.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from files import parse_json

Message = dict[str, Any]
Example = dict[str, Any]
HELD_OUT = 32  # of 256 keys
SPLITS = ("train", "heldout")
NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def held_out(key: str) -> bool:
    """Is this question kept out of training? It depends on the key alone, so no seed and no other generator can leak it."""
    return hashlib.sha256(key.encode()).digest()[0] < HELD_OUT


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
) -> dict[str, Any]:
    """The assistant message at index `turn` is right where it gives `answer`, of a kind: number, yes_no, text or call.

    others: values of a text answer that would be wrong.
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
    checks: list[dict[str, Any]],
    tools: list[dict] | None = None,
) -> Example:
    """A conversation whose id is a hash of its content."""
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


def asked(
    kind: str,
    key: str,
    question: str,
    answer: tuple[str, Any],
    values: Sequence[Any],
    say: Callable[[Any], Message],
    others: Sequence[str] = (),
) -> Example:
    """One question, one reply. answer: type and value of the right one; values: what `say` says, the right one first."""
    right, *wrong = map(say, values)
    return example(kind, key, [user(question), right], [check(1, *answer, wrong, others)])


def answer_of(text: str, kind: str = "number") -> str:
    """The final answer of a reply, normalised; "" where there is none. Thoughts do not count.

    number: the last one, without separators. yes_no: the first such word. text: the last line in lower case without
    punctuation, but for dots that begin a word. call: the first JSON object with a name, its keys sorted.
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
        found = NUMBER.findall(text)
        return str(Fraction(found[-1].replace(",", ""))) if found else ""
    if kind == "yes_no":
        word = re.search(r"\b(yes|no)\b", text.lower())
        return word[1] if word else ""
    return _plain(text.splitlines()[-1] if text else "")


def is_right(example: Example, text: str, check: int = -1) -> bool:
    """Does a reply give the right answer? Other words may surround it; beside a text answer no wrong one may stand.

    A value inside a longer one does not count: Southeast Asia is not Asia. A unit that belongs to a number must follow it.
    check: which of the example's checks; default: the last, its final answer.
    """
    judged = example["checks"][check]
    kind, answer = judged["type"], judged["answer"]
    found = answer_of(text, kind)
    if kind == "text":
        values = {_plain(value) for value in [answer, *judged.get("others", [])]}
        said = [value for value in values if _within(value, found)]
        return [
            value
            for value in said
            if not any(_within(value, other) for other in said if other != value)
        ] == [_plain(answer)]
    if kind == "call":
        return found == json.dumps(answer, sort_keys=True)
    unit = _plain(re.sub(r"^[-\d,.]+", "", answer)) if kind == "number" else ""
    return found != "" and found == answer_of(answer, kind) and _within(unit, _plain(text))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\.?\w+", text.lower()))


def _within(part: str, whole: str) -> bool:
    return not part or f" {part} " in f" {whole} "


def _call_of(text: str) -> str:
    decoder = json.JSONDecoder()
    for place in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        found = found.get("function", found)
        if isinstance(found, dict) and "name" in found:
            arguments = found.get("arguments", {})
            if isinstance(arguments, str):
                try:
                    arguments = parse_json(arguments)
                except ValueError:
                    return ""
            return json.dumps({"name": found["name"], "arguments": arguments}, sort_keys=True)
        return ""
    return ""
