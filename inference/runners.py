"""Runners: one interface to generate tokens with a checkpoint (torch) or a GGUF file (llama.cpp).

A runner keeps its key-value cache. When a prompt extends the last one, only the new tokens are
computed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from inference.generation import stream
from inference.kv_cache import Cache
from inference.llamacpp import LlamaCpp
from inference.sampling import Sampling, next_token, uniforms
from models.hf import load_hf


class Runner(Protocol):
    """Generates the continuation of one prompt at a time."""

    context: int  # maximum tokens of prompt and reply together

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_tokens: Sequence[int],
    ) -> Iterator[int]:
        """Yield new tokens, up to and including the first stop token.

        ValueError if prompt and new tokens exceed the context.
        """
        ...


class TorchRunner:
    """Runs a Hugging Face folder with torch."""

    def __init__(self, folder: Path, device: str = "cpu", context: int | None = None):
        self.model = load_hf(
            folder, dtype=torch.float32 if device == "cpu" else None, device=device
        )
        trained = self.model.config.max_position_embeddings
        self.context = min(context or trained, trained)
        weight = self.model.head_weight
        self.cache = Cache(self.model.config, 1, self.context, weight.device, weight.dtype)
        self.cached_tokens: list[int] = []

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_tokens: Sequence[int],
    ) -> Iterator[int]:
        _check_length(prompt, max_new_tokens, self.context)
        shared = shared_prefix(self.cached_tokens, prompt)
        if sampling.repetition_penalty != 1:  # `stream` penalises only the tokens passed to it
            shared = 0
        self.cached_tokens = [*prompt[:shared]]
        self.cache.lengths = [shared]
        reply: list[int] = []
        events = stream(
            self.model,
            [prompt[shared:]],
            max_new_tokens,
            sampling,
            seed,
            stop_tokens,
            cache=self.cache,
        )
        try:
            for event in events:
                reply.append(event.token)
                yield event.token
        finally:
            self.cached_tokens = [*prompt, *reply][: self.cache.lengths[0]]


class GgufRunner:
    """Runs a GGUF file with llama.cpp; inference/sampling.py samples from its logits."""

    def __init__(self, path: Path, context: int | None = None, threads: int = 0):
        self.runtime = LlamaCpp(path, context, threads)
        self.context = self.runtime.context

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_tokens: Sequence[int],
    ) -> Iterator[int]:
        _check_length(prompt, max_new_tokens, self.context)
        shared = shared_prefix(self.runtime.tokens, prompt)
        self.runtime.truncate(shared)
        random = uniforms([seed], max_new_tokens)[0]
        seen = torch.zeros(1, self.runtime.vocab_size, dtype=torch.bool)
        seen[0, list(prompt)] = True
        ids = [*prompt[shared:]]
        for step in range(max_new_tokens):
            scores = torch.from_numpy(self.runtime.feed(ids))
            token = int(next_token(scores, sampling, seen, random[step : step + 1])[0])
            yield token
            if token in stop_tokens:
                return
            seen[0, token] = True
            ids = [token]


def shared_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Count the prompt's leading tokens that are cached; its last token is always recomputed."""
    count = 0
    while count < min(len(cached), len(prompt) - 1) and cached[count] == prompt[count]:
        count += 1
    return count


def _check_length(prompt: Sequence[int], max_new_tokens: int, context: int) -> None:
    if not prompt or max_new_tokens < 1:
        raise ValueError("the prompt and the reply need at least one token each")
    if len(prompt) + max_new_tokens > context:
        raise ValueError(
            f"{len(prompt)} prompt and {max_new_tokens} new tokens exceed the model's context "
            f"of {context}; start a new conversation or ask for fewer tokens"
        )
