"""Read torch's distributed checkpoints without running what a foreign file asks for.

`state/.metadata` is a pickle, and entries that are not tensors are pickles too. `SafeReader` rebuilds the index from the
classes that torch writes and refuses everything else; `SafePlanner` loads other entries with weights_only=True.
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

MAX_INDEX_BYTES = 1 << 28  # a 1.1B model's index has about 1 MB on 8 ranks
CLASSES = (
    *(
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
    ),
    *(TensorStorageMetadata, _MEM_FORMAT_ENCODING, _StorageInfo),
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in CLASSES},
    ("torch", "Size"): torch.Size,
    (
        "pathlib",
        "PosixPath",
    ): PurePosixPath,  # where torch's own writer saved it; no file is touched
    ("torch.serialization", "_get_layout"): _get_layout,
    **{
        ("torch", str(value).removeprefix("torch.")): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
}
OPCODES = (  # what pickle protocols 2 to 5 write for the classes above; sets, extensions and persistent ids are left out
    *(
        pickle.PROTO,
        pickle.FRAME,
        pickle.STOP,
        pickle.MARK,
        pickle.POP,
        pickle.POP_MARK,
        pickle.GLOBAL,
        pickle.STACK_GLOBAL,
    ),
    *(
        pickle.NEWOBJ,
        pickle.REDUCE,
        pickle.BUILD,
        pickle.MEMOIZE,
        pickle.BINPUT,
        pickle.LONG_BINPUT,
        pickle.BINGET,
    ),
    *(
        pickle.LONG_BINGET,
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.BININT,
        pickle.BININT1,
        pickle.BININT2,
    ),
    *(
        pickle.LONG1,
        pickle.BINFLOAT,
        pickle.SHORT_BINUNICODE,
        pickle.BINUNICODE,
        pickle.EMPTY_DICT,
        pickle.SETITEM,
    ),
    *(
        pickle.SETITEMS,
        pickle.EMPTY_LIST,
        pickle.APPEND,
        pickle.APPENDS,
        pickle.EMPTY_TUPLE,
        pickle.TUPLE,
        pickle.TUPLE1,
    ),
    *(pickle.TUPLE2, pickle.TUPLE3),
)


PythonUnpickler: Any = vars(pickle)[
    "_Unpickler"
]  # not the C one: it lets single opcodes be refused


class _Unpickler(PythonUnpickler):
    """Rebuilds what ALLOWED lists, and nothing else."""

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
        if isinstance(self.stack[-2], type):  # would set attributes of a class of torch
            self.refuse()
        super().load_build()

    def load_setitem(self) -> None:
        self.check_keys([self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])
        super().load_setitems()

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse keys of other classes: hashing a tuple nested many times over would not end."""
        for key in keys:
            parts = (key.fqn, key.offset) if type(key) is MetadataIndex else (key, None)
            if type(parts[0]) is not str or type(parts[1]) not in (torch.Size, type(None)):
                self.refuse()

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), refuse),
        **{code[0]: PythonUnpickler.dispatch[code[0]] for code in OPCODES},
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def read_index(state: Path) -> Metadata:
    """The index (`.metadata`) of a state/ folder; ValueError where it is damaged or holds anything but an index."""
    path = state / ".metadata"
    try:
        if (size := path.stat().st_size) > MAX_INDEX_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        index = _Unpickler(io.BytesIO(path.read_bytes())).load()
        _check(index, state)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its opcodes meet
        raise ValueError(
            f"{path} is not a checkpoint's index ({error}); take another copy of the checkpoint"
        ) from error
    return index


def _check(index: Any, state: Path) -> None:
    """Raise ValueError unless types, shapes and places of an index are right, and its data files as long as it says."""
    if (
        type(index) is not Metadata
        or type(index.state_dict_metadata) is not dict
        or type(index.storage_data) is not dict
    ):
        raise ValueError("it holds no index")
    if type(index.storage_meta) not in (StorageMeta, type(None)):
        raise ValueError("its storage_meta has another type")
    for path in (index.planner_data or {}).values():  # name of an entry -> its keys in nested dicts
        if type(path) is not tuple or not all(type(part) in (str, int) for part in path):
            raise ValueError("its planner_data do not name keys")
    sizes: dict[str, int] = {}
    for key, place in index.storage_data.items():
        known = (
            type(key) is MetadataIndex
            and type(key.fqn) is str
            and key.fqn in index.state_dict_metadata
        )
        if not known or type(place) is not _StorageInfo:
            raise ValueError("its storage_data do not belong to its entries")
        name = place.relative_path
        if (
            type(name) is not str
            or Path(name).name != name
            or vars(place).get("transform_descriptors")
        ):
            raise ValueError(f"it reads {name!r}, which is not a plain file of this folder")
        if not (_natural(place.offset) and _natural(place.length)):
            raise ValueError(f"{key.fqn} has no valid offset and length")
        if name not in sizes:
            sizes[name] = (state / name).stat().st_size if (state / name).is_file() else -1
        if sizes[name] < place.offset + place.length:
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
    name: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, Any]
) -> None:
    """Raise ValueError unless the chunks of a tensor lie in it, fill it, and have the bytes of their shape in a file."""
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
            raise ValueError(f"{name} has a chunk of another rank than its own")
        if any(
            o < 0 or s < 0 or o + s > whole
            for o, s, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        ):
            raise ValueError(f"{name} has a chunk outside of its shape")
        count = math.prod(chunk.sizes)
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or (count and place.length < count * dtype.itemsize):
            raise ValueError(f"{name} has a chunk without its bytes")
        elements += count
    if elements != math.prod(entry.size):
        raise ValueError(
            f"the chunks of {name} have {elements} elements, but its shape {tuple(entry.size)}"
        )


class SafeReader(dcp.FileSystemReader):
    """torch's reader of a state/ folder, whose index is read by `read_index`; ValueError as there."""

    def __init__(self, state: Path):
        super().__init__(state)
        self.index = read_index(state)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


class SafePlanner(dcp.DefaultLoadPlanner):
    """torch's plan of loading, for which entries that are not tensors hold numbers, texts and containers of them only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            content = torch.load(value, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{name} in the checkpoint's state/ is not plain data; take another copy of it"
            ) from error
        plain = io.BytesIO()
        torch.save(
            content, plain
        )  # the default planner reads it again; what it reads now is harmless
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load(tensors: dict[str, Any], state: Path, no_dist: bool = False) -> None:
    """dcp.load of a state/ folder into `tensors`; collective unless no_dist. ValueError where the index is not one."""
    try:
        dcp.load(tensors, storage_reader=SafeReader(state), planner=SafePlanner(), no_dist=no_dist)
    except CheckpointException as error:  # what any rank raised; torch.load raises many classes
        cause = next(cause for cause, _ in error.failures.values())
        first_line = str(cause).strip().split("\n")[0][:300]
        text = (
            first_line
            if isinstance(cause, ValueError)
            else f"{state} cannot be loaded ({first_line})"
        )
        raise ValueError(text) from error
