"""Forecasts the tokens an evaluation reads and generates from its flags, without reading data.

scripts.plan uses it. Test sets are described by the mean size of their prompts in UTF-8 bytes.
"""

import argparse
import io
import re
import shlex
from contextlib import redirect_stderr
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

from evals.held_out import BYTES_PER_TOKEN
from evals.suite import parse
from evals.suite_config import open_suite, suite_parser
from training.config import RunConfig
from training.planning.eval_cost import Tokens


class ItemSizes(NamedTuple):
    """Mean sizes over the items. Options are read once each, after their shared prompt."""

    items: int
    prompt: float  # bytes of the formatted question
    options: float = 0  # bytes of all options together; one-token options are read with the prompt
    shot: float = 0  # bytes of one solved example


# Counted from the data of data/decontamination/benchmarks.py: HellaSwag, ARC, MMLU, GSM8K, BFCL's
# default categories, and the sets of eval_choice, eval_lambada, eval_open_qa and eval_code.
# Estimated, because their rows come from the hub: TruthfulQA, toxicity, MT-bench and IFEval.
TEST_SETS = {
    "hellaswag": ItemSizes(10_042, 241, 563, 382),
    "arc_challenge": ItemSizes(1172, 150, 116, 179),
    "arc_easy": ItemSizes(2376, 132, 90, 154),
    "mmlu": ItemSizes(14_042, 467, 0, 411),
    "mmlu_cloze": ItemSizes(14_042, 275, 168, 267),
    "gsm8k": ItemSizes(1319, 240, 0, 533),
    "truthfulqa": ItemSizes(817, 60, 600),
    "toxicity": ItemSizes(99_442, 60),
    "tool_use": ItemSizes(1240, 1200),
    "mt_bench": ItemSizes(160, 800),  # 80 two-turn conversations; turn 2 includes the first answer
    "piqa": ItemSizes(1838, 54, 199, 155),
    "winogrande": ItemSizes(1267, 0, 211, 108),  # two full contexts per item
    "boolq": ItemSizes(3270, 647, 0, 653),
    "openbookqa": ItemSizes(500, 55, 71, 77),
    "sciq": ItemSizes(1000, 506, 47, 520),
    "siqa": ItemSizes(1954, 115, 61, 137),
    "commonsense_qa": ItemSizes(1221, 152, 0, 156),
    "commonsense_qa_cloze": ItemSizes(1221, 86, 51, 99),
    "lambada": ItemSizes(5153, 320, 7),
    "triviaqa": ItemSizes(7993, 99, 0, 115),
    "nq_open": ItemSizes(3610, 80, 0, 70),
    "humaneval": ItemSizes(164, 451),
    "mbpp": ItemSizes(500, 1878),
    "ifeval": ItemSizes(541, 210),
}
CODE_TOKENS = {"humaneval": 1024, "mbpp": 256}  # default of --max_new_tokens
SUBJECTS = 57  # of MMLU, whose few-shot examples are read once per subject, not once per item
CATEGORIES = 5  # default categories of tool_use
NEEDLE_READS = 2  # a needle prompt is read once to generate and once to score the options
NEEDLE_WRITES = 24  # default of --max_new_tokens


class Workload(NamedTuple):
    """Tokens of one evaluation over all its items."""

    read: float
    written: float = 0  # upper bound: every answer takes --max_new_tokens
    length: int = 0  # mean tokens per row


def workload(
    name: str, args: argparse.Namespace, context: int, sources: int
) -> list[Workload] | None:
    """Workloads of evals/eval_<name>.py with these flags; None for an unknown evaluation.

    context: the model's context in tokens. sources: number of sources for perplexity without
    --sources.
    """
    if name == "perplexity":
        return _perplexity(args, context, sources)
    if name == "needle":
        return _needle(args, context)
    if name == "arc":
        parts = ("challenge", "easy") if args.part == "both" else (args.part,)
        return [_items(f"arc_{part}", args) for part in parts]
    if name == "mmlu":
        formats = {"letter": ("mmlu",), "cloze": ("mmlu_cloze",), "both": ("mmlu", "mmlu_cloze")}
        return [
            _items(task, args, groups=SUBJECTS, limit_of=SUBJECTS) for task in formats[args.format]
        ]
    if name == "tool_use":
        return [_items(name, args, replies=1 if args.free_only else 2, limit_of=CATEGORIES)]
    if name == "toxicity":
        return [_items(name, args, replies=args.samples)]
    if name in ("choice", "open_qa"):
        variants = {"commonsense_qa": ("commonsense_qa", "commonsense_qa_cloze")}
        names = [name for task in args.tasks for name in variants.get(task, (task,))]
        return [_items(name, args) for name in names]
    if name == "code":  # refused without --run_code
        return [
            _items(task, args, answer=CODE_TOKENS[task]) for task in args.tasks if args.run_code
        ]
    return [_items(name, args)] if name in TEST_SETS else None


def _items(
    task: str,
    args: argparse.Namespace,
    groups: int | None = None,
    replies: int = 1,
    limit_of: int = 1,
    answer: int = 0,
) -> Workload:
    """Workload of one test set.

    groups: how often the few-shot examples are read (default: once per item). replies: answers per
    item. limit_of: number of parts to which --limit applies. answer: tokens of an answer without
    --max_new_tokens.
    """
    sizes = TEST_SETS[task]
    items = min(sizes.items, args.limit * limit_of) if args.limit else sizes.items
    shots = sizes.shot * getattr(args, "shots", 0) / BYTES_PER_TOKEN
    prompt, options = sizes.prompt / BYTES_PER_TOKEN, sizes.options / BYTES_PER_TOKEN
    read = items * (prompt * replies + options) + shots * (
        items if groups is None else min(groups, items)
    )
    answer = getattr(args, "max_tokens", None) or answer
    return Workload(read, items * replies * answer, round(shots + prompt + answer))


def _perplexity(args: argparse.Namespace, context: int, sources: int) -> list[Workload] | None:
    if not args.tokens and not args.limit:
        return None  # the whole split; its size is unknown without the data
    length = args.sequence_length or context
    tokens = max(length, args.tokens or args.limit * length)
    if args.limit:
        tokens = min(tokens, args.limit * length)
    windows = length / args.stride if args.stride else 1  # windows overlap with a stride
    return [Workload(tokens * windows * len(args.sources or range(sources)), length=length)]


def _needle(args: argparse.Namespace, context: int) -> list[Workload]:
    lengths = (
        args.context or [length for length in (4096, 8192, 16384) if length <= context] or [context]
    )
    tests = min(args.num_tests, args.limit or args.num_tests) * len(args.kinds)
    written = tests * (args.max_tokens or NEEDLE_WRITES)
    return [
        Workload((NEEDLE_READS + args.gain) * tests * length, written, length)
        for length in sorted(set(lengths))
    ]


def command_tokens(
    command: str, run: RunConfig, sources: int
) -> tuple[int, dict[str, list[Tokens] | None]]:
    """Return a command's number of processes, and the tokens of each evaluation it runs.

    Tokens are None for an evaluation without known sizes and for a command of another program.
    """
    processes = re.search(r"--nproc[_-]per[_-]node[= ](\d+)", command)
    context = run.model.max_position_embeddings
    try:
        work = {
            name: workload(name, args, context, sources)
            for name, args in _evaluations(command).items()
        }
    except ValueError:
        work = {command: None}
    tokens = {
        name: None if parts is None else [(part.read, part.written, part.length) for part in parts]
        for name, parts in work.items()
    }
    return int(processes[1]) if processes else 1, tokens


def _evaluations(command: str) -> dict[str, argparse.Namespace]:
    """Return name -> flags of the evaluations that a command runs.

    Raises ValueError for wrong flags and for a command that is not an evaluation.
    """
    words = shlex.split(command)
    modules = [(i, word) for i, (flag, word) in enumerate(pairwise(words), 1) if flag == "-m"]
    index, module = next(
        (m for m in modules if m[1].startswith(("evals.eval_", "scripts.run_evals"))), (0, "")
    )
    flags = words[index + 1 :]
    try:
        with redirect_stderr(io.StringIO()):
            if module == "scripts.run_evals":
                args = suite_parser(None).parse_args(flags)
                suite, _ = open_suite(args.suite)
                return {name: parse(name, text, args, None) for name, text in suite.evals.items()}
            if module:
                return {
                    module.removeprefix("evals.eval_"): import_module(module)
                    .parser()
                    .parse_args(flags)
                }
    # AttributeError: the evaluation has no parser().
    except (SystemExit, ImportError, AttributeError) as error:
        raise ValueError(f"{command} has invalid flags") from error
    raise ValueError(f"{command} is not an evaluation")
