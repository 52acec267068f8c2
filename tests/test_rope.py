"""YaRN compared with transformers and llama.cpp; phases that change it; refused settings."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, VOCAB, train_here
from test_training import losses, same_state
from transformers import AutoModelForCausalLM

from export.gguf import write_gguf
from inference.generation import generate
from inference.gguf_tokenizer import field, open_gguf, read_vocabulary
from inference.kv_cache import Cache, forward
from inference.llamacpp import LlamaCpp, find_library
from models.hf import from_hf_config, read_hf_config, save_hf, to_hf_config
from models.moe import MoEConfig
from models.nanollama import ModelConfig, NanoLlama
from models.rope import RopeScaling
from scripts import verify_checkpoint
from training.config import load, to_dict
from training.planning.plan import load_plan, scheduled_phases

TEST_MODE = ROOT / "configs" / "test_mode.yaml"
ORIGINAL = 16  # of 64 tokens
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MOE = {"kind": "moe", "moe": MoEConfig(experts=3)}
SHAPES = {
    "Llama": {},
    "Qwen3": {"qk_norm": True},
    "Mixtral": MOE,
    "Qwen3Moe": {**MOE, "qk_norm": True},
}
ATTENTION = {"attention_factor": 1.3}
BETAS = {"beta_fast": 4.0, "beta_slow": 0.5}
TOKENS = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0))


def yarn(**more) -> RopeScaling:
    settings = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, **more}
    return RopeScaling("yarn", **settings)


def tiny(scaling: RopeScaling | None, **shape) -> NanoLlama:
    """A model with random norms and matrices, whose logits depend on the positions."""
    model = NanoLlama(ModelConfig(**{**TINY, **shape}, rope_scaling=scaling), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_without_scaling_the_tables_are_unchanged():
    model = tiny(None)
    frequencies = 10_000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    angles = torch.outer(torch.arange(64, dtype=torch.float32), frequencies).repeat(1, 2)
    assert torch.equal(model.rotary.cos, angles.cos())
    assert torch.equal(model.rotary.sin, angles.sin())
    hf = to_hf_config(model.config, torch.float32, 0, 0, 1)
    assert "rope_scaling" not in hf
    assert hf["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [*((name, {}) for name in SHAPES), ("Llama", ATTENTION), ("Qwen3", BETAS)],
)
def test_logits_equal_those_of_transformers_inside_and_beyond_the_original_context(
    shape, settings, tmp_path
):
    model = tiny(yarn(**settings), **SHAPES[shape])
    save_hf(tmp_path, model.config, model.state_dict(), torch.float32, bos=0, eos=0, pad=1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == f"{shape}ForCausalLM"
    plain = NanoLlama(replace(model.config, rope_scaling=None)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, logits, unscaled = model(TOKENS), theirs(TOKENS).logits, plain(TOKENS)
    assert (ours - logits).abs().max() <= 1e-5
    for positions in (slice(2, ORIGINAL), slice(ORIGINAL, None)):
        assert (ours - unscaled)[:, positions].abs().max() > 0.1
    assert read_hf_config(tmp_path) == model.config
    theirs.save_pretrained(tmp_path / "again")
    assert read_hf_config(tmp_path / "again").rope_scaling == model.config.rope_scaling


def test_config_json_is_read_in_all_spellings():
    config = ModelConfig(**TINY, rope_scaling=yarn(attention_factor=1.3), rope_theta=5e5)
    hf = to_hf_config(config, torch.float32, 0, 0, 1)
    assert {**hf["rope_scaling"], "rope_theta": 5e5} == hf["rope_parameters"]
    for absent in ("rope_scaling", "rope_parameters"):
        assert from_hf_config({k: v for k, v in hf.items() if k != absent}) == config
    shape = {k: v for k, v in hf.items() if k not in ("rope_scaling", "rope_parameters")}

    def read(**section) -> RopeScaling | None:
        return from_hf_config({**shape, "rope_scaling": section}).rope_scaling

    assert read(type="yarn", factor=4.0, finetuned=True) == yarn(
        original_max_position_embeddings=64
    )
    assert read(rope_type="yarn", factor=2, beta_fast=None) == yarn(
        factor=2.0, original_max_position_embeddings=64
    )
    outside = {**shape, "original_max_position_embeddings": 16}  # as in Phi-3
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert from_hf_config({**outside, "rope_parameters": section}).rope_scaling == yarn()
    other = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    both = {"rope_scaling": other, "rope_parameters": {"rope_type": "default"}}
    assert from_hf_config({**shape, **both}).rope_scaling == yarn(factor=8.0)
    for wrong, message in (
        ({"rope_type": "linear", "factor": 2.0}, "does not support this model's rope_type"),
        ({"type": "llama3", "factor": 2.0}, "llama3 needs low_freq_factor and a larger"),
        ({"type": "longrope", "factor": 2.0}, "does not support this model's rope_type"),
        ({**section, "truncate": False}, "does not support this model's truncate"),
        ({**section, "mscale": 1.0, "mscale_all_dim": 0.7}, "this model's mscale"),
        ({"partial_rotary_factor": 0.5}, "this model's partial_rotary_factor"),
        ({"rope_type": "yarn"}, "must have a factor for YaRN"),
        ({**section, "factor": "4"}, "rope_scaling.factor='4' must be a finite number"),
        ({**section, "factor": 0.5}, "rope_scaling.factor=0.5 must be at least 1"),
        ({**section, "factor": [4]}, "must be a finite number"),
        ({**section, "original_max_position_embeddings": 10**400}, "original_max_position"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(**wrong)


def write_files(folder: Path, model: NanoLlama, store: Path) -> dict[str, Path]:
    """Save a model with the store's tokenizer, and export it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((store / "tokenizer" / name).read_bytes())
    save_hf(folder, model.config, model.state_dict(), torch.float32, bos=0, eos=0, pad=1)
    targets = {outtype: folder / f"{outtype}.gguf" for outtype in ("f32", "f16")}
    put = read_vocabulary(folder, VOCAB).put
    write_gguf(folder, targets, put, "m", threads=1, say=lambda line: None)
    return targets


@pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize(
    ("shape", "settings"), [*((name, {}) for name in SHAPES), ("Llama", ATTENTION)]
)
def test_llama_cpp_computes_the_same_logits(shape, settings, text_store, tmp_path):
    """Its key-value cache is f16, also for a file in f32."""
    model = tiny(yarn(**settings), **{**SHAPES[shape], "vocab_size": VOCAB})
    with torch.no_grad():
        expected = model(TOKENS[:1])[0]
    for path in write_files(tmp_path, model, text_store).values():
        with LlamaCpp(path, 64, threads=1) as runtime:
            logits = torch.from_numpy(runtime.feed(TOKENS[0].tolist(), last=64))
        assert (logits - expected).abs().max() < 0.01


def test_keys_of_gguf_files_and_what_llama_cpp_cannot_do(text_store, tmp_path):
    model = tiny(yarn(attention_factor=1.3), vocab_size=VOCAB)
    reader = open_gguf(write_files(tmp_path, model, text_store)["f32"])
    keys = {
        name: field(reader, f"llama.rope.scaling.{name}")
        for name in ("type", "factor", "original_context_length", "attn_factor")
    }
    ratio = 1.3 / (0.1 * math.log(4) + 1)
    assert keys.pop("attn_factor") == pytest.approx(ratio)
    assert keys == {"type": "yarn", "factor": 4.0, "original_context_length": ORIGINAL}
    for scaling in (yarn(), None):
        reader = open_gguf(
            write_files(tmp_path, tiny(scaling, vocab_size=VOCAB), text_store)["f32"]
        )
        assert field(reader, "llama.rope.scaling.attn_factor") is None
    assert field(reader, "llama.rope.scaling.type") is None
    with pytest.raises(ValueError, match=r"llama.cpp has beta_fast=32 .* but .* beta_fast 4"):
        write_files(tmp_path, tiny(yarn(beta_fast=4.0), vocab_size=VOCAB), text_store)


def test_generation_with_a_cache_equals_the_full_forward_pass():
    model = tiny(yarn())
    cache = Cache(model.config, 2, 64)
    hidden = [forward(model, part, cache) for part in TOKENS.split([10, 20, 1, 33], dim=1)]
    with torch.no_grad():
        logits = model(TOKENS)
    assert (torch.cat(hidden, 1) @ model.head_weight.T - logits).abs().max() <= 1e-5
    [reply] = generate(model, [TOKENS[0, :10].tolist()], 40)
    text = torch.tensor([[*TOKENS[0, :10].tolist(), *reply.tokens]])
    with torch.no_grad():
        assert reply.tokens == model(text)[0, 9:-1].argmax(-1).tolist()


LONG = (
    "model.max_position_embeddings=64",
    "data.sequence_length=64",
    "data.micro_batch_size=2",
    f"model.rope_scaling={{type: yarn, factor: 4, original_max_position_embeddings: {ORIGINAL}}}",
)
SHORT = (f"model.max_position_embeddings={ORIGINAL}", f"data.sequence_length={ORIGINAL}")
ALLOW = "allow_rope_scaling_change=true"


@pytest.mark.one_layer
def test_a_phase_begins_with_yarn_and_resumes_bit_for_bit(settings, tmp_path, capfd):
    def phases(name: str, stops: list[int]) -> Path:
        place = lambda phase: f"output_dir={tmp_path / name / phase}"  # noqa: E731
        log = f"log_dir={tmp_path / name / 'logs'}"
        quiet = (log, "validation.every=0", "checkpoint.every=2")
        assert train_here(settings(place("one"), *quiet, *SHORT, steps=2))
        for stop in stops:
            more = (f"resume_from={tmp_path / name / 'one'}", f"until={stop}", *LONG, ALLOW)
            train_here(settings(place("two"), *quiet, *more, phase="two", steps=4))
        return tmp_path / name / "two" / "step_6"

    straight, stopped = phases("straight", [6]), phases("stopped", [3, 4, 6])
    assert same_state(straight, stopped, tmp_path)
    assert losses(tmp_path / "straight" / "logs") == losses(tmp_path / "stopped" / "logs")
    assert read_hf_config(straight).rope_scaling == yarn()
    output = capfd.readouterr().out
    assert "theta 10,000, YaRN factor 4 of 16 tokens" in output
    assert "model.rope_scaling changes from none to YaRN factor 4 of 16 tokens" in output


@pytest.mark.one_layer
def test_scaling_changes_only_where_it_is_allowed(settings, tmp_path):
    one = tmp_path / "checkpoints" / "one"
    quiet = ("validation.every=0", "checkpoint.every=2")
    assert train_here(settings(*quiet, *SHORT, steps=2))
    changed = "would change: .*step_2 was trained with none, but the config has YaRN factor 4 of 16"
    allow = changed + ".* or set allow_rope_scaling_change=true"
    start, log = f"init_from={one / 'step_2'}", f"log_dir={tmp_path / 'other'}"
    for more in ((f"resume_from={one}",), (start, log)):
        with pytest.raises(ValueError, match=allow):
            train_here(settings(*quiet, *LONG, *more, phase="two", steps=2))
    with pytest.raises(ValueError, match=changed + " tokens; make them equal$"):
        train_here(settings(*quiet, *LONG, ALLOW, steps=4))  # within the phase
    with pytest.raises(ValueError, match=r"would change: .*step_2 was trained with none"):
        train_here(settings(*quiet, *LONG, steps=4))
    assert train_here(settings(*quiet, *LONG, start, log, ALLOW, phase="three", steps=1))


def test_a_plan_whose_scalings_differ_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = yaml.safe_load(TEST_MODE.read_text(encoding="utf-8"))
    base |= {"schedule": {"warmup_steps": 1, "total_steps": 20, "decay_steps": 2}, "steps": 10}
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": ORIGINAL}
    long = {**base, "phase": "two", "model": {**base["model"], "rope_scaling": scaling}}
    plan = {"name": "p", "phases": [{"config": "one.yaml"}, {"config": "two.yaml"}]}

    def schedule(second: dict) -> list:
        for name, content in (("one", {**base, "phase": "one"}), ("two", second), ("plan", plan)):
            Path(f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return scheduled_phases(load_plan("plan.yaml"))

    with pytest.raises(ValueError, match=r"is none in one.yaml and YaRN .* in two.yaml"):
        schedule(long)
    assert len(schedule({**long, "allow_rope_scaling_change": True})) == 2


def test_settings_are_read_written_and_refused(tmp_path):
    run = load(TEST_MODE, list(LONG))
    assert run.model.rope_scaling == yarn()
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(run)), encoding="utf-8")
    assert load(path) == run
    section = "model.rope_scaling"
    original = f"{section}.original_max_position_embeddings"
    for overrides, message in (
        ([f"{section}.factor=0.5"], f"{section}.factor=0.5 must be at least 1"),
        ([f"{section}.type=linear"], f"{section}.type='linear' is not one of yarn"),
        ([f"{section}={{type: yarn, factor: 4}}"], f"{section} lacks original_max_position"),
        ([f"{section}={{factor: 4}}"], f"{section} lacks type"),
        ([f"{section}.factor=2"], "covers 32 tokens (factor x original_max_position_embeddings)"),
        ([f"{original}=0"], f"{original}=0 must be at least 1"),
        ([f"{section}.beta_fast=0.5"], f"beta_fast=0.5 must be above {section}.beta_slow=1"),
        ([f"{section}.attention_factor=0"], f"{section}.attention_factor=0 must be above 0"),
        (["rope_theta=[10000, 500000]"], "rope_theta=[10000.0, 500000.0] cannot change over"),
        (["rope_theta=1"], f"{section} does not fit rope_theta=1"),
        (["rope_theta=1.1", f"{original}=1000000"], "does not fit rope_theta=1.1"),
        ([f"{original}=1"], f"{section} does not fit rope_theta=10000"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(TEST_MODE, [*LONG, *overrides])


@pytest.mark.one_layer
def test_a_checkpoint_is_verified_against_the_config_of_its_phase(
    settings, tmp_path, monkeypatch, capsys
):
    folder, logs = tmp_path / "checkpoints/tiny/one", tmp_path / "logs/tiny"
    places = (f"output_dir={folder}", f"log_dir={logs}", "run=tiny", "validation.every=0")
    assert train_here(settings(*places, *LONG, "checkpoint.every=1", steps=1))
    monkeypatch.chdir(tmp_path)

    def output(code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["x", str(folder / "step_1"), "--model"])
        with pytest.raises(SystemExit) as end:
            verify_checkpoint.main()
        assert end.value.code == code
        return capsys.readouterr().out

    assert ", YaRN factor 4 of 16 tokens, context 64 tokens" in output(0)
    path = logs / "one.config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["model"]["rope_scaling"] = None
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert "WRONG: model.rope_scaling is YaRN factor 4 of 16 tokens, but" in output(1)
