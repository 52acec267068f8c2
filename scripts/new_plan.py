"""Choose a model and write a plan for your GPUs and hours, or for this CPU.

python -m scripts.new_plan --gpu rtx4090 --gpus 1 --hours 48 --price 0.4
python -m scripts.new_plan --gpu h100 --gpus 2 --hours 168 --goal base --name week
python -m scripts.new_plan --gpu rtx3060 --hours 24 --params 1e8
python -m scripts.new_plan --gpu cpu --minutes 30

Writes configs/NAME/ and prints memory, hours, disk, money and the expected loss. It never
overwrites a folder, and --name must not be the name of another run. --goal code needs a login to
the hub. Run the plan with `python -m scripts.pipeline --plan configs/NAME/plan.yaml`.
docs/new_plan.md has the rules and their sources. With --gpu cpu, it first trains for 20 seconds to
measure this machine.
"""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from data import manifest
from evals.cost import command_tokens
from ranges import Range, above
from training.config import load
from training.planning.cards import GPUS
from training.planning.cost import check, forecast
from training.planning.cpu_plan import CORPUS, QUICKSTART, choose_cpu, cpu_files
from training.planning.dial import Request, choose
from training.planning.dial_data import GOALS, gated_text
from training.planning.dial_text import cpu_text, gpu_text
from training.planning.plan import load_plan
from training.planning.plan_files import (
    check_name,
    config_headers,
    gpu_files,
    write_plan,
)
from training.planning.probe import measure

STORE = Path("data/store/quickstart")


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}, or cpu: this machine")
    parser.add_argument(
        "--gpus", type=int_at_least(1), default=1, help="number of GPUs, 1 to 8 (default: 1)"
    )
    positive = within(float, above(0))
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=positive)
    length.add_argument("--minutes", type=positive)
    parser.add_argument("--goal", choices=GOALS, default="chat", help="default: chat")
    parser.add_argument("--tokens", type=positive, help="pretraining tokens; default: chosen")
    parser.add_argument("--params", type=positive, help="parameters of the model; default: chosen")
    parser.add_argument("--price", type=within(float, Range(0)), help="price of one GPU hour")
    parser.add_argument("--name", help="name of the plan; default: from the other flags")
    args = parser.parse_args()
    with user_errors():
        hours = args.hours or args.minutes / 60
        machine = args.gpu if args.gpus == 1 else f"{args.gpus}x{args.gpu}"
        span = f"{args.minutes:.15g}m" if args.minutes else f"{args.hours:.15g}h"
        name = args.name or f"{args.goal}_{machine}_{span}"
        check_name(name)
        folder = Path("configs") / name
        about = f"Written by python -m scripts.new_plan {shlex.join(sys.argv[1:])}"
        if args.gpu == "cpu":
            _cpu(args, 60 * hours, folder, about)
        else:
            request = Request(args.gpu, args.gpus, hours, args.goal, args.tokens, args.params)
            _gpu(request, args.price, folder, about)
        print(f"\nNext: python -m scripts.pipeline --plan {folder / 'plan.yaml'}")


def _gpu(request: Request, price: float | None, folder: Path, about: str) -> None:
    """Write and describe a plan for GPUs."""
    choice = choose(request)
    gated = gated_text(request.goal, choice.fit.long_rows)
    if gated:
        print("\n".join(textwrap.wrap(f"note: {gated}", 100)), flush=True)
    files = gpu_files(choice, folder.name)
    notes = (gated, *choice.notes) if gated else choice.notes
    write_plan(folder, files, config_headers(folder.name, files, about, notes))
    plan = load_plan(folder / "plan.yaml")
    report = forecast(
        plan, request.gpu, request.gpus, price=price, evaluation_tokens_of=command_tokens
    )
    check(report)
    print(f"{folder}: a plan of goal {request.goal}\n{gpu_text(choice, report, price)}")


def _cpu(args: argparse.Namespace, minutes: float, folder: Path, about: str) -> None:
    """Measure this machine, then write and describe a plan for it."""
    for flag in ("tokens", "params", "price"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag} has no effect with --gpu cpu, which trains the quickstart's model; "
                "remove it"
            )
    if args.gpus > 1:
        raise ValueError(f"--gpus {args.gpus} has no effect with --gpu cpu; remove it")
    run = load(QUICKSTART / "base.yaml")
    print("measuring training steps for 20 seconds", flush=True)
    probe = measure(run)
    prepared = all(manifest.read(STORE / "tokens" / source) for source in CORPUS)
    choice = choose_cpu(minutes, args.goal, probe, prepared)
    files = cpu_files(choice, folder.name)
    write_plan(folder, files, config_headers(folder.name, files, about, choice.notes))
    load_plan(folder / "plan.yaml")
    text = cpu_text(choice, probe, run.model.num_parameters, minutes)
    print(f"{folder}: a plan of goal {args.goal}\n{text}")


if __name__ == "__main__":
    main()
