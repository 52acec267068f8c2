"""Carry a plan out: data, then phase after phase, pausing at milestones to measure, judge and decide, then what comes after.

python -m scripts.pipeline --plan configs/plan_1b.yaml
python -m scripts.pipeline --plan configs/plan_1b.yaml --extend phase1_pretrain=20000       # later steps move by as many
python -m scripts.pipeline --plan configs/plan_1b.yaml --accept "HellaSwag is fine, text was looked at"
python -m scripts.pipeline --plan configs/plan_1b.yaml --branch early --at 150000 --steps 15000   # a decay of its own

Every stage is a command that can be run by hand; it is printed first. What is done is skipped, what was killed goes on
where it stood: to go on, run this again. Exit status 3: a gate said no-go.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from entrypoint import user_errors
from training import setup
from training.checkpoint import damage, identity, step_folders
from training.curriculum import Milestone, Plan, PlanStage, Stretch, load_plan, stretches
from training.gates import by_name, decide, judge
from training.logger import append_event, open_alerts

NO_GO = 3


class Pipeline:
    """A plan being carried out. It keeps what it decided in logs/<run>/ and its measurements in results/<run>/."""

    def __init__(self, plan: Plan, extend: dict[str, int], accept: str | None):
        self.plan, self.number = plan, 0
        self.launch = ["python", "-m", "scripts.launch", f"--nproc_per_node={plan.ranks}", "train.py"]
        self.measured: list[tuple[str, dict]] = []  # where, metrics by name
        self.accept = accept or (f"extended {extend}" if extend else None)  # that is what a no-go may advise
        run = stretches(plan)[0].run
        self.logs, self.results = run.logs, Path("results") / run.run
        self.alerts = open_alerts(self.logs, replace(run.log.alerts, quiet_s=0.0), setup.secrets(run.log.alerts.secrets))
        self.longer = self._extensions(extend)
        self.stretches = stretches(plan, self.longer)

    def run(self) -> None:
        for sentence, command in self.plan.before.items():
            self.stage(sentence, shlex.split(command))
        before: Path | None = None
        for stretch in self.stretches:
            for stop in sorted({milestone.at for milestone in stretch.phase.milestones} | {stretch.end}):
                self.train(stretch, stop, before)
                for milestone in stretch.phase.milestones:
                    if milestone.at == stop:
                        checkpoint = stretch.run.checkpoints / f"step_{milestone.at}"
                        self.judge(replace(milestone, evals=milestone.evals or tuple(self.plan.evals)), checkpoint)
            before = stretch.run.checkpoints
        checkpoint = step_folders(self.stretches[-1].run.checkpoints)[-1]
        for stage in self.plan.stages:
            for sentence, command in stage.commands.items():
                self.stage(sentence, shlex.split(command.format(checkpoint=checkpoint)))
            if not step_folders(Path(stage.leaves)):
                raise ValueError(f"stage {stage.name} left no checkpoint in {stage.leaves}; make its commands write there")
            checkpoint = step_folders(Path(stage.leaves))[-1]
            if stage.evals:
                self.judge(stage, checkpoint)
        for sentence, command in self.plan.after.items():
            self.stage(sentence, shlex.split(command.format(checkpoint=checkpoint)))

    def train(self, stretch: Stretch, stop: int, before: Path | None) -> None:
        """Train a phase up to step `stop`, unless it is there already."""
        run = stretch.run
        folders = step_folders(run.checkpoints)
        if folders and int(folders[-1].name[5:]) >= stop and damage(folders[-1]) is None:
            return
        settings = [f"until={stop}"] if stop < stretch.end else []
        if self.longer:
            settings += [f"steps={run.steps}", f"schedule.total_steps={run.schedule.total_steps}"]
        resume = ["--resume_from", str(before)] if before else []
        data = run.data
        self.stage(
            f"Training, phase {run.phase}, steps {stretch.begin} to {stop} of {stretch.end}: {', '.join(data.mix)}, "
            f"{data.sequence_length} tokens a row, rope theta {run.model.rope_theta:,.0f}",
            [*self.launch, "--config", stretch.phase.config, *resume, *settings],
        )

    def judge(self, milestone: Milestone | PlanStage, checkpoint: Path) -> None:
        """Measure and judge a milestone or what a stage left, once; SystemExit(3) where that ends the plan here."""
        step = milestone.at if isinstance(milestone, Milestone) else milestone.name
        where = f"at step {step}" if isinstance(milestone, Milestone) else f"after {step}"
        folder = self.results / (f"step_{step}" if isinstance(milestone, Milestone) else milestone.name)
        path = folder / "decision.json"
        done = json.loads(path.read_text()) if path.is_file() else {"gates": None}
        if done["gates"] == _plain(milestone.gates) and (done["outcome"] != "no-go" or done["accepted"]):
            self._remember(milestone.evals, folder, where)
            return
        for name in milestone.evals:
            output = folder / f"{name}.json"
            wanted = identity(checkpoint)
            measured = json.loads(output.read_text()) if output.is_file() else {}
            if measured.get("of") != wanted or measured.get("not_measured"):
                command = self.plan.evals[name].format(checkpoint=checkpoint, output=output)
                self.stage(f"Measuring {name} {where}", shlex.split(command))
                measured = {**json.loads(output.read_text()), "of": wanted}
                output.write_text(json.dumps(measured, indent=2) + "\n")
        self._remember(milestone.evals, folder, where)
        verdicts = [judge(gate, self.measured[-1][1]) for gate in milestone.gates]
        outcome = decide(verdicts) if verdicts else "go"
        for gate, verdict in zip(milestone.gates, verdicts, strict=True):
            earlier = [(at, judge(gate, metrics).value) for at, metrics in self.measured[:-1]]
            before = [f"; before, {at}: {value:.3f}" for at, value in earlier if value is not None]
            print(f"    {verdict}{(before or [''])[-1]}")
        accepted = self.accept if outcome == "no-go" else None
        folder.mkdir(parents=True, exist_ok=True)
        decision = {"step": step, "outcome": outcome, "accepted": accepted, "gates": _plain(milestone.gates)}
        values = [verdict.value for verdict in verdicts]
        found = {"values": values, "of": identity(checkpoint), "metrics": self.measured[-1][1]}
        path.write_text(json.dumps({**decision, **found}, indent=2) + "\n")
        text = f"{outcome} {where}: " + "; ".join(map(str, verdicts))
        append_event(self.logs, "gate", text, **decision, values=values, advice=milestone.advice)
        self.alerts.send("gate", f"{self.stretches[0].run.run}: {outcome} {where}", f"{text}\n{milestone.advice}")
        self.alerts.flush()
        print(f"decision {where}: {outcome.upper()}" + (f", accepted: {accepted}" if accepted else ""), flush=True)
        if outcome != "go" and milestone.advice:
            print(f"the plan advises: {milestone.advice}", flush=True)
        if outcome == "no-go" and not accepted:
            print('To go on all the same, give --accept "reason".', file=sys.stderr)
            raise SystemExit(NO_GO)
        self.accept = None if accepted else self.accept  # a reason is for one decision

    def _remember(self, names: tuple[str, ...], folder: Path, where: str) -> None:
        """What was measured there, for the gates and for those that come later."""
        files = {name: folder / f"{name}.json" for name in names}
        read = [by_name(name, json.loads(file.read_text())["metrics"]) for name, file in files.items() if file.is_file()]
        self.measured.append((where, {name: metrics for found in read for name, metrics in found.items()}))

    def branch(self, name: str, at: int, steps: int) -> None:
        """Decay the learning rate over `steps` steps from a checkpoint of the stable part, beside the run itself."""
        found = [s for s in self.stretches if (s.run.checkpoints / f"step_{at}").is_dir()]
        if not found:
            raise ValueError(f"there is no checkpoint of step {at} to branch from; checkpoint.keep says how many are kept")
        run = found[0].run
        schedule = f"schedule={{warmup_steps: {run.schedule.warmup_steps}, total_steps: {at + steps}, decay_steps: {steps}}}"
        where = f"checkpoints/{run.run}/branch_{name}"
        folders = [f"output_dir={where}", f"log_dir={self.logs}/branch_{name}"]
        settings = [f"phase=branch_{name}", f"steps={steps}", schedule, *folders]
        resume = ["--config", found[0].phase.config, "--resume_from", str(run.checkpoints / f"step_{at}")]
        self.stage(f"Branch {name}: the rate decays over steps {at} to {at + steps}", [*self.launch, *resume, *settings])

    def stage(self, sentence: str, command: list[str]) -> None:
        """Run one stage; if it fails, leave with its status after saying what to do."""
        self.number += 1
        print(f"\n[{self.number}] {sentence}\n    {subprocess.list2cmdline(command)}", flush=True)
        began = time.monotonic()
        ranks = self.plan.ranks if "scripts.launch" in command else 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
        program = [sys.executable, *command[1:]] if command[0] == "python" else command
        process = subprocess.Popen(program, env=environment)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the stage was told too: let it save
            status = process.wait() or 130
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
        if status:
            how = "was interrupted" if status in (130, 143) else f"stopped (exit status {status}); what went wrong is said above"
            print(f"\nStage {self.number} {how}. The same command goes on from here.", file=sys.stderr)
            raise SystemExit(status)

    def _extensions(self, asked: dict[str, int]) -> dict[str, int]:
        """Steps that phases were extended by, now and in earlier calls."""
        path = self.logs / "extensions.json"
        longer = json.loads(path.read_text()) if path.is_file() else {}
        if asked:
            longer = {**longer, **asked}
            stretches(self.plan, longer)  # complains before anything is written down
            append_event(self.logs, "extend", f"phases run on: {asked}", **asked)
            path.write_text(json.dumps(longer) + "\n")
        return longer


def _plain(gates) -> list[dict]:
    return [vars(gate) for gate in gates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument("--extend", nargs="*", default=[], metavar="PHASE=STEPS", help="let a phase run on after its end")
    parser.add_argument("--accept", metavar="REASON", help="go on after a no-go; the reason is recorded")
    parser.add_argument("--branch", metavar="NAME", help="decay from a checkpoint, with --at and --steps, and do nothing else")
    parser.add_argument("--at", type=int, help="step of the checkpoint that the branch begins from")
    parser.add_argument("--steps", type=int, help="steps of the branch")
    args = parser.parse_args()
    began = time.monotonic()
    with user_errors():
        pipeline = Pipeline(load_plan(args.plan), dict(_extension(text) for text in args.extend), args.accept)
        if args.branch:
            if not (args.at and args.steps):
                raise ValueError("--branch needs --at STEP and --steps N")
            pipeline.branch(args.branch, args.at, args.steps)
        else:
            pipeline.run()
    print(f"\nDone in {time.monotonic() - began:.0f} s.")


def _extension(text: str) -> tuple[str, int]:
    name, equals, steps = text.partition("=")
    if not equals or not steps.lstrip("-").isdigit():
        raise ValueError(f"--extend {text} must be PHASE=STEPS")
    return name, int(steps)


if __name__ == "__main__":
    main()
