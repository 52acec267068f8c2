"""Named conversations and preference pairs: pinned addresses, and rows in the hub's schema."""

import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from data.chat.conversations import read_conversations
from data.chat.preferences import PairSource, parse_row
from data.chat.rows import read_rows
from data.chat.sft import ChatSource
from data.corpus.sources import CONVERSATIONS, HUB_SOURCES, PAIRS
from train_dpo import PreferenceRun
from training.settings import load_settings

QUESTION = {"content": "Name a noble gas.", "role": "user"}
TURNS = [QUESTION, {"content": "Neon.", "role": "assistant"}]
REJECTED = [QUESTION, {"content": "Iron.", "role": "assistant"}]
ROWS = {  # all columns of the hub's parquet files
    "smoltalk2": {
        "messages": TURNS,
        "chat_template_kwargs": {
            "custom_instructions": "",
            "enable_thinking": False,
            "python_tools": [],
            "xml_tools": [],
        },
        "source": "smol-magpie-ultra",
    },
    "ultrafeedback": {
        "prompt": QUESTION["content"],
        "prompt_id": "a" * 64,
        "chosen": TURNS,
        "rejected": REJECTED,
        "messages": TURNS,
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    },
}
ROWS["tulu_3_8b"] = ROWS["tulu_3_70b"] = {
    "id": "x-1",
    "prompt": QUESTION["content"],
    "chosen": TURNS,
    "rejected": REJECTED,
    "source": "ai2-adapt-dev/a",
}
NAMED = {**CONVERSATIONS, **PAIRS}


def source_of(name: str, **settings):
    return (ChatSource if name in CONVERSATIONS else PairSource)(name, **settings)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_name_becomes_a_pinned_address_and_its_rows_are_read(name, tmp_path, monkeypatch):
    rows, source = NAMED[name], source_of(name)
    assert re.fullmatch("[0-9a-f]{40}", rows.revision) and rows.licence and rows.about
    assert source.path == f"hf://{rows.repo}@{rows.revision}"
    assert (source.split, source.config) == (rows.split, rows.config)
    assert type(source)(name.replace("_", "-").upper()) == source
    assert type(source)(**vars(source)) == source  # as a resolved config reads back
    file = tmp_path / f"{rows.split}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[name]] * 3), file)
    asked = []
    real = datasets.load_dataset

    def local(repo, config, split, revision, streaming):
        asked.append((repo, config, split, revision))
        return real("parquet", data_files=str(file), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    if name in CONVERSATIONS:
        read = [*read_conversations(source.path, source.format, None, source.split, source.config)]
        assert [row["messages"] for row in read] == [TURNS] * 3
        assert read[0]["ignored"] in ([], ["column chat_template_kwargs"])
    else:
        pairs = [
            parse_row(row, source.format)
            for row in read_rows(source.path, source.split, source.config)
        ]
        assert {(pair.chosen["content"], pair.rejected["content"]) for pair in pairs} == {
            ("Neon.", "Iron.")
        }
        assert len(pairs) == 3 and pairs[0].prompt == TURNS[:1]
    assert asked == [(rows.repo, rows.config, rows.split, rows.revision)]


def test_a_local_path_and_explicit_settings_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = source_of("smoltalk2", split="OpenHermes_2.5_no_think")
    assert other.split == "OpenHermes_2.5_no_think" and other.config == "SFT"
    assert source_of("smoltalk2", config="Mid").config == "Mid"
    assert ChatSource("ultrafeedback").path == "ultrafeedback"  # of pairs, not of conversations
    (tmp_path / "tulu_3_8b").mkdir()
    assert PairSource("tulu_3_8b").path == "tulu_3_8b"
    override = ["preferences.sources={ultra: {path: ultrafeedback}}", "data.mix={ultra: 1}"]
    run = load_settings(PreferenceRun, ROOT / "configs" / "dpo.yaml", override)
    assert run.preferences.sources["ultra"] == PairSource("ultrafeedback")


def test_the_page_lists_every_name_with_its_licence():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name, source in {**HUB_SOURCES, **NAMED}.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert source.repo in row
        if "## More named sources" in page.split(row)[0]:
            assert f"| {source.licence} |" in row
