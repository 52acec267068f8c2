"""Gates relative to an earlier stage: decisions, standard errors, scripts.pipeline, run_evals."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from evals.engines import folder_hash
from evals.plan_gates import gates_of, references
from training.checkpoint_files import model_hash
from training.config import load
from training.planning.gates import Gate, Measured, judge, reference_of, thresholds
from training.planning.plan import evaluation_points, load_plan, scheduled_phases

HIGHER = Gate("chat.acc", go=0.0, no_go=-0.1, against="before")
LOWER = Gate("all.bits_per_byte", go=0.2, no_go=0.5, against="sft")


def acc(value: float, stderr: float | None = None, n: int | None = None) -> dict:
    return {"chat": {"acc": {"value": value, "stderr": stderr, "n": n}}}


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (acc(0.5), acc(0.5), "go"),
        (acc(0.5), acc(0.45), "caution"),
        (acc(0.5), acc(0.35), "no-go"),
        (acc(0.5, 0.01, 2000), acc(0.35, 0.01, 2000), "no-go"),
        (
            acc(0.5, 0.1, 25),
            acc(0.35, 0.1, 25),
            "caution",
        ),  # beyond the border by less than the standard error
        (
            acc(0.5, 0.1, 25),
            acc(0.5, 0.1, 25),
            "caution",
        ),  # the border itself is within the standard error
        (acc(1.0, 0.0, 2), acc(0.5, 0.35, 2), "caution"),
        (acc(1.0, 0.0, 4), acc(0.75, 0.0, 4), "caution"),  # a sample error of 0 is not certainty
    ],
)
def test_a_change_is_judged_with_its_standard_error(before, after, outcome):
    verdict = judge(HIGHER, after, Measured("sft", "after sft", before))
    assert verdict.outcome == outcome and "after sft" in str(verdict)


def test_a_lower_metric_may_rise_by_so_much():
    reference = Measured("sft", "after sft", {"all": {"bits_per_byte": 3.0}})
    outcomes = [
        judge(LOWER, {"all": {"bits_per_byte": value}}, reference).outcome
        for value in (2.0, 3.1, 3.4, 3.6)
    ]
    assert outcomes == ["go", "go", "caution", "no-go"]
    message = str(judge(LOWER, {"all": {"bits_per_byte": 3.4}}, reference))
    assert (
        message == "all.bits_per_byte = 3.400, +0.400 against 3.000 after sft "
        "(go <= +0.2, no-go beyond +0.5): caution"
    )


def test_the_error_of_a_text_does_not_excuse_a_rise_on_the_same_text():
    text = {"all": {"bits_per_byte": {"value": 3.0, "stderr": 0.2}}}
    later = {"all": {"bits_per_byte": {"value": 3.6, "stderr": 0.2}}}
    verdict = judge(LOWER, later, Measured("sft", "after sft", text))
    assert verdict.outcome == "no-go" and "\u00b1" not in str(verdict)


def test_a_reference_that_was_not_measured_is_a_no_go_with_a_sentence():
    for reference in (
        None,
        Measured("sft", "after sft", {}),
        Measured("sft", "after sft", acc(float("nan"))),
    ):
        verdict = judge(HIGHER, acc(0.9), reference)
        assert verdict.outcome == "no-go" and "so the change is unknown" in str(verdict)


def test_which_place_a_gate_compares_with():
    earlier = [
        Measured("one", "at step 2", {}),
        Measured("one", "at step 4", {}),
        Measured("sft", "after sft", {}),
    ]
    steps = [
        reference_of(Gate("x", 0, 1, against=name), earlier)
        for name in ("before", "one", "sft", "dpo", "")
    ]
    assert [place and place.where for place in steps] == [
        "after sft",
        "at step 4",
        "after sft",
        None,
        None,
    ]


def small_plan(place: Path, against: str, evals: bool = True) -> Path:
    gate = {"metric": "chat.acc", "go": 0.0, "no_go": -0.1, "against": against}
    commands = {"Tuning": "cp -r {checkpoint}/. checkpoints/quickstart/sft/step_1"}
    sft = {
        "name": "sft",
        "output_dir": "checkpoints/quickstart/sft",
        "commands": commands,
        "evals": ["chat"] if evals else [],
    }
    dpo = {
        "name": "dpo",
        "output_dir": "checkpoints/quickstart/dpo",
        "commands": commands,
        "evals": ["chat"],
        "gates": [gate],
    }
    phases = [{"config": str(ROOT / "configs" / "quickstart" / "base.yaml")}]
    content = {"name": "p", "evals": {"chat": "true"}, "phases": phases, "stages": [sft, dpo]}
    path = place / "plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("against", "evals", "message"),
    [
        ("stf", True, "gate chat.acc has against=stf; available: before, sft"),
        ("dpo", True, "available: before, sft"),
        ("before", False, "available: none .first"),
    ],
)
def test_a_plan_with_an_impossible_reference_is_refused(tmp_path, against, evals, message):
    with pytest.raises(ValueError, match=message):
        scheduled_phases(load_plan(small_plan(tmp_path, against, evals)))


@pytest.mark.parametrize("against", ["before", "sft"])
@pytest.mark.parametrize("judged", [True, False])
def test_by_hand_the_results_of_the_reference_are_found(tmp_path, monkeypatch, against, judged):
    """`judged`: scripts.pipeline decides; otherwise run_evals with its default --output."""
    plan = small_plan(tmp_path, against)
    monkeypatch.chdir(tmp_path)
    for stage, value in (("sft", 1), ("dpo", 2)):
        folder = Path(f"checkpoints/quickstart/{stage}/step_1")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"value": value}), encoding="utf-8")
    dpo, sft = Path("checkpoints/quickstart/dpo/step_1"), Path("checkpoints/quickstart/sft/step_1")
    gates = gates_of(plan, dpo, None)
    (nothing,) = references(gates, plan, dpo, None)
    assert (
        nothing and nothing.metrics == {} and judge(gates[0], acc(0.9), nothing).outcome == "no-go"
    )
    metrics = acc(0.5)["chat"]
    if judged:
        of = model_hash(sft)
        file, content = (
            Path("results/quickstart/sft/decision.json"),
            {"of": of, "metrics": {"chat": metrics}},
        )
    else:
        file = Path("results/quickstart/sft/step_1/chat.json")
        content = {
            "task": "chat",
            "n": 4,
            "metrics": metrics,
            "checkpoint_hash": folder_hash(sft),
        }
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    (reference,) = references(gates, plan, dpo, None)
    assert (
        reference.where == "after sft"
        and judge(gates[0], acc(0.45), reference).outcome == "caution"
    )
    file.write_text(
        json.dumps({**content, "of": "another", "checkpoint_hash": "another"}), encoding="utf-8"
    )
    (stale,) = references(gates, plan, dpo, None)
    assert judge(gates[0], acc(0.9), stale).outcome == "no-go"


def test_by_hand_the_gates_of_an_extended_phase_are_found(tmp_path, monkeypatch):
    """Steps before and after the extension, as checkpoints of both may exist."""
    plan = small_plan(tmp_path, "before")
    content = yaml.safe_load(plan.read_text(encoding="utf-8"))
    steps = load(content["phases"][0]["config"]).steps
    gate = {"metric": "chat.acc", "go": 0.5, "no_go": 0.1}
    content["phases"][0]["milestones"] = [{"step": steps, "gates": [gate]}]
    plan.write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    longer = Path(f"checkpoints/quickstart/base/step_{steps + 50}")
    with pytest.raises(ValueError, match=f"neither a milestone nor a stage.*{steps};"):
        gates_of(plan, longer, None)
    extensions = tmp_path / "logs" / "quickstart" / "extensions.json"
    extensions.parent.mkdir(parents=True)
    extensions.write_text(json.dumps({"base": 50}), encoding="utf-8")
    for folder in (longer, longer.with_name(f"step_{steps}")):
        assert [gate.go for gate in gates_of(plan, folder, None)] == [0.5]


@pytest.mark.parametrize("name", ["plan_1b.yaml", "quickstart/plan.yaml"])
def test_forgetting_is_gated_after_every_stage(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = load_plan(Path("configs", name))
    listed = {place.name: place for place in evaluation_points(plan, scheduled_phases(plan))}
    for stage in plan.stages:
        against = {gate.metric for gate in listed[stage.name].gates if gate.against}
        assert {"all.bits_per_byte", "hellaswag.acc_norm"} <= against, stage.name
    dpo = {
        gate.metric
        for gate in listed["dpo"].gates
        if gate.against == "before" and gate.go >= 0 > gate.no_go
    }
    assert dpo & {"pairs.preferred", "truthfulqa.mc2"}


def test_figures_of_a_measured_quickstart_run_stop_nothing(monkeypatch):
    """DPO lost on pairs, within the standard error (2 CPU cores, 2026-11-30, Python 3.11.7).

    Its figures are of a run whose SFT had 400 steps.
    """
    monkeypatch.chdir(ROOT)

    def figures(bits, chat, pairs, swag):
        metrics = {"all": {"bits_per_byte": {"value": bits, "stderr": None}}}
        for name, metric, (value, stderr, n) in (
            ("chat", "acc", chat),
            ("pairs", "preferred", pairs),
            ("hellaswag", "acc_norm", swag),
        ):
            metrics[name] = {metric: {"value": value, "stderr": stderr, "n": n}}
        return metrics

    before = Measured(
        "gold",
        "at step 400",
        figures(2.135, (0.0, 0.0, 160), (0.5, 0.04, 200), (0.208, 0.085, 24)),
    )
    tuned = figures(2.193, (0.892, 0.02, 250), (0.98, 0.01, 200), (0.167, 0.078, 24))
    sft = Measured(
        "sft",
        "after sft",
        figures(2.321, (0.762, 0.034, 160), (0.98, 0.01, 200), (0.167, 0.078, 24)),
    )
    dpo = figures(2.320, (0.769, 0.033, 160), (0.97, 0.012, 200), (0.167, 0.078, 24))
    stages = {
        stage.name: stage.gates for stage in load_plan(Path("configs/quickstart/plan.yaml")).stages
    }
    assert {judge(gate, tuned, before).outcome for gate in stages["sft"]} == {"go"}
    outcomes = {
        f"{gate.metric} {gate.against}": judge(gate, dpo, sft).outcome for gate in stages["dpo"]
    }
    lost = {"pairs.preferred before"}
    assert {name for name, outcome in outcomes.items() if outcome == "caution"} == lost
    assert "no-go" not in outcomes.values()
    collapsed = figures(4.4, (0.05, 0.017, 160), (0.4, 0.035, 200), (0.25, 0.09, 24))
    assert [judge(gate, collapsed, sft).outcome for gate in stages["dpo"] if gate.against][:3] == [
        "no-go"
    ] * 3


def test_a_decision_keeps_what_a_gate_is_against():
    assert thresholds((Gate("x", 1, 2), HIGHER)) == [
        {"metric": "x", "go": 1, "no_go": 2},
        {"metric": "chat.acc", "go": 0.0, "no_go": -0.1, "against": "before"},
    ]
