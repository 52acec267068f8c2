"""Plot a run: loss, validation loss per source, learning rate, gradient norm, speed and events.

python -m scripts.plot_run logs/quickstart

For a mixture of experts, also writes routing.png: the load of each expert and two routing curves.
"""

from pathlib import Path

from cli import CommandParser, user_errors
from evals.report.runs import has_experts, open_runs, plot, plot_routing


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("logs", type=Path, help="folder that contains metrics.jsonl")
    parser.add_argument("--output", type=Path, help="default: loss.png in that folder")
    args = parser.parse_args()
    with user_errors():
        output = args.output or args.logs / "loss.png"
        runs = open_runs([args.logs])
        plot(runs, output)
        print(f"curves: {output}")
        if has_experts(runs[0]):
            routing = output.with_name("routing.png")
            plot_routing(runs, routing)
            print(f"load of the experts: {routing}")


if __name__ == "__main__":
    main()
