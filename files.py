"""Files: atomic writes, hashes, JSON, step folders, temporary names, and full disks."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_NAMES = 8  # folders that a message lists
MOVED = re.compile(r"\.(tmp|rolled_back|old\d+)(/|$)")  # folders that are incomplete or replaced
_NUMBERS = itertools.count()  # makes temporary names unique among the threads of a process
FULL = (errno.ENOSPC, errno.EDQUOT)
# How numpy, torch, safetensors, tokenizers and pyarrow report a full disk, without an errno
FULL_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written|"
    r"PytorchStreamWriter failed|inline_container\.cc.* unexpected pos",
    re.DOTALL,
)


def write_text(path: Path, content: str, sync: bool = True) -> None:
    """Write a text file atomically: after a crash or on a full disk, the old file remains.

    sync: wait until the content is on the disk. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        scratch.rename(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_number(folder: Path) -> int | None:
    """Return N of a folder named step_N; None for any other name."""
    prefix, _, digits = folder.name.partition("_")
    return int(digits) if prefix == "step" and digits.isdecimal() else None


def step_folders(folder: Path) -> list[Path]:
    """Return the step_N folders in `folder`, in order of N."""
    numbers = {path: step_number(path) for path in folder.glob("step_*") if path.is_dir()}
    return sorted(
        (path for path, number in numbers.items() if number is not None),
        key=lambda path: numbers[path] or 0,
    )


def newest_step(folder: Path, file: str) -> Path:
    """Resolve a phase folder to its newest step_N folder with `file`; any other to itself."""
    if (folder / file).is_file():
        return folder
    return next((s for s in reversed(step_folders(folder)) if (s / file).is_file()), folder)


def checkpoint_advice(folder: Path) -> str:
    """Return the advice for a folder that is not a checkpoint: the folders below that hold one."""
    configs = [file for depth in (1, 2, 3) for file in folder.glob("*/" * depth + "config.json")]
    models = [config.parent.relative_to(folder) for config in configs]
    phases = {path if step_number(path) is None else path.parent for path in models}
    names = sorted(name for name in map(str, phases) if name != "." and not MOVED.search(name))
    more = ", ..." * (len(names) > MAX_NAMES)
    if not names:
        return "give a step_N folder"
    return f"give one of its folders {', '.join(names[:MAX_NAMES])}{more}"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; ValueError if the text is not JSON or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object; ValueError for any other value."""
    if not isinstance(value := parse_json(text), dict):
        raise ValueError(f"it is {'a list' if isinstance(value, list) else repr(value)[:50]}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; ValueError if it is damaged, OSError if it is missing."""
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: it must be a JSON object ({error}); restore it from a copy"
        ) from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a file's JSON object; None if the file is missing, damaged or holds another value."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; [] if it is missing.

    Lines that a killed process left unfinished are skipped.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def is_full(error: BaseException | None) -> bool:
    """Return True if an error or one of its causes reports a full disk or an exhausted quota."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        full = isinstance(error, OSError) and error.errno in FULL
        if full or FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_error(folder: Path, error: BaseException, todo: str) -> OSError:
    """Build the error for a full disk: it names the folder, its free space and what to do."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    quota = isinstance(error, OSError) and error.errno == errno.EDQUOT
    code = errno.EDQUOT if quota else errno.ENOSPC
    return OSError(code, f"{os.strerror(code)}: {folder} has {free:.3f} GB free; {todo}")


def check_free_space(folder: Path, size: int, what: str) -> None:
    """OSError if the disk of `folder` has less than `size` bytes free for `what`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs about {size / 1e9:.3f} GB but {folder} has {free / 1e9:.3f} GB free; "
            "free some space",
        )


def temporary(path: Path) -> Path:
    """Return a new temporary path beside `path`: .NAME.N.HOST.PID.tmp."""
    return path.with_name(f".{path.name}.{next(_NUMBERS)}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_stale(folder: Path) -> list[Path]:
    """Remove the `temporary` paths of this host's ended processes; return them."""
    removed = []
    for path in sorted(folder.glob(".*.tmp")):
        stem, _, pid = path.name.removesuffix(".tmp").rpartition(".")
        this_host = stem.endswith(f".{socket.gethostname()}")
        if this_host and pid.isdecimal() and not _is_running(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True
