"""A model's matrices laid out for products with few rows: what decoding on a CPU spends its time on.

torch's own products of one to some dozen rows reach a third to a half of what oneDNN's blocked weights or a turned matrix do,
in fp32 as in bf16 (benchmarks/generation.py, docs/performance.md). Costs the memory of the weights once more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from models.nanollama import NanoLlama

Product = Callable[[Tensor], Tensor]  # x [N, in] -> [N, out]
ROWS_HINT = 16  # what the blocks are chosen for; they do as well for 1 and for 1,000


class Layer(NamedTuple):
    """The products of one layer; queries, keys and values come from one, and so do the feed-forward's two halves."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product


class LinearOps(NamedTuple):
    layers: list[Layer]
    head: Product


class _Kept(NamedTuple):
    state: tuple  # of the weights
    for_one: bool  # for one row only
    matrices: LinearOps


_packs: WeakKeyDictionary[NanoLlama, _Kept] = WeakKeyDictionary()


def plain(model: NanoLlama) -> LinearOps:
    """The matrices as they lie in the model."""
    return _matrices(
        model, lambda *weights: lambda x: _joined([F.linear(x, weight) for weight in weights])
    )


def packed(model: NanoLlama, rows: int) -> LinearOps:
    """The matrices in the best layout for `rows` rows; the plain ones where there is no better one.

    Kept with the model until a weight changes: its place in memory, autograd's count of changes, or, since neither tells of
    every write through `.data`, its first value.
    """
    weight = model.embed_tokens.weight
    if not _can_pack(weight):
        return plain(model)
    state = tuple((p.data_ptr(), p._version, p[(0,) * p.ndim].item()) for p in model.parameters())
    kept = _packs.get(model)
    if kept is None or kept.state != state or (kept.for_one and rows > 1):
        one = rows == 1 and weight.dtype == torch.float32
        kept = None
        _packs.pop(model, None)  # before the new one needs memory
        kept = _packs[model] = _Kept(state, one, _matrices(model, _transposed if one else _blocked))
    return kept.matrices


def _matrices(model: NanoLlama, lay: Callable[..., Product]) -> LinearOps:
    def layer(block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        qkv = lay(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return Layer(
            qkv,
            lay(attention.o_proj.weight),
            lay(mlp.gate_proj.weight, mlp.up_proj.weight),
            lay(mlp.down_proj.weight),
        )

    with torch.no_grad():
        return LinearOps([layer(block) for block in model.layers], lay(head(model)))


def head(model: NanoLlama) -> Tensor:
    """The matrix [V, D] that makes logits of hidden states."""
    return model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _can_pack(weight: Tensor) -> bool:
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or weight.is_inference()
    ):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _blocked(*weights: Tensor) -> Product:
    """By oneDNN, as torch.compile's own CPU code does it."""
    blocks = torch.ops.mkldnn._reorder_linear_weight(_joined_rows(weights), ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def _transposed(*weights: Tensor) -> Product:
    """For one row in fp32: wide matrices are read fastest with the outputs side by side, others as they are."""
    whole = _joined_rows(weights)
    if whole.shape[0] <= whole.shape[1]:
        return lambda x: F.linear(x, whole)
    turned = whole.t().contiguous()
    return lambda x: x @ turned


def _joined_rows(weights: tuple[Tensor, ...]) -> Tensor:
    return (
        weights[0].detach()
        if len(weights) == 1
        else torch.cat([weight.detach() for weight in weights])
    )
