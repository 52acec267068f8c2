"""Extensions of a plan's phases (--extend), kept in the run's log folder."""

from collections.abc import Mapping
from pathlib import Path

from files import read_object, write_json
from training.logger import append_event
from training.planning.plan import Plan, scheduled_phases


def record_extensions(plan: Plan, logs: Path, new: Mapping[str, int]) -> dict[str, int]:
    """Return the total steps by which each phase is extended, earlier calls included.

    new: phase -> steps; ValueError if they do not exceed the earlier ones.
    """
    path = logs / "extensions.json"
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
    if new:
        extensions = {**extensions, **new}
        scheduled_phases(plan, extensions)  # validates the steps before anything is written
        append_event(logs, "extend", f"extended by steps: {dict(new)}", **new)
        write_json(path, extensions)
    return extensions
