"""What a row and its messages may hold, in one place for SFT, DPO, evaluation and prompts.

A message is read into {"role", "content"} and, where given, "thought", "tool_calls",
"tool_call_id", "name" (of a tool response) and "weight": 0 (an assistant turn without loss).
ValueError names a key that changes the meaning and is not supported. Other unknown keys are
returned, so that the caller can count them. null, "", [] and {} count as absent.
"""

import json
from collections.abc import Collection
from typing import Any

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {"developer": "system", "function": "tool"}
THOUGHTS = ("thought", "reasoning_content", "reasoning", "thinking")  # names of the same text
FLAGS = (  # 0 or false: the assistant turn has no loss
    "weight",
    "loss_weight",
    "loss_scale",
    "train",
    "training",
    "trainable",
    "trained",
    "is_trainable",
    "loss",
    "loss_mask",
)
ROW_COLUMNS = ("tools", "functions", "system")  # read in every format
ROW_FLAGS = ("weight", "loss_weight", "train", "trainable", "loss_mask")  # of a row
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = (
    *("image", "images", "image_url", "video", "videos", "video_url"),
    *("audio", "audios", "input_audio", "file", "files"),
)
REFUSED = (  # keys that change what is said or trained, without a place in the template
    *MEDIA,
    "attachments",
    "refusal",
    "mask",
    "train_detail",
    "training_detail",
    "prefix",
    "partial",
    "channel",
    "recipient",
    "tools",
    "functions",
    "tool_plan",
)
THOUGHT_PARTS = (
    "reasoning_details",
    "thinking_blocks",
)  # refused unless one of THOUGHTS holds the text
OWNER = {
    **dict.fromkeys((*THOUGHTS, "tool_calls", "function_call"), "assistant"),
    "tool_call_id": "tool",
}
KNOWN = {"role", "content", *FLAGS, *REFUSED, *OWNER}
NEUTRALISED = "with special tokens in their text, neutralised"
NOT_TRAINED = "no assistant turn has a loss (weight 0)"


def read_messages(given: Any) -> tuple[list[Message], list[str]]:
    """The messages of a conversation and the ignored keys; tool responses in the order of calls."""
    if not isinstance(given, list) or not given:
        raise ValueError("a conversation without messages")
    read = [read_message(message) for message in given]
    return order_responses([message for message, _ in read]), [
        key for _, keys in read for key in keys
    ]


def read_message(message: Any) -> tuple[Message, list[str]]:
    """One message and its ignored keys. Reading the result again changes nothing."""
    role = message.get("role") if isinstance(message, dict) else message
    role = SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if not isinstance(message, dict) or role not in ROLES:
        raise ValueError(f"the unknown role {str(role)[:40]!r}")
    ignored: list[str] = []
    content, keys = _text(message.get("content"))
    read: Message = {"role": role, "content": content}
    ignored += keys
    if role == "assistant":
        ignored += _read_assistant(message, read)
    elif any(flag(message, key) for key in FLAGS):
        raise ValueError(f"a {role} turn with a loss; only assistant turns are trained")
    for key, value in message.items():
        if not is_given(value):
            continue
        if OWNER.get(key, role) != role:
            raise ValueError(f"the key {key!r} in a turn of the role {role!r}")
        refused = key in THOUGHT_PARTS and "thought" not in read
        if refused or (key in REFUSED and (value or key == "mask")):
            raise ValueError(f"the key {key!r} of a message, which is not supported")
        if role == "tool" and key in ("tool_call_id", "name"):
            read[key] = _name(value, key)
        elif key not in KNOWN:
            ignored.append(str(key))
    return read, ignored


def _read_assistant(message: Message, read: Message) -> list[str]:
    """Add the thought, tool calls and weight of an assistant turn to `read`; return ignored keys."""
    ignored: list[str] = []
    thoughts: list[str] = []
    for key in THOUGHTS:
        text, keys = _text(message.get(key), key)
        thoughts += [text] if text else []
        ignored += keys
    if len(set(thoughts)) > 1:
        raise ValueError(
            f"different texts under {' and '.join(key for key in THOUGHTS if message.get(key))}"
        )
    if thoughts:
        read["thought"] = thoughts[0]
    calls, legacy = message.get("tool_calls") or [], message.get("function_call")
    if not isinstance(calls, list):
        raise ValueError("tool_calls that are no list")
    if calls and is_given(legacy):
        raise ValueError("both tool_calls and function_call in one turn")
    if is_given(legacy):
        calls = [{"function": legacy}]
    if calls:
        read["tool_calls"] = [read_call(call, ignored) for call in calls]
    if not is_trained(message):
        read["weight"] = 0
    return ignored


def read_call(call: Any, ignored: list[str] | None = None) -> Message:
    """A tool call as {"id" (if it has one), "function": {"name", "arguments": object}}."""
    try:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        raise ValueError("a tool call that is no {function: {name, arguments}}") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a tool call that is no {function: {name, arguments}}")
    if call.get("type") not in (None, "", "function"):
        raise ValueError("a tool call of a type other than 'function'")
    if ignored is not None:
        parts = {"tool_calls": call, "tool_calls.function": call["function"]}
        known = ("id", "type", "function", "name", "arguments")
        for path, part in parts.items():
            ignored += [f"{path}.{key}" for key in part if key not in known and is_given(part[key])]
    number = {"id": _name(call["id"], "id")} if is_given(call.get("id")) else {}
    return {**number, "function": {"name": name, "arguments": arguments}}


def order_responses(messages: list[Message]) -> list[Message]:
    """The messages with the responses to each turn's tool calls in the order of the calls.

    Responses are matched by tool_call_id, else by function name, else in the order given.
    ValueError unless each call has one response; the calls of the last message may have none.
    """
    ordered: list[Message] = []
    start = 0
    while start < len(messages):
        message, end = messages[start], start + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        responses, calls = messages[start + 1 : end], message.get("tool_calls")
        if calls and (responses or end < len(messages)):
            responses = _match(calls, responses)
        ordered += [message, *responses]
        start = end
    return ordered


def _match(calls: list[Message], responses: list[Message]) -> list[Message]:
    ids = [call["id"] for call in calls if "id" in call]
    asked = [response["tool_call_id"] for response in responses if "tool_call_id" in response]
    if len(set(ids)) < len(ids):
        raise ValueError("two tool calls with the same id")
    if len(set(asked)) < len(asked):
        raise ValueError("two tool responses with the same tool_call_id")
    if not set(asked) <= set(ids):
        raise ValueError("a tool response whose tool_call_id is that of no call before it")
    if ids and len(ids) < len(calls):
        raise ValueError("tool calls of which only some have an id")
    if ids and len(asked) < len(responses):
        raise ValueError("a tool response without tool_call_id to calls with ids")
    left, ordered = list(responses), []
    for call in calls:
        name = call["function"]["name"]
        fits = [
            r["tool_call_id"] == call["id"] if ids else r.get("name", name) == name for r in left
        ]
        if True not in fits:
            raise ValueError("a tool call without a response")
        ordered.append(left.pop(fits.index(True)))
        if ordered[-1].get("name", name) != name:
            raise ValueError("a tool response with the name of another function than its call")
    if left:
        raise ValueError("more tool responses than tool calls")
    return ordered


def is_given(value: Any) -> bool:
    """Whether a value says anything: tables fill absent keys with null."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def flag(holder: dict[str, Any], key: str) -> bool | None:
    """A weight or a flag as a truth value, None if absent; ValueError for other weights."""
    value = holder.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"the key {key!r} is neither 0 nor 1; other weights are not supported")
    return bool(value)


def is_trained(holder: dict[str, Any], keys: Collection[str] = FLAGS) -> bool:
    """Whether a message or a row has a loss; ValueError if its weights and flags disagree."""
    found = {key: value for key in keys if (value := flag(holder, key)) is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f"the keys {' and '.join(found)} disagree on whether the turn is trained")
    return all(found.values())


def read_row(row: dict[str, Any], columns: Collection[str]) -> list[str]:
    """The ignored columns of a row: all but `columns`. ValueError if one holds media."""
    for key in MEDIA:
        if row.get(key):
            raise ValueError(f"the column {key!r}, which is not supported")
    known = {*columns, *ROW_COLUMNS, *ROW_FLAGS, "id", "group"}
    return [f"column {key}" for key, value in row.items() if key not in known and is_given(value)]


def row_tools(row: dict[str, Any]) -> Any:
    """The tools of a row: a list, its JSON text, a list of JSON texts, or legacy `functions`."""
    tools, functions = row.get("tools"), row.get("functions")
    if is_given(tools) and is_given(functions):
        raise ValueError("both tools and functions")
    given = _json(tools if is_given(tools) else functions)
    if not isinstance(given, list):
        return given
    given = [_json(tool) for tool in given]
    return (
        [{"type": "function", "function": tool} for tool in given] if is_given(functions) else given
    )


def with_row_system(row: dict[str, Any], messages: Any) -> Any:
    """Messages that begin with the row's own system prompt, if it has one."""
    system = row.get("system")
    if not is_given(system) or not isinstance(messages, list):
        return messages
    first = read_message(messages[0])[0] if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"].strip() != str(system).strip():
        raise ValueError("a system column and another system turn")
    return messages


def ignored_line(name: str, ignored: dict[str, int]) -> list[str]:
    """A line on the ignored keys of a source, if there are any."""
    keys = ", ".join(f"{key} x {count:,}" for key, count in ignored.items())
    return [f"{name}: ignored keys: {keys}"] if keys else []


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except (ValueError, RecursionError):
        raise ValueError("tools that are not valid JSON") from None


def _name(value: Any, key: str) -> str:
    if not isinstance(value, str | int):
        raise ValueError(f"the key {key!r} is not text")
    return str(value)


def _text(content: Any, name: str = "content") -> tuple[str, list[str]]:
    """Content as text, with text parts joined, and the ignored keys of the parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError(f"{name} that is not text")
    ignored: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if is_given(kind) and kind not in TEXT_PARTS:
            raise ValueError(
                f"{name} with a part of type {str(kind)[:40]!r}; only text is supported"
            )
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{name} that is not text")
        for key, value in part.items():
            if key in MEDIA and is_given(value):
                raise ValueError(f"{name} with a part that holds {key!r}; only text is supported")
            ignored += [f"{name}.{key}"] if key not in ("type", "text") and is_given(value) else []
    return "".join(part["text"] for part in content), ignored
