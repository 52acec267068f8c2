"""Needle in a haystack: retrieve numbers from a long text, as RULER does (arXiv:2404.06654).

python -m evals.eval_needle --checkpoint checkpoints/quickstart/gold --context 512 1024
python -m evals.eval_needle --checkpoint checkpoints/quickstart/gold --context 1024 \\
    --kinds single multi_key multi_value multi_query --num_tests 11

single: one key with one number. multi_key: needles of other keys are distractors. multi_value: four
numbers of one key. multi_query: four keys. --num_tests counts the tests per kind and length; depths
are evenly spaced over --depths positions. Prompt and answer fill the context exactly.

accuracy: share of the correct numbers in the generated text. choice: the likeliest number among the
correct ones and nine wrong ones is correct (chance 1/10; 4/13 for multi_value and multi_query).
margin: log-probability of the likeliest correct number minus that of the likeliest wrong one, in
nats. choice and margin also separate weak models. gain, with --gain: how much likelier the correct
numbers are than after the same text with other numbers in their needles, in nats. It is 0 for each
test if the model ignores the needle, so it shows the first traces of retrieval in tiny models. It
reads each text once more. A heatmap of depth by length is saved beside the results.
"""

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from statistics import fmean
from typing import Any

from cli import int_at_least
from data.decontamination.benchmarks import read_jsonl
from data.manifest import read_json
from evals.harness import Choose, Estimate, Eval, Item, Sample, Score, Write, means
from evals.language_model import EvalTokenizer
from evals.multiple_choice import field
from evals.run import add_max_new_tokens, eval_parser, main
from inference.gguf_tokenizer import tokenizer_folder

KINDS = ("single", "multi_key", "multi_value", "multi_query")
NUM_TESTS = 100
# Numbers per multi_value or multi_query test, needles of other keys, wrong options.
MULTIPLE, DISTRACTORS, WRONG = 4, 12, 9
FIRST = (
    "amber brave calm dusty eager faint gentle hollow ivory jolly keen lunar mossy narrow ochre "
    "plain quiet rusty silent tidy"
)
SECOND = (
    "anchor basket candle dagger engine feather garden hammer island jacket kettle ladder marble "
    "needle orchard pillow"
)
SUBJECTS = (
    "The road The river A lamp The wind An old clock The roof A cart The field A bell "
    "The harbour The snow A garden"
)
VERBS = (
    "turned slowly|stayed where it was|looked the same as before|could be heard far off|"
    "grew darker|was left behind"
)
TIMES = (
    "in the morning|before noon|at dusk|for a while|that day|as on most days|once more|"
    "without a reason"
)
PREFACE = (
    "Some numbers are hidden in the text below. Remember them, for they will be asked for at its "
    "end.\n\n"
)


def noise(rng: random.Random) -> Iterator[str]:
    """Yield random filler sentences."""
    subjects = re.findall(r"(?:The|An old|A) \w+", SUBJECTS)
    verbs, times = VERBS.split("|"), TIMES.split("|")
    for _ in count():
        yield f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(times)}."


def sentences(haystack: str) -> list[str]:
    """Sentences of a local text file; [] for noise."""
    if haystack == "noise":
        return []
    path = Path(haystack)
    if not path.is_file():
        raise ValueError(
            f"--haystack {haystack} is not a file; give noise, a .txt file or a .jsonl with text"
        )
    rows = (
        [{"text": path.read_text(encoding="utf-8", errors="replace")}]
        if path.suffix == ".txt"
        else read_jsonl(path)
    )
    texts = [field(row, "text", i, "needle", str) for i, row in enumerate(rows)]
    pieces = [piece for text in texts for piece in re.split(r"(?<=[.!?])\s+", text)]
    pieces = [piece for piece in pieces if piece.strip()]
    if not pieces:
        raise ValueError(f"{haystack} has no text; give a file with sentences")
    return pieces


class Haystack:
    """Sentences as token ids, each encoded once."""

    def __init__(self, tokenizer: EvalTokenizer, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, texts
        self.encoded = dict[str, list[int]]()

    def ids(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer.encode([text], special=False)[0]
        return self.encoded[text]

    def sample(self, tokens: int, rng: random.Random) -> list[list[int]]:
        """Consecutive sentences of `tokens` ids in total, from a random start; the last is cut."""
        first = rng.randrange(len(self.texts)) if self.texts else 0
        stream = (
            (self.texts[i % len(self.texts)] for i in count(first)) if self.texts else noise(rng)
        )
        sentences, remaining = list[list[int]](), tokens
        while remaining > 0:
            sentences.append(self.ids(f" {next(stream)}")[:remaining])
            remaining -= len(sentences[-1])
        return sentences


def insert_needles(
    sentences: list[list[int]], needles: Sequence[tuple[float, list[int]]]
) -> list[int]:
    """Join sentences, inserting each (depth, ids) needle before the sentence nearest to its depth.

    Depths run from 0 to 1, measured in tokens.
    """
    starts = [0, *accumulate(map(len, sentences))]
    inserted: dict[int, list[int]] = defaultdict(list)
    for depth, ids in needles:
        nearest = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * starts[-1]))
        inserted[nearest] += ids
    return [token for i, ids in enumerate([*sentences, []]) for token in (*inserted[i], *ids)]


def build_test(
    kind: str,
    length: int,
    depth: float,
    haystack: Haystack,
    rng: random.Random,
    max_tokens: int,
    swap: bool = False,
) -> dict[str, Any]:
    """One test: prompt ids, correct numbers, and options with the correct ones first.

    The prompt and an answer of max_tokens have `length` tokens. ValueError if they do not fit.
    swap: add the prompt with other numbers in place of the correct ones.
    """
    keys = [f"{a} {b}" for a in FIRST.split() for b in SECOND.split()]
    rng.shuffle(keys)
    drawn = rng.sample(range(1_000_000, 10_000_000), MULTIPLE + DISTRACTORS + WRONG)
    numbers = [str(number) for number in drawn]
    correct = MULTIPLE if kind in ("multi_value", "multi_query") else 1
    others = DISTRACTORS if kind == "multi_key" else 0
    names = [keys[0] if kind == "multi_value" else key for key in keys[: correct + others]]

    def hidden(numbers: Sequence[str]) -> list[list[int]]:
        return [
            haystack.ids(f" The special number of the {name} is {number}.")
            for name, number in zip(names, numbers, strict=False)
        ]

    ids, swapped = hidden(numbers), hidden([*numbers[-correct:], *numbers[correct:]])
    depths = [depth, *(rng.random() for _ in ids[1:])]
    queried = [f"the {name}" for name in dict.fromkeys(names[:correct])]
    query = ", ".join(queried[:-1]) + f" and {queried[-1]}" if len(queried) > 1 else queried[0]
    be, plural = ("is", "") if correct == 1 else ("are", "s")
    answer = f"The special number{plural} of {query} {be}"
    question = haystack.ids(
        f"\n\nQuestion: What {be} the special number{plural} of {query}?\nAnswer: {answer}"
    )
    preface = [haystack.tokenizer.begin, *haystack.ids(PREFACE)]
    size = max(sum(map(len, needles)) for needles in ([ids, swapped] if swap else [ids]))
    remaining = length - max_tokens - len(preface) - len(question) - size
    if remaining < 0:
        raise ValueError(
            f"a context of {length} tokens is too short for a {kind} needle and its question; "
            f"give --context {length - remaining} or more"
        )
    filler = haystack.sample(remaining, rng)

    def prompt(needles: list[list[int]]) -> tuple[int, ...]:
        text = insert_needles(filler, list(zip(depths, needles, strict=True)))
        return (*preface, *text, *question)

    options = [*numbers[:correct], *numbers[-WRONG:]]
    return {
        "prompt": prompt(ids),
        **({"swapped": prompt(swapped)} if swap else {}),
        "right": numbers[:correct],
        "options": options,
        "max_tokens": max_tokens,
    }


def score(item: Item, ids: Any) -> Score:
    """accuracy, choice, margin and, of a test with another prompt, gain."""
    row = item.row
    options = tuple(tuple(ids(f" {option}")) for option in row["options"])
    correct = options[: len(row["right"])]
    written, scored, *without = yield [
        Write(row["prompt"], max_tokens=row["max_tokens"]),
        Choose(row["prompt"], options),
        *([Choose(row["swapped"], correct)] if "swapped" in row else []),
    ]
    numbers = re.findall(r"\d+", written.text.replace(",", ""))
    accuracy = sum(number in numbers for number in row["right"]) / len(row["right"])
    logprobs = [option.logprob for option in scored]
    right, wrong = logprobs[: len(correct)], logprobs[len(correct) :]
    margin = max(right) - max(wrong)
    gain = [fmean(right) - fmean(option.logprob for option in other) for other in without]
    return {
        "accuracy": accuracy,
        "choice": float(margin > 0),
        "margin": margin,
        **({"gain": gain[0]} if gain else {}),
        "text": written.text,
        "length": str(row["length"]),
        "depth": f"{row['depth']:.3f}",
    }


def by_length(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Means over all tests, and per length as accuracy_16384."""
    estimates = means(samples)
    lengths = sorted({sample.scores["length"] for sample in samples}, key=int)
    for length in lengths:
        group = means([sample for sample in samples if sample.scores["length"] == length])
        estimates |= {f"{name}_{length}": estimate for name, estimate in group.items()}
    return estimates


def build(args: argparse.Namespace) -> Eval:
    args.haystack = args.haystack or args.data or "noise"
    tokenizer = EvalTokenizer(args.checkpoint)
    limit = read_json(tokenizer_folder(args.checkpoint) / "config.json").get(
        "max_position_embeddings", 0
    )
    lengths = (
        args.context or [length for length in (4096, 8192, 16384) if length <= limit] or [limit]
    )
    if max(lengths) > limit:
        raise ValueError(
            f"--context {max(lengths)} exceeds the model's context of {limit} tokens; reduce it"
        )
    depths = min(args.depths, args.num_tests)
    haystack, items = Haystack(tokenizer, sentences(args.haystack)), []
    digits = max(len(haystack.ids(f" {number}")) for number in (1234567, 9080706))
    for kind in args.kinds:
        numbers = MULTIPLE + 1 if kind in ("multi_value", "multi_query") else 2
        max_tokens = args.max_tokens or (digits + 4) * numbers
        for length in sorted(set(lengths)):
            for number in range(args.num_tests)[: args.limit]:
                test, step = divmod(number, depths)
                depth = step / (depths - 1) if depths > 1 else 0.5
                name = f"{kind}/{length}/{depth:.3f}/{test}"
                rng = random.Random(f"{args.seed} {name}")
                row = build_test(kind, length, depth, haystack, rng, max_tokens, args.gain)
                items.append(Item(name, {**row, "length": length, "depth": depth}, kind))
    metadata = {
        "haystack": args.haystack,
        "lengths": sorted(set(lengths)),
        "depths": depths,
        "num_tests": args.num_tests,
    }
    return Eval(
        "needle",
        2,
        items,
        partial(score, ids=haystack.ids),
        seed=args.seed,
        aggregate=by_length,
        metadata=metadata,
    )


Grid = dict[str, dict[tuple[int, float], list[float]]]


def grid(samples: Path, metric: str = "accuracy") -> Grid:
    """Read a samples file: kind -> (length, depth) -> scores of the tests."""
    cells: Grid = defaultdict(lambda: defaultdict(list))
    for sample in read_jsonl(samples):
        if metric in sample["scores"]:
            cell = int(sample["scores"]["length"]), float(sample["scores"]["depth"])
            cells[sample["subject"]][cell].append(sample["scores"][metric])
    return cells


def heatmap(samples: Path, output: Path) -> None:
    """Plot depth by length, one column per kind; first row accuracy, second row choice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = ("accuracy", "choice")
    grids = [grid(samples, metric) for metric in metrics]
    kinds = list(grids[0])
    figure, axes = pyplot.subplots(
        2, len(kinds), figsize=(1 + 3.2 * len(kinds), 7), squeeze=False, layout="constrained"
    )
    for row, (metric, by_kind) in enumerate(zip(metrics, grids, strict=True)):
        for axis, kind in zip(axes[row], kinds, strict=True):
            tests = by_kind[kind]
            lengths, depths = sorted({x for x, _ in tests}), sorted({y for _, y in tests})
            cells = [[sum(tests[x, y]) / len(tests[x, y]) for x in lengths] for y in depths]
            image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
            per_length = sum(len(scores) for (x, _), scores in tests.items() if x == lengths[0])
            axis.set_title(f"{kind}, {metric} ({per_length} tests per length)", fontsize=9)
            for y, values in enumerate(cells):
                for x, value in enumerate(values):
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    figure.supxlabel("context (tokens)")
    figure.supylabel("needle depth")
    figure.colorbar(image, ax=axes)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--context",
        type=int_at_least(1),
        nargs="+",
        help="tokens of prompt and answer (default: 4096 8192 16384, up to the model's context)",
    )
    parser.add_argument(
        "--num_tests",
        type=int_at_least(1),
        default=NUM_TESTS,
        help="tests per kind and length, over all depths (default: %(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=int_at_least(1),
        default=11,
        help="needle positions from 0 to 100 %% of the text (default: %(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["single"],
        metavar="KIND",
        help=f"{', '.join(KINDS)} (default: single)",
    )
    parser.add_argument(
        "--haystack",
        help="noise, or a text file, preferably held out (default: --data, else noise)",
    )
    add_max_new_tokens(parser, "tokens per answer (default: enough for the numbers)")
    parser.add_argument("--gain", action="store_true", help="also measure gain, for tiny models")
    return parser


if __name__ == "__main__":
    output = main(parser(), build)
    if output:
        picture = output.with_suffix(".png")
        heatmap(output.with_name(output.stem + ".samples.jsonl"), picture)
        print(f"heatmap written to {picture}")
