"""Experts equal a plain loop and Mixtral's; each known fault of such models fails a check here."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_mixture
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.dataloader import Batch, Step
from models import hf, moe
from models.losses import IGNORE, TokenLosses
from models.moe import MoE, MoEConfig, RouterStats, token_keys
from models.nanollama import ModelConfig, NanoLlama
from training import loop, muon, setup
from training.config import DataConfig, RunConfig, fixed, load
from training.fsdp_utils import ParallelConfig, check_alignment, wrap_model_fsdp
from training.muon import Muon, orthogonalize, update_scale
from training.objectives import next_token
from training.routing import Routing
from yaml_file import read_yaml_file

WIDTH, SIZE, EXPERTS = 16, 12, 5
CPU = torch.device("cpu")
CONFIG = tiny_mixture(
    MoEConfig(experts=EXPERTS, balance="bias", router="noisy_top_k"), initializer_range=0.2
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_layer(activation: str = "swiglu", **settings: Any) -> MoE:
    """Return a layer with random weights."""
    layer = MoE(MoEConfig(**{"experts": EXPERTS, **settings}), WIDTH, SIZE, activation, layer=1)
    for seed, weight in enumerate(layer.parameters()):
        weight.data = 0.4 * random(*weight.shape, seed=seed)
    return layer


def random_batch(rows: int = 4, length: int = 16, seed: int = 0) -> Batch:
    tokens = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def one_step(
    micro: int = 4, config: ModelConfig = CONFIG, keep: str = "none"
) -> tuple[dict[str, float], Tensor, list[Tensor], dict[str, Tensor]]:
    """Return metrics, loads [L, E], gradients and buffers after one step's backward passes."""
    parallel = ParallelConfig(dtype="float32", compile=False, activation_checkpointing=keep)
    run = RunConfig(model=config, data=DataConfig(sequence_length=16, tokens_per_step=64))
    batch = random_batch()
    pieces = [
        Batch(tokens, targets, None)
        for tokens, targets in zip(
            batch.tokens.split(micro), batch.targets.split(micro), strict=True
        )
    ]
    with setup.ranks() as device:
        state = setup.build(replace(run, parallel=parallel), device, seed=0)
        model = state.model
        sums, _ = loop.backward(run, model, Step(pieces, 64, 64), next_token(1e-4))
        means, _, loads = loop.reduce(sums, 64)
        gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
        assert loads is not None
        return means, loads, gradients, dict(model.named_buffers())


# ---- the same numbers as others


def reference(layer: MoE, x: Tensor) -> Tensor:
    """Return the output for tokens x [N, D] by a loop over tokens and experts."""

    def network(experts: moe.Experts, index: int, token: Tensor) -> Tensor:
        up = experts.up_proj[index] @ token
        if experts.gate_proj is not None:
            hidden = F.silu(experts.gate_proj[index] @ token) * up
        elif experts.activation == "gelu":
            hidden = F.gelu(up, approximate="tanh")
        else:
            hidden = F.relu(up) ** 2
        return experts.down_proj[index] @ hidden

    rows = []
    for token in x:
        probabilities = (layer.router.weight @ token).softmax(0)
        choice = probabilities if layer.router.bias is None else probabilities + layer.router.bias
        chosen = sorted(range(EXPERTS), key=lambda i: -choice[i])[: layer.config.top_k]
        total = sum(probabilities[i] for i in chosen) if layer.config.top_k > 1 else 1
        row = sum(probabilities[i] / total * network(layer.experts, i, token) for i in chosen)
        rows.append(row if layer.shared is None else row + network(layer.shared, 0, token))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        ("swiglu", {"top_k": 2}),
        ("gelu", {"top_k": 1, "shared_size": 7}),
        ("relu2", {"top_k": EXPERTS, "balance": "none"}),
        ("swiglu", {"top_k": 3, "balance": "bias", "shared_size": 5}),
    ],
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(activation, settings):
    layer, x = make_layer(activation, **settings), random(2, 9, WIDTH, seed=50)
    if layer.router.bias is not None:
        layer.router.bias.copy_(random(EXPERTS))
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    actual, stats = layer(x)
    expected = reference(layer, x.flatten(0, 1)).view_as(x)
    assert (actual - expected).abs().max() <= 1e-5
    assert stats.counts.sum() == 18 * layer.config.top_k and stats.counts.dtype == torch.int64
    direction = random(*actual.shape, seed=51)
    pairs = zip(
        torch.autograd.grad(actual, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    )
    assert max((a - b).abs().max() for a, b in pairs) <= 2e-5


def test_outputs_and_gradients_equal_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    layer, x = make_layer(top_k=2), random(2, 9, WIDTH, seed=50)
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=SIZE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    theirs, experts = MixtralSparseMoeBlock(config), layer.experts
    assert experts.gate_proj is not None
    theirs.load_state_dict(
        {
            "gate.weight": layer.router.weight,
            "experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], 1),
            "experts.down_proj": experts.down_proj,
        }
    )
    direction = random(*x.shape, seed=51)
    actual, expected = layer(x)[0], theirs(x)
    assert (actual - expected).abs().max() <= 1e-5
    actual.backward(direction)
    expected.backward(direction)
    gate, up = theirs.experts.gate_up_proj.grad.chunk(2, 1)
    for ours, grad in (
        (layer.router.weight, theirs.gate.weight.grad),
        (experts.gate_proj, gate),
        (experts.up_proj, up),
        (experts.down_proj, theirs.experts.down_proj.grad),
    ):
        assert (ours.grad - grad).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_of_products_is_grouped_mm_bit_for_bit(dtype):
    x, weight = random(24, WIDTH).to(dtype), random(4, 8, WIDTH, seed=1).to(dtype)
    ends = torch.tensor([0, 3, 3, 24], dtype=torch.int32)
    arguments = x.requires_grad_(), weight.requires_grad_(), ends
    results = []
    for product in (moe.grouped_linear, lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)):
        out = product(*arguments)
        results.append((out, *torch.autograd.grad(out, arguments[:2], random(24, 8).to(dtype))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("counts", [(500, 0, 1, 64, 459), (0, 0, 1024, 0, 0), (205,) * 4 + (204,)])
def test_a_cpu_pads_groups_in_bf16_to_few_sizes_and_changes_nothing(counts, monkeypatch):
    layer = make_layer().bfloat16().experts
    sizes, mm = set(), torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: (sizes.update(a.shape), mm(a, b, out=out))[1]
    )

    def run() -> tuple[Tensor, list[Tensor]]:
        x = random(sum(counts), WIDTH).bfloat16().requires_grad_()
        out, computed = layer(x, torch.tensor(counts))
        assert computed == sum(counts)
        grad = random(*out.shape, seed=1).bfloat16()
        return out, list(torch.autograd.grad(out, (x, *layer.parameters()), grad))

    padded, padded_grads = run()
    assert all(size % moe.ALIGNED == 0 or size in (WIDTH, SIZE) for size in sizes)
    monkeypatch.setattr(moe, "needs_aligned_groups", lambda x, counts: False)
    exact, grads = run()
    assert torch.equal(padded, exact) and torch.equal(padded_grads[0], grads[0])
    # The sum over rows may be added in another order: one rounding of bf16.
    for grad, expected in zip(padded_grads[1:], grads[1:], strict=True):
        assert (grad - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_noise_is_standard_normal_and_belongs_to_the_row():
    tokens = random_batch(64, 32).tokens
    keys = token_keys(tokens)
    noise = moe.gaussian_noise(keys, 8)  # [64, 32, 8]
    assert noise.mean().abs() < 0.03 and abs(noise.var() - 1) < 0.04
    values = noise.flatten().sort().values
    ideal = torch.arange(1, len(values) + 1) / len(values)
    assert (torch.special.ndtr(values) - ideal).abs().max() < 1.63 / len(values) ** 0.5  # 1 %
    for dimension, length in enumerate(noise.shape):  # neighbouring rows, positions, experts
        pair = [noise.narrow(dimension, begin, length - 1).flatten() for begin in (0, 1)]
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 0.04
    assert torch.equal(token_keys(tokens[5:7]), keys[5:7])  # any micro-batch, any rank
    same_text = token_keys(tokens[:1].expand(2, -1))
    assert torch.equal(same_text[0], same_text[1]) and len(same_text[0].unique()) == 32
    # Numbers of rows tell equal rows apart, of one micro-batch, two of them, or two steps.
    text, rows = tokens[:1].expand(64, -1), torch.arange(64) + 1000
    keys_of_rows = token_keys(text, rows)
    assert len(keys_of_rows.unique()) == keys_of_rows.numel()
    assert torch.equal(token_keys(text[5:7], rows[5:7]), keys_of_rows[5:7])
    assert not torch.equal(token_keys(tokens, rows), token_keys(tokens[:, :].flip(0), rows).flip(0))
    of_rows = moe.gaussian_noise(keys_of_rows, 8).flatten(1)
    assert (torch.corrcoef(of_rows) - torch.eye(64)).abs().max() < 0.3
    assert of_rows.mean().abs() < 0.03 and abs(of_rows.var() - 1) < 0.04
    layers = [MoE(CONFIG.moe, WIDTH, SIZE, "swiglu", i).noise_offset for i in range(3)]
    by_layer = torch.stack([moe.gaussian_noise(keys + offset, 8).flatten() for offset in layers])
    assert (torch.corrcoef(by_layer) - torch.eye(3)).abs().max() < 0.04


def test_an_fsdp_unit_is_a_block_never_an_expert():
    """A unit that a rank skips, for lack of tokens, would hang the other ranks."""
    with setup.ranks():
        model = wrap_model_fsdp(NanoLlama(CONFIG, seed=0), ParallelConfig(dtype="float32"), CPU)
        units = [name for name, part in model.named_modules() if isinstance(part, FSDPModule)]
    assert units == ["", "layers.0", "layers.1"]


def test_equal_rows_of_a_step_get_different_noise():
    """Through the objective; the routes depend on the row's number, not on its micro-batch."""
    noisy = replace(CONFIG, moe=replace(CONFIG.moe, balance="none"))
    model, batch = NanoLlama(noisy, seed=0), random_batch(1)
    for layer in model.layers:
        layer.mlp.router.noise_weight.data.fill_(1.0)
    model.train()
    objective = next_token(0.0)

    def counts(*numbers: int) -> Tensor:
        tokens, targets = (field.expand(len(numbers), -1) for field in batch[:2])
        rows = torch.tensor(numbers, dtype=torch.int64)
        return objective(model, Batch(tokens, targets, None, rows))[1]["expert_counts"]

    with torch.no_grad():
        alone = [counts(number) for number in (3, 4, 9)]
        assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])
        assert torch.equal(counts(3, 4, 9), sum(alone))
        assert torch.equal(counts(9, 3), alone[0] + alone[2])
        model.eval()
        assert model(*batch[:2]).router is None


def test_widths_that_grouped_mm_cannot_take_are_refused_on_a_gpu_only():
    def complaint(dtype: torch.dtype, device: str, **sizes: int) -> str:
        settings = {"expert_size": 16, "shared_size": 8, "hidden_size": 16} | sizes
        hidden = settings.pop("hidden_size")
        model = NanoLlama(tiny_mixture(MoEConfig(**settings), hidden_size=hidden), seed=0)
        try:
            check_alignment(model, dtype, torch.device(device))
        except ValueError as error:
            return str(error)
        return ""

    assert complaint(torch.bfloat16, "cuda") == ""
    for size in ({"expert_size": 12}, {"shared_size": 4}):
        assert complaint(torch.float32, "cuda", **size) == ""
        assert complaint(torch.bfloat16, "cpu", **size) == ""
        message = complaint(torch.bfloat16, "cuda", **size)
        assert "in bfloat16 on a GPU the widths of experts must be multiples of 8" in message
        [[name, value]] = size.items()
        assert f"[{1 if name == 'shared_size' else 8}, {value}, 16]" in message
        # torch agrees, on its stand-in for a GPU's tensors.
        x, weight = torch.empty(8, value, device="meta"), torch.empty(2, 16, value, device="meta")
        x, weight = x.bfloat16(), weight.bfloat16()
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            F.grouped_mm(x, weight.mT, offs=torch.empty(2, dtype=torch.int32, device="meta"))
    for path in sorted((ROOT / "configs" / "moe").glob("*.yaml")):
        content = read_yaml_file(path)
        if "phases" in content or "speedrun" in path.name:
            continue
        config = load(path).model
        assert (config.moe.size(config.intermediate_size) % 8, config.hidden_size % 8) == (0, 0)


def test_padding_after_the_last_target_counts_nowhere():
    plain = replace(CONFIG, moe=replace(CONFIG.moe, router="top_k"))
    model, batch = NanoLlama(plain, seed=0), random_batch()
    targets = batch.targets.clone()
    targets[:, 10:] = targets[:, 2] = IGNORE  # padding, and a prompt token in between
    padded = model(batch.tokens, targets).router
    cut = model(batch.tokens[:, :10], targets[:, :10]).router
    assert torch.equal(padded.counts, cut.counts) and padded.counts.sum(1).tolist() == [80, 80]
    for name in ("balance", "z", "entropy"):
        assert (getattr(padded, name) - getattr(cut, name)).abs().max() <= 1e-5
    assert not padded.dropped.any()


def test_phases_may_differ_in_weights_and_rates_only():
    config = replace(CONFIG, moe=replace(CONFIG.moe, bias_rate=0.5, z_weight=0.0))
    assert fixed(config, "moe") == fixed(CONFIG, "moe")
    others = {"experts": 6, "top_k": 1, "router": "top_k", "balance": "none", "shared_size": 8}
    for name, value in others.items():
        changed = replace(CONFIG, moe=replace(CONFIG.moe, **{name: value}))
        assert fixed(changed, "moe") != fixed(CONFIG, "moe")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"balance": "bias", "balance_weight": 0.1}, "balance_weight=0.1 has no effect"),
        ({"balance": "loss", "bias_rate": 0.1}, "bias_rate=0.1 has no effect"),
        ({"experts": 4, "top_k": 5}, "top_k=5 is more than model.moe.experts=4"),
    ],
)
def test_settings_without_effect_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        MoEConfig(**settings)


def test_micro_batches_and_checkpointed_activations_change_nothing():
    means, loads, gradients, _ = one_step()
    for micro, keep in ((1, "none"), (4, "full"), (2, "selective"), (1, "full")):
        other, counts, others, _ = one_step(micro, keep=keep)
        assert other == pytest.approx(means, abs=1e-5) and torch.equal(counts, loads)
        pairs = zip(others, gradients, strict=True)
        assert max((a - b).abs().max() for a, b in pairs) <= 1e-5


# ---- known faults: each check holds, and fails when the fault is put in


def check_router_is_fp32() -> None:
    """Scores that bfloat16 cannot tell apart still choose the larger one."""
    layer, x = make_layer(top_k=2), random(64, 8, WIDTH).bfloat16()
    layer.router.weight.data += 0.7  # large scores, small differences
    _, chosen, probabilities, _ = layer.router(x, None)
    exact = (x.double() @ layer.router.weight.double().T).softmax(-1)
    assert probabilities.dtype == torch.float32
    assert torch.equal(chosen.sort(-1).values, exact.topk(2).indices.sort(-1).values)


class Quiet:
    def event(self, *_: object, **__: object) -> None: ...


def bias_after(loads: Tensor) -> Tensor:
    layer = make_layer(balance="bias")
    Routing(layer, Quiet()).after_step(1, loads)  # type: ignore[arg-type]
    assert layer.router.bias is not None
    return layer.router.bias


def check_bias_follows_single_tokens() -> None:
    """An imbalance of one token in 2^24 changes the bias, in the right direction."""
    many = 2**24
    loads = torch.tensor([[many + 1, many - 1, many, many, many]])
    assert bias_after(loads).sign().tolist() == [-1, 1, 0, 0, 0]


def check_reduce_is_exact() -> None:
    """Loads are sums over ranks, without rounding."""
    with setup.ranks(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda total: total.mul_(2))  # two equal ranks
        counts = torch.tensor([[2**24 + 1, 3]])
        *_, loads = loop.reduce({"loss": torch.tensor(1.0), "expert_counts": counts}, 4)
    assert loads is not None and torch.equal(loads, 2 * counts)


def check_counts_cover_the_step() -> None:
    """Each token of each micro-batch counts top_k times, also with checkpointed activations."""
    _, loads, _, _ = one_step(micro=1, keep="full")
    assert loads.sum(1).tolist() == [64 * CONFIG.moe.top_k] * 2


def check_counters_start_at_zero() -> None:
    layer = make_layer(balance="bias")
    assert layer.router.bias is not None and not layer.router.bias.any()
    stats = layer(random(2, 9, WIDTH))[1]
    assert stats.counts.sum() == 2 * 9 * 2


def check_router_losses_reach_the_router() -> None:
    """The gradient of balance loss plus z-loss is their slope by finite differences."""
    layer, x = make_layer(balance="loss", balance_weight=1.0, z_weight=0.1), random(3, 9, WIDTH)
    targets = torch.ones(3, 9, dtype=torch.bool)
    targets[1, 4:] = False
    weight, direction = layer.router.weight, random(EXPERTS, WIDTH, seed=9)

    def loss(shift: float) -> tuple[Tensor, Tensor]:
        weight.data += shift * direction
        stats = RouterStats.stack([layer(x)[1]])
        weight.data -= shift * direction
        assert stats is not None
        return moe.router_loss_sum(stats, targets, layer.config)[0], stats.counts

    (above, counts), (below, counts_below) = loss(1e-3), loss(-1e-3)
    assert torch.equal(counts, counts_below)  # the shares of experts have no slope
    (gradient,) = torch.autograd.grad(loss(0.0)[0], weight)
    slope, expected = (gradient * direction).sum(), (above - below) / 2e-3
    assert abs(slope - expected) <= 0.01 * abs(expected) and abs(expected) > 0.1
    balance = replace(layer.config, z_weight=0.0)
    stats = RouterStats.stack([layer(x)[1]])
    assert stats is not None
    total, sums = moe.router_loss_sum(stats, targets, balance)
    assert total.requires_grad and torch.autograd.grad(total, weight)[0].abs().max() > 1e-3
    assert sums["balance_loss"].allclose(total)


def check_router_losses_equal_others() -> None:
    """For one row, balance is transformers' for Mixtral / top_k; z is arXiv:2202.08906's."""
    layer, x = make_layer(top_k=2), random(1, 9, WIDTH)
    stats, scores = layer(x)[1], x[0] @ layer.router.weight.T
    expected = load_balancing_loss_func((scores,), EXPERTS, 2) / 2
    assert abs(stats.balance.item() - expected.item()) <= 1e-5
    assert abs(stats.z.item() - scores.logsumexp(-1).square().mean().item()) <= 1e-4


def check_no_pair_is_dropped() -> None:
    stats = make_layer(top_k=2)(random(2, 9, WIDTH))[1]
    assert stats.dropped.item() == 0


def check_each_layer_has_its_own_loads() -> None:
    model = NanoLlama(CONFIG, seed=0)
    loads = torch.tensor([[9, 0, 1, 1, 1], [0, 9, 1, 1, 1]])
    Routing(model, Quiet()).after_step(1, loads)  # type: ignore[arg-type]
    first, second = (layer.mlp.router.bias for layer in model.layers)
    assert first[0] < 0 < first[1] and second[1] < 0 < second[0]


def check_idle_experts() -> None:
    """With all tokens at two experts, the outputs are right and the idle experts' gradients 0."""
    layer, x = make_layer(), random(2, 9, WIDTH).abs()
    layer.router.weight.data[[1, 3]] += 2.0
    out, stats = layer(x)
    assert stats.counts.tolist() == [0, 18, 0, 18, 0]
    assert (out - reference(layer, x.flatten(0, 1)).view_as(x)).abs().max() <= 1e-5
    out.square().sum().backward()
    sizes = layer.experts.up_proj.grad.abs().amax((1, 2))
    assert (sizes > 0).tolist() == [False, True, False, True, False]


def check_one_expert_teaches_the_router() -> None:
    """With top_k=1 the router has a gradient from the output alone."""
    layer = make_layer(top_k=1, balance="none")
    layer(random(2, 9, WIDTH))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3


def check_evaluation_leaves_no_trace() -> None:
    """Evaluation has no noise and changes no buffer; neither do forward and recomputation."""
    config = replace(CONFIG, moe=replace(CONFIG.moe, router="noisy_top_k"))
    *_, buffers = one_step(keep="full")
    assert not buffers["layers.0._checkpoint_wrapped_module.mlp.router.bias"].any()
    batch = random_batch()
    layer = make_layer(balance="bias").eval()
    layer(random(2, 9, WIDTH))
    assert not layer.router.bias.any()
    with setup.ranks():
        wrapped = wrap_model_fsdp(NanoLlama(config, seed=0), ParallelConfig(dtype="float32"), CPU)
        seen: list[TokenLosses] = []

        def evaluate(model: torch.nn.Module) -> dict[str, dict[str, float]]:
            seen.append(model(batch.tokens, batch.targets))
            return {}

        loop.validate(wrapped, evaluate)
        assert not any(layer.mlp.router.bias.any() for layer in wrapped.layers)
    quiet = NanoLlama(replace(config, moe=replace(config.moe, router="top_k")))
    quiet.load_state_dict(NanoLlama(config, seed=0).state_dict(), strict=False)
    assert (seen[0].nll - quiet(batch.tokens, batch.targets).nll).abs().max() <= 1e-5


def check_muon_treats_experts_one_by_one() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 6, 10))
    others = {"params": [torch.nn.Parameter(torch.zeros(1))]}
    optimizer = Muon([{"params": [weight], "muon": True}, others], lr=1.0, momentum=0.0)
    weight.grad = random(4, 6, 10)
    optimizer.step()
    expected = [orthogonalize(matrix[None])[0] for matrix in weight.grad]
    assert (weight + update_scale((6, 10), "rms") * torch.stack(expected)).abs().max() <= 1e-5


def check_saved_bias_is_fp32() -> None:
    model = NanoLlama(CONFIG, seed=0)
    bias = model.layers[0].mlp.router.bias  # type: ignore[union-attr]
    bias += 0.001 * torch.arange(EXPERTS) + 1  # type: ignore[operator]
    saved = hf.to_hf_tensors(CONFIG, model.state_dict(), torch.bfloat16)
    assert torch.equal(saved["model.layers.0.mlp.router.bias"], bias)
    assert saved["model.layers.0.mlp.router.weight"].dtype == torch.bfloat16


def edit(owner: Any, name: str, old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: the function owner.name with other source text."""

    def put_in(patch: pytest.MonkeyPatch) -> None:
        function = getattr(owner, name)
        source, scope = textwrap.dedent(inspect.getsource(function)), {}
        assert old in source
        code = "from __future__ import annotations\n" + source.replace(old, new)
        exec(code, dict(vars(sys.modules[function.__module__])), scope)
        patch.setattr(owner, name, scope[name])

    return put_in


def always_normalized(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MoEConfig, "normalized", True)


def counting(in_training: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: the layer counts in a buffer at each forward pass, also when recomputed.

    in_training: False counts in evaluation only.
    """

    def put_in(patch: pytest.MonkeyPatch) -> None:
        inner = MoE.forward

        def forward(self: MoE, *inputs: Any) -> Any:
            out, stats = inner(self, *inputs)
            if self.router.bias is not None and (in_training or not self.training):
                self.router.bias.add_(inputs[0].numel())
            return out, stats

        patch.setattr(MoE, "forward", forward)

    return put_in


FAULTS = [
    (
        check_router_is_fp32,
        "router in bfloat16",
        edit(
            moe.Router,
            "forward",
            "scores.logsumexp",
            "(scores := scores.bfloat16().float()).logsumexp",
        ),
    ),
    (
        check_bias_follows_single_tokens,
        "counts in bfloat16",
        edit(Routing, "after_step", "counts.sum() - counts", "counts.bfloat16().sum() - counts"),
    ),
    (check_reduce_is_exact, "counts in float32", edit(loop, "reduce", ".double()", ".float()")),
    (
        check_reduce_is_exact,
        "counts of one rank",
        edit(loop, "reduce", "loads = flat.long().view(loads.shape)", "pass"),
    ),
    (
        check_counts_cover_the_step,
        "counts of the last micro-batch",
        edit(loop, "backward", "totals.get(name, 0) + value", "value"),
    ),
    (
        check_counters_start_at_zero,
        "counters not initialised",
        edit(moe.Router, "stats", "torch.zeros(rows, experts,", "torch.full((rows, experts), 7,"),
    ),
    (
        check_router_losses_reach_the_router,
        "balance loss without gradient",
        edit(moe, "router_loss_sum", "stats.balance.sum(0)", "stats.balance.detach().sum(0)"),
    ),
    (
        check_router_losses_reach_the_router,
        "weight of the balance loss unused",
        edit(moe, "router_loss_sum", "weight = config.balance_weight", "weight = 0.0"),
    ),
    (
        check_router_losses_equal_others,
        "balance loss times the number of experts",
        edit(moe.Router, "stats", "experts * (shares", "experts * experts * (shares"),
    ),
    (
        check_router_losses_equal_others,
        "softmax taken twice",
        edit(moe.Router, "stats", "(probabilities * weight", "(probabilities.softmax(-1) * weight"),
    ),
    (
        check_router_losses_equal_others,
        "z-loss without the square",
        edit(moe.Router, "stats", "normalizer.square()", "normalizer"),
    ),
    (
        check_no_pair_is_dropped,
        "tokens of an expert lost",
        edit(MoE, "apply_experts", "order = pairs", "counts[0] = 0; order = pairs"),
    ),
    (
        check_each_layer_has_its_own_loads,
        "loads of the first layer for all",
        edit(Routing, "after_step", "zip(self.layers, loads,", "zip(self.layers, loads[[0, 0]],"),
    ),
    (
        check_idle_experts,
        "groups of idle experts left out",
        edit(moe.Experts, "forward", "counts.cumsum(0)", "counts[counts > 0].cumsum(0)"),
    ),
    (check_one_expert_teaches_the_router, "one expert divided by itself", always_normalized),
    (check_evaluation_leaves_no_trace, "counts at every forward pass", counting(True)),
    (check_evaluation_leaves_no_trace, "counts in evaluation", counting(False)),
    (
        check_evaluation_leaves_no_trace,
        "noise in evaluation",
        edit(NanoLlama, "forward", "if self.training:", "if True:"),
    ),
    (
        check_muon_treats_experts_one_by_one,
        "experts orthogonalised together",
        edit(
            muon._Round,
            "orthogonalize",
            "matrices.flatten(0, -3)",
            "matrices.flatten(0, -2)[None]",
        ),
    ),
    (
        check_saved_bias_is_fp32,
        "buffers in bfloat16",
        edit(hf, "stored_dtype", "torch.float32 if", "dtype if"),
    ),
]


@pytest.mark.parametrize(
    "check", dict.fromkeys(check for check, *_ in FAULTS), ids=lambda check: check.__name__
)
def test_known_faults_are_absent(check):
    check()


@pytest.mark.parametrize(
    ("check", "put_in"), [row[::2] for row in FAULTS], ids=[name for _, name, _ in FAULTS]
)
def test_a_check_fails_with_its_fault(check, put_in, monkeypatch):
    put_in(monkeypatch)
    with pytest.raises(AssertionError):
        check()
