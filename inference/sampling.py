"""Sample a token from logits, with the logits processors of transformers in the same order."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from machine import exact

MIN_TEMPERATURE = 1e-6  # dividing by less may overflow fp32; 0 means greedy decoding


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, applied in this order, as transformers does. Default: greedy."""

    repetition_penalty: float = 1.0  # for seen tokens: divides positive scores, multiplies negative
    temperature: float = 0.0  # divides the scores; 0: greedy, the settings below have no effect
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens whose total probability first reaches p
    min_p: float = 0.0  # keep tokens with at least this fraction of the top probability

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            "temperature": (
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
                f"0, or finite and at least {MIN_TEMPERATURE:g}",
            ),
            "top_k": (self.top_k >= 0, "0 or above"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (valid, bounds) in ranges.items():
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} must be {bounds}")


def process_logits(scores: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Transform fp32 scores [B, V]; their softmax is the distribution to sample from.

    seen [B, V] marks the earlier tokens of each row.
    """
    penalty = sampling.repetition_penalty
    if seen is not None and penalty != 1:
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, penalised, scores)
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        threshold = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    if sampling.min_p > 0:
        probs = scores.softmax(-1)
        dropped = probs < sampling.min_p * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(dropped, -math.inf)
    return scores


def sample(scores: Tensor, random: Tensor) -> Tensor:
    """Sample a token [B] from each row's softmax by inverse transform.

    random [B], fp64 in [0, 1) on scores' exact_device, selects the token by cumulative probability
    in token-id order.
    """
    sums = exact(scores).double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(sums, (random * sums[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=scores.shape[-1] - 1).to(scores.device)


def next_token(
    scores: Tensor, sampling: Sampling, seen: Tensor | None, random: Tensor | None
) -> Tensor:
    """Return the next token [B] of fp32 scores [B, V]. Greedy decoding needs no random numbers."""
    scores = process_logits(scores, sampling, seen)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    assert random is not None
    return sample(scores, random)


def uniforms(seeds: list[int], count: int) -> Tensor:
    """Return uniform fp64 numbers [B, count] in [0, 1); each row depends only on its seed."""
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed} must be at least -2**63 and below 2**64")
    rows = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)
