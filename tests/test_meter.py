"""The tokens/s meter, with a clock that only tests advance."""

import pytest
import torch
from conftest import ROOT

from data.dataloader import Batch, Step
from training import meter, setup
from training.config import load
from training.loop import train
from training.meter import Meter, flops_per_token
from training.objectives import next_token
from training.ops.profiling import dry_run

# Seconds a step.
DATA, COMPUTE, UPDATE, VALIDATION, SAVE, LOGGING = (
    3.0,
    5.0,
    0.5,
    100.0,
    1000.0,
    10_000.0,
)
STEPS, TOKENS = 4, 4 * 16


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


class Saves:
    """Replaces Checkpointer: saving takes long."""

    failed = False

    def __init__(self, clock):
        self.clock, self.saved = clock, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def save(self, state, metric=None, **_):
        self.clock.spend(SAVE)
        self.saved += 1


class Log:
    """Replaces the log: records rows, and takes long."""

    def __init__(self, clock):
        self.clock, self.rows = clock, []

    def open(self, *_):
        pass

    def metrics(self, values, last):
        self.clock.spend(LOGGING)
        self.rows.append(values)


def run_with(clock, tmp_path, objective_takes=lambda call: COMPUTE / 2, dry=False):
    """Train STEPS steps of two micro-batches; saves, log and data take time; return log rows."""
    settings = [
        "parallel.dtype=float32",
        "schedule={warmup_steps: 1, total_steps: 9, decay_steps: 0}",
        "checkpoint={every: 2}",
    ]
    where = [f"log_dir={tmp_path}", f"output_dir={tmp_path}"]
    run = load(
        ROOT / "configs" / "test_mode.yaml",
        [f"steps={STEPS}", "validation={every: 2}", *settings, *where],
    )
    inner, calls = next_token(0.0), []

    class Loader:
        def at(self, batch_index):
            clock.spend(DATA)
            text = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(batch_index))
            batch = Batch(text[:, :-1], text[:, 1:], torch.zeros(2, 16, dtype=torch.int32))
            return Step([batch, batch], TOKENS, TOKENS)

    def objective(model, batch):
        clock.spend(objective_takes(len(calls)))
        calls.append(1)
        return inner(model, batch)

    def evaluate(model):
        clock.spend(VALIDATION)
        return {"all": {"loss": 1.0}}

    log, checkpointer = Log(clock), Saves(clock)
    with setup.ranks() as device:
        state = setup.build(run, device)
        state.phase_end = STEPS
        state.optimizer.register_step_pre_hook(lambda *_: clock.spend(UPDATE))
        if dry:
            dry_run(run, state, device, objective)
        assert train(run, state, Loader(), objective, checkpointer, log, evaluate) == 0
    assert checkpointer.saved == 2 and sum("val/loss" in row for row in log.rows) == 2
    return log.rows


def test_data_compute_and_update_count_and_what_lies_between_steps_does_not(clock, tmp_path):
    rows = run_with(clock, tmp_path)
    step = DATA + COMPUTE + UPDATE
    assert [row["step_s"] for row in rows] == [
        step
    ] * STEPS  # also after steps that validated and saved
    assert [row["tokens_per_s"] for row in rows] == [TOKENS / step] * STEPS
    assert [row["data/wait_frac"] for row in rows] == [DATA / step] * STEPS
    total_seconds = STEPS * (step + LOGGING) + 2 * (VALIDATION + SAVE)
    assert clock.now == total_seconds  # only the test advances the clock


@pytest.mark.parametrize("dry", [True, False])
def test_what_compiles_in_the_dry_run_is_in_no_step(clock, tmp_path, dry):
    """torch.compile runs at a block's first call: in the dry run, else in the first step."""
    rows = run_with(clock, tmp_path, lambda call: 600.0 if call == 0 else COMPUTE / 2, dry)
    step = DATA + COMPUTE + UPDATE
    assert [row["step_s"] for row in rows] == [step if dry else step - COMPUTE / 2 + 600.0] + [
        step
    ] * (STEPS - 1)


def test_mfu_is_of_each_gpu_and_only_where_its_peak_is_known(clock, monkeypatch):
    shape = load(ROOT / "configs" / "base_1b.yaml").model
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70e9)
    figures = Meter(shape, 4096, 2, torch.device("cuda", 0))
    figures.start()
    clock.spend(1.0)
    measured = figures.stop(131_072)
    assert (
        measured["mfu"]
        == pytest.approx(131_072 / 2 * flops_per_token(shape, 4096) / 989e12)
        == pytest.approx(0.558, abs=1e-3)
    )
    assert measured["memory_gb"] == 70.0
    figures = Meter(shape, 4096, 1, torch.device("cpu"))
    clock.spend(1.0)
    assert "mfu" not in figures.stop(1)
