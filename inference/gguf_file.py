"""Validate a GGUF file in Python before C code or the gguf package reads it.

A damaged file makes llama.cpp abort, crash or wait for ever, and gguf.GGUFReader loop over counts that no file holds. What is
checked: structure (types, lengths, counts, offsets, alignment), numbers (known keys and their ranges), the vocabulary, and for
dense llama and qwen3 files the name and shape of every tensor. Values of weights are not.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # GGUF's number of a type
UNSIGNED, SIGNED, FLOATS = (0, 2, 4, 10), (1, 3, 5, 11), (6, 12)
MAX_KEY, MAX_NAME, MAX_DIMENSIONS = (
    65_535,
    63,
    4,
)  # of a key, a tensor's name, a tensor; as llama.cpp has them
MAX_VOCABULARY, MAX_CONTEXT, MAX_LAYERS, MAX_WIDTH = 1 << 24, 1 << 24, 512, 1 << 20
KINDS = {"u32": (4,), "i32": (5,), "f32": (6,), "bool": (7,), "str": (STRING,), "u64": (10,)}
COUNT, WIDTH = ("u32", 1, MAX_WIDTH), ("u32", 1, MAX_WIDTH)
KEYS: dict[
    str, tuple[str, float, float]
] = {  # after "<architecture>.": type and range; a count may be an array, one a layer
    "block_count": ("u32", 1, MAX_LAYERS),
    "context_length": ("u32", 1, MAX_CONTEXT),
    "embedding_length": WIDTH,
    "feed_forward_length": WIDTH,
    "vocab_size": ("u32", 1, MAX_VOCABULARY),
    "attention.head_count": COUNT,
    "attention.head_count_kv": ("u32", 0, MAX_WIDTH),
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "attention.layer_norm_rms_epsilon": ("f32", 0.0, 1.0),
    "attention.layer_norm_epsilon": ("f32", 0.0, 1.0),
    "attention.sliding_window": ("u32", 0, MAX_CONTEXT),
    "rope.dimension_count": WIDTH,
    "rope.freq_base": ("f32", 1.0, 1e12),
    "rope.scaling.factor": ("f32", 1e-3, 1e6),
    "rope.scaling.type": ("str", 0, 0),
    "rope.scaling.original_context_length": ("u32", 1, MAX_CONTEXT),
    "expert_count": ("u32", 0, 4096),
    "expert_used_count": ("u32", 0, 4096),
    "expert_feed_forward_length": WIDTH,
}
NOT_WEIGHTS = (
    24,
    25,
    26,
    27,
    28,
)  # GGML's I8, I16, I32, I64 and F64; llama.cpp crashes on weights of these types
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")
OTHER_KEYS: dict[str, tuple[str, float, float]] = {
    "general.architecture": ("str", 0, 0),
    "general.file_type": ("u32", 0, 2000),
    "general.quantization_version": ("u32", 0, 100),
    "general.alignment": ("u32", 8, 1 << 16),
    "tokenizer.ggml.model": ("str", 0, 0),
    "tokenizer.ggml.pre": ("str", 0, 0),
    "tokenizer.chat_template": ("str", 0, 0),
    "tokenizer.ggml.add_bos_token": ("bool", 0, 1),
    "tokenizer.ggml.add_eos_token": ("bool", 0, 1),
    "tokenizer.ggml.add_space_prefix": ("bool", 0, 1),
    "split.count": ("u16", 0, 1),
}
KINDS["u16"] = (2,)


class Value(NamedTuple):
    kind: int  # GGUF's number of the type
    of: int  # of an array's elements, else -1
    value: Any  # a number, a text, a list of texts or an array


class Tensor(NamedTuple):
    shape: tuple[int, ...]  # ggml's order: the width of a row first
    kind: int
    offset: int  # from the beginning of the file
    size: int


class Gguf(NamedTuple):
    values: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        found = self.values.get(name)
        return default if found is None else found.value

    def of_model(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture; of one value a layer the largest."""
        value = self.get(f"{self.get('general.architecture')}.{name}", default)
        return int(np.max(value)) if isinstance(value, np.ndarray) else value

    def cache_bytes(self, context: int) -> int:
        """Bytes of llama.cpp's key-value cache (fp16) for a context of so many tokens."""
        heads = self.of_model("attention.head_count")
        width = self.of_model("embedding_length") // heads
        sizes = [self.of_model(f"attention.{part}_length", width) for part in ("key", "value")]
        return (
            2
            * sum(sizes)
            * self.of_model("attention.head_count_kv", heads)
            * self.of_model("block_count")
            * context
        )


def check_gguf(path: Path) -> Gguf:
    """The keys and tensors of a GGUF file; ValueError, in one sentence, where it is missing, damaged or not GGUF."""
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    status = path.stat()
    return _checked(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _checked(path: Path, size: int, changed: int, inode: int) -> Gguf:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                content = _Cursor(data).read()
            _check_values(content)
            _check_vocabulary(content)
            _check_shapes(content)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is damaged: {error}; copy or export it again") from error
    return content


class _Cursor:
    """Reads a file from its beginning; ValueError where it ends too early or a number is beyond reason."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, count: int) -> int:
        """Go on by so many bytes; returns where they begin."""
        if count > self.size - self.at:
            raise ValueError("it ends before its tensors do, or a length in it is wrong")
        self.at += count
        return self.at - count

    def number(self, kind: int) -> Any:
        letter = "<" + SCALARS[kind]
        begin = self.take(struct.calcsize(letter))
        if kind == 7 and self.data[begin] > 1:
            raise ValueError("a boolean is neither 0 nor 1")
        return struct.unpack_from(letter, self.data, begin)[0]

    def text(self, limit: int = 1 << 30) -> str:
        length = self.number(10)
        if length > limit:
            raise ValueError(f"a text of {length} bytes is too long")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError:
            raise ValueError("a text in it is not UTF-8") from None

    def value(self) -> Value:
        kind = self.number(4)
        if kind == STRING:
            return Value(kind, -1, self.text())
        if kind in SCALARS:
            return Value(kind, -1, self.number(kind))
        if kind != ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        of, count = self.number(4), self.number(10)
        if of == STRING:
            if count * 8 > self.size - self.at:
                raise ValueError("an array is longer than the file")
            return Value(kind, of, [self.text() for _ in range(count)])
        if of not in SCALARS:
            raise ValueError(f"an array has elements of the unknown type {of}")
        dtype = np.dtype("<" + SCALARS[of] if of != 7 else "u1")
        begin = self.take(count * dtype.itemsize)
        return Value(kind, of, np.frombuffer(self.data[begin : self.at], dtype))

    def read(self) -> Gguf:
        import gguf

        self.take(4)
        version, tensors, keys = self.number(4), self.number(10), self.number(10)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are read, little-endian")
        if keys * 13 + tensors * 24 > self.size:  # the least that each takes
            raise ValueError(f"it counts {keys} keys and {tensors} tensors, more than it can hold")
        values: dict[str, Value] = {}
        for _ in range(keys):
            name = self.text(MAX_KEY)
            if not name or name in values:
                raise ValueError(f"the key {name!r} is empty or there twice")
            values[name] = self.value()
        alignment = values.get("general.alignment", Value(4, -1, 32))
        if (
            alignment.kind != 4
            or not 8 <= alignment.value <= 1 << 16
            or alignment.value & (alignment.value - 1)
        ):
            raise ValueError(
                f"general.alignment is {alignment.value!r}, not a power of two from 8 to 65536"
            )
        found: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        end = 0
        for _ in range(tensors):
            name = self.text(MAX_NAME)
            if not name or name in found:
                raise ValueError(f"the tensor {name!r} has no name or is there twice")
            dimensions = self.number(4)
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = tuple(self.number(10) for _ in range(dimensions))
            kind, offset = self.number(4), self.number(10)
            try:
                block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ValueError(f"{name} has the unknown type {kind}") from None
            if min(shape) < 1 or math.prod(shape) >= 1 << 48 or shape[0] % block:
                raise ValueError(f"{name} has the shape {shape}, which its type cannot have")
            size = math.prod(shape) // block * width
            if offset != end:
                raise ValueError(
                    f"{name} lies at offset {offset}, not {end}, where the tensor before it ends"
                )
            end = -(-(offset + size) // alignment.value) * alignment.value
            found[name] = (shape, kind, offset, size)
        begin = -(-self.at // alignment.value) * alignment.value
        for name, (_, _, offset, size) in found.items():
            if begin + offset + size > self.size:
                raise ValueError(f"it ends before its tensors do, in {name}")
        return Gguf(
            values,
            {
                name: Tensor(s, k, begin + offset, size)
                for name, (s, k, offset, size) in found.items()
            },
        )


def _check_values(content: Gguf) -> None:
    """Raise ValueError unless each known key has its type and a number in its range, and every number is finite."""
    for name, found in content.values.items():
        if (found.kind in FLOATS and not math.isfinite(found.value)) or (
            found.of in FLOATS and not np.isfinite(found.value).all()
        ):
            raise ValueError(f"{name} is not finite")
    _check_known(content, OTHER_KEYS, "", 0)
    if not (architecture := content.get("general.architecture")):
        raise ValueError("it has no general.architecture")
    layers = content.values.get(f"{architecture}.block_count")
    _check_known(
        content, KEYS, architecture + ".", layers.value if layers and layers.kind == 4 else 0
    )
    for name in REQUIRED:
        if f"{architecture}.{name}" not in content.values:
            raise ValueError(f"it has no {architecture}.{name}")
    heads, kv = (content.of_model(f"attention.{name}") for name in ("head_count", "head_count_kv"))
    if kv and heads % kv:
        raise ValueError(f"{heads} attention heads do not divide over {kv} of keys and values")
    key = content.of_model("attention.key_length", content.of_model("embedding_length") // heads)
    rotated = content.of_model("rope.dimension_count", key)
    if rotated > key or rotated % 2 or not key:
        raise ValueError(f"rope.dimension_count is {rotated} with heads of {key}")
    if content.of_model("expert_used_count", 0) > content.of_model("expert_count", 0):
        raise ValueError("it uses more experts than it has")


def _check_known(
    content: Gguf, keys: Mapping[str, tuple[str, float, float]], prefix: str, layers: int
) -> None:
    for name, (kind, least, most) in keys.items():
        found = content.values.get(prefix + name)
        if found is None:
            continue
        values = [found.value]
        if (
            found.kind == ARRAY
            and name in PER_LAYER
            and found.of in (4, 5)
            and len(found.value) == layers
        ):
            values = found.value.tolist()
        elif found.kind not in KINDS[kind]:
            raise ValueError(f"{prefix}{name} has GGUF type {found.kind}, not {kind}")
        odd = next(
            (value for value in values if kind != "str" and not least <= value <= most), None
        )
        if odd is not None or (kind == "f32" and values == [0.0]):
            raise ValueError(
                f"{prefix}{name} is {odd if odd is not None else 0.0}, not from {least:g} to {most:g}"
            )


def _check_vocabulary(content: Gguf) -> None:
    """Raise ValueError unless the lists of the vocabulary have one length and type, and ids lie in it."""
    lists = {"tokens": STRING, "merges": STRING, "token_type": 5, "scores": 6}
    for name, of in lists.items():
        found = content.values.get(f"tokenizer.ggml.{name}")
        if found is not None and (found.kind != ARRAY or found.of != of):
            raise ValueError(
                f"tokenizer.ggml.{name} is not a list of {'texts' if of == STRING else 'numbers'}"
            )
    tokens = content.get("tokenizer.ggml.tokens")
    if not tokens or content.get("tokenizer.ggml.model") is None:
        raise ValueError("it has no vocabulary")
    types = content.get("tokenizer.ggml.token_type", np.ones(len(tokens), dtype=np.int32))
    if len(types) != len(tokens) or len(content.get("tokenizer.ggml.scores", tokens)) != len(
        tokens
    ):
        raise ValueError(
            f"{len(tokens)} tokens have {len(types)} types, or another number of scores"
        )
    if types.min() < 0 or types.max() > 6:
        raise ValueError("a token has an unknown type")
    known = set(tokens)
    if len(known) != len(tokens) or "" in known:
        raise ValueError("a token is empty or there twice")
    if (size := content.of_model("vocab_size", len(tokens))) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens, but a vocab_size of {size}")
    for name, found in content.values.items():
        is_id = name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
        if is_id and (found.kind != 4 or not 0 <= found.value < len(tokens)):
            raise ValueError(
                f"{name} is {found.value}, which is not an id of its {len(tokens)} tokens"
            )
    if content.get("tokenizer.ggml.model") == "gpt2":
        if content.get("tokenizer.ggml.merges") is None:
            raise ValueError("it has no merges")
        for merge in content.get("tokenizer.ggml.merges"):
            first, _, second = merge.partition(" ")
            if not (first in known and second in known and first + second in known):
                raise ValueError(f"the merge {merge[:80]!r} does not join two tokens into one")


def _check_shapes(content: Gguf) -> None:
    """Raise ValueError unless tensors have the shapes that the numbers ask for; dense llama and qwen3 files only."""
    width, vocabulary = (
        content.of_model("embedding_length"),
        len(content.get("tokenizer.ggml.tokens")),
    )
    embedding = content.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (width, vocabulary):
        raise ValueError(
            f"token_embd.weight is {embedding and embedding.shape}, not {(width, vocabulary)}"
        )
    architecture = content.get("general.architecture")
    if architecture not in ("llama", "qwen3") or content.of_model("expert_count", 0):
        return
    needed = ("feed_forward_length", "attention.layer_norm_rms_epsilon")
    if missing := next(
        (name for name in needed if f"{architecture}.{name}" not in content.values), None
    ):
        raise ValueError(f"it has no {architecture}.{missing}")
    if any(isinstance(content.get(f"{architecture}.{name}"), np.ndarray) for name in PER_LAYER):
        return  # layers of different shapes
    heads, ffn = content.of_model("attention.head_count"), content.of_model("feed_forward_length")
    kv = content.of_model("attention.head_count_kv", heads)
    key = content.of_model("attention.key_length", width // heads)
    value = content.of_model("attention.value_length", width // heads)
    if not kv:
        raise ValueError("attention.head_count_kv is 0")
    layer = {
        "attn_norm": (width,),
        "attn_q": (width, heads * key),
        "attn_k": (width, kv * key),
        "attn_v": (width, kv * value),
    }
    layer |= {
        "attn_output": (heads * value, width),
        "ffn_norm": (width,),
        "ffn_gate": (width, ffn),
        "ffn_up": (width, ffn),
    }
    layer |= {
        "ffn_down": (ffn, width),
        **({"attn_q_norm": (key,), "attn_k_norm": (key,)} if architecture == "qwen3" else {}),
    }
    wanted = {
        f"blk.{i}.{name}.weight": shape
        for i in range(content.of_model("block_count"))
        for name, shape in layer.items()
    }
    wanted["output_norm.weight"] = (width,)
    for name, shape in wanted.items():
        found = content.tensors.get(name)
        if found is None or found.shape != shape:
            raise ValueError(
                f"the tensor {name} is {found.shape if found else 'missing'}, not {shape}"
            )
    output = content.tensors.get("output.weight", embedding)
    if output.shape != (width, vocabulary):
        raise ValueError(f"output.weight is {output.shape}, not {(width, vocabulary)}")
    for name, tensor in content.tensors.items():
        if len(tensor.shape) == 1 and tensor.kind != 0:
            raise ValueError(f"the tensor {name} is not fp32")
        if tensor.kind in NOT_WEIGHTS:
            raise ValueError(
                f"the tensor {name} has GGML type {tensor.kind}, which llama.cpp does not multiply"
            )
