"""Preference losses over pairs of answers: DPO and its variants. Metrics have TRL's names.

The log-probability of an answer is the negated sum of its tokens' losses from the model. All losses
are sums over pairs; the loop divides by the number of pairs in the whole step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from data.chat.replay import TextBatch
from machine import exact, exact_device
from ranges import AnyFloat, NonNegativeFloat, above, at_least, check_fields, one_of
from training.objectives import Objective

LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "simpo", "apo_zero")
REFERENCES = ("precomputed", "cpu", "none")


@dataclass(frozen=True)
class DPOConfig:
    """The preference loss and its reference model."""

    loss: Annotated[str, one_of(*LOSSES)] = "sigmoid"  # docs/dpo.md; sigmoid: DPO's loss
    # Strength of the KL penalty.
    beta: Annotated[float, above(0, hint="0.1 is usual, 5 for sigmoid_norm, 2 for simpo")] = 0.1
    # Assumed share of pairs with swapped labels: for sigmoid (cDPO), robust and simpo.
    label_smoothing: Annotated[float, at_least(0, below=0.5)] = 0.0
    margin: AnyFloat = 0.5  # simpo's gamma: target margin of beta times mean log-probabilities
    sft_weight: NonNegativeFloat = 0.0  # weight of the chosen answers' mean nll per token
    # The reference model's log-probabilities: precomputed (default: cached on disk), cpu (a frozen
    # model) or none (for simpo).
    reference: Annotated[str, one_of(*REFERENCES)] | None = None
    # File of precomputed log-probabilities; default: reference.safetensors in output_dir.
    reference_cache: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "dpo")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            raise ValueError(
                f"dpo.label_smoothing has no effect with dpo.loss={self.loss}; remove it"
            )
        if self.loss == "simpo" and self.reference not in (None, "none"):
            raise ValueError("dpo.loss=simpo has no reference; remove dpo.reference")
        if self.reference_cache and self.resolved_reference != "precomputed":
            raise ValueError(
                f"dpo.reference_cache has no effect with dpo.reference={self.resolved_reference}; "
                "remove it"
            )
        if self.margin != 0.5 and self.loss != "simpo":
            raise ValueError(
                f"dpo.margin={self.margin:g} has no effect with dpo.loss={self.loss}; remove it"
            )

    @property
    def resolved_reference(self) -> str:
        """`reference` with its default filled in: one of REFERENCES."""
        return self.reference or ("none" if self.loss == "simpo" else "precomputed")


def answer_logps(model: nn.Module, batch: Any) -> Tensor:
    """Return fp32 log-probabilities of answers [2n]: n chosen, then n rejected.

    Gathering instead of scattering makes the order of additions deterministic on a GPU.
    """
    nll = model(batch.tokens, batch.targets, batch.doc_ids).nll.flatten()
    return -torch.cat([nll, nll.new_zeros(1)])[batch.answer_positions].sum(1)


def pair_losses(config: DPOConfig, ratios: Tensor, lengths: Tensor) -> Tensor:
    """Return the loss of each pair [n].

    ratios: log-ratios to the reference; lengths: tokens; both [2, n], chosen and rejected.
    sigmoid (arXiv:2305.18290; label_smoothing: cDPO, ericmitchell.ai/cdpo.pdf), sigmoid_norm (per
    token, as in Tulu 3, arXiv:2411.15124), ipo (arXiv:2310.12036, per token as its authors advise),
    hinge (arXiv:2305.10425), robust (arXiv:2403.00409), simpo (arXiv:2405.14734; ratios are plain
    log-probabilities), apo_zero (arXiv:2408.06266).
    """
    beta, smoothing = config.beta, config.label_smoothing
    if config.loss in ("sigmoid_norm", "ipo", "simpo"):
        ratios = ratios / lengths
    chosen, rejected = ratios
    delta = chosen - rejected
    if config.loss == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    if config.loss == "hinge":
        return relu(1 - beta * delta)
    if config.loss == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    scores = beta * delta - (config.margin if config.loss == "simpo" else 0)
    right, wrong = -logsigmoid(scores), -logsigmoid(-scores)
    if config.loss == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def _preference(
    model: nn.Module, batch: Any, config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    logps = answer_logps(model, batch).unflatten(0, (2, -1))  # [2, n]
    lengths = (batch.answer_positions < batch.targets.numel()).sum(1).unflatten(0, (2, -1))
    ratios = logps - batch.reference.unflatten(0, (2, -1))
    losses = pair_losses(config, ratios, lengths) * batch.counted
    loss = losses.sum()
    sft_sums = {}
    if config.sft_weight:
        nll = -(logps[0] * batch.sft_weight_per_token * batch.counted).sum()
        loss = loss + config.sft_weight * nll
        sft_sums["sft_loss"] = nll.detach()
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            **sft_sums,
            **_metric_sums(config, logps.detach(), ratios.detach(), lengths, batch.counted),
        }
    return loss, sums


def _metric_sums(
    config: DPOConfig, logps: Tensor, ratios: Tensor, lengths: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """Return metric sums over pairs. Equal rewards count as wrong, as in TRL."""
    rewards = config.beta * (ratios / lengths if config.loss == "simpo" else ratios)
    of_pairs = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": rewards[0] > rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
        "lengths/chosen": lengths[0],
        "lengths/rejected": lengths[1],
        "lengths/delta": lengths[0] - lengths[1],
    }
    if config.resolved_reference != "none":
        # kl_per_token estimates KL(reference || policy), as if the reference had sampled the
        # answers.
        of_pairs["kl_per_token"] = -ratios.sum(0) / lengths.sum(0)
        of_pairs["drift_per_token"] = ratios.abs().sum(0) / lengths.sum(0)
    return {name: (values * counted).sum() for name, values in of_pairs.items()}


def preference(config: DPOConfig) -> Objective:
    """Return the objective of a preference loss, with its metrics.

    It excludes the router losses of a mixture of experts and leaves router biases unchanged.
    """
    return partial(_preference, config=config)


def with_text(objective: Objective, weight: float) -> Objective:
    """Add the loss of text batches to an objective of pairs: weight * their mean nll per token.

    The metric "replay_loss" is that mean; "loss" is the sum of both.
    """

    def combined(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(batch, TextBatch):
            return objective(model, batch)
        nll = model(batch.tokens, batch.targets, batch.doc_ids).nll.sum()
        mean = nll * batch.weight_per_token[0]
        loss = weight * mean
        return loss, {"loss": loss.detach(), "replay_loss": mean.detach()}

    return combined


def evaluate_pairs(
    model: nn.Module,
    objective: Objective,
    sources: Mapping[str, tuple[list[Any], int]],
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, float]]:
    """Return the means of the objective's metrics by source, and over all pairs as "all".

    sources: name -> (this rank's batches, pairs over all ranks). all_reduce_sum: over ranks.
    """
    device = next(model.parameters()).device
    results: dict[str, dict[str, float]] = {}
    overall: dict[str, float] = {}
    for name, (batches, pairs) in sources.items():
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for key, value in objective(model, batch.to(device))[1].items():
                zero = torch.zeros((), dtype=torch.float64, device=exact_device(device))
                sums[key] = sums.get(key, zero) + exact(value)
        totals = dict(
            zip(sums, all_reduce_sum(torch.stack(list(sums.values()))).tolist(), strict=True)
        )
        results[name] = {key: value / pairs for key, value in totals.items()}
        overall = {key: overall.get(key, 0.0) + value for key, value in totals.items()}
    pairs = sum(number for _, number in sources.values())
    return {**results, "all": {key: value / pairs for key, value in overall.items()}}
