"""Batches that grow, between phases or within one: rows, tokens, forecast, exact resuming."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, VOCAB, read_metrics, train_here
from test_hyperball import read_state

from data.dataloader import PackedDataLoader
from data.store import open_shards
from training.config import load
from training.planning import cost
from training.planning.plan import Plan, PlanPhase, scheduled_phases
from training.schedulers import rows_of_step, tokens_of_steps

TEST_MODE = ROOT / "configs" / "test_mode.yaml"
SCHEDULE = "schedule={warmup_steps: 2, total_steps: 8, decay_steps: 3, decay: power}"
GROWS = "schedules.batch_tokens={points: [[0, 512], [5, 1024]], shape: step}"
# Positions in a whole run, counted in updates.
POSITIONS = {"begin", "end", "step", "start_step", "total_steps", "phase_start", "phase_end"}


def growing(step: int) -> int:
    return 4 if step < 3 else 8


# ---- rows


@pytest.fixture(scope="module")
def loader(text_store):
    mix = {"first": 0.7, "second": 0.3}
    shards = open_shards(str(text_store), mix, "train", VOCAB)

    def make(rows, micro=2, rank=0, world=1):
        return PackedDataLoader(shards, mix, 64, rows, micro, 5, rank, world)

    return make


def test_a_growing_batch_reads_the_same_rows_in_the_same_order(loader):
    single, grows = loader(1, micro=1), loader(growing)
    ends = np.cumsum([growing(step) for step in range(6)]).tolist()
    assert [grows.first_row(step) for step in range(7)] == [0, *ends]
    for step in (5, 0, 3, 2, 4, 1):  # a pure function of the index
        ours = grows.at(step)
        begin, end = grows.first_row(step), grows.first_row(step + 1)
        theirs = [single.at(row) for row in range(begin, end)]
        tokens = torch.cat([batch.tokens for batch in ours.batches])
        assert torch.equal(tokens, torch.cat([part.batches[0].tokens for part in theirs]))
        assert ours.loss_denominator == sum(part.loss_denominator for part in theirs)
        assert ours.tokens == sum(part.tokens for part in theirs) == growing(step) * 64
        assert torch.cat([batch.rows for batch in ours.batches]).tolist() == [*range(begin, end)]
        halves = [loader(growing, rank=rank, world=2).at(step).batches for rank in (0, 1)]
        assert torch.equal(tokens, torch.cat([b.tokens for half in halves for b in half]))
    assert grows.epochs(6) == single.epochs(ends[-1])
    assert grows.shares(2, 5) == single.shares(ends[1], ends[4])


def test_the_fingerprint_has_the_growth(loader):
    marks = [loader(rows).fingerprint for rows in (4, 8, growing, lambda step: 4)]
    assert len({*marks}) == 4 and loader(growing).fingerprint == marks[2]


def test_the_fingerprint_has_the_definition_of_the_curve_and_calls_it_never(loader, monkeypatch):
    def mark(points: str, *more: str) -> str:
        growth = f"schedules.batch_tokens={{points: {points}, shape: step}}"
        rows = rows_of_step(load(TEST_MODE, [growth, *more]))
        calls = []
        curve = rows.tokens.curve
        monkeypatch.setattr(type(curve), "rounded", lambda self, step: calls.append(step) or 512)
        packed = loader(rows)
        monkeypatch.undo()
        assert calls == [rows.start]  # rows of the first step
        return packed.fingerprint

    late = "[[0, 512], [400000, 1024]]"  # beyond the steps that a hash of values would cover
    assert mark(late) == mark(late, "steps=9") == mark("[[0, 512.0], [4.0e5, 1024]]")
    others = [
        mark("[[0, 512], [400001, 1024]]"),
        mark("[[0, 512], [400000, 2048]]"),
        mark(late, "start_step=3", "resume_from=one"),
        mark(late, "data.sequence_length=32"),
    ]
    assert len({mark(late), *others}) == 5


def test_steps_that_do_not_divide_over_the_ranks_are_refused_before_training(loader):
    packed = loader(lambda step: 4 if step < 9 else 5)
    packed.describe(9)
    message = r"5 rows per step do not divide .* change data.tokens_per_step or schedules.batch_tok"
    with pytest.raises(ValueError, match=message):
        packed.describe(10)


def test_rows_of_a_step_count_from_the_start_of_the_phase():
    run = load(TEST_MODE, [GROWS, "start_step=3", "resume_from=one"])
    rows = rows_of_step(run)
    assert [rows(batch_index) for batch_index in range(4)] == [8, 8, 16, 16]
    assert rows_of_step(load(TEST_MODE)) == 8
    assert tokens_of_steps(run, 3, 7) == 2 * 512 + 2 * 1024
    assert tokens_of_steps(load(TEST_MODE), 3, 7) == 4 * 512
    with pytest.raises(ValueError, match="counts steps of the whole run, but start_step is not s"):
        rows_of_step(replace(run, start_step=None))
    linear = load(TEST_MODE, ["schedules.batch_tokens.points=[[0, 512], [9, 1024]]"])
    with pytest.raises(ValueError, match=r"is 569 at step 1, which is not a multiple of .*=64"):
        rows_of_step(linear)(1)


# ---- tokens of a plan


def test_a_forecast_adds_up_the_tokens_of_each_phase(tmp_path, monkeypatch):
    paths = []
    for phase, tokens, more in (("one", 512, {}), ("two", 1024, {"start_step": 4})):
        content = yaml.safe_load(TEST_MODE.read_text(encoding="utf-8"))
        content["data"] |= {"tokens_per_step": tokens, "mix": {"text": 1}}
        content["schedule"] = {"warmup_steps": 1, "total_steps": 10, "decay_steps": 2}
        content |= {"phase": phase, "steps": 4 if phase == "one" else 6, **more}
        if phase == "two":
            curve = {"points": [[0, 1024], [8, 2048]], "shape": "step"}
            content["schedules"] = {"batch_tokens": curve}
        paths.append(tmp_path / f"{phase}.yaml")
        paths[-1].write_text(yaml.safe_dump(content), encoding="utf-8")
    plan, asked = Plan("p", tuple(PlanPhase(str(path)) for path in paths)), []
    real = cost.forecast_loss
    monkeypatch.setattr(
        cost, "forecast_loss", lambda size, tokens: asked.append(tokens) or real(size, tokens)
    )
    monkeypatch.setattr(cost, "readable_tokens", lambda run: {"text": 4096})
    report = cost.forecast(plan, "h100", 1, training_tokens_of=cost.readable_tokens)
    expected = [4 * 512, 4 * 1024 + 2 * 2048]
    assert [phase["tokens"] for phase in report["phases"]] == expected
    assert report["total"]["tokens"] == sum(expected) and report["total"]["steps"] == 10
    assert asked == [expected[0], sum(expected)]
    so_far = [phase["sources"]["text"]["epochs_so_far"] for phase in report["phases"]]
    assert so_far == [expected[0] / 4096, sum(expected) / 4096]
    hours = [phase["bound_hours"] / phase["tokens"] for phase in report["phases"]]
    assert hours[1] < hours[0]  # of larger batches, per token
    longer = scheduled_phases(plan, {"one": 3})
    assert [(part.begin, part.end) for part in longer] == [(0, 7), (7, 13)]


def test_no_code_multiplies_updates_of_several_phases_by_the_tokens_of_one():
    """A position in the run times tokens_per_step is wrong as soon as the batch has grown."""
    # The dial writes plans of one batch size.
    one_batch = {
        ROOT / "training" / "planning" / f"{name}.py" for name in ("plan_files", "dial_gates")
    }
    folders = (ROOT / name for name in ("training", "evals", "lab", "scripts", "data"))
    found = []
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")} - one_batch):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                names = {
                    part.attr if isinstance(part, ast.Attribute) else part.id
                    for side in (node.left, node.right)
                    for part in ast.walk(side)
                    if isinstance(part, ast.Attribute | ast.Name)
                }
                if "tokens_per_step" in names and names & POSITIONS:
                    found.append(f"{path}:{node.lineno}")
    assert not found, found


# ---- runs


def train(settings, folder: Path, phase: str, steps: int, *more: str) -> None:
    folders = [f"output_dir={folder / phase}", f"log_dir={folder / 'logs'}"]
    overrides = ["data.mix={first: 1}", "validation.every=0", *folders, *more]
    train_here(settings(SCHEDULE, *overrides, phase=phase, steps=steps))


@pytest.mark.one_layer
def test_growth_between_phases_equals_growth_within_one_and_resumes_bit_for_bit(
    settings, tmp_path, text_store
):
    inside, across, stopped = (tmp_path / name for name in ("inside", "across", "stopped"))
    train(settings, inside, "one", 8, GROWS)

    shards = open_shards(str(text_store), {"first": 1}, "train", VOCAB)
    rows = len(PackedDataLoader(shards, {"first": 1}, 64, 8, 8, 1337).packed[0])
    later = ["start_step=5", "data.tokens_per_step=1024"]
    later += [f"data.start_epoch={{first: {5 * 8 / rows!r}}}"]
    train(settings, across, "one", 5)
    train(settings, across, "two", 3, f"resume_from={across / 'one'}", *later)

    for until in ("until=4", "until=6"):  # before the border, and after it
        train(settings, stopped, "one", 8, GROWS, until)
    train(settings, stopped, "one", 8, GROWS)

    tables = [read_metrics(folder / "logs") for folder in (inside, across, stopped)]
    for key in ("loss", "lr", "grad_norm", "tokens"):
        columns = [[row[key] for row in table] for table in tables]
        assert columns[0] == columns[1] == columns[2], key
    assert [row["tokens"] for row in tables[0]] == [
        *(512 * step for step in range(1, 6)),
        *(5 * 512 + 1024 * step for step in range(1, 4)),
    ]
    assert [row["batch_tokens"] for row in tables[0]] == 5 * [512] + 3 * [1024]
    states = [
        read_state(folder / phase / "step_8", tmp_path / "s.pt")
        for folder, phase in ((inside, "one"), (across, "two"), (stopped, "one"))
    ]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
