"""An evaluation of your own rows: multiple choice, questions with answers, or texts.

python -m evals.eval_own --checkpoint checkpoints/quickstart/gold --config my_eval.yaml

The YAML file gives the rows, their columns, the metric and the prompt: docs/own_evaluation.md.
`python -m scripts.run_evals --suite my_eval.yaml` does the same, with gates. A suite lists the file
beside built-in evaluations.

multiple_choice: acc and acc_norm (log-probability per character). question_answer: exact_match
(equal without case, punctuation and articles), number_match (the last number is equal) or contains
(the answer's words are in the text). text: bits_per_byte, perplexity and loss, with an error over
blocks of rows (evals/text_blocks.py).
"""

import argparse
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from data.decontamination import test_sets
from data.decontamination.benchmarks import HUB
from data.decontamination.own_rows import (
    TEMPLATE,
    OwnEval,
    OwnRow,
    files_of,
    read_own_rows,
)
from data.manifest import file_hash
from evals import eval_perplexity
from evals.chat import CheckpointChat
from evals.eval_open_qa import ARTICLES, normalise
from evals.harness import Estimate, Eval, Item, Sample, Score, Write
from evals.multiple_choice import FewShotSampler, prompt, score_options
from evals.run import eval_parser, main
from ranges import shown
from training.settings import load_settings

VERSION = 1
MAX_TOKENS = 64
# Names of other files beside the results, and of perplexity over all sources.
TAKEN = ("all", "benchmark_results", "decision")
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def built_in_names() -> list[str]:
    """Names of the evaluations in this folder, without this one."""
    names = (path.stem.removeprefix("eval_") for path in Path(__file__).parent.glob("eval_*.py"))
    return sorted(name for name in names if name != "own")


def definition(path: Path) -> OwnEval:
    """Load a definition. ValueError for a wrong setting or a name that is taken."""
    try:
        own = load_settings(OwnEval, path)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error
    if own.name in {*built_in_names(), *HUB, *test_sets.TEST_SETS, *TAKEN, "own"}:
        raise ValueError(
            f"{path}: name={own.name} is the name of a built-in evaluation or file; choose "
            f"another, such as my_{own.name}"
        )
    for setting in ("path", "shots_path"):
        given = getattr(own, setting)
        beside = path.parent / str(given)
        if given and not Path(given).exists() and beside.exists():
            raise ValueError(
                f"{path}: {setting}={given} is not in the working folder; write {beside}"
            )
    return own


def number_of(text: str) -> Decimal | None:
    """The last number of a text, without dollar signs and thousands separators."""
    matches = NUMBER.findall(text.replace("$", ""))
    return Decimal(matches[-1].replace(",", "")) if matches else None


def exact_match(text: str, answer: str) -> bool:
    return _plain(text) == _plain(answer)


def number_match(text: str, answer: str) -> bool:
    return number_of(text) is not None and number_of(text) == number_of(answer)


def contains(text: str, answer: str) -> bool:
    words, sought = (f" {' '.join(_plain(t).split())} " for t in (text, answer))
    return sought in words


def _plain(text: str) -> str:
    return normalise(text.strip(), ARTICLES)


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "contains": contains,
}


def score_answer(item: Item) -> Score:
    """Each metric is 1 if the generated text matches one of the accepted answers."""
    row = item.row
    written = yield Write(row["prompt"], tuple(row["stop"]), row["max_tokens"])
    scores: dict[str, Any] = {
        metric: float(any(MATCHES[metric](written.text, answer) for answer in row["answers"]))
        for metric in row["metrics"]
    }
    return {**scores, "text": written.text}


def score_choice(item: Item) -> Score:
    scores = yield from score_options(item)
    return {metric: scores[metric] for metric in item.row["metrics"]}


def aggregate_text(metrics: tuple[str, ...], samples: Sequence[Sample]) -> dict[str, Estimate]:
    estimates = eval_perplexity.text_estimates(samples, text_blocks(samples)["blocks"])
    return {name: estimates[name] for name in (*metrics, "tokens")}


def text_blocks(samples: Sequence[Sample]) -> dict[str, Any]:
    """Blocks of all rows; subjects are not separated, since each may have one row."""
    return {"blocks": {"all": eval_perplexity.document_blocks(samples)}}


def build(args: argparse.Namespace) -> Eval:
    own = definition(args.config)
    rows = read_own_rows(own, args.data)
    limits = [limit for limit in (own.limit, args.limit) if limit is not None]
    chosen = rows[: min(limits, default=None)]
    metadata = {
        "data": args.data or own.path,
        "data_hashes": {str(path): file_hash(path) for path in files_of(own, args.data)},
        "config": str(args.config),
        "kind": own.kind,
        "rows": len(rows),
    }
    if own.kind == "text":
        items = [Item(r.id, {"text": r.text, "stride": None}, r.subject) for r in chosen]
        if len(chosen) < 2:
            metadata["note"] = "no standard error: it needs at least 2 rows"
        return Eval(
            own.name,
            VERSION,
            items,
            eval_perplexity.score,
            aggregate=partial(aggregate_text, own.metrics),
            details=text_blocks,
            metadata=metadata,
        )
    prompts = _prompts(own, rows, chosen, args)
    if own.kind == "multiple_choice":
        items = [
            Item(
                row.id,
                {
                    "context": text,
                    "options": list(row.choices),
                    "gold": row.gold,
                    "metrics": own.metrics,
                },
                row.subject,
            )
            for row, text in zip(chosen, prompts, strict=True)
        ]
        chance = sum(1 / len(row.choices) for row in chosen) / len(chosen)
        metadata["chance"] = {metric: round(chance, 6) for metric in own.metrics}
        if own.answer_is is None and len(rows) >= 8 and all(row.gold for row in rows):
            metadata["note"] = (
                "no row's answer is the first choice; if answers count from 1, set answer_is: "
                "position"
            )
        score = score_choice
    else:
        items = [
            Item(row.id, _answer_row(own, row, text), row.subject)
            for row, text in zip(chosen, prompts, strict=True)
        ]
        score = score_answer
    return Eval(own.name, VERSION, items, score, own.shots, args.seed, metadata=metadata)


def _prompts(
    own: OwnEval, rows: list[OwnRow], chosen: list[OwnRow], args: argparse.Namespace
) -> list[str | tuple[int, ...]]:
    """The prompt of each chosen row, with its solved examples; token ids with a chat template."""
    template = own.template or ("{question}" if own.chat else TEMPLATE)
    apart = own.shots_path is not None
    pool = read_own_rows(own, own.shots_path) if own.shots and apart else rows
    sampler = FewShotSampler(pool, own.shots, args.seed)
    chat = CheckpointChat(args.checkpoint) if own.chat else None
    prompts: list[str | tuple[int, ...]] = []
    for row in chosen:
        shots = sampler.sample(None if apart else row)
        solved = [(shot.render(template), shot.answers[0]) for shot in shots]
        question = row.render(template)
        if chat is None:
            prompts.append(prompt("", solved, question))
        else:
            turns = [
                (role, text)
                for pair in solved
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            turns.append(("user", question))
            messages = [{"role": role, "content": text} for role, text in turns]
            prompts.append(chat.prompt(messages))
    return prompts


def _answer_row(own: OwnEval, row: OwnRow, text: str | tuple[int, ...]) -> dict[str, Any]:
    numbers = [number_of(answer) for answer in row.answers]
    if "number_match" in own.metrics and numbers == [None] * len(numbers):
        raise ValueError(
            f"{row.where} has the answer {shown(row.answers[0])}, which has no number; fix the row "
            "or choose another metric"
        )
    empty = [answer for answer in row.answers if not _plain(answer).strip()]
    if {"exact_match", "contains"} & {*own.metrics} and empty:
        raise ValueError(
            f"{row.where} has the answer {shown(empty[0])}, which is empty without punctuation; "
            "fix the row or use the metric number_match"
        )
    stop = own.stop if own.stop is not None else () if own.chat else ("\n",)
    return {
        "prompt": text,
        "answers": list(row.answers),
        "metrics": own.metrics,
        "stop": list(stop),
        "max_tokens": own.max_tokens or MAX_TOKENS,
    }


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file that defines the evaluation"
    )
    return parser


if __name__ == "__main__":
    main(parser(), build)
