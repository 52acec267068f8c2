"""Check each GPU path against the same computation in fp32 without a GPU's kernels.

    python -m benchmarks.gpu_paths --output results/gpu/paths.json

- loss head: every softcap, padding, two targets and float8, compiled, against cross-entropy in
  double precision.
- Newton-Schulz in bfloat16: the cosine to the polar factor.
- the speedrun model with its tricks: loss and gradients, compiled, in bfloat16, each attention
  kernel, against fp32 on the CPU.
- the grouped matrix product of experts in bfloat16 with its gradients, one expert idle.
- one FSDP step of that model with Muon, against fp32 on the CPU.
The attention kernels alone are checked by tests/test_attention.py, which needs a GPU for them. A
path that this machine lacks is reported as not measured. Exit status 1 if an error exceeds its
limit.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.side_by_side import machine, reason, write
from cli import CommandParser, user_errors
from models.losses import SOFTCAPS, LossHead, token_losses
from models.moe import grouped_linear
from models.speedrun_config import GPTConfig
from models.speedrun_gpt import SpeedrunGPT
from training import setup
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp
from training.muon import COEFFICIENTS, orthogonalize
from training.optimizers import OptimConfig, build_optimizer

BF16, FP8 = 3e-2, 0.15  # limits: difference of two tensors / norm of the exact one
Check = tuple[str, Callable[[], float], float]  # name, error, limit
TRICKS = GPTConfig(
    vocab_size=500,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
    **{"positions": "rotary", "rope_fraction": 0.5, "yarn": True, "norm": "rmsnorm"},
    **{"norm_gains": False, "biases": False, "activation": "relu2", "qk_norm": True},
    **{"tie_word_embeddings": False, "vocab_multiple": 128, "softcap": 15.0},
    **{"embedding_norm": True, "attention_scale": 0.12, "attention_gate": True},
    **{"merged_qkv": True, "key_offset": True, "window_pattern": "SL", "paired_head_layers": (2,)},
    **{"long_window": 128, "short_window": 64, "embedding_skips": True, "value_residual": True},
    **{"unet_skips": True, "value_embeddings": (0, -1, -1, 0), "smear": True, "backout_layer": 2},
    **{"bigram_vocab_size": 256, "bigram_signs": True, "multi_token_weights": (1.0, 0.5)},
)


def difference(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors, by norm."""
    pairs = [
        (a.detach().cpu().double(), b.detach().double()) for a, b in zip(actual, exact, strict=True)
    ]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def head_error(head: LossHead, device: torch.device, compiled: bool) -> float:
    """Return the error of loss and gradients of the chunked loss head, with two targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 512, 256, generator=generator)
    weight = torch.randn(512, 256, generator=generator) / 4
    targets, weights = torch.randint(500, (4, 512, 2), generator=generator), (1.0, 0.5)

    h, w = (x.to(torch.bfloat16).double().requires_grad_() for x in (hidden, weight))
    logits = head.cap(F.linear(h, w)[..., :500])
    terms = [F.cross_entropy(logits.flatten(0, 1), targets[..., k].flatten()) for k in range(2)]
    exact_loss = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    exact = [exact_loss.detach(), *torch.autograd.grad(exact_loss, (h, w))]

    h, w = (x.to(device, torch.bfloat16).requires_grad_() for x in (hidden, weight))
    losses = token_losses(
        h, w, targets.to(device), 1024, compiled, head=head, target_weights=weights
    )
    loss = losses.nll.mean()
    return difference([loss, *torch.autograd.grad(loss, (h, w))], exact)


def muon_error(name: str, device: torch.device) -> float:
    """Return 1 - cosine of the orthogonalized matrix and the polar factor, the worst of four."""
    worst = 0.0
    for rows, columns in ((256, 256), (256, 1024), (1024, 256), (768, 3072)):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        update = orthogonalize(matrix[None].to(device, torch.bfloat16), COEFFICIENTS[name])[0]
        cosine = F.cosine_similarity(update.cpu().double().flatten(), (u @ v).flatten(), dim=0)
        worst = max(worst, 1 - float(cosine))
    return worst


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and doc_ids [2, 256] of three documents a row."""
    tokens = torch.randint(500, (2, 257), generator=torch.Generator().manual_seed(0))
    doc_ids = (torch.arange(256) // 100).int().expand(2, -1).contiguous()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), doc_ids


def randomized(config: GPTConfig) -> SpeedrunGPT:
    """Return a model without zeros among its weights, so that each has an effect."""
    model, generator = SpeedrunGPT(config, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: nn.Module, device: torch.device) -> list[Tensor]:
    tokens, targets, doc_ids = (x.to(device) for x in example())
    loss = model(tokens, targets, doc_ids).nll.mean()
    return [loss, *torch.autograd.grad(loss, [*model.parameters()])]


def model_error(kernel: str, fp8: bool, device: torch.device, compiled: bool) -> float:
    """Return the error of loss and all gradients together, in bfloat16."""
    config = replace(TRICKS, fp8_head=fp8)
    exact = gradients(randomized(TRICKS), torch.device("cpu"))
    model = randomized(config).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.attention, model.compile_head = kernel, compiled
    for block in model.layers if compiled else ():
        block.compile(fullgraph=True)
    actual = gradients(model, device)
    together = [torch.cat([x.flatten().cpu().float() for x in xs[1:]]) for xs in (actual, exact)]
    return difference([actual[0], together[0]], [exact[0], together[1]])


def experts_error(device: torch.device) -> float:
    """Return the error of output and gradients of four experts' products in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, weight, slope = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((96, 64), (4, 48, 64), (96, 48))
    )
    offsets = torch.tensor([40, 40, 41, 96], dtype=torch.int32)
    results = []
    for where, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float64)):
        inputs = [tensor.to(where, dtype).requires_grad_() for tensor in (x, weight)]
        out = grouped_linear(*inputs, offsets.to(where))
        results.append([out, *torch.autograd.grad(out, inputs, slope.to(where, dtype))])
    return difference(*results)


def step_error(device: torch.device) -> float:
    """Return the error of the weights' change in one FSDP step with Muon, bf16 against fp32."""
    optim = OptimConfig(name="muon", lr=0.01, normuon_beta2=0.95, cautious_decay=True)
    changes = []
    for where, dtype in ((device, "bfloat16"), (torch.device("cpu"), "float32")):
        model = randomized(TRICKS)
        before = deepcopy([*model.parameters()])
        if where == device:
            wrap_model_fsdp(model, ParallelConfig(dtype=dtype), device)
        optimizer = build_optimizer(model, optim)
        tokens, targets, doc_ids = (x.to(where) for x in example())
        model(tokens, targets, doc_ids).nll.mean().backward()
        optimizer.step()
        after = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
        matrices = zip(after, before, strict=True)
        moved = [(a.detach().cpu() - b.detach()).flatten() for a, b in matrices if b.ndim == 3]
        changes.append(torch.cat(moved))
    return 1 - float(F.cosine_similarity(changes[0], changes[1], dim=0))


def checks(device: torch.device, compiled: bool) -> Iterator[Check]:
    """Yield the checks; compiled: with torch.compile where training uses it."""
    cuda = device.type == "cuda"
    for kind in ("none", *SOFTCAPS):
        head = LossHead(0.0 if kind == "none" else 15.0, "tanh" if kind == "none" else kind, 500)
        yield (
            f"loss head, softcap {kind}",
            lambda head=head: head_error(head, device, compiled),
            BF16,
        )
        if cuda:
            head = head._replace(fp8=True)
            yield (
                f"loss head, softcap {kind}, fp8",
                lambda h=head: head_error(h, device, compiled),
                FP8,
            )
    for name, limit in (("quintic", 0.03), ("polar_express", 0.015), ("quintic12", 0.015)):
        yield f"Newton-Schulz, {name}", lambda name=name: muon_error(name, device), limit
    for kernel in ("flex", "varlen", "flash") if cuda else ("sdpa", "blocks"):
        yield (
            f"model, {kernel}",
            lambda kernel=kernel: model_error(kernel, False, device, compiled),
            5e-2,
        )
    if cuda:
        yield "model, flex, fp8 head", lambda: model_error("flex", True, device, compiled), FP8
    yield "grouped products of experts", lambda: experts_error(device), BF16
    yield "FSDP step with Muon", lambda: step_error(device), 5e-2


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with user_errors(), setup.ranks() as device:
        result = {"task": "gpu_paths", "machine": machine(device), "rows": rows}
        for name, measure, limit in checks(device, not args.eager):
            row: dict[str, object] = {"path": name, "limit": limit}
            rows.append(row)
            try:
                row["error"] = error = measure()
                row["ok"] = error <= limit
                text = f"error {error:.1e}, limit {limit:g}{'' if row['ok'] else ': FAILED'}"
            except Exception as problem:  # not installed or unsupported: reported in the row
                row["not measured"] = reason(problem)
                text = f"not measured: {row['not measured']}"
            print(f"{name:<32} {text}", flush=True)
            write(args.output, result)  # after each path, in case the time runs out
    raise SystemExit(int(any(row.get("ok") is False for row in rows)))


if __name__ == "__main__":
    main()
