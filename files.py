"""Small files that survive a crash: written whole or not at all, and read without surprises."""

import json
import os
from pathlib import Path
from typing import Any


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


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file, or it holds anything else (as after a full disk)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
