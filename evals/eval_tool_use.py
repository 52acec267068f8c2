"""Tool use on the Berkeley Function Calling Leaderboard (BFCL): syntax and semantics of calls.

python -m evals.eval_tool_use --checkpoint checkpoints/quickstart/dpo --limit 5

Modes: free decodes without constraints. constrained starts a call with its marker token, and
xgrammar restricts the JSON to the functions' schemas. Irrelevance items, which need no call, are
free only. Metrics per mode: syntax, the calls are valid JSON; schema, they fit the functions;
semantics, BFCL's AST check; called, the model tried to call. Calls are JSON objects with name and
arguments, not BFCL's Python. A checkpoint without <|tool_call|> is prompted to answer with a JSON
list.

Data: the PyPI package bfcl-eval, read as an archive. --data takes BFCL's data folder, or a .jsonl
with id, question, function and ground_truth. --limit applies to each category.
"""

import argparse
import json

from cli import add_boolean
from data.decontamination.benchmarks import BFCL_CATEGORIES, describe, load_bfcl
from evals.chat import CheckpointChat
from evals.harness import Eval, Generation, Item, Score, Write
from evals.multiple_choice import field, require
from evals.run import add_max_new_tokens, eval_parser, main
from evals.tool_calls import call_schema, fits, matches, read_calls, tools

MARKER = "<|tool_call|>"
INSTRUCTION = (
    "You can call functions. To do so, answer with nothing but a JSON list of calls, each an "
    "object with the function's name and its arguments: "
    '[{{"name": "...", "arguments": {{...}}}}]. If no function fits, say so in words. '
    "The functions are:\n{functions}"
)
SYSTEM = "To act, call one or more of the tools. If none fits, say so in words."


def score_reply(written: Generation, prefix: str, item: Item, mode: str) -> dict[str, float]:
    """Scores of one reply; prefix: the text that was already in the prompt."""
    row, marker = item.row, MARKER if item.row["marker"] is not None else None
    calls, well_formed = read_calls(prefix + written.text, marker)
    if not row["ground_truth"]:  # an irrelevance item
        return {f"{mode}_irrelevance": float(well_formed and not calls)}
    valid = bool(calls) and well_formed and all(fits(call, row["function"]) for call in calls)
    correct = valid and matches(calls, row["ground_truth"], row["function"])
    return {
        f"{mode}_syntax": float(bool(calls) and well_formed),
        f"{mode}_schema": float(valid),
        f"{mode}_semantics": float(correct),
        f"{mode}_called": float(bool(calls) or not well_formed),
    }


def score(item: Item) -> Score:
    row = item.row
    requests = {"free": Write(row["prompt"], (), row["max_tokens"], keep_special=True)}
    if row["schema"] and row["ground_truth"]:
        prompt = row["prompt"] if row["marker"] is None else (*row["prompt"], row["marker"])
        requests["constrained"] = Write(
            prompt,
            (),
            row["max_tokens"],
            keep_special=True,
            schema=row["schema"],
            marker=row["marker"],
        )
    written = yield list(requests.values())
    scores: dict[str, object] = {}
    for mode, reply in zip(requests, written, strict=True):
        prefix = MARKER if mode == "constrained" and row["marker"] is not None else ""
        reply = reply._replace(text=strip_end(reply.text, row["ends"]))
        scores |= score_reply(reply, prefix, item, mode)
    return scores


def strip_end(text: str, ends: list[str]) -> str:
    """Remove the end token, which keep_special left in the text."""
    return next((text.removesuffix(end) for end in ends if text.endswith(end)), text)


def build(args: argparse.Namespace) -> Eval:
    chat = CheckpointChat(args.checkpoint)
    marker = chat.token(MARKER)
    items = []
    for category in args.categories:
        rows = load_bfcl(category, args.data, args.cache)
        for i, row in enumerate(rows[: args.limit]):
            question, functions = (
                field(row, name, i, category, list) for name in ("question", "function")
            )
            turn = question[0] if question and isinstance(question[0], list) else question
            require(bool(turn), i, category, "has no question")
            for name, objects, keys in (
                ("question", turn, {"role", "content"}),
                ("function", functions, {"name", "parameters"}),
            ):
                valid = all(isinstance(value, dict) and keys <= value.keys() for value in objects)
                needed = " and ".join(sorted(keys))
                problem = f"has {objects!r} as {name}, which must be objects with {needed}"
                require(valid, i, category, problem)
            call = call_schema(functions)
            listed = "\n".join(json.dumps(tool["function"]) for tool in tools(functions))
            native = marker is not None and chat.takes_tools
            system = SYSTEM if native else INSTRUCTION.format(functions=listed)
            if turn[0]["role"] == "system":
                system, turn = f"{turn[0]['content']}\n\n{system}", turn[1:]
            messages = [{"role": "system", "content": system}, *turn]
            call_list = {"type": "array", "items": call, "minItems": 1, "maxItems": 8}
            schema = call if native else call_list
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
    native = marker is not None and chat.takes_tools
    metadata = {
        "data": describe("bfcl", args.categories[0], args.data),
        "form": f"{MARKER} and JSON" if native else "a JSON list",
        "max_tokens": args.max_tokens,
    }
    return Eval("tool_use", 1, items, score, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=BFCL_CATEGORIES,
        default=list(BFCL_CATEGORIES[:5]),
        metavar="NAME",
    )
    add_boolean(parser, "--free_only", "skip the constrained mode, which needs xgrammar")
    add_max_new_tokens(parser, "tokens per reply", 512)
    return parser


if __name__ == "__main__":
    main(parser(), build)
