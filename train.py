"""Pretrain one phase.

    python train.py --config configs/quickstart/base.yaml                       # one process
    torchrun --nproc_per_node=2 train.py --config configs/phase1_pretrain.yaml  # two GPUs, or two CPU processes
    torchrun --nproc_per_node=2 train.py --test_mode --steps 1000               # dummy data: does this machine train?
    accelerate launch --multi_gpu --num_processes 2 train.py --config configs/phase1_pretrain.yaml     # the same as torchrun

The same command line again goes on from the newest whole checkpoint. Any setting can be given as section.key=value.
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
from training.ops import self_test as selftest
from training.phase import Stage, TokenizerFiles, run_phase


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config",
        help="YAML file (default: the 1.1B model's first phase; with --test_mode a tiny model)",
    )
    parser.add_argument(
        "--output_dir", help="where step_N folders go (default: checkpoints/<run>/<phase>)"
    )
    parser.add_argument(
        "--resume_from", help="a step folder or phase folder of an earlier phase to go on from"
    )
    parser.add_argument("--steps", type=int, help="updates in this phase")
    parser.add_argument("--wandb_project", help="send metrics to this Weights & Biases project")
    parser.add_argument("--wandb_run_name", help="name of the run there (default: the run's)")
    parser.add_argument(
        "--test_mode",
        action="store_true",
        help="train on dummy data and check that everything works",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace steps 4 to 6 from here into logs/<run>/profile/",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any other setting of the config"
    )
    args = parser.parse_intermixed_args()  # settings may stand between flags
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        flags = {
            "output_dir": args.output_dir,
            "resume_from": args.resume_from,
            "steps": args.steps,
            "log.wandb_project": args.wandb_project,
            "log.wandb_run_name": args.wandb_run_name,
        }
        default = "configs/test_mode.yaml" if args.test_mode else "configs/phase1_pretrain.yaml"
        test = selftest.overrides(args.steps) if args.test_mode else []
        run = load(args.config or default, test + args.overrides, flags)
        with setup.ranks() as device:
            run_on_rank0(lambda: log_in(run.log))
            status = pretrain(run, rank, world, device, args.test_mode, args.profile)
    setup.exit_process(status)


def pretrain(
    run: RunConfig, rank: int, world: int, device: torch.device, test: bool, profile: bool = False
) -> int:
    """One phase from data to checkpoints. Returns the exit status, 0 if it is complete; it has saved in any case."""
    data, vocab = run.data, run.model.vocab_size
    if test:
        run_on_rank0(lambda: selftest.clear(run))
        run_on_rank0(
            lambda: write_dummy_store(Path(data.store), vocab, 40 * data.tokens_per_step, run.seed)
        )
    tokenizer = open_tokenizer(data.store, vocab)
    shards = open_shards(data.store, data.mix, "train", vocab, data.min_document_tokens)
    shape = (data.sequence_length, data.rows, data.micro_batch_size)
    packed = PackedDataLoader(shards, data.mix, *shape, run.seed, rank, world, data.packing)
    batch_size = run.validation.batch_size or data.micro_batch_size
    measured = run.validation.every or run.validation.before
    held_out = {
        name: validation_batches(
            part, data.sequence_length, batch_size, run.validation.rows, rank, world
        )
        for name, part in (
            open_shards(data.store, data.mix, "val", vocab) if measured else {}
        ).items()
    }
    bytes_of = torch.from_numpy(tokenizer.bytes_of)
    evaluate = (
        partial(perplexity, sources=held_out, bytes_of=bytes_of, total=setup.all_reduce_sum)
        if measured
        else None
    )
    stage = Stage(
        loader=Prefetcher(packed, device),
        objective=next_token(run.optim.z_weight),
        tokenizer=TokenizerFiles(tokenizer.folder, tokenizer.special),
        evaluate=evaluate,
        data_lines=packed.describe(run.steps),
        check=selftest.check if test else None,
    )
    return run_phase(run, device, stage, profile)


if __name__ == "__main__":
    main()
