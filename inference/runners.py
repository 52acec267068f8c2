"""One sequence of tokens and what a model says next, alike for a checkpoint (torch) and a GGUF file (llama.cpp).

A speaker keeps its key-value cache: of a prompt that continues the last one, only what is new is computed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from inference.generation import Cache, stream
from inference.llamacpp import LlamaCpp
from inference.packed_weights import head
from inference.sampling import Sampling, choose, uniforms
from models.hf import load_hf


class Runner(Protocol):
    context: int  # tokens that fit, prompt and reply together

    def speak(
        self, prompt: Sequence[int], new: int, sampling: Sampling, seed: int, stop: Sequence[int]
    ) -> Iterator[int]:
        """At most `new` tokens after a prompt, one by one; a token of `stop` is the last. ValueError where they do not fit."""
        ...


class TorchRunner:
    """A Hugging Face folder that NanoLlama reads."""

    def __init__(self, folder: Path, device: str = "cpu", context: int | None = None):
        self.model = load_hf(
            folder, dtype=torch.float32 if device == "cpu" else None, device=device
        )
        trained = self.model.config.max_position_embeddings
        self.context = min(context or trained, trained)
        weight = head(self.model)
        self.cache = Cache(self.model.config, 1, self.context, weight.device, weight.dtype)
        self.held: list[int] = []  # what the cache holds

    def speak(
        self, prompt: Sequence[int], new: int, sampling: Sampling, seed: int, stop: Sequence[int]
    ) -> Iterator[int]:
        _check(prompt, new, self.context)
        shared = common(self.held, prompt)
        self.held = [*prompt[:shared]]
        self.cache.lengths = [shared]
        if (
            sampling.repetition_penalty != 1 and shared
        ):  # it counts all tokens of the prompt that `stream` is given
            shared, self.held, self.cache.lengths = 0, [], [0]
        said: list[int] = []
        try:
            for event in stream(
                self.model, [prompt[shared:]], new, sampling, seed, stop, cache=self.cache
            ):
                said.append(event.token)
                yield event.token
        finally:
            self.held = [*prompt, *said][: self.cache.lengths[0]]


class GgufRunner:
    """A GGUF file, run by llama.cpp; tokens are drawn from its logits as everywhere here."""

    def __init__(self, path: Path, context: int | None = None, threads: int = 0):
        self.runtime = LlamaCpp(path, context, threads)
        self.context = self.runtime.context

    def speak(
        self, prompt: Sequence[int], new: int, sampling: Sampling, seed: int, stop: Sequence[int]
    ) -> Iterator[int]:
        _check(prompt, new, self.context)
        shared = common(self.runtime.held, prompt)
        self.runtime.keep(shared)
        luck = uniforms([seed], new)[0]
        seen = torch.zeros(1, self.runtime.size, dtype=torch.bool)
        seen[0, list(prompt)] = True
        ids = [*prompt[shared:]]
        for i in range(new):
            token = int(
                choose(torch.from_numpy(self.runtime.feed(ids)), sampling, seen, luck[i : i + 1])[0]
            )
            yield token
            if token in stop:
                return
            seen[0, token] = True
            ids = [token]


def common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of a prompt need not be computed again; its last always is, for what comes after it."""
    count = 0
    while count < min(len(held), len(prompt) - 1) and held[count] == prompt[count]:
        count += 1
    return count


def _check(prompt: Sequence[int], new: int, context: int) -> None:
    if not prompt or new < 1:
        raise ValueError("a prompt and a reply need at least one token each")
    if len(prompt) + new > context:
        raise ValueError(
            f"{len(prompt)} tokens and {new} new ones exceed the model's context of {context}; begin anew or ask for less"
        )
