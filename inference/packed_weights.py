"""Weight layouts for decoding on a CPU; `linear_ops` is the one entry point.

For 1 to about 50 rows, torch's matrix products reach a third to a half of the speed of oneDNN's
blocked weights or of a transposed matrix, in fp32 and bf16 (docs/performance.md).
A packed layout is a second copy of the weights in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from models.moe import MoE
from models.nanollama import NanoLlama, SwiGLU

Product = Callable[[Tensor], Tensor]  # x [N, in] -> [N, out]
ROWS_HINT = 16  # rows that oneDNN tunes its blocks for; they also suit 1 and 1,000 rows


class LayerOps(NamedTuple):
    """Matrix products of one layer; qkv fuses three projections, the feed-forward its first two."""

    qkv: Product
    out: Product
    feed_forward: Product


class LinearOps(NamedTuple):
    """Matrix products of a model."""

    layers: list[LayerOps]
    head: Product


class _CachedOps(NamedTuple):
    weights_state: tuple[Any, ...]
    single_row: bool  # the layout suits one row only
    ops: LinearOps


_cache: WeakKeyDictionary[NanoLlama, _CachedOps] = WeakKeyDictionary()


def linear_ops(model: NanoLlama, rows: int | None = None) -> LinearOps:
    """Return the model's matrix products in the fastest layout for `rows` rows.

    rows=None, and devices without a faster layout, use the model's own weights. A packed layout is
    cached until a weight changes: its address, autograd's version counter or its first value
    (writes through `.data` do not increase the counter).
    """
    weight = model.embed_tokens.weight
    if rows is None or not _can_pack(weight):
        return _build(model, _unpacked)
    state = tuple((p.data_ptr(), p._version, p[(0,) * p.ndim].item()) for p in model.parameters())
    cached = _cache.get(model)
    if cached is None or cached.weights_state != state or (cached.single_row and rows > 1):
        cached = None
        _cache.pop(model, None)  # frees the old copy before the new one is built
        single_row = rows == 1 and weight.dtype == torch.float32
        ops = _build(model, _transposed if single_row else _blocked)
        cached = _cache[model] = _CachedOps(state, single_row, ops)
    return cached.ops


def _build(model: NanoLlama, layout: Callable[..., Product]) -> LinearOps:
    def layer_ops(block: Any) -> LayerOps:
        attention, mlp = block.self_attn, block.mlp
        return LayerOps(
            layout(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            layout(attention.o_proj.weight),
            experts(mlp) if isinstance(mlp, MoE) else feed_forward(mlp),
        )

    def feed_forward(mlp: SwiGLU) -> Product:
        gate_up = layout(mlp.gate_proj.weight, mlp.up_proj.weight)
        down = layout(mlp.down_proj.weight)

        def swiglu(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2, dim=-1)
            return down(F.silu(gate) * up)

        return swiglu

    def experts(mlp: MoE) -> Product:
        return lambda x: mlp(x[None])[0][0]

    with torch.no_grad():
        return LinearOps([layer_ops(block) for block in model.layers], layout(model.head_weight))


def _can_pack(weight: Tensor) -> bool:
    onednn = torch.backends.mkldnn.is_available()
    if weight.device.type != "cpu" or not onednn or weight.is_inference():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _unpacked(*weights: Tensor) -> Product:
    """Use the weights as stored."""
    if len(weights) == 1:
        return lambda x: F.linear(x, weights[0])
    return lambda x: torch.cat([F.linear(x, weight) for weight in weights], dim=-1)


def _blocked(*weights: Tensor) -> Product:
    """Use oneDNN's blocked layout, as torch.compile does on a CPU."""
    blocks = torch.ops.mkldnn._reorder_linear_weight(_concatenated(weights), ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, None, "none", [], "")


def _transposed(*weights: Tensor) -> Product:
    """Transpose matrices with more outputs than inputs: fastest for one fp32 row."""
    weight = _concatenated(weights)
    if weight.shape[0] <= weight.shape[1]:
        return lambda x: F.linear(x, weight)
    transposed = weight.t().contiguous()
    return lambda x: x @ transposed


def _concatenated(weights: tuple[Tensor, ...]) -> Tensor:
    if len(weights) == 1:
        return weights[0].detach()
    return torch.cat([weight.detach() for weight in weights])
