"""scripts.preview shows the ids and the loss mask of the batches that training reads."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, complaint_of

import train
import train_dpo
import train_sft
from benchmarks import parity_sft
from data.packing import IGNORE
from data.tokenizers.bpe import load_tokenizer
from scripts import preview
from training import setup
from training.config import load
from training.settings import load_settings


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    """A base model with a byte tokenizer, conversations, pairs, and a config of each stage."""
    folder = tmp_path_factory.mktemp("case")
    parity_sft.write_case(folder)
    pairs = [
        {"prompt": f"{i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "No" + " no" * i}
        for i in range(6)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = {"run": "tiny", "steps": 1}
    rows = {"path": str(folder / "rows.jsonl")}
    chat = {"sources": {"rows": rows}, "cache": str(folder / "sft"), "val_fraction": 0}
    data = {"mix": {"rows": 1}, "sequence_length": 384, "tokens_per_step": 768}
    sft = {**common, "phase": "sft", "chat": chat, "data": {**data, "micro_batch_size": 1}}
    sources = {"pairs": {"path": str(folder / "pairs.jsonl")}}
    preferences = {"sources": sources, "cache": str(folder / "dpo"), "val_fraction": 0}
    data = {"mix": {"pairs": 1}, "sequence_length": 128, "pairs_per_step": 4}
    dpo = {**common, "phase": "dpo", "preferences": preferences}
    dpo["data"] = {**data, "micro_batch_size": 4}
    for name, content in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def show(monkeypatch, capsys):
    """Run scripts.preview here and return its output."""

    def show(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        preview.main()
        return capsys.readouterr().out

    return show


@pytest.fixture
def trained(monkeypatch):
    """Start a stage of training, and return the batches of its first step instead of training."""

    def trained(module: Any, run: Any) -> list:
        steps = []

        def run_phase(run, device, stage, profile=False):
            steps.append(stage.loader.at(0))
            return 0

        monkeypatch.setattr(module, "run_phase", run_phase)
        entry = {train: "pretrain", train_sft: "finetune", train_dpo: "align"}[module]
        more = {"test": False} if module is train else {}
        with setup.ranks() as device:
            getattr(module, entry)(run, 0, 1, device, **more)
        return steps[0].batches

    return trained


def shown_ids(text: str) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each printed document, and which of them are between the brackets."""
    documents = []
    for line in re.findall(r"^ids: (.*)$", text, flags=re.MULTILINE):
        ids, mask = [], []
        for begin, numbers in re.findall(r"(\u27e6?)([\d ]+)\u27e7?", line):
            new = [int(number) for number in numbers.split()]
            ids += new
            mask += [bool(begin)] * len(new)
        documents.append((ids, mask))
    return documents


def documents_of(batches: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and targets of each document of the batches, without padding."""
    documents = []
    for batch in batches:
        for tokens, targets, doc_ids in zip(*batch[:3], strict=True):
            for number in doc_ids.unique().tolist():
                document = doc_ids == number
                if (targets[document] != IGNORE).any():
                    documents.append((tokens[document], targets[document]))
    return documents


ALL = ("--count", 100, "--characters", 0, "--ids")


def test_packed_rows_are_those_of_training(show, trained, settings, text_store):
    overrides = settings("data.packing=best_fit")
    printed = show("--config", ROOT / "configs" / "test_mode.yaml", *overrides, *ALL)
    run = load(ROOT / "configs" / "test_mode.yaml", overrides)
    batches = trained(train, run)
    documents = documents_of(batches)
    assert [ids for ids, _ in shown_ids(printed)] == [tokens.tolist() for tokens, _ in documents]
    assert "\u27e6" not in printed  # every token has a loss
    rows, padding = run.data.rows, sum(int((b.targets == IGNORE).sum()) for b in batches)
    assert padding and printed.count("==== row ") == rows
    tokens = run.data.tokens_per_step - padding
    summary = f"{len(documents):,} documents, {tokens:,} tokens, {padding:,} padding"
    assert f"step 0: {rows} rows of {run.data.sequence_length:,} tokens: {summary}\n" in printed
    assert "reads first for" in printed and "source second: " in printed
    tokenizer = load_tokenizer(text_store / "tokenizer")
    texts = [tokenizer.decode(t.tolist(), skip_special_tokens=False) for t, _ in documents]
    assert all(f"tokens\n{text}\nids: " in printed for text in texts)
    stream = show(
        "--config",
        ROOT / "configs" / "test_mode.yaml",
        *settings(),
        "--start",
        3,
        "--characters",
        20,
    )
    assert stream.count("==== row ") == 2 and "step 3: " in stream and ", 0 padding" in stream
    assert re.search(r"\[\.\.\. [\d,]+ characters \.\.\.\]", stream)


def test_conversations_are_those_of_training(show, trained, case):
    printed = show("--config", case / "sft.yaml", "--base_model", case / "base", *ALL)
    flags = {"init_from": str(case / "base")}
    run = load_settings(train_sft.SFTConfig, case / "sft.yaml", [], flags)
    batches = trained(train_sft, run)
    expected, found = documents_of(batches), shown_ids(printed)
    assert len(expected) == len(found) == 3
    for (tokens, targets), (ids, mask) in zip(expected, found, strict=True):
        assert ids[:-1] == tokens.tolist() and not mask[0]
        assert mask[1:] == (targets != IGNORE).tolist()
        assert [i for i, m in zip(ids[1:], mask[1:], strict=True) if m] == [
            target for target in targets.tolist() if target != IGNORE
        ]
    targets = sum(int((b.targets != IGNORE).sum()) for b in batches)
    padding = sum(int((b.doc_ids == b.doc_ids.max()).sum()) for b in batches)
    assert f"; {targets:,} targets with a loss, {768 - padding - targets:,} without\n" in printed
    assert "rows: 3 conversations, " in printed
    assert "user\nHi<|im_end|>\n<|im_start|>assistant\n\u27e6Hello!<|im_end|>\u27e7\n" in printed
    assert '\u27e6<|tool_call|>{"name": "now", ' in printed


def test_pairs_are_those_of_training(show, trained, case, monkeypatch):
    arguments = ("--config", case / "dpo.yaml", "--base_model", case / "base")
    printed = show(*arguments, *ALL)
    monkeypatch.setattr(train_dpo, "reference_logps", lambda *_: None)
    flags = {"init_from": str(case / "base")}
    run = load_settings(train_dpo.PreferenceRun, case / "dpo.yaml", [], flags)
    expected = {
        (tuple(tokens.tolist()), tuple(targets.tolist()))
        for tokens, targets in documents_of(trained(train_dpo, run))
    }
    found, parts = set(), shown_ids(printed)
    assert len(parts) == 3 * 4  # prompt, chosen and rejected answer
    for prompt, *answers in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        for ids, mask in answers:
            whole, trained_ids = prompt[0] + ids, prompt[1] + mask
            pairs = zip(whole[1:], trained_ids[1:], strict=True)
            found.add((tuple(whole[:-1]), tuple(i if m else IGNORE for i, m in pairs)))
            assert not any(prompt[1]) and all(mask)
    assert found == expected and len(found) == 8
    assert "---- chosen\n\u27e6It is " in printed and "step 0: 4 pairs: " in printed


def test_a_file_of_conversations(show, case, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (case / "rows.jsonl").read_text().splitlines()]
    rows[1]["messages"][-1]["weight"] = 0  # its only answer has no loss
    rows.insert(1, {"messages": [{"role": "assistant", "content": "Hi"}]})
    hidden = [{"role": "user", "content": "\x1b[31m?"}, {"role": "assistant", "content": "1"}]
    rows.append({"messages": hidden})
    chats = tmp_path / "my_chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("--rows", chats, "--base_model", case / "base")
    monkeypatch.chdir(tmp_path)
    printed = show(*base, *ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["my_chats.jsonl"]
    assert printed.count("==== conversation ") == 3 and "my_chats.jsonl:2" in printed
    assert f"{chats}: 3 conversations, 143 of 427 tokens trained; " in printed
    assert "; 1 no assistant turn has a loss (weight 0)" in printed
    assert "\x1b" not in printed and "\ufffd[31m?" in printed
    [(ids, mask), *_] = shown_ids(printed)
    assert f"==== conversation 1 of 3: {len(ids)} tokens, {sum(mask)} tokens with a loss" in printed
    second = show(*base, "--start", 1, "--count", 1)
    assert second.count("==== ") == 1 and "What time is it?" in second
    cut = show(*base, "--sequence_length", 60)
    assert "1 cut" in cut and "truncated after 60" in cut
    from data.chat.tokenizer import save_chat_tokenizer

    save_chat_tokenizer(tmp_path / "tokenizer", case / "base")  # no model yet
    printed = show("--rows", chats, "--base_model", tmp_path / "tokenizer")
    assert printed.count("==== conversation ") == 2


def test_colours_on_a_terminal_unless_no_color_is_set(show, case, monkeypatch):
    arguments = ("--rows", case / "rows.jsonl", "--base_model", case / "base", "--count", 1)
    plain = show(*arguments)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show(*arguments)
    assert "\033[32mYes.<|im_end|>\033[0m" in coloured.replace("<|end_thought|>", "\033[32m")
    assert "\u27e6" not in coloured
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(*arguments) == plain and "\u27e6" in plain and "\033" not in plain


def test_mistakes(case, capsys, monkeypatch, tmp_path):
    pairs = case / "pairs.jsonl"
    base = ["--base_model", case / "base"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    own = tmp_path / "own.yaml"
    own.write_text("{name: mine, kind: text, path: my_texts.jsonl}")
    for arguments, expected in (
        ([], "nothing to show; give --config or --rows"),
        (["--rows", pairs], "--rows needs --base_model: a checkpoint, or a folder with"),
        (["--rows", pairs, *base], "100.0% of 6 conversations are malformed"),
        (["--rows", empty, *base], "has no usable conversation"),
        (["--rows", tmp_path / "lost.jsonl", *base], "lost.jsonl"),
        (["--rows", pairs, *base, "--config", case / "sft.yaml"], "without --config and settings"),
        (["--config", case / "sft.yaml"], "no base model is set; use --base_model"),
        (["--config", ROOT / "configs/test_mode.yaml", *base], "was trained with model."),
        (["--config", case / "lost.yaml"], "lost.yaml not found"),
        (["--config", ROOT / "configs/plan_1b.yaml"], "is a plan; give it to scripts.pipeline"),
        (["--config", case / "sft.yaml", *base, "--sequence_length", 9], "data.sequence_length=N"),
        (["--config", case / "sft.yaml", *base, "--count", 0], "argument --count: 0 must be at"),
        (["--rows", pairs, "--base_model", tmp_path], "has no tokenizer.json"),
        (["--config", own], "own.yaml is an evaluation; scripts.run_evals --suite"),
        (["--config", ROOT / "configs/speedrun/00_baseline.yaml"], "is a config of train_gpt.py"),
    ):
        error = complaint_of(preview.main, arguments, capsys, monkeypatch)
        assert expected in error and "max_bad" not in error, error
