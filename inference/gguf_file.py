"""Validate a GGUF file in Python before C code or the gguf package reads it.

A damaged file makes llama.cpp abort, crash or hang, and gguf.GGUFReader loop over impossible
counts. The check covers the structure (types, lengths, counts, offsets, alignment), the ranges of
known keys and the vocabulary. For dense llama and qwen3 files it covers the name and shape of every
tensor. It does not read the weights.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STRING, ARRAY = 8, 9  # GGUF type numbers, as below
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
}
UNSIGNED, SIGNED, FLOATS = (0, 2, 4, 10), (1, 3, 5, 11), (6, 12)
MAX_KEY, MAX_NAME, MAX_DIMENSIONS = 65_535, 63, 4  # llama.cpp's limits for keys and tensors
MAX_VOCABULARY, MAX_CONTEXT, MAX_LAYERS, MAX_WIDTH = 1 << 24, 1 << 24, 512, 1 << 20
KINDS = {"u32": (4,), "i32": (5,), "f32": (6,), "bool": (7,), "str": (STRING,), "u64": (10,)}
COUNT, WIDTH = ("u32", 1, MAX_WIDTH), ("u32", 1, MAX_WIDTH)
# Keys after "<architecture>.": type and range. Keys of PER_LAYER may be arrays.
KEYS: dict[str, tuple[str, float, float]] = {
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
    "rope.scaling.attn_factor": ("f32", 1e-3, 1e3),
    "expert_count": ("u32", 0, 4096),
    "expert_used_count": ("u32", 0, 4096),
    "expert_feed_forward_length": WIDTH,
}
NOT_WEIGHTS = (24, 25, 26, 27, 28)  # GGML's I8, I16, I32, I64, F64 crash llama.cpp as weights
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
    kind: int  # GGUF type number
    element_kind: int  # element type of an array, else -1
    value: Any  # number, str, list of str, or numpy array


class Tensor(NamedTuple):
    shape: tuple[int, ...]  # in ggml's order: the row width first
    kind: int  # ggml type number
    offset: int  # bytes from the start of the file
    size: int  # bytes


class Gguf(NamedTuple):
    values: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key."""
        entry = self.values.get(name)
        return default if entry is None else entry.value

    def of_model(self, name: str, default: Any = None) -> Any:
        """Return the value of an architecture key; of per-layer values, the largest."""
        value = self.get(f"{self.get('general.architecture')}.{name}", default)
        return int(np.max(value)) if isinstance(value, np.ndarray) else value

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of llama.cpp's key-value cache (fp16) for `context` tokens."""
        heads = self.of_model("attention.head_count")
        width = self.of_model("embedding_length") // heads
        key = self.of_model("attention.key_length", width)
        value = self.of_model("attention.value_length", width)
        kv_heads = self.of_model("attention.head_count_kv", heads)
        return 2 * (key + value) * kv_heads * self.of_model("block_count") * context


def check_gguf(path: Path) -> Gguf:
    """Read the keys and tensors of a GGUF file; ValueError if missing, damaged or not GGUF."""
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the path")
    status = path.stat()
    return _checked(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _checked(path: Path, size: int, changed: int, inode: int) -> Gguf:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file; give a file of scripts.export_gguf or llama.cpp"
            )
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
    """Reads a file sequentially; ValueError if it ends early or a number is impossible."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position, self.size = data, 0, len(data)

    def take(self, count: int) -> int:
        """Advance by `count` bytes; return their start."""
        if count > self.size - self.position:
            raise ValueError("it ends before its last tensor, or one of its lengths is wrong")
        self.position += count
        return self.position - count

    def number(self, kind: int) -> Any:
        letter = "<" + SCALARS[kind]
        begin = self.take(struct.calcsize(letter))
        if kind == 7 and self.data[begin] > 1:
            raise ValueError("a boolean is neither 0 nor 1")
        return struct.unpack_from(letter, self.data, begin)[0]

    def text(self, limit: int = 1 << 30) -> str:
        length = self.number(10)
        if length > limit:
            raise ValueError(f"a string of {length} bytes is too long")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError:
            raise ValueError("a string in it is not UTF-8") from None

    def value(self) -> Value:
        kind = self.number(4)
        if kind == STRING:
            return Value(kind, -1, self.text())
        if kind in SCALARS:
            return Value(kind, -1, self.number(kind))
        if kind != ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        element_kind, count = self.number(4), self.number(10)
        if element_kind == STRING:
            if count * 8 > self.size - self.position:
                raise ValueError("an array is longer than the file")
            return Value(kind, element_kind, [self.text() for _ in range(count)])
        if element_kind not in SCALARS:
            raise ValueError(f"an array has elements of the unknown type {element_kind}")
        dtype = np.dtype("<" + SCALARS[element_kind] if element_kind != 7 else "u1")
        begin = self.take(count * dtype.itemsize)
        return Value(kind, element_kind, np.frombuffer(self.data[begin : self.position], dtype))

    def read(self) -> Gguf:
        import gguf

        self.take(4)
        version, tensors, keys = self.number(4), self.number(10), self.number(10)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; supported are 2 and 3, little-endian")
        if keys * 13 + tensors * 24 > self.size:  # minimum bytes per key and per tensor
            raise ValueError(f"its {keys} keys and {tensors} tensors exceed its size")
        values: dict[str, Value] = {}
        for _ in range(keys):
            name = self.text(MAX_KEY)
            if not name or name in values:
                raise ValueError(f"the key {name!r} is empty or repeated")
            values[name] = self.value()
        setting = values.get("general.alignment", Value(4, -1, 32))
        alignment = setting.value
        if setting.kind != 4 or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise ValueError(
                f"general.alignment is {alignment!r}, not a power of two from 8 to 65536"
            )
        entries: dict[str, Tensor] = {}  # offsets relative to the data section
        end = 0
        for _ in range(tensors):
            name = self.text(MAX_NAME)
            if not name or name in entries:
                raise ValueError(f"the tensor {name!r} has no name or is repeated")
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
                raise ValueError(f"{name} has the shape {shape}, which its type does not allow")
            size = math.prod(shape) // block * width
            if offset != end:
                raise ValueError(
                    f"{name} has offset {offset}, but the previous tensor ends at {end}"
                )
            end = -(-(offset + size) // alignment) * alignment
            entries[name] = Tensor(shape, kind, offset, size)
        start = -(-self.position // alignment) * alignment
        tensors_by_name = {
            name: tensor._replace(offset=start + tensor.offset) for name, tensor in entries.items()
        }
        for name, tensor in tensors_by_name.items():
            if tensor.offset + tensor.size > self.size:
                raise ValueError(f"it ends before its last tensor, in {name}")
        return Gguf(values, tensors_by_name)


def _check_values(content: Gguf) -> None:
    """Check the types and ranges of known keys, and that every number is finite."""
    for name, entry in content.values.items():
        has_floats = entry.kind in FLOATS or entry.element_kind in FLOATS
        if has_floats and not np.isfinite(entry.value).all():
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
        raise ValueError(f"{heads} attention heads are not a multiple of {kv} key-value heads")
    key = content.of_model("attention.key_length", content.of_model("embedding_length") // heads)
    rotated = content.of_model("rope.dimension_count", key)
    if rotated > key or rotated % 2 or not key:
        raise ValueError(f"rope.dimension_count is {rotated}, but head_dim is {key}")
    if content.of_model("expert_used_count", 0) > content.of_model("expert_count", 0):
        raise ValueError("it uses more experts than it has")


def _check_known(
    content: Gguf, keys: Mapping[str, tuple[str, float, float]], prefix: str, layers: int
) -> None:
    """Check the type and range of each known key that is present."""
    for name, (kind, least, most) in keys.items():
        entry = content.values.get(prefix + name)
        if entry is None:
            continue
        values = [entry.value]
        is_integer_array = entry.kind == ARRAY and entry.element_kind in (4, 5)
        if is_integer_array and name in PER_LAYER and len(entry.value) == layers:
            values = entry.value.tolist()
        elif entry.kind not in KINDS[kind]:
            raise ValueError(f"{prefix}{name} has GGUF type {entry.kind}, not {kind}")
        for value in values if kind != "str" else []:
            if not least <= value <= most or (kind == "f32" and value == 0.0):
                raise ValueError(f"{prefix}{name} is {value}, not from {least:g} to {most:g}")


def _check_vocabulary(content: Gguf) -> None:
    """Check the lengths and types of the vocabulary's lists, special-token ids and merges."""
    lists = {"tokens": STRING, "merges": STRING, "token_type": 5, "scores": 6}
    for name, element_kind in lists.items():
        entry = content.values.get(f"tokenizer.ggml.{name}")
        if entry is not None and (entry.kind != ARRAY or entry.element_kind != element_kind):
            elements = "strings" if element_kind == STRING else "numbers"
            raise ValueError(f"tokenizer.ggml.{name} is not a list of {elements}")
    tokens = content.get("tokenizer.ggml.tokens")
    if not tokens or content.get("tokenizer.ggml.model") is None:
        raise ValueError("it has no vocabulary")
    types = content.get("tokenizer.ggml.token_type", np.ones(len(tokens), dtype=np.int32))
    scores = content.get("tokenizer.ggml.scores", tokens)
    if not len(tokens) == len(types) == len(scores):
        raise ValueError(
            f"it has {len(tokens)} tokens, but {len(types)} types and {len(scores)} scores"
        )
    if types.min() < 0 or types.max() > 6:
        raise ValueError("a token has an unknown type")
    known = set(tokens)
    if len(known) != len(tokens) or "" in known:
        raise ValueError("a token is empty or repeated")
    if (size := content.of_model("vocab_size", len(tokens))) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens, but a vocab_size of {size}")
    for name, entry in content.values.items():
        is_id = name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
        if is_id and (entry.kind != 4 or not 0 <= entry.value < len(tokens)):
            raise ValueError(
                f"{name} is {entry.value}, which is not an id of its {len(tokens)} tokens"
            )
    if content.get("tokenizer.ggml.model") == "gpt2":
        if content.get("tokenizer.ggml.merges") is None:
            raise ValueError("it has no merges")
        for merge in content.get("tokenizer.ggml.merges"):
            first, _, second = merge.partition(" ")
            if not (first in known and second in known and first + second in known):
                raise ValueError(f"the merge {merge[:80]!r} does not join two tokens into one")


def _check_shapes(content: Gguf) -> None:
    """Check the shapes of all tensors; complete for dense llama and qwen3 files only."""
    width = content.of_model("embedding_length")
    vocabulary = len(content.get("tokenizer.ggml.tokens"))
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
        "attn_output": (heads * value, width),
        "ffn_norm": (width,),
        "ffn_gate": (width, ffn),
        "ffn_up": (width, ffn),
        "ffn_down": (ffn, width),
    }
    if architecture == "qwen3":
        layer |= {"attn_q_norm": (key,), "attn_k_norm": (key,)}
    expected = {
        f"blk.{i}.{name}.weight": shape
        for i in range(content.of_model("block_count"))
        for name, shape in layer.items()
    }
    expected["output_norm.weight"] = (width,)
    for name, shape in expected.items():
        stored = content.tensors.get(name)
        if stored is None or stored.shape != shape:
            raise ValueError(
                f"the tensor {name} is {stored.shape if stored else 'missing'}, not {shape}"
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
