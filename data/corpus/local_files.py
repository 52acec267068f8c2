"""List the data files of a path and read their content in bounded memory."""

import codecs
import glob
import os
import zlib
from collections.abc import Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
BLOCK = 1 << 20  # bytes of content handled at once
SLICES = {".gz": 1 << 16, ".zst": 1 << 8}  # decoder input in bytes; zstd expands it to 8 MB at most
MAX_LINE = 100_000_000  # bytes
MAX_WINDOW = 1 << 27  # bytes, of the zstd decoder, as in the zstd command
MAX_EXPANSION = 1_000  # content bytes per compressed byte, beyond the first 50 MB
BATCH_BYTES = 16_000_000  # approximate bytes of a parquet file in memory


def find_files(where: str) -> dict[str, Path]:
    """Return the data files of a path, by name; see list_files."""
    return list_files(where)[0]


def list_files(where: str, excluded: Collection[Path] = ()) -> tuple[dict[str, Path], list[str]]:
    """Return the data files of a file, a folder (recursively) or a glob, sorted, by relative name.

    An existing path is never read as a glob. Hidden and temporary (*.tmp) files and folders are
    excluded, and so are `excluded` folders unless `where` is inside one. Also returns the names of
    files of other types. ValueError if it finds no data file.
    """
    root = Path(where)
    fixed = (
        root
        if root.exists()
        else Path(*takewhile(lambda part: not glob.has_magic(part), root.parts))
    )
    outside = [
        folder.resolve() for folder in excluded if folder.resolve() not in fixed.resolve().parents
    ]
    matches = (
        [root]
        if root.exists()
        else [Path(path) for path in sorted(glob.glob(where, recursive=True))]
    )
    paths: set[Path] = set()
    for match in matches:
        if any(part.endswith(".tmp") for part in match.relative_to(fixed).parts):
            continue
        if match.is_dir():
            paths.update(_walk(match, outside))
        elif not _is_in_any(match, outside):
            paths.add(match)
    base = root
    if paths and not root.is_dir():
        base = Path(os.path.commonpath([path.parent for path in paths]))
    named = {path.relative_to(base).as_posix(): path for path in sorted(paths)}
    data_files = {name: path for name, path in named.items() if path.name.endswith(SUFFIXES)}
    if not data_files:
        raise ValueError(
            f"no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file found at {where}; check the path"
        )
    return data_files, [name for name in named if name not in data_files]


def _walk(root: Path, outside: Collection[Path]) -> Iterator[Path]:
    """Yield the files below a folder; follow symbolic links, visit each folder once."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or _is_in_any(Path(real), outside):
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(filter(_is_shown, below))
        yield from (Path(folder, name) for name in filter(_is_shown, names))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".tmp")


def _is_in_any(path: Path, folders: Collection[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def rows_at_once(file: Any, group: int) -> int:
    """Return the number of rows of a parquet row group to decode together within BATCH_BYTES."""
    info = file.metadata.row_group(group)
    columns = [info.column(i) for i in range(info.num_columns)]
    repeated = any("DICTIONARY" in encoding for column in columns for encoding in column.encodings)
    most = (
        16 if repeated else 1024
    )  # dictionaries store a repeated value once: sizes are unreliable
    return max(1, min(most, BATCH_BYTES * info.num_rows // max(1, info.total_byte_size)))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines without line ends.

    The last line of an intact file may lack its line end. A UTF-8 byte-order mark is dropped.
    ValueError for UTF-16, UTF-32 and lines above MAX_LINE.
    """
    pending: list[bytes] = []
    size = number = 0
    for block in blocks(path):
        if not number and not pending:
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise ValueError(f"{path} is UTF-16 or UTF-32 text; convert it with iconv -t UTF-8")
            block = block.removeprefix(codecs.BOM_UTF8)
        first, *rest = block.split(b"\n")
        pending.append(first)
        size += len(first)
        for line in rest:
            number += 1
            yield b"".join(pending)
            pending, size = [line], len(line)
        if size > MAX_LINE:
            kind = (
                "is a JSON array"
                if pending[0].lstrip().startswith(b"[")
                else "is too long for one row"
            )
            raise ValueError(
                f"line {number + 1} of {path} {kind} of more than {MAX_LINE:,} bytes; write one "
                "object per line"
            )
    if size:
        yield b"".join(pending)


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content of a .gz, .zst or plain file in blocks.

    EOFError for a truncated compressed file; ValueError if it expands beyond MAX_EXPANSION.
    """
    if path.suffix not in (".gz", ".zst"):
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
        return
    limit, expanded, size = max(50_000_000, MAX_EXPANSION * path.stat().st_size), 0, 0
    chunks: list[bytes] = []
    damage: Exception | None = None
    try:
        for chunk in _gunzip(path) if path.suffix == ".gz" else _unzstd(path):
            chunks.append(chunk)
            size, expanded = size + len(chunk), expanded + len(chunk)
            if expanded > limit:
                raise ValueError(
                    f"{path} expands to more than {MAX_EXPANSION:,} times its size, unlike text; "
                    "remove it"
                )
            if size >= BLOCK:
                content = b"".join(chunks)
                chunks, size = [], 0
                yield from (content[i : i + BLOCK] for i in range(0, len(content), BLOCK))
    except (EOFError, OSError, zlib.error, zstd_error()) as error:
        damage = error
    yield b"".join(chunks)
    if damage:
        raise damage


def _gunzip(path: Path) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while data := file.read(SLICES[".gz"]):
            while data:
                if decoder.eof:
                    decoder = zlib.decompressobj(wbits=31)  # files may hold several streams
                content = decoder.decompress(data, BLOCK)
                yield content
                data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
                while len(content) == BLOCK and not data and not decoder.eof:
                    content = decoder.decompress(b"", BLOCK)
                    yield content
    if not decoder.eof:
        raise EOFError("the compressed file is truncated")


def _unzstd(path: Path) -> Iterator[bytes]:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
    with open(path, "rb") as file:
        while data := file.read(SLICES[".zst"]):
            while data:
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
                yield decoder.decompress(data)
                data = decoder.unused_data
    if not decoder.eof:
        raise EOFError("the compressed file is truncated")


def zstd_error() -> type[Exception]:
    """Return zstandard's exception class, importing the package on use."""
    import zstandard

    return zstandard.ZstdError
