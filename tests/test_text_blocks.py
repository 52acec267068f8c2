"""Standard errors of held-out text: the jackknife, ranks, paired changes, and the report."""

import json
import math
import os
import random
import re
import sys
from html import unescape
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import one_thread, save_tiny, tiny_config
from report_example import example_report, write_run
from test_report_page import render, section, text_of

from data.dataloader import row_batches
from data.packing import StreamRows
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer, save_tokenizer, token_bytes
from evals import eval_own, eval_perplexity
from evals.engines import load_model
from evals.eval_perplexity import perplexity
from evals.report.markup import error
from evals.report.metric_names import metric_of
from evals.report.stages import stages
from evals.run import evaluate
from evals.text_blocks import MAX_BLOCKS, blocks_of, change_stderr, figures, stderrs, total
from models.hf import load_hf, save_hf

CONFIG = tiny_config(max_position_embeddings=64)
LN2 = math.log(2)


def text_rows(rng: np.random.Generator, count: int, bits: float) -> np.ndarray:
    """Independent rows [count, 3] of nats, tokens and bytes, with about `bits` bits per byte."""
    size = rng.integers(200, 400, count)
    nats = size * LN2 * (bits + 0.3 * rng.standard_normal(count))
    return np.stack([nats, np.full(count, 64.0), size], 1)


# ---- the jackknife


def test_blocks_are_equal_consecutive_and_sum_to_the_text():
    rows = text_rows(np.random.default_rng(0), 77, 1.0).tolist()
    blocks = blocks_of(rows)
    assert [len(values) for values in blocks.values()] == [MAX_BLOCKS] * 3
    assert set(blocks["tokens"]) == {2 * 64, 3 * 64}
    assert blocks["nats"][:2] == [math.fsum(r[0] for r in rows[:2]), sum(r[0] for r in rows[2:4])]
    assert total({"a": blocks}) == pytest.approx(np.sum(rows, 0).tolist(), rel=1e-12)
    assert blocks_of(rows[:3])["bytes"] == [row[2] for row in rows[:3]]


def test_the_error_equals_a_jackknife_by_brute_force():
    """Leave out rows of a block, repeat the others of its source, and compute the ratio anew."""
    rng = np.random.default_rng(1)
    sources = {"a": text_rows(rng, 32, 0.8), "b": text_rows(rng, 9, 1.7)}  # a row is a block
    blocks = {name: blocks_of(rows.tolist()) for name, rows in sources.items()}

    def bits_without(names: list[str], source: str, row: int) -> float:
        sums = np.zeros(3)
        for name in names:
            rows = np.delete(sources[name], row, 0) if name == source else sources[name]
            sums += len(sources[name]) * rows.mean(0)
        return sums[0] / LN2 / sums[2]

    def brute_force(names: list[str]) -> float:
        variance = 0.0
        for source in names:
            n = len(sources[source])
            values = [bits_without(names, source, row) for row in range(n)]
            variance += (n - 1) ** 2 / n * np.var(values, ddof=1)
        return math.sqrt(variance)

    for names in (["a"], ["b"], ["a", "b"]):
        error = stderrs({name: blocks[name] for name in names})["bits_per_byte"]
        assert error == pytest.approx(brute_force(names), rel=1e-9)


def test_the_error_is_that_of_repeated_samples():
    """Independent rows of two sources: the jackknife is near the spread of the figures."""
    rng = np.random.default_rng(2)
    values, errors = [], []
    for _ in range(400):
        sources = {
            name: blocks_of(text_rows(rng, count, bits).tolist())
            for name, count, bits in (("a", 160, 0.8), ("b", 64, 1.7))
        }
        groups = [{"a": sources["a"]}, {"b": sources["b"]}, sources]
        values.append([figures(*total(group))["bits_per_byte"] for group in groups])
        errors.append([stderrs(group)["bits_per_byte"] for group in groups])
    spread = np.std(values, axis=0, ddof=1)
    assert np.sqrt(np.mean(np.square(errors), axis=0)) == pytest.approx(spread, rel=0.12)


def test_perplexity_follows_the_loss():
    blocks = {"a": blocks_of(text_rows(np.random.default_rng(3), 64, 1.0).tolist())}
    errors, values = stderrs(blocks), figures(*total(blocks))
    by_the_delta_method = values["perplexity"] * errors["loss"]
    assert errors["perplexity"] == pytest.approx(by_the_delta_method, rel=0.05)


@pytest.mark.parametrize(
    "rows",
    [
        [[50.0, 64.0, 200.0]],
        [[50.0, 64.0, 200.0], [0.0, 0.0, 0.0]],  # nothing is left without the first
        [[50.0, 64.0, 200.0], [math.nan, 64.0, 200.0]],
        [[5e5, 64.0, 200.0], [4e5, 64.0, 200.0]],  # the perplexity is infinite
    ],
)
def test_without_two_usable_blocks_there_is_no_error(rows):
    good = blocks_of(text_rows(np.random.default_rng(4), 8, 1.0).tolist())
    assert stderrs({"a": blocks_of(rows)})["perplexity"] is None
    if len(rows) == 1:
        errors = stderrs({"a": blocks_of(rows), "b": good})
        assert errors == {"loss": None, "perplexity": None, "bits_per_byte": None}
        assert change_stderr({"a": blocks_of(rows)}, {"a": blocks_of(rows)}, "loss") is None


# ---- the command


@pytest.fixture
def run(checkpoint, text_store, tmp_path, monkeypatch, capfd):
    """Run eval_perplexity with these flags; its results file and stdout."""

    def run(*more: str) -> tuple[dict, str]:
        arguments = ["--checkpoint", checkpoint, "--dataset", text_store, "--device", "cpu"]
        arguments += ["--output", tmp_path / "perplexity.json", *more]
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        eval_perplexity.main()
        return json.loads((tmp_path / "perplexity.json").read_text()), capfd.readouterr().out

    return run


@pytest.mark.parametrize("mode", [["--tokens", "6400"], ["--tokens", "all", "--stride", "64"]])
def test_the_results_have_blocks_and_errors_of_each_source(run, mode):
    results, printed = run(*mode)
    assert list(results["blocks"]) == ["first", "second"]
    for name, estimates in results["metrics"].items():
        sources = results["blocks"] if name == "all" else {name: results["blocks"][name]}
        for metric, value in figures(*total(sources)).items():
            assert estimates[metric]["value"] == pytest.approx(value, rel=1e-9)
        assert estimates["tokens"]["stderr"] is None
        error = estimates["bits_per_byte"]["stderr"]
        assert error == stderrs(sources)["bits_per_byte"] > 0
        line = next(line for line in printed.splitlines() if line.split()[0] == name)
        assert re.search(rf"bits per byte \d+\.\d{{3}} \+- {error:.3f}  \(", line)
    assert "no standard error" not in printed


def test_one_row_or_document_has_no_error_and_the_output_says_so(run, tmp_path):
    results, printed = run("--limit", "1")
    assert results["metrics"]["first"]["bits_per_byte"]["stderr"] is None
    assert "+-" not in printed and printed.count("note: no standard error") == 1
    assert "for first, second, all: each source needs at least 2 rows" in printed
    two_and_one = [{"text": f"{name} fell on the hills", "source": name} for name in "aab"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in two_and_one))
    results, printed = run("--dataset", str(tmp_path / "texts.jsonl"))
    assert "no standard error for b, all: each source needs" in printed


def test_sums_by_row_do_not_change_the_figures(checkpoint, text_store):
    model, sizes = load_hf(checkpoint), torch.from_numpy(token_bytes(load_tokenizer(checkpoint)))
    shards = TokenShards(text_store / "tokens" / "first", "val")
    batches = {"first": row_batches(StreamRows(shards, 64), 64, 4, 10)}
    row_sums: dict[str, list[torch.Tensor]] = {"first": []}
    alone = perplexity(model, batches, sizes)
    assert perplexity(model, batches, sizes, row_sums=row_sums) == alone
    rows = torch.cat(row_sums["first"])
    assert rows.shape == (12, 3) and not rows[10:].any()  # two rows of padding
    assert rows.sum(0)[1] == alone["all"]["tokens"] == 640


@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_two_ranks_have_the_blocks_of_one(kind, checkpoint, text_store, tmp_path):
    """37 rows or texts a source and batches of 2: rows alternate, and the last are padding."""
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": "rain on the hills " * (1 + i % 5), "source": "ab"[i % 2]} for i in range(74)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = text_store if kind == "rows" else texts
    arguments = ["--checkpoint", checkpoint, "--dataset", data, "--device", "cpu"]
    arguments += ["--limit", "37", "--batch_size", "2", "--output"]
    launch = ["scripts.launch", "--nproc_per_node=2", "-m"]
    results = []
    for name, launcher in (("one", []), ("two", launch)):
        output = tmp_path / name / "perplexity.json"
        words = [*launcher, "evals.eval_perplexity", *arguments, output]
        done = forked.run([sys.executable, "-m", *map(str, words)], env=one_thread())
        assert done.returncode == 0, done.stderr
        results.append(json.loads(output.read_text()))
    one, two = results
    assert one["n"] == two["n"] == 74
    for name, blocks in one["blocks"].items():
        assert len(blocks["nats"]) == MAX_BLOCKS
        for key in ("tokens", "bytes"):
            assert two["blocks"][name][key] == blocks[key]
        assert two["blocks"][name]["nats"] == pytest.approx(blocks["nats"], rel=1e-6)
    if kind == "rows":
        assert two["blocks"] == one["blocks"]
    for name, estimates in one["metrics"].items():
        for metric, estimate in estimates.items():
            expected = estimate["stderr"] and pytest.approx(estimate["stderr"], rel=1e-3)
            assert two["metrics"][name][metric]["stderr"] == expected


def test_own_texts_have_an_error_over_their_rows(checkpoint, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"the rain fell over {i} hills and {i * i} mats", "subject": str(i)}
        for i in range(5)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.yaml").write_text("{name: mine, path: rows.jsonl, kind: text}")
    parser = eval_own.parser()
    args = parser.parse_args(["--checkpoint", str(checkpoint), "--config", "mine.yaml"])
    content = evaluate(eval_own.build(args), model, None)
    assert len(content["blocks"]["all"]["nats"]) == 5  # subjects of one row do not prevent it
    assert content["metrics"]["bits_per_byte"]["stderr"] > 0
    assert content["metrics"]["bits_per_byte"]["n"] is None  # not a mean over items
    args.limit = 1
    content = evaluate(eval_own.build(args), model, None)
    assert content["metrics"]["bits_per_byte"]["stderr"] is None
    assert content["note"] == "no standard error: it needs at least 2 rows"


# ---- changes


@pytest.fixture(scope="module")
def trained(text_store, tmp_path_factory) -> list[Path]:
    """Two checkpoints of one short run."""
    place = tmp_path_factory.mktemp("trained")
    start = save_tiny(place / "step_0", CONFIG, text_store)
    model = load_hf(start)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    shards = TokenShards(text_store / "tokens" / "first", "train")
    folders = []
    for step, batch in enumerate(row_batches(StreamRows(shards, 64), 64, 8, 8 * 48), 1):
        nll = model(batch.tokens, batch.targets, batch.doc_ids).nll
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (40, 48):
            folders.append(place / f"step_{step}")
            save_hf(folders[-1], CONFIG, model.state_dict(), torch.float32, bos=0, eos=0, pad=1)
            save_tokenizer(load_tokenizer(start), folders[-1])
    return folders


def test_a_paired_error_is_smaller_between_checkpoints_of_a_run(trained, text_store, tmp_path):
    def changes(*flags: list[str]) -> dict[str, dict]:
        for folder, more in zip(trained, flags, strict=True):
            arguments = ["--checkpoint", str(folder), "--dataset", str(text_store), *more]
            args = eval_perplexity.parser().parse_args([*arguments, "--device", "cpu"])
            args.output = tmp_path / folder.name / "perplexity.json"
            eval_perplexity.resolve_data(args)
            content = eval_perplexity.measure(args, load_model(folder, "cpu"))
            decision = {"metrics": content["metrics"]}
            (tmp_path / folder.name / "decision.json").write_text(json.dumps(decision))
        metrics = stages(tmp_path)[trained[1].name]["metrics"]
        return {key: metrics[key]["change"] for key in metrics if key.endswith("bits_per_byte")}

    independent = changes(["--tokens", "6400"], ["--tokens", "6464"])  # other rows
    paired = changes(["--tokens", "6400"], ["--tokens", "6400"])
    assert set(paired) == {f"{name}.bits_per_byte" for name in ("first", "second", "all")}
    for key, change in paired.items():
        assert change["paired"] and not independent[key]["paired"]
        assert 0 < change["stderr"] < independent[key]["stderr"] / 2
    two_contexts = changes(["--tokens", "6400"], ["--tokens", "6400", "--sequence_length", "32"])
    assert not any(change["paired"] for change in two_contexts.values())


def test_the_paired_error_is_that_of_the_difference_of_equal_blocks():
    rng = np.random.default_rng(5)
    rows = text_rows(rng, 64, 1.0)
    better = rows * [0.9, 1, 1] + np.outer(rng.standard_normal(64), [2.0, 0, 0])
    before, after = ({"a": blocks_of(text.tolist())} for text in (rows, better))
    difference = {"a": blocks_of((better - rows * [1, 0, 0]).tolist())}  # a ratio by bytes, too
    expected = stderrs(difference)["bits_per_byte"]
    assert change_stderr(before, after, "bits_per_byte") == pytest.approx(expected, rel=1e-9)
    assert expected < stderrs(before)["bits_per_byte"] / 2


# ---- the report

BITS = {"step_260": 2.0, "sft": 2.3, "dpo": 2.3}


def add_blocks(place: Path) -> None:
    """Give the results of write_run blocks: two sources and a text of the user's own."""
    rng = random.Random(0)
    difficulty = {name: [rng.gauss(1, 0.1) for _ in range(32)] for name in ("stem", "web", "prose")}
    for stage, bits in BITS.items():
        blocks = {
            name: blocks_of(
                [[4000 * LN2 * bits * d + rng.gauss(0, 5), 1000.0, 4000.0] for d in by_block]
            )
            for name, by_block in difficulty.items()
        }
        own = {"all": blocks.pop("prose")}
        groups = {name: {name: blocks[name]} for name in blocks} | {"all": blocks}
        metrics = {name: estimates(sources) for name, sources in groups.items()}
        folder = place / "results" / stage
        common = {"checkpoint_hash": stage, "data_hashes": {"text": "0"}}
        text = {"task": "perplexity", "metrics": metrics, "n": 64, "blocks": blocks, **common}
        write(folder / "perplexity.json", text)
        mine = {"task": "prose", "kind": "text", "metrics": estimates(own), "n": 32}
        write(folder / "prose.json", {**mine, "blocks": own, **common})
        only_loss = {"loss": estimates(own)["loss"], "tokens": estimates(own)["tokens"]}
        write(folder / "poems.json", {**mine, "task": "poems", "metrics": only_loss, **common})
        decision = json.loads((folder / "decision.json").read_text())
        decision["metrics"] |= {**metrics, "prose": estimates(own)}
        decision |= {"gates": [], "values": [], "references": []}
        write(folder / "decision.json", decision)


def estimates(sources) -> dict[str, dict]:
    errors = stderrs(sources)
    values = figures(*total(sources)).items()
    return {name: {"value": value, "stderr": errors.get(name), "n": None} for name, value in values}


def write(path: Path, content: dict) -> None:
    """Write JSON; a file that exists keeps its time, which gives the order of the stages."""
    times = path.stat() if path.exists() else None
    path.write_text(json.dumps(content))
    if times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def place(tmp_path) -> Path:
    write_run(tmp_path)
    add_blocks(tmp_path)
    return tmp_path


def test_the_report_shows_paired_changes_and_bold_only_beyond_noise(place):
    report = example_report(place)
    shown = section(render(report), "Stage by stage")
    for name in ("all", "prose"):
        key = f"{name}.bits_per_byte"
        row = re.search(rf'<tr><th scope="row"><span title="{key}">.*?</tr>', shown)[0]
        worse, noise = re.findall(r'<span class="change .*?</span>', row)[:2]
        assert "<b>+0." in worse and "▼ worse, paired" in worse and "±" in worse
        assert "<b>" not in noise and "within noise, paired" in noise
        stage = report["stages"]["sft"]["metrics"][key]
        before = report["stages"]["step_260"]["metrics"][key]
        unpaired = math.hypot(stage["stderr"], before["stderr"])
        assert 0 < stage["change"]["stderr"] < unpaired / 5
        assert metric_of(key).text(stage["stderr"]) in text_of(row)


@pytest.mark.parametrize("difference", ["data", "blocks", "settings", "value"])
def test_a_change_between_different_texts_is_not_paired(place, difference):
    path = place / "results" / "dpo" / "perplexity.json"
    content = json.loads(path.read_text())
    if difference == "data":
        content["data_hashes"] = {"text": "1"}
    elif difference == "blocks":
        content["blocks"]["stem"]["bytes"][3] += 1
        content["blocks"]["stem"]["bytes"][4] -= 1
    elif difference == "settings":
        content["stride"] = 64
    else:  # the file was measured again after the decision
        content["blocks"]["stem"]["nats"][3] += 1000
    write(path, content)
    found = stages(place / "results")
    metrics, before = found["dpo"]["metrics"], found["sft"]["metrics"]
    for key in ("stem.bits_per_byte", "all.bits_per_byte"):
        change = metrics[key]["change"]
        assert not change["paired"]
        assert change["stderr"] == math.hypot(before[key]["stderr"], metrics[key]["stderr"])
    is_paired = metrics["web.bits_per_byte"]["change"]["paired"]
    assert is_paired == (difference in ("blocks", "value"))
    assert metrics["prose.bits_per_byte"]["change"]["paired"]


def test_old_results_render_without_an_error(place):
    for name in ("perplexity", "prose"):
        path = place / "results" / "sft" / f"{name}.json"
        content = json.loads(path.read_text())
        del content["blocks"]
        write(path, content)
    decision = json.loads((place / "results" / "sft" / "decision.json").read_text())
    for group in ("stem", "web", "all", "prose"):
        decision["metrics"][group]["bits_per_byte"]["stderr"] = None
    write(place / "results" / "sft" / "decision.json", decision)
    report = example_report(place)
    for stage in ("sft", "dpo"):
        change = report["stages"][stage]["metrics"]["all.bits_per_byte"]["change"]
        assert change["stderr"] is None and not change["paired"]
    shown = section(render(report), "Stage by stage")
    row = re.search('<tr><th scope="row"><span title="all.bits.*?</tr>', shown)[0]
    first, second = re.findall(r'<span class="change .*?</span>', row)[:2]
    assert "±" not in first + second and "<b>" not in first + second


def test_held_out_text_lists_the_users_own_texts_with_n_and_error(place):
    report = example_report(place)
    html = section(render(report), "Held-out text")
    names = re.findall(r'<div class="what"><b><span title="([\w.]+)">', html)
    assert names[-2:] == ["all.bits_per_byte", "prose.bits_per_byte"] and len(names) == 4
    own = report["evaluations"]["prose"]["metrics"]["bits_per_byte"]
    shown = text_of(html)
    assert "prose your own texts, perplexity" in shown
    assert f"{own['value']:.3f} ± {own['stderr']:.3f} n 32" in shown
    assert html.count('class="err"') == 4
    assert re.search(r"Held-out text, poems, loss.*?: [\d.]+ ± [\d.]+ n 32", unescape(shown))
    bars = section(render(report), "Benchmarks")
    assert "prose" not in bars and "poems" not in bars  # a text's figures are not rates


def test_a_small_error_is_not_shown_as_zero():
    bits, accuracy = metric_of("all.bits_per_byte"), metric_of("hellaswag.acc")
    assert [error(bits, e) for e in (0.0123, 0.00042, None)] == [" ± 0.012", " ± 0.0004", ""]
    assert error(accuracy, 0.0004) == " ± 0.0"
