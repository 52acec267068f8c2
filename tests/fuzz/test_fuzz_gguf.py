"""GGUF files: keys, types, lengths, tensors and flipped bytes, up to llama.cpp and back to a
tokenizer.
"""

import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from data.tokenizers.bpe import load_tokenizer
from export.gguf import write_gguf
from fuzz.bases import chat_files, write_files
from fuzz.mutate import EXTREMES, Change, byte_changes, change_bytes
from fuzz.sandbox import fuzz
from inference import gguf_tokenizer
from inference.gguf_file import ARRAY, SCALARS, STRING, check_gguf
from inference.gguf_tokenizer import open_gguf, read_vocabulary, tokenizer_folder
from inference.llamacpp import LlamaCpp, check_weights, find_library

Key = tuple[str, int, int, Any]  # name, type, type of elements or -1, value
Tensor = tuple[str, list[int], int, int]  # name, shape, type, offset
CONTEXT = 64
FOUND = [("structure", [("kind", "blk.1.attn_k.weight", kind)]) for kind in (24, 25, 26, 27, 28)]
TEXTS = ["", "llama", "qwen3", "gpt2", "llama-bpe", "x" * 300, "\ud800", "{{ a }}"]


@cache
def whole() -> bytes:
    """A GGUF file of a chat model with random F16 weights."""
    with tempfile.TemporaryDirectory() as folder:
        model, path = write_files(chat_files(), Path(folder) / "model"), Path(folder) / "m.gguf"
        write_gguf(
            model, {"f16": path}, read_vocabulary(model, 392).put, "m", say=lambda line: None
        )
        return path.read_bytes()


@cache
def parts() -> tuple[list[Key], list[Tensor], bytes]:
    """Return keys, tensors and data of the valid file."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(whole())
        file.flush()
        info = check_gguf(Path(file.name))
    keys = []
    for name, (kind, of, value) in info.values.items():
        keys.append((name, kind, of, value.tolist() if isinstance(value, np.ndarray) else value))
    begin = min(tensor.offset for tensor in info.tensors.values())
    return (
        keys,
        [(name, list(t.shape), t.kind, t.offset - begin) for name, t in info.tensors.items()],
        whole()[begin:],
    )


def pack(kind: int, value: Any) -> bytes:
    """Encode a value for GGUF; a value that does not fit its type becomes zeros."""
    if kind == STRING:
        text = str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    try:
        return struct.pack("<" + SCALARS[kind], value)
    except (struct.error, KeyError, OverflowError, TypeError):
        return bytes(struct.calcsize("<" + SCALARS.get(kind, "I")))


def write(keys: list[Key], tensors: list[Tensor], data: bytes) -> bytes:
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, of, value in keys:
        content += pack(STRING, name) + struct.pack("<I", kind)
        if kind == ARRAY:
            items = value if isinstance(value, list) else [value]
            content += struct.pack("<IQ", of & 0xFFFFFFFF, len(items)) + b"".join(
                pack(of, item) for item in items
            )
        else:
            content += pack(kind, value)
    for name, shape, kind, offset in tensors:
        content += (
            pack(STRING, name)
            + struct.pack("<I", len(shape))
            + struct.pack(f"<{len(shape)}Q", *shape)
        )
        content += struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % 32) + data


@cache
def structural() -> st.SearchStrategy[list[Change]]:
    keys, tensors, data = parts()
    names, weights = [key[0] for key in keys], [tensor[0] for tensor in tensors]
    numbers = st.sampled_from([n for n in EXTREMES if not isinstance(n, str)]) | st.integers(0, 400)
    sizes = st.integers(0, 400) | numbers.map(whole_number)
    named, weight = st.sampled_from(names), st.sampled_from(weights)
    long = st.sampled_from([key[0] for key in keys if isinstance(key[3], list)])
    change = st.one_of(
        st.tuples(st.just("value"), named, numbers),
        st.tuples(st.just("value"), named, st.sampled_from(TEXTS)),
        st.tuples(st.just("type"), named, st.integers(0, 13)),
        st.tuples(st.just("drop"), named),
        st.tuples(st.just("again"), named),
        st.tuples(st.just("name"), named, named | st.just("")),
        st.tuples(
            st.just("element"),
            long,
            st.integers(0, 400),
            numbers | st.sampled_from(["", "a b", "Ġ", "<|im_end|>"]),
        ),
        st.tuples(st.just("shorter"), long, st.integers(0, 400)),
        st.tuples(st.just("shape"), weight, st.lists(sizes, max_size=5)),
        st.tuples(st.just("kind"), weight, st.integers(0, 45)),
        st.tuples(st.just("offset"), weight, st.sampled_from([0, 32, 64, 128]) | sizes),
        st.tuples(st.just("weights"), byte_changes(len(data))),
        st.tuples(st.just("lost"), weight),
    )
    return st.lists(change, max_size=3)


def whole_number(value: float) -> int:
    return int(min(max(value, 0), 2**64 - 1)) if value == value and abs(value) < 1e300 else 2**63


def changed_file(changes: list[Change]) -> bytes:
    keys, tensors, data = parts()
    fields, shapes = [list(key) for key in keys], [list(tensor) for tensor in tensors]
    for kind_of_change, name, *more in changes:
        rows = [row for row in fields if row[0] == name]
        for row in rows:
            if kind_of_change in ("value", "type"):
                row[3 if kind_of_change == "value" else 1] = more[0]
            elif kind_of_change == "drop":
                fields.remove(row)
            elif kind_of_change == "again":
                fields.append(list(row))
            elif kind_of_change == "name":
                row[0] = more[0]
            elif kind_of_change == "element" and isinstance(row[3], list) and row[3]:
                row[3] = [*row[3]]
                row[3][more[0] % len(row[3])] = more[1]
            elif kind_of_change == "shorter" and isinstance(row[3], list):
                row[3] = row[3][: more[0]]
        for shape in [shape for shape in shapes if shape[0] == name]:
            if kind_of_change == "lost":
                shapes.remove(shape)
            elif kind_of_change in ("shape", "kind", "offset"):
                shape[{"shape": 1, "kind": 2, "offset": 3}[kind_of_change]] = more[0]
        if kind_of_change == "weights":
            data = change_bytes(data, name)
    return write(
        [(n, k, o, v) for n, k, o, v in fields], [(n, s, k, o) for n, s, k, o in shapes], data
    )


def inputs() -> st.SearchStrategy[tuple[str, list[Change]]]:
    header = len(whole()) - len(parts()[2])
    return st.one_of(
        st.tuples(st.just("structure"), structural()),
        st.tuples(st.just("structure"), structural()),
        st.tuples(st.just("bytes"), byte_changes(header, special=range(0, 64))),
    )


@pytest.mark.skipif(find_library() is None, reason="no llama.cpp: pip install xllamacpp")
@fuzz(st.deferred(inputs), share=0.08, accepted=(0.05, 0.7), examples=FOUND)
def test_gguf(case: tuple[str, list[Change]], folder: Path) -> None:
    """A file that check_gguf accepts loads in llama.cpp, which must not end the process, and has
    values of its own shapes.
    """
    kind, changes = case
    path = folder / "m.gguf"
    path.write_bytes(change_bytes(whole(), changes) if kind == "bytes" else changed_file(changes))
    content = check_gguf(path)
    for name, tensor in content.tensors.items():
        assert tensor.offset + tensor.size <= path.stat().st_size, name
    reader = open_gguf(path)
    assert {tensor.name for tensor in reader.tensors} == set(content.tensors)
    check_weights(path)
    with LlamaCpp(path, CONTEXT, threads=1, probed=True) as runtime:
        ids = runtime.encode("a text\n1 <|im_end|>")
        assert all(0 <= id < runtime.vocab_size for id in ids)
        assert np.isfinite(runtime.feed([0, 5])).all()
        runtime.decode([0, 5, runtime.vocab_size - 1])
    try:
        load_tokenizer(tokenizer_folder(path)).encode("a text\n1")
    finally:
        gguf_tokenizer._unpacked.cache_clear()  # removes its temporary folder
