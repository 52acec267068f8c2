"""Chat settings that SFT and DPO store in config.json: context length, tools, thoughts.

scripts.chat and the demo use them as defaults.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.chat.tools import TOOLS
from data.manifest import read_json

KEY = "nanollama_chat"  # key of config.json; a GGUF file has its JSON text as "nanollama.chat"
MAX_NAMES = 64  # recorded tools, the most frequent ones


@dataclass(frozen=True)
class ChatDefaults:
    """Chat settings of a checkpoint, from the rows that it was trained on."""

    context: int  # maximum tokens of a row
    tools: tuple[str, ...] = ()  # names of the tools in rows, the most frequent first
    tools_at_once: int = 0  # maximum tools of a row
    thoughts: bool = False  # True if replies had thoughts

    def __post_init__(self) -> None:
        numbers = [self.context, self.tools_at_once]
        numbers_valid = (
            all(type(number) is int for number in numbers)
            and self.context >= 1
            and self.tools_at_once >= 0
        )
        names_valid = isinstance(self.tools, (list, tuple)) and all(
            isinstance(name, str) for name in self.tools
        )
        if not numbers_valid or not names_valid or not isinstance(self.thoughts, bool):
            raise ValueError(
                f"{KEY} of config.json is damaged; remove it to use the model's full context and "
                "all tools"
            )
        object.__setattr__(self, "tools", tuple(self.tools))


class ChatStatistics:
    """Counts tools and thoughts in a source's conversations."""

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
    """Return the name in a tool's schema."""
    function = tool.get("function")
    return str((function if isinstance(function, dict) else tool).get("name"))


def record(base: Path, reports: Iterable[dict[str, Any]], context: int) -> dict[str, Any]:
    """Return the record of a model trained from `base` on these sources.

    reports: of the sources. context: row length.
    """
    base_record = read_chat_defaults(base) or ChatDefaults(1)
    counts: Counter[str] = Counter()
    at_once, thoughts = base_record.tools_at_once, base_record.thoughts
    for report in reports:
        statistics = report["seen"]
        counts.update(statistics["tools"])
        at_once, thoughts = (
            max(at_once, statistics["tools_at_once"]),
            thoughts or statistics["thoughts"] > 0,
        )
    names = dict.fromkeys([*base_record.tools, *(name for name, _ in counts.most_common())])
    return asdict(
        ChatDefaults(max(context, base_record.context), tuple(names)[:MAX_NAMES], at_once, thoughts)
    )


def read_chat_defaults(folder: Path) -> ChatDefaults | None:
    """Return the record of a folder; None for a base model, another or an older model."""
    return parse(read_json(folder / "config.json").get(KEY))


def parse(value: Any) -> ChatDefaults | None:
    """Return the record from its JSON value. ValueError if it is damaged."""
    if value is None:
        return None
    fields = value if isinstance(value, dict) else {}
    known = {name: fields[name] for name in ChatDefaults.__annotations__ if name in fields}
    return ChatDefaults(**{"context": 0, **known})


def offered(
    trained: ChatDefaults | None, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return the schemas of the tools to offer: the named ones, or all for "all".

    Without names: the recorded tools, at most as many as the model's rows had. Without a record,
    all tools. ValueError for an unknown name.
    """
    known = {name_of(tool): tool for tool in TOOLS}
    if names is None and trained:
        return [known[name] for name in trained.tools if name in known][: trained.tools_at_once]
    if names is None or list(names) == ["all"]:
        return list(TOOLS)
    for name in names:
        if name not in known:
            raise ValueError(f"--tools {name}: unknown tool; known: {', '.join(known)}, or all")
    return [known[name] for name in names]


def to_text(folder: Path) -> str | None:
    """Return the record of a folder as JSON, for a GGUF file."""
    trained = read_chat_defaults(folder)
    return json.dumps(asdict(trained)) if trained else None
