"""Train rungs of the speedrun ladder with several seeds and compare them in a record.

python -m scripts.ladder --rungs 0-9 --seeds 3          # in miniature without a GPU
python -m scripts.ladder --rungs muon untied_head 20-22 --seeds 5 --miniature
python -m scripts.ladder --medium --devices 0,1,2,3     # track 2, four runs at a time
python -m scripts.ladder --rungs 0-9 --report_only      # write the record again
python -m scripts.ladder --history                      # write docs/learning_path.md

Each rung trains for the steps of its config. The target is the baseline's mean final loss; rung 0,
the baseline, is always included. The record in records/<date>_ladder* has tokens, steps and seconds
to the target with 95 % intervals, against the baseline and against the previous rung, and the
final loss of a rung that never reaches it. Every command is resumable: run it again and it
continues.

The miniature needs the quickstart's text as shards:
python -m scripts.write_bin --store data/store/quickstart --output_dir data/quickstart_bin \\
    --mix wikipedia=0.5 factbook=0.25 code=0.25 --max_document 256
"""

import os
import shlex
import sys

import torch

from cli import CommandParser, int_at_least, user_errors
from data.bin_shards import BinShards
from files import write_text
from lab.experiment import check
from lab.ladder import FULL, MEDIUM, MINIATURE, ladder_experiment, read_ladder, select_rungs
from lab.learning_path import PAGE, learning_path
from lab.session import add_session_flags, conduct
from training.settings import load_settings
from training.speedrun import SpeedrunRun


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--rungs", nargs="+", default=[], help="numbers, ranges or names")
    parser.add_argument(
        "--seeds", type=int_at_least(1), default=3, help="seeds per rung (default: 3)"
    )
    parser.add_argument("--medium", action="store_true", help="the ladder of track 2 (350M)")
    parser.add_argument("--miniature", action="store_true", help="small models, also with a GPU")
    parser.add_argument("--full", action="store_true", help="full size, also without a GPU")
    add_session_flags(parser)
    parser.add_argument("--history", action="store_true", help="write docs/learning_path.md")
    args = parser.parse_args()
    with user_errors():
        if args.history:
            write_text(PAGE, learning_path(args.records))
            print(f"wrote {PAGE}")
            return
        if args.medium + args.miniature + args.full > 1:
            raise ValueError(
                "--medium, --miniature and --full exclude each other; give one of them"
            )
        small = args.miniature or not (args.full or torch.cuda.is_available())
        folder = MEDIUM if args.medium else MINIATURE if small else FULL
        rungs = select_rungs(read_ladder(folder), args.rungs)
        experiment = ladder_experiment(folder, rungs, args.seeds)
        check(experiment, experiment.variants)
        if not args.report_only:
            baseline = load_settings(SpeedrunRun, rungs[0].path)
            for pattern in (baseline.data.train, baseline.data.val):  # ValueError if missing
                BinShards(pattern, baseline.model.vocab_size, baseline.data.bos_token)
        print(f"{len(rungs)} rungs of {folder}, {args.seeds} seed(s) each", flush=True)
        conduct(
            experiment,
            list(experiment.variants),
            dict(os.environ),
            args.devices,
            args.report_only,
            shlex.join(["python", "-m", "scripts.ladder", *sys.argv[1:]]),
            args.records,
        )


if __name__ == "__main__":
    main()
