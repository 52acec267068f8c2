"""Align a fine-tuned model with preferences: DPO or a related loss (dpo.loss).

    python train_dpo.py --config configs/quickstart/dpo.yaml --base_model checkpoints/quickstart/sft
    torchrun --nproc_per_node=2 train_dpo.py --config configs/dpo.yaml \\
        --base_model my_run/sft --output_dir my_run/dpo \\
        --steps 5000 --batch_size 4 --learning_rate 5e-7 --beta 0.1

my_run stands for the checkpoints of a larger run. --batch_size has another meaning in train_sft.py.
Run the same command again to resume from the newest complete checkpoint.
Set any other setting with section.key=value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from data.chat.pair_batches import PairBatch, PairLoader, Pairs, ValidationPairs
from data.chat.preferences import PreferenceConfig, describe, prepare
from data.chat.rendering import TRAINING_TEMPLATE
from data.chat.replay import (
    PairReplayConfig,
    add_shares,
    mixture,
    open_replay,
    replay_validation,
)
from data.dataloader import Batch, Prefetcher
from data.manifest import file_hash
from data.tokenizers.bpe import token_bytes
from evals.eval_perplexity import replay_figures
from ranges import PositiveInt, check_fields
from training import setup
from training.config import DataConfig
from training.distributed import run_on_rank0
from training.fine_tuning import TuningRun, open_base, parser, start, with_record
from training.fsdp_utils import compute_dtype
from training.phase import Stage, run_phase
from training.preference_losses import DPOConfig, evaluate_pairs, preference, with_text
from training.reference import ReferenceLogps, build_reference, frozen_logps, sharded
from training.settings import NoEffect


@dataclass(frozen=True)
class PairDataConfig(DataConfig):
    """The data section of DPO. A row is a prompt and one answer, so a pair has two rows.

    micro_batch_size counts rows. tokens_per_step follows from pairs_per_step.
    """

    sequence_length: PositiveInt = 1024  # maximum tokens of a prompt and its answer
    pairs_per_step: PositiveInt = 4  # pairs of an update, over all ranks

    def __post_init__(self) -> None:
        check_fields(self, "data")
        object.__setattr__(self, "tokens_per_step", 2 * self.pairs_per_step * self.sequence_length)
        super().__post_init__()


@dataclass(frozen=True)
class PreferenceRun(TuningRun):
    """Config of a run on preference pairs."""

    NO_EFFECT: ClassVar[dict[str, NoEffect]] = TuningRun.NO_EFFECT | {
        "data.tokens_per_step": NoEffect("has no effect in DPO: set data.pairs_per_step instead"),
        "optim.z_weight": NoEffect(
            "has no effect in DPO, which has no z-loss; remove it", (0, None)
        ),
    }

    data: PairDataConfig = field(default_factory=PairDataConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    preferences: PreferenceConfig = field(kw_only=True)
    replay: PairReplayConfig | None = None  # pretraining text beside the pairs; default: none

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {
            "data.micro_batch_size": self.data.micro_batch_size,
            "validation.batch_size": self.validation.batch_size,
        }
        for name, rows in sizes.items():
            if rows and rows % 2:
                raise ValueError(f"{name}={rows} must be even in DPO, where a pair has two rows")


def main() -> None:
    batch_size = (
        "pairs per update, over all ranks (data.pairs_per_step). In train_sft.py it is the rows "
        "per rank and micro-batch"
    )
    flags = parser(PreferenceRun, __doc__, "configs/dpo.yaml", batch_size)
    flags.add_argument("--beta", type=float, help="KL penalty strength (beta)")
    args = flags.parse_intermixed_args()
    start(
        PreferenceRun, args, {"data.pairs_per_step": args.batch_size, "dpo.beta": args.beta}, align
    )


def align(
    run: PreferenceRun, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """Train on preference pairs. Returns the exit status of training.loop.train."""
    base = open_base(run, Path(run.preferences.cache))
    chat, folder, files, run = base
    mixture(run.data.mix, run.replay)  # ValueError if a name is in both
    data, new_tokens = run.data, files.new_tokens
    text = open_replay(run.replay, "train", folder) if run.replay else {}
    prepared = run_on_rank0(
        lambda: prepare(run.preferences, data.mix, folder, data.sequence_length)
    )
    train, val = (
        {name: Pairs(path, split) for name, path in prepared.items()} for split in ("train", "val")
    )
    files = with_record(base, [source.report for source in train.values()], data.sequence_length)
    size = max(1, min(data.micro_batch_size // 2, data.pairs_per_step // world))  # pairs
    # Row lengths are multiples of this: each length costs a compilation.
    multiple = 64 if device.type == "cuda" else 1
    pairs = PairLoader(
        train,
        data.mix,
        data.sequence_length,
        data.pairs_per_step,
        size,
        run.seed,
        rank,
        world,
        multiple,
    )
    val_size = max(1, (run.validation.batch_size or 2 * size) // 2)
    val_pairs = ValidationPairs(
        val, run.validation.rows, val_size, data.sequence_length, rank, world, multiple
    )
    steps = {"train": pairs.steps(run.steps), "val": val_pairs.steps()}
    logps = reference_logps(run, folder, new_tokens, device, steps, {"train": train, "val": val})
    pairs.reference = partial(logps, "train") if logps else None
    sources = val_pairs.batches(partial(logps, "val") if logps else None)
    lines = run.schedule_lines()
    text_batches: dict[str, list[Batch]] = {}
    if run.replay:
        pairs.add_text(text, run.replay)
        rows = (run.validation.batch_size or 2 * size, run.validation.rows)
        text_batches, text_lines = replay_validation(
            run.replay, folder, data.sequence_length, *rows, rank, world
        )
        lines += text_lines
    if 2 * size < data.micro_batch_size:
        lines.append(
            f"micro-batches: {2 * size} rows, the rank's share of a step, instead of "
            f"data.micro_batch_size={data.micro_batch_size}"
        )
    run = replace(run.with_schedule(), data=replace(data, micro_batch_size=2 * size))
    objective, loader = preference(run.dpo), Prefetcher(pairs, device)
    token_sizes = torch.from_numpy(token_bytes(chat.tokenizer, run.model.vocab_size))

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        results = evaluate_pairs(model, objective, sources, setup.all_reduce_sum) if sources else {}
        if text_batches:
            results |= replay_figures(model, text_batches, token_sizes, setup.all_reduce_sum)
        if run.replay and (end := loader.position):
            add_shares(results, pairs.shares(max(0, end - run.validation.every), end), text)
        return results

    lines += [
        line for name, source in train.items() for line in describe(name, source.report)
    ] + pairs.describe(run.steps)
    stage = Stage(
        loader=loader,
        objective=with_text(objective, run.replay.weight) if run.replay else objective,
        tokenizer=files,
        evaluate=evaluate if sources or text_batches else None,
        data_lines=lines,
        largest_batch=largest_batch(size, data.sequence_length, device),
    )
    return run_phase(run, device, stage, profile)


def largest_batch(pairs: int, length: int, device: torch.device) -> PairBatch:
    """Return zeros in the shape of the largest micro-batch: each answer fills `length` tokens."""
    zeros = torch.zeros(2 * pairs, length, dtype=torch.int64, device=device)
    indices = torch.arange(zeros.numel(), device=device).view_as(zeros)
    reference, ones = torch.zeros(2 * pairs, device=device), torch.ones(pairs, device=device)
    return PairBatch(zeros, zeros, zeros.int(), indices, reference, ones, ones)


def reference_logps(
    run: PreferenceRun,
    tokenizer: Path,
    new_tokens: range | None,
    device: torch.device,
    steps: dict,
    pairs: dict[str, dict[str, Pairs]],
) -> Callable[[str, list, PairBatch], torch.Tensor] | None:
    """Return a function that looks up or computes a batch's reference log-probabilities.

    The reference model is run.init_from. None if the loss needs no reference. "precomputed"
    log-probabilities are computed here, before the policy is built.
    """
    base, dpo = Path(str(run.init_from)), run.dpo
    if dpo.resolved_reference == "cpu":
        model = build_reference(base, run.model, new_tokens)
        return lambda split, names, batch: frozen_logps(model, batch)
    if dpo.resolved_reference == "none":
        return None
    sources = [
        (split, name, source)
        for split, by_name in pairs.items()
        for name, source in sorted(by_name.items())
    ]
    inputs = run_on_rank0(
        lambda: {
            "weights": " ".join(file_hash(path) for path in sorted(base.glob("*.safetensors"))),
            "model": file_hash(base / "config.json"),
            "tokenizer": file_hash(tokenizer / "tokenizer.json"),
            "template": file_hash(tokenizer / TRAINING_TEMPLATE),
            "length": str(run.data.sequence_length),
            "dtype": str(compute_dtype(run.parallel, device)),
            "data": " ".join(
                f"{split} {name} {source.fingerprint}" for split, name, source in sources
            ),
        }
    )
    sizes = {f"{split}/{name}": len(source.prompts) for split, name, source in sources}
    path = Path(dpo.reference_cache or run.checkpoints / "reference.safetensors")
    logps = ReferenceLogps(path, inputs, sizes)
    logps.compute(
        lambda: sharded(build_reference(base, run.model, new_tokens), run, device),
        steps,
        partial(print, flush=True) if setup.rank_and_world()[0] == 0 else lambda _: None,
    )
    return logps.lookup


if __name__ == "__main__":
    main()
