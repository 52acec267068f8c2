"""Compare runs: curves by step and by tokens as a PNG, figures as a Markdown table.

python -m scripts.compare_runs logs/a logs/b --output results/compare    # compare.png, compare.md
"""

from pathlib import Path

from cli import CommandParser, user_errors
from evals.report.runs import open_runs, plot, table


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that contain metrics.jsonl")
    parser.add_argument(
        "--output", type=Path, default=Path("results/compare"), help="output path without suffix"
    )
    args = parser.parse_args()
    with user_errors():
        runs = open_runs(args.runs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        curves, text = Path(f"{args.output}.png"), table(runs)
        plot(runs, curves)
        Path(f"{args.output}.md").write_text(text, encoding="utf-8")
        print(f"{text}\ncurves: {curves}, this table: {args.output}.md")


if __name__ == "__main__":
    main()
