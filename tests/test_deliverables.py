"""Results table and tiers, SFT and DPO reports, consistent deliverables, theta and mask."""

import json
import os
import re
import shutil
import sys
import time
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, VOCAB, complaint_of, tiny_config, train_here
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_plan import AFTER, DPO, SHAPE, TARGETS, build, change, put, run

from data.manifest import file_hash
from evals.engines import folder_hash
from evals.report.build import measured
from evals.report.targets import TIERS, cells, judged_hash, read_targets, status, table
from evals.suite_config import open_suite
from models import nanollama
from models.hf import save_hf
from models.nanollama import NanoLlama
from scripts import deliverables, verify_checkpoint
from training.logger import append_event
from training.planning.gates import Gate, judge
from training.planning.plan import load_plan, scheduled_phases

PLAN_1B = ROOT / "configs" / "plan_1b.yaml"


@pytest.fixture(scope="module")
def tree(text_store, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    build(root, text_store)
    return root


@pytest.fixture
def work(tree, tmp_path, monkeypatch) -> Path:
    """Copy the tree and use it as the working folder."""
    shutil.copytree(tree, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def gather(monkeypatch, capsys):
    def gather(code: int, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["x", "--plan", "plan.yaml", *more])
        with pytest.raises(SystemExit) as end:
            deliverables.main()
        output = capsys.readouterr()
        assert end.value.code == code, output.out + output.err
        return output.out

    return gather


@pytest.mark.parametrize(
    ("value", "stderr", "expected", "near", "lower"),
    [
        (0.39, 0.005, "missed", [], False),
        (0.39, 0.011, "missed", ["mvp"], False),
        (0.40, None, "MVP", [], False),
        (0.49, 0.1, "MVP", ["mvp", "success"], False),
        (0.50, 0.001, "success", ["success"], False),
        (0.70, 0.01, "stretch", [], False),
        (None, None, "not measured", [], False),
        (float("nan"), None, "not measured", [], False),
        (0.61, None, "missed", [], True),
        (0.60, 0.001, "MVP", ["mvp"], True),
        (0.45, 0.01, "success", [], True),
        (0.40, None, "stretch", [], True),
    ],
)
def test_the_status_is_the_highest_tier_reached(value, stderr, expected, near, lower):
    values = (0.6, 0.5, 0.4) if lower else (0.4, 0.5, 0.6)
    target = {**dict(zip(TIERS, values, strict=True)), "lower": lower}
    assert status(target, value, stderr) == {"status": expected, "near": near}


def add_mt_bench() -> None:
    """Add an unmeasured target to the plan; rewrite the report."""
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    target = {"metric": "mt_bench.score", "title": "MT-bench", "percent": False}
    target |= {"mvp": 4, "success": 5, "stretch": 6}
    put("plan.yaml", {**plan, "targets": [*TARGETS, target]})
    run(AFTER[-1].format(checkpoint=DPO))


def test_one_results_table_in_three_files(work):
    add_mt_bench()
    rows = json.loads(Path("results/benchmark_results.json").read_text())["targets"]
    keys = ("value", "stderr", "n", "of", "status", "near")
    assert [[row[key] for key in keys] for row in rows] == [
        [0.41, 0.02, 800, "items", "MVP", ["mvp"]],
        [
            11.5,
            None,
            12345,
            "tokens",
            "success",
            [],
        ],  # phase 3's perplexity; this model's is far higher
        [0.0, None, 1, "items", "missed", []],
        [None, None, None, None, "not measured", []],
    ]
    near = "MVP (within one standard error of MVP)"
    cells_of_rows = ["|".join(cells(row)) for row in rows]
    assert cells_of_rows[0] == f"HellaSwag (%)|41.0|2.0|800 items|≥ 40|≥ 50|≥ 60|{near}"
    assert (
        cells_of_rows[1] == "Text, after phase3_gold|11.50|-|12,345 tokens|≤ 13|≤ 12|≤ 11|success"
    )
    text = Path("results/comparison_table.md").read_text()
    page = Path("results/report.html").read_text()
    page = [" ".join(unescape(re.sub("<[^>]+>", " ", row)).split()) for row in page.split("<tr>")]
    for row in rows:
        assert f"| {' | '.join(cells(row))} |" in text[: text.index("beside published")]
        assert any(" ".join(cells(row)) in cells_of_rows for cells_of_rows in page), row["title"]
    assert "- Text: our judgement" in text


def test_every_metric_that_the_plan_names_is_reported(tree, monkeypatch):
    """Gates and targets name only metrics that the suite reports with the plan's flags."""
    monkeypatch.chdir(ROOT)
    plan = load_plan(PLAN_1B)
    reported = json.loads((tree / "results/tiny/dpo/aligned.json").read_text())["metrics"]
    texts = {"all", "fineweb_edu"}
    assert "fineweb_edu" in scheduled_phases(plan)[0].run.data.mix and texts < reported.keys()

    def lacking(gates, evals) -> list[str]:
        tasks = set()
        for words in (plan.evals[name].split() for name in evals):
            if "--suite" in words:
                tasks |= open_suite(words[words.index("--suite") + 1])[0].evals.keys()
            else:
                tasks |= {word[11:] for word in words if word.startswith("evals.eval_")}
        tasks |= texts if "perplexity" in tasks else set()
        have = {name: part for name, part in reported.items() if name in tasks}
        return [gate.metric for gate in gates if judge(gate, have).value is None]

    judged = [*plan.stages, *(milestone for phase in plan.phases for milestone in phase.milestones)]
    assert sum(len(part.gates) for part in judged) > 20
    for part in judged:
        assert lacking(part.gates, part.evals) == []
    targets = [Gate(target["metric"], 1, 0) for target in read_targets(PLAN_1B)]
    assert len(targets) == 10 and lacking(targets, ["aligned"]) == []
    for metric, evals in (("mmlu.accuracy", "aligned"), ("needle.accuracy_16384", "suite")):
        assert lacking([Gate(metric, 1, 0)], [evals]) == [metric]  # a typo; not in that suite
    scores = measured(tree / "results/tiny/dpo", folder_hash(tree / DPO))[0]
    rows = table(read_targets(PLAN_1B), lambda stage: scores)
    assert all(row["status"] != "not measured" and row["n"] for row in rows)


def test_report_and_card_speak_of_sft_and_dpo_as_of_pretraining(tree):
    trained = json.loads((tree / "results/benchmark_results.json").read_text())["training"]
    assert (trained["steps"], trained["tokens"]) == (6, 3072)
    assert [phase["tokens"] for phase in trained["phases"]] == [2048, 1024]
    sft, dpo = trained["tuning"]
    assert (sft["name"], sft["steps"], sft["tokens"]) == ("sft", 3, 3333)
    assert (dpo["steps"], dpo["tokens"]) == (2, 2222)
    assert dpo["started_from"] == "checkpoints/tiny/sft/step_3"
    assert dpo["sources"] == {"dpo_rows": "hub/dpo.jsonl"} and sft["mix"] == {"sft_rows": 1.0}
    assert sft["held_out"] == [{"step": 0, "loss": 2.5}, {"step": 3, "loss": 1.25}]
    assert dpo["preferred"] == [{"step": 0, "share": 0.5}, {"step": 2, "share": 0.75}]
    page = unescape(re.sub("<[^>]+>", " ", (tree / "results/report.html").read_text()))
    page = " ".join(page.split())
    tiles = ("3.07K pretraining tokens", "6 pretraining steps", "3 sft steps", "2 dpo steps")
    rows = ("sft 3 3,333 2e-05 sft_rows 1 2.500 → 1.250", "0.693 → 0.500 50.0 → 75.0")
    for text in (*tiles, *rows):
        assert text in page, text
    card = (tree / "gguf/README.md").read_text()
    for row in (
        "| phase1_pretrain | 4 | 2,048 | 64 | 0.001 | fineweb_edu 1 |",
        "| sft | 3 | 3,333 | 32 | 2e-05 | sft_rows 1 |",
        "| dpo | 2 | 2,222 | 32 | 2e-05 | dpo_rows 1 |",
        "| dpo | checkpoints/tiny/sft/step_3 | dpo_rows: hub/dpo.jsonl "
        "| 0.693 → 0.500 | 50.0 → 75.0 |",
    ):
        assert row in card, row


def everything(folder: Path) -> dict[str, bytes | str]:
    """Return each file's bytes and each link's target."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(p): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in paths}


def test_everything_is_gathered_and_a_second_run_changes_nothing(work, gather):
    for task in ("perplexity", "hellaswag", "needle"):  # of other data, with other flags
        by_hand = json.loads(Path(f"results/tiny/dpo/{task}.json").read_text())
        for estimate in by_hand["metrics"].get("all", by_hand["metrics"]).values():
            estimate["value"] = 0.9
        put(f"results/tiny/dpo/step_2/{task}.json", {**by_hand, "n": 99_999})
    first = gather(0)
    assert "21 of 21 deliverables are present and agree" in first
    assert "0.41, MVP, within one standard error of MVP" in first
    for name, step in {"phase1": "step_4", "phase3": "step_6", "sft": "step_3"}.items():
        link = Path("checkpoints") / name
        assert not link.readlink().is_absolute() and (link / step / "config.json").is_file()
    configs = yaml.safe_load(Path("results/hyperparameters.yaml").read_text())
    steps = {"phase1_pretrain": 4, "phase3_gold": 2, "sft": 3, "dpo": 2}
    assert {name: part["steps"] for name, part in configs.items()} == steps
    urls = "https://wandb.example/runs/1\nnone: W&B was off in phase1_pretrain, phase3_gold, sft\n"
    assert Path("results/wandb_run_urls.txt").read_text() == urls
    assert Path("results/git_commit_hash.txt").read_text() == "abc123\n"
    log = Path("results/training_log.md").read_text()
    assert log.index("the run begins") < log.index("log of sft") < log.index("log of dpo")
    for copy, source in (("data", "store"), ("models/tokenizer", "store/tokenizer")):
        name = "contaminated_ids.json" if copy == "data" else "tokenizer.json"
        assert (Path(copy) / name).read_bytes() == (Path(source) / name).read_bytes()
    before = everything(work)
    assert gather(0) == first and everything(work) == before
    put("logs/tiny/dpo/wandb_run_urls.txt", "https://wandb.example/runs/2\n")
    gather(0)  # it updates its own files when their source changes
    assert "runs/2" in Path("results/wandb_run_urls.txt").read_text()


def test_a_small_plan_keeps_its_deliverables_in_the_folder_of_its_report(work, gather):
    plan = Path("plan.yaml").read_text()
    plan = re.sub(r"(--output(?:_dir)?\s+)results", r"\1results/tiny", plan)
    Path("plan.yaml").write_text(plan)
    for path in [path for path in Path("results").iterdir() if path.is_file()]:
        path.rename(Path("results/tiny") / path.name)
    before = set(everything(work))
    gather(0)
    new_files = set(everything(work)) - before
    assert new_files and all(path.startswith(str(work / "results" / "tiny")) for path in new_files)
    assert (work / "results/tiny/checkpoints/phase1/step_4").is_dir()
    assert "results/other/benchmark_results.json" in gather(1, "--folder", "results/other")


def repaint(**about: str) -> None:
    path, text = Path("results/attention_visualizations.png"), PngInfo()
    with Image.open(path) as image:
        for key, value in {**image.text, **about}.items():
            text.add_text(key, value)
        image.save(path, pnginfo=text)


def replace_text(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text, path
    Path(path).write_text(text.replace(old, new, 1))


def commit_anew() -> None:
    for path in Path("logs").rglob("*.environment.json"):
        change(path, lambda content: content.update(git="def456"))


def grow(path: Path) -> None:
    """Append a byte without changing the modification time."""
    times = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


BENCHMARKS, DECISION = "results/benchmark_results.json", "results/tiny/dpo/decision.json"
CONFIGS = "results/hyperparameters.yaml"
DISAGREEMENTS = {
    "score in the table": (
        lambda: replace_text("results/comparison_table.md", "| 41.0 |", "| 43.0 |"),
        f"results/comparison_table.md: differs from {BENCHMARKS}",
    ),
    "score on the page": (
        lambda: replace_text("results/report.html", "41.0", "43.0"),
        f"results/report.html: differs from {BENCHMARKS}",
    ),
    "score in the results": (
        lambda: replace_text("results/tiny/dpo/hellaswag.json", "0.41", "0.43"),
        "results/tiny has different scores of hellaswag",
    ),
    "score of the decision": (
        lambda: replace_text(DECISION, "0.41", "0.43"),
        f"hellaswag.acc_norm is 0.41, but 0.43 in {DECISION}",
    ),
    "decision on another model": (
        lambda: change(DECISION, lambda found: found.update(of="x")),
        f"{DECISION} judges another checkpoint",
    ),
    "target": (
        lambda: replace_text("plan.yaml", "mvp: 0.4", "mvp: 0.45"),
        "its results table differs from plan.yaml",
    ),
    "report of another checkpoint": (
        lambda: change(BENCHMARKS, lambda found: found.update(checkpoint_hash="x")),
        f", not {DPO}",
    ),
    "tokens in the log": (
        lambda: replace_text("logs/tiny/metrics.jsonl", '"tokens": 3072', '"tokens": 4096'),
        "differ from logs/tiny",
    ),
    "steps in the config": (
        lambda: replace_text("logs/tiny/sft/sft.config.yaml", "steps: 3", "steps: 9"),
        "hyperparameters.yaml has 9 steps of sft, its log has 3",
    ),
    "a longer phase": (
        lambda: shutil.copytree("checkpoints/tiny/sft/step_3", "checkpoints/tiny/sft/step_8"),
        "the log of sft ends at step 3, its newest checkpoint is checkpoints/tiny/sft/step_8",
    ),
    "commit": (commit_anew, "its commit abc123 is not in results/git_commit_hash.txt"),
    "tokenizer": (
        lambda: replace_text("checkpoints/tiny/phase3_gold/step_6/tokenizer.json", "{", "{ "),
        "models/tokenizer: checkpoints/tiny/phase3_gold/step_6 has a different tokenizer",
    ),
    "picture of another model": (
        lambda: repaint(checkpoint_hash="x"),
        f"does not show {DPO}",
    ),
    "length of the picture": (lambda: repaint(input_length="32"), "shows 32 tokens; the plan"),
    "card": (
        lambda: replace_text("gguf/README.md", "0.41", "0.43"),
        "gguf/README.md: differs from the results",
    ),
    "size of a GGUF file": (
        lambda: grow(Path("gguf/tiny-q8_0.gguf")),
        f"is not compared with {DPO} yet",
    ),
    "a GGUF file made anew": (
        lambda: os.utime("gguf/tiny-q8_0.gguf"),
        f"gguf/tiny-q8_0.gguf: is not compared with {DPO} yet",
    ),
    "parity": (
        lambda: replace_text("gguf/check_gguf.json", '"verdict": "ok"', '"verdict": "wrong"'),
        "gguf/tiny-f16.gguf: is a different model",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_what_disagrees_is_named(name, work, gather):
    edit, expected = DISAGREEMENTS[name]
    edit()
    output = gather(1)
    assert expected in output and "WRONG" in output


def test_other_weights_are_another_checkpoint_everywhere(work, gather):
    config = tiny_config(vocab_size=VOCAB + 8, **SHAPE)
    shutil.copytree(DPO, "kept")
    save_hf(DPO, config, NanoLlama(config, seed=77).state_dict(), torch.float32)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(Path("kept") / name, DPO / name)
    output = gather(1)
    picture = "results/attention_visualizations.png"
    for part in (BENCHMARKS, picture, "gguf/tiny-f16.gguf", "gguf/README.md"):
        assert re.search(rf"^{part} +WRONG", output, re.M), part


@pytest.mark.parametrize("kind", ["file", "changed", "no file", "folder", "link"])
def test_what_it_did_not_make_stays(kind, work, gather, capsys, monkeypatch):
    is_file = kind in ("file", "changed")
    is_result = is_file or kind == "no file"
    place = Path("results/git_commit_hash.txt" if is_result else "checkpoints/phase1")
    if kind == "changed":
        gather(0)
    if is_file:
        put(place, "mine\n")
    elif kind in ("folder", "no file"):
        place.mkdir()
    else:
        place.symlink_to("tiny/sft")
    before = everything(work)
    message = complaint_of(deliverables.main, ["--plan", "plan.yaml"], capsys, monkeypatch)
    assert str(place) in message and "move it away" in message and everything(work) == before


def test_what_is_missing_is_named_with_the_command_that_makes_it(work, gather):
    add_mt_bench()
    Path("gguf/tiny-q8_0.gguf").unlink()
    Path("results/attention_visualizations.png").unlink()
    Path("store/contaminated_ids.json").unlink()
    shutil.rmtree("checkpoints/tiny/phase1_pretrain")
    printed = gather(1)
    export = AFTER[1].format(checkpoint=DPO)
    output = "results/tiny/dpo/aligned.json"
    suite = f"scripts.run_evals --checkpoint {DPO} --suite aligned --output {output}"
    for name, command in (
        ("gguf/tiny-q8_0.gguf: missing", export),
        ("results/attention_visualizations.png: missing", AFTER[0].format(checkpoint=DPO)),
        ("data/contaminated_ids.json: missing", "scripts.prepare_data --config data.yaml"),
        ("score: MT-bench: not measured", suite),
        (
            "checkpoints/phase1: missing: checkpoints/tiny/phase1_pretrain has no checkpoint",
            "scripts.pipeline --plan plan.yaml",
        ),
    ):
        assert f"{name}\n    python -m {command}\n" in printed, name


def test_a_stage_that_was_left_out_is_not_missing(work, gather):
    def skip() -> None:
        append_event(Path("logs/tiny"), "skipped_stage", stage="dpo")

    gather(0)
    skip()  # after it ran
    output = gather(1)
    assert re.search("^checkpoints/dpo +skipped +by --skip$", output, re.M)
    assert f"{BENCHMARKS}: it reports {DPO}, not checkpoints/tiny/sft/step_3" in output
    assert not Path("checkpoints/dpo").is_symlink() and "dpo:" not in Path(CONFIGS).read_text()
    gather(0, "--checkpoint", str(DPO))  # chosen by the user
    for logs, event in (("logs/tiny", "used_stage"), ("logs/tiny/dpo", "begun")):
        skip()
        time.sleep(0.002)  # events have milliseconds
        append_event(Path(logs), event, stage="dpo")
        gather(0)
    shutil.rmtree("checkpoints/tiny/dpo")
    assert "checkpoints/dpo: missing" in gather(1)


def test_theta_context_and_document_mask_of_a_checkpoint(settings, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checkpoints" / "tiny" / "one"
    places = [f"output_dir={folder}", f"log_dir={tmp_path / 'logs' / 'tiny'}", "run=tiny"]
    assert train_here(settings(*places, "rope_theta=[10000, 80000]"))
    monkeypatch.chdir(tmp_path)

    def check(code: int, step: int = 6) -> str:
        monkeypatch.setattr(sys, "argv", ["x", f"checkpoints/tiny/one/step_{step}", "--model"])
        with pytest.raises(SystemExit) as end:
            verify_checkpoint.main()
        assert end.value.code == code
        return capsys.readouterr().out

    output = check(0)
    assert "rope theta 80,000 (as in logs/tiny/one.config.yaml), context 64 tokens" in output
    config, of_stage = Path("logs/tiny/one.config.yaml"), Path("logs/tiny/one/one.config.yaml")
    of_stage.parent.mkdir()
    config.rename(of_stage)  # as in the logs of SFT and DPO
    assert f"rope theta 80,000 (as in {of_stage}), context 64 tokens" in check(0)
    of_stage.rename(config)
    differences = re.search(r"differ by at most (\S+); without the mask by (\S+)", output)
    error, mixed = map(float, differences.groups())
    assert error < 1e-4 < 1e-3 < mixed
    assert "WRONG" not in check(0, step=3)  # theta still rises at that step
    with monkeypatch.context() as patch:
        mask = nanollama.attention_mask
        patch.setattr(nanollama, "attention_mask", lambda doc_ids, *rest: mask(None, *rest))
        assert "WRONG: the logits of packed and separate documents differ" in check(1)
    config, manifest = (folder / "step_6" / name for name in ("config.json", "manifest.json"))
    rope = {"rope_type": "default", "rope_theta": 1e4}
    change(config, lambda differences: differences.update(rope_theta=1e4, rope_parameters=rope))
    change(
        manifest,
        lambda differences: differences["files"].update({"config.json": file_hash(config)}),
    )
    assert "WRONG: rope theta is 10,000, but logs/tiny/one.config.yaml has 80,000" in check(1)


def test_the_attention_picture_says_what_it_is_of(tree):
    with Image.open(tree / "results" / "attention_visualizations.png") as image:
        about = {key: image.text[key] for key in ("checkpoint_hash", "input_length")}
    assert about == {"checkpoint_hash": folder_hash(tree / DPO), "input_length": "64"}


def test_results_measured_by_hand_count_for_their_stage(tmp_path):
    def result(name: str, step: str, digest: str, **more: str) -> None:
        content = {"checkpoint": f"checkpoints/run/{step}", "checkpoint_hash": digest, **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    result("suite", "gold/step_9", "a")
    assert judged_hash(tmp_path, "gold") == "a" and judged_hash(tmp_path, "base") is None
    result("needle", "gold/step_9", "b")
    assert judged_hash(tmp_path, "gold") is None  # of two checkpoints
    (tmp_path / "decision.json").write_text(json.dumps({"of": "x"}))
    result("suite", "gold/step_9", "a", of="x")
    result("needle", "gold/step_9", "b", of="y")
    assert judged_hash(tmp_path, "gold") == "a"
