"""Align a fine-tuned model with preferences: DPO, or one of its kin (dpo.loss).

    python train_dpo.py --config configs/quickstart/dpo.yaml --base_model checkpoints/quickstart/sft
    torchrun --nproc_per_node=2 train_dpo.py --config configs/dpo.yaml --base_model checkpoints/nanollama_1b/sft \\
        --output_dir checkpoints/nanollama_1b/dpo --num_steps 5000 --batch_size 4 --learning_rate 5e-7 --beta 0.1

The same command line again goes on from the newest whole checkpoint. Any setting can be given as section.key=value.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from data.chat.pair_batches import HeldOutPairs, PairBatch, PairLoader, Pairs
from data.chat.preferences import PreferenceConfig, describe, prepare
from data.chat.rendering import TRAINING_TEMPLATE
from data.dataloader import Prefetcher
from data.manifest import file_hash
from ranges import PositiveInt, check_fields
from training import setup
from training.config import DataConfig
from training.distributed import run_on_rank0
from training.fsdp_utils import compute_dtype
from training.phase import Stage, run_phase
from training.preference_losses import DPOConfig, held_out, preference
from training.reference import ReferenceLogps, build_reference, frozen_logps, sharded
from training.settings import NoEffect
from training.tuning import TuningRun, parser, start, take_base, with_record


@dataclass(frozen=True)
class PairDataConfig(DataConfig):
    """data, with rows of one prompt and one answer: a pair is two, also of micro_batch_size. tokens_per_step follows."""

    sequence_length: PositiveInt = 1024  # tokens of a prompt and its answer, at most
    pairs_per_step: PositiveInt = 4  # over all ranks

    def __post_init__(self) -> None:
        check_fields(self, "data")
        object.__setattr__(self, "tokens_per_step", 2 * self.pairs_per_step * self.sequence_length)
        super().__post_init__()


@dataclass(frozen=True)
class PreferenceRun(TuningRun):
    """A run on pairs."""

    NO_EFFECT: ClassVar[dict[str, NoEffect]] = TuningRun.NO_EFFECT | {
        "data.tokens_per_step": NoEffect(
            "has no effect in DPO: a step has data.pairs_per_step pairs; set that"
        ),
        "optim.z_weight": NoEffect(
            "has no effect in DPO, whose losses have no z-loss; remove it", (0, None)
        ),
    }

    data: PairDataConfig = field(default_factory=PairDataConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    preferences: PreferenceConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {
            "data.micro_batch_size": self.data.micro_batch_size,
            "validation.batch_size": self.validation.batch_size,
        }
        for name, rows in sizes.items():
            if rows and rows % 2:
                raise ValueError(f"{name}={rows} must be even in DPO, since a pair is two rows")


def main() -> None:
    flags = parser(__doc__, "configs/dpo.yaml", "pairs in one update, over all ranks")
    flags.add_argument("--beta", type=float, help="how dear it is to leave the reference")
    args = flags.parse_intermixed_args()
    start(
        PreferenceRun, args, {"data.pairs_per_step": args.batch_size, "dpo.beta": args.beta}, align
    )


def align(
    run: PreferenceRun, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """From pairs to checkpoints. Returns the exit status, 0 if complete; it has saved in any case."""
    base = take_base(run, Path(run.preferences.cache))
    _, folder, files, run = base
    data, new_tokens = run.data, files.new_tokens
    prepared = run_on_rank0(
        lambda: prepare(run.preferences, data.mix, folder, data.sequence_length)
    )
    train, val = (
        {name: Pairs(path, split) for name, path in prepared.items()} for split in ("train", "val")
    )
    files = with_record(base, [source.report for source in train.values()], data.sequence_length)
    size = max(1, min(data.micro_batch_size // 2, data.pairs_per_step // world))  # pairs
    multiple = (
        64 if device.type == "cuda" else 1
    )  # few lengths of rows, for kernels and compilation
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
    held = (run.validation.batch_size or 2 * size) // 2
    few = HeldOutPairs(
        val, run.validation.rows, max(1, held), data.sequence_length, rank, world, multiple
    )
    source = reference(
        run,
        folder,
        new_tokens,
        device,
        {"train": pairs.steps(run.steps), "val": few.steps()},
        {"train": train, "val": val},
    )
    pairs.reference = partial(source, "train") if source else None
    sources = few.batches(partial(source, "val") if source else None)
    lines = run.schedule_lines()
    if 2 * size < data.micro_batch_size:
        lines.append(
            f"micro-batches: {2 * size} rows, a rank's share, instead of data.micro_batch_size={data.micro_batch_size}"
        )
    run = replace(run.with_schedule(), data=replace(data, micro_batch_size=2 * size))
    objective = preference(run.dpo)
    evaluate = (
        partial(held_out, objective=objective, sources=sources, total=setup.all_reduce_sum)
        if sources
        else None
    )
    lines += [
        line for name, source in train.items() for line in describe(name, source.report)
    ] + pairs.describe(run.steps)
    stage = Stage(
        loader=Prefetcher(pairs, device),
        objective=objective,
        tokenizer=files,
        evaluate=evaluate,
        data_lines=lines,
        largest_batch=largest_batch(size, data.sequence_length, device),
    )
    return run_phase(run, device, stage, profile)


def largest_batch(pairs: int, length: int, device: torch.device) -> PairBatch:
    """Zeros in the shape of the largest micro-batch: each answer of each pair fills a row of `length` tokens."""
    zeros = torch.zeros(2 * pairs, length, dtype=torch.int64, device=device)
    places = torch.arange(zeros.numel(), device=device).view_as(zeros)
    reference, ones = torch.zeros(2 * pairs, device=device), torch.ones(pairs, device=device)
    return PairBatch(zeros, zeros, zeros.int(), places, reference, ones, ones)


def reference(
    run: PreferenceRun,
    tokenizer: Path,
    new_tokens: range | None,
    device: torch.device,
    steps: dict,
    pairs: dict[str, dict[str, Pairs]],
) -> Callable[[str, list, PairBatch], torch.Tensor] | None:
    """What gives the log-probabilities under run.init_from of a split's batch; they are computed before there is a policy."""
    base, dpo = Path(str(run.init_from)), run.dpo
    if dpo.referred == "cpu":
        model = build_reference(base, run.model, new_tokens)
        return lambda split, names, batch: frozen_logps(model, batch)
    if dpo.referred == "none":
        return None
    sources = [
        (split, name, source)
        for split, part in pairs.items()
        for name, source in sorted(part.items())
    ]
    made_of = run_on_rank0(
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
    logps = ReferenceLogps(
        Path(dpo.reference_cache or run.checkpoints / "reference.safetensors"), made_of, sizes
    )
    logps.compute(
        lambda: sharded(build_reference(base, run.model, new_tokens), run, device),
        steps,
        partial(print, flush=True) if setup.rank_and_world()[0] == 0 else lambda _: None,
    )
    return logps.of


if __name__ == "__main__":
    main()
