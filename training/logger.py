"""What a run says: metrics.jsonl, one object a step (the truth); events.jsonl and training_log.md, a line for what happened;
heartbeat, that it lives; the console; W&B, TensorBoard and alerts if asked for.
"""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from files import write_text
from training.alerts import AlertConfig, Alerts


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between console lines (where the console is no terminal) and between points of W&B and TensorBoard
    wandb_project: str | None = None  # set to send metrics to Weights & Biases; WANDB_MODE=offline keeps them local
    wandb_run_name: str | None = None
    tensorboard: bool = False  # write logs/<run>/tensorboard
    alerts: AlertConfig = field(default_factory=AlertConfig)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")
        if self.wandb_run_name and not self.wandb_project:
            raise ValueError("log.wandb_run_name needs a W&B project; give --wandb_project, or set log.wandb_project")
        if self.alerts.wandb and not self.wandb_project:
            raise ValueError("log.alerts.wandb needs a W&B run; set log.wandb_project")


class Log:
    """The log of one run in `folder`; on ranks other than the main one every method does nothing.

    `with log:` around training closes it, and writes a "failed" event where an exception ends it. Nothing is sent to W&B or
    TensorBoard before open(). secrets: environment variables that config.alerts names.
    """

    def __init__(
        self, folder: Path, config: LogConfig, main: bool, run: dict[str, Any], secrets: Mapping[str, str] | None = None
    ):
        self.folder, self.config, self.main, self.run = folder, config, main, run
        self.name, self.phase, self.step = run.get("run", folder.name), run.get("phase"), 0
        self.bar: tqdm | None = None
        self.file: Any = None
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
                raise ValueError("log.wandb_project is set but wandb is not installed; run pip install wandb") from error
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
        self._close_files()
        self._begin_at(step)
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
        self.file.close()
        self._begin_at(step)
        if self.bar:
            self.bar.update(step - self.bar.n)

    def _begin_at(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [(row.get("step", math.inf) <= step, json.dumps(row) + "\n") for row in read_lines(path)]
            if redone := "".join(line for kept, line in lines if not kept):
                with open(self.folder / "metrics_redone.jsonl", "a", encoding="utf-8") as file:
                    file.write(redone)
            write_text(path, "".join(line for kept, line in lines if kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if self.board:
                self.board.close()
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def _open_wandb(self, project: str) -> None:
        import wandb

        self.wandb = wandb.init(
            project=project,
            name=self.config.wandb_run_name or self.name,
            group=self.name,  # each start of train.py is a W&B run of its own
            job_type=self.phase,
            config=self.run,
            dir=str(self.folder.parent),
        )
        self.wandb.define_metric("*", step_metric="step")  # W&B's own step could not go back
        with open(self.folder / "wandb_run_urls.txt", "a") as file:
            file.write(f"{self.wandb.url or 'offline, to be sent by: wandb sync ' + str(Path(self.wandb.dir).parent)}\n")
        if self.config.alerts.wandb:
            self.alerts.channels["wandb"] = lambda title, text: self.wandb.alert(title=title, text=text)

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
        try:
            append_event(self.folder, kind, text, **fields)  # before the console, which may be gone
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
        self.file.write(json.dumps(_plain(values)) + "\n")
        self.step = values["step"]
        self.beat(self.step)
        due = last or values["step"] % self.config.every == 0 or "val/loss" in values
        if due and self.wandb:
            self.wandb.log(values)
        if due and self.board:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("step", "end"):
                    self.board.add_scalar(name, value, values["step"])
        short = f"loss {values['loss']:.3f}  lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  "
        short += f"{values['tokens_per_s']:,.0f} tok/s"
        if values.get("data/wait_frac", 0) >= 0.01:
            short += f"  {values['data/wait_frac']:.0%} of it waiting for data"
        if "mfu" in values:
            short += f"  mfu {values['mfu']:.1%}"
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(short, refresh=False)
        elif due:
            print(f"step {values['step']:>6}/{values['end']}  {values['phase']}  {short}", flush=True)
        if "val/loss" in values:
            self.say(f"        {held_out_text(values)}")

    def beat(self, step: int, force: bool = False) -> None:
        """Renew logs/<run>/heartbeat, at most once a second: what scripts/watch.py looks at."""
        if not self.main or (time.monotonic() - self.beaten < 1 and not force):
            return
        self.beaten = time.monotonic()
        who = {"phase": self.phase, "status": self.status, "pid": os.getpid(), "host": socket.gethostname()}
        write_text(self.folder / "heartbeat", json.dumps({"time": now(), "step": step, **who}) + "\n", sync=False)

    def close(self) -> None:
        """Close what open() opened and wait for alerts that are under way. Can be called again, or without open()."""
        if not self.main:
            return
        if self.file:
            self.status = "ended" if self.status == "running" else self.status
            self.beat(self.step, force=True)
        self._close_files()
        self.alerts.flush()
        if self.wandb:
            self.wandb.finish(exit_code=int(self.status == "failed"))
            self.wandb = None

    def _close_files(self) -> None:
        if self.bar:
            self.bar.close()
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
        if self.board:
            self.board.close()
        self.bar = self.file = self.board = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error and self.file:
                with suppress(OSError):  # a full disk must not hide what went wrong
                    said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                    self.event("failed", f"{self.name} {self.phase} failed after step {self.step}: {said}")
        finally:
            with suppress(*([OSError] if error else [])):
                self.close()


def open_alerts(folder: Path, config: AlertConfig, secrets: Mapping[str, str]) -> Alerts:
    """Alerts of the run in `folder`; one that fails is an event there. Says in one line which channels are off."""

    def failed(channel: str, error: str) -> None:
        with suppress(OSError):  # in a thread, where nobody could do anything about it
            append_event(folder, "alert_failed", f"{channel}: {error}", channel=channel)

    alerts = Alerts(config, secrets, failed)
    if alerts.off:
        print("alerts: " + ", ".join(f"{name} off (set {wanting})" for name, wanting in alerts.off.items()), flush=True)
    return alerts


def held_out_text(values: dict[str, Any]) -> str:
    """What training.loop.validate measured, in a line."""
    bits = {key.split("/")[1]: value for key, value in values.items() if key.endswith("/bits_per_byte")}
    parts = ", ".join(f"{source} {value:.3f}" for source, value in bits.items() if source != "bits_per_byte")
    parts = f"bits per byte: {parts}" if parts else ""
    if "val/rewards/accuracies" in values:
        parts = f"{values['val/rewards/accuracies']:.1%} of pairs the right way round"
    return ", ".join(part for part in (f"held-out loss {values['val/loss']:.3f}", parts) if part)


def append_event(folder: Path, kind: str, text: str = "", **fields: Any) -> None:
    """Append an event to folder/events.jsonl, and to folder/training_log.md in readable form. Nothing is ever rewritten.

    Each line is one write and is synced; half a line, left by a process that was killed in it, is ended before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    time_now = now()
    line = {"time": time_now, "event": kind, **fields, **({"text": text} if text else {})}
    _append(folder / "events.jsonl", json.dumps(_plain(line), default=str))
    log = folder / "training_log.md"
    if not log.exists():
        _append(log, f"# Training log of {folder.absolute().name}\n")
    where = f" · step {fields['step']:,}" if isinstance(fields.get("step"), int) else ""
    what = " ".join((text or _spell(fields)).split())
    _append(log, f"- {time_now[:19].replace('T', ' ')} UTC{where} · **{kind}**{': ' + what if what else ''}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without lines that a killed process left unfinished; [] where there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _append(path: Path, line: str) -> None:
    with open(path, "a+b", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(("\n" * torn + line + "\n").encode())
        os.fsync(file.fileno())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or Infinity; as strings they survive any reader."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _spell(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items() if name != "step" and value is not None)
