"""Progress of a plan: the number of each command, elapsed time and an estimate of the time left."""

import time

from training.console import clock
from training.planning.plan import Plan, ScheduledPhase, scheduled_phases


def command_count(plan: Plan, phases: list[ScheduledPhase] | None = None) -> int:
    """Return the number of commands of a plan. phases: if some were extended."""
    count = len(plan.before) + len(plan.after)
    for scheduled in phases or scheduled_phases(plan):
        milestones = scheduled.phase.milestones
        count += len({milestone.step for milestone in milestones} | {scheduled.end})
        for milestone in milestones:
            evals = len(milestone.evals or plan.evals)
            count += 2 * evals + 1 if milestone.averages else evals
    return count + sum(len(stage.commands) + len(stage.evals) for stage in plan.stages)


class Progress:
    """Numbers a plan's commands, including those that a repeated call skips."""

    def __init__(self, plan: Plan, phases: list[ScheduledPhase]):
        """ValueError if plan.seconds does not have one value per command."""
        self.number, self.total = 0, command_count(plan, phases)
        self.seconds = plan.seconds
        if self.seconds and len(self.seconds) != self.total:
            raise ValueError(
                f"seconds has {len(self.seconds)} values, but the plan has {self.total} commands; "
                "give one for each, or remove the setting"
            )
        self.start = time.monotonic()
        self.took = self.expected = 0.0  # seconds of the commands run by this call

    def skip(self, count: int = 1) -> None:
        """Count commands that are skipped because their results exist."""
        self.number += count

    def heading(self, title: str) -> str:
        """Return the line to print before the next command."""
        self.number += 1
        position = f"[{self.number}/{self.total}]"
        elapsed = clock(time.monotonic() - self.start)
        if not self.seconds:
            return f"{position} {title} ({elapsed} elapsed)"
        # This machine's speed relative to the plan's seconds.
        pace = self.took / self.expected if self.expected else 1.0
        left = clock(pace * sum(self.seconds[self.number - 1 :]))
        return f"{position} {title} ({elapsed} elapsed, about {left} left)"

    def done(self, seconds: float) -> None:
        """Record how long the command of the last heading took."""
        if self.seconds:
            self.took += seconds
            self.expected += self.seconds[self.number - 1]
