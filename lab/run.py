"""Run the trials of an experiment as processes, each in its own folder, and record their state.

`trial.json` in a run's folder holds its identity (a hash of its settings) and status. A finished
run with the same identity is not repeated. A killed run continues from its newest checkpoint.
"""

import hashlib
import os
import queue
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from cli import ROOT
from files import read_object, write_json, write_text
from lab.experiment import Experiment, Trial, make_trial, pilots
from lab.measurements import measure, seconds_per_step
from machine import cpus
from torchrun_plugin import LAUNCHER
from training.ops.supervisor import DRIVER
from training.run_folder import unused

STATE, OUTPUT = "trial.json", "output.txt"
FINISHED, FAILED, RUNNING = "finished", "failed", "running"
CODE = ("models", "data", "training", "cli.py", "files.py", "train.py", "train_gpt.py")
MAX_LINES = 6  # of a failed run's output that trial.json keeps


@dataclass
class Slots:
    """Places where runs execute: one run per device, or one run on this machine."""

    environment: Mapping[str, str]
    devices: Sequence[str] = ()
    ranks: int = 1
    threads: int | None = None
    free: "queue.Queue[str | None]" = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        if len(self.devices) % self.ranks:
            raise ValueError(
                f"--devices lists {len(self.devices)} devices and a run has {self.ranks} ranks; "
                "list a multiple of that"
            )
        for begin in range(0, len(self.devices), self.ranks):
            self.free.put(",".join(self.devices[begin : begin + self.ranks]))
        if not self.devices:
            self.free.put(None)
        self.count = self.free.qsize()

    def environment_on(self, slot: str | None) -> dict[str, str]:
        """Return the environment of a run: its devices, threads and driver process."""
        threads = max(1, cpus() // (self.count * self.ranks))
        environment = {"OMP_NUM_THREADS": str(threads), **self.environment}
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        paths = [str(ROOT), *filter(None, [self.environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        # A run must end with this process: the next session would start the same run again.
        return {**environment, DRIVER: str(os.getpid()), LAUNCHER: str(os.getpid())}


def is_finished(trial: Trial) -> bool:
    """Return True if the run has finished with its present settings."""
    state = read_object(trial.folder / STATE) or {}
    return state.get("identity") == trial.identity and state.get("status") == FINISHED


def plan_trials(
    experiment: Experiment, variants: Sequence[str], seeds: Sequence[int]
) -> list[Trial]:
    """Return all runs, seed by seed, so that drift of the machine affects every variant equally.

    With a budget in seconds, a variant with unfinished pilots is excluded.
    """
    step_s: dict[str, float | None] = dict.fromkeys(variants)
    for variant in filter(experiment.needs_pilot, variants):
        shorts = pilots(experiment, variant)
        if all(map(is_finished, shorts)):
            step_s[variant] = statistics.fmean(map(seconds_per_step, shorts))
        else:
            del step_s[variant]
    return [
        make_trial(experiment, variant, seed, seconds)
        for seed in seeds
        for variant, seconds in step_s.items()
    ]


def run_experiment(
    experiment: Experiment, variants: Sequence[str], seeds: Sequence[int], slots: Slots
) -> list[str]:
    """Run everything that has not finished; return one line per failed run."""
    needed = [pilots(experiment, name) for name in variants if experiment.needs_pilot(name)]
    # Pilots run round by round, so that drift of the machine affects every variant equally.
    shorts = [short for round_ in zip(*needed, strict=True) for short in round_]
    failures = Runner(experiment, shorts, slots).run()
    return failures + Runner(experiment, plan_trials(experiment, variants, seeds), slots).run()


class Runner:
    """Run trials in order on the free slots, and print one line per finished run."""

    def __init__(self, experiment: Experiment, trials: list[Trial], slots: Slots):
        self.experiment, self.trials, self.slots = experiment, trials, slots
        self.waiting = [trial for trial in trials if not is_finished(trial)]
        self.wall_s: list[float] = []
        self.failures: list[str] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.printing, self.interrupted = Lock(), False

    def run(self) -> list[str]:
        """Run the unfinished trials; return one line per failure."""
        for trial in self.trials:
            if trial not in self.waiting:
                self._clean(trial)  # a killed process may have left checkpoints
                print(f"{trial.name}: finished earlier", flush=True)
        with ThreadPoolExecutor(self.slots.count) as pool:
            futures = [pool.submit(self._run_one, trial) for trial in self.waiting]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stop()
                raise
        return self.failures

    def _stop(self) -> None:
        """Ask running processes to save and exit, and start no others."""
        self.interrupted = True
        for process in list(self.running.values()):
            process.terminate()

    def _run_one(self, trial: Trial) -> None:
        slot = self.slots.free.get()
        try:
            if not self.interrupted:
                self._execute(trial, self.slots.environment_on(slot))
        finally:
            self.slots.free.put(slot)

    def _execute(self, trial: Trial, environment: Mapping[str, str]) -> None:
        earlier = _prepare(trial)
        state: dict[str, Any] = {
            "identity": trial.identity,
            "variant": trial.variant,
            "seed": trial.seed,
            "command": list(trial.words),
            "steps": trial.steps,
            "codes": sorted({*earlier.get("codes", []), code_hash()}),
        }
        write_json(trial.folder / STATE, {**state, "status": RUNNING})
        start = time.monotonic()
        status = self._spawn(trial, environment)
        wall_s = time.monotonic() - start
        state |= {"exit_status": status, "wall_s": round(wall_s, 1)}
        if self.interrupted:
            return
        error = _last_lines(trial.folder / OUTPUT) if status else ""
        figures = ""
        if not status:
            try:
                figures = self._figures(trial)
            except ValueError as problem:
                error = str(problem)
        if error:
            write_json(trial.folder / STATE, {**state, "status": FAILED, "error": error})
            reason = error.splitlines()[-1]
            if status < 0:
                reason = f"killed by signal {-status}"
            self.failures.append(f"{trial.name} ({reason})")
            figures = f"FAILED, exit status {status}: {reason}"
        else:
            write_json(trial.folder / STATE, {**state, "status": FINISHED})
            self._clean(trial)
        with self.printing:
            self.wall_s.append(wall_s)
            print(f"{trial.name}: {figures}, {wall_s:.0f} s{self._remaining()}", flush=True)

    def _spawn(self, trial: Trial, environment: Mapping[str, str]) -> int:
        """Run the command to its end and return its exit status; 127 if it cannot be started."""
        words = [sys.executable if word == "python" else word for word in trial.words]
        words = [str(ROOT / word) if _is_entry_point(word) else word for word in words]
        with open(trial.folder / OUTPUT, "ab") as output:
            try:
                process = subprocess.Popen(
                    words,
                    cwd=trial.working_folder,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                output.write(f"error: {error}\n".encode())
                return 127
            self.running[trial.name] = process
            if self.interrupted:
                process.terminate()
            status = process.wait()
            del self.running[trial.name]
        return status

    def _figures(self, trial: Trial) -> str:
        if trial.name.endswith("-pilot"):
            return f"{seconds_per_step(trial):.4f} s per step"
        compare = self.experiment.compare
        measured = measure(trial, compare.metrics)
        return (
            f"{compare.metric} {measured.final[compare.metric]:.4f}, {measured.steps:,} steps, "
            f"{measured.seconds:.1f} s of training"
        )

    def _remaining(self) -> str:
        left = len(self.waiting) - len(self.wall_s)
        if not left:
            return ""
        seconds = left * sum(self.wall_s) / len(self.wall_s) / self.slots.count
        return f"; {left} more, about {max(1, round(seconds / 60))} min"

    def _clean(self, trial: Trial) -> None:
        """Delete the checkpoints of a finished run, unless the experiment keeps them."""
        keep = self.experiment.keep_checkpoints and not trial.name.endswith("-pilot")
        if not keep and trial.checkpoints.is_dir():
            shutil.rmtree(trial.checkpoints)


def _prepare(trial: Trial) -> dict[str, Any]:
    """Create the folder of a run and return the state of its earlier attempt, or {}.

    Renames the folders of an earlier run with different settings, and checkpoints without a log:
    resumed, they would end in a log of the last steps only.
    """
    state = read_object(trial.folder / STATE) or {}
    earlier = next((folder for folder in _folders(trial) if folder.is_dir()), None)
    if earlier and state.get("identity") != trial.identity:
        suffix = next(
            f".old{n}"
            for n in range(1, 10_000)
            if not any(_with_suffix(f, f".old{n}").exists() for f in _folders(trial))
        )
        of_plan = (path for name in ("*", "*/plan") for path in trial.folder.glob(f"logs/{name}"))
        with unused(*_folders(trial), *of_plan):
            for folder in _folders(trial):
                if folder.is_dir():
                    folder.rename(_with_suffix(folder, suffix))
        if earlier == trial.folder:
            reason = "its settings have changed; the earlier run is in"
        else:
            reason = f"{trial.folder} is missing; the earlier checkpoints are in"
        print(f"{trial.name}: {reason} {_with_suffix(earlier, suffix)}", flush=True)
        state = {}
    trial.folder.mkdir(parents=True, exist_ok=True)
    for name, content in trial.files.items():
        write_text(trial.folder / name, yaml.safe_dump(content, sort_keys=False))
    if trial.files:  # a plan runs in its own folder and needs links to the data and configs here
        for name in ("data/store", "configs"):
            link = trial.folder / name
            if Path(name).exists() and not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(name).resolve(), target_is_directory=True)
    return state


def _folders(trial: Trial) -> tuple[Path, Path]:
    return trial.folder, trial.checkpoints


def _with_suffix(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _is_entry_point(word: str) -> bool:
    """Return True if a word is a script of the project that the working folder lacks."""
    return word.endswith(".py") and not Path(word).exists() and (ROOT / word).is_file()


def _last_lines(path: Path) -> str:
    """Return the last lines of a run's output."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-MAX_LINES:]) or "no output"


def code_hash() -> str:
    """Hash the source that training depends on, to detect code changes between runs."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]
