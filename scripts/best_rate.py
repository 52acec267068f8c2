"""Find the best learning rate of a parameter group at each width, and the rule over widths.

python -m scripts.experiment configs/lab/embedding_rate.yaml
python -m scripts.best_rate logs/lab/embedding_rate                # or a folder of records/
python -m scripts.best_rate logs/lab/embedding_rate --predict 2048

For each width and seed, the minimum of a parabola through the best rate and its neighbours; then a
power law of the width. Intervals (95 %) are over seeds for a width, and of the fitted line.
"""

from pathlib import Path

from cli import CommandParser, int_at_least, user_errors
from lab.best_rate import by_width, fit_rule, read_losses
from lab.statistics import Estimate
from training.optimizers import GROUPS


def interval(value: Estimate) -> str:
    """Format an estimate with its interval."""
    bounds = "" if value.low is None else f" [{value.low:.3g}, {value.high:.3g}]"
    return f"{value.mean:.3g}{bounds}"


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("logs", type=Path, help="logs/lab/NAME or a folder of records/")
    parser.add_argument("--group", default="embedding", choices=GROUPS, help="parameter group")
    parser.add_argument("--metric", default="val/loss", help="a metric of the runs")
    parser.add_argument("--predict", type=int_at_least(1), metavar="WIDTH", help="another width")
    args = parser.parse_args()
    with user_errors():
        rule = fit_rule(read_losses(args.logs, args.group, args.metric))
        for width, rate in by_width(rule).items():
            print(f"width {width:>6,}: best rate of the {args.group} {interval(rate)}, n={rate.n}")
        print(f"rate ~ width^{interval(rule.exponent)}")
        if args.predict:
            print(f"width {args.predict:>6,}: {interval(rule.at(args.predict))}, extrapolated")


if __name__ == "__main__":
    main()
