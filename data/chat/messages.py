"""Parse the messages and columns of chat rows for SFT, DPO, evaluation and prompts.

A message becomes {"role", "content"} with optional "thought", "tool_calls", "tool_call_id", "name"
(of a tool response) and "weight": 0 (an assistant turn without loss). ValueError names an
unsupported key that changes the meaning. Other unknown keys are returned for the caller to count.
Values null, "", [] and {} count as absent.
"""

from collections.abc import Collection
from typing import Any

from files import parse_json

Message = dict[str, Any]
Conversation = dict[str, Any]  # "messages", "tools" and keys of its source
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
ROW_COLUMNS = ("tools", "functions", "system")  # columns read in every format
ROW_FLAGS = ("weight", "loss_weight", "train", "trainable", "loss_mask")  # of a row
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = (
    *("image", "images", "image_url", "video", "videos", "video_url"),
    *("audio", "audios", "input_audio", "file", "files"),
)
REFUSED = (  # keys that change the text or the loss but have no place in the template
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
THOUGHT_PARTS = ("reasoning_details", "thinking_blocks")  # ValueError unless THOUGHTS has the text
OWNER = {
    **dict.fromkeys((*THOUGHTS, "tool_calls", "function_call"), "assistant"),
    "tool_call_id": "tool",
}
KNOWN = {"role", "content", *FLAGS, *REFUSED, *OWNER}
NEUTRALISED = "with special tokens in their text, neutralised"
NOT_TRAINED = "no assistant turn has a loss (weight 0)"


def read_messages(value: object) -> tuple[list[Message], list[str]]:
    """Return a conversation's normalised messages and its ignored keys.

    Tool responses are sorted into the order of their calls.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of at least one message")
    results = [read_message(message) for message in value]
    ignored = [key for _, keys in results for key in keys]
    return order_responses([message for message, _ in results]), ignored


def read_message(message: object) -> tuple[Message, list[str]]:
    """Return a normalised message and its ignored keys. Idempotent."""
    role = message.get("role") if isinstance(message, dict) else message
    role = SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if not isinstance(message, dict) or role not in ROLES:
        raise ValueError(f"unknown role {str(role)[:40]!r}; available: {', '.join(ROLES)}")
    ignored: list[str] = []
    content, keys = _text(message.get("content"))
    read: Message = {"role": role, "content": content}
    ignored += keys
    if role == "assistant":
        ignored += _read_assistant(message, read)
    elif any(flag(message, key) for key in FLAGS):
        raise ValueError(
            f"a {role} turn with a loss; only assistant turns are trained: remove its weight"
        )
    for key, value in message.items():
        if not is_given(value):
            continue
        if OWNER.get(key, role) != role:
            raise ValueError(f"the key {key!r} in a turn of the role {role!r}; remove it")
        refused = key in THOUGHT_PARTS and "thought" not in read
        if refused or (key in REFUSED and (value or key == "mask")):
            raise ValueError(f"the key {key!r} of a message is not supported; remove it")
        if role == "tool" and key in ("tool_call_id", "name"):
            read[key] = _name(value, key)
        elif key not in KNOWN:
            ignored.append(str(key))
    return read, ignored


def _read_assistant(message: Message, read: Message) -> list[str]:
    """Add an assistant turn's thought, tool calls and weight to `read`; return ignored keys."""
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
        raise ValueError("tool_calls must be a list")
    if calls and is_given(legacy):
        raise ValueError("a message has both tool_calls and function_call; keep tool_calls")
    if is_given(legacy):
        calls = [{"function": legacy}]
    if calls:
        read["tool_calls"] = [read_call(call, ignored) for call in calls]
    if not is_trained(message):
        read["weight"] = 0
    return ignored


def read_call(call: Any, ignored: list[str] | None = None) -> Message:
    """Return a tool call as {"id" (if it has one), "function": {"name", "arguments": object}}."""
    try:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        arguments = parse_json(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError("a tool call must be {function: {name, arguments}}") from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a tool call must be {function: {name, arguments}}")
    if call.get("type") not in (None, "", "function"):
        raise ValueError("a tool call of a type other than 'function' is not supported; remove it")
    if ignored is not None:
        objects = {"tool_calls": call, "tool_calls.function": call["function"]}
        known = ("id", "type", "function", "name", "arguments")
        for path, value in objects.items():
            ignored += [
                f"{path}.{key}" for key in value if key not in known and is_given(value[key])
            ]
    call_id = {"id": _name(call["id"], "id")} if is_given(call.get("id")) else {}
    return {**call_id, "function": {"name": name, "arguments": arguments}}


def order_responses(messages: list[Message]) -> list[Message]:
    """Return the messages with tool responses sorted into the order of their calls.

    Responses are matched by tool_call_id, else by function name, else by position. ValueError
    unless each call has one response; calls of the last message may have none.
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
    targets = [response["tool_call_id"] for response in responses if "tool_call_id" in response]
    if len(set(ids)) < len(ids):
        raise ValueError("two tool calls with the same id; make ids unique")
    if len(set(targets)) < len(targets):
        raise ValueError("two tool messages with the same tool_call_id; each call has one response")
    if not set(targets) <= set(ids):
        raise ValueError(
            "a tool message has an unknown tool_call_id; use the id of a preceding call"
        )
    if ids and len(ids) < len(calls):
        raise ValueError("only some of the tool calls have an id; give ids to all or none")
    if ids and len(targets) < len(responses):
        raise ValueError("a tool message lacks tool_call_id, but its calls have ids; add it")
    remaining, ordered = list(responses), []
    for call in calls:
        name = call["function"]["name"]
        matches = [
            r["tool_call_id"] == call["id"] if ids else r.get("name", name) == name
            for r in remaining
        ]
        if True not in matches:
            raise ValueError("a tool call without a response; add a tool message")
        ordered.append(remaining.pop(matches.index(True)))
        if ordered[-1].get("name", name) != name:
            raise ValueError(
                "a tool message names another function than its call; correct name or tool_call_id"
            )
    if remaining:
        raise ValueError("more tool messages than tool calls; remove the extra ones")
    return ordered


def is_given(value: object) -> bool:
    """Return False for an empty value; tables fill absent keys with empty values."""
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def flag(holder: Message, key: str) -> bool | None:
    """Return a weight or flag as a boolean; None if it is absent.

    ValueError for weights other than 0 and 1.
    """
    value = holder.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError(f"the key {key!r} must be 0 or 1; other weights are not supported")
    return bool(value)


def is_trained(holder: Message, keys: Collection[str] = FLAGS) -> bool:
    """Return True if a message or row has a loss; ValueError if its weights and flags disagree."""
    flags = {key: value for key in keys if (value := flag(holder, key)) is not None}
    if len(set(flags.values())) > 1:
        raise ValueError(f"the keys {' and '.join(flags)} disagree on whether the turn is trained")
    return all(flags.values())


def read_row(row: dict[str, Any], columns: Collection[str]) -> list[str]:
    """Return the ignored columns of a row: all but `columns`. ValueError if one contains media."""
    for key in MEDIA:
        if row.get(key):
            raise ValueError(f"the column {key!r} is not supported; remove it")
    known = {*columns, *ROW_COLUMNS, *ROW_FLAGS, "id", "group"}
    return [f"column {key}" for key, value in row.items() if key not in known and is_given(value)]


def row_tools(row: dict[str, Any]) -> Any:
    """Return the tools of a row.

    Accepts a list, its JSON text, a list of JSON texts, and legacy `functions`.
    """
    tools, functions = row.get("tools"), row.get("functions")
    if is_given(tools) and is_given(functions):
        raise ValueError("the row has both tools and functions; keep tools")
    value = _json(tools if is_given(tools) else functions)
    if not isinstance(value, list):
        return value
    schemas = [_json(schema) for schema in value]
    if is_given(functions):
        return [{"type": "function", "function": schema} for schema in schemas]
    return schemas


def with_row_system(row: dict[str, Any], messages: Any) -> Any:
    """Return the messages, preceded by the row's system column if it has one."""
    system = row.get("system")
    if not is_given(system) or not isinstance(messages, list):
        return messages
    first = read_message(messages[0])[0] if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"].strip() != str(system).strip():
        raise ValueError(
            "the column system differs from the first message of role 'system'; keep one"
        )
    return messages


def ignored_line(name: str, ignored: dict[str, int]) -> list[str]:
    """Return a console line that lists a source's ignored keys, or []."""
    keys = ", ".join(f"{key} x {count:,}" for key, count in ignored.items())
    return [f"{name}: ignored keys: {keys}"] if keys else []


def _json(value: object) -> Any:
    try:
        return parse_json(value) if isinstance(value, str) and value else value
    except ValueError:
        raise ValueError("tools must be valid JSON") from None


def _name(value: object, key: str) -> str:
    if not isinstance(value, str | int):
        raise ValueError(f"the key {key!r} must be text")
    return str(value)


def _text(content: object, name: str = "content") -> tuple[str, list[str]]:
    """Return the content as text (text parts joined), and the ignored keys of the parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError(f"{name} must be text")
    ignored: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if is_given(kind) and kind not in TEXT_PARTS:
            raise ValueError(
                f"{name} with a part of type {str(kind)[:40]!r}; only text is supported"
            )
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{name} must be text")
        for key, value in part.items():
            if key in MEDIA and is_given(value):
                raise ValueError(f"{name} with a part that has {key!r}; only text is supported")
            ignored += [f"{name}.{key}"] if key not in ("type", "text") and is_given(value) else []
    return "".join(part["text"] for part in content), ignored
