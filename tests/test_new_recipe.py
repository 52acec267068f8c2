"""The starter recipe for one's own text: held-out share, vocabulary, steps, files."""

import io
import json
import re
import shlex
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, complaint_of, library
from test_docs_quotes import messages

from data import manifest
from data.corpus import documents
from data.pipeline import starter
from data.pipeline.prepare import prepare, train_store_tokenizer
from data.pipeline.recipe import Recipe, Split
from data.pipeline.starter_files import named_sources
from data.tokenizers.bpe import train_tokenizer
from scripts import download_data, new_plan, new_recipe
from train_sft import SFTConfig
from training.config import load
from training.settings import load_settings


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_names_of_sources_differ():
    paths = ["x/a.txt", "y/a.csv", "*.md", "?.md"]
    assert named_sources(paths) == dict(zip(["a", "a_2", "text", "text_2"], paths, strict=True))


def test_the_share_that_is_held_out_suffices_for_every_source():
    def size(count: int, length: int, begin: int = 0) -> starter.SourceSize:
        documents = ((f"d{i}", "x" * length) for i in range(begin, begin + count))
        return starter.source_size(documents)

    many = size(2000, 1000)
    assert many.documents == 2000 and many.size == 2_000_000
    assert many.held_out[0][0] == sum(Split(0.02).of(f"d{i}") == "val" for i in range(2000))
    assert starter.choose_fraction([many]) == 0.02
    assert starter.choose_fraction([size(300, 1000)]) == 0.1  # 2 % and 5 % are below 20 kB
    assert starter.choose_fraction([many, size(300, 1000)]) == 0.1
    assert starter.choose_fraction([size(3, 1_000_000)]) is None
    first = next(i for i in range(2000) if Split(0.02).of(f"d{i}") == "val")  # at every share
    giant = ((f"d{i}", "x" * (1_500_000 if i == first else 1000)) for i in range(2000))
    assert starter.choose_fraction([starter.source_size(giant)]) is None  # too much is held out


def test_the_vocabulary_grows_with_the_text_by_the_share_of_frequent_tokens(monkeypatch):
    texts = [text for _, text in library(30)]
    size = sum(len(text.encode()) for text in texts)
    monkeypatch.setattr(starter, "VOCABULARIES", (320, 384, 1024))
    few, chosen, many = (
        starter.choose_vocabulary([texts], size * factor) for factor in (1, 4, 1000)
    )
    assert (few.size, chosen.size, many.size) == (320, 384, 1024)
    tokenizer = train_tokenizer(texts, chosen.size)  # merges are nested: the same tokens
    ids = [index for text in texts for index in tokenizer.encode(text).ids]
    sampled = sum(len(text.encode()) for text in texts)
    assert chosen.bytes_per_token == pytest.approx(sampled / len(ids), rel=1e-3)
    counts = [ids.count(index) for index in range(258, chosen.size)]
    share = sum(4 * count >= starter.FREQUENT for count in counts) / len(counts)
    assert chosen.frequent == pytest.approx(share, abs=0.01)
    with pytest.raises(ValueError, match=r"the texts yield .* tokens, not 4096"):
        starter.choose_vocabulary([["a b c"]], 5, 4096)


def test_steps_are_those_of_four_epochs_within_the_minutes():
    assert starter.choose_steps(1_000_000, 2048, 10_000) == 1953
    assert starter.choose_steps(1_000_000, 2048, 600) == 600
    assert starter.choose_steps(1_000, 2048, 600) == starter.LEAST_STEPS
    assert starter.choose_steps(1_000_000, 2048, 0) == starter.LEAST_STEPS


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run new_recipe in tmp_path; return its output, or its error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "VOCABULARIES", (384, 512))  # training more takes seconds

    def command(*arguments: object, fails: bool = False) -> str:
        if fails:
            return complaint_of(new_recipe.main, list(arguments), capsys, monkeypatch)
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        new_recipe.main()
        return capsys.readouterr().out

    return command


def read_again(recipe: str) -> list[str]:
    """Run the commands of download_data in a recipe's comments; return the last line of each."""
    said = []
    for words in re.findall(r"^# python -m scripts\.download_data (.*)$", recipe, flags=re.M):
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
            patch.setattr(sys, "argv", ["x", *shlex.split(words)])
            download_data.main()
        said.append(output.getvalue().splitlines()[-1])
    return said


def library_folder(folder: Path) -> Path:
    for name, text in library(60):
        write(folder / f"{name}.txt", text.encode())
    return folder


def test_from_a_folder_to_shards_and_a_config_that_trains_on_them(run, tmp_path):
    library_folder(tmp_path / "my texts")
    said = run("--name", "mine", "--text", "my texts", "--minutes", "0.2")
    recipe_path, config_path = Path("configs/data/mine.yaml"), Path("configs/mine.yaml")
    assert f"python -m scripts.prepare_data --config {recipe_path} --train_tokenizer" in said
    assert f"python train.py --config {config_path}" in said
    recipe, config = load_settings(Recipe, recipe_path), load(config_path)
    assert list(recipe.sources) == ["my_texts"] and recipe.dedup.kind == "exact"
    assert recipe.decontaminate.test_sets == () and recipe.sources["my_texts"].filters == ()
    assert config.model.vocab_size == recipe.tokenizer.vocab_size
    assert config.data.store == recipe.store and config.data.mix == {"my_texts": 1.0}
    assert config.run == "mine" and config.steps == config.schedule.total_steps == 41
    assert train_store_tokenizer(recipe) and prepare(recipe) == "done"
    report = json.loads(Path("data/store/mine/report.json").read_text())["sources"]["my_texts"]
    assert report["kept"] + report["repeated"] == report["documents"]
    assert report["val_tokens"] > config.validation.rows * config.data.sequence_length
    written = recipe_path.read_text(), config_path.read_text()
    message = run("--name", "mine", "--text", "my texts", fails=True)
    assert "configs/data/mine.yaml already exists; use another" in message
    assert (recipe_path.read_text(), config_path.read_text()) == written


def test_few_long_files_are_cut_and_too_little_text_is_refused(run, tmp_path):
    texts = [text for _, text in library(60)]
    write(tmp_path / "one.txt", "\n\n".join(texts).encode())
    write(tmp_path / "rows.jsonl", json.dumps({"text": "\n\n".join(texts)}).encode())
    write(tmp_path / "on.txt", "\n\n".join(text + "." for text in texts).encode())
    said = run("--name", "one", "--text", "one.txt", "on.txt", "--vocab_size", "384")
    assert "one: too few documents to hold some out (1); cutting .txt and .md files" in said
    recipe, config = load_settings(Recipe, "configs/data/one.yaml"), load("configs/one.yaml")
    assert config.model.vocab_size == recipe.tokenizer.vocab_size == 384
    assert set(config.data.mix) == {"one", "on"} and sum(config.data.mix.values()) == 1
    record = manifest.read(tmp_path / "data/store/one/documents/one")
    assert record is not None and record["documents"] > 30
    text = Path("configs/data/one.yaml").read_text()
    assert f"--document_chars {record['inputs']['document_chars']} " in text
    assert read_again(text) == ["already there"] * 2
    message = run("--name", "rows", "--text", "rows.jsonl", fails=True)
    assert "rows.jsonl: no share of its 1 documents" in message and "split long ones" in message
    write(tmp_path / "tiny" / "a.txt", b"A few words.")
    message = run("--name", "tiny", "--text", "tiny", fails=True)
    assert "0.0 kB of text are too little to train a model; add text, at least 100 kB" in message
    assert not Path("configs/data/tiny.yaml").exists() and not Path("configs/rows.yaml").exists()
    assert "must have letters" in run("--name", "a b", "--text", "tiny", fails=True)


def test_a_file_that_is_too_long_for_a_document_is_cut(run, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE", 50_000)
    write(tmp_path / "long.txt", "\n\n".join(text for _, text in library(60)).encode())
    said = run("--name", "long", "--text", "long.txt")
    assert "long.txt is one document of more than 50,000 bytes; cutting .txt and .md files" in said
    assert load("configs/long.yaml").steps >= starter.LEAST_STEPS


def test_the_command_in_the_recipe_reads_the_same_documents(run, tmp_path):
    """With every flag that changes them, and a path that is also a known source."""
    rows = [{"key": name, "title": "t", "story": text} for name, text in library(60)]
    write(tmp_path / "my notes" / "a.json", json.dumps(rows).encode())
    flags = ["--text_column", "story", "--id_column", "key", "--max_bad", 0.05]
    run("--name", "notes", "--text", "my notes", "--max_tokens", 123_456_789, *flags)
    assert read_again(Path("configs/data/notes.yaml").read_text()) == ["already there"]
    library_folder(tmp_path / "code")
    run("--name", "mine", "--text", "code", "--document_chars", 1000)
    record = manifest.read(tmp_path / "data/store/mine/documents/code")
    assert record is not None and record["origin"] == "./code"
    assert read_again(Path("configs/data/mine.yaml").read_text()) == ["already there"]


@pytest.mark.parametrize("name", ["code", "quickstart", "fineweb_edu", "mmlu", "fineweb10B"])
def test_an_existing_path_precedes_a_known_source(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_sources([name]) == {name: name}
    write(tmp_path / name / "a.txt", b"x")
    assert named_sources([name]) == {name: f"./{name}"}


def test_files_that_do_not_load_are_not_left_behind(run, tmp_path, monkeypatch):
    library_folder(tmp_path / "texts")

    def failing(*_):
        raise ValueError("the recipe is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(new_recipe, "load_settings", failing)
        assert "the recipe is wrong" in run("--name", "mine", "--text", "texts", fails=True)
    assert not Path("configs/mine.yaml").exists() and not Path("configs/data/mine.yaml").exists()
    run("--name", "mine", "--text", "texts", "--minutes", "0.004")
    assert load("configs/mine.yaml").steps == starter.LEAST_STEPS


def test_messages_of_the_readers_name_flags_of_new_recipe():
    names = ("ingest", "skipped", "readers", "documents", "tables", "local_files")
    files = [*(ROOT / f"data/corpus/{name}.py" for name in names)]
    files.append(ROOT / "data/pipeline/starter_files.py")
    known = {flag for action in new_recipe.make_parser()._actions for flag in action.option_strings}
    known |= {"--dataset", "--output_dir"}  # of the command in the recipe
    seen, unknown = set(), []
    for path in files:
        texts = messages(path.read_text(encoding="utf-8"))
        given = [text for text in texts if text.startswith("--") and text.endswith("remove it")]
        for message in texts:
            if any(message in text for text in given) or message.startswith("# python"):
                continue  # about a flag that was given, or a command
            text = re.sub(r"--\w+ of scripts\.download_data|\(or --shards\)", "", message)
            flags = set(re.findall(r"--[a-z]\w*", text))
            seen |= flags
            unknown += [(path.name, message) for flag in flags - known]
    assert unknown == [] and {"--text_column", "--document_chars", "--max_bad"} <= seen


def blocks(page: str) -> list[dict]:
    """Return the YAML blocks of a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```yaml\n(.*?)^ *```$", text, flags=re.M | re.S)
    return [yaml.safe_load(textwrap.dedent(block)) for _, block in found]


def test_the_configs_of_the_page_load(run, tmp_path, capsys, monkeypatch):
    sft, large = blocks("own_data.md")
    write(tmp_path / "my_sft.yaml", yaml.safe_dump(sft).encode())
    assert load_settings(SFTConfig, "my_sft.yaml", [], {"init_from": "x"}).run == "my_run"
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    library_folder(tmp_path / "texts")
    run("--name", "my_run", "--text", "texts")
    [small] = re.findall(r"run=my_small .*?model\.\w+=\d+ .*?model\.\w+=\d+", page, flags=re.S)
    overrides = small.replace("\\", "").split()
    model = load("configs/my_run.yaml", overrides).model
    assert (model.hidden_size, model.intermediate_size, model.head_dim) == (128, 352, 32)
    [command] = re.findall(r"^ *python -m scripts\.new_plan (.*)$", page, flags=re.M)
    monkeypatch.setattr(sys, "argv", ["x", *shlex.split(command)])
    new_plan.main()
    write(tmp_path / "configs" / "my_large.yaml", yaml.safe_dump(large).encode())
    config = load("configs/my_large.yaml")
    plan = load("configs/my_plan/base.yaml")
    assert config.model == replace(plan.model, vocab_size=1024) and config.optim == plan.optim
    assert config.data.mix == {"my_texts": 1.0} and config.data.store == "data/store/my_run"


def test_large_text_is_filtered(run, tmp_path, monkeypatch):
    library_folder(tmp_path / "texts")
    monkeypatch.setattr(starter, "LARGE", 100_000)
    run("--name", "large", "--text", "texts")
    recipe = load_settings(Recipe, "configs/data/large.yaml")
    assert recipe.sources["texts"].filters == ("gopher_repetition",)
    assert recipe.dedup.kind == "minhash" and "mmlu" in recipe.decontaminate.test_sets
