"""The log of a run: metrics, events, heartbeat, console, and optional W&B, TensorBoard and alerts.

metrics.jsonl has one object per step; plots and reports are derived from it. events.jsonl and
training_log.md have one line per event. heartbeat shows that the run is alive.
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
from training import trackers
from training.console import StepTimes, metrics_text
from training.ops.alerts import AlertConfig, Alerts

MARKDOWN = "training_log.md"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"  # with times of our own


@dataclass(frozen=True)
class LogConfig:
    """Destinations of metrics and events."""

    # Steps between console lines (without a terminal), and points in W&B and TensorBoard.
    every: PositiveInt = 10
    wandb_project: str | None = None  # Weights & Biases; WANDB_MODE=offline keeps metrics local
    wandb_run_name: str | None = None  # name of the W&B run; default: the run's
    tensorboard: bool = False  # write logs/<run>/tensorboard
    alerts: AlertConfig = field(default_factory=AlertConfig)

    def __post_init__(self) -> None:
        check_fields(self, "log")
        if self.wandb_run_name and not self.wandb_project:
            raise ValueError(
                "log.wandb_run_name needs a W&B project; set --wandb_project or log.wandb_project"
            )
        if self.alerts.wandb and not self.wandb_project:
            raise ValueError("log.alerts.wandb needs a W&B run; set log.wandb_project")


class Log:
    """The log of a run in `folder`. On ranks other than 0, methods do nothing.

    `with log:` closes it after training and records a "failed" event for an exception. W&B and
    TensorBoard (training/trackers.py) start in open(). run: the settings. secrets: environment
    variables that config.alerts names.

    After open(), a full disk or a removed or read-only folder does not end training: rows and
    events stay in memory, and each later write tries again.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        is_rank0: bool,
        run: dict[str, Any],
        secrets: Mapping[str, str] | None = None,
    ):
        self.folder, self.config, self.is_rank0, self.run = folder, config, is_rank0, run
        self.name, self.phase, self.step = run.get("run", folder.name), run.get("phase"), 0
        self.bar: tqdm | None = None
        self.file: JsonlFile | None = None
        self.waiting: list[tuple[str, str]] = []  # (file name, line) of unwritten events
        self.broken = False  # True if the last write to the folder failed
        self.times: StepTimes | None = None
        self.measured: dict[str, Any] = {}  # validation metrics before the first step
        self.status, self.beaten = "running", -math.inf
        if is_rank0:
            self.alerts = open_alerts(folder, config.alerts, secrets or {})
            self.trackers = trackers.Trackers(
                folder, config.wandb_project, config.tensorboard, self.say
            )

    def open(self, step: int, end: int, phase: str) -> None:
        """Begin or resume at `step`. Move metrics of later steps to metrics_redone.jsonl."""
        if not self.is_rank0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.phase, self.step, self.status = phase, step, "running"
        waiting = self._waiting_until(step)
        self._close_files()
        self._begin_at(step, waiting)
        self.trackers.open(step, phase, self.config.wandb_run_name, self.run)
        if self.config.alerts.wandb:
            self.alerts.channels["wandb"] = self.trackers.alert
        if self.measured:
            self.trackers.metrics(self.measured)
            self.trackers.samples(step)
            self.measured = {}
        if sys.stderr.isatty():
            self.bar = tqdm(total=end, initial=step, desc=phase, bar_format=BAR)
        self.times = self.times or StepTimes()
        self.beat(step, force=True)

    def _waiting_until(self, step: int) -> list[dict[str, Any]]:
        return [row for row in self.file.waiting if row["step"] <= step] if self.file else []

    def _begin_at(self, step: int, waiting: list[dict[str, Any]]) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [
                (row.get("step", math.inf) <= step, json.dumps(row) + "\n")
                for row in read_lines(path)
            ]
            if redone := "".join(line for is_earlier, line in lines if not is_earlier):
                with open(self.folder / "metrics_redone.jsonl", "a", encoding="utf-8") as file:
                    file.write(redone)
            write_text(path, "".join(line for is_earlier, line in lines if is_earlier))
        before, self.file = self.file, JsonlFile(path, waiting)
        if before:
            before.close()

    def say(self, text: str) -> None:
        """Print one line on the console."""
        if self.is_rank0:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def event(self, kind: str, text: str = "", **fields: Any) -> None:
        """Record an event in both event files, print it, and send an alert if configured.

        kind: begun, resumed, ended, paused, stopped (by a signal or a no-go), failed, skipped (an
        update), rollback, startup, measured (before the first step), starved (an expert) or
        set_aside. Other processes record with append_event: gate, forecast (of an average),
        no_average, extend, skipped_stage, restarted, gave_up, set_aside, stuck, recovered and
        alert_failed. fields: JSON values beside phase and step.
        """
        if not self.is_rank0:
            return
        if kind in ("ended", "paused", "stopped", "failed"):
            self.status = kind
        if self.file:
            self.beat(self.step)
        if kind == "measured":
            self.measured = {"step": self.step, **fields}
        fields = {"phase": self.phase, "step": self.step, **fields}
        title = f"{kind} at step {fields['step']}"
        self.waiting += _event_lines(kind, text, fields)
        try:
            self._keep(self._write_events)  # written first, since the console may be closed
        finally:  # on a full disk, still send the alert and print
            where = f"{self.folder.absolute()} on {socket.gethostname()}"
            if fields.get("outcome") == "no-go":
                self.alerts.sent.pop(kind, None)  # quiet_s must not hide it after a "go"
            self.alerts.send(kind, f"{self.name}: {title}", f"{text or _spell(fields)}\n{where}")
            self.say(text or f"{title}: {_spell(fields)}")

    def metrics(self, values: dict[str, Any], last: bool = False) -> None:
        """Record one step. `values` holds at least step, loss, lr, grad_norm and tokens_per_s."""
        if not self.is_rank0:
            return
        assert self.file and self.times
        self.file.waiting.append(_plain(values))
        self._keep(self._write_waiting)
        self.step = values["step"]
        self.beat(self.step)
        validated = any(name.startswith("val/") for name in values)
        due = last or self.step % self.config.every == 0 or validated
        if due:
            self.trackers.metrics(values)
        if validated:
            self.trackers.samples(self.step)
        if "step_s" in values:
            self.times.add(values["step_s"])
        if not (self.bar or due):
            return
        times = self.times.text(values["end"] - self.step)
        if self.bar:
            self.bar.set_postfix_str(f"{times}  {metrics_text(values)}", refresh=False)
            self.bar.update(1)
        else:
            where = f"step {self.step:>6}/{values['end']}  {values['phase']}"
            print(f"{where}  {metrics_text(values)}  {times}", flush=True)
        if "val/loss" in values:
            self.say(f"        {validation_text(values)}")

    def _write_waiting(self) -> None:
        """Write waiting rows and events; OSError if the folder is still not writable."""
        assert self.file
        if self.file.write():
            self.say(f"warning: {self.file.path} was removed during the run; it was written again")
        self._write_events()
        if self.broken:
            self.broken = False
            self.say(f"{self.folder} is writable again; nothing was lost")

    def _write_events(self) -> None:
        while self.waiting:
            name, line = self.waiting[0]
            _append(self.folder / name, line)
            del self.waiting[0]

    def _keep(self, work: Callable[[], None]) -> None:
        """Run `work` on the folder. During training, an OSError causes only one warning."""
        try:
            work()
        except OSError as error:
            if not self.file:
                raise
            if not self.broken:
                self.broken = True
                why = error.strerror or error
                self.say(
                    f"warning: {self.folder} is not writable ({why}); training continues and keeps "
                    "its log in memory"
                )

    def beat(self, step: int, force: bool = False) -> None:
        """Write the heartbeat file, which scripts/watch.py reads, at most once a second."""
        if not self.is_rank0 or (time.monotonic() - self.beaten < 1 and not force):
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
        """Close the files and wait for alerts. May be called twice, or without open()."""
        if not self.is_rank0:
            return
        if self.file:
            self.status = "ended" if self.status == "running" else self.status
            self.beat(self.step, force=True)
            self._keep(self._write_waiting)
            if lost := len(self.file.waiting) + len(self.waiting):
                first = self.file.waiting[0]["step"] if self.file.waiting else self.step
                self.say(
                    f"warning: {lost} rows and events from step {first} on are missing from "
                    f"{self.folder}, which is not writable"
                )
        self._close_files()
        self.alerts.flush()
        self.trackers.close(failed=self.status == "failed")

    def _close_files(self) -> None:
        if self.bar:
            self.bar.close()
        if self.file:
            self._keep(self.file.close)
        self.bar = self.file = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            if error and self.file:
                with suppress(OSError):  # even on a full disk, raise the error itself
                    text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                    self.event(
                        "failed", f"{self.name} {self.phase} failed after step {self.step}: {text}"
                    )
        finally:
            with suppress(*([OSError] if error else [])):
                self.close()


class JsonlFile:
    """A .jsonl file. Rows are kept until they can be written; a removed file is recreated."""

    def __init__(self, path: Path, waiting: list[dict[str, Any]]):
        self.path, self.waiting = path, waiting
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115

    def write(self) -> bool:
        """Append waiting rows; return True if the file was recreated. OSError if writing fails."""
        restored = self._restore()
        while self.waiting:
            end = self.file.seek(0, os.SEEK_END)
            try:
                _write_all(self.file, (json.dumps(self.waiting[0]) + "\n").encode())
            except OSError:
                self.file.truncate(end)  # leave no partial row
                raise
            del self.waiting[0]
        return restored

    def _restore(self) -> bool:
        """Reopen the path if its file was removed or replaced; return True if it was rewritten."""
        try:
            current = os.stat(self.path)
        except FileNotFoundError:
            current = None
        opened = os.fstat(self.file.fileno())
        if current and (current.st_dev, current.st_ino) == (opened.st_dev, opened.st_ino):
            return False
        self.file.seek(0)
        content = self.file.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        again = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            if not current:
                _write_all(again, content)
        except OSError:
            again.close()
            self.path.unlink(missing_ok=True)
            raise
        self.file.close()
        self.file = again
        return not current

    def close(self) -> None:
        try:
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def _write_all(file: Any, data: bytes) -> None:
    """Write all bytes to an unbuffered file, or raise OSError."""
    while data:
        data = data[file.write(data) :]


def log_in(config: LogConfig) -> None:
    """Log in to W&B if it is configured, asking for a key on a terminal. ValueError if it fails."""
    if config.wandb_project:
        trackers.log_in()


def open_alerts(folder: Path, config: AlertConfig, secrets: Mapping[str, str]) -> Alerts:
    """Return the alerts of a run. Failures become events. Prints the channels that are off."""

    def failed(channel: str, error: str) -> None:
        with suppress(OSError):  # runs in a thread
            append_event(folder, "alert_failed", f"{channel}: {error}", channel=channel)

    alerts = Alerts(config, secrets, failed)
    if alerts.off:
        print(
            "alerts: "
            + ", ".join(f"{name} off (set {wanting})" for name, wanting in alerts.off.items()),
            flush=True,
        )
    return alerts


def validation_text(values: dict[str, Any]) -> str:
    """Format the metrics of training.loop.validate as one line."""
    bits = {
        key.split("/")[1]: value for key, value in values.items() if key.endswith("/bits_per_byte")
    }
    details = ", ".join(
        f"{source} {value:.3f}" for source, value in bits.items() if source != "bits_per_byte"
    )
    details = f"bits per byte: {details}" if details else ""
    if "val/rewards/accuracies" in values:
        details = f"reward accuracy {values['val/rewards/accuracies']:.1%}"
    return ", ".join(
        text for text in (f"validation loss {values['val/loss']:.3f}", details) if text
    )


def append_event(folder: Path, kind: str, text: str = "", **fields: Any) -> None:
    """Append an event to events.jsonl and, as text, to training_log.md in `folder`.

    Each line is one synced write. First ends an unfinished line of a killed process.
    """
    for name, line in _event_lines(kind, text, fields):
        _append(folder / name, line)


def _event_lines(kind: str, text: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (file name, line) of an event for each file that records it."""
    time_now = now()
    line = {"time": time_now, "event": kind, **fields, **({"text": text} if text else {})}
    where = f" · step {fields['step']:,}" if isinstance(fields.get("step"), int) else ""
    details = " ".join((text or _spell(fields)).split())
    details = f": {details}" if details else ""
    plain = f"- {time_now[:19].replace('T', ' ')} UTC{where} · **{kind}**{details}"
    return [("events.jsonl", json.dumps(_plain(line), default=str)), (MARKDOWN, plain)]


def now() -> str:
    """Return the time in UTC, as ISO 8601."""
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
    """Replace NaN and Infinity by strings, since JSON has neither."""
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }


def _spell(fields: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in fields.items() if name != "step" and value is not None
    )
