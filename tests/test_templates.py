"""A folder's chat template is found in every form of transformers; all readers agree."""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import save_tiny, tiny_config
from gguf import GGUFReader
from transformers import AutoTokenizer

from data.chat.folder_templates import choose, read_templates, template_of
from data.chat.rendering import Chat
from data.chat.template import jinja_template
from data.chat.tokenizer import save_chat_tokenizer
from data.synthetic import generate as synthetic
from evals import eval_chat
from evals.chat import CheckpointChat
from evals.engines import folder_hash
from inference.chat_formats import CompletionFormat, TemplateFormat, open_chat_format
from inference.gguf_tokenizer import tokenizer_folder
from scripts import export_gguf

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
FORMS = ("string", "list", "jinja", "json", "additional", "with_tools", "none")


def put_template(folder: Path, form: str, template: str) -> None:
    """Write a template to a folder in one of FORMS."""
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if form == "string":
        content["chat_template"] = template
    elif form == "list":
        content["chat_template"] = [
            {"name": "rag", "template": "R"},
            {"name": "default", "template": template},
        ]
    elif form == "json":
        (folder / "chat_template.json").write_text(
            json.dumps({"chat_template": template}), encoding="utf-8"
        )
    elif form in ("jinja", "with_tools"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if form in ("additional", "with_tools"):
        named = folder / "additional_chat_templates"
        named.mkdir()
        name = "default" if form == "additional" else "tool_use"
        (named / f"{name}.jinja").write_text(
            template + ("" if form == "additional" else "T"), encoding="utf-8"
        )
    settings.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def model(form, tmp_path, text_store) -> Path:
    """A small base model, with a foreign template unless form is "none"."""
    folder = tmp_path / "model"
    save_tiny(folder, tiny_config(max_position_embeddings=1024), text_store)
    put_template(folder, form, OWN)
    return folder


def test_every_form_is_read(form, model):
    assert template_of(model) == (None if form == "none" else OWN)
    assert isinstance(
        open_chat_format(model), CompletionFormat if form == "none" else TemplateFormat
    )
    if form not in ("none", "json"):  # in transformers, only processors read chat_template.json
        assert AutoTokenizer.from_pretrained(model).get_chat_template() == OWN
    if form == "none":
        with pytest.raises(ValueError, match="has no chat template"):
            CheckpointChat(model)
    else:
        text = CheckpointChat(model).tokenizer.decode(
            CheckpointChat(model).prompt([{"role": "user", "content": "Hi."}])
        )
        assert text == "[user] Hi.\n[assistant] "


def test_the_export_keeps_it_and_the_card_calls_it_no_base_model(
    form, model, tmp_path, monkeypatch
):
    out = tmp_path / "out" / "m-{outtype}.gguf"
    monkeypatch.setattr(
        sys, "argv", ["x", "--checkpoint", str(model), "--outtype", "f32", "--outfile", str(out)]
    )
    export_gguf.main()
    reader = GGUFReader(out.parent / "m-f32.gguf")
    field = reader.get_field("tokenizer.chat_template")
    texts = {
        name: (out.parent / name).read_text(encoding="utf-8")
        for name in ("README.md", "LM_STUDIO.md", "Modelfile")
    }
    if form == "none":
        assert (
            field is None
            and "base model" in texts["README.md"]
            and "{{ .Prompt }}" in texts["Modelfile"]
        )
        return
    assert field.contents() == OWN and not any("base model" in text for text in texts.values())
    assert "{{ .Prompt }}" not in texts["Modelfile"] and "scripts.chat" in texts["README.md"]
    unpacked = tokenizer_folder(out.parent / "m-f32.gguf")
    assert read_templates(unpacked) == read_templates(model) and isinstance(
        open_chat_format(out.parent / "m-f32.gguf"), TemplateFormat
    )


def test_eval_chat_asks_in_it(form, model, tmp_path):
    rows = synthetic.generate_identity_examples(5, 0, "heldout")
    data = tmp_path / "all.heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = eval_chat.build(Namespace(checkpoint=model, data=str(data), limit=None))
    write, choose_one = next(evaluation.score(evaluation.items[0]))
    _, before, replies = eval_chat.split_item(evaluation.items[0])
    if form == "none":
        assert evaluation.metadata["prompts"] == "plain lines" and write.prompt.startswith("User: ")
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert evaluation.metadata["prompts"] == "the model's own chat template"
    assert tokenizer.decode(write.prompt) == f"[user] {before[-1]['content']}\n[assistant] "
    assert [tokenizer.decode(option) for option in choose_one.options] == [
        f"{m['content']}<|endoftext|>" for m in replies
    ]


def test_questions_that_it_refuses_are_counted(tmp_path, text_store):
    folder = tmp_path / "model"
    save_tiny(folder, tiny_config(max_position_embeddings=1024), text_store)
    put_template(
        folder,
        "string",
        OWN.replace(
            "[{{", "{% if m['role'] == 'tool' %}{{ raise_exception('no') }}{% endif %}[{{", 1
        ),
    )
    rows = synthetic.generate_tool_use_examples(4, 0, "heldout", easy=True)
    data = tmp_path / "all.heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = eval_chat.build(Namespace(checkpoint=folder, data=str(data), limit=None))
    asked = eval_chat.read_items(str(data), None)
    dropped = evaluation.metadata["dropped"]["refused by the model's own chat template"]
    assert dropped > 0 and len(evaluation.items) + dropped == len(asked)


@pytest.mark.parametrize("where", FORMS[:5])
def test_our_own_template_is_ours_in_every_form(where, tmp_path, text_store):
    folder = tmp_path / "model"
    save_chat_tokenizer(folder, text_store / "tokenizer")
    (folder / "chat_template.jinja").unlink()
    put_template(folder, where, jinja_template())
    assert isinstance(open_chat_format(folder), Chat)


def test_files_go_first_and_mistakes_are_sentences(tmp_path, model):
    put_template(tmp_path, "list", "config")
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_templates(tmp_path) == {"default": "file"}
    assert (
        choose({"rag": "R"}) == "R" and choose({"default": "D", "tool_use": "T"}, tools=[1]) == "T"
    )
    with pytest.raises(ValueError, match="chat templates named a, b"):
        choose({"a": "A", "b": "B"})
    for wrong in (5, [5], [{"name": "default"}], {"default": 1}):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": wrong}), encoding="utf-8"
        )
        with pytest.raises(ValueError, match="neither text nor a list of named texts"):
            template_of(tmp_path)


@pytest.mark.parametrize(
    "changed",
    ["chat_template.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja"],
)
def test_another_template_is_another_model_to_evaluations(changed, tmp_path, text_store):
    folder = tmp_path / "model"
    save_tiny(folder, tiny_config(), text_store)
    before = folder_hash(folder)
    (folder / changed).parent.mkdir(exist_ok=True)
    (folder / changed).write_text('{"chat_template": "x"}', encoding="utf-8")
    assert folder_hash(folder) != before
    shutil.rmtree(folder)
