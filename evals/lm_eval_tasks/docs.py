"""Row preprocessing of lm-evaluation-harness for the tasks in this folder."""

from typing import Any

from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag  # noqa: F401
from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as mc2  # noqa: F401

from evals.eval_gsm8k import solution


def gsm8k_cot(rows: Any) -> Any:
    """Convert GSM8K's solutions to chains of thought."""
    return rows.map(lambda row: {"solution": solution(row["answer"], cot=True)})
