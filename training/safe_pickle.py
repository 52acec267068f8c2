"""Read torch's distributed checkpoints without executing code from untrusted files.

The index `state/.metadata` and all non-tensor entries are pickles. `SafeReader` unpickles the index
with an allowlist of the classes that torch writes; `SafePlanner` loads the entries with
weights_only=True.
"""

import io
import math
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

MAX_INDEX_BYTES = 1 << 28  # the index of a 1.1B model on 8 ranks has about 1 MB
CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in CLASSES},
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PurePosixPath,  # the folder torch saved to; no file is accessed
    ("torch.serialization", "_get_layout"): _get_layout,
    **{
        ("torch", str(value).removeprefix("torch.")): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
}
# Opcodes that pickle protocols 2 to 5 write for these classes, without sets, extensions and
# persistent ids.
OPCODE_NAMES = """
    PROTO FRAME STOP MARK POP POP_MARK GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD MEMOIZE
    BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT SHORT_BINUNICODE BINUNICODE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
"""
OPCODES = [vars(pickle)[name] for name in OPCODE_NAMES.split()]

PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # the C unpickler cannot reject opcodes


class _Unpickler(PythonUnpickler):
    """An unpickler restricted to the objects in ALLOWED and the opcodes in OPCODES."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise ValueError(
                f"it asks for {module}.{name}, which is not part of a checkpoint's index"
            ) from None

    def refuse(self) -> None:
        raise ValueError("it uses a pickle operation that is not part of a checkpoint's index")

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):  # BUILD on a torch class would set its attributes
            self.refuse()
        super().load_build()

    def load_setitem(self) -> None:
        self.check_keys([self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_setitems()

    def check_keys(self, keys: list[Any]) -> None:
        """Allow string and MetadataIndex keys only: hashing a deeply nested tuple can hang."""
        for key in keys:
            name, offset = (key.fqn, key.offset) if type(key) is MetadataIndex else (key, None)
            if type(name) is not str or type(offset) not in (torch.Size, type(None)):
                self.refuse()

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), refuse),
        **{code[0]: PythonUnpickler.dispatch[code[0]] for code in OPCODES},
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def read_index(state: Path) -> Metadata:
    """Return the index (`.metadata`) of a state/ folder.

    ValueError if the file is damaged or is not a valid index.
    """
    path = state / ".metadata"
    try:
        if (size := path.stat().st_size) > MAX_INDEX_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_INDEX_BYTES:,}")
        index = _Unpickler(io.BytesIO(path.read_bytes())).load()
        _check(index, state)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(
            f"{path} is not a checkpoint's index ({error}); use another copy of the checkpoint"
        ) from error
    return index


def _check(index: Any, state: Path) -> None:
    """Raise ValueError if types, shapes or offsets are invalid, or data files are too short."""
    if (
        type(index) is not Metadata
        or type(index.state_dict_metadata) is not dict
        or type(index.storage_data) is not dict
    ):
        raise ValueError("it is not an index")
    if type(index.storage_meta) not in (StorageMeta, type(None)):
        raise ValueError("its storage_meta has another type")
    for path in (index.planner_data or {}).values():  # entry name -> key path
        if type(path) is not tuple or not all(type(key) in (str, int) for key in path):
            raise ValueError("its planner_data has an invalid key path")
    sizes: dict[str, int] = {}
    for key, info in index.storage_data.items():
        known = (
            type(key) is MetadataIndex
            and type(key.fqn) is str
            and key.fqn in index.state_dict_metadata
        )
        if not known or type(info) is not _StorageInfo:
            raise ValueError("its storage_data do not belong to its entries")
        name = info.relative_path
        if (
            type(name) is not str
            or Path(name).name != name
            or vars(info).get("transform_descriptors")
        ):
            raise ValueError(f"it reads {name!r}, which is not a plain file of this folder")
        if not (_natural(info.offset) and _natural(info.length)):
            raise ValueError(f"{key.fqn} has no valid offset and length")
        if name not in sizes:
            sizes[name] = (state / name).stat().st_size if (state / name).is_file() else -1
        if sizes[name] < info.offset + info.length:
            raise ValueError(f"{name} is missing or shorter than the index says")
    for name, entry in index.state_dict_metadata.items():
        if type(name) is not str or type(entry) not in (
            TensorStorageMetadata,
            BytesStorageMetadata,
        ):
            raise ValueError("an entry is neither a tensor nor bytes")
        if type(entry) is BytesStorageMetadata and MetadataIndex(name) not in index.storage_data:
            raise ValueError(f"{name} has no bytes")
        if type(entry) is TensorStorageMetadata:
            _check_tensor(name, entry, index.storage_data)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_tensor(
    name: str, entry: TensorStorageMetadata, storage: dict[MetadataIndex, Any]
) -> None:
    """Raise ValueError unless a tensor's chunks fill its shape and each has its bytes in a file."""
    dtype = (
        vars(entry.properties).get("dtype") if type(entry.properties) is TensorProperties else None
    )
    if (
        type(entry.size) is not torch.Size
        or type(entry.chunks) is not list
        or not isinstance(dtype, torch.dtype)
    ):
        raise ValueError(f"{name} has no shape, dtype or chunks")
    elements = 0
    for chunk in entry.chunks:
        if type(chunk) is not ChunkStorageMetadata or not (
            type(chunk.offsets) is type(chunk.sizes) is torch.Size
        ):
            raise ValueError(f"{name} has a damaged chunk")
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            raise ValueError(f"{name} has a chunk of a different number of dimensions")
        if any(
            offset < 0 or length < 0 or offset + length > size
            for offset, length, size in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        ):
            raise ValueError(f"{name} has a chunk outside its shape")
        count = math.prod(chunk.sizes)
        info = storage.get(MetadataIndex(name, chunk.offsets))
        if info is None or (count and info.length < count * dtype.itemsize):
            raise ValueError(f"{name} has a chunk without its bytes")
        elements += count
    if elements != math.prod(entry.size):
        raise ValueError(
            f"the chunks of {name} have {elements} elements, but its shape {tuple(entry.size)}"
        )


class SafeReader(dcp.FileSystemReader):
    """torch's FileSystemReader with an index from `read_index`; ValueError if it is invalid."""

    def __init__(self, state: Path):
        super().__init__(state)
        self.index = read_index(state)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


class SafePlanner(dcp.DefaultLoadPlanner):
    """torch's DefaultLoadPlanner, but non-tensor entries must load with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{name} in the checkpoint's state/ is not plain data; "
                "use another copy of the checkpoint"
            ) from error
        plain = io.BytesIO()
        torch.save(content, plain)  # the base class unpickles this safe copy
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load(
    tensors: dict[str, Any], state: Path, no_dist: bool = False, reader: SafeReader | None = None
) -> None:
    """Run dcp.load of a state/ folder into `tensors`; collective unless no_dist.

    reader: reads the index once for several loads. ValueError if the checkpoint is invalid on any
    rank.
    """
    try:
        reader = reader or SafeReader(state)
        dcp.load(tensors, storage_reader=reader, planner=SafePlanner(), no_dist=no_dist)
    except CheckpointException as error:  # wraps an error of any rank
        cause = next(cause for cause, _ in error.failures.values())
        first_line = str(cause).strip().split("\n")[0][:300]
        text = (
            first_line
            if isinstance(cause, ValueError)
            else f"{state} cannot be loaded ({first_line})"
        )
        raise ValueError(text) from error
