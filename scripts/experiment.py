"""Run an experiment: variants x seeds of a command, then a record with intervals and charts.

python -m scripts.experiment configs/lab/example.yaml
python -m scripts.experiment configs/lab/example.yaml --seeds 0 1 2 3 4 --only muon
python -m scripts.experiment configs/lab/example.yaml --devices 0,1     # two runs at a time
python -m scripts.experiment configs/lab/example.yaml --report_only
python -m scripts.experiment configs/lab/example.yaml budget.tokens=500000
python -m scripts.experiment --compare logs/quickstart logs/my_run \\
    --output results/compare    # writes results/compare.png and .md

Run the same command again to resume: finished runs are not repeated, a killed run continues from
its newest checkpoint, and a failed run is retried. Runs are in logs/lab/<name>/<variant>-<seed>,
the record is in records/<date>_<name>. --devices sets CUDA_VISIBLE_DEVICES of each run; on a
machine without GPUs, it only sets the number of concurrent runs. --compare plots any runs by step
and by tokens and needs no experiment; logs/my_run stands for a run of yours.
"""

import os
import shlex
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors
from evals.report.runs import has_experts, open_runs, plot, plot_routing, table
from lab.experiment import Experiment, check, load_experiment
from lab.session import add_session_flags, conduct


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("config", nargs="?", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting")
    parser.add_argument(
        "--seeds", type=int_at_least(0), nargs="+", help="seeds, instead of the file's"
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run only these variants")
    add_session_flags(parser)
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="LOGS", help="compare these log folders instead"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/compare"),
        help="output path of --compare, without suffix",
    )
    args = parser.parse_intermixed_args()
    with user_errors():
        if args.compare:
            compare_logs(args.compare, args.output)
            return
        if args.config is None:
            raise ValueError("name the YAML file of an experiment, e.g. configs/lab/example.yaml")
        overrides = list(args.overrides)
        if args.seeds:
            overrides.append(f"seeds={args.seeds}")
        experiment = load_experiment(args.config, overrides)
        variants = _chosen(experiment, args.only)
        check(experiment, experiment.variants)
        words = ["python", "-m", "scripts.experiment", args.config, *overrides]
        conduct(
            experiment,
            variants,
            dict(os.environ),
            args.devices,
            args.report_only,
            shlex.join(words),
            args.records,
        )


def compare_logs(folders: list[Path], output: Path) -> None:
    """Plot runs into <output>.png and write their table into <output>.md."""
    runs = open_runs(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    curves, text = Path(f"{output}.png"), table(runs)
    plot(runs, curves)
    if any(map(has_experts, runs)):
        plot_routing(runs, Path(f"{output}_routing.png"))
    Path(f"{output}.md").write_text(text, encoding="utf-8")
    print(f"{text}\ncurves: {curves}, this table: {output}.md")


def _chosen(experiment: Experiment, only: list[str] | None) -> list[str]:
    """Return the variants to run; ValueError for an unknown variant."""
    if unknown := [name for name in only or [] if name not in experiment.variants]:
        raise ValueError(f"--only {unknown[0]}: the variants are {', '.join(experiment.variants)}")
    return only or list(experiment.variants)


if __name__ == "__main__":
    main()
