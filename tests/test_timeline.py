"""Run docs/timeline.md to its end in miniature: its commands with small sizes, and its failures.

Days 1 to 25 run by hand, in the table's order, from an empty folder. The plan begins phase 1, loses
a rank and its terminal; after the gate of day 21 it meets a no-go and follows the advice, and it
ends the four weeks. miniature.py simulates the hub, and torchrun in every launch but the one whose
rank is killed (test_launchers.py and test_nodes.py test the launcher).
"""

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml
from conftest import ROOT, read_metrics
from miniature import Command, build, small, table_commands

from scripts import pipeline
from training.ops import supervisor

RUN, LOGS, RESULTS = "nanollama_1b", Path("logs/nanollama_1b"), Path("results/nanollama_1b")
DOCUMENT = (ROOT / "docs" / "timeline.md").read_text()
BY_HAND = [small(command) for command in table_commands(DOCUMENT)]
PLAN = "python -m scripts.pipeline --plan configs/plan_1b.yaml"
WAIT = 300  # seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a 1B plan; its gate after pretraining is a no-go at this size."""
    folder, before = tmp_path_factory.mktemp("timeline"), os.getcwd()
    build(folder)
    path = folder / "configs" / "plan_1b.yaml"
    plan = yaml.safe_load(path.read_text())
    (gate,) = (
        gate
        for gate in plan["phases"][3]["milestones"][0]["gates"]
        if gate["metric"] == "all.perplexity"
    )
    gate |= {"go": 1.0, "no_go": 1.1}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    os.chdir(folder)
    yield folder
    os.chdir(before)


def give(command: str, status: int = 0) -> str:
    """Run a command of the document; return its output."""
    process = Command(shlex.split(command), dict(os.environ))
    exit_status, output = process.wait(), process.output.read_text()
    assert exit_status == status and "Traceback" not in output, output
    return output


@pytest.fixture
def drive(monkeypatch, capfd):
    """drive(command, status): run the driver here, its commands in forked processes."""

    def one(command: str, status: int = 0, first_launch=None) -> str:
        launches = [first_launch] if first_launch else []

        def popen(words, env):
            trains = any(word.endswith("train.py") for word in words)
            return launches.pop()(words, env) if launches and trains else Command(words, env)

        monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(Popen=popen))
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "scripts.pipeline"]
        monkeypatch.setattr(sys, "argv", words[2:])
        try:
            ended = pipeline.main() or 0
        except SystemExit as error:
            ended = error.code
        output = "".join(capfd.readouterr())
        assert ended == status and "Traceback" not in output, output[-6000:]
        return output

    return one


def when(condition, act) -> threading.Thread:
    """Call a function in a thread as soon as a condition holds."""

    def wait() -> None:
        end = time.monotonic() + WAIT
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def step() -> int:
    path = LOGS / "metrics.jsonl"
    return supervisor.last_step(path) or 0 if path.is_file() and path.stat().st_size else 0


def events(kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (LOGS / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def checkpoints() -> dict[str, str]:
    """Return every checkpoint's manifest, which contains the checksums of its files."""
    return {
        str(path): path.read_text()
        for path in sorted(Path("checkpoints", RUN).rglob("manifest.json"))
    }


def lock_holder() -> int:
    """Return the process of rank 0."""
    return int(Path("checkpoints", RUN, "phase1_pretrain", "run.lock").read_text().split()[1])


def test_day_1(place):
    commands = BY_HAND[: next(i for i, command in enumerate(BY_HAND) if "download_data" in command)]
    assert commands[0] == "make setup" and re.search(r"^setup:", Path("Makefile").read_text(), re.M)
    output = give(commands[1])
    # A plan of this size needs no GPU.
    assert "ready for: quickstart yes" in output and "alert: slack" in output
    output = give(commands[2])
    assert output.count("test mode: ok") == 4 and "FAILED" not in output
    assert "is not empty; use another --output_dir for test mode" in give(
        f"{commands[2]} --output_dir configs", status=2
    )
    for command in commands[3:]:  # test_fsdp, verify_model
        output = give(command)
        assert "ok" in output and "FAILED" not in output


def days(first: str, last: str) -> list[str]:
    """Return the table's commands from the first with these words up to the one before the last."""
    begin, end = (next(i for i, c in enumerate(BY_HAND) if words in c) for words in (first, last))
    assert begin < end
    return BY_HAND[begin:end]


def test_four_weeks_by_hand_and_by_the_plan(place, drive):
    for command in days("download_data", "phase1_pretrain.yaml"):
        give(command)

    def real(words, env):
        """Start scripts.launch, whose parent is not the driver; kill its rank 0 at step 20."""
        environment = {**env, "OMP_NUM_THREADS": "1"}
        del environment[supervisor.DRIVER]
        launched = forked.Process(words, Path.cwd(), environment)
        when(lambda: step() >= 20, lambda: os.kill(lock_holder(), signal.SIGKILL))
        return launched

    closing = when(lambda: step() >= 60, lambda: os.kill(os.getpid(), signal.SIGHUP))
    output = drive(PLAN, status=129, first_launch=real)
    closing.join()
    assert "was interrupted. The same command continues from here." in output
    assert output.count("already there") == 6  # sources
    assert len(events("restarted")) == 1 and "SIGKILL" in events("restarted")[0]["text"]
    assert events("stopped")[-1]["step"] == step() < 100

    by_hand = days("phase1_pretrain.yaml", "generate_chat_data")
    assert sum("--gates" in command for command in by_hand) == 5
    for command in by_hand[:-1]:
        give(command)
    assert step() == 230 and "decision: NO-GO" in give(by_hand[-1], status=3)

    output = drive(PLAN, status=3)
    assert "decision at step 230: NO-GO" in output and step() == 230
    # Step 50 twice: its results were replaced by hand.
    assert [gate["outcome"] for gate in events("gate")] == ["go"] * 6 + ["no-go"]
    (advised,) = set(
        re.findall(
            r"`(python -m scripts\.pipeline [^`]*--extend phase3_crystallization=\d+)`", output
        )
    )
    output = drive(advised, status=3)
    assert "decision at step 235: NO-GO" in output and step() == 235

    for command in days("generate_chat_data", "visualize_attention"):
        give(command)
    before, metrics = checkpoints(), (LOGS / "metrics.jsonl").read_text()
    output = drive(f'{PLAN} --accept "a model of this size"')
    assert "deliverables are present and agree" in output
    assert "missing" not in output.rpartition("[")[2]
    for command in days("visualize_attention", "demo_ui"):
        give(command)
    assert checkpoints() == before and (LOGS / "metrics.jsonl").read_text() == metrics
    (check,) = (command for command in BY_HAND if "verify_checkpoint" in command)
    assert "rope theta 500,000 (as in logs/nanollama_1b/phase2_16k.config.yaml)" in give(check)

    rows = read_metrics(LOGS)
    # Each step once, despite a kill, a signal and an extension.
    assert [row["step"] for row in rows] == list(range(1, 236))
    rates = [row["lr"] for row in rows if row["step"] >= 10]
    assert all(before >= after for before, after in pairwise(rates)) and rates[-1] == 0
    assert rates[-30] == rates[0]  # the decay of 28 steps begins where that of 23 did
    for milestone in (50, 100, 150, 184, 207):
        assert list(Path("checkpoints", RUN).glob(f"*/step_{milestone}/model.safetensors")), (
            milestone
        )


def test_what_the_four_weeks_leave(place):
    content = json.loads(Path("results/benchmark_results.json").read_text())
    texts = {
        path: Path(path).read_text()
        for path in ("results/comparison_table.md", "results/report.html", "gguf/README.md")
    }
    assert len(content["targets"]) == 10 and all(
        target["value"] is not None for target in content["targets"]
    )
    measured = json.loads((RESULTS / "dpo" / "aligned.json").read_text())
    for task, metric in (("mmlu", "acc"), ("truthfulqa", "mc2")):
        value = content["evaluations"][task]["metrics"][metric]["value"]
        assert value == measured["metrics"][task][metric]["value"]
        for path, text in texts.items():
            assert f"{100 * value:.1f}" in text or f"{value:.4f}" in text, (path, task)
    of_all = yaml.safe_load(Path("results/hyperparameters.yaml").read_text())
    phases = (
        "phase1_pretrain",
        "phase2_annealing",
        "phase2_16k",
        "phase3_crystallization",
        "midtrain",
        "sft",
        "dpo",
    )
    assert list(of_all) == list(phases)
    assert [of_all[name]["steps"] for name in phases] == [184, 10, 13, 28, 2, 12, 5]
    training_log = Path("results/training_log.md").read_text()
    assert "restart 1 of 3" in training_log and "a model of this size" in training_log
    assert Path("results/wandb_run_urls.txt").read_text() == "none: W&B was off\n"
    assert Path("results/attention_visualizations.png").read_bytes().startswith(b"\x89PNG")
    links = {
        "phase1": "phase1_pretrain/step_184",
        "phase3": "phase3_crystallization/step_235",
        "dpo": "dpo/step_5",
    }
    for name, folder in links.items():
        assert Path("checkpoints", name, Path(folder).name).samefile(
            Path("checkpoints", RUN, folder)
        )


def test_the_demo_opens_the_last_model(place):
    (command,) = (command for command in BY_HAND if "demo_ui" in command)
    demo = Command(shlex.split(command), dict(os.environ))
    end = time.monotonic() + WAIT
    while "http://" not in demo.output.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    demo.send_signal(signal.SIGKILL)
    assert demo.wait() == 128 + signal.SIGKILL
    output = demo.output.read_text()
    assert (
        f"opening {place / 'checkpoints'}" in output
        and "/dpo/step_5, of the newest run;" in output
        and "http://" in output
    )
