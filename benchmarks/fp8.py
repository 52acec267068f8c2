"""Measure the loss gap of float8 matmuls against bf16; benchmarks.train_speed measures the speed.

    python -m benchmarks.fp8 --steps 200 --output benchmarks/results/fp8.json

Both runs use the same model, batches and steps. On a GPU with float8: --layers blocks of the 1.1B
model, in bf16. On a CPU: a tiny model with emulated float8 (rounded to float8, multiplied in fp32).
The text is Python's library, read byte by byte.
"""

import argparse
import statistics
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.side_by_side import machine, modules, write
from cli import CommandParser, int_at_least, user_errors
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.fp8 import convert_to_fp8
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp
from training.optimizers import OptimConfig, build_optimizer

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
)


def text(limit: int = 4_000_000) -> torch.Tensor:
    """Return the bytes of Python's standard library modules."""
    return torch.frombuffer(bytearray(b"".join(modules())[:limit]), dtype=torch.uint8).long()


def train(
    config: ModelConfig, fp8: bool, args: argparse.Namespace, device: torch.device
) -> list[float]:
    """Return the loss of each step, in nats per byte."""
    model = NanoLlama(config, seed=args.seed)
    if fp8:
        converted = convert_to_fp8(model.layers, device, emulate=device.type == "cpu")
        print(
            f"float8{' emulated' if device.type == 'cpu' else ''}: {len(converted)} matrices",
            flush=True,
        )
    model = wrap_model_fsdp(model, ParallelConfig(dtype="bfloat16"), device)
    optimizer = build_optimizer(model, OptimConfig(lr=args.lr))
    source, losses = text(), []
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        indices = torch.randint(
            len(source) - args.length - 1, (args.rows, 1), generator=generator
        ) + torch.arange(args.length + 1)
        tokens = source[indices].to(device)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20) * (1 - step / args.steps)
        loss = model(tokens[:, :-1], tokens[:, 1:]).nll.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = CommandParser(__doc__)
    parser.add_argument("--steps", type=int_at_least(1), default=500 if cuda else 200)
    parser.add_argument(
        "--sequence_length", dest="length", type=int_at_least(1), default=2048 if cuda else 128
    )
    parser.add_argument("--rows", type=int_at_least(1), default=16 if cuda else 8)
    parser.add_argument("--layers", type=int_at_least(1), default=8, help="layers of the GPU model")
    parser.add_argument("--learning_rate", dest="lr", type=float, default=1e-3 if cuda else 3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with user_errors():
        if find_spec("torchao") is None:
            raise ValueError("float8 needs the package torchao: pip install torchao")
    config = replace(ModelConfig(vocab_size=256), num_hidden_layers=args.layers) if cuda else TINY
    with user_errors(), setup.ranks() as device:
        losses = {
            name: train(config, name == "float8", args, device) for name in ("bf16", "float8")
        }
    last = {name: statistics.mean(each[-len(each) // 10 :]) for name, each in losses.items()}
    gap = last["float8"] - last["bf16"]
    share = gap / last["bf16"]
    print(
        f"mean loss of the last tenth: {last['bf16']:.4f} in bf16, {last['float8']:.4f} in float8: "
        f"{gap:+.4f} nats, {share:+.2%}"
    )
    kind = "float8 of the device" if cuda else "emulated: rounded to float8, multiplied in fp32"
    result = {
        "task": "fp8",
        "kind": kind,
        "machine": machine(device, "torchao"),
        "parameters": config.num_parameters,
    }
    write(args.output, result | {"last_tenth": last, "gap": gap, "losses": losses})


if __name__ == "__main__":
    main()
