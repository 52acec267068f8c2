"""Run a plan: resume, evaluate, decide at gates, repeat, extend and branch."""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli import ROOT
from files import read_object, step_folders, write_json
from machine import cpus
from training import setup
from training.averaging import difference, last_checkpoints, recorded_last
from training.checkpoint_files import find_damage, model_hash, step_of
from training.logger import append_event, open_alerts
from training.ops.supervisor import Supervisor
from training.planning.extensions import read_extensions, record_extensions
from training.planning.gates import (
    Gate,
    Measured,
    estimate,
    judge_all,
    read_metrics,
    reference_of,
    thresholds,
)
from training.planning.plan import Milestone, Plan, PlanStage, ScheduledPhase, scheduled_phases
from training.planning.progress import Progress
from training.planning.renewal import Renewal, check_phases, renewals, set_aside
from training.planning.stages import (
    check_average_is_there,
    evaluation_settings,
    stage_settings,
)
from training.trackers import record_evaluation

NO_GO = 3  # exit status


class Pipeline:
    """A plan's execution: events and decisions in logs/<run>/, evaluations in results/<run>/.

    extend: phase -> steps to train longer. accept: reason to continue after a reported no-go.
    environment: passed to the commands, with OMP_NUM_THREADS added if it is not set.
    """

    def __init__(
        self,
        plan: Plan,
        extend: dict[str, int],
        accept: str | None,
        environment: Mapping[str, str],
    ):
        self.plan, self.environment = plan, environment
        launch = f"python -m scripts.launch --nproc_per_node={plan.ranks} train.py"
        self.launch = launch.split()
        self.measured: list[Measured] = []  # in order of the plan
        self.missed: dict[Path, str] = {}  # average -> why it was not measured
        self.accept = accept
        self.extended = extend  # extending a phase also accepts the no-go that advised it
        run = scheduled_phases(plan)[0].run
        if not run.logs.exists() and (ROOT / run.logs).exists() and Path.cwd() != ROOT:
            print(
                f"warning: {Path.cwd()} has no run {run.run}, but {ROOT} has one; "
                "to continue it, run the command there"
            )
        self.logs, self.results = run.logs, Path("results") / run.run
        self.alerts = open_alerts(
            self.logs, replace(run.log.alerts, quiet_s=0.0), setup.secrets(run.log.alerts.secrets)
        )
        self.supervisor = Supervisor(self.logs, plan.restarts, self.event)
        self.extensions = read_extensions(self.logs, extend)
        self.scheduled_phases = scheduled_phases(plan, self.extensions)
        self.progress = Progress(plan, self.scheduled_phases)

    def run(self, redo: frozenset[str] = frozenset(), skip: frozenset[str] = frozenset()) -> None:
        """Run the whole plan in order; SystemExit at a no-go or a failed command.

        redo: phases and stages to repeat. skip: stages to skip.
        """
        self._check_names(redo, skip)
        check_phases(self.scheduled_phases, self.extensions, redo)
        record_extensions(self.logs, self.extensions, self.extended)
        for title, command in self.plan.before.items():
            self.run_command(title, shlex.split(command))
        before: Path | None = None  # checkpoints of the previous phase
        for number, scheduled in enumerate(self.scheduled_phases):
            for renewal in renewals(self.scheduled_phases, number, self.extensions, redo):
                self._set_aside(renewal)
            milestones = scheduled.phase.milestones
            for stop in sorted({milestone.step for milestone in milestones} | {scheduled.end}):
                self.train(scheduled, stop, before)
                for milestone in milestones:
                    if milestone.step == stop:
                        checkpoint = scheduled.run.checkpoints / f"step_{stop}"
                        evals = milestone.evals or tuple(self.plan.evals)
                        milestone = replace(milestone, evals=evals)
                        if milestone.averages and checkpoint.is_dir():
                            self.try_forecast(milestone, checkpoint, scheduled.run.checkpoint.every)
                        self.judge(milestone, checkpoint, scheduled)
            before = scheduled.run.checkpoints
        checkpoint = step_folders(self.scheduled_phases[-1].run.checkpoints)[-1]
        for stage in self.plan.stages:
            if stage.name in skip:
                text = f"stage {stage.name} is skipped (--skip)"
                self.event("skipped_stage", text, stage=stage.name)
                self.progress.skip(len(stage.commands) + len(stage.evals))
                continue
            checkpoint = self.run_stage(stage, checkpoint, stage.name in redo)
        for title, command in self.plan.after.items():
            self.run_command(title, self._fill(command, checkpoint=checkpoint))
        for why in self.missed.values():
            print(f"\nwarning: {why}", flush=True)

    def train(self, scheduled: ScheduledPhase, stop: int, before: Path | None) -> None:
        """Train a phase up to step `stop`, unless a checkpoint of this or a later step exists.

        before: folder of the previous phase's checkpoints, where a new phase starts.
        """
        run = scheduled.run
        folders = step_folders(run.checkpoints)
        if folders and step_of(folders[-1]) >= stop and find_damage(folders[-1]) is None:
            self.progress.skip()
            return
        settings = [f"until={stop}"] if stop < scheduled.end else []
        if self.extensions:
            schedule = run.schedule
            settings += [f"steps={run.steps}", f"schedule.total_steps={schedule.total_steps}"]
            settings += [f"schedule.decay_steps={schedule.decay_steps}"]
            settings += [f"start_step={run.start_step}"] if run.start_step is not None else []
        if scheduled.begin < run.schedule.decay_begin < scheduled.end:  # kept for --extend
            settings += [f"checkpoint.milestones={[*run.checkpoint.milestones]}".replace(" ", "")]
        resume = ["--resume_from", str(before)] if before else []
        data = run.data
        self.run_command(
            f"Training, phase {run.phase}, steps {scheduled.begin} to {stop} of {scheduled.end}: "
            f"{', '.join(data.mix)}, sequence length {data.sequence_length}, "
            f"rope {run.positions_text}",
            [*self.launch, "--config", scheduled.phase.config, *resume, *settings],
        )

    def run_stage(self, stage: PlanStage, checkpoint: Path, redo: bool) -> Path:
        """Run a stage's commands on a checkpoint, judge the new checkpoint and return it.

        A stage whose base model has changed is repeated; its folder is renamed to FOLDER.old1.
        """
        output, record = Path(stage.output_dir), self.results / stage.name / "stage.json"
        inputs = {
            "checkpoint": model_hash(checkpoint),
            "commands": stage.commands,
            "settings": stage_settings(stage),
        }
        done, folders = read_object(record), step_folders(output)
        position = (read_object(folders[-1] / "state" / "trainer.json") if folders else None) or {}
        parent = position.get("parent") if position.get("phase") == stage.name else None
        base = parent or (done or {}).get("checkpoint")
        if folders and redo:
            self._set_aside(Renewal(output, f"{stage.name} is repeated (--redo)"))
        elif folders and base not in (None, "", inputs["checkpoint"]):
            text = f"{stage.name} did not start from {checkpoint} and is repeated"
            self._set_aside(Renewal(output, text))
        elif folders and done and any(done.get(k) != inputs[k] for k in ("commands", "settings")):
            raise ValueError(
                f"the settings of stage {stage.name} have changed since it ran; "
                f"repeat it with --redo {stage.name}, or undo the change"
            )
        check_average_is_there(stage, self.missed)
        write_json(record, inputs)
        for title, command in stage.commands.items():
            self.run_command(title, self._fill(command, checkpoint=checkpoint))
        if not step_folders(output):
            raise ValueError(
                f"stage {stage.name} wrote no checkpoint to {output}; make its commands write there"
            )
        newest = step_folders(output)[-1]
        if stage.evals:
            self.judge(stage, newest)
        return newest

    def judge(
        self,
        milestone: Milestone | PlanStage,
        checkpoint: Path,
        scheduled: ScheduledPhase | None = None,
    ) -> None:
        """Evaluate and judge a milestone or stage once; SystemExit(3) at a no-go."""
        if isinstance(milestone, Milestone):
            step: int | str = milestone.step
            where, folder = f"at step {step}", self.results / f"step_{step}"
        else:
            step = milestone.name
            where, folder = f"after {step}", self.results / milestone.name
        if not checkpoint.is_dir():
            raise ValueError(
                f"{checkpoint} is missing, but the plan judges it {where}; restore the folder, or "
                f"repeat with --redo {scheduled.run.phase if scheduled else step}"
            )
        path, checkpoint_id = folder / "decision.json", model_hash(checkpoint)
        done = read_object(path) or {}
        phase = scheduled.run.phase if scheduled else str(step)
        compared, references = self._references(milestone.gates)
        gates = thresholds(milestone.gates)
        current = done.get("of") == checkpoint_id and done.get("gates") == gates
        current = current and done.get("references", [None] * len(references)) == references
        current = current and self._are_current(milestone.evals, checkpoint_id, folder)
        if current and (done.get("outcome") != "no-go" or done.get("accepted")):
            self._remember(milestone.evals, folder, phase, where)
            self.progress.skip(len(milestone.evals))
            return
        for name in milestone.evals:
            self._evaluate(name, checkpoint, checkpoint_id, folder / f"{name}.json", where)
        metrics = self._remember(milestone.evals, folder, phase, where)
        verdicts, outcome = judge_all(milestone.gates, metrics, compared)
        # --accept applies only to a no-go that an earlier call reported.
        was_seen = current and done.get("outcome") == "no-go"
        steps = self.extended.get(scheduled.run.phase) if scheduled else None
        reason = self.accept or (f"{phase} extended by {steps} steps" if steps else None)
        accepted = reason if outcome == "no-go" and was_seen else None
        decision: dict[str, Any] = {"step": step, "outcome": outcome, "accepted": accepted}
        decision["gates"] = gates
        if any(gate.against for gate in milestone.gates):
            decision["references"] = references
        values = [verdict.value for verdict in verdicts]
        write_json(path, {**decision, "values": values, "of": checkpoint_id, "metrics": metrics})
        advice = [
            verdict.gate.advice
            for verdict in verdicts
            if verdict.outcome != "go" and verdict.gate.advice
        ]
        advice = list(dict.fromkeys(advice)) or (
            [milestone.advice] if milestone.advice and outcome != "go" else []
        )
        remark = f"; accepted: {accepted}" if accepted else ""
        text = f"{outcome} {where}: {'; '.join(map(str, verdicts))}{remark}"
        fields = {**decision, "values": values, "verdicts": [v.outcome for v in verdicts]}
        append_event(self.logs, "gate", text, **fields, advice="; ".join(advice))
        self.alerts.send(
            "gate",
            f"{self.scheduled_phases[0].run.run}: {outcome} {where}",
            "\n".join([text, *advice]),
        )
        self.alerts.flush()
        # A stage logs its training to a separate folder and W&B run.
        logs = self.logs if scheduled else self.logs / str(step)
        record_evaluation(logs, step_of(checkpoint), metrics, self.logs / "events.jsonl")
        for verdict in verdicts:
            print(f"    {verdict}{self._previous_value(verdict.gate)}")
        print(f"decision {where}: {outcome.upper()}{remark}", flush=True)
        for sentence in advice:
            print(f"the plan advises: {sentence}", flush=True)
        if outcome == "no-go" and not accepted:
            print('To continue, run it again with --accept "reason".', file=sys.stderr)
            raise SystemExit(NO_GO)
        self.accept = None if accepted else self.accept  # --accept accepts one decision

    def try_forecast(self, milestone: Milestone, checkpoint: Path, every: int) -> None:
        """Run forecast(); report a failure and continue, because training does not need it."""
        average = checkpoint.parent / f"average_{milestone.step}"
        where = f"at step {milestone.step}, average of {milestone.averages} checkpoints"
        number = self.progress.number
        try:
            self.forecast(milestone, checkpoint, average, every, where)
        except (ValueError, SystemExit) as error:
            if self.supervisor.stopped:
                raise
            why = f"exit status {error.code}" if isinstance(error, SystemExit) else error
            self.missed[average] = f"no forecast {where} ({why})"
            self.progress.number = number + 1 + len(milestone.evals)
            text = f"{self.missed[average]}; the plan continues without it"
            self.event("no_average", text, step=milestone.step)

    def forecast(
        self, milestone: Milestone, checkpoint: Path, average: Path, every: int, where: str
    ) -> None:
        """Evaluate the average of a milestone's last checkpoints, `every` steps apart, once.

        Its gates are only reported. Training continues from `checkpoint`, the milestone's own.
        ValueError if other checkpoints of a missing average were deleted.
        """
        step, phase, count = milestone.step, checkpoint.parent, milestone.averages or 0
        folder = self.results / f"step_{step}_average"
        compared, references = self._references(milestone.gates)
        inputs: dict[str, Any] = {
            "raw": model_hash(checkpoint),
            "averages": count,
            "commands": {name: self.plan.evals[name] for name in milestone.evals},
            "gates": thresholds(milestone.gates),
            "references": references,
        }
        path = folder / "decision.json"
        done = read_object(path) or {}
        current = all(done.get(key) == value for key, value in inputs.items())
        if current and self._are_current(milestone.evals, done["of"], folder):
            self.progress.skip(1 + len(milestone.evals))
            return
        recorded = recorded_last(average, phase, count, until=step, max_distance=every)
        if not recorded or difference(average, recorded) or find_damage(average):
            sources = last_checkpoints(phase, count, until=step, max_distance=every)
            if average.exists():
                why = difference(average, sources) or f"is damaged ({find_damage(average)})"
                self._set_aside(Renewal(average, f"{average} {why}"))
            command = f"python -m scripts.average_checkpoints --last {count} --until {step}"
            paths = ["--phase_folder", str(phase), "--output_dir", str(average)]
            title = f"Average of {', '.join(source.name for source in sources)}"
            self.run_command(title, [*command.split(), *paths])
        else:
            self.progress.skip()
        digest = model_hash(average)
        for name in milestone.evals:
            self._evaluate(name, average, digest, folder / f"{name}.json", where)
        metrics = read_metrics(milestone.evals, folder)
        verdicts, outcome = judge_all(milestone.gates, metrics, compared)
        values = [verdict.value for verdict in verdicts]
        decision = {"step": step, "outcome": outcome, **inputs, "values": values}
        text = f"forecast {where}: {outcome}; " + "; ".join(map(str, verdicts))
        logged = {key: value for key, value in decision.items() if key != "commands"}
        self.event("forecast", text, **logged)
        write_json(path, {**decision, "of": digest, "metrics": metrics})
        record_evaluation(self.logs, step, metrics, self.logs / "events.jsonl", "eval_average")

    def _evaluate(
        self, name: str, checkpoint: Path, checkpoint_id: str, output: Path, where: str
    ) -> None:
        """Run an evaluation, unless `output` has its complete and current results."""
        incomplete = (read_object(output) or {}).get("not_measured")
        if not incomplete and self._are_current((name,), checkpoint_id, output.parent):
            self.progress.skip()
            return
        template = self.plan.evals[name]
        command = self._fill(template, checkpoint=checkpoint, output=output)
        settings = evaluation_settings(template)
        self.run_command(f"Evaluation {name} {where}", command)
        content = read_object(output)
        if content is None:
            raise ValueError(
                f"the evaluation {name} wrote no results to {output}; "
                "make its command write to {output}"
            )
        key = {"of": checkpoint_id, "command": template, "settings": settings}
        write_json(output, {**content, **key})

    def _are_current(self, evals: tuple[str, ...], checkpoint_id: str, folder: Path) -> bool:
        """Return True if a folder has the results of evaluations of this checkpoint.

        Their commands and the configs that these name must not have changed since.
        """
        for name in evals:
            command, stored = self.plan.evals[name], read_object(folder / f"{name}.json") or {}
            if (stored.get("of"), stored.get("command")) != (checkpoint_id, command):
                return False
            settings = evaluation_settings(command)
            if stored.get("settings", settings) != settings:  # missing in older results
                return False
        return True

    def _references(
        self, gates: tuple[Gate, ...]
    ) -> tuple[list[Measured | None], list[float | None]]:
        """Return the earlier measurement that each gate compares with, and its value there."""
        compared = [reference_of(gate, self.measured) for gate in gates]
        values = [
            estimate(gate.metric, reference.metrics) if reference else None
            for gate, reference in zip(gates, compared, strict=True)
        ]
        return compared, [value.value if value else None for value in values]

    def _previous_value(self, gate: Gate) -> str:
        """Return "; before, WHERE: VALUE" if an absolute gate was measured earlier, else ""."""
        if gate.against:
            return ""
        earlier = [(m.where, estimate(gate.metric, m.metrics)) for m in self.measured[:-1]]
        texts = [f"; before, {where}: {value.value:.3f}" for where, value in earlier if value]
        return texts[-1] if texts else ""

    def _remember(self, names: tuple[str, ...], folder: Path, phase: str, where: str) -> dict:
        """Read the metrics of a milestone or stage and store them for later gates."""
        self.measured.append(Measured(phase, where, read_metrics(names, folder)))
        return self.measured[-1].metrics

    def _set_aside(self, renewal: Renewal) -> None:
        """Rename checkpoints and report it."""
        aside = set_aside(renewal)
        self.event(
            "set_aside",
            f"{renewal.why}; its old checkpoints are in {aside}; "
            "delete them if you do not need them",
        )

    def event(self, kind: str, text: str, **fields: object) -> None:
        """Log an event and print it."""
        append_event(self.logs, kind, text, **fields)
        print(text, flush=True)

    def _fill(self, command: str, **values: object) -> list[str]:
        """Split a plan's command into words and fill in {checkpoint}, {output} and {run}."""
        return [
            word.format(run=self.scheduled_phases[0].run.run, **values)
            for word in shlex.split(command)
        ]

    def _check_names(self, redo: frozenset[str], skip: frozenset[str]) -> None:
        stages = [stage.name for stage in self.plan.stages]
        phases = [scheduled.run.phase for scheduled in self.scheduled_phases]
        for flag, names, valid in (("--redo", redo, [*phases, *stages]), ("--skip", skip, stages)):
            if unknown := sorted(names - set(valid)):
                raise ValueError(f"{flag} {unknown[0]}: the plan has {', '.join(valid) or 'none'}")

    def branch(self, name: str, step: int, steps: int) -> None:
        """Decay the learning rate over `steps` steps from the checkpoint of `step`.

        The branch gets its own folders beside the run's.
        """
        phases = [s for s in self.scheduled_phases if (s.run.checkpoints / f"step_{step}").is_dir()]
        if not phases:
            raise ValueError(
                f"no phase has a checkpoint of step {step} to branch from; "
                "checkpoint.keep sets how many are kept"
            )
        run = phases[0].run
        warmup, end = run.schedule.warmup_steps, step + steps
        settings = [
            f"phase=branch_{name}",
            f"steps={steps}",
            f"start_step={step}",
            f"schedule.warmup_steps={warmup}",
            f"schedule.total_steps={end}",
            f"schedule.decay_steps={steps}",
            f"output_dir=checkpoints/{run.run}/branch_{name}",
            f"log_dir={self.logs}/branch_{name}",
        ]
        base = str(run.checkpoints / f"step_{step}")
        resume = ["--config", phases[0].phase.config, "--resume_from", base]
        self.progress.total, self.progress.seconds = 1, ()
        self.run_command(
            f"Branch {name}: the learning rate decays from step {step} to {end}",
            [*self.launch, *resume, *settings],
        )

    def run_command(self, title: str, command: list[str]) -> None:
        """Run one command; restart it if a rank dies, and exit with its status if it fails."""
        heading = self.progress.heading(title)
        print(f"\n{heading}\n    {subprocess.list2cmdline(command)}", flush=True)
        start = time.monotonic()
        ranks = self.plan.ranks if "scripts.launch" in command else 1
        environment = {"OMP_NUM_THREADS": str(max(1, cpus() // ranks)), **self.environment}
        words = [str(ROOT / word) if _entry_point(word) else word for word in command]
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        status = self.supervisor.run(program, environment)
        seconds = time.monotonic() - start
        self.progress.done(seconds)
        print(f"    {seconds:.0f} s", flush=True)
        if status:
            if self.supervisor.stopped:
                reason = "was interrupted. The same command continues from here."
            else:
                reason = (
                    f"stopped (exit status {status}). Fix the error above; "
                    "the same command then continues from here."
                )
            print(f"\nCommand {self.progress.number} {reason}", file=sys.stderr)
            raise SystemExit(status)


def _entry_point(word: str) -> bool:
    """Return True for a script of the project that the working folder lacks."""
    return word.endswith(".py") and not Path(word).exists() and (ROOT / word).is_file()
