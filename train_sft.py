"""Fine-tune a base model on conversations (SFT), or prepare it for them (mid-training).

    python train_sft.py --config configs/quickstart/sft.yaml \\
        --base_model checkpoints/quickstart/gold
    torchrun --nproc_per_node=2 train_sft.py --config configs/sft.yaml \\
        --base_model my_run/gold --steps 12000 --batch_size 8 --learning_rate 5e-5

my_run stands for the checkpoints of a larger run. --batch_size has another meaning in train_dpo.py.
The base model is a checkpoint of train.py, or any Llama or Qwen3 folder in Hugging Face format. The
command adds the chat tokens and the chat template. Run the same command again to resume from the
newest complete checkpoint. Set any other setting with section.key=value.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from data.chat.replay import ReplayConfig, add_shares, mixture, open_replay, replay_validation
from data.chat.sft import ChatConfig, Conversations, describe, prepare
from data.dataloader import Batch, PackedDataLoader, Prefetcher, row_batches
from data.tokenizers.bpe import token_bytes
from evals.eval_perplexity import perplexity, replay_figures
from evals.samples import check_samples, write_samples
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
    replay: ReplayConfig | None = None  # pretraining text among the conversations; default: none


def main() -> None:
    batch_size = (
        "rows per rank and micro-batch (data.micro_batch_size); the step keeps "
        "data.tokens_per_step tokens. In train_dpo.py it is the pairs per update"
    )
    args = parser(SFTConfig, __doc__, "configs/sft.yaml", batch_size).parse_intermixed_args()
    epochs = None if args.steps is None else "null"  # --steps overrides chat.epochs
    flags = {"data.micro_batch_size": args.batch_size, "chat.epochs": epochs}
    start(SFTConfig, args, flags, finetune)


def finetune(
    run: SFTConfig, rank: int, world: int, device: torch.device, profile: bool = False
) -> int:
    """Train on conversations. Returns the exit status of training.loop.train."""
    base = open_base(run, Path(run.chat.cache))
    chat, folder, _, run = base
    check_samples(run.chat.samples, chat, run.model.max_position_embeddings)
    data, length = run.data, run.data.sequence_length
    prepared = run_on_rank0(lambda: prepare(run.chat, data.mix, folder, length))
    sources = {name: Conversations(path, "train") for name, path in prepared.items()}
    files = with_record(base, [source.report for source in sources.values()], length)
    shape = (length, data.rows, data.micro_batch_size)
    text = open_replay(run.replay, "train", folder) if run.replay else {}
    mix = mixture(data.mix, run.replay)
    packed = PackedDataLoader({**sources, **text}, mix, *shape, run.seed, rank, world)
    if run.chat.epochs:
        run = replace(run, steps=packed.steps_of_epochs(run.chat.epochs, sources))
    lines, run, loader = run.schedule_lines(), run.with_schedule(), Prefetcher(packed, device)
    batch_size, rows = run.validation.batch_size or data.micro_batch_size, run.validation.rows
    batches = {}
    for name, path in prepared.items():
        if (split := Conversations(path, "val")).documents:
            packed_rows = split.pack(length, run.seed)
            count = min(rows, len(packed_rows))
            batches[name] = row_batches(packed_rows, length, batch_size, count, rank, world)
    text_batches: dict[str, list[Batch]] = {}
    if run.replay:
        text_batches, text_lines = replay_validation(
            run.replay, folder, length, batch_size, rows, rank, world
        )
        lines += [f"replayed text is {run.replay.share:.1%} of the trained tokens", *text_lines]
    token_sizes = torch.from_numpy(token_bytes(chat.tokenizer, run.model.vocab_size))

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        assert isinstance(model, NanoLlama)
        results = perplexity(model, batches, token_sizes, setup.all_reduce_sum) if batches else {}
        if text_batches:  # separate: "all" averages over the conversations only
            results |= replay_figures(model, text_batches, token_sizes, setup.all_reduce_sum)
        if end := loader.position:
            add_shares(results, packed.shares(max(0, end - run.validation.every), end), text)
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
        evaluate=evaluate if batches or text_batches or run.chat.samples else None,
        data_lines=lines,
    )
    return run_phase(run, device, stage, profile)


if __name__ == "__main__":
    main()
