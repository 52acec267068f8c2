"""lm-evaluation-harness' own preparation of rows, for the tasks here."""

from typing import Any

from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag  # noqa: F401
from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as mc2  # noqa: F401

from evals.eval_gsm8k import solution


def gsm8k_cot(rows: Any) -> Any:
    """Chains of thought out of GSM8K's own solutions."""
    return rows.map(lambda row: {"solution": solution(row["answer"], cot=True)})
