"""Hyperball: constant Frobenius norms of weights and updates, in place of weight decay.

Source: Wen et al. 2026, arXiv:2606.16899. For a matrix W with the update U of a base optimizer
(Adam: AdamH, Muon: MuonH) and the Frobenius norm R of the initial W:

    W <- R Normalize(W - lr R Normalize(U)),    Normalize(X) = X / |X|

Choice of parameters and base optimizers follows levanter's adamh.py and muonh.py
(marin-community/marin 0084342, 05422e2). Each matrix of a stack has a separate R.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from machine import exact, exact_device
from training.shard_layout import ShardLayout, local

MIN_NORM = 1e-10  # minimum norm of an update that is scaled to lr R


def matrices_of(shape: Sequence[int]) -> int:
    """Return the number of matrices in a parameter [rows, columns] or [matrices, rows, columns]."""
    return shape[0] if len(shape) == 3 else 1


def partial_products(
    weight: Tensor, update: Tensor, shape: Sequence[int], layout: ShardLayout
) -> Tensor:
    """Return this rank's part of |W|^2, <W, U> and |U|^2 of each matrix, float64 [matrices, 3].

    weight, update: this rank's rows of a parameter of that shape. Summed over the shards, the
    results are the products of full matrices. They are on the weight's exact_device.
    """
    update = update.float()
    pairs = ((weight, weight), (weight, update), (update, update))
    if len(shape) == 2:
        return torch.stack([exact(a * b).sum(dtype=torch.float64) for a, b in pairs])[None]
    device = exact_device(weight.device)
    products = torch.zeros(shape[0], len(pairs), dtype=torch.float64, device=device)
    sums = [exact(a * b).sum((1, 2), dtype=torch.float64) for a, b in pairs]
    products[layout.span(shape[0])] = torch.stack(sums, -1)
    return products


def project(
    weight: Tensor,
    update: Tensor,
    products: Tensor,
    initial_norm: Tensor,
    lr: float,
    layout: ShardLayout,
) -> None:
    """Set this rank's rows of W to R Normalize(W - lr R Normalize(U)), in place.

    products: of full matrices, [matrices, 3] as in partial_products. initial_norm: R, [matrices].
    A matrix with an update of 0 is unchanged, bit for bit.
    """
    weight_square, product, update_square = products.unbind(-1)
    initial_norm = initial_norm.to(products.device)
    step = lr * initial_norm / update_square.sqrt().clamp(min=MIN_NORM)
    norm = (weight_square - 2 * step * product + step.square() * update_square).sqrt()
    factor = torch.where(update_square > 0, initial_norm / norm, 1.0)
    step = step * factor
    if weight.ndim == 3:
        span = layout.span(len(products))
        factor, step = factor[span, None, None], step[span, None, None]
    factor, step = (number.float().to(weight.device) for number in (factor, step))
    weight.mul_(factor).sub_(update * step)


def frobenius_norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Collective. Return the norm of each matrix of each parameter, float32 [matrices].

    The parameters must have the same layout.
    """
    layout = ShardLayout.from_tensor(parameters[0])
    weights = [local(parameter) for parameter in parameters]
    products = sum_over_shards(
        torch.cat(
            [
                partial_products(weight, weight, parameter.shape, layout)
                for weight, parameter in zip(weights, parameters, strict=True)
            ]
        ),
        layout,
    )
    sizes = [matrices_of(parameter.shape) for parameter in parameters]
    return list(products[:, 0].sqrt().float().to(weights[0].device).split(sizes))


def sum_over_shards(products: Tensor, layout: ShardLayout) -> Tensor:
    """Collective. Sum partial products over the shards, in place, and return them."""
    if layout.shards > 1:
        dist.all_reduce(products, group=layout.shard_group)
    return products


def store_initial_norms(states: Mapping[Tensor, Any], parameters: Sequence[Tensor]) -> None:
    """Collective. Store the norms of new parameters in their states, as "initial_norm"."""
    new = [p for p in parameters if "initial_norm" not in states[p]]
    for parameter, norms in zip(new, frobenius_norms(new) if new else [], strict=True):
        states[parameter]["initial_norm"] = norms.clone()  # no view: checkpoints save storages


def adamh(states: Mapping[Tensor, Any], group: dict[str, Any]) -> None:
    """Collective. Update the parameters of a group that have a gradient by AdamH.

    The states have the keys of torch's fused Adam, and "initial_norm". Updates are computed twice,
    before and after the sum over the shards, instead of being stored.
    """
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not parameters:
        return
    for parameter in parameters:
        _update_moments(parameter, states[parameter], *group["betas"])
    store_initial_norms(states, parameters)
    layout = ShardLayout.from_tensor(parameters[0])
    partial = [
        partial_products(local(p), _adam_update(states[p], group), p.shape, layout)
        for p in parameters
    ]
    products = sum_over_shards(torch.cat(partial), layout).split([len(rows) for rows in partial])
    for p, sums in zip(parameters, products, strict=True):
        update, norm = _adam_update(states[p], group), states[p]["initial_norm"]
        project(local(p), update, sums, norm, group["lr"], layout)


def _update_moments(parameter: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> None:
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    gradient = local(parameter.grad)
    state["step"] += 1
    local(state["exp_avg"]).lerp_(gradient, 1 - beta1)
    local(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


def _adam_update(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return this rank's rows of Adam's update, without the learning rate."""
    beta1, beta2 = group["betas"]
    moment = local(state["exp_avg"]) / (1 - beta1 ** state["step"])
    square = local(state["exp_avg_sq"]) / (1 - beta2 ** state["step"])
    return moment / (square.sqrt() + group["eps"])
