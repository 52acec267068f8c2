"""From logits to a token: the transforms of transformers' logits processors, in its order, and a draw by given chance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-6  # scores divided by less may leave fp32's range; 0 is the limit


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults take the likeliest. In this order, as in transformers' `generate`."""

    repetition_penalty: float = (
        1.0  # divides positive scores of tokens that came before, multiplies negative ones
    )
    temperature: float = (
        0.0  # divides the scores; 0 takes the likeliest token, and what follows has no part
    )
    top_k: int = 0  # keep the k likeliest tokens, 0 all
    top_p: float = 1.0  # keep the likeliest tokens whose probabilities first reach p together
    min_p: float = (
        0.0  # keep tokens that have at least this share of the likeliest one's probability
    )

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            "temperature": (
                self.temperature == 0 or COLDEST <= self.temperature < math.inf,
                f"0, or finite and at least {COLDEST:g}",
            ),
            "top_k": (self.top_k >= 0, "0 or above"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (fits, words) in ranges.items():
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must be {words}")


def adjust(scores: Tensor, how: Sampling, seen: Tensor | None = None) -> Tensor:
    """Scores [B, V], fp32, whose softmax is the distribution to draw from. seen [B, V] marks tokens that came before."""
    if seen is not None and how.repetition_penalty != 1:
        penalised = torch.where(
            scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty
        )
        scores = torch.where(seen, penalised, scores)
    if how.temperature == 0:
        return scores
    scores = scores / how.temperature
    if 0 < how.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(how.top_k).values[:, -1:], -math.inf)
    if how.top_p < 1:
        ascending, order = scores.sort()
        rare = ascending.softmax(-1).cumsum(-1) <= 1 - how.top_p
        rare[:, -1] = False
        scores = scores.masked_fill(rare.scatter(-1, order, rare), -math.inf)
    if how.min_p > 0:
        shares = scores.softmax(-1)
        rare = shares < how.min_p * shares.amax(-1, keepdim=True)
        scores = scores.masked_fill(rare, -math.inf)
    return scores


def draw(scores: Tensor, chance: Tensor) -> Tensor:
    """A token [B] of each row's softmax: the one in whose part of [0, 1), laid out by token id, its chance [B] (fp64) falls."""
    sums = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, (chance * sums[:, -1])[:, None], right=True)[:, 0].clamp(
        max=scores.shape[-1] - 1
    )


def choose(scores: Tensor, how: Sampling, seen: Tensor | None, chance: Tensor | None) -> Tensor:
    """The next token [B] of scores [B, V], fp32; chance [B] may be None where temperature is 0, which takes the likeliest."""
    scores = adjust(scores, how, seen)
    if how.temperature == 0:
        return scores.argmax(-1)
    assert chance is not None
    return draw(scores, chance)


def uniforms(seeds: list[int], count: int) -> Tensor:
    """Numbers [B, count] in [0, 1), fp64, a row of them for each seed: a row's draws do not depend on its neighbours."""
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed} must be at least -2**63 and below 2**64")
    rows = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)
