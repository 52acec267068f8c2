"""The data pipeline: the fate of each document, kills and resumes, one node, Slurm and Ray."""

import fcntl
import json
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import forked
import numpy as np
import pytest
import yaml
from conftest import library, write_documents
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.formatters import PIIFormatter
from forked import Forked

from benchmarks.fault_points import point
from benchmarks.fault_sites import Site
from data.pipeline.prepare import prepare, train_store_tokenizer
from data.pipeline.recipe import Recipe, Split
from data.pipeline.steps import ChooseDuplicates, Mask, Signature
from data.shards import TokenShards
from data.tokenizers.bpe import load_tokenizer, special_ids
from training.settings import load_settings

ITEM = (
    "A farmer carries forty seven baskets of purple onions over the frozen bridge, sells "
    "nineteen of them to the miller's youngest daughter and drops six into the river. How many "
    "baskets reach the market on the other side?"
)
SECRET = "Write to some.body@somewhere.org or 8.8.8.8 about it."
FOREIGN = (
    "Die Bauern trugen ihre Körbe über die gefrorene Brücke und verkauften sie auf dem Markt in "
    "der alten Stadt. " * 3
)


def sentences(seed: int, count: int = 30) -> str:
    """Return English-like prose; two seeds share no sequence of 5 words."""
    rng = random.Random(seed)
    words = [
        "the",
        "a",
        "river",
        "stone",
        "quiet",
        "morning",
        "found",
        "carried",
        "slowly",
        "near",
        "every",
        "garden",
        "letter",
    ]
    numbers = [
        f"{rng.choice(words)} {rng.choice(words)} {rng.choice(words)} {rng.randrange(10**6)}"
        for _ in range(count)
    ]
    return (
        "The "
        + ". The ".join(
            f"{number} was {rng.choice(words)} and {rng.choice(words)}" for number in numbers
        )
        + "."
    )


def make_store(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write a store of three sources in five parts; return recipe and expected fates."""
    prose = [(f"prose/{i}", sentences(i)) for i in range(40)]
    fate = {}

    def plant(source: list[tuple[str, str]], place: int, id: str, text: str, outcome: str) -> None:
        source.insert(place, (id, text))
        fate[id] = outcome

    others = [(f"other/{i}", sentences(100 + i)) for i in range(20)]
    plant(prose, 3, "foreign", FOREIGN, "language")
    plant(prose, 9, "short", "Too short.", "too_short")
    plant(prose, 30, "equal", sentences(2), "repeated")  # its duplicate prose/2 is in another part
    plant(prose, 31, "loud", "Buy it now. " * 60, "dup")
    # Its duplicate prose/7 is in another source.
    plant(others, 5, "near", sentences(7).replace("was", "is", 1), "repeated")
    plant(others, 8, "leak", f"{sentences(300, 10)} {ITEM} {sentences(301, 10)}", "contaminated")
    plant(prose, 12, "mail", f"{sentences(302)} {SECRET}", "kept")
    store = folder / "store"
    write_documents(store, "prose", prose, parts=2)
    write_documents(store, "other", others, parts=2)
    write_documents(store, "code", library(40))
    (folder / "tests.jsonl").write_text(
        json.dumps({"id": "q1", "text": ITEM}) + "\n" + json.dumps({"id": "q2", "text": "Why?"})
    )
    clean = {
        "min_chars": 50,
        "language": "en",
        "min_language_score": 0.3,
        "filters": ["gopher_repetition"],
        "mask_pii": True,
    }
    recipe = {
        "store": str(store),
        "tokenizer": {"vocab_size": 400},
        "sources": {"prose": clean, "other": {**clean, "filters": []}, "code": {}},
        "val_fraction": 0.1,
        "dedup": {"buckets": 4},
        "decontaminate": {"test_sets": [str(folder / "tests.jsonl")]},
        "executor": {"workers": 1},
    }
    path = folder / "recipe.yaml"
    # The order decides which duplicate stays.
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    train_store_tokenizer(load_settings(Recipe, path))
    return path, fate


def shards(store: Path) -> dict[str, bytes]:
    """Return each file of a store's shards as bytes."""
    paths = [path for path in sorted((store / "tokens").rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(store)): path.read_bytes() for path in paths if path.suffix != ".json"
    }


def texts(store: Path, source: str, split: str) -> list[str]:
    shards, tokenizer = (
        TokenShards(store / "tokens" / source, split),
        load_tokenizer(store / "tokenizer"),
    )
    tokens, doc_ids = shards.read(0, len(shards))
    bos = special_ids(tokenizer).bos
    documents = [tokens[doc_ids == i].tolist() for i in range(shards.documents)]
    assert all(ids[0] == bos and bos not in ids[1:] for ids in documents)
    return [tokenizer.decode(ids[1:], skip_special_tokens=False) for ids in documents]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    path, fate = make_store(tmp_path_factory.mktemp("done"))
    recipe = load_settings(Recipe, path)
    assert prepare(recipe) == "done"
    return path, fate, Path(recipe.store)


def test_every_document_meets_its_fate(done):
    path, _, store = done
    recipe, split = load_settings(Recipe, path), Split(0.1)
    shards_by_name = {
        f"{source}/{s}": texts(store, source, s)
        for source in recipe.sources
        for s in ("train", "val")
    }
    for source, prefix in (("prose", "prose"), ("other", "other")):
        for i in range(40 if source == "prose" else 20):
            text = sentences(i if source == "prose" else 100 + i)
            which = split.of(f"{prefix}/{i}")
            other_split = "val" if which == "train" else "train"
            assert (
                shards_by_name[f"{source}/{which}"].count(text) == 1
                and text not in shards_by_name[f"{source}/{other_split}"]
            ), (source, i)
    everything = "\n".join(text for part in shards_by_name.values() for text in part)
    assert not any(text in everything for text in (ITEM, FOREIGN, "Buy it now", "Too short"))
    assert (
        SECRET not in everything and "email@example.com or 22.214.171.124 about it." in everything
    )
    assert (
        sentences(7) in shards_by_name[f"prose/{split.of('prose/7')}"]
        and sentences(7).replace("was", "is", 1) not in everything
    )
    report = json.loads((store / "report.json").read_text())["sources"]
    assert (
        report["prose"]["dropped/language"]
        == report["prose"]["dropped/too_short"]
        == report["prose"]["masked"]
        == 1
    )
    # The third one is the repetitive document.
    assert sum(n for key, n in report["prose"].items() if key.startswith("dropped/")) == 3
    assert (
        report["prose"]["repeated"] == report["other"]["repeated"] == 1
        and report["other"]["contaminated"] == 1
    )
    for source, count in report.items():
        gone = (
            sum(n for key, n in count.items() if key.startswith("dropped/"))
            + count["repeated"]
            + count["contaminated"]
        )
        assert (
            count["documents"] - gone
            == count["kept"]
            == len(shards_by_name[f"{source}/train"]) + len(shards_by_name[f"{source}/val"])
        )
    hits = json.loads((store / "contaminated_ids.json").read_text())
    assert list(hits["documents"]) == ["leak"] and hits["documents"]["leak"][0]["test_id"] == "q1"
    assert [ids for ids in hits["too_short"].values() if ids] == [["q2"]]
    assert prepare(recipe) == "already there"


def test_held_out_documents_are_in_no_training_shard(done):
    path, _, store = done
    for source in load_settings(Recipe, path).sources:
        assert not set(texts(store, source, "train")) & set(texts(store, source, "val"))


def test_cutting_keeps_the_rest_of_a_document(done, tmp_path):
    path, _ = make_store(tmp_path)
    recipe = load_settings(
        Recipe, path, ["decontaminate.by_rule={exact: cut, 13-gram: keep}", "dedup.kind=none"]
    )
    assert prepare(recipe) == "done"
    report = json.loads((Path(recipe.store) / "report.json").read_text())["sources"]
    assert report["other"]["cut"] == 1 and report["other"]["contaminated"] == 0
    everything = "\n".join(
        text for s in ("train", "val") for text in texts(Path(recipe.store), "other", s)
    )
    assert ITEM not in everything and "purple onions" not in everything
    assert sentences(300, 10) in everything and sentences(301, 10) in everything
    assert sentences(7).replace("was", "is", 1) in everything  # a duplicate, and dedup is off


def test_exact_dedup_drops_equal_texts_only(tmp_path):
    path, _ = make_store(tmp_path)
    recipe = load_settings(Recipe, path, ["dedup.kind=exact"])
    assert prepare(recipe) == "done"
    report = json.loads((Path(recipe.store) / "report.json").read_text())["sources"]
    assert report["prose"]["repeated"] == 1 and report["other"]["repeated"] == 0


def test_signatures_are_datatroves_and_agree_as_often_as_the_shingles_do():
    step = Signature("unused", MinhashConfig(num_buckets=64, hashes_per_bucket=4))
    one, other = (
        sentences(1, 200),
        sentences(1, 200).replace("river", "lake").replace("stone", "brick", 5),
    )
    shingles = [step.get_shingles(text) for text in (one, other, one.upper() + " !")]
    signatures = [step.get_signature(part) for part in shingles]
    assert signatures == [MinhashDedupSignature.get_signature(step, part) for part in shingles]
    assert signatures[2] == signatures[0]  # case and punctuation do not count
    a, b = (set(part[:, 0].tolist()) for part in shingles[:2])
    agree = np.mean(
        [
            x == y
            for left, right in zip(*signatures[:2], strict=True)
            for x, y in zip(left, right, strict=True)
        ]
    )
    assert 0.2 < len(a & b) / len(a | b) < 0.9 and agree == pytest.approx(
        len(a & b) / len(a | b), abs=0.1
    )
    assert step.get_shingles("two words").shape == step.get_shingles("?!").shape == (1, 1)
    assert (step.get_shingles("two words") != step.get_shingles("other words")).all()


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "scripts.prepare_data", "--config", str(path), *more]


def test_killed_at_any_point_it_ends_with_the_same_bytes(done, tmp_path):
    path, _ = make_store(tmp_path)
    store, site = Path(load_settings(Recipe, path).store), Site(tmp_path / "site", Forked)
    for workers, whom, operation, nth, file in (  # one worker starts no pool
        (2, "*", "write", 1, "work/clean-*/signatures/*/*.sig"),
        (2, "*", "write", 2, "work/clean-*/stages/clean/completions/*"),
        (2, "scripts.prepare_data", "write", 1, "work/clean-*/counts/*"),
        (2, "*", "write", 2, "work/clean-*/stages/pairs/completions/*"),
        (2, "scripts.prepare_data", "write", 1, "work/tokens-*/tokens/*/.train-*.starts.tmp"),
        (2, "*", "rename", 2, "work/tokens-*/entries/*"),
        (1, "scripts.prepare_data", "rename", 2, "tokens/*"),
    ):
        # Kill its tasks as well, or leave them running. Fails if a point is not reached.
        arguments = f"-m scripts.prepare_data --config {path} executor.workers={workers}"
        site.run_faulty(arguments, point(operation, f"{store}/{file}", whom=whom, nth=nth))
    finished = forked.run(command(path, "executor.workers=2"))
    assert finished.returncode == 0, finished.stderr
    assert shards(store) == shards(done[2])
    report = [
        json.loads((folder / "report.json").read_text())["sources"] for folder in (store, done[2])
    ]
    assert report[0] == report[1] and not list(store.rglob("*.tmp*"))
    assert "kept" in finished.stdout and not finished.stderr.strip()


@pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed; pip install -r requirements-cluster.txt"
)
def test_a_ray_cluster_cleans_and_tokenizes_alike(tmp_path, monkeypatch):
    """Ray starts a process for each task, which imports all packages: few tasks.

    Deduplication runs as tasks of the same kind (see the tests of Slurm and of a pool).
    """
    import ray

    path, _ = make_store(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["sources"].pop("code")
    content["sources"].pop("other")
    path.write_text(yaml.safe_dump({**content, "dedup": {"kind": "none"}}))
    recipe = load_settings(Recipe, path)
    assert prepare(recipe) == "done"
    store = Path(recipe.store)
    expected = shards(store)
    for folder in ("tokens", "work"):
        shutil.rmtree(store / folder)
    monkeypatch.setattr(ray, "init", partial(ray.init, include_dashboard=False))
    more = ["executor.kind=ray", "executor.workers=2", "executor.memory_gb=1"]
    assert prepare(load_settings(Recipe, path, more)) == "done"
    assert expected and shards(store) == expected


FAKE_SBATCH = """#!/bin/bash
# Runs the script of each task of a job array at once.
script="${@: -1}"; number=$(ls "$SLURM_SPOOL" | wc -l); cp "$script" "$SLURM_SPOOL/$number.sh"
echo "$@" >"$SLURM_SPOOL/$number.args"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" \
>>"$SLURM_SPOOL/$number.out" 2>&1 || exit 1
done
echo "Submitted batch job 10$number"
"""
FAKE_SRUN = """#!/bin/bash
# Records a task; the test runs all of them in one process, to import datatrove once.
echo "$SLURM_ARRAY_TASK_ID $@" >>"$SLURM_SPOOL/tasks"
"""
RUN_TASKS = """
import os, sys
from datatrove.tools.launch_pickled_pipeline import main
for line in open(sys.argv[1], encoding="utf-8"):
    task, *words = line.split()
    assert words[:4] == ["-l", "-n", "1", "launch_pickled_pipeline"], words
    os.environ["SLURM_ARRAY_TASK_ID"], sys.argv = task, words[3:]
    main()
"""


def test_slurm_jobs_make_the_same_shards(done, tmp_path, monkeypatch):
    path, _ = make_store(tmp_path)
    tools, spool = tmp_path / "bin", tmp_path / "spool"
    for folder in (tools, spool):
        folder.mkdir()
    for name, text in (
        ("sbatch", FAKE_SBATCH),
        ("srun", FAKE_SRUN),
        ("scontrol", '#!/bin/bash\necho "$3"\n'),
        ("squeue", '#!/bin/bash\ncat "$SLURM_SPOOL"/queue 2>/dev/null\n'),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SPOOL", str(spool))
    recipe = load_settings(
        Recipe, path, ["executor.kind=slurm", "executor.partition=cpu", "executor.workers=3"]
    )
    assert prepare(recipe) == "submitted"
    words = [sys.executable, "-c", RUN_TASKS, str(spool / "tasks")]
    run = forked.run(words, env={**os.environ, "SLURM_NODELIST": "here"})
    assert run.returncode == 0, run.stderr
    scripts = [
        file.read_text() for file in sorted(spool.glob("*.sh"), key=lambda file: int(file.stem))
    ]
    jobs = [script for script in scripts if "launch_pickled_pipeline" in script]
    assert [script.split("--job-name=nanollama-")[1].split("\n")[0] for script in jobs] == [
        "clean",
        "find_duplicates",
        "choose_duplicates",
        "tokenize",
        "publish",
    ]
    for script, tasks in zip(jobs, (5, 4, 1, 5, 1), strict=True):
        assert (
            f"--array=0-{tasks - 1}%3\n" in script
            and "--partition=cpu\n" in script
            and "--mem-per-cpu=4G\n" in script
        )
    arguments = [file.read_text() for file in sorted(spool.glob("*.args"))]
    # Each job but the first waits for its predecessor.
    assert sum("--dependency=afterok:" in text for text in arguments) == 4
    assert shards(Path(recipe.store)) == shards(done[2])
    assert prepare(recipe) == "already there"
    shutil.rmtree(Path(recipe.store) / "tokens")
    (spool / "queue").write_text("107\n107\n")
    with pytest.raises(ValueError, match="Slurm jobs 107 of an earlier run are still queued"):
        prepare(recipe)


def test_a_full_disk_stops_it_and_nothing_half_written_is_taken_for_whole(
    done, tmp_path, monkeypatch
):
    import errno

    from data.pipeline import steps

    path, _ = make_store(tmp_path)
    recipe = load_settings(Recipe, path)

    class FullDisk(steps.ShardFile):
        def add(self, document):
            if self.tokens > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add(document)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "ShardFile", FullDisk)
        with pytest.raises(
            ValueError, match=r"tokenize failed: .*No space left on device.*continues with the"
        ):
            prepare(recipe)
    assert not (Path(recipe.store) / "tokens").exists()
    assert prepare(recipe) == "done"
    assert shards(Path(recipe.store)) == shards(done[2])


def test_the_order_of_sources_is_part_of_what_was_done(tmp_path):
    path, _ = make_store(tmp_path)
    recipe = load_settings(Recipe, path)
    assert prepare(recipe) == "done"
    turned = replace(recipe, sources=dict(reversed(recipe.sources.items())))
    assert prepare(turned) == "done"
    report = json.loads((Path(recipe.store) / "report.json").read_text())["sources"]
    # Now the other source keeps the duplicates.
    assert report["prose"]["repeated"] == 2 and report["other"]["repeated"] == 0
    of_library = {text for _, text in library(40)}
    assert set(texts(Path(recipe.store), "code", "train")) <= of_library


def test_of_a_chain_of_repeats_the_earliest_stays(tmp_path):
    links = {
        "a": [((0, 5), (1, 2))],
        "b": [((1, 2), (1, 9)), ((0, 7), (2, 0))],
        "c": [((1, 9), (2, 1)), ((0, 5), (2, 1))],
    }
    for name, pairs in links.items():
        np.array(pairs, dtype="<u4").tofile(tmp_path / f"{name}.dups")
    ChooseDuplicates(tmp_path, tmp_path / "removed").run()
    removed = {
        path.stem: np.fromfile(path, dtype="<u4").tolist()
        for path in (tmp_path / "removed").iterdir()
    }
    assert removed == {"000001": [2, 9], "000002": [0, 1]}


def test_shards_that_were_deleted_or_cut_are_made_again(tmp_path):
    path, _ = make_store(tmp_path)
    recipe = load_settings(Recipe, path)
    store = Path(recipe.store)
    assert prepare(recipe) == "done"
    before = shards(store)
    shutil.rmtree(store / "tokens" / "other")
    assert prepare(recipe) == "done" and shards(store) == before
    shard = store / "tokens" / "prose" / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert prepare(recipe) == "done" and shards(store) == before
    shutil.rmtree(store / "work")
    assert prepare(recipe) == "already there"


def test_e_mail_is_masked_as_datatrove_does_but_in_linear_time():
    ours, stock = Mask(), PIIFormatter()
    for text in (
        "Write to a.b+c@some-where.co.uk, or (x_y@z.org); not @home, a@b, or me@localhost. "
        "8.8.8.8 and 10.0.0.1.",
        "one@example.net two@example.net three@sub.example.net\nfour@example.net:five@example.net",
        "no address at all @ some place. a@b.c@d.e",
    ):
        assert ours.format(text) == stock.format(text) != text or "no address" in text
    began = time.monotonic()
    assert ours.format("ab12" * 250_000 + " @ x") == "ab12" * 250_000 + " @ x"
    assert ours.format("a-" * 500_000 + "@b.org") and time.monotonic() - began < 5


def test_a_task_that_left_no_file_does_not_pass_for_one_that_kept_nothing(tmp_path):
    path, _ = make_store(tmp_path)
    recipe = load_settings(Recipe, path)
    assert prepare(recipe) == "done"
    [clean] = Path(recipe.store).glob("work/clean-*")
    (clean / "documents" / "00002.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"00002.parquet has 0 documents, but the cleaning task counted"
    ):
        prepare(load_settings(Recipe, path, ["val_fraction=0.2"]))


def test_mistakes_get_a_sentence(done, tmp_path):
    path, _ = make_store(tmp_path)
    store = Path(load_settings(Recipe, path).store)

    def said(*overrides: str) -> str:
        run = forked.run(command(path, *overrides))
        assert (
            run.returncode == 2
            and run.stderr.startswith("error: ")
            and "Traceback" not in run.stderr
        ), run.stderr
        return run.stderr

    assert "did you mean 'gopher_repetition'" in said("sources.prose.filters=[gopher_repetitoin]")
    assert "known: exact, coverage, 13-gram" in said("decontaminate.by_rule={exakt: cut}")
    assert "executor.kind=slurm needs executor.partition" in said("executor.kind=slurm")
    assert "needs sbatch, which is not installed" in said(
        "executor.kind=slurm", "executor.partition=cpu"
    )
    assert "sources in the store: code, other, prose" in said("sources.third={}")
    damaged = store / "documents" / "other" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert f"{damaged} is missing or damaged" in said()
    (store / "work" / "clean-of-a-running-job").mkdir(parents=True)
    with open(store / "work" / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        assert "another prepare_data is running" in said()
        assert (
            time.monotonic() - began < 30 and (store / "work" / "clean-of-a-running-job").is_dir()
        )
    (store / "tokenizer" / "tokenizer.json").unlink()
    assert "for a new model, give --train_tokenizer" in said()
