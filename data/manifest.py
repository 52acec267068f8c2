"""Manifests: JSON files beside a stage's output; with a current manifest, a run skips the stage.

A manifest has "inputs" (hashes and settings that determine the output) and the stage's records. It
is written last: an output without a manifest is unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import files
from data.verified import find_damaged_file
from files import (
    check_free_space,
    disk_full_error,
    file_hash,
    is_full,
    read_object,
    remove_stale,
    temporary,
    write_text,
)

NAME = "manifest.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing, ValueError if it is damaged."""
    return files.read_json(path) if path.is_file() else {}


def read(folder: Path) -> dict | None:
    """Return the manifest of a folder; None if it is missing or unreadable."""
    return read_object(folder / NAME)


def is_current(folder: Path, inputs: dict) -> bool:
    """Return True if a folder's manifest has these inputs."""
    content = read(folder)
    return content is not None and content.get("inputs") == inputs


def write(folder: Path, content: dict) -> None:
    """Sync the folder's files to disk, then write its manifest atomically."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    write_text(folder / NAME, json.dumps(content, indent=2))


def save_arrays(folder: Path, split: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write each array as <split>.<name>.npy; OSError before any write if the disk is too full."""
    check_free_space(
        folder, sum(array.nbytes for array in arrays.values()), f"the prepared {split} split"
    )
    for name, array in arrays.items():
        np.save(folder / f"{split}.{name}.npy", array)


def _cache_fault(folder: Path, content: dict[str, Any], arrays: Sequence[str]) -> str | None:
    """Describe the damage of a folder of `load_or_prepare`; None if all checksums match."""
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
    return find_damaged_file(folder, sums)


def load_or_prepare(
    cache: Path,
    name: str,
    inputs: dict[str, Any],
    arrays: Sequence[str],
    prepare: Callable[[Path], dict[str, Any]],
    files: Iterable[Path] = (),
) -> tuple[Path, dict[str, Any]]:
    """Return the cached folder of arrays made from these inputs, and its report.

    Prepares a missing folder. prepare(folder) writes <split>.<array>.npy for the splits train and
    val and returns the report. The folder is then renamed into place. files: the input files; if
    free space is below a quarter of their size, OSError before the work starts.
    """
    if Path(name).name in ("", "..") or Path(name).name != name:
        raise ValueError(f"the source name {name!r} must be a plain folder name, such as my_rows")
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{key}"
    content = read(folder)
    if content and content.get("inputs") == inputs:
        problem = _cache_fault(folder, content, arrays)
        if problem is None:
            return folder, content["report"]
        print(f"warning: {problem}; the rows of {name} are prepared again", flush=True)
    scratch = temporary(folder)
    remove_stale(cache)
    shutil.rmtree(scratch, ignore_errors=True)
    check_free_space(
        cache, sum(path.stat().st_size for path in files) // 4, f"the prepared source {name}"
    )
    try:
        scratch.mkdir(parents=True)
        report = prepare(scratch)
        sums = {
            split: " ".join(file_hash(scratch / f"{split}.{array}.npy") for array in arrays)
            for split in ("train", "val")
        }
        write(scratch, {"inputs": inputs, "report": report, "sha256": sums})
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except Exception as error:
        if is_full(error) and str(cache) not in str(error):
            todo = (
                f"the prepared rows of {name} were not saved; free some space there and run the "
                "same command again"
            )
            raise disk_full_error(cache, error, todo) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder, report
