"""A run's config: YAML files laid over each other, then dotted overrides, read strictly into frozen dataclasses.

Precedence: default < extended file < file < override. A key that does not exist stops the run with a suggestion.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.nanollama import ModelConfig
from training.checkpoint import CheckpointConfig
from training.fsdp_utils import ParallelConfig
from training.gates import Gate
from training.logger import LogConfig
from training.optimizers import OptimConfig
from training.schedulers import ScheduleConfig


@dataclass(frozen=True)
class DataConfig:
    store: str = "data/store/nanollama"  # folder with tokenizer/ and tokens/<source>/
    mix: dict[str, float] = field(default_factory=dict)  # source -> weight, by tokens
    sequence_length: int = 4096
    tokens_per_step: int = 131_072  # over all ranks and micro-batches
    micro_batch_size: int = 16  # rows a rank holds at once
    accept_changed: bool = False  # resume in the middle of a phase although data, mixture or batch have changed

    def __post_init__(self) -> None:
        if min(self.sequence_length, self.micro_batch_size) < 1:
            raise ValueError("data.sequence_length and data.micro_batch_size must be at least 1")
        if self.tokens_per_step < 1 or self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"data.tokens_per_step={self.tokens_per_step} must be a multiple of data.sequence_length={self.sequence_length}"
            )

    @property
    def rows(self) -> int:
        """Rows in one step over all ranks."""
        return self.tokens_per_step // self.sequence_length


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 1000  # steps; the end of a phase is measured always; 0 turns validation off
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
    seed: int = 1337
    output_dir: str | None = None  # default: checkpoints/<run>/<phase>
    log_dir: str | None = None  # default: logs/<run>
    resume_from: str | None = None  # a step folder, or a folder of them, whose weights, moments and step go on here
    init_from: str | None = None  # a Hugging Face folder whose weights start a new run
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    gates: tuple[Gate, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds the model's context, "
                f"model.max_position_embeddings={self.model.max_position_embeddings}; shorten one or raise the other"
            )
        for name in ("run", "phase"):
            if not getattr(self, name) or Path(getattr(self, name)).name != getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a plain folder name")

    @property
    def checkpoints(self) -> Path:
        return Path(self.output_dir or f"checkpoints/{self.run}/{self.phase}")

    @property
    def logs(self) -> Path:
        return Path(self.log_dir or f"logs/{self.run}")


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run of a YAML file with `section.key=value` overrides; ValueError says which setting is wrong and how."""
    values = read_yaml(Path(path))
    for override in overrides or []:
        key, found, text = override.partition("=")
        if not found:
            raise ValueError(f"{override!r} is not an override; write section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {override!r} is not YAML") from error
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key} is not a setting: {section} has no parts")
        inner[last] = value
    return _make(RunConfig, values, "")


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file laid over the one it `extends` (a path beside it). Sections are merged key by key, values replaced."""
    if not path.is_file():
        raise ValueError(f"there is no config file {path}" + _nearest(path))
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings, as key: value")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    merged = read_yaml(path.parent / str(parent), (*seen, path.resolve()))
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The whole resolved config, as plain values that read back to the same run."""
    return {**dataclasses.asdict(run), "gates": [dataclasses.asdict(gate) for gate in run.gates]}


def _make(kind: Any, value: Any, name: str) -> Any:
    """`value` from YAML as the type `kind`; name is the dotted setting, for messages."""
    if dataclasses.is_dataclass(kind):
        return _make_dataclass(kind, value, name)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _make(next(k for k in typing.get_args(kind) if k is not type(None)), value, name)
    if origin is dict and isinstance(value, dict):
        return {str(k): _make(typing.get_args(kind)[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_make(typing.get_args(kind)[0], v, f"{name}[{i}]") for i, v in enumerate(value))
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # PyYAML reads 3e-4 as a string
            if kind is float:
                return number
            if number == int(number):
                return value if isinstance(value, int) else int(number)
        except (ValueError, OverflowError):
            pass
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ValueError(f"{name}={value!r} must be {wanted.get(kind, 'a list' if origin is tuple else 'settings, as key: value')}")


def _make_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must hold settings, as key: value")
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
            raise ValueError(f"{name}{'.' if name else ''}{key} is not a setting; {hint}")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ValueError(f"{name} lacks {f.name}")
    prefix = f"{name}." if name else ""
    return kind(**{key: _make(fields[key], part, prefix + key) for key, part in value.items()})


def _nearest(path: Path) -> str:
    names = [found.name for found in path.parent.glob("*.yaml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
