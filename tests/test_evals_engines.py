"""NanoLlama, Transformers and llama.cpp agree on one checkpoint; ranks fail together."""

import json
import math
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import one_thread, save_tiny

from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import load_tokenizer, save_tokenizer
from evals import eval_needle, eval_perplexity, eval_tool_use
from evals.chat import CheckpointChat
from evals.engines import NanoLlamaEngine, TransformersEngine, folder_hash, load_model
from evals.harness import Cache, Choose, Item, Read, Write, run_items
from evals.language_model import EvalTokenizer
from export.gguf import write_gguf
from inference.gguf_tokenizer import read_vocabulary, tokenizer_folder
from inference.llamacpp import find_library
from models.hf import load_hf, save_hf
from models.nanollama import ModelConfig, NanoLlama

CONFIG = ModelConfig(400, 64, 128, 2, 4, 2, max_position_embeddings=1024, initializer_range=0.1)
TEXTS = [
    "def f(x):\n    return x",
    "The cat sat on the mat and",
    "import os\nimport sys\n",
    "1 + 2 = 3, so 20 + 1 =",
]
SHARED = (
    "Here is what they said of it, line after line, in so many words "
    "that a prefix is worth its keep.\n" * 12
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text_store) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "step_1"
    chat = save_chat_tokenizer(folder, text_store / "tokenizer")
    save_hf(
        folder, CONFIG, NanoLlama(CONFIG, seed=4).state_dict(), torch.float32, **chat.config_ids
    )
    return folder


def answers(model) -> list:
    """Return responses to requests of every kind.

    Sampled responses are compared within one engine only.
    """

    def score(item):
        drawn, again = yield [
            Write(item.id, (), 12, temperature=0.8, top_p=0.9, seed=3),
            Write(item.id, (), 9, 0.8, 0.9, 3),
        ]
        assert drawn.text.startswith(again.text.rstrip("\ufffd"))
        choices = [Choose(SHARED + item.id, (" yes", " no, not at all", " perhaps"))]
        choices += [Choose(item.id + " ", ("a", "bc de")), Choose("", (item.id,))]
        responses = yield [
            *choices,
            Write(item.id, (), 12),
            Read(item.id * 30, None),
            Read(item.id * 8, 7),
        ]
        return {"found": responses}

    samples = run_items([Item(text, {}) for text in TEXTS], score, model, Cache())
    return [answer for sample in samples for answer in sample.scores["found"]]


def assert_alike(responses: list, expected: list, tolerance: float) -> None:
    assert len(responses) == len(expected)
    for one, two in zip(responses, expected, strict=True):
        if isinstance(one, list):  # choices
            pairs = [(a.logprob, b.logprob) for a, b in zip(one, two, strict=True)]
            assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=tolerance)
            assert [(a.tokens, a.greedy) for a in one] == [(b.tokens, b.greedy) for b in two]
            assert max(pairs)[0] == max(a for a, _ in pairs) and max(
                pairs, key=lambda pair: pair[1]
            ) == max(pairs)
        elif hasattr(one, "text"):
            assert one == two
        else:
            assert (
                one.logprob == pytest.approx(two.logprob, abs=tolerance * one.tokens**0.5)
                and one[1:] == two[1:]
            )


def test_transformers_engine_equals_ours(checkpoint):
    ours = load_model(checkpoint, batch_size=3)
    theirs = load_model(checkpoint, batch_size=3)
    theirs.engine = TransformersEngine(checkpoint, "cpu", "float32", 3)
    assert (
        isinstance(ours.engine, NanoLlamaEngine) and theirs.engine.context == ours.context == 1024
    )
    assert_alike(answers(ours), answers(theirs), 2e-4)


def test_a_folder_of_another_architecture_is_read_by_transformers(checkpoint, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    net.save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer(checkpoint), tmp_path)
    model = load_model(tmp_path)
    assert (
        isinstance(model.engine, TransformersEngine)
        and model.context == 64
        and model.dtype == "float32"
    )
    [[[answer]]] = [
        batch
        for batch in (
            [a for _, a in part] for part in model.answer([Choose("The cat", (" sat down",))])
        )
    ]
    ids, full_ids = (model.tokenizer.encode([text])[0] for text in ("The cat", "The cat sat down"))
    with torch.no_grad():
        logprobs = net(torch.tensor([full_ids])).logits[0].log_softmax(-1)
    expected = sum(logprobs[i - 1, full_ids[i]].item() for i in range(len(ids), len(full_ids)))
    assert answer.logprob == pytest.approx(expected, abs=1e-4) and answer.tokens == len(
        full_ids
    ) - len(ids)


def test_a_folder_hash_includes_stop_tokens_and_template(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "step_1")
    hashes = [folder_hash(tmp_path / "step_1")]
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "step_1" / name).write_text('{"eos_token_id": [2, 5]}')
        hashes.append(folder_hash(tmp_path / "step_1"))
    assert hashes[0] == folder_hash(checkpoint) and len(set(hashes)) == 4


def files(checkpoint: Path, out: Path, *outtypes: str) -> dict[str, Path]:
    targets = {outtype: out / f"m-{outtype}.gguf" for outtype in outtypes}
    write_gguf(
        checkpoint,
        targets,
        read_vocabulary(checkpoint, CONFIG.vocab_size).put,
        "m",
        say=lambda line: None,
    )
    return targets


@pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")
def test_a_gguf_file_equals_its_checkpoint(checkpoint, text_store, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("xgrammar")
    expected = answers(load_model(checkpoint))
    for outtype, path in files(checkpoint, tmp_path, "f32", "f16").items():
        model = load_model(path)
        assert (
            model.context == 1024
            and model.dtype in ("gguf_f32", "gguf_f16")
            and outtype in model.dtype
        )
        assert_alike(expected, answers(model), 0.02)
    assert (
        EvalTokenizer(path).stops == EvalTokenizer(checkpoint).stops
        and EvalTokenizer(path).begin == EvalTokenizer(checkpoint).begin
    )
    talk = [{"role": "user", "content": "How much is 2 + 2? <|im_end|>"}]
    assert CheckpointChat(path).prompt(talk) == CheckpointChat(checkpoint).prompt(talk)
    with pytest.raises(ValueError, match="omit --dtype"):
        load_model(path, dtype="float32")

    def run(module, *arguments, folder=checkpoint):
        batches = []
        for name in (folder, path):
            output = tmp_path / "out" / name.stem / "found.json"
            command_line = [
                "--checkpoint",
                str(name),
                "--output",
                str(output),
                "--device",
                "cpu",
                *arguments,
            ]
            monkeypatch.setattr(sys, "argv", ["x", *command_line])
            if module is eval_perplexity:
                module.main()
            else:
                from evals.run import main

                main(module.parser(), module.build)
            batches.append(json.loads(output.read_text()))
        return batches

    save_tiny(tmp_path / "base", CONFIG, text_store, seed=4)
    windows = ["--stride", "512", "--sequence_length", "512", "--limit", "1"]
    one, two = run(
        eval_perplexity, "--dataset", str(text_store), *windows, folder=tmp_path / "base"
    )
    losses = [batches["metrics"]["all"]["loss"]["value"] for batches in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    one, two = run(
        eval_needle, "--context", "700", "--num_tests", "1", "--depths", "2", "--kinds", "single"
    )
    assert one["prompt_hash"] == two["prompt_hash"]
    for name, estimate in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(
            estimate["value"], abs=0.1 if "margin" in name else 0
        )
    function = {
        "name": "now",
        "parameters": {
            "type": "dict",
            "properties": {"zone": {"type": "integer"}},
            "required": ["zone"],
        },
    }
    row = {
        "question": [[{"role": "user", "content": "When?"}]],
        "function": [function],
        "ground_truth": [{"now": {"zone": [1]}}],
    }
    (tmp_path / "bfcl.jsonl").write_text(json.dumps({"id": "simple_python_0", **row}) + "\n")
    data = [
        "--data",
        str(tmp_path / "bfcl.jsonl"),
        "--categories",
        "simple_python",
        "--max_tokens",
        "60",
    ]
    one, two = run(eval_tool_use, *data)
    assert one["prompt_hash"] == two["prompt_hash"] and one["metrics"] == two["metrics"]
    assert two["metrics"]["constrained_syntax"]["value"] == 1.0


def test_bad_gguf_files(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="does not exist; check the path"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "odd.gguf").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_model(tmp_path / "odd.gguf")
    assert tokenizer_folder(tmp_path) == tmp_path


def test_nonfinite_logits_on_one_rank_end_both(checkpoint, tmp_path):
    """NaN occurs in a question that only the second rank scores."""
    words = EvalTokenizer(checkpoint)
    bad = next(i for i in range(300, 400) if words.decode([i]).strip().isalpha())
    model = load_hf(checkpoint)
    model.embed_tokens.weight.data[bad] = math.nan
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_hf(tmp_path, CONFIG, model.state_dict(), torch.float32, bos=0, eos=0, pad=1)
    rows = [
        {
            "activity_label": "T",
            "ctx_a": "zzz" + words.decode([bad]) * (i == 3),
            "ctx_b": "",
            "label": "0",
        }
        for i in range(4)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "endings": ["a b", "c d"]}) + "\n" for row in rows))
    suite, output = tmp_path / "suite.yaml", tmp_path / "suite" / "out.json"
    suite.write_text(f"evals: {{hellaswag: --data {data}}}\n")
    command = [
        "--checkpoint",
        str(tmp_path),
        "--device",
        "cpu",
        "--suite",
        str(suite),
        "--output",
        str(output),
    ]
    launch = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--nproc_per_node=2",
        "-m",
        "scripts.run_evals",
    ]
    done = forked.run([*launch, *command], env=one_thread(), timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "rank 1 of 2 failed" in done.stderr
        and "logits that are not finite in float32" in done.stderr
    )
