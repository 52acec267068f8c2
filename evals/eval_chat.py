"""Held-out questions with known answers (data/synthetic/generate.py): is the reply right, and is the right reply the likeliest?

python -m evals.eval_chat --checkpoint checkpoints/quickstart/sft --data data/store/quickstart/chat

acc: the greedy reply gives the right answer (synthetic.is_right). choice: the right reply is likelier, a token, than every
wrong one that the example holds; choice_chance is what guessing would give. Each assistant turn with a known answer is one
item, the turns before it given as they should be. A folder with another chat template than ours is asked in that one. A folder
without any (a base model) gets the conversation as plain lines, User: ... Assistant: ..., so that the same questions can be put
before SFT. preferred: of a preference pair, the
chosen reply is likelier than the rejected one (--data .../pairs.heldout.jsonl; a folder's pairs are not among its questions).
"""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.chat.conversations import Row
from data.chat.folder_templates import template_of
from data.chat.messages import read_message, read_messages, read_row, row_tools, with_row_system
from data.chat.preferences import Dropped, parse_row
from data.chat.rendering import Chat
from data.chat.template import is_our_template
from data.synthetic.generate import is_right
from evals.chat import Chat as OtherChat
from evals.harness import Choose, Eval, Item, Score, Write
from evals.run import flags, main
from files import parse_json
from inference.gguf_tokenizer import tokenizer_folder

MAX_TOKENS = 96  # of a reply
DATA = "data/store/quickstart/chat"
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool", "system": "System"}


def read_items(
    data: str | None, limit: int | None, dropped: Counter[str] | None = None
) -> list[Item]:
    """One item for each check of each example in the *.heldout.jsonl files of a folder (but pairs), or in one file.

    Rows mean what they mean in SFT and DPO. ValueError names a faulty row; pairs that DPO drops are counted in `dropped`.
    """
    path = Path(data or DATA)
    files = (
        sorted(set(path.glob("*.heldout.jsonl")) - {path / "pairs.heldout.jsonl"})
        if path.is_dir()
        else [path]
    )
    items: list[Item] = []
    for file in files:
        try:
            lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
            rows = [
                Row(f"{file}:{number}", parse_json(line)) for number, line in lines if line.strip()
            ]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}); write it by scripts.generate_chat_data"
            ) from error
        for row in [row for row in rows if "checks" in row.value or "chosen" in row.value][:limit]:
            try:
                items += items_of(row)
            except Dropped as error:
                (Counter() if dropped is None else dropped)[str(error)] += 1
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"{row.where} is not a question or a pair ({type(error).__name__}: {error})"
                ) from error
    if not items:
        raise ValueError(
            f"{path} holds no questions with checks; write some by python -m scripts.generate_chat_data"
        )
    return items


def items_of(named: Row) -> list[Item]:
    """A tool's call is a subject of its own, and so is a preference pair."""
    row, number = named.value, str(named.value.get("id") or Path(named.where).name)
    if "chosen" in row:
        pair = parse_row(named, "messages")
        check: dict[str, Any] = {"turn": len(pair.prompt), "wrong": [pair.rejected]}
        example = {"messages": [*pair.prompt, pair.chosen], "tools": pair.tools, "checks": [check]}
        return [Item(number, {"example": example, "check": 0}, "pairs")]
    read_row(row, row)
    messages, _ = read_messages(with_row_system(row, row["messages"]))
    turns = len(messages) - len(row["messages"])  # 1 where the row has a system prompt of its own
    checks = [
        {
            **check,
            "turn": check["turn"] + turns,
            "wrong": [read_message(wrong)[0] for wrong in check["wrong"]],
        }
        for check in row["checks"]
    ]
    example = {**row, "messages": messages, "tools": row_tools(row), "checks": checks}
    kind = row["source"].rpartition("/")[2]
    return [
        Item(
            f"{number}/{i}",
            {"example": example, "check": i},
            "tool calls" if check["type"] == "call" else kind,
        )
        for i, check in enumerate(checks)
    ]


def plain(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation as lines, for models that know no template."""
    return "".join(f"{SPEAKERS[message['role']]}: {_said(message)}\n" for message in messages)


def _said(message: dict[str, Any]) -> str:
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    return " ".join(
        part for part in (message.get("thought", ""), message["content"], *calls) if part
    )


def build(args: Namespace) -> Eval:
    """ValueError where there are no questions."""
    folder = tokenizer_folder(args.checkpoint)
    template = template_of(folder)
    ours = is_our_template(template)
    chat: Chat | OtherChat | None = (
        Chat.from_folder(folder) if ours else OtherChat(args.checkpoint) if template else None
    )

    def encoded(
        example: dict, before: list, replies: list
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Ids of the prompt and of each reply."""
        tools = example.get("tools")
        if isinstance(chat, OtherChat):
            return chat.prompt(before, tools), tuple(
                chat.reply([*before, reply], tools) for reply in replies
            )
        assert chat is not None
        prompt = tuple(chat.prompt(before, tools))
        return prompt, tuple(
            reply_ids(chat, example, before, reply, len(prompt)) for reply in replies
        )

    def score(item: Item) -> Score:
        example, number = item.row["example"], item.row["check"]
        check, before, replies = parts_of(item)
        if chat is None:
            prompt: Any = plain(before) + "Assistant:"
            options: tuple[Any, ...] = tuple(f" {_said(reply)}" for reply in replies)
        else:
            prompt, options = encoded(example, before, replies)
        if "type" not in check:
            (scored,) = yield [Choose(prompt, options)]
            return {"preferred": float(scored[0].logprob > scored[1].logprob)}
        stop = ("\n",) if chat is None else ()
        written, scored = yield [
            Write(prompt, stop, MAX_TOKENS, keep_special=chat is None or ours),
            Choose(prompt, options),
        ]
        scores = {
            "acc": float(is_right(example, written.text, number)),
            "ended": float(written.stopped),
        }
        if len(options) > 1:
            of_token = [option.logprob / option.tokens for option in scored]
            scores |= {
                "choice": float(of_token[0] > max(of_token[1:])),
                "choice_chance": 1 / len(options),
            }
        return scores

    dropped = Counter[str]()
    items = read_items(args.data, args.limit, dropped)
    if isinstance(chat, OtherChat):
        items = _renderable(items, encoded, dropped)
    how = "chat template" if ours else "the model's own chat template" if chat else "plain lines"
    about: dict[str, Any] = {"data": str(args.data or DATA), "prompts": how}
    about |= {"dropped": dict(dropped)} if dropped else {}
    task = "pairs" if all(item.subject == "pairs" for item in items) else "chat"
    return Eval(task, 1, items, score, about=about)


def parts_of(item: Item) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The check of an item, the messages before the judged turn, and the replies, the right one first."""
    check = item.row["example"]["checks"][item.row["check"]]
    messages = item.row["example"]["messages"]
    return check, messages[: check["turn"]], [messages[check["turn"]], *check["wrong"]]


def _renderable(
    items: list[Item], encoded: Callable[..., Any], dropped: Counter[str]
) -> list[Item]:
    """The items that a model's own template takes; others are counted. ValueError if it takes none."""
    kept, refused = [], ""
    for item in items:
        _, before, replies = parts_of(item)
        try:
            encoded(item.row["example"], before, replies)
            kept.append(item)
        except ValueError as error:
            dropped["refused by the model's own chat template"] += 1
            refused = refused or str(error)
    if not kept:
        raise ValueError(f"none of {len(items)} questions can be put to the model: {refused}")
    return kept


def reply_ids(chat: Chat, example: dict, before: list, reply: dict, begun: int) -> tuple[int, ...]:
    """The ids of a reply after its prompt of `begun` ids, up to and with its end."""
    whole = chat.encode(
        [chat.clean({"messages": [*before, reply], "tools": example.get("tools")})]
    )[0]
    return tuple(whole.ids[begun : whole.ends[-1]].tolist())


if __name__ == "__main__":
    main(flags(__doc__, shots=None), build)
