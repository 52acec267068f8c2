"""Conversations in all formats and preference pairs, from a row of a file to prepared ids."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from data.chat.conversations import GENERATED_COLUMNS, OASST
from data.chat.messages import FLAGS, MEDIA, REFUSED, ROW_COLUMNS, THOUGHTS
from data.chat.pair_batches import Pairs
from data.chat.preferences import PairSource, PreferenceConfig
from data.chat.preferences import prepare as prepare_pairs
from data.chat.rendering import Chat
from data.chat.sft import ChatConfig, ChatSource, Conversations
from data.chat.sft import prepare as prepare_conversations
from data.manifest import read
from fuzz.bases import chat_files, write_files
from fuzz.mutate import (
    Change,
    byte_changes,
    change_bytes,
    change_json,
    dump,
    json_changes,
    paths_of,
)
from fuzz.sandbox import fuzz

LENGTH = 640  # tokens of a row
MARK = "marked text 4711"
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
CALLS = [
    {
        "id": str(i),
        "type": "function",
        "function": {"name": "add", "arguments": {"a": i, "b": [1.5]}},
    }
    for i in range(2)
]
HELLO = {"role": "user", "content": "What is 2 + 2?"}
FOUR = {"role": "assistant", "content": "It is 4."}
REPLY = {"message_id": "e", "text": "Yes.", "role": "assistant", "replies": []}
ROWS: dict[str, list[Any]] = {
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                HELLO,
                {"role": "assistant", "content": "", "thought": "I ask.", "tool_calls": CALLS},
                {"role": "tool", "tool_call_id": "1", "name": "add", "content": "5"},
                {"role": "tool", "tool_call_id": "0", "content": [{"type": "text", "text": "4"}]},
                {**FOUR, "weight": 1},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "You are welcome.", "weight": 0},
            ],
            "tools": [TOOL],
            "id": "a",
        }
    ],
    "sharegpt": [
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What is 2 + 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "It is 4."},
            ],
            "tools": json.dumps([TOOL]),
        }
    ],
    "alpaca": [
        {
            "instruction": "Add.",
            "input": "2 + 2",
            "output": "4",
            "history": [["Hello", "Hi"]],
            "thought": "It is easy.",
        }
    ],
    "oasst": [
        {
            "message_id": "q",
            "parent_id": None,
            "message_tree_id": "t",
            "role": "prompter",
            "text": "Hello",
            "lang": "en",
        },
        {
            "message_id": "a",
            "parent_id": "q",
            "role": "assistant",
            "text": "Hi",
            "rank": 1,
            "deleted": False,
        },
        {
            "message_id": "b",
            "parent_id": "q",
            "role": "assistant",
            "text": "Yes?",
            "rank": 0,
            "review_result": True,
        },
        {
            "message_id": "c",
            "parent_id": "b",
            "role": "prompter",
            "text": "Add 2 and 2.",
            "replies": [],
        },
        {
            "message_tree_id": "u",
            "prompt": {"message_id": "d", "text": "One?", "role": "prompter", "replies": [REPLY]},
        },
    ],
    "metamath": [
        {
            "query": "2 + 2?",
            "response": "We add.\n#### 4\nThe answer is: 4",
            "original_question": "2 + 2 = ?",
        }
    ],
    "gsm8k": [{"question": "2 + 2?", "answer": "We add <<2+2=4>>4.\n#### 4"}],
    "toolformer": [
        {
            "instruction": "toolformer: enabled\ntoolformer access: Wiki\n"
            "Finds pages.\nWiki(title)\n"
            "Who was Ada?",
            "input": "",
            "output": 'See Wiki("Ada").',
        }
    ],
}
PAIRS: dict[str, list[Any]] = {
    "messages": [
        {
            "prompt": "2 + 2?",
            "chosen": "4",
            "rejected": "5",
            "tools": [TOOL],
            "system": "Be brief.",
            "source": "a",
        },
        {
            "chosen": [HELLO, FOUR],
            "rejected": [HELLO, {"role": "assistant", "content": "5", "thought": "Hm."}],
        },
        {
            "prompt": [{"role": "system", "content": "Be brief."}, HELLO],
            "chosen": [FOUR],
            "rejected": [{**FOUR, "content": "5"}],
        },
    ],
    "hh": [
        {
            "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
        }
    ],
}
WORDS = tuple(
    dict.fromkeys(
        (
            *THOUGHTS,
            *FLAGS,
            *MEDIA,
            *REFUSED,
            *ROW_COLUMNS,
            "function_call",
            "name",
            "history",
            "developer",
            MARK,
        )
    )
)
# Keys that name a row and are not text of it.
SILENT = {*OASST, *GENERATED_COLUMNS, "id", "group", "tool_call_id", "original_question"}


@cache
def changed(format: str, pairs: bool) -> st.SearchStrategy[Any]:
    rows = (PAIRS if pairs else ROWS)[format]
    text = "\n".join(map(json.dumps, rows))
    of_text = st.just([]) | st.just([]) | st.just([]) | byte_changes(len(text.encode()), most=2)
    mark = st.tuples(
        st.just("add"),
        st.sampled_from(paths_of(rows)),
        st.sampled_from([*WORDS, "x"]),
        st.just(MARK),
    )
    changes = json_changes(rows, WORDS) | st.lists(mark, min_size=1, max_size=1)
    return st.tuples(
        st.just(format), changes, of_text, st.sampled_from([".jsonl", ".jsonl", ".json"])
    )


def write_rows(
    rows: list[Any], case: tuple[str, list[Change], list[Change], str], folder: Path
) -> tuple[Path, Path, bool]:
    """Write changed rows and a chat tokenizer; return their paths, and whether a new key of the
    rows says MARK.
    """
    _, changes, of_text, suffix = case
    changed_rows = change_json(rows, changes)
    lines = (
        dump(changed_rows)
        if suffix == ".json" or not isinstance(changed_rows, list)
        else "\n".join(map(dump, changed_rows))
    )
    path = folder / f"rows{suffix}"
    path.write_bytes(change_bytes(lines.encode(), of_text))
    marked = not of_text and any(
        change[0] == "add" and change[-1] == MARK and change[2] not in SILENT for change in changes
    )
    # Replies that are not chosen.
    unread = case[0] == "oasst" and any(change[1][0] in (1, 3) for change in changes)
    marked = marked and not unread
    return path, write_files(chat_files(), folder / "chat"), marked and MARK in lines


def decoded(chat: Chat, ids: Any) -> str:
    return chat.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


UNREAD_OF_TREE = [
    ("oasst", [("add", (4,), "history", MARK)], [], ".jsonl"),
    ("messages", [("add", (0, "messages", 7, "role"), "thought", MARK)], [], ".jsonl"),
]


@fuzz(
    st.sampled_from(sorted(ROWS)).flatmap(lambda format: changed(format, False)),
    share=0.12,
    accepted=(0.1, 0.8),
    examples=UNREAD_OF_TREE,
)
def test_conversations(case: tuple[str, list[Change], list[Change], str], folder: Path) -> None:
    """Accepted rows become ids of the template's own rendering; text under new keys is trained,
    counted or refused.
    """
    path, tokenizer, marked = write_rows(ROWS[case[0]], case, folder)
    config = ChatConfig(
        {"a": ChatSource(str(path), case[0])}, str(folder / "cache"), val_fraction=0.0, max_bad=0.0
    )
    prepared = prepare_conversations(config, ["a"], tokenizer, LENGTH)["a"]
    source = Conversations(prepared, "train")
    rows = source.pack(LENGTH, 0)
    tokens, targets, doc_ids = (np.zeros(LENGTH, dtype=np.int64) for _ in range(3))
    for index in range(len(rows)):
        rows.fill(index, tokens, targets, doc_ids)
        assert (targets != -100).sum() == rows.targets(index) > 0
    chat = Chat.from_folder(tokenizer)
    assert int(source.ids.max()) < chat.tokenizer.get_vocab_size()
    report = (read(prepared) or {})["report"]
    # Turns of weight 0 after the last trained one are counted and left out.
    paths = [change[1][:3] for change in case[1]]
    untrained_end = case[0] == "messages" and (0, "messages", 7) in paths
    assert (
        not marked
        or MARK in decoded(chat, source.ids)
        or report["ignored"]
        or report["counts"]["cut"]
        or (untrained_end and report["counts"]["assistant turns without loss (weight 0)"])
    ), report


FOUND = [("messages", [("put", (0, "tools", 0, "function"), "add")], [], ".jsonl")]


@fuzz(
    st.sampled_from(sorted(PAIRS)).flatmap(lambda format: changed(format, True)),
    share=0.08,
    accepted=(0.1, 0.8),
    examples=FOUND,
)
def test_pairs(case: tuple[str, list[Change], list[Change], str], folder: Path) -> None:
    """Accepted pairs have one prompt and two answers that differ; rows that are left out are
    counted.
    """
    path, tokenizer, marked = write_rows(PAIRS[case[0]], case, folder)
    config = PreferenceConfig(
        {"a": PairSource(str(path), case[0])}, str(folder / "cache"), val_fraction=0.0, max_bad=0.0
    )
    prepared = prepare_pairs(config, ["a"], tokenizer, LENGTH)["a"]
    pairs, report = Pairs(prepared, "train"), (read(prepared) or {})["report"]
    chat = Chat.from_folder(tokenizer)
    text = ""
    for index in range(report["pairs"]["train"]):
        (chosen, rejected), prompt = pairs.read(index)
        assert (
            0 < prompt < min(len(chosen), len(rejected))
            and max(len(chosen), len(rejected)) <= LENGTH + 1
        )
        assert (
            chosen[:prompt].tolist() == rejected[:prompt].tolist()
            and chosen.tolist() != rejected.tolist()
        )
        text += decoded(chat, chosen) + decoded(chat, rejected)
    assert report["rows"] == sum(report["pairs"].values()) + sum(report["dropped"].values()) + sum(
        report["bad"].values()
    )
    assert not marked or MARK in text or report["ignored"] or report["dropped"], report


def test_bases_are_accepted() -> None:
    """The unchanged rows of each format are valid."""
    for kind, check in ((ROWS, test_conversations), (PAIRS, test_pairs)):
        for form in kind:
            with tempfile.TemporaryDirectory() as folder:
                check.check((form, [], [], ".jsonl"), Path(folder))
