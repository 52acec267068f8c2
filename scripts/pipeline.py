"""Run a plan: data, pretraining phases with milestones and gates, then stages such as SFT and DPO.

python -m scripts.pipeline --plan configs/quickstart/plan.yaml
python -m scripts.pipeline --plan configs/quickstart/plan.yaml --redo sft    # with a new config
python -m scripts.pipeline --plan configs/quickstart/plan.yaml --skip dpo

With two 80 GB GPUs:
python -m scripts.pipeline --plan configs/plan_1b.yaml
python -m scripts.pipeline --plan configs/plan_1b.yaml --extend phase1_pretrain=20000
python -m scripts.pipeline --plan configs/plan_1b.yaml --accept "HellaSwag is fine, text was read"
python -m scripts.pipeline --plan configs/plan_1b.yaml --branch early --at 150000 --steps 15000

Prints and runs the plan's commands. Run it again to resume: finished stages are skipped. A
training command that dies restarts from its newest checkpoint, at most `restarts` times and not
after two failures in a row at the same step. If a stage's base model has changed, its checkpoint
folder is renamed to FOLDER.old1 and the stage runs again. --extend moves all later steps. --branch
decays the learning rate from a checkpoint, in separate folders beside the run. Exit status 3: a
gate said no-go.
"""

import os
import time
from pathlib import Path

from cli import CommandParser, int_at_least, user_errors
from training.planning.pipeline import Pipeline
from training.planning.plan import load_plan, scheduled_phases
from training.planning.stages import final_folder, skipped_stages
from training.run_folder import locked


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument(
        "--extend",
        nargs="+",
        default=[],
        metavar="PHASE=STEPS",
        help="train a phase for more steps; later phases move accordingly",
    )
    parser.add_argument(
        "--accept", metavar="REASON", help="continue after a no-go; the reason is logged"
    )
    parser.add_argument(
        "--redo",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rename the folders of phases or stages to FOLDER.old1 and run them again",
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="STAGE", help="skip stages, such as dpo"
    )
    parser.add_argument(
        "--branch",
        metavar="NAME",
        help="instead of the plan, decay the learning rate from a checkpoint (--at, --steps)",
    )
    parser.add_argument(
        "--at", type=int_at_least(1), help="step of the checkpoint that the branch starts from"
    )
    parser.add_argument("--steps", type=int_at_least(1), help="steps of the branch")
    args = parser.parse_args()
    start = time.monotonic()
    with user_errors():
        plan = load_plan(args.plan)
        with locked(scheduled_phases(plan)[0].run.logs / "plan"):
            extend = dict(_extension(text) for text in args.extend)
            pipeline = Pipeline(plan, extend, args.accept, os.environ)
            if args.branch:
                if not (args.at and args.steps):
                    raise ValueError("--branch needs --at STEP and --steps N")
                if args.extend or args.redo:
                    raise ValueError("--branch cannot be combined with --extend or --redo")
                pipeline.branch(args.branch, args.at, args.steps)
            else:
                pipeline.run(frozenset(args.redo), frozenset(args.skip))
                for name in sorted(skipped_stages(pipeline.logs) - set(args.skip)):
                    text = f"stage {name} is used again; to skip it, repeat --skip {name}"
                    pipeline.event("used_stage", text, stage=name)
    if args.accept and pipeline.accept == args.accept:
        print("\n--accept was not used, because no gate said no-go")
    print(f"\nDone in {time.monotonic() - start:.0f} s.")
    if plan.next and not args.branch:
        folders = {entry.run.phase: entry.run.checkpoints for entry in pipeline.scheduled_phases}
        folders |= {stage.name: Path(stage.output_dir) for stage in plan.stages}
        checkpoint = str(final_folder(folders, pipeline.logs))
        lines = [line.replace("{checkpoint}", checkpoint) for line in plan.next]
        print("Next:", *lines, sep="\n    ")


def _extension(text: str) -> tuple[str, int]:
    name, equals, steps = text.partition("=")
    if not equals or not steps.isdecimal() or not int(steps):
        raise ValueError(f"--extend {text} must be PHASE=STEPS, with at least 1 step")
    return name, int(steps)


if __name__ == "__main__":
    main()
