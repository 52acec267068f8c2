"""Multiple choice as in lm-evaluation-harness: few-shot sampling, acc, acc_norm and row checks."""

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from evals.harness import Choose, Item, Score, Scored

T = TypeVar("T")


def first_shots(pool: Sequence[T], count: int) -> list[T]:
    """The first `count` examples, the same for every item (lm-eval's first_n)."""
    _check_count(pool, count)
    return list(pool[:count])


class FewShotSampler:
    """Draws `count` new examples for each item, in item order (lm-eval's default, seed 1234)."""

    def __init__(self, pool: Sequence[Any], count: int, seed: int):
        _check_count(pool, count)
        self.pool, self.count, self.random = list(pool), count, random.Random(seed)

    def sample(self, excluded: Any = None) -> list[Any]:
        """Draw examples. excluded: an example of the pool that must not be drawn, or None.

        As in lm-eval, one more is drawn, so that the excluded one can be removed.
        """
        if not self.count:
            return []
        if excluded is None:
            return self.random.sample(self.pool, self.count)
        _check_count(self.pool, self.count + 1)
        drawn = self.random.sample(self.pool, self.count + 1)
        kept = [example for example in drawn if example != excluded][: self.count]
        if len(kept) < self.count:  # the pool has equal examples
            others = [example for example in self.pool if example != excluded]
            _check_count(others, self.count)
            kept = self.random.sample(others, self.count)
        return kept


def _check_count(pool: Sequence[Any], count: int) -> None:
    if count < 0 or count > len(pool):
        raise ValueError(
            f"--shots {count} needs {count} solved examples; the data have {len(pool)}"
        )


def prompt(description: str, solved: Sequence[tuple[str, str]], question: str) -> str:
    """Join the description, the solved (question, answer) examples and the question."""
    return description + "".join(f"{text} {answer}\n\n" for text, answer in solved) + question


def score_options(item: Item) -> Score:
    """acc and acc_norm of an item whose row has context, options and gold (an index)."""
    scored = yield Choose(
        item.row["context"], tuple(f" {option}" for option in item.row["options"])
    )
    return accuracies(scored, item.row["options"], item.row["gold"])


def accuracies(
    scored: Sequence[Scored], options: Sequence[str], gold: int, prefix: str = ""
) -> dict[str, float]:
    """acc: the gold option is the most likely. acc_norm: the same per character.

    Of equally likely options the first is chosen.
    """
    logprobs = [option.logprob for option in scored]
    normalised = [
        logprob / len(text) if text else -math.inf
        for logprob, text in zip(logprobs, options, strict=True)
    ]
    return {
        f"{prefix}acc": float(logprobs.index(max(logprobs)) == gold),
        f"{prefix}acc_norm": float(normalised.index(max(normalised)) == gold),
    }


def field(row: dict[str, Any], name: str, number: int, task: str, kind: type = object) -> Any:
    """A field of a row; ValueError names the row if the field is missing or of another type."""
    require(name in row, number, task, f"has no {name!r}, only {', '.join(row)}")
    require(
        isinstance(row[name], kind),
        number,
        task,
        f"has {row[name]!r} as {name}, which must be a {kind.__name__}",
    )
    return row[name]


def text_list(value: Any, name: str, number: int, task: str) -> list[str]:
    """The value of a row's field, checked to be a list of two or more texts."""
    valid = (
        isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
    )
    message = f"has {value!r} as {name}, which must be a list of two or more texts"
    require(valid, number, task, message)
    return value


def require(valid: bool, number: int, task: str, problem: str) -> None:
    """ValueError naming the row and its problem unless `valid`."""
    if not valid:
        raise ValueError(
            f"row {number} of the data for {task} {problem}; use the hub dataset's schema"
        )
