"""What is minimised. An objective maps a model and a batch to a sum of losses and detached sums to report.

The loop divides by the weight of the whole step (its targets over all micro-batches and ranks); an objective never averages.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.losses import compute_loss_with_z_penalty

Objective = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def _next_token(model: nn.Module, batch: Any, z_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    return compute_loss_with_z_penalty(model(batch.tokens, batch.targets, batch.doc_ids), z_weight)


def next_token(z_weight: float) -> Objective:
    """Cross-entropy of the next token within its document, plus z-loss."""
    return partial(_next_token, z_weight=z_weight)


def with_neftune(objective: Objective, alpha: float, seed: int) -> Objective:
    """The same with noise on the embeddings, uniform within alpha / sqrt(L * d) in a document of L tokens (arXiv:2310.05914).

    The noise of a row depends on the seed and on the row's number in the order of training alone: not on ranks, micro-batches
    or what was done before, so a resumed run draws the same.
    """

    def noisy(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        def add(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
            return embedded + neftune_noise(
                batch.doc_ids, batch.rows, embedded.shape[-1], alpha, seed
            ).to(embedded.dtype)

        hook = model.get_submodule("embed_tokens").register_forward_hook(add)
        try:
            return objective(model, batch)
        finally:
            hook.remove()

    return noisy


def neftune_noise(doc_ids: Tensor, rows: Tensor, width: int, alpha: float, seed: int) -> Tensor:
    """fp32 [B, T, width] for docs [B, T], which count up from 0 in each row, and rows [B]."""
    index = doc_ids.long()
    ones = torch.ones_like(index)
    length = (
        torch.zeros_like(index).scatter_add_(1, index, ones).gather(1, index)
    )  # [B, T], tokens in a token's document
    noise = torch.empty(*doc_ids.shape, width, device=doc_ids.device)
    for i, row in enumerate(rows.tolist()):
        generator = torch.Generator(doc_ids.device).manual_seed((seed * 1_000_003 + row) % 2**63)
        noise[i].uniform_(-1, 1, generator=generator)
    return noise * (alpha / (length * width).sqrt())[..., None]
