"""MT-bench: 80 two-turn questions, graded from 1 to 10 by a judge model (arXiv:2306.05685).

python -m evals.eval_mt_bench --checkpoint checkpoints/quickstart/dpo \\
    --judge http://localhost:8000/v1 --judge_model name

The judge is any OpenAI-compatible endpoint. Without one, answers are generated but not graded.
Scores are comparable only for the same judge and judge prompt; the results file records both.
--judge_prompts replaces our judge prompt by FastChat's judge_prompts.jsonl.

Data: the hub's, or --data with rows of turns (or prompt), category and reference (reference answers
for grading maths, reasoning and coding).
"""

import argparse
import re
from pathlib import Path

from cli import int_at_least
from data.decontamination.benchmarks import describe, load_rows, read_jsonl
from evals.chat import CheckpointChat
from evals.harness import Eval, Item, Judge, Score, Write
from evals.judges import ChatEndpoint, read_key
from evals.multiple_choice import field
from evals.run import add_max_new_tokens, eval_parser, main

# FastChat's temperatures; 0 for other categories.
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
GRADE = (
    "Grade the assistant's {what} to the user below, as an impartial judge: is it helpful, "
    "relevant, correct, thorough, and does it do what was asked? Length in itself earns nothing."
    "{against} First explain your grade in a few sentences. Then give it, a number from 1 "
    "(useless) to 10 (perfect), in double square brackets, like this: Rating: [[5]]\n\n"
)
REFERENCE = " Hold it against the reference answer: correctness comes first, so name its mistakes."
GRADED_BY_REFERENCE = ("math", "reasoning", "coding")
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
NO_JUDGE = "answers were not graded; they are in the samples file. Give --judge to grade them"


def wording(turn: int, reference: bool) -> str:
    """Our judge prompt, with the same fields as FastChat's."""
    graded = "answer" if turn == 1 else "answer in its second turn"
    text = GRADE.format(what=graded, against=REFERENCE if reference else "")
    for n in range(1, turn + 1):
        field = "" if turn == 1 else f"_{n}"
        text += f"### User\n{{question{field}}}\n\n### Assistant\n{{answer{field}}}\n\n"
        text += f"### Reference answer\n{{ref_answer_{n}}}\n\n" if reference else ""
    return text


def judge_prompts(path: Path | None) -> dict[tuple[int, bool], tuple[str, str]]:
    """(turn, has a reference) -> (system prompt, template): ours, or FastChat's from `path`."""
    kinds = [(turn, reference) for turn in (1, 2) for reference in (False, True)]
    if path is None:
        return {kind: ("", wording(*kind)) for kind in kinds}
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; --judge_prompts takes FastChat's judge_prompts.jsonl"
        )
    rows = {row.get("name"): row for row in read_jsonl(path)}
    names = {(t, r): f"single{'-math' * r}-v1{'-multi-turn' * (t == 2)}" for t, r in kinds}
    missing = [name for name in names.values() if name not in rows]
    if missing:
        raise ValueError(
            f"{path} has no prompt named {', '.join(missing)}; "
            "--judge_prompts takes FastChat's judge_prompts.jsonl"
        )
    return {
        kind: (rows[name]["system_prompt"], rows[name]["prompt_template"])
        for kind, name in names.items()
    }


def rating(text: str) -> float | None:
    """Parse the grade of a judgment; None unless it is from 1 to 10."""
    match = next(filter(None, (pattern.search(text) for pattern in RATING)), None)
    grade = float(match.group(1)) if match else 0.0
    return grade if 1 <= grade <= 10 else None


def two_turns(item: Item, chat: CheckpointChat, max_tokens: int) -> Score:
    """Generate the model's answers to both turns."""
    messages: list[dict[str, str]] = []
    temperature = TEMPERATURE.get(item.subject, 0.0)
    for question in item.row["turns"]:
        messages.append({"role": "user", "content": question})
        seed, prompt = len(messages), chat.prompt(messages)
        written = yield Write(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        messages.append({"role": "assistant", "content": written.text.strip()})
    return {"answers": [message["content"] for message in messages[1::2]]}


def graded(
    item: Item, answers: list[str], prompts: dict[tuple[int, bool], tuple[str, str]]
) -> Score:
    """Grade the answers of both turns."""
    turns, reference = item.row["turns"], item.row["reference"]
    fields = {"question": turns[0], "answer": answers[0]}
    for n in range(2):
        fields |= {f"question_{n + 1}": turns[n], f"answer_{n + 1}": answers[n]}
        fields |= {f"ref_answer_{n + 1}": reference[n]} if reference else {}
    templates = [prompts[turn, bool(reference)] for turn in (1, 2)]
    judgments = yield [Judge(template.format(**fields), system) for system, template in templates]
    grades = [rating(judgment) for judgment in judgments]
    by_turn = {f"turn_{n}": grade for n, grade in enumerate(grades, 1) if grade is not None}
    mean = {"score": sum(by_turn.values()) / 2} if len(by_turn) == 2 else {}
    return {**mean, **by_turn, "unread": float(grades.count(None)), "judgments": judgments}


def build(args: argparse.Namespace) -> Eval:
    chat, prompts = CheckpointChat(args.checkpoint), judge_prompts(args.judge_prompts)
    key = read_key(args.judge_key_file) if args.judge_key_file else ""
    judge = (
        ChatEndpoint(args.judge, args.judge_model, key, retries=args.retries)
        if args.judge
        else None
    )
    items = []
    for i, row in enumerate(load_rows("mt_bench", "train", args.data, args.cache)[: args.limit]):
        turns = row.get("turns") or field(row, "prompt", i, "mt_bench")
        if not isinstance(turns, list) or len(turns) != 2:
            raise ValueError(
                f"row {i} of the data for mt_bench must have two turns, not {str(turns)[:60]!r}"
            )
        category, reference = str(row.get("category", "")), row.get("reference") or []
        if category not in GRADED_BY_REFERENCE or len(reference) != 2:
            reference = []
        number = str(row.get("question_id", row.get("prompt_id", i)))
        items.append(Item(number, {"turns": turns, "reference": reference}, category))

    def score(item: Item) -> Score:
        scores = yield from two_turns(item, chat, args.max_tokens)
        scores |= {"empty": sum(not answer for answer in scores["answers"]) / 2}
        return (
            {**scores, **(yield from graded(item, scores["answers"], prompts))} if judge else scores
        )

    metadata = {"data": describe("mt_bench", "train", args.data), "max_tokens": args.max_tokens}
    metadata |= (
        {"judge_prompts": str(args.judge_prompts or "ours")}
        if judge
        else {"note": NO_JUDGE, "judge": None}
    )
    return Eval("mt_bench", 1, items, score, metadata=metadata, judge=judge)


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="base URL of an OpenAI-compatible API, such as http://localhost:8000/v1",
    )
    parser.add_argument("--judge_model", default="judge", help="model name at that API")
    parser.add_argument(
        "--judge_key_file",
        type=Path,
        help="a file with the API key, such as <(printenv OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--judge_prompts",
        type=Path,
        help="FastChat's judge_prompts.jsonl (default: our judge prompt)",
    )
    parser.add_argument(
        "--retries",
        type=int_at_least(0),
        default=4,
        help="retries of a judge request, with exponential backoff",
    )
    add_max_new_tokens(parser, "tokens per answer", 1024)
    return parser


if __name__ == "__main__":
    main(parser(), build)
