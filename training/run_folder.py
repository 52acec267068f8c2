"""Who a run is and who may write to its folders: one identity over its phases, one process at a time.

`run.json` in a folder of checkpoints and in the log folder names the run they belong to. `run.lock` names the process
that writes there now. Neither is part of a checkpoint, so equal states still leave equal checkpoints.
"""

import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from files import read_object, write_json
from training.checkpoint import step_folders
from training.config import RunConfig

IDENTITY, LOCK = "run.json", "run.lock"
PATIENCE = 5.0  # seconds to wait for a process that is just leaving


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Hold the lock of each folder. ValueError, with host and process, where another process holds one.

    The kernel releases a lock when its process ends, however it ends.
    """
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
            if not _lock(file.fileno()):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"{folder} is in use by {holder}; wait for it, stop it, or use another folder"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def _lock(handle: int) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)


def claim(run: RunConfig, source: Path | None) -> str:
    """Tie this start to its run. Returns a sentence where the log of an ended run was set aside, else "".

    source: the step folder that the run continues from; None for a new run. ValueError where the log folder holds the
    history of another run, or of this phase in another folder, whose checkpoints still exist.
    """
    folder, record = run.checkpoints.resolve(), _read(run.logs)
    earlier = [
        _read(run.checkpoints),
        _read(source.parent) if source else None,
        record if source else None,
    ]
    identity = next((found["id"] for found in earlier if found), uuid.uuid4().hex)
    folders: dict[str, str] = record["folders"] if record else {}
    said = ""
    if record and record["id"] != identity:
        kept = [path for path in folders.values() if step_folders(Path(path))]
        if kept:
            raise ValueError(
                f"{run.logs} is the log of another run, whose checkpoints are in {kept[-1]}; give this run a "
                "name of its own (run=NAME) or another log_dir"
            )
        said, folders = _set_aside(run.logs), {}
    elif (
        record
        and folders.get(run.phase, str(folder)) != str(folder)
        and step_folders(Path(folders[run.phase]))
    ):
        raise ValueError(
            f"{run.logs} is the log of {run.phase} in {folders[run.phase]}; for a second one give another "
            "log_dir as well as another output_dir"
        )
    elif not record and source is None:
        said = _set_aside(run.logs)  # of a version that wrote no identity
    content = {"id": identity, "run": run.run, "folders": {**folders, run.phase: str(folder)}}
    write_json(run.logs / IDENTITY, content)
    write_json(run.checkpoints / IDENTITY, {**content, "folders": {run.phase: str(folder)}})
    return said


def _set_aside(logs: Path) -> str:
    """Keep the metrics of a run that is gone under another name."""
    path = logs / "metrics.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return ""
    kept = path.with_name(f"metrics_until_{datetime.now(UTC):%Y%m%dT%H%M%S}.jsonl")
    path.rename(kept)
    return f"{path} was of an earlier run without checkpoints; it is kept as {kept.name}"


def _read(folder: Path) -> dict[str, Any] | None:
    content = read_object(folder / IDENTITY) or {}
    known = isinstance(content.get("id"), str) and isinstance(content.get("folders"), dict)
    return content if known else None
