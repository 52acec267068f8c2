"""scripts.pipeline: pauses, one decision per gate, no-go, --accept, --extend and branches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml
from conftest import ROOT, read_metrics
from sinks import FakeWandb

import train
from files import write_json
from scripts import pipeline
from training import run_folder
from training.fine_tuning import TuningRun
from training.logger import Log
from training.ops import supervisor
from training.planning import progress
from training.planning.gates import Gate, by_name, judge
from training.planning.plan import load_plan, scheduled_phases
from training.planning.renewal import renewals
from training.planning.stages import skipped_stages
from training.source_checks import check_rate

pytestmark = pytest.mark.one_layer

TUNING = "cp -r {checkpoint}/. checkpoints/tiny/tuned/step_1"
MEASURE = """
import json, os, sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
step = int(Path(sys.argv[1]).name[5:])
assert (Path(sys.argv[1]) / "model.safetensors").is_file()
Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
Path(sys.argv[2]).write_text(json.dumps(\
{"metrics": {"all": {"perplexity": float(os.environ.get(f"AT_{step}", 10))}}}))
print("measured", step)
"""


@pytest.fixture
def plan(settings, tmp_path) -> Path:
    """A plan of two four-step phases on one rank; a script scores steps 2, 4 and 8.

    The script reads the scores from the environment.
    """
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "measure.py").write_text(MEASURE)
    (tmp_path / "checkpoints" / "tiny" / "tuned").mkdir(parents=True)
    base = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
    for phase, more in (("one", []), ("two", ["rope_theta=20000", "allow_theta_jump=true"])):
        content = {**base, "run": "tiny"}
        for override in settings(
            "schedule={warmup_steps: 2, total_steps: 8, decay_steps: 2}",
            "data.micro_batch_size=8",
            *more,
            phase=phase,
            steps=4,
        ):
            *sections, last = (key := override.split("=", 1))[0].split(".")
            inner = content
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = yaml.safe_load(key[1])
        content["output_dir"], content["log_dir"] = f"checkpoints/tiny/{phase}", "logs/tiny"
        content["validation"]["every"] = 0
        (tmp_path / f"{phase}.yaml").write_text(yaml.safe_dump(content))
    gate = {"metric": "all.perplexity", "go": 12, "no_go": 20}
    marks = [
        {"step": 2, "gates": [gate], "advice": "wait"},
        {"step": 4, "gates": [gate], "advice": "--extend one=2"},
    ]
    content = {
        "name": "tiny",
        "ranks": 1,
        "before": {"Something first": "python -c print(41+1)"},
        "evals": {"perplexity": "python measure.py {checkpoint} {output}"},
        "phases": [
            {"config": "one.yaml", "milestones": marks},
            {"config": "two.yaml", "milestones": [{"step": 8, "gates": [gate]}]},
        ],
        "stages": [
            {
                "name": "tuned",
                "output_dir": "checkpoints/tiny/tuned",
                "commands": {
                    "Its folder": "mkdir -p checkpoints/tiny/tuned/step_1",
                    "Tuning": TUNING,
                },
                "evals": ["perplexity"],
                "gates": [gate],
                "advice": "tune again",
            }
        ],
        "after": {"Something last": "python -c \"print('last', '{checkpoint}')\""},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


class Forked:
    """Replaces Popen for scripts.launch on one rank: forks a process that has imported torch."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.output = Path("trained.txt").resolve()
        self.output.write_text("")
        arguments = (command[command.index("train.py") :], os.getcwd(), env, str(self.output))
        self.process = forked.forkserver().Process(target=train_there, args=arguments)
        self.process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        print(self.output.read_text(), end="")
        return self.process.exitcode


def train_there(arguments: list[str], place: str, environment: dict[str, str], output: str) -> None:
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = arguments
    os.chdir(place)
    if "SLOW" in environment:
        metrics = Log.metrics
        Log.metrics = lambda self, *more: (
            time.sleep(float(environment["SLOW"])),
            metrics(self, *more),
        )[1]
    if "KILL_AT" in environment:
        Log.metrics = killing(
            Log.metrics, int(environment["KILL_AT"]), environment.get("KILL_ONCE")
        )
    train.main()


def killing(metrics, at: int, once: str | None):
    """Replace Log.metrics: SIGKILL at a step, only once if a file `once` is given."""

    def recorded(self, values, *more):
        if values["step"] == at and not (once and Path(once).exists()):
            Path(once or "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics(self, values, *more)

    return recorded


@pytest.fixture
def run(plan, monkeypatch, capfd):
    """run(*flags, status=0, **figures): run the driver here, its training in forked processes."""
    monkeypatch.chdir(plan)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(command: list[str], env: dict[str, str]) -> Forked | subprocess.Popen:
        return (
            Forked(command, env)
            if "scripts.launch" in command
            else subprocess.Popen(command, env=env)
        )

    monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(Popen=start))

    def one(*more: str, status: int = 0, **figures: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["pipeline", "--plan", "plan.yaml", *more])
        for name, value in figures.items():
            monkeypatch.setenv(name, value)
        try:
            exit_status = pipeline.main() or 0
        except SystemExit as error:
            exit_status = error.code
        for name in figures:
            monkeypatch.delenv(name)
        done = subprocess.CompletedProcess(sys.argv, exit_status, *capfd.readouterr())
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return one


def losses(place: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(place / "logs" / "tiny")]


def events(place: Path, kind: str) -> list[dict]:
    rows = [
        json.loads(line)
        for line in (place / "logs" / "tiny" / "events.jsonl").read_text().splitlines()
    ]
    return [row for row in rows if row["event"] == kind]


def numbers_of(output: str) -> list[str]:
    return re.findall(r"^\[(\d+/\d+)\]", output, re.MULTILINE)


def test_the_time_left_follows_the_pace_of_this_machine(plan, monkeypatch):
    monkeypatch.chdir(plan)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    whole = replace(load_plan("plan.yaml"), seconds=(10.0, *[30.0] * 10))
    phases = scheduled_phases(whole)
    counted = progress.Progress(whole, phases)
    assert counted.heading("first") == "[1/11] first (0:00:00 elapsed, about 0:05:10 left)"
    now[0] += 20
    counted.done(20.0)  # half the expected speed
    assert counted.heading("second") == "[2/11] second (0:00:20 elapsed, about 0:10:00 left)"
    counted.skip(3)
    assert counted.heading("sixth") == "[6/11] sixth (0:00:20 elapsed, about 0:06:00 left)"
    plain = progress.Progress(replace(whole, seconds=()), phases)
    assert plain.heading("first") == "[1/11] first (0:00:00 elapsed)"
    with pytest.raises(ValueError, match=r"seconds has 2 values, but the plan has 11 commands"):
        progress.Progress(replace(whole, seconds=(1.0, 2.0)), phases)


def test_a_plan_pauses_decides_and_ends_as_if_it_had_not(plan, run):
    stopped = run(AT_4="15", AT_1="30", status=3).stdout
    assert (
        "decision after tuned: NO-GO" in stopped
        and "the plan advises: tune again" in stopped
        and "\nlast" not in stopped
    )
    output = stopped + run("--accept", "as it is").stdout
    assert "\n42\n" in output and "\nlast checkpoints/tiny/tuned/step_1\n" in output
    assert events(plan, "gate")[-1]["accepted"] == "as it is"
    assert [line for line in output.splitlines() if line.startswith("decision")] == [
        "decision at step 2: GO",
        "decision at step 4: CAUTION",
        "decision at step 8: GO",
        "decision after tuned: NO-GO",
        "decision after tuned: NO-GO; accepted: as it is",
    ]
    assert "the plan advises: --extend one=2" in output
    again = run().stdout  # nothing is trained, evaluated or decided twice
    assert "train.py" not in again and "measured" not in again and "decision" not in again
    assert numbers_of(stopped)[-1] == "10/11"  # the evaluation of the stage
    assert numbers_of(again) == ["1/11", "8/11", "9/11", "11/11"]  # what is done is counted
    paused = losses(plan)
    assert len(paused) == 8
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["phases"][0]["milestones"] = []
    for folder in ("checkpoints", "logs", "results"):
        (plan / folder).rename(plan / f"{folder}_before")
    (plan / "checkpoints" / "tiny" / "tuned").mkdir(parents=True)
    (plan / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run()
    assert losses(plan) == paused


def test_evaluations_and_gates_reach_the_wandb_runs_of_the_log_folders(plan, run, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder, id in (("logs/tiny", "phases"), ("logs/tiny/tuned", "stage")):
        names = {"id": id, "project": "p", "name": id, "group": "tiny", "owner": None}
        write_json(plan / folder / "wandb.json", names)  # as a training with log.wandb_project
    run(AT_1="15")
    assert [options["id"] for options in wandb.inits] == ["phases"] * 3 + ["stage"]
    assert wandb.series("eval/all/perplexity") == [(2, 10.0), (4, 10.0), (8, 10.0), (1, 15.0)]
    tables = wandb.series("gates/decisions")
    assert [len(table.data) for _, table in tables] == [1, 2, 3, 4]
    where, metric, value, go, no_go, _, verdict, decision = tables[-1][1].data[-1]
    assert (where, metric, value, go, no_go) == ("after tuned", "all.perplexity", 15.0, 12, 20)
    assert verdict == decision == "caution"
    run()  # nothing is decided again
    assert len(wandb.inits) == 4 and wandb.ended == [0] * 4


def test_a_no_go_stops_until_it_is_accepted_with_a_reason(plan, run):
    command = "python measure.py {checkpoint} {output} --suite mine"
    (plan / "configs" / "evals").mkdir(parents=True)
    suite = plan / "configs" / "evals" / "mine.yaml"
    suite.write_text("evals: {x: --max_new_tokens 8, own.yaml: ''}")
    (plan / "own.yaml").write_text("choices: {1: a}")
    edit_plan(plan, evals={"perplexity": command})
    done = run(status=3, AT_4="30")
    assert (
        "decision at step 4: NO-GO" in done.stdout
        and "the plan advises: --extend one=2" in done.stdout
    )
    assert '--accept "reason"' in done.stderr and len(losses(plan)) == 4
    # The same checkpoint is not evaluated again.
    assert run(status=3, AT_4="30").stdout.count("measured") == 0
    # A changed suite, or a changed evaluation that it lists, measures every milestone again.
    suite.write_text("evals: {x: --max_new_tokens 64, own.yaml: ''}")
    done = run(status=3, AT_4="30")
    assert re.findall(r"^measured (\d)", done.stdout, re.MULTILINE) == ["2", "4"]
    (plan / "own.yaml").write_text("choices: {1: b}")
    done = run(status=3, AT_2="21", AT_4="30")
    assert "decision at step 2: NO-GO" in done.stdout and "decision at step 4" not in done.stdout
    edit_plan(plan, evals={"perplexity": f"{command} more"})
    done = run(status=3, AT_4="30")
    assert re.findall(r"^decision at step (\d)", done.stdout, re.MULTILINE) == ["2", "4"]
    output = run("--accept", "the text reads well").stdout
    assert (
        "decision at step 4: NO-GO; accepted: the text reads well" in output
        and len(losses(plan)) == 8
    )
    accepted = [event["accepted"] for event in events(plan, "gate") if event["step"] == 4]
    assert accepted == [None] * 4 + ["the text reads well"]
    decision = json.loads((plan / "results" / "tiny" / "step_4" / "decision.json").read_text())
    assert decision["outcome"] == "no-go" and decision["values"] == [30.0]


def test_what_was_not_measured_is_no_pass(plan, run):
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["phases"][0]["milestones"][0]["gates"].append(
        {"metric": "hellaswag.accuracy", "go": 0.4, "no_go": 0.3}
    )
    (plan / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert "hellaswag.accuracy = not measured" in run(status=3).stdout


def test_a_milestone_without_its_checkpoint_is_named(plan, run):
    run()
    shutil.rmtree(plan / "checkpoints" / "tiny" / "one" / "step_2")
    message = run(status=2).stderr
    assert "step_2 is missing, but the plan judges it at step 2" in message
    assert message.strip().endswith("--redo one")


def test_a_stage_is_judged_against_an_earlier_one(plan, run):
    stages = yaml.safe_load((plan / "plan.yaml").read_text(encoding="utf-8"))["stages"]
    gate = {"metric": "all.perplexity", "go": 1, "no_go": 5, "against": "before"}
    edit_plan(plan, stages=[{**stages[0], "gates": [gate]}])
    output = run(AT_8="12", AT_1="18", status=3).stdout
    assert (
        "all.perplexity = 18.000, +6.000 against 12.000 at step 8 "
        "(go <= +1.0, no-go beyond +5.0): no-go" in output
    )
    decision = json.loads(
        (plan / "results" / "tiny" / "tuned" / "decision.json").read_text(encoding="utf-8")
    )
    assert decision["references"] == [12.0] and decision["values"] == [18.0]
    assert "accepted: as it is" in run("--accept", "as it is").stdout
    assert "decision" not in run().stdout
    edit_plan(plan, stages=[{**stages[0], "gates": [{**gate, "against": "one"}]}])
    assert "+8.000 against 10.000 at step 4" in run(status=3).stdout
    edit_plan(plan, stages=[{**stages[0], "gates": [{**gate, "against": "tuned"}]}])
    assert "available: before, one, two" in run(status=2).stderr


def test_two_tasks_may_name_a_metric_the_same():
    task = {"acc_norm": {"value": 0.5, "stderr": 0.1}, "acc": {"value": 0.3, "stderr": 0.1}}
    suite = {"arc": {"acc_norm": {"value": 0.2, "stderr": None}}, "wikipedia": {"perplexity": 12.0}}
    metrics = (
        by_name("hellaswag", task) | by_name("suite", suite) | by_name("plain", {"rate": 0.25})
    )
    expected = {
        "hellaswag.acc_norm": 0.5,
        "arc.acc_norm": 0.2,
        "wikipedia.perplexity": 12.0,
        "plain.rate": 0.25,
        "arc": None,
    }
    assert {name: judge(Gate(name, 1, 0), metrics).value for name in expected} == expected


def test_a_phase_is_extended_after_a_no_go_and_the_rest_moves(plan, run):
    run(status=3, AT_4="30")
    first = losses(plan)
    output = run("--extend", "one=2", AT_6="9").stdout
    assert (
        "steps 4 to 6" not in output
        and "steps 0 to 6 of 6" in output
        and "decision at step 10: GO" in output
    )
    assert losses(plan)[:4] == first and len(losses(plan)) == 10
    assert (plan / "checkpoints" / "tiny" / "two" / "step_10").is_dir() and len(
        events(plan, "extend")
    ) == 1
    assert "train.py" not in run().stdout  # the extension is remembered
    output = run("--extend", "one=3").stdout
    assert "two follows one and is repeated; its old checkpoints" in output
    assert len(losses(plan)) == 11 and (plan / "checkpoints/tiny/two.old1/step_10").is_dir()


def test_a_reason_is_for_a_no_go_that_was_seen(plan, run):
    run("--accept", "whatever comes", status=3, AT_2="30")
    run("--accept", "it was read", status=3, AT_2="30", AT_4="30")
    assert [gate["accepted"] for gate in events(plan, "gate")] == [None, "it was read", None]
    run("--extend", "two=2", status=3, AT_4="30")  # accepts no-go decisions of its own phase only
    run("--extend", "one=2", status=3, AT_6="30")  # the gate of the longer phase is decided again
    again = run("--extend", "one=2", status=2).stderr  # adds no step, so it accepts nothing
    assert (
        "one is extended by 2 steps already" in again and "make it 4 with --extend one=4" in again
    )
    assert "must be PHASE=STEPS, with at least 1 step" in run("--extend", "one=-2", status=2).stderr
    run("--accept", "enough")
    assert "--accept was not used" in run("--accept", "again").stdout


def test_a_branch_decays_beside_the_run(plan, run):
    run(status=3, AT_4="30")
    output = run("--branch", "early", "--at", "4", "--steps", "2").stdout
    assert "begins at step 4, after one" in output
    rows = read_metrics(plan / "logs" / "tiny" / "branch_early")
    assert (
        [row["step"] for row in rows] == [5, 6]
        and rows[-1]["lr"] < rows[0]["lr"]
        and len(losses(plan)) == 4
    )
    message = run("--branch", "x", "--at", "99", "--steps", "2", status=2).stderr
    assert "no phase has a checkpoint of step 99 to branch from" in message


def test_mistakes(plan, run):
    assert "--extend one must be PHASE=STEPS" in run("--extend", "one", status=2).stderr
    assert "unknown phase three" in run("--extend", "three=2", status=2).stderr
    assert "--branch needs --at STEP and --steps N" in run("--branch", "x", status=2).stderr
    message = run("--branch", "x", "--at", "2", "--steps", "2", "--redo", "one", status=2).stderr
    assert "--branch cannot be combined with --extend or --redo" in message
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["before"] = {"Broken": "python -c exit(1)"}
    (plan / "plan.yaml").write_text(yaml.safe_dump(content))
    assert "Command 1 stopped (exit status 1)" in run(status=1).stderr


def test_a_damaged_or_foreign_decision_is_made_again(plan, run):
    run(AT_4="11")
    path = plan / "results" / "tiny" / "step_4" / "decision.json"
    path.write_text("")  # as a full disk leaves it
    assert "decision at step 4: GO" in run().stdout
    path.write_text(json.dumps({**json.loads(path.read_text()), "of": "another checkpoint"}))
    output = run().stdout
    assert "decision at step 4: GO" in output and "measured" not in output


def edit_phase(plan: Path, phase: str, **changes) -> None:
    content = yaml.safe_load((plan / f"{phase}.yaml").read_text())
    (plan / f"{phase}.yaml").write_text(yaml.safe_dump({**content, **changes}))


def edit_plan(plan: Path, **changes) -> None:
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    (plan / "plan.yaml").write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))


def test_extending_a_phase_that_decayed_repeats_its_decay_without_a_rise(plan, run):
    """The last phase, steps 4 to 8, decays over 6 to 8.

    Extended by 4 steps, it decays over 6 to 12, from the checkpoint before the decay.
    """
    run()
    tuned = plan / "checkpoints" / "tiny" / "tuned" / "step_1" / "manifest.json"
    before = tuned.read_bytes()
    output = run("--extend", "two=4").stdout
    assert "the decay is repeated" in output and "decision at step 12: GO" in output
    rows = read_metrics(plan / "logs" / "tiny")
    rates = [row["lr"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 13))
    peak = max(rates)
    assert rates[1:6] == [peak] * 5 and rates[-1] == 0.0
    falls = [a - b for a, b in pairwise(rates[5:])]
    # One straight line over the border: no step increases.
    assert falls == pytest.approx([peak / 6] * 6)
    redone = [
        json.loads(line)
        for line in (plan / "logs" / "tiny" / "metrics_redone.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in redone] == [7, 8]  # no result is lost
    assert (plan / "checkpoints" / "tiny" / "two.old1" / "step_8" / "model.safetensors").is_file()
    assert "tuned did not start from" in output and tuned.read_bytes() != before
    assert "train.py" not in run().stdout
    plot = [sys.executable, "-m", "scripts.plot_run", "logs/tiny"]
    assert forked.run(plot, cwd=plan).returncode == 0
    assert (plan / "logs" / "tiny" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_extension_repeats_a_decay_that_began_in_an_earlier_phase(plan, run):
    """The decay begins at step 3 of the first phase; only milestones are kept before its end."""
    for phase in ("one", "two"):
        edit_phase(
            plan,
            phase,
            schedule={"warmup_steps": 1, "total_steps": 8, "decay_steps": 5},
            checkpoint={"every": 1, "keep": 1, "keep_best": False},
        )
    run()
    checkpoints, logs = plan / "checkpoints" / "tiny", plan / "logs" / "tiny"
    output = run("--extend", "two=4").stdout
    assert "one/step_4 decayed for a shorter schedule; the decay is repeated; its" in output
    assert [path.name for path in (checkpoints / "one.old1").glob("step_*")] == ["step_4"]
    assert (checkpoints / "two.old1" / "step_8").is_dir()
    rates = [row["lr"] for row in read_metrics(logs)]
    falls = [a - b for a, b in pairwise(rates[2:])]
    assert falls == pytest.approx([rates[0] / 9] * 9) and rates[-1] == 0.0 and len(rates) == 12
    assert "train.py" not in run().stdout

    shutil.rmtree(checkpoints / "one" / "step_3")  # as by an older version
    phases = scheduled_phases(load_plan("plan.yaml"), {"two": 6})
    later, renewal = renewals(phases, 0, {"two": 6}, ())
    assert later.why == "two follows one and is repeated"
    assert [path.name for path in renewal.steps] == ["step_4"]
    assert "from step 2, with 1 step before it, because no checkpoint of step 3" in renewal.why
    shutil.rmtree(checkpoints / "one" / "step_2")
    before = sorted(plan.rglob("*.json"))
    message = run("--extend", "two=6", status=2).stderr
    assert "would start one again from step 0, because no checkpoint" in message
    assert message.strip().endswith("add --redo one to accept that")
    assert sorted(plan.rglob("*.json")) == before  # a refused extension changes nothing
    assert json.loads((logs / "extensions.json").read_text()) == {"two": 4}
    identity = json.loads((logs / "run.json").read_text())["id"]
    output = run("--extend", "two=6", "--redo", "one").stdout
    assert "one is repeated (--redo)" in output and "two follows one and is repeated" in output
    assert [row["step"] for row in read_metrics(logs)] == list(range(1, 15))
    assert json.loads((logs / "run.json").read_text())["id"] == identity
    assert not list(logs.glob("metrics_until_*")) and "train.py" not in run().stdout


def test_a_rate_that_would_rise_again_is_refused(plan, run, settings, capfd, monkeypatch):
    run()
    command = ["train.py", "--config", "two.yaml", "--resume_from", "checkpoints/tiny/one"]
    monkeypatch.setattr(sys, "argv", [*command, "steps=8", "schedule.total_steps=12"])
    with pytest.raises(SystemExit) as end:
        train.main()
    message = capfd.readouterr().err
    assert (
        end.value.code == 2
        and "the learning rate would rise from 0.0e+00 to 3.0e-03 at step 8" in message
    )
    monkeypatch.setattr(
        sys, "argv", [*command, "steps=8", "schedule.total_steps=12", "schedule.allow_rise=true"]
    )
    with pytest.raises(SystemExit) as end:
        train.main()
    assert not end.value.code and len(losses(plan)) == 12
    trainer = plan / "checkpoints" / "tiny" / "two" / "step_8" / "state" / "trainer.json"
    with pytest.raises(ValueError, match="choose another output_dir and start again, or set"):
        check_rate(TuningRun(steps=20).with_schedule(), json.loads(trainer.read_text()))


def test_a_stage_is_made_again_for_another_base_or_when_asked(plan, run, monkeypatch):
    edit_plan(plan, next=["chat {checkpoint}"])
    assert run().stdout.endswith("Next:\n    chat checkpoints/tiny/tuned\n")
    assert (
        "Tuning" in run("--redo", "tuned").stdout
        and (plan / "checkpoints/tiny/tuned.old1/step_1").is_dir()
    )
    assert "--redo three: the plan has one, two, tuned" in run("--redo", "three", status=2).stderr
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.1)
    with run_folder.locked(plan / "checkpoints/tiny/two"):
        assert "tiny/two is in use by process" in run("--redo", "two", status=2).stderr
    output = run("--redo", "two").stdout
    assert (
        "two is repeated (--redo)" in output
        and (plan / "checkpoints/tiny/two.old1/step_8").is_dir()
    )
    # The output has the same bits, so later stages are current.
    assert "tuned did not start from" not in output
    before = yaml.safe_load((plan / "plan.yaml").read_text())["stages"]
    stages = [{**before[0], "commands": {"Tuning": TUNING}}, *before[1:]]
    edit_plan(plan, stages=stages)
    assert "the settings of stage tuned have changed" in run(status=2).stderr
    output = run("--skip", "tuned").stdout  # its checkpoints exist
    assert "stage tuned is skipped" in output and "\nlast checkpoints/tiny/two/step_8\n" in output
    assert output.endswith("Next:\n    chat checkpoints/tiny/two\n")
    assert skipped_stages(plan / "logs/tiny") == {"tuned"}
    assert "--skip one: the plan has tuned" in run("--skip", "one", status=2).stderr
    run(status=2)
    assert skipped_stages(plan / "logs/tiny") == {"tuned"}
    edit_plan(plan, stages=before)
    assert "stage tuned is used again" in run().stdout
    assert skipped_stages(plan / "logs/tiny") == set()

    # A finished phase does not ignore a changed config.
    data = yaml.safe_load((plan / "two.yaml").read_text())["data"]
    mix, store = {"first": 1.0}, f"{data['store']}/."
    edit_phase(plan, "two", data={**data, "micro_batch_size": 4, "store": store})
    assert "train.py" not in run("--skip", "tuned").stdout
    edit_phase(plan, "two", seed=77, data={**data, "mix": mix})
    message = run("--skip", "tuned", status=2).stderr
    assert (
        "two was trained with another seed and data.mix than two.yaml has now; repeat it with "
        "--redo two, or undo the change" in message
    )
    edit_phase(plan, "two", seed=1337, data=data)
    for phase in ("one", "two"):
        edit_phase(plan, phase, optim={"lr": 0.002})
    assert "one was trained with another optim.lr than" in run(status=2).stderr

    # The extension of a changing rope theta changes it at every step.
    edit_phase(plan, "two", rope_theta=[10000, 20000])
    phases = scheduled_phases(load_plan("plan.yaml"), {"two": 2})
    (renewal,) = renewals(phases, 1, {"two": 2}, ())
    assert not renewal.steps and "the phase is repeated from step 4" in renewal.why


def test_a_rank_that_dies_is_restarted_and_one_that_dies_at_the_same_step_twice_is_not(plan, run):
    output = run(KILL_AT="7", KILL_ONCE="once").stdout
    assert (
        "the launcher was killed (SIGKILL), often for lack of memory, at step 6 (status -9); "
        "restart 1 of 3 from the newest checkpoint" in output
    )
    assert len(losses(plan)) == 8 and events(plan, "restarted")[0]["step"] == 6
    for folder in ("checkpoints", "logs", "results"):
        (plan / folder).rename(plan / f"{folder}_before")
    (plan / "checkpoints" / "tiny" / "tuned").mkdir(parents=True)
    done = run(KILL_AT="7", status=137)
    assert "at step 6 again; the same step failed twice, so it is not restarted" in done.stdout
    assert [event["step"] for event in events(plan, "gave_up")] == [6]
    (plan / "killed").unlink()
    edit_plan(plan, restarts=0)
    assert "it was restarted 0 times already" in run(KILL_AT="7", status=137).stdout


# Each start logs the next step of the argument and, unless it is the last, dies of SIGKILL.
DYING = """
import json, os, pathlib, signal, sys
logs = pathlib.Path("logs/tiny/sft")
logs.mkdir(parents=True, exist_ok=True)
steps = sys.argv[1].split(",")
number = len((logs / "starts").read_text()) if (logs / "starts").exists() else 0
(logs / "starts").write_text("x" * (number + 1))
with open(logs / "metrics.jsonl", "a") as file:
    print(json.dumps({"step": int(steps[number])}), file=file)
if number + 1 < len(steps):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("script", "steps", "expected"),
    [
        ("train_sft.py", "3,5,9", [("restarted", 3), ("restarted", 5)]),
        ("train_dpo.py", "3,3,9", [("restarted", 3), ("gave_up", 3)]),
        ("train_gpt.py", "3,9", [("restarted", 3)]),
        ("measure.py", "3,9", []),
    ],
)
def test_a_training_that_needs_no_launcher_is_restarted_too(
    script, steps, expected, tmp_path, monkeypatch
):
    """The step is that of the stage's log, not that of pretraining's."""
    monkeypatch.chdir(tmp_path)
    Path("logs/tiny").mkdir(parents=True)
    Path("logs/tiny/metrics.jsonl").write_text('{"step": 800}\n')
    Path(script).write_text(DYING)
    told = []
    driver = supervisor.Supervisor(
        Path("logs/tiny"), 3, lambda kind, text, step, **_: told.append((kind, step, text))
    )
    status = driver.run([sys.executable, script, steps], os.environ)
    assert [event[:2] for event in told] == expected
    assert status == (0 if expected and expected[-1][0] == "restarted" else 137)
    assert all("the process was killed (SIGKILL), often for" in text for *_, text in told)


def test_a_closed_terminal_stops_the_stage_which_saves(plan, run, monkeypatch):
    def close() -> None:
        path = plan / "logs" / "tiny" / "metrics.jsonl"
        while not (path.is_file() and path.stat().st_size):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=close)
    thread.start()
    done = run(status=129, SLOW="0.15")
    thread.join()
    assert "was interrupted. The same command continues from here." in done.stderr
    saved = [
        json.loads(line)["step"]
        for line in (plan / "logs/tiny/metrics.jsonl").read_text().splitlines()
    ]
    assert (plan / "checkpoints" / "tiny" / "one" / f"step_{saved[-1]}").is_dir() and saved[-1] < 8
    run()
    assert len(losses(plan)) == 8


def test_two_drivers_do_not_carry_out_one_plan(plan, run, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.2)
    (plan / "logs" / "tiny").mkdir(parents=True)
    with run_folder.locked(plan / "logs" / "tiny" / "plan"):
        message = run(status=2).stderr
    assert f"logs/tiny/plan is in use by process {os.getpid()} on " in message
