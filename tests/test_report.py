"""The report page is self-contained and equals its JSON; chunked attention is exact."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, VOCAB, tiny_config

from evals import eval_needle
from evals.engines import folder_hash
from evals.report import build as report
from evals.report import trained
from models.hf import load_hf
from scripts import visualize_attention
from training.state import State

CONFIG = tiny_config(max_position_embeddings=256)
BREAKS = "one\u2028two\u2029three\u0085four\x0bfive"  # line ends only for str.splitlines
VOID = {"meta", "line", "polyline", "br", "link", "img", "input"}


@pytest.fixture(scope="module")
def page_case(checkpoint, tmp_path_factory):
    """A report of synthetic results and logs, and its output folder."""
    place = tmp_path_factory.mktemp("report")
    results, logs = place / "results", place / "logs"
    results.mkdir()
    logs.mkdir()
    of = {"checkpoint_hash": folder_hash(checkpoint)}

    def put(name, task, metrics, n, n_of=None, **more):
        estimates = {
            key: {"value": value, "stderr": error} for key, (value, error) in metrics.items()
        }
        for key, count in (n_of or {}).items():
            estimates[key]["n"] = count
        (results / name).write_text(
            json.dumps({"task": task, "metrics": estimates, "n": n, "shots": 0, **of, **more})
        )

    put("hellaswag.json", "hellaswag", {"acc": (0.4321, 0.01), "acc_norm": (0.4321, 0.0123)}, 800)
    put("tool_use.json", "tool_use", {"free_syntax": (0.5, 0.3)}, 8, n_of={"free_syntax": 3})
    put("smaller.json", "hellaswag", {"acc_norm": (0.99, 0.01)}, 3)
    put("other.json", "mmlu", {"acc": (0.77, 0.01)}, 9, checkpoint_hash="of another")
    clean = {"metrics": {"acc": {"value": 0.2, "stderr": 0.1}}, "n": 3, "contaminated": ["x"]}
    put("mmlu.json", "mmlu", {"acc": (0.2625, 0.004)}, 400, clean=clean)
    put("needle.json", "needle", {"accuracy": (0.5, 0.1)}, 4, samples="needle.samples.jsonl")
    cells = [
        ("128", "0.000", 1.0),
        ("128", "0.000", 0.0),
        ("256", "0.000", 1.0),
        ("128", "1.000", 0.25),
    ]
    lines = [
        {"subject": "single", "scores": {"length": a, "depth": b, "accuracy": c, "text": BREAKS}}
        for a, b, c in cells
    ]
    (results / "needle.samples.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    assert eval_needle.grid(results / "needle.samples.jsonl")["single"][128, 0.0] == [1.0, 0.0]
    values, names = (
        {"wiki": (2.0, 7.4, 1.25), "all": (2.0, 7.4, 1.5)},
        ("loss", "perplexity", "bits_per_byte"),
    )
    bits = {
        key: {n: {"value": v, "stderr": None} for n, v in zip(names, row, strict=True)}
        for key, row in values.items()
    }
    (results / "perplexity.json").write_text(
        json.dumps({"task": "perplexity", "metrics": bits, "n": 9, **of})
    )
    summary = {
        "task": "quick",
        "metrics": {},
        "not_measured": {"gsm8k": "no <data>", "mmlu": "was"},
        **of,
    }
    (results / "quick.json").write_text(json.dumps(summary))
    rows = [
        {
            "step": i,
            "phase": "one" if i < 60 else "two",
            "loss": 9 / i**0.3,
            "tokens": 100 * i,
            "step_s": 2,
        }
        for i in range(1, 101)
    ]
    rows[50]["val/loss"], rows[70]["loss"] = 4.5, float("nan")
    (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = {"metric": "all.perplexity", "go": 8, "no_go": 9}
    event = {
        "event": "gate",
        "time": "2026-01-01T00:00:00",
        "step": 100,
        "outcome": "caution",
        "accepted": None,
    }
    (logs / "events.jsonl").write_text(
        json.dumps({**event, "gates": [gate], "values": [8.5], "advice": "wait <a bit>"}) + "\n"
    )
    hits = [{"test_set": "mmlu", "test_id": "x"}, {"test_set": "mmlu", "test_id": "y"}]
    scores = {
        "documents": {"d": hits},
        "too_short": {"mmlu": ["z"]},
        "settings": {"test_sets": {"mmlu": 400, "arc": 30}},
    }
    (place / "ids.json").write_text(json.dumps(scores))
    command = [
        "--checkpoint",
        str(checkpoint),
        "--logs",
        str(logs),
        "--results",
        str(results),
        "--device",
        "cpu",
    ]
    more = [
        "--contaminated",
        str(place / "ids.json"),
        "--name",
        "tiny <b>",
        "--max_new_tokens",
        "8",
        "--output",
        str(place / "out"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *command, *more, "--prompt", "def f(", "x " * 400])
        report.main()
    return json.loads((place / "out" / "benchmark_results.json").read_text()), place / "out"


class Page(HTMLParser):
    """Collects open tags, external resources and texts of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.resources, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.resources += [
            (tag, value)
            for name, value in attrs
            if name in ("src", "srcset", "data") or (tag, name) == ("link", "href")
        ]

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID, tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_results_are_of_this_checkpoint_and_the_largest_run(page_case):
    report_data, _ = page_case
    assert set(report_data["evaluations"]) == {
        "hellaswag",
        "mmlu",
        "needle",
        "perplexity",
        "tool_use",
    } and report_data["not_measured"] == {"gsm8k": "no <data>"}
    named = {"task": "hellaswag", "metric": "acc_norm"}
    assert report_data["scores"]["hellaswag"] == {
        "value": pytest.approx(43.21),
        "stderr": pytest.approx(1.23),
        "shots": 0,
        "n": 800,
        **named,
    }
    assert report_data["scores"]["mmlu"]["value"] == pytest.approx(26.25)
    assert report_data["needle"]["single"]["cells"] == {
        "128/0.0": 0.5,
        "256/0.0": 1.0,
        "128/1.0": 0.25,
    }
    assert report_data["contamination"]["sets"]["mmlu"] == {
        "items": 400,
        "too_short": 1,
        "items_hit": 2,
        "documents_hit": 1,
    }
    assert report_data["parameters"] == CONFIG.num_parameters
    assert [phase["begin"] for phase in report_data["training"]["phases"]] == [
        0,
        59,
    ] and report_data["training"]["tokens"] == 10_000
    assert report_data["training"]["curve"][70][1] is None  # NaN is invalid in JSON and in charts
    assert report_data["samples"][0]["text"] and report_data["samples"][-1]["text"] is None


def test_the_page_is_self_contained_and_equals_the_json(page_case):
    report_data, out = page_case
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert (
        not page.open
        and not page.resources
        and "@import" not in text
        and "url(" not in text
        and "<script" not in text
    )
    page_text = " ".join(page.texts)
    numbers = [f"{score['value']:.1f}" for score in report_data["scores"].values()]
    numbers += [f"± {score['stderr']:.1f}" for score in report_data["scores"].values()]
    numbers += [
        f"{m['bits_per_byte']['value']:.3f}"
        for m in report_data["evaluations"]["perplexity"]["metrics"].values()
    ]
    numbers += [f"{value:.2f}" for value in report_data["needle"]["single"]["cells"].values()]
    numbers += [
        report_data["checkpoint_hash"],
        "8.500",
        "CAUTION",
        "wait <a bit>",
        "no <data>",
        "tiny <b>",
        "HellaSwag, accuracy (%)",
        "50.0 ± 30.0  n 3",
        "acc 26.2 → 20.0",
    ]
    for number in numbers:
        assert number in page_text, number
    assert report_data["samples"][0]["text"] in page_text


def test_training_history_ends_at_the_checkpoint(tmp_path):
    rows = [
        {"step": i, "phase": "a" if i < 4 else "b", "loss": 1.0, "tokens": 10 * i, "val/loss": 2.0}
        for i in range(1, 7)
    ]
    events = [{"event": "gate", "step": step, "outcome": "go"} for step in (2, 6, "sft")] + [
        {"event": "skipped", "step": 5}
    ]
    for name, lines in (("metrics", rows), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    histories = {}
    for place, phase in (
        ("a/step_2", "a"),
        ("b/step_6", "b"),
        ("b/step_5", ""),
        ("sft/step_3", "sft"),
        ("elsewhere", "b"),
    ):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        if phase:  # else its state/ is gone, and its name tells
            (folder / "state").mkdir()
            step = 4 if place == "elsewhere" else int(place.rpartition("_")[2])
            (folder / "state" / "trainer.json").write_text(
                json.dumps({**State(None, None, phase=phase).position(), "step": step})
            )
        history = report.training(tmp_path, folder)
        where = (
            history["steps"],
            history["tokens"],
            len(history["curve"]),
            len(history["held_out"]),
        )
        histories[place] = (
            *where,
            [phase["name"] for phase in history["phases"]],
            [gate["step"] for gate in history["gates"]],
        )
        assert history["incidents"] == ({"skipped": 1} if history["steps"] >= 5 else {})
    assert histories == {
        "a/step_2": (2, 20, 2, 2, ["a"], [2]),
        "b/step_6": (6, 60, 6, 6, ["a", "b"], [2, 6]),
        "b/step_5": (5, 50, 5, 5, ["a", "b"], [2]),
        "sft/step_3": (6, 60, 6, 6, ["a", "b"], [2, 6, "sft"]),  # its inputs
        "elsewhere": (4, 40, 4, 4, ["a", "b"], [2]),
    }


def test_every_published_score_has_its_source_and_shots(page_case):
    report_data, out = page_case
    table = (out / "comparison_table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert (
        len(rows) == 2 + len(report_data["published"]["models"])
        and len({row.count("|") for row in rows}) == 1
    )
    assert "43.2 ± 1.2 (0, n 800)" in rows[1]
    for model in report_data["published"]["models"]:
        assert (
            model["from"]["source"] in report_data["published"]["sources"]
            and model["scores"].keys() <= report.COLUMNS.keys()
        )
        assert (
            model["from"]["harness"]
            and model["from"]["metric"]
            and all(s["shots"] is not None for s in model["scores"].values())
        )
    for name in ("TinyLlama", "MobileLLM", "SmolLM2", "OLMo", "Llama-3.2", "Pythia", "nanochat"):
        assert any(
            model["name"].startswith(name) for model in report_data["published"]["models"]
        ), name
    assert "def f([" in (out / "qualitative_samples.txt").read_text()


def test_a_browser_renders_the_page(page_case, tmp_path):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}",
        "--timeout=20000",
    ]
    picture = tmp_path / "page.png"
    size = ["--window-size=1000,1400", f"--screenshot={picture}"]
    done = subprocess.run(
        [chromium, *flags, *size, f"file://{page_case[1]}/report.html"],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert len(colours) > 200  # bars, curves and text, not an empty page


def test_a_report_without_results(checkpoint, tmp_path, monkeypatch, capfd):
    (tmp_path / "results").mkdir()
    command = [
        "x",
        "--checkpoint",
        str(checkpoint),
        "--results",
        str(tmp_path / "results"),
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    for more, expected in (
        (["--logs", str(tmp_path)], "has no metrics; give the --logs of the run"),
        (
            ["--contaminated", str(tmp_path / "none.json")],
            "cannot be read as a contamination report",
        ),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *more, "--max_new_tokens", "2"])
        with pytest.raises(SystemExit) as exit_info:
            report.main()
        assert exit_info.value.code == 2 and expected in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--max_new_tokens", "2"])
    report.main()  # a page with the available parts
    assert "<h2>Samples</h2>" in (tmp_path / "report.html").read_text()


def test_chunked_attention_equals_the_full_matrix(checkpoint, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    length, size = 100, 7
    tokens = torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(0))
    # Nine rows per chunk.
    statistics = visualize_attention.attention_statistics(
        load_hf(checkpoint), tokens, size=size, chunk=4 * length * 9
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        # [L, H, T, T]
        expected = torch.stack(theirs(tokens[None], output_attentions=True).attentions)[
            :, 0
        ].double()
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for i, (low, high) in enumerate(pairwise(edges)):
        inside = (distance >= low) & (distance < high)
        assert torch.allclose(
            statistics.profile[:, :, i], (expected * inside).sum((2, 3)) / length, atol=1e-5
        )
    assert statistics.profile.shape == (2, 4, 8) and torch.allclose(
        statistics.profile.sum(-1), torch.ones(2, 4, dtype=torch.float64)
    )
    assert torch.allclose(statistics.sink, expected[:, :, 1:, 0].mean(-1), atol=1e-5)
    bands = torch.arange(length) * size // length
    for a in range(size):
        for b in range(size):
            part = expected[:, :, bands == a][..., bands == b].sum(-1).mean(-1)
            assert torch.allclose(statistics.maps[:, :, a, b], part, atol=1e-5)
    output = tmp_path / "attention.png"
    arguments = [
        "x",
        "--checkpoint",
        str(checkpoint),
        "--input_length",
        "200",
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    visualize_attention.main()
    assert output.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*arguments, "--input_length", "257"])
    with pytest.raises(SystemExit):
        visualize_attention.main()


def test_the_page_needs_no_package_beyond_the_core():
    text = "".join(
        (ROOT / "evals" / "report" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("page", "charts")
    )
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.M))
    assert imported <= {"math", "collections", "html", "typing", "pathlib", "evals"}


def test_corpus_hash_and_origin(tmp_path):
    store = tmp_path / "store"
    (store / "documents" / "code").mkdir(parents=True)
    origins = []
    for release, digest in (("python 3.11.7", "a1"), ("python 3.12.1", "b2")):
        (store / "report.json").write_text(
            json.dumps({"inputs": {"documents": {"code": digest}}}), encoding="utf-8"
        )
        (store / "documents" / "code" / "manifest.json").write_text(
            json.dumps({"origin": release}), encoding="utf-8"
        )
        origins.append(trained.corpus([{"data": {"store": str(store)}}, {}])[str(store)])
    assert [origin["origins"]["code"] for origin in origins] == ["python 3.11.7", "python 3.12.1"]
    assert origins[0]["sha256"] != origins[1]["sha256"]
    assert trained.corpus([{"data": {"store": str(tmp_path)}}]) == {}
