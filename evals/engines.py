"""Models that answer the harness: a checkpoint folder (ours, any Llama or Qwen3 folder, else by transformers) or a GGUF file.

Prompts become ids as in lm-evaluation-harness: context and option are encoded together and cut where the context alone ends,
after spaces at the context's end have gone to the option; an empty context is bos, or eos where there is no bos.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from data.manifest import file_hash
from data.tokenizer import load_tokenizer
from evals.harness import Answer, Choose, Read, Reading, Request, Scored, Text, TooLong, Write, Written
from models.hf import load_hf
from models.nanollama import NanoLlama

HEAD_CHUNK = {"cpu": 256}  # rows of logits at a time; 4,096 elsewhere
MIN_SHARED = 32  # tokens that contexts must have in common for their keys and values to be kept
NANOLLAMA = ("llama", "qwen3")  # model types that models/hf.py reads


class Unit(NamedTuple):
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

    def score(self, units: Sequence[Unit]) -> Iterator[list[tuple[int, list[Scored]]]]:
        """Batches of (index of the unit, one Scored an option)."""
        ...

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], words: "Words"
    ) -> Iterator[list[tuple[int, Written]]]:
        """Batches of (index of the prompt, what follows)."""
        ...


class Words:
    """The tokenizer of a checkpoint folder, and which ids begin and end a text."""

    def __init__(self, folder: Path):
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{folder} holds no tokenizer.json; copy the tokenizer's files there, an evaluation reads and writes text"
            )
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        named, ids = _json(folder / "tokenizer_config.json"), _json(folder / "config.json")
        self.bos, self.eos = (self._special(named.get(f"{name}_token"), ids.get(f"{name}_token_id")) for name in ("bos", "eos"))
        begin = self.eos if self.bos is None else self.bos
        if begin is None:
            raise ValueError(f"{folder} names neither a bos nor an eos token; name one in its tokenizer_config.json")
        self.begin: int = begin
        self.begins_with = self.tokenizer.id_to_token(begin) or ""
        stops = (_json(folder / "generation_config.json").get("eos_token_id"), ids.get("eos_token_id"), self.eos)
        self.stops = frozenset(i for stop in stops if stop is not None for i in (stop if isinstance(stop, list) else [stop]))

    def _special(self, token: Any, default: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        index = self.tokenizer.token_to_id(text) if text else None
        return index if index is not None else default[0] if isinstance(default, list) else default

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of texts, with what the tokenizer puts around them unless the text begins so itself; equal texts once."""
        known: dict[str, list[int]] = {}
        for around in (True, False):
            group = [t for t in dict.fromkeys(texts) if (special and not t.startswith(self.begins_with or "\0")) is around]
            encodings = self.tokenizer.encode_batch(group, add_special_tokens=around)
            known |= {text: encoding.ids for text, encoding in zip(group, encodings, strict=True)}
        return [known[text] for text in texts]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def bytes_of(self, ids: Sequence[int]) -> int:
        return len(self.decode(ids).encode())


def load_model(checkpoint: Path, device: str = "cpu", dtype: str | None = None, batch_size: int = 16) -> "LanguageModel":
    """The model of a folder, or of a GGUF file; ValueError where it cannot answer."""
    if not checkpoint.exists():
        raise ValueError(f"there is no checkpoint at {checkpoint}")
    if checkpoint.suffix == ".gguf":
        raise ValueError(f"{checkpoint}: GGUF files cannot be evaluated yet; give the folder that it was made of")
    words = Words(checkpoint)
    kind = _json(checkpoint / "config.json").get("model_type")
    engine: Engine
    if kind in NANOLLAMA or not (checkpoint / "config.json").is_file():
        model = load_hf(checkpoint, getattr(torch, dtype) if dtype else None, device)
        engine = NanoLlamaEngine(model.eval(), batch_size)
    else:
        engine = TransformersEngine(checkpoint, device, dtype, batch_size)
    return LanguageModel(str(checkpoint), folder_hash(checkpoint), engine, words)


def folder_hash(folder: Path) -> str:
    """sha256 of weights, config and tokenizer: what an answer depends on."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "tokenizer.json"))
    return hashlib.sha256("".join(f"{name} {file_hash(folder / name)}\n" for name in names).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


class LanguageModel:
    """Requests of the harness as ids for an engine."""

    def __init__(self, name: str, hash: str, engine: Engine, words: Words):
        self.name, self.hash, self.engine, self.words = name, hash, engine, words
        self.context, self.dtype = engine.context, engine.dtype

    def answer(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer | TooLong]]]:
        """See harness.Model."""
        kinds = {kind: [i for i, r in enumerate(requests) if isinstance(r, kind)] for kind in (Choose, Read, Write)}
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
            long.append((i, TooLong(unit.longest, self.context))) if unit.longest > self.context else fitting.append((i, unit))
        if long:
            yield long
        for batch in self._score([unit for _, unit in fitting]):
            yield [(fitting[i][0], scored) for i, scored in batch]

    def units(self, requests: Sequence[Choose]) -> list[Unit]:
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
            if not isinstance(context, str) or not all(isinstance(option, str) for option in options):
                first, *rest = self.ids([context, *options])
                units.append(Unit(tuple(first), tuple(map(tuple, rest))))
                continue
            head, whole = next(alone), [next(together) for _ in options]
            if context.rstrip():
                units.append(Unit(tuple(head), tuple(tuple(ids[len(head) :]) for ids in whole)))
            else:  # lm-eval encodes these without special tokens
                bare_ids = self.words.encode([context + str(option) for option in options], special=False)
                begun = [ids[1:] if ids[:1] == [self.words.begin] else ids for ids in bare_ids]
                units.append(Unit((self.words.begin,), tuple(map(tuple, begun))))
        for request, unit in zip(requests, units, strict=True):
            if not unit.context or not all(unit.options):
                raise ValueError(
                    f"the tokenizer leaves nothing of an option of {str(request.options)[:80]} to score; mend the item"
                )
        return units

    def _read(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        units, owners, readings = [], [], []
        for i, (request, ids) in enumerate(zip(requests, self.ids([r.text for r in requests]), strict=True)):
            tokens = ids if isinstance(request.text, str) else ids[1:]
            windows = rolling(tokens, self.words.begin if isinstance(request.text, str) else ids[0], self.context, request.stride)
            units += windows
            owners += [i] * len(windows)
            size = len(request.text.encode()) if isinstance(request.text, str) else self.words.bytes_of(tokens)
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

    def _score(self, units: Sequence[Unit]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for batch in self.engine.score(units):
            if not all(math.isfinite(scored.logprob) for _, options in batch for scored in options):
                raise ValueError(
                    f"{self.name} gives logits that are not finite in {self.dtype}; check the folder with "
                    "scripts.verify_checkpoint, or give --dtype float32"
                )
            yield batch

    def _write(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        fitting, long = [], []
        for i, (request, ids) in enumerate(zip(requests, self.ids([r.prompt for r in requests]), strict=True)):
            needed = len(ids or [self.words.begin]) + request.max_tokens
            long.append((i, TooLong(needed, self.context))) if needed > self.context else fitting.append((i, ids))
        if long:
            yield long
        places = [i for i, _ in fitting]
        prompts = [ids or [self.words.begin] for _, ids in fitting]
        for batch in self.engine.write(prompts, [requests[i] for i in places], self.words):
            yield [(places[i], written) for i, written in batch]


def rolling(tokens: Sequence[int], begin: int, context: int, stride: int | None = None) -> list[Unit]:
    """Windows that score each token once: the first begins after `begin`, later ones end `stride` tokens (default: a whole
    context) further and see as much before them as the context holds. As lm-evaluation-harness with context_len =
    context - stride + 1."""
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise ValueError(f"a window cannot move by {step} tokens in a context of {context}; give a stride from 1 to {context}")
    windows = [Unit((begin,), (tuple(tokens[:context]),))] if tokens else []
    for first in range(context, len(tokens), step):
        end = min(first + step, len(tokens))
        windows.append(Unit(tuple(tokens[end - context - 1 : first]), (tuple(tokens[first:end]),)))
    return windows


class NanoLlamaEngine:
    """Scores and writes with our own model. Options share the row of their context, rows share their common beginning."""

    def __init__(self, model: NanoLlama, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.context = model.config.max_position_embeddings
        self.device = model.embed_tokens.weight.device
        self.dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score(self, units: Sequence[Unit]) -> Iterator[list[tuple[int, list[Scored]]]]:
        order = sorted(range(len(units)), key=lambda i: -sum(map(len, units[i].options)) - len(units[i].context))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            yield list(zip(places, self._batch([units[i] for i in places]), strict=True))

    def _batch(self, units: Sequence[Unit]) -> list[list[Scored]]:
        """One row a unit: its context, then its options side by side, which see the context and themselves only."""
        rows = [_row(unit) for unit in units]
        length = max(len(row.tokens) for row in rows)
        shape = (len(rows), length)
        tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        owner = torch.full(shape, -1)
        for i, row in enumerate(rows):
            size = len(row.tokens)
            tokens[i, :size], positions[i, :size], owner[i, :size] = map(torch.tensor, (row.tokens, row.positions, row.owner))
        tokens, positions, owner = (part.to(self.device) for part in (tokens, positions, owner))
        mask = None
        if any(len(row.tokens) > len(unit.context) and len(unit.options) > 1 for row, unit in zip(rows, units, strict=True)):
            causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            mask = (causal & ((owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])))[:, None]
        hidden = self._trunk(tokens, positions, mask)
        return self._figures(hidden, rows, units)

    def _trunk(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        model = self.model
        cos, sin = model.rotary.cos[positions][:, None], model.rotary.sin[positions][:, None]  # [B, 1, T, head_dim]
        x = model.embed_tokens(tokens)
        for layer in model.layers:
            x = layer(x, cos, sin, mask)
        return model.norm(x)  # [B, T, D]

    def _figures(self, hidden: Tensor, rows: Sequence["Row"], units: Sequence[Unit]) -> list[list[Scored]]:
        """Log-probabilities of the options, from logits of only those places that predict one of their tokens."""
        spots: dict[tuple[int, int], int] = {}  # (row, column) -> its number
        at: list[int] = []
        targets: list[int] = []
        for i, (row, unit) in enumerate(zip(rows, units, strict=True)):
            for columns, option in zip(row.predicts, unit.options, strict=True):
                at += [spots.setdefault((i, column), len(spots)) for column in columns]
                targets += option
        index = torch.tensor(list(spots), device=hidden.device)
        picked = hidden[index[:, 0], index[:, 1]]  # [spots, D]
        head = self.model.embed_tokens.weight if self.model.lm_head is None else self.model.lm_head.weight
        logprob, greedy = gather_logprobs(picked, head, torch.tensor(at), torch.tensor(targets))
        values, hits = iter(logprob), iter(greedy)
        return [
            [
                Scored(math.fsum(next(values) for _ in option), len(option), all([next(hits) for _ in option]))
                for option in unit.options
            ]
            for unit in units
        ]

    def write(self, prompts: Sequence[list[int]], requests: Sequence[Write], words: Words) -> Iterator[list[tuple[int, Written]]]:
        raise NotImplementedError


class Row(NamedTuple):
    """A unit as one row of tokens."""

    tokens: list[int]
    positions: list[int]
    owner: list[int]  # 0: the context; k: option k
    predicts: list[list[int]]  # of each option: the columns whose logits are about its tokens


def _row(unit: Unit) -> Row:
    n = len(unit.context)
    tokens, positions, owner, predicts = list(unit.context), list(range(n)), [0] * n, []
    for k, option in enumerate(unit.options, 1):
        fed = len(option) - 1
        predicts.append([n - 1, *range(len(tokens), len(tokens) + fed)])
        tokens += option[:-1]
        positions += range(n, n + fed)
        owner += [k] * fed
    return Row(tokens, positions, owner, predicts)


def gather_logprobs(hidden: Tensor, head: Tensor, at: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probability of targets[i] after hidden[at[i]], in fp32, and whether it is the most likely token.

    hidden [N, D], head [V, D], at and targets [M] on the CPU. Logits of one chunk of rows exist at a time.
    """
    chunk = HEAD_CHUNK.get(hidden.device.type, 4096)
    logprob, greedy = torch.empty(len(at)), torch.empty(len(at), dtype=torch.bool)
    for start in range(0, len(hidden), chunk):
        logits = F.linear(hidden[start : start + chunk], head).float()
        mine = ((at >= start) & (at < start + chunk)).nonzero()[:, 0]
        rows, wanted = (at[mine] - start).to(logits.device), targets[mine].to(logits.device)
        found = logits[rows, wanted]
        logprob[mine] = (found - logits.logsumexp(-1)[rows]).cpu()
        greedy[mine] = (logits.argmax(-1)[rows] == wanted).cpu()
    return logprob.tolist(), greedy.tolist()


class TransformersEngine:
    """Any causal model that transformers loads; one row an option."""

    def __init__(self, folder: Path, device: str, dtype: str | None, batch_size: int):
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder} cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
        self.model = model.to(device).eval()
        self.context = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048))
        self.batch_size, self.device, self.dtype = batch_size, device, str(self.model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score(self, units: Sequence[Unit]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for start in range(0, len(units), self.batch_size):
            batch = units[start : start + self.batch_size]
            rows = [(unit.context, option) for unit in batch for option in unit.options]
            length = max(len(context) + len(option) - 1 for context, option in rows)
            tokens = torch.zeros(len(rows), length, dtype=torch.long)  # padded on the right, where causal models do not look
            for i, (context, option) in enumerate(rows):
                ids = [*context, *option[:-1]]
                tokens[i, : len(ids)] = torch.tensor(ids)
            logits = self.model(tokens.to(self.device), use_cache=False).logits
            scored = []
            for i, (context, option) in enumerate(rows):
                log_probs = logits[i, len(context) - 1 : len(context) - 1 + len(option)].float().log_softmax(-1).cpu()
                wanted = torch.tensor(option)
                total = log_probs.gather(1, wanted[:, None]).double().sum().item()
                scored.append(Scored(total, len(option), bool((log_probs.argmax(-1) == wanted).all())))
            options = iter(scored)
            yield [(start + i, [next(options) for _ in unit.options]) for i, unit in enumerate(batch)]

    def write(self, prompts: Sequence[list[int]], requests: Sequence[Write], words: Words) -> Iterator[list[tuple[int, Written]]]:
        raise NotImplementedError
