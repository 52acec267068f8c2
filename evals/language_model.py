"""Tokenizes the harness's requests for an engine and decodes the engine's output.

Contexts and continuations are tokenized as in lm-evaluation-harness: encoded together, then split
after the tokens of the context alone. Trailing spaces of the context are first moved to the
continuation. An empty context becomes bos, or eos without a bos.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.chat.rendering import marker_tokens
from data.manifest import read_json
from data.tokenizers.bpe import listed_ids, load_tokenizer, special_text
from evals.harness import (
    Answer,
    Choose,
    Generation,
    Read,
    Request,
    Scored,
    Text,
    TextScore,
    TooLong,
    Write,
)
from inference.gguf_tokenizer import tokenizer_folder
from inference.grammar import JsonConstraint, JsonGrammar


class ScoreRequest(NamedTuple):
    """Token ids of a context, and of the continuations to score after it."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Input length for the longest continuation; its last token is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1


class Engine(Protocol):
    """Scores and generates token ids for one kind of model."""

    context: int
    dtype: str

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        """Yield batches of (request index, one Scored per continuation)."""
        ...

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], tokenizer: "EvalTokenizer"
    ) -> Iterator[list[tuple[int, Generation]]]:
        """Yield batches of (prompt index, completion)."""
        ...


class EvalTokenizer:
    """The tokenizer of a checkpoint with its bos, eos and stop token ids."""

    def __init__(self, checkpoint: Path):
        self.folder = folder = tokenizer_folder(checkpoint)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json; copy the tokenizer's files to that folder"
            )
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        named, ids = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
        self.bos, self.eos = (
            self._special(special_text(named, f"{name}_token"), listed_ids(ids, f"{name}_token_id"))
            for name in ("bos", "eos")
        )
        added = self.tokenizer.get_added_tokens_decoder()
        markers = marker_tokens(added.values())
        self.markers = {index for index, token in added.items() if token.content in markers}
        begin = self.eos if self.bos is None else self.bos
        if begin is None:
            raise ValueError(
                f"{folder} defines neither a bos nor an eos token; "
                "set bos_token in its tokenizer_config.json"
            )
        self.begin: int = begin
        self.begins_with = self.tokenizer.id_to_token(begin) or ""
        stops = [
            index
            for config in (read_json(folder / "generation_config.json"), ids)
            for index in listed_ids(config, "eos_token_id")
        ]
        self.stops = frozenset(stops if self.eos is None else [*stops, self.eos])

    def _special(self, token: str | None, default: list[int]) -> int | None:
        index = self.tokenizer.token_to_id(token) if token else None
        return index if index is not None else next(iter(default), None)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of texts; `special` adds special tokens unless a text begins with bos."""
        ids: dict[str, list[int]] = {}
        for add_special in (True, False):
            group = [
                text
                for text in dict.fromkeys(texts)
                if (special and not text.startswith(self.begins_with or "\0")) is add_special
            ]
            encodings = self.tokenizer.encode_batch(group, add_special_tokens=add_special)
            ids |= {text: encoding.ids for text, encoding in zip(group, encodings, strict=True)}
        return [ids[text] for text in texts]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        kept = [index for index in ids if keep_special or index not in self.markers]
        return self.tokenizer.decode(kept, skip_special_tokens=not keep_special)

    def ended(self, new: Sequence[int], request: Write) -> bool:
        """Whether the last tokens contain one of the request's stop strings."""
        if not request.stop:
            return False
        tail = max(len(stop.encode()) for stop in request.stop) + 4  # a token has at least a byte
        text = self.decode(new[-tail:], request.keep_special)
        return any(stop in text for stop in request.stop)

    def written(self, new: Sequence[int], request: Write) -> Generation:
        """Decode generated tokens up to the first end token or stop string."""
        end = next((i for i, token in enumerate(new) if token in self.stops), len(new))
        text = self.decode(
            new[: end + 1] if request.keep_special else new[:end], request.keep_special
        )
        matches = (text.find(stop) for stop in request.stop)
        cut = min((index for index in matches if index >= 0), default=len(text))
        return Generation(text[:cut], len(new), end < len(new) or cut < len(text))

    @functools.cached_property
    def for_grammars(self) -> Any:
        """The tokenizer as a Transformers object, for xgrammar."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def count_bytes(self, ids: Sequence[int]) -> int:
        return len(self.decode(ids).encode())


def build_constraint(
    request: Write, tokenizer: EvalTokenizer, vocab_size: int
) -> JsonConstraint | None:
    """Grammar constraint for a request's JSON schema; None without one.

    vocab_size: rows of the model's head.
    """
    if not request.schema:
        return None
    followers = sorted(tokenizer.stops)
    followers = followers if request.marker is None else [request.marker, *followers]
    grammar = JsonGrammar(request.schema, tokenizer.for_grammars, vocab_size)
    constraint = grammar.constraint(request.marker, followers, request.max_tokens)
    if request.marker is not None:
        constraint.accept(request.marker)  # the prompt already ends with it
    return constraint


class LanguageModel:
    """An engine and its tokenizer as a harness.Responder."""

    def __init__(self, name: str, hash: str, engine: Engine, tokenizer: EvalTokenizer):
        self.name, self.hash, self.engine, self.tokenizer = name, hash, engine, tokenizer
        self.context, self.dtype = engine.context, engine.dtype

    def answer(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer | TooLong]]]:
        """See harness.Responder."""
        kinds = {
            kind: [i for i, r in enumerate(requests) if isinstance(r, kind)]
            for kind in (Choose, Read, Write)
        }
        for kind, method in ((Choose, self._choose), (Read, self._read), (Write, self._write)):
            indices = kinds[kind]
            for batch in method([requests[i] for i in indices]) if indices else ():
                yield [(indices[i], answer) for i, answer in batch]

    def ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids of texts; texts given as ids are returned unchanged."""
        encoded = iter(self.tokenizer.encode([text for text in texts if isinstance(text, str)]))
        return [next(encoded) if isinstance(text, str) else list(text) for text in texts]

    def _choose(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        encoded = self.encode_choices(requests)
        too_long = [
            (i, TooLong(request.longest, self.context))
            for i, request in enumerate(encoded)
            if request.longest > self.context
        ]
        if too_long:
            yield too_long
        fitting = [i for i, request in enumerate(encoded) if request.longest <= self.context]
        for batch in self._score([encoded[i] for i in fitting]):
            yield [(fitting[i], scored) for i, scored in batch]

    def encode_choices(self, requests: Sequence[Choose]) -> list[ScoreRequest]:
        """Tokenize contexts and options, split as in lm-evaluation-harness."""
        contexts, pairs = [], []
        for context, options in requests:
            if isinstance(context, str) and all(isinstance(option, str) for option in options):
                bare = context.rstrip()
                contexts.append(bare)
                pairs += [context + str(option) for option in options]
        context_ids = iter(self.ids(contexts))
        pair_ids = iter(self.tokenizer.encode(pairs) if pairs else [])
        encoded = []
        for context, options in requests:
            if not isinstance(context, str) or not all(
                isinstance(option, str) for option in options
            ):
                first, *rest = self.ids([context, *options])
                encoded.append(ScoreRequest(tuple(first), tuple(map(tuple, rest))))
                continue
            prefix, sequences = next(context_ids), [next(pair_ids) for _ in options]
            if context.rstrip():
                continuations = tuple(tuple(ids[len(prefix) :]) for ids in sequences)
                encoded.append(ScoreRequest(tuple(prefix), continuations))
            else:  # lm-eval encodes these without special tokens
                begin = self.tokenizer.begin
                texts = [context + str(option) for option in options]
                sequences = self.tokenizer.encode(texts, special=False)
                sequences = [ids[1:] if ids[:1] == [begin] else ids for ids in sequences]
                encoded.append(ScoreRequest((begin,), tuple(map(tuple, sequences))))
        for request, ids in zip(requests, encoded, strict=True):
            if not ids.context or not all(ids.continuations):
                raise ValueError(
                    f"an option of {str(request.options)[:80]} has no tokens to score; fix the item"
                )
        return encoded

    def _read(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        windows, owners, readings = [], [], []
        for i, (request, ids) in enumerate(
            zip(requests, self.ids([r.text for r in requests]), strict=True)
        ):
            tokens = ids if isinstance(request.text, str) else ids[1:]
            begin = self.tokenizer.begin if isinstance(request.text, str) else ids[0]
            text_windows = rolling_windows(tokens, begin, self.context, request.stride)
            windows += text_windows
            owners += [i] * len(text_windows)
            size = (
                len(request.text.encode())
                if isinstance(request.text, str)
                else self.tokenizer.count_bytes(tokens)
            )
            readings.append(TextScore(0.0, len(tokens), size))
        remaining = [owners.count(i) for i in range(len(requests))]
        yield [(i, TextScore(0.0, 0, 0)) for i, count in enumerate(remaining) if not count]
        for batch in self._score(windows):
            done = []
            for window, [scored] in batch:
                i = owners[window]
                readings[i] = readings[i]._replace(logprob=readings[i].logprob + scored.logprob)
                remaining[i] -= 1
                if not remaining[i]:
                    done.append((i, readings[i]))
            yield done

    def _score(self, requests: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for batch in self.engine.score(requests):
            if not all(math.isfinite(scored.logprob) for _, group in batch for scored in group):
                raise ValueError(
                    f"{self.name} returns logits that are not finite in {self.dtype}; check it "
                    "with scripts.verify_checkpoint, or give --dtype float32"
                )
            yield batch

    def _write(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        prompts = self.ids([request.prompt for request in requests])
        prompts = [ids or [self.tokenizer.begin] for ids in prompts]
        needed = [len(p) + r.max_tokens for p, r in zip(prompts, requests, strict=True)]
        too_long = [(i, TooLong(n, self.context)) for i, n in enumerate(needed) if n > self.context]
        if too_long:
            yield too_long
        fitting = [i for i, n in enumerate(needed) if n <= self.context]
        fitting_prompts = [prompts[i] for i in fitting]
        fitting_requests = [requests[i] for i in fitting]
        for batch in self.engine.write(fitting_prompts, fitting_requests, self.tokenizer):
            yield [(fitting[i], written) for i, written in batch]


def rolling_windows(
    tokens: Sequence[int], begin: int, context: int, stride: int | None = None
) -> list[ScoreRequest]:
    """Windows that score each token once, as lm-eval with context_len = context - stride + 1.

    The first window begins after `begin`. Each later one advances by `stride` tokens (default: the
    context) and sees as many preceding tokens as fit. ValueError unless 1 <= stride <= context.
    """
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise ValueError(
            f"stride {step} does not fit a context of {context} tokens; give 1 to {context}"
        )
    windows = [ScoreRequest((begin,), (tuple(tokens[:context]),))] if tokens else []
    for first in range(context, len(tokens), step):
        end = min(first + step, len(tokens))
        windows.append(
            ScoreRequest(tuple(tokens[end - context - 1 : first]), (tuple(tokens[first:end]),))
        )
    return windows
