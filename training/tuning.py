"""What train_sft.py and train_dpo.py have in common: their flags, and a base model that is to speak in the chat template."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from cli import CommandParser, user_errors
from data.chat.rendering import Chat
from data.chat.tokenizer import keep_chat_tokenizer
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

UNKNOWN_LENGTH = 10**9  # stands for the base model's context until its config is read


@dataclass(frozen=True)
class TuningRun(RunConfig):
    """A run that starts from the base model init_from, with its shape, and counts its own steps. Its logs have their own folder.

    The learning rate decays from warm-up to the end, as transformers' (and so TRL's) does: the next update would have min_lr.
    Settings that follow from the base model or from `steps` are refused in a config.
    """

    SHAPE_FROM_BASE: ClassVar[bool] = True
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = RunConfig.NO_EFFECT | {
        "model": NoEffect(
            "has no effect in SFT and DPO: the shape is that of the base model (init_from); remove it"
        ),
        "schedule.total_steps": NoEffect(
            "has no effect in SFT and DPO: the schedule ends with steps; remove it"
        ),
        "schedule.decay_steps": NoEffect(
            "has no effect in SFT and DPO: the rate decays from warm-up to the end; remove it"
        ),
        "data.store": NoEffect(
            "has no effect in SFT and DPO, which read the files of their sources; remove it"
        ),
        "data.packing": NoEffect("has no effect in SFT and DPO, which never cut a row; remove it"),
        "data.min_document_tokens": NoEffect(
            "has no effect in SFT and DPO; filter the files of the source", ({},)
        ),
    }

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(max_position_embeddings=UNKNOWN_LENGTH)
    )

    @property
    def logs(self) -> Path:
        return Path(self.log_dir or f"logs/{self.run}/{self.phase}")

    def with_schedule(self) -> Any:
        """The same run, its schedule over its own steps."""
        warmup = min(self.schedule.warmup_steps, self.steps // 10)
        decay, total = self.steps - warmup, self.steps + 1
        return replace(
            self,
            schedule=replace(
                self.schedule, warmup_steps=warmup, total_steps=total, decay_steps=decay
            ),
        )

    def schedule_lines(self) -> list[str]:
        """What with_schedule changes, for the log: a warm-up of more than a tenth of the steps is shortened."""
        wanted, used = self.schedule.warmup_steps, self.with_schedule().schedule.warmup_steps
        return [
            f"warm-up: {used} steps, a tenth of the run, instead of schedule.warmup_steps={wanted}"
        ] * (used < wanted)


class Base(NamedTuple):
    chat: Chat
    folder: Path  # of the chat tokenizer
    files: TokenizerFiles
    run: Any  # the run with the base's shape, and vocabulary for the chat tokens


def parser(about: str | None, config: str, batch_size: str) -> argparse.ArgumentParser:
    """The flags of both; batch_size: what that flag means."""
    made = CommandParser(about)
    made.add_argument("--config", default=config, help="YAML file")
    made.add_argument(
        "--base_model", help="a step folder, a phase folder or a Hugging Face folder to start from"
    )
    made.add_argument(
        "--output_dir", help="where step_N folders go (default: checkpoints/<run>/<phase>)"
    )
    made.add_argument("--num_steps", type=int, help="updates")
    made.add_argument("--batch_size", type=int, help=batch_size)
    made.add_argument("--learning_rate", type=float)
    made.add_argument("--wandb_project", help="send metrics to this Weights & Biases project")
    made.add_argument("--wandb_run_name", help="name of the run there (default: the run's)")
    made.add_argument(
        "--profile",
        action="store_true",
        help="trace steps 4 to 6 from here into logs/<run>/<phase>/profile/",
    )
    made.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any other setting of the config"
    )
    return made


def start(
    kind: type[TuningRun],
    args: argparse.Namespace,
    more: dict[str, Any],
    train: Callable[[Any, int, int, torch.device, bool], int],
) -> None:
    """Read the run, with flags over its config (more: setting -> value or None), train, and leave with the exit status."""
    flags = {"init_from": args.base_model, "output_dir": args.output_dir, "steps": args.num_steps}
    flags |= {
        "optim.lr": args.learning_rate,
        "log.wandb_project": args.wandb_project,
        "log.wandb_run_name": args.wandb_run_name,
        **more,
    }
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        run = load_settings(kind, args.config, args.overrides, flags)
        with setup.ranks() as device:
            run_on_rank0(lambda: log_in(run.log))
            status = train(run, rank, world, device, args.profile)
    setup.exit_process(status)


def with_record(base: Base, reports: Iterable[dict[str, Any]], length: int) -> TokenizerFiles:
    """The tokenizer files, and for config.json what the conversations are like: the defaults of chat and demo."""
    trained = record(Path(str(base.run.init_from)), reports, length)
    return base.files._replace(special={**base.files.special, KEY: trained})


def take_base(run: TuningRun, cache: Path) -> Base:
    """The model to start from and its tokenizer, grown by the chat tokens and kept under `cache`; ValueError without one."""
    if not run.init_from:
        raise ValueError("there is no model to start from; give --base_model")
    base = run_on_rank0(lambda: setup.find_checkpoint(Path(str(run.init_from)), required=True))
    assert base
    folder = run_on_rank0(lambda: keep_chat_tokenizer(base, cache))
    chat, config = Chat.from_folder(folder), read_hf_config(base)
    known, tokens = vocabulary_size(load_tokenizer(base)), vocabulary_size(chat.tokenizer)
    if known > config.vocab_size:
        raise ValueError(
            f"{base}: the tokenizer has the id {known - 1}, but its model has {config.vocab_size} rows of embedding"
        )
    files = TokenizerFiles(
        folder, chat.config_ids, range(known, tokens) if tokens > known else None
    )
    theta = config.rope_theta if run.rope_theta is None else run.rope_theta
    model = replace(config, vocab_size=max(config.vocab_size, tokens))
    run = replace(run, model=model, rope_theta=theta, init_from=str(base))
    return Base(chat, folder, files, run)
