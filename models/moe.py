"""A mixture of experts in place of a block's feed-forward network.

    router: scores of the experts, fp32 -> the best top_k experts of each token -> their outputs,
    weighted and added

No token is dropped: pairs of token and expert are sorted by expert, and a grouped matrix product
multiplies each expert's rows with its weights. Sources: Mixtral, arXiv:2401.04088; noisy router,
arXiv:1701.06538, section 2.1; balance loss, arXiv:2101.03961, section 2.2; router z-loss,
arXiv:2202.08906; balancing by a bias, arXiv:2408.15664.
Shapes: B rows, T tokens of a row, N = B * T, D hidden_size, I expert_size, E experts, K top_k.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.losses import IGNORE
from ranges import NonNegativeFloat, NonNegativeInt, at_least, check_fields, one_of

Size = Annotated[int, at_least(1, below=2**31)]
KINDS = ("dense", "moe")  # feed-forward networks
# Rows of an expert, rounded up for oneDNN, which compiles a product for each new number of rows.
ALIGNED = 64


@dataclass(frozen=True)
class MoEConfig:
    """Experts and their router, with model.kind=moe."""

    # Number of experts; CUDA's grouped product takes at most 1,023.
    experts: Annotated[int, at_least(1, maximum=1023)] = 8
    top_k: Size = 2  # experts that a token uses
    # Width of an expert. Default: width of the dense network / top_k, for equal active parameters.
    expert_size: Size | None = None
    shared_size: NonNegativeInt = 0  # width of an expert that every token uses; 0: none
    # How experts are chosen; noisy_top_k: training adds noise of a learned scale to the scores.
    router: Annotated[str, one_of("top_k", "noisy_top_k")] = "top_k"
    # How loads are balanced. loss: a balance loss. bias: a bias on the scores that choose experts,
    # raised by bias_rate after each step for experts below the mean load and lowered for experts
    # above it. none: neither.
    balance: Annotated[str, one_of("loss", "bias", "none")] = "loss"
    balance_weight: NonNegativeFloat = 0.01  # weight of the balance loss
    z_weight: NonNegativeFloat = 0.001  # weight of the router z-loss
    bias_rate: NonNegativeFloat = 0.001  # change of a bias per step, with balance=bias

    def __post_init__(self) -> None:
        check_fields(self, "model.moe")
        if self.top_k > self.experts:
            raise ValueError(
                f"model.moe.top_k={self.top_k} is more than model.moe.experts={self.experts}; "
                "lower the first or raise the second"
            )
        for name, balance in (("balance_weight", "loss"), ("bias_rate", "bias")):
            default = self.__dataclass_fields__[name].default
            if self.balance != balance and getattr(self, name) not in (0, default):
                raise ValueError(
                    f"model.moe.{name}={getattr(self, name):g} has no effect with "
                    f"model.moe.balance={self.balance}; remove it, or set balance={balance}"
                )

    @property
    def fixed(self) -> "MoEConfig":
        """These settings with default weights and rates, which may change between phases."""
        default = MoEConfig()
        return replace(
            self,
            balance_weight=default.balance_weight,
            z_weight=default.z_weight,
            bias_rate=default.bias_rate,
        )

    @property
    def normalized(self) -> bool:
        """Whether the weights of a token's experts add up to 1.

        For one expert they would always be 1, and the router would learn nothing.
        """
        return self.top_k > 1

    def size(self, dense: int) -> int:
        """Return the width of an expert, given the width `dense` of a dense network."""
        return self.expert_size or max(1, dense // self.top_k)

    def router_parameters(self, width: int) -> int:
        """Return the number of the router's parameters, without its bias."""
        return self.experts * width * (2 if self.router == "noisy_top_k" else 1)

    @property
    def problem_of_mixtral(self) -> str:
        """Why Mixtral's format cannot hold this network; empty if it can."""
        if self.balance == "bias":
            return "model.moe.balance=bias, whose biases Mixtral's router lacks"
        if self.shared_size:
            return f"model.moe.shared_size={self.shared_size}; Mixtral has no shared expert"
        if not self.normalized:
            return f"model.moe.top_k={self.top_k}; Mixtral would set each weight to 1"
        return ""


def check_moe(kind: str, moe: MoEConfig) -> None:
    """ValueError if a dense model has settings of experts."""
    if kind == "dense" and moe != MoEConfig():
        raise ValueError("model.moe has no effect with model.kind=dense; set model.kind=moe")


class RouterStats(NamedTuple):
    """Routing statistics of one micro-batch; stacked over layers, each field has [L] in front."""

    balance: Tensor  # [B] fp32: E * sum of share * mean probability over experts; 1 if balanced
    z: Tensor  # [B] fp32: mean squared logsumexp of the scores
    entropy: Tensor  # [B] fp32: mean entropy of the probabilities, in nats
    counts: Tensor  # [E] int64: tokens of each expert
    dropped: Tensor  # int64: token-expert pairs minus the rows that experts computed

    @classmethod
    def stack(cls, layers: "list[RouterStats]") -> "RouterStats | None":
        """Combine the stats of a model's layers; None if it has no experts."""
        return cls(*map(torch.stack, zip(*layers, strict=True))) if layers else None


class Router(nn.Module):
    """Choose experts and their weights, in fp32 up to the choice."""

    bias: Tensor | None

    def __init__(self, config: MoEConfig, width: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        noisy = config.router == "noisy_top_k"
        self.noise_weight = nn.Parameter(torch.empty(config.experts, width)) if noisy else None
        bias = torch.zeros(config.experts, dtype=torch.float32)
        self.register_buffer("bias", bias if config.balance == "bias" else None)

    def forward(
        self, x: Tensor, noise_keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route x [B, T, D]. noise_keys [B, T]: see token_keys; None: no noise.

        Returns weights [B, T, K] fp32, chosen experts [B, T, K], and for all experts probabilities
        [B, T, E] and the logsumexp [B, T] of the scores.
        """
        scores = F.linear(x.float(), self.weight.float())
        if self.noise_weight is not None and noise_keys is not None:
            size = F.softplus(F.linear(x.float(), self.noise_weight.float()))
            scores = scores + size * gaussian_noise(noise_keys, self.config.experts)
        normalizer = scores.logsumexp(-1)
        probabilities = (scores - normalizer[..., None]).exp()
        choice = probabilities if self.bias is None else probabilities + self.bias
        chosen = choice.topk(self.config.top_k, dim=-1).indices
        if self.config.normalized:  # as probabilities divided by their sum, which may underflow
            weights = scores.gather(-1, chosen).softmax(-1)
        else:
            weights = probabilities.gather(-1, chosen)
        return weights, chosen, probabilities, normalizer

    def stats(
        self,
        chosen: Tensor,
        probabilities: Tensor,
        normalizer: Tensor,
        trained: Tensor | None,
        computed: Tensor,
    ) -> RouterStats:
        """Summarise forward()'s results over the `trained` tokens [B, T]; None: over all tokens.

        computed: rows that experts computed, padding included; with divided experts, only the sum
        over ranks is meaningful. Balance is measured in each row (arXiv:2412.19437), so it does not
        depend on how rows are divided into micro-batches and ranks.
        """
        rows, experts = len(chosen), self.config.experts
        counted = torch.ones_like(chosen[..., 0]) if trained is None else trained.long()  # [B, T]
        weight = counted.float() / counted.sum(1, keepdim=True).clamp_min(1)  # mean over a row
        pairs = counted[..., None].expand_as(chosen)
        counts = torch.zeros(rows, experts, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(1, chosen.flatten(1), pairs.flatten(1))  # [B, E]
        shares = counts.float() / counts.sum(1, keepdim=True).clamp_min(1)
        balance = experts * (shares * (probabilities * weight[..., None]).sum(1)).sum(-1)
        entropy = torch.special.entr(probabilities.detach()).sum(-1)
        return RouterStats(
            balance,
            (normalizer.square() * weight).sum(1),
            (entropy * weight).sum(1),
            counts.sum(0),
            chosen.numel() - computed,
        )


class Experts(nn.Module):
    """E feed-forward networks with stacked weights, without biases.

    Each weight is [E, outputs, inputs], as in E nn.Linear: Muon and grouped_mm need this layout.
    """

    def __init__(self, experts: int, width: int, size: int, activation: str):
        super().__init__()
        self.activation = activation
        gated = activation == "swiglu"
        self.gate_proj = nn.Parameter(torch.empty(experts, size, width)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(experts, size, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, size))

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the weights gate_proj, up_proj and down_proj."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Apply each expert to its rows of x [rows, D]; expert 0 has the first counts[0] rows.

        Returns the output and the number of rows computed, int64.
        """
        computed, slots = counts.sum(), None
        if needs_aligned_groups(x, counts):
            slots, counts = aligned_slots(counts, len(x))
            x = x.new_zeros(len(x) + ALIGNED * len(counts), x.shape[1]).index_copy_(0, slots, x)
        offsets = counts.cumsum(0).to(torch.int32)
        gate_proj, up_proj, down_proj = self.weights()
        up = grouped_linear(x, up_proj, offsets)
        if gate_proj is not None:
            hidden = F.silu(grouped_linear(x, gate_proj, offsets)) * up
        else:
            hidden = activate(up, self.activation)
        out = grouped_linear(hidden, down_proj, offsets)
        return out if slots is None else out.index_select(0, slots), computed


def needs_aligned_groups(x: Tensor, counts: Tensor) -> bool:
    """Return True if oneDNN compiles the products of groups of x for their numbers of rows."""
    is_large = len(x) > ALIGNED * len(counts)  # else padding costs more
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and is_large


def aligned_slots(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Give each group a multiple of ALIGNED rows: return the rows' new places [rows], new counts.

    counts [E]: rows of each group; their sum is `rows`.
    """
    aligned = (counts + ALIGNED - 1) // ALIGNED * ALIGNED
    shifts = (aligned - counts).cumsum(0) - (aligned - counts)
    places = torch.arange(rows, device=counts.device)
    return places + shifts[torch.bucketize(places, counts.cumsum(0), right=True)], aligned


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply gelu (tanh form) or relu2, squared ReLU (arXiv:2109.08668)."""
    return F.gelu(x, approximate="tanh") if activation == "gelu" else F.relu(x).square()


def unaligned(model: nn.Module) -> str:
    """Return the first expert weight that grouped_mm refuses in bfloat16, or "".

    Both matrix dimensions must be multiples of 8, which are the kernel's 16 bytes.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and any(size % 8 for size in weight.shape[1:]):
            return f"{name.replace('_checkpoint_wrapped_module.', '')} {list(weight.shape)}"
    return ""


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply groups of rows of x [rows, inputs] with the matrices of weight [E, out, inputs].

    offsets [E] int32: end of each group of rows. Groups may be empty. The loops return zeros for
    rows after the last group.
    """
    weight = weight.to(x.dtype)
    aligned = weight.shape[1] % 8 == weight.shape[2] % 8 == 0  # to the kernel's 16 bytes
    if x.is_cuda and x.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(x, weight.mT, offs=offsets)
    return _grouped_linear(x, weight, offsets)


# Custom operators hide the loops from torch.compile: new group sizes cause no recompilation.
@torch.library.custom_op("nanollama::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(len(x), weight.shape[1])
    for matrix, begin, end in _groups(weight, offsets):
        torch.mm(x[begin:end], matrix.T, out=out[begin:end])
    out[end:] = 0
    return out


@torch.library.custom_op("nanollama::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    for (matrix, begin, end), grad_matrix in zip(
        _groups(weight, offsets), grad_weight, strict=True
    ):
        torch.mm(grad[begin:end], matrix, out=grad_x[begin:end])
        torch.mm(grad[begin:end].T, x[begin:end], out=grad_matrix)
    grad_x[end:] = 0
    return grad_x, grad_weight


def _groups(weight: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Yield each matrix with the begin and the end of its rows."""
    ends = offsets.tolist()
    return zip(weight, [0, *ends], ends, strict=False)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None


_grouped_linear.register_autograd(_gradients, setup_context=_save_inputs)


class MoE(nn.Module):
    """Router, experts and an optional shared expert."""

    noise_offset: Tensor

    def __init__(self, config: MoEConfig, width: int, size: int, activation: str, layer: int):
        """width: D. size: I. layer: number of the block, from 0, for the noise."""
        super().__init__()
        self.config = config
        offset = torch.tensor(_signed(layer * 0xD1B54A32D192ED03 % 2**64))
        # A buffer, because torch.compile would recompile the block for each integer.
        self.register_buffer("noise_offset", offset, persistent=False)
        self.router = Router(config, width)
        self.experts = Experts(config.experts, width, size, activation)
        shared = config.shared_size
        self.shared = Experts(1, width, shared, activation) if shared else None

    def forward(
        self, x: Tensor, noise_keys: Tensor | None = None, trained: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the output [B, T, D] and, in training, the router's stats.

        noise_keys [B, T]: from token_keys. trained [B, T] bool: tokens that the stats count.
        """
        if noise_keys is not None:
            noise_keys = noise_keys + self.noise_offset
        weights, chosen, probabilities, normalizer = self.router(x, noise_keys)
        rows = x.flatten(0, 1)
        out, computed = self.apply_experts(rows, weights.flatten(0, 1), chosen.flatten(0, 1))
        stats = None
        if self.training:
            stats = self.router.stats(chosen, probabilities, normalizer, trained, computed)
        if self.shared is not None:
            every = torch.full((1,), len(rows), dtype=torch.int64, device=x.device)
            out = out + self.shared(rows, every)[0]
        return out.view_as(x), stats

    def apply_experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum [N, D] of each token's experts, and the rows they computed.

        x [N, D]; the others [N, K].
        """
        tokens, k = chosen.shape
        pairs = chosen.flatten()
        counts = torch.zeros(self.config.experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        order = pairs.argsort(stable=True)  # [N * K] pairs by expert
        inverse = inverse_of(order)
        copies = x[:, None].expand(-1, k, -1).reshape(tokens * k, -1)
        out, computed = self.experts(permute(copies, order, inverse), counts)
        out = permute(out, inverse, order).view(tokens, k, -1)
        return (out * weights[..., None].to(out.dtype)).sum(1), computed


class _Permute(torch.autograd.Function):
    """x[order], with a deterministic gradient on every device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def inverse_of(order: Tensor) -> Tensor:
    """Return the permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return x[order]; inverse undoes the permutation `order`."""
    return _Permute.apply(x, order, inverse)


def router_inputs(
    kind: str,
    config: MoEConfig,
    tokens: Tensor,
    targets: Tensor | None,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return noise_keys and `trained` of a training step, both [B, T] or None, for MoE.forward.

    rows: see token_keys. `trained` marks the tokens up to a row's last target; the rest is padding.
    """
    if kind == "dense":
        return None, None
    noise_keys = token_keys(tokens, rows) if config.router == "noisy_top_k" else None
    if targets is None:
        return noise_keys, None
    return noise_keys, (targets != IGNORE).long().flip(1).cumsum(1).flip(1) > 0


def router_loss_sum(
    stats: RouterStats, has_target: Tensor, config: MoEConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the routers' losses over rows, each row weighted by its number of targets.

    Dividing by the targets of the whole step then gives a weighted mean over rows. The losses of
    the layers are added (arXiv:2101.03961). has_target [B, T] bool. Returns the sum and detached
    sums: "balance_loss" and "router_z_loss", already weighted; "router_entropy" in nats, the mean
    over layers; "dropped_tokens", which must be 0; "expert_counts", int64 [L, E].
    """
    targets = has_target.sum(1)  # [B]
    weight = config.balance_weight if config.balance == "loss" else 0.0
    balance = weight * (stats.balance.sum(0) * targets).sum()
    z = config.z_weight * (stats.z.sum(0) * targets).sum()
    return balance + z, {
        "balance_loss": balance.detach(),
        "router_z_loss": z.detach(),
        "router_entropy": (stats.entropy.mean(0) * targets).sum(),
        "dropped_tokens": stats.dropped.sum(),
        "expert_counts": stats.counts,
    }


def token_keys(tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return a hash per token, int64 [B, T], of its row's tokens, row number and position.

    rows [B]: row numbers in training order, so that identical rows get different keys. None: 0.
    Noise from these keys is the same for any number of ranks, any micro-batch size, after a resume,
    and when activation checkpointing recomputes a block.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device) * _signed(0x9E3779B97F4A7C15)
    row = ((tokens + 1) * _mix(position)).sum(1, keepdim=True)
    if rows is not None:
        row = row + _mix(rows[:, None] * _signed(0x9E3779B97F4A7C15))
    return _mix(row + position)


def gaussian_noise(keys: Tensor, count: int) -> Tensor:
    """Return standard normal numbers, fp32 [*keys.shape, count], that depend only on the keys."""
    columns = torch.arange(count, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(keys[..., None] + columns)
    u = ((_shift(bits, 40) + 1).float()) / 2**24  # in (0, 1]
    v = (_shift(bits, 16) & (2**24 - 1)).float() / 2**24
    return (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()  # Box-Muller


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers right as if they were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return number - 2**64 if number >= 2**63 else number
