"""Scaling forecast: the fit against scipy, coverage of intervals, runs of a folder, the planner."""

import csv
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import ROOT, complaint_of
from scipy import optimize

from lab.experiment import check, load_experiment, make_trial
from lab.scaling import hold_out_largest, read_runs
from models.nanollama import ModelConfig, NanoLlama
from scripts import forecast as command
from scripts import plan as plan_command
from training.planning import published, scaling_law
from training.planning.forecast_text import forecast_text
from training.planning.plan import load_plan
from training.planning.scaling_law import (
    HUBER,
    PRIOR_CENTRE,
    PRIOR_SD,
    Run,
    fit,
    fit_many,
    load_law,
    non_embedding_parameters,
)

TRUTH = {"E": 1.8, "A": 0.8, "B": 1.5, "alpha": 0.35, "beta": 0.37}  # at 1e6 and 4e5
SIZES = [0.55e6, 1.2e6, 1.6e6, 3.0e6, 3.7e6]
BUDGETS = [245_760, 491_520, 983_040]
LARGEST = (5_700_000, 1_638_400)
CELLS = [(int(size), tokens) for size in SIZES for tokens in BUDGETS]
PAIRS = np.repeat(np.array(CELLS, dtype=float), 2, axis=0)  # two seeds


def true_loss(parameters, tokens, values=TRUTH):
    return (
        values["E"]
        + values["A"] * (1e6 / parameters) ** values["alpha"]
        + values["B"] * (4e5 / tokens) ** values["beta"]
    )


def noisy(rng, sets: int, noise: float, misfit: float = 0.0, values=TRUTH) -> np.ndarray:
    """Log losses [sets, runs] with noise of seeds and of cells."""
    cells = misfit * rng.standard_normal((sets, len(CELLS)))
    exact = np.log(true_loss(PAIRS[:, 0], PAIRS[:, 1], values))
    return exact + noise * rng.standard_normal((sets, len(PAIRS))) + np.repeat(cells, 2, axis=1)


def runs_of(noise: float = 0.004, seeds: int = 2, cells=(*CELLS, LARGEST)) -> list[Run]:
    rng = np.random.default_rng(3)
    return [
        Run(f"{n}-{d}", seed, n, d, true_loss(n, d) * math.exp(noise * rng.standard_normal()))
        for n, d in cells
        for seed in range(seeds)
    ]


def test_the_fit_minimizes_what_scipy_minimizes():
    """Hoffmann's objective, with the prior, by another optimizer and written out again."""
    log_losses = noisy(np.random.default_rng(0), 1, 0.005)[0]
    log_losses[[3, 11]] += 0.05  # outliers, which the Huber loss must not follow
    [law] = fit_many(PAIRS[:, 0], PAIRS[:, 1], log_losses[None], draws=0)
    centre = PRIOR_CENTRE + np.r_[np.full(3, log_losses.min()), 0, 0]
    n0, d0 = law.reference

    def residuals(theta):
        e, size, data, alpha, beta = np.exp(theta)
        model = e + size * (n0 / PAIRS[:, 0]) ** alpha + data * (d0 / PAIRS[:, 1]) ** beta
        return (np.log(model) - log_losses) / law.seed_sd

    def objective(theta):
        absolute = np.abs(residuals(theta))
        huber = np.where(absolute < HUBER, absolute**2 / 2, HUBER * (absolute - HUBER / 2))
        return huber.sum() + (((theta - centre) / PRIOR_SD) ** 2).sum() / 2

    best = min(
        (
            optimize.minimize(objective, centre + shift, method="BFGS", options={"gtol": 1e-8})
            for shift in (np.zeros(5), np.array([0.3, 0, 0, -0.4, 0.4]))
        ),
        key=lambda result: result.fun,
    )
    assert objective(np.log(law.best)) <= best.fun + 1e-6
    assert np.log(law.best) == pytest.approx(best.x, abs=2e-3)
    squares = optimize.least_squares(lambda theta: residuals(theta), centre)
    assert objective(np.log(law.best)) < objective(squares.x)


def test_it_recovers_a_law_without_noise():
    wide = [(int(n), int(d)) for n in np.geomspace(1e6, 1e9, 7) for d in np.geomspace(1e6, 1e9, 7)]
    law = fit(runs_of(0, 2, wide), draws=100)
    assert law.constants["E"] == pytest.approx(TRUTH["E"], rel=0.01)
    for name, (reference, scale) in {"alpha": ("A", 1e6), "beta": ("B", 4e5)}.items():
        assert law.constants[name] == pytest.approx(TRUTH[name], rel=0.02)
        amount = law.constants[reference] / scale ** law.constants[name]
        assert amount == pytest.approx(TRUTH[reference], rel=0.02)
    assert max(law.prior_share.values()) < 0.1 and law.seed_sd == scaling_law.MIN_SEED_SD


@pytest.mark.parametrize("misfit", [0.0, 0.005])
def test_the_intervals_cover_as_often_as_they_say(misfit):
    """100 repetitions: the nominal 95 % within four standard errors, and the width is of use."""
    rng, noise, sets = np.random.default_rng(5), 0.004, 100
    laws = fit_many(PAIRS[:, 0], PAIRS[:, 1], noisy(rng, sets, noise, misfit), draws=60)
    expected = true_loss(*LARGEST)
    measured = expected * np.exp(
        misfit * rng.standard_normal(sets) + noise / math.sqrt(2) * rng.standard_normal(sets)
    )
    near = np.array([law.interval(*LARGEST, seeds=2) for law in laws])
    far = np.array([law.interval(1e9, 30e9) for law in laws])
    for intervals, values in ((near, measured), (far, np.full(sets, true_loss(1e9, 30e9)))):
        inside = (intervals[:, 0] <= values) & (values <= intervals[:, 1])
        assert 0.87 <= inside.mean() <= 1
    assert np.mean([law.seed_sd for law in laws]) == pytest.approx(noise, rel=0.1)
    assert np.mean([law.misfit_sd for law in laws]) == pytest.approx(misfit, abs=0.0015)
    assert (near[:, 1] - near[:, 0]).mean() < 0.07 * expected
    # Far from the runs the interval is wide: it must not claim what the runs cannot know.
    assert (far[:, 1] - far[:, 0]).mean() > 0.3 * true_loss(1e9, 30e9)


def test_the_interval_of_a_measured_mean_has_the_noise_of_seeds_and_misfit():
    [law] = fit_many(PAIRS[:, 0], PAIRS[:, 1], noisy(np.random.default_rng(1), 1, 0.004, 0.006))
    certain = replace(law, draws=np.tile(law.best, (20_000, 1)))
    low, high = certain.interval(*LARGEST)
    assert low == high == pytest.approx(law.loss(*LARGEST)) and law.misfit_sd > 0.002
    low, high = certain.interval(*LARGEST, seeds=3)
    noise = math.hypot(law.seed_sd / math.sqrt(3), law.misfit_sd)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * noise, rel=0.03)


def test_intervals_that_ignore_the_prior_would_be_too_narrow(monkeypatch):
    losses = noisy(np.random.default_rng(7), 40, 0.01)
    widths = []
    for scale in (1.0, 0.0):
        if not scale:
            monkeypatch.setattr(scaling_law, "_resample", keep_centre(scaling_law._resample))
        laws = fit_many(PAIRS[:, 0], PAIRS[:, 1], losses, draws=60)
        widths.append(np.mean([np.ptp(law.interval(1e9, 30e9)) for law in laws]))
    assert widths[1] < 0.75 * widths[0]


def keep_centre(resample):
    def same(cells, centre, draws):
        weights, _ = resample(cells, centre, draws)
        return weights, np.tile(centre, (draws, 1))

    return same


def test_too_few_runs_are_refused():
    for runs, problem in (
        (runs_of(cells=CELLS[:12]), "4 sizes and needs at least 5"),
        (runs_of(cells=CELLS[::3]), "1 token budgets and needs at least 2"),
        (runs_of(cells=[CELLS[0], CELLS[4], *CELLS[6::3]]), "5 pairs of size and budget and"),
        (runs_of(seeds=1), "1 seeds per pair and needs at least 2"),
        ([], "0 sizes"),
        ([*runs_of(), Run("bad", 0, *CELLS[0], math.nan)], "loss of bad is not a positive number"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            fit(runs)


def test_non_embedding_parameters_are_those_of_the_model():
    for changes in ({}, {"tie_word_embeddings": True}, {"qk_norm": True}):
        config = ModelConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **changes,
        )
        named = NanoLlama(config).named_parameters()
        expected = sum(p.numel() for name, p in named if "embed" not in name and "head" not in name)
        assert non_embedding_parameters(config) == expected


# runs of a folder


def model(parameters: int) -> dict:
    """A model section; the sizes of CELLS are replaced by those of real models."""
    width = 16 * (1 + list(SIZES).index(parameters)) if parameters in SIZES else 128
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return {"vocab_size": 64, **shape, **heads}


def size_of(parameters: int) -> int:
    return non_embedding_parameters(ModelConfig(**model(parameters)))


@pytest.fixture
def logs(tmp_path):
    """Write logs/lab/scaling, as scripts.experiment does."""
    folder = tmp_path / "logs" / "lab" / "scaling"
    for run in runs_of():
        logs = folder / f"{run.name}-{run.seed}"
        logs.mkdir(parents=True)
        state = {"status": "finished", "variant": run.name, "seed": run.seed}
        (logs / "trial.json").write_text(json.dumps(state))
        (logs / "base.config.yaml").write_text(yaml.safe_dump({"model": model(run.parameters)}))
        loss = true_loss(size_of(run.parameters), run.tokens) + 0.01 * run.seed
        rows = [
            {"step": 1, "tokens": 2048, "val/loss": 9.0},
            {"step": 2, "tokens": run.tokens, "val/loss": loss},
        ]
        (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, state in (("x-0-pilot", "finished"), ("y-0", "failed"), ("z-0.old1", "finished")):
        (folder / name).mkdir()
        values = {"status": state, "variant": name.split("-")[0], "seed": 0}
        (folder / name / "trial.json").write_text(json.dumps(values))
    return folder


def test_logs_and_record_give_the_same_runs(logs, tmp_path):
    runs = read_runs(logs, "val/loss")
    assert len(runs) == 2 * (len(CELLS) + 1) and runs[-1].tokens == LARGEST[1]
    assert {run.parameters for run in runs} == {size_of(n) for n in [*SIZES, LARGEST[0]]}
    record = tmp_path / "records" / "today_scaling"
    (record / "configs").mkdir(parents=True)
    with open(record / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "metric", "step", "tokens", "seconds", "value"])
        for run in runs:
            for metric, value in (("val/loss", 9.0), ("val/other", 1.0), ("val/loss", run.loss)):
                writer.writerow([run.name, run.seed, metric, 1, f"{run.tokens:.0f}", 1, value])
            folder = logs / f"{run.name}-{run.seed}"
            text = (folder / "base.config.yaml").read_text()
            (record / "configs" / f"{run.name}.yaml").write_text(text)
    assert read_runs(record, "val/loss") == runs
    with pytest.raises(ValueError, match=r"no finished run with val/bpb; give logs/lab/NAME"):
        read_runs(record, "val/bpb")


def test_the_largest_run_has_no_part_in_its_forecast():
    runs = runs_of()
    held_out = hold_out_largest(runs, 100, "val/loss")
    assert [run.cell for run in held_out.runs] == [LARGEST] * 2
    changed = [run._replace(loss=2 * run.loss) if run.cell == LARGEST else run for run in runs]
    other = hold_out_largest(changed, 100, "val/loss")
    assert (other.predicted, other.interval) == (held_out.predicted, held_out.interval)
    assert held_out.is_inside and not other.is_inside
    assert held_out.measured == pytest.approx(np.mean([run.loss for run in held_out.runs]))


def test_the_command_and_the_planner(logs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    arguments = [str(logs), "--draws", "100", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--predict", "1e9", "3e10"])
    command.main()
    text = capsys.readouterr().out
    assert "inside the interval" in text and "fitted without them" in text
    assert re.search(r"1e\+09 parameters, 3e\+10 tokens: \S+ \[\S+, \S+\]; ", text)
    values = json.loads((output / "forecast.json").read_text())
    assert values["held_out"]["inside"] and len(values["runs"]) == 32
    assert (output / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert "| beta |" in (output / "forecast.md").read_text()
    law = load_law(output / "forecast.json")
    again = fit(read_runs(logs, "val/loss"), 100)
    assert law.interval(1e9, 3e10) == pytest.approx(again.interval(1e9, 3e10), rel=1e-3)
    # --predict has the interval of the expected loss; the held-out runs are judged with noise.
    predicted, judged = (tuple(values[key]["interval"]) for key in ("predicted", "held_out"))
    assert predicted == pytest.approx(again.interval(1e9, 3e10))
    held_out = hold_out_largest(read_runs(logs, "val/loss"), 100, "val/loss")
    cell = held_out.runs[0].cell
    assert judged == pytest.approx(held_out.law.interval(*cell, seeds=2))
    expected = held_out.law.interval(*cell)
    assert judged[1] - judged[0] > expected[1] - expected[0]
    monkeypatch.chdir(ROOT)
    flags = ["configs/plan_1b.yaml", "--forecast", str(output / "forecast.json")]
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--json"])
    plan_command.main()
    report = json.loads(capsys.readouterr().out)
    last = report["phases"][-1]["scaling_law"]
    size = 1_100_048_384 - 2 * 32_000 * 2048
    assert last["parameters"] == size and last["tokens"] == report["total"]["tokens"]
    assert last["tokens_factor"] == pytest.approx(last["tokens"] / LARGEST[1])
    assert last["interval"] == pytest.approx(law.interval(size, last["tokens"]))
    text = forecast_text(report)
    assert text.count("  own runs ") == 4 and text.count("perplexity") > 4
    assert f"extrapolated {size / law.parameters[1]:,.0f} x in parameters" in text
    (output / "bad.json").write_text(json.dumps({**values, "law": {"best": [1]}}))
    complaint = complaint_of(
        plan_command.main, [flags[0], "--forecast", output / "bad.json"], capsys, monkeypatch
    )
    assert "bad.json: it is not a law" in complaint
    for path in sorted(logs.glob("*-1")):
        (path / "trial.json").unlink()
    complaint = complaint_of(command.main, [str(logs)], capsys, monkeypatch)
    assert "1 seeds per pair and needs at least 2" in complaint


def test_targets_of_the_timeline():
    plan = load_plan(ROOT / "configs" / "plan_1b.yaml")
    loss = {"perplexity": 11.8}
    outlook = published.target_outlook(plan.targets, 1_100_048_384, 30e9, loss)
    plausible = {entry["title"].split(",")[0]: entry["plausible"] for entry in outlook}
    assert plausible == {
        "Perplexity on held-out text": True,
        "HellaSwag": True,
        "ARC challenge": True,
        "TruthfulQA mc2": True,
        "MMLU": False,
        "GSM8K": False,
    }
    assert published.target_outlook(plan.targets, 5_000_000, 30e9, loss) == []
    assert published.target_outlook(plan.targets, 1_100_048_384, 3e12, loss) == []
    page = (ROOT / "docs" / "forecast.md").read_text(encoding="utf-8")
    for metric, (low, high, _) in published.PUBLISHED.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{metric}` |"))
        assert f"{100 * low:.1f} to {100 * high:.1f}" in row


def test_the_shipped_experiment_has_enough_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = load_experiment("configs/lab/scaling.yaml")
    check(experiment, experiment.variants)
    runs = []
    for name in experiment.variants:
        trial = make_trial(experiment, name, 0)
        config = trial.settings["config"]
        values = {**config["model"]}
        values.pop("rope_theta", None)
        parameters = non_embedding_parameters(ModelConfig(**values))
        tokens = trial.steps * config["data"]["tokens_per_step"]
        assert f"{parameters / 1e6:.2g}M-{trial.steps}" == name.replace(".0M", "M") or (
            f"{parameters / 1e6:.1f}M-{trial.steps}" == name
        )
        runs += [Run(name, seed, parameters, tokens, 4.0) for seed in experiment.seeds]
    largest = max(runs, key=lambda run: run.compute).cell
    assert largest[0] == max(run.parameters for run in runs)
    assert largest[1] == max(run.tokens for run in runs)
    scaling_law.check_runs([run for run in runs if run.cell != largest])
