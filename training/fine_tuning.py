"""Shared parts of train_sft.py and train_dpo.py: flags, and a base model with the chat template."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch

from cli import CommandParser, user_errors
from data.chat.rendering import Chat
from data.chat.tokenizer import cache_chat_tokenizer
from data.chat.trained_chat import KEY, record
from data.tokenizers.bpe import load_tokenizer, vocabulary_size
from models.hf import read_hf_config
from models.nanollama import ModelConfig
from training import setup
from training.config import RunConfig
from training.distributed import run_on_rank0
from training.logger import log_in
from training.phase import TokenizerFiles
from training.settings import NoEffect, load_settings
from training.settings_reference import add_settings

UNKNOWN_LENGTH = 10**9  # placeholder until the base model's config is read


@dataclass(frozen=True)
class TuningRun(RunConfig):
    """A fine-tuning run from the base model init_from, with its shape and a separate log folder.

    The learning rate decays from the end of warm-up to the last step. As in transformers and TRL,
    it would reach min_lr one step later. The config may not set what the base model or `steps`
    determines.
    """

    SHAPE_FROM_BASE: ClassVar[bool] = True
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = RunConfig.NO_EFFECT | {
        "model": NoEffect(
            "has no effect in SFT and DPO: the base model (init_from) sets the shape; remove it"
        ),
        "allow_rope_scaling_change": NoEffect(
            "has no effect in SFT and DPO: the base model sets model.rope_scaling; remove it",
            (False,),
        ),
        "schedule.total_steps": NoEffect(
            "has no effect in SFT and DPO: the schedule ends with steps; remove it"
        ),
        "schedule.decay_steps": NoEffect(
            "has no effect in SFT and DPO: the decay follows the warm-up; remove it"
        ),
        "data.store": NoEffect(
            "has no effect in SFT and DPO, which read the files of their sources; remove it"
        ),
        "data.packing": NoEffect("has no effect in SFT and DPO, which never split rows; remove it"),
        "data.min_document_tokens": NoEffect(
            "has no effect in SFT and DPO; filter the files of the source", ({},)
        ),
        "data.start_epoch": NoEffect("has no effect in SFT and DPO; remove it", ({},)),
    }

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(max_position_embeddings=UNKNOWN_LENGTH)
    )

    @property
    def logs(self) -> Path:
        return Path(self.log_dir or f"logs/{self.run}/{self.phase}")

    def with_schedule(self) -> Self:
        """Return this run with a learning-rate schedule over its steps."""
        warmup = min(self.schedule.warmup_steps, self.steps // 10)
        decay, total = self.steps - warmup, self.steps + 1
        return replace(
            self,
            schedule=replace(
                self.schedule, warmup_steps=warmup, total_steps=total, decay_steps=decay
            ),
        )

    def schedule_lines(self) -> list[str]:
        """Return a log line if with_schedule shortens the warm-up to a tenth of the steps."""
        configured, used = self.schedule.warmup_steps, self.with_schedule().schedule.warmup_steps
        return [
            f"warm-up: {used} steps, a tenth of the run, instead of "
            f"schedule.warmup_steps={configured}"
        ] * (used < configured)


Run = TypeVar("Run", bound=TuningRun)


class Base(NamedTuple, Generic[Run]):
    """The base model of a tuning run, with its chat tokenizer."""

    chat: Chat
    folder: Path  # folder of the chat tokenizer
    files: TokenizerFiles
    run: Run  # the run with the base model's shape and the chat tokens in its vocabulary


def parser(
    kind: type[TuningRun], about: str | None, config: str, batch_size: str
) -> argparse.ArgumentParser:
    """Return the parser of the shared flags. config: default. batch_size: help of --batch_size."""
    flags = CommandParser(about)
    flags.add_argument("--config", default=config, help="YAML file")
    flags.add_argument(
        "--base_model", help="step folder, phase folder or Hugging Face folder to start from"
    )
    flags.add_argument(
        "--output_dir", help="folder for step_N (default: checkpoints/<run>/<phase>)"
    )
    flags.add_argument("--steps", type=int, help="updates")
    flags.add_argument("--batch_size", type=int, help=batch_size)
    flags.add_argument("--learning_rate", type=float, help="peak learning rate")
    flags.add_argument("--wandb_project", help="Weights & Biases project for the metrics")
    flags.add_argument(
        "--wandb_run_name", help="Weights & Biases run name (default: the run's name)"
    )
    profile = "trace steps 4 to 6 into logs/<run>/<phase>/profile/"
    flags.add_argument("--profile", action="store_true", help=profile)
    add_settings(flags, kind)
    return flags


def start(
    kind: type[Run],
    args: argparse.Namespace,
    more_flags: Mapping[str, object],
    train: Callable[[Run, int, int, torch.device, bool], int],
) -> None:
    """Load the config with the flags applied, train, and exit with the status.

    more_flags: setting -> value of a flag of one stage; None if unset.
    """
    flags = {
        "init_from": args.base_model,
        "output_dir": args.output_dir,
        "steps": args.steps,
        "optim.lr": args.learning_rate,
        "log.wandb_project": args.wandb_project,
        "log.wandb_run_name": args.wandb_run_name,
        **more_flags,
    }
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        run = load_settings(kind, args.config, args.overrides, flags)
        with setup.ranks() as device:
            run_on_rank0(lambda: log_in(run.log))
            status = train(run, rank, world, device, args.profile)
    setup.exit_process(status)


def with_record(base: Base[Run], reports: Iterable[dict[str, Any]], length: int) -> TokenizerFiles:
    """Return the tokenizer files with a record of the training conversations for config.json.

    Chat and demo read their defaults from this record.
    """
    trained = record(Path(str(base.run.init_from)), reports, length)
    return base.files._replace(config_entries={**base.files.config_entries, KEY: trained})


def open_base(run: Run, cache: Path) -> Base[Run]:
    """Find the base model and add the chat tokens to its tokenizer, stored under `cache`."""
    if not run.init_from:
        raise ValueError("no base model is set; use --base_model")
    base = run_on_rank0(lambda: setup.find_checkpoint(Path(str(run.init_from)), required=True))
    assert base
    folder = run_on_rank0(lambda: cache_chat_tokenizer(base, cache))
    chat, config = Chat.from_folder(folder), read_hf_config(base)
    known, tokens = vocabulary_size(load_tokenizer(base)), vocabulary_size(chat.tokenizer)
    if known > config.vocab_size:
        raise ValueError(
            f"{base}: the tokenizer has id {known - 1}, but the embedding has "
            f"{config.vocab_size} rows; use a matching tokenizer"
        )
    files = TokenizerFiles(
        folder, chat.config_ids, range(known, tokens) if tokens > known else None
    )
    theta = config.rope_theta if run.rope_theta is None else run.rope_theta
    # Few steps on few conversations: no router noise and no bias updates.
    moe = replace(config.moe, router="top_k", bias_rate=0.0)
    model = replace(config, vocab_size=max(config.vocab_size, tokens))
    model = replace(model, moe=moe) if model.kind == "moe" else model
    run = replace(run, model=model, rope_theta=theta, init_from=str(base))
    return Base(chat, folder, files, run)
