"""Verify files against their checksums, once per state of a file (size, times, inode).

Verified states are cached beside the folder in `.<folder>.verified.json`. If that file cannot be
written, every call reads the files again.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from files import file_hash, read_object, write_json
from machine import cpus

NOTICE_BYTES = 2e9  # bytes; verifying more prints a line


def find_damaged_file(
    folder: Path, sums: Mapping[str, str], check: Callable[[Path], str | None] | None = None
) -> str | None:
    """Describe a folder's first damaged file; None if every file has its sha256.

    sums: name -> sha256. check: returns another problem of a file, such as ids beyond the
    vocabulary. One process verifies; concurrent processes wait for it.
    """
    note = folder.with_name(f".{folder.name}.verified.json")
    if not _changed(folder, sums, note):
        return None
    with _exclusive_lock(folder):
        if not (changed := _changed(folder, sums, note)):
            return None
        if (size := sum(state[0] for state in changed.values())) > NOTICE_BYTES:
            print(f"verifying {size / 1e9:.0f} GB of {folder}, once", flush=True)

        def fault(name: str) -> str | None:
            if file_hash(folder / name) != sums[name]:
                return f"{folder / name} is damaged: its sha256 differs from the manifest"
            problem = check(folder / name) if check else None
            return f"{folder / name} is damaged: {problem}" if problem else None

        with ThreadPoolExecutor(min(8, cpus())) as pool:
            faults = [text for text in pool.map(fault, changed) if text]
        if faults:
            return faults[0]
        with suppress(OSError):
            write_json(note, {**(read_object(note) or {}), **changed})
    return None


def _changed(folder: Path, sums: Mapping[str, str], note: Path) -> dict[str, list[Any]]:
    """Return the state of each file that changed since it was verified."""
    known = read_object(note) or {}
    states = {}
    for name, checksum in sums.items():
        status = (folder / name).stat()
        states[name] = [
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            checksum,
        ]
    return {name: state for name, state in states.items() if known.get(name) != state}


@contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, if the file system supports locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
