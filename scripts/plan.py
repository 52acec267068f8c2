"""Estimate the hours, memory, disk and loss of a plan before it runs, without GPU or data.

python -m scripts.plan configs/plan_1b.yaml --gpu h100 --gpus 2
python -m scripts.plan configs/plan_1b.yaml --gpu a100-40 --gpus 8 --mfu 0.5 --price 1.5 --json
python -m scripts.plan configs/plan_1b.yaml --forecast my_forecast.json    # of scripts.forecast

Exit status 2 if a phase does not fit in GPU memory; the last line then names settings that fit.
"""

import json
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from evals.cost import command_tokens
from ranges import Range, above
from training.planning.cards import GPUS
from training.planning.cost import check, forecast, readable_tokens
from training.planning.forecast_text import forecast_text
from training.planning.plan import load_plan, scheduled_phases
from training.planning.published import target_outlook
from training.planning.scaling_law import forecast_phases, load_law, non_embedding_parameters


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=int_at_least(1), help="default: the plan's ranks")
    parser.add_argument(
        "--mfu",
        type=within(float, above(0, maximum=1)),
        help="assumed model FLOPs utilisation of training; default: hours from the operations of "
        "a step and published throughputs (docs/new_plan.md)",
    )
    parser.add_argument(
        "--price", type=within(float, Range(0)), help="price of one GPU hour, in any currency"
    )
    parser.add_argument(
        "--forecast",
        type=Path,
        metavar="FILE",
        help="forecast.json of scripts.forecast, for a second loss forecast beside Hoffmann's",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; units: bytes, FLOPs and hours"
    )
    args = parser.parse_args()
    with user_errors():
        law = load_law(args.forecast) if args.forecast else None
        plan = load_plan(args.plan)
        report = forecast(
            plan,
            args.gpu,
            args.gpus,
            args.mfu,
            args.price,
            readable_tokens,
            command_tokens,
        )
        if law:
            size = non_embedding_parameters(scheduled_phases(plan)[0].run.model)
            forecast_phases(law, str(args.forecast), size, report)
        report["targets"] = target_outlook(
            plan.targets,
            report["active_parameters"],
            report["total"]["tokens"],
            report["phases"][-1]["loss"],
        )
        print(json.dumps(report, indent=2) if args.json else forecast_text(report), flush=True)
        check(report)


if __name__ == "__main__":
    main()
