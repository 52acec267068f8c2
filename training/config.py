"""The config of a run: one frozen dataclass per section. settings.py reads it from YAML."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from models.kinds import AnyConfig
from models.moe import MoEConfig
from models.nanollama import ModelConfig
from models.rope import RopeScaling
from ranges import (
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    at_least,
    check_fields,
)
from training.checkpoint import CheckpointConfig
from training.continued import is_scaling_of, settings_from_base
from training.curves import Curve, check_curves
from training.faults import FaultConfig
from training.fsdp_utils import ParallelConfig
from training.logger import LogConfig
from training.optimizers import OptimConfig
from training.schedulers import ScheduleConfig
from training.settings import (
    NoEffect,
    apply_overrides,
    load_settings,
    read_yaml,
    without_no_effect,
)
from training.startup import StartupConfig

# Fields of ModelConfig in which phases may differ; setup.py checks the rotary settings.
PHASES_DIFFER = ("max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range")


def scaling_of(model: AnyConfig) -> RopeScaling | None:
    """Return model.rope_scaling; None for a model that has no such setting."""
    return model.rope_scaling if isinstance(model, ModelConfig) else None


def fixed(model: AnyConfig, name: str) -> object:
    """Return a model setting without the fields in which phases may differ."""
    value = getattr(model, name)
    return value.fixed if isinstance(value, MoEConfig) else value


@dataclass(frozen=True)
class DataConfig:
    """Sources, mixture and batches."""

    store: NonEmptyText = "data/store/nanollama"  # folder with tokenizer/ and tokens/<source>/
    mix: dict[str, PositiveFloat] = field(default_factory=dict)  # source -> weight of its tokens
    sequence_length: PositiveInt = 4096  # tokens of a row
    tokens_per_step: PositiveInt = 131_072  # tokens of an update, over all ranks and micro-batches
    micro_batch_size: PositiveInt = 16  # rows per rank in one forward and backward pass
    # stream: documents one after another, cut at the end of a row. best_fit: cut only documents
    # longer than a row, and pad rows.
    packing: str = "stream"
    # Source -> minimum length of its documents; shorter ones are skipped.
    min_document_tokens: dict[str, PositiveInt] = field(default_factory=dict)
    # Source -> epochs that earlier phases have read; this phase continues there (default: 0).
    start_epoch: dict[str, NonNegativeFloat] = field(default_factory=dict)
    accept_changed: bool = False  # resume the phase although data, mixture or batch size changed

    def __post_init__(self) -> None:
        check_fields(self, "data")
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"data.tokens_per_step={self.tokens_per_step} must be a multiple of "
                f"data.sequence_length={self.sequence_length}"
            )
        if self.packing not in ("stream", "best_fit"):
            raise ValueError(f"data.packing={self.packing!r} must be stream or best_fit")
        for key in ("min_document_tokens", "start_epoch"):
            for name in getattr(self, key):
                if name not in self.mix:
                    sources = ", ".join(self.mix) or "nothing"
                    raise ValueError(
                        f"data.{key}.{name}: data.mix reads {sources}, not {name}; remove it"
                    )

    @property
    def rows(self) -> int:
        """Rows in one step over all ranks."""
        return self.tokens_per_step // self.sequence_length


@dataclass(frozen=True)
class ValidationConfig:
    """Evaluation on validation rows during training."""

    # Steps between validations; the end of a phase is always validated; 0: no validation.
    every: NonNegativeInt = 1000
    before: bool = False  # also validate before the first step of a phase
    rows: PositiveInt = 64  # validation rows per source
    batch_size: PositiveInt | None = None  # rows per rank; default: data.micro_batch_size

    def __post_init__(self) -> None:
        check_fields(self, "validation")

    def is_due(self, step: int, last: bool) -> bool:
        """Return True if validation follows this step; `last`: the last step of a command."""
        return bool(self.every) and (last or step % self.every == 0)


@dataclass(frozen=True)
class RunConfig:
    """One phase of a run."""

    SHAPE_FROM_BASE: ClassVar[bool] = False  # True if init_from sets the model section
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {
        "model.rope_theta": NoEffect(
            "is rope_theta here: one number, or [first, last] over the phase"
        )
    }

    run: str = "nanollama"  # name in checkpoints/<run>/ and logs/<run>/; the same in all phases
    phase: str = "phase1_pretrain"  # name in checkpoints/<run>/<phase>
    steps: PositiveInt = 184_000  # updates in this phase
    start_step: NonNegativeInt | None = None  # step of the whole run at which this phase must begin
    until: PositiveInt | None = None  # save and exit at this step of the whole run, as if paused
    # Base of the rotary embedding: one value, or [first, last] for a log-linear change over the
    # phase. Default: 10000, or that of the base model.
    rope_theta: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    allow_theta_jump: bool = False  # accept another rope theta than the source checkpoint's
    allow_rope_scaling_change: bool = False  # accept another model.rope_scaling than the source's
    seed: Annotated[int, at_least(0, below=2**63)] = 1337  # for initial weights and order of data
    output_dir: str | None = None  # folder of step_N; default: checkpoints/<run>/<phase>
    # Folder of metrics and events; default: logs/<run>, in SFT and DPO logs/<run>/<phase>.
    log_dir: str | None = None
    resume_from: str | None = None  # name or folder of an earlier phase, or a step folder
    init_from: str | None = None  # Hugging Face folder whose weights start a new run
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # Other settings that change over the steps, by name (training/curves.py:SCHEDULED).
    schedules: dict[str, Curve] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    startup: StartupConfig = field(default_factory=StartupConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_curves(self.schedules, self.optim)
        self._resolve_theta()
        self._check_rope_scaling()
        if not self.SHAPE_FROM_BASE:
            self.parallel.check_model(self.model.kind, self.model.moe)
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds the model's context, "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; "
                "lower the first or raise the second"
            )
        covered = (self.checkpoint.keep - 1) * self.checkpoint.every
        distance = self.faults.rollback_steps
        if covered < distance < self.steps:
            raise ValueError(
                f"faults.rollback_steps={distance} needs older checkpoints than checkpoint.keep="
                f"{self.checkpoint.keep} with checkpoint.every={self.checkpoint.every}; set "
                f"checkpoint.keep={-(-distance // self.checkpoint.every) + 1}"
            )
        for key, name in (("run", self.run), ("phase", self.phase)):
            if name in ("", "..") or Path(name).name != name:
                raise ValueError(f"{key}={name!r} must be a plain folder name")

    def _resolve_theta(self) -> None:
        """Check rope_theta, fill in its default, and copy its first value to the model section."""
        if isinstance(self.rope_theta, tuple) and len(self.rope_theta) != 2:
            raise ValueError(
                f"rope_theta={list(self.rope_theta)} must be one number or two, [first, last]"
            )
        if self.rope_theta is not None:
            first = self.rope_theta[0] if isinstance(self.rope_theta, tuple) else self.rope_theta
            object.__setattr__(self, "model", replace(self.model, rope_theta=first))
        elif not self.SHAPE_FROM_BASE:
            object.__setattr__(self, "rope_theta", self.model.rope_theta)
        if min(self.theta_range) <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0")

    def _check_rope_scaling(self) -> None:
        """ValueError if model.rope_scaling contradicts the context or a changing rope_theta."""
        scaling = scaling_of(self.model)
        if scaling is None:
            return
        if len(set(self.theta_range)) > 1:
            raise ValueError(
                f"rope_theta={list(self.theta_range)} cannot change over a phase with "
                "model.rope_scaling, which slows down the frequencies of one theta; give one number"
            )
        context = self.model.max_position_embeddings
        scaled = scaling.factor * scaling.original_max_position_embeddings
        derived = self.SHAPE_FROM_BASE or is_scaling_of(self.init_from, scaling, context)
        if scaling.type == "yarn" and not derived and round(scaled) != context:
            raise ValueError(
                f"model.rope_scaling covers {scaled:,.10g} tokens (factor "
                f"x original_max_position_embeddings), but model.max_position_embeddings="
                f"{context:,}; make them equal"
            )

    @property
    def theta_range(self) -> tuple[float, float]:
        """Rope theta of the first and the last step of the phase."""
        last = self.rope_theta[1] if isinstance(self.rope_theta, tuple) else self.rope_theta
        return self.model.rope_theta, last or self.model.rope_theta

    @property
    def theta_text(self) -> str:
        """Rope theta as text, e.g. "10,000 to 500,000"."""
        return " to ".join(f"{theta:,.0f}" for theta in dict.fromkeys(self.theta_range))

    @property
    def positions_text(self) -> str:
        """Describe how the model encodes positions, for the summary of a run."""
        scaling = scaling_of(self.model)
        return f"theta {self.theta_text}" + (f", {scaling}" if scaling else "")

    @property
    def resume_folder(self) -> Path | None:
        """Folder of resume_from; a phase name is looked up beside this phase, then in the run."""
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


def load(
    path: str | Path, overrides: list[str] | None = None, flags: dict[str, Any] | None = None
) -> RunConfig:
    """Read the run of a YAML file, with overrides and flags as load_settings takes them.

    With init_from, the model folder supplies the settings that the config omits.
    """
    values = apply_overrides(RunConfig, read_yaml(Path(path)), overrides or [], flags)
    derived = settings_from_base(values)
    return load_settings(RunConfig, path, overrides, {**(flags or {}), **derived})


def to_dict(run: RunConfig) -> dict[str, Any]:
    """Convert the resolved config to plain values for load(), without NO_EFFECT settings."""
    values = dataclasses.asdict(run)
    if isinstance(run.rope_theta, tuple):
        values["rope_theta"] = list(run.rope_theta)
    return without_no_effect(run.NO_EFFECT, values)
