"""Text generation: continue a batch of prompts token by token over a key-value cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inference.kv_cache import Cache, decode_compiled, forward
from inference.packed_weights import LinearOps, linear_ops
from inference.sampling import Sampling, next_token, uniforms
from machine import exact_device
from models.nanollama import NanoLlama

GREEDY = Sampling()
MIN_TOKENS_TO_PACK = 8  # from this many new tokens on, packing the weights pays off


class GeneratedToken(NamedTuple):
    """One new token of a row."""

    row: int
    token: int
    logprob: float | None  # under the model, before temperature, penalties and constraints
    finish: str | None  # on a row's last token: "stop" (token or criterion) or "length"


class Constraint(Protocol):
    """Restricts one row's next tokens; inference/grammar.py implements it for JSON."""

    def mask(self, scores: Tensor) -> None:
        """Set the scores [V] of forbidden tokens to -inf, in place."""

    def accept(self, token: int) -> None:
        """Advance by the generated token."""


def stream(
    model: NanoLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    stopping_criterion: Callable[[int, list[int]], bool] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    logprobs: bool = False,
    cache: Cache | None = None,
    compile: bool = False,
) -> Iterator[GeneratedToken]:
    """Continue each prompt (token ids, at least one); yield each step's tokens, in row order.

    seed: one per row, or a number: row i uses seed + i. A row's tokens do not depend on the other
    rows. stopping_criterion(row, new tokens): called after each token; True ends the row.
    constraints: one per row, None for an unconstrained row.
    cache: continue its rows, one prompt each. Afterwards, a cache of one row holds all tokens but
    the last and can be continued again. A larger cache cannot, because finished rows are dropped.
    compile: run each decoding step as a compiled graph over the full cache length, on a GPU as a
    CUDA graph. Compilation takes tens of seconds for each cache shape.

    ValueError if a prompt is empty, a token is not in the vocabulary, or the prompt and the new
    tokens exceed the context.
    """
    lengths = [len(prompt) for prompt in prompts]
    _check(model, prompts, max_new_tokens, cache)
    weight = model.head_weight
    device = weight.device
    if cache is None:
        room = max(lengths) + max_new_tokens - 1
        cache = Cache(model.config, len(prompts), room, device, weight.dtype)
    random = None
    if sampling.temperature > 0:
        seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
        random = uniforms(seeds, max_new_tokens).to(exact_device(device))
    rows = list(range(len(prompts)))  # prompt number of each row of the cache
    new_tokens: list[list[int]] = [[] for _ in prompts]
    active = set(rows)
    padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
    seen = None
    if sampling.repetition_penalty != 1:
        shape = len(prompts), model.config.vocab_size
        seen = torch.zeros(shape, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt)] = True
    pack = max_new_tokens >= MIN_TOKENS_TO_PACK and not compile
    ops = linear_ops(model, len(prompts) if pack else None)
    hidden = forward(model, torch.tensor(padded, device=device), cache, lengths, ops)
    with torch.no_grad():
        scores = ops.head(hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1])
    for step in range(max_new_tokens):
        with torch.no_grad():
            scores = scores.float()
            allowed = _constrain(scores, constraints, rows, active)
            step_random = None if random is None else random[rows, step]
            chosen = next_token(allowed, sampling, seen, step_random)
            token_logprobs: list[Any] = [None] * len(rows)
            if logprobs:
                token_logprobs = scores.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
        ids = chosen.tolist()
        for index, row in enumerate(rows):
            if row not in active:
                continue
            token = ids[index]
            new_tokens[row].append(token)
            if constraints is not None and (constraint := constraints[row]) is not None:
                constraint.accept(token)
            stop = stopping_criterion is not None and stopping_criterion(row, new_tokens[row])
            stop = stop or token in stop_tokens
            finish = "stop" if stop else "length" if step + 1 == max_new_tokens else None
            if finish:
                active.remove(row)
            yield GeneratedToken(row, token, token_logprobs[index], finish)
        if not active:
            return
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        if 2 * len(active) <= len(rows) and not compile:  # drop the finished rows
            indices = [index for index, row in enumerate(rows) if row in active]
            rows = [rows[index] for index in indices]
            cache, chosen = cache.select(indices), chosen[indices]
            seen = seen[indices] if seen is not None else None
        if compile:
            scores = decode_compiled(model, chosen, cache)
        else:
            scores = _decode_step(model, ops, chosen, cache)


@torch.inference_mode()  # a tenth faster than no_grad on a CPU
def _decode_step(model: NanoLlama, ops: LinearOps, tokens: Tensor, cache: Cache) -> Tensor:
    """Append one token [B] to each row; return logits [B, V]."""
    return ops.head(forward(model, tokens[:, None], cache, ops=ops)[:, 0])


def _check(
    model: NanoLlama, prompts: Sequence[Sequence[int]], max_new_tokens: int, cache: Cache | None
) -> None:
    """Raise the ValueErrors of `stream`."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts or not all(prompts):
        raise ValueError("each prompt needs at least one token; begin an empty prompt with bos")
    size = model.config.vocab_size
    unknown = [token for prompt in prompts for token in prompt if not 0 <= token < size]
    if unknown:
        raise ValueError(
            f"token {unknown[0]} is not in the model's vocabulary of {size}; "
            "use the model's own tokenizer"
        )
    if cache is not None:
        if len(cache.lengths) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts do not fit a cache of {len(cache.lengths)} rows"
            )
        need = max(cache.lengths) + max(len(prompt) for prompt in prompts) + max_new_tokens - 1
        if need > cache.length:
            raise ValueError(
                f"the cache has room for {cache.length} tokens, not for {need}; raise its length"
            )


def _constrain(
    scores: Tensor,
    constraints: Sequence[Constraint | None] | None,
    rows: list[int],
    active: set[int],
) -> Tensor:
    """Apply the constraints to a copy of scores [B, V]; without any, return the scores."""
    if constraints is None:
        return scores
    scores = scores.clone()
    for index, row in enumerate(rows):
        if row in active and (constraint := constraints[row]) is not None:
            constraint.mask(scores[index])
    return scores


@dataclass
class Row:
    """The result of `generate` for one prompt."""

    tokens: list[int] = field(default_factory=list)  # new tokens, with the final stop token
    logprobs: list[float] = field(default_factory=list)  # empty unless requested
    finish: str = "length"  # or "stop"


def generate(
    model: NanoLlama, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[Row]:
    """Run `stream` to the end, with the same arguments; return one Row per prompt."""
    rows = [Row() for _ in prompts]
    for event in stream(model, prompts, max_new_tokens, **options):
        rows[event.row].tokens.append(event.token)
        if event.logprob is not None:
            rows[event.row].logprobs.append(event.logprob)
        rows[event.row].finish = event.finish or rows[event.row].finish
    return rows
