"""eval_perplexity: data discovery, the amount of scored text and memory use."""

import json
import sys
import tracemalloc
import weakref
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint_of, save_tiny, tiny_config

from data.corpus.sources import GROUPS
from data.dataloader import validation_batches
from data.decontamination.benchmarks import stream_jsonl
from data.packing import StreamRows
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer, token_bytes
from evals import eval_perplexity, held_out, progress
from evals.engines import load_model
from evals.eval_perplexity import perplexity
from evals.report.build import measured
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training import setup
from training.config import load
from training.settings import load_settings

LENGTH = 64
CONFIG = tiny_config(max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory, text_store) -> Path:
    """A folder with a store of sources fineweb_edu and pg19, and a run of phases gold, sft, dpo."""
    root = tmp_path_factory.mktemp("root")
    tokens = root / "store" / "tokens"
    tokens.mkdir(parents=True)
    (root / "store" / "tokenizer").symlink_to(text_store / "tokenizer")
    for name, source in (("fineweb_edu", "first"), ("pg19", "second")):
        (tokens / name).symlink_to(text_store / "tokens" / source)
    for step in ("gold/step_6", "sft/step_9", "dpo/step_9"):
        save_tiny(root / "checkpoints" / "nano" / step, CONFIG, text_store)
    mix = "data.mix={fineweb_edu: 0.5, pg19: 0.5}"
    with chdir(root):
        runs = [
            load(
                ROOT / "configs" / "test_mode.yaml",
                ["run=nano", "phase=gold", "steps=9", "data.store=store", mix],
            ),
            load_settings(
                SFTConfig,
                ROOT / "configs/quickstart/sft.yaml",
                ["init_from=checkpoints/nano/gold", "run=nano"],
            ),
            load_settings(
                PreferenceRun,
                ROOT / "configs/quickstart/dpo.yaml",
                ["init_from=checkpoints/nano/sft", "run=nano"],
            ),
        ]
        with setup.ranks() as device:
            for run in runs:
                setup.write_run_files(run, device)
    return root


GOLD = Path("checkpoints/nano/gold/step_6")


def flags(root: Path, *more: str, checkpoint: Path = GOLD):
    """Parsed flags of eval_perplexity with resolved data."""
    arguments = ["--checkpoint", str(root / checkpoint), "--device", "cpu", *more]
    args = eval_perplexity.parser().parse_args(arguments)
    held_out.resolve_data(args)
    return args


@pytest.fixture
def run(root, tmp_path, monkeypatch, capfd):
    """Run eval_perplexity with these flags; its results file, stdout and stderr."""

    def run(*more: str):
        output = tmp_path / "perplexity.json"
        arguments = ["--checkpoint", str(GOLD), "--device", "cpu", "--output", str(output), *more]
        with monkeypatch.context() as patch:
            patch.chdir(root)
            patch.setattr(sys, "argv", ["x", *arguments])
            eval_perplexity.main()
        return json.loads(output.read_text()), *capfd.readouterr()

    return run


def values(results) -> dict[str, dict[str, float]]:
    metrics = results["metrics"].items()
    return {
        name: {key: estimate["value"] for key, estimate in part.items()} for name, part in metrics
    }


def available(root: Path, source: str) -> int:
    return len(TokenShards(root / "store" / "tokens" / source, "val"))


# ---- amount of scored text


def test_tokens_limit_each_source(run, root):
    results, out, _ = run("--tokens", "1300")
    # No --dataset: the run's store.
    assert set(results["metrics"]) == {
        "fineweb_edu",
        "pg19",
        "all",
    }
    for source in ("fineweb_edu", "pg19"):
        available_tokens = available(root, source)
        assert (
            results["coverage"][source]
            == {"tokens": 20 * LENGTH, "available_tokens": available_tokens}
            and available_tokens > 4 * 1300
        )
        assert values(results)[source][
            "tokens"
        ] == 20 * LENGTH and f"{20 * LENGTH:,} of {available_tokens:,}" in out.replace(
            " tokens", ""
        )
    assert results["tokens_per_source"] == 1300 and results["n"] == 40
    assert values(run("--tokens", "1300", "--limit", "3")[0])["pg19"]["tokens"] == 3 * LENGTH
    assert eval_perplexity.parser().parse_args(["--checkpoint", "x"]).tokens == 2**20


def test_rows_are_evenly_spaced(root):
    shards = TokenShards(root / "store" / "tokens" / "pg19", "val")
    count = (len(shards) - 1) // LENGTH
    rows = held_out.ChosenRows(shards, LENGTH, 20 * LENGTH, None)
    gaps = np.diff([*rows.indices, count])
    assert len(rows) == 20 and rows.indices[0] == 0 and gaps.min() > 1 and np.ptp(gaps) <= 1
    tokens, targets, doc_ids = (np.zeros(LENGTH, dtype) for dtype in (np.int64, np.int64, np.int32))
    rows.fill(7, tokens, targets, doc_ids)
    start = int(rows.indices[7]) * LENGTH
    assert (
        tokens.tolist() == shards.read(start, start + LENGTH)[0].tolist()
        and targets[:-1].tolist() == tokens[1:].tolist()
    )
    lengths = np.array([50, 900, 10, 40, 60, 30, 20, 90, 5, 70])
    chosen = held_out.evenly_spaced(lengths, 300)
    assert lengths[chosen].sum() <= 300 and len(chosen) > 1 and (np.diff(chosen) > 0).all()
    assert held_out.evenly_spaced(lengths, 0).tolist() == list(range(10))
    assert held_out.evenly_spaced(lengths[1:2], 300).tolist() == [0]  # cut by the caller


def test_the_choice_depends_on_neither_ranks_nor_batch_size(root, monkeypatch):
    monkeypatch.setattr(eval_perplexity.dist, "all_reduce", lambda sums: None)  # sums of one rank
    model = load_model(root / GOLD, "cpu")
    totals = []
    for size, world in ((1, 1), (3, 1), (4, 2), (3, 2)):
        args = flags(root, "--tokens", "704", "--batch_size", str(size))
        parts = [values(eval_perplexity.by_rows(args, model, rank, world)) for rank in range(world)]
        totals.append({name: [sum(p[name]["tokens"] for p in parts)] for name in parts[0]})
        for name, sums in totals[-1].items():
            sums.append(sum(part[name]["loss"] * part[name]["tokens"] for part in parts))
        assert all(part["pg19"]["tokens"] > 0 for part in parts)
    for other in totals[1:]:
        for name, sums in totals[0].items():
            assert other[name] == pytest.approx(sums, rel=1e-6), name
    assert totals[0]["all"][0] == 2 * 11 * LENGTH


@pytest.mark.parametrize("everything", ["all", "0"])
def test_all_equals_the_training_loops_validation_of_every_row(run, root, everything):
    results, _, _ = run("--tokens", everything)
    model = load_model(root / GOLD, "cpu").engine.model
    store = root / "store" / "tokens"
    batches = {
        name: validation_batches(TokenShards(store / name, "val"), LENGTH, 4, None)
        for name in ("fineweb_edu", "pg19")
    }
    expected = perplexity(
        model, batches, torch.from_numpy(token_bytes(load_tokenizer(root / GOLD)))
    )
    assert values(results) == {
        name: pytest.approx(figures, rel=1e-9) for name, figures in expected.items()
    }
    assert results["tokens_per_source"] is None
    assert results["coverage"]["pg19"]["tokens"] == (available(root, "pg19") - 1) // LENGTH * LENGTH


def test_batches_are_made_one_at_a_time(root, monkeypatch):
    filled, ahead, alive, batches = [0], [], [], []
    fill = StreamRows.fill

    def counted(self, *row):
        filled[0] += 1
        fill(self, *row)

    def look(module, inputs):
        batches.append(weakref.ref(inputs[0]))
        ahead.append(filled[0] - 2 * len(batches))
        alive.append(sum(batch() is not None for batch in batches))

    monkeypatch.setattr(StreamRows, "fill", counted)
    model = load_model(root / GOLD, "cpu")
    model.engine.model.register_forward_pre_hook(look)
    eval_perplexity.by_rows(flags(root, "--tokens", str(40 * LENGTH), "--batch_size", "2"), model)
    assert len(batches) == 2 * 20 and set(ahead) == {0} and max(alive) <= 2


def test_only_chosen_texts_are_in_memory(root, tmp_path):
    texts = tmp_path / "texts.jsonl"
    with open(texts, "w") as file:
        file.writelines(
            json.dumps({"text": f"{i} " * 2000, "source": "ab"[i % 2]}) + "\n" for i in range(800)
        )
    args = flags(root, "--dataset", str(texts), "--tokens", "5000")
    held_out.documents(args)  # one-time imports and caches
    tracemalloc.start()
    items, coverage = held_out.documents(args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts.stat().st_size > 5e6 and peak < 1e6
    scored = sum(len(item.row["text"]) for item in items if item.subject == "a")
    assert coverage["a"]["bytes"] == scored and 5000 < scored <= 5000 * held_out.BYTES_PER_TOKEN
    assert (
        coverage["a"]["available_documents"] == 400
        and coverage["a"]["documents"] == len(items) / 2 > 1
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "x"}\n{\n')
    assert next(stream_jsonl(broken)) == {"text": "x"}  # the second line has not been read yet


def test_documents_and_texts_have_the_same_limit(run, root, tmp_path):
    results, _, _ = run("--tokens", "400", "--stride", str(LENGTH))
    for source, of in results["coverage"].items():
        assert 0 < of["tokens"] <= 400 and values(results)[source]["tokens"] == of["tokens"]
        assert (
            of["available_tokens"] == available(root, source)
            and of["documents"] <= of["available_documents"]
        )
    one = tmp_path / "one.txt"
    one.write_text("the rain fell over the hills and nobody knew why. " * 100)
    cut, out, _ = run("--dataset", str(one), "--tokens", "200")
    assert cut["coverage"]["one"] == {
        "bytes": 800,
        "available_bytes": 5000,
        "documents": 1,
        "available_documents": 1,
    }
    assert "800 of 5,000 bytes" in out and set(cut["metrics"]) == {"one", "all"}
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.txt", "b.txt", "deep/c.txt")):
        (folder / name).write_text(f"book {i} " * 40)
    (folder / "notes.md").write_text("not a text")
    reference, _, _ = run("--dataset", str(folder), "--tokens", "all")
    assert reference["n"] == 3 and reference["coverage"]["books"]["bytes"] == 3 * 280
    (folder / "b.txt").write_text("another book")
    assert run("--dataset", str(folder))[0]["data_hashes"] != reference["data_hashes"]


def test_progress_is_lines_in_a_log_file_and_a_bar_on_a_terminal(run, monkeypatch):
    _, _, err = run("--tokens", "2560")
    lines = [line for line in err.splitlines() if line.startswith("pg19: ")]
    assert lines[0].startswith("pg19: 0 of 40 rows") and lines[-1].startswith("pg19: 40 of 40 rows")
    assert len(lines) == 2 and "\r" not in err  # a line every half minute; this took less
    monkeypatch.setattr(progress, "SECONDS", 0)
    _, _, err = run("--tokens", "2560")
    assert sum(line.startswith("pg19: ") for line in err.splitlines()) > 9
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("cli.survive_closed_pipes", lambda: None)
    _, _, err = run("--tokens", "2560")
    assert "\r" in err and "40/40" in err


# ---- location of the text


@pytest.mark.parametrize(
    "checkpoint",
    [GOLD, "checkpoints/nano/gold", "checkpoints/nano/sft", "checkpoints/nano/dpo/step_9"],
)
def test_the_store_is_that_of_the_pretraining_run(root, tmp_path, monkeypatch, checkpoint):
    for folder in (root, tmp_path):  # also from another folder
        monkeypatch.chdir(folder)
        args = flags(root, checkpoint=checkpoint)
        assert args.dataset.resolve() == root / "store" and args.sources is None
        assert list(held_out.shards_of(args)) == ["fineweb_edu", "pg19"]


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        *(
            (name, ["fineweb_edu"])
            for name in (
                "fineweb-edu-validation",
                "fineweb_edu",
                "fineweb-edu",
                "FineWeb-Edu_validation",
            )
        ),
        *((name, ["pg19"]) for name in ("pg19", "PG19-validation")),
        ("books-mixed-validation", ["pg19", "fineweb_edu"]),  # a group
    ],
)
def test_source_names_have_variants(root, monkeypatch, name, sources):
    monkeypatch.chdir(root)
    monkeypatch.setitem(GROUPS, "books_mixed", ("pg19", "fineweb_edu"))
    args = flags(root, "--dataset", name)
    assert args.sources == sources and [*held_out.shards_of(args)] == sources
    assert flags(root, "--data", name).sources == sources  # as a suite's --data perplexity=NAME


def test_other_text_and_single_sources_never_count_as_the_text_of_the_run(root, monkeypatch):
    monkeypatch.chdir(root)
    rows = [json.dumps({"text": f"short {i}"}) + "\n" for i in range(50)]
    Path("many.jsonl").write_text("".join(rows))
    Path("other").symlink_to("store")  # the run's store, by another path
    for more in ([], ["--dataset", "many.jsonl"], ["--dataset", "pg19", "--tokens", "all"]):
        flags = ["--checkpoint", str(GOLD), "--device", "cpu", "--tokens", "1300", *more]
        monkeypatch.setattr(sys, "argv", ["x", *flags])
        eval_perplexity.main()
    folder = Path("results/nano/gold/step_6")
    contents = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert contents.keys() == {"perplexity", "perplexity_many", "perplexity_pg19"}
    expected = contents["perplexity"]
    assert expected["n"] < contents["perplexity_many"]["n"] and "foreign_text" not in expected
    assert expected["n"] < contents["perplexity_pg19"]["n"]
    digest = expected["checkpoint_hash"]
    assert measured(Path("results"), digest)[0]["perplexity"]["metrics"] == expected["metrics"]
    (folder / "perplexity.json").unlink()
    (folder / "perplexity_pg19.json").unlink()
    assert measured(Path("results"), digest)[0] == {}
    figures = contents["perplexity_many"]["metrics"]  # the plan's own choice of text counts
    (folder / "decision.json").write_text(json.dumps({"metrics": figures}))
    assert measured(Path("results"), digest)[0]["perplexity"]["metrics"] == figures
    args = eval_perplexity.parser().parse_args(["--checkpoint", str(GOLD), "--dataset", "other"])
    held_out.resolve_data(args)
    assert not args.foreign


def test_mistakes_end_in_one_sentence(root, tmp_path, text_store, monkeypatch, capfd):
    monkeypatch.chdir(root)
    stray = save_tiny(tmp_path / "checkpoints" / "stray" / "step_1", CONFIG, text_store)
    (tmp_path / "empty").mkdir()

    def said(*more) -> str:
        flags = [
            "--checkpoint",
            str(GOLD),
            "--device",
            "cpu",
            "--output",
            str(tmp_path / "x.json"),
            *map(str, more),
        ]
        return complaint_of(eval_perplexity.main, flags, capfd, monkeypatch)

    assert "give --dataset a data store" in said("--checkpoint", stray)
    assert "pg19 does not exist; give --dataset" in said("--checkpoint", stray, "--dataset", "pg19")
    assert "available sources: fineweb_edu, pg19" in said("--dataset", "c4-validation")
    assert "already names pg19" in said("--dataset", "pg19", "--sources", "fineweb_edu")
    group = said("--dataset", "pg19_and_stack_mixed-validation")  # one of the two is missing
    assert "pg19_and_stack_mixed-validation is neither a path nor a source of" in group
    assert "has no .txt files" in said("--dataset", tmp_path / "empty")
    assert "too few for one row of 9999999" in said("--sequence_length", "9999999")
    (tmp_path / "x.txt").write_text("a text")
    assert "has no source who; available: x" in said(
        "--dataset", tmp_path / "x.txt", "--sources", "who"
    )
    (root / "store").rename(root / "moved")
    try:
        assert "store, is missing; give --dataset" in said()
    finally:
        (root / "moved").rename(root / "store")
    for wrong in ("many", "-5", "inf", "0.5"):
        with pytest.raises(SystemExit):
            eval_perplexity.parser().parse_args(["--checkpoint", "x", "--tokens", wrong])
        assert "argument --tokens" in capfd.readouterr().err
