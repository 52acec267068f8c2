"""lm-evaluation-harness' own preparation of rows, for the tasks here."""

from lm_eval.tasks.hellaswag.utils import process_docs as hellaswag  # noqa: F401
from lm_eval.tasks.truthfulqa.utils import process_results_mc2 as mc2  # noqa: F401
