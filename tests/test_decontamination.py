"""Decontamination finds real test items in real text, with few false positives."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from conftest import ROOT

from data.decontamination import index as decontamination
from data.decontamination import scan as scan_files
from data.decontamination import test_sets as testsets
from data.decontamination.index import Hit, Index, Settings, build_index, cut
from data.decontamination.report import report, to_json
from data.decontamination.scan import decontaminate, similar_rows
from data.decontamination.test_sets import Item, load_test_set
from data.decontamination.words import hash_words, normalise

WHEELS = ROOT / "data" / "store" / "wheels"
QUESTION = (
    "A farmer keeps seventeen brown goats behind an old stone barn and sells their milk each "
    "Friday. How much does he earn?"
)
PROSE = (
    "It rained all the way to the coast, and nobody in the carriage spoke until the lamps of "
    "the harbour came into view. "
)


@pytest.fixture(scope="session")
def sets():
    """The start of real test sets, which contain templates and shared passages."""
    return {
        name: load_test_set(name, WHEELS)[:1500] for name in ("mmlu", "gsm8k", "hellaswag", "arc")
    }


@pytest.fixture(scope="session")
def index(sets):
    return build_index(sets, Settings())


@pytest.fixture(scope="session")
def host() -> list[str]:
    """Words of prose and code without test items: docstrings of Python's library."""
    import email.message
    import statistics
    import subprocess as process

    return " ".join(
        Path(module.__file__).read_text() for module in (email.message, statistics, process)
    ).split()


def small(*texts: str) -> Index:
    return build_index({"own": [Item(str(i), (text,)) for i, text in enumerate(texts)]}, Settings())


def spans(item_index: Index, text: str) -> list[str]:
    return [text[hit.span[0] : hit.span[1]] for hit in item_index.scan([("x", text)])]


def planted(
    text: str, every: int, phase: int, host: list[str], length: int, rng: random.Random
) -> str:
    words = [
        rng.choice(host) if every and i % every == phase else word
        for i, word in enumerate(text.split())
    ]
    begin, position = rng.randrange(len(host) - length), rng.randrange(length + 1)
    before, after = host[begin : begin + position], host[begin + position : begin + length]
    return f"{' '.join(before)}\n{text if not every else ' '.join(words)}\n{' '.join(after)}"


@pytest.mark.parametrize("every, least", [(0, 100.0), (12, 97.0), (8, 92.0)])
def test_recall_on_real_items(sets, index, host, every, least):
    rng = random.Random(every)
    for name, items in sets.items():
        texts = [
            (item.id, text)
            for item in items
            for text in item.variants
            if len(hash_words([text])[0]) >= 13
        ]
        for length in (100, 1000, 3000):
            chosen = rng.sample(texts, 100)
            phases = [i % every if every else 0 for i in range(len(chosen))]
            documents = [
                (str(i), planted(text, every, phases[i], host, length, rng))
                for i, (_, text) in enumerate(chosen)
            ]
            hits = {
                (hit.train_id, hit.test_id) for hit in index.scan(documents) if hit.test_set == name
            }
            share = (
                100
                * sum((str(i), test_id) in hits for i, (test_id, _) in enumerate(chosen))
                / len(chosen)
            )
            assert share >= least, (name, length, share)


def test_real_text_without_items_is_clean(index, host):
    documents = [(str(i), " ".join(host[i : i + 300])) for i in range(0, len(host), 300)]
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    documents += [(path.name, path.read_text()) for path in library]
    assert len(documents) > 150
    assert not list(index.scan(documents))


def test_span_is_exact_whatever_the_script():
    """Offsets refer to the original text, even if normalisation changes its length."""
    item_index = small(QUESTION)
    decomposed = (
        QUESTION.replace("a farmer", "a\u0301 farmer")
        .replace("e", "e\u0301")
        .replace("barn", "BA\u00adRN")
    )
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTION)
    for copy in (
        QUESTION,
        QUESTION.upper(),
        decomposed,
        wide,
        QUESTION.replace("fi", "ﬁ"),
        QUESTION.replace(" ", " — "),
    ):
        for around in (("", ""), ("漢字 ½ ﬃ ß İ \ud800 🤖 ", " ﷽ الله"), (PROSE * 20, PROSE * 20)):
            text = around[0] + copy + around[1]
            [span] = spans(item_index, text)
            assert span.strip("?\uff1f") == copy.strip("?\uff1f"), span


def test_latex_numbers_and_text_without_spaces():
    formula = (
        r"Let $f(x) = x^2 + \frac{3}{4}x$ and $g(y) = y_1 - 7$ for all real values. Find "
        r"$f(g(2)) \leq 10$."
    )
    plain = "Let f(x) = x² + ¾x and g(y) = y₁ \u2212 7 for all real values. Find f(g(2)) ≤ 10"
    assert normalise("x²").split() == normalise("x^2").split() == [b"x", b"2"]
    assert len(spans(small(formula), f"{PROSE} {formula} {PROSE}")) == 1
    assert len(spans(small(formula), f"{PROSE} {plain} {PROSE}")) == 1
    chinese = "农夫在旧石仓后面养了十七只棕色山羊每周五出售羊奶他能赚多少钱"
    assert spans(small(chinese), f"天气很好。{chinese}。我们走吧。") == [chinese]


def test_items_do_not_reach_over_document_borders():
    words = QUESTION.split()
    halves = [("a", " ".join(words[:11])), ("b", " ".join(words[11:]))]
    assert not list(small(QUESTION).scan(halves))
    assert [hit.train_id for hit in small(QUESTION).scan([*halves, ("c", QUESTION)])] == ["c"]


def test_words_put_in_left_out_or_changed():
    words = QUESTION.split()
    item_index = small(QUESTION)
    inserted = " ".join([*words[:7], "very", "large", *words[7:]])
    shortened = " ".join(words[:9] + words[10:])
    for copy in (inserted, shortened):
        [hit] = item_index.scan([("x", PROSE + copy)])
        assert hit.rule == "coverage" and 0.65 <= hit.score <= 1
    assert not list(item_index.scan([("x", PROSE + " ".join(words[:8]))]))
    assert not list(item_index.scan([("x", " ".join(sorted(words)))]))


def test_rules():
    long = " ".join(f"{QUESTION} {PROSE}".split()[:40])
    [exact] = small(long).scan([("x", "Well then: " + long)])
    assert (exact.rule, exact.score) == ("exact", 1.0)
    [run] = small(long).scan([("x", " ".join(long.split()[5:20]))])
    assert run.rule == "13-gram" and run.score < Settings().coverage
    assert not list(small(long).scan([("x", " ".join(long.split()[5:17]))]))
    numbers = "What is the rank of this matrix? 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"
    assert not list(small(numbers).scan([("x", "1 " * 10_000)]))


def test_every_copy_is_found_also_in_a_text_scanned_in_pieces(monkeypatch):
    item_index = small(QUESTION)
    text = "".join(f"{PROSE * (i % 7)}{QUESTION} " for i in range(100))
    expected = spans(item_index, text)
    assert expected == [QUESTION.rstrip("?")] * 100
    for size in (900, 1777):
        monkeypatch.setattr(decontamination, "PIECE", size)
        monkeypatch.setattr(decontamination, "BATCH", size)
        assert spans(item_index, text) == expected
    monkeypatch.setattr(decontamination, "MAX_MATCHES", 10)
    assert len(spans(item_index, text)) == 100  # several per piece


def test_repeats_without_end_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(decontamination, "MAX_MATCHES", 1000)
    [*hits] = small(QUESTION).scan([("x", f"{QUESTION}\n" * 500), ("y", QUESTION)])
    assert (
        sum(hit.train_id == "x" for hit in hits) == decontamination.MAX_REPEATS
        and hits[-1].train_id == "y"
    )


def test_short_items_and_templates():
    template = (
        "Read the following passage with great care and then choose the one statement that is "
        "best supported by it. "
    )
    questions = [
        f"{template} The {animal} of the {place} hunts {prey} at dusk."
        for animal, place, prey in animals()
    ]
    sets = {
        "own": [Item(str(i), (text,)) for i, text in enumerate([*questions, "Why?", "", template])]
    }
    item_index = build_index(sets, Settings())
    assert item_index.too_short == {"own": [str(len(questions)), str(len(questions) + 1)]}
    hits = {hit.test_id for hit in item_index.scan([("x", PROSE + questions[3] + PROSE)])}
    assert {"3"} <= hits <= {"3", str(len(questions) + 2)}
    # 9 words: only a complete match counts.
    short = "Which planet has rings of bright frozen methane dust?"
    assert len(spans(small(short), PROSE + short)) == 1 and not spans(
        small(short), PROSE + short.replace("dust", "sand")
    )


def animals() -> list[tuple[str, str, str]]:
    names = (
        "wolf otter heron lynx badger falcon viper weasel marten stoat kestrel polecat osprey "
        "buzzard adder civet"
    )
    return [(name, f"{name[::-1]}ia", f"{name[1:]}lings") for name in names.split(" ")]


def test_cut():
    assert cut("one two three four", [(4, 7)]) == "one three four"
    assert cut("one two three four", [(5, 6), (9, 10)]) == "one four"  # widened to word boundaries
    assert cut("one, two. three", [(0, 9)]) == " three" and cut("one two", [(4, 7)]) == "one "
    assert (
        cut("a\n\nb\n\nc", [(3, 4)]) == "a\n\n\n\nc"
        and cut("same", []) == "same"
        and cut("all", [(0, 3)]) == ""
    )
    text = PROSE + QUESTION + PROSE
    remaining = cut(text, [hit.span for hit in small(QUESTION).scan([("x", text)])])
    assert (
        not list(small(QUESTION).scan([("x", remaining)]))
        and remaining.startswith(PROSE.strip())
        and remaining.endswith(PROSE)
    )


def test_saved_index_finds_the_same_and_is_pickled_by_its_path(index, sets, tmp_path):
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    assert len(pickle.dumps(loaded)) < 1000
    documents = [(item.id, PROSE + item.variants[0]) for item in sets["gsm8k"][:50]]
    assert (
        list(pickle.loads(pickle.dumps(loaded)).scan(documents))
        == list(index.scan(documents))
        != []
    )
    assert to_json(loaded, loaded.scan(documents)) == to_json(index, index.scan(documents))
    (tmp_path / "index" / "words.npy").unlink()
    with pytest.raises(ValueError, match="build it again"):
        Index.load(tmp_path / "index")


def test_similar_rows_finds_what_was_rearranged():
    first, second = (
        "Tom has twelve red apples and gives five to his sister",
        "How many apples does he keep for lunch",
    )
    sets = {"own": [Item("q", (f"{first}. {second}?",)), Item("r", (QUESTION,))]}
    rows = [("turned", f"{second}? {first}."), ("other", PROSE), ("empty", "")]
    assert [
        (hit.train_id, hit.test_id, hit.rule) for hit in similar_rows(rows, sets, Settings())
    ] == [("turned", "q", "minhash")]


def test_hash_words_agrees_with_splitting():
    texts = [PROSE, "", "  ", "Ünïcode, ünicode UNICODE", "日本 x²"]
    hashes, _, bounds = hash_words(texts)
    assert (
        np.diff(bounds).tolist()
        == [len(normalise(text).split()) for text in texts]
        == [23, 0, 0, 3, 4]
    )
    assert len(set(hashes[bounds[3] : bounds[4]].tolist())) == 1
    words = [word for text in texts for word in normalise(text).split()]
    assert len(set(words)) == len(set(hashes.tolist()))


@pytest.fixture
def files(tmp_path):
    """A file of 40 documents, the 8th with the test item; a file of one document; the test set."""
    rows = [
        {"id": f"d{i}", "text": PROSE + (QUESTION if i == 7 else "") + PROSE} for i in range(40)
    ]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + "not json\n"
    )
    with gzip.open(tmp_path / "train" / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"id": "e0", "text": f"| {QUESTION}"}))
    items = [{"id": "q1", "text": QUESTION}, {"id": "q2", "text": "Why?"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    return tmp_path


def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "scripts.decontaminate",
        "--cache",
        str(WHEELS),
        "--output",
        str(folder / "out" / "ids.json"),
    ]
    return forked.run([*command, *more])


def test_command_writes_the_schema_and_a_report(files):
    test_set = str(files / "own.jsonl")
    done = run(
        files,
        "--train_dataset",
        str(files / "train"),
        "--test_datasets",
        test_set,
        "--report",
        str(files / "report.md"),
        "--rows",
    )
    assert done.returncode == 0, done.stderr
    excluded = json.loads((files / "out" / "ids.json").read_text())
    assert list(excluded) == ["documents", "too_short", "settings"] and excluded["too_short"] == {
        test_set: ["q2"]
    }
    assert list(excluded["documents"]) == ["d7", "e0"]
    [entry] = excluded["documents"]["d7"]
    assert {
        "test_set": test_set,
        "test_id": "q1",
        "score": 1.0,
        "rule": "exact",
    }.items() <= entry.items()
    text = PROSE + QUESTION + PROSE
    assert text[slice(*entry["span"])] == QUESTION.rstrip("?")
    assert excluded["settings"]["documents"] == 41 and excluded["settings"]["skipped"] == {
        "not JSON": 1
    }
    page = (files / "report.md").read_text()
    assert (
        f"| {test_set} | 2 | 1 | 1 | 1 | 2 | exact 2 |" in page
        and "d7, e0" in page
        and page.strip() in done.stdout
    )
    assert sorted(path.name for path in (files / "out").iterdir()) == ["ids.json"]


def test_workers_find_the_same(files):
    train, test_set = [str(files / "train")], [str(files / "own.jsonl")]
    results = [
        decontaminate(train, test_set, files / "ids.json", WHEELS, Settings(), workers=workers)[1]
        for workers in (1, 2)
    ]
    assert results[0] == results[1] and len(results[0]["documents"]) == 2


def test_a_source_of_a_store(files):
    (files / "store" / "documents").mkdir(parents=True)
    (files / "train").rename(files / "store" / "documents" / "web")
    _, result = decontaminate(
        [f"{files / 'store'}:web"],
        [str(files / "own.jsonl")],
        files / "ids.json",
        WHEELS,
        Settings(),
    )
    assert list(result["documents"]) == ["d7", "e0"]


def test_bad_input_ends_in_one_sentence(files):
    (files / "bad.jsonl").write_text('{"id": "1"}\n')
    (files / "bad.parquet").write_text("no parquet")
    (files / "empty.jsonl").write_text("")
    train, test_set = str(files / "train"), str(files / "own.jsonl")
    for arguments, message in [
        ((train, "gsm9k"), "did you mean gsm8k?"),
        ((train, "questions"), "known: mmlu, gsm8k, hellaswag, arc, truthfulqa"),
        ((train, str(files / "absent.jsonl")), r"the test set .*absent\.jsonl does not exist"),
        ((train, str(files / "bad.jsonl")), r"bad.jsonl:1 \(keys: id\) no column with text"),
        ((train, str(files / "bad.parquet")), "unreadable file"),
        ((train, str(files / "empty.jsonl")), "have no items"),
        ((str(files / "absent"), test_set), "absent; check the path"),
        ((f"{files}:absent", test_set), "download the source first"),
        ((str(files / "bad.jsonl"), test_set), "no document could be read"),
    ]:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            decontaminate([arguments[0]], [arguments[1]], files / "ids.json", WHEELS, Settings())
    assert not (files / "ids.json").exists()
    done = run(files, "--train_dataset", train, "--test_datasets", "gsm9k")
    assert (
        done.returncode == 2
        and done.stderr == "error: " + done.stderr.splitlines()[0].removeprefix("error: ") + "\n"
    )


def test_known_test_sets_are_whole():
    sizes = {"mmlu": 14_042, "gsm8k": 1_319, "hellaswag": 10_042, "arc": 3_548}
    for name, size in sizes.items():
        items = load_test_set(name, WHEELS)
        assert len(items) == len({item.id for item in items}) == size
        assert all(
            item.variants and all(text.strip() for text in item.variants[:1]) for item in items
        )
    assert "<<" not in load_test_set("gsm8k", WHEELS)[0].variants[1] and testsets.fingerprint(
        "gsm8k"
    ) != testsets.fingerprint("truthfulqa")


def test_truthfulqa_without_a_hub_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="give a local"):
        load_test_set("truthfulqa", tmp_path)
    row = {
        "question": QUESTION,
        "best_answer": "Ten",
        "correct_answers": ["Ten", "10"],
        "mc1_targets": {"choices": ["Ten", "Two"]},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    items = load_test_set("truthfulqa", tmp_path)
    assert [item.id for item in items] == ["generation/0", "multiple_choice/0"] and items[
        1
    ].variants[1].endswith("Ten\nTwo")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert load_test_set("truthfulqa", tmp_path) == items  # from the cache


def test_report_shows_nothing_where_nothing_was_found():
    item_index = small(QUESTION)
    assert report(item_index, to_json(item_index, [])).endswith("| own | 1 | 1 | 0 | 0 | 0 | - |")
    hit = Hit("a|b", "own", "0", 0.9, (0, 5), "coverage", "x|y")
    assert r"| a\|b | 0.90 coverage | x\|y | 0 |" in report(item_index, to_json(item_index, [hit]))
    assert scan_files._data_path("no/colon") == "no/colon"
