"""Extensions of a plan's phases (--extend), kept in the run's log folder."""

from collections.abc import Mapping
from pathlib import Path

from files import read_object, write_json
from training.logger import append_event

FILE = "extensions.json"


def read_extensions(logs: Path, new: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the total steps by which each phase is extended, earlier calls included.

    new: phase -> steps; ValueError if they do not exceed the earlier ones.
    """
    path, new = logs / FILE, new or {}
    if path.is_file() and read_object(path) is None:
        raise ValueError(
            f"{path} is damaged; restore it as JSON: phase -> steps by which it was extended"
        )
    extensions = read_object(path) or {}
    for phase, steps in new.items():
        if steps <= (now := extensions.get(phase, 0)):
            raise ValueError(
                f"{phase} is extended by {now} steps already; continue without --extend, "
                f"or make it {now + steps} with --extend {phase}={now + steps}"
            )
    return {**extensions, **new}


def record_extensions(logs: Path, extensions: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Write the extensions if this call added some."""
    if new:
        append_event(logs, "extend", f"extended by steps: {dict(new)}", **new)
        write_json(logs / FILE, extensions)
