"""W&B and TensorBoard: chart names, one W&B run over restarts and phases, evaluations, samples."""

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, read_metrics, train_here
from sinks import FakeTensorboard, FakeWandb

from files import read_lines
from training import trackers
from training.curves import SCHEDULED
from training.logger import Log, LogConfig, append_event, log_in
from training.trackers import chart_name, charts, gate_table, record_evaluation, scores

GROUPS = ("train/", "val/", "perf/", "optim/", "data/", "model/", "experts/")
ROW = {"phase": "p", "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "tokens_per_s": 3.0, "end": 9}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {**ROW, "step": step, "step_s": 0.5, **more}


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def board(monkeypatch) -> FakeTensorboard:
    module = FakeTensorboard()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module


# chart names


def documented_keys() -> set[str]:
    """Return the keys of metrics.jsonl in the tables of the documentation."""
    keys = set[str]()
    for name in ("training", "sft", "dpo", "moe"):
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        heading = r"\| (?:Key|Key in `metrics.jsonl`|Metric) \| Meaning .*\n\|[-:|]+\n"
        tables = re.findall(rf"^{heading}((?:\|.*\n)+)", text, flags=re.MULTILINE)
        for line in "".join(tables).splitlines():
            cell = line.split("|")[1]
            keys |= {key for key in re.findall(r"`([^`]+)`", cell) if "." not in key}
    return keys - {"schedules", "val/SOURCE/loss", "perplexity", "bits_per_byte"}


def test_every_metric_of_the_documentation_has_a_chart_of_a_group():
    keys = documented_keys() | set(SCHEDULED)
    assert {"loss", "tokens_per_s", "rewards/accuracies", "max_violation", "lr", "lr.head"} <= keys
    names = {key: chart_name(key) for key in keys - set(trackers.NOT_CHARTS)}
    assert all(name.startswith(GROUPS) for name in names.values())
    assert len(set(names.values())) == len(names)  # no two metrics in one chart
    assert names["loss"] == "train/loss" and names["kl_per_token"] == "train/kl_per_token"
    assert names["step_s"] == "perf/step_seconds" and names["lr.head"] == "optim/lr_factor_head"
    assert names["data/wait_frac"] == "perf/data_wait_fraction"
    assert chart_name("val/a.b/bits_per_byte") == "val/a.b/bits_per_byte"


def test_every_metric_of_a_real_run_is_charted_once(settings, tmp_path, wandb, board):
    scheduled = "{lr.head: {points: [[0, 1], [6, 0.5]]}, beta2: {points: [[0, 0.9], [6, 0.95]]}}"
    more = ["log={every: 1, wandb_project: p, tensorboard: true}", f"schedules={scheduled}"]
    assert train_here(settings(*more, "validation={every: 3, rows: 4, before: true}"))
    rows = read_metrics(tmp_path / "logs")
    keys = {key for row in rows for key in row} - set(trackers.NOT_CHARTS)
    assert {"loss", "grad_norm", "memory_gb", "lr.head", "val/first/bits_per_byte"} <= keys
    for last in (wandb.points[-1], rows[-1]):
        assert last["step"] == 6
    assert {chart_name(key): rows[-1].get(key) for key in keys} | {"step": 6} == wandb.points[-1]
    assert [step for step, _ in wandb.series("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in wandb.series("val/loss")] == [0, 3, 6]  # before the first step, too
    for name in wandb.points[-1].keys() - {"step"}:
        assert name.startswith(GROUPS) and board.scalars[name] == wandb.series(name), name
    assert wandb.config["optim"]["lr"] > 0 and wandb.config["phases"]["one"]["steps"] == 6
    environment = json.loads((tmp_path / "logs" / "one.environment.json").read_text())
    assert wandb.config["environment"] == environment and "git" in environment


def test_numbers_of_a_row_and_of_nested_scores():
    values = charts(row(1, expert_load=[[0.5, 1.5], [0.2, 1.8]], batch_index=3))
    assert values["experts/load_min"] == 0.2 and values["experts/load_max"] == 1.8
    assert values["data/batch_index"] == 3 and not any("phase" in name for name in values)
    metrics = {
        "hellaswag": {"acc_norm": {"value": 0.4, "stderr": 0.1, "n": 9}},
        "wiki": {"perplexity": 12.5, "tokens": 7},
        "mmlu": {"stem": {"acc": {"value": 0.3}}},
        "note": "text",
    }
    assert scores(metrics, "eval") == {
        "eval/hellaswag/acc_norm": 0.4,
        "eval/wiki/perplexity": 12.5,
        "eval/wiki/tokens": 7,
        "eval/mmlu/stem/acc": 0.3,
    }


# one W&B run


def test_restarts_and_phases_continue_one_wandb_run_and_lose_no_point(tmp_path, wandb, capfd):
    config = LogConfig(every=2, wandb_project="proj")
    starts = (("one", 0, {"steps": 8}), ("one", 4, {"steps": 8}), ("two", 8, {"steps": 4}))
    for phase, start, settings in starts:
        (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump({phase: settings}))
        with Log(tmp_path, config, True, {"run": "name", "phase": phase, **settings}) as log:
            log.open(start, start + 4, phase)
            for step in range(start + 1, start + 7):
                log.metrics(row(step, loss=float(100 * start + step)))
            log.close()  # a second close has no effect
    ids = {options["id"] for options in wandb.inits}
    assert len(wandb.inits) == 3 and len(ids) == 1
    for options in wandb.inits:
        assert options["resume"] == "allow" and options["dir"] == str(tmp_path)
        assert (options["project"], options["name"], options["group"]) == ("proj", "name", "name")
    assert wandb.metrics == {"step": {"hidden": True}, "*": {"step_metric": "step"}}
    logged = [step for step, _ in wandb.series("train/loss")]
    assert logged == [2, 4, 6, 6, 8, 10, 10, 12, 14]  # steps that ran again are there twice
    assert wandb.ended == [0, 0, 0]
    assert wandb.config["steps"] == 4 and wandb.config["phases"] == {"two": {"steps": 4}}
    url = f"https://wandb.example/proj/{ids.pop()}"
    assert (tmp_path / "wandb_run_urls.txt").read_text() == f"{url}\n"
    assert capfd.readouterr().out.count(f"W&B: {url}\n") == 3 and wandb.silent


def test_another_run_or_project_in_the_folder_is_another_wandb_run(tmp_path, wandb):
    def start(project: str, identity: str) -> str:
        (tmp_path / "run.json").write_text(json.dumps({"id": identity, "folders": {}}))
        with Log(tmp_path, LogConfig(wandb_project=project), True, {"run": "r"}) as log:
            log.open(0, 9, "p")
        return wandb.inits[-1]["id"]

    first = start("a", "1")
    assert start("a", "1") == first
    second = start("b", "1")
    third = start("b", "2")  # the metrics of the first run were renamed
    assert len({first, second, third}) == 3 and start("b", "2") == third


def test_a_stage_has_a_wandb_run_of_its_own_and_a_given_name_stays(tmp_path, wandb):
    for folder, phase, name in ((tmp_path / "sft", "sft", None), (tmp_path, "base", "mine")):
        config = LogConfig(wandb_project="p", wandb_run_name=name)
        with Log(folder, config, True, {"run": "r"}) as log:
            log.open(0, 9, phase)
    with Log(tmp_path, LogConfig(wandb_project="p"), True, {"run": "r"}) as log:
        log.open(9, 12, "gold")
    sft, base, gold = wandb.inits
    assert (sft["name"], sft["group"], sft["job_type"]) == ("r/sft", "r", "sft")
    assert (base["name"], base["job_type"]) == ("mine", None) and gold["name"] == "mine"
    assert sft["id"] != base["id"] == gold["id"]


def test_a_failed_run_ends_with_status_1_and_a_finished_one_opens_nothing(tmp_path, wandb):
    config = LogConfig(wandb_project="p")
    with pytest.raises(RuntimeError), Log(tmp_path, config, True, {}) as log:
        log.open(8, 9, "p")
        raise RuntimeError
    assert wandb.ended == [1]
    with Log(tmp_path, config, True, {}):
        pass  # restarting a finished run trains nothing
    assert len(wandb.inits) == 1


def test_offline_and_disabled(tmp_path, wandb, capfd):
    wandb.mode = "offline"
    for _ in range(2):
        with Log(tmp_path, LogConfig(wandb_project="p"), True, {}) as log:
            log.open(0, 9, "p")
    line = f"offline; send it with wandb sync {tmp_path}/wandb\n"
    assert (tmp_path / "wandb_run_urls.txt").read_text() == line
    assert capfd.readouterr().out == f"W&B: {line}" * 2
    wandb.mode = "disabled"
    with Log(tmp_path / "off", LogConfig(wandb_project="p"), True, {}) as log:
        log.open(0, 9, "p")
    assert capfd.readouterr().out == "" and not (tmp_path / "off" / "wandb.json").exists()


def test_a_tracker_that_fails_during_training_is_one_warning(tmp_path, wandb, board, capfd):
    config = LogConfig(every=1, wandb_project="p", tensorboard=True)
    with Log(tmp_path, config, True, {}) as log:
        log.open(0, 9, "p")
        log.metrics(row(1))
        wandb.error = "the service\nis gone"
        for step in (2, 3):
            log.metrics(row(step))
    assert [step for step, _ in wandb.series("train/loss")] == [1]
    assert [step for step, _ in board.scalars["train/loss"]] == [1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    warnings = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        f"warning: W&B: nothing more is logged (the service is gone); {tmp_path} has it all"
    ]


def test_a_wandb_that_does_not_start_is_a_sentence(tmp_path, wandb):
    wandb.error = "no\nserver"
    log = Log(tmp_path, LogConfig(wandb_project="p"), True, {})
    with pytest.raises(ValueError, match=r"W&B cannot be used \(no server\); run `wandb login`"):
        log.open(0, 9, "p")


def test_a_sink_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    for name, config in (
        ("wandb", LogConfig(wandb_project="p")),
        ("tensorboard", LogConfig(tensorboard=True)),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"torch.utils.{name}", None)
        with pytest.raises(ValueError, match=f"{name} is not installed; run pip install {name}"):
            Log(tmp_path, config, True, {})


def test_log_in_asks_only_if_there_is_no_key(wandb):
    asked = []

    def login(prompt: bool = True) -> bool:
        asked.append((prompt, wandb.silent))
        return has_key

    wandb.login = login
    wandb.termsetup = lambda settings, logger: setattr(wandb, "silent", settings.silent)
    has_key = True
    log_in(LogConfig())
    log_in(LogConfig(wandb_project="p"))
    assert asked == [(False, True)]
    has_key = False
    log_in(LogConfig(wandb_project="p"))
    assert asked[1:] == [(False, True), (True, False)] and wandb.silent  # its questions are shown
    wandb.mode = "offline"
    log_in(LogConfig(wandb_project="p"))
    assert len(asked) == 3


def test_tables_that_fail_end_only_the_tables(tmp_path, wandb, capfd):
    wandb.Table = lambda **_: 1 / 0
    with Log(tmp_path, LogConfig(every=1, wandb_project="p"), True, {}) as log:
        log.open(0, 9, "p")
        for step in (1, 2):
            with open(tmp_path / "samples.jsonl", "a") as file:
                file.write('{"title": "t", "prompt": "p", "reply": "r"}\n')
            log.metrics(row(step, **{"val/loss": 1.0}))
    assert [step for step, _ in wandb.series("val/loss")] == [1, 2]
    assert (
        capfd.readouterr().out.count("W&B tables: nothing more is logged (division by zero)") == 1
    )


# TensorBoard


def test_tensorboard_shows_one_curve_over_a_resume(tmp_path, board):
    for start, loss in ((0, 1.0), (2, 5.0)):
        with Log(tmp_path, LogConfig(every=1, tensorboard=True), True, {}) as log:
            log.open(start, 4, "p")
            for step in range(start + 1, start + 4):
                log.metrics(row(step, loss=loss))
    curve = [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0), (5, 5.0)]
    assert board.scalars["train/loss"] == curve
    assert board.opened == [(str(tmp_path / "tensorboard"), step) for step in (1, 3)]


def test_the_real_tensorboard_shows_one_curve_over_a_resume(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    for start, loss in ((0, 1.0), (2, 5.0)):
        with Log(tmp_path, LogConfig(every=1, tensorboard=True), True, {}) as log:
            log.open(start, 4, "p")
            for step in range(start + 1, start + 4):
                log.metrics(row(step, loss=loss))
    record_evaluation(tmp_path, 5, {"task": {"acc": 0.5}}, tmp_path / "events.jsonl")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "optim/lr", "perf/tokens_per_second"} <= set(events.Tags()["scalars"])
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0), (5, 5.0)]
    assert [event.value for event in events.Scalars("eval/task/acc")] == [0.5]


# evaluations, gates and samples

GATES = [
    {"metric": "hellaswag.acc", "go": 0.4, "no_go": 0.3},
    {"metric": "wiki.perplexity", "go": 15.0, "no_go": 17.0, "against": "before"},
]


def decide(folder: Path, step: int | str, *values: float | None, **more: Any) -> None:
    decision = {"outcome": "go", "accepted": None, "verdicts": ["go", "caution"], **more}
    append_event(folder, "gate", "text", step=step, gates=GATES, values=values, **decision)


def test_a_plans_evaluation_continues_the_run_with_scores_and_all_gates(tmp_path, wandb, board):
    config = LogConfig(every=1, wandb_project="p", tensorboard=True)
    with Log(tmp_path, config, True, {"run": "r"}) as log:
        log.open(0, 9, "p")
        log.metrics(row(1))
    decide(tmp_path, 5, 0.5, 14.0)
    decide(
        tmp_path, "sft", 0.2, None, outcome="no-go", accepted="as | it is", verdicts=["no-go"] * 2
    )
    append_event(tmp_path, "gate", "of an older version", step=1, outcome="go")
    metrics = {"hellaswag": {"acc": {"value": 0.5, "stderr": 0.1}}}
    record_evaluation(tmp_path, 5, metrics, tmp_path / "events.jsonl")
    record_evaluation(tmp_path, 5, metrics, tmp_path / "none.jsonl", "eval_average")
    training, evaluation, average = wandb.inits
    assert training["id"] == evaluation["id"] == average["id"] and evaluation["name"] == "r"
    assert wandb.series("eval/hellaswag/acc") == board.scalars["eval/hellaswag/acc"] == [(5, 0.5)]
    assert wandb.series("eval_average/hellaswag/acc") == [(5, 0.5)]
    [(step, table)] = wandb.series("gates/decisions")
    assert step == 5 and table.columns[:3] == ["where", "metric", "value"]
    assert table.data == [
        ["at step 5", "hellaswag.acc", 0.5, 0.4, 0.3, "", "go", "go"],
        ["at step 5", "wiki.perplexity", 14.0, 15.0, 17.0, "before", "caution", "go"],
        ["after sft", "hellaswag.acc", 0.2, 0.4, 0.3, "", "no-go", "no-go, accepted"],
        ["after sft", "wiki.perplexity", None, 15.0, 17.0, "before", "no-go", "no-go, accepted"],
    ]
    [(_, text)] = board.texts["gates/decisions"]
    assert text.splitlines()[1:3] == [
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| at step 5 | hellaswag.acc | 0.5 | 0.4 | 0.3 |  | go | go |",
    ]
    assert wandb.ended == [0, 0, 0]


def test_an_evaluation_that_cannot_be_sent_is_a_warning_and_other_folders_get_none(
    tmp_path, wandb, capfd
):
    record_evaluation(tmp_path, 5, {"a": {"b": 1.0}}, tmp_path / "events.jsonl")
    assert not wandb.inits and capfd.readouterr().out == ""
    with Log(tmp_path, LogConfig(wandb_project="p"), True, {}) as log:
        log.open(0, 9, "p")
    capfd.readouterr()
    wandb.error = "timeout"
    record_evaluation(tmp_path, 5, {"a": {"b": 1.0}}, tmp_path / "events.jsonl")
    assert "warning: W&B: nothing more is logged (timeout)" in capfd.readouterr().out


def test_gates_without_values_are_left_out():
    assert gate_table([{"event": "gate", "gates": [], "values": [], "outcome": "go"}]).rows == []
    assert gate_table([{"event": "begun"}]).rows == []


def test_new_samples_are_logged_at_each_validation(tmp_path, wandb, board):
    path = tmp_path / "samples.jsonl"

    def write(title: str) -> None:
        reply = {"title": title, "prompt": "a | b", "reply": "one\ntwo"}
        with open(path, "a") as file:
            file.write(json.dumps(reply) + "\n")

    config = LogConfig(every=1, wandb_project="p", tensorboard=True)
    write("of an earlier start")
    with Log(tmp_path, config, True, {}) as log:
        write("sft, batch 0")
        log.event("measured", "before", step=0, **{"val/loss": 2.0})
        log.open(0, 9, "sft")
        log.metrics(row(1))
        write("sft, batch 2")
        log.metrics(row(2, **{"val/own/loss": 1.0}))
        log.metrics(row(3, **{"val/own/loss": 1.0}))
    tables = wandb.series("samples/chat")
    assert [step for step, _ in tables] == [0, 2]
    assert [row[0] for row in tables[1][1].data] == [
        "of an earlier start",
        "sft, batch 0",
        "sft, batch 2",
    ]
    [(_, first), (_, second)] = board.texts["samples/chat"]
    assert second.splitlines()[2:] == ["| sft, batch 2 | a \\| b | one<br>two |"]
    assert "batch 0" in first and "earlier" not in first
    assert wandb.series("val/loss") == [(0, 2.0)] and wandb.series("val/own/loss")[0] == (2, 1.0)


# the real wandb


def records(path: Path) -> Iterator[Any]:
    """Read the records of an offline run: LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


REAL_RUN = """
import math, sys
from pathlib import Path
from training.logger import Log, LogConfig, append_event, log_in
from training.trackers import record_evaluation

folder, start = Path(sys.argv[1]), int(sys.argv[2])
config = LogConfig(every=1, wandb_project="proj")
log_in(config)
run = {"run": "r", "steps": 4, "optim": {"lr": 0.1}}
with Log(folder, config, True, run) as log:
    log.open(start, 4, "p")
    for step in range(start + 1, 5):
        log.metrics({"step": step, "phase": "p", "loss": math.nan if step == 1 else 1.5,
                     "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0, "step_s": 0.5, "end": 4})
gates = [{"metric": "task.acc", "go": 0.4, "no_go": 0.3}]
if start:
    append_event(folder, "gate", "text", step=4, gates=gates, values=[0.5], verdicts=["go"],
                 outcome="go", accepted=None)
    record_evaluation(folder, 4, {"task": {"acc": {"value": 0.5}}}, folder / "events.jsonl")
"""


@pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed; pip install -r requirements.txt"
)
def test_the_real_wandb_offline_is_one_run_over_a_restart_and_prints_one_line(tmp_path):
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env = {**known, "HOME": str(tmp_path), "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "p.environment.json").write_text('{"git": "0123abc"}')
    outputs = []
    for start in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", REAL_RUN, str(folder), str(start)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done)
    for done in outputs:
        assert done.stderr == ""
        first, *rest = done.stdout.splitlines()
        assert first == f"W&B: offline; send it with wandb sync {folder}/wandb"
        assert all(line.startswith("step ") for line in rest)
    files = sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(files) == 3  # two starts of training and an evaluation
    contents = [list(records(path)) for path in files]
    runs = [record.run for content in contents for record in content if record.HasField("run")]
    saved = json.loads((folder / "wandb.json").read_text())
    assert {(run.run_id, run.project, run.display_name, run.run_group) for run in runs} == {
        (saved["id"], "proj", "r", "r")
    }
    points = [
        {
            " ".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for content in contents
        for record in content
        if record.HasField("history")
    ]
    logged = [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 3, 4]
    assert math.isnan(float(str(logged[0][1]))) and logged[-1][1] == 1.5
    [(step, score)] = [(p["step"], p["eval/task/acc"]) for p in points if "eval/task/acc" in p]
    [table] = [point for point in points if "gates/decisions _type" in point]
    assert (step, score) == (4, 0.5) and table["step"] == 4
    assert table["gates/decisions _type"] == "table-file" and table["gates/decisions nrows"] == 1
    config = {
        item.key: json.loads(item.value_json)
        for content in contents
        for record in content
        if record.HasField("config")
        for item in record.config.update
    }
    assert config["steps"] == 4 and config["optim"] == {"lr": 0.1}
    assert config["environment"] == {"git": "0123abc"}
    axes = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for content in contents
        for record in content
        if record.HasField("metric")
    }
    assert axes["*"] == "step"
    assert read_lines(folder / "metrics.jsonl")[0]["loss"] == "nan"
