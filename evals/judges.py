"""Models that answer Judge requests: an OpenAI-compatible endpoint or a toxicity classifier.

They implement harness.Responder, so their answers are cached: an interrupted evaluation asks only
for the missing ones.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from evals.harness import Answer, Failed, Judge, Request, TooLong

Batches = Iterator[list[tuple[int, Answer | TooLong | Failed]]]
RETRY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP statuses that may be temporary


def read_key(path: Path) -> str:
    """Read an API key from a file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); give a file that holds an API key"
        ) from error


class ChatEndpoint:
    """A model behind an OpenAI-compatible chat endpoint, asked greedily; answers are reply texts.

    url: the base, such as http://localhost:8000/v1. workers: concurrent requests. retries: further
    attempts after a temporary error; the first waits `pause` seconds, each next one twice as long.
    timeout: seconds for one request.
    """

    dtype, context = "judge", 0

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        max_tokens: int = 2048,
        workers: int = 8,
        retries: int = 4,
        pause: float = 1.0,
        timeout: float = 120.0,
    ):
        self.name, self.model, self.max_tokens = f"{model} at {url}", model, max_tokens
        self.url = url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.workers, self.retries, self.pause, self.timeout = workers, retries, pause, timeout
        settings = json.dumps([self.name, self._body(Judge(""))])
        self.hash = hashlib.sha256(settings.encode()).hexdigest()
        self.unreachable = ""  # the reason; once set, no further requests are sent

    def _body(self, request: Judge) -> dict[str, Any]:
        messages = [{"role": "system", "content": request.system}] if request.system else []
        messages.append({"role": "user", "content": request.text})
        settings = {"temperature": 0, "max_tokens": self.max_tokens}
        return {"model": self.model, "messages": messages, **settings}

    def answer(self, requests: Sequence[Any]) -> Batches:
        pending, running = iter(enumerate(requests)), dict[Future[Any], int]()
        # At most `workers` requests are submitted: an interrupt waits for these, not for the rest.
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                while True:
                    running |= {
                        pool.submit(self.ask, request): i
                        for i, request in islice(pending, self.workers - len(running))
                    }
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    yield [(running.pop(future), future.result()) for future in done]
            except KeyboardInterrupt:
                self.unreachable = "interrupted"  # stops retries
                raise

    def ask(self, question: Judge) -> str | Failed:
        """Return the reply's text, or Failed."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            if self.unreachable:
                return Failed(self.unreachable)
            try:
                body = json.dumps(self._body(question)).encode()
                request = urllib.request.Request(self.url, body, self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                text = error.read(200).decode(errors="replace")
                reason = f"it answered with status {error.code}: {text}"
                if error.code not in RETRY:
                    return Failed(reason)
            except (OSError, http.client.HTTPException) as error:
                reason = f"it cannot be reached: {getattr(error, 'reason', error)}".strip()
            except (ValueError, KeyError, IndexError, TypeError) as error:
                return Failed(f"its reply cannot be read ({type(error).__name__}: {error})")
        if reason.startswith("it cannot be reached"):
            self.unreachable = reason
        return Failed(reason)


class ProfanityCheck:
    """The linear SVM of alt-profanity-check: probability that a text contains offensive words."""

    name, dtype, context = "alt-profanity-check 1.9.1 (linear SVM; offensive words)", "judge", 0
    hash = hashlib.sha256(b"alt-profanity-check 1.9.1").hexdigest()

    def __init__(self) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError:
            raise ValueError(
                "the default scorer is not installed; pip install alt-profanity-check==1.9.1, "
                "or give --scorer FOLDER with a classifier"
            ) from None
        self.predict = predict_prob

    def answer(self, requests: Sequence[Any]) -> Batches:
        if requests:
            scores = self.predict([request.text for request in requests])
            yield list(enumerate(map(float, scores)))


class Classifier:
    """A sequence classifier in a Hugging Face folder; answers are the probability of one label.

    label: the label's name or index. ValueError if the folder has no such label.
    """

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
        index = names.get(label.lower(), int(label) if label.isdigit() else None)
        if index is None or index >= len(names):
            raise ValueError(
                f"{folder} has no label {label!r}, only {', '.join(names)}; give --label"
            )
        multi_label = config.problem_type == "multi_label_classification"
        self.index, self.sigmoid = index, multi_label or config.num_labels == 1
        self.name = f"{folder} ({label})"
        self.hash = hashlib.sha256((folder_hash(folder) + label).encode()).hexdigest()
        self.device, self.batch_size = device, batch_size

    def answer(self, requests: Sequence[Request]) -> Batches:
        import torch

        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        limit = min(
            self.tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", 512),
        )
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            texts = [str(requests[i][0]) for i in indices]
            batch = self.tokenizer(
                texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.device)).logits.float()
            probabilities = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
            yield list(zip(indices, probabilities[:, self.index].tolist(), strict=True))
