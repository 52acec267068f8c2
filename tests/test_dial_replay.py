"""Plans of the dial read new text where a later phase replays a source of an earlier one."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, VOCAB

from data.dataloader import PackedDataLoader
from data.store import open_shards
from training.config import RunConfig, load
from training.planning import cpu_plan
from training.planning.cost import TrainingTokens, forecast, readable_tokens
from training.planning.cpu_plan import CORPUS, MAX_DATA_EPOCHS, choose_cpu, cpu_files
from training.planning.dial import Request, choose
from training.planning.dial_data import AVAILABLE, DOWNLOAD_MARGIN, GOALS
from training.planning.forecast_text import forecast_text
from training.planning.plan import Plan, PlanPhase, load_plan
from training.planning.plan_files import (
    Files,
    config_headers,
    continue_sources,
    gpu_files,
    write_plan,
)
from training.planning.probe import Probe

IDLE = Probe(7_000, 2048 / 7_000, 60, 0.15, 4e11, 2e10, 2)
REPEATED = Request("h100", 8, 2000, "code", parameters=4e8)  # reads Python for several epochs
REQUESTS = [
    Request("rtx4090", 1, 48),
    Request("rtx3060", 1, 24, "base"),
    Request("h100", 2, 168),  # with a long-context phase
    Request("h100", 2, 60, "code"),
    REPEATED,
    # 30 steps: its long-context phase is a third longer than its share
    Request("h100", 1, 48, "base", parameters=4e8, tokens=30 * 8_192),
]
LONG = 0.5  # share of a source's tokens in long documents


def plan_of(files: Files) -> Plan:
    write_plan(Path("configs/mine"), files, config_headers("mine", files, "about"))
    return load_plan("configs/mine/plan.yaml")


def store_of(amounts: Mapping[str, float]) -> TrainingTokens:
    """Count the tokens of a store with so many training tokens of each source."""

    def tokens(run: RunConfig) -> dict[str, int]:
        data = run.data
        shares = {name: LONG if name in data.min_document_tokens else 1 for name in data.mix}
        return {name: math.ceil(share * amounts[name]) for name, share in shares.items()}

    return tokens


def reads(report: dict[str, Any]) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """(source, only long documents) -> first and last epoch that each phase reads."""
    epochs: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for phase in report["phases"]:
        for name, source in phase["sources"].items():
            assert source["unread_from"] is None, (phase["phase"], name)
            start, key = source["start_epoch"], (name, bool(source["least_document"]))
            epochs.setdefault(key, []).append((start, start + source["epochs"]))
    return epochs


def check_text(report: dict[str, Any], replays: int) -> None:
    """The forecast as text agrees: `replays` sources continue, none starts again."""
    text = forecast_text(report)
    assert "starts again" not in text and "data.start_epoch" not in text
    assert text.count("; continues at epoch ") == replays


@pytest.mark.parametrize("kept", [1 / DOWNLOAD_MARGIN, 1.0])  # of the downloads, by the filters
@pytest.mark.parametrize("request_", REQUESTS)
def test_phases_on_a_gpu_read_text_once(request_, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = choose(request_)
    plan = plan_of(gpu_files(choice, "mine"))
    store = store_of({name: kept * tokens for name, tokens in choice.downloads.items()})
    report = forecast(plan, request_.gpu, request_.gpus, training_tokens_of=store)
    epochs = reads(report)
    check_text(report, sum(len(phases) - 1 for phases in epochs.values()))
    assert ("fineweb_edu", False) in epochs and len(epochs["fineweb_edu", False]) == len(
        plan.phases
    )
    for (name, _), phases in epochs.items():
        for (_, end), (start, _) in pairwise(phases):
            # No text twice, and of unread text at most the margin is skipped.
            assert end - 1e-6 < start < DOWNLOAD_MARGIN * 1.02 * end, name
    for name, tokens in report["sources"].items():
        downloaded = choice.downloads[name]
        assert downloaded >= DOWNLOAD_MARGIN * tokens * (1 - 1e-9) or downloaded == AVAILABLE[name]
        if downloaded > DOWNLOAD_MARGIN * tokens and (name, False) in epochs:
            assert epochs[name, False][-1][1] <= 1, name  # enough text for all phases


def test_some_plan_reads_a_source_for_several_epochs():
    choice = choose(REPEATED)
    python = choice.downloads["the_stack_python"]
    assert python == AVAILABLE["the_stack_python"] < choice.tokens / 2


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("minutes", [5, 30, 90])
def test_phases_on_the_cpu_read_text_once(goal, minutes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = choose_cpu(minutes, goal, IDLE, prepared=False)
    plan = plan_of(cpu_files(choice, "mine"))
    report = forecast(plan, "h100", 1, training_tokens_of=store_of(CORPUS))
    epochs = reads(report)
    replayed = {"code"} if goal == "code" else {"wikipedia", "factbook", "code"}
    assert {name for (name, _), phases in epochs.items() if len(phases) > 1} == replayed
    check_text(report, len(replayed))
    for name in replayed:
        (_, end), (start, _) = epochs[name, False]
        assert start == pytest.approx(end, rel=1e-7), name
    assert forecast_text(report).count("selects documents anew") == 2  # rows of 1,024
    for name, tokens in report["sources"].items():
        assert tokens <= 1.01 * MAX_DATA_EPOCHS * CORPUS[name]


def test_a_prepared_store_sets_the_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {name: 0.9 * tokens for name, tokens in CORPUS.items()}
    monkeypatch.setattr(cpu_plan, "readable_tokens", store_of(smaller))
    plan = plan_of(cpu_files(choose_cpu(5, "chat", IDLE, prepared=True), "mine"))
    gold = load(plan.phases[-1].config).data.start_epoch
    reads(forecast(plan, "h100", 1, training_tokens_of=store_of(smaller)))
    monkeypatch.setattr(cpu_plan, "readable_tokens", lambda run: {})
    usual = cpu_files(choose_cpu(5, "chat", IDLE, prepared=True), "mine")["gold.yaml"]["data"]
    assert gold == pytest.approx({k: v / 0.9 for k, v in usual["start_epoch"].items()}, rel=1e-4)


def phases_of(folder: Path, store: Path, configs: list[dict[str, Any]]) -> Plan:
    """Write configs of a model of test_mode.yaml; a plan of them."""
    total = sum(config["steps"] for config in configs)
    for number, config in enumerate(configs):
        content = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
        content["data"] |= {"store": str(store)} | config["data"]
        schedule = {"warmup_steps": 2, "total_steps": total, "decay_steps": 4}
        content |= {"phase": f"p{number}", "steps": config["steps"], "schedule": schedule}
        content["model"]["vocab_size"] = VOCAB
        (folder / f"p{number}.yaml").write_text(yaml.safe_dump(content))
    return Plan("p", tuple(PlanPhase(str(folder / f"p{i}.yaml")) for i in range(len(configs))))


def test_the_figures_are_those_of_the_forecast_and_no_row_comes_twice(text_store, tmp_path):
    both = {"first": 1.0, "second": 1.0}
    shards = open_shards(text_store, both, "train", VOCAB)
    stored = {name: len(source) for name, source in shards.items()}
    step = 2048
    third = stored["first"] // step // 4  # steps of a quarter of it
    assert third >= 3

    def configs() -> list[dict[str, Any]]:
        mixes = ({"first": 1.0}, {"first": 1.0}, both)
        return [{"steps": third, "data": {"mix": mix, "tokens_per_step": step}} for mix in mixes]

    continued = configs()
    continue_sources(continued, stored)
    assert "start_epoch" not in continued[0]["data"]
    for number in (1, 2):  # without its own setting, a phase is told the figure that it got
        parts = [*continued[:number], *configs()[number:]]
        report = forecast(
            phases_of(tmp_path, text_store, parts), "h100", 1, training_tokens_of=readable_tokens
        )
        start = continued[number]["data"]["start_epoch"]
        assert list(start) == ["first"]
        said = report["phases"][number]["sources"]["first"]["unread_from"]
        assert said == pytest.approx(start["first"], abs=1e-7) and said > 0.18 * number
        assert f"(data.start_epoch.first={said:.8g} continues)" in forecast_text(report)
    plan = phases_of(tmp_path, text_store, continued)
    reads(forecast(plan, "h100", 1, training_tokens_of=readable_tokens))

    rows: list[int] = []
    for phase in plan.phases:
        run = load(phase.config)
        data = run.data
        loader = PackedDataLoader(
            {name: shards[name] for name in data.mix},
            data.mix,
            data.sequence_length,
            data.rows,
            data.rows,
            run.seed,
            start_epoch=data.start_epoch,
        )
        places = (loader._locate(row) for row in range(run.steps * data.rows))
        rows += [index for source, index in places if loader.names[source] == "first"]
    assert len(rows) > 2 * third * step // data.sequence_length
    assert len(rows) - len(set(rows)) <= 2  # a position is rounded to a row


def test_text_that_a_phase_continues_within_is_named(text_store, tmp_path):
    data = {"mix": {"first": 1.0}, "tokens_per_step": 2048}
    late = [
        {"steps": 6, "data": data},
        {"steps": 2, "data": {**data, "start_epoch": {"first": 0.001}}},
    ]
    plan = phases_of(tmp_path, text_store, late)
    text = forecast_text(forecast(plan, "h100", 1, training_tokens_of=readable_tokens))
    end = 6 * 2048 / len(open_shards(text_store, {"first": 1.0}, "train", VOCAB)["first"])
    said = f"epoch 0.00, within the text of earlier phases (data.start_epoch.first={end:.8g} cont"
    assert said in text and "starts again" not in text
