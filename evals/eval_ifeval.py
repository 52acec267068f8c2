"""IFEval: does a reply follow instructions that a program can verify? Prompts and scores of lm-evaluation-harness' `ifeval`.

python -m evals.eval_ifeval --checkpoint checkpoints/dpo/step_900 --chat --data ifeval.jsonl

strict: the reply as it is; loose: also without its first or last line and without asterisks. prompt_level: all instructions
of a prompt are followed; inst_level: share of instructions. --chat asks by the checkpoint's chat template, as lm-eval does
with --apply_chat_template; without it the model continues the prompt. Data: rows with key, prompt, instruction_id_list and
kwargs, from --data, else from the hub. Extras: `pip install langdetect==1.0.9 nltk==3.10.4`.
"""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from cli import add_boolean, at_least
from data.decontamination.benchmarks import describe, load_rows
from evals.chat import Chat
from evals.harness import Estimate, Eval, Item, Sample, Score, Write, means
from evals.instructions import INSTRUCTIONS, Tools, fault, follows, follows_loosely
from evals.multiple_choice import field, require
from evals.run import flags, main

SCORES = {"strict": follows, "loose": follows_loosely}


def read(row: dict[str, Any], number: int) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The prompt and its instructions with their arguments; columns without a value are left out."""
    names, arguments = (
        field(row, name, number, "ifeval", list) for name in ("instruction_id_list", "kwargs")
    )
    same = len(names) == len(arguments) > 0
    require(same, number, "ifeval", f"has {len(names)} instructions and {len(arguments)} kwargs")
    require(
        all(of is None or isinstance(of, dict) for of in arguments),
        number,
        "ifeval",
        "has kwargs that are not objects",
    )
    given = [{key: value for key, value in (of or {}).items() if value} for of in arguments]
    for name, of in zip(names, given, strict=True):
        why = fault(name, of)
        require(why is None, number, "ifeval", str(why))
    return field(row, "prompt", number, "ifeval", str), list(zip(names, given, strict=True))


def totals(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Prompt-level accuracies with their errors; instruction-level ones over all instructions, without an error."""
    found = means(samples)
    for kind in SCORES:
        followed = [value for sample in samples for value in sample.scores[kind]]
        found[f"inst_level_{kind}_acc"] = Estimate(
            sum(followed) / len(followed), None, len(followed)
        )
    return found


def build(args: argparse.Namespace) -> Eval:
    items, chat, tools = [], Chat(args.checkpoint) if args.chat else None, Tools(args.cache)
    needed = set[str]()
    for i, row in enumerate(load_rows("ifeval", "train", args.data, args.cache)[: args.limit]):
        text, instructions = read(row, i)
        needed |= {module for name, _ in instructions for module in INSTRUCTIONS[name].modules}
        asked = chat.prompt([{"role": "user", "content": text}]) if chat else text
        of = {"prompt": asked, "instructions": instructions, "max_tokens": args.max_tokens}
        items.append(Item(str(row.get("key", i)), of))
    missing = sorted(module for module in needed if find_spec(module) is None)
    if missing:
        raise ValueError(
            f"IFEval needs {', '.join(missing)} here; pip install langdetect==1.0.9 nltk==3.10.4"
        )
    if "nltk" in needed:
        tools.sentences("")  # a wheel that cannot be downloaded must fail before the model writes

    def score(item: Item) -> Score:
        written = yield Write(item.row["prompt"], (), item.row["max_tokens"])
        given = item.row["instructions"]
        found = {
            kind: [check(written.text, name, of, tools) for name, of in given]
            for kind, check in SCORES.items()
        }
        levels = {
            f"prompt_level_{kind}_acc": float(all(followed)) for kind, followed in found.items()
        }
        return {
            **levels,
            **found,
            "instructions": [name for name, _ in given],
            "stopped": written.stopped,
        }

    about = {
        "data": describe("ifeval", "train", args.data),
        "chat": bool(args.chat),
        "max_tokens": args.max_tokens,
    }
    about["packages"] = {module: version(module) for module in sorted(needed)}
    return Eval("ifeval", 4, items, score, totals=totals, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=None)
    add_boolean(parser, "--chat", "ask by the checkpoint's chat template")
    parser.add_argument(
        "--max_tokens",
        type=at_least(1),
        default=1280,
        help="of a reply (default: lm-eval's %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
