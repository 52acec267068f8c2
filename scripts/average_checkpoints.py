"""Average the weights of checkpoints into a new model folder.

python -m scripts.average_checkpoints --phase_folder checkpoints/quickstart/base --last 2
python -m scripts.average_checkpoints --weights 1 2 --output_dir checkpoints/averaged \\
    --checkpoints checkpoints/quickstart/sft/step_250 checkpoints/quickstart/sft/step_500

The mean of the last checkpoints at a constant learning rate forecasts the result of a decay
(arXiv:2505.12082). During the decay, the mean is a candidate for the final model. The folder has
the files of a step folder without state/: evaluations, export, chat and --base_model accept it, but
training cannot resume from it. Its average.json names the sources. Run the same command again: a
finished average is unchanged, even if its sources have been deleted.
"""

import argparse
from itertools import pairwise
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors, within
from ranges import above
from training.averaging import (
    complete_steps,
    is_made,
    last_checkpoints,
    record_of,
    recorded_last,
    write_average,
)
from training.checkpoint_files import step_of


def main() -> None:
    parser = CommandParser(__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "--checkpoints", nargs="+", type=Path, metavar="FOLDER", help="model folders to average"
    )
    chosen.add_argument("--phase_folder", type=Path, help="average its last checkpoints")
    parser.add_argument(
        "--last", type=int_at_least(2), help="number of checkpoints of --phase_folder (default: 5)"
    )
    parser.add_argument(
        "--every", type=int_at_least(1), help="only steps that are multiples of this number"
    )
    parser.add_argument("--until", type=int_at_least(1), help="only steps up to this one")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=within(float, above(0)),
        metavar="W",
        help="weight of each checkpoint, oldest first for --phase_folder (default: equal)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="new folder (default: average_N in the phase folder, for the newest step N)",
    )
    args = parser.parse_args()
    with user_errors():
        sources, output = chosen_checkpoints(args)
        names = ", ".join(str(source) for source in sources)
        if is_made(output, sources, args.weights):
            print(f"{output} is the average of {names}; nothing to do")
            return
        write_average(record_of(sources, args.weights), output)
        print(f"{output}: average of {len(sources)} checkpoints: {names}")
        steps = [step_of(source) for source in sources] if args.phase_folder else []
        if len({right - left for left, right in pairwise(steps)}) > 1:
            print("warning: the steps are unevenly spaced; choose some with --every and --until")


def chosen_checkpoints(args: argparse.Namespace) -> tuple[list[Path], Path]:
    """Return the checkpoints to average, in order, and the output folder; may raise ValueError."""
    if args.phase_folder:
        phase, every = args.phase_folder, args.every or 1
        choice = (phase, args.last or 5, every, args.until)
        newest = [step_of(folder) for folder in complete_steps(phase, every, args.until)][-1:]
        output = args.output_dir or phase / f"average_{newest[0] if newest else 0}"
        return recorded_last(output, *choice) or last_checkpoints(*choice), output
    if args.last or args.every or args.until:
        raise ValueError("--last, --every and --until choose among a --phase_folder; give that")
    if args.output_dir is None:
        raise ValueError("--checkpoints needs an --output_dir")
    return args.checkpoints, args.output_dir


if __name__ == "__main__":
    main()
