"""Fine-tune a base model on conversations (SFT), or prepare it for them (mid-training).

    python train_sft.py --config configs/quickstart/sft.yaml --base_model checkpoints/quickstart/gold
    torchrun --nproc_per_node=2 train_sft.py --config configs/sft.yaml --base_model checkpoints/nanollama_1b/midtrain

The base is a folder of train.py's, or any Llama or Qwen3 folder of Hugging Face's; it gets the chat tokens and the template.
The same command line again goes on from the newest whole checkpoint. Any setting can be given as section.key=value.
"""

import argparse
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from data.chat import Chat
from data.chat_tokenizer import keep_chat_tokenizer
from data.dataloader import PackedDataLoader, Prefetcher, row_batches
from data.sft import ChatConfig, Conversations, describe, prepare
from data.tokenizer import load_tokenizer, token_bytes
from entrypoint import user_errors
from evals.eval_perplexity import perplexity
from evals.samples import write_samples
from models.hf import read_hf_config
from training import setup
from training.checkpoint import on_main, whole_weights
from training.config import RunConfig
from training.objectives import next_token, with_neftune
from training.phase import TokenizerFiles, run_phase
from training.settings import load_settings


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """A run on conversations. The model is that of the base, init_from; the learning rate decays from warm-up to the end."""

    chat: ChatConfig = field(kw_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/sft.yaml", help="YAML file")
    parser.add_argument("--base_model", help="a step folder, a phase folder or a Hugging Face folder to start from")
    parser.add_argument("--output_dir", help="where step_N folders go (default: checkpoints/<run>/<phase>)")
    parser.add_argument("--num_steps", type=int, help="updates")
    parser.add_argument("--batch_size", type=int, help="rows a rank holds at once; a step stays data.tokens_per_step")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--wandb_project", help="send metrics to this Weights & Biases project")
    parser.add_argument("--profile", action="store_true", help="trace steps 4 to 6 from here into logs/<run>/profile/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any other setting of the config")
    args = parser.parse_intermixed_args()
    flags = {
        "init_from": args.base_model,
        "output_dir": args.output_dir,
        "steps": args.num_steps,
        "data.micro_batch_size": args.batch_size,
        "optim.lr": args.learning_rate,
        "log.wandb_project": args.wandb_project,
    }
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        given = [f"{key}={value}" for key, value in flags.items() if value is not None]
        any_length = "model.max_position_embeddings=1000000000"  # until the base's is known
        run = load_settings(SFTConfig, args.config, [any_length, *args.overrides, *given])
        with setup.ranks() as device:
            finished = finetune(run, rank, world, device, args.profile)
    setup.leave(0 if finished else 143)


def finetune(run: SFTConfig, rank: int, world: int, device: torch.device, profile: bool = False) -> bool:
    """From conversations to checkpoints. False if a signal stopped it; it has saved then."""
    if not run.init_from:
        raise ValueError("there is no model to start from; give --base_model")
    base = on_main(lambda: setup.find_checkpoint(Path(str(run.init_from)), required=True))
    assert base
    folder = on_main(lambda: keep_chat_tokenizer(base, Path(run.chat.cache)))
    chat, config = Chat.from_folder(folder), read_hf_config(base)
    known, tokens = load_tokenizer(base).get_vocab_size(), chat.tokenizer.get_vocab_size()
    model = replace(config, vocab_size=max(config.vocab_size, tokens))
    run = replace(run, model=model, init_from=str(base))
    data, length = run.data, run.data.sequence_length
    prepared = on_main(lambda: prepare(run.chat, data.mix, folder, length))
    sources = {name: Conversations(path, "train") for name, path in prepared.items()}
    shape = (length, data.rows, data.micro_batch_size)
    packed = PackedDataLoader(sources, data.mix, *shape, run.seed, rank, world)
    if run.chat.epochs:
        run = replace(run, steps=ceil(run.chat.epochs * sum(map(len, packed.packed)) / data.rows))
    warmup = min(run.schedule.warmup_steps, run.steps // 10)
    schedule = replace(run.schedule, warmup_steps=warmup, total_steps=run.steps, decay_steps=run.steps - warmup)
    run, loader = replace(run, schedule=schedule), Prefetcher(packed, device)
    batch_size, rows = run.validation.batch_size or data.micro_batch_size, run.validation.rows
    parts = {name: Conversations(path, "val") for name, path in prepared.items()}
    held_out = {
        name: row_batches(kept := part.pack(length, run.seed), length, batch_size, min(rows, len(kept)), rank, world)
        for name, part in parts.items()
        if part.documents
    }

    def evaluate(model: Any) -> dict[str, dict[str, float]]:
        results = perplexity(model, held_out, bytes_of, setup.add_up)
        places = loader.ahead[0] if loader.ahead else 0  # read so far
        for name, share in packed.shares(max(0, places - run.validation.every), places).items():
            results.setdefault(name, {})["trained_share"] = share
        if run.chat.samples:
            weights, title = whole_weights(model), f"{run.phase}, place {places}"
            if rank == 0:
                write_samples(run.logs / "samples.md", title, model.config, weights, chat, run.chat.samples, device)
        return results

    bytes_of = torch.zeros(model.vocab_size, dtype=torch.int64)
    bytes_of[:tokens] = torch.from_numpy(token_bytes(chat.tokenizer))
    objective = next_token(run.optim.z_weight)
    if run.chat.neftune_alpha:
        objective = with_neftune(objective, run.chat.neftune_alpha, run.seed)
    files = TokenizerFiles(folder, chat.config_ids, known if tokens > known else None)
    lines = [line for name, source in sources.items() for line in describe(name, source.report)] + packed.describe(run.steps)
    return run_phase(run, device, loader, objective, evaluate if held_out else None, files, lines, profile)


if __name__ == "__main__":
    main()
