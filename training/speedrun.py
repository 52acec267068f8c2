"""The config of a speedrun: a run on `.bin` shards with a SpeedrunGPT and a target loss."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from models.speedrun_config import GPTConfig
from ranges import NonEmptyText, NonNegativeInt, PositiveFloat, PositiveInt, check_fields
from training.checkpoint import Checkpointer
from training.checkpoint_files import read_manifest
from training.config import DataConfig, RunConfig, ValidationConfig
from training.distributed import run_on_rank0
from training.logger import Log
from training.settings import NoEffect
from training.state import State

OF_BINS = "has no effect on .bin shards, which data.train and data.val name; remove it"


@dataclass(frozen=True)
class BinDataConfig(DataConfig):
    """Shards and batches. data.micro_batch_size counts rows of data.sequence_length tokens."""

    train: NonEmptyText = "data/fineweb10B/fineweb_train_*.bin"  # pattern of training shards
    val: NonEmptyText = "data/fineweb10B/fineweb_val_*.bin"  # pattern of validation shards
    bos_token: NonNegativeInt = 50_256  # first token of each document
    alignment: str = "sequential"  # bos: each row begins with a document (record 26)
    document_mask: bool = False  # tokens attend within their document (record 12)
    max_document: PositiveInt | None = None  # cuts longer documents; needs bos (record 29)


@dataclass(frozen=True)
class BinValidationConfig(ValidationConfig):
    """Evaluation on the first tokens of the validation shards."""

    tokens: PositiveInt = 10_485_760  # first tokens of the validation shards to score
    # Tokens of a row; default: data.sequence_length. Longer rows give tokens more context.
    sequence_length: PositiveInt | None = None


@dataclass(frozen=True)
class SpeedrunRun(RunConfig):
    """One speedrun, with a single phase."""

    NO_EFFECT: ClassVar[dict[str, NoEffect]] = RunConfig.NO_EFFECT | {
        "allow_rope_scaling_change": NoEffect(
            "has no effect in a speedrun, whose models have no model.rope_scaling", (False,)
        ),
        "data.store": NoEffect(OF_BINS),
        "data.mix": NoEffect(OF_BINS, ({},)),
        "data.packing": NoEffect(OF_BINS),
        "data.min_document_tokens": NoEffect(OF_BINS, ({},)),
        "data.start_epoch": NoEffect(OF_BINS, ({},)),
        "validation.rows": NoEffect("has no effect on .bin shards; set validation.tokens"),
    }

    run: str = "speedrun"
    phase: str = "train"
    # GPTConfig has every field of ModelConfig that training reads.
    model: GPTConfig = field(default_factory=GPTConfig)  # type: ignore[assignment]
    data: BinDataConfig = field(default_factory=BinDataConfig)
    validation: BinValidationConfig = field(default_factory=BinValidationConfig)
    target_loss: PositiveFloat | None = None  # validation loss to reach: 3.28 or 2.92

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        if len(set(self.theta_range)) > 1:
            raise ValueError(
                f"rope_theta={list(self.theta_range)} must be one number in a speedrun, where "
                "rotary frequencies follow the window (model.yarn)"
            )
        lengths = {"validation.sequence_length": self.validation.sequence_length or 0}
        if curve := self.schedules.get("sequence_length"):
            lengths["schedules.sequence_length"] = round(max(value for _, value in curve.points))
        for name, length in lengths.items():
            if length > self.model.max_position_embeddings:
                raise ValueError(
                    f"{name}={length} exceeds the model's context, model.max_position_embeddings="
                    f"{self.model.max_position_embeddings}; lower the first or raise the second"
                )
        if self.data.alignment == "sequential" and self.data.max_document:
            raise ValueError(f"data.max_document={self.data.max_document} needs data.alignment=bos")

    @property
    def positions_text(self) -> str:
        rotary = self.model.positions == "rotary"
        return super().positions_text if rotary else "learned positions"


def tokenizer_folder(run: SpeedrunRun) -> Path | None:
    """Return the folder tokenizer/ beside the validation shards, or None."""
    folder = Path(run.data.val).parent / "tokenizer"
    return folder if folder.is_dir() else None


def check_target(run: RunConfig, state: State, checkpointer: Checkpointer, log: Log) -> None:
    """Log whether the validation loss of the last step is at most run.target_loss."""
    assert isinstance(run, SpeedrunRun)
    if run.target_loss is None:
        return
    folder = checkpointer.folder / f"step_{state.step}"
    loss = run_on_rank0(lambda: (read_manifest(folder) or {}).get("metric"))
    if loss is None:
        log.say(f"target loss {run.target_loss:g}: not checked, because validation.every is 0")
    elif loss <= run.target_loss:
        log.say(f"target loss {run.target_loss:g}: reached with {loss:.4f}")
    else:
        log.say(f"target loss {run.target_loss:g}: not reached; the last loss is {loss:.4f}")
