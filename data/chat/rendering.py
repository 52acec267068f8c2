"""Encode conversations as tokens with a loss mask, and parse replies.

A conversation is {"messages": [...], "tools": [...]} in OpenAI's format; an assistant message may
also have a "thought" (reasoning_content elsewhere). data/chat/messages.py defines the keys of a
message; data/chat/template.py has the same template in Jinja. The loss covers the assistant's
thoughts, answers, tool calls and <|im_end|>, unless the turn has "weight": 0.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from data.chat.folder_templates import template_of
from data.chat.messages import Conversation, Message, read_call, read_messages
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
MAX_DEPTH = 100  # nested lists and objects in a call's arguments or a tool's schema
TOOLS = "You can call these tools:"


def marker_tokens(added: Iterable[AddedToken]) -> tuple[str, ...]:
    """Return the added tokens that text must not contain: special tokens and our markers."""
    return tuple(token.content for token in added if token.special or token.content in MARKERS)


def neutralise(text: str, tokens: Iterable[str] = MARKERS) -> str:
    """Break special tokens in a text: "<|im_end|>" becomes "< |im_end|>"."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _neutralise_all(value: Any, tokens: Sequence[str], depth: int = 0) -> Any:
    """Neutralise all texts of a JSON value.

    ValueError for invalid Unicode or deep nesting.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"values are nested more than {MAX_DEPTH} deep; flatten them")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text that is not valid Unicode") from None
        return neutralise(value, tokens)
    if isinstance(value, dict):
        return {
            _neutralise_all(str(key), tokens): _neutralise_all(item, tokens, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_neutralise_all(item, tokens, depth + 1) for item in value]
    return value


def clean(
    conversation: Conversation,
    tokens: Sequence[str] = (BOS, PAD, *CHAT_TOKENS),
    answered: bool = True,
) -> Conversation:
    """Normalise a conversation for encoding: check the order of roles, neutralise and trim texts.

    answered: require an assistant message, as in training. Returns {"messages", "tools"};
    ValueError names the fault.
    """
    tools = conversation.get("tools") or []
    messages, _ = read_messages(conversation.get("messages"))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of JSON schemas")
    previous = ""
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in MAY_FOLLOW[previous]:
            before = f"role {previous!r}" if previous else "no message"
            raise ValueError(
                f"a message of role {role!r} follows {before}; allowed there: "
                f"{', '.join(MAY_FOLLOW[previous])}"
            )
        if role == "tool" and previous == "assistant" and "tool_calls" not in messages[number - 1]:
            raise ValueError("tool message without a preceding tool call; remove it")
        previous = role
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant message; add a reply")
    return {
        "messages": [_clean_message(m, tokens) for m in messages],
        "tools": _neutralise_all(tools, tokens),
    }


def _clean_message(message: Message, tokens: Sequence[str]) -> Message:
    role = message["role"]
    content = _neutralise_all(message["content"], tokens)
    if role != "tool":
        content = content.strip()  # white space would merge with the newline of the header
    if role != "assistant":
        if not content and role == "user":
            raise ValueError("a user message is empty; add text or remove it")
        return {"role": role, "content": content}
    cleaned: Message = {"role": role, "content": content}
    if thought := _neutralise_all(message.get("thought", ""), tokens):
        cleaned["thought"] = thought
    if calls := [_clean_call(call, tokens) for call in message.get("tool_calls", ())]:
        cleaned["tool_calls"] = calls
    if not content and not thought and not calls:
        raise ValueError("an assistant message is empty; add content or remove it")
    return {**cleaned, "weight": 0} if "weight" in message else cleaned


def _clean_call(call: Any, tokens: Sequence[str]) -> Message:
    function = read_call(call)["function"]
    return {"function": {key: _neutralise_all(value, tokens) for key, value in function.items()}}


class Segment(NamedTuple):
    """A special token, or text between special tokens, split where the loss mask changes."""

    text: str
    trained: bool = False
    special: bool = False
    ends_reply: bool = False


def segments(conversation: Conversation, bos: str | None) -> Iterator[Segment]:
    """Yield a clean conversation's segments, which join to the template's rendering."""
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


def _turn(*content: Segment, reply: bool = False) -> Iterator[Segment]:
    yield Segment(IM_START, special=True)
    yield from content
    yield Segment(IM_END, trained=content[-1].trained, special=True, ends_reply=reply)
    yield Segment("\n")


def _reply(message: Message) -> Iterator[Segment]:
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


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # equals transformers' tojson


class Encoded(NamedTuple):
    """Token ids of a conversation."""

    ids: np.ndarray  # uint32 [n]
    trained: np.ndarray  # bool [n], loss mask: True if the token is a trained target
    ends: list[int]  # index after the <|im_end|> of each assistant turn


def index_of(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that the tokenizer must have."""
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index


class Chat:
    """The chat template with a tokenizer that has CHAT_TOKENS."""

    def __init__(self, tokenizer: Tokenizer, bos: str | None = BOS, pad: str | None = PAD):
        """bos: first token of a conversation, as of documents in pretraining; None if unused."""
        self.special = marker_tokens(tokenizer.get_added_tokens_decoder().values())
        required = (*CHAT_TOKENS, *([bos] if bos else []))
        missing = [token for token in required if token not in self.special]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}; use a chat tokenizer, which "
                "train_sft.py writes"
            )
        tokenizer.encode_special_tokens = True  # encode special tokens in texts as plain text
        self.tokenizer, self.bos, self.pad = tokenizer, bos, pad
        self.ids = {token: index_of(tokenizer, token) for token in self.special}
        self.names = {index: token for token, index in self.ids.items()}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Chat":
        """Load the chat tokenizer that save_chat_tokenizer or train_sft.py wrote."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file() or not template_of(Path(folder)):
            raise ValueError(
                f"{folder} has no chat tokenizer (tokenizer.json with {TEMPLATE}); train_sft.py "
                "writes one"
            )
        config = read_json(Path(folder) / "tokenizer_config.json")
        return cls(
            load_tokenizer(folder),
            special_text(config, "bos_token"),
            special_text(config, "pad_token"),
        )

    def clean(self, conversation: Conversation, answered: bool = True) -> Conversation:
        """Apply clean() with all special tokens of this tokenizer."""
        return clean(conversation, self.special, answered)

    def has_special(self, value: object) -> bool:
        """Return True if a JSON value's texts have a special token, which clean() neutralises."""
        text = json.dumps(value, ensure_ascii=False)
        return any(token in text for token in self.special)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Return clean conversations as token ids, loss masks and ends of assistant turns."""
        rows = [list(segments(conversation, self.bos)) for conversation in conversations]
        texts = list(dict.fromkeys(s.text for row in rows for s in row if not s.special))
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [self._join(row, ids_of) for row in rows]

    def _join(self, row: list[Segment], ids_of: dict[str, list[int]]) -> Encoded:
        ids: list[int] = []
        trained: list[bool] = []
        ends = []
        for segment in row:
            new = [self.ids[segment.text]] if segment.special else ids_of[segment.text]
            ids += new
            trained += [segment.trained] * len(new)
            if segment.ends_reply:
                ends.append(len(ids))
        return Encoded(np.array(ids, dtype=np.uint32), np.array(trained, dtype=bool), ends)

    def prompt(self, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
        """Return a prompt's token ids, which end with the generation prompt.

        The last message must be a user or tool message.
        """
        cleaned = self.clean({"messages": messages, "tools": tools}, answered=False)
        if cleaned["messages"][-1]["role"] not in ("user", "tool"):
            raise ValueError("a prompt must end with a user or tool message")
        header = self.tokenizer.encode("assistant\n", add_special_tokens=False).ids
        return [*self.encode([cleaned])[0].ids.tolist(), self.ids[IM_START], *header]

    @property
    def config_ids(self) -> dict[str, int]:
        """Return bos, eos (<|im_end|>) and pad ids for config.json."""
        named = {"bos": self.bos, "eos": IM_END, "pad": self.pad}
        return {name: index_of(self.tokenizer, token) for name, token in named.items() if token}

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a reply."""
        return [self.ids[token] for token in (IM_END, IM_START, self.bos) if token]

    def render(self, conversation: Conversation) -> str:
        """Return a clean conversation as text."""
        return "".join(segment.text for segment in segments(conversation, self.bos))

    def parse(self, ids: Sequence[int], partial: bool = False) -> "Reply":
        """Parse a reply from its ids; plain text that looks like a special token stays text.

        partial: as in parse().
        """
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
    """A parsed reply. broken: texts of invalid tool calls. ended: a stop token was generated."""

    thought: str
    content: str
    tool_calls: list[Message]  # {"function": {"name", "arguments": object}}
    broken: list[str]
    ended: bool

    def message(self, calls_before: int = 0) -> Message:
        """Return the reply as a message in OpenAI's format, its thought as reasoning_content.

        calls_before: tool calls earlier in the conversation; ids continue their numbers.
        """
        message: Message = {"role": "assistant", "content": self.content}
        if self.thought:
            message["reasoning_content"] = self.thought
        calls = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": _json(call["function"]["arguments"]),
                },
            }
            for number, call in enumerate(self.tool_calls, calls_before + 1)
        ]
        return {**message, "tool_calls": calls} if calls else message


_MARKER = re.compile("|".join(re.escape(token) for token in MARKERS))


def parse(text: str, partial: bool = False) -> Reply:
    """Parse a reply from its text with special tokens; an unclosed section extends to the end.

    partial: more text will follow; a possible prefix of a marker is withheld, and an unfinished
    call is not broken.
    """
    if partial:
        prefixes = (token[:size] for token in MARKERS for size in range(1, len(token)))
        prefix = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        text = text[: len(text) - prefix]
    pieces, position = [], 0
    for match in _MARKER.finditer(text):
        pieces += [(text[position : match.start()], False), (match.group(), True)]
        position = match.end()
    return _read([*pieces, (text[position:], False)], partial)


def _read(pieces: list[tuple[str, bool]], partial: bool) -> Reply:
    """Parse a reply from a sequence of texts (False) and markers (True)."""
    thoughts, content, calls, broken = [""], "", [], []
    mode, ended = "content", False
    for number, (text, marker) in enumerate(pieces):
        if marker and text in (START_THOUGHT, TOOL_CALL):
            mode = text
            thoughts += [""] if text == START_THOUGHT else []
        elif marker and text == END_THOUGHT:
            if mode == "content":  # the prompt began the thought
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


def _read_call(text: str) -> tuple[Message | None, str]:
    """Parse the tool call that a text begins with; return it (None if invalid) and the rest."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if not isinstance(value, dict) or not isinstance(value.get("arguments"), dict):
            return None, ""
        call = {"function": {"name": value.get("name"), "arguments": value["arguments"]}}
        _clean_call(call, ())
    except (ValueError, RecursionError):
        return None, ""
    return call, text[end:]
