"""Plot a run: loss, validation loss per source, learning rate, gradient norm, speed and events.

python -m scripts.plot_run logs/quickstart
"""

from pathlib import Path

from cli import CommandParser, user_errors
from evals.report.runs import open_runs, plot


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("run", type=Path, help="the folder that contains metrics.jsonl")
    parser.add_argument("--output", type=Path, help="default: loss.png in that folder")
    args = parser.parse_args()
    with user_errors():
        output = args.output or args.run / "loss.png"
        plot(open_runs([args.run]), output)
        print(f"curves: {output}")


if __name__ == "__main__":
    main()
