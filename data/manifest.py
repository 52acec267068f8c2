"""What a stage of the data pipeline leaves beside its output, so that the next run knows whether to do it again.

A manifest is JSON: "inputs" (hashes and settings that the output depends on) and whatever else the stage records. It is
written last, so that an output without one is unfinished.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> dict | None:
    """The manifest of a folder, or None where it has none that can be read."""
    try:
        return json.loads((folder / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def is_current(folder: Path, inputs: dict) -> bool:
    """Was this folder finished, and from these inputs?"""
    found = read(folder)
    return found is not None and found.get("inputs") == inputs


def write(folder: Path, content: dict) -> None:
    """Write the manifest, by rename and after everything else in the folder is on the disk."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    part = folder / (NAME + ".tmp")
    with open(part, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / NAME)
