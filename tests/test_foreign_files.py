"""Untrusted GGUF files, chat templates and folders run no code and never crash or hang."""

import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, complaint_of, save_tiny, tiny_config
from test_foreign_checkpoints import Calls

from data.chat import bounded_template
from data.chat.bounded_template import BoundedTemplate
from data.chat.tokenizer import save_chat_tokenizer
from evals.chat import CheckpointChat
from export.gguf import write_gguf
from inference import llamacpp
from inference.chat_formats import TemplateFormat, open_chat_format
from inference.gguf_file import check_gguf
from inference.gguf_tokenizer import open_gguf, read_vocabulary
from inference.llamacpp import LlamaCpp, find_library, probe
from models.hf import load_hf
from scripts import chat as chat_script
from scripts import check_gguf as check_gguf_script

pytest.importorskip("gguf")
runtime = pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")


# GGUF


@pytest.fixture(scope="module")
def model(text_store, tmp_path_factory) -> Path:
    """A chat checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, tiny_config(vocab_size=392, max_position_embeddings=128), text_store)
    save_chat_tokenizer(folder, text_store / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def valid_file(model) -> Path:
    path = model.parent / "whole.gguf"
    write_gguf(model, {"f16": path}, read_vocabulary(model, 392).put, "m", say=lambda line: None)
    return path


def fields(path: Path) -> dict[str, int]:
    """Return the offset of the type of each key's value."""
    import gguf

    data, offsets = path.read_bytes(), {}
    for name, field in gguf.GGUFReader(path).fields.items():
        offset = int(field.offset)
        offsets[name] = offset + 8 + struct.unpack_from("<Q", data, offset)[0]
    return offsets


def faults(path: Path) -> dict[str, bytes]:
    """Return damaged copies of a file, by kind of damage."""
    data, offsets = path.read_bytes(), fields(path)

    def put(place: int, new: bytes) -> bytes:
        return data[:place] + new + data[place + len(new) :]

    def number(key: str, value: int | float, letter: str = "I") -> bytes:
        return put(offsets[key] + 4, struct.pack("<" + letter, value))

    tensors = data.index(struct.pack("<Q", 17) + b"token_embd.weight") + 25  # number of dimensions
    copies = {
        "architecture is an array": put(offsets["general.architecture"], struct.pack("<I", 9)),
        "architecture is a number": put(offsets["general.architecture"], struct.pack("<I", 4)),
        "tokens are numbers": put(offsets["tokenizer.ggml.tokens"] + 4, struct.pack("<I", 4)),
        "endless tokens": put(offsets["tokenizer.ggml.tokens"] + 8, struct.pack("<Q", 1 << 62)),
        "nested array": put(offsets["tokenizer.ggml.tokens"] + 4, struct.pack("<I", 9)),
        "a long text": put(offsets["general.architecture"] + 4, struct.pack("<Q", 1 << 63)),
        "an unknown type": put(offsets["general.architecture"], struct.pack("<I", 99)),
        "no UTF-8": put(offsets["general.architecture"] + 12, b"\xff"),
        "no blocks": number("llama.block_count", 0),
        "many blocks": number("llama.block_count", 3_000_000_000),
        "one block more": number("llama.block_count", 3),
        "no context": number("llama.context_length", 0),
        "an absurd context": number("llama.context_length", (1 << 32) - 1),
        "no heads": number("llama.attention.head_count", 0),
        "odd heads": number("llama.attention.head_count_kv", 3),
        "no width": number("llama.embedding_length", 0),
        "another width": number("llama.embedding_length", 128),
        "no rotation": number("llama.rope.dimension_count", 7),
        "epsilon NaN": number("llama.attention.layer_norm_rms_epsilon", float("nan"), "f"),
        "epsilon below 0": number("llama.attention.layer_norm_rms_epsilon", -1.0, "f"),
        "theta infinite": number("llama.rope.freq_base", float("inf"), "f"),
        "theta 0": number("llama.rope.freq_base", 0.0, "f"),
        "eos beyond": number("tokenizer.ggml.eos_token_id", 10**9),
        "another vocabulary": number("llama.vocab_size", 391),
        "a boolean of 7": put(offsets["tokenizer.ggml.add_bos_token"] + 4, b"\7")
        if "tokenizer.ggml.add_bos_token" in offsets
        else b"",
        "version 0": put(4, struct.pack("<I", 0)),
        "big-endian": put(4, struct.pack(">I", 3)),
        "endless keys": put(16, struct.pack("<Q", 1 << 60)),
        "endless tensors": put(8, struct.pack("<Q", (1 << 64) - 1)),
        "no dimensions": put(tensors, struct.pack("<I", 0)),
        "99 dimensions": put(tensors, struct.pack("<I", 99)),
        "an absurd shape": put(tensors + 4, struct.pack("<Q", 1 << 62)),
        "an unknown tensor type": put(tensors + 20, struct.pack("<I", 31)),
        "a tensor beyond the end": put(tensors + 24, struct.pack("<Q", 1 << 40)),
        "cut short": data[:-40],
        "half": data[: len(data) // 2],
        "its beginning": data[:20],
        "a magic": b"GGUF",
        "nothing": b"",
    }
    copies["a token twice"] = data.replace(b"<|reserved_0|>", b"<|reserved_1|>", 1)
    return copies


@runtime
def test_damaged_gguf_files_end_in_a_sentence(model, valid_file, tmp_path, capsys, monkeypatch):
    assert check_gguf(valid_file).of_model("block_count") == 2
    monkeypatch.setattr(llamacpp, "library", lambda: pytest.fail("C code sees a damaged file"))
    for name, content in faults(valid_file).items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        started = time.monotonic()
        for reads in (check_gguf, open_gguf, LlamaCpp):
            with pytest.raises(ValueError, match=r"is damaged: |is not a GGUF file"):
                reads(path)
                print(f"accepted: {name}")  # shown where the next line fails
        assert time.monotonic() - started < 5, name
    for path in sorted(tmp_path.glob("*o*.gguf"))[:4]:
        for main, arguments in (
            (chat_script.main, ["--model", path, "--prompt", "hi"]),
            (chat_script.main, ["--model", path, "--serve", "0"]),
            (check_gguf_script.main, ["--checkpoint", model, "--gguf", path]),
        ):
            assert path.name in complaint_of(main, arguments, capsys, monkeypatch)


@runtime
def test_weights_that_are_not_finite_and_a_context_beyond_the_memory(
    valid_file, tmp_path, monkeypatch
):
    probe(valid_file)
    data, tensors = bytearray(valid_file.read_bytes()), check_gguf(valid_file).tensors
    place = tensors["blk.1.ffn_up.weight"]
    data[place.offset : place.offset + 2] = np.array(np.nan, dtype="<f2").tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight holds values that are not finite"):
        LlamaCpp(tmp_path / "nan.gguf")
    monkeypatch.setattr(llamacpp, "_available_memory", lambda: 10_000.0)
    with pytest.raises(ValueError, match="give a smaller --context"):
        LlamaCpp(valid_file)


@runtime
def test_a_file_that_llama_cpp_hangs_or_dies_on_is_refused(valid_file, tmp_path, monkeypatch):
    """Faults that validation misses end a subprocess only."""
    for number, (code, seconds, words) in enumerate(
        (
            ("import os; os.abort()", 30, "exit status -6"),
            ("import time; time.sleep(60)", 0.3, "does not finish"),
        )
    ):
        path = tmp_path / f"{number}.gguf"
        shutil.copy(valid_file, path)
        monkeypatch.setattr(llamacpp, "PROBE_SECONDS", seconds)
        run = subprocess.run
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda *_, code=code, run=run, **options: run([sys.executable, "-c", code], **options),
        )
        with pytest.raises(ValueError, match=words):
            LlamaCpp(path)
        monkeypatch.undo()


def test_flipped_bytes_in_a_gguf_header_never_hang(valid_file, tmp_path):
    data, draw = valid_file.read_bytes(), random.Random(1)
    end = min(tensor.offset for tensor in check_gguf(valid_file).tensors.values())
    refused = 0
    for number in range(300):
        content = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(end)] = draw.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        try:
            check_gguf(path)
        except ValueError:
            refused += 1
        path.unlink()
    assert refused > 100


# Chat templates


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bounded_template, "MAX_SECONDS", 0.5)


SLOW_OR_LARGE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a'.ljust(10**11) }}",
    "{{ '%099999999999d' | format(1) }}",
    "{{ 9 ** (9 ** 9) ** 9 }}",
    "{% set n = messages | length + 8 %}{{ n ** (n ** n) ** n }}",
    "{% set n = namespace(t='ab') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ (messages | list * 10**9) | length }}",
]
FORBIDDEN_OR_WRONG = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[7].content }}{{ unknown.attribute }}",
    "{% if %}",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ 1 / 0 }}",
]


def rejection(source: str) -> str:
    """Return why a template rejects a conversation, and check that it does so soon."""
    started = time.monotonic()
    template = BoundedTemplate(source)
    with pytest.raises(
        ValueError, match=r"the model's chat template rejects this conversation: ."
    ) as error:
        template.render(HELLO)
    assert "\n" not in str(error.value) and time.monotonic() - started < 10
    return str(error.value)


@pytest.mark.parametrize("source", SLOW_OR_LARGE)
def test_a_template_that_takes_too_much_ends_in_a_sentence(source, quick):
    rejection(source)


@pytest.mark.parametrize("source", FORBIDDEN_OR_WRONG)
def test_a_template_that_does_what_it_must_not_is_refused_at_once(source):
    assert "more than" not in rejection(source)


def test_a_template_serves_again_after_it_was_stopped(monkeypatch):
    monkeypatch.setattr(bounded_template, "MAX_SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = BoundedTemplate(
        "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}ok {{ bos_token }}"
    )
    with pytest.raises(ValueError, match="more than"):
        template.render([{"role": "user", "content": "loop"}])
    assert template.render(HELLO, bos_token="B") == "ok B"
    process = template.process
    assert process and process.poll() is None
    del template
    assert process.poll() is not None


def test_the_bounded_text_is_that_of_transformers(model):
    from transformers import AutoTokenizer

    template = (
        "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% set ns.last = loop.index %}\n"
        "  {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
        "{{ eos_token }}{% endgeneration %}\n"
        "  {% else %}[{{ m.role }}] {{ m.content }}{% if loop.index > 8 %}{% break %}"
        "{% endif %}{% endif %}\n"
        "{% endfor %}{{ ns.last }}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}"
        "{% if add_generation_prompt %}<go>{% endif %}{{ strftime_now('%Y') }}{{ dict(a=1) }}"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tools = [{"type": "function", "function": {"name": "é<b>", "parameters": {}}}]
    messages = [
        *HELLO,
        {"role": "assistant", "content": " ünï "},
        {"role": "user", "content": None},
        *HELLO,
    ]
    expected = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert (
        BoundedTemplate(template).render(messages, tools, **tokenizer.special_tokens_map)
        == expected
    )


def test_chat_and_evaluation_bound_foreign_templates(model, tmp_path, quick, capsys, monkeypatch):
    folder = tmp_path / "foreign"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    chat = open_chat_format(folder)
    assert isinstance(chat, TemplateFormat)
    for speaks in (chat, CheckpointChat(folder)):
        with pytest.raises(ValueError, match="more than"):
            speaks.prompt(HELLO)
    message = complaint_of(
        chat_script.main, ["--model", folder, "--prompt", "hi"], capsys, monkeypatch
    )
    assert "chat template rejects this conversation" in message
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": 7}')
    assert "transformers cannot read" in complaint_of(
        chat_script.main, ["--model", folder, "--prompt", "hi"], capsys, monkeypatch
    )


def test_no_code_of_a_foreign_folder_is_asked_for(model, tmp_path):
    marker, folder = tmp_path / "ran", tmp_path / "foreign"
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                **settings,
                "tokenizer_class": "T",
                "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]},
            }
        )
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.T"}})
    )
    try:
        CheckpointChat(folder)
    except ValueError as error:
        assert "transformers cannot read" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"vocab_size": 10**13}, "vocab_size|parameters"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"dtype": "save"}, "dtype"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_foreign_config_with_wrong_values_ends_in_a_sentence(model, tmp_path, change, words):
    folder = tmp_path / "foreign"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        load_hf(folder, dtype=None)


def test_an_index_of_weights_names_files_of_its_folder_only(model, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(model, folder)
    for value in ([1], {"a": "../model/model.safetensors"}, {"a": 3}, None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        with pytest.raises(ValueError, match="does not name files of this folder"):
            load_hf(folder)


def test_nothing_unpickles_without_restriction():
    """safe_pickle.py is the restricted reader; distributed.py copies errors of this process."""
    risky = re.compile(
        r"pickle\.loads?\(|torch\.load\(|allow_pickle=True|FileSystemReader\(|dcp\.load\(|yaml\.unsafe_load"
    )
    for folder in ("models", "data", "training", "evals", "demo", "scripts", "."):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert path.name in ("safe_pickle.py", "distributed.py") or not risky.search(text), path
            for call in re.finditer(r"(\w+)\.from_pretrained\(\s*\w", text):
                known = (
                    call[1] == "PreTrainedTokenizerFast"
                    or "trust_remote_code=False" in text[call.start() :][:200]
                )
                assert known, (path, call[0])


def test_transformers_models_of_pickles_are_refused(model, tmp_path):
    from evals.engines import TransformersEngine

    marker, folder = tmp_path / "ran", tmp_path / "foreign"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Calls(os.system, f"touch {marker}")))
    with pytest.raises(ValueError, match="cannot be loaded"):
        TransformersEngine(folder, "cpu", None, 1)
    assert not marker.exists()
