"""The plan's driver: pauses, decides once, stops on a no-go, goes on when told why, extends and branches."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, read_metrics

import train
from scripts import pipeline
from training.gates import Gate, by_name, judge

MEASURE = """
import json, os, sys
from pathlib import Path
step = int(Path(sys.argv[1]).name[5:])
assert (Path(sys.argv[1]) / "model.safetensors").is_file()
Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
Path(sys.argv[2]).write_text(json.dumps({"metrics": {"all": {"perplexity": float(os.environ.get(f"AT_{step}", 10))}}}))
print("measured", step)
"""


@pytest.fixture
def plan(settings, tmp_path) -> Path:
    """A plan of two phases of four steps on one rank, judged at steps 2, 4 and 8 by a script that reads the environment."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "measure.py").write_text(MEASURE)
    (tmp_path / "checkpoints" / "tiny" / "tuned").mkdir(parents=True)
    base = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
    for phase, more in (("one", []), ("two", ["model.rope_theta=20000"])):
        content = {**base, "run": "tiny"}
        for override in settings("schedule={warmup_steps: 2, total_steps: 8, decay_steps: 2}", *more, phase=phase, steps=4):
            *sections, last = (key := override.split("=", 1))[0].split(".")
            inner = content
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = yaml.safe_load(key[1])
        content["output_dir"], content["log_dir"] = f"checkpoints/tiny/{phase}", "logs/tiny"
        content["validation"]["every"] = 0
        (tmp_path / f"{phase}.yaml").write_text(yaml.safe_dump(content))
    gate = {"metric": "all.perplexity", "go": 12, "no_go": 20}
    marks = [{"at": 2, "gates": [gate], "advice": "wait"}, {"at": 4, "gates": [gate], "advice": "--extend one=2"}]
    content = {
        "name": "tiny",
        "ranks": 1,
        "before": {"Something first": "python -c print(41+1)"},
        "evals": {"perplexity": "python measure.py {checkpoint} {output}"},
        "phases": [
            {"config": "one.yaml", "milestones": marks},
            {"config": "two.yaml", "milestones": [{"at": 8, "gates": [gate]}]},
        ],
        "stages": [
            {
                "name": "tuned",
                "leaves": "checkpoints/tiny/tuned",
                "commands": {"Tuning": "cp -r {checkpoint}/. checkpoints/tiny/tuned/step_1"},
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
    """A command of scripts.launch on one rank, in a process forked from one that has imported torch; stands for Popen."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.output = Path("trained.txt").resolve()
        self.output.write_text("")
        arguments = (command[command.index("train.py") :], os.getcwd(), env, str(self.output))
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=train_there, args=arguments)
        self.process.start()

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
    train.main()


@pytest.fixture
def run(plan, monkeypatch, capfd):
    """run(*flags, status=0, **figures): the driver in this process, its training in forked ones."""
    monkeypatch.chdir(plan)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["test_pipeline", "torch._dynamo", "torch.distributed.checkpoint"])
    popen = subprocess.Popen
    start = lambda command, env: Forked(command, env) if "scripts.launch" in command else popen(command, env=env)  # noqa: E731
    monkeypatch.setattr(pipeline.subprocess, "Popen", start)

    def one(*more: str, status: int = 0, **figures: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["pipeline", "--plan", "plan.yaml", *more])
        for name, value in figures.items():
            monkeypatch.setenv(name, value)
        try:
            found = pipeline.main() or 0
        except SystemExit as error:
            found = error.code
        for name in figures:
            monkeypatch.delenv(name)
        done = subprocess.CompletedProcess(sys.argv, found, *capfd.readouterr())
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return one


def losses(place: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(place / "logs" / "tiny")]


def events(place: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (place / "logs" / "tiny" / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def test_a_plan_pauses_decides_and_ends_as_if_it_had_not(plan, run):
    stopped = run(AT_4="15", AT_1="30", status=3).stdout
    assert "decision after tuned: NO-GO" in stopped and "the plan advises: tune again" in stopped and "\nlast" not in stopped
    output = stopped + run("--accept", "as it is").stdout
    assert "\n42\n" in output and "\nlast checkpoints/tiny/tuned/step_1\n" in output
    assert events(plan, "gate")[-1]["accepted"] == "as it is"
    assert [line for line in output.splitlines() if line.startswith("decision")] == [
        "decision at step 2: GO",
        "decision at step 4: CAUTION",
        "decision at step 8: GO",
        "decision after tuned: NO-GO",
        "decision after tuned: NO-GO, accepted: as it is",
    ]
    assert "the plan advises: --extend one=2" in output
    again = run().stdout  # nothing is trained, measured or decided twice
    assert "train.py" not in again and "measured" not in again and "decision" not in again
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


def test_a_no_go_stops_until_it_is_accepted_with_a_reason(plan, run):
    done = run(status=3, AT_4="30")
    assert "decision at step 4: NO-GO" in done.stdout and "the plan advises: --extend one=2" in done.stdout
    assert 'give --accept "reason"' in done.stderr and len(losses(plan)) == 4
    assert run(status=3, AT_4="30").stdout.count("measured") == 0  # the same checkpoint is not measured again
    output = run("--accept", "the text reads well").stdout
    assert "decision at step 4: NO-GO, accepted: the text reads well" in output and len(losses(plan)) == 8
    assert [event["accepted"] for event in events(plan, "gate") if event["step"] == 4] == [None, None, "the text reads well"]
    decision = json.loads((plan / "results" / "tiny" / "step_4" / "decision.json").read_text())
    assert decision["outcome"] == "no-go" and decision["values"] == [30.0]


def test_what_was_not_measured_is_no_pass(plan, run):
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["phases"][0]["milestones"][0]["gates"].append({"metric": "hellaswag.accuracy", "go": 0.4, "no_go": 0.3})
    (plan / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert "hellaswag.accuracy = not measured" in run(status=3).stdout


def test_two_tasks_may_name_a_metric_the_same():
    task = {"acc_norm": {"value": 0.5, "stderr": 0.1}, "acc": {"value": 0.3, "stderr": 0.1}}
    suite = {"arc": {"acc_norm": {"value": 0.2, "stderr": None}}, "wikipedia": {"perplexity": 12.0}}
    metrics = by_name("hellaswag", task) | by_name("suite", suite) | by_name("plain", {"rate": 0.25})
    wanted = {"hellaswag.acc_norm": 0.5, "arc.acc_norm": 0.2, "wikipedia.perplexity": 12.0, "plain.rate": 0.25, "arc": None}
    assert {name: judge(Gate(name, 1, 0), metrics).value for name in wanted} == wanted


def test_a_phase_is_extended_after_a_no_go_and_the_rest_moves(plan, run):
    run(status=3, AT_4="30")
    first = losses(plan)
    output = run("--extend", "one=2", AT_6="9").stdout
    assert "steps 4 to 6" not in output and "steps 0 to 6 of 6" in output and "decision at step 10: GO" in output
    assert losses(plan)[:4] == first and len(losses(plan)) == 10
    assert (plan / "checkpoints" / "tiny" / "two" / "step_10").is_dir() and len(events(plan, "extend")) == 1
    assert "train.py" not in run().stdout  # the extension is remembered


def test_a_branch_decays_beside_the_run(plan, run):
    run(status=3, AT_4="30")
    output = run("--branch", "early", "--at", "4", "--steps", "2").stdout
    assert "begins at step 4, after one" in output
    rows = read_metrics(plan / "logs" / "tiny" / "branch_early")
    assert [row["step"] for row in rows] == [5, 6] and rows[-1]["lr"] < rows[0]["lr"] and len(losses(plan)) == 4
    said = run("--branch", "x", "--at", "99", "--steps", "2", status=2).stderr
    assert "there is no checkpoint of step 99 to branch from" in said


def test_mistakes(plan, run):
    assert "--extend one must be PHASE=STEPS" in run("--extend", "one", status=2).stderr
    assert "three is no phase of the plan" in run("--extend", "three=2", status=2).stderr
    assert "--branch needs --at STEP and --steps N" in run("--branch", "x", status=2).stderr
    content = yaml.safe_load((plan / "plan.yaml").read_text())
    content["before"] = {"Broken": "python -c exit(1)"}
    (plan / "plan.yaml").write_text(yaml.safe_dump(content))
    assert "Stage 1 stopped (exit status 1)" in run(status=1).stderr
