"""NanoLlama compared with transformers; initialisation, document masks and limits."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.hf import from_hf_config, load_hf, resolve_checkpoint, save_hf
from models.layers import RotaryEmbedding, apply_rotary
from models.nanollama import ModelConfig, NanoLlama

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(**more) -> NanoLlama:
    """A tiny model with random norms and matrices, so that errors cannot cancel."""
    model = NanoLlama(ModelConfig(**{**TINY, **more}), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


TOKENS = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    "variant", [{}, {"qk_norm": True}, {"tie_word_embeddings": True}, {"head_dim": 16}]
)
def test_our_folder_gives_the_same_logits_in_transformers(tmp_path, theta, variant):
    model = tiny(rope_theta=theta, **variant)
    save_hf(tmp_path, model.config, model.state_dict(), torch.float32, bos=0, eos=0, pad=1)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(reference) is (Qwen3ForCausalLM if variant.get("qk_norm") else LlamaForCausalLM)
    assert (model(TOKENS) - reference(TOKENS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_a_transformers_folder_gives_the_same_logits_and_gradients_here(tmp_path, theta, kind):
    torch.manual_seed(1)
    config_class = LlamaConfig if kind is LlamaForCausalLM else Qwen3Config
    rope = {"rope_type": "default", "rope_theta": theta}
    hf_model = kind(
        config_class(
            **TINY,
            rope_parameters=rope,
            head_dim=8,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    hf_model.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    assert model.config.rope_theta == theta
    assert (model(TOKENS) - hf_model(TOKENS).logits).abs().max() <= 1e-5
    hf_model(TOKENS, labels=TOKENS).loss.backward()
    losses = model(TOKENS[:, :-1], TOKENS[:, 1:])
    losses.nll.mean().backward()
    for name, parameter in model.named_parameters():
        reference = hf_model.get_parameter(
            name if name.startswith("lm_head") else f"model.{name}"
        ).grad
        assert (parameter.grad - reference).abs().max() <= 1e-5, name


def test_theta_is_written_for_both_generations_of_transformers(tmp_path):
    model = tiny(rope_theta=500_000.0)
    save_hf(tmp_path, model.config, model.state_dict(), torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    for absent in ("rope_theta", "rope_parameters"):
        assert (
            from_hf_config({k: v for k, v in config.items() if k != absent}).rope_theta == 500_000.0
        )
    assert load_hf(tmp_path, dtype=None).norm.weight.dtype == torch.bfloat16


def test_a_phase_folder_stands_for_its_newest_model(tmp_path):
    for step in ("step_9", "step_10", "step_11"):
        (tmp_path / step).mkdir()
    for step in ("step_9", "step_10"):
        (tmp_path / step / "config.json").touch()
    # step_11 is still being written.
    assert resolve_checkpoint(str(tmp_path)) == tmp_path / "step_10"
    for folder in (tmp_path / "step_9", tmp_path / "step_11", tmp_path / "none.gguf"):
        assert resolve_checkpoint(str(folder)) == folder


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        from_hf_config({"model_type": "gpt2"})
    scaled = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "rope_scaling": {"rope_type": "longrope", "factor": 8.0},
    }
    with pytest.raises(ValueError, match="rope_type"):
        from_hf_config(scaled)


def test_parameter_count_of_the_1b_model():
    with torch.device("meta"):
        model = NanoLlama(ModelConfig())
    assert (
        sum(p.numel() for p in model.parameters()) == ModelConfig().num_parameters == 1_100_048_384
    )
    for variant in ({"qk_norm": True}, {"tie_word_embeddings": True}, {"head_dim": 16}):
        assert (
            sum(p.numel() for p in tiny(**variant).parameters())
            == tiny(**variant).config.num_parameters
        )


def test_initialisation_follows_its_table():
    config = ModelConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=700,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    weights = NanoLlama(config, seed=0).state_dict()
    for name, weight in weights.items():
        if "norm" in name:
            assert (weight == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(
                0.02 / math.sqrt(16) if residual else 0.02, rel=0.05
            ), name
    again = NanoLlama(config, seed=0).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_packed_documents_equal_the_same_documents_apart():
    model = tiny()
    lengths = (9, 1, 27)
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].expand(2, -1)
    packed = model(TOKENS, doc_ids=doc_ids)
    apart = torch.cat([model(part) for part in TOKENS.split(lengths, dim=1)], dim=1)
    assert (packed - apart).abs().max() <= 1e-5
    assert (packed - model(TOKENS)).abs().max() > 1e-2  # without the mask the neighbours are seen


def test_rotary_scores_depend_on_distance_only_and_are_exact_far_out():
    cos, sin = RotaryEmbedding(64, 16_384, 500_000.0)(16_384)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, 1, 1, 64, generator=generator),
        torch.randn(1, 1, 1, 64, generator=generator),
    )
    rotated_q, rotated_k = (
        apply_rotary(x.expand(1, 1, 16_384, 64), cos, sin)[0, 0] for x in (q, k)
    )
    scores = [float(rotated_q[position] @ rotated_k[position - 7]) for position in (7, 100, 16_383)]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-2)
    exact = 16_383.0 * 500_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (
        cos[16_383, :32].double() - exact.cos()
    ).abs().max() <= 2e-3  # fp32 angles of up to 16383 radians


def test_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens exceed the model's context of 64"):
        tiny()(torch.zeros(1, 65, dtype=torch.int64))
