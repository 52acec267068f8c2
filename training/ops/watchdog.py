"""Hang watchdog: ends ranks stuck in a step and names the rank they wait for.

torch's own timeout must outlast the slowest save; this one covers only the steps.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cli import print_error

READS, COMPUTES = "reading the data", "the computation"  # the two parts of a step, in order
COMPILING = 1800  # extra seconds for the first step
PULSE = 1.0  # seconds between heartbeats
GRACE = 5.0  # seconds before a rank reports a lost peer
GONE = ": its process is stopped, or its machine is down or swapping"
LOST = 75  # exit status: EX_TEMPFAIL of sysexits.h, "try again"
AGAIN = "repeat the command to resume from the newest checkpoint"
BROKEN = (  # RuntimeError texts of a lost connection
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "Timed out",
    "connectFullMesh failed",
)


class HangWatchdog:
    """Ends this process with status 75 if a step takes longer than `seconds`; off with one rank.

    The first step may take half an hour more. begin() starts the clock, pause() stops it for
    validation and saving. A thread writes a heartbeat to the process group's store, so that
    a stuck rank can be told from a dead rank. Each running rank writes the stacks of its threads
    and its last collectives (Flight Recorder pickles) to `folder`.
    """

    def __init__(self, seconds: float, folder: Path):
        self.seconds, self.folder = seconds, folder
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.first = self.step = 0
        self.since: float | None = None
        self.done = threading.Event()

    def __enter__(self) -> "HangWatchdog":
        if self.world > 1:
            self.store: Any = dist.distributed_c10d._get_default_store()
            self.threads = [
                threading.Thread(target=work, daemon=True) for work in (self._pulse, self._time)
            ]
            for thread in self.threads:
                thread.start()
        return self

    def begin(self, step: int, activity: str) -> None:
        """Record that this rank begins `activity`, READS or COMPUTES, of a step counted from 1."""
        if self.world == 1:
            return
        if step != self.step:
            self.first, self.step, self.since = self.first or step, step, time.monotonic()
            # This timer works even if no thread can get the GIL.
            faulthandler.dump_traceback_later(self._limit() + 60, exit=True)
        self.store.set(f"watch/{self.rank}", f"{step} {activity}")

    def pause(self) -> None:
        """Pause the watchdog."""
        self.since = None
        if self.world > 1:
            faulthandler.cancel_dump_traceback_later()

    def _limit(self) -> float:
        return self.seconds + (COMPILING if self.step == self.first else 0)

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.done.set()
        if self.world > 1:
            self.threads[1].join()  # the thread may wait for a closed store

    def _pulse(self) -> None:
        with suppress(RuntimeError):  # the store is closed
            store = self.store.clone()  # the main thread's connection may be in use
            while not self.done.wait(PULSE):
                store.add(f"watch/pulse/{self.rank}", 1)

    def _time(self) -> None:
        while not self.done.wait(min(1.0, self.seconds / 4)):
            since = self.since
            if since is not None and time.monotonic() - since > self._limit():
                self._end()

    def _end(self) -> NoReturn:
        answer: list[str | None] = []
        asking = threading.Thread(target=self._ask, args=(answer,), daemon=True)
        asking.start()
        asking.join(10 * PULSE)
        cause = (
            answer[0]
            if answer
            else "rank 0, which hosts the ranks' shared store, does not respond" + GONE
        )
        if cause:
            print_error(
                f"step {self.step} did not end within {self._limit():g} s "
                f"(parallel.timeout_s): {cause}; stacks and collectives of the waiting ranks are "
                f"in {self.folder}; {AGAIN}"
            )
        with suppress(OSError):  # end this rank even on a full disk
            self._dump()
        os._exit(LOST)

    def _ask(self, answer: list[str | None]) -> None:
        """Append the cause to `answer`; on all ranks but the first to find it, append None."""
        with suppress(RuntimeError):
            store = self.store.clone()
            before = self._pulses(store)
            time.sleep(4 * PULSE)
            silent_ranks = [
                rank
                for rank, (old, new) in enumerate(zip(before, self._pulses(store), strict=True))
                if old == new
            ]
            doing = [
                store.get(f"watch/{rank}").decode().split(" ", 1) for rank in range(self.world)
            ]
            is_first = store.add("watch/said", 1) == 1
            answer.append(self._cause(silent_ranks, doing) if is_first else None)

    def _pulses(self, store: dist.Store) -> list[int]:
        return [store.add(f"watch/pulse/{rank}", 0) for rank in range(self.world)]

    def _cause(self, silent: list[int], doing: list[list[str]]) -> str:
        """Return the most likely cause: a dead process, a rank that is behind, or the network."""
        if silent:
            return f"{_ranks(silent)} not respond" + GONE
        ahead = max(doing, key=lambda work: (int(work[0]), work[1] == COMPUTES))
        behind = [rank for rank, work in enumerate(doing) if work != ahead]
        if behind:
            step, activity = doing[behind[0]]
            return f"rank {behind[0]} is behind, in {activity} of step {step}"
        return (
            "every rank is alive and in the same step; check the network and the GPUs "
            "(nvidia-smi, dmesg)"
        )

    def _dump(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"stacks_{self.rank}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        bindings = torch._C._distributed_c10d
        record = getattr(bindings, "_dump_nccl_trace", None) or getattr(
            bindings, "_dump_fr_trace", None
        )
        if record:
            (self.folder / f"collectives_{self.rank}").write_bytes(record())


def _ranks(numbers: list[int]) -> str:
    return (
        f"rank {numbers[0]} does"
        if len(numbers) == 1
        else f"ranks {', '.join(map(str, numbers))} do"
    )


def is_connection_lost(error: BaseException) -> bool:
    """Return True if `error` means that another rank has ended or cannot be reached."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in BROKEN)
    )


def exit_if_peer_lost(error: BaseException, rank: int) -> None:
    """Exit with status 75 and one sentence if `error` is only the loss of another rank."""
    if is_connection_lost(error):
        sys.stdout.flush()
        time.sleep(GRACE)  # torchrun may end this rank first
        print_error(
            f"rank {rank} lost its connection to another rank, which ended or whose machine "
            f"is down; look for its last output; {AGAIN}\n({str(error).splitlines()[0][:200]})"
        )
        os._exit(LOST)
