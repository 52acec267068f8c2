"""Align a fine-tuned model with preferences: DPO, or one of its kin (dpo.loss).

    python train_dpo.py --config configs/quickstart/dpo.yaml --base_model checkpoints/quickstart/sft
    torchrun --nproc_per_node=2 train_dpo.py --config configs/dpo.yaml --base_model checkpoints/nanollama_1b/sft \\
        --output_dir checkpoints/nanollama_1b/dpo --num_steps 5000 --batch_size 4 --learning_rate 5e-7 --beta 0.1

The same command line again goes on from the newest whole checkpoint. Any setting can be given as section.key=value.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from data.chat import TRAINING_TEMPLATE, Chat
from data.chat_tokenizer import keep_chat_tokenizer
from data.dataloader import Prefetcher
from data.manifest import file_hash
from data.pair_batches import HeldOutPairs, PairBatch, PairLoader, Pairs
from data.preferences import PreferenceConfig, describe, prepare
from data.tokenizer import load_tokenizer
from entrypoint import user_errors
from models.hf import read_hf_config
from training import setup
from training.checkpoint import on_main
from training.config import DataConfig, RunConfig
from training.fsdp_utils import compute_dtype
from training.phase import TokenizerFiles, run_phase
from training.preference_losses import DPOConfig, held_out, preference
from training.reference import ReferenceLogps, build_reference, frozen_logps, sharded
from training.settings import load_settings


@dataclass(frozen=True)
class PairDataConfig(DataConfig):
    """data, with rows of one prompt and one answer: a pair is two, also of micro_batch_size. tokens_per_step follows."""

    sequence_length: int = 1024  # tokens of a prompt and its answer, at most
    pairs_per_step: int = 4  # over all ranks

    def __post_init__(self) -> None:
        if self.pairs_per_step < 1:
            raise ValueError(f"data.pairs_per_step={self.pairs_per_step} must be at least 1")
        object.__setattr__(self, "tokens_per_step", 2 * self.pairs_per_step * self.sequence_length)
        super().__post_init__()


@dataclass(frozen=True)
class PreferenceRun(RunConfig):
    """A run on pairs. The model is that of the base, init_from; the learning rate decays from warm-up to the end."""

    data: PairDataConfig = field(default_factory=PairDataConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    preferences: PreferenceConfig = field(kw_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/dpo.yaml", help="YAML file")
    parser.add_argument("--base_model", help="a step folder, a phase folder or a Hugging Face folder to start from")
    parser.add_argument("--output_dir", help="where step_N folders go (default: checkpoints/<run>/<phase>)")
    parser.add_argument("--num_steps", type=int, help="updates")
    parser.add_argument("--batch_size", type=int, help="pairs in one update, over all ranks")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--beta", type=float, help="how dear it is to leave the reference")
    parser.add_argument("--wandb_project", help="send metrics to this Weights & Biases project")
    parser.add_argument("--profile", action="store_true", help="trace steps 4 to 6 from here into logs/<run>/profile/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any other setting of the config")
    args = parser.parse_intermixed_args()
    flags = {
        "init_from": args.base_model,
        "output_dir": args.output_dir,
        "steps": args.num_steps,
        "data.pairs_per_step": args.batch_size,
        "optim.lr": args.learning_rate,
        "dpo.beta": args.beta,
        "log.wandb_project": args.wandb_project,
    }
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        given = [f"{key}={value}" for key, value in flags.items() if value is not None]
        any_length = "model.max_position_embeddings=1000000000"  # until the base's is known
        run = load_settings(PreferenceRun, args.config, [any_length, *args.overrides, *given])
        with setup.ranks() as device:
            finished = align(run, rank, world, device, args.profile)
    setup.leave(0 if finished else 143)


def align(run: PreferenceRun, rank: int, world: int, device: torch.device, profile: bool = False) -> bool:
    """From pairs to checkpoints. False if a signal stopped it; it has saved then."""
    if not run.init_from:
        raise ValueError("there is no model to start from; give --base_model")
    base = on_main(lambda: setup.find_checkpoint(Path(str(run.init_from)), required=True))
    folder = on_main(lambda: keep_chat_tokenizer(base, Path(run.preferences.cache)))
    chat, config = Chat.from_folder(folder), read_hf_config(base)
    known, tokens = load_tokenizer(base).get_vocab_size(), chat.tokenizer.get_vocab_size()
    data, grown = run.data, known if tokens > known else None
    run = replace(run, model=replace(config, vocab_size=max(config.vocab_size, tokens)), init_from=str(base))
    prepared = on_main(lambda: prepare(run.preferences, data.mix, folder, data.sequence_length))
    train, val = ({name: Pairs(path, split) for name, path in prepared.items()} for split in ("train", "val"))
    size = max(1, min(data.micro_batch_size // 2, data.pairs_per_step // world))  # pairs
    multiple = 64 if device.type == "cuda" else 1  # few lengths of rows, for kernels and compilation
    pairs = PairLoader(train, data.mix, data.sequence_length, data.pairs_per_step, size, run.seed, rank, world, multiple)
    held = (run.validation.batch_size or 2 * size) // 2
    few = HeldOutPairs(val, run.validation.rows, max(1, held), data.sequence_length, rank, world, multiple)
    source = reference(
        run, folder, grown, device, {"train": pairs.steps(run.steps), "val": few.steps()}, {"train": train, "val": val}
    )
    pairs.reference = partial(source, "train") if source else None
    sources = few.batches(partial(source, "val") if source else None)
    warmup = min(run.schedule.warmup_steps, run.steps // 10)
    schedule = replace(run.schedule, warmup_steps=warmup, total_steps=run.steps, decay_steps=run.steps - warmup)
    run = replace(run, schedule=schedule, data=replace(data, micro_batch_size=2 * size))
    objective = preference(run.dpo)
    evaluate = partial(held_out, objective=objective, sources=sources, total=setup.add_up) if sources else None
    files = TokenizerFiles(folder, chat.config_ids, grown)
    lines = [line for name, source in train.items() for line in describe(name, source.report)] + pairs.describe(run.steps)
    return run_phase(run, device, Prefetcher(pairs, device), objective, evaluate, files, lines, profile)


def reference(
    run: PreferenceRun, tokenizer: Path, grown: int | None, device: torch.device, steps: dict, pairs: dict[str, dict[str, Pairs]]
) -> Callable[[str, list, PairBatch], torch.Tensor] | None:
    """What gives the log-probabilities under run.init_from of a split's batch; they are computed before there is a policy."""
    base, dpo = Path(str(run.init_from)), run.dpo
    if dpo.referred == "cpu":
        model = build_reference(base, run.model, grown)
        return lambda split, names, batch: frozen_logps(model, batch)
    if dpo.referred == "none":
        return None
    made_of = on_main(
        lambda: {
            "weights": " ".join(file_hash(path) for path in sorted(base.glob("*.safetensors"))),
            "tokenizer": file_hash(tokenizer / "tokenizer.json"),
            "template": file_hash(tokenizer / TRAINING_TEMPLATE),
            "length": str(run.data.sequence_length),
            "dtype": str(compute_dtype(run.parallel, device)),
            "data": " ".join(f"{name} {source.fingerprint}" for name, source in sorted(pairs["train"].items())),
        }
    )
    sizes = {f"{split}/{name}": len(source.prompts) for split, part in pairs.items() for name, source in part.items()}
    logps = ReferenceLogps(Path(dpo.reference_cache or run.checkpoints / "reference.safetensors"), made_of, sizes)
    logps.compute(
        lambda: sharded(build_reference(base, run.model, grown), run, device),
        steps,
        partial(print, flush=True) if setup.rank_and_world()[0] == 0 else lambda _: None,
    )
    return logps.of


if __name__ == "__main__":
    main()
