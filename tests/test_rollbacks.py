"""Milestones without the plan's driver; how far a rollback goes, and a kill right after it."""

import math
from pathlib import Path

import pytest
from conftest import ROOT, train_here
from test_faults import equal, events, places, weights

import train
from files import step_folders
from training.checkpoint import Checkpointer
from training.checkpoint_files import read_manifest, read_position
from training.config import load
from training.logger import Log
from training.planning.plan import load_plan

pytestmark = pytest.mark.one_layer

CONFIG = ROOT / "configs" / "test_mode.yaml"


@pytest.fixture
def spoil(monkeypatch):
    """spoil({3, 4}): make the batches at these indices bad; spoil(set()): none."""
    loader = train.Prefetcher

    def at_places(bad: set[int]) -> None:
        class Spoiled(loader):
            def at(self, place):
                step = super().at(place)
                return step._replace(loss_denominator=math.nan) if place in bad else step

        monkeypatch.setattr(train, "Prefetcher", Spoiled)

    return at_places


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_milestones_are_saved_and_kept_without_the_driver(settings, tmp_path):
    rare = "checkpoint={every: 4, keep: 1, keep_best: false, milestones: [1, 3]}"
    assert train_here(settings(rare, steps=10))
    assert steps_in(tmp_path / "checkpoints" / "one") == ["step_1", "step_10", "step_3"]


def test_a_step_that_is_saved_again_stays_a_milestone_and_keeps_its_loss(settings, tmp_path, spoil):
    checkpointer = "checkpoint={every: 100, keep: 1, keep_best: false}"
    assert train_here(settings(checkpointer, steps=3))  # the end of a phase is a milestone
    folder = tmp_path / "checkpoints" / "one"
    before = read_manifest(folder / "step_3")
    spoil({4, 5})
    again = settings(checkpointer, "faults.bad_in_a_row=2", steps=8)
    assert train_here(again)  # rolls back to step 3 and saves it again
    after = read_manifest(folder / "step_3")
    assert steps_in(folder) == ["step_3", "step_8"] and after["files"] != before["files"]
    assert after["milestone"] is True and after["metric"] == before["metric"] > 0


def test_milestones_of_the_1b_model_are_those_of_its_plan(tmp_path):
    plan = load_plan(ROOT / "configs" / "plan_1b.yaml")
    first, *others = [load(phase.config) for phase in plan.phases]
    assert first.checkpoint.milestones == tuple(gate.step for gate in plan.phases[0].milestones)[:3]
    assert first.checkpoint.milestones == (50_000, 100_000, 150_000)
    assert all(run.checkpoint.milestones == () for run in others)
    order = r"milestones=\[\d, 2\] must be .* in rising order"
    for wrong, match in (("[3, 2]", order), ("[2, 2]", order), ("[0, 2]", "must be at least 1")):
        with pytest.raises(ValueError, match=match):
            load(CONFIG, [f"checkpoint.milestones={wrong}"])


FAR = (
    "checkpoint={every: 1, keep: 9}",
    "faults={bad_in_a_row: 2, rollback_steps: 3}",
    "validation.every=0",
)


class Killed(BaseException):
    """Simulates SIGKILL."""


@pytest.mark.parametrize("moment", ["set aside", "saved"])
def test_killed_right_after_a_rollback(settings, tmp_path, spoil, monkeypatch, moment):
    def place(name: str) -> list[str]:
        folder = tmp_path / name
        return settings(*FAR, f"output_dir={folder}", f"log_dir={folder / 'logs'}", steps=9)

    spoil({5, 6})
    assert train_here(place("straight"))
    [rollback] = events(tmp_path / "straight" / "logs", "rollback")
    aside = [f"step_{step}.rolled_back" for step in (3, 4, 5)]
    assert rollback["step"] == 2 and "rolled back 3 steps" in rollback["text"]
    assert sorted(rollback["set_aside"]) == aside
    assert places(tmp_path / "straight" / "logs") == [1, 2, 3, 4, 5, 8, 9, 10, 11]
    saved = [f"step_{step}" for step in range(1, 10)]  # the checkpoints set aside are deleted
    assert steps_in(tmp_path / "straight") == saved

    def kill(self, *arguments, **_):
        went_back = [path for path in (tmp_path / "killed").glob("*.rolled_back")]
        if went_back if moment == "set aside" else arguments[0] == "rollback":
            raise Killed
        return original(self, *arguments, **_)

    kind, name = (Checkpointer, "save") if moment == "set aside" else (Log, "event")
    original = getattr(kind, name)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(kind, name, kill)
        train_here(place("killed"))
    assert [path.name for path in step_folders(tmp_path / "killed")] == ["step_1", "step_2"]
    assert steps_in(tmp_path / "killed") == ["step_1", "step_2", *aside]
    if moment == "saved":
        spoil(set())  # the checkpoint lists the bad batches, so the run skips them
    assert train_here(place("killed"))
    assert events(tmp_path / "killed" / "logs", "resumed")[0]["step"] == 2
    assert equal(weights(tmp_path / "killed", 9), weights(tmp_path / "straight", 9))
    position = read_position(tmp_path / "killed" / "step_9")
    assert position["faults"]["excluded_batches"] == [5, 6]


def test_a_rollback_without_so_old_a_checkpoint_goes_to_the_oldest(settings, tmp_path, spoil):
    spoil({3, 4})
    assert train_here(settings(*FAR, "faults.rollback_steps=4", steps=5))
    assert events(tmp_path / "logs", "rollback")[0]["step"] == 1


def test_keep_must_reach_back_as_far_as_a_rollback():
    short = ["steps=100", "faults.rollback_steps=5", "checkpoint.every=2"]
    with pytest.raises(ValueError, match=r"needs older checkpoints .* set checkpoint.keep=4"):
        load(CONFIG, [*short, "checkpoint.keep=3"])
    assert load(CONFIG, [*short, "checkpoint.keep=4"])
