"""benchmarks/train_speed.py: contenders compute the same losses; its clock times steps only."""

from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

from benchmarks import train_speed, train_speed_ranks, train_speed_report
from benchmarks.peers import CONTENDERS, Done, Work, missing
from training import setup
from training.config import load

STEPS = 3


def losses_of(name, folder, *overrides):
    """Return the losses of STEPS steps of a contender."""
    config = str(ROOT / "configs" / "test_mode.yaml")
    arguments = [
        "data.tokens_per_step=512",
        "data.micro_batch_size=4",
        *overrides,
        f"output_dir={folder}",
        f"log_dir={folder}",
    ]
    run = load(config, [*arguments, *train_speed.prepare(load(config, arguments), STEPS, folder)])
    losses = []

    def pace(loss):
        losses.append(float(loss))
        if len(losses) == STEPS:
            raise Done

    with setup.ranks() as device, pytest.raises(Done):
        CONTENDERS[name](Work(run, device, 0, 1, STEPS + 1, pace))
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_contenders_do_the_same_work(tmp_path, dtype, tolerance):
    ours = losses_of("ours", tmp_path / "ours", f"parallel.dtype={dtype}")
    assert len(set(ours)) == STEPS
    for name in ("plain", "hf", "litgpt"):
        if missing(name, "cpu") is None:
            others = losses_of(name, tmp_path / name, f"parallel.dtype={dtype}")
            assert others == pytest.approx(ours, rel=tolerance), name


def test_what_cannot_run_says_why():
    assert "GPU" in missing("liger", "cpu") and "needs its own environment" in missing(
        "torchtitan", "cuda"
    )
    assert missing("ours", "cpu") is missing("plain", "cuda") is None
    assert (missing("hf", "cpu") is None) == (find_spec("accelerate") is not None)


def test_a_step_lasts_from_the_end_of_the_one_before_and_waiting_for_a_round_does_not_count(
    monkeypatch,
):
    now, reports = [0.0], []
    monkeypatch.setattr(train_speed_ranks.time, "perf_counter", lambda: now[0])

    def commands():
        yield "go 2"
        now[0] += 1000.0  # the other contenders run
        yield "go 1"

    pace = train_speed_ranks.Pace(torch.device("cpu"), commands(), reports.append)
    pace.begin()
    for seconds in (3.0, 5.0):
        now[0] += seconds
        pace(1.5)
    now[0] += 7.0
    with pytest.raises(Done):
        pace(torch.tensor(2.5))
    assert [report["seconds"] for report in reports] == [[3.0, 5.0], [7.0]]
    assert [report["losses"] for report in reports] == [[1.5, 1.5], [2.5]]


def test_a_case_for_each_combination():
    assert train_speed.grid(["a.b=1,2", "c.d=x"]) == [["a.b=1", "c.d=x"], ["a.b=2", "c.d=x"]]
    assert train_speed.grid([]) == [[]]
    with pytest.raises(ValueError, match="must be a setting and its values"):
        train_speed.grid(["a.b"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--rounds 0",
        "--steps 0",
        "--warmup 0",
        "--contenders ours:0",
        "--contenders hf:x",
        "--contenders a",
    ],
)
def test_numbers_below_one_and_unknown_contenders_are_refused(arguments):
    with pytest.raises(
        ValueError, match=r"must be at least 1|numbers of at least 1|is not one of ours"
    ):
        train_speed.parse(arguments.split())


def test_ranks_of_torchrun_measure_one_contender(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_speed.parse([]).contenders == ["ours_documents"]
    for arguments in (
        ["--contenders", "ours", "plain"],
        ["--contenders", "hf"],
        ["--vary", "optim.lr=1,2"],
        ["--profile"],
    ):
        with pytest.raises(ValueError, match="measures --contenders ours or ours_documents alone"):
            train_speed.on_these_ranks(train_speed.parse(arguments), 2)


def test_a_case_in_which_ours_was_not_measured_is_a_failure():
    ours, peer = (
        {"contender": "ours:2", "step_s": 1.0, "same_loss": True},
        {"contender": "liger:1", "not_measured": "needs a GPU"},
    )
    assert train_speed_report.succeeded({"contenders": [ours, peer]})
    assert not train_speed_report.succeeded({"contenders": [peer]})
    assert not train_speed_report.succeeded(
        {
            "contenders": [
                {"contender": "ours:1", "not_measured": "out of memory"},
                {**ours, "contender": "hf:1"},
            ]
        }
    )
    assert not train_speed_report.succeeded({"contenders": [ours, {**ours, "same_loss": False}]})


def test_ratios_are_medians_over_rounds_and_losses_are_compared():
    def result(name, rounds, losses):
        return {"contender": name, "step_s": 1.0, "rounds_s": rounds, "warm_up_losses": losses}

    ratios = {
        "contenders": [
            result("ours:2", [1.0, 2.0, 1.0], [5.0, 4.0]),
            result("hf:1", [2.0, 3.0, 1.5], [5.0, 4.1]),
            result("ours_documents:2", [1.0, 2.0, 3.0], [5.5, 4.0]),
        ]
    }
    train_speed_report.compare(ratios, 1e-2)
    assert [one["first_is_faster_by"] for one in ratios["contenders"]] == [1.0, 1.5, 1.0]
    assert [one["same_loss"] for one in ratios["contenders"]] == [True, False, None]
