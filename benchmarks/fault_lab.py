"""What the cases of the fault table share: the runs that nothing happens to, a case's row, and the page of all rows."""

import platform
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_runs import EVERY, Launch, Run, Verdict, settings
from benchmarks.fault_sites import Sites
from benchmarks.faulty_train import Fault

COLUMNS = (
    "fault",
    "what was done",
    "recovered",
    "tokens lost / repeated",
    "loss curve",
    "weights, state, files",
    "note",
)


@dataclass
class Row:
    """A case's line of the table."""

    name: str
    fault: str
    done: str
    ok: bool
    cells: tuple[str, str, str, str]  # recovered, tokens, loss curve, weights and state
    note: str
    launches: int
    seconds: float = 0.0
    stream: str = ""
    kills: list[dict] = field(default_factory=list)
    skipped: str = ""  # why the case could not run on this machine
    date: str = ""
    versions: str = ""
    command: str = ""  # that measured it, where it is another than the page's

    def markdown(self) -> str:
        return "| " + " | ".join((self.fault, self.done, *self.cells, self.note)) + " |"


@dataclass
class Lab:
    """Where the cases run, and the runs that nothing happens to, which they share."""

    folder: Path
    launch: Launch
    sites: Sites
    quick: bool
    seed: int
    imports: float  # seconds that a start-up may take: a kill in it comes within that
    lock: threading.Lock = field(default_factory=threading.Lock)
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def run(
        self,
        name: str,
        steps: int = 12,
        *more: str,
        store: Path | None = None,
        always: Fault | None = None,
    ) -> Run:
        folder = self.folder / name
        return Run(
            folder,
            [settings(store or self.store, folder, steps, "one", *more)],
            self.launch,
            always=always or Fault(),
        )

    def straight(self, name: str, make: Callable[[str], Run]) -> Run:
        """The run that make(name) makes, finished; made once."""
        with self.lock:
            if name not in self.runs:
                self.runs[name] = make(name).finish()
            return self.runs[name]

    def plain(self, steps: int = 12) -> Run:
        return self.straight(f"straight-{steps}", lambda name: self.run(name, steps))


def row(
    run: Run, verdict: Verdict, fault: str, done: str, note: str, tolerance: float = 0.0
) -> Row:
    name = run.folder.name
    tokens = f"{verdict.tokens_lost} / {verdict.tokens_repeated}, {'same stream' if verdict.stream_equal else 'ANOTHER STREAM'}"
    curve = "equal, bitwise" if verdict.curve_equal else f"within {verdict.loss_difference:.1e}"
    state = "equal, bitwise" if verdict.state_equal else f"within {verdict.weights_difference:.1e}"
    if not tolerance:
        curve, state = (
            cell if cell.startswith("equal") else f"DIFFERENT, {cell}" for cell in (curve, state)
        )
    if verdict.unmeasured:
        curve += f", {verdict.unmeasured} held-out figure(s) never taken"
    cells = ("yes", tokens, curve, state)
    return Row(
        name,
        fault,
        done,
        verdict.holds(tolerance),
        cells,
        note,
        run.launches,
        stream=verdict.stream,
        kills=run.killed,
    )


def table(rows: list[Row]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
            *(row.markdown() for row in rows),
        ]
    )


def page(rows: list[Row], about: dict[str, str]) -> str:
    launches = sum(row.launches for row in rows)
    skipped = sum(bool(row.skipped) for row in rows)
    dates = Counter(row.date for row in rows)
    measured = ", ".join(f"{count} on {date}" for date, count in sorted(dates.items()))
    return f"""# Faults, and what is left of them

Written by `{about["command"]}` on {about["date"]}:
{about["hardware"]}, Python {about["python"]}, torch {about["torch"]}, seed {about["seed"]};
{len(rows)} rows, {skipped} of them not run on this machine, {launches} commands.
Rows were measured on different days where noted: {measured}; faults.json has the date and the
versions of each row.

There are two kinds of case. Each ends with a comparison with a run that nothing happened to.

- train.py alone: a model of 2 layers and width 32 on 2 CPU ranks (gloo, ZeRO-2) with background
  saves every {EVERY} steps, in runs of up to 60 steps.
- Whole plans and their commands: a small plan downloads and prepares texts, trains a tokenizer,
  pretrains 12 steps, measures and judges step 4, then does mid-training, SFT, DPO and GGUF export
  on 2 ranks. The undisturbed plan is run once and shared by all these cases; each case has a
  working folder of its own, with the parts of the undisturbed plan that come before.

Faults of the second kind act at file operations: a Python audit hook in every process sends a signal
at a chosen open or rename, or lets the kernel end the process (SIGXFSZ) in the middle of a file.

Columns: the same command line is given again until it is complete ("recovered"). Tokens lost /
repeated: train.py cases compare what the gradients of each update came from, recorded at the
objective under the optimizer's own count of updates, which is saved and loaded with the weights,
and read anew from the loader by the places in metrics.jsonl; plan cases compare the steps and places
of metrics.jsonl. Loss curve: every column of metrics.jsonl but times and memory; for train.py cases
step, place, tokens, rate, loss, z-loss, gradient norm and held-out loss. Weights, state, files:
checksums of every file of the last checkpoint, moments and position too, and of the shards,
tokenizer, GGUF files, decision and results that the case makes. A temporary file that is left fails
the plan cases.

{table(rows)}

The moments of the kills and the sha256 of each stream are in
[faults.json](../benchmarks/results/faults.json). What is not shown here: GPUs, NCCL, several
machines, a power failure, a real clock that is wrong.
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
