"""Processes of benchmarks/train_speed.py: the clock of a rank, and the ranks of a contender."""

import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import CONTENDERS, Done, Work
from benchmarks.train_speed_report import cpu_name
from training import setup
from training.config import RunConfig, load


class Pace:
    """Clock of one rank: times the steps of a round, reports them, waits for the next command.

    A command is `go STEPS [trace]`; the end of the commands raises Done.
    """

    def __init__(
        self,
        device: torch.device,
        commands: Iterator[str],
        report: Callable[[dict], None],
        trace: bool = False,
    ):
        self.device, self.commands, self.report, self.trace = device, commands, report, trace
        self.profiler: torch.profiler.profile | None = None

    def begin(self) -> None:
        command = next(self.commands, "").split()
        if len(command) < 2 or command[0] != "go":
            raise Done
        self.left, self.losses, self.marks, self.busy = int(command[1]), [], [], []
        if self.trace and len(command) > 2:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        self._mark()

    def _mark(self) -> None:
        if self.device.type == "cuda":  # on the GPU's clock, without synchronising
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
            self.busy.append(time.process_time())

    def __call__(self, loss: torch.Tensor | float) -> None:
        self._mark()
        self.losses.append(loss)
        self.left -= 1
        if self.left:
            return
        pairs = itertools.pairwise(self.marks)
        busy = [b - a for a, b in itertools.pairwise(self.busy)]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in pairs]
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            times = [b - a for a, b in pairs]
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        measurements: dict[str, Any] = {
            "seconds": times,
            "losses": [float(loss) for loss in self.losses],
            "memory_gb": memory,
            "cpu_s": busy,
        }
        if self.profiler:
            self.profiler.stop()
            measurements["profile"] = operators(
                self.profiler, len(times), self.device.type == "cuda"
            )
            self.profiler = None
        self.report(measurements)
        self.begin()


def operators(
    profiler: torch.profiler.profile, steps: int, cuda: bool, rows: int = 20
) -> list[dict[str, Any]]:
    """Return the operators with the largest self time: ms and calls per step, share."""
    events = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e)
        for e in profiler.key_averages()
    ]
    total = sum(time for time, _ in events) or 1
    events.sort(key=lambda pair: -pair[0])
    return [
        {
            "operator": e.key[:80],
            "ms": spent / 1e3 / steps,
            "calls": e.count / steps,
            "share": spent / total,
        }
        for spent, e in events[:rows]
    ]


def run_rank(
    name: str, run: RunConfig, steps: int, pace_of: Callable[[torch.device], Pace]
) -> None:
    """Train a contender as the rank in the environment, until the commands end."""
    rank, world = setup.rank_and_world()
    with setup.ranks() as device:
        pace = pace_of(device)
        try:
            pace.begin()
            CONTENDERS[name](Work(run, device, rank, world, steps, pace))
        except Done:
            return
        raise RuntimeError(f"{name} stopped before the commands ended")


def worker(name: str, config: str, overrides: list[str], steps: int, trace: bool) -> None:
    """Run a rank that Group started: read commands from stdin, write JSON reports to stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # other output goes to stderr
    report = os.fdopen(out, "w", buffering=1, encoding="utf-8")

    def pace_of(device: torch.device) -> Pace:
        is_cuda = device.type == "cuda"
        about = {"device": torch.cuda.get_device_name(device) if is_cuda else cpu_name()}
        return Pace(
            device,
            iter(sys.stdin),
            lambda values: print(json.dumps({**values, **about}), file=report),
            trace,
        )

    run_rank(name, load(config, overrides), steps, pace_of)
    setup.exit_process(0)


class Group:
    """The processes of one contender."""

    def __init__(
        self,
        spec: str,
        run: RunConfig,
        config: str,
        overrides: list[str],
        steps: int,
        trace: bool,
        folder: Path,
    ):
        self.spec = spec
        self.name, ranks, rows = ([*spec.split(":"), "", ""])[:3]
        self.ranks = int(ranks or 1)
        share = run.data.rows // self.ranks
        self.rows = int(rows or min(run.data.micro_batch_size, share))
        self.threads = max(1, (os.cpu_count() or 1) // self.ranks)
        self.warm: dict[str, Any] | None = None  # report of the warm-up
        self.rounds: list[dict[str, Any]] = []
        self.traced: dict[str, Any] | None = None
        self.failure: str | None = None
        settings = [
            f"data.micro_batch_size={self.rows}",
            f"output_dir={folder / 'checkpoints'}",
            f"log_dir={folder / spec}",
        ]
        command = [
            sys.executable,
            "-m",
            "benchmarks.train_speed",
            "--worker",
            self.name,
            "--config",
            config,
        ]
        command += ["--total", str(steps), *(["--trace"] if trace else []), *overrides, *settings]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.errors = open(folder / f"{spec}.err", "w+", encoding="utf-8")  # noqa: SIM115
        self.processes = []
        for rank in range(self.ranks):
            rank_env = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {
                name: str(value) for name, value in (rank_env if self.ranks > 1 else {}).items()
            }
            environment |= {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
            pipe = subprocess.PIPE
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=self.errors,
                    text=True,
                    bufsize=1,
                    env={**os.environ, **environment},
                    encoding="utf-8",
                )
            )

    def go(self, steps: int, trace: bool = False) -> dict[str, Any] | None:
        """Run steps; return the merged reports of all ranks, or set `failure` and return None."""
        try:
            for process in self.processes:
                assert process.stdin
                process.stdin.write(f"go {steps}{' trace' if trace else ''}\n")
            reports = [
                json.loads(process.stdout.readline())
                for process in self.processes
                if process.stdout
            ]
        except (BrokenPipeError, json.JSONDecodeError):
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()] or [
                "a process ended without a message"
            ]
            memory = any("out of memory" in line.lower() for line in lines)
            self.failure = (
                "out of memory"
                if memory
                else next((x for x in reversed(lines) if "Error" in x), lines[-1])[:300]
            )
            self.stop()
            return None
        losses = [
            statistics.fmean(values)
            for values in zip(*(report["losses"] for report in reports), strict=True)
        ]
        busy = [
            sum(values) for values in zip(*(report["cpu_s"] for report in reports), strict=True)
        ]
        return {
            **reports[0],
            "losses": losses,
            "cpu_s": busy,
            "memory_gb": max(report["memory_gb"] for report in reports),
        }

    def stop(self) -> None:
        for process in self.processes:
            if process.stdin:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
