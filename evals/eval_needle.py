"""Needle in a haystack: numbers hidden at a depth of a long text, asked for at its end; RULER's four kinds (arXiv:2404.06654).

python -m evals.eval_needle --checkpoint checkpoints/nanollama_1b/phase2_16k --context_length 4096 16384 --num_tests 100
python -m evals.eval_needle --checkpoint checkpoints/nanollama_1b/phase2_16k --kinds single multi_key multi_value multi_query

--num_tests counts the tests of each kind at each length; their depths are spread evenly over --depths places.
single: one key, one number. multi_key: needles of other keys lie about. multi_value: four numbers of one key. multi_query:
four keys are asked for. accuracy: the share of the numbers that the model writes, each as a number of its own. choice: is a
right number likelier than nine wrong ones (chance: 0.1)? It tells of weak models too, as does margin, in nats. Prompt and answer
fill the context to the token. A heatmap, depth by length, is drawn beside the results.
"""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from cli import at_least
from data.decontamination.benchmarks import read_jsonl
from data.manifest import read_json
from evals.harness import Choose, Estimate, Eval, Item, Sample, Score, Write, means
from evals.language_model import EvalTokenizer
from evals.multiple_choice import field
from evals.run import flags, main
from inference.gguf_tokenizer import tokenizer_folder

KINDS = ("single", "multi_key", "multi_value", "multi_query")
NUM_TESTS = 100
MANY, DISTRACTORS, WRONG = 4, 12, 9  # numbers asked for, needles of other keys, wrong options
FIRST = "amber brave calm dusty eager faint gentle hollow ivory jolly keen lunar mossy narrow ochre plain quiet rusty silent tidy"
SECOND = "anchor basket candle dagger engine feather garden hammer island jacket kettle ladder marble needle orchard pillow"
THINGS = "The road The river A lamp The wind An old clock The roof A cart The field A bell The harbour The snow A garden"
DOES = "turned slowly|stayed where it was|looked the same as before|could be heard far off|grew darker|was left behind"
WHEN = "in the morning|before noon|at dusk|for a while|that day|as on most days|once more|without a reason"
PREFACE = "Some numbers are hidden in the text below. Remember them, for they will be asked for at its end.\n\n"


def noise(draw: random.Random) -> Iterator[str]:
    """Sentences about nothing."""
    things = re.findall(r"(?:The|An old|A) \w+", THINGS)
    for _ in count():
        yield f"{draw.choice(things)} {draw.choice(DOES.split('|'))} {draw.choice(WHEN.split('|'))}."


def sentences(haystack: str) -> list[str]:
    """The sentences of local texts; none for noise."""
    if haystack == "noise":
        return []
    path = Path(haystack)
    if not path.is_file():
        raise ValueError(
            f"--haystack {haystack} is neither noise nor a file of texts (.txt, or .jsonl with text)"
        )
    rows = (
        [{"text": path.read_text(encoding="utf-8", errors="replace")}]
        if path.suffix == ".txt"
        else read_jsonl(path)
    )
    texts = [field(row, "text", i, "needle", str) for i, row in enumerate(rows)]
    found = [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    if not found:
        raise ValueError(f"{haystack} holds no text")
    return found


class Hay:
    """What is hidden in: sentences as ids, encoded once."""

    def __init__(self, words: EvalTokenizer, texts: Sequence[str]):
        self.words, self.texts, self.known = words, texts, dict[str, list[int]]()

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.words.encode([text], special=False)[0]
        return self.known[text]

    def draw(self, tokens: int, draw: random.Random) -> list[list[int]]:
        """Sentences in a row, as ids: `tokens` of them, the last sentence cut."""
        first = draw.randrange(len(self.texts)) if self.texts else 0
        stream = (
            (self.texts[i % len(self.texts)] for i in count(first)) if self.texts else noise(draw)
        )
        parts, left = list[list[int]](), tokens
        while left > 0:
            parts.append(self.ids(f" {next(stream)}")[:left])
            left -= len(parts[-1])
        return parts


def place(parts: list[list[int]], needles: Sequence[tuple[float, list[int]]]) -> list[int]:
    """The sentences with each needle before the sentence that its depth (0 to 1, by tokens) falls on."""
    starts = [0, *accumulate(map(len, parts))]
    at: dict[int, list[int]] = defaultdict(list)
    for depth, ids in needles:
        at[min(range(len(starts)), key=lambda i: abs(starts[i] - depth * starts[-1]))] += ids
    return [token for i, part in enumerate([*parts, []]) for token in (*at[i], *part)]


def make(
    kind: str, length: int, depth: float, hay: Hay, draw: random.Random, max_tokens: int
) -> dict[str, Any]:
    """One test: the prompt, in ids, so that it and an answer of max_tokens are `length` tokens, what is right, what is wrong."""
    keys = [f"{a} {b}" for a in FIRST.split() for b in SECOND.split()]
    draw.shuffle(keys)
    numbers = [
        str(number)
        for number in draw.sample(range(1_000_000, 10_000_000), MANY + DISTRACTORS + WRONG)
    ]
    wanted = MANY if kind in ("multi_value", "multi_query") else 1
    others = DISTRACTORS if kind == "multi_key" else 0
    names = [keys[0] if kind == "multi_value" else key for key in keys[: wanted + others]]
    ids = [
        hay.ids(f" The special number of the {name} is {number}.")
        for name, number in zip(names, numbers, strict=False)
    ]
    depths = [depth, *(draw.random() for _ in ids[1:])]
    asked = list(dict.fromkeys(names[:wanted]))
    which = (
        f"the {asked[0]}"
        if len(asked) == 1
        else ", ".join(f"the {name}" for name in asked[:-1]) + f" and the {asked[-1]}"
    )
    be, plural = ("is", "") if wanted == 1 else ("are", "s")
    begun = f"The special number{plural} of {which} {be}"
    question = hay.ids(
        f"\n\nQuestion: What {be} the special number{plural} of {which}?\nAnswer: {begun}"
    )
    head = [hay.words.begin, *hay.ids(PREFACE)]
    left = length - max_tokens - len(head) - len(question) - sum(map(len, ids))
    if left < 0:
        raise ValueError(
            f"a context of {length} tokens is too short for a {kind} needle and its question; "
            f"give --context {length - left} or more"
        )
    prompt = (*head, *place(hay.draw(left, draw), list(zip(depths, ids, strict=True))), *question)
    options = [*numbers[:wanted], *numbers[-WRONG:]]
    return {
        "prompt": prompt,
        "right": numbers[:wanted],
        "options": options,
        "max_tokens": max_tokens,
    }


def score(item: Item, ids: Any) -> Score:
    """accuracy, choice and margin."""
    row = item.row
    written, scored = yield [
        Write(row["prompt"], max_tokens=row["max_tokens"]),
        Choose(row["prompt"], tuple(tuple(ids(f" {option}")) for option in row["options"])),
    ]
    said = re.findall(r"\d+", written.text.replace(",", ""))
    found = sum(number in said for number in row["right"]) / len(row["right"])
    logprobs = [option.logprob for option in scored]
    margin = max(logprobs[: len(row["right"])]) - max(logprobs[len(row["right"]) :])
    where = {"length": str(row["length"]), "depth": f"{row['depth']:.3f}"}
    return {
        "accuracy": found,
        "choice": float(margin > 0),
        "margin": margin,
        "text": written.text,
        **where,
    }


def by_length(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """The means, over all and of each length, as accuracy_16384."""
    found = means(samples)
    lengths = sorted({sample.scores["length"] for sample in samples}, key=int)
    for length in lengths:
        part = means([sample for sample in samples if sample.scores["length"] == length])
        found |= {f"{name}_{length}": estimate for name, estimate in part.items()}
    return found


def build(args: argparse.Namespace) -> Eval:
    args.haystack = args.haystack or args.data or "noise"
    words = EvalTokenizer(args.checkpoint)
    limit = read_json(tokenizer_folder(args.checkpoint) / "config.json").get(
        "max_position_embeddings", 0
    )
    lengths = (
        args.context or [length for length in (4096, 8192, 16384) if length <= limit] or [limit]
    )
    if max(lengths) > limit:
        raise ValueError(
            f"a context of {max(lengths)} tokens exceeds the model's {limit}; give --context up to that"
        )
    depths = min(args.depths, args.num_tests)
    hay, items = Hay(words, sentences(args.haystack)), []
    digits = max(len(hay.ids(f" {number}")) for number in (1234567, 9080706))
    for kind in args.kinds:
        room = args.max_tokens or (digits + 4) * (
            MANY + 1 if kind in ("multi_value", "multi_query") else 2
        )
        for length in sorted(set(lengths)):
            for number in range(args.num_tests)[: args.limit]:
                test, step = divmod(number, depths)
                depth = step / (depths - 1) if depths > 1 else 0.5
                name = f"{kind}/{length}/{depth:.3f}/{test}"
                row = make(kind, length, depth, hay, random.Random(f"{args.seed} {name}"), room)
                items.append(Item(name, {**row, "length": length, "depth": depth}, kind))
    how = {
        "haystack": args.haystack,
        "lengths": sorted(set(lengths)),
        "depths": depths,
        "num_tests": args.num_tests,
    }
    return Eval(
        "needle", 2, items, partial(score, ids=hay.ids), seed=args.seed, totals=by_length, about=how
    )


Grid = dict[str, dict[tuple[int, float], list[float]]]


def grid(samples: Path, metric: str = "accuracy") -> Grid:
    """kind -> (length, depth) -> the scores of its tests, out of a samples file."""
    cells: Grid = defaultdict(lambda: defaultdict(list))
    for sample in read_jsonl(samples):
        if metric in sample["scores"]:
            where = int(sample["scores"]["length"]), float(sample["scores"]["depth"])
            cells[sample["subject"]][where].append(sample["scores"][metric])
    return cells


def heatmap(samples: Path, output: Path) -> None:
    """Depth by length, a panel for each kind: accuracy above, choice below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = ("accuracy", "choice")
    grids = [grid(samples, metric) for metric in metrics]
    kinds = list(grids[0])
    figure, axes = pyplot.subplots(
        2, len(kinds), figsize=(1 + 3.2 * len(kinds), 7), squeeze=False, layout="constrained"
    )
    for row, (metric, found) in enumerate(zip(metrics, grids, strict=True)):
        for axis, kind in zip(axes[row], kinds, strict=True):
            lengths, depths = (
                sorted({x for x, _ in found[kind]}),
                sorted({y for _, y in found[kind]}),
            )
            cells = [
                [sum(found[kind][x, y]) / len(found[kind][x, y]) for x in lengths] for y in depths
            ]
            shown = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            tests = sum(
                len(scores) for (length, _), scores in found[kind].items() if length == lengths[0]
            )
            axis.set_title(f"{kind}, {metric} ({tests} tests a length)", fontsize=9)
            for y, of_depth in enumerate(cells):
                for x, value in enumerate(of_depth):
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    figure.supxlabel("context in tokens")
    figure.supylabel("depth of the needle")
    figure.colorbar(shown, ax=axes)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = flags(__doc__, shots=None)
    about = "tokens of prompt and answer (default: 4096 8192 16384, as far as the model goes)"
    parser.add_argument("--context", "--context_length", type=at_least(1), nargs="+", help=about)
    about = "tests of each kind at each length, over all depths (default: %(default)s)"
    parser.add_argument("--num_tests", type=at_least(1), default=NUM_TESTS, help=about)
    about = "places of the needle, from 0 to 100 %% of the text (default: %(default)s)"
    parser.add_argument("--depths", type=at_least(1), default=11, help=about)
    about = f"{', '.join(KINDS)} (default: single)"
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["single"], metavar="KIND", help=about
    )
    parser.add_argument(
        "--haystack",
        help="noise, or a file of texts, best held-out ones (default: --data, else noise)",
    )
    parser.add_argument(
        "--max_tokens", type=at_least(1), help="of an answer (default: room for the numbers)"
    )
    return parser


if __name__ == "__main__":
    written = main(parser(), build)
    if written:
        picture = written.with_suffix(".png")
        heatmap(written.with_name(written.stem + ".samples.jsonl"), picture)
        print(f"drawn in {picture}")
