"""Models that answer the harness: a checkpoint folder (ours, any Llama or Qwen3 folder, else by transformers) or a GGUF file."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.chat.folder_templates import template_files
from data.manifest import file_hash
from evals.gguf_engine import GgufEngine
from evals.harness import Scored, Write, Written
from evals.language_model import (
    Engine,
    EvalTokenizer,
    LanguageModel,
    ScoreRequest,
    constraint_of,
    read_json,
)
from inference.generation import Cache, forward, generate, head
from inference.grammar import JsonConstraint
from inference.sampling import Sampling
from models.hf import load_hf
from models.nanollama import NanoLlama

HEAD_CHUNK = {"cpu": 256}  # rows of logits at a time; 4,096 elsewhere
MIN_SHARED, MIN_SAVED = (
    32,
    1024,
)  # tokens that contexts must have in common, and save together, to be computed once
STEP = 32  # tokens of a prompt that cost what a step of writing does; a group of its own has all steps once more
BRANCH = {"cpu": 24}  # options at a time, the longest first; all of a batch elsewhere
HASHED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
NANOLLAMA = ("llama", "qwen3")  # model types that models/hf.py reads


def check_there(checkpoint: Path) -> None:
    """Raise ValueError if the checkpoint does not exist."""
    if not checkpoint.exists():
        raise ValueError(f"there is no checkpoint at {checkpoint}")


def load_model(
    checkpoint: Path, device: str = "cpu", dtype: str | None = None, batch_size: int = 16
) -> LanguageModel:
    """The model of a folder, or of a GGUF file; ValueError where it cannot answer."""
    check_there(checkpoint)
    check_device(device)
    words = EvalTokenizer(checkpoint)
    engine: Engine
    if checkpoint.suffix == ".gguf":
        if dtype:
            raise ValueError(
                f"the weights of {checkpoint} are of the types that the file has; leave --dtype out"
            )
        engine = GgufEngine(checkpoint, torch.get_num_threads())
        return LanguageModel(str(checkpoint), file_hash(checkpoint), engine, words)
    kind = read_json(checkpoint / "config.json").get("model_type")
    if kind in NANOLLAMA or not (checkpoint / "config.json").is_file():
        model = load_hf(checkpoint, getattr(torch, dtype) if dtype else None, device)
        engine = NanoLlamaEngine(model.eval(), batch_size)
    else:
        engine = TransformersEngine(checkpoint, device, dtype, batch_size)
    return LanguageModel(str(checkpoint), folder_hash(checkpoint), engine, words)


def check_device(device: str) -> None:
    """ValueError where torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"there is no device {device!r} here ({str(error).splitlines()[0]}); give --device cpu"
        ) from error


def folder_hash(folder: Path) -> str:
    """sha256 of weights, configs (they name bos and the ends), tokenizer and chat template: what an answer depends on."""
    names = {
        path.name
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name in HASHED
    }
    names |= {str(path.relative_to(folder)) for path in template_files(folder)}
    return hashlib.sha256(
        "".join(f"{name} {file_hash(folder / name)}\n" for name in sorted(names)).encode()
    ).hexdigest()


class NanoLlamaEngine:
    """Scores and writes with our own model. What contexts have in common, and each context itself, is computed once."""

    def __init__(self, model: NanoLlama, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.context = model.config.max_position_embeddings
        self.device = model.embed_tokens.weight.device
        self.dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score(self, units: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for shared, members in share(units):
            start = self._begun(units[members[0]].context[:shared])
            members.sort(
                key=lambda i: (
                    -len(units[i].context) - (len(units[i].options) == 1) * len(units[i].options[0])
                )
            )
            for first in range(0, len(members), self.batch_size):
                places = members[first : first + self.batch_size]
                yield list(
                    zip(places, self._batch([units[i] for i in places], shared, start), strict=True)
                )

    def _cache(self, rows: int, length: int) -> Cache:
        return Cache(
            self.model.config, rows, length, self.device, self.model.embed_tokens.weight.dtype
        )

    def _begun(self, shared: Sequence[int]) -> Cache | None:
        """A cache of one row that holds what contexts share; None where they share nothing."""
        if not shared:
            return None
        cache = self._cache(1, len(shared))
        forward(self.model, torch.tensor([shared], device=self.device), cache)
        return cache

    def _batch(
        self, units: Sequence[ScoreRequest], shared: int, start: Cache | None
    ) -> list[list[Scored]]:
        """Contexts (without the tokens that `start` holds) as rows, then options as rows that continue them; a unit's only
        option follows in the row of its context. Logits are made of those places only that predict an option's token."""
        lone = [len(unit.options) == 1 for unit in units]
        rows = [
            [*unit.context[shared:], *(unit.options[0][:-1] if one else ())]
            for unit, one in zip(units, lone, strict=True)
        ]
        more = [
            (i, k)
            for i, unit in enumerate(units)
            if not lone[i]
            for k, ids in enumerate(unit.options)
            if len(ids) > 1
        ]
        fed = max((len(units[i].options[k]) - 1 for i, k in more), default=0)
        length = shared + max(map(len, rows))
        if length + fed > self.context:  # a long context beside long options: they fit apart
            return [scored for unit in units for scored in self._batch([unit], shared, start)]
        cache = self._cache(len(rows), length) if start is None else start.expand(len(rows), length)
        tokens, lengths = pad(rows, self.device)
        hidden = forward(self.model, tokens, cache, lengths)
        cells: list[tuple[int, int]] = []
        places: list[list[list[int]]] = []
        for i, unit in enumerate(units):
            end, first = len(unit.context) - shared - 1, len(cells)
            cells += [(i, end + k) for k in range(len(unit.options[0]) if lone[i] else 1)]
            places.append([list(range(first, len(cells))) for _ in unit.options])
        picked = [hidden[_columns(cells, self.device)]]
        total = len(cells)
        more.sort(key=lambda place: -len(units[place[0]].options[place[1]]))
        several = BRANCH.get(self.device.type, len(more) or 1)
        for begin in range(0, len(more), several):  # attention is computed of padding too
            branch = more[begin : begin + several]
            tokens, lengths = pad([units[i].options[k][:-1] for i, k in branch], self.device)
            hidden = forward(
                self.model, tokens, cache.select([i for i, _ in branch], length + fed), lengths
            )
            for (i, k), count in zip(branch, lengths, strict=True):
                places[i][k] += range(total, total + count)
                total += count
            inside = [(row, column) for row, count in enumerate(lengths) for column in range(count)]
            picked.append(hidden[_columns(inside, self.device)])
        at = [place for of_unit in places for of_option in of_unit for place in of_option]
        targets = [token for unit in units for option in unit.options for token in option]
        figures = gather_logprobs(
            torch.cat(picked), head(self.model), torch.tensor(at), torch.tensor(targets)
        )
        each = iter(zip(*figures, strict=True))
        return [[_sum([next(each) for _ in option]) for option in unit.options] for unit in units]

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], words: EvalTokenizer
    ) -> Iterator[list[tuple[int, Written]]]:
        units = [ScoreRequest(tuple(prompt), ((),)) for prompt in prompts]
        steps = max((request.max_tokens for request in requests), default=0)
        for shared, members in share(units, STEP * steps):
            start = self._begun(units[members[0]].context[:shared])
            kinds: dict[tuple[float, float], list[int]] = {}
            for i in members:
                kinds.setdefault((requests[i].temperature, requests[i].top_p), []).append(i)
            for (temperature, top_p), places in kinds.items():
                how = Sampling(temperature=temperature, top_p=top_p)
                places.sort(key=lambda i: (requests[i].max_tokens, len(prompts[i])))
                for first in range(0, len(places), self.batch_size):
                    yield self._written(
                        places[first : first + self.batch_size],
                        shared,
                        start,
                        how,
                        prompts,
                        requests,
                        words,
                    )

    def _written(
        self,
        places: Sequence[int],
        shared: int,
        start: Cache | None,
        how: Sampling,
        prompts: Sequence[list[int]],
        requests: Sequence[Write],
        words: EvalTokenizer,
    ) -> list[tuple[int, Written]]:
        """One batch; rows that need fewer tokens than the longest end when they have them."""
        most = max(requests[i].max_tokens for i in places)
        length = max(len(prompts[i]) for i in places) + most
        if (
            length > self.context and len(places) > 1
        ):  # a long prompt beside a long answer: they fit apart
            return [
                one
                for i in places
                for one in self._written([i], shared, start, how, prompts, requests, words)
            ]
        cache = (
            self._cache(len(places), length) if start is None else start.expand(len(places), length)
        )

        def ended(row: int, new: list[int]) -> bool:
            return len(new) >= requests[places[row]].max_tokens or words.ended(
                new, requests[places[row]]
            )

        rows = generate(
            self.model,
            [prompts[i][shared:] for i in places],
            most,
            sampling=how,
            seed=[requests[i].seed for i in places],
            stop_tokens=tuple(words.stops),
            ended=ended,
            constraints=self._constraints([requests[i] for i in places], words),
            cache=cache,
        )
        return [
            (i, words.written(row.tokens, requests[i])) for i, row in zip(places, rows, strict=True)
        ]

    def _constraints(
        self, requests: Sequence[Write], words: EvalTokenizer
    ) -> list[JsonConstraint | None] | None:
        """What holds each row to its schema; None where no row has one."""
        found = [
            constraint_of(request, words, self.model.config.vocab_size) for request in requests
        ]
        return found if any(found) else None


def _sum(figures: list[tuple[float, bool]]) -> Scored:
    return Scored(
        math.fsum(logprob for logprob, _ in figures),
        len(figures),
        all(greedy for _, greedy in figures),
    )


def _columns(cells: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tensor(cells, device=device).unbind(1)
    return rows, columns


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Rows of ids as one tensor [rows, longest], filled up with 0 on the right, and their lengths."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens.to(device), [len(row) for row in rows]


def share(units: Sequence[ScoreRequest], least: int = 0) -> list[tuple[int, list[int]]]:
    """Units whose contexts begin alike: how many tokens they share (never all of a context), and which they are.

    Where that saves too little, `least` or MIN_SAVED tokens, units are in one group that shares nothing. Contexts are compared
    in sorted order, so those that begin alike are neighbours.
    """
    least = max(least, MIN_SAVED)
    groups: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(units)), key=lambda i: units[i].context):
        context = units[i].context
        if groups:
            shared, members = groups[-1]
            common = min(shared, len(context) - 1, _common(units[members[0]].context, context))
            if common >= MIN_SHARED and (len(members) == 1 or common >= 0.9 * shared):
                members.append(i)
                groups[-1] = (common, members)
                continue
        groups.append((len(context) - 1, [i]))
    worth = [group for group in groups if group[0] * (len(group[1]) - 1) >= least]
    rest = [i for shared, members in groups if shared * (len(members) - 1) < least for i in members]
    return [*worth, (0, rest)] if rest else worth


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def gather_logprobs(
    hidden: Tensor, weight: Tensor, at: Tensor, targets: Tensor
) -> tuple[list[float], list[bool]]:
    """Log-probability of targets[i] after hidden[at[i]], in fp32, and whether it is the most likely token.

    hidden [N, D], weight [V, D], at and targets [M] on the CPU. Logits of one chunk of rows exist at a time.
    """
    chunk = HEAD_CHUNK.get(hidden.device.type, 4096)
    logprob, greedy = torch.empty(len(at)), torch.empty(len(at), dtype=torch.bool)
    for start in range(0, len(hidden), chunk):
        logits = F.linear(hidden[start : start + chunk], weight).float()
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
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True
            )
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{folder} cannot be loaded as a causal language model: {str(error).splitlines()[0]}"
            ) from error
        self.model = model.to(device).eval()
        self.context = int(
            getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048)
        )
        self.batch_size, self.device, self.dtype = (
            batch_size,
            device,
            str(self.model.dtype).removeprefix("torch."),
        )

    @torch.inference_mode()
    def score(self, units: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for start in range(0, len(units), self.batch_size):
            batch = units[start : start + self.batch_size]
            rows = [(unit.context, option) for unit in batch for option in unit.options]
            length = max(len(context) + len(option) - 1 for context, option in rows)
            tokens = torch.zeros(
                len(rows), length, dtype=torch.long
            )  # padded on the right, where causal models do not look
            for i, (context, option) in enumerate(rows):
                ids = [*context, *option[:-1]]
                tokens[i, : len(ids)] = torch.tensor(ids)
            logits = self.model(tokens.to(self.device), use_cache=False).logits
            scored = []
            for i, (context, option) in enumerate(rows):
                log_probs = (
                    logits[i, len(context) - 1 : len(context) - 1 + len(option)]
                    .float()
                    .log_softmax(-1)
                    .cpu()
                )
                wanted = torch.tensor(option)
                total = log_probs.gather(1, wanted[:, None]).double().sum().item()
                scored.append(
                    Scored(total, len(option), bool((log_probs.argmax(-1) == wanted).all()))
                )
            options = iter(scored)
            yield [
                (start + i, [next(options) for _ in unit.options]) for i, unit in enumerate(batch)
            ]

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], words: EvalTokenizer
    ) -> Iterator[list[tuple[int, Written]]]:
        """One prompt at a time."""
        if any(request.schema for request in requests):
            raise ValueError(
                "JSON by a grammar is written by Llama and Qwen3 folders only; leave the constrained part out"
            )
        for i, (ids, request) in enumerate(zip(prompts, requests, strict=True)):
            torch.manual_seed(request.seed)
            how = (
                {"temperature": request.temperature, "top_p": request.top_p}
                if request.temperature
                else {}
            )
            tokens = self.model.generate(
                torch.tensor([ids], device=self.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.device),
                max_new_tokens=request.max_tokens,
                do_sample=bool(request.temperature),
                eos_token_id=sorted(words.stops),
                pad_token_id=min(words.stops),
                **how,
            )
            yield [(i, words.written(tokens[0, len(ids) :].tolist(), request))]
