"""Pretrain one phase.

    python train.py --config configs/quickstart/base.yaml                       # one process
    torchrun --nproc_per_node=2 train.py --config configs/phase1_pretrain.yaml  # two ranks
    torchrun --nproc_per_node=2 train.py --test_mode --steps 1000               # on dummy data
    accelerate launch --multi_gpu --num_processes 2 train.py --config configs/phase1_pretrain.yaml
    python train.py --config configs/continue.yaml --init_from my_model         # from a model

my_model stands for a Llama or Qwen3 folder. Run the same command again to resume.
Set any other setting with section.key=value; --help_settings optim lists those of a section.
"""

from functools import partial
from pathlib import Path

import torch

from cli import CommandParser, user_errors
from data.dataloader import PackedDataLoader, Prefetcher, validation_batches
from data.store import open_shards, open_tokenizer, write_dummy_store
from evals.eval_perplexity import perplexity
from training import setup
from training.config import RunConfig, load
from training.distributed import run_on_rank0
from training.logger import log_in
from training.objectives import next_token
from training.ops import self_test
from training.phase import Evaluate, Stage, TokenizerFiles, run_phase
from training.schedulers import rows_of_step, run_schedules
from training.settings_reference import add_settings


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", help="YAML file (default: configs/phase1_pretrain.yaml)")
    parser.add_argument("--output_dir", help="default: checkpoints/<run>/<phase>")
    parser.add_argument("--resume_from", help="step or phase folder of an earlier phase")
    parser.add_argument("--init_from", help="model folder whose weights and shape start the run")
    parser.add_argument("--steps", type=int, help="updates in this phase")
    parser.add_argument("--wandb_project", help="Weights & Biases project for the metrics")
    parser.add_argument("--wandb_run_name", help="Weights & Biases run name (default: run)")
    parser.add_argument(
        "--test_mode",
        action="store_true",
        help="train on dummy data (without --config: a tiny model), then check logs and checkpoint",
    )
    parser.add_argument("--profile", action="store_true", help="trace steps 4 to 6")
    add_settings(parser, RunConfig)
    args = parser.parse_intermixed_args()  # overrides may come between flags
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        names = ("output_dir", "resume_from", "init_from", "steps")
        flags = {name: getattr(args, name) for name in names} | {
            "log.wandb_project": args.wandb_project,
            "log.wandb_run_name": args.wandb_run_name,
        }
        default = "configs/test_mode.yaml" if args.test_mode else "configs/phase1_pretrain.yaml"
        test = self_test.overrides(args.steps) if args.test_mode else []
        run = load(args.config or default, test + args.overrides, flags)
        with setup.ranks() as device:
            run_on_rank0(lambda: log_in(run.log))
            status = pretrain(run, rank, world, device, args.test_mode, args.profile)
    setup.exit_process(status)


def pretrain(
    run: RunConfig, rank: int, world: int, device: torch.device, test: bool, profile: bool = False
) -> int:
    """Train one phase on packed token shards. Returns the exit status of training.loop.train."""
    data, vocab = run.data, run.model.vocab_size
    if test:
        run_on_rank0(lambda: self_test.clear(run))
        tokens = 40 * data.tokens_per_step
        run_on_rank0(lambda: write_dummy_store(Path(data.store), vocab, tokens, run.seed))
    tokenizer = open_tokenizer(data.store, vocab, padded=run.init_from is not None)
    shards = open_shards(data.store, data.mix, "train", vocab, data.min_document_tokens)
    batch = (data.sequence_length, rows_of_step(run), data.micro_batch_size, run.seed, rank, world)
    packed = PackedDataLoader(shards, data.mix, *batch, data.packing, data.start_epoch)
    stage = Stage(
        loader=Prefetcher(packed, device),
        objective=next_token(run.optim.z_weight),
        tokenizer=TokenizerFiles(tokenizer.folder, tokenizer.special),
        evaluate=make_evaluate(run, rank, world, torch.from_numpy(tokenizer.token_bytes)),
        make_schedules=partial(run_schedules, by_loader=("batch_tokens",)),
        data_lines=packed.describe(run.steps),
        check=self_test.check if test else None,
    )
    return run_phase(run, device, stage, profile)


def make_evaluate(
    run: RunConfig, rank: int, world: int, token_bytes: torch.Tensor
) -> Evaluate | None:
    """Return the perplexity evaluation; None if validation is off. token_bytes: [vocab]."""
    data, validation = run.data, run.validation
    if not (validation.every or validation.before):
        return None
    size = validation.batch_size or data.micro_batch_size
    shards = open_shards(data.store, data.mix, "val", run.model.vocab_size)
    batches = {
        name: validation_batches(source, data.sequence_length, size, validation.rows, rank, world)
        for name, source in shards.items()
    }
    return partial(
        perplexity, sources=batches, token_bytes=token_bytes, all_reduce_sum=setup.all_reduce_sum
    )


if __name__ == "__main__":
    main()
