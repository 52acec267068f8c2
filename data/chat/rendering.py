"""Chat: what a conversation looks like as tokens, which of them are trained, and how a reply is read back.

A conversation is {"messages": [...], "tools": [...]} in OpenAI's format; an assistant's message may
also have a "thought". data/chat/messages.py says which keys a message may have; data/chat/template.py
has the same template as Jinja text. The loss covers the assistant's thoughts, answers, tool calls
and <|im_end|>, unless the turn has "weight": 0.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.chat.folder_templates import template_of
from data.chat.messages import read_call, read_messages
from data.chat.template import (
    CHAT_TOKENS,
    END_THOUGHT,
    IM_END,
    IM_START,
    MARKERS,
    START_THOUGHT,
    TEMPLATE,
    TOOL_CALL,
    TOOL_RESPONSE,
)
from data.chat.template import TRAINING_TEMPLATE as TRAINING_TEMPLATE
from data.chat.template import jinja_template as jinja_template
from data.manifest import read_json
from data.tokenizers.bpe import BOS, PAD, load_tokenizer, special_text

MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
}
MAY_FOLLOW["tool"] = ("tool", "assistant")
MAX_DEPTH = 100  # lists and objects in each other, in a call's arguments or a tool's schema
TOOLS = "You can call these tools:"


def neutralise(text: str, tokens: Iterable[str] = MARKERS) -> str:
    """Text in which no special token is left: "<|im_end|>" becomes "< |im_end|>". All else stays as it is."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _neutralise_all(value: Any, tokens: Sequence[str], depth: int = 0) -> Any:
    """A JSON value with all its texts neutralised; ValueError where one is not Unicode, or values lie too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"values nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text that is not valid Unicode") from None
        return neutralise(value, tokens)
    if isinstance(value, dict):
        return {
            _neutralise_all(str(key), tokens): _neutralise_all(part, tokens, depth + 1)
            for key, part in value.items()
        }
    return (
        [_neutralise_all(part, tokens, depth + 1) for part in value]
        if isinstance(value, (list, tuple))
        else value
    )


def clean(
    conversation: dict[str, Any],
    tokens: Sequence[str] = (BOS, PAD, *CHAT_TOKENS),
    answered: bool = True,
) -> dict[str, Any]:
    """{"messages", "tools"} of a conversation in the one form that is encoded: roles in order, texts neutralised and trimmed.

    answered: an assistant must speak in it (as in training, not in a prompt). ValueError names what is wrong with it.
    """
    tools = conversation.get("tools") or []
    given, _ = read_messages(conversation.get("messages"))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools that are no list of JSON schemas")
    before = ""
    for number, message in enumerate(given):
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            raise ValueError(
                f"two {role} turns in a row"
                if role == before
                else f"{role} after {before or 'nothing'}"
            )
        if role == "tool" and before == "assistant" and "tool_calls" not in given[number - 1]:
            raise ValueError("a tool's response that nobody called for")
        before = role
    if answered and not any(message["role"] == "assistant" for message in given):
        raise ValueError("a conversation in which no assistant speaks")
    return {
        "messages": [_clean_message(m, tokens) for m in given],
        "tools": _neutralise_all(tools, tokens),
    }


def _clean_message(message: dict[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    role = message["role"]
    content = _neutralise_all(message["content"], tokens)
    if role != "tool":
        content = content.strip()  # or else white space would melt into the newline of the header
    if role != "assistant":
        if not content and role == "user":
            raise ValueError("an empty user turn")
        return {"role": role, "content": content}
    cleaned: dict[str, Any] = {"role": role, "content": content}
    if thought := _neutralise_all(message.get("thought", ""), tokens):
        cleaned["thought"] = thought
    if calls := [_clean_call(call, tokens) for call in message.get("tool_calls", ())]:
        cleaned["tool_calls"] = calls
    if not content and not thought and not calls:
        raise ValueError("an empty assistant turn")
    return {**cleaned, "weight": 0} if "weight" in message else cleaned


def _clean_call(call: Any, tokens: Sequence[str]) -> dict[str, Any]:
    function = read_call(call)["function"]
    return {"function": {key: _neutralise_all(value, tokens) for key, value in function.items()}}


class Segment(NamedTuple):
    """A special token, or the text between two (cut where training begins: after an assistant's header)."""

    text: str
    trained: bool = False
    special: bool = False
    ends_reply: bool = False


def segments(conversation: dict[str, Any], bos: str | None) -> Iterator[Segment]:
    """A clean conversation as the template renders it. The texts in a row are the rendering."""
    messages, tools = conversation["messages"], conversation["tools"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if bos:
        yield Segment(bos, special=True)
    if tools:
        lines = "\n".join([TOOLS, *(_json(tool) for tool in tools)])
        system = f"{system}\n\n{lines}" if system else lines
    if system:
        yield from _turn(Segment(f"system\n{system}"))
    for message in messages[messages[0]["role"] == "system" :]:
        if message["role"] == "assistant":
            yield from _turn(Segment("assistant\n"), *_reply(message), reply=True)
        elif message["role"] == "tool":
            response = [Segment(TOOL_RESPONSE, special=True), Segment(message["content"])]
            yield from _turn(Segment("tool\n"), *response)
        else:
            yield from _turn(Segment(f"{message['role']}\n{message['content']}"))


def _turn(*inside: Segment, reply: bool = False) -> Iterator[Segment]:
    yield Segment(IM_START, special=True)
    yield from inside
    yield Segment(IM_END, trained=inside[-1].trained, special=True, ends_reply=reply)
    yield Segment("\n")


def _reply(message: dict[str, Any]) -> Iterator[Segment]:
    trained = "weight" not in message
    if "thought" in message:
        yield Segment(START_THOUGHT, trained, True)
        yield Segment(message["thought"], trained)
        yield Segment(END_THOUGHT, trained, True)
    yield Segment(message["content"], trained)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        yield Segment(TOOL_CALL, trained, True)
        yield Segment(
            _json({"name": function["name"], "arguments": function["arguments"]}), trained
        )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # as the tojson of transformers


class Encoded(NamedTuple):
    ids: np.ndarray  # uint32 [n]
    trained: np.ndarray  # bool [n]: has a loss as a target
    ends: list[int]  # where each assistant's turn ends: the index after its <|im_end|>


def index_of(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index


class Chat:
    """The template with one tokenizer, which has CHAT_TOKENS."""

    def __init__(self, tokenizer: Tokenizer, bos: str | None = BOS, pad: str | None = PAD):
        """bos: begins every conversation, as it begins every document in pretraining; None for models without."""
        special = {
            added.content
            for added in tokenizer.get_added_tokens_decoder().values()
            if added.special
        }
        missing = [
            token for token in (*CHAT_TOKENS, *([bos] if bos else [])) if token not in special
        ]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}; it is no tokenizer for chat (train_sft.py makes one)"
            )
        tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        self.tokenizer, self.bos, self.pad = tokenizer, bos, pad
        self.special = tuple(
            added.content
            for added in tokenizer.get_added_tokens_decoder().values()
            if added.special
        )
        self.ids = {token: index_of(tokenizer, token) for token in self.special}
        self.names = {index: token for token, index in self.ids.items()}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Chat":
        """The chat tokenizer of a folder that save_chat_tokenizer or train_sft.py wrote."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file() or not template_of(Path(folder)):
            raise ValueError(
                f"{folder} holds no chat tokenizer ({TEMPLATE} beside tokenizer.json); train_sft.py writes one"
            )
        config = read_json(Path(folder) / "tokenizer_config.json")
        return cls(
            load_tokenizer(folder),
            special_text(config, "bos_token"),
            special_text(config, "pad_token"),
        )

    def clean(self, conversation: dict[str, Any], answered: bool = True) -> dict[str, Any]:
        """clean() against all special tokens of this tokenizer."""
        return clean(conversation, self.special, answered)

    def holds_special(self, value: Any) -> bool:
        """Whether a text in a JSON value holds a special token, which clean() neutralises."""
        text = json.dumps(value, ensure_ascii=False)
        return any(token in text for token in self.special)

    def encode(self, conversations: Sequence[dict[str, Any]]) -> list[Encoded]:
        """Ids of clean conversations, what of them is trained, and where they may be cut."""
        parts = [list(segments(conversation, self.bos)) for conversation in conversations]
        texts = list(dict.fromkeys(part.text for row in parts for part in row if not part.special))
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(texts, found, strict=True)}
        return [self._join(row, ids_of) for row in parts]

    def _join(self, parts: list[Segment], ids_of: dict[str, list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        ends = []
        for part in parts:
            new = [self.ids[part.text]] if part.special else ids_of[part.text]
            ids += new
            trained += [part.trained] * len(new)
            if part.ends_reply:
                ends.append(len(ids))
        return Encoded(np.array(ids, dtype=np.uint32), np.array(trained, dtype=bool), ends)

    def prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids up to where the assistant's next turn begins. ValueError where it is not the assistant's turn to speak."""
        cleaned = self.clean({"messages": messages, "tools": tools}, answered=False)
        if cleaned["messages"][-1]["role"] not in ("user", "tool"):
            raise ValueError("a prompt must end with a user's message or a tool's response")
        header = self.tokenizer.encode("assistant\n", add_special_tokens=False).ids
        return [*self.encode([cleaned])[0].ids.tolist(), self.ids[IM_START], *header]

    @property
    def config_ids(self) -> dict[str, int]:
        """bos, eos and pad of config.json; a reply ends with <|im_end|>."""
        named = {"bos": self.bos, "eos": IM_END, "pad": self.pad}
        return {name: index_of(self.tokenizer, token) for name, token in named.items() if token}

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a reply."""
        return [self.ids[token] for token in (IM_END, IM_START, self.bos) if token]

    def render(self, conversation: dict[str, Any]) -> str:
        """A clean conversation as text."""
        return "".join(part.text for part in segments(conversation, self.bos))

    def parse(self, ids: Sequence[int], partial: bool = False) -> "Reply":
        """A reply from its ids. Text that only looks like a special token stays text. partial: as in parse()."""
        pieces: list[tuple[str, bool]] = []
        run: list[int] = []
        for index in (*ids, None):
            if index is not None and index not in self.names:
                run.append(int(index))
                continue
            text = self.tokenizer.decode(run, skip_special_tokens=False)
            pieces.append((text.rstrip("\ufffd") if index is None and partial else text, False))
            run = []
            if index is not None:
                pieces.append((self.names[index], True))
        return _read(pieces, partial)


class Reply(NamedTuple):
    """What an assistant said. broken: tool calls that clean() would not take, or no JSON at all. ended: it stopped itself."""

    thought: str
    content: str
    tool_calls: list[dict[str, Any]]  # {"function": {"name", "arguments"}}
    broken: list[str]
    ended: bool

    def message(self) -> dict[str, Any]:
        """As a message, to go on with the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thought:
            message["thought"] = self.thought
        return {**message, "tool_calls": self.tool_calls} if self.tool_calls else message


_MARKER = re.compile("|".join(re.escape(token) for token in MARKERS))


def parse(text: str, partial: bool = False) -> Reply:
    """A reply from its text, special tokens included; unclosed parts are what they began as.

    partial: the text still grows; what may be the beginning of a marker is held back, and an unfinished call is not broken.
    """
    if partial:
        held = max(
            (
                size
                for token in MARKERS
                for size in range(1, len(token))
                if text.endswith(token[:size])
            ),
            default=0,
        )
        text = text[: len(text) - held]
    pieces, at = [], 0
    for found in _MARKER.finditer(text):
        pieces += [(text[at : found.start()], False), (found.group(), True)]
        at = found.end()
    return _read([*pieces, (text[at:], False)], partial)


def _read(pieces: list[tuple[str, bool]], partial: bool) -> Reply:
    """A reply from texts and markers (True) by turns."""
    thoughts, content, calls, broken = [""], "", [], []
    mode, ended = "content", False
    for number, (text, marker) in enumerate(pieces):
        if marker and text in (START_THOUGHT, TOOL_CALL):
            mode = text
            thoughts += [""] if text == START_THOUGHT else []
        elif marker and text == END_THOUGHT:
            if mode == "content":  # it was begun by the prompt
                thoughts, content = [*thoughts, content], ""
            mode = "content"
        elif marker:
            ended = True
            break
        elif mode == START_THOUGHT:
            thoughts[-1] += text
        elif mode == TOOL_CALL:
            call, rest = _read_call(text)
            if call:
                calls.append(call)
                content += rest
            elif not (partial and number == len(pieces) - 1):
                broken.append(text)
            mode = "content"
        else:
            content += text
    return Reply(
        "\n".join(thought for thought in thoughts if thought), content.strip(), calls, broken, ended
    )


def _read_call(text: str) -> tuple[dict[str, Any] | None, str]:
    """The call that a text begins with, None where it is none that clean() takes, and what follows."""
    begun = text.lstrip()
    try:
        call, end = json.JSONDecoder().raw_decode(begun)
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            return None, ""
        made = {"function": {"name": call.get("name"), "arguments": call["arguments"]}}
        _clean_call(made, ())
    except (ValueError, RecursionError):
        return None, ""
    return made, begun[end:]
