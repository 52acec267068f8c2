"""Write benchmark items as local .jsonl files in the hub's schema, and lm-eval tasks over MMLU."""

import json
from pathlib import Path

from cli import ROOT
from data.decontamination.benchmarks import Rows
from evals.eval_mmlu import KIND
from files import write_text

MMLU_TASKS = {"local_mmlu": "letter", "local_mmlu_cloze": "cloze"}


def write_rows(path: Path, rows: Rows) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_splits(folder: Path, splits: dict[str, Rows]) -> None:
    """Write <folder>/<split>.jsonl with the columns that all splits share.

    lm-eval's reader refuses other columns; the wheel's GSM8K has an id in one split.
    """
    columns = set.intersection(*(set(rows[0]) for rows in splits.values()))
    for split, rows in splits.items():
        write_rows(
            folder / f"{split}.jsonl",
            [{name: row[name] for name in row if name in columns} for row in rows],
        )


def write_mmlu_tasks(output: Path, splits: dict[str, Rows]) -> None:
    """Write the rows and the lm-eval tasks of each MMLU subject, and a group per kind of task.

    Kinds: local_mmlu_<subject> (answer letters) and local_mmlu_cloze_<subject> (answer texts).
    """
    folder = output / "lm_eval_tasks"
    folder.mkdir(parents=True, exist_ok=True)
    subjects = list(dict.fromkeys(row["subject"] for row in splits["test"]))
    for subject in subjects:
        files = {
            split: str((output / "mmlu" / subject / f"{split}.jsonl").resolve()) for split in splits
        }
        for split, rows in splits.items():
            write_rows(Path(files[split]), [row for row in rows if row["subject"] == subject])
        for name, kind in MMLU_TASKS.items():
            base = ROOT / "evals" / "lm_eval_tasks" / f"{name.removeprefix('local')}.yaml"
            subject_name = " ".join(subject.split("_"))
            task = {
                "include": str(base),
                "task": f"{name}_{subject}",
                "dataset_kwargs": {"data_files": files},
                "description": (
                    f"The following are {KIND[kind]} (with answers) about {subject_name}.\n\n"
                ),
            }
            path = folder / f"{name}_{subject}.yaml"  # JSON is valid YAML
            path.write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    for name, kind in MMLU_TASKS.items():
        metrics = [
            {"metric": metric, "weight_by_size": True}
            for metric in ("acc", "acc_norm")[: 1 + (kind == "cloze")]
        ]
        group = {
            "group": name,
            "task": [f"{name}_{subject}" for subject in subjects],
            "aggregate_metric_list": metrics,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(group, indent=1) + "\n", encoding="utf-8")
