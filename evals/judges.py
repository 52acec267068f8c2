"""What answers Judge: a model behind an OpenAI-compatible endpoint, Perspective, or a toxicity classifier on this machine.

All are models of the harness, so their answers are kept as they come and a killed evaluation asks only for the rest.
"""

import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from evals.harness import Answer, Failed, Judge, Request, TooLong

Batches = Iterator[list[tuple[int, Answer | TooLong | Failed]]]
RETRY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses after which asking again may help


def read_key(path: Path) -> str:
    """The API key in a file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); it should hold an API key"
        ) from error


class Remote:
    """Asks a server by JSON over HTTP, several questions at a time, and again where that may help.

    body(request) is what is posted, read(reply) what becomes of the reply; what else comes is Failed. rate: requests a second.
    """

    dtype, context = "judge", 0

    def __init__(
        self,
        name: str,
        url: str,
        headers: dict[str, str],
        body: Callable[[Judge], dict[str, Any]],
        read: Callable[[Any], Any],
        rate: float = 0.0,
        workers: int = 8,
        retries: int = 4,
        pause: float = 1.0,
        timeout: float = 120.0,
    ):
        self.name, self.url, self.headers, self.body, self.read = name, url, headers, body, read
        self.interval, self.workers, self.retries = 1 / rate if rate else 0.0, workers, retries
        self.pause, self.timeout = pause, timeout
        self.hash = hashlib.sha256(json.dumps([name, body(Judge(""))]).encode()).hexdigest()
        self.lock, self.next = threading.Lock(), 0.0
        self.gone = ""  # why the server cannot be reached: then the rest is not asked

    def answer(self, requests: Sequence[Any]) -> Batches:
        left, running = iter(enumerate(requests)), dict[Future[Any], int]()
        with ThreadPoolExecutor(
            self.workers
        ) as pool:  # no queue: who interrupts waits for what is on its way, not for the rest
            try:
                while True:
                    running |= {
                        pool.submit(self.ask, request): i
                        for i, request in islice(left, self.workers - len(running))
                    }
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    yield [(running.pop(future), future.result()) for future in done]
            except KeyboardInterrupt:
                self.gone = "interrupted"  # no second attempts
                raise

    def ask(self, question: Judge) -> Any:
        """What is read from the reply, or Failed."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            if not self.gone:
                self._wait()
            if self.gone:
                return Failed(self.gone)
            try:
                request = urllib.request.Request(
                    self.url,
                    json.dumps(self.body(question)).encode(),
                    {"Content-Type": "application/json", **self.headers},
                )
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return self.read(json.load(reply))
            except urllib.error.HTTPError as error:
                reason = f"it answered with status {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code not in RETRY:
                    return Failed(reason)
            except (OSError, http.client.HTTPException) as error:
                reason = f"it cannot be reached: {getattr(error, 'reason', error)}".strip()
            except (ValueError, KeyError, IndexError, TypeError) as error:
                return Failed(f"its reply cannot be read ({type(error).__name__}: {error})")
        if reason.startswith("it cannot be reached"):
            self.gone = reason
        return Failed(reason)

    def _wait(self) -> None:
        """Until the next request may go out."""
        with self.lock:
            mine = max(self.next, time.monotonic())
            self.next = mine + self.interval
        time.sleep(max(0.0, mine - time.monotonic()))


def endpoint(url: str, model: str, key: str = "", max_tokens: int = 2048, **how: Any) -> Remote:
    """An OpenAI-compatible chat endpoint at `url` (as http://localhost:8000/v1), greedy; answers are the reply's text."""

    def body(request: Judge) -> dict[str, Any]:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.text})
        return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = url.rstrip("/") + "/chat/completions"
    return Remote(
        f"{model} at {url}",
        where,
        headers,
        body,
        lambda reply: str(reply["choices"][0]["message"]["content"]),
        **how,
    )


PERSPECTIVE = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"


def perspective(key: str, url: str = PERSPECTIVE, rate: float = 1.0, **how: Any) -> Remote:
    """Google's Perspective API, attribute TOXICITY; rate: its free quota is one request a second."""

    def body(request: Judge) -> dict[str, Any]:
        asked: dict[str, Any] = {"TOXICITY": {}}
        return {
            "comment": {"text": request.text},
            "languages": ["en"],
            "requestedAttributes": asked,
            "doNotStore": True,
        }

    where = f"{url}?{urllib.parse.urlencode({'key': key})}"
    return Remote(
        "Perspective TOXICITY",
        where,
        {},
        body,
        lambda reply: float(reply["attributeScores"]["TOXICITY"]["summaryScore"]["value"]),
        rate=rate,
        **how,
    )


class ProfanityCheck:
    """The linear SVM of the wheel alt-profanity-check: chance that a text is offensive. It reads words, not meaning."""

    name, dtype, context = "alt-profanity-check 1.9.1 (linear SVM; offensive words)", "judge", 0
    hash = hashlib.sha256(b"alt-profanity-check 1.9.1").hexdigest()

    def __init__(self) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError:
            raise ValueError(
                "the default scorer is a small classifier in a wheel: pip install alt-profanity-check==1.9.1; "
                "or give --scorer FOLDER of a classifier, or --scorer perspective"
            ) from None
        self.predict = predict_prob

    def answer(self, requests: Sequence[Any]) -> Batches:
        if requests:
            yield list(
                enumerate(
                    float(score) for score in self.predict([request.text for request in requests])
                )
            )


class Classifier:
    """A sequence classifier in a Hugging Face folder: the probability of the label `label` (its name or number)."""

    dtype, context = "judge", 0

    def __init__(self, folder: Path, label: str, device: str, batch_size: int = 32):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from evals.engines import check_device, folder_hash

        check_device(device)
        try:
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True
            )
            self.model = self.model.to(device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{folder} cannot be loaded as a text classifier: {str(error).splitlines()[0]}"
            ) from error
        config = self.model.config
        names = {str(name).lower(): int(index) for index, name in config.id2label.items()}
        place = names.get(label.lower(), int(label) if label.isdigit() else None)
        if place is None or place >= len(names):
            raise ValueError(
                f"{folder} has no label {label!r}, only {', '.join(names)}; give --label"
            )
        self.place, self.many = (
            place,
            config.problem_type == "multi_label_classification" or config.num_labels == 1,
        )
        self.name, self.hash = (
            f"{folder} ({label})",
            hashlib.sha256((folder_hash(folder) + label).encode()).hexdigest(),
        )
        self.device, self.batch_size = device, batch_size

    def answer(self, requests: Sequence[Request]) -> Batches:
        import torch

        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        limit = min(
            self.tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", 512),
        )
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            texts = [str(requests[i][0]) for i in places]
            batch = self.tokenizer(
                texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.device)).logits.float()
            uniforms = logits.sigmoid() if self.many else logits.softmax(-1)
            yield list(zip(places, uniforms[:, self.place].tolist(), strict=True))
