"""Gather a plan's deliverables, check that they agree, and print commands for missing deliverables.

python -m scripts.deliverables --plan configs/plan_1b.yaml
python -m scripts.deliverables --plan configs/quickstart/plan.yaml --output_dir results/quickstart

Copies small files and writes relative links to checkpoints. results/... goes to --output_dir
(default: the folder of the plan's report). With --output_dir results, data/, models/ and
checkpoints/ are written next to it; with any other folder, inside it. Never overwrites a file that
this command did not write. Exit status 1 if a deliverable is missing or two of them disagree.
"""

from pathlib import Path

from cli import CommandParser, user_errors
from evals.report.deliverable_checks import ggufs, pictures, report, scores
from evals.report.deliverables import gather, open_plan, table
from models.hf import resolve_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument(
        "--checkpoint",
        type=resolve_checkpoint,
        help="the final model (default: the checkpoint of the plan's last stage)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="for reports and logs (default: the folder of the plan's report)",
    )
    args = parser.parse_args()
    with user_errors():
        outputs = open_plan(args.plan, args.checkpoint, args.output_dir)
        deliverables = gather(outputs)
        deliverables += [*report(outputs), *pictures(outputs), *ggufs(outputs), *scores(outputs)]
        print(table(deliverables))
        wrong = [deliverable for deliverable in deliverables if deliverable.problem]
        for deliverable in wrong:
            command = f"\n    {deliverable.command}" if deliverable.command else ""
            print(f"\n{deliverable.name}: {deliverable.problem}{command}")
        good = len(deliverables) - len(wrong)
        print(f"\n{good} of {len(deliverables)} deliverables are present and agree")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
