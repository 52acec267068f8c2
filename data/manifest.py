"""What a stage of the data pipeline leaves beside its output, so that the next run knows whether to do it again.

A manifest is JSON: "inputs" (hashes and settings that the output depends on) and whatever else the stage records. It is
written last, so that an output without one is unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.verified import damaged
from files import (
    check_room,
    is_full,
    no_room,
    parse_object,
    read_object,
    sweep,
    temporary,
    write_text,
)

NAME = "manifest.json"


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file; ValueError where it holds none."""
    try:
        return parse_object(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: it is no JSON object ({error}); take another copy of it"
        ) from error


def read(folder: Path) -> dict | None:
    """The manifest of a folder, or None where it has none that can be read."""
    return read_object(folder / NAME)


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


def save_arrays(folder: Path, split: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write <split>.<name>.npy of each array; OSError, before anything is written, if the disk has no room for them."""
    check_room(
        folder, sum(array.nbytes for array in arrays.values()), f"the prepared {split} split"
    )
    for name, array in arrays.items():
        np.save(folder / f"{split}.{name}.npy", array)


def _cache_fault(folder: Path, content: dict[str, Any], arrays: Sequence[str]) -> str | None:
    """What is wrong with a folder that `keep` made, or None where every array has its checksum."""
    sums: dict[str, str] = {}
    for split in ("train", "val"):
        names = [f"{split}.{array}.npy" for array in arrays]
        if missing := next((name for name in names if not (folder / name).is_file()), None):
            return f"{folder / missing} is missing"
        try:
            sums |= dict(zip(names, content["sha256"][split].split(), strict=True))
        except (KeyError, TypeError, AttributeError, ValueError):
            return f"{folder / NAME} lacks checksums"
    if not isinstance(content.get("report"), dict):
        return f"{folder / NAME} lacks the report"
    return damaged(folder, sums)


def keep(
    cache: Path,
    name: str,
    inputs: dict[str, Any],
    arrays: Sequence[str],
    prepare: Callable[[Path], dict[str, Any]],
    files: Iterable[Path] = (),
) -> tuple[Path, dict[str, Any]]:
    """The folder under `cache` of what was prepared from these inputs, and the report on it; prepared now if it is not there.

    prepare(folder) writes <split>.<array>.npy for the splits train and val and returns the report. Published by rename.
    files: what is read whole. Less free space than a quarter of their size is refused before the work.
    """
    if Path(name).name in ("", "..") or Path(name).name != name:
        raise ValueError(f"the source name {name!r} must be a plain folder name, such as my_rows")
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{key}"
    found = read(folder)
    if found and found.get("inputs") == inputs:
        problem = _cache_fault(folder, found, arrays)
        if problem is None:
            return folder, found["report"]
        print(f"warning: {problem}; the rows of {name} are prepared again", flush=True)
    part = temporary(folder)
    sweep(cache)
    shutil.rmtree(part, ignore_errors=True)
    check_room(
        cache, sum(path.stat().st_size for path in files) // 4, f"the prepared source {name}"
    )
    try:
        part.mkdir(parents=True)
        report = prepare(part)
        sums = {
            split: " ".join(file_hash(part / f"{split}.{array}.npy") for array in arrays)
            for split in ("train", "val")
        }
        write(part, {"inputs": inputs, "report": report, "sha256": sums})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except Exception as error:
        if is_full(error) and str(cache) not in str(error):
            todo = f"the prepared rows of {name} were not kept; free some space there and run the same command again"
            raise no_room(cache, error, todo) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what failed leaves nothing
    return folder, report
