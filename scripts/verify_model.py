"""Check that the model learns: overfit one random batch in 100 steps, to a loss of 0.01.

python -m scripts.verify_model                                # a tiny model, seconds on a CPU
python -m scripts.verify_model --config configs/base_1b.yaml  # the 1.1B model, on a GPU
"""

import torch

from cli import CommandParser, int_at_least, user_errors
from machine import add_device
from models.losses import token_loss_sum
from models.nanollama import NanoLlama
from training.config import load
from training.optimizers import build_optimizer

TARGET = 0.01


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", default="configs/test_mode.yaml")
    parser.add_argument("--steps", type=int_at_least(1), default=100)
    add_device(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()  # overrides may come between flags
    with user_errors():
        run = load(args.config, args.overrides)
        model = NanoLlama(run.model, seed=run.seed).to(args.device)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, expected {run.model.num_parameters:,}")
        loss = overfit(model, run, args.steps)
        verdict = "ok" if loss <= TARGET else f"FAILED, the target is {TARGET}"
        print(f"loss {loss:.4f} after {args.steps} steps: {verdict}")
    raise SystemExit(0 if loss <= TARGET else 1)


def overfit(model: NanoLlama, run, steps: int) -> float:
    """Train on one batch of random tokens, at most [4, 64]; return the last loss.

    The rows start with different tokens, so every next token is predictable.
    """
    optimizer = build_optimizer(model, run.optim)
    generator = torch.Generator().manual_seed(run.seed)
    length = min(64, run.model.max_position_embeddings)
    batch = torch.randint(run.model.vocab_size, (4, length + 1), generator=generator).to(
        next(model.parameters()).device
    )
    batch[:, 0] = torch.arange(4)
    for step in range(steps):
        losses = model(batch[:, :-1], batch[:, 1:])
        loss, sums = token_loss_sum(losses, run.optim.z_weight)
        optimizer.zero_grad()
        (loss / losses.nll.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.optim.lr * min(1.0, (step + 1) / 10)
        optimizer.step()
        value = sums["loss"].item() / losses.nll.numel()
        if step % 10 == 9:
            print(f"step {step + 1:>4}  loss {value:.4f}")
    return value


if __name__ == "__main__":
    main()
