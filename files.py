"""Small files that survive a crash, names of temporary files, and what a full disk looks like."""

import errno
import itertools
import json
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

_NUMBERS = itertools.count()  # threads of one process write at once
FULL = (errno.ENOSPC, errno.EDQUOT)
# How numpy, torch, safetensors, tokenizers and pyarrow report a full disk, without an errno
FULL_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written|PytorchStreamWriter failed|"
    r"inline_container\.cc.* unexpected pos",
    re.DOTALL,
)


def write_text(path: Path, content: str, sync: bool = True) -> None:
    """Write a whole file by rename, so that a reader, a crash or a full disk leaves the old file or the new one.

    sync: wait until the content is on the disk. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON as write_text does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError if it is not JSON or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object of a JSON text; ValueError for any other JSON value, also for a list of pairs."""
    if not isinstance(value := parse_json(text), dict):
        raise ValueError(f"it holds {'a list' if isinstance(value, list) else repr(value)[:50]}")
    return value


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file, or it holds anything else (as after a full disk)."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without lines that a killed process left unfinished; [] where there is no file."""
    rows = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ()
    ):
        with suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def is_full(error: BaseException | None) -> bool:
    """True if an error, or one that it came from, is a full disk or an exhausted quota."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        known = isinstance(error, OSError) and error.errno in FULL
        if known or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room(folder: Path, error: BaseException, todo: str) -> OSError:
    """The error to raise for a full disk (is_full): names the folder, its free space and what to do."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    code = (
        errno.EDQUOT if isinstance(error, OSError) and error.errno == errno.EDQUOT else errno.ENOSPC
    )
    return OSError(code, f"{os.strerror(code)}: {folder} has {free:.3f} GB free; {todo}")


def check_room(folder: Path, size: int, what: str) -> None:
    """OSError if the disk of `folder` has no room for `size` bytes of `what`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        text = f"{what} needs about {size / 1e9:.3f} GB but {folder} has {free / 1e9:.3f} GB free; free some space"
        raise OSError(errno.ENOSPC, text)


def temporary(path: Path) -> Path:
    """A temporary name, new in each call, of a file or folder that this process writes: .NAME.N.HOST.PID.tmp beside it."""
    return path.with_name(f".{path.name}.{next(_NUMBERS)}.{socket.gethostname()}.{os.getpid()}.tmp")


def sweep(folder: Path) -> list[Path]:
    """Remove temporary files and folders (`temporary`) of processes of this host that have ended; return their paths."""
    gone = []
    for path in sorted(folder.glob(".*.tmp")):
        stem, _, number = path.name.removesuffix(".tmp").rpartition(".")
        if (
            stem.endswith(f".{socket.gethostname()}")
            and number.isdecimal()
            and not _is_running(int(number))
        ):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )
            gone.append(path)
    return gone


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
