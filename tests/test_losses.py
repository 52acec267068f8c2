"""The chunked head against the plain formula."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from models import losses
from models.losses import IGNORE, LossHead, token_loss_sum, token_losses


def plain(hidden, weight, targets, z_weight):
    """Sum cross-entropy and weighted squared logsumexp over unmasked targets, from full logits."""
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    valid = targets.flatten() != IGNORE
    ce = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return ce + z_weight * logits.logsumexp(-1)[valid].square().sum()


def example(dtype=torch.float32, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(29, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(29, (3, 11), generator=generator)
    targets[torch.rand(3, 11, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 33, 1000, None])
@pytest.mark.parametrize("z_weight", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_and_gradients_equal_the_plain_formula(chunk, z_weight, ignored):
    hidden, weight, targets = example(ignored=ignored)
    loss, sums = token_loss_sum(token_losses(hidden, weight, targets, chunk), z_weight)
    expected = plain(hidden, weight, targets, z_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums["loss"].item() + sums["z_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("chunk", [8, None])
def test_each_output_has_its_own_gradient(chunk):
    hidden, weight, targets = example()
    scale = torch.linspace(0.5, 2.0, targets.numel()).view_as(targets)
    logits = F.linear(hidden, weight)
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    losses = token_losses(hidden, weight, targets, chunk)
    for ours, plain_output in zip(losses[:2], (nll, lse), strict=True):
        a = torch.autograd.grad((ours * scale).sum(), (hidden, weight), retain_graph=True)
        b = torch.autograd.grad(
            (plain_output * scale * (targets != IGNORE)).sum(), (hidden, weight), retain_graph=True
        )
        assert all((x - y).abs().max() <= 1e-5 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("chunk", [8, None])
def test_ignored_targets_count_for_nothing(chunk):
    hidden, weight, targets = example()
    losses = token_losses(hidden, weight, targets, chunk)
    masked = targets == IGNORE
    assert (
        (losses.nll[masked] == 0).all()
        and (losses.logsumexp[masked] == 0).all()
        and (losses.nll[~masked] > 0).all()
    )
    nothing = token_losses(hidden, weight, torch.full_like(targets, IGNORE), chunk)
    loss, _ = token_loss_sum(nothing, 0.1)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_bf16_weights_sum_their_gradient_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8192, 64, generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(512, 64, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(512, (1, 8192), generator=generator)
    ours = torch.autograd.grad(token_losses(hidden, weight, targets, 64).nll.sum(), weight)[
        0
    ].float()
    exact_inputs = (hidden.detach().float(), weight.detach().float().requires_grad_())
    exact = torch.autograd.grad(plain(*exact_inputs, targets, 0.0), exact_inputs[1])[0]
    assert (
        ours - exact
    ).abs().max() <= 6e-3 * exact.abs().max()  # 3e-2 where chunks are summed in bf16


def test_whole_logits_are_never_built(monkeypatch):
    hidden, weight, targets = example()
    sizes = []
    linear = F.linear
    monkeypatch.setattr(
        "models.losses.F.linear", lambda *args: sizes.append(len(args[0])) or linear(*args)
    )
    token_loss_sum(token_losses(hidden, weight, targets, 8), 1e-4)[0].backward()
    assert max(sizes) == 8 and sum(sizes) == 2 * targets.numel()


@pytest.mark.parametrize(
    "backend, dtype, head",
    [
        ("aot_eager", torch.float32, LossHead()),
        ("aot_eager", torch.bfloat16, LossHead()),
        ("inductor", torch.bfloat16, LossHead()),
        ("aot_eager", torch.float32, LossHead(2.0, "isru", vocab_size=26)),
    ],
)
def test_compiled_equals_eager(backend, dtype, head, monkeypatch):
    """GPUs run the compiled loss. Chunks have 8 tokens, the last one 1."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    compiled_functions = {
        f: torch.compile(f, fullgraph=True, backend=backend)
        for f in (losses._forward, losses._backward)
    }
    monkeypatch.setattr(losses, "_compiled", compiled_functions.__getitem__)
    hidden, weight, targets = example(dtype)
    targets = targets.clamp_max(25)
    actual = []
    for compiled in (False, True):
        loss, _ = token_loss_sum(token_losses(hidden, weight, targets, 8, compiled, head=head), 0.1)
        actual.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for a, b in zip(*actual, strict=True):
        assert (a.float() - b.float()).abs().max() <= (
            1e-5 if dtype == torch.float32 else 2e-2
        ) * a.float().abs().max()


def test_logits_that_are_kept_are_few_and_give_the_same_losses_in_bf16(monkeypatch):
    hidden, weight, targets = example(torch.bfloat16)
    chunked = token_losses(hidden, weight, targets, 8)
    for ours, others in zip(token_losses(hidden, weight, targets)[:2], chunked[:2], strict=True):
        assert (ours - others).abs().max() <= 1e-5  # the logits are the same numbers
    sizes = []
    linear = F.linear
    monkeypatch.setattr(
        "models.losses.F.linear", lambda *args: sizes.append(args[0].numel()) or linear(*args)
    )
    monkeypatch.setattr("models.losses.MAX_KEPT_LOGITS", 33 * 29 - 1)
    token_losses(torch.cat([hidden] * 30, 1), weight, torch.cat([targets] * 30, 1))
    assert max(sizes) == 256 * 16  # chunks of 256 tokens, as on a CPU above the limit


CAPS = {  # kind -> (bound, reference)
    "none": (0.0, lambda z: z),
    "tanh": (2.0, lambda z: 2 * torch.tanh(z / 2)),
    "isru": (3.0, lambda z: 3 * z / torch.sqrt(z**2 + 9)),
    "sigmoid": (23.0, lambda z: 23 * torch.sigmoid((z + 5) / 7.5)),
}


@pytest.mark.parametrize("kind", CAPS)
@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25)])
def test_softcap_bias_padding_and_further_targets_equal_autograd_on_full_logits(
    kind, chunk, weights
):
    """29 rows, of which 26 are tokens; both outputs have their own gradients."""
    (hidden, weight, _), (bound, cap) = example(), CAPS[kind]
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(29, generator=generator).requires_grad_()
    targets = torch.randint(26, (3, 11, len(weights)), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORE
    log_probs = cap(F.linear(hidden, weight, bias)[..., :26].double())
    lse = log_probs.logsumexp(-1)
    nll = lse[..., None] - log_probs.gather(-1, targets.clamp_min(0))
    first = targets[..., 0] != IGNORE
    nll = (nll * torch.tensor(weights) * (targets != IGNORE) * first[..., None]).sum(-1)
    head = LossHead(bound, kind if bound else "tanh", vocab_size=26)
    targets = targets if len(weights) > 1 else targets[..., 0]
    ours = token_losses(
        hidden, weight, targets, chunk, bias=bias, head=head, target_weights=weights
    )
    scale = torch.linspace(0.1, 1.0, 33).view(3, 11)
    inputs = hidden, weight, bias
    for actual, expected in ((ours.nll, nll), (ours.logsumexp, lse * first)):
        assert (actual - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
        a = torch.autograd.grad((actual * scale).sum(), inputs, retain_graph=True)
        b = torch.autograd.grad((expected * scale).sum(), inputs, retain_graph=True)
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= 1e-6 * max(1, y.abs().max())


def test_a_saturated_softcap_has_no_gradient():
    for kind, (bound, _) in CAPS.items():
        if bound:
            head = LossHead(bound, kind)
            slope = head.slope(head.cap(torch.tensor([-1e8, 1e8])))
            assert slope.isfinite().all() and slope.abs().max() <= 1e-3


@pytest.mark.parametrize("chunk", [8, None])
def test_no_softcap_and_one_target_keep_every_bit(chunk):
    hidden, weight, targets = example()
    results = []
    for options in ({}, {"head": LossHead(vocab_size=29), "target_weights": (1.0,)}):
        for shape in (targets, targets[..., None]):
            losses = token_losses(hidden, weight, shape, chunk, **options)
            loss, _ = token_loss_sum(losses, 0.1)
            results.append([*losses[:2], *torch.autograd.grad(loss, (hidden, weight))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_float8_products_are_close_to_exact_ones(monkeypatch):
    """The arithmetic of the float8 head, which torch emulates on a CPU."""
    monkeypatch.setattr(losses, "_check_fp8", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 64, generator=generator).requires_grad_()
    weight = torch.randn(128, 64, generator=generator).mul_(0.1).requires_grad_()
    targets = torch.randint(128, (2, 32), generator=generator)
    results = []
    for head in (LossHead(), LossHead(fp8=True)):
        nll = token_losses(hidden, weight, targets, 32, head=head).nll
        results.append([nll, *torch.autograd.grad(nll.sum() / 1e4, (hidden, weight))])
    for exact, rounded in zip(*results, strict=True):
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.06
