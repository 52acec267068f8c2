"""Compare files with their checksums once for each state of a file: size, times and inode say whether it was written since.

What was verified is noted beside the folder, in `.<folder>.verified.json`. Where that cannot be written, files are read again.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from files import read_object, write_json
from machine import cpus

TOLD = 2e9  # bytes from which on the console says what takes time


def damaged(
    folder: Path, sums: Mapping[str, str], check: Callable[[Path], str | None] | None = None
) -> str | None:
    """What is wrong with the first damaged file of a folder, or None where each has its sha256.

    sums: name -> sha256. check: finds another fault in a file, such as ids beyond the vocabulary. Processes that ask at the
    same time wait for one that reads.
    """
    note = folder.with_name(f".{folder.name}.verified.json")
    if not _changed(folder, sums, note):
        return None
    with _alone(folder):
        if not (changed := _changed(folder, sums, note)):
            return None
        if (size := sum(state[0] for state in changed.values())) > TOLD:
            print(f"verifying {size / 1e9:.0f} GB of {folder}, once", flush=True)

        def fault(name: str) -> str | None:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sums[name]:
                    return f"{folder / name} is damaged: it has not the sha256 of its manifest"
            problem = check(folder / name) if check else None
            return f"{folder / name} is damaged: {problem}" if problem else None

        with ThreadPoolExecutor(min(8, cpus())) as pool:
            faults = [found for found in pool.map(fault, changed) if found]
        if faults:
            return faults[0]
        with suppress(OSError):
            write_json(note, {**(read_object(note) or {}), **changed})
    return None


def _changed(folder: Path, sums: Mapping[str, str], note: Path) -> dict[str, list[Any]]:
    """The state of each file that differs from the one in which it was verified."""
    known = read_object(note) or {}
    states = {}
    for name, total in sums.items():
        status = (folder / name).stat()
        states[name] = [
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            total,
        ]
    return {name: state for name, state in states.items() if known.get(name) != state}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time, where the file system knows locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
