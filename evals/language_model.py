"""Requests of the harness as token ids for an engine, and what it answers as text.

Prompts become ids as in lm-evaluation-harness: context and option are encoded together and cut where the context alone ends,
after spaces at the context's end have gone to the option; an empty context is bos, or eos where there is no bos.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.manifest import read_json
from data.tokenizers.bpe import listed_ids, load_tokenizer, special_text
from evals.harness import (
    Answer,
    Choose,
    Read,
    Reading,
    Request,
    Scored,
    Text,
    TooLong,
    Write,
    Written,
)
from inference.gguf_tokenizer import tokenizer_folder
from inference.grammar import JsonConstraint, JsonGrammar


class ScoreRequest(NamedTuple):
    """What scoring is made of: token ids after which each option's ids are scored."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens that are fed for the longest option: its last one is only predicted."""
        return len(self.context) + max(map(len, self.options)) - 1


class Engine(Protocol):
    """The part of a model that differs: ids in, figures out."""

    context: int
    dtype: str

    def score(self, units: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        """Batches of (index of the unit, one Scored an option)."""
        ...

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], words: "EvalTokenizer"
    ) -> Iterator[list[tuple[int, Written]]]:
        """Batches of (index of the prompt, what follows)."""
        ...


class EvalTokenizer:
    """The tokenizer of a checkpoint, and which ids begin and end a text."""

    def __init__(self, checkpoint: Path):
        self.folder = folder = tokenizer_folder(checkpoint)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{folder} holds no tokenizer.json; copy the tokenizer's files there, an evaluation reads and writes text"
            )
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        named, ids = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
        self.bos, self.eos = (
            self._special(special_text(named, f"{name}_token"), listed_ids(ids, f"{name}_token_id"))
            for name in ("bos", "eos")
        )
        begin = self.eos if self.bos is None else self.bos
        if begin is None:
            raise ValueError(
                f"{folder} names neither a bos nor an eos token; name one in its tokenizer_config.json"
            )
        self.begin: int = begin
        self.begins_with = self.tokenizer.id_to_token(begin) or ""
        stops = [
            index
            for found in (read_json(folder / "generation_config.json"), ids)
            for index in listed_ids(found, "eos_token_id")
        ]
        self.stops = frozenset(stops if self.eos is None else [*stops, self.eos])

    def _special(self, token: str | None, default: list[int]) -> int | None:
        index = self.tokenizer.token_to_id(token) if token else None
        return index if index is not None else next(iter(default), None)

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of texts, with what the tokenizer puts around them unless the text begins so itself; equal texts once."""
        known: dict[str, list[int]] = {}
        for around in (True, False):
            group = [
                t
                for t in dict.fromkeys(texts)
                if (special and not t.startswith(self.begins_with or "\0")) is around
            ]
            encodings = self.tokenizer.encode_batch(group, add_special_tokens=around)
            known |= {text: encoding.ids for text, encoding in zip(group, encodings, strict=True)}
        return [known[text] for text in texts]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def ended(self, new: Sequence[int], request: Write) -> bool:
        """Has one of the request's stop strings been written?"""
        tail = (
            max((len(stop.encode()) for stop in request.stop), default=0) + 4
        )  # a token has a byte or more
        return bool(request.stop) and any(
            stop in self.decode(new[-tail:], request.keep_special) for stop in request.stop
        )

    def written(self, new: Sequence[int], request: Write) -> Written:
        """What the new tokens say, up to the first end token or stop string."""
        end = next((i for i, token in enumerate(new) if token in self.stops), len(new))
        text = self.decode(
            new[: end + 1] if request.keep_special else new[:end], request.keep_special
        )
        cut = min(
            (place for stop in request.stop if (place := text.find(stop)) >= 0), default=len(text)
        )
        return Written(text[:cut], len(new), end < len(new) or cut < len(text))

    @functools.cached_property
    def for_grammars(self) -> Any:
        """The tokenizer in transformers' form, which xgrammar reads."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def bytes_of(self, ids: Sequence[int]) -> int:
        return len(self.decode(ids).encode())


def constraint_of(request: Write, words: EvalTokenizer, size: int) -> JsonConstraint | None:
    """What holds the text of a request to its schema; None where it has none. size: rows of the model's head."""
    if not request.schema:
        return None
    then = sorted(words.stops) if request.marker is None else [request.marker, *sorted(words.stops)]
    constraint = JsonGrammar(request.schema, words.for_grammars, size).constraint(
        request.marker, then, request.max_tokens
    )
    if request.marker is not None:
        constraint.accept(request.marker)  # it ends the prompt
    return constraint


class LanguageModel:
    """Requests of the harness as ids for an engine."""

    def __init__(self, name: str, hash: str, engine: Engine, words: EvalTokenizer):
        self.name, self.hash, self.engine, self.words = name, hash, engine, words
        self.context, self.dtype = engine.context, engine.dtype

    def answer(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer | TooLong]]]:
        """See harness.Model."""
        kinds = {
            kind: [i for i, r in enumerate(requests) if isinstance(r, kind)]
            for kind in (Choose, Read, Write)
        }
        for kind, method in ((Choose, self._choose), (Read, self._read), (Write, self._write)):
            places = kinds[kind]
            for batch in method([requests[i] for i in places]) if places else ():
                yield [(places[i], answer) for i, answer in batch]

    def ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """Ids of texts; what is ids already stays."""
        encoded = iter(self.words.encode([text for text in texts if isinstance(text, str)]))
        return [next(encoded) if isinstance(text, str) else list(text) for text in texts]

    def _choose(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        fitting, long = [], []
        for i, unit in enumerate(self.units(requests)):
            long.append(
                (i, TooLong(unit.longest, self.context))
            ) if unit.longest > self.context else fitting.append((i, unit))
        if long:
            yield long
        for batch in self._score([unit for _, unit in fitting]):
            yield [(fitting[i][0], scored) for i, scored in batch]

    def units(self, requests: Sequence[Choose]) -> list[ScoreRequest]:
        """Context and options of each request in ids, cut where lm-evaluation-harness cuts them."""
        contexts, pairs = [], []
        for context, options in requests:
            if isinstance(context, str) and all(isinstance(option, str) for option in options):
                bare = context.rstrip()
                contexts.append(bare)
                pairs += [context + str(option) for option in options]
        alone, together = iter(self.ids(contexts)), iter(self.words.encode(pairs) if pairs else [])
        units = []
        for context, options in requests:
            if not isinstance(context, str) or not all(
                isinstance(option, str) for option in options
            ):
                first, *rest = self.ids([context, *options])
                units.append(ScoreRequest(tuple(first), tuple(map(tuple, rest))))
                continue
            head, whole = next(alone), [next(together) for _ in options]
            if context.rstrip():
                units.append(
                    ScoreRequest(tuple(head), tuple(tuple(ids[len(head) :]) for ids in whole))
                )
            else:  # lm-eval encodes these without special tokens
                bare_ids = self.words.encode(
                    [context + str(option) for option in options], special=False
                )
                begun = [ids[1:] if ids[:1] == [self.words.begin] else ids for ids in bare_ids]
                units.append(ScoreRequest((self.words.begin,), tuple(map(tuple, begun))))
        for request, unit in zip(requests, units, strict=True):
            if not unit.context or not all(unit.options):
                raise ValueError(
                    f"the tokenizer leaves nothing of an option of {str(request.options)[:80]} to score; mend the item"
                )
        return units

    def _read(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        units, owners, readings = [], [], []
        for i, (request, ids) in enumerate(
            zip(requests, self.ids([r.text for r in requests]), strict=True)
        ):
            tokens = ids if isinstance(request.text, str) else ids[1:]
            windows = rolling(
                tokens,
                self.words.begin if isinstance(request.text, str) else ids[0],
                self.context,
                request.stride,
            )
            units += windows
            owners += [i] * len(windows)
            size = (
                len(request.text.encode())
                if isinstance(request.text, str)
                else self.words.bytes_of(tokens)
            )
            readings.append(Reading(0.0, len(tokens), size))
        left = [owners.count(i) for i in range(len(requests))]
        yield [(i, Reading(0.0, 0, 0)) for i, windows in enumerate(left) if not windows]
        for batch in self._score(units):
            done = []
            for place, [scored] in batch:
                i = owners[place]
                readings[i] = readings[i]._replace(logprob=readings[i].logprob + scored.logprob)
                left[i] -= 1
                if not left[i]:
                    done.append((i, readings[i]))
            yield done

    def _score(self, units: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for batch in self.engine.score(units):
            if not all(math.isfinite(scored.logprob) for _, options in batch for scored in options):
                raise ValueError(
                    f"{self.name} gives logits that are not finite in {self.dtype}; check the folder with "
                    "scripts.verify_checkpoint, or give --dtype float32"
                )
            yield batch

    def _write(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        fitting, long = [], []
        for i, (request, ids) in enumerate(
            zip(requests, self.ids([r.prompt for r in requests]), strict=True)
        ):
            needed = len(ids or [self.words.begin]) + request.max_tokens
            long.append(
                (i, TooLong(needed, self.context))
            ) if needed > self.context else fitting.append((i, ids))
        if long:
            yield long
        places = [i for i, _ in fitting]
        prompts = [ids or [self.words.begin] for _, ids in fitting]
        for batch in self.engine.write(prompts, [requests[i] for i in places], self.words):
            yield [(places[i], written) for i, written in batch]


def rolling(
    tokens: Sequence[int], begin: int, context: int, stride: int | None = None
) -> list[ScoreRequest]:
    """Windows that score each token once: the first begins after `begin`, later ones end `stride` tokens (default: a whole
    context) further and see as much before them as the context holds. As lm-evaluation-harness with context_len =
    context - stride + 1."""
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise ValueError(
            f"a window cannot move by {step} tokens in a context of {context}; give a stride from 1 to {context}"
        )
    windows = [ScoreRequest((begin,), (tuple(tokens[:context]),))] if tokens else []
    for first in range(context, len(tokens), step):
        end = min(first + step, len(tokens))
        windows.append(
            ScoreRequest(tuple(tokens[end - context - 1 : first]), (tuple(tokens[first:end]),))
        )
    return windows
