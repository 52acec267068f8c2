"""Loads models for evaluation: NanoLlama, Llama and Qwen3 folders, other causal LMs, GGUF files.

Folders of other architectures are loaded with Transformers.
"""

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
from evals.harness import Generation, Scored, Write
from evals.language_model import (
    Engine,
    EvalTokenizer,
    LanguageModel,
    ScoreRequest,
    build_constraint,
    read_json,
)
from inference.generation import generate
from inference.grammar import JsonConstraint
from inference.kv_cache import Cache, forward
from inference.sampling import Sampling
from machine import missing
from models.hf import TYPES, check_model_folder, load_hf, read_hf_config
from models.hf_experts import SHARED_TYPES
from models.hf_experts import TYPES as EXPERT_TYPES
from models.nanollama import NanoLlama
from models.speedrun_config import GPTConfig

HEAD_CHUNK = {"cpu": 256}  # rows of logits per chunk; 4,096 on other devices
MIN_SHARED = 32  # tokens of a shared prefix worth computing once
MIN_SAVED = 1024  # tokens that a group with a shared prefix must save in total
STEP = 32  # prefill tokens that cost as much as one decoding step
BRANCH = {"cpu": 24}  # continuations per forward pass; a whole batch on other devices
HASHED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Model types that models/hf.py reads, or, for the speedrun's, explains that it cannot be evaluated.
NANOLLAMA = (*TYPES, *EXPERT_TYPES, GPTConfig.model_type)


def check_checkpoint(checkpoint: Path) -> None:
    """ValueError unless the path is a model folder or a file with the suffix of GGUF files."""
    if checkpoint.suffix != ".gguf" or not checkpoint.exists():
        check_model_folder(checkpoint)


def load_model(
    checkpoint: Path, device: str = "cpu", dtype: str | None = None, batch_size: int = 16
) -> LanguageModel:
    """Load a model folder or GGUF file; ValueError if it cannot be evaluated."""
    check_checkpoint(checkpoint)
    check_device(device)
    tokenizer = EvalTokenizer(checkpoint)
    engine: Engine
    if checkpoint.suffix == ".gguf":
        if dtype:
            raise ValueError(
                f"--dtype {dtype} does not apply to {checkpoint}, whose weights keep the file's "
                "types; omit --dtype"
            )
        engine = GgufEngine(checkpoint, torch.get_num_threads())
        return LanguageModel(str(checkpoint), file_hash(checkpoint), engine, tokenizer)
    if _is_ours(checkpoint):
        model = load_hf(checkpoint, getattr(torch, dtype) if dtype else None, device)
        engine = NanoLlamaEngine(model.eval(), batch_size)
    else:
        engine = TransformersEngine(checkpoint, device, dtype, batch_size)
    return LanguageModel(str(checkpoint), folder_hash(checkpoint), engine, tokenizer)


def _is_ours(checkpoint: Path) -> bool:
    """Whether models/hf.py reads this folder, or explains why it cannot be evaluated."""
    model_type = read_json(checkpoint / "config.json").get("model_type")
    if model_type in SHARED_TYPES:  # transformers has more of their settings
        try:
            read_hf_config(checkpoint)
        except ValueError:
            return False
    return model_type in NANOLLAMA


def check_device(device: str) -> None:
    """ValueError if the device is not available."""
    if reason := missing(device):
        raise ValueError(f"device {device!r} is not available ({reason}); give --device cpu")


def folder_hash(folder: Path) -> str:
    """sha256 of all files that answers depend on: weights, configs, tokenizer, chat template."""
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
    """Scores and generates with NanoLlama; contexts and their shared prefixes are computed once."""

    def __init__(self, model: NanoLlama, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.context = model.config.max_position_embeddings
        self.device = model.embed_tokens.weight.device
        self.dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        def row_length(i: int) -> int:
            context, continuations = requests[i]
            return len(context) + (len(continuations) == 1) * len(continuations[0])

        for shared, members in group_by_prefix(requests):
            prefix = self._prefill(requests[members[0]].context[:shared])
            members.sort(key=row_length, reverse=True)
            for first in range(0, len(members), self.batch_size):
                indices = members[first : first + self.batch_size]
                scored = self._score_batch([requests[i] for i in indices], shared, prefix)
                yield list(zip(indices, scored, strict=True))

    def _cache(self, rows: int, length: int) -> Cache:
        return Cache(
            self.model.config, rows, length, self.device, self.model.embed_tokens.weight.dtype
        )

    def _prefill(self, prefix: Sequence[int]) -> Cache | None:
        """A one-row KV cache of a shared prefix; None for an empty prefix."""
        if not prefix:
            return None
        cache = self._cache(1, len(prefix))
        forward(self.model, torch.tensor([prefix], device=self.device), cache)
        return cache

    def _expand(self, prefix: Cache | None, rows: int, length: int) -> Cache:
        return self._cache(rows, length) if prefix is None else prefix.expand(rows, length)

    def _score_batch(
        self, requests: Sequence[ScoreRequest], shared: int, prefix: Cache | None
    ) -> list[list[Scored]]:
        """Score requests whose first `shared` context tokens are in the `prefix` cache.

        The first pass computes contexts; a request's only continuation is appended to its context's
        row. Further passes compute continuations as rows that branch from the contexts' cache.
        Logits are computed only at positions that predict a continuation token.
        """
        single = [len(request.continuations) == 1 for request in requests]
        rows = [
            [*context[shared:], *(continuations[0][:-1] if alone else ())]
            for (context, continuations), alone in zip(requests, single, strict=True)
        ]
        branches = [
            (i, k)
            for i, request in enumerate(requests)
            if not single[i]
            for k, ids in enumerate(request.continuations)
            if len(ids) > 1
        ]

        def branch_ids(branch: tuple[int, int]) -> tuple[int, ...]:
            return requests[branch[0]].continuations[branch[1]][:-1]

        longest = max((len(branch_ids(branch)) for branch in branches), default=0)
        length = shared + max(map(len, rows))
        if length + longest > self.context:  # each request fits on its own
            return [
                scored
                for request in requests
                for scored in self._score_batch([request], shared, prefix)
            ]
        cache = self._expand(prefix, len(rows), length)
        tokens, lengths = pad(rows, self.device)
        hidden = forward(self.model, tokens, cache, lengths)
        cells: list[tuple[int, int]] = []  # (row, column) of each hidden state to use
        positions: list[list[list[int]]] = []  # [request][continuation]: indices of states
        for i, (context, continuations) in enumerate(requests):
            end, first = len(context) - shared - 1, len(cells)
            cells += [(i, end + k) for k in range(len(continuations[0]) if single[i] else 1)]
            positions.append([list(range(first, len(cells))) for _ in continuations])
        states = [hidden[_columns(cells, self.device)]]
        total = len(cells)
        branches.sort(key=lambda branch: -len(branch_ids(branch)))  # attention also reads padding
        size = BRANCH.get(self.device.type, len(branches) or 1)
        for first in range(0, len(branches), size):
            group = branches[first : first + size]
            tokens, lengths = pad([branch_ids(branch) for branch in group], self.device)
            branch_cache = cache.select([i for i, _ in group], length + longest)
            hidden = forward(self.model, tokens, branch_cache, lengths)
            for (i, k), count in zip(group, lengths, strict=True):
                positions[i][k] += range(total, total + count)
                total += count
            cells = [(row, column) for row, count in enumerate(lengths) for column in range(count)]
            states.append(hidden[_columns(cells, self.device)])
        flat = [index for request in positions for indices in request for index in indices]
        targets = [t for request in requests for ids in request.continuations for t in ids]
        logprobs = gather_logprobs(
            torch.cat(states), self.model.head_weight, torch.tensor(flat), torch.tensor(targets)
        )
        tokens_scored = iter(zip(*logprobs, strict=True))
        return [
            [_sum([next(tokens_scored) for _ in ids]) for ids in request.continuations]
            for request in requests
        ]

    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], tokenizer: EvalTokenizer
    ) -> Iterator[list[tuple[int, Generation]]]:
        contexts = [ScoreRequest(tuple(prompt), ((),)) for prompt in prompts]
        steps = max((request.max_tokens for request in requests), default=0)
        for shared, members in group_by_prefix(contexts, STEP * steps):
            prefix = self._prefill(prompts[members[0]][:shared])
            groups: dict[tuple[float, float], list[int]] = {}
            for i in members:
                groups.setdefault((requests[i].temperature, requests[i].top_p), []).append(i)
            for (temperature, top_p), indices in groups.items():
                sampling = Sampling(temperature=temperature, top_p=top_p)
                indices.sort(key=lambda i: (requests[i].max_tokens, len(prompts[i])))
                for first in range(0, len(indices), self.batch_size):
                    batch = indices[first : first + self.batch_size]
                    written = self._generate(
                        [prompts[i] for i in batch],
                        [requests[i] for i in batch],
                        tokenizer,
                        sampling,
                        shared,
                        prefix,
                    )
                    yield list(zip(batch, written, strict=True))

    def _generate(
        self,
        prompts: Sequence[list[int]],
        requests: Sequence[Write],
        tokenizer: EvalTokenizer,
        sampling: Sampling,
        shared: int,
        prefix: Cache | None,
    ) -> list[Generation]:
        """Generate one batch; each row ends after its own max_tokens."""
        max_tokens = max(request.max_tokens for request in requests)
        length = max(map(len, prompts)) + max_tokens
        if length > self.context and len(prompts) > 1:  # each prompt fits on its own
            return [
                self._generate([prompt], [request], tokenizer, sampling, shared, prefix)[0]
                for prompt, request in zip(prompts, requests, strict=True)
            ]

        def ended(row: int, new: list[int]) -> bool:
            request = requests[row]
            return len(new) >= request.max_tokens or tokenizer.ended(new, request)

        rows = generate(
            self.model,
            [prompt[shared:] for prompt in prompts],
            max_tokens,
            sampling=sampling,
            seed=[request.seed for request in requests],
            stop_tokens=tuple(tokenizer.stops),
            stopping_criterion=ended,
            constraints=self._constraints(requests, tokenizer),
            cache=self._expand(prefix, len(prompts), length),
        )
        return [
            tokenizer.written(row.tokens, request)
            for row, request in zip(rows, requests, strict=True)
        ]

    def _constraints(
        self, requests: Sequence[Write], tokenizer: EvalTokenizer
    ) -> list[JsonConstraint | None] | None:
        """The grammar constraint of each row; None if no row has a schema."""
        size = self.model.config.vocab_size
        constraints = [build_constraint(request, tokenizer, size) for request in requests]
        return constraints if any(constraints) else None


def _sum(tokens: list[tuple[float, bool]]) -> Scored:
    """Combine the (logprob, greedy) pairs of a continuation's tokens."""
    logprobs, greedy = zip(*tokens, strict=True)
    return Scored(math.fsum(logprobs), len(tokens), all(greedy))


def _columns(cells: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Index tensors of (row, column) pairs."""
    rows, columns = torch.tensor(cells, device=device).unbind(1)
    return rows, columns


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Right-pad rows of ids with 0 to a tensor [rows, longest]; also return their lengths."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens.to(device), [len(row) for row in rows]


def group_by_prefix(
    requests: Sequence[ScoreRequest], min_saved: int = 0
) -> list[tuple[int, list[int]]]:
    """Group requests by shared context prefix: (tokens shared, request indices) per group.

    A prefix is always shorter than the context. Groups that save fewer than min_saved or MIN_SAVED
    tokens are merged into one group that shares nothing.
    """
    min_saved = max(min_saved, MIN_SAVED)
    groups: list[tuple[int, list[int]]] = []
    # Sorting makes contexts with a common prefix neighbours.
    for i in sorted(range(len(requests)), key=lambda i: requests[i].context):
        context = requests[i].context
        if groups:
            shared, members = groups[-1]
            overlap = _common_length(requests[members[0]].context, context)
            common = min(shared, len(context) - 1, overlap)
            if common >= MIN_SHARED and (len(members) == 1 or common >= 0.9 * shared):
                members.append(i)
                groups[-1] = (common, members)
                continue
        groups.append((len(context) - 1, [i]))
    sharing, rest = [], []
    for shared, members in groups:
        if shared * (len(members) - 1) >= min_saved:
            sharing.append((shared, members))
        else:
            rest += members
    return [*sharing, (0, rest)] if rest else sharing


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def gather_logprobs(
    hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor
) -> tuple[list[float], list[bool]]:
    """fp32 log-probability of targets[i] after hidden[positions[i]], and whether it is the argmax.

    hidden [N, D]; weight [V, D]; positions and targets [M] on the CPU. Logits are computed for one
    chunk of rows at a time.
    """
    chunk = HEAD_CHUNK.get(hidden.device.type, 4096)
    logprob, greedy = torch.empty(len(positions)), torch.empty(len(positions), dtype=torch.bool)
    for start in range(0, len(hidden), chunk):
        logits = F.linear(hidden[start : start + chunk], weight).float()
        inside = ((positions >= start) & (positions < start + chunk)).nonzero()[:, 0]
        rows = (positions[inside] - start).to(logits.device)
        chunk_targets = targets[inside].to(logits.device)
        target_logits = logits[rows, chunk_targets]
        logprob[inside] = (target_logits - logits.logsumexp(-1)[rows]).cpu()
        greedy[inside] = (logits.argmax(-1)[rows] == chunk_targets).cpu()
    return logprob.tolist(), greedy.tolist()


class TransformersEngine:
    """Scores and generates with any causal LM of Transformers; one row per continuation."""

    def __init__(self, folder: Path, device: str, dtype: str | None, batch_size: int):
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True
            )
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{folder} cannot be loaded as a causal LM: {str(error).splitlines()[0]}"
            ) from error
        self.model = model.to(device).eval()
        self.context = int(
            getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048)
        )
        self.batch_size, self.device = batch_size, device
        self.dtype = str(self.model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[list[tuple[int, list[Scored]]]]:
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            rows = [(context, ids) for context, continuations in batch for ids in continuations]
            # Right padding does not affect the tokens before it in a causal model.
            tokens, _ = pad([[*context, *ids[:-1]] for context, ids in rows], torch.device("cpu"))
            logits = self.model(tokens.to(self.device), use_cache=False).logits
            scored = []
            for i, (context, ids) in enumerate(rows):
                end = len(context) - 1
                logprobs = logits[i, end : end + len(ids)].float().log_softmax(-1).cpu()
                targets = torch.tensor(ids)
                total = logprobs.gather(1, targets[:, None]).double().sum().item()
                greedy = bool((logprobs.argmax(-1) == targets).all())
                scored.append(Scored(total, len(ids), greedy))
            remaining = iter(scored)
            yield [
                (start + i, [next(remaining) for _ in request.continuations])
                for i, request in enumerate(batch)
            ]

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[list[int]], requests: Sequence[Write], tokenizer: EvalTokenizer
    ) -> Iterator[list[tuple[int, Generation]]]:
        """Generate one prompt at a time."""
        if any(request.schema for request in requests):
            raise ValueError(
                "grammar-constrained generation needs a Llama or Qwen3 folder; give --free_only"
            )
        for i, (ids, request) in enumerate(zip(prompts, requests, strict=True)):
            torch.manual_seed(request.seed)
            sampling = (
                {"temperature": request.temperature, "top_p": request.top_p}
                if request.temperature
                else {}
            )
            tokens = self.model.generate(
                torch.tensor([ids], device=self.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.device),
                max_new_tokens=request.max_tokens,
                do_sample=bool(request.temperature),
                eos_token_id=sorted(tokenizer.stops),
                pad_token_id=min(tokenizer.stops),
                **sampling,
            )
            yield [(i, tokenizer.written(tokens[0, len(ids) :].tolist(), request))]
