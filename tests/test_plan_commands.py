"""Every command of every plan, of the advice at its gates and of docs/timeline.md can be given as it stands."""

import argparse
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

from evals.report.targets import markdown, read_targets, table
from evals.suite import parse as parse_suite
from scripts.run_evals import open_suite
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.planning.plan import Plan, load_plan
from training.settings import load_settings

PLANS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if re.search(r"^phases:", path.read_text(), re.M)
)
COMMAND = re.compile(r"`((?:python|torchrun) [^`]+)`")
SETTING = re.compile(r"`([a-z_.]+): ([^`]+)`")


class Parsed(Exception):
    """Ends a command once its flags were read."""


def parse(command: str, monkeypatch) -> argparse.Namespace:
    """The flags of a command, read by its own parser; AssertionError where it refuses them or names a file that is not there."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", "-m", "scripts.launch", *words[1:]]
    assert words[0] == "python", command
    if words[1:3] == ["-m", "scripts.launch"]:
        launched = get_args_parser().parse_args(words[3:])
        words = [
            "python",
            *["-m"] * launched.module,
            launched.training_script,
            *launched.training_script_args,
        ]
    read = []

    def wrap(original):
        def wrapped(self, *args, **kwargs):
            read.append(original(self, *args, **kwargs))
            raise Parsed

        return wrapped

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy: the module was imported before
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(
                argparse.ArgumentParser, name, wrap(getattr(argparse.ArgumentParser, name))
            )
        is_module = words[1] == "-m"
        patch.setattr(sys, "argv", words[2 if is_module else 1 :])
        try:
            run = runpy.run_module if is_module else runpy.run_path
            run(words[2] if is_module else str(ROOT / words[1]), run_name="__main__")
        except Parsed:
            pass
        except (SystemExit, ImportError, OSError) as error:
            raise AssertionError(f"{command}: {error!r}") from error
    for value in vars(read[0]).values():
        if str(value).endswith((".yaml", ".py")):
            assert Path(str(value)).is_file(), f"{command}: there is no {value}"
    if "scripts.run_evals" in words:
        for name, flags in open_suite(read[0].suite)[0].evals.items():
            parse_suite(name, flags, read[0], None)
    return read[0]


def commands(plan: Plan) -> list[str]:
    """All of a plan's commands with their placeholders filled in, and those that its advice names."""
    stages = [command for stage in plan.stages for command in stage.commands.values()]
    found = [*plan.before.values(), *plan.evals.values(), *stages, *plan.after.values()]
    filled = [
        text.format(checkpoint="checkpoints/x/dpo/step_9", output="results/x/y.json", run="x")
        for text in found
    ]
    return filled + [command for advice in advices(plan) for command in COMMAND.findall(advice)]


def advices(plan: Plan) -> list[str]:
    judged = [*plan.stages, *(milestone for phase in plan.phases for milestone in phase.milestones)]
    return [part.advice for part in judged] + [
        gate.advice for part in judged for gate in part.gates
    ]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_plans_are_valid(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = commands(load_plan(path))
    assert len(found) >= 10
    for command in found:
        parse(command, monkeypatch)
    for wrong in (
        found[0] + " --no_such_flag 1",
        "python -m scripts.run_evals --checkpoint x --suite configs/none.yaml",
    ):
        with pytest.raises((AssertionError, ValueError)):
            parse(wrong, monkeypatch)


def test_settings_in_advice_are_those_of_the_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    changed = 0
    for advice in advices(load_plan("configs/plan_1b.yaml")):
        settings = SETTING.findall(advice)
        if settings:
            (config,) = set(re.findall(r"in (configs/\w+\.yaml)", advice))
            kind = PreferenceRun if "dpo" in config else SFTConfig
            run = load_settings(kind, config, [f"{key}={value}" for key, value in settings])
            for key, value in settings:
                assert f"{key.rpartition('.')[2]}" and yaml.safe_load(value) is not None
            if "mix" in advice:
                assert (
                    sum(run.data.mix.values()) == pytest.approx(1)
                    and run.data.mix.keys() <= run.chat.sources.keys()
                )
            changed += 1
    assert changed >= 5


def test_every_gate_after_pretraining_says_what_to_do():
    plan = load_plan(ROOT / "configs" / "plan_1b.yaml")
    metrics = {stage.name: [gate.metric for gate in stage.gates] for stage in plan.stages}
    assert metrics["sft"] == ["mmlu.acc", "gsm8k.flexible"] and len(metrics["dpo"]) == 8
    for gate in [gate for stage in plan.stages for gate in stage.gates]:
        assert COMMAND.search(gate.advice), gate.metric
    ends = [
        re.search(r"-m (?:scripts|evals)\.(\w+)", command).group(1)
        for command in plan.after.values()
    ]
    assert ends[-1] == "deliverables" and {
        "visualize_attention",
        "export_gguf",
        "check_gguf",
        "report",
    } < set(ends)


def test_the_timeline_names_commands_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "timeline.md").read_text()
    found = COMMAND.findall(text.replace("\\|", "|"))
    assert len(found) >= 25
    for command in found:
        parse(command, monkeypatch)
    unmeasured = markdown(table(read_targets(Path("configs/plan_1b.yaml")), lambda stage: {}))
    assert unmeasured in text  # the same targets as the plan's
    for day in range(1, 29):
        days = [
            tuple(map(int, re.findall(r"\d+", row)))
            for row in re.findall(r"^\| ((?:\d+)(?: - \d+)?) \|", text, re.M)
        ]
        assert any(row[0] <= day <= row[-1] for row in days), f"no row for day {day}"
