"""Fine-tune a base model on conversations (SFT), or prepare it for them (mid-training).

    python train_sft.py --config configs/quickstart/sft.yaml --base_model checkpoints/quickstart/gold
    torchrun --nproc_per_node=2 train_sft.py --config configs/sft.yaml --base_model checkpoints/nanollama_1b/midtrain

The base is a folder of train.py's, or any Llama or Qwen3 folder of Hugging Face's; it gets the chat tokens and the template.
The same command line again goes on from the newest whole checkpoint. Any setting can be given as section.key=value.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from data.chat.rendering import Chat
from data.chat.sft import ChatConfig, Conversations, describe, prepare
from data.dataloader import PackedDataLoader, Prefetcher, row_batches
from data.tokenizers.bpe import token_bytes
from evals.eval_perplexity import perplexity
from evals.samples import write_samples
from training import setup
from training.checkpoint import whole_weights
from training.distributed import run_on_rank0
from training.objectives import next_token, with_neftune
from training.phase import Stage, run_phase
from training.tuning import TuningRun, parser, start, take_base, with_record


@dataclass(frozen=True)
class SFTConfig(TuningRun):
    """A run on conversations."""

    chat: ChatConfig = field(kw_only=True)


def main() -> None:
    flags = parser(
        __doc__, "configs/sft.yaml", "rows a rank holds at once; a step stays data.tokens_per_step"
    )
    args = flags.parse_intermixed_args()
    counted = None if args.num_steps is None else "null"  # a flag goes before what the config says
    start(
        SFTConfig,
        args,
        {"data.micro_batch_size": args.batch_size, "chat.epochs": counted},
        finetune,
    )


def finetune(
    run: SFTConfig, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """From conversations to checkpoints. Returns the exit status, 0 if complete; it has saved in any case."""
    base = take_base(run, Path(run.chat.cache))
    chat, folder, _, run = base
    check_samples(run, chat)
    data, length = run.data, run.data.sequence_length
    prepared = run_on_rank0(lambda: prepare(run.chat, data.mix, folder, length))
    sources = {name: Conversations(path, "train") for name, path in prepared.items()}
    files = with_record(base, [source.report for source in sources.values()], length)
    shape = (length, data.rows, data.micro_batch_size)
    packed = PackedDataLoader(sources, data.mix, *shape, run.seed, rank, world)
    if run.chat.epochs:
        run = replace(run, steps=ceil(run.chat.epochs * sum(map(len, packed.packed)) / data.rows))
    lines, run, loader = run.schedule_lines(), run.with_schedule(), Prefetcher(packed, device)
    batch_size, rows = run.validation.batch_size or data.micro_batch_size, run.validation.rows
    parts = {name: Conversations(path, "val") for name, path in prepared.items()}
    held_out = {
        name: row_batches(
            kept := part.pack(length, run.seed),
            length,
            batch_size,
            min(rows, len(kept)),
            rank,
            world,
        )
        for name, part in parts.items()
        if part.documents
    }

    def evaluate(model: Any) -> dict[str, dict[str, float]]:
        results = perplexity(model, held_out, bytes_of, setup.all_reduce_sum) if held_out else {}
        places = loader.position
        for name, share in (
            packed.shares(max(0, places - run.validation.every), places) if places else {}
        ).items():
            results.setdefault(name, {})["trained_share"] = share
        if run.chat.samples:
            weights, title = whole_weights(model), f"{run.phase}, place {places}"
            if rank == 0:
                write_samples(
                    run.logs / "samples.md",
                    title,
                    model.config,
                    weights,
                    chat,
                    run.chat.samples,
                    device,
                )
        return results

    known = torch.from_numpy(token_bytes(chat.tokenizer))
    bytes_of = torch.zeros(run.model.vocab_size, dtype=torch.int64)
    bytes_of[: len(known)] = known
    objective = next_token(run.optim.z_weight)
    if run.chat.neftune_alpha:
        objective = with_neftune(objective, run.chat.neftune_alpha, run.seed)
    lines += [line for name, source in sources.items() for line in describe(name, source.report)]
    lines += packed.describe(run.steps)
    measured = evaluate if held_out or run.chat.samples else None
    return run_phase(
        run, device, Stage(loader, objective, files, measured, data_lines=lines), profile
    )


def check_samples(run: SFTConfig, chat: Chat) -> None:
    """ValueError where one of chat.samples cannot be asked, before there is anything to lose."""
    for text in run.chat.samples:
        try:
            used = len(chat.prompt([{"role": "user", "content": text}]))
        except ValueError as error:
            raise ValueError(
                f"chat.samples: {text[:40]!r} cannot be asked ({error}); change it or leave it out"
            ) from None
        if used >= run.model.max_position_embeddings:
            raise ValueError(
                f"chat.samples: {text[:40]!r} leaves no room for a reply: with the template it has {used} tokens of the model's "
                f"{run.model.max_position_embeddings}; shorten it"
            )


if __name__ == "__main__":
    main()
