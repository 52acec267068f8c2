"""Folders of models with experts: equal to transformers both ways, exact settings, bad input."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import TINY, TOKENS, tiny
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from inference import kv_cache
from inference.generation import generate
from inference.kv_cache import Cache, decode_compiled, forward, logits
from inference.packed_weights import linear_ops
from models import hf_experts
from models.hf import config_json, load_hf, read_hf_config, save_hf
from models.moe import MoEConfig
from models.nanollama import NanoLlama

OWN = MoEConfig(experts=4, top_k=1, shared_size=48, balance="bias")  # no format of others has it


def tiny_moe(moe: MoEConfig | None = None, **more) -> NanoLlama:
    """tiny() with experts. Its biases, if any, are random."""
    model = tiny(kind="moe", moe=moe or MoEConfig(experts=4), **more)
    generator = torch.Generator().manual_seed(5)
    for buffer in model.buffers():
        if buffer.shape == (model.config.moe.experts,):
            buffer.copy_(0.01 * torch.randn(buffer.shape, generator=generator))
    return model


def save(folder: Path, model: NanoLlama, dtype: torch.dtype = torch.float32) -> None:
    save_hf(
        folder, model.config, model.state_dict(), dtype
    )  # no pad: transformers' gradient of its row is 0


def change_config(folder: Path, **changes) -> None:
    content = {**config_json(folder), **changes}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def theirs(model: torch.nn.Module, name: str, gradient: bool) -> torch.Tensor:
    """A parameter of a transformers model, or its gradient, by our name."""

    def get(name: str) -> torch.Tensor:
        parameter = model.get_parameter(name)
        return parameter.grad if gradient else parameter.detach()

    if name.startswith("lm_head"):
        return get(name)
    name = f"model.{name}".replace(".router.", ".gate.")
    for half, ours in enumerate(("gate_proj", "up_proj")):
        if name.endswith(f"experts.{ours}"):
            return get(name.replace(ours, "gate_up_proj")).chunk(2, dim=1)[half]
    return get(name)


def assert_equal_models(model: NanoLlama, reference: torch.nn.Module) -> None:
    """Compare logits, and each parameter's gradient of the mean cross-entropy."""
    assert (model(TOKENS) - reference(TOKENS).logits).abs().max() <= 1e-5
    reference(TOKENS, labels=TOKENS).loss.backward()
    model(TOKENS[:, :-1], TOKENS[:, 1:]).nll.mean().backward()
    for name, parameter in model.named_parameters():
        expected = theirs(reference, name, gradient=True)
        error = (parameter.grad - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, name


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ({}, MixtralForCausalLM),
        ({"tie_word_embeddings": True, "rope_theta": 500_000.0}, MixtralForCausalLM),
        ({"qk_norm": True, "head_dim": 16}, Qwen3MoeForCausalLM),
    ],
)
def test_our_folder_gives_the_same_logits_and_gradients_in_transformers(tmp_path, variant, kind):
    model = tiny_moe(**variant)
    save(tmp_path, model)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(reference) is kind
    assert_equal_models(model, reference)
    # transformers keeps unknown keys of config.json, and with them all settings of ours.
    reference.save_pretrained(tmp_path / "again")
    again = load_hf(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[k]) for k, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [MixtralForCausalLM, Qwen3MoeForCausalLM])
def test_a_transformers_folder_gives_the_same_logits_and_gradients_here(tmp_path, kind):
    torch.manual_seed(1)
    config_class, size = MixtralConfig, {"num_local_experts": 5}
    if kind is Qwen3MoeForCausalLM:
        config_class = Qwen3MoeConfig
        size = {"num_experts": 5, "moe_intermediate_size": 48, "norm_topk_prob": True}
    options = {"num_experts_per_tok": 3, "head_dim": 8, "initializer_range": 0.1}
    options["router_aux_loss_coef"] = 0.002 * TINY["num_hidden_layers"] / 3
    reference = kind(config_class(**TINY, **size, **options))
    reference.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    expert = 48 if kind is Qwen3MoeForCausalLM else TINY["intermediate_size"]
    weight = model.config.moe.balance_weight
    assert weight == pytest.approx(0.002)  # theirs: a mean over layers, shares that add up to 3
    moe = MoEConfig(experts=5, top_k=3, expert_size=expert, balance_weight=weight)
    assert model.config.moe == moe
    assert model.config.num_parameters == reference.num_parameters()
    assert_equal_models(model, reference)
    defaults = {"num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings"}
    written = config_json(tmp_path)
    changed = {key: value for key, value in written.items() if key not in defaults}
    (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    if kind is MixtralForCausalLM:  # a missing key has transformers' default
        config, default = read_hf_config(tmp_path), MixtralConfig(num_attention_heads=8)
        assert config.rope_theta == default.rope_parameters["rope_theta"]
        for name in defaults - {"rope_parameters"}:
            assert getattr(config, name) == getattr(default, name)


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(experts=3, balance_weight=0.02, z_weight=0.0),
        MoEConfig(expert_size=40, balance="none"),
        MoEConfig(experts=4, router="noisy_top_k"),
        MoEConfig(experts=4, top_k=3, balance="bias", bias_rate=0.01),
        OWN,
    ],
    ids=str,
)
def test_settings_survive_a_folder(moe, tmp_path):
    model = tiny_moe(moe)
    save(tmp_path, model, torch.bfloat16)
    again = load_hf(tmp_path, dtype=None)
    assert again.config == model.config
    mixtral = not moe.problem_of_mixtral
    assert config_json(tmp_path)["model_type"] == ("mixtral" if mixtral else hf_experts.OWN_TYPE)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("noise" in name for name in stored if mixtral)
    for name, value in model.state_dict().items():
        if name.endswith("noise_weight"):
            assert not again.state_dict()[name].any()
        elif name.endswith("router.bias"):  # its differences are below bfloat16's precision
            assert value.any() and torch.equal(again.state_dict()[name], value)
        else:
            assert torch.equal(again.state_dict()[name], value.bfloat16())


@pytest.mark.parametrize("moe", [MoEConfig(experts=4), OWN], ids=["mixtral", "own"])
def test_cached_logits_and_tokens_are_those_of_the_plain_forward(moe):
    model = tiny_moe(moe).eval()
    cache, lengths = Cache(model.config, 2, 37), [5, 13]
    with torch.no_grad():
        exact = model(TOKENS)
    out = logits(model, forward(model, TOKENS[:, :13], cache, lengths))  # right padding
    for row, count in enumerate(lengths):
        assert (out[row, :count] - exact[row, :count]).abs().max() <= 1e-5
    for width in (1, 7):
        starts = list(cache.lengths)
        chunk = torch.stack([TOKENS[row, at : at + width] for row, at in enumerate(starts)])
        out = logits(model, forward(model, chunk, cache))
        for row, at in enumerate(starts):
            assert (out[row] - exact[row, at : at + width]).abs().max() <= 1e-5
    prompts = [TOKENS[0, :4].tolist(), TOKENS[1, :9].tolist()]
    for row, prompt in zip(generate(model, prompts, 12), prompts, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in row.tokens:
                assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
                ids.append(token)


def test_packed_experts_follow_the_weights():
    model = tiny_moe().eval()
    x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = linear_ops(model, 3).layers[0].feed_forward(x)
        assert (before - model.layers[0].mlp(x[None])[0][0]).abs().max() <= 1e-6
        model.layers[0].mlp.experts.down_proj.mul_(2.0)
        assert torch.equal(linear_ops(model, 3).layers[0].feed_forward(x), 2 * before)


def test_the_compiled_step_with_experts_is_one_graph_and_changes_nothing(monkeypatch):
    compiled = torch.compile(kv_cache._decode, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(kv_cache, "_compiled_decode", lambda: compiled)
    model = tiny_moe(num_hidden_layers=1).eval()
    cache = Cache(model.config, 2, 12)
    forward(model, TOKENS[:, :9], cache)
    for at in (9, 10):  # other experts
        scores = decode_compiled(model, TOKENS[:, at], cache)
        with torch.no_grad():
            exact = model(TOKENS[:, : at + 1])[:, -1]
        assert (scores - exact).abs().max() <= 1e-5


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tmp_path / "m", tiny_moe(num_hidden_layers=1))
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, "does not support this model's sliding_window"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=4"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok='2' must be a whole number"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok=3 contradicts nanollama_moe"),
        ({"num_local_experts": True}, "num_local_experts=True must be a whole number"),
        ({"num_local_experts": 2**70}, "num_local_experts=1180591620717411303424 must be"),
        ({"nanollama_moe": [1]}, r"nanollama_moe=\[1\] must be an object"),
        ({"nanollama_moe": {}}, r"nanollama_moe=\{\} must be an object"),
        ({"nanollama_moe": {"intermediate_size": "8"}}, "nanollama_moe.intermediate_size='8' must"),
        ({"nanollama_moe": {"intermediate_size": 8, "top_k": "2"}}, "top_k='2' must be a whole"),
        ({"nanollama_moe": {"intermediate_size": 8, "router": ["x"]}}, "router=.* must be text"),
        ({"nanollama_moe": {"intermediate_size": 8, "bias_rate": -1}}, "bias_rate=-1 must not be"),
        ({"nanollama_moe": {"intermediate_size": 8, "lr": 1}}, "unknown key 'lr'; remove it"),
        ({"model_type": "nanollama_moe", "qk_norm": 1}, "qk_norm=1 in config.json must be true"),
    ],
    ids=str,
)
def test_a_wrong_config_ends_in_one_sentence(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_hf(folder)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_what_others_save_and_we_lack_is_named(folder):
    content = config_json(folder)
    del content["nanollama_moe"], content["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="num_local_experts is missing; it must be a whole number"):
        load_hf(folder)
    change_config(folder, num_local_experts=4, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="Mixtral with num_experts_per_tok=1 is not supported"):
        load_hf(folder)
    change_config(folder, model_type="nanollama_moe")
    with pytest.raises(ValueError, match="nanollama_moe=None must be an object"):
        load_hf(folder)


def test_wrong_weights_end_in_one_sentence(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    renamed = {name.replace("w2.weight", "w4.weight"): value for name, value in weights.items()}
    cases = {
        "down_proj: an expert is missing or differs in dtype or shape": {
            name: value for name, value in weights.items() if name != expert
        },
        "an expert is missing or differs in dtype": {**weights, expert: weights[expert][:, :3]},
        "differ in 2 weights, e.g. layers.0.mlp.experts.down_proj": renamed,
        r"mlp.router.weight is \(3, 64\) in .* but \(4, 64\) in the model": {
            **weights,
            "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(3, 64),
        },
    }
    for words, changed in cases.items():
        save_file({name: value.clone() for name, value in changed.items()}, path)
        with pytest.raises(ValueError, match=words) as error:
            load_hf(folder)
        assert str(folder) in str(error.value)
