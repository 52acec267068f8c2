"""What a stage of the data pipeline leaves beside its output, so that the next run knows whether to do it again.

A manifest is JSON: "inputs" (hashes and settings that the output depends on) and whatever else the stage records. It is
written last, so that an output without one is unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from files import write_text

NAME = "manifest.json"


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file; ValueError where it holds none."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON object ({error}); take another copy of it") from error


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
    write_text(folder / NAME, json.dumps(content, indent=2))


def keep(
    cache: Path, name: str, inputs: dict[str, Any], arrays: Sequence[str], prepare: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder under `cache` of what was prepared from these inputs, and the report on it; prepared now if it is not there.

    prepare(folder) writes <split>.<array>.npy for the splits train and val and returns the report. Published by rename.
    """
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{key}"
    found = read(folder)
    if found is not None and found["inputs"] == inputs:
        return folder, found["report"]
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        report = prepare(part)
        sums = {split: " ".join(file_hash(part / f"{split}.{array}.npy") for array in arrays) for split in ("train", "val")}
        write(part, {"inputs": inputs, "report": report, "sha256": sums})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what failed leaves nothing
    return folder, report
