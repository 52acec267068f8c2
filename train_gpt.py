"""Train GPT-2 124M on .bin shards as fast as possible: the nanoGPT speedrun.

    python train_gpt.py --config configs/speedrun/00_baseline.yaml
    torchrun --nproc_per_node=8 train_gpt.py                       # the newest rung of the ladder
    ./run.sh --config configs/speedrun/miniature/00_baseline.yaml  # all GPUs, or this CPU

Any number of GPUs that divides the batch trains the same steps. Run the same command again to
resume. Set any other setting with section.key=value.
"""

from functools import partial

import torch

from cli import CommandParser, user_errors
from data.bin_loader import BinLoader, BinValidation
from data.bin_shards import BinShards, bin_token_bytes
from data.dataloader import Prefetcher
from evals.eval_perplexity import perplexity
from training import setup
from training.curves import OF_LOADER
from training.distributed import run_on_rank0
from training.logger import log_in
from training.objectives import next_token
from training.phase import Evaluate, Stage, TokenizerFiles, run_phase
from training.schedulers import of_step, run_schedules
from training.settings import load_settings
from training.settings_reference import add_settings
from training.speedrun import SpeedrunRun, check_target, tokenizer_folder


def main(about: str | None = __doc__, config: str = "configs/speedrun/current.yaml") -> None:
    parser = CommandParser(about)
    parser.add_argument("--config", default=config, help=f"YAML file (default: {config})")
    parser.add_argument("--name", help="name of the run: logs/NAME, checkpoints/NAME")
    parser.add_argument("--steps", type=int, help="updates")
    parser.add_argument("--profile", action="store_true", help="trace steps 4 to 6")
    parser.add_argument("--wandb_project", help="Weights & Biases project for the metrics")
    add_settings(parser, SpeedrunRun)
    args = parser.parse_intermixed_args()  # overrides may stand between flags
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        flags = {
            "run": args.name,
            "steps": args.steps,
            "log.wandb_project": args.wandb_project,
        }
        run = load_settings(SpeedrunRun, args.config, args.overrides, flags)
        with setup.ranks() as device:
            run_on_rank0(lambda: log_in(run.log))
            status = speedrun(run, rank, world, device, args.profile)
    setup.exit_process(status)


def speedrun(
    run: SpeedrunRun, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """Train one run on .bin shards. Returns the exit status of training.loop.train."""
    data, vocab = run.data, run.model.vocab_size
    loader = BinLoader(
        BinShards(data.train, vocab, data.bos_token),
        tokens=of_step(run, "batch_tokens", data.tokens_per_step),
        length=of_step(run, "sequence_length", data.sequence_length),
        rank=rank,
        world=world,
        micro_batch_tokens=data.micro_batch_size * data.sequence_length,
        alignment=data.alignment,
        max_document=data.max_document,
        document_mask=data.document_mask,
    )
    stage = Stage(
        loader=Prefetcher(loader, device),
        objective=next_token(run.optim.z_weight),
        tokenizer=TokenizerFiles(tokenizer_folder(run), {"bos_token_id": data.bos_token}),
        evaluate=make_evaluate(run, rank, world),
        make_schedules=partial(run_schedules, by_loader=OF_LOADER),
        data_lines=loader.describe(run.steps),
        check=check_target,
    )
    return run_phase(run, device, stage, profile)


def make_evaluate(run: SpeedrunRun, rank: int, world: int) -> Evaluate | None:
    """Return the evaluation of validation loss; None if validation is off.

    It adds bits per byte if the tokenizer is beside the shards.
    """
    data, validation, vocab = run.data, run.validation, run.model.vocab_size
    if not (validation.every or validation.before):
        return None
    length = validation.sequence_length or data.sequence_length
    rows = validation.batch_size or max(1, data.micro_batch_size * data.sequence_length // length)
    shards = BinShards(data.val, vocab, data.bos_token)
    batches = BinValidation(
        shards, validation.tokens, length, rows, rank, world, data.document_mask
    )
    folder = tokenizer_folder(run)
    known = None if folder is None else bin_token_bytes(folder.parent, vocab)
    token_bytes = torch.zeros(vocab, dtype=torch.int64)
    if known is not None:
        token_bytes = torch.from_numpy(known)

    def evaluate(model: torch.nn.Module) -> dict[str, dict[str, float]]:
        results = perplexity(model, {"all": batches}, token_bytes, setup.all_reduce_sum)
        if known is None:
            del results["all"]["bits_per_byte"]
        return results

    return evaluate


if __name__ == "__main__":
    main()
