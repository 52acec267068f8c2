"""Tiny train.py runs with injected faults, and comparisons of their tokens, losses and weights.

A run is a list of phases. Each phase is a command line that is repeated until it completes.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faulty_train import Action, Fault, row_hashes
from data.dataloader import PackedDataLoader
from data.shards import ShardWriter
from data.store import DUMMY, open_shards
from files import read_lines, step_folders
from training.checkpoint_files import (
    find_damage,
    read_manifest,
    read_position,
    step_of,
)
from training.config import load

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "test_mode.yaml"
VOCAB = 128
LENGTH = 32  # tokens per row
ROWS = 8  # per step
EVERY = 2  # steps between checkpoints
CURVE = ("step", "phase", "batch_index", "tokens", "lr", "loss", "z_loss", "grad_norm")
HELD_OUT = "val/loss"
PATIENCE = 150.0  # timeout of a launch, seconds

# Arguments of train.py, ranks, fault, path of the record.
Launch = Callable[[list[str], int, Fault, Path], "Ended"]


class Failed(Exception):
    """A run did not recover; the message says how."""


@dataclass
class Ended:
    status: int
    output: str


def launch_here(arguments: list[str], ranks: int, fault: Fault, record: Path) -> Ended:
    """Run scripts.launch on this machine; return its status after all its processes have ended."""
    command = [
        sys.executable,
        "-m",
        "scripts.launch",
        f"--nproc_per_node={ranks}",
        "-m",
        "benchmarks.faulty_train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault)}
    with open(f"{record}.output", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        Path(f"{record}.launcher.pid").write_text(str(process.pid), encoding="utf-8")
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = -1
            process.kill()
        for path in record.parent.glob(f"{record.name}.rank*.pid"):
            wait_until_gone(int(path.read_text(encoding="utf-8") or 0), kill=status == -1)
        output.seek(0)
        text = output.read()
    if status == -1:
        raise Failed(f"a launch did not end within {PATIENCE:.0f} s: {text[-500:]}")
    return Ended(status, text)


def wait_until_gone(process: int, kill: bool = False) -> None:
    """Wait until a process that is not our child ends; kill it after 60 seconds."""
    start = time.monotonic()
    while process and (stat := Path(f"/proc/{process}/stat")).exists():
        try:
            if stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return
            if kill or time.monotonic() - start > 60:
                os.kill(process, 9)
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.01)


def write_store(store: Path, seed: int) -> None:
    """Write three sources of skewed random tokens in small shards; "short" has six steps."""
    rng = np.random.default_rng(seed)
    for name, tokens in ((DUMMY, 24_000), ("more", 24_000), ("short", 6 * ROWS * LENGTH + 1)):
        with ShardWriter(
            store / "tokens" / name, VOCAB, DUMMY, inputs={}, shard_tokens=4_000
        ) as shards:
            for split, left in (("val", 1_000), ("train", tokens)):
                while left:
                    length = min(int(rng.integers(20, 200)), left)
                    shards.add(
                        split,
                        [0, *(VOCAB * rng.random(length - 1) ** 2).astype(int).clip(1).tolist()],
                    )
                    left -= length


def settings(store: Path, folder: Path, steps: int, phase: str = "one", *more: str) -> list[str]:
    """Return train.py's arguments for a phase of a tiny model; one step is 256 tokens."""
    model = (
        f"{{vocab_size: {VOCAB}, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 4, "
    )
    return [
        "--config",
        str(CONFIG),
        f"model={model}num_key_value_heads: 2, max_position_embeddings: 64}}",
        f"data={{store: {store}, mix: {{{DUMMY}: 0.6, more: 0.4}}, sequence_length: {LENGTH}, "
        f"tokens_per_step: {ROWS * LENGTH}, micro_batch_size: 2}}",
        f"schedule={{warmup_steps: 2, total_steps: {steps}, decay_steps: 4}}",
        "parallel.dtype=float32",
        "validation={every: 4, rows: 4}",
        f"checkpoint={{every: {EVERY}, keep: 3, asynchronous: true}}",
        f"phase={phase}",
        f"steps={steps}",
        f"output_dir={folder / phase}",
        f"log_dir={folder / 'logs'}",
        *more,
    ]


@dataclass
class Run:
    """A run in `folder`. always: a fault injected into every launch."""

    folder: Path
    phases: list[list[str]]  # arguments of train.py, in order
    launch: Launch
    ranks: int = 2
    always: Fault = field(default_factory=lambda: Fault())
    launches: int = 0
    current: int = 0  # phase
    ended: list[Ended] = field(default_factory=list)
    killed: list[dict[str, Any]] = field(default_factory=list)  # state after each kill
    damaged: int = 0  # step folders that were damaged on purpose

    def again(self, fault: Fault | None = None, ranks: int | None = None) -> Ended:
        """Launch the current phase again; if it completes, the next phase becomes current."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / f"launch-{self.launches:03}"
        self.launches += 1
        merged: Fault = {**self.always, **(fault or {}), "record": str(record)}
        ended = self.launch(self.phases[self.current], ranks or self.ranks, merged, record)
        self.ended.append(ended)
        actions = merged.get("actions", [])
        if any(action["do"].startswith("kill") for action in actions):
            halves = sorted(path.name for path in self.folder.glob("*/step_*.tmp"))
            rows = read_lines(self.folder / "logs" / "metrics.jsonl")
            self.killed.append(
                {
                    **actions[-1],
                    "status": ended.status,
                    "step": rows[-1]["step"] if rows else 0,
                    "half": halves,
                }
            )
        for path in self.step_folders():
            if problem := find_damage(path):
                raise Failed(f"after launch {self.launches} {path.name} is damaged: {problem}")
        if ended.status == 0:
            self.current += 1
        return ended

    def step_folders(self) -> list[Path]:
        return [path for phase in ("one", "two") for path in step_folders(self.folder / phase)]

    def newest(self) -> int:
        """Return the step of the current phase's newest checkpoint, or 0."""
        folders = step_folders(self.folder / ("one", "two")[self.current])
        return step_of(folders[-1]) if folders else 0

    def survive(self, *faults: Fault) -> "Run":
        """Launch with each fault, which must stop the run, then finish."""
        for number, fault in enumerate(faults, 1):
            if self.again(fault).status == 0:
                action = fault.get("actions", fault)
                raise Failed(f"fault {number} of {len(faults)} did not stop the run: {action}")
        return self.finish()

    def finish(self, ranks: int | None = None) -> "Run":
        while self.current < len(self.phases):
            if status := self.again(ranks=ranks).status:
                raise Failed(f"status {status} without a fault: {self.ended[-1].output[-800:]}")
        return self

    def final(self) -> Path:
        return self.step_folders()[-1]


# Training data


def trained_on(records: list[list[dict[str, Any]]]) -> dict[int, list[str]]:
    """Return update -> hashes of its rows, from the records of all launches.

    A later launch replaces the updates that it repeats. A launch that starts too late leaves a gap.
    """
    stream: dict[int, list[str]] = {}
    for lines in records:
        if lines:
            first = min(line["update"] for line in lines)
            stream = {update: rows for update, rows in stream.items() if update < first}
        # A rank's rows are contiguous in the step.
        for line in sorted(lines, key=lambda line: line["rank"]):
            stream.setdefault(line["update"], []).extend(line["rows"])
    return stream


def recorded(run: Run) -> dict[int, list[str]]:
    """Return trained_on() of a run's records."""
    launches = [
        sorted(run.folder.glob(f"launch-{number:03}.rank*.jsonl")) for number in range(run.launches)
    ]
    return trained_on([[line for path in paths for line in read_lines(path)] for paths in launches])


def by_batch_index(run: Run) -> dict[int, list[str]]:
    """Return update -> hashes of rows, re-read at the batch indices in metrics.jsonl."""
    loaders: dict[str, PackedDataLoader] = {}
    stream = {}
    for row in read_lines(run.folder / "logs" / "metrics.jsonl"):
        phase = row["phase"]
        if phase not in loaders:
            config = load(run.folder / "logs" / f"{phase}.config.yaml")
            data = config.data
            shards = open_shards(data.store, data.mix, "train", config.model.vocab_size)
            loaders[phase] = PackedDataLoader(
                shards, data.mix, data.sequence_length, data.rows, data.rows, config.seed
            )
        [batch] = loaders[phase].at(row["batch_index"] - 1).batches
        stream[row["step"]] = row_hashes(batch)
    return stream


def stream_hash(stream: dict[int, list[str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(stream.items())).encode()).hexdigest()


def lost_and_repeated(
    stream: dict[int, list[str]], expected: dict[int, list[str]]
) -> tuple[int, int]:
    """Count the rows missing from stream and the rows it has too many, with multiplicity."""
    actual_rows, expected_rows = (
        Counter(row for rows in updates.values() for row in rows) for updates in (stream, expected)
    )
    lost, repeated = expected_rows - actual_rows, actual_rows - expected_rows
    return lost.total(), repeated.total()


# Comparison


@dataclass
class Verdict:
    """Comparison of a run with faults and an undisturbed run."""

    tokens_lost: int
    tokens_repeated: int
    stream: str  # sha256 of the stream of rows
    stream_equal: bool  # recorded, by batch indices in metrics.jsonl, and in the other run
    loss_difference: float  # largest of any step
    curve_equal: bool  # all of CURVE, and each held-out loss that was measured, bit for bit
    unmeasured: int  # steps whose held-out loss only the other run has
    weights_difference: float  # largest of any weight
    state_equal: bool  # weights, moments and position of the last checkpoint, file by file

    def holds(self, tolerance: float = 0.0) -> bool:
        """True if no tokens were lost or repeated and all is equal, or within a tolerance."""
        tokens = self.stream_equal and not self.tokens_lost and not self.tokens_repeated
        exact = self.curve_equal and self.state_equal
        return tokens and (
            exact
            if not tolerance
            else max(self.loss_difference, self.weights_difference) <= tolerance
        )


def compare(run: Run, reference: Run, skipped: bool = False) -> Verdict:
    """Compare a run with a reference.

    skipped: run skipped a bad step, reference excluded it by setting; their skip counts may differ.
    """
    stream, expected = recorded(run), recorded(reference)
    lost, repeated = lost_and_repeated(stream, expected)
    curves = [read_lines(part.folder / "logs" / "metrics.jsonl") for part in (run, reference)]
    plain = [[{name: row.get(name) for name in CURVE} for row in rows] for rows in curves]
    losses = [np.array([row["loss"] for row in rows]) for rows in curves]
    same = [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    measured = [{row["step"]: row[HELD_OUT] for row in rows if HELD_OUT in row} for rows in curves]
    unmeasured = len(measured[1].keys() - measured[0].keys())
    held_out = all(measured[1].get(step) == value for step, value in measured[0].items())
    manifests = [read_manifest(part.final()) for part in (run, reference)]
    assert all(manifests)
    files = [dict(manifest["files"]) for manifest in manifests if manifest]
    positions = [read_position(part.final()) for part in (run, reference)]
    for part, position in zip(files, positions, strict=True):
        if skipped:
            part.pop("state/trainer.json"), position["faults"].pop("skipped")
    return Verdict(
        lost * _tokens(run),
        repeated * _tokens(run),
        stream_hash(stream),
        stream == expected == by_batch_index(run) == by_batch_index(reference),
        float(np.abs(losses[0] - losses[1]).max()) if same else float("inf"),
        plain[0] == plain[1] and held_out,
        unmeasured,
        _largest_difference(run.final(), reference.final()),
        files[0] == files[1] and (not skipped or positions[0] == positions[1]),
    )


def _tokens(run: Run) -> int:
    return load(run.folder / "logs" / "one.config.yaml").data.sequence_length


def _largest_difference(a: Path, b: Path) -> float:
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def kill(at: str, of: int, rank: int = 0, everyone: bool = False, delay: float = 0.0) -> Fault:
    """Return a fault that sends SIGKILL to one rank, or to all ranks and the launcher."""
    action: Action = {
        "at": at,
        "of": of,
        "rank": rank,
        "do": "kill_all" if everyone else "kill",
        "delay": delay,
    }
    return {"actions": [action]}
