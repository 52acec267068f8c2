"""Chat and demo default to the context, tools and thoughts of SFT and DPO; flags override."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, complaint_of, save_tiny, tiny_config
from test_dpo import dpo_here
from test_dpo import settings as dpo_settings

import train_sft
from benchmarks import parity_dpo
from data.chat.tokenizer import save_chat_tokenizer
from data.chat.tools import TOOLS
from data.chat.trained_chat import KEY, ChatDefaults, name_of, offered, read_chat_defaults, record
from data.manifest import read_json
from data.synthetic import generate as synthetic
from demo.page import tools_label
from demo.talk import open_chat_model
from export.gguf import write_gguf
from export.gguf_plan import read_config
from inference.gguf_tokenizer import read_vocabulary, tokenizer_folder
from scripts import chat
from training import setup
from training.settings import load_settings

LENGTH = 512  # tokens of a row
ALL = [name_of(tool) for tool in TOOLS]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, text_store) -> Path:
    """A model after one SFT step on tool use, one tool per row, and on problems with thoughts."""
    place = tmp_path_factory.mktemp("tuned")
    save_tiny(place / "base", tiny_config(max_position_embeddings=4096), text_store)
    sources = {
        "tools": synthetic.generate_tool_use_examples(40, 0, "train", easy=True),
        "math": synthetic.generate_math_examples(20, 0, "train", easy=True),
    }
    for name, rows in sources.items():
        (place / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    listed = ", ".join(f"{name}: {{path: {place / name}.jsonl}}" for name in sources)
    overrides = [
        f"chat={{sources: {{{listed}}}, cache: {place / 'cache'}, val_fraction: 0.0, "
        f"samples: [], max_bad: 0.5}}",
        f"data={{mix: {{tools: 0.5, math: 0.5}}, sequence_length: {LENGTH}, "
        f"tokens_per_step: {LENGTH}, micro_batch_size: 1}}",
        "steps=1",
        f"init_from={place / 'base'}",
        "parallel={dtype: float32}",
        f"log_dir={place / 'logs'}",
        f"output_dir={place / 'sft'}",
    ]
    run = load_settings(train_sft.SFTConfig, ROOT / "configs" / "sft.yaml", overrides)
    with setup.ranks() as device:
        assert train_sft.finetune(run, 0, 1, device) == 0
    return place / "sft" / "step_1"


def test_sft_records_what_it_trained_on(tuned):
    trained = read_chat_defaults(tuned)
    assert trained and (trained.context, trained.tools_at_once, trained.thoughts) == (
        LENGTH,
        1,
        True,
    )
    assert trained.tools[0] == "calculator" and set(trained.tools) <= set(ALL)
    [tool] = offered(trained)
    assert name_of(tool) == "calculator"
    assert [name_of(tool) for tool in offered(trained, ["all"])] == ALL
    assert [name_of(tool) for tool in offered(trained, ["weekday"])] == ["weekday"]
    with pytest.raises(ValueError, match=r"--tools abacus: unknown tool; known: calculator"):
        offered(trained, ["abacus"])


def test_dpo_adds_to_the_record_of_its_base(tmp_path):
    parity_dpo.write_case(tmp_path)
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)
    ]
    (tmp_path / "many.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    policy = tmp_path / "policy" / "config.json"
    config = {
        **read_json(policy),
        KEY: {"context": 300, "tools": ["weekday"], "tools_at_once": 1, "thoughts": True},
    }
    policy.write_text(json.dumps(config), encoding="utf-8")
    assert dpo_here(*dpo_settings(tmp_path, tmp_path), "steps=1")
    assert read_chat_defaults(tmp_path / "out" / "step_1") == ChatDefaults(
        300, ("weekday",), 1, True
    )


def test_a_record_joins_base_and_sources(tmp_path):
    seen = [
        {"tools": {"a": 2, "b": 5}, "tools_at_once": 2, "thoughts": 0},
        {"tools": {"a": 4}, "tools_at_once": 1, "thoughts": 1},
    ]
    trained_record = record(tmp_path, [{"seen": part} for part in seen], 64)
    assert trained_record == {
        "context": 64,
        "tools": ("a", "b"),
        "tools_at_once": 2,
        "thoughts": True,
    }


@pytest.mark.parametrize(
    "wrong",
    [5, [], {"context": "x"}, {"context": True}, {"context": 0}, {"context": 9, "tools": [1]}],
)
def test_a_damaged_record_is_a_sentence(wrong, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({KEY: wrong}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"nanollama_chat of config\.json is damaged"):
        read_chat_defaults(tmp_path)


@pytest.fixture(scope="module", params=["folder", "gguf"])
def model(request, tuned, tmp_path_factory) -> Path:
    if request.param == "folder":
        return tuned
    file = tmp_path_factory.mktemp("gguf") / "m-f32.gguf"
    write_gguf(
        tuned, {"f32": file}, read_vocabulary(tuned, read_config(tuned).vocab_size).put, "m", 1
    )
    assert read_chat_defaults(tokenizer_folder(file)) == read_chat_defaults(tuned)
    return file


@pytest.mark.parametrize(
    ("flags", "context", "names"), [([], LENGTH, ["calculator"]), (["all"], 2048, ALL)]
)
def test_the_demo_follows_it_and_a_flag_asks_for_more(model, flags, context, names):
    voice = open_chat_model(model, context if flags else None, flags or None)
    assert voice.context == context and [name_of(tool) for tool in voice.tools] == names
    assert tools_label([voice]) == f"Tools: {', '.join(names)}"
    prompt = voice.chat.prompt([{"role": "user", "content": "What is 2 + 3?"}], list(voice.tools))
    # With all tools, no room is left.
    assert len(voice.chat.prompt([{"role": "user", "content": "x"}], TOOLS)) > LENGTH
    assert (len(prompt) < LENGTH - 100) == (not flags)


def test_chat_follows_it_too(model, monkeypatch, capsys):
    flags = ["chat", "--model", str(model), "--prompt", "Hi", "--max_new_tokens", "1"]
    for more, message in (
        ([], f"context {LENGTH}, tools: calculator; --context and --tools change them"),
        (
            ["--tools", "weekday", "lookup", "--context", "1024"],
            "context 1,024, tools: weekday, lookup;",
        ),
    ):
        monkeypatch.setattr(sys, "argv", [*flags, *more])
        chat.main()
        assert message in capsys.readouterr().out
    complaint = complaint_of(
        chat.main,
        ["--model", model, "--prompt", "x", "--tools", "all", "--no_tools"],
        capsys,
        monkeypatch,
    )
    assert "--tools and --no_tools exclude each other" in complaint


def test_without_a_record_all_is_offered(tmp_path, text_store):
    folder = tmp_path / "old"
    save_tiny(folder, tiny_config(max_position_embeddings=256), text_store)
    shutil.copytree(folder, tmp_path / "base")
    save_chat_tokenizer(folder, tmp_path / "base")
    assert read_chat_defaults(folder) is None and offered(None) == TOOLS
