"""A run's config: what train.py reads, one frozen dataclass a section. How YAML becomes that: settings.py."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.nanollama import ModelConfig
from training.checkpoint import CheckpointConfig
from training.fsdp_utils import ParallelConfig
from training.guard import FaultConfig
from training.logger import LogConfig
from training.optimizers import OptimConfig
from training.schedulers import ScheduleConfig
from training.settings import load_settings
from training.startup import StartupConfig

PHASES_DIFFER = ("max_position_embeddings", "rope_theta", "initializer_range")  # of the model; all else one run keeps


@dataclass(frozen=True)
class DataConfig:
    store: str = "data/store/nanollama"  # folder with tokenizer/ and tokens/<source>/
    mix: dict[str, float] = field(default_factory=dict)  # source -> weight, by tokens
    sequence_length: int = 4096
    tokens_per_step: int = 131_072  # over all ranks and micro-batches
    micro_batch_size: int = 16  # rows a rank holds at once
    packing: str = "stream"  # or best_fit: pad rows a little so that only documents longer than a row are cut
    min_document_tokens: dict[str, int] = field(default_factory=dict)  # source -> read only documents at least this long
    accept_changed: bool = False  # resume in the middle of a phase although data, mixture or batch have changed

    def __post_init__(self) -> None:
        if min(self.sequence_length, self.micro_batch_size) < 1:
            raise ValueError("data.sequence_length and data.micro_batch_size must be at least 1")
        if self.tokens_per_step < 1 or self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"data.tokens_per_step={self.tokens_per_step} must be a multiple of data.sequence_length={self.sequence_length}"
            )
        if self.packing not in ("stream", "best_fit"):
            raise ValueError(f"data.packing={self.packing!r} must be stream or best_fit")
        for name, tokens in self.min_document_tokens.items():
            if name not in self.mix:
                raise ValueError(
                    f"data.min_document_tokens.{name}: data.mix reads {', '.join(self.mix) or 'nothing'}, not {name}"
                )
            if tokens < 1:
                raise ValueError(f"data.min_document_tokens.{name}={tokens} must be at least 1")

    @property
    def rows(self) -> int:
        """Rows in one step over all ranks."""
        return self.tokens_per_step // self.sequence_length


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 1000  # steps; the end of a phase is measured always; 0 turns validation off
    before: bool = False  # measure before the first step, too
    rows: int = 64  # held-out rows a source
    batch_size: int | None = None  # rows a rank holds at once; default: data.micro_batch_size

    def __post_init__(self) -> None:
        if self.every < 0 or self.rows < 1 or (self.batch_size or 1) < 1:
            raise ValueError("validation.every must not be negative; validation.rows and .batch_size must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One phase of one run, as `train.py --config` reads it."""

    run: str = "nanollama"
    phase: str = "phase1_pretrain"
    steps: int = 184_000  # updates in this phase
    start_step: int | None = None  # step of the whole run at which this phase must begin
    until: int | None = None  # step of the whole run to pause at, saved, before the phase ends
    rope_theta_end: float | None = None  # theta rises evenly in its logarithm from model.rope_theta to this over the phase
    seed: int = 1337
    output_dir: str | None = None  # default: checkpoints/<run>/<phase>
    log_dir: str | None = None  # default: logs/<run>
    resume_from: str | None = None  # an earlier phase by name, its folder, or a step folder: continues its state
    init_from: str | None = None  # a Hugging Face folder whose weights start a new run
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    startup: StartupConfig = field(default_factory=StartupConfig)

    def __post_init__(self) -> None:
        if self.rope_theta_end is not None and self.rope_theta_end <= 0:
            raise ValueError(f"rope_theta_end={self.rope_theta_end} must be above 0")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.start_step is not None and self.start_step < 0:
            raise ValueError(f"start_step={self.start_step} must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**63")
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds the model's context, "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; shorten one or raise the other"
            )
        reach, back = (self.checkpoint.keep - 1) * self.checkpoint.every, self.faults.rollback_steps
        if reach < back < self.steps:
            raise ValueError(
                f"faults.rollback_steps={back} needs older checkpoints than the {self.checkpoint.keep} that are kept, one "
                f"every {self.checkpoint.every} steps; set checkpoint.keep={-(-back // self.checkpoint.every) + 1}"
            )
        for name in ("run", "phase"):
            if Path(getattr(self, name)).name in ("", "..") or Path(getattr(self, name)).name != getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a plain folder name")

    @property
    def earlier(self) -> Path | None:
        """Where resume_from points: a phase by name lies beside this phase's folder, or in checkpoints/<run>."""
        if self.resume_from is None:
            return None
        path = Path(self.resume_from)
        if len(path.parts) > 1 or path.is_dir():
            return path
        beside = self.checkpoints.parent / path
        return beside if beside.is_dir() else Path("checkpoints") / self.run / path

    @property
    def checkpoints(self) -> Path:
        return Path(self.output_dir or f"checkpoints/{self.run}/{self.phase}")

    @property
    def logs(self) -> Path:
        return Path(self.log_dir or f"logs/{self.run}")


def load(path: str | Path, overrides: list[str] | None = None, flags: dict[str, Any] | None = None) -> RunConfig:
    """Read the run of a YAML file, with overrides and flags as load_settings takes them."""
    return load_settings(RunConfig, path, overrides, flags)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The whole resolved config, as plain values that read back to the same run."""
    return dataclasses.asdict(run)
