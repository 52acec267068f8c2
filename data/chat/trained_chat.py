"""What a model's conversations were like in SFT and DPO, kept in its config.json: the defaults of chat and demo."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.chat.tools import TOOLS
from data.manifest import read_json

KEY = "nanollama_chat"  # of config.json; in a GGUF file its JSON text is "nanollama.chat"
MAX_NAMES = 64  # tools that are recorded, the most frequent ones


@dataclass(frozen=True)
class TrainedChat:
    """The record of a checkpoint."""

    context: int  # tokens of a row, at most
    tools: tuple[str, ...] = ()  # names of the tools that rows offered, the most frequent first
    tools_at_once: int = 0  # that one row offered, at most
    thoughts: bool = False  # whether replies had thoughts

    def __post_init__(self) -> None:
        numbers = [self.context, self.tools_at_once]
        right = (
            all(type(number) is int for number in numbers)
            and self.context >= 1
            and self.tools_at_once >= 0
        )
        names = isinstance(self.tools, (list, tuple)) and all(
            isinstance(name, str) for name in self.tools
        )
        if not right or not names or not isinstance(self.thoughts, bool):
            raise ValueError(
                f"{KEY} of config.json is damaged; remove it, and chat uses the model's whole context and all tools"
            )
        object.__setattr__(self, "tools", tuple(self.tools))


class Seen:
    """Counts what the conversations of a source are like."""

    def __init__(self) -> None:
        self.tools, self.at_once, self.thoughts = Counter[str](), 0, 0

    def add(
        self, messages: Iterable[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> None:
        """Count a clean conversation."""
        names = [name_of(tool) for tool in tools or ()]
        self.tools.update(names)
        self.at_once = max(self.at_once, len(names))
        self.thoughts += any(message.get("thought") for message in messages)

    def report(self) -> dict[str, Any]:
        return {
            "tools": dict(self.tools.most_common(MAX_NAMES)),
            "tools_at_once": self.at_once,
            "thoughts": self.thoughts,
        }


def name_of(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("name"))


def record(base: Path, reports: Iterable[dict[str, Any]], context: int) -> dict[str, Any]:
    """The record of a model that is trained from `base` on sources with these reports, in rows of `context` tokens."""
    before = read_trained_chat(base) or TrainedChat(1)
    counts: Counter[str] = Counter()
    at_once, thoughts = before.tools_at_once, before.thoughts
    for report in reports:
        seen = report["seen"]
        counts.update(seen["tools"])
        at_once, thoughts = max(at_once, seen["tools_at_once"]), thoughts or seen["thoughts"] > 0
    names = dict.fromkeys([*before.tools, *(name for name, _ in counts.most_common())])
    return asdict(
        TrainedChat(max(context, before.context), tuple(names)[:MAX_NAMES], at_once, thoughts)
    )


def read_trained_chat(folder: Path) -> TrainedChat | None:
    """The record of a folder; None of a base model, of another project's, or of an older checkpoint."""
    return parse(read_json(folder / "config.json").get(KEY))


def parse(found: Any) -> TrainedChat | None:
    """The record from its JSON value. ValueError if it is damaged."""
    if found is None:
        return None
    given = found if isinstance(found, dict) else {}
    known = {name: given[name] for name in TrainedChat.__annotations__ if name in given}
    return TrainedChat(**{"context": 0, **known})


def offered(
    trained: TrainedChat | None, asked: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The tools that a conversation offers: those asked for by name, or "all"; else as many as the model saw at once.

    Without a record all are offered. ValueError for an unknown name.
    """
    known = {name_of(tool): tool for tool in TOOLS}
    if asked is None and trained:
        return [known[name] for name in trained.tools if name in known][: trained.tools_at_once]
    if asked is None or list(asked) == ["all"]:
        return list(TOOLS)
    for name in asked:
        if name not in known:
            raise ValueError(f"--tools {name}: unknown tool; there are {', '.join(known)}, or all")
    return [known[name] for name in asked]


def to_text(folder: Path) -> str | None:
    """The record of a folder as JSON, for a GGUF file."""
    trained = read_trained_chat(folder)
    return json.dumps(asdict(trained)) if trained else None
