"""What a run says: metrics.jsonl, one object a step (the truth); events.jsonl and training_log.md, a line for what happened;
heartbeat, that it lives; the console; W&B, TensorBoard and alerts if asked for.
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from files import read_lines, write_text
from ranges import PositiveInt, check_fields
from training.ops.alerts import AlertConfig, Alerts

MARKDOWN = "training_log.md"


@dataclass(frozen=True)
class LogConfig:
    # Steps between console lines (if the console is not a terminal) and between points of W&B and TensorBoard.
    every: PositiveInt = 10
    wandb_project: str | None = (
        None  # set to send metrics to Weights & Biases; WANDB_MODE=offline keeps them local
    )
    wandb_run_name: str | None = None
    tensorboard: bool = False  # write logs/<run>/tensorboard
    alerts: AlertConfig = field(default_factory=AlertConfig)

    def __post_init__(self) -> None:
        check_fields(self, "log")
        if self.wandb_run_name and not self.wandb_project:
            raise ValueError(
                "log.wandb_run_name needs a W&B project; give --wandb_project, or set log.wandb_project"
            )
        if self.alerts.wandb and not self.wandb_project:
            raise ValueError("log.alerts.wandb needs a W&B run; set log.wandb_project")


class Log:
    """The log of one run in `folder`; on ranks other than the main one every method does nothing.

    `with log:` around training closes it, and writes a "failed" event where an exception ends it. Nothing is sent to W&B or
    TensorBoard before open(). secrets: environment variables that config.alerts names.

    After open() a full disk, or a folder that is removed or read-only, does not end training: rows and events wait in
    memory, and each later write tries again.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        main: bool,
        run: dict[str, Any],
        secrets: Mapping[str, str] | None = None,
    ):
        self.folder, self.config, self.main, self.run = folder, config, main, run
        self.name, self.phase, self.step = run.get("run", folder.name), run.get("phase"), 0
        self.bar: tqdm | None = None
        self.file: Rows | None = None
        self.waiting: list[
            tuple[str, str]
        ] = []  # (file name, line) of events that are not written yet
        self.broken = False  # the last write to the folder failed
        self.wandb: Any = None
        self.board: Any = None
        self.status, self.beaten = "running", -math.inf
        if main:
            self.alerts = open_alerts(folder, config.alerts, secrets or {})
            self._import_sinks()

    def _import_sinks(self) -> None:
        """ValueError, before anything is done, where a sink that is asked for is not installed."""
        if self.config.wandb_project:
            try:
                import wandb  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "log.wandb_project is set but wandb is not installed; run pip install wandb"
                ) from error
        if self.config.tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                raise ValueError(
                    "log.tensorboard is set but tensorboard is not installed; run pip install tensorboard"
                ) from error

    def open(self, step: int, end: int, phase: str) -> None:
        """Begin or continue at `step`. Rows of metrics.jsonl for later steps move to metrics_redone.jsonl."""
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.phase, self.step, self.status = phase, step, "running"
        waiting = self._waiting_until(step)
        self._close_files()
        self._begin_at(step, waiting)
        if sys.stderr.isatty():
            self.bar = tqdm(total=end, initial=step, desc=phase, unit="step")
        if self.config.wandb_project and not self.wandb:
            self._open_wandb(self.config.wandb_project)
        self.beat(step, force=True)

    def rewind(self, step: int) -> None:
        """Go back to `step` after a roll-back: later steps will come again, and leave metrics.jsonl."""
        if not self.main:
            return
        self.step = step
        waiting = self._waiting_until(step)
        self._keep(lambda: self._begin_at(step, waiting))
        if self.bar:
            self.bar.update(step - self.bar.n)

    def _waiting_until(self, step: int) -> list[dict[str, Any]]:
        return [row for row in self.file.waiting if row["step"] <= step] if self.file else []

    def _begin_at(self, step: int, waiting: list[dict[str, Any]]) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [
                (row.get("step", math.inf) <= step, json.dumps(row) + "\n")
                for row in read_lines(path)
            ]
            if redone := "".join(line for kept, line in lines if not kept):
                with open(self.folder / "metrics_redone.jsonl", "a", encoding="utf-8") as file:
                    file.write(redone)
            write_text(path, "".join(line for kept, line in lines if kept))
        before, self.file = self.file, Rows(path, waiting)
        if before:
            before.close()
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if self.board:
                self.board.close()
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _open_wandb(self, project: str) -> None:
        import wandb

        try:
            self.wandb = wandb.init(
                project=project,
                name=self.config.wandb_run_name or self.name,
                group=self.name,  # each start of train.py is a W&B run of its own
                job_type=self.phase,
                config=self.run,
                dir=str(self.folder.parent),
            )
        except Exception as error:
            raise _unusable(error) from error
        self.wandb.define_metric("*", step_metric="step")  # W&B's own step could not go back
        with open(self.folder / "wandb_run_urls.txt", "a", encoding="utf-8") as file:
            file.write(
                f"{self.wandb.url or 'offline, to be sent by: wandb sync ' + str(Path(self.wandb.dir).parent)}\n"
            )
        if self.config.alerts.wandb:
            self.alerts.channels["wandb"] = lambda title, text: self.wandb.alert(
                title=title, text=text
            )

    def say(self, text: str) -> None:
        """One line of plain English on the console."""
        if self.main:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def event(self, kind: str, text: str = "", **fields: Any) -> None:
        """Something happened: a line in both event files, then on the console, and an alert if configured.

        kind, as used here: begun, resumed, ended, paused, stopped (by a signal or a no-go), failed, skipped (an update),
        rollback, startup, gate, extend, checkpoint, measured (before the first step), stuck, recovered, set_aside,
        alert_failed. fields: whatever JSON can hold; phase and step are known.
        """
        if not self.main:
            return
        if kind in ("ended", "paused", "stopped", "failed"):
            self.status = kind
        if self.file:
            self.beat(self.step)
        fields = {"phase": self.phase, "step": self.step, **fields}
        title = f"{kind} at step {fields['step']}"
        self.waiting += _event_lines(kind, text, fields)
        try:
            self._keep(self._write_events)  # before the console, which may be gone
        finally:  # a full disk must not silence the alert and the console
            where = f"{self.folder.absolute()} on {socket.gethostname()}"
            if fields.get("outcome") == "no-go":
                self.alerts.sent.pop(kind, None)  # an earlier "go" of its kind does not silence it
            self.alerts.send(kind, f"{self.name}: {title}", f"{text or _spell(fields)}\n{where}")
            self.say(text or f"{title}: {_spell(fields)}")

    def metrics(self, values: dict[str, Any], last: bool = False) -> None:
        """Record one step. `values` holds at least step, loss, lr, grad_norm and tokens_per_s."""
        if not self.main:
            return
        assert self.file
        self.file.waiting.append(_plain(values))
        self._keep(self._write_waiting)
        self.step = values["step"]
        self.beat(self.step)
        due = last or values["step"] % self.config.every == 0 or "val/loss" in values
        if due and self.wandb:
            self.wandb.log(values)
        if due and self.board:
            self._keep(lambda: self._draw(values))
        short = (
            f"loss {values['loss']:.3f}  lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  "
        )
        short += f"{values['tokens_per_s']:,.0f} tok/s"
        if values.get("data/wait_frac", 0) >= 0.01:
            short += f"  {values['data/wait_frac']:.0%} of it waiting for data"
        if "mfu" in values:
            short += f"  mfu {values['mfu']:.1%}"
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(short, refresh=False)
        elif due:
            print(
                f"step {values['step']:>6}/{values['end']}  {values['phase']}  {short}", flush=True
            )
        if "val/loss" in values:
            self.say(f"        {held_out_text(values)}")

    def _draw(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and name not in ("step", "end"):
                self.board.add_scalar(name, value, values["step"])

    def _write_waiting(self) -> None:
        """Write the rows and events that wait; OSError if the folder still takes none."""
        assert self.file
        if self.file.write():
            self.say(
                f"warning: {self.file.path} was removed while the run writes it; its rows were written again"
            )
        self._write_events()
        if self.broken:
            self.broken = False
            self.say(f"{self.folder} can be written again; nothing was lost")

    def _write_events(self) -> None:
        while self.waiting:
            name, line = self.waiting[0]
            _append(self.folder / name, line)
            del self.waiting[0]

    def _keep(self, work: Callable[[], None]) -> None:
        """Do work on the folder. In training a failure is a warning, once, since a log must not end a run."""
        try:
            work()
        except OSError as error:
            if not self.file:
                raise
            if not self.broken:
                self.broken = True
                why = error.strerror or error
                self.say(
                    f"warning: {self.folder} cannot be written ({why}); training goes on and keeps its log in memory"
                )

    def beat(self, step: int, force: bool = False) -> None:
        """Renew logs/<run>/heartbeat, at most once a second: what scripts/watch.py looks at."""
        if not self.main or (time.monotonic() - self.beaten < 1 and not force):
            return
        self.beaten = time.monotonic()
        who = {
            "phase": self.phase,
            "status": self.status,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        content = json.dumps({"time": now(), "step": step, **who}) + "\n"
        self._keep(lambda: write_text(self.folder / "heartbeat", content, sync=False))

    def close(self) -> None:
        """Close what open() opened and wait for alerts that are under way. Can be called again, or without open()."""
        if not self.main:
            return
        if self.file:
            self.status = "ended" if self.status == "running" else self.status
            self.beat(self.step, force=True)
            self._keep(self._write_waiting)
            if lost := len(self.file.waiting) + len(self.waiting):
                first = self.file.waiting[0]["step"] if self.file.waiting else self.step
                self.say(
                    f"warning: {lost} rows and events from step {first} on are not in {self.folder}, which takes no writes"
                )
        self._close_files()
        self.alerts.flush()
        if self.wandb:
            self.wandb.finish(exit_code=int(self.status == "failed"))
            self.wandb = None

    def _close_files(self) -> None:
        if self.bar:
            self.bar.close()
        if self.file:
            self._keep(self.file.close)
        if self.board:
            self._keep(self.board.close)
        self.bar = self.file = self.board = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            if error and self.file:
                with suppress(OSError):  # a full disk must not hide what went wrong
                    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                    self.event(
                        "failed", f"{self.name} {self.phase} failed after step {self.step}: {said}"
                    )
        finally:
            with suppress(*([OSError] if error else [])):
                self.close()


class Rows:
    """A file of JSON objects, one a line. Rows that cannot be written wait; a file that was removed is written again."""

    def __init__(self, path: Path, waiting: list[dict[str, Any]]):
        self.path, self.waiting = path, waiting
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115

    def write(self) -> bool:
        """Append what waits; True if the file had to be made anew. OSError if the disk does not take it."""
        restored = self._restore()
        while self.waiting:
            end = self.file.seek(0, os.SEEK_END)
            try:
                _write_all(self.file, (json.dumps(self.waiting[0]) + "\n").encode())
            except OSError:
                self.file.truncate(end)  # no half row
                raise
            del self.waiting[0]
        return restored

    def _restore(self) -> bool:
        """Write the whole file anew if no file, or another one, has its path."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            found = None
        own = os.fstat(self.file.fileno())
        if found and (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
            return False
        self.file.seek(0)
        content = self.file.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        again = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            if not found:
                _write_all(again, content)
        except OSError:
            again.close()
            self.path.unlink(missing_ok=True)
            raise
        self.file.close()
        self.file = again
        return not found

    def close(self) -> None:
        try:
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def _write_all(file: Any, data: bytes) -> None:
    """Write to an unbuffered file; OSError unless all of it was taken."""
    while data:
        data = data[file.write(data) :]


def log_in(config: LogConfig) -> None:
    """Make sure that W&B can be used, if it is asked for; asks for a key on a terminal. ValueError if it cannot."""
    if not config.wandb_project:
        return
    try:
        import wandb
    except ImportError:
        return  # Log has a sentence for that
    try:
        wandb.login()  # False without a check if WANDB_MODE is offline or disabled
    except Exception as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> ValueError:
    ways = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to send the run later"
    return ValueError(f"W&B cannot be used ({' '.join(str(error).split())[:300]}); {ways}")


def open_alerts(folder: Path, config: AlertConfig, secrets: Mapping[str, str]) -> Alerts:
    """Alerts of the run in `folder`; one that fails is an event there. Says in one line which channels are off."""

    def failed(channel: str, error: str) -> None:
        with suppress(OSError):  # in a thread, where nobody could do anything about it
            append_event(folder, "alert_failed", f"{channel}: {error}", channel=channel)

    alerts = Alerts(config, secrets, failed)
    if alerts.off:
        print(
            "alerts: "
            + ", ".join(f"{name} off (set {wanting})" for name, wanting in alerts.off.items()),
            flush=True,
        )
    return alerts


def held_out_text(values: dict[str, Any]) -> str:
    """What training.loop.validate measured, in a line."""
    bits = {
        key.split("/")[1]: value for key, value in values.items() if key.endswith("/bits_per_byte")
    }
    parts = ", ".join(
        f"{source} {value:.3f}" for source, value in bits.items() if source != "bits_per_byte"
    )
    parts = f"bits per byte: {parts}" if parts else ""
    if "val/rewards/accuracies" in values:
        parts = f"{values['val/rewards/accuracies']:.1%} of pairs the right way round"
    return ", ".join(part for part in (f"held-out loss {values['val/loss']:.3f}", parts) if part)


def append_event(folder: Path, kind: str, text: str = "", **fields: Any) -> None:
    """Append an event to folder/events.jsonl, and to folder/training_log.md in readable form. Nothing is ever rewritten.

    Each line is one write and is synced; half a line, left by a process that was killed in it, is ended before.
    """
    for name, line in _event_lines(kind, text, fields):
        _append(folder / name, line)


def _event_lines(kind: str, text: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """(file name, line) of an event that happens now, for each file that records it."""
    time_now = now()
    line = {"time": time_now, "event": kind, **fields, **({"text": text} if text else {})}
    where = f" · step {fields['step']:,}" if isinstance(fields.get("step"), int) else ""
    what = " ".join((text or _spell(fields)).split())
    plain = (
        f"- {time_now[:19].replace('T', ' ')} UTC{where} · **{kind}**{': ' + what if what else ''}"
    )
    return [("events.jsonl", json.dumps(_plain(line), default=str)), (MARKDOWN, plain)]


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == MARKDOWN and not path.exists():
        line = f"# Training log of {path.parent.absolute().name}\n\n{line}"
    with open(path, "a+b", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        _write_all(file, ("\n" * torn + line + "\n").encode(errors="backslashreplace"))
        os.fsync(file.fileno())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or Infinity; as strings they survive any reader."""
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def _spell(fields: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in fields.items() if name != "step" and value is not None
    )
