"""Files of a step folder: manifest with checksums, trainer.json, and the identity of its model."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from files import read_object, step_number
from machine import cpus
from training.state import is_position

MANIFEST = "manifest.json"
TRAINER = "state/trainer.json"
HASHING_THREADS = min(8, cpus())


def step_of(folder: Path) -> int:
    """Return N of a folder step_N."""
    number = step_number(folder)
    assert number is not None, folder
    return number


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a step folder's manifest: {"hash", "metric", "milestone", "files": {name: checksum}}.

    None if the manifest is missing or damaged.
    """
    content = read_object(folder / MANIFEST) or {}
    sums, metric = content.get("files"), content.get("metric")
    if not isinstance(sums, dict) or not isinstance(metric, int | float | None):
        return None
    paths = [Path(name) for name in sums]
    return None if any(path.is_absolute() or ".." in path.parts for path in paths) else content


def has_state(folder: Path) -> bool:
    """Return True if a run can resume from a step folder, by its manifest or else its state/."""
    manifest = read_manifest(folder)
    return (folder / "state").is_dir() if manifest is None else TRAINER in manifest["files"]


def find_damage(folder: Path, with_state: bool = True) -> str | None:
    """Describe the first missing, changed or unlisted file of a step folder; None if complete.

    with_state: also check state/, which only a resume reads.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST}"
    sums = manifest["files"]
    if not with_state:
        sums = {name: total for name, total in sums.items() if not name.startswith("state/")}
    for name in sums:
        if not (folder / name).is_file():
            return f"{name} is missing"
    required = {"config.json", *(path.name for path in folder.glob("*.safetensors"))}
    if with_state and TRAINER in sums:
        required |= {f"state/{path.name}" for path in (folder / "state").glob("*")}
    if unlisted := sorted(required - sums.keys()):
        return f"{unlisted[0]} has no checksum in {MANIFEST}"
    actual = hash_files(folder, list(sums), manifest.get("hash", "blake2b"))
    return next((f"{name} has changed" for name in sums if actual[name] != sums[name]), None)


def model_hash(folder: Path) -> str:
    """Return a hash of the model, from a step folder's manifest or from another folder's files.

    It excludes state/, so deleting the state of an old checkpoint does not change it.
    """
    manifest = read_manifest(folder)
    if manifest:
        files = manifest["files"]
        sums = {name: total for name, total in files.items() if not name.startswith("state/")}
    else:
        names = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")
        )
        sums = hash_files(folder, names, "sha256")
    return blake2b(json.dumps(sums, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_position(folder: Path) -> dict[str, Any]:
    """Read trainer.json; ValueError if it is damaged."""
    position = read_object(folder / TRAINER)
    if position is None or not is_position(position):
        raise ValueError(f"{folder / TRAINER} is damaged; use another copy of the checkpoint")
    return position


def read_phase(folder: Path) -> str:
    """Return the phase that saved a step folder."""
    return read_position(folder)["phase"]


def check_complete(folder: Path) -> None:
    """ValueError if a step folder is damaged or cannot be resumed from."""
    if not has_state(folder):
        raise ValueError(
            f"{folder} has no state/ to resume from; load only its weights with init_from={folder}"
        )
    problem = find_damage(folder)
    if problem:
        raise ValueError(f"{folder} is damaged ({problem}); resume from another checkpoint")


def hash_files(folder: Path, names: list[str], algorithm: str) -> dict[str, str]:
    """Compute checksums of files in `folder`, by name, in parallel threads."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing and reading release the GIL
        sums = pool.map(lambda name: _checksum(folder / name, algorithm), names)
        return dict(zip(names, sums, strict=True))


def _checksum(path: Path, algorithm: str) -> str:
    # Old manifests name no algorithm; they use blake2b.
    digest = sha256() if algorithm == "sha256" else blake2b(digest_size=16)
    block = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
