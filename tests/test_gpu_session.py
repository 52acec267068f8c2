"""benchmarks/gpu_session.sh without a GPU: its commands exist, and a part survives a failure."""

import json
import os
import shlex
import subprocess

import pytest
from conftest import ROOT

from benchmarks import train_speed
from benchmarks.train_speed_report import GOALS
from lab.experiment import Experiment, check
from training.config import load
from training.settings import load_settings

SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"


def session(*arguments, **environment):
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("tiny", [[], ["--tiny"]])
@pytest.mark.parametrize("part", "1234")
def test_every_command_names_what_exists(part, tiny, tmp_path):
    listed = session(part, "--list", *tiny, OUT=str(tmp_path), PYTHON="python3")
    assert listed.returncode == 0 and listed.stderr == ""
    commands = [line.split(": ", 1)[1] for line in listed.stdout.splitlines()]
    assert commands
    for command in commands:
        words = shlex.split(command)
        if words[0] != "python3":
            assert words[0] == "nvidia-smi" or words[1:] == ["benchmarks/gpu_session.sh", "resume"]
            continue
        module = words[words.index("-m") + 1] if words[1] == "-m" else words[1]
        if module == "torch.distributed.run":
            module = next(word for word in words if word.endswith(".py"))
        path = ROOT / (module if module.endswith(".py") else module.replace(".", "/") + ".py")
        assert module == "pytest" or path.is_file(), command
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
        if module == "benchmarks.train_speed":
            args = train_speed.parse(words[words.index(module) + 1 :])
            for options in train_speed.grid(args.vary):  # ValueError for an unknown setting
                run = load(ROOT / args.config, [*args.overrides, *options])
                assert (
                    run.data.rows % run.data.micro_batch_size == 0
                    and run.data.sequence_length in (16, 32, 64, *GOALS)
                )
        elif module == "scripts.experiment":
            experiment = words[words.index(module) + 1]
            overrides = [word for word in words if "=" in word]
            loaded = load_settings(Experiment, ROOT / experiment, overrides)
            check(loaded, loaded.variants)


def test_a_part_goes_on_when_commands_fail(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *check_env*) exit 3 ;; '
        '*"-m pytest"*) echo "said \\"no\\""; exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    done = session("1", "--tiny", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 1
    report = json.loads((tmp_path / "out" / "part1.json").read_text())
    statuses = {entry["name"]: entry["status"] for entry in report["commands"]}
    assert statuses["environment"] == "failed with 3"
    assert statuses["attention_kernels"] == "failed with 1"
    assert statuses["dummy_run"] == statuses["speed_4k"] == "ok"
    assert statuses["resume"] == "failed with 2"  # no run was trained
    assert 'said "no"' in (tmp_path / "out" / "part1.log").read_text()
    python.write_text("#!/bin/sh\nexit 0\n")  # a repeated part runs what has not succeeded
    done = session("1", "--tiny", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert "speed_4k: done" in done.stdout and "environment: done" not in done.stdout
    report = json.loads((tmp_path / "out" / "part1.json").read_text())
    assert sorted(entry["name"] for entry in report["commands"]) == sorted(statuses)
    spent = session(
        "1", "--tiny", OUT=str(tmp_path / "spent"), PYTHON=str(python), PART_SECONDS="0"
    )
    assert spent.returncode == 0
    report = json.loads((tmp_path / "spent" / "part1.json").read_text())
    assert {entry["status"] for entry in report["commands"]} == {"no time left"}
    assert session("7", OUT=str(tmp_path)).returncode == 2
