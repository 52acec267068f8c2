"""Fine-tune a base model on conversations (SFT), or prepare it for them (mid-training).

    python train_sft.py --config configs/quickstart/sft.yaml \\
        --base_model checkpoints/quickstart/gold
    torchrun --nproc_per_node=2 train_sft.py --config configs/sft.yaml \\
        --base_model checkpoints/nanollama_1b/midtrain

The base model is a checkpoint of train.py, or any Llama or Qwen3 folder in Hugging Face format. It
gets the chat tokens and the chat template. Run the same command again to resume from the newest
complete checkpoint. Set any other setting with section.key=value.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

import torch
from torch import nn

from data.chat.rendering import Chat
from data.chat.sft import ChatConfig, Conversations, describe, prepare
from data.dataloader import PackedDataLoader, Prefetcher, row_batches
from data.tokenizers.bpe import token_bytes
from evals.eval_perplexity import perplexity
from evals.samples import write_samples
from models.nanollama import NanoLlama
from training import setup
from training.checkpoint import full_state_dict
from training.distributed import run_on_rank0
from training.fine_tuning import TuningRun, open_base, parser, start, with_record
from training.objectives import next_token, with_neftune
from training.phase import Stage, run_phase


@dataclass(frozen=True)
class SFTConfig(TuningRun):
    """Config of a run on conversations."""

    chat: ChatConfig = field(kw_only=True)


def main() -> None:
    batch_size = "rows per rank and micro-batch; the step keeps data.tokens_per_step tokens"
    args = parser(__doc__, "configs/sft.yaml", batch_size).parse_intermixed_args()
    epochs = None if args.num_steps is None else "null"  # --num_steps overrides chat.epochs
    flags = {"data.micro_batch_size": args.batch_size, "chat.epochs": epochs}
    start(SFTConfig, args, flags, finetune)


def finetune(
    run: SFTConfig, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """Train on conversations. Returns the exit status of training.loop.train."""
    base = open_base(run, Path(run.chat.cache))
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
    batches = {}
    for name, path in prepared.items():
        if (split := Conversations(path, "val")).documents:
            packed_rows = split.pack(length, run.seed)
            count = min(rows, len(packed_rows))
            batches[name] = row_batches(packed_rows, length, batch_size, count, rank, world)
    token_sizes = torch.zeros(run.model.vocab_size, dtype=torch.int64)  # bytes; 0 for padding rows
    sizes = torch.from_numpy(token_bytes(chat.tokenizer))
    token_sizes[: len(sizes)] = sizes

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        assert isinstance(model, NanoLlama)
        results = perplexity(model, batches, token_sizes, setup.all_reduce_sum) if batches else {}
        if end := loader.position:
            begin = max(0, end - run.validation.every)
            for name, share in packed.shares(begin, end).items():
                results.setdefault(name, {})["trained_share"] = share
        if run.chat.samples:
            weights, title = full_state_dict(model), f"{run.phase}, batch {end}"
            if rank == 0:
                path, prompts = run.logs / "samples.md", run.chat.samples
                write_samples(path, title, model.config, weights, chat, prompts, device)
        return results

    objective = next_token(run.optim.z_weight)
    if run.chat.neftune_alpha:
        objective = with_neftune(objective, run.chat.neftune_alpha, run.seed)
    lines += [line for name, source in sources.items() for line in describe(name, source.report)]
    lines += packed.describe(run.steps)
    stage = Stage(
        loader=loader,
        objective=objective,
        tokenizer=files,
        evaluate=evaluate if batches or run.chat.samples else None,
        data_lines=lines,
    )
    return run_phase(run, device, stage, profile)


def check_samples(run: SFTConfig, chat: Chat) -> None:
    """ValueError if a prompt of chat.samples does not fit the template or the context."""
    context = run.model.max_position_embeddings
    for text in run.chat.samples:
        try:
            tokens = len(chat.prompt([{"role": "user", "content": text}]))
        except ValueError as error:
            raise ValueError(
                f"chat.samples: invalid prompt {text[:40]!r} ({error}); change or remove it"
            ) from None
        if tokens >= context:
            raise ValueError(
                f"chat.samples: {text[:40]!r} leaves no room for a reply: {tokens} tokens with "
                f"the template, context {context}; shorten it"
            )


if __name__ == "__main__":
    main()
