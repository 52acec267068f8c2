"""Fit a scaling law to the runs of an experiment and forecast larger runs, with intervals.

python -m scripts.experiment configs/lab/scaling.yaml
python -m scripts.forecast logs/lab/scaling                      # or a folder of records/
python -m scripts.forecast logs/lab/scaling --predict 1e9 30e9   # parameters, tokens
python -m scripts.plan configs/plan_1b.yaml --forecast results/forecast/scaling/forecast.json

The runs with the most compute are held out, forecast from the other runs, and compared. To forecast
them before they run, run the other variants with --only and give the size to --predict. Writes
forecast.json, forecast.png and forecast.md. docs/forecast.md has the method.
"""

from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from files import write_json, write_text
from lab.scaling import (
    forecast_values,
    held_out_lines,
    hold_out_largest,
    law_lines,
    plot,
    read_runs,
    report,
)
from ranges import above
from training.planning.scaling_law import DRAWS, fit


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("logs", type=Path, help="logs/lab/NAME or a folder of records/")
    parser.add_argument("--metric", default="val/loss", help="a metric of the runs")
    parser.add_argument(
        "--predict",
        type=within(float, above(0)),
        nargs=2,
        metavar=("PARAMETERS", "TOKENS"),
        help="also forecast this run: non-embedding parameters and training tokens",
    )
    parser.add_argument(
        "--draws", type=int_at_least(100), default=DRAWS, help="resampled fits for the intervals"
    )
    parser.add_argument("--output_dir", type=Path, help="default: results/forecast/NAME")
    args = parser.parse_args()
    with user_errors():
        runs = read_runs(args.logs, args.metric)
        held_out = hold_out_largest(runs, args.draws, args.metric)
        law = fit(runs, args.draws, args.metric)
        output = args.output_dir or Path("results/forecast", args.logs.resolve().name)
        output.mkdir(parents=True, exist_ok=True)
        values = forecast_values(args.logs, runs, held_out, law)
        lines = [*held_out_lines(held_out), "", f"law of all {len(runs)} runs", *law_lines(law)]
        if args.predict:
            size, tokens = args.predict
            low, high = law.interval(size, tokens)
            n, d = law.factors(size, tokens)
            values["predicted"] = {
                "parameters": size,
                "tokens": tokens,
                "loss": law.loss(size, tokens),
                "interval": [low, high],
            }
            lines += [
                "",
                f"{size:.4g} parameters, {tokens:.4g} tokens: {law.loss(size, tokens):.4f} "
                f"[{low:.4f}, {high:.4f}]; {n:.3g} x the largest size and {d:.3g} x the most "
                "tokens of the runs",
            ]
        write_json(output / "forecast.json", values)
        write_text(output / "forecast.md", report(args.logs, held_out, law, runs))
        plot(held_out, runs, output / "forecast.png")
        print("\n".join([*lines, "", f"report: {output / 'forecast.md'}"]), flush=True)


if __name__ == "__main__":
    main()
