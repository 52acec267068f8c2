"""Carry out a plan: data, then phase after phase, pausing at milestones to measure, judge and decide, then the stages.

python -m scripts.pipeline --plan configs/plan_1b.yaml
python -m scripts.pipeline --plan configs/plan_1b.yaml --extend phase1_pretrain=20000       # later steps move by as many
python -m scripts.pipeline --plan configs/plan_1b.yaml --accept "HellaSwag is fine, text was looked at"
python -m scripts.pipeline --plan configs/plan_1b.yaml --redo sft                           # after a change of its config
python -m scripts.pipeline --plan configs/plan_1b.yaml --skip dpo
python -m scripts.pipeline --plan configs/plan_1b.yaml --branch early --at 150000 --steps 15000   # a decay of its own

Every stage is a command of its own; it is printed first. What is done is skipped, what was killed is resumed: run this
again to continue. A training stage that dies is restarted from its newest checkpoint, at most `restarts` times. A stage
whose base model has changed is set aside and made again. Exit status 3: a gate said no-go.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli import ROOT, CommandParser, at_least, user_errors
from files import read_object, write_json
from machine import cpus
from training import setup
from training.checkpoint import damage, identity, step_folders
from training.logger import append_event, open_alerts
from training.ops.supervisor import Supervisor
from training.planning.gates import Gate, Measured, by_name, decide, estimate, judge, reference_of
from training.planning.plan import (
    Milestone,
    Plan,
    PlanStage,
    ScheduledPhase,
    load_plan,
    scheduled_phases,
)
from training.run_folder import locked
from training.settings import read_yaml

NO_GO = 3


class Pipeline:
    """A plan being carried out. It keeps its decisions in logs/<run>/ and its measurements in results/<run>/."""

    def __init__(self, plan: Plan, extend: dict[str, int], accept: str | None):
        self.plan, self.number = plan, 0
        self.launch = [
            "python",
            "-m",
            "scripts.launch",
            f"--nproc_per_node={plan.ranks}",
            "train.py",
        ]
        self.measured: list[Measured] = []  # in order of the plan
        self.accept, self.extended = (
            accept,
            extend,
        )  # an extension accepts the no-go of its phase that advised it
        run = scheduled_phases(plan)[0].run
        if not run.logs.exists() and (ROOT / run.logs).exists() and Path.cwd() != ROOT:
            print(
                f"warning: {Path.cwd()} has no run {run.run}, but {ROOT} has one; to continue it, give the command there"
            )
        self.logs, self.results = run.logs, Path("results") / run.run
        self.alerts = open_alerts(
            self.logs, replace(run.log.alerts, quiet_s=0.0), setup.secrets(run.log.alerts.secrets)
        )
        self.supervisor = Supervisor(self.logs, plan.restarts, self.event)
        self.longer = self._extensions(extend)
        self.scheduled_phases = scheduled_phases(plan, self.longer)

    def run(self, redo: frozenset[str] = frozenset(), skip: frozenset[str] = frozenset()) -> None:
        self._check_names(redo, skip)
        for sentence, command in self.plan.before.items():
            self.stage(sentence, shlex.split(command))
        before: Path | None = None
        for scheduled in self.scheduled_phases:
            self._renew(scheduled, before, scheduled.run.phase in redo)
            for stop in sorted(
                {milestone.at for milestone in scheduled.phase.milestones} | {scheduled.end}
            ):
                self.train(scheduled, stop, before)
                for milestone in scheduled.phase.milestones:
                    if milestone.at == stop:
                        checkpoint = scheduled.run.checkpoints / f"step_{milestone.at}"
                        self.judge(
                            replace(milestone, evals=milestone.evals or tuple(self.plan.evals)),
                            checkpoint,
                            scheduled,
                        )
            before = scheduled.run.checkpoints
        checkpoint = step_folders(self.scheduled_phases[-1].run.checkpoints)[-1]
        for stage in self.plan.stages:
            if stage.name in skip:
                self.event(
                    "skipped_stage",
                    f"stage {stage.name} is left out, as --skip asks",
                    stage=stage.name,
                )
                continue
            checkpoint = self.carry_out(stage, checkpoint, stage.name in redo)
        for sentence, command in self.plan.after.items():
            self.stage(sentence, self._fill(command, checkpoint=checkpoint))

    def train(self, scheduled: ScheduledPhase, stop: int, before: Path | None) -> None:
        """Train a phase up to step `stop`, unless it is there already."""
        run = scheduled.run
        folders = step_folders(run.checkpoints)
        if folders and int(folders[-1].name[5:]) >= stop and damage(folders[-1]) is None:
            return
        settings = [f"until={stop}"] if stop < scheduled.end else []
        if self.longer:
            schedule = run.schedule
            settings += [f"steps={run.steps}", f"schedule.total_steps={schedule.total_steps}"]
            settings += [f"schedule.decay_steps={schedule.decay_steps}"]
            settings += [f"start_step={run.start_step}"] if run.start_step is not None else []
        resume = ["--resume_from", str(before)] if before else []
        data = run.data
        self.stage(
            f"Training, phase {run.phase}, steps {scheduled.begin} to {stop} of {scheduled.end}: {', '.join(data.mix)}, "
            f"{data.sequence_length} tokens a row, rope theta {run.theta_text}",
            [*self.launch, "--config", scheduled.phase.config, *resume, *settings],
        )

    def carry_out(self, stage: PlanStage, checkpoint: Path, redo: bool) -> Path:
        """Run a stage's commands on a checkpoint, judge what they leave, and return that; made before from other: redone."""
        leaves, record = Path(stage.leaves), self.results / stage.name / "stage.json"
        made_of = {
            "checkpoint": identity(checkpoint),
            "commands": stage.commands,
            "settings": _settings(stage),
        }
        done, folders = read_object(record), step_folders(leaves)
        position = (read_object(folders[-1] / "state" / "trainer.json") if folders else None) or {}
        parent = position.get("parent") if position.get("phase") == stage.name else None
        of = parent or (done or {}).get("checkpoint")
        if folders and redo:
            self._set_aside(leaves, f"{stage.name} is done again, as --redo asks")
        elif folders and of not in (None, "", made_of["checkpoint"]):
            self._set_aside(
                leaves,
                f"{stage.name} was made from another model than {checkpoint}, and is made again",
            )
        elif (
            folders
            and done
            and any(done.get(name) != made_of[name] for name in ("commands", "settings"))
        ):
            raise ValueError(
                f"stage {stage.name} was made with other settings than the plan and its configs have now; give "
                f"--redo {stage.name} to make it again, or undo the change"
            )
        write_json(record, made_of)
        for sentence, command in stage.commands.items():
            self.stage(sentence, self._fill(command, checkpoint=checkpoint))
        if not step_folders(leaves):
            raise ValueError(
                f"stage {stage.name} left no checkpoint in {leaves}; make its commands write there"
            )
        newest = step_folders(leaves)[-1]
        if stage.evals:
            self.judge(stage, newest)
        return newest

    def judge(
        self,
        milestone: Milestone | PlanStage,
        checkpoint: Path,
        scheduled: ScheduledPhase | None = None,
    ) -> None:
        """Measure and judge a milestone or what a stage left, once; SystemExit(3) where that ends the plan here."""
        step = milestone.at if isinstance(milestone, Milestone) else milestone.name
        where = f"at step {step}" if isinstance(milestone, Milestone) else f"after {step}"
        folder = self.results / (
            f"step_{step}" if isinstance(milestone, Milestone) else milestone.name
        )
        path, of = folder / "decision.json", identity(checkpoint)
        done = read_object(path) or {}
        phase = scheduled.run.phase if scheduled else str(step)
        compared = [reference_of(gate, self.measured) for gate in milestone.gates]
        known = [
            estimate(gate.metric, found.metrics) if found else None
            for gate, found in zip(milestone.gates, compared, strict=True)
        ]
        references = [found.value if found else None for found in known]
        current = done.get("of") == of and done.get("gates") == _plain(milestone.gates)
        current = current and done.get("references", [None] * len(references)) == references
        if current and (done.get("outcome") != "no-go" or done.get("accepted")):
            self._remember(milestone.evals, folder, phase, where)
            return
        for name in milestone.evals:
            output, key = folder / f"{name}.json", {"of": of, "command": self.plan.evals[name]}
            measured = read_object(output) or {}
            if any(measured.get(part) != value for part, value in key.items()) or measured.get(
                "not_measured"
            ):
                command = self._fill(self.plan.evals[name], checkpoint=checkpoint, output=output)
                self.stage(f"Measuring {name} {where}", command)
                found = read_object(output)
                if found is None:
                    raise ValueError(
                        f"the evaluation {name} left no results in {output}; make its command write {{output}}"
                    )
                write_json(output, {**found, **key})
        metrics = self._remember(milestone.evals, folder, phase, where)
        verdicts = [
            judge(gate, metrics, found)
            for gate, found in zip(milestone.gates, compared, strict=True)
        ]
        outcome = decide(verdicts) if verdicts else "go"
        was_seen = (
            current and done.get("outcome") == "no-go"
        )  # a reason is for a no-go that was seen
        steps = self.extended.get(scheduled.run.phase) if scheduled else None
        reason = self.accept or (
            f"{scheduled.run.phase} extended by {steps} steps" if scheduled and steps else None
        )
        accepted = reason if outcome == "no-go" and was_seen else None
        decision: dict[str, Any] = {"step": step, "outcome": outcome, "accepted": accepted}
        decision["gates"] = _plain(milestone.gates)
        decision |= (
            {"references": references} if any(gate.against for gate in milestone.gates) else {}
        )
        values = [verdict.value for verdict in verdicts]
        write_json(path, {**decision, "values": values, "of": of, "metrics": metrics})
        advice = [
            verdict.gate.advice
            for verdict in verdicts
            if verdict.outcome != "go" and verdict.gate.advice
        ]
        advice = list(dict.fromkeys(advice)) or (
            [milestone.advice] if milestone.advice and outcome != "go" else []
        )
        text = (
            f"{outcome} {where}: "
            + "; ".join(map(str, verdicts))
            + (f"; accepted: {accepted}" if accepted else "")
        )
        append_event(self.logs, "gate", text, **decision, values=values, advice="; ".join(advice))
        self.alerts.send(
            "gate",
            f"{self.scheduled_phases[0].run.run}: {outcome} {where}",
            "\n".join([text, *advice]),
        )
        self.alerts.flush()
        for gate, verdict in zip(milestone.gates, verdicts, strict=True):
            earlier = (
                []
                if gate.against
                else [(m.where, estimate(gate.metric, m.metrics)) for m in self.measured[:-1]]
            )
            before = [f"; before, {at}: {found.value:.3f}" for at, found in earlier if found]
            print(f"    {verdict}{(before or [''])[-1]}")
        print(
            f"decision {where}: {outcome.upper()}"
            + (f", accepted: {accepted}" if accepted else ""),
            flush=True,
        )
        for sentence in advice:
            print(f"the plan advises: {sentence}", flush=True)
        if outcome == "no-go" and not accepted:
            print('To continue nevertheless, give --accept "reason".', file=sys.stderr)
            raise SystemExit(NO_GO)
        self.accept = None if accepted else self.accept  # a reason is for one decision

    def _remember(self, names: tuple[str, ...], folder: Path, phase: str, where: str) -> dict:
        """What was measured there, for the gates and for those that come later."""
        read = [(name, read_object(folder / f"{name}.json")) for name in names]
        metrics = [by_name(name, content["metrics"]) for name, content in read if content]
        self.measured.append(
            Measured(
                phase, where, {name: values for found in metrics for name, values in found.items()}
            )
        )
        return self.measured[-1].metrics

    def _renew(self, scheduled: ScheduledPhase, before: Path | None, redo: bool) -> None:
        """Set aside what a phase left where it can't be continued: redone, begun from another model, or its decay cut short."""
        run, folders = scheduled.run, step_folders(scheduled.run.checkpoints)
        known = [
            (folder, position)
            for folder in folders
            if (position := read_object(folder / "state" / "trainer.json"))
        ]
        if not known:
            return
        newest, position = known[-1]
        earlier = step_folders(before)[-1] if before and step_folders(before) else None
        if redo:
            self._set_aside(run.checkpoints, f"{run.phase} is done again, as --redo asks")
        elif (
            earlier
            and position["phase"] == run.phase
            and position["parent"] not in ("", identity(earlier))
        ):
            self._set_aside(
                run.checkpoints, f"{run.phase} did not begin from {earlier}, and is done again"
            )
        elif self.longer and position.get("rate", {}).get("total_steps") not in (
            None,
            run.schedule.total_steps,
        ):
            stable = run.schedule.total_steps - run.schedule.decay_steps  # the decay begins there
            cut = [folder for folder, found in known if found["step"] > stable]
            if cut and position["step"] < scheduled.end:
                text = f"the learning rate of {newest} has decayed for a shorter {run.phase}; the decay is done again, longer"
                self._set_aside(run.checkpoints, text, cut)

    def _set_aside(self, folder: Path, why: str, steps: list[Path] | None = None) -> None:
        """Move a folder of checkpoints, or some of its step folders, out of the way; nothing is deleted."""
        number = next(
            n for n in range(1, 1000) if not folder.with_name(f"{folder.name}.old{n}").exists()
        )
        aside = folder.with_name(f"{folder.name}.old{number}")
        if steps is None:
            folder.rename(aside)
        else:
            aside.mkdir()
            for step in steps:
                step.rename(aside / step.name)
        text = f"{why}; the checkpoints so far are kept in {aside}: delete them when they are not needed"
        self.event("set_aside", text)

    def event(self, kind: str, text: str, **fields: object) -> None:
        """An event of the run, and a line on the console."""
        append_event(self.logs, kind, text, **fields)
        print(text, flush=True)

    def _fill(self, command: str, **values: object) -> list[str]:
        """The words of a plan's command, with {checkpoint}, {output} and {run} filled in."""
        return [
            word.format(run=self.scheduled_phases[0].run.run, **values)
            for word in shlex.split(command)
        ]

    def _check_names(self, redo: frozenset[str], skip: frozenset[str]) -> None:
        stages, phases = (
            [stage.name for stage in self.plan.stages],
            [s.run.phase for s in self.scheduled_phases],
        )
        for flag, asked, known in (("--redo", redo, [*phases, *stages]), ("--skip", skip, stages)):
            if unknown := sorted(asked - set(known)):
                raise ValueError(f"{flag} {unknown[0]}: the plan has {', '.join(known) or 'none'}")

    def branch(self, name: str, at: int, steps: int) -> None:
        """Decay the learning rate over `steps` steps from a checkpoint of the stable part, beside the run itself."""
        found = [s for s in self.scheduled_phases if (s.run.checkpoints / f"step_{at}").is_dir()]
        if not found:
            raise ValueError(
                f"there is no checkpoint of step {at} to branch from; checkpoint.keep says how many are kept"
            )
        run = found[0].run
        schedule = f"schedule={{warmup_steps: {run.schedule.warmup_steps}, total_steps: {at + steps}, decay_steps: {steps}}}"
        where = f"checkpoints/{run.run}/branch_{name}"
        folders = [f"output_dir={where}", f"log_dir={self.logs}/branch_{name}"]
        settings = [
            f"phase=branch_{name}",
            f"steps={steps}",
            f"start_step={at}",
            schedule,
            *folders,
        ]
        resume = [
            "--config",
            found[0].phase.config,
            "--resume_from",
            str(run.checkpoints / f"step_{at}"),
        ]
        self.stage(
            f"Branch {name}: the rate decays over steps {at} to {at + steps}",
            [*self.launch, *resume, *settings],
        )

    def stage(self, sentence: str, command: list[str]) -> None:
        """Run one stage, again if it dies; if it fails, leave with its status after saying what to do."""
        self.number += 1
        print(f"\n[{self.number}] {sentence}\n    {subprocess.list2cmdline(command)}", flush=True)
        began = time.monotonic()
        ranks = self.plan.ranks if "scripts.launch" in command else 1
        environment = {"OMP_NUM_THREADS": str(max(1, cpus() // ranks)), **os.environ}
        words = [str(ROOT / word) if _entry_point(word) else word for word in command]
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        status = self.supervisor.run(program, environment)
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
        if status:
            if self.supervisor.stopped:
                how = "was interrupted. The same command continues from here."
            else:
                how = f"stopped (exit status {status}). Mend the error above; the same command then continues from here."
            print(f"\nStage {self.number} {how}", file=sys.stderr)
            raise SystemExit(status)

    def _extensions(self, asked: dict[str, int]) -> dict[str, int]:
        """Steps that phases were extended by, now and in earlier calls."""
        path = self.logs / "extensions.json"
        if path.is_file() and read_object(path) is None:
            raise ValueError(
                f"{path} is damaged; restore it: it holds the steps that phases were extended by, as JSON"
            )
        longer = read_object(path) or {}
        if asked:
            for phase, steps in asked.items():
                if steps <= (now := longer.get(phase, 0)):
                    raise ValueError(
                        f"{phase} is extended by {now} steps already; without --extend the plan continues, and "
                        f"--extend {phase}={now + steps} makes it {now + steps}"
                    )
            longer = {**longer, **asked}
            scheduled_phases(self.plan, longer)  # complains before anything is written down
            append_event(self.logs, "extend", f"phases run on: {asked}", **asked)
            write_json(path, longer)
        return longer


def _plain(gates: tuple[Gate, ...]) -> list[dict]:
    """Gates as they are kept beside a decision: what it depends on, without the advice."""
    return [
        {
            "metric": gate.metric,
            "go": gate.go,
            "no_go": gate.no_go,
            **({"against": gate.against} if gate.against else {}),
        }
        for gate in gates
    ]


def _settings(stage: PlanStage) -> dict[str, dict]:
    """Content of the configs that a stage's commands name."""
    words = {word for command in stage.commands.values() for word in shlex.split(command)}
    return {
        word: read_yaml(Path(word)) for word in sorted(words) if word.endswith((".yaml", ".yml"))
    }


def _entry_point(word: str) -> bool:
    """Whether a word names a file of the project that the working folder lacks: commands work from any folder."""
    return word.endswith(".py") and not Path(word).exists() and (ROOT / word).is_file()


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--plan", required=True, type=Path)
    parser.add_argument(
        "--extend",
        nargs="+",
        default=[],
        metavar="PHASE=STEPS",
        help="let a phase run on after its end",
    )
    parser.add_argument(
        "--accept", metavar="REASON", help="go on after a no-go; the reason is recorded"
    )
    parser.add_argument(
        "--redo",
        nargs="+",
        default=[],
        metavar="NAME",
        help="set aside a phase or stage, and do it again",
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="STAGE", help="leave out a stage, such as dpo"
    )
    parser.add_argument(
        "--branch",
        metavar="NAME",
        help="decay from a checkpoint, with --at and --steps, and do nothing else",
    )
    parser.add_argument(
        "--at", type=at_least(1), help="step of the checkpoint that the branch begins from"
    )
    parser.add_argument("--steps", type=at_least(1), help="steps of the branch")
    args = parser.parse_args()
    began = time.monotonic()
    with user_errors():
        plan = load_plan(args.plan)
        with locked(scheduled_phases(plan)[0].run.logs / "plan"):
            pipeline = Pipeline(plan, dict(_extension(text) for text in args.extend), args.accept)
            if args.branch:
                if not (args.at and args.steps):
                    raise ValueError("--branch needs --at STEP and --steps N")
                pipeline.branch(args.branch, args.at, args.steps)
            else:
                pipeline.run(frozenset(args.redo), frozenset(args.skip))
    if args.accept and pipeline.accept == args.accept:
        print("\n--accept was not used: no decision that it could apply to was a no-go")
    print(f"\nDone in {time.monotonic() - began:.0f} s.")


def _extension(text: str) -> tuple[str, int]:
    name, equals, steps = text.partition("=")
    if not equals or not steps.isdecimal() or not int(steps):
        raise ValueError(f"--extend {text} must be PHASE=STEPS, with at least 1 step")
    return name, int(steps)


if __name__ == "__main__":
    main()
