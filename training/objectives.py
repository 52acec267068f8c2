"""What is minimised. An objective maps a model and a batch to a sum of losses and detached sums to report.

The loop divides by the weight of the whole step (its targets over all micro-batches and ranks); an objective never averages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from models.losses import compute_loss_with_z_penalty

Objective = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def _next_token(model: nn.Module, batch: Any, z_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    return compute_loss_with_z_penalty(model(batch.tokens, batch.targets, batch.docs), z_weight)


def next_token(z_weight: float) -> Objective:
    """Cross-entropy of the next token within its document, plus z-loss."""
    return partial(_next_token, z_weight=z_weight)
