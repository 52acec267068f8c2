"""What a run says: one JSON object a step in metrics.jsonl (the truth), a line or bar on the console, W&B if asked for."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between console lines (where the console is no terminal) and between W&B points
    wandb_project: str | None = None  # set to send metrics to Weights & Biases; WANDB_MODE=offline keeps them local
    wandb_run_name: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")


class Log:
    """The log of one run in `folder`; on ranks other than the main one every method does nothing."""

    def __init__(self, folder: Path, config: LogConfig, main: bool, run: dict[str, Any]):
        self.folder, self.config, self.main = folder, config, main
        self.bar: tqdm | None = None
        self.wandb: Any = None
        if main and config.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("log.wandb_project is set but wandb is not installed; run pip install wandb") from error
            name = config.wandb_run_name or run["run"]
            self.wandb = wandb.init(project=config.wandb_project, name=name, config=run, dir=str(folder.parent))

    def open(self, step: int, end: int, phase: str) -> None:
        """Begin or go on at `step`: what metrics.jsonl says of later steps came from a run that was cut short and goes."""
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except json.JSONDecodeError:
                    pass  # the last line of a run that was killed while writing it
            part = path.with_suffix(".tmp")
            part.write_text("".join(line + "\n" for line in kept))
            part.rename(path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        if sys.stderr.isatty():
            self.bar = tqdm(total=end, initial=step, desc=phase, unit="step")

    def say(self, text: str) -> None:
        """One line of plain English on the console."""
        if self.main:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def metrics(self, values: dict[str, Any], last: bool = False) -> None:
        """Record one step. `values` holds at least step, loss, lr, grad_norm and tokens_per_s."""
        if not self.main:
            return
        # JSON has no NaN or Infinity; as strings they survive any reader
        clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps(clean) + "\n")
        due = last or values["step"] % self.config.every == 0 or "val/loss" in values
        if self.wandb and due:
            self.wandb.log(clean, step=values["step"])
        short = f"loss {values['loss']:.3f}  lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  "
        short += f"{values['tokens_per_s']:,.0f} tok/s"
        if "mfu" in values:
            short += f"  mfu {values['mfu']:.1%}"
        if self.bar:
            self.bar.update(1)
            self.bar.set_postfix_str(short, refresh=False)
        elif due:
            print(f"step {values['step']:>6}/{values['end']}  {values['phase']}  {short}", flush=True)
        if "val/loss" in values:
            bits = {key.split("/")[1]: value for key, value in values.items() if key.endswith("/bits_per_byte")}
            parts = ", ".join(f"{source} {value:.3f}" for source, value in bits.items() if source != "bits_per_byte")
            self.say(f"        held-out loss {values['val/loss']:.3f}, bits per byte: {parts}")

    def close(self) -> None:
        if self.main:
            if self.bar:
                self.bar.close()
            os.fsync(self.file.fileno())
            self.file.close()
            if self.wandb:
                self.wandb.finish()
