"""What multiple-choice tasks share: few-shot examples as lm-evaluation-harness draws them, and its two accuracies."""

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from evals.harness import Choose, Item, Score, Scored

T = TypeVar("T")


def first_shots(pool: Sequence[T], count: int) -> list[T]:
    """The first `count` examples, the same for every item (lm-eval's first_n)."""
    _enough(pool, count)
    return list(pool[:count])


class Shots:
    """`count` examples drawn anew for each item, in the order of items (lm-eval's default; its fewshot_random_seed is 1234)."""

    def __init__(self, pool: Sequence[Any], count: int, seed: int):
        _enough(pool, count)
        self.pool, self.count, self.random = list(pool), count, random.Random(seed)

    def draw(self) -> list[Any]:
        return self.random.sample(self.pool, self.count) if self.count else []


def _enough(pool: Sequence[Any], count: int) -> None:
    if count < 0 or count > len(pool):
        raise ValueError(
            f"--shots {count} is not possible: there are {len(pool)} solved examples to take them from"
        )


def prompt(description: str, solved: Sequence[tuple[str, str]], question: str) -> str:
    """The description, each solved question with its answer, and the question to answer."""
    return description + "".join(f"{text} {answer}\n\n" for text, answer in solved) + question


def best_option(item: Item) -> Score:
    """Score an item whose row has context, options and gold (an index): acc and acc_norm."""
    scored = yield Choose(
        item.row["context"], tuple(f" {option}" for option in item.row["options"])
    )
    return accuracies(scored, item.row["options"], item.row["gold"])


def accuracies(
    scored: Sequence[Scored], options: Sequence[str], gold: int, prefix: str = ""
) -> dict[str, float]:
    """acc: the gold option is the likeliest; acc_norm: by log-probability a character. The first of equals counts."""
    plain = [option.logprob for option in scored]
    normed = [
        logprob / len(text) if text else -math.inf
        for logprob, text in zip(plain, options, strict=True)
    ]
    return {
        f"{prefix}acc": float(plain.index(max(plain)) == gold),
        f"{prefix}acc_norm": float(normed.index(max(normed)) == gold),
    }


def field(row: dict[str, Any], name: str, number: int, task: str, kind: type = object) -> Any:
    """A field of a row; ValueError says which row lacks it, or has another type there."""
    require(name in row, number, task, f"has no {name!r}, only {', '.join(row)}")
    require(
        isinstance(row[name], kind),
        number,
        task,
        f"has {row[name]!r} as {name}, which is no {kind.__name__}",
    )
    return row[name]


def texts(found: Any, name: str, number: int, task: str) -> list[str]:
    """What a row has as `name`, if it is a list of two or more texts."""
    fine = (
        isinstance(found, list) and len(found) > 1 and all(isinstance(text, str) for text in found)
    )
    require(fine, number, task, f"has {found!r} as {name}, which is no list of two or more texts")
    return found


def require(fine: bool, number: int, task: str, what: str) -> None:
    """ValueError unless a row is as it should be; what: is wrong with it."""
    if not fine:
        raise ValueError(f"row {number} of the data for {task} {what}; it takes the hub's schema")
