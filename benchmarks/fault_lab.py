"""Shared parts of the fault table's cases: undisturbed runs, table rows, and the Markdown page."""

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
    """A case's row of the table."""

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
    skipped: str = ""  # why this machine cannot run the case
    date: str = ""
    versions: str = ""
    command: str = ""  # that measured it, if not the page's

    def markdown(self) -> str:
        return "| " + " | ".join((self.fault, self.done, *self.cells, self.note)) + " |"


@dataclass
class Lab:
    """Working folder of the cases, and the undisturbed runs that they share."""

    folder: Path
    launch: Launch
    sites: Sites
    quick: bool
    seed: int
    imports: float  # upper limit of start-up kill delays, seconds
    lock: threading.Lock = field(default_factory=threading.Lock)
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides that make quick runs smaller: one layer, one micro-batch per rank and step."""
        return ("model.num_hidden_layers=1", "data.micro_batch_size=4") if self.quick else ()

    @property
    def pause(self) -> float:
        """Seconds that a save waits after its launcher or driver was killed."""
        return 0.5 if self.quick else 1.0

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
            [settings(store or self.store, folder, steps, "one", *more, *self.overrides)],
            self.launch,
            always=always or Fault(),
        )

    def straight(self, name: str, make: Callable[[str], Run]) -> Run:
        """Return the finished run of make(name), from a cache."""
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
    stream = "same stream" if verdict.stream_equal else "DIFFERENT STREAM"
    tokens = f"{verdict.tokens_lost} / {verdict.tokens_repeated}, {stream}"
    curve = "equal, bitwise" if verdict.curve_equal else f"within {verdict.loss_difference:.1e}"
    state = "equal, bitwise" if verdict.state_equal else f"within {verdict.weights_difference:.1e}"
    if not tolerance:
        curve, state = (
            cell if cell.startswith("equal") else f"DIFFERENT, {cell}" for cell in (curve, state)
        )
    if verdict.unmeasured:
        curve += f", {verdict.unmeasured} held-out loss(es) not measured"
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
    return f"""# Fault injection

Written by `{about["command"]}` on {about["date"]}:
{about["hardware"]}, Python {about["python"]}, torch {about["torch"]}, seed {about["seed"]};
{len(rows)} rows, {skipped} of them not run on this machine, {launches} commands.
Dates of the rows: {measured}. faults.json has the date and the versions of each row.

There are two kinds of cases. Each compares its result with that of an undisturbed run.

- train.py alone: a model of 2 layers and width 32 on 2 CPU ranks (gloo, ZeRO-2) with background
  saves every {EVERY} steps, in runs of up to 60 steps.
- Plans and their commands: a small plan downloads and prepares texts, trains a tokenizer, pretrains
  12 steps with a gate at step 4, then runs mid-training, SFT, DPO and GGUF export on 2 ranks. The
  undisturbed plan runs once for all these cases. Each case has its own working folder, with the
  undisturbed results of the stages before.

In plan cases, faults act at file operations. A Python audit hook in every process sends a signal at
a chosen open or rename, or limits the file size: then the kernel ends the process during a write
(SIGXFSZ).

Columns:

- Recovered: repeating the same command line completes the run.
- Tokens lost / repeated: in train.py cases the objective records the rows of each update, keyed by
  the update count, which is saved with the weights. The test compares them with the loader's rows
  at the logged batch indices. Plan cases compare the steps and batch indices in metrics.jsonl.
- Loss curve: all columns of metrics.jsonl except times and memory; for train.py cases step, batch
  index, tokens, learning rate, loss, z-loss, gradient norm and held-out loss.
- Weights, state, files: checksums of all files of the last checkpoint, including moments and
  position, and of the shards, tokenizer, GGUF files, decision and results of the case.

A temporary file left behind fails a plan case.

{table(rows)}

[faults.json](../benchmarks/results/faults.json) has the times of the kills and the sha256 of each
stream. Not tested: GPUs, NCCL, several machines, power failures, wrong system clocks.
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
