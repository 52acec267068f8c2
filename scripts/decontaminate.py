"""Find items of evaluation sets in training data: writes which documents hold which, and changes no data.

python -m scripts.decontaminate --train_dataset data/store/quickstart:wikipedia --test_datasets mmlu,gsm8k,hellaswag,arc
"""

import argparse
from pathlib import Path

from data.decontamination import Settings, report
from data.scan_files import decontaminate
from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train_dataset",
        nargs="+",
        required=True,
        help=".parquet and .jsonl(.gz, .zst) files, folders, STORE:SOURCE, known names",
    )
    parser.add_argument("--test_datasets", required=True, help="names and files with id and text, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("data/contaminated_ids.json"))
    parser.add_argument("--report", type=Path, help="write the report to this file too, as Markdown")
    parser.add_argument(
        "--rows", action="store_true", help="short rows (SFT, preferences): look for similar ones too, by MinHash"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, over files")
    parser.add_argument("--coverage", type=float, default=Settings.coverage, help="share of an item that counts as holding it")
    parser.add_argument("--cache", type=Path, default=Path("data/store/wheels"), help="where downloaded test sets are kept")
    args = parser.parse_args()
    with user_errors():
        tests = [name.strip() for name in args.test_datasets.split(",") if name.strip()]
        settings = Settings(coverage=args.coverage)
        index, found = decontaminate(args.train_dataset, tests, args.output, args.cache, settings, args.rows, args.workers)
        text = report(index, found)
        if args.report:
            args.report.parent.mkdir(parents=True, exist_ok=True)
            args.report.write_text(text + "\n")
        scanned = found["settings"]["documents"]
        print(f"{text}\n\n{scanned:,} documents scanned, {len(found['documents']):,} hit; written to {args.output}")


if __name__ == "__main__":
    main()
