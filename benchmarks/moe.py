"""Compare training steps with experts: ours, dense of equal active FLOPs, and Mixtral's in HF.

    python -m benchmarks.moe                                  # CPU: a model of 11M parameters
    python -m benchmarks.moe --dtype float32 --rounds 20 --output benchmarks/results/moe_fp32.json

A step is forward, backward, clipping to norm 1 and AdamW. Each step has new random tokens, so the
loads of the experts change. Ours runs as in training (FSDP2 with one rank, balance loss and router
z-loss); transformers' Mixtral computes no router loss, and for bfloat16 runs under autocast. All
models with experts start from equal weights, and their losses of the first step must agree. The
contenders take turns; times are medians over rounds, on a CPU of this process's CPU time.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import machine, median_ms, reason, write
from cli import CommandParser, user_errors
from data.dataloader import Batch, Step
from models.hf import save_hf
from models.moe import MoEConfig
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.config import DataConfig, RunConfig
from training.fsdp_utils import DTYPES, ParallelConfig
from training.loop import backward
from training.objectives import next_token

GOALS = {"ours / transformers": 2.0, "ours / dense": 0.6}
VOCABULARY = 2048
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first losses, relative


def random_batches(rows: int, length: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of random tokens, the same for each contender."""
    generator = torch.Generator().manual_seed(0)
    while True:
        text = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
        yield Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), None).to(device)


def step_of_ours(
    run: RunConfig, batches: Iterator[Batch], device: torch.device
) -> Callable[[], float]:
    """Return a training step of a model of ours; it returns the loss per token."""
    state, tokens = setup.build(run, device), run.data.tokens_per_step

    def step() -> float:
        batch = next(batches)
        sums, _ = backward(run, state.model, Step([batch], tokens, tokens), next_token(0.0))
        state.optimizer.step()
        state.optimizer.zero_grad()
        return float(sums["loss"]) / tokens

    return step


def step_of_mixtral(
    folder: Path, experts: str, batches: Iterator[Batch], dtype: torch.dtype, device: torch.device
) -> Callable[[], float]:
    """Return a training step of transformers' Mixtral. experts: its implementation of them."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    autocast = dtype != torch.float32

    def step() -> float:
        batch = next(batches)
        with torch.autocast(device.type, dtype, enabled=autocast):
            # Mixtral shifts labels itself; targets are the tokens that follow.
            loss: Tensor = model(
                batch.tokens, shift_labels=batch.targets, labels=batch.targets
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return tokens/s of each contender and the ratios."""
    moe = MoEConfig(experts=args.experts, top_k=args.top_k, expert_size=args.expert_size)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=args.top_k * args.expert_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=args.length,
        kind="moe",
        moe=moe,
    )
    dense = replace(config, kind="dense", moe=MoEConfig())
    batches = partial(random_batches, args.rows, args.length, device)
    run = RunConfig(
        model=config,
        data=DataConfig(sequence_length=args.length, tokens_per_step=args.rows * args.length),
        parallel=ParallelConfig(dtype=args.dtype),
    )
    steps = {
        "ours": step_of_ours(run, batches(), device),
        "dense": step_of_ours(replace(run, model=dense), batches(), device),
    }
    skipped = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = NanoLlama(config, seed=run.seed).state_dict()
        save_hf(Path(folder), config, weights, torch.float32)
        for experts in ("eager", "grouped_mm"):
            name = f"transformers, {experts}"
            try:
                dtype = DTYPES[args.dtype]
                steps[name] = step_of_mixtral(Path(folder), experts, batches(), dtype, device)
            except (ImportError, ValueError, TypeError) as error:  # another version
                skipped[name] = reason(error)
    losses = {name: step() for name, step in steps.items()}
    for name, loss in losses.items():
        if name != "dense" and abs(loss / losses["ours"] - 1) > TOLERANCE[args.dtype]:
            raise ValueError(
                f"the first loss of {name} is {loss:.5f}, that of ours {losses['ours']:.5f}"
            )
    times = median_ms(steps, args.rounds, device)  # type: ignore[arg-type]
    speed = {name: 1000 * run.data.tokens_per_step / ms for name, ms in times.items()}
    fastest = max(value for name, value in speed.items() if name.startswith("transformers"))
    ratios = {
        "ours / transformers, eager": speed["ours"] / speed["transformers, eager"],
        "ours / transformers": speed["ours"] / fastest,
        "ours / dense": speed["ours"] / speed["dense"],
    }
    return {
        "parameters": config.num_parameters,
        "active_parameters": config.num_active_parameters,
        "first_loss": losses,
        "tokens_per_s": speed,
        "skipped": skipped,
        "ratios": ratios,
        "goals": GOALS,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    whole = partial(parser.add_argument, type=int)
    whole("--width", default=256)
    whole("--layers", default=4)
    whole("--experts", default=8)
    whole("--top_k", default=2)
    whole("--expert_size", default=384)
    whole("--rows", default=8)
    whole("--sequence_length", dest="length", default=256)
    whole("--rounds", default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on shared cores, threads that wait for each other distort times
    with user_errors(), setup.ranks() as device:
        about = {**machine(device, "transformers"), **vars(args), "output": None}
        result = measure(args, device)
        for name, speed in result["tokens_per_s"].items():
            print(f"{name:<28} {speed:10,.0f} tokens/s")
        for name, ratio in result["ratios"].items():
            goal = f"; goal {GOALS[name]}" if name in GOALS else ""
            print(f"{name:<28} {ratio:10.2f}{goal}")
        write(args.output, about | result)


if __name__ == "__main__":
    main()
