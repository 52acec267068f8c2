"""Local files of documents and rows: which files a path stands for, and their content in bounded memory."""

import codecs
import glob
import os
import zlib
from collections.abc import Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
BLOCK = 1 << 20  # bytes of content handled at once, compressed or not
SLICES = {
    ".gz": 1 << 16,
    ".zst": 1 << 8,
}  # bytes given to a decoder at once; zstd's expand to 8 MB at most
MAX_LINE = 100_000_000  # bytes
MAX_WINDOW = 1 << 27  # bytes, of the zstd decoder, as the zstd command has it
MAX_EXPANSION = 1_000  # bytes of content for a byte of a compressed file, beyond the first 50 MB
BATCH_BYTES = 16_000_000  # of a parquet file in memory at once, about


def find_files(where: str) -> dict[str, Path]:
    """The data files that a path stands for, by name; see list_files."""
    return list_files(where)[0]


def list_files(where: str, excluded: Collection[Path] = ()) -> tuple[dict[str, Path], list[str]]:
    """The data files of a file, a folder (with all folders below it) or a glob, sorted, by their names below it.

    A path that exists is never read as a glob. Not listed: hidden files and folders, unfinished ones (*.tmp), and the
    `excluded` folders, unless `where` lies in one. Also returns the names of files of other kinds. ValueError where there
    is no data file.
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
    above = (
        root
        if root.is_dir()
        else Path(os.path.commonpath([path.parent for path in paths]))
        if paths
        else root
    )
    named = {path.relative_to(above).as_posix(): path for path in sorted(paths)}
    found = {name: path for name, path in named.items() if path.name.endswith(SUFFIXES)}
    if not found:
        raise ValueError(
            f"there is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file at {where}; check the path"
        )
    return found, [name for name in named if name not in found]


def _walk(root: Path, outside: Collection[Path]) -> Iterator[Path]:
    """Files below a folder. Links are followed, so that each folder is entered once."""
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
    """Rows of a parquet file's row group to decode together, so that long rows do not fill the memory."""
    about = file.metadata.row_group(group)
    columns = [about.column(i) for i in range(about.num_columns)]
    repeated = any("DICTIONARY" in encoding for column in columns for encoding in column.encodings)
    most = 16 if repeated else 1024  # a repeated value is stored once, so sizes say little
    return max(1, min(most, BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file without their ends. A last line without an end is one too, unless the file is cut off.

    A byte-order mark of UTF-8 is dropped. ValueError for UTF-16 and UTF-32, and for a line above MAX_LINE.
    """
    begun: list[bytes] = []
    size = number = 0
    for block in blocks(path):
        if not number and not begun:
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise ValueError(f"{path} is UTF-16 or UTF-32 text; convert it with iconv -t UTF-8")
            block = block.removeprefix(codecs.BOM_UTF8)
        first, *rest = block.split(b"\n")
        begun.append(first)
        size += len(first)
        for line in rest:
            number += 1
            yield b"".join(begun)
            begun, size = [line], len(line)
        if size > MAX_LINE:
            kind = (
                "is a JSON array"
                if begun[0].lstrip().startswith(b"[")
                else "is too long for one row"
            )
            raise ValueError(
                f"line {number + 1} of {path} {kind} of more than {MAX_LINE:,} bytes; write one object a line"
            )
    if size:
        yield b"".join(begun)


def blocks(path: Path) -> Iterator[bytes]:
    """Content of a .gz, .zst or plain file in blocks. EOFError where a compressed one ends too early.

    ValueError where it expands as no text does.
    """
    if path.suffix not in (".gz", ".zst"):
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
        return
    limit, expanded, size = max(50_000_000, MAX_EXPANSION * path.stat().st_size), 0, 0
    parts: list[bytes] = []
    damage: Exception | None = None
    try:
        for part in _gunzip(path) if path.suffix == ".gz" else _unzstd(path):
            parts.append(part)
            size, expanded = size + len(part), expanded + len(part)
            if expanded > limit:
                raise ValueError(
                    f"{path} expands to more than {MAX_EXPANSION:,} times its size, as no text does; remove it"
                )
            if size >= BLOCK:
                content = b"".join(parts)
                parts, size = [], 0
                yield from (content[at : at + BLOCK] for at in range(0, len(content), BLOCK))
    except (EOFError, OSError, zlib.error, zstd_error()) as error:
        damage = error
    yield b"".join(parts)
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
        raise EOFError("the compressed file ends too early")


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
        raise EOFError("the compressed file ends too early")


def zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
