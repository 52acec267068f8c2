"""Objectives: functions of a model and a batch that return a loss sum and detached metric sums.

An objective never averages: the loop divides by the loss denominator of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.losses import IGNORE, token_loss_sum
from models.moe import router_loss_sum

if TYPE_CHECKING:
    from data.dataloader import Batch
    from models.kinds import AnyModel

Objective = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


def _next_token(
    model: nn.Module, batch: Batch, z_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    rows = batch.rows if len(batch.rows) else None  # set by loaders
    losses = model(batch.tokens, batch.targets, batch.doc_ids, rows)
    loss, sums = token_loss_sum(losses, z_weight)
    if losses.router is None:
        return loss, sums
    moe = cast("AnyModel", model).config.moe
    router_loss, router_sums = router_loss_sum(losses.router, batch.targets != IGNORE, moe)
    return loss + router_loss, sums | router_sums


def next_token(z_weight: float) -> Objective:
    """Return next-token cross-entropy within documents, plus z-loss and the routers' losses."""
    return partial(_next_token, z_weight=z_weight)


def with_neftune(objective: Objective, alpha: float, seed: int) -> Objective:
    """Add NEFTune noise to the embeddings of an objective's model (arXiv:2310.05914).

    The noise is uniform within alpha / sqrt(L * d) in a document of L tokens. The noise of a row
    depends only on the seed and the row's number in training order, so it is the same for any
    number of ranks, any micro-batch size and after a resume.
    """

    def noisy(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.doc_ids is not None
        doc_ids = batch.doc_ids

        def add(_module: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
            return embedded + neftune_noise(
                doc_ids, batch.rows, embedded.shape[-1], alpha, seed
            ).to(embedded.dtype)

        hook = model.get_submodule("embed_tokens").register_forward_hook(add)
        try:
            return objective(model, batch)
        finally:
            hook.remove()

    return noisy


def neftune_noise(doc_ids: Tensor, rows: Tensor, width: int, alpha: float, seed: int) -> Tensor:
    """Return noise, fp32 [B, T, width].

    doc_ids [B, T] count documents from 0 in each row; rows [B]: row numbers in training order.
    """
    index = doc_ids.long()
    ones = torch.ones_like(index)
    # Length of each token's document, [B, T].
    length = torch.zeros_like(index).scatter_add_(1, index, ones).gather(1, index)
    noise = torch.empty(*doc_ids.shape, width, device=doc_ids.device)
    for i, row in enumerate(rows.tolist()):
        generator = torch.Generator(doc_ids.device).manual_seed((seed * 1_000_003 + row) % 2**63)
        noise[i].uniform_(-1, 1, generator=generator)
    return noise * (alpha / (length * width).sqrt())[..., None]
