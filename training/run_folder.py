"""Identity and locks of a run's folders: one identity over all phases, one writing process.

`run.json` in the checkpoint and log folders names their run. `run.lock` names the process that
writes there. Neither is part of a checkpoint, so equal states give equal checkpoints.
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

from files import read_object, step_folders, step_number, write_json
from training.config import RunConfig

IDENTITY, LOCK = "run.json", "run.lock"
LOCK_TIMEOUT = 5.0  # seconds to wait for a process that is exiting


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Hold the lock of each folder; ValueError names a process that already holds one.

    The kernel releases a lock when its process ends, even if killed.
    """
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
            if not _lock(file.fileno()):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"{folder} is in use by {holder}; wait, stop it, or use another folder"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextmanager
def unused(*folders: Path) -> Iterator[None]:
    """Hold the locks that the folders have, to move or empty them; creates nothing.

    ValueError as from locked().
    """
    with locked(*(folder for folder in folders if (folder / LOCK).is_file())):
        yield


def _lock(handle: int) -> bool:
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.1)


def in_use(folder: Path) -> bool:
    """Return True if a process holds the lock of a run's folder."""
    if not (folder / LOCK).is_file():
        return False
    with open(folder / LOCK, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def claim(run: RunConfig, source: Path | None, step: int) -> str:
    """Record that checkpoint and log folders belong to this run, which starts at `step`.

    Returns a message if the metrics of an ended run were renamed, else "". source: step folder that
    the run continues from; None for a new run. ValueError if the log folder belongs to another run
    (or to this phase in another folder) whose checkpoints still exist, or if another phase has
    later checkpoints, whose metrics this start would remove from the log.
    """
    folder, record = run.checkpoints.resolve(), _read(run.logs)
    earlier = [
        _read(run.checkpoints),
        _read(source.parent) if source else None,
        record if source else None,
    ]
    identity = next((content["id"] for content in earlier if content), uuid.uuid4().hex)
    folders: dict[str, str] = record["folders"] if record else {}
    message = ""
    if record and record["id"] != identity:
        existing = [path for path in folders.values() if step_folders(Path(path))]
        if existing:
            raise ValueError(
                f"{run.logs} is the log of another run with checkpoints in {existing[-1]}; set "
                "another name (run=NAME) or log_dir"
            )
        message, folders = _rename_metrics(run.logs), {}
    elif (
        record
        and folders.get(run.phase, str(folder)) != str(folder)
        and step_folders(Path(folders[run.phase]))
    ):
        raise ValueError(
            f"{run.logs} is the log of {run.phase} in {folders[run.phase]}; set another log_dir as "
            "well as another output_dir"
        )
    elif not record and source is None:
        message = _rename_metrics(run.logs)  # an older version, without run.json
    for phase, path in folders.items():
        newest = step_folders(Path(path))[-1:]
        if path != str(folder) and newest and (step_number(newest[0]) or 0) > step:
            raise ValueError(
                f"{run.phase} would start at step {step:,} and remove later metrics from "
                f"{run.logs}, but {phase} has {newest[0]}; set another log_dir, or move {path} away"
            )
    content = {"id": identity, "run": run.run, "folders": {**folders, run.phase: str(folder)}}
    write_json(run.logs / IDENTITY, content)
    write_json(run.checkpoints / IDENTITY, {**content, "folders": {run.phase: str(folder)}})
    return message


def _rename_metrics(logs: Path) -> str:
    """Rename the metrics of an earlier run."""
    path = logs / "metrics.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return ""
    target = path.with_name(f"metrics_until_{datetime.now(UTC):%Y%m%dT%H%M%S}.jsonl")
    path.rename(target)
    return f"{path} belongs to an earlier run without checkpoints; renamed to {target.name}"


def _read(folder: Path) -> dict[str, Any] | None:
    content = read_object(folder / IDENTITY) or {}
    known = isinstance(content.get("id"), str) and isinstance(content.get("folders"), dict)
    return content if known else None
