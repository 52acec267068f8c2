"""Evaluation harness: batches the model requests of all items, caches answers, aggregates scores.

An evaluation is a generator that takes one item, yields requests and returns the item's scores:

    def score(item):
        scored = yield Choose(item.row["question"], tuple(item.row["choices"]))
        return {"acc": float(max(scored).logprob == scored[item.row["answer"]].logprob)}

It yields one request or a list of requests, and receives one answer or a list of answers:

    request   answered by     lm-evaluation-harness   answer
    Choose    the model       loglikelihood           one Scored per option
    Read      the model       loglikelihood_rolling   TextScore
    Write     the model       generate_until          Generation
    Judge     a grader                                any JSON value

The requests' names are part of answer caches and samples files. A text may also be a tuple of token
ids. Returned numbers become metrics: the mean over the items that have them. Other returned values
go to the samples file. All items run concurrently, and the requests of one round are batched, so
multi-turn items cost no more than single-turn ones. An item with a request longer than the model's
context is reported as too long and not scored.
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
    """Log-likelihood of each option after the context. Answer: list[Scored].

    Trailing spaces of the context are moved to the options.
    """

    context: Text
    options: tuple[Text, ...]


class Write(NamedTuple):
    """Continue the prompt until a stop string, an end token or max_tokens. Answer: Generation.

    Temperature 0 is greedy.
    """

    prompt: Text
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # differs between samples of one prompt
    keep_special: bool = False  # keep special tokens in the text
    schema: str = ""  # JSON schema that constrains the text
    # Token id that ends the prompt; each repetition starts another JSON value.
    marker: int | None = None


class Read(NamedTuple):
    """Log-likelihood of the whole text. Answer: TextScore.

    bos (or eos) is prepended to a text. Token ids are scored from the second one on. A text longer
    than the context is scored in windows that advance by `stride` tokens (default: the context). A
    smaller stride gives each token more context.
    """

    text: Text
    stride: int | None = None


class Judge(NamedTuple):
    """Grade a text by the evaluation's grader: a judge model, classifier or sandbox.

    Answer: any JSON value.
    """

    text: str
    system: str = ""  # system prompt of an instruct model


class Scored(NamedTuple):
    logprob: float  # nats, summed over the option's tokens
    tokens: int
    greedy: bool  # greedy decoding would generate this option


class Generation(NamedTuple):
    text: str  # without the stop string
    tokens: int
    stopped: bool  # ended by a stop string or an end token, not by max_tokens


class TextScore(NamedTuple):
    logprob: float
    tokens: int
    bytes: int  # UTF-8 bytes of the scored tokens


class TooLong(NamedTuple):
    """Replaces an answer: the request needs `tokens` tokens, more than the context of `limit`."""

    tokens: int
    limit: int


class Failed(NamedTuple):
    """Replaces an answer: the reason why the judge returned none."""

    reason: str


Request = Choose | Write | Read | Judge
Answer = list[Scored] | Generation | TextScore | Any
Scores = dict[str, Any]
Score = Generator[Any, Any, Scores]


class Responder(Protocol):
    """Answers requests: a model (evals/engines.py), or a grader of texts.

    Graders, which answer Judge requests only, are in evals/judges.py, evals/sandbox.py and the
    evaluations that use them.
    """

    name: str
    hash: str  # hash of weights, config and tokenizer
    dtype: str
    context: int  # tokens

    def answer(
        self, requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Answer | TooLong | Failed]]]:
        """Yield batches of (request index, answer), in any order, each request once."""
        ...


@dataclass(frozen=True)
class Item:
    id: str  # the id that the decontamination report uses
    row: dict[str, Any]
    subject: str = ""


class Estimate(NamedTuple):
    value: float
    stderr: float | None  # standard error of the mean over items; None if undefined
    n: int | None = None  # items with this score; None if it is not a mean over items


@dataclass
class Sample:
    """The requests, answers and scores of one item."""

    id: str
    subject: str
    scores: Scores = field(default_factory=dict)
    exchange: list[tuple[Request, Any]] = field(default_factory=list)
    too_long: int = 0  # tokens of a request that exceeds the context, else 0
    failed: str = ""  # reason why the judge did not answer


def means(samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Mean of each score over the items that have it, with its standard error.

    The variance divides by n - 1, as in lm-eval.
    """
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
    """A task: its items, the scoring function and the aggregation of scores."""

    task: str
    version: int  # version of prompts and scoring; increase it when scores may change
    items: Sequence[Item]
    score: Callable[[Item], Score]
    shots: int = 0
    seed: int | None = None  # seed of the few-shot sampler
    test_set: str = ""  # name in the decontamination report; default: the task
    aggregate: Callable[[Sequence[Sample]], dict[str, Estimate]] = means
    # More fields of the results file, from the scored samples
    details: Callable[[Sequence[Sample]], dict[str, Any]] = lambda samples: {}
    metadata: dict[str, Any] = field(default_factory=dict)  # copied to the results file
    judge: Responder | None = None  # answers Judge requests


def run_items(
    items: Sequence[Item],
    score: Callable[[Item], Score],
    model: Responder,
    cache: "Cache",
    show: bool = False,
    judge: Responder | None = None,
    judge_cache: "Cache | None" = None,
) -> list[Sample]:
    """Run all items in rounds; a cache or a model answers each request."""
    samples = [Sample(item.id, item.subject) for item in items]
    running = {i: score(item) for i, item in enumerate(items)}
    inbox: dict[int, Any] = dict.fromkeys(running)
    while running:
        pending: dict[int, list[Request]] = {}
        single = set()  # items that yielded a request instead of a list
        for i, generator in list(running.items()):
            try:
                yielded = generator.send(inbox[i])
            except StopIteration as end:
                samples[i].scores = end.value
                del running[i]
                continue
            if not isinstance(yielded, list):
                single.add(i)
            pending[i] = yielded if isinstance(yielded, list) else [yielded]
        if not pending:
            break
        owners = [i for i, requests in pending.items() for _ in requests]
        requests = [request for requests in pending.values() for request in requests]
        answers: list[Any] = [None] * len(requests)
        responders = ((False, model, cache), (True, judge, judge_cache or Cache()))
        for is_judge, responder, answer_cache in responders:
            indices = [k for k, r in enumerate(requests) if isinstance(r, Judge) is is_judge]
            if indices:
                assert responder is not None, "a Judge request in an evaluation without a judge"
                batch = [requests[k] for k in indices]
                replied = _answers(batch, responder, answer_cache, show)
                for k, answer in zip(indices, replied, strict=True):
                    answers[k] = answer
        replies: dict[int, list] = defaultdict(list)
        for i, answer in zip(owners, answers, strict=True):
            replies[i].append(answer)
        for i, item_requests in pending.items():
            samples[i].exchange += zip(item_requests, replies[i], strict=True)
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
    requests: list[Request], model: Responder, cache: "Cache", show: bool
) -> list[Answer | TooLong | Failed]:
    """Answers in the order of requests. Equal requests are sent once; failures are not cached."""
    uncached: dict[str, Request] = {}
    keys = [request_key(request) for request in requests]
    for key, request in zip(keys, requests, strict=True):
        if key not in cache:
            uncached.setdefault(key, request)
    uncached_keys = list(uncached)
    unanswered: dict[str, TooLong | Failed] = {}
    cached = len(requests) - len(uncached)
    with progress(len(requests), "request", show, initial=cached) as bar:
        for batch in model.answer(list(uncached.values())):
            answered = dict[str, Answer]()
            for i, answer in batch:
                if isinstance(answer, TooLong | Failed):
                    unanswered[uncached_keys[i]] = answer
                else:
                    answered[uncached_keys[i]] = answer
            cache.add(answered)
            bar.update(len(batch))
    pairs = zip(keys, requests, strict=True)
    return [
        unanswered[key] if key in unanswered else cache.get(key, request) for key, request in pairs
    ]


def request_key(request: Request) -> str:
    """Hash of a request: the cache key of its answer for one model."""
    return hashlib.sha256(json.dumps([type(request).__name__, *request]).encode()).hexdigest()[:32]


class Cache:
    """Answers of one model, appended to files as they arrive, so an interrupted suite resumes.

    Each rank appends to its own file and reads all files. Without a folder, answers stay in memory.
    """

    def __init__(self, folder: Path | None = None, model: Responder | None = None, rank: int = 0):
        self.answers: dict[str, Any] = {}
        self.file = None
        if folder is None or model is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # The context is part of the name: it decides the windows of a long text.
        stem = f"{model.hash[:16]}-{model.dtype}-{model.context}"
        for path in sorted(folder.glob(f"{stem}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    self.answers.update(json.loads(line))
                except ValueError:  # an incomplete line of an interrupted write
                    continue
        path = folder / f"{stem}.{rank}.jsonl"
        incomplete = path.is_file() and path.stat().st_size
        incomplete = incomplete and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - stays open during the run
        if incomplete:
            self.file.write("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.answers

    def get(self, key: str, request: Request) -> Answer:
        answer = self.answers[key]
        if isinstance(request, Choose):
            return [Scored(*scored) for scored in answer]
        if isinstance(request, Judge):
            return answer
        return Generation(*answer) if isinstance(request, Write) else TextScore(*answer)

    def add(self, answers: dict[str, Any]) -> None:
        self.answers |= answers
        if self.file is not None and answers:
            self.file.write(
                "".join(json.dumps({key: answer}) + "\n" for key, answer in answers.items())
            )
            self.file.flush()


def contaminated_ids(path: Path, test_set: str) -> set[str] | None:
    """Ids of a test set's items found in training data; None if the report does not cover the set.

    path: a decontamination report. ValueError if it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if test_set not in report["settings"]["test_sets"]:
            return None
        return {
            hit["test_id"]
            for hits in report["documents"].values()
            for hit in hits
            if hit["test_set"] == test_set
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a contamination report ({type(error).__name__}); "
            "give a report of scripts.decontaminate or scripts.prepare_data"
        ) from error


def results(
    evaluation: Eval,
    samples: Sequence[Sample],
    model: Responder,
    contaminated: set[str] | None = None,
) -> dict[str, Any]:
    """Content of the results file: metrics over all items, per subject, and over clean items.

    Clean items are those not found in the training data. ValueError if no item could be scored.
    """
    scored = [sample for sample in samples if not sample.too_long]
    too_long = [sample for sample in samples if sample.too_long]
    if not scored:
        needed = max((sample.too_long for sample in too_long), default=0)
        raise ValueError(
            f"none of the {len(samples)} items of {evaluation.task} fits the model's context of "
            f"{model.context} tokens (the longest needs {needed}); reduce --shots or use a model "
            "with a longer context"
            if too_long
            else f"{evaluation.task} has no items; check --data and --limit"
        )
    subjects: dict[str, list[Sample]] = defaultdict(list)
    for sample in scored:
        subjects[sample.subject].append(sample)
    keys = "".join(
        request_key(request)
        for sample in samples
        for request, _ in sample.exchange
        if not isinstance(request, Judge)
    )
    clean = [sample for sample in scored if sample.id not in (contaminated or ())]
    by_subject = {name: _metrics(evaluation, group) for name, group in sorted(subjects.items())}
    return {
        "task": evaluation.task,
        **_metrics(evaluation, scored),
        "version": evaluation.version,
        "shots": evaluation.shots,
        "seed": evaluation.seed,
        **({"subjects": by_subject, "macro": _macro(by_subject)} if len(by_subject) > 1 else {}),
        "clean": None
        if contaminated is None
        else {
            **_metrics(evaluation, clean),
            "contaminated": sorted({s.id for s in scored} & contaminated),
        },
        "too_long": {
            "n": len(too_long),
            "ids": [sample.id for sample in too_long],
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
        **evaluation.details(scored),
        **evaluation.metadata,
    }


def _metrics(evaluation: Eval, samples: Sequence[Sample]) -> dict[str, Any]:
    metrics = evaluation.aggregate(samples) if samples else {}
    return {
        "metrics": {name: estimate._asdict() for name, estimate in metrics.items()},
        "n": len(samples),
    }


def _macro(by_subject: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Unweighted mean of each metric over subjects."""
    values: dict[str, list[float]] = defaultdict(list)
    for subject in by_subject.values():
        for name, estimate in subject["metrics"].items():
            values[name].append(estimate["value"])
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def write_results(output: Path, content: dict[str, Any], samples: Iterable[Sample]) -> None:
    """Write the results file and, beside it, <stem>.samples.jsonl; each atomically."""
    samples_path = write_samples(output, samples)
    write_json(output, {**content, "samples": samples_path.name})


def write_samples(output: Path, samples: Iterable[Sample]) -> Path:
    """Write the requests, answers and scores of each item to <stem>.samples.jsonl beside output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(output.stem + ".samples.jsonl")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
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
    temporary.rename(path)
    return path
