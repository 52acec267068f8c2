"""A suite loads the model once, resumes, reuses results, splits over ranks, checks gates."""

import json
import sys
from pathlib import Path

import forked
import pytest
import yaml
from conftest import ROOT, one_thread, save_tiny, tiny_config

from evals import engines
from evals.local_rows import write_rows
from evals.plan_gates import gates_of
from evals.suite_config import open_suite
from scripts import run_evals

CONFIG = tiny_config(max_position_embeddings=512)


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_store) -> Path:
    """A folder with a checkpoint, rows of two tasks, a suite and a plan."""
    place = tmp_path_factory.mktemp("suite")
    folder = place / "step_6"
    save_tiny(folder, CONFIG, text_store)
    endings = [
        [f"goes {i} {word}" for word in ("up", "down the hill", "home", "nowhere")]
        for i in range(6)
    ]
    of = {"activity_label": "Walk", "ctx_a": "A dog runs.", "ctx_b": "it"}
    rows = [
        {**of, "endings": ends, "label": str(i % 4), "id": f"h{i}"}
        for i, ends in enumerate(endings)
    ]
    write_rows(place / "hellaswag.jsonl", rows)
    targets = {"choices": ["yes", "no", "it may be"], "labels": [1, 0, 0]}
    more = {"choices": [*targets["choices"], "perhaps"], "labels": [1, 0, 0, 0]}
    rows = [
        {"question": f"Is {i} even?", "mc1_targets": targets, "mc2_targets": more} for i in range(4)
    ]
    write_rows(place / "truthfulqa.jsonl", rows)
    evals = {
        "perplexity": f"--dataset {text_store} --sequence_length 64 --limit 5 --batch_size 1",
        "hellaswag": "",
        "truthfulqa": "",
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump({"evals": evals}, sort_keys=False))
    gates = [
        {"metric": "first.bits_per_byte", "go": 60, "no_go": 90},
        {"metric": "hellaswag.acc_norm", "go": -1, "no_go": -2},
    ]
    missing = {"metric": "gsm8k.flexible", "go": 0.1, "no_go": 0.0}
    marks = [{"step": 6, "gates": gates}, {"step": 7, "gates": [*gates, missing]}]
    plan = {
        "name": "tiny",
        "evals": {"suite": "x"},
        "phases": [{"config": "one.yaml", "milestones": marks}],
    }
    (place / "plan.yaml").write_text(yaml.safe_dump(plan))
    return place


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    data = ["--data", *(f"{name}={place / name}.jsonl" for name in ("hellaswag", "truthfulqa"))]
    common = [
        "--checkpoint",
        str(place / "step_6"),
        "--suite",
        str(place / "tiny.yaml"),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    return [*common, *(data if "--data" not in more else []), *more]


@pytest.fixture
def run(place, monkeypatch, capfd):
    """Run a suite in this process: exit status, summary, output and number of model requests."""

    def run(output: Path, *more: str):
        asked = []
        answer = engines_of().answer

        def counted(self, requests):
            asked.extend(requests)
            return answer(self, requests)

        with monkeypatch.context() as patch:
            patch.setattr(engines_of(), "answer", counted)
            patch.setattr(sys, "argv", ["x", *arguments(place, output, *more)])
            try:
                run_evals.main()
                status = 0
            except SystemExit as left:
                status = left.code
        printed = capfd.readouterr()
        return (
            status,
            json.loads(output.read_text()) if output.is_file() else {},
            printed.out + printed.err,
            len(asked),
        )

    return run


def engines_of():
    return engines.LanguageModel


def test_a_suite_is_measured_once_and_judged(run, place, tmp_path):
    output = tmp_path / "tiny.json"
    status, results, printed, asked = run(output, "--gates", str(place / "plan.yaml"))
    assert (
        status == 0
        and asked == 6 + 2 * 4
        and "decision: GO" in printed
        and results["outcome"] == "go"
    )
    assert (
        set(results["metrics"]) == {"first", "second", "all", "hellaswag", "truthfulqa"}
        and results["n"]["hellaswag"] == 6
    )
    assert (
        results["metrics"]["hellaswag"]
        == json.loads((tmp_path / "hellaswag.json").read_text())["metrics"]
    )
    status, again, _, asked = run(output)
    assert (
        status == 0
        and asked == 0
        and again["metrics"] == results["metrics"]
        and again["outcome"] is None
    )
    (tmp_path / "hellaswag.json").unlink()  # as after a kill: answers, but no results
    _, again, _, asked = run(output)
    assert asked == 0 and again["metrics"] == results["metrics"]
    _, fewer, _, asked = run(output, "--limit", "2")
    assert fewer["n"]["hellaswag"] == 2 and asked == 0  # other results from cached answers


def test_another_checkpoint_is_measured_again(run, place, text_store, tmp_path):
    _, results, _, _ = run(tmp_path / "tiny.json")
    weights = place / "step_6" / "model.safetensors"
    original = weights.read_bytes()
    try:
        save_tiny(place / "other", CONFIG, text_store, seed=4)
        weights.write_bytes((place / "other" / "model.safetensors").read_bytes())
        _, second, _, asked = run(tmp_path / "tiny.json")
    finally:
        weights.write_bytes(original)
    assert asked == 6 + 2 * 4 and second["checkpoint_hash"] != results["checkpoint_hash"]
    assert second["metrics"]["all"] != results["metrics"]["all"]


def test_unmeasured_evaluations_are_named_and_fail_gates(run, place, tmp_path):
    data = ["--data", f"hellaswag={place / 'hellaswag.jsonl'}", "truthfulqa=nowhere.jsonl"]
    status, results, output, _ = run(
        tmp_path / "tiny.json", *data, "--gates", str(place / "plan.yaml")
    )
    assert (
        status == 0
        and "nowhere.jsonl does not exist" in results["not_measured"]["truthfulqa"]
        and "hellaswag" in results["metrics"]
    )
    assert "warning: truthfulqa was not measured" in output
    status, results, output, _ = run(
        tmp_path / "tiny.json", "--gates", str(place / "plan.yaml"), "--at", "7"
    )
    assert (
        status == 3
        and "gsm8k.flexible = not measured" in output
        and results["outcome"] == "no-go"
        and not results["not_measured"]
    )


def test_two_ranks_equal_one(run, place, tmp_path):
    _, results, _, _ = run(tmp_path / "one" / "tiny.json")
    launch = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--nproc_per_node=2",
        "-m",
        "scripts.run_evals",
    ]
    more = [
        "--data",
        f"hellaswag={place / 'hellaswag.jsonl'}",
        "truthfulqa=nowhere.jsonl",
        "--gates",
        str(place / "plan.yaml"),
        "--at",
        "7",
    ]
    command = [*launch, *arguments(place, tmp_path / "two" / "tiny.json", *more)]
    done = forked.run(command, env=one_thread())
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    two = json.loads((tmp_path / "two" / "tiny.json").read_text())
    assert (
        two["metrics"]["hellaswag"] == results["metrics"]["hellaswag"]
        and "truthfulqa" in two["not_measured"]
    )
    for name in ("first", "second", "all"):
        for metric, estimate in results["metrics"][name].items():
            assert two["metrics"][name][metric]["value"] == pytest.approx(
                estimate["value"], rel=1e-6
            )
    ranked = json.loads((tmp_path / "two" / "perplexity.json").read_text())
    assert (
        ranked["n"] == json.loads((tmp_path / "one" / "perplexity.json").read_text())["n"] == 2 * 5
    )


def test_mistakes(run, place, tmp_path):
    (tmp_path / "odd.yaml").write_text("evals: {hellaswag: --shot 0 --wrong}\n")
    (tmp_path / "who.yaml").write_text("evals: {hellaswga: --shots 0}\n")
    (tmp_path / "key.yaml").write_text("eval: {hellaswag: --shots 0}\n")
    (tmp_path / "quote.yaml").write_text('evals: {hellaswag: "--shots \'0"}\n')
    for more, expected in (
        (
            ["--suite", str(tmp_path / "odd.yaml"), "--data", "hellaswag=x"],
            "flags for hellaswag are invalid: --shot 0 --wrong",
        ),
        (
            ["--suite", str(tmp_path / "who.yaml"), "--data", "hellaswga=x"],
            "unknown evaluation 'hellaswga'; available: arc, ",
        ),
        (["--suite", str(tmp_path / "key.yaml")], "did you mean 'evals'?"),
        (
            ["--suite", str(tmp_path / "quote.yaml"), "--data", "hellaswag=x"],
            "flags for hellaswag are invalid: --shots '0",
        ),
        (["--suite", "fulll"], "did you mean"),
        (["--output", str(tmp_path)], "is a folder; give a file"),
        (["--data", "mmlu=x"], "must be NAME=PATH with one of perplexity, hellaswag, truthfulqa"),
        (
            ["--gates", str(place / "plan.yaml"), "--at", "5"],
            "choose one with --at (milestones: 6, 7; stages: none)",
        ),
        (
            ["--data", "perplexity=nowhere", "hellaswag=nowhere", "truthfulqa=nowhere"],
            "no evaluation of the suite tiny could run",
        ),
    ):
        status, _, output, _ = run(tmp_path / "x.json", *more)
        assert status == 2 and [
            line for line in output.splitlines() if line.startswith("error: ") and expected in line
        ], (
            expected,
            output,
        )


def test_shipped_suites_parse():
    for name in ("quick", "milestone", "full", str(ROOT / "configs" / "quickstart" / "suite.yaml")):
        suite, _ = open_suite(name)
        for task, flags in suite.evals.items():
            parser = __import__(f"evals.eval_{task}", fromlist=["parser"]).parser()
            parser.parse_args(["--checkpoint", "x", *flags.split()])


def test_gates_of_a_stage_are_found_by_its_folder(tmp_path):
    plan, folder = ROOT / "configs" / "plan_1b.yaml", tmp_path / "checkpoints" / "nanollama_1b"
    assert [gate.metric for gate in gates_of(plan, folder / "sft" / "step_50000", None)] == [
        *("mmlu.acc", "gsm8k.flexible", "all.bits_per_byte", "hellaswag.acc_norm")
    ]
    assert len(gates_of(plan, folder / "dpo" / "step_5000", None)) == 13
    assert gates_of(plan, folder / "elsewhere" / "step_1", "dpo") == gates_of(
        plan, folder / "dpo" / "step_5000", None
    )
    assert gates_of(plan, folder / "phase1_pretrain" / "step_50000", None)[0].go == 25
    with pytest.raises(
        ValueError, match=r"neither a milestone nor a stage.*230000; stages: midtrain, sft, dpo"
    ):
        gates_of(plan, folder / "phase1_pretrain" / "step_51000", None)
