"""Read conversations of several formats from files and hub data sets.

A conversation is {"messages", "tools", "id", "group"}. A malformed row becomes Skipped with its
file:line; a valid but unsuitable row (another language, no answer) becomes Skipped without it. The
train/val split keeps a `group` together: a message tree, or a question with its rephrasings.
"""

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from data.chat.messages import (
    NOT_TRAINED,
    ROW_FLAGS,
    THOUGHTS,
    Conversation,
    Message,
    is_given,
    is_trained,
    read_messages,
    read_row,
    row_tools,
    with_row_system,
)
from data.chat.rows import Row, read_rows
from data.corpus.documents import Skipped
from files import file_hash, parse_json

OASST = {
    *(
        "message_id",
        "parent_id",
        "message_tree_id",
        "tree_state",
        "prompt",
        "replies",
        "text",
        "role",
        "lang",
        "rank",
        "deleted",
    ),
    *(
        "user_id",
        "created_date",
        "review_count",
        "review_result",
        "synthetic",
        "model_name",
        "detoxify",
        "emojis",
        "labels",
    ),
}  # keys of OpenAssistant messages
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def read_conversations(
    path: str,
    format: str,
    language: str | None = None,
    split: str = "train",
    config: str | None = None,
) -> Iterator[Conversation | Skipped]:
    """Yield the conversations of files or of a hub data set.

    path: a file, folder, glob or hf://owner/name. format: one of FORMATS. language: for oasst, the
    language of the trees. split, config: of a hub data set. ValueError if the files are missing or
    the hub fails.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown conversation format {format!r}; known: {', '.join(FORMATS)}")
    rows = read_rows(path, split, config)
    if format == "oasst":
        yield from _oasst(rows, language)
        return
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        result = _skip_malformed(format, row.where, _read, format, row.value)
        if isinstance(result, dict):
            row_id = result.get("id") or row.value.get("id")
            result = {**result, "id": str(row_id or row.where), "where": row.where}
        yield result


def _skip_malformed(
    format: str, where: str, parse: Callable[..., Conversation | Skipped], *arguments: Any
) -> Conversation | Skipped:
    """Return parse(*arguments), or Skipped with the reason if the row is malformed."""
    try:
        return parse(*arguments)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return Skipped(f"not in {format} format ({type(error).__name__}: {error})", where)
    except ValueError as error:
        return Skipped(str(error), where)


def _read(format: str, row: dict[str, Any]) -> Conversation | Skipped:
    """Return a row's conversation with normalised messages.

    Its "ignored" lists unused keys and columns.
    """
    if not is_trained(row, ROW_FLAGS):
        return Skipped(NOT_TRAINED, "")
    columns = read_row(row, COLUMNS[format])
    conversation = FORMATS[format](row)
    messages, keys = read_messages(with_row_system(row, conversation["messages"]))
    tools = conversation.get("tools") or row_tools(row)
    ignored = [*keys, *columns, *conversation.get("ignored", ())]
    return {**conversation, "messages": messages, "tools": tools, "ignored": ignored}


def check_mix(mix: Collection[str], sources: Collection[str], setting: str) -> None:
    """ValueError if data.mix is empty or names an unknown source.

    setting: the config key of the sources.
    """
    known = ", ".join(sources)
    if not mix:
        raise ValueError(f"data.mix is empty; list at least one of {setting}: {known}")
    for name in mix:
        if name not in sources:
            raise ValueError(f"data.mix.{name}: {setting} has no such source; available: {known}")


def describe_source(source: Any, paths: dict[str, Path]) -> dict[str, Any]:
    """Return a source's settings and file hashes, which identify its prepared rows."""
    files = {file: file_hash(path) for file, path in paths.items()}
    return {**vars(source), "path": None if files else source.path, "files": files}


def _messages(row: dict) -> Conversation:
    return {"messages": row["messages"]}


def _sharegpt(row: dict) -> Conversation:
    messages: list[Message] = []
    for turn in row["conversations"]:
        role, value = SHAREGPT.get(turn["from"], turn["from"]), turn["value"]
        rest = {key: field for key, field in turn.items() if key not in ("from", "value")}
        if any(is_given(rest.get(key)) for key in ("role", "content")):
            raise ValueError("a turn with both from, value and role, content")
        if role == "function_call":
            functions = parse_json(value)
            functions = functions if isinstance(functions, list) else [functions]
            calls = [{"function": function} for function in functions]
            messages.append({**rest, "role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({**rest, "role": role, "content": value})
    return {"messages": messages}


def _alpaca(row: dict) -> Conversation:
    messages: list[Message] = []
    prompt = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    for question, answer in [*(row.get("history") or []), (prompt, row["output"])]:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    messages[-1] |= {key: row[key] for key in THOUGHTS if is_given(row.get(key))}
    return {"messages": messages}


def _metamath(row: dict) -> Conversation:
    """Parse a row of MetaMathQA; the text before the last line is the thought.

    The last line is "The answer is: ...".
    """
    thought, separator, answer = row["response"].rpartition("The answer is:")
    if not separator:
        raise ValueError("no line 'The answer is:'")
    thought = re.sub(r"\n?####[^\n]*\n?\s*$", "", thought).strip()
    return {
        **_solved(row["query"], thought, answer),
        "group": row.get("original_question") or row["query"],
    }


def _gsm8k(row: dict) -> Conversation:
    """Parse a row of GSM8K; the steps without calculator annotations are the thought."""
    thought, separator, answer = row["answer"].rpartition("####")
    if not separator:
        raise ValueError("no line '#### answer'")
    return _solved(row["question"], re.sub(r"<<[^>]*>>", "", thought).strip(), answer)


def _solved(question: str, thought: str, answer: str) -> Conversation:
    reply = {
        "role": "assistant",
        "thought": thought,
        "content": f"The answer is {answer.strip().rstrip('.')}.",
    }
    return {"messages": [{"role": "user", "content": question}, reply]}


def _toolformer(row: dict) -> Conversation:
    """Parse a row of GPTeacher's Toolformer.

    The instruction lists tools, and the answer contains calls. Each tool has two lines, its
    description and its signature.
    """
    lines = row["instruction"].split("\n")
    if not lines[0].startswith("toolformer:") or not lines[1].startswith("toolformer access:"):
        raise ValueError("an instruction without tools")
    names = [name.strip() for name in lines[1].partition(":")[2].split(",")]
    tools, parameters = [], {}
    for i, name in enumerate(names):
        description, signature = lines[2 + 2 * i : 4 + 2 * i]
        match = re.fullmatch(rf"{re.escape(name)}\((\w+)\)", signature.strip())
        if not match:
            raise ValueError(f"a tool whose signature is not {name}(parameter)")
        parameters[name] = parameter = match[1]
        schema = {
            "type": "object",
            "properties": {parameter: {"type": "string"}},
            "required": [parameter],
        }
        tools.append(
            {
                "type": "function",
                "function": {"name": name, "description": description, "parameters": schema},
            }
        )
    question = "\n".join(lines[2 + 2 * len(names) :])
    prompt = "\n".join(text for text in (question, row.get("input")) if text)
    pattern = (
        rf"\b({'|'.join(map(re.escape, names))})\(\s*(?:\w+\s*=\s*)?(['\"])(.*?)(?<!\\)\2\s*\)"
    )
    calls = [
        {"function": {"name": name, "arguments": {parameters[name]: argument}}}
        for name, _, argument in re.findall(pattern, row["output"], re.DOTALL)
    ]
    reply = {"role": "assistant", "content": "" if calls else row["output"], "tool_calls": calls}
    around = calls and re.search(r"\w", re.sub(pattern, "", row["output"], flags=re.DOTALL))
    ignored = ["text around the calls"] if around else []
    return {
        "messages": [{"role": "user", "content": prompt}, reply],
        "tools": tools,
        "ignored": ignored,
    }


def _oasst(rows: Iterator[Row | Skipped], language: str | None) -> Iterator[Conversation | Skipped]:
    """Yield the best path of each OpenAssistant tree.

    Rows are nested trees, or flat messages as on the hub.
    """
    flat: dict[str, list[dict]] = {}  # by parent
    roots: list[tuple[Row, dict]] = []
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        message = row.value.get("prompt", row.value)
        if not isinstance(message, dict) or not {"message_id", "text", "role"} <= message.keys():
            yield Skipped("not in oasst format", row.where)
        elif not all(
            isinstance(id, (str, int))
            for id in (message["message_id"], message.get("parent_id") or "")
        ):
            yield Skipped("not in oasst format (an id that is not text)", row.where)
        elif message.get("parent_id") is None:
            roots.append((row, message))
        else:
            flat.setdefault(message["parent_id"], []).append(message)
    messages = [
        *(root for _, root in roots),
        *(message for replies in flat.values() for message in replies),
    ]
    for parent in flat.keys() - {message["message_id"] for message in messages}:
        yield from [Skipped("a reply to a missing message", "")] * len(flat[parent])
    for row, root in roots:
        yield _skip_malformed("oasst", row.where, _tree, row, root, flat, language)


def _tree(
    row: Row, root: dict, flat: dict[str, list[dict]], language: str | None
) -> Conversation | Skipped:
    columns = []
    if row.value is not root:  # a nested tree, with its own keys
        if not is_trained(row.value, ROW_FLAGS):
            return Skipped(NOT_TRAINED, "")
        columns = read_row(row.value, OASST)
    tree = str(root.get("message_tree_id") or root["message_id"])
    if language and root.get("lang") not in (language, None):
        return Skipped("another language", "")
    path = _best_path(root, flat)
    if len(path) < 2:
        return Skipped("a tree without an answer", "")
    messages = []
    for m in path:
        role = {"prompter": "user"}.get(m["role"], m["role"])
        rest = {k: v for k, v in m.items() if k not in OASST}
        messages.append({**rest, "role": role, "content": m["text"]})
    messages, ignored = read_messages(messages)
    return {
        "messages": messages,
        "id": tree,
        "group": tree,
        "where": row.where,
        "ignored": [*ignored, *columns],
    }


def _best_path(root: dict, flat: dict[str, list[dict]]) -> list[dict]:
    """Return a path from the root, with the best-ranked valid reply at each message.

    A reply is valid if it was neither deleted nor rejected.
    """
    path = [root]
    while True:
        # pop uses each reply once, so a cycle ends
        replies = path[-1].get("replies") or flat.pop(path[-1]["message_id"], [])
        valid = [m for m in replies if not m.get("deleted") and m.get("review_result") is not False]
        if not valid:
            return path if path[-1]["role"] == "assistant" else path[:-1]
        path.append(min(valid, key=lambda m: (m.get("rank") is None, m.get("rank") or 0)))


def _oasst_row(row: dict) -> Conversation:
    raise AssertionError("_oasst reads all rows together")


GENERATED_COLUMNS = ("source", "key", "checks")  # keys of generated rows that evaluations read
COLUMNS: dict[str, tuple[str, ...]] = {  # columns of each format
    "messages": ("messages", *GENERATED_COLUMNS),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output", "history", *THOUGHTS),
    "metamath": ("query", "response", "original_question"),
    "gsm8k": ("question", "answer"),
    "toolformer": ("instruction", "input", "output"),
}
FORMATS: dict[str, Callable[[dict], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "oasst": _oasst_row,
    "metamath": _metamath,
    "gsm8k": _gsm8k,
    "toolformer": _toolformer,
}
