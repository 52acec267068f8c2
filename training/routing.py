"""After each step of a mixture of experts: bias updates, metrics, warnings about idle experts."""

import re

import torch
from torch import Tensor, nn

from models.moe import MoE
from training.logger import Log

STARVED = 0.01  # an expert with less than this fraction of an equal share is starved
SHORT = 1000  # longer phases log loads every log.every steps, not every step
PATIENCE = 100  # steps in a row before a warning about a starved expert


class Routing:
    """The routers of a model during training. For a dense model, methods do nothing."""

    def __init__(self, model: nn.Module, log: Log, steps: int = 0):
        """steps: steps of the phase."""
        mixtures = {n: module for n, module in model.named_modules() if isinstance(module, MoE)}
        self.layers = list(mixtures.values())
        # Layer numbers, from names such as layers.3.mlp.
        self.numbers = [int((re.findall(r"\d+", name) or [0])[0]) for name in mixtures]
        self.log, self.every = log, log.config.every if steps > SHORT else 1
        self.starved_steps: Tensor | None = None  # [L, E] steps in a row

    @torch.no_grad()
    def after_step(self, step: int, loads: Tensor | None) -> dict[str, float | list[list[float]]]:
        """Update the biases, and return metrics of an applied step.

        loads: tokens of each expert over all micro-batches and ranks, int64 [L, E] on the CPU; None
        without experts. Metrics: expert_load [L][E], 1 for an equal share, not logged at every
        step; max_violation, the mean over layers of the largest load - 1 (arXiv:2408.15664).
        """
        if loads is None:
            return {}
        for layer, counts in zip(self.layers, loads, strict=True):
            if (bias := layer.router.bias) is not None:
                # From integers, so the sign of mean load - load is exact.
                below = (counts.sum() - counts * len(counts)).sign()
                bias += layer.config.bias_rate * below.to(bias.device)
        metrics: dict[str, float | list[list[float]]] = {}
        shares = loads.double() * loads.shape[1] / loads.sum(1, keepdim=True)
        self._warn(step, shares < STARVED)
        metrics["max_violation"] = float((shares.amax(1) - 1).mean())
        if step % self.every == 0:
            metrics["expert_load"] = [[round(x, 3) for x in layer] for layer in shares.tolist()]
        return metrics

    def _warn(self, step: int, starved: Tensor) -> None:
        """Warn about experts starved for PATIENCE steps in a row; a resume restarts the count."""
        before = torch.zeros_like(starved, dtype=torch.int64)
        before = before if self.starved_steps is None else self.starved_steps
        self.starved_steps = (before + 1) * starved
        for layer, expert in (self.starved_steps == PATIENCE).nonzero().tolist():
            key = {"loss": "balance_weight", "bias": "bias_rate"}
            balance = self.layers[layer].config.balance
            advice = f"raise model.moe.{key[balance]}" if balance in key else "set a balance"
            number = self.numbers[layer]
            self.log.event(
                "starved",
                f"        expert {expert} of layer {number} got less than {STARVED:.0%} of an "
                f"equal share of tokens for {PATIENCE} steps; {advice}, or use fewer experts",
                step=step,
                layer=number,
                expert=expert,
            )
