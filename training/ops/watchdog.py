"""Ranks that wait for each other for good: noticed within a step's time limit, named, and ended, so that a restart can go on.

torch's own limit must outlast the slowest save; this one is for the steps alone, and says which rank the others wait for.
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

READS, COMPUTES = "reading the data", "the computation"  # what a step is made of, in this order
COMPILING = 1800  # seconds that the first step may take longer
PULSE = 1.0  # seconds
GONE = ": its process is stopped, or its machine is gone or swapping"
LOST = 75  # exit status: EX_TEMPFAIL of sysexits.h, "try again"
AGAIN = "the same command goes on from the newest checkpoint"
BROKEN = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "Timed out",
)


class Watch:
    """Ends this process with status 75 where a step takes longer than `seconds`, the first half an hour more. Off with one rank.

    begin(step, what) is told what this rank does, rest() that it does nothing that is timed: validation and saving are not.
    A thread keeps a pulse in the process group's store, which tells a rank that is stuck from one that is gone. `folder`
    gets the stack of every thread, and the last collectives as Flight Recorder pickles them, of each rank that still runs.
    """

    def __init__(self, seconds: float, folder: Path):
        self.seconds, self.folder = seconds, folder
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.first = self.step = 0
        self.since: float | None = None
        self.done = threading.Event()

    def __enter__(self) -> "Watch":
        if self.world > 1:
            self.store: Any = dist.distributed_c10d._get_default_store()
            self.threads = [
                threading.Thread(target=work, daemon=True) for work in (self._pulse, self._time)
            ]
            for thread in self.threads:
                thread.start()
        return self

    def begin(self, step: int, what: str) -> None:
        """This rank begins to do `what` of a step, from 1."""
        if self.world == 1:
            return
        if step != self.step:
            self.first, self.step, self.since = self.first or step, step, time.monotonic()
            faulthandler.dump_traceback_later(
                self._limit() + 60, exit=True
            )  # needs no GIL, should the threads not get it
        self.store.set(f"watch/{self.rank}", f"{step} {what}")

    def rest(self) -> None:
        """What comes now may take its time."""
        self.since = None
        if self.world > 1:
            faulthandler.cancel_dump_traceback_later()

    def _limit(self) -> float:
        return self.seconds + (COMPILING if self.step == self.first else 0)

    def __exit__(self, *_: object) -> None:
        self.rest()
        self.done.set()
        if self.world > 1:
            self.threads[1].join()  # the other may wait for a store that is gone

    def _pulse(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and this rank's connections with it
            store = self.store.clone()  # the connection of the main thread may be in use
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
            else "rank 0 does not respond, which keeps what the ranks know of each other" + GONE
        )
        if cause:
            print(
                f"error: step {self.step} did not end within {self._limit():g} s (parallel.timeout_s): {cause}; stacks and "
                f"collectives of the waiting ranks are in {self.folder}; {AGAIN}",
                file=sys.stderr,
                flush=True,
            )
        with suppress(OSError):  # a full disk must not keep this rank alive
            self._dump()
        os._exit(LOST)

    def _ask(self, answer: list[str | None]) -> None:
        """Puts the cause into answer; None on all ranks but the first to find it."""
        with suppress(RuntimeError):
            store = self.store.clone()
            before = self._pulses(store)
            time.sleep(4 * PULSE)
            silent = [
                rank
                for rank, (old, new) in enumerate(zip(before, self._pulses(store), strict=True))
                if old == new
            ]
            doing = [
                store.get(f"watch/{rank}").decode().split(" ", 1) for rank in range(self.world)
            ]
            answer.append(self._cause(silent, doing) if store.add("watch/said", 1) == 1 else None)

    def _pulses(self, store: dist.Store) -> list[int]:
        return [store.add(f"watch/pulse/{rank}", 0) for rank in range(self.world)]

    def _cause(self, silent: list[int], doing: list[list[str]]) -> str:
        """The likeliest: a process that does not run, else one that is behind, else what is between them."""
        if silent:
            return f"{_ranks(silent)} not respond" + GONE
        ahead = max(doing, key=lambda at: (int(at[0]), at[1] == COMPUTES))
        behind = [rank for rank, at in enumerate(doing) if at != ahead]
        if behind:
            step, what = doing[behind[0]]
            return f"rank {behind[0]} is behind, the last it did was {what} of step {step}"
        return "every rank is alive and in the same step, so look at the network, or for a GPU that failed (nvidia-smi, dmesg)"

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


def leave_if_lost(error: BaseException, rank: int) -> None:
    """Where an error only says that another rank has ended: end with status 75 and one sentence, unless torchrun is faster."""
    said = str(error)
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in said for text in BROKEN)
    ):
        sys.stdout.flush()
        time.sleep(5)  # torchrun ends this rank at once where it knows of the other's end
        print(
            f"error: rank {rank} lost its connection to another rank, which has ended, or whose machine is gone; look for what "
            f"it said last; {AGAIN}\n({said.splitlines()[0][:200]})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)
