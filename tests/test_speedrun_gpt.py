"""SpeedrunGPT compared with transformers' GPT-2; properties of each trick of the speedrun."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from models import losses as loss_head
from models.layers import RotaryEmbedding
from models.losses import IGNORE
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from models.speedrun_layers import query_factor, rotary_frequencies

TINY = GPTConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=32,
)
ROTARY = {"positions": "rotary", "rope_theta": 1024.0, "rope_fraction": 0.5}
TRICKS = {
    "rotary": {"positions": "rotary"},
    "rope_fraction": ROTARY,
    "rmsnorm": {"norm": "rmsnorm"},
    "norm_gains": {"norm_gains": False},
    "plain_rmsnorm": {"norm": "rmsnorm", "norm_gains": False},
    "biases": {"biases": False},
    "relu2": {"activation": "relu2"},
    "mlp_ratio": {"mlp_ratio": 2.5},
    "qk_norm": {"qk_norm": True},
    "zero_init": {"zero_init": True, "tie_word_embeddings": False},
    "fan_in": {"init": "fan_in", "tie_word_embeddings": False},
    "padded": {"vocab_multiple": 64},
    "untied": {"tie_word_embeddings": False, "vocab_multiple": 64},
    "head_bias": {"tie_word_embeddings": False, "head_bias": True, "vocab_multiple": 64},
    "embedding_norm": {"embedding_norm": True},
    "attention_scale": {"attention_scale": 0.12},
    "rotary_scale": {**ROTARY, "attention_scale": 0.12},
    "tanh": {"softcap": 3.0},
    "isru": {"softcap": 3.0, "softcap_kind": "isru", "vocab_multiple": 64},
    "sigmoid": {"softcap": 23.0, "softcap_kind": "sigmoid"},
    "embedding_skips": {"embedding_skips": True},
    "value_residual": {"value_residual": True, "layers_without_attention": (0,)},
    "unet_skips": {"unet_skips": True},
    "skips": {"skips": ((0, 2), (1, 3)), "skip_gates": True},
    "full_value_embeddings": {"value_embeddings": (0, 1, 2, 3)},
    "unet_value_embeddings": {"value_embeddings": (0, 1, 1, 0), "value_embedding_gates": True},
    "sparse_value_embeddings": {"value_embeddings": (0, -1, -1, 0)},
    "windows": {"short_window": 3, "long_window": 7, "window_pattern": "LSS"},
    "yarn": {**ROTARY, "long_window": 8, "yarn": True},
    "merged_qkv": {"merged_qkv": True},
    "smear": {"smear": True},
    "backout": {"backout_layer": 1},
    "attention_gate": {"attention_gate": True},
    "dropped": {"layers_without_attention": (2,), "layers_without_mlp": (0,)},
    "multi_token": {"multi_token_weights": (1.0, 0.5, 0.25)},
    "key_offset": {**ROTARY, "key_offset": True, "window_pattern": "LS", "short_window": 5},
    "paired": {**ROTARY, "paired_head_layers": (0, 2), "value_embeddings": (0, -1, -1, 0)},
    "bigram": {"bigram_vocab_size": 53, "bigram_signs": True, "embedding_skips": True},
}
ALL = {
    **ROTARY,
    "norm": "rmsnorm",
    "norm_gains": False,
    "biases": False,
    "activation": "relu2",
    "vocab_multiple": 64,
    "tie_word_embeddings": False,
    "embedding_norm": True,
    "softcap": 15.0,
    "multi_token_weights": (1.0, 0.5),
    "qk_norm": True,
    "attention_scale": 0.12,
    "merged_qkv": True,
    "attention_gate": True,
    "key_offset": True,
    "paired_head_layers": (2,),
    "layers_without_attention": (1,),
    "layers_without_mlp": (0,),
    "long_window": 12,
    "short_window": 5,
    "window_pattern": "LLS",
    "yarn": True,
    "embedding_skips": True,
    "value_residual": True,
    "unet_skips": True,
    "skip_gates": True,
    "value_embeddings": (0, -1, -1, 1),
    "value_embedding_gates": True,
    "smear": True,
    "backout_layer": 2,
    "bigram_vocab_size": 53,
    "bigram_signs": True,
}
TRICKS["all"] = ALL
TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
DOC_IDS = (torch.arange(24) >= torch.tensor([[10], [17]])).long()


def tiny(config: GPTConfig = TINY, **tricks) -> SpeedrunGPT:
    """A tiny model in which every parameter is random, so that errors cannot cancel."""
    model = SpeedrunGPT(replace(config, head_dim=None, **tricks), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: SpeedrunGPT, tokens=TOKENS, doc_ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, doc_ids=doc_ids)


def losses_and_gradients(model: SpeedrunGPT) -> list[torch.Tensor]:
    losses = model(TOKENS, TARGETS, DOC_IDS)
    losses.nll.sum().backward()
    return [losses.nll, *(parameter.grad for parameter in model.parameters())]


def assert_equal_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("merged", [False, True])
def test_defaults_give_the_logits_and_gradients_of_transformers(merged):
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=32, n_embd=32, n_layer=4, n_head=4, attn_pdrop=0.0,
            embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model = tiny(merged_qkv=merged)
    pairs = []  # our parameters [output, input], theirs [input, output]
    transformer = reference.transformer
    with torch.no_grad():
        for ours, theirs in (
            (model.embed_tokens, transformer.wte),
            (model.position_embed, transformer.wpe),
            (model.norm, transformer.ln_f),
        ):
            pairs += list(zip(ours.parameters(), theirs.parameters(), strict=True))
        for ours, theirs in zip(model.layers, transformer.h, strict=True):
            attention = ours.attn
            if merged:
                qkv = attention.qkv_weight, attention.qkv_bias
            else:
                projections = attention.q_proj, attention.k_proj, attention.v_proj
                qkv = [[getattr(p, part) for p in projections] for part in ("weight", "bias")]
            pairs += list(zip(qkv, theirs.attn.c_attn.parameters(), strict=True))
            for our_part, their_part in (
                (ours.attn_norm, theirs.ln_1),
                (attention.o_proj, theirs.attn.c_proj),
                (ours.mlp_norm, theirs.ln_2),
                (ours.mlp.up_proj, theirs.mlp.c_fc),
                (ours.mlp.down_proj, theirs.mlp.c_proj),
            ):
                pairs += list(zip(our_part.parameters(), their_part.parameters(), strict=True))

        def as_theirs(ours, theirs):
            stacked = torch.cat(ours) if isinstance(ours, list) else ours
            if theirs.ndim == 1:
                return stacked.flatten()
            table = theirs is transformer.wte.weight or theirs is transformer.wpe.weight
            return stacked if table else stacked.reshape(theirs.mT.shape).mT

        for ours, theirs in pairs:
            theirs.copy_(as_theirs(ours, theirs))
    assert len(pairs) == len(list(reference.parameters()))
    assert (logits(model) - reference(TOKENS).logits).abs().max() <= 1e-5
    F.cross_entropy(reference(TOKENS).logits.flatten(0, 1), TARGETS.flatten()).backward()
    model(TOKENS, TARGETS).nll.mean().backward()
    for ours, theirs in pairs:
        grad = [p.grad for p in ours] if isinstance(ours, list) else ours.grad
        assert (as_theirs(grad, theirs) - theirs.grad).abs().max() <= 1e-5


def test_initialisation_equals_that_of_transformers_in_distribution():
    weights = SpeedrunGPT(replace(TINY, hidden_size=256, head_dim=None), seed=0).state_dict()
    assert weights["layers.0.attn.q_proj.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["layers.3.mlp.down_proj.weight"].std() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert (weights["layers.1.attn_norm.weight"] == 1).all()
    assert (weights["layers.1.mlp.up_proj.bias"] == 0).all()


def test_published_sizes():
    assert GPTConfig().num_parameters == 124_439_808
    medium = GPTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    assert medium.num_parameters == 354_823_168


def test_flops_follow_the_palm_convention():
    matrices = 12 * 12 * 768**2 + 50_257 * 768  # the blocks and the head
    assert GPTConfig().flops_per_token(1024) == 6 * matrices + 12 * 12 * 768 * 1024
    windows = GPTConfig(short_window=100, window_pattern="LSSS")
    assert windows.flops_per_token(1024) == 6 * matrices + 12 * 768 * (3 * 1024 + 9 * 100)


@pytest.mark.parametrize("trick", TRICKS)
def test_losses_and_gradients_are_finite_and_every_parameter_has_one(trick):
    model = tiny(**TRICKS[trick])
    assert model.config.num_parameters == sum(p.numel() for p in model.parameters())
    baseline = losses_and_gradients(tiny())[0]
    losses, *gradients = losses_and_gradients(model)
    assert losses.shape == TOKENS.shape and losses.dtype == torch.float32
    assert not torch.equal(losses, baseline) or trick == "merged_qkv"
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("trick", TRICKS)
def test_tokens_see_neither_later_tokens_nor_other_documents(trick):
    model = tiny(**TRICKS[trick])
    later = TOKENS.clone()
    later[:, 13:] = (later[:, 13:] + 1) % 97
    assert torch.equal(logits(model)[:, :13], logits(model, later)[:, :13])
    assert not torch.equal(logits(model)[:, 13:], logits(model, later)[:, 13:])
    other = TOKENS.clone()
    other[0, :10] = (other[0, :10] + 1) % 97
    expected, actual = (logits(model, tokens, DOC_IDS)[0] for tokens in (TOKENS, other))
    assert torch.equal(expected[10:], actual[10:])
    assert not torch.equal(expected[:10], actual[:10])


@pytest.mark.parametrize("paired", [(), (0, 1)])
def test_logits_do_not_depend_on_tokens_before_the_windows(paired):
    tricks = {"paired_head_layers": paired, "positions": "rotary", "num_hidden_layers": 2}
    model = tiny(**tricks, short_window=4, long_window=6, window_pattern="SL")
    reach = 4 // 2 + 6 // 2 if paired else 4 - 1 + 6 - 1
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 97
    differs = (logits(model) != logits(model, changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(5, 5 + reach + 1))


@pytest.mark.parametrize("tricks", [{}, ROTARY, {**ROTARY, "paired_head_layers": (1,)}])
def test_a_window_of_the_whole_row_is_no_window(tricks):
    model = tiny(**tricks, window_pattern="LS", short_window=2, long_window=3)
    model.set_windows(48, 48)
    assert torch.equal(logits(model), logits(tiny(**tricks)))


def test_setters_give_the_model_that_has_the_values_in_its_config():
    model = tiny(window_pattern="LS", softcap=30.0, long_window=4)
    model.set_windows(3, 9)
    model.set_softcap(2.0)
    model.set_multi_token_weights((1.0, 0.5))
    expected = tiny(
        window_pattern="LS",
        short_window=3,
        long_window=9,
        softcap=2.0,
        multi_token_weights=(1.0, 0.5),
    )
    assert_equal_bits(losses_and_gradients(model), losses_and_gradients(expected))
    for call, message in (
        (lambda: model.set_windows(0, 4), "short_window=0 must be at least 1"),
        (lambda: model.set_softcap(-1.0), "softcap=-1 must not be negative"),
        (lambda: model.set_multi_token_weights(()), "must begin with a weight above 0"),
        (lambda: model.set_multi_token_weights((0.0, 1.0)), "must begin with a weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_setters_work_between_compiled_steps(monkeypatch):
    """Blocks and loss head are compiled as on a GPU: more values of each knob than recompiles."""
    torch._dynamo.reset()
    compile_eager = partial(torch.compile, fullgraph=True, backend="eager")
    heads = {f: compile_eager(f) for f in (loss_head._forward, loss_head._backward)}
    monkeypatch.setattr(loss_head, "_compiled", heads.__getitem__)
    tricks = {**ALL, "num_hidden_layers": 2, "layers_without_attention": ()}
    tricks |= {"value_embeddings": (0, 1), "paired_head_layers": (), "backout_layer": 0}
    eager, compiled = tiny(**tricks), tiny(**tricks)
    compiled.compile_head = True
    for block in compiled.layers:
        block.compile(fullgraph=True, backend="eager")
    for step in range(10):
        results = []
        for model in (compiled, eager):
            model.set_windows(3 + step, 6 + step)
            model.set_softcap(15.0 - step)
            model.set_multi_token_weights((1.0, 1 / (1 + step)))
            results.append(losses_and_gradients(model))
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


def test_yarn_depends_on_the_two_windows_alone_and_keeps_fast_channels():
    config = replace(TINY, **ROTARY, head_dim=128, long_window=2048, yarn=True)
    before, after = (rotary_frequencies(config, window) for window in (2048, 4096))
    turns = 2048 * before / (2 * torch.pi)
    assert torch.equal(before[turns > 32], after[turns > 32])
    assert torch.allclose(before[turns < 1] / 2, after[turns < 1])
    assert ((after <= before) & (after >= before / 2 - 1e-9)).all()
    assert query_factor(config, 2048) == 1 and query_factor(config, 4096) > 1.1
    model = tiny(**ROTARY, long_window=8, yarn=True)
    before = logits(model)
    for window in (12, 20, 8):
        model.set_windows(None, window)
    assert torch.equal(logits(model), before)


def test_full_rotation_has_the_frequencies_of_llama():
    config = replace(TINY, positions="rotary", head_dim=8)
    expected, actual = RotaryEmbedding(8, 32, 10_000.0), RotaryEmbedding(8, 32, 1.0)
    actual.set_frequencies(rotary_frequencies(config, None))
    assert torch.equal(actual.cos, expected.cos) and torch.equal(actual.sin, expected.sin)


def test_attention_scale_of_the_default_changes_nothing():
    for tricks in ({}, ROTARY):
        scaled = tiny(**tricks, attention_scale=8**-0.5)
        assert (logits(scaled) - logits(tiny(**tricks))).abs().max() <= 1e-5


def test_padding_of_the_vocabulary_is_never_predicted():
    model, padded = tiny(), tiny(vocab_multiple=64)
    with torch.no_grad():
        padded.load_state_dict(
            {
                **model.state_dict(),
                "embed_tokens.weight": torch.cat((model.embed_tokens.weight, torch.ones(31, 32))),
            }
        )
    assert (logits(padded) - logits(model)).abs().max() <= 1e-5
    ours, expected = losses_and_gradients(padded), losses_and_gradients(model)
    assert (ours[0] - expected[0]).abs().max() <= 1e-5
    assert (ours[1][:97] - expected[1]).abs().max() <= 1e-5 and not ours[1][97:].any()


def test_multi_token_losses_are_the_sum_over_the_next_tokens():
    model = tiny(multi_token_weights=(1.0, 0.5, 0.25))
    losses = model(TOKENS, TARGETS, DOC_IDS)
    log_probs = logits(model, TOKENS, DOC_IDS).log_softmax(-1)
    expected = torch.zeros(2, 24)
    for row in range(2):
        for t in range(24):
            for shift, weight in enumerate((1.0, 0.5, 0.25)):
                if t + shift < 24 and DOC_IDS[row, t + shift] == DOC_IDS[row, t]:
                    expected[row, t] -= weight * log_probs[row, t, TARGETS[row, t + shift]]
    assert (losses.nll - expected).abs().max() <= 1e-5
    masked = torch.where(torch.arange(24) % 2 == 0, IGNORE, TARGETS)
    assert (model(TOKENS, masked).nll[:, ::2] == 0).all()
    assert_equal_bits([model.eval()(TOKENS, TARGETS).nll], [tiny()(TOKENS, TARGETS).nll])


def test_value_embeddings_are_shared_by_the_layers_that_name_one_table():
    assert len(SpeedrunGPT(replace(TINY, value_embeddings=(0, 1, 1, 0))).value_embeds) == 2
    model = tiny(value_embeddings=(-1, -1, 0, -1))
    changed = tiny(value_embeddings=(-1, -1, 0, -1))
    with torch.no_grad():
        changed.value_embeds[0].weight[TOKENS[0, 5]] += 1
    differs = (logits(model) != logits(changed)).any(-1)[0]
    assert differs[TOKENS[0] == TOKENS[0, 5]].all() and not differs[:5].any()


def test_keys_are_offset_in_the_unrotated_channels_only():
    attention = tiny(**ROTARY, key_offset=True).layers[0].attn
    k = torch.randn(1, 4, 6, 8)
    starts = torch.tensor([[True, False, False, True, False, False]])
    offset = attention._offset_keys(k, starts)
    for t, source in enumerate((0, 0, 1, 3, 3, 4)):
        assert torch.equal(offset[:, :, t, [2, 3, 6, 7]], k[:, :, source, [2, 3, 6, 7]])
    assert torch.equal(offset[..., [0, 1, 4, 5]], k[..., [0, 1, 4, 5]])


def test_bigram_rows_follow_the_hash_and_documents():
    embedding = tiny(bigram_vocab_size=53).bigram_embed
    starts = torch.zeros(1, 4, dtype=torch.bool)
    starts[0, [0, 2]] = True
    rows = [52, (36313 * 7 ^ 27191 * 5) % 52, 52, (36313 * 96 ^ 27191 * 9) % 52]
    actual = embedding(torch.tensor([[5, 7, 9, 96]]), starts)
    assert torch.equal(actual[0], embedding.table.weight[rows])


def test_weights_do_not_depend_on_the_trick_that_reads_them_later():
    """A trick without parameters leaves the weights of a seed as they are."""
    plain = SpeedrunGPT(TINY, seed=7).state_dict()
    for trick in ("qk_norm", "windows", "tanh", "multi_token", "attention_scale"):
        weights = SpeedrunGPT(replace(TINY, **TRICKS[trick]), seed=7).state_dict()
        assert_equal_bits(list(weights.values()), list(plain.values()))


def test_zero_init_begins_with_equal_probabilities():
    config = replace(TINY, zero_init=True, tie_word_embeddings=False)
    nll = SpeedrunGPT(config, seed=0)(TOKENS, TARGETS).nll
    assert (nll - torch.tensor(97.0).log()).abs().max() <= 1e-5


@pytest.mark.parametrize("trick", ["all", "sparse_value_embeddings", "head_bias"])
def test_bf16_weights_give_bf16_activations_and_fp32_losses(trick):
    model = tiny(**TRICKS[trick]).bfloat16()
    dtypes = set()
    for block in model.layers:
        block.register_forward_hook(lambda *args: dtypes.add(args[-1][0].dtype))
    assert logits(model).dtype == torch.bfloat16
    assert model(TOKENS, TARGETS).nll.dtype == torch.float32
    assert dtypes == {torch.bfloat16}


def test_fp8_head_is_refused_in_training_on_a_cpu():
    model = tiny(fp8_head=True, vocab_multiple=16)
    with pytest.raises(ValueError, match=r"model.fp8_head needs an NVIDIA GPU .* not cpu; remove"):
        model(TOKENS, TARGETS)
    assert torch.equal(
        model.eval()(TOKENS, TARGETS).nll, tiny(vocab_multiple=16)(TOKENS, TARGETS).nll
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "batch"}, "model.norm='batch' is not one of layernorm, rmsnorm"),
        ({"hidden_size": 33}, "model.hidden_size=33 does not divide into 4 heads"),
        ({"softcap": -1.0}, "model.softcap=-1 must not be negative"),
        ({"rope_fraction": 1.5}, "model.rope_fraction=1.5 must be above 0 and at most 1"),
        ({"paired_head_layers": (4,)}, "model.paired_head_layers has layer 4, but the layers are"),
        ({"skips": ((2, 1),)}, r"model.skips has \[2, 1\]; give pairs"),
        ({"backout_layer": 4}, "model.backout_layer=4 must be below 4"),
        ({"window_pattern": "LX"}, "model.window_pattern='LX' must consist of the letters L and S"),
        ({"value_embeddings": (0, 1)}, "model.value_embeddings has 2 entries for 4 layers"),
        ({"value_embeddings": (0, 2, 0, 0)}, "model.value_embeddings=.* skips a table number"),
        ({"key_offset": True}, "model.key_offset needs model.positions=rotary"),
        ({"yarn": True, "positions": "rotary"}, "model.yarn needs model.long_window"),
        ({"short_window": 5}, "model.short_window has no effect without an S"),
        ({"bigram_vocab_size": 1}, "model.bigram_vocab_size=1 is too small"),
        ({"hidden_size": 8, "smear": True}, "model.hidden_size=8 must be at least 12 for gates"),
        ({"skip_gates": True}, "model.skip_gates needs model.skips or unet_skips"),
        ({"head_bias": True}, "model.head_bias needs an untied head"),
        ({"multi_token_weights": ()}, "model.multi_token_weights=.* must begin with a weight"),
        (
            {"layers_without_attention": (1,), "layers_without_mlp": (1,)},
            "model.layers_without_attention and layers_without_mlp both have layer 1",
        ),
        (
            {"layers_without_attention": (1,), "paired_head_layers": (1,)},
            "model.layers_without_attention has layer 1; remove it from",
        ),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, head_dim=None, **fields)


def test_a_row_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="33 tokens exceed the model's context of 32"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))
