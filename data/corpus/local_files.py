"""List the data files of a path and read their content in bounded memory."""

import codecs
import glob
import os
import re
import zlib
from collections.abc import Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from files import read_object

PACKED = ("", ".gz", ".zst")
TEXT_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in (".txt", ".md") for packed in PACKED)
ROW_SUFFIXES = (
    *(f"{suffix}{packed}" for suffix in (".jsonl", ".json", ".csv", ".tsv") for packed in PACKED),
    *(".parquet", ".arrow"),
)
SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES)
ROW_TYPES = ".jsonl, .json, .csv, .tsv (each also .gz or .zst), .parquet, .arrow"
FILE_TYPES = f".txt, .md, {ROW_TYPES}"
CONVERT = "convert documents to .txt"
# owner/name of a hub data set, with its configuration and revision
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[^/@]+)?(@.+)?")
HIDDEN, TEMPORARY = "hidden files and folders", "temporary files and folders (.tmp)"
OTHER_SPLIT = "other splits of the data set; --split selects one"
BLOCK = 1 << 20  # bytes of content handled at once
SLICES = {".gz": 1 << 16, ".zst": 1 << 8}  # decoder input in bytes; zstd expands it to 8 MB at most
MAX_LINE = 100_000_000  # bytes
MAX_WINDOW = 1 << 27  # bytes of the zstd decoder's window, as in the zstd command
MAX_EXPANSION = 1_000  # content bytes per compressed byte, beyond the first 50 MB
BATCH_BYTES = 16_000_000  # approximate bytes of a parquet file in memory


class EncodingError(ValueError):
    """A file in an unsupported encoding."""


def file_type(name: str) -> str:
    """Return the suffix of a file name, in lower case and without .gz or .zst: ".txt", ".csv"."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED[1:] else path.suffix


def find_files(where: str, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Return the data files of a path, by name; see list_files."""
    return list_files(where, suffixes=suffixes)[0]


def list_files(
    where: str,
    excluded: Collection[Path] = (),
    split: str | None = None,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the data files of a file, a folder (recursively) or a glob, sorted, by relative name.

    An existing path is never read as a glob. Excludes hidden and temporary (*.tmp) files and
    folders, and `excluded` folders unless `where` is inside one. For a folder written by datasets'
    save_to_disk, it lists the files of `split` (default: train). Also returns the names of excluded
    files, with the reason. ValueError if it finds no data file.
    """
    root = Path(where)
    fixed = (
        root
        if root.exists()
        else Path(*takewhile(lambda name: not glob.has_magic(name), root.parts))
    )
    outside = [
        folder.resolve() for folder in excluded if folder.resolve() not in fixed.resolve().parents
    ]
    matches = (
        [root]
        if root.exists()
        else [Path(path) for path in sorted(glob.glob(where, recursive=True))]
    )
    walk = _Walk(outside, split)
    paths: set[Path] = set()
    for match in matches:
        if any(name.endswith(".tmp") for name in match.relative_to(fixed).parts):
            walk.left_out[match] = TEMPORARY
        elif match.is_dir():
            paths.update(walk.files(match))
        elif not _is_in_any(match, outside):
            paths.add(match)
    if split is not None and not walk.has_splits:
        raise ValueError(
            f"--split {split} applies to hub data sets and folders of save_to_disk with several "
            f"splits, and {where} is neither; remove it"
        )
    base = root
    if paths and not root.is_dir():
        base = Path(os.path.commonpath([path.parent for path in paths]))
    named = {_relative(path, base): path for path in sorted(paths)}
    data_files = {
        name: path for name, path in named.items() if path.name.lower().endswith(suffixes)
    }
    types = FILE_TYPES if suffixes == SUFFIXES else ROW_TYPES
    if not data_files:
        others = f" (only {', '.join(list(named)[:3])})" if named and root.is_dir() else ""
        advice = _advice(where, bool(named), suffixes)
        raise ValueError(f"no file of type {types} found at {where}{others}; {advice}")
    reason = f"file type other than {types}; {CONVERT}"
    left_out = {name: reason for name in named if name not in data_files}
    left_out |= {_relative(path, base): reason for path, reason in walk.left_out.items()}
    return data_files, left_out


def _advice(where: str, has_others: bool, suffixes: tuple[str, ...]) -> str:
    """Say what to do about a path without a data file. has_others: it has files of other types."""
    if has_others:
        return CONVERT if suffixes == SUFFIXES else "convert them to .jsonl"
    if HUB_NAME.fullmatch(where) and not Path(where).parent.is_dir():
        return f"check the path; for a data set of the hub, give hf://{where}"
    return "check the path"


def _relative(path: Path, base: Path) -> str:
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


class _Walk:
    """Lists the files below folders; records excluded files."""

    def __init__(self, outside: Collection[Path], split: str | None):
        self.outside, self.split = outside, split
        self.left_out: dict[Path, str] = {}
        self.has_splits = False

    def files(self, root: Path) -> Iterator[Path]:
        """Yield the files below a folder; follow symbolic links, visit each folder once."""
        seen: set[str] = set()
        for folder, below, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen or _is_in_any(Path(real), self.outside):
                below.clear()
                continue
            seen.add(real)
            names = self._without_metadata(Path(folder), below, names)
            below[:] = sorted(name for name in below if self._is_shown(Path(folder, name)))
            yield from (
                path for path in (Path(folder, name) for name in names) if self._is_shown(path)
            )

    def _is_shown(self, path: Path) -> bool:
        if path.name.startswith("."):
            self.left_out[path] = HIDDEN
        elif path.name.endswith(".tmp"):
            self.left_out[path] = TEMPORARY
        return path not in self.left_out

    def _without_metadata(self, folder: Path, below: list[str], names: list[str]) -> list[str]:
        """Return the names of the data files of a folder, which may itself be a data set.

        Reduces `below` to the folder of the selected split.
        """
        if "dataset_dict.json" in names:  # datasets.DatasetDict.save_to_disk
            self.has_splits = True
            split = self.split or "train"
            splits = sorted((read_object(folder / "dataset_dict.json") or {}).get("splits", below))
            if split not in splits:
                raise ValueError(
                    f"{folder} has no split {split}; give --split {' or '.join(splits)}"
                )
            self.left_out |= {folder / name: OTHER_SPLIT for name in splits if name != split}
            below[:] = [split]
            return []
        if {"dataset_info.json", "state.json"} <= set(names):  # datasets.Dataset.save_to_disk
            state = read_object(folder / "state.json") or {}
            return sorted(entry["filename"] for entry in state.get("_data_files", []))
        if {"manifest.json", "00000.parquet"} <= set(names):  # a source of a store
            return sorted(set(names) - {"manifest.json"})
        return names


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
    """Yield a text file's lines as UTF-8, without line ends.

    The last line of an intact file may lack its line end. Encodings: see utf8_blocks. ValueError
    for lines above MAX_LINE.
    """
    pending: list[bytes] = []
    size = number = 0
    for block in utf8_blocks(path):
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


def utf8_blocks(path: Path) -> Iterator[bytes]:
    """Yield a text file's content as UTF-8 without byte-order mark.

    UTF-16 with a byte-order mark is converted. Other content is not checked, except that UTF-32 is
    an EncodingError.
    """
    decoder: codecs.IncrementalDecoder | None = None
    begin = True
    for block in blocks(path):
        if begin and block:
            begin = False
            if block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
                raise EncodingError(f"{path} is UTF-32 text; convert it with iconv -t UTF-8")
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
            block = block.removeprefix(codecs.BOM_UTF8)
        # Lone surrogates become bytes that are not UTF-8, which readers report.
        yield decoder.decode(block).encode("utf-8", "surrogatepass") if decoder else block
    if decoder and decoder.getstate()[0]:
        raise EOFError("the UTF-16 text ends within a character")


def blocks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content of a .gz, .zst or plain file in blocks.

    EOFError for a truncated compressed file; ValueError if it expands beyond MAX_EXPANSION.
    """
    packed = path.suffix.lower()
    if packed not in (".gz", ".zst"):
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
        return
    limit, expanded, size = max(50_000_000, MAX_EXPANSION * path.stat().st_size), 0, 0
    chunks: list[bytes] = []
    damage: Exception | None = None
    try:
        for chunk in _gunzip(path) if packed == ".gz" else _unzstd(path):
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
