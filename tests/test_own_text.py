"""One's own text: accepted files, encodings, columns, and what is skipped."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT

from data import manifest
from data.chat.rows import read_rows
from data.corpus import documents as documents_module
from data.corpus import local_files, tables
from data.corpus.documents import BINARY, ENCODING, NO_TEXT_COLUMN, text_pieces
from data.corpus.ingest import ingest, open_reader
from data.corpus.local_files import HIDDEN, OTHER_SPLIT, TEMPORARY
from data.corpus.readers import FileReader, Skipped
from data.corpus.sources import Document, hub_set

OTHER_TYPE = f"file type other than {local_files.FILE_TYPES}; {local_files.CONVERT}"
TEXTS = [
    'One, "two";\nthree \\ [x] {y}',
    "Größe 日本 🤖",
    *(f"Text {i}.\n\nEnd." for i in range(8)),
]
ROWS = [{"id": f"d{i}", "text": text, "n": i} for i, text in enumerate(TEXTS)]


def lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table_text(separator: str, rows: list[dict] = ROWS) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arrow_stream(rows: list[dict] = ROWS) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def arrow_file() -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=3)
    return sink.getvalue()


FORMS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: lines(ROWS),
    "a.jsonl.gz": lambda: gzip.compress(lines(ROWS)),
    "a.jsonl.zst": lambda: zstandard.compress(lines(ROWS)),
    "utf16.jsonl": lambda: (
        json.dumps(ROWS[0]).encode("utf-16")
        + lines(ROWS[1:]).decode().encode("utf-16-le").join([b"\n\0", b""])
    ),
    "a.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False).encode("utf-8-sig"),
    "lines.json": lambda: lines(ROWS),
    "a.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": lambda: table_text(","),
    "semicolon.csv": lambda: b"\xef\xbb\xbf" + table_text(";"),
    "utf16.CSV": lambda: table_text(",").decode().encode("utf-16"),
    "a.csv.gz": lambda: gzip.compress(table_text("|")),
    "a.tsv": lambda: table_text("\t"),
    "a.parquet": parquet,
    "stream.arrow": arrow_stream,
    "file.arrow": arrow_file,
}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(where: Path, **options) -> list[Document | Skipped]:
    return list(FileReader(str(where), **options).read())


# ---- forms


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_documents_and_resumes_after_any_row(name, tmp_path):
    path = write(tmp_path / name, FORMS[name]())
    expected = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    assert read(path) == expected
    for count in (1, 3, 4, len(TEXTS)):
        reader = FileReader(str(path))
        rows = reader.read()
        assert list(islice(rows, count)) == expected[:count]
        again = FileReader(str(path))
        again.position = json.loads(json.dumps(reader.position))
        assert list(again.read()) == expected[count:]


@pytest.mark.parametrize("name", ["a.txt", "b.md", "C.TXT", "d.txt.gz", "e.md.zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_is_one_document(name, encoding, tmp_path):
    text = "Größe\r\n\r\n日本 🤖 \n"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    assert read(write(tmp_path / name, pack(text.encode(encoding)))) == [Document(name, text)]


def test_utf_16_of_both_byte_orders_and_its_damage(tmp_path):
    for codec, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        path = write(tmp_path / "a.txt", mark + "für 🤖".encode(codec))
        assert read(path) == [Document("a.txt", "für 🤖")]
    [skipped] = read(write(tmp_path / "a.txt", b"\xff\xfea\0b"))
    assert skipped.reason == "rest of the file truncated or damaged"
    lone = b"\xff\xfe" + b"\x00\xd8" + "x".encode("utf-16-le")
    assert read(write(tmp_path / "a.txt", lone)) == [Skipped(ENCODING, "a.txt")]


def test_folders_of_save_to_disk(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    write(tmp_path / "one" / "cache-123.arrow", b"left by map()")
    expected = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    assert read(tmp_path / "one") == expected
    halves = {"train": data.select(range(4)), "test": data.select(range(4, 10))}
    datasets.DatasetDict(halves).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two") == [Skipped(OTHER_SPLIT, "test"), *expected[:4]]
    assert read(tmp_path / "two", split="test")[1:] == expected[4:]
    with pytest.raises(ValueError, match=r"two has no split val; give --split test or train"):
        read(tmp_path / "two", split="val")
    with pytest.raises(ValueError, match=r"--split test applies to hub .* neither; remove it"):
        read(tmp_path / "one", split="test")


def test_a_folder_of_a_mixture_skips_and_names_what_it_does_not_read(tmp_path, capsys):
    folder = tmp_path / "texts"
    for name in ("a.csv", "deep/a.json", "deep/stream.arrow"):
        write(folder / name, FORMS[name.rpartition("/")[2]]())
    for i in range(5):
        write(folder / f"t{i}.txt", f"Text {i}".encode())
    odd = {
        "latin.txt": ("für".encode("latin-1"), ENCODING),
        "picture.md": (b"\x89PNG\0\0", BINARY),
        "empty.txt": (b"", "no text"),
        "paper.pdf": (b"%PDF", OTHER_TYPE),
        ".hidden.txt": (b"x", HIDDEN),
        "half.txt.tmp": (b"x", TEMPORARY),
        "wide.csv": ("id,text\n1,x".encode("utf-32"), ENCODING),
        "meta.csv": (b"file,author\na.txt,Someone\n", NO_TEXT_COLUMN),
        "config.json": (b'{\n"a": 1\n}', tables.NOT_ROWS),
    }
    for name, (content, _) in odd.items():
        write(folder / name, content)
    write(folder / ".git" / "a.txt", b"x")
    assert ingest(FileReader(str(folder)), tmp_path / "store", "s")
    record, errors = manifest.read(tmp_path / "store" / "documents" / "s"), capsys.readouterr().err
    assert record is not None and record["documents"] == 3 * len(TEXTS) + 5
    reasons = [reason for _, reason in odd.values()] + [HIDDEN]
    assert record["skipped"] == {reason: reasons.count(reason) for reason in reasons}
    for name, (_, reason) in odd.items():
        [line] = [line for line in errors.splitlines() if f"({reason})" in line]
        assert name in line and line.startswith(f"s: skipped {reasons.count(reason)} ")
    assert ".git" in errors and "meta.csv (file, author)" in errors


def test_a_file_in_another_encoding_is_refused_and_so_are_many(tmp_path):
    latin = write(tmp_path / "in" / "a.txt", "für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"no readable document \(1 x .*iconv.* first is a.txt\)"):
        ingest(FileReader(str(latin)), tmp_path / "store", "s")
    write(tmp_path / "in" / "b.txt", "für".encode("latin-1"))
    write(tmp_path / "in" / "c.txt", b"fine")
    with pytest.raises(ValueError, match=r"2 of 3 texts of .* first is a.txt\); convert them with"):
        ingest(FileReader(str(tmp_path / "in")), tmp_path / "store", "s")
    write(tmp_path / "in" / "d.txt", b"fine too")
    assert ingest(FileReader(str(tmp_path / "in")), tmp_path / "store", "s")
    wide = write(tmp_path / "a.csv", "id,text\n1,x".encode("utf-32"))
    with pytest.raises(ValueError, match=r"a.csv is UTF-32 text; convert it with iconv -t UTF-8"):
        read(wide)


# ---- columns and rows


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet", "arrow"])
def test_the_column_of_the_text_is_chosen_and_printed(form, tmp_path, capsys):
    def table(**row) -> Path:
        rows = [row]
        arrow = pa.Table.from_pylist(rows)
        path = tmp_path / f"a.{form}"
        if form == "parquet":
            pq.write_table(arrow, path)
            return path
        content = {"csv": table_text(",", rows), "jsonl": lines(rows), "arrow": arrow_stream(rows)}
        return write(path, content.get(form, json.dumps(rows).encode()))

    def texts(path: Path, **options) -> list[str]:
        return [row.text for row in read(path, **options) if isinstance(row, Document)]

    assert texts(table(title="t", text="x", story="s")) == ["x"]
    assert texts(table(title="t", Content="x", story="s")) == ["x"]
    assert texts(table(id="1", n=3, story="x")) == ["x"]
    assert texts(table(title="t", text="y", story="x"), text_column="story") == ["x"]
    assert ingest(FileReader(str(table(id="1", n=3, story="x"))), tmp_path / "store", "s")
    said = f"s: read the column 'story' as text, first in a.{form}; --text_column names another\n"
    assert capsys.readouterr().err == said
    path = table(id="1", title="t", story="x")
    with pytest.raises(ValueError, match=r"no column text|no readable document .*--text_column"):
        ingest(FileReader(str(path)), tmp_path / "store", "t")
    with pytest.raises(ValueError, match=r"no column plot|no readable document .*--text_column"):
        ingest(FileReader(str(path), "plot"), tmp_path / "store", "t")


def test_malformed_rows_of_a_table_are_counted(tmp_path):
    content = (
        b'id,text\n1,fine\n2,not quoted, it goes on\n\n3,f\xfcr\n4,"a ""b"" c\nd"\n5\n6,"open\n'
    )
    assert read(write(tmp_path / "a.csv", content + b"7,lost\n")) == [
        Document("1", "fine"),
        Skipped(tables.TOO_LONG_ROW, "a.csv:3"),
        Skipped("not UTF-8 text", "a.csv:4"),
        Document("4", 'a "b" c\nd'),
        Skipped("no column with text", "a.csv:6 (keys: id)"),
        Skipped(tables.NOT_CSV, "a.csv:7"),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_array_is_cut_into_its_elements(size, tmp_path, monkeypatch):
    elements = [{"text": 'a"b\\', "more": [1, {"x": "]},["}]}, [], "a, [b", 3.5, None, {}, "\\\\"]
    content = json.dumps(elements, indent=1).encode()

    def in_pieces(content: bytes) -> list[bytes | str]:
        pieces = [content[i : i + size] for i in range(0, len(content), size)]
        monkeypatch.setattr(tables, "utf8_blocks", lambda path: iter(pieces))
        return list(tables.json_rows(tmp_path / "a.json"))

    assert [json.loads(row) for row in in_pieces(content)] == elements
    assert in_pieces(b" [ ] \n") == []
    assert in_pieces(b"[1, 2] x")[-1] == tables.MORE_THAN_ARRAY
    with pytest.raises(EOFError):
        in_pieces(content[:-1])


def test_an_array_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    row = json.dumps({"text": "x" * 1000}).encode()
    content = b"[" + b",".join([row] * 5000) + b"]"
    path = write(tmp_path / "a.json.gz", gzip.compress(content))
    monkeypatch.setattr(tables, "MAX_LINE", 3_000_000)  # bytes that an element may take
    assert len(read(path)) == 5000
    write(path, gzip.compress(b'[{"text": "' + b"x" * 4_000_000 + b'"}]'))
    with pytest.raises(ValueError, match=r"an element of the JSON array in .* has more than 3,000"):
        read(path)
    cut = gzip.compress(content)[:-200]
    rows = read(write(path, cut))
    assert len(rows) > 1000 and rows[-1].reason == "rest of the file truncated or damaged"
    assert read(write(tmp_path / "b.json", b'["one", "two"]')) == [
        Document("b.json:1", "one"),
        Document("b.json:2", "two"),
    ]


# ---- long files


@pytest.mark.parametrize("chars", [10, 64, 500])
@pytest.mark.parametrize("kind", ["paragraphs", "one line", "one word"])
def test_pieces_of_a_file_are_its_text(chars, kind, tmp_path):
    words = [f"Wört{i}" for i in range(200)]
    paragraphs = "\n\n".join("\n".join(words[i : i + 7]) for i in range(0, 200, 7))
    text = {"paragraphs": paragraphs, "one line": " ".join(words), "one word": "日" * 700}[kind]
    path = write(tmp_path / "a.txt", text.encode())
    pieces = [piece.decode() for piece in text_pieces(path, chars)]
    assert "".join(pieces) == text + "\n" and len(pieces) > 1
    assert max(len(piece.encode()) for piece in pieces) <= 2 * chars
    if kind == "paragraphs":
        assert all(piece.endswith("\n\n") for piece in pieces[:-1]) == (chars > 10)
    read_pieces = read(path, document_chars=chars)
    assert [row.text for row in read_pieces] == pieces
    assert [row.id for row in read_pieces[:2]] == ["a.txt#1", "a.txt#2"]


def test_a_document_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "MAX_LINE", 1000)
    path = write(tmp_path / "a.txt", b"line\n" * 300)
    with pytest.raises(ValueError, match="more than 1,000 bytes; cut it with --document_chars"):
        read(path)
    assert sum(len(row.text) for row in read(path, document_chars=1000)) == 1500


# ---- hub data sets


def test_addresses_of_whole_data_sets():
    assert hub_set("hf://a/b") == ("a/b", None, None)
    assert hub_set("hf://a/b:c-1.0@v1") == ("a/b", "c-1.0", "v1")
    assert hub_set("hf://a/b@main") == ("a/b", None, "main")
    assert hub_set("hf://a/b/c.parquet@v1") is hub_set("a/b") is None


CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/train.parquet}, {split: test, path: en/test.parquet}]
- config_name: de
  data_files: [{split: train, path: de/train.parquet}]
---
"""


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, capsys):
    """Reads a folder in the hub's layout, which its client takes for the data set of that name."""
    root = tmp_path / "owner" / "books"
    write(root / "README.md", CARD.encode())
    rows = [{"title": "t", "id": row["id"], "content": row["text"]} for row in ROWS]
    parts = {"en/train": rows[:7], "en/test": rows[7:], "de/train": [{"story": "Es war", "n": 3}]}
    for name, part in parts.items():
        path = root / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=3)
    monkeypatch.chdir(tmp_path)

    def documents(address: str, **options) -> list[Document | Skipped]:
        name, reader = open_reader(address, tmp_path / "store", **options)
        assert name == "books"
        return list(reader.read())

    expected = [Document(f"d{i}", text) for i, text in enumerate(TEXTS)]
    assert documents("hf://owner/books:en") == expected[:7]
    assert documents("hf://owner/books:en@main", split="test") == expected[7:]
    assert documents("hf://owner/books:de") == [Document("books/1", "Es war")]
    titles = documents("hf://owner/books:en", text_column="title", id_column="content")
    assert titles[0] == Document(TEXTS[0], "t")
    for address, options, message in (
        ("hf://owner/books", {}, "several configs; read hf://owner/books:CONFIG with one of en"),
        ("hf://owner/books:en", {"split": "val"}, "no split val; give --split with one of t"),
        ("hf://owner/books:en", {"text_column": "x"}, "no readable document .7 x no column"),
    ):
        _, reader = open_reader(address, tmp_path / "store", **options)
        with pytest.raises(ValueError, match=message):
            ingest(reader, tmp_path / "store", "books")
    _, reader = open_reader("hf://owner/books:en", tmp_path / "store")
    assert ingest(reader, tmp_path / "store", "books")
    assert "books: read the column 'content' as text, first in owner/books:en:train@" in (
        capsys.readouterr().err
    )
    _, reader = open_reader("hf://owner/books:en", tmp_path / "store")
    assert list(islice(reader.read(), 4)) == expected[:4]
    _, again = open_reader("hf://owner/books:en", tmp_path / "store")
    again.position = json.loads(json.dumps(reader.position))
    assert list(again.read()) == expected[4:7]
    _, other = open_reader("hf://owner/books:en", tmp_path / "store", split="test")
    with pytest.raises(ValueError, match=r"books from owner/books:en:train@.* would replace"):
        ingest(other, tmp_path / "store", "books")
    rows = list(read_rows("hf://owner/books:en"))
    assert [row.value["content"] for row in rows] == TEXTS[:7]
    with pytest.raises(ValueError, match="en and config: de name two configs; remove one"):
        list(read_rows("hf://owner/books:en", config="de"))


def test_settings_without_effect_are_refused(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    for dataset, options, message in (
        ("hf://a/b/c.parquet", {"split": "test"}, "--split applies to whole hub data sets"),
        ("fineweb_edu", {"split": "test"}, "--split applies to whole hub data sets"),
        ("code", {"split": "test"}, "--split applies to whole hub data sets"),
        (str(path), {"split": "test"}, "--split test applies to hub data sets and folders"),
        ("code", {"document_chars": 1000}, "--document_chars cuts local .txt and .md files only"),
        ("hf://a/b", {"document_chars": 1000}, "--document_chars cuts local .txt and .md files"),
    ):
        with pytest.raises(ValueError, match=message):
            open_reader(dataset, tmp_path / "store", **options)


# ---- errors that say what to do


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("form", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_a_missing_column_lists_the_keys_of_the_first_row(form, explicit, tmp_path):
    def refused(row: dict) -> str:
        arrow = pa.Table.from_pylist([row])
        path = write(tmp_path / form, b"")
        if form == "a.parquet":
            pq.write_table(arrow, path)
        else:
            flat = {key: value if isinstance(value, str) else "[]" for key, value in row.items()}
            content = {
                "a.csv": lambda: table_text(",", [flat]),
                "a.jsonl": lambda: lines([row]),
                "a.json": lambda: json.dumps([row]).encode(),
                "a.arrow": lambda: arrow_stream([row]),
            }
            write(path, content[form]())
        with pytest.raises(ValueError) as error:
            ingest(FileReader(str(path), "plot" if explicit else None), tmp_path / "store", "s")
        return str(error.value)

    words = refused({"id": "1", "title": "t", "story": "x"})
    assert "id, title, story" in words and "--text_column" in words and "train_sft" not in words
    for key in ("messages", "conversations"):
        words = refused({key: [{"role": "user", "content": "Hi"}], "origin": "forum"})
        assert f"{key}, origin" in words and "train_sft.py" in words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.docx", b"PK", "convert documents to .txt"),
        ("in/a.pdf", b"%PDF", r"\(only a.pdf\); convert documents to .txt"),
        (
            "a.json.gz",
            gzip.compress(b"A plain text.\nMore.", mtime=0),
            "rename a file of plain text to .txt",
        ),
        ("a.jsonl", b"A plain text.\nMore.\n", "rename a file of plain text"),
        ("a.txt", b"\x89PNG\0\0", "convert them to text$"),
        ("a.md", "f\xfcr".encode("latin-1"), "convert them with iconv -t UTF-8$"),
        ("a.jsonl", b'"text"\n', r'write each row as {"text": "..."}$'),
        ("a.parquet", b"PAR1", "restore them from a copy$"),
    ],
)
def test_files_that_a_flag_does_not_help_get_other_advice(name, content, words, tmp_path):
    path = write(tmp_path / name, content)
    where = path.parent if name.startswith("in/") else path
    with pytest.raises(ValueError, match=words) as error:
        ingest(FileReader(str(where)), tmp_path / "store", "s")
    assert "--" not in str(error.value)


def test_an_address_without_its_prefix_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for address in ("Salesforce/wikitext", "a/b:c-1.0@v1", "a.b/c"):
        with pytest.raises(ValueError, match=f"give hf://{address}$"):
            open_reader(address, tmp_path / "store")
    for path in ("texts/lost", "texts/*.txt", "/a/b", "a/b/c"):
        with pytest.raises(ValueError, match=r"; check the path$"):
            open_reader(path, tmp_path / "store", "s")


# ---- conversations


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[1, 2]"}]


@pytest.mark.parametrize("form", ["a.csv", "a.tsv", "a.json", "lines.json", "a.arrow", "disk"])
def test_rows_of_conversations_are_read_from_the_same_forms(form, tmp_path):
    rows = [{"messages": MESSAGES, "output": "[1, 2]"}, {"messages": MESSAGES[:1], "output": "b"}]
    flat = [{**row, "messages": json.dumps(row["messages"])} for row in rows]
    folder = tmp_path / "in"
    if form == "disk":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    else:
        content = {
            "a.csv": lambda: table_text(",", flat),
            "a.tsv": lambda: table_text("\t", flat),
            "a.json": lambda: json.dumps(rows).encode(),
            "lines.json": lambda: lines(rows),
            "a.arrow": lambda: arrow_stream(rows),
        }
        write(folder / form, content[form]())
    write(folder / "README.md", b"About these rows")
    assert [row.value for row in read_rows(str(folder))] == rows


# ---- documentation


def test_the_page_lists_the_file_types():
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in page for suffix in (".txt", ".md", ".csv", ".tsv", ".json"))
    assert all(f"`{suffix}`" in page for suffix in (".jsonl", ".parquet", ".arrow"))
