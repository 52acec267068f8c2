"""Bad steps: skips, rollbacks, resumes over them; pauses and ramps."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, train_here
from safetensors.torch import load_file

import train
from models.hf import read_hf_config
from training.faults import FaultConfig, FaultState

pytestmark = pytest.mark.one_layer


@pytest.fixture
def poison(monkeypatch):
    """Multiply loss and gradients by a factor at the given batch indices."""

    plain = train.next_token
    loader = train.Prefetcher

    def at(factors: dict[int, float]) -> None:
        places = []

        class Watched(loader):
            def at(self, place):
                places.append(place)
                return super().at(place)

        def next_token(z_weight):
            objective = plain(z_weight)

            def poisoned(model, batch):
                loss, sums = objective(model, batch)
                # The dry run reads no batch.
                factor = factors.get(places[-1], 1.0) if places else 1.0
                return loss * factor, {name: value * factor for name, value in sums.items()}

            return poisoned

        monkeypatch.setattr(train, "Prefetcher", Watched)
        monkeypatch.setattr(train, "next_token", next_token)

    return at


def events(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in rows if event["event"] == kind]


def places(folder: Path) -> list[int]:
    return [row["batch_index"] for row in read_metrics(folder)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step_{step}" / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_bad_step_is_skipped_as_if_its_place_had_been_left_out(
    settings, tmp_path, poison, monkeypatch
):
    with monkeypatch.context() as clean:
        clean.setattr(
            FaultState, "next_batch_index", lambda self, place: place + 1 if place == 3 else place
        )
        assert train_here(settings(f"output_dir={tmp_path / 'out'}", f"log_dir={tmp_path / 'lo'}"))
    for name, factor in (("nan", math.nan), ("inf", math.inf)):
        poison({3: factor})
        assert train_here(
            settings(f"output_dir={tmp_path / name}", f"log_dir={tmp_path / ('l' + name)}")
        )
        assert equal(weights(tmp_path / name, 6), weights(tmp_path / "out", 6))
        assert places(tmp_path / f"l{name}") == places(tmp_path / "lo") == [1, 2, 3, 5, 6, 7]
        [event] = events(tmp_path / f"l{name}", "skipped")
        assert event["batch_index"] == 3 and event["step"] == 4 and name in event["problem"]


def test_many_bad_steps_in_a_row_go_back_leave_them_out_and_train_on_gently(
    settings, tmp_path, poison
):
    poison(dict.fromkeys(range(4, 7), math.nan))
    assert train_here(
        settings("checkpoint.every=2", "faults.bad_in_a_row=3", "validation.every=0", steps=8)
    )
    [event] = events(tmp_path / "logs", "rollback")
    assert (
        event["excluded_batches"] == [4, 5, 6]
        and event["lr_scale"] == 0.5
        and event["grad_clip"] == 0.5
        and event["step"] == 4
    )
    rows = read_metrics(tmp_path / "logs")
    assert [row["step"] for row in rows] == list(range(1, 9)) and places(tmp_path / "logs") == [
        1,
        2,
        3,
        4,
        8,
        9,
        10,
        11,
    ]
    before, after = rows[3]["lr"], rows[4]["lr"]
    assert after == pytest.approx(before / 2)
    trainer = json.loads(
        (tmp_path / "checkpoints" / "one" / "step_8" / "state" / "trainer.json").read_text()
    )
    assert trainer["faults"]["excluded_batches"] == [4, 5, 6] and trainer["faults"]["skipped"] == 3


def test_after_too_many_rollbacks_it_stops_with_its_checkpoint(settings, tmp_path, poison):
    poison(dict.fromkeys(range(3, 100), math.nan))
    small = ["checkpoint.every=3", "faults.bad_in_a_row=2", "faults.max_rollbacks=2"]
    with pytest.raises(ValueError, match=r"2 bad steps in a row after 2 rollbacks"):
        train_here(settings(*small))
    assert [path.name for path in (tmp_path / "checkpoints" / "one").glob("step_*")] == ["step_3"]
    assert (
        len(events(tmp_path / "logs", "rollback")) == 2
        and len(events(tmp_path / "logs", "skipped")) == 6
    )


def test_bad_steps_before_the_first_checkpoint_say_so(settings, poison):
    poison(dict.fromkeys(range(9), math.nan))
    with pytest.raises(
        ValueError, match=r"one has no checkpoint to roll back to\. Restart it with a lower"
    ):
        train_here(settings())


def test_a_spike_is_skipped_and_stays_out_of_the_window_also_over_a_resume(
    settings, tmp_path, poison
):
    poison({5: 100.0, 8: 100.0})
    guarded = [
        "faults.window=4",
        "faults.spike_sigma=20",
        "checkpoint.every=4",
        "validation.every=0",
        "schedule.warmup_steps=8",
    ]
    assert train_here(
        settings(*guarded, f"output_dir={tmp_path / 'a'}", f"log_dir={tmp_path / 'la'}", steps=9)
    )
    assert [event["batch_index"] for event in events(tmp_path / "la", "skipped")] == [5, 8]
    for stop in (4, 6, 9):
        assert train_here(
            settings(
                *guarded,
                f"output_dir={tmp_path / 'b'}",
                f"log_dir={tmp_path / 'lb'}",
                f"until={stop}",
                steps=9,
            )
        )
    assert places(tmp_path / "la") == places(tmp_path / "lb") and equal(
        weights(tmp_path / "a", 9), weights(tmp_path / "b", 9)
    )


def test_what_is_a_spike():
    config, faults = FaultConfig(window=4, spike_sigma=6), FaultState()
    for loss in (1.0, 1.1, 0.9, 1.0):
        assert faults.check_step(loss, 1.0, config) is None
    assert faults.check_step(1.4, 1.0, config) is None or "loss" in str(
        faults.check_step(1.4, 1.0, config)
    )
    assert "deviations" in str(faults.check_step(9.0, 1.0, config)) and 9.0 not in faults.losses
    assert "gradient norm nan" in str(faults.check_step(1.0, math.nan, config))
    assert FaultState().check_step(1e9, 1e9, config) is None  # nothing to compare with yet
    assert faults.next_phase().losses == [] and faults.next_phase().skipped == faults.skipped
    faults.excluded_batches = [3, 4, 7]
    assert [faults.next_batch_index(place) for place in (2, 3, 4, 6, 7)] == [2, 5, 5, 6, 8]


def test_pausing_changes_nothing(settings, tmp_path):
    assert train_here(
        settings(f"output_dir={tmp_path / 'a'}", f"log_dir={tmp_path / 'la'}", "validation.every=0")
    )
    for stop in (2, 5, 99):
        overrides = settings(
            f"output_dir={tmp_path / 'b'}",
            f"log_dir={tmp_path / 'lb'}",
            "validation.every=0",
            f"until={stop}",
        )
        assert train_here(overrides)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("la", "lb")]
    assert losses[0] == losses[1] and equal(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))


def test_theta_rises_over_the_phase_and_a_resume_finds_it(settings, tmp_path):
    ramp = [
        "rope_theta=[10000, 500000]",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "validation.every=0",
    ]
    assert train_here(settings(*ramp, f"output_dir={tmp_path / 'a'}", f"log_dir={tmp_path / 'la'}"))
    thetas = [read_hf_config(tmp_path / "a" / f"step_{step}").rope_theta for step in range(1, 7)]
    assert thetas[0] == 10_000 and thetas[-1] == pytest.approx(500_000)
    assert [b / a for a, b in pairwise(thetas)] == pytest.approx([50**0.2] * 5)
    for stop in (2, 6):
        assert train_here(
            settings(
                *ramp, f"output_dir={tmp_path / 'b'}", f"log_dir={tmp_path / 'lb'}", f"until={stop}"
            )
        )
    assert equal(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))
