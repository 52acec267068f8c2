"""Parameter groups and optimizers."""

from dataclasses import dataclass

import torch
from torch import nn

from ranges import Fraction, NonNegativeFloat, PositiveFloat, check_fields
from training.muon import Muon


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer's settings."""

    name: str = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    lr: PositiveFloat = 1.0e-3  # peak of the schedule
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1.0e-8
    momentum: Fraction = 0.95  # Muon's, Nesterov
    weight_decay: NonNegativeFloat = 0.1
    grad_clip: NonNegativeFloat = 1.0  # maximum global gradient norm; 0: no clipping
    z_weight: NonNegativeFloat = 1.0e-4

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r} is not one of adamw, muon")


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool = False) -> list[dict]:
    """Parameter groups: weight decay for matrices, none for norms and the input embedding.

    muon: matrices of the blocks come first, in a separate group with "muon": True.
    """
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = name.endswith("norm.weight") or "embed_tokens" in name
        assert plain or parameter.ndim == 2, f"no rule whether to decay {name}"
        (kept if plain else hidden if muon and name.startswith("layers.") else decayed).append(
            parameter
        )
    groups: list[dict] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    if muon:
        groups = [
            {"params": hidden, "weight_decay": weight_decay, "muon": True},
            *(g for g in groups if g["params"]),
        ]
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {
        id(parameter) for parameter in model.parameters()
    }
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon with AdamW, over parameter_groups."""
    groups = parameter_groups(model, config.weight_decay, config.name == "muon")
    betas = (config.beta1, config.beta2)
    if config.name == "muon":
        return Muon(groups, config.lr, config.momentum, betas, config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
