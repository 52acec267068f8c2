"""train.py with a fault in it and a record of what it trains on: what benchmarks/faults.py launches as a rank.

The environment variable FAULT holds, as JSON, where to record and what goes wrong; see Fault. Without it, and without
"record", this is train.py. Every update adds a line to <record>.rank<r>.jsonl: the update's number as the optimizer counts it
(which is saved and loaded with the weights), the place, and a hash of each row of tokens that its gradients came from.
"""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict


class Action(TypedDict, total=False):
    """What to do once `rank` reaches `at` of number `of`, and `delay` seconds later.

    at: start (nothing is imported yet, of 0), build (the model is there, of 0), batch (of a place), step (of an update), and
    of the step that a save writes: save (its thread begins), state (all but checksums and manifest is written; rank 0 and 1),
    publish (before the manifest), rename (after it, before the folder gets its name), saved (after); end (training is done).
    """

    at: str
    of: int
    rank: int
    delay: float
    do: str  # kill, kill_all (the launcher too), terminate, hide (rename `path` to `path`.hidden)
    path: str


class Fault(TypedDict, total=False):
    record: str  # path of what is recorded, without its ending
    actions: list[Action]
    nan: dict[str, Any]  # rank, place, what (gradient, loss): multiplied by NaN there
    leave_out: list[int]  # places that are not read: the run without a bad step
    full: dict[
        str, Any
    ]  # rank, step, what (state, weights): no space left for that in the save of that step
    clocks: list[float]  # seconds that each rank's clock is off
    jump: dict[str, float]  # at (update), by (seconds): from there on all clocks are off by more


class Rank:
    """This process: what it is to do, and has trained on since the last update."""

    def __init__(self, fault: Fault, rank: int, world: int):
        self.fault, self.rank, self.world = fault, rank, world
        self.record = Path(fault["record"]) if "record" in fault else None
        self.rows: list[str] = []
        self.batch_index = self.saving = 0
        if self.record:
            self._file(f"rank{rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
            if self._file("killed").exists():  # all were killed before this one was heard of
                os._exit(137)

    def _file(self, ending: str) -> Path:
        assert self.record
        return self.record.with_name(f"{self.record.name}.{ending}")

    def reach(self, point: str, number: int = 0) -> None:
        for action in self.fault.get("actions", []):
            if (action["at"], action.get("of", 0), action.get("rank", 0)) == (
                point,
                number,
                self.rank,
            ):
                if delay := action.get("delay", 0.0):
                    timer = threading.Timer(delay, self.act, [action])
                    timer.daemon = True
                    timer.start()
                else:
                    self.act(action)

    def act(self, action: Action) -> None:
        if action["do"] == "hide":
            os.rename(action["path"], action["path"] + ".hidden")
        elif action["do"] == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif action["do"] == "kill_all":
            self._file("killed").touch()
            folder, name = self._file("pid").parent, self._file("").name
            found = {
                int(path.read_text(encoding="utf-8") or 0) for path in folder.glob(f"{name}*.pid")
            } - {0, os.getpid()}
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if action["do"].startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)

    def fed(self, batch: Any) -> None:
        """This rank computes gradients from a batch."""
        self.rows += row_hashes(batch)

    def updated(self, optimizer: Any) -> None:
        """The optimizer changed the weights."""
        if not self.rows:  # torch makes the state of a new optimizer by an update without gradients
            return
        number = int(next(iter(optimizer.state.values()))["step"])
        line = {
            "update": number,
            "rank": self.rank,
            "world": self.world,
            "batch_index": self.batch_index,
            "rows": self.rows,
        }
        if self.record:
            with open(self._file(f"rank{self.rank}.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.rows = []
        self.reach("step", number)


def row_hashes(batch: Any) -> list[str]:
    """A hash of each row of a batch: its tokens, targets and document ids."""
    rows = zip(batch.tokens.numpy(), batch.targets.numpy(), batch.doc_ids.numpy(), strict=True)
    return [sha256(b"".join(part.tobytes() for part in row)).hexdigest()[:16] for row in rows]


def watch(rank: Rank) -> None:
    """Let rank see what training does, and do to it what is to go wrong."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import train
    from training import checkpoint, phase, setup
    from training.guard import FaultState

    register_optimizer_step_post_hook(lambda optimizer, *_: rank.updated(optimizer))
    plain, build, run, nan = train.next_token, setup.build, phase.train, rank.fault.get("nan", {})

    def next_token(z_weight: float) -> Any:
        objective = plain(z_weight)

        def watched(model: Any, batch: Any) -> Any:
            loss, sums = objective(model, batch)
            if model.training:
                rank.fed(batch)
                if nan and (rank.rank, rank.batch_index) == (nan["rank"], nan["batch_index"]):
                    loss = loss * float("nan")
                    sums = (
                        {name: value * float("nan") for name, value in sums.items()}
                        if nan["what"] == "loss"
                        else sums
                    )
            return loss, sums

        return watched

    class Watched(train.Prefetcher):
        def at(self, batch_index: int) -> Any:
            step = super().at(batch_index)
            rank.batch_index, rank.rows = batch_index, []
            rank.reach("batch", batch_index)
            return step

    def built(*arguments: Any, **named: Any) -> Any:
        state = build(*arguments, **named)
        rank.reach("build")
        return state

    def trained(*arguments: Any, **named: Any) -> Any:
        finished = run(*arguments, **named)
        rank.reach("end")
        return finished

    train.next_token, train.Prefetcher, setup.build, phase.train = (
        next_token,
        Watched,
        built,
        trained,
    )  # type: ignore[misc]
    if excluded_batches := rank.fault.get("leave_out"):
        FaultState.next_batch_index = lambda self, batch_index: next(
            p for p in range(batch_index, 1 << 30) if p not in excluded_batches
        )  # type: ignore
    watch_saves(rank, checkpoint)


def watch_saves(rank: Rank, checkpoint: Any) -> None:
    checkpointer = checkpoint.Checkpointer
    write, publish, checksums, sync = (
        checkpointer._write,
        checkpointer._publish,
        checkpoint._checksums,
        checkpoint._sync,
    )

    def written(self: Any, snapshot: Any, group: Any) -> None:
        rank.saving = snapshot.position["step"]
        rank.reach("save", rank.saving)
        write(self, snapshot, group)
        rank.reach("saved", rank.saving)

    def summed(*arguments: Any) -> Any:
        rank.reach("state", rank.saving)
        return checksums(*arguments)

    def published(*arguments: Any) -> None:
        rank.reach("publish", rank.saving)
        publish(*arguments)

    def synced(path: Path) -> None:
        sync(path)
        if path.suffix == ".tmp":  # the whole folder: what is left is its name
            rank.reach("rename", rank.saving)

    checkpointer._write, checkpointer._publish, checkpoint._checksums, checkpoint._sync = (
        written,
        published,
        summed,
        synced,
    )
    if full := rank.fault.get("full"):
        fill_the_disk(rank, checkpoint, full)


def fill_the_disk(rank: Rank, checkpoint: Any, full: dict[str, Any]) -> None:
    """No space left for one part of one save on one rank, as the file system would say it."""
    from errno import ENOSPC

    from torch.distributed.checkpoint import filesystem

    owner, name = (
        (checkpoint, "save_hf") if full["what"] == "weights" else (filesystem, "_write_item")
    )
    plain = getattr(owner, name)

    def write(*arguments: Any, **named: Any) -> Any:
        if (rank.rank, rank.saving) == (full["rank"], full["step"]):
            raise OSError(ENOSPC, "No space left on device")
        return plain(*arguments, **named)

    setattr(owner, name, write)


def turn_the_clock(rank: Rank) -> None:
    """Shift what this process takes for the time of day."""
    true, off, jump = time.time, rank.fault["clocks"][rank.rank], rank.fault.get("jump", {})
    moved = [off]
    time.time = lambda: true() + moved[0]
    time.time_ns = lambda: int(time.time() * 1e9)

    from datetime import datetime, timedelta

    from training import logger

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=moved[0])

    logger.datetime = Skewed  # type: ignore[misc]
    updated = rank.updated

    def jumped(optimizer: Any) -> None:
        updated(optimizer)
        if jump and int(next(iter(optimizer.state.values()))["step"]) >= jump["at"]:
            moved[0] = off + jump["by"]

    rank.updated = jumped  # type: ignore[method-assign]


def main() -> None:
    rank = Rank(
        json.loads(os.environ.get("FAULT", "{}")),
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    rank.reach("start")
    if "clocks" in rank.fault:
        turn_the_clock(rank)
    watch(rank)
    import train

    train.main()


if __name__ == "__main__":
    main()
