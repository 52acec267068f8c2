"""Tool use on questions of the Berkeley Function Calling Leaderboard: are calls well formed (syntax), and right (semantics)?

python -m evals.eval_tool_use --checkpoint checkpoints/sft/step_12000 --categories simple_python multiple --limit 50

free: whatever the model says. constrained: a call is begun for it, by the id of its marker, and xgrammar holds the JSON to the
functions' schema (irrelevance, where nothing is to be called, is free only). A checkpoint without <|tool_call|> is told to
answer with a JSON list. Calls are JSON, {"name", "arguments"}, not BFCL's Python; semantics is its AST check. schema: calls that
fit the functions; called: it tried. Data: a pinned wheel; --data takes BFCL's data folder, or one .jsonl with id, question,
function and ground_truth. --limit counts for each category.
"""

import argparse
import json

from cli import add_boolean, at_least
from data.decontamination.benchmarks import BFCL_CATEGORIES, describe, load_bfcl
from evals.chat import Chat
from evals.harness import Eval, Item, Score, Write, Written
from evals.multiple_choice import field, require
from evals.run import flags, main
from evals.tool_calls import call_schema, fits, matches, read_calls, tools

MARKER = "<|tool_call|>"
INSTRUCTION = (
    "You can call functions. To do so, answer with nothing but a JSON list of calls, each an object with the function's name and "
    'its arguments: [{{"name": "...", "arguments": {{...}}}}]. If no function fits, say so in words. The functions are:\n'
    "{functions}"
)
SYSTEM = "To act, call one or more of the tools. If none fits, say so in words."


def judge_reply(written: Written, begun: str, item: Item, kind: str) -> dict[str, float]:
    row, marker = item.row, MARKER if item.row["marker"] is not None else None
    calls, well_formed = read_calls(begun + written.text, marker)
    if not row["ground_truth"]:  # nothing is to be called
        return {f"{kind}_irrelevance": float(well_formed and not calls)}
    known = bool(calls) and well_formed and all(fits(call, row["function"]) for call in calls)
    right = known and matches(calls, row["ground_truth"], row["function"])
    return {
        f"{kind}_syntax": float(bool(calls) and well_formed),
        f"{kind}_schema": float(known),
        f"{kind}_semantics": float(right),
        f"{kind}_called": float(bool(calls) or not well_formed),
    }


def score(item: Item) -> Score:
    row = item.row
    requests = {"free": Write(row["prompt"], (), row["max_tokens"], keep_special=True)}
    if row["schema"] and row["ground_truth"]:
        begun = row["prompt"] if row["marker"] is None else (*row["prompt"], row["marker"])
        requests["constrained"] = Write(
            begun,
            (),
            row["max_tokens"],
            keep_special=True,
            schema=row["schema"],
            marker=row["marker"],
        )
    written = yield list(requests.values())
    scores: dict[str, object] = {}
    for kind, reply in zip(requests, written, strict=True):
        begun_by_us = MARKER if kind == "constrained" and row["marker"] is not None else ""
        scores |= judge_reply(
            reply._replace(text=strip_end(reply.text, row["ends"])), begun_by_us, item, kind
        )
    return scores


def strip_end(text: str, ends: list[str]) -> str:
    """Without the token that ended it, which is kept so that markers are."""
    return next((text.removesuffix(end) for end in ends if text.endswith(end)), text)


def build(args: argparse.Namespace) -> Eval:
    chat = Chat(args.checkpoint)
    marker = chat.token(MARKER)
    items = []
    for category in args.categories:
        rows = load_bfcl(category, args.data, args.cache)
        for i, row in enumerate(rows[: args.limit]):
            question, functions = (
                field(row, name, i, category, list) for name in ("question", "function")
            )
            talk = question[0] if question and isinstance(question[0], list) else question
            require(bool(talk), i, category, "has no question")
            for name, parts, keys in (
                ("question", talk, {"role", "content"}),
                ("function", functions, {"name", "parameters"}),
            ):
                fine = all(isinstance(part, dict) and keys <= part.keys() for part in parts)
                require(
                    fine,
                    i,
                    category,
                    f"has {parts!r} as {name}, which are no objects with {' and '.join(sorted(keys))}",
                )
            one = call_schema(functions)
            listed = "\n".join(json.dumps(tool["function"]) for tool in tools(functions))
            native = marker is not None and chat.takes_tools
            told = SYSTEM if native else INSTRUCTION.format(functions=listed)
            if talk[0]["role"] == "system":
                told, talk = f"{talk[0]['content']}\n\n{told}", talk[1:]
            messages = [{"role": "system", "content": told}, *talk]
            schema = (
                one if native else {"type": "array", "items": one, "minItems": 1, "maxItems": 8}
            )
            items.append(
                Item(
                    str(row.get("id", f"{category}_{i}")),
                    {
                        "prompt": chat.prompt(messages, tools(functions) if native else None),
                        "function": functions,
                        "ground_truth": row["ground_truth"],
                        "schema": "" if args.free_only else json.dumps(schema),
                        "marker": marker if native else None,
                        "max_tokens": args.max_tokens,
                        "ends": chat.special,
                    },
                    category,
                )
            )
    form = f"{MARKER} and JSON" if marker is not None and chat.takes_tools else "a JSON list"
    about = {
        "data": describe("bfcl", args.categories[0], args.data),
        "form": form,
        "max_tokens": args.max_tokens,
    }
    return Eval("tool_use", 1, items, score, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=None)
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=BFCL_CATEGORIES,
        default=list(BFCL_CATEGORIES[:5]),
        metavar="NAME",
    )
    add_boolean(parser, "--free_only", "without the constrained part, which needs xgrammar")
    parser.add_argument("--max_tokens", type=at_least(1), default=512, help="of a reply")
    return parser


if __name__ == "__main__":
    main(parser(), build)
