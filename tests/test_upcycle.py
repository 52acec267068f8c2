"""A dense checkpoint becomes a mixture of experts, which every later stage then takes."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import complaint_of, read_metrics, save_tiny, tiny_config, train_here
from test_dpo import dpo_here
from test_sft import sft_here

from data.chat.tokenizer import FILES, save_chat_tokenizer
from data.chat.trained_chat import KEY, read_chat_defaults
from data.tokenizers.bpe import load_tokenizer
from evals import eval_lambada
from inference.open_model import open_model
from inference.sampling import Sampling
from models.hf import config_json, load_hf, save_hf
from models.moe import MoEConfig
from models.nanollama import NanoLlama
from scripts import upcycle

MIXTURE = MoEConfig(experts=4, top_k=2, expert_size=96)
# Which Mixtral cannot express.
OWN = MoEConfig(experts=4, top_k=1, shared_size=32, balance="bias", router="noisy_top_k")
FLAGS = ("--experts", 4, "--top_k", 2)


def run(main, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *map(str, arguments)])
        main()


@pytest.fixture(scope="module")
def dense(tmp_path_factory, text_store) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "base", tiny_config(), text_store)


@pytest.fixture(scope="module")
def mixture(dense) -> Path:
    """The dense checkpoint upcycled, with routers that spread tokens."""
    folder = dense.parent / "mixture"
    run(upcycle.main, "--checkpoint", dense, "--output_dir", folder, *FLAGS, "--router_std", 0.5)
    return folder


@pytest.mark.parametrize("k", [2, 4])
def test_the_mixture_computes_what_the_dense_model_does(k, dense, tmp_path, capsys):
    out = tmp_path / "new" / "mixture"
    run(upcycle.main, "--checkpoint", dense, "--output_dir", out, "--experts", 4, "--top_k", k)
    before, after = load_hf(dense), load_hf(out)
    assert after.config.moe == MoEConfig(experts=4, top_k=k, expert_size=96)
    tokens = torch.randint(384, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (after(tokens) - before(tokens)).abs().max() <= 1e-5
        losses = after(tokens, tokens)
    assert (losses.router.counts > 0).all()  # the routers use all experts
    text = capsys.readouterr().out
    for model in (before, after):
        assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert f"a token uses {after.config.num_active_parameters:,}" in text
    assert f"model.moe={{experts: 4, top_k: {k}, expert_size: 96}}" in text
    names = {path.name for path in dense.iterdir() if "tiktoken" not in path.name}
    assert {path.name for path in out.iterdir()} == names  # those of a training checkpoint
    ids = {name: config_json(out)[name] for name in ("bos_token_id", "eos_token_id")}
    assert ids == {name: config_json(dense)[name] for name in ids}
    assert [path.name for path in out.parent.iterdir()] == ["mixture"]  # no temporary folder


def test_noise_makes_experts_differ_by_its_size(dense, tmp_path):
    weights = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        flags = ("--output_dir", tmp_path / name, "--noise", 0.1, "--seed", seed, *FLAGS)
        run(upcycle.main, "--checkpoint", dense, *flags)
        weights[name] = load_hf(tmp_path / name).state_dict()
    original = load_hf(dense).state_dict()["layers.1.mlp.up_proj.weight"]
    copies = weights["one"]["layers.1.mlp.experts.up_proj"]
    assert (copies - original).std().item() == pytest.approx(0.1 * original.std().item(), rel=0.05)
    assert not torch.equal(copies[0], copies[1])
    same = {
        name: torch.equal(value, weights["again"][name]) for name, value in weights["one"].items()
    }
    assert all(same.values())
    assert not torch.equal(copies, weights["two"]["layers.1.mlp.experts.up_proj"])


def test_a_chat_model_keeps_its_template_and_its_chat_settings(dense, tmp_path):
    source = tmp_path / "chat"
    chat = save_chat_tokenizer(source, dense)
    config = tiny_config(vocab_size=chat.tokenizer.get_vocab_size(), tie_word_embeddings=True)
    trained = {KEY: {"context": 200, "thoughts": True}}
    weights = NanoLlama(config, seed=1).state_dict()
    save_hf(source, config, weights, torch.bfloat16, **chat.config_ids, **trained)
    run(upcycle.main, "--checkpoint", source, "--output_dir", tmp_path / "m", *FLAGS)
    for name in FILES:
        assert (tmp_path / "m" / name).read_bytes() == (source / name).read_bytes()
    assert read_chat_defaults(tmp_path / "m") == read_chat_defaults(source)
    assert load_hf(tmp_path / "m", dtype=None).layers[0].mlp.router.weight.dtype == torch.bfloat16
    chat_format, runner = open_model(tmp_path / "m", None)  # as scripts.chat does
    ids = runner.generate(chat.prompt([{"role": "user", "content": "Hi"}]), 5, Sampling(), 0, ())
    assert len(list(ids)) == 5 and chat_format


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--top_k", 1), "--top_k 1 would change what the model computes"),
        (("--top_k", 9), "model.moe.top_k=9 is more than model.moe.experts=8"),
        (("--noise", -1), "--noise: -1 must not be negative"),
        (("--router_std", 0), "--router_std: 0 must be above 0"),
        (("--experts", "many"), "--experts: invalid"),
        (("--output_dir", "{dense}"), "exists and is not empty; give a new folder"),
        (("--checkpoint", "{dense}/none"), "does not exist; check the path"),
        (("--checkpoint", "{mixture}"), "is already a mixture of experts; give a dense checkpoint"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, words, dense, mixture, tmp_path, monkeypatch, capsys):
    given = [str(flag).format(dense=dense, mixture=mixture) for flag in flags]
    arguments = ["--checkpoint", dense, "--output_dir", tmp_path / "m", *given]
    assert words in complaint_of(upcycle.main, arguments, capsys, monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_pretraining_continues_the_mixture(balance, mixture, settings, tmp_path):
    shape = ("hidden_size: 64", "intermediate_size: 96", "num_hidden_layers: 2")
    heads = ("vocab_size: 384", "num_attention_heads: 4", "num_key_value_heads: 2")
    moe = f"kind: moe, moe: {{experts: 4, top_k: 2, expert_size: 96, balance: {balance}}}"
    model = f"model={{{', '.join((*shape, *heads))}, {moe}}}"
    assert train_here(settings(f"init_from={mixture}", model, steps=2))
    rows = read_metrics(tmp_path / "logs")
    assert len(rows) == 2 and "max_violation" in rows[-1]
    model = load_hf(tmp_path / "checkpoints" / "one" / "step_2")
    assert (model.layers[0].mlp.router.bias is not None) == (balance == "bias")


@pytest.mark.parametrize(
    ("key", "before", "value"),
    [
        ("model.moe.top_k", 2, 1),
        ("model.num_attention_heads", 4, 2),
        ("model.rms_norm_eps", 1e-5, 1e-6),
    ],
)
def test_settings_that_no_shape_shows_are_those_of_the_base(key, before, value, mixture, settings):
    shape = ("hidden_size: 64", "intermediate_size: 96", "num_hidden_layers: 2", "vocab_size: 384")
    heads = {2: "2, num_key_value_heads: 1, head_dim: 32", 4: "4, num_key_value_heads: 2"}
    heads = heads[value if "heads" in key else 4]
    moe = "kind: moe, moe: {experts: 4, top_k: 2, expert_size: 96}"
    model = f"model={{{', '.join(shape)}, num_attention_heads: {heads}, {moe}}}"
    sentence = f"was trained with {key}={before}, but the config has {value}"
    with pytest.raises(ValueError, match=sentence):
        train_here(settings(f"init_from={mixture}", model, f"{key}={value}", steps=2))


@pytest.fixture(scope="module")
def own(tmp_path_factory, text_store) -> Path:
    """A checkpoint of the type that only NanoLlama reads."""
    folder = tmp_path_factory.mktemp("own") / "base"
    return save_tiny(folder, tiny_config(kind="moe", moe=OWN), text_store)


def test_sft_and_dpo_start_from_a_mixture(mixture, own, tmp_path):
    turns = [
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "It is said."},
    ]
    pair = {"prompt": "Say it.", "chosen": "It is said.", "rejected": "No."}
    for name, row in (("chats", {"messages": turns}), ("pairs", pair)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    common = (
        *("steps=2", "parallel={dtype: float32}", "validation.every=0", "optim={lr: 1e-3}"),
        "checkpoint={every: 2, asynchronous: false}",
    )
    for base in (mixture, own):
        where = tmp_path / base.parent.name
        sft = (
            f"chat={{sources: {{a: {{path: {tmp_path / 'chats.jsonl'}}}}}, "
            f"cache: {tmp_path / 'cache'}, val_fraction: 0}}",
            "data={mix: {a: 1}, sequence_length: 128, tokens_per_step: 256, micro_batch_size: 1}",
            *(f"init_from={base}", f"log_dir={where / 'sft'}", f"output_dir={where / 'a'}"),
        )
        assert sft_here(*common, *sft)
        dpo = (
            f"preferences={{sources: {{b: {{path: {tmp_path / 'pairs.jsonl'}}}}}, "
            f"cache: {tmp_path / 'cache'}, val_fraction: 0}}",
            "data={mix: {b: 1}, sequence_length: 128, pairs_per_step: 2, micro_batch_size: 2}",
            *(f"init_from={where / 'a'}", f"log_dir={where / 'dpo'}", f"output_dir={where / 'b'}"),
        )
        assert dpo_here(*common, *dpo)
        assert {"balance_loss", "router_entropy", "max_violation"} <= read_metrics(where / "sft")[
            -1
        ].keys()
        aligned = read_metrics(where / "dpo")[-1]
        assert "rewards/margins" in aligned and "balance_loss" not in aligned
        config = load_hf(where / "b" / "step_2").config
        before = MIXTURE if base == mixture else OWN  # fine-tuning: no noise, constant biases
        assert config.moe == replace(before, router="top_k", bias_rate=0.0)


def test_evaluations_read_every_mixture(mixture, own, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat and the dog"}\n' * 3, encoding="utf-8")
    for folder in (mixture, own):
        output = tmp_path / folder.parent.name
        flags = ("--checkpoint", folder, "--data", rows, "--output", output)
        run(lambda: eval_lambada.main(eval_lambada.parser(), eval_lambada.build), *flags)
        result = json.loads(output.read_text(encoding="utf-8"))
        context, word = load_tokenizer(folder).encode_batch(["the cat and the", " dog"])
        ids = torch.tensor([[*context.ids, *word.ids]])
        with torch.no_grad():
            nll = load_hf(folder).eval()(ids[:, :-1], ids[:, 1:]).nll[0, -len(word.ids) :].sum()
        assert math.log(result["metrics"]["perplexity"]["value"]) == pytest.approx(float(nll))
