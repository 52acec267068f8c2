"""User input: names, paths, files, columns, encodings, overrides, splits; bounded memory."""

import json
import shutil
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import complaint_of, read_metrics, train_here
from datatrove.data import Document as StepDocument

import scripts.download_data as download
from data import manifest
from data.chat.conversations import read_conversations
from data.chat.preferences import PairSource, PreferenceConfig
from data.chat.preferences import _check as check_pairs
from data.chat.rows import read_rows
from data.chat.sft import ChatConfig, ChatSource, _check_limit
from data.corpus import local_files, readers
from data.corpus.ingest import ingest, open_reader, source_name
from data.corpus.local_files import BLOCK, blocks, find_files, list_files, read_lines
from data.corpus.readers import FileReader, Skipped
from data.corpus.sources import Document, hub_files
from data.decontamination.scan import _files
from data.pipeline import steps
from data.shards import ShardWriter
from data.tokenizers.bpe import MAX_PIECE, _cut_long_pieces, train_tokenizer

ROWS = [
    {"id": f"d{i}", "text": f"The quick brown fox number {i} jumps over the lazy dog."}
    for i in range(300)
]


def lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(where: Path | str, **options) -> list[Document | Skipped]:
    return list(FileReader(str(where), **options).read())


# ---- names in the store


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run download_data in this process; return its last line of output, or its error."""

    def command(*arguments: object, fails: bool = False) -> str:
        arguments_of_command = ["--output", tmp_path / "store", "--dataset", *arguments]
        if fails:
            return complaint_of(download.main, arguments_of_command, capsys, monkeypatch)
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments_of_command)])
        download.main()
        return capsys.readouterr().out

    return command


def test_a_source_is_not_replaced_by_another_of_its_name(run, tmp_path):
    one, two = (
        write(tmp_path / name / "0.jsonl", lines(ROWS[:n])).parent
        for name, n in (("c4.en", 3), ("c4.realnews", 5))
    )
    message = run(one, two, fails=True)
    assert (
        f"{one} and {two} have the same source name c4" in message
        and not (tmp_path / "store").exists()
    )
    assert "3 documents" in run(one)
    message = run(two, fails=True)
    assert (
        f"has a source c4 from {one}, which {two} would replace" in message and "--name" in message
    )
    assert f"has a source c4 from {one}" in run(two, "--name", "c4", fails=True)
    assert "5 documents" in run(two, "--name", "c4_news")
    write(one / "1.jsonl", lines(ROWS[10:12]))
    assert "5 documents" in run(one)  # a source that changed is read again
    assert "5 documents" in run(f"{one}/../c4.en")  # another spelling of the same place
    assert sorted(path.name for path in (tmp_path / "store" / "documents").iterdir()) == [
        "c4",
        "c4_news",
    ]


def test_a_begun_download_is_not_replaced_either(tmp_path, monkeypatch):
    one, two = (write(tmp_path / name / "0.jsonl", lines(ROWS)) for name in ("a.x", "a.y"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(FileReader(str(one)), tmp_path / "store", "a")
    with pytest.raises(ValueError, match=r"a from .*a\.x.*a\.y/0.jsonl would replace"):
        ingest(FileReader(str(two)), tmp_path / "store", "a")
    assert ingest(FileReader(str(one)), tmp_path / "store", "a")


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("x/books-2024 (new).jsonl", "books-2024_new"),
        ("x/my texts/", "my_texts"),
        ("x/a.jsonl.zst", "a"),
        ("x/*.jsonl", ""),
        ("x/part?.jsonl", ""),
        ("fineweb_edu", "fineweb_edu"),
        ("hf://allenai/c4/en/*.json.gz@main", "c4"),
    ],
)
def test_names_of_sources(dataset, name):
    assert source_name(dataset) == name


# ---- paths


@pytest.mark.parametrize("name", ["books [2024].jsonl", "what?.jsonl", "a*b.jsonl", "[ab].jsonl"])
def test_a_path_that_exists_is_not_a_glob(name, tmp_path, run):
    write(tmp_path / "in" / "ab.jsonl", lines(ROWS[10:19]))
    path = write(tmp_path / "in" / name, lines(ROWS[:4]))
    assert [d.id for d in read(path)] == ["d0", "d1", "d2", "d3"]
    assert len(list(read_rows(str(path)))) == 4
    assert "4 documents" in run(path, "--name", "x")
    folder = write(tmp_path / "more [1]" / "b.jsonl", lines(ROWS[:2])).parent
    assert len(read(folder)) == 2 and len(read(f"{tmp_path}/more [[]1]/*.jsonl")) == 2


def test_equal_file_names_stay_apart_in_decontamination(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "0.jsonl", lines(ROWS[:1]))
    write(tmp_path / "a" / "1.jsonl", lines(ROWS[:1]))
    names = [name for name, _ in _files([str(tmp_path / "a"), str(tmp_path / "b")])]
    assert names == [str(tmp_path / "a" / "0.jsonl"), "1.jsonl", str(tmp_path / "b" / "0.jsonl")]


def test_an_existing_folder_needs_no_slash(run, tmp_path, monkeypatch):
    write(tmp_path / "texts" / "a.jsonl", lines(ROWS[:4]))
    monkeypatch.chdir(tmp_path)
    assert "4 documents" in run("texts")


def test_a_path_named_like_a_known_source_is_pointed_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(download._names("code")) == ["code"]
    assert (
        "note: code is read as the data set of that name; use ./code for the path"
        in capsys.readouterr().err
    )


def test_hidden_unfinished_and_own_files_are_not_read(tmp_path, run):
    root = tmp_path / "texts"
    for name in ("t.jsonl", "sub/u.jsonl"):
        write(root / name, lines(ROWS[:2]))
    for name in (
        "._t.jsonl",
        ".ipynb_checkpoints/t.jsonl",
        "sub/.git/u.jsonl",
        "half.tmp/00000.jsonl",
        "v.jsonl.tmp",
    ):
        write(root / name, lines(ROWS[:9]))
    assert list(find_files(str(root))) == ["sub/u.jsonl", "t.jsonl"]
    assert len(find_files(f"{root}/**/*.jsonl")) == len(find_files(f"{root}/*")) == 2
    # Hidden folders are read if the argument names them.
    assert list(find_files(str(root / ".ipynb_checkpoints"))) == ["t.jsonl"]
    assert "4 documents" in run(root, "--name", "x")
    assert "4 documents" in run(tmp_path, "--name", "y")  # the store lies in the folder
    assert "4 documents" in run(f"{tmp_path}/**/*", "--name", "z")
    # The store is read if the argument names a source in it.
    assert "4 documents" in run(tmp_path / "store" / "documents" / "x", "--name", "copy")
    assert "no file of type .txt" in run(tmp_path / "store", "--name", "w", fails=True)


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path / "far" / "a.jsonl", lines(ROWS[:2]))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert list(find_files(str(tmp_path / "in"))) == ["link/a.jsonl"]


def test_files_of_other_kinds_are_named(tmp_path, capsys):
    write(tmp_path / "in" / "a.jsonl", lines(ROWS))
    write(tmp_path / "in" / "b.jsonl.bz2", b"x")
    assert ingest(FileReader(str(tmp_path / "in")), tmp_path / "store", "s")
    reason = f"file type other than {local_files.FILE_TYPES}; {local_files.CONVERT}"
    assert f"s: skipped 1 ({reason}): b.jsonl.bz2" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no file of type .txt, .* found at .*b.jsonl.bz2"):
        list_files(str(tmp_path / "in" / "b.jsonl.bz2"))


# ---- columns and encodings


@pytest.mark.parametrize("kind", ["binary", "large_binary", "large_string", "string", "dictionary"])
def test_a_column_of_bytes_is_text(kind, tmp_path):
    types = {
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
        "large_string": pa.large_string(),
    }
    text = pa.array([row["text"].encode() for row in ROWS]).cast(types.get(kind, pa.string()))
    ids = pa.array([row["id"].encode() for row in ROWS])
    text = text.dictionary_encode() if kind == "dictionary" else text
    pq.write_table(pa.table({"id": ids, "text": text}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Document(row["id"], row["text"]) for row in ROWS]


def test_a_column_of_bytes_in_conversations(tmp_path):
    rows = pa.table(
        {
            "instruction": pa.array([b"What?"]),
            "output": pa.array([b"That."]),
            "picture": pa.array([b"\xff\xd8"]),
        }
    )
    pq.write_table(rows, tmp_path / "a.parquet")
    [row] = read_rows(str(tmp_path / "a.parquet"))
    assert row.value == {"instruction": "What?", "output": "That.", "picture": b"\xff\xd8"}


def test_a_column_that_is_no_text_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [[1, 2], [3]]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError,
        match=r"column text of .*a.parquet has type list<.*>, not text; give --text_column",
    ):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff\xfe\x00"])}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[1] == Skipped("not UTF-8 text", "a.parquet:2")


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_in_another_encoding_is_refused(encoding, packed, tmp_path):
    content = "".join(
        json.dumps({"text": f"{i} für"}, ensure_ascii=False) + "\n" for i in range(300)
    ).encode(encoding)
    name = "a.jsonl.zst" if packed else "a.jsonl"
    path = write(tmp_path / name, zstandard.compress(content) if packed else content)
    with pytest.raises(
        ValueError,
        match=r"is UTF-32 text; convert it|cannot be read|has no readable document",
    ):
        ingest(FileReader(str(path)), tmp_path / "store", "s")
    assert not (tmp_path / "store" / "documents" / "s").exists()
    if encoding == "utf-32":
        with pytest.raises(ValueError, match="is UTF-32 text; convert it"):
            list(read_conversations(str(path), "messages"))


def test_a_byte_order_mark_of_utf_8_is_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(ROWS[:3]))
    assert [d.id for d in read(path)] == ["d0", "d1", "d2"]
    assert [row.value["id"] for row in read_rows(str(path))] == ["d0", "d1", "d2"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "cut\n', "not JSON"),
        (b"[1]\n", "not a JSON object"),
        (b'{"content": "elsewhere"}\n', "no column with text"),
        (b'{"text": 5}\n', "no column with text"),
        (b'{"text": "\xff"}\n', "not UTF-8 text"),
    ],
)
def test_unreadable_rows_above_one_percent_are_refused(bad, reason, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", lines(ROWS[:297]) + bad * 3)
    assert ingest(FileReader(str(path)), tmp_path / "store", "s")
    assert f"s: skipped 3 ({reason}): a.jsonl:298" in capsys.readouterr().err
    path = write(tmp_path / "b.jsonl", lines(ROWS[:296]) + bad * 4)
    with pytest.raises(
        ValueError,
        match=rf"1.3% of the 300 rows of .*\(4 x {reason}; the first is b.jsonl:297.*; .*--max_bad",
    ):
        ingest(FileReader(str(path)), tmp_path / "store", "t")
    assert not (tmp_path / "store" / "documents" / "t").exists()
    assert ingest(FileReader(str(path)), tmp_path / "store", "t", max_bad=0.02)
    blank = write(tmp_path / "c.jsonl", lines(ROWS[:4]) + b'{"text": ""}\n{"text": null}\n')
    assert ingest(FileReader(str(blank)), tmp_path / "store", "u")  # empty, but not unreadable


# ---- bounded work


def test_a_json_array_on_one_line_is_linear_and_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", json.dumps([{"text": "x" * 1000}] * 30_000).encode() + b"\n")
    began = time.monotonic()
    assert read(path) == [Skipped("a JSON array; write one object per line", "a.jsonl:1")]
    assert time.monotonic() - began < 10
    copied: list[int] = []

    class Counted(bytes):
        def __add__(self, other):
            copied.append(len(self))
            return Counted(bytes(self) + other)

    monkeypatch.setattr(
        local_files, "blocks", lambda _: (Counted(b"x" * 1000) for _ in range(3000))
    )
    # A quadratic reader would need 4.5e9.
    assert sum(map(len, read_lines(path))) == 3_000_000 and sum(copied) < 3_000_000
    monkeypatch.setattr(local_files, "blocks", blocks)
    monkeypatch.setattr(local_files, "MAX_LINE", 10_000_000)
    with pytest.raises(
        ValueError,
        match=r"line 1 of .*a.jsonl is a JSON array of more than 10,000,000 bytes; write one "
        r"object",
    ):
        read(path)
    with pytest.raises(ValueError, match=r"line 1 of .*a.jsonl is a JSON array"):
        list(read_rows(str(path)))
    write(path, b'{"text": "' + b"y" * 9_000_000 + b'"}\n')
    assert [len(d.text) for d in read(path)] == [9_000_000]


def bomb(path: Path, megabytes: int) -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(
        b"".join(packer.compress(b"\0" * 1_000_000) for _ in range(megabytes)) + packer.flush()
    )


def test_a_zst_bomb_is_refused_in_little_memory(tmp_path):
    bomb(tmp_path / "a.jsonl.zst", 400)
    sizes = []
    with pytest.raises(
        ValueError, match="expands to more than 1,000 times its size, unlike text; remove it"
    ):
        for block in blocks(tmp_path / "a.jsonl.zst"):
            sizes.append(len(block))
    assert max(sizes) <= BLOCK and sum(sizes) < 60_000_000
    window = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    write(tmp_path / "b.jsonl.zst", packer.compress(lines(ROWS)) + packer.flush())
    [skipped] = read(tmp_path / "b.jsonl.zst")  # it asks for 1 GB to be decoded
    assert skipped.reason == "rest of the file truncated or damaged"


@pytest.mark.parametrize("suffix", ["gz", "zst", "jsonl"])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3_000_001])
def test_blocks_give_every_byte(suffix, size, tmp_path):
    import gzip
    import random

    for content in (b"a" * size, random.Random(size).randbytes(size)):
        pack = {"gz": gzip.compress, "zst": zstandard.compress, "jsonl": bytes}[suffix]
        path = write(tmp_path / f"x.{suffix}", pack(content) + pack(b"end"))
        assert b"".join(blocks(path)) == content + b"end"


@pytest.mark.parametrize("repeated", [False, True])
def test_long_rows_of_parquet_are_read_few_at_a_time(repeated, tmp_path, monkeypatch):
    page = "0123456789" * 200_000
    texts = [page if repeated else f"{i} {page}" for i in range(60)]
    pq.write_table(
        pa.table({"text": texts}),
        tmp_path / "a.parquet",
        row_group_size=60,
        use_dictionary=repeated,
    )
    sizes = []
    original = pq.ParquetFile.iter_batches

    def watched(self, **options):
        for batch in original(self, **options):
            sizes.append(batch.num_rows * 2_000_000)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert [d.text for d in read(tmp_path / "a.parquet")] == texts
    assert len(list(steps.read_documents(with_ids(tmp_path, texts)))) == 60
    assert len(list(read_rows(str(tmp_path / "a.parquet")))) == 60
    assert max(sizes) <= 2 * 16_000_000 and sum(sizes) == 3 * 120_000_000


def with_ids(folder: Path, texts: list[str]) -> Path:
    path = folder / "with_ids.parquet"
    pq.write_table(
        pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}),
        path,
        row_group_size=60,
    )
    return path


def test_batches_of_documents_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BATCH_CHARS", 1000)
    sizes = [10] * 300 + [400] * 5 + [5000, 10, 3000]
    documents = [StepDocument(id=str(i), text="x" * size) for i, size in enumerate(sizes)]
    batches = list(steps.batches(iter(documents)))
    assert [d.id for batch in batches for d in batch] == [d.id for d in documents]
    assert all(len(batch) == 1 or sum(len(d.text) for d in batch) <= 1000 for batch in batches)
    assert max(map(len, batches)) == 100
    writer = steps.WriteClean(str(tmp_path / "clean"))
    assert len(list(writer.run(iter(documents), rank=0))) == len(documents)
    table = pq.ParquetFile(tmp_path / "clean" / "00000.parquet")
    assert [row["text"] for row in table.read().to_pylist()] == [d.text for d in documents]
    groups = [table.read_row_group(i)["text"].to_pylist() for i in range(table.num_row_groups)]
    assert all(sum(map(len, group[:-1])) < 1000 for group in groups) and len(groups) > 5


def test_a_document_without_spaces_trains_in_seconds():
    import random

    text = "".join(random.Random(7).choices("ACGT", k=200_000))
    began = time.monotonic()
    assert train_tokenizer([text, "=" * 50_000, " " * 50_000], 2000).get_vocab_size() == 2000
    assert time.monotonic() - began < 30  # 4 s; minutes where a word is as long as the text


def test_only_long_pieces_are_cut():
    short = "Some words, " * 500 + "x" * (MAX_PIECE - 1) + " \u4e2d" * 10
    assert list(_cut_long_pieces(short)) == [short]
    long = "a " + "ab" * 1700 + ". " + "!" * 2001 + " b " + "\n" * 1000
    pieces = list(_cut_long_pieces(long))
    assert "".join(pieces) == long and max(map(len, pieces)) < 2 * MAX_PIECE and len(pieces) > 5


# ---- splits and configs


def report(train: int, val: int, kind: str) -> dict:
    if kind == "pairs":
        return {
            "pairs": {"train": train, "val": val},
            "bad": {},
            "rows": train + val,
            "dropped": {},
            "named": [],
        }
    splits = {"train": {"conversations": train}, "val": {"conversations": val}}
    return {"splits": splits, "bad": {}, "conversations": train + val, "named": [], "counts": {}}


def test_all_rows_held_out_names_the_share():
    chat = ChatConfig({"x": ChatSource("a.jsonl")}, val_fraction=0.9)
    with pytest.raises(
        ValueError,
        match=r"x: all 3 conversations are in the validation split; lower chat.val_fraction=0.9 "
        r"or add data",
    ):
        _check_limit("x", report(0, 3, "chat"), chat)
    with pytest.raises(ValueError, match="check its path and format"):
        _check_limit("x", report(0, 0, "chat"), chat)
    pairs = PreferenceConfig({"x": PairSource("a.jsonl")}, val_fraction=0.8)
    with pytest.raises(
        ValueError,
        match=r"x: all 2 pairs are in the validation split; lower preferences.val_fraction=0.8",
    ):
        check_pairs("x", report(0, 2, "pairs"), pairs)
    with pytest.raises(ValueError, match="check its path, format and length"):
        check_pairs("x", report(0, 0, "pairs"), pairs)


CARD = """---
configs:
- config_name: en
  data_files: [{split: train_sft, path: en.jsonl}]
- config_name: de
  data_files: [{split: train, path: de.jsonl}]
---
"""


def test_splits_and_configs_of_a_hub_set(tmp_path, monkeypatch):
    for name in ("en", "de"):
        row = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": name}]
        }
        write(tmp_path / "owner" / "two" / f"{name}.jsonl", lines([row]))
    write(tmp_path / "owner" / "two" / "README.md", CARD.encode())
    monkeypatch.chdir(tmp_path)  # where the hub's own client takes the folder for the data set

    def answers(**options) -> list[str]:
        return [
            c["messages"][1]["content"]
            for c in read_conversations("hf://owner/two", "messages", **options)
        ]

    assert answers(config="en", split="train_sft") == ["en"] and answers(config="de") == ["de"]
    for options, message in (
        ({}, "owner/two has several configs; set config of the source to one of en, de"),
        ({"config": "fr"}, "owner/two has no config fr; set config of the source to one of en, de"),
        (
            {"config": "en"},
            "owner/two has no split train; set split of the source to one of train_sft",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            answers(**options)
    with pytest.raises(
        ValueError, match=r"split and config select rows of a hub data set; .* local path"
    ):
        list(read_rows("owner/two/en.jsonl", "test"))


def test_any_files_of_the_hub_are_a_source(tmp_path):
    assert hub_files("hf://allenai/c4/en/*.json.gz@v1") == ("allenai/c4", "en/*.json.gz", "v1")
    assert hub_files("hf://a/b/data/train-*.parquet") == ("a/b", "data/train-*.parquet", "main")
    for wrong in ("hf://a", "hf://a/b/c.zip"):
        with pytest.raises(ValueError, match=rf"{wrong} must name the files to read"):
            hub_files(wrong)
    commit = "0" * 40
    name, reader = open_reader(
        f"hf://allenai/c4/en/*.json.gz@{commit}", tmp_path, text_column="body"
    )
    assert name == "c4" and isinstance(reader, readers.HubReader)
    assert (reader.inputs["repo"], reader.inputs["files"], reader.inputs["revision"]) == (
        "allenai/c4",
        "en/*.json.gz",
        commit,
    )
    assert reader.source.text_column == "body" and reader.origin == f"allenai/c4@{commit}"


# ---- held-out text


def store_without_val(text_store: Path, target: Path, split: str = "train") -> Path:
    """Copy text_store, with a single split for one source."""
    shutil.copytree(text_store, target, ignore=shutil.ignore_patterns("plans"))
    made_by = manifest.file_hash(target / "tokenizer" / "tokenizer.json")
    shutil.rmtree(target / "tokens" / "second")
    with ShardWriter(target / "tokens" / "second", 384, made_by, inputs={}) as shards:
        for i in range(25):
            shards.add(split, [0, *(2 + (i + n) % 300 for n in range(200))])
    return target


def test_a_source_without_held_out_tokens_is_said_at_the_start(settings, text_store, tmp_path):
    store = store_without_val(text_store, tmp_path / "small")
    message = (
        r"source second has 0 validation tokens, .*raise val_fraction in the recipe "
        r".*validation.every=0"
    )
    with pytest.raises(ValueError, match=message):
        train_here(settings(f"data.store={store}"))
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()
    assert train_here(settings(f"data.store={store}", "validation.every=0"))
    assert not any("val/loss" in row for row in read_metrics(tmp_path / "logs"))
    with pytest.raises(
        ValueError,
        match="source second has no training documents; lower val_fraction",
    ):
        train_here(settings(f"data.store={store_without_val(text_store, tmp_path / 'all', 'val')}"))


def test_a_failing_validation_saves_first(settings, tmp_path, monkeypatch):
    import train

    def failing(model, **_):
        raise ZeroDivisionError("nothing to divide by")

    with monkeypatch.context() as patched:
        patched.setattr(train, "perplexity", failing)
        with pytest.raises(ZeroDivisionError):
            train_here(settings("checkpoint.every=4"))
    assert [path.name for path in (tmp_path / "checkpoints" / "one").glob("step_*")] == ["step_3"]
    assert [row["step"] for row in read_metrics(tmp_path / "logs")] == [1, 2, 3]
    assert train_here(settings("checkpoint.every=4"))  # continues after the step that failed
    rows = read_metrics(tmp_path / "logs")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and "val/loss" in rows[-1]
