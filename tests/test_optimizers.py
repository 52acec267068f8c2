"""Parameter groups by role and the options of AdamW: equal to torch's AdamW where they overlap."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch import nn

from models.nanollama import ModelConfig, NanoLlama
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from training.adamw import AdamW
from training.config import load
from training.optimizers import (
    GROUPS,
    GroupConfig,
    OptimConfig,
    build_optimizer,
    group_of,
    parameter_groups,
)
from training.planning.memory import optimizer_state_bytes

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_norm=True,
)
TRICKS = GPTConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=False,
    merged_qkv=True,
    attention_gate=True,
    unet_skips=True,
    skip_gates=True,
    smear=True,
    value_embeddings=(0, -1, -1, 0),
    bigram_vocab_size=40,
)


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names_by_group(model: nn.Module, config: OptimConfig) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names)  # every parameter once
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


# ---- groups


@pytest.mark.parametrize("tied", [False, True])
def test_groups_of_the_llama_model(tied):
    groups = names_by_group(
        NanoLlama(replace(MODEL, tie_word_embeddings=tied)), OptimConfig(name="muon")
    )
    assert groups["embedding"] == {"embed_tokens.weight"}
    assert groups.get("head", set()) == (set() if tied else {"lm_head.weight"})
    assert all("norm" in name for name in groups["vectors"]) and len(groups["vectors"]) == 9
    assert all(name.split(".")[-2].endswith("_proj") for name in groups["matrices"])
    assert len(groups["matrices"]) == 14 and "value_embeddings" not in groups


def test_groups_of_the_speedrun_model_and_its_muon_matrices():
    model, config = SpeedrunGPT(TRICKS, seed=0), OptimConfig(name="muon")
    groups = names_by_group(model, config)
    assert groups["embedding"] == {"embed_tokens.weight"} and groups["head"] == {"lm_head.weight"}
    assert groups["value_embeddings"] == {
        "position_embed.weight",
        "value_embeds.0.weight",
        "bigram_embed.table.weight",
    }
    kinds = ("qkv_weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")
    assert len(groups["matrices"]) == 16
    assert all(name.endswith(kinds) for name in groups["matrices"])
    gates = {name for name in groups["vectors"] if name.endswith("gate.weight")}
    assert {"skip_gate.weight", "smear.gate.weight"} < gates
    muon = [group for group in build_optimizer(model, config).param_groups if group["muon"]]
    assert [group["name"] for group in muon] == ["matrices"]
    assert {p.ndim for p in muon[0]["params"]} == {2, 3}


def test_a_tensor_of_one_dimension_is_never_a_matrix():
    for name in ("layers.0.self_attn.q_proj.bias", "embed_tokens.bias", "lm_head.bias", "scale"):
        assert group_of(name, torch.zeros(3)) == "vectors"
    assert group_of("lm_head.weight", torch.zeros(3, 3)) == "head"
    assert {group_of(n, torch.zeros(2, 3, 4)) for n in ("bank", "experts.up")} == {"matrices"}


def test_default_decay_is_of_matrices_and_head_and_each_group_replaces_its_settings():
    model = SpeedrunGPT(TRICKS, seed=0)
    config = OptimConfig(lr=2e-3, weight_decay=0.3)
    for group in parameter_groups(model, config):
        assert group["weight_decay"] == (0.3 if group["name"] in ("matrices", "head") else 0.0)
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.9, 0.95), 1e-8)
    changed = GroupConfig(lr=4.0, beta1=0.5, beta2=0.99, eps=1e-10, weight_decay=0.7)
    groups = parameter_groups(model, replace(config, groups={"vectors": changed}))
    group = next(group for group in groups if group["name"] == "vectors")
    values = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert values == (8e-3, (0.5, 0.99), 1e-10, 0.7)


@pytest.mark.parametrize("name", GROUPS)
def test_a_factor_on_a_group_is_adamw_with_that_rate_on_its_tensors_alone(name):
    model, start = SpeedrunGPT(TRICKS, seed=0), SpeedrunGPT(TRICKS, seed=0)
    config = OptimConfig(lr=1e-3, groups={name: GroupConfig(lr=8.0)})
    optimizer = build_optimizer(model, config)
    references = {}
    for key, parameter in start.named_parameters():
        group = group_of(key, parameter)
        references[key] = torch.optim.AdamW(
            [parameter],
            lr=8e-3 if group == name else 1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1 if group in ("matrices", "head") else 0.0,
            fused=True,
        )
    for step in range(3):
        gradients(model, step)
        gradients(start, step)
        optimizer.step()
        for reference in references.values():
            reference.step()
    for (key, actual), expected in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(actual, expected), key


# ---- AdamW's options


def test_cautious_decay_is_of_weights_that_the_update_shrinks():
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0))
    cautious, plain, bare = (nn.Parameter(weight.clone()) for _ in range(3))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95)}
    optimizers = (
        AdamW([{"params": [cautious], "weight_decay": 0.5}], cautious=True, **settings),
        torch.optim.AdamW([plain], weight_decay=0.5, fused=True, **settings),
        torch.optim.AdamW([bare], weight_decay=0.0, fused=True, **settings),
    )
    masks = []
    for step in range(3):
        before = cautious.detach().clone()
        gradient = torch.randn(200, generator=torch.Generator().manual_seed(9 + step))
        for parameter, optimizer in zip((cautious, plain, bare), optimizers, strict=True):
            parameter.data.copy_(before)  # the moments of all three stay equal
            parameter.grad = gradient.clone()
            optimizer.step()
        shrinks = (before - bare.detach()) * before >= 0
        expected = torch.where(shrinks, plain.detach(), bare.detach())
        assert (cautious - expected).abs().max() <= 1e-7
        masks.append(shrinks)
    assert all(50 < mask.sum() < 150 for mask in masks) and not torch.equal(masks[0], masks[2])
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.5


def test_updates_on_every_second_step_use_the_sum_of_gradients():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = AdamW([{"params": [ours], "weight_decay": 0.1}], 1e-2, every=2)
    reference = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(7):
        before, total = ours.detach().clone(), torch.zeros_like(start)
        for seed in range(step - step % 2, step + 1):
            generator = torch.Generator().manual_seed(seed)
            ours.grad = torch.randn(start.shape, generator=generator)
            total += ours.grad
        optimizer.step()
        if step % 2 == 0:
            assert torch.equal(ours, before)
            continue
        theirs.grad = total
        reference.step()
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.groups.norms.lr=2"], "optim.groups.norms is not a parameter group; there are mat"),
        (["optim.groups.head.lr=-1"], "optim.groups.head.lr=-1 must not be negative"),
        (["optim.groups.head.beta2=1"], "optim.groups.head.beta2=1 must be at least 0 and below 1"),
        (["optim.groups.head.rate=1"], "optim.groups.head.rate is not a setting"),
        (["optim.adam_every=2"], "optim.adam_every=2 needs optim.name=muon; with adamw, raise"),
        (["optim.adam_every=0", "optim.name=muon"], "optim.adam_every=0 must be at least 1"),
        (
            ["optim.groups.matrices.beta2=0.9", "optim.name=muon"],
            "optim.groups.matrices.beta2 has no effect on Muon",
        ),
        (["optim.muon_scale=large"], "optim.muon_scale='large' is not one of rms, spectral"),
        (["optim.muon_dtype=half"], "optim.muon_dtype='half' is not one of auto, bfloat16, float"),
        (["optim.muon_coefficients=x"], "is not one of polar_express, quintic, quintic12"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(ROOT / "configs" / "base_1b.yaml", overrides)


def test_a_group_that_the_model_lacks_is_refused():
    config = OptimConfig(groups={"value_embeddings": GroupConfig(lr=2.0)})
    with pytest.raises(ValueError, match=r"optim.groups.value_embeddings: the model has no .* it "):
        build_optimizer(NanoLlama(MODEL), config)


def test_bytes_of_the_state_with_every_option():
    config = OptimConfig(name="muon", normuon_beta2=0.95, adam_every=2)
    model = NanoLlama(MODEL, seed=0)
    optimizer = build_optimizer(model, config)
    gradients(model, 0)
    optimizer.step()
    actual = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert optimizer_state_bytes(MODEL, "ddp", 1, config) == pytest.approx(actual, rel=0.001)


def test_hooks_run_once_also_beside_an_optimizer_of_torch():
    """torch wraps the step of a class for its hooks when it makes the first instance."""
    weight = nn.Parameter(torch.ones(2))
    torch.optim.AdamW([weight])
    optimizer, calls = AdamW([{"params": [weight]}], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["before"]


@pytest.mark.parametrize(
    ("muon_dtype", "compute", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_newton_schulz_has_the_dtype_of_the_forward_pass(muon_dtype, compute, expected):
    updates = []
    for config, dtype in (
        (OptimConfig(name="muon", muon_dtype=muon_dtype), compute),
        (OptimConfig(name="muon", muon_dtype=str(expected).removeprefix("torch.")), None),
    ):
        torch.manual_seed(0)
        model = NanoLlama(MODEL)
        optimizer = build_optimizer(model, config, dtype)
        gradients(model, 0)
        optimizer.step()
        updates.append(model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.equal(*updates)
