"""Held-out chat questions with known answers, and preference pairs.

python -m evals.eval_chat --checkpoint checkpoints/quickstart/sft --data data/store/quickstart/chat

acc: the greedy reply contains the correct answer (data.synthetic.generate.is_right). choice: the
correct reply has a higher log-probability per token than every wrong reply of the example;
choice_chance is the score of random guessing. preferred: the chosen reply of a pair is more likely
than the rejected one. Pairs need --data .../pairs.heldout.jsonl; a folder's pairs are skipped.

Each assistant turn with a known answer is one item, after the reference turns before it. Prompts
use the checkpoint's chat template. A base model without one gets plain lines (User: ... Assistant:
...), so the same questions can be evaluated before SFT.
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
from evals.chat import CheckpointChat
from evals.harness import Choose, Eval, Item, Score, Write
from evals.run import eval_parser, main
from files import parse_json
from inference.gguf_tokenizer import tokenizer_folder

MAX_TOKENS = 96  # per reply
DATA = "data/store/quickstart/chat"
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool", "system": "System"}


def read_items(
    data: str | None, limit: int | None, dropped: Counter[str] | None = None
) -> list[Item]:
    """One item per check of each example in a folder's *.heldout.jsonl (except pairs) or in a file.

    Rows are read as in SFT and DPO. ValueError names a malformed row. Pairs that DPO drops are
    counted in `dropped`.
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
                f"{file} cannot be read ({type(error).__name__}); run scripts.generate_chat_data"
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
            f"{path} has no questions with checks; run python -m scripts.generate_chat_data"
        )
    return items


def items_of(named: Row) -> list[Item]:
    """The items of one row; tool calls and preference pairs have their own subjects."""
    row, number = named.value, str(named.value.get("id") or Path(named.where).name)
    if "chosen" in row:
        pair = parse_row(named, "messages")
        check: dict[str, Any] = {"turn": len(pair.prompt), "wrong": [pair.rejected]}
        example = {"messages": [*pair.prompt, pair.chosen], "tools": pair.tools, "checks": [check]}
        return [Item(number, {"example": example, "check": 0}, "pairs")]
    read_row(row, row)
    messages, _ = read_messages(with_row_system(row, row["messages"]))
    turns = len(messages) - len(row["messages"])  # 1 if the row's system prompt was added
    checks = [
        {
            **check,
            "turn": check["turn"] + turns,
            "wrong": [read_message(wrong)[0] for wrong in check["wrong"]],
        }
        for check in row["checks"]
    ]
    example = {**row, "messages": messages, "tools": row_tools(row), "checks": checks}
    source = row["source"].rpartition("/")[2]
    subjects = ["tool calls" if check["type"] == "call" else source for check in checks]
    return [
        Item(f"{number}/{i}", {"example": example, "check": i}, subject)
        for i, subject in enumerate(subjects)
    ]


def plain_lines(messages: Sequence[dict[str, Any]]) -> str:
    """Render a conversation as lines, for models without a chat template."""
    return "".join(f"{SPEAKERS[message['role']]}: {_content(message)}\n" for message in messages)


def _content(message: dict[str, Any]) -> str:
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    return " ".join(filter(None, (message.get("thought", ""), message["content"], *calls)))


def build(args: Namespace) -> Eval:
    """Build the evaluation; ValueError if no questions are found."""
    folder = tokenizer_folder(args.checkpoint)
    template = template_of(folder)
    ours = is_our_template(template)
    chat: Chat | CheckpointChat | None = (
        Chat.from_folder(folder) if ours else CheckpointChat(args.checkpoint) if template else None
    )

    def encode(
        example: dict, before: list, replies: list
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Token ids of the prompt and of each reply."""
        tools = example.get("tools")
        if isinstance(chat, CheckpointChat):
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
        check, before, replies = split_item(item)
        if chat is None:
            prompt: Any = plain_lines(before) + "Assistant:"
            options: tuple[Any, ...] = tuple(f" {_content(reply)}" for reply in replies)
        else:
            prompt, options = encode(example, before, replies)
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
            per_token = [option.logprob / option.tokens for option in scored]
            scores |= {
                "choice": float(per_token[0] > max(per_token[1:])),
                "choice_chance": 1 / len(options),
            }
        return scores

    dropped = Counter[str]()
    items = read_items(args.data, args.limit, dropped)
    if isinstance(chat, CheckpointChat):
        items = _renderable(items, encode, dropped)
    prompts = (
        "chat template" if ours else "the model's own chat template" if chat else "plain lines"
    )
    metadata: dict[str, Any] = {"data": str(args.data or DATA), "prompts": prompts}
    metadata |= {"dropped": dict(dropped)} if dropped else {}
    task = "pairs" if all(item.subject == "pairs" for item in items) else "chat"
    return Eval(task, 1, items, score, metadata=metadata)


def split_item(item: Item) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The check, the messages before the scored turn, and the replies, correct one first."""
    check = item.row["example"]["checks"][item.row["check"]]
    messages = item.row["example"]["messages"]
    return check, messages[: check["turn"]], [messages[check["turn"]], *check["wrong"]]


def _renderable(items: list[Item], encode: Callable[..., Any], dropped: Counter[str]) -> list[Item]:
    """Items that the model's own template renders; others are counted. ValueError if none."""
    rendered, refused = [], ""
    for item in items:
        _, before, replies = split_item(item)
        try:
            encode(item.row["example"], before, replies)
            rendered.append(item)
        except ValueError as error:
            dropped["refused by the model's own chat template"] += 1
            refused = refused or str(error)
    if not rendered:
        raise ValueError(f"the chat template renders none of {len(items)} questions: {refused}")
    return rendered


def reply_ids(
    chat: Chat, example: dict, before: list, reply: dict, prompt_length: int
) -> tuple[int, ...]:
    """Token ids of a reply after its prompt, including the end token."""
    row = chat.clean({"messages": [*before, reply], "tools": example.get("tools")})
    conversation = chat.encode([row])[0]
    return tuple(conversation.ids[prompt_length : conversation.ends[-1]].tolist())


if __name__ == "__main__":
    main(eval_parser(__doc__, shots=None), build)
