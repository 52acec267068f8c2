"""Commands of plans, of their advice, of README and of docs/ pass their own argument parsers."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

from evals.report.targets import markdown, read_targets, table
from evals.suite import parse as parse_suite
from evals.suite_config import open_suite
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.config import load
from training.planning.plan import Plan, ScheduledPhase, load_plan, scheduled_phases
from training.settings import _section_of, load_settings

PLANS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if re.search(r"^phases:", path.read_text(), re.M)
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`((?:python|torchrun) [^`]+)`")
OUTPUT = re.compile(r"--output(?:_dir)? (\S+)")
SETTING = re.compile(r"`([a-z_.]+): ([^`]+)`")


class Parsed(Exception):
    """Stops a command after it parsed its flags."""


def parse(command: str, monkeypatch) -> argparse.Namespace:
    """Parse a command's flags with its own parser.

    Raises AssertionError if the parser refuses them or if a named .yaml or .py file is missing. The
    reader of a page writes files and folders named my_*.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])  # a script may change it
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
    namespaces = []

    def wrap(original):
        def wrapped(self, *args, **kwargs):
            namespaces.append(original(self, *args, **kwargs))
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
        path = ROOT / (f"{words[2].replace('.', '/')}.py" if is_module else words[1])
        try:
            if path.is_file():  # run_module fails for names that pytest rewrites (scripts.test_*)
                runpy.run_path(str(path), run_name="__main__")
            else:
                runpy.run_module(words[2], run_name="__main__")
        except Parsed:
            pass
        except (SystemExit, ImportError, OSError) as error:
            raise AssertionError(f"{command}: {error!r}") from error
    for value in vars(namespaces[0]).values():
        mine = any(part.startswith("my_") for part in Path(str(value)).parts)
        if str(value).endswith((".yaml", ".py")) and not mine:
            assert Path(str(value)).is_file(), f"{command}: there is no {value}"
    suite = str(vars(namespaces[0]).get("suite", ""))
    if "scripts.run_evals" in words and not Path(suite).name.startswith("my_"):
        for name, flags in open_suite(namespaces[0].suite)[0].evals.items():
            parse_suite(name, flags, namespaces[0], None)
    return namespaces[0]


def commands(plan: Plan) -> list[str]:
    """Return commands of a plan and of its advice, with placeholders filled in."""
    stages = [command for stage in plan.stages for command in stage.commands.values()]
    templates = [*plan.before.values(), *plan.evals.values(), *stages, *plan.after.values()]
    filled = [
        text.format(checkpoint="checkpoints/x/dpo/step_9", output="results/x/y.json", run="x")
        for text in templates
    ]
    return filled + [command for advice in advices(plan) for command in COMMAND.findall(advice)]


def advices(plan: Plan) -> list[str]:
    judged = [*plan.stages, *(milestone for phase in plan.phases for milestone in phase.milestones)]
    return [stage.advice for stage in judged] + [
        gate.advice for stage in judged for gate in stage.gates
    ]


def page_commands(text: str) -> list[str]:
    """Return commands in the code blocks of a page."""
    return command_lines("".join(CODE_BLOCK.findall(text)))


def command_lines(text: str) -> list[str]:
    """Return the lines of a text that are commands, with continuations joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line.partition(" #")[0].strip() for line in lines]
    return [command for command in commands if command.startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_code_blocks_of_pages_are_valid(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in page_commands(page.read_text(encoding="utf-8")):
        parse(command, monkeypatch)


def test_commands_of_a_page_are_read_without_comments_and_continuations():
    text = "```\npython a.py --b c \\\n    --d e   # why\nmake test\n```\n`python f.py`\n"
    assert [command.split() for command in page_commands(text)] == [
        ["python", "a.py", "--b", "c", "--d", "e"]
    ]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_plans_are_valid(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plan_commands = commands(load_plan(path))
    assert plan_commands
    for command in plan_commands:
        parse(command, monkeypatch)
    for wrong in (
        plan_commands[0] + " --no_such_flag 1",
        "python -m scripts.run_evals --checkpoint x --suite configs/none.yaml",
    ):
        with pytest.raises((AssertionError, ValueError)):
            parse(wrong, monkeypatch)


def lost_milestones(phases: Sequence[ScheduledPhase]) -> list[int]:
    """Return milestones that a phase's config does not keep when it runs without the plan."""
    return [
        milestone.step
        for scheduled in phases
        for milestone in scheduled.phase.milestones
        if milestone.step not in (scheduled.end, *scheduled.run.checkpoint.milestones)
    ]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_keep_the_milestones_of_their_plan(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    phases = scheduled_phases(load_plan(path))
    assert any(scheduled.phase.milestones for scheduled in phases)
    assert lost_milestones(phases) == []


LARGE_PLANS = ("configs/plan_1b.yaml", "configs/plan_1b_plus.yaml")


@pytest.mark.parametrize("path", LARGE_PLANS)
def test_settings_in_advice_are_those_of_the_config(path, monkeypatch, tmp_path):
    """As overrides, and appended to the config, whose own value must then be removed."""
    monkeypatch.chdir(ROOT)
    shutil.copytree("configs", tmp_path / "configs")
    changed = 0
    for advice in advices(load_plan(path)):
        settings = SETTING.findall(advice)
        if settings:
            (config,) = set(re.findall(r"in (configs/[\w/]+\.yaml)", advice))
            kind = PreferenceRun if "dpo" in config else SFTConfig
            run = load_settings(kind, config, [f"{key}={value}" for key, value in settings])
            pasted, text = tmp_path / config, Path(config).read_text()
            lines = "".join(f"{key}: {value}\n" for key, value in settings)
            pasted.write_text(text + lines)
            content, again = yaml.safe_load(text), 0
            for key, _ in settings:
                section, name = _section_of(key, content)
                again += section.pop(name, None) is not None
            if again:
                with pytest.raises(ValueError, match=r"has the (setting|key) .* twice.*; remove"):
                    load_settings(kind, pasted)
            pasted.write_text(yaml.safe_dump(content) + lines)
            assert load_settings(kind, pasted) == run
            pasted.write_text(text)
            if "mix" in advice:
                assert (
                    sum(run.data.mix.values()) == pytest.approx(1)
                    and run.data.mix.keys() <= run.chat.sources.keys()
                )
            changed += 1
    assert changed >= 5


def test_the_plus_plan_writes_into_folders_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    given, plus = (load_plan(path) for path in LARGE_PLANS)
    assert not {stage.output_dir for stage in given.stages} & {s.output_dir for s in plus.stages}
    runs = [{load(phase.config).run for phase in plan.phases} for plan in (given, plus)]
    assert runs == [{"nanollama_1b"}, {"nanollama_1b_plus"}]
    texts = "\n".join([*plus.after.values(), *advices(plus)])
    assert "plan_1b.yaml" not in texts and "nanollama_1b/" not in texts.replace(
        "data/store/nanollama_1b/", ""
    )


def test_no_two_plans_write_the_same_output(monkeypatch):
    monkeypatch.chdir(ROOT)
    outputs = [
        {path for command in load_plan(plan).after.values() for path in OUTPUT.findall(command)}
        - {"{output}"}
        for plan in PLANS
    ]
    assert len(set().union(*outputs)) == sum(map(len, outputs)) > 5


@pytest.mark.parametrize("path", LARGE_PLANS)
def test_every_gate_after_pretraining_says_what_to_do(path):
    plan = load_plan(ROOT / path)
    metrics = {stage.name: [gate.metric for gate in stage.gates] for stage in plan.stages}
    assert metrics["sft"][:2] == ["mmlu.acc", "gsm8k.flexible"] and len(metrics["dpo"]) == 13
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


def test_the_timeline_has_the_limits_of_the_plans_gates():
    plan = load_plan(ROOT / "configs" / "plan_1b.yaml")
    gates = {f"step_{m.step}": m.gates for phase in plan.phases for m in phase.milestones}
    gates = {name: found for name, found in gates.items() if found}
    gates |= {stage.name: stage.gates for stage in plan.stages}
    shown = {}
    for row in (ROOT / "docs" / "timeline.md").read_text().split("\n"):
        output = re.search(r"--output results/nanollama_1b/(\w+)/\w+\.json", row)
        if output and output[1] in gates:
            limits = re.sub(r"step 230,000|16,?384|GSM8K|\(0 shots\)", "", row.split("|")[-2])
            shown[output[1]] = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", limits)}
    assert shown.keys() == gates.keys()
    for name, expected in gates.items():
        numbers = set()
        for gate in expected:
            is_share = not re.search("perplexity|bits_per_byte|toxicity", gate.metric)
            pair = [limit * 100 if is_share else limit for limit in (gate.go, gate.no_go)]
            # A share that is never a no-go.
            numbers |= {round(limit, 2) for limit in pair[: 1 if gate.no_go == 0 else 2]}
        assert shown[name] == numbers, name


def test_the_timeline_names_commands_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "timeline.md").read_text()
    page_spans = COMMAND.findall(text.replace("\\|", "|"))
    assert len(page_spans) >= 25
    for command in page_spans:
        parse(command, monkeypatch)
    unmeasured = markdown(table(read_targets(Path("configs/plan_1b.yaml")), lambda stage: {}))
    # The same targets as the plan's; the page wraps the notes at 100 columns.
    assert " ".join(unmeasured.split()) in " ".join(text.split())
    for day in range(1, 29):
        days = [
            tuple(map(int, re.findall(r"\d+", row)))
            for row in re.findall(r"^\| ((?:\d+)(?: - \d+)?) \|", text, re.M)
        ]
        assert any(row[0] <= day <= row[-1] for row in days), f"no row for day {day}"
