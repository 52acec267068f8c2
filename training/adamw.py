"""torch's fused AdamW with cautious weight decay, updates on every n-th step, and AdamH."""

from typing import Any

import torch
from torch import Tensor

from training.hyperball import adamh, store_initial_norms
from training.shard_layout import local


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with two options; with the defaults, bit-identical to torch's.

    cautious: decay only elements that the update also moves towards zero
    (arXiv:2510.12402). every: step() sums the gradients, and each `every`-th call updates the
    parameters with the sum. The sums and their count are part of the state, so a checkpoint
    between two updates resumes exactly. Groups with "hyperball": True are updated by AdamH
    (hyperball.py) and have no weight decay. Parameters are plain tensors or DTensors; if such a
    group has DTensors, step() is collective.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        cautious: bool = False,
        every: int = 1,
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.cautious, self.every = cautious, every

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        if self.every == 1:
            return self._update()
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self._accumulate(parameters):
            return
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = self.state[p]["gradient_sum"]
        self._update()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
            self.state[p]["gradient_sum"].zero_()
            self.state[p]["summed"].zero_()

    def _accumulate(self, parameters: list[Tensor]) -> bool:
        """Add the gradients to their sums. Return True once the sums cover `every` steps."""
        for p in parameters:
            state = self.state[p]
            if not state:  # all keys exist from the first step on, as checkpoints require
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in ("exp_avg", "exp_avg_sq", "gradient_sum"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["summed"] = torch.zeros((), dtype=torch.float32, device=p.device)
            if p.grad is not None:
                state["gradient_sum"].add_(p.grad)
            state["summed"] += 1
        for group in self.param_groups:
            if group.get("hyperball"):
                store_initial_norms(self.state, group["params"])
        return bool(parameters) and int(self.state[parameters[0]]["summed"]) >= self.every

    def _update(self) -> None:
        groups = self.param_groups
        for group in groups:
            if group.get("hyperball"):
                adamh(self.state, group)
        self.param_groups = [group for group in groups if not group.get("hyperball")]
        if self.cautious:
            for group in self.param_groups:
                self._decay(group)
            self.param_groups = [{**group, "weight_decay": 0.0} for group in self.param_groups]
        step: Any = torch.optim.AdamW.step
        while getattr(step, "hooked", False):  # torch's wrapper, which would run step hooks twice
            step = step.__wrapped__
        step(self)
        self.param_groups = groups

    def _decay(self, group: dict[str, Any]) -> None:
        """Decay the weights that have the sign of the new first moment, the update's sign."""
        for p in group["params"]:
            if p.grad is None or not group["weight_decay"]:
                continue
            moment = local(p.grad)  # for the first update, the gradient has the moment's sign
            if self.state[p]:
                moment = local(self.state[p]["exp_avg"]).lerp(moment, 1 - group["betas"][0])
            decay_cautiously(local(p), moment, group["lr"] * group["weight_decay"])


def decay_cautiously(weight: Tensor, update: Tensor, rate: float) -> None:
    """Multiply weights that have the sign of their update by 1 - rate (arXiv:2510.12402).

    The caller subtracts the update later. A weight with an update of 0 decays, too.
    """
    weight.mul_(torch.where(weight * update >= 0, 1 - rate, 1.0))
