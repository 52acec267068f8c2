"""Flags of evaluation commands and the demo; the cost forecast of evaluations."""

import math
import os
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, complaint_of, save_tiny, tiny_config

import demo_ui
from evals import eval_gsm8k, eval_needle, eval_tool_use, eval_toxicity
from evals.cost import command_tokens
from scripts import plan as plan_command
from training.config import load
from training.logger import append_event
from training.planning.cards import GPUS
from training.planning.cost import forecast
from training.planning.forecast_text import forecast_text
from training.planning.plan import Milestone, Plan, PlanPhase, load_plan


@pytest.mark.parametrize("name", ["--context", "--context_length"])
@pytest.mark.parametrize(("tests", "depths", "places"), [(12, 5, 5), (7, 1, 1), (3, 11, 3)])
def test_num_tests_counts_tests_at_each_length(text_store, tmp_path, name, tests, depths, places):
    long = save_tiny(tmp_path / "step_1", tiny_config(max_position_embeddings=1024), text_store)
    arguments = [
        "--checkpoint",
        str(long),
        name,
        "700",
        "900",
        "--num_tests",
        str(tests),
        "--depths",
        str(depths),
    ]
    built = eval_needle.build(eval_needle.parser().parse_args(arguments))
    for length in (700, 900):
        cells = Counter(item.row["depth"] for item in built.items if item.row["length"] == length)
        assert (
            cells.total() == tests
            and len(cells) == places
            and max(cells.values()) - min(cells.values()) <= 1
        )
    assert len(built.items) == 2 * tests == len({item.row["prompt"] for item in built.items})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *(
            (given, True)
            for given in (["{}"], ["{}", "True"], ["{}", "true"], ["{}=1"], ["{}", "yes"])
        ),
        *((given, False) for given in ([], ["{}", "False"], ["{}=0"], ["{}", "no"])),
    ],
)
def test_boolean_flags_take_a_value_or_none(given, expected, capsys):
    flags = ((eval_gsm8k, "--cot"), (eval_toxicity, "--chat"), (eval_tool_use, "--free_only"))
    for module, flag in flags:
        words = [word.format(flag) for word in given]
        args = module.parser().parse_args(["--checkpoint", "x", *words, "--limit", "3"])
        assert getattr(args, flag[2:]) is expected and args.limit == 3
        with pytest.raises(SystemExit):
            module.parser().parse_args(["--checkpoint", "x", flag, "maybe"])
        assert f"argument {flag}: 'maybe' is neither true nor false" in capsys.readouterr().err


def test_the_demo_opens_the_furthest_stage_of_the_newest_run(
    text_store, tmp_path, monkeypatch, capsys
):
    with pytest.raises(
        ValueError, match="no model found under checkpoints/; give --checkpoint or --gguf"
    ):
        demo_ui.newest_model(tmp_path / "none", tmp_path)
    folders = [  # each is preferred to those before it; seconds of its config.json
        ("nano/gold/step_5", 50),
        ("other/phase1/step_2", 60),
        ("nano/midtrain/step_1", 10),
        ("nano/sft/step_3", 5),
        ("nano/dpo/step_1", 1),
        ("mine/sft/step_2", 70),  # the user's own SFT, after another run's DPO
        ("mine/base/step_9", 80),
        ("tuned/midtrain/step_1", 75),
        ("dpo", 90),
    ]
    later = {"mine/base/step_9": "mine/sft/step_2"}  # a base model is not preferred to its SFT
    for name, seconds in folders:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").touch()
        (folder / "config.json").touch()
        os.utime(folder / "config.json", (seconds, seconds))
        expected = tmp_path / "checkpoints" / later.get(name, name)
        assert demo_ui.newest_model(tmp_path / "none", tmp_path) == expected
        if name == "nano/dpo/step_1":
            append_event(tmp_path / "logs" / "nano", "skipped_stage", stage="dpo")
            chosen = demo_ui.newest_model(tmp_path)
            assert chosen == tmp_path / "checkpoints" / "nano/sft/step_3"
    for name in ("nano/dpo/step_7", "nano/dpo/step_8.tmp"):  # without weights: incomplete
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").touch()
    (tmp_path / "checkpoints" / "nano/dpo/step_8.tmp" / "model.safetensors").touch()
    assert demo_ui.newest_model(tmp_path) == tmp_path / "checkpoints" / "dpo"
    place = tmp_path / "here"
    model = save_tiny(
        place / "checkpoints/nano/gold/step_9", tiny_config(max_position_embeddings=64), text_store
    )
    assert demo_ui.newest_model(place, tmp_path) == model  # the first place has one
    pytest.importorskip("gradio", reason="no gradio: pip install -r requirements-demo.txt")
    monkeypatch.chdir(place)
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        patch.setattr(sys, "argv", ["x", "--share=no", "--port", port])
        with pytest.raises(SystemExit):
            demo_ui.main()
    out, err = capsys.readouterr()
    assert f"opening {model}, of the newest run" in out and "give another port" in err
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setattr(demo_ui, "ROOT", empty)
    assert "no model found under checkpoints/" in complaint_of(
        demo_ui.main, [], capsys, monkeypatch
    )


# ---- cost of evaluations


def one_phase(tmp_path, evals: dict[str, str], **more) -> Plan:
    base = yaml.safe_load((ROOT / "configs" / "test_mode.yaml").read_text())
    data = {**base["data"], "store": "nowhere", "mix": {"a": 0.5, "b": 0.5}}
    schedule = {"warmup_steps": 2, "total_steps": 100, "decay_steps": 4}
    path = tmp_path / "one.yaml"
    path.write_text(
        yaml.safe_dump({**base, "data": data, "schedule": schedule, "phase": "one", "steps": 100})
    )
    marks = (Milestone(40), Milestone(100, tuple(evals)[:1]))
    return Plan("small", (PlanPhase(str(path), marks),), ranks=2, evals=evals, **more)


def test_forward_flops_and_hours(tmp_path):
    command = "python -m {} --checkpoint {{checkpoint}} --output {{output}} {}"
    evals = {
        "text": command.format(
            "scripts.launch --nproc_per_node=2 -m evals.eval_perplexity", "--tokens 6400"
        ),
        "sums": command.format("evals.eval_gsm8k", "--shots 0 --limit 10 --max_new_tokens 100"),
        "own": "python mystery.py {checkpoint} {output}",
    }
    plan = one_phase(
        tmp_path,
        evals,
        after={
            "Books": command.format("evals.eval_perplexity", "--limit 1"),
            "Talk": "python x.py",
        },
    )
    report = forecast(plan, "h100", mfu=0.5, price=2.0, evaluation_tokens_of=command_tokens)
    first, second, end = report["evaluations"]
    assert [entry["where"] for entry in report["evaluations"]] == [
        "one 40",
        "one 100",
        "at the end",
    ]
    # Parameters in matmuls: 2 layers of attention, 2 * 64 * (64 + 32), and SwiGLU, 3 * 64 * 176;
    # the head, 64 * 512.
    matmul = 2 * (12_288 + 33_792) + 32_768

    def per_token(row: int) -> int:  # attention: scores and values of 2 layers, 64 wide
        return 2 * matmul + 2 * 2 * 2 * 64 * row

    text, sums, own = first["evals"]
    peak = GPUS["h100"].flops
    assert text["read"] == 2 * 6400 and text["flops"] == pytest.approx(12_800 * per_token(64))
    assert text["hours"] == pytest.approx(12_800 * per_token(64) / (0.5 * 2 * peak) / 3600)
    read, written = 10 * 240 / 4, 10 * 100  # 240 bytes a question, at most 100 tokens an answer
    assert (sums["read"], sums["written"]) == (read, written)
    assert sums["flops"] == pytest.approx((read + written) * per_token(160))
    assert sums["hours"] == pytest.approx(
        per_token(160) * (read / 0.5 + written / 0.01) / peak / 3600
    )
    assert not own["known"] and first["flops"] == text["flops"] + sums["flops"]
    assert [e["name"] for e in second["evals"]] == ["perplexity"] and end["evals"][0][
        "read"
    ] == 2 * 64
    total = report["evaluations_total"]
    assert total["hours"] == pytest.approx(
        math.fsum(entry["hours"] for entry in report["evaluations"])
    )
    assert total["cost"] == pytest.approx(total["hours"] * 2 * 2.0)
    output = forecast_text(report)
    assert (
        "not counted: python mystery.py" in output
        and "perplexity 0.01M read, " not in output.split("one 100")[1]
    )
    assert forecast(plan, "h100")["evaluations"] == [] and "Evaluations" not in forecast_text(
        forecast(plan, "h100")
    )


def test_every_evaluation_of_the_1b_plan_is_counted(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plan = load_plan("configs/plan_1b.yaml")
    monkeypatch.setattr(sys, "argv", ["x", "configs/plan_1b.yaml", "--gpu", "h100"])
    plan_command.main()
    output = capsys.readouterr().out
    milestones = [
        f"{Path(phase.config).stem} {mark.step:,}"
        for phase in plan.phases
        for mark in phase.milestones
    ]
    measured = [*milestones, *(stage.name for stage in plan.stages if stage.evals)]
    assert len(measured) == 9 and all(f"\n  {where}: " in output for where in measured)
    assert "not counted" not in output and "hours for evaluations" in output
    entries = forecast(plan, "h100", evaluation_tokens_of=command_tokens)["evaluations"]
    assert [entry["where"] for entry in entries] == measured
    counts = {entry["where"]: len(entry["evals"]) for entry in entries}
    assert (
        counts["dpo"] == 10
        and counts["phase2_16k 207,000"] == 1
        and sum(counts.values()) == 6 * 3 + 1 + 2 * 10
    )
    costs = {e["name"]: e for e in entries[-1]["evals"]}
    sources = {name for phase in plan.phases for name in load(phase.config).data.mix}
    assert costs["perplexity"]["read"] == 2**20 * len(sources)
    assert costs["needle"]["read"] == 2 * 100 * (4096 + 8192 + 16_384) and all(
        e["hours"] > 0 for e in costs.values()
    )
    assert sum(entry["hours"] for entry in entries) < 24
