"""Run train.py with an injected fault and record its training rows; a rank of benchmarks/faults.py.

The environment variable FAULT holds a Fault as JSON. Without it, this is train.py. With "record",
each update adds a line to <record>.rank<r>.jsonl: the optimizer's update count (saved with the
weights), the batch index, and a hash of each row of tokens behind its gradients.
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
    """An action of `rank` at point `at` with number `of`, after `delay` seconds.

    at: start (before imports; of=0), build (the model is built; of=0), batch (of: batch index),
    step (of: update), end (training is done). In the save of step `of`: save (the thread starts),
    state (only checksums and manifest are missing; ranks 0 and 1), publish (before the manifest),
    rename (before the folder's rename), saved (after it).
    """

    at: str
    of: int
    rank: int
    delay: float
    do: str  # kill, kill_all (the launcher too), terminate, hide (rename `path` to `path`.hidden)
    path: str


class Fault(TypedDict, total=False):
    record: str  # path of the record, without suffix
    actions: list[Action]
    nan: dict[str, Any]  # rank, batch_index, what (gradient, loss): multiplied by NaN
    excluded_batches: list[int]  # batch indices to exclude
    full: dict[str, Any]  # rank, step, what (state, weights): ENOSPC in the save of that step
    clocks: list[float]  # clock offset of each rank, seconds
    jump: dict[str, float]  # at (update), by (seconds): all clocks jump at that update


class Rank:
    """This rank's fault, and its training rows since the last update."""

    def __init__(self, fault: Fault, rank: int, world: int):
        self.fault, self.rank, self.world = fault, rank, world
        self.record = Path(fault["record"]) if "record" in fault else None
        self.rows: list[str] = []
        self.batch_index = self.saving = 0
        if self.record:
            self._file(f"rank{rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
            if self._file("killed").exists():  # kill_all came before this process registered
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
            processes = {
                int(path.read_text(encoding="utf-8") or 0) for path in folder.glob(f"{name}*.pid")
            } - {0, os.getpid()}
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if action["do"].startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)

    def record_batch(self, batch: Any) -> None:
        """Record the rows of a batch before its backward pass."""
        self.rows += row_hashes(batch)

    def record_update(self, optimizer: Any) -> None:
        """Write the rows of an update to the record."""
        if not self.rows:  # torch initializes optimizer state with a step without gradients
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
    """Return a hash of each row of a batch: its tokens, targets and document ids."""
    rows = zip(batch.tokens.numpy(), batch.targets.numpy(), batch.doc_ids.numpy(), strict=True)
    return [sha256(b"".join(array.tobytes() for array in row)).hexdigest()[:16] for row in rows]


def watch(rank: Rank) -> None:
    """Patch train.py to record rows and inject the rank's fault."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import train
    from training import checkpoint, phase, setup
    from training.faults import FaultState

    register_optimizer_step_post_hook(lambda optimizer, *_: rank.record_update(optimizer))
    plain, build, run, nan = train.next_token, setup.build, phase.train, rank.fault.get("nan", {})

    def next_token(z_weight: float) -> Any:
        objective = plain(z_weight)

        def watched(model: Any, batch: Any) -> Any:
            loss, sums = objective(model, batch)
            if model.training:
                rank.record_batch(batch)
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
    if excluded_batches := rank.fault.get("excluded_batches"):
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
        if path.suffix == ".tmp":  # the folder, complete except for its rename
            rank.reach("rename", rank.saving)

    checkpointer._write, checkpointer._publish, checkpoint._checksums, checkpoint._sync = (
        written,
        published,
        summed,
        synced,
    )
    if full := rank.fault.get("full"):
        inject_enospc(rank, checkpoint, full)


def inject_enospc(rank: Rank, checkpoint: Any, full: dict[str, Any]) -> None:
    """Raise ENOSPC in one write of one save on one rank."""
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


def shift_clock(rank: Rank) -> None:
    """Shift this process's time of day."""
    real_time, offset, jump = time.time, rank.fault["clocks"][rank.rank], rank.fault.get("jump", {})
    shift = [offset]
    time.time = lambda: real_time() + shift[0]
    time.time_ns = lambda: int(time.time() * 1e9)

    from datetime import datetime, timedelta

    from training import logger

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=shift[0])

    logger.datetime = Skewed  # type: ignore[misc]
    record_update = rank.record_update

    def jump_after_update(optimizer: Any) -> None:
        record_update(optimizer)
        if jump and int(next(iter(optimizer.state.values()))["step"]) >= jump["at"]:
            shift[0] = offset + jump["by"]

    rank.record_update = jump_after_update  # type: ignore[method-assign]


def main() -> None:
    rank = Rank(
        json.loads(os.environ.get("FAULT", "{}")),
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    rank.reach("start")
    if "clocks" in rank.fault:
        shift_clock(rank)
    watch(rank)
    import train

    train.main()


if __name__ == "__main__":
    main()
