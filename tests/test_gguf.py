"""GGUF files compared with their checkpoint by gguf, transformers, llama.cpp; bad inputs, chat."""

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, complaint_of
from safetensors.torch import load_file, save_file

from data.chat.rendering import (
    CHAT_TOKENS,
    END_THOUGHT,
    IM_END,
    IM_START,
    START_THOUGHT,
    TOOL_CALL,
    Chat,
    jinja_template,
)
from data.chat.tokenizer import PROBE, save_chat_tokenizer
from data.chat.tools import TOOLS
from evals.engines import folder_hash
from export import gguf as gguf_export
from export.gguf import find_k_quantizer, tensor_type, write_gguf
from export.gguf_check import (
    MAX_KL,
    WRONG_FACTOR,
    compare,
    compare_tokens,
    fuzz,
    reference,
    table,
    verdict_of,
)
from export.gguf_plan import read_config
from inference.chat_session import ChatSession
from inference.gguf_tokenizer import build_tokenizer, field, open_gguf, read_vocabulary
from inference.llamacpp import LlamaCpp, find_library, quantise_rows
from inference.runners import GgufRunner, TorchRunner
from inference.sampling import Sampling
from models.hf import load_hf, save_hf
from models.moe import MoEConfig
from models.nanollama import ModelConfig, NanoLlama
from scripts import chat as chat_script
from scripts import check_gguf, export_gguf

gguf = pytest.importorskip("gguf")
runtime = pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")
libgguf = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("libgguf"), reason="libgguf is not installed"
)
# Fixed: which tokens use another expert after rounding depends on the text.
TEXT = (ROOT / "LICENSE").read_text()
SHAPES = {
    "dense": ModelConfig(
        392,
        256,
        512,
        3,
        8,
        2,
        max_position_embeddings=256,
        rope_theta=500_000.0,
        initializer_range=0.04,
    ),
    "qwen3": ModelConfig(400, 96, 256, 2, 4, 2, 128, 256, qk_norm=True, tie_word_embeddings=True),
    "tied": ModelConfig(
        392, 72, 160, 2, 4, 4, head_dim=20, max_position_embeddings=256, tie_word_embeddings=True
    ),
    "mixtral": ModelConfig(
        392,
        256,
        512,
        2,
        8,
        2,
        max_position_embeddings=256,
        initializer_range=0.04,
        kind="moe",
        moe=MoEConfig(experts=8, top_k=2),
    ),
}


@pytest.fixture(scope="module")
def folders(text_store, tmp_path_factory) -> dict[str, Path]:
    """Chat checkpoints of each shape with random weights and norms."""
    checkpoints = {}
    for name, config in SHAPES.items():
        folder = checkpoints[name] = tmp_path_factory.mktemp(name)
        chat = save_chat_tokenizer(folder, text_store / "tokenizer")
        model = NanoLlama(config, seed=1)
        draw = torch.Generator().manual_seed(0)
        weights = {
            k: v + (0.3 * torch.rand(v.shape, generator=draw) if v.dim() == 1 else 0)
            for k, v in model.state_dict().items()
        }
        save_hf(
            folder,
            config,
            weights,
            torch.float32 if name == "tied" else torch.bfloat16,
            **chat.config_ids,
        )
    return checkpoints


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """All outtypes of each shape."""
    return {
        name: make(folder, tmp_path_factory.mktemp("gguf"), *gguf_export.OUTTYPES)
        for name, folder in folders.items()
    }


def make(folder: Path, out: Path, *outtypes: str, **options) -> dict[str, Path]:
    targets = {outtype: out / f"m-{outtype}.gguf" for outtype in outtypes}
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_gguf(
        folder, targets, read_vocabulary(folder, size).put, "m", say=lambda line: None, **options
    )
    assert sorted(out.iterdir()) == sorted(targets.values())  # and no temporary file
    return targets


def test_keys_and_tensors(folders, files):
    for name, arch in (("dense", "llama"), ("qwen3", "qwen3")):
        config, chat = SHAPES[name], Chat.from_folder(folders[name])
        for outtype, path in files[name].items():
            reader = gguf.GGUFReader(path)
            numbers = {
                "block_count": config.num_hidden_layers,
                "context_length": 256,
                "embedding_length": config.hidden_size,
                "feed_forward_length": config.intermediate_size,
                "attention.head_count": config.num_attention_heads,
                "attention.head_count_kv": 2,
                "attention.key_length": config.resolved_head_dim,
                "attention.value_length": config.resolved_head_dim,
                "rope.dimension_count": config.resolved_head_dim,
                "rope.freq_base": config.rope_theta,
                "vocab_size": config.vocab_size,
            }
            assert {key: field(reader, f"{arch}.{key}") for key in numbers} == numbers
            assert field(reader, f"{arch}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
            assert field(reader, "general.architecture") == arch
            assert (
                field(reader, "general.file_type")
                == {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "bf16": 32}[outtype]
            )
            assert (
                field(reader, "tokenizer.ggml.pre") == "qwen2"
                and field(reader, "tokenizer.ggml.model") == "gpt2"
            )
            ids = {"bos": "<|endoftext|>", "eos": IM_END, "eot": IM_END, "padding": "<|pad|>"}
            for key, token in ids.items():
                assert field(reader, f"tokenizer.ggml.{key}_token_id") == chat.ids[token]
            assert field(reader, "tokenizer.ggml.add_bos_token") is False
            assert field(reader, "tokenizer.chat_template") == jinja_template()
            assert "generation -" not in jinja_template()
            tokens, types = (
                field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type")
            )
            assert len(tokens) == len(types) == config.vocab_size
            shown = {token for token, kind in zip(tokens, types, strict=True) if kind == 4}
            assert shown == {START_THOUGHT, END_THOUGHT, TOOL_CALL, "<|tool_response|>"}
            assert {token for token, kind in zip(tokens, types, strict=True) if kind == 3} == {
                *CHAT_TOKENS,
                *ids.values(),
            } - shown
            assert [token for token, kind in zip(tokens, types, strict=True) if kind == 5] == [
                f"[PAD{i}]" for i in range(392, config.vocab_size)
            ]
            assert all(tensor.data_offset % reader.alignment == 0 for tensor in reader.tensors)
            ends = [
                (tensor.data_offset, tensor.data_offset + tensor.n_bytes)
                for tensor in reader.tensors
            ]
            assert (
                all(one[1] <= other[0] for one, other in pairwise(ends))
                and ends[-1][1] <= path.stat().st_size
            )
            assert ("output.weight" in {t.name for t in reader.tensors}) == (
                not config.tie_word_embeddings
            )


def test_the_same_bytes_with_any_number_of_threads_and_files(folders, files, tmp_path):
    again = make(folders["dense"], tmp_path, "q8_0", "q4_k_m", threads=3)
    for outtype, path in again.items():
        assert path.read_bytes() == files["dense"][outtype].read_bytes()


@pytest.mark.parametrize("name", ["dense", "qwen3"])
def test_transformers_reads_the_checkpoint_back(name, folders, files):
    from transformers import AutoModelForCausalLM

    path = files[name]["f32"]
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = torch.randint(392, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = load_hf(folders[name])(tokens)
        assert (theirs(tokens).logits - ours).abs().max() < 1e-4


def test_types_of_q4_k_m_are_llama_cpps():
    def more(layers: int) -> set[int]:
        config = ModelConfig(num_hidden_layers=layers)
        kinds = {
            i: tensor_type("q4_k_m", f"blk.{i}.ffn_down.weight", (2048, 5632), config)
            for i in range(layers)
        }
        assert kinds == {
            i: tensor_type("q4_k_m", f"blk.{i}.attn_v.weight", (256, 2048), config)
            for i in range(layers)
        }
        return {i for i, kind in kinds.items() if kind == "Q6_K"}

    # chosen by llama_model_quantize
    assert more(22) == {0, 1, 4, 7, 10, 13, 16, 19, 20, 21}
    assert [more(n) for n in (1, 2, 7, 8)] == [{0}, {1}, {2, 5, 6}, {0, 3, 6, 7}]
    config = ModelConfig(num_hidden_layers=2)
    tied = ModelConfig(num_hidden_layers=2, tie_word_embeddings=True)
    for name, shape, shapes, expected in (
        ("output.weight", (32_000, 2048), config, "Q6_K"),
        ("token_embd.weight", (32_000, 2048), config, "Q4_K"),
        ("token_embd.weight", (32_000, 2048), tied, "Q6_K"),
        ("token_embd.weight", (32_000, 576), tied, "Q8_0"),
        ("blk.0.attn_q.weight", (576, 576), config, "Q5_0"),
        ("blk.1.ffn_down.weight", (576, 1504), config, "Q8_0"),
        ("blk.0.attn_q.weight", (80, 80), config, "F16"),
        ("blk.0.attn_norm.weight", (2048,), config, "F32"),
    ):
        assert tensor_type("q4_k_m", name, shape, shapes) == expected
    assert tensor_type("q8_0", "blk.0.attn_q.weight", (80, 80), config) == "F16"


@runtime
def test_rows_equal_llama_cpps_and_libggufs():
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32) ** 3
    for kind in ("Q8_0", "Q5_0"):
        number = gguf.GGMLQuantizationType[kind]
        assert (quantise_rows(rows, number) == gguf.quants.quantize(rows, number)).all()
    packed = pytest.importorskip("libgguf", reason="libgguf is not installed")
    for kind in ("Q4_K", "Q6_K"):
        number = gguf.GGMLQuantizationType[kind]
        assert (
            quantise_rows(rows, number)
            == np.asarray(packed.quantize_rows(rows, number)).reshape(64, -1)
        ).all()


def moe_folder(folder: Path, store: Path, kind: str, experts: int, width: int, inner: int) -> Path:
    """A random MixtralForCausalLM or Qwen3MoeForCausalLM of transformers with our tokenizer."""
    import transformers

    chat = save_chat_tokenizer(folder, store / "tokenizer")
    shape = {
        "vocab_size": 392,
        "hidden_size": width,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "num_local_experts": experts,
    }
    shape["moe_intermediate_size" if kind == "Qwen3Moe" else "intermediate_size"] = inner
    ids = {f"{name}_token_id": index for name, index in chat.config_ids.items()}
    torch.manual_seed(0)
    options = {
        "norm_topk_prob": True,
        "initializer_range": 0.05,
        "max_position_embeddings": 256,
        "dtype": "float32",
    }
    config = getattr(transformers, f"{kind}Config")(**shape, **options, **ids)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(std=0.5)  # few choices between experts are close
    model.save_pretrained(folder)
    return folder


@runtime
@pytest.mark.parametrize(
    ("kind", "experts", "width", "inner"),
    [("Qwen3Moe", 8, 256, 256), ("Qwen3Moe", 5, 96, 160), ("Mixtral", 5, 96, 160)],
)
def test_llama_cpp_computes_what_transformers_does_of_a_mixture_of_experts(
    kind, experts, width, inner, text_store, tmp_path
):
    from transformers import AutoModelForCausalLM

    folder = moe_folder(tmp_path / "moe", text_store, kind, experts, width, inner)
    written = make(folder, tmp_path / "out", *gguf_export.OUTTYPES)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = Chat.from_folder(folder).tokenizer.encode(TEXT).ids[:200]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)
    for outtype, limit in (MAX_KL | {"q4_k_m": 0.05}).items():
        with LlamaCpp(written[outtype], 256, threads=1) as llama:
            actual = torch.from_numpy(llama.feed(ids, last=len(ids)))
        kl = (expected.exp() * (expected - actual.log_softmax(-1))).sum(-1)
        # Rounding rarely selects another expert.
        assert kl.median() < limit and kl.mean() < WRONG_FACTOR * limit, outtype
    assert read_config(folder).num_parameters == model.num_parameters()
    reader = open_gguf(written["q4_k_m"])
    keys = {"expert_count": experts, "expert_used_count": 2, "feed_forward_length": inner}
    if kind == "Qwen3Moe":
        keys |= {"expert_feed_forward_length": inner, "feed_forward_length": 96}
    arch = "qwen3moe" if kind == "Qwen3Moe" else "llama"
    assert {key: field(reader, f"{arch}.{key}") for key in keys} == keys
    tensors = {tensor.name.removeprefix("blk.0."): tensor for tensor in reader.tensors}
    kinds = {
        name: tensors[f"{name}.weight"].tensor_type.name
        for name in ("attn_v", "attn_output", "ffn_up_exps", "ffn_gate_inp")
    }
    # llama-quant.cpp's rules for 8 experts and for rows that are not a multiple of 256
    eight, narrow = ("Q8_0", "Q5_1", "Q4_K", "F32"), ("Q5_0", "Q5_0", "Q5_0", "F32")
    assert tuple(kinds.values()) == (eight if experts == 8 else narrow)
    stacked = tensors["ffn_down_exps.weight"]
    rows = model.model.layers[0].mlp.experts.down_proj.detach().numpy()  # [experts, width, inner]
    assert (
        stacked.tensor_type.name == ("Q4_K" if experts == 8 else "Q5_0")
        and len(stacked.data) == experts
    )
    for one, data in zip(rows, stacked.data, strict=True):
        assert (quantise_rows(one, stacked.tensor_type) == data).all()


def test_what_of_a_mixture_of_experts_is_refused(text_store, tmp_path, monkeypatch, capsys):
    folder = moe_folder(tmp_path / "moe", text_store, "Qwen3Moe", 2, 32, 32)
    flags = ["--checkpoint", folder, "--outtype", "q8_0", "--outfile", tmp_path / "m.gguf"]
    capsys.readouterr()  # written by transformers
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [1]}, "layers without experts"),
        (
            {"num_local_experts": 3},
            "mlp.router.weight has shape (2, 32), but config.json implies (3, 32)",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert words in complaint_of(export_gguf.main, flags, capsys, monkeypatch)
    weights = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if "1.mlp.experts.0.up" not in name
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert "an expert is missing" in complaint_of(export_gguf.main, flags, capsys, monkeypatch)


@pytest.mark.parametrize(
    "settings", [{"balance": "bias"}, {"shared_size": 32}, {"top_k": 1}], ids=str
)
def test_a_router_that_mixtral_lacks_is_refused(settings, text_store, tmp_path):
    moe = MoEConfig(experts=4, **settings)
    config = ModelConfig(392, 32, 64, 1, 4, 2, max_position_embeddings=64, kind="moe", moe=moe)
    save_hf(tmp_path / "m", config, NanoLlama(config, seed=0).state_dict(), torch.float32)
    ((name, value),) = settings.items()
    words = rf"cannot be exported to GGUF: it has model\.moe\.{name}={value}.*or train with"
    with pytest.raises(ValueError, match=words):
        write_gguf(tmp_path / "m", {"f16": tmp_path / "m.gguf"}, lambda writer: None, "m")


@libgguf
def test_without_llama_cpp_libgguf_writes_the_same_file(folders, files, tmp_path, monkeypatch):
    def missing():
        raise ValueError("none")

    monkeypatch.setattr("inference.llamacpp.library", missing)
    assert find_k_quantizer() is not quantise_rows
    assert (
        make(folders["dense"], tmp_path, "q4_k_m")["q4_k_m"].read_bytes()
        == files["dense"]["q4_k_m"].read_bytes()
    )


@runtime
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_what_the_checkpoint_does(name, folders, files):
    ref = reference(folders[name], TEXT, tokens=400, strings=150, new=20)
    for outtype, path in files[name].items():
        row = compare(path, ref, threads=1)
        assert row["verdict"] == "ok", (outtype, row["because"])
        assert (
            row["outtype"] == outtype
            and row["tokenizer"]["mismatches"] == row["tokenizer"]["decoded_otherwise"] == 0
        )
        if outtype in ("f32", "f16"):
            # A token that rounding sends to another expert is off by more.
            assert row.get("median_error", row["max_error"]) < 0.02
            assert row.get("median_kl", row["kl"]) < 1e-5
            assert row["perplexity"] == pytest.approx(row["checkpoint_perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    "error, kl, verdict",
    [(0.05, 1e-6, "ok"), (0.07, 1e-6, "high"), (0.07, 2e-5, "wrong"), (0.7, 1e-6, "wrong")],
)
def test_the_worst_logit_alone_is_rounding_until_it_is_far_off(error, kl, verdict):
    row = {
        "weight_error": {},
        "tokenizer": {"mismatches": 0},
        "ends": True,
        "outtype": "f16",
        "greedy": {"largest_gap": 0.0},
    }
    assert verdict_of({**row, "max_error": error, "kl": kl}, logit_std=3.0)[0] == verdict
    # In a mixture of experts the limits hold for the median token, and WRONG_FACTOR for the mean.
    medians = {"median_error": error, "median_kl": kl}
    for mean, expected in ((9e-5, verdict), (2e-4, "wrong")):
        mixture = {**row, **medians, "max_error": 1.0, "kl": mean}
        assert verdict_of(mixture, logit_std=3.0)[0] == expected


@runtime
def test_what_the_check_is_there_for_is_found(folders, tmp_path, monkeypatch):
    ref = reference(folders["dense"], TEXT, tokens=400, strings=300, new=20)
    vocabulary = read_vocabulary(folders["dense"], 392)
    wrong = vocabulary._replace(
        pre="gpt-2", types=[kind if kind != 4 else 3 for kind in vocabulary.types]
    )
    write_gguf(folders["dense"], {"f16": tmp_path / "words.gguf"}, wrong.put, "m")
    row = compare(tmp_path / "words.gguf", ref, threads=1)
    assert (
        row["verdict"] == "wrong"
        and row["tokenizer"]["mismatches"] > 20
        and row["max_error"] < 0.02
    )
    monkeypatch.setattr(gguf_export, "permute", lambda weight, heads: weight)
    path = make(folders["dense"], tmp_path / "turned", "f16")["f16"]
    row = compare(path, ref, threads=1)
    assert row["verdict"] == "wrong" and row["max_error"] > 0.1 and row["weight_error"]["F16"] > 0.5
    # Other shapes and another vocabulary.
    other_file = make(folders["tied"], tmp_path / "other", "q8_0")["q8_0"]
    row = compare(other_file, ref, threads=1)
    assert (
        row["verdict"] == "wrong"
        and "contains another model: token_embd.weight" in row["because"][0]
    )
    assert "| m-q8_0.gguf | 0.3 | wrong | - | - |" in table([row])


@runtime
def test_5500_strings_get_the_same_ids_and_the_file_holds_the_tokenizer(folders, files):
    chat = Chat.from_folder(folders["dense"])
    texts = fuzz(TEXT, 5500)
    with LlamaCpp(files["dense"]["q8_0"], 64) as llama:
        comparison = compare_tokens(texts, chat.tokenizer, llama)
        assert (
            comparison["strings"] == 11_000
            and comparison["mismatches"] == 0
            and comparison["decoded_otherwise"] == 0
        )
        assert llama.ends_reply(chat.ids[IM_END]) and not llama.ends_reply(chat.ids[IM_START])
    reader = open_gguf(files["dense"]["q8_0"])
    keys = (
        field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges", "pre")
    )
    rebuilt = build_tokenizer(*keys)
    for special in (False, True):
        rebuilt.encode_special_tokens = chat.tokenizer.encode_special_tokens = special
        assert [e.ids for e in rebuilt.encode_batch(texts)] == [
            e.ids for e in chat.tokenizer.encode_batch(texts)
        ]


@runtime
def test_checkpoint_and_file_say_the_same(folders, files):
    speakers = TorchRunner(folders["dense"]), GgufRunner(files["dense"]["f32"], threads=1)
    chat = Chat.from_folder(folders["dense"])
    prompt = chat.prompt([{"role": "user", "content": "Hello there"}])
    for sampling in (Sampling(), Sampling(1.2, temperature=0.8, top_p=0.9)):
        # Few tokens: llama.cpp keeps keys in f16.
        replies = [list(runner.generate(prompt, 10, sampling, 5, ())) for runner in speakers]
        assert replies[0] == replies[1] and len(replies[0]) == 10
        longer = [*prompt, *replies[0][:6], 40]  # the cache keeps the common prefix
        assert speakers[1].runtime.tokens[: len(prompt)] == prompt
        fresh = list(TorchRunner(folders["dense"]).generate(longer, 10, sampling, 6, ()))
        assert [list(runner.generate(longer, 10, sampling, 6, ())) for runner in speakers] == [
            fresh,
            fresh,
        ]
    stop = replies[0][3]
    assert (
        list(speakers[1].generate(prompt, 10, sampling, 5, [stop]))
        == replies[0][: replies[0].index(stop) + 1]
    )
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        list(speakers[1].generate(prompt, 256, sampling, 0, ()))


def test_a_session_runs_tools_and_shows_thoughts_apart(folders):
    chat = Chat.from_folder(folders["dense"])
    call = '{"name": "calculator", "arguments": {"expression": "17 * 23"}}'
    script = [
        f"{START_THOUGHT}ask{END_THOUGHT}Let me see.{TOOL_CALL}{call}{IM_END}",
        f"It is 391.{IM_END}",
        f"{TOOL_CALL}{{{IM_END}",
    ]
    chat.tokenizer.encode_special_tokens = False
    replies = [chat.tokenizer.encode(text).ids for text in [*script, "and so on"]]
    chat.tokenizer.encode_special_tokens = True
    prompts = []

    def speak(prompt):
        prompts.append(prompt)
        return iter(replies[len(prompts) - 1])

    session = ChatSession(chat, speak, "Be kind.", TOOLS)
    pieces = list(session.ask("How much is 17 * 23? <|im_end|>"))
    texts = {
        kind: "".join(text for part_kind, text in pieces if part_kind == kind)
        for kind in ("thought", "content", "call", "result")
    }
    assert texts == {
        "thought": "ask",
        "content": "Let me see.It is 391.",
        "call": "calculator(expression='17 * 23')",
        "result": "391",
    }
    assert len(pieces) > 6  # streamed
    assert [message["role"] for message in session.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert (
        prompts[1][: len(prompts[0])] == prompts[0] and prompts[0].count(chat.ids[IM_END]) == 2
    )  # typed special tokens are text
    messages_before = list(session.messages)
    assert (
        "invalid tool call" in list(session.ask("again"))[-1][1]
        and session.messages == messages_before
    )
    assert (
        "stopped at the token limit" in list(session.ask("again"))[-1][1]
        and session.messages[-1]["content"] == "and so on"
    )


def test_a_mistake_ends_a_turn_not_the_conversation(folders, files, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"long " * 300 + b"\n/reset\nhi \xff there\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(
        sys, "argv", ["x", "--model", str(folders["dense"]), "--max_new_tokens", "1", "--no_tools"]
    )
    chat_script.main()
    outputs = capsys.readouterr().out.split("> ")
    assert (
        "tokens fill the context of 256" in outputs[1]
        and len(outputs) == 5
        and "fill" not in outputs[3]
    )
    busy_socket = socket.create_server(("127.0.0.1", 0))
    for path, flags, words in (
        (folders["dense"], ["--max_new_tokens", 0], "--max_new_tokens 0 must be"),
        (folders["dense"], ["--context", -5], "--context -5 must be"),
        (files["dense"]["q8_0"], ["--serve", 0, "--context", -5], "--context -5 must be"),
        (files["dense"]["q8_0"], ["--serve", busy_socket.getsockname()[1]], "give another port"),
        (files["dense"]["q8_0"], ["--serve", 99_999], "give another port"),
    ):
        assert words in complaint_of(
            chat_script.main, ["--model", path, *flags], capsys, monkeypatch
        )
    busy_socket.close()


@runtime
def test_served_by_llama_cpp_with_our_template_to_openais_client(files, folders):
    pytest.importorskip("xllamacpp", reason="the server is xllamacpp's")
    openai = pytest.importorskip(
        "openai", reason="no openai: pip install -r requirements-parity.txt"
    )
    command = [
        sys.executable,
        "-m",
        "scripts.chat",
        "--model",
        str(files["dense"]["f32"]),
        "--serve",
        "0",
    ]
    server = forked.Process(command)
    try:
        while "/v1" not in server.stdout() and server.poll() is None:
            time.sleep(0.05)
        url = re.search(r"http://[^/]+", server.stdout())[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert len(client.models.list().data) == 1
        chat = Chat.from_folder(folders["dense"])
        asked = {"messages": PROBE["messages"][:2], "tools": PROBE["tools"]}
        rendered = client.with_options(base_url=url).post(
            "/apply-template", body=asked, cast_to=dict
        )["prompt"]
        assert rendered == chat.tokenizer.decode(chat.prompt(**asked), skip_special_tokens=False)
        calls = [
            {"id": i, "type": "function", "function": {"name": "f", "arguments": f'{{"x":"{i}"}}'}}
            for i in "ab"
        ]
        calling = {
            "role": "assistant",
            "content": None,
            "tool_calls": calls,
            "reasoning_content": "hm",
        }
        # Out of order.
        answers = [{"role": "tool", "content": f"{i}<|im_end|>", "tool_call_id": i} for i in "ba"]
        row = [PROBE["messages"][1], calling, *answers]
        rendered = client.with_options(base_url=url).post(
            "/apply-template", body={"messages": row}, cast_to=dict
        )["prompt"]
        assert rendered == chat.tokenizer.decode(chat.prompt(row), skip_special_tokens=False)
        messages = asked["messages"]
        request = {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(**request)
        prompt = chat.prompt(messages)
        ours = list(TorchRunner(folders["dense"]).generate(prompt, 8, Sampling(), 0, chat.stop_ids))
        assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(
            ours
        )
        text = answer.choices[0].message.content
        assert text.strip() == chat.tokenizer.decode(ours, skip_special_tokens=True).strip()
        pieces = [
            chunk.choices[0]
            for chunk in client.chat.completions.create(**request, stream=True)
            if chunk.choices
        ]
        texts = [piece.delta.content for piece in pieces if piece.delta.content]
        # An unfinished character waits for its end.
        assert "".join(texts) == text and len(texts) > 1
        assert pieces[-1].finish_reason == answer.choices[0].finish_reason
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


def test_mistakes_of_export_are_told_in_a_sentence_and_leave_nothing(
    folders, tmp_path, monkeypatch, capsys
):
    good, out = folders["dense"], tmp_path / "out"

    def failed(folder: Path, outtype="f16,q8_0", outfile="m-{outtype}.gguf") -> str:
        message = complaint_of(
            export_gguf.main,
            ["--checkpoint", folder, "--outtype", outtype, "--outfile", out / outfile],
            capsys,
            monkeypatch,
        )
        assert not out.exists() or not list(out.iterdir())
        return message

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    assert "is not a checkpoint" in failed(tmp_path)
    assert "'q3' is not one of" in failed(good, "f16,q3")
    assert "one name for 2 files" in failed(good, outfile="m.gguf")
    bare = copy("bare")
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in failed(bare)
    other = copy("other")
    content = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(
        json.dumps({**content, "pre_tokenizer": {"type": "Whitespace"}})
    )
    assert "uses no pre-tokenizer that llama.cpp has" in failed(other)
    (other / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "NFC"}}))
    assert "it has a normalizer" in failed(other)
    (other / "tokenizer.json").write_text("{")
    assert "tokenizer.json is damaged" in failed(other)
    cut = copy("cut")
    os.truncate(cut / "model.safetensors", 100_000)
    assert "is damaged" in failed(cut)
    config = json.loads((good / "config.json").read_text())
    (cut / "config.json").write_text("[1]")
    assert "config.json is damaged" in failed(cut)
    small = copy("small")
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert "more than the model's 300" in failed(small)
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert "differ in 9 tensors" in failed(small)
    for value, words in ((float("nan"), "not finite"), (1e9, "beyond the range of f16")):
        weights = {name: tensor.clone() for name, tensor in load_hf(good).state_dict().items()}
        weights["layers.1.mlp.up_proj.weight"][3, 3] = value
        save_hf(small, SHAPES["dense"], weights, torch.bfloat16, 0, 0, 0)
        assert words in failed(small)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000)
        )
        assert "free some space" in failed(good)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_export, "quantise", full)
    assert "No space left" in failed(good)


@runtime
def test_a_damaged_file_is_told_of(folders, files, tmp_path, monkeypatch, capsys):
    content = files["dense"]["f16"].read_bytes()
    path = tmp_path / "m.gguf"
    for size in (0, 3, 20, 5_000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        message = complaint_of(
            check_gguf.main, ["--checkpoint", folders["dense"], "--gguf", path], capsys, monkeypatch
        )
        assert "is damaged" in message or "is not a GGUF file" in message
        assert "m.gguf" in complaint_of(
            chat_script.main, ["--model", path, "--prompt", "hi"], capsys, monkeypatch
        )
        with pytest.raises(ValueError, match=r"is damaged|is not a GGUF file"):
            LlamaCpp(path)
    assert "is not a checkpoint: it has no config.json; give" in complaint_of(
        chat_script.main, ["--model", tmp_path], capsys, monkeypatch
    )


def test_the_card_tells_of_the_run_and_leaves_other_files_alone(
    folders, tmp_path, monkeypatch, capsys
):
    logs, results, out = tmp_path / "logs", tmp_path / "results", tmp_path / "out"
    for folder in (logs, results, out, tmp_path / "store"):
        folder.mkdir()
    for phase, lr in (("late", 0.5), ("early", 0.25)):
        data = (
            f"{{store: {tmp_path / 'store'}, mix: {{books: 1.0}}, tokens_per_step: 100, "
            f"sequence_length: 64}}"
        )
        (logs / f"{phase}.config.yaml").write_text(f"steps: 7\noptim: {{lr: {lr}}}\ndata: {data}\n")
    steps = [
        {"phase": "early" if step <= 7 else "late", "step": step, "tokens": 100 * step}
        for step in range(1, 22)
    ]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    gates = [
        {"event": "gate", "step": step, "text": f"go at step {step}: fine"} for step in (7, 21)
    ]
    (logs / "events.jsonl").write_text("".join(json.dumps(gate) + "\n" for gate in gates))
    shutil.copytree(folders["dense"], tmp_path / "late" / "step_14")
    (tmp_path / "store" / "report.json").write_text(
        '{"sources": {"books": {"documents": 9, "kept": 8, "train_tokens": 1234}}}'
    )
    acc = {"acc": {"value": 0.25, "stderr": 0.125, "n": 4}}
    for task, made_by in (("arc", folder_hash(folders["dense"])), ("mmlu", "another")):
        result = {"task": task, "metrics": acc, "n": 9, "shots": 25, "checkpoint_hash": made_by}
        (results / f"{task}.json").write_text(json.dumps(result))
    (results / "decision.json").write_text(json.dumps({"step": 14, "metrics": {"arc": acc}}))
    (out / "Modelfile").write_text("mine")
    flags = (
        "--outtype",
        "q8_0",
        "--outfile",
        out / "tiny.gguf",
        "--logs",
        logs,
        "--results",
        results,
    )
    monkeypatch.setattr(
        sys, "argv", ["x", "--checkpoint", str(tmp_path / "late" / "step_14"), *map(str, flags)]
    )
    export_gguf.main()
    assert (
        "Modelfile was not written by this command" in capsys.readouterr().out
        and (out / "Modelfile").read_text() == "mine"
    )
    card = (out / "README.md").read_text()
    early, late = (
        card.index(f"| {phase} | 7 | 700 | 64 | {lr} | books 1 |")
        for phase, lr in (("early", 0.25), ("late", 0.5))
    )
    assert early < late
    assert (
        "| books | 9 | 8 | 1,234 |" in card
        and "- go at step 7: fine" in card
        and "go at step 21" not in card
    )
    scores = card[card.index("## Scores") : card.index("## Licence")].splitlines()
    assert [line for line in scores if line.startswith("| ")][2:] == [
        "| arc | acc | 0.25 ± 0.12 | 25 | 4 |"
    ]
    assert "Not found: a contamination report" in card and "The owner's choice" in card
    (out / "Modelfile").unlink()
    export_gguf.main()
    assert "FROM ./tiny.gguf" in (out / "Modelfile").read_text()
