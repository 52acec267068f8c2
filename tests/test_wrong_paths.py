"""Configs, suites and checkpoints by name or path: spellings that work, and advice that helps."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, complaint_of
from test_flags import COMMANDS, examples

from evals.report.deliverables import open_plan
from evals.suite_config import SUITES, open_suite
from files import checkpoint_advice
from inference.open_model import open_model
from models.hf import check_model_folder
from training.config import load
from training.planning.cards import GPUS, OTHERS, check_gpu
from training.planning.plan import PlanStage
from training.planning.plan_files import check_name
from training.planning.stages import stage_settings
from training.settings import read_yaml

OWN = {"name": "mine", "path": "rows.jsonl", "kind": "text"}
CHECKPOINT = re.compile(r"--checkpoint \S+")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, values: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(values), encoding="utf-8")


# configs and suites


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "sub/mine.yml", "mine"])
def test_a_suite_is_any_file(place, name):
    write(name, OWN)
    suite, path = open_suite(name)
    assert path == Path(name) and suite.evals == {"mine": f"--config {name}"}
    write("suite.yml", {"evals": {name: "--limit 3", "hellaswag": "--shots 0"}})
    assert open_suite("suite.yml")[0].evals == {
        "mine": f"--config {name} --limit 3",
        "hellaswag": "--shots 0",
    }


def test_names_of_suites_come_before_files(place):
    write("quick", OWN)
    for name in SUITES:
        assert open_suite(name)[1] == Path(f"configs/evals/{name}.yaml")
    write("configs/evals/own.yml", {"evals": {"hellaswag": ""}})
    assert open_suite("own")[1] == Path("configs/evals/own.yml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost.yml", "config file lost.yml not found"),
        ("sub/lost", "config file sub/lost not found"),
        ("mine.yaml", "config file mine.yaml not found; did you mean mine.yml"),
        ("quik", "config file configs/evals/quik.yaml not found; did you mean configs/evals/quick"),
    ],
)
def test_a_missing_suite_is_named_as_given(place, name, message):
    write("mine.yml", OWN)
    with pytest.raises(ValueError, match=message):
        open_suite(name)


def test_configs_may_end_in_yml(place):
    write("mine.yml", {"extends": str(ROOT / "configs/test_mode.yaml"), "run": "mine"})
    assert load("mine.yml").run == "mine"
    with pytest.raises(ValueError, match=r"mine.yaml not found; did you mean mine.yml\?"):
        read_yaml(Path("mine.yaml"))
    stage = PlanStage(name="x", output_dir="x", commands={"X": "python x.py --config mine.yml"})
    assert stage_settings(stage)["mine.yml"]["run"] == "mine"
    write("configs/other.yml", {"run": "taken"})
    with pytest.raises(ValueError, match="--name taken is in use by configs/other"):
        check_name("taken")


# checkpoints


@pytest.fixture
def run_folder(place) -> Path:
    """A run folder with a phase and a stage, without config.json of its own."""
    run = place / "checkpoints" / "mine"
    for name in ("base/step_2", "base/step_4", "sft/step_2", "sft.old1/step_2", "dpo/step_1.tmp"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    return run


def test_the_advice_names_the_folders_that_hold_checkpoints(run_folder, tmp_path):
    assert checkpoint_advice(run_folder) == "give one of its folders base, sft"
    assert checkpoint_advice(run_folder.parent).endswith("folders mine/base, mine/sft")
    for folder in (run_folder / "dpo", tmp_path / "none", run_folder / "base"):
        assert checkpoint_advice(folder) == "give a step_N folder"
    for i in range(9):
        (tmp_path / "many" / f"p{i}").mkdir(parents=True)
        (tmp_path / "many" / f"p{i}" / "config.json").touch()
    assert checkpoint_advice(tmp_path / "many").endswith("p6, p7, ...")


def test_chat_names_the_folders_of_a_run(run_folder):
    with pytest.raises(ValueError, match=r"has no config.json; give one of its folders base, sft$"):
        open_model(run_folder, None)


def opens_a_checkpoint() -> dict[Path, str]:
    """Return command -> its first --help example with --checkpoint."""
    return {
        path: example
        for path in COMMANDS
        if path.parent.name != "benchmarks"
        for example in reversed(examples(path))
        if CHECKPOINT.search(example) and ".launch" not in example
    }


@pytest.mark.parametrize("path", opens_a_checkpoint(), ids=lambda path: path.stem)
def test_the_folder_of_a_run_is_not_a_checkpoint(path, run_folder, capsys, monkeypatch):
    """Every command says so before it reads data, in the words of the same function."""
    if path.name == "demo_ui.py":
        pytest.importorskip("gradio", reason="no gradio: pip install -r requirements-demo.txt")
    reasons = {
        run_folder: "is not a checkpoint: it has no config.json; give one of its folders base, sft",
        run_folder / "lost": "does not exist; check the path",
    }
    for folder, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{reason}$") as error:
            check_model_folder(folder)
        example = CHECKPOINT.sub(f"--checkpoint {folder}", opens_a_checkpoint()[path])
        words = shlex.split(example)[2 if path.name == "demo_ui.py" else 3 :]
        message = complaint_of(
            lambda: runpy.run_path(str(path), run_name="__main__"), words, capsys, monkeypatch
        )
        assert message == f"error: {error.value}\n"


def test_deliverables_of_a_run_folder(run_folder):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        open_plan(ROOT / "configs/quickstart/plan.yaml", run_folder, None)


# GPUs


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((slip, "rtx4090") for slip in ("4090", "rtx409", "rtx44090", "RTX 4090", "rxt4090")),
        *(("h10", "h100"), ("h1000", "h100"), ("A100_80", "a100-80"), ("laptop", "laptop8")),
    ],
)
def test_a_typing_error_gets_the_nearest_card(typed, meant):
    with pytest.raises(ValueError, match=rf"unknown --gpu {typed}; did you mean {meant}\? "):
        check_gpu(typed)


@pytest.mark.parametrize(
    "card",
    ["v100", "rtx4080", "rtx5080", "rtx3090ti", "a10", "a40", "t4", "p100", "mi300x", *OTHERS],
)
def test_another_card_gets_no_other_card_but_a_rule(card):
    with pytest.raises(ValueError, match=f"unknown --gpu {card}; available: h100, ") as error:
        check_gpu(card, ", and cpu")
    assert "did you mean" not in str(error.value)
    assert "and cpu. For another card, give one of these that has no more memory" in str(
        error.value
    )
    assert card not in GPUS
