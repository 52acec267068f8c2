"""The harness: an evaluation asks, a model answers, the harness batches, resumes, adds up and writes.

An evaluation is a function of one item that yields requests and returns its scores:

    def score(item):
        scored = yield Choose(item.row["question"], tuple(item.row["choices"]))     # one Scored an option
        return {"acc": float(max(scored).logprob == scored[item.row["answer"]].logprob)}

What it yields: Choose, Write or Read, or Judge, which another model answers, or a list of them (answered by a list). Text may be
given as a tuple of token ids too.
What it returns: numbers, which become metrics (the mean over the items that have them), and anything else, which is kept in
the samples file. All items run at once: whatever they ask for in a round is answered in batches, so items of several turns
cost no more. A request that does not fit the model's context ends its item, which is then counted, named and not scored.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evals.progress import progress
from files import write_json

Text = str | tuple[int, ...]


class Choose(NamedTuple):
    """How likely is each option after the context? Answer: list[Scored]. Spaces that end the context go to the options."""

    context: Text
    options: tuple[Text, ...]


class Write(NamedTuple):
    """Continue the prompt until a stop string, an end token or max_tokens. Answer: Written. Temperature 0 is greedy."""

    prompt: Text
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # samples of one prompt differ by it
    keep_special: bool = False  # special tokens stay in the text
    schema: str = ""  # a JSON schema that the text keeps to
    marker: int | None = (
        None  # a token that ends the prompt and may begin more JSON after the first
    )


class Read(NamedTuple):
    """How likely is the whole text? Answer: Reading. A text begins after bos (or eos); token ids begin with their own first one.

    A text longer than the context is read in windows that move by `stride` tokens (default: the context, so that tokens are
    read once; less gives each token more context).
    """

    text: Text
    stride: int | None = None


class Judge(NamedTuple):
    """A question to the evaluation's judge: an instruct model, a classifier. Answer: what it says, any JSON value."""

    text: str
    system: str = ""  # for a judge that takes instructions


class Scored(NamedTuple):
    logprob: float  # nats, summed over the option's tokens
    tokens: int
    greedy: bool  # would greedy decoding have written it?


class Written(NamedTuple):
    text: str  # without the stop string
    tokens: int
    stopped: bool  # by a stop string or an end token, not by max_tokens


class Reading(NamedTuple):
    logprob: float
    tokens: int
    bytes: int  # UTF-8 bytes of the tokens that were scored


class TooLong(NamedTuple):
    """In place of an answer: the request needs `tokens` of a context of `limit`."""

    tokens: int
    limit: int


class Failed(NamedTuple):
    """In place of an answer: why the judge gave none."""

    reason: str


Request = Choose | Write | Read | Judge
Answer = list[Scored] | Written | Reading | Any
Scores = dict[str, Any]
Score = Generator[Any, Any, Scores]


class Model(Protocol):
    """What answers: see evals/engines.py, and evals/judges.py for what answers Judge."""

    name: str
    hash: str  # of weights, config and tokenizer
    dtype: str
    context: int  # tokens

    def answer(
        self, requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Answer | TooLong | Failed]]]:
        """Batches of (index of the request, answer), in any order, each request once."""
        ...


@dataclass(frozen=True)
class Item:
    id: str  # as the decontamination report names it
    row: dict[str, Any]
    subject: str = ""


class Estimate(NamedTuple):
    value: float
    stderr: float | None  # standard error of the mean over items; None where it has none
    n: int | None = None  # items that have it; None where it is no mean over items


@dataclass
class Sample:
    """One item, done."""

    id: str
    subject: str
    scores: Scores = field(default_factory=dict)
    exchange: list[tuple[Request, Any]] = field(default_factory=list)
    too_long: int = 0  # tokens that one of its requests needs, where that is more than the context
    failed: str = ""  # why the judge did not answer


def means(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """The mean of each number over the items that have it, with its standard error (n - 1 in the variance, as lm-eval)."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, value in sample.scores.items():
            if isinstance(value, (bool, int, float)):
                values[name].append(float(value))
    return {name: _mean(numbers) for name, numbers in values.items()}


def _mean(numbers: list[float]) -> Estimate:
    n, mean = len(numbers), math.fsum(numbers) / len(numbers)
    if n < 2:
        return Estimate(mean, None, n)
    return Estimate(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (n - 1) / n), n)


@dataclass(frozen=True)
class Eval:
    """A task: its items, how one is scored, how scores become metrics."""

    task: str
    version: int  # of prompts and scoring: raise it when a score may change
    items: Sequence[Item]
    score: Callable[[Item], Score]
    shots: int = 0
    seed: int | None = None  # of the few-shot sample
    test_set: str = ""  # what decontamination calls it; default: the task
    totals: Callable[[Sequence[Sample]], dict[str, Estimate]] = means
    about: dict[str, Any] = field(
        default_factory=dict
    )  # more for the results file: data, variant, ...
    judge: Model | None = None  # what answers Judge


def ask(
    items: Sequence[Item],
    score: Callable[[Item], Score],
    model: Model,
    cache: "Cache",
    show: bool = False,
    judge: Model | None = None,
    judged: "Cache | None" = None,
) -> list[Sample]:
    """Run items to their end; rounds of requests, each answered from the cache or by the model, or by the judge with its own."""
    samples = [Sample(item.id, item.subject) for item in items]
    running = {i: score(item) for i, item in enumerate(items)}
    inbox: dict[int, Any] = dict.fromkeys(running)
    while running:
        asked: dict[int, list[Request]] = {}
        single = set()
        for i, generator in list(running.items()):
            try:
                wanted = generator.send(inbox[i])
            except StopIteration as end:
                samples[i].scores = end.value
                del running[i]
                continue
            if not isinstance(wanted, list):
                single.add(i)
            asked[i] = wanted if isinstance(wanted, list) else [wanted]
        if not asked:
            break
        places = [(i, j) for i, requests in asked.items() for j in range(len(requests))]
        requests = [asked[i][j] for i, j in places]
        answers: list[Any] = [None] * len(requests)
        for to_judge, who, kept in ((False, model, cache), (True, judge, judged or Cache())):
            part = [
                k for k, request in enumerate(requests) if isinstance(request, Judge) is to_judge
            ]
            if part:
                assert who is not None, "a Judge request in an evaluation without a judge"
                for k, answer in zip(
                    part, _answers([requests[k] for k in part], who, kept, show), strict=True
                ):
                    answers[k] = answer
        replies: dict[int, list] = defaultdict(list)
        for (i, _), answer in zip(places, answers, strict=True):
            replies[i].append(answer)
        for i, wanted in asked.items():
            samples[i].exchange += zip(wanted, replies[i], strict=True)
            samples[i].too_long = max(
                (answer.tokens for answer in replies[i] if isinstance(answer, TooLong)), default=0
            )
            samples[i].failed = next(
                (answer.reason for answer in replies[i] if isinstance(answer, Failed)), ""
            )
            if samples[i].too_long or samples[i].failed:
                running.pop(i).close()
            inbox[i] = replies[i][0] if i in single else replies[i]
    return samples


def _answers(
    requests: list[Request], model: Model, cache: "Cache", show: bool
) -> list[Answer | TooLong | Failed]:
    """Answers in the order of requests; equal requests are asked once. What was not answered is not kept."""
    wanted: dict[str, Request] = {}
    keys = [key_of(request) for request in requests]
    for key, request in zip(keys, requests, strict=True):
        if key not in cache:
            wanted.setdefault(key, request)
    names = list(wanted)
    unanswered: dict[str, TooLong | Failed] = {}
    with progress(len(requests), "request", show, initial=len(requests) - len(names)) as bar:
        for batch in model.answer(list(wanted.values())):
            cache.add(
                {
                    names[i]: answer
                    for i, answer in batch
                    if not isinstance(answer, TooLong | Failed)
                }
            )
            unanswered |= {
                names[i]: answer for i, answer in batch if isinstance(answer, TooLong | Failed)
            }
            bar.update(len(batch))
    pairs = zip(keys, requests, strict=True)
    return [
        unanswered[key] if key in unanswered else cache.get(key, request) for key, request in pairs
    ]


def key_of(request: Request) -> str:
    """A hash of all that the answer depends on, but for the model."""
    return hashlib.sha256(json.dumps([type(request).__name__, *request]).encode()).hexdigest()[:32]


class Cache:
    """Answers of one model, kept in a folder as they come, so that a killed suite goes on where it was.

    Each rank appends to a file of its own and reads all; without a folder, answers live in memory only.
    """

    def __init__(self, folder: Path | None = None, model: Model | None = None, rank: int = 0):
        self.found: dict[str, Any] = {}
        self.file = None
        if folder is None or model is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{model.hash[:16]}-{model.dtype}-{model.context}"  # windows of a long text depend on the context too
        for path in sorted(folder.glob(f"{stem}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    self.found.update(json.loads(line))
                except ValueError:  # the end of a killed write
                    continue
        path = folder / f"{stem}.{rank}.jsonl"
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run lasts
        if torn:
            self.file.write("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def get(self, key: str, request: Request) -> Answer:
        kept = self.found[key]
        if isinstance(request, Choose):
            return [Scored(*scored) for scored in kept]
        if isinstance(request, Judge):
            return kept
        return Written(*kept) if isinstance(request, Write) else Reading(*kept)

    def add(self, answers: dict[str, Any]) -> None:
        self.found |= answers
        if self.file is not None and answers:
            self.file.write(
                "".join(json.dumps({key: answer}) + "\n" for key, answer in answers.items())
            )
            self.file.flush()


def contaminated_ids(path: Path, test_set: str) -> set[str] | None:
    """Items of a test set that a decontamination report found in training data; None where it was not looked for."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if test_set not in found["settings"]["test_sets"]:
            return None
        return {
            hit["test_id"]
            for hits in found["documents"].values()
            for hit in hits
            if hit["test_set"] == test_set
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a contamination report ({type(error).__name__}); "
            "give the file that scripts.decontaminate or scripts.prepare_data wrote"
        ) from error


def results(
    evaluation: Eval, samples: Sequence[Sample], model: Model, contaminated: set[str] | None = None
) -> dict[str, Any]:
    """The results file: metrics over all items, over each subject, and over the items that are not in the training data."""
    done = [sample for sample in samples if not sample.too_long]
    long = [sample for sample in samples if sample.too_long]
    if not done:
        needed = max((sample.too_long for sample in long), default=0)
        raise ValueError(
            f"none of the {len(samples)} items of {evaluation.task} fits the model's context of {model.context} tokens "
            f"(the longest needs {needed}); take fewer shots or a model with a longer context"
            if long
            else f"{evaluation.task} has no items; check --data and --limit"
        )
    subjects: dict[str, list[Sample]] = defaultdict(list)
    for sample in done:
        subjects[sample.subject].append(sample)
    keys = "".join(
        key_of(request)
        for sample in samples
        for request, _ in sample.exchange
        if not isinstance(request, Judge)
    )
    clean = [sample for sample in done if sample.id not in (contaminated or ())]
    of_subjects = {name: _metrics(evaluation, part) for name, part in sorted(subjects.items())}
    return {
        "task": evaluation.task,
        **_metrics(evaluation, done),
        "version": evaluation.version,
        "shots": evaluation.shots,
        "seed": evaluation.seed,
        **({"subjects": of_subjects, "macro": _macro(of_subjects)} if len(of_subjects) > 1 else {}),
        "clean": None
        if contaminated is None
        else {
            **_metrics(evaluation, clean),
            "contaminated": sorted({s.id for s in done} & contaminated),
        },
        "too_long": {
            "n": len(long),
            "ids": [sample.id for sample in long],
            "context": model.context,
        },
        **(
            {"judge": evaluation.judge.name, "judge_hash": evaluation.judge.hash}
            if evaluation.judge
            else {}
        ),
        "prompt_hash": hashlib.sha256(keys.encode()).hexdigest(),
        "model": model.name,
        "checkpoint_hash": model.hash,
        "dtype": model.dtype,
        **evaluation.about,
    }


def _metrics(evaluation: Eval, samples: Sequence[Sample]) -> dict[str, Any]:
    totals = evaluation.totals(samples) if samples else {}
    return {
        "metrics": {name: estimate._asdict() for name, estimate in totals.items()},
        "n": len(samples),
    }


def _macro(of_subjects: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Unweighted mean of each metric over subjects."""
    values: dict[str, list[float]] = defaultdict(list)
    for part in of_subjects.values():
        for name, estimate in part["metrics"].items():
            values[name].append(estimate["value"])
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def write_results(output: Path, found: dict[str, Any], samples: Iterable[Sample]) -> None:
    """output, and beside it <stem>.samples.jsonl; each by rename."""
    kept = write_samples(output, samples)
    write_json(output, {**found, "samples": kept.name})


def write_samples(output: Path, samples: Iterable[Sample]) -> Path:
    """<stem>.samples.jsonl beside output: each item, what was asked and answered, its scores."""
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_name(output.stem + ".samples.jsonl")
    part = kept.with_name(kept.name + ".tmp")
    with open(part, "w", encoding="utf-8") as file:
        for sample in samples:
            exchange = [
                {"request": type(request).__name__, **request._asdict(), "answer": answer}
                for request, answer in sample.exchange
            ]
            line = {
                "id": sample.id,
                "subject": sample.subject,
                "scores": sample.scores,
                "too_long": sample.too_long,
            }
            line |= {"failed": sample.failed} if sample.failed else {}
            file.write(json.dumps({**line, "exchange": exchange}, ensure_ascii=False) + "\n")
    part.rename(kept)
    return kept
