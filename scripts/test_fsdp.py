"""Check that sharded training equals single-process training on the same global batches.

    torchrun --nproc_per_node=2 scripts/test_fsdp.py

Each rank also trains the full model in plain PyTorch (no FSDP, one backward, mean over all
targets). Loss, gradient norm and every weight must agree after each step: for zero2, zero3, ddp
and, with four or more ranks, HSDP; with and without gradient accumulation; with AdamW and Muon; and
for a mixture of experts, gathered or divided among the ranks.
The settings used on GPUs (bf16, torch.compile if a compiler exists, each kind of activation
checkpointing) must match the fp32 run within bf16 rounding.
"""

import os
import shutil
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from cli import CommandParser, user_errors
from data.dataloader import Batch, Step
from models.losses import IGNORE
from models.moe import MoEConfig
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.checkpoint import full_state_dict
from training.config import DataConfig, RunConfig
from training.fsdp_utils import ParallelConfig
from training.loop import backward, reduce
from training.objectives import next_token
from training.optimizers import OptimConfig, build_optimizer

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
# Without router losses, which the plain training omits.
MIXTURE = replace(MODEL, kind="moe", moe=MoEConfig(experts=8, balance="none", z_weight=0.0))
STEPS, ROWS, LENGTH, TOLERANCE = 4, 8, 48, 2e-5
ROUGH = (1e-2, 1e-2, 1e-3)  # bounds in bf16: loss, gradient norm, weights
ROUGH_EXPERTS = (1e-2, 1e-2, 5e-3)  # rounding also changes some tokens' experts


def global_batch(step: int) -> Batch:
    """Return [ROWS, LENGTH] random tokens with documents and unevenly ignored targets.

    On such a batch, a mean of micro-batch means differs from the mean.
    """
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    targets = text[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row * LENGTH // ROWS] = IGNORE
    doc_ids = (
        (torch.rand(ROWS, LENGTH, generator=generator) < 0.1).int().cumsum(1, dtype=torch.int32)
    )
    return Batch(text[:, :-1].contiguous(), targets, doc_ids)


def train_alone(
    config: ModelConfig, optim: OptimConfig, device: torch.device
) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """Return loss, gradient norm and weights after each step of plain training."""
    model = NanoLlama(config, seed=0).to(device)
    optimizer = build_optimizer(model, optim)
    trace = []
    for step in range(STEPS):
        batch = global_batch(step).to(device)
        logits = model(batch.tokens, doc_ids=batch.doc_ids)
        valid = batch.targets != IGNORE
        ce = torch.nn.functional.cross_entropy(logits[valid], batch.targets[valid])
        (ce + optim.z_weight * logits[valid].logsumexp(-1).square().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        trace.append((ce.item(), norm.item(), weights))
    return trace


def train_sharded(
    run: RunConfig, micro: int, device: torch.device
) -> list[tuple[float, float, dict[str, torch.Tensor]]]:
    """Return the same trace with FSDP over all ranks, in micro-batches of `micro` rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state = setup.build(run, device, seed=0)
    trace = []
    for step in range(STEPS):
        batch = global_batch(step)
        tensors = [field for field in batch[:3] if field is not None]
        local = [tensor.chunk(world)[rank].split(micro) for tensor in tensors]
        pieces = [Batch(*fields).to(device) for fields in zip(*local, strict=True)]
        weight = int((batch.targets != IGNORE).sum())
        sums, norm = backward(
            run,
            state.model,
            Step(pieces, weight, batch.tokens.numel()),
            next_token(run.optim.z_weight),
        )
        means, *_ = reduce(sums, weight)
        state.optimizer.step()
        state.optimizer.zero_grad()
        # clone: full_state_dict may return the live tensors
        weights = {name: value.clone() for name, value in full_state_dict(state.model).items()}
        trace.append((means["loss"], norm, weights))
    return trace


def compare(device: torch.device) -> bool:
    """Return True if every configuration agrees; rank 0 prints a line for each. Collective."""
    world = dist.get_world_size()
    adamw = OptimConfig(lr=3e-3, z_weight=1e-2)
    muon = replace(adamw, name="muon")
    traces = {
        (model.kind, optim.name): train_alone(model, optim, device)
        for model in (MODEL, MIXTURE)
        for optim in (adamw, muon)
    }
    all_agree = True

    def check(
        parallel: ParallelConfig,
        micro: int,
        name: str,
        bounds: tuple[float, float, float],
        optim: OptimConfig = adamw,
        model: ModelConfig = MODEL,
    ) -> None:
        nonlocal all_agree
        expected = traces[model.kind, optim.name]
        data = DataConfig(
            sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH, micro_batch_size=micro
        )
        run = RunConfig(model=model, data=data, optim=optim, parallel=parallel)
        worst = [0.0, 0.0, 0.0]
        for (loss, norm, weights), (loss0, norm0, weights0) in zip(
            train_sharded(run, micro, device), expected, strict=True
        ):
            weight_error = max(
                (distance(weights[n], weights0[n], parallel.dtype) for n in weights), default=0.0
            )
            worst = [
                max(a, b)
                for a, b in zip(
                    worst, (abs(loss - loss0), abs(norm - norm0), weight_error), strict=True
                )
            ]
        failed = any(not value <= bound for value, bound in zip(worst, bounds, strict=True))
        ok = setup.all_reduce_sum(torch.tensor(float(failed))).item() == 0
        all_agree &= ok
        if dist.get_rank() == 0:
            figures = "loss {:.1e}, gradient norm {:.1e}, weights {:.1e}".format(*worst)
            print(
                f"{'ok    ' if ok else 'FAILED'}  {world} ranks, {name}, micro-batch {micro}: "
                f"differences: {figures}",
                flush=True,
            )

    exact = [
        ParallelConfig(strategy=strategy, dtype="float32", compile=False)
        for strategy in ("zero2", "zero3", "ddp")
    ]
    if world % 2 == 0 and world > 2:
        exact += [replace(parallel, replicas=2) for parallel in exact[:2]]
    for parallel in exact:
        name = parallel.strategy + (
            f" x {parallel.replicas} replicas" if parallel.replicas > 1 else ""
        )
        for micro in (1, ROWS // world):
            check(parallel, micro, name, (TOLERANCE,) * 3)
        check(parallel, 1, f"{name}, muon", (TOLERANCE,) * 3, muon)
    divided = replace(exact[0], experts=world)
    for parallel, name in ((exact[0], "gathered experts"), (divided, "divided experts")):
        check(parallel, 1, name, (TOLERANCE,) * 3, model=MIXTURE)
        check(parallel, ROWS // world, f"{name}, muon", (TOLERANCE,) * 3, muon, MIXTURE)
    cuda = device.type == "cuda"
    for keep in ("none", "selective", "full"):
        # On a CPU, compile only one of them to save time.
        compiled = cuda or (keep == "selective" and shutil.which("g++") is not None)
        parallel = ParallelConfig(dtype="bfloat16", activation_checkpointing=keep, compile=compiled)
        mode = "compiled" if compiled else "eager"
        name = f"zero2 bfloat16 {mode}, activation checkpointing {keep}"
        check(parallel, max(1, ROWS // world // 2), name, ROUGH)
        if keep == "none":  # on a GPU with grouped_mm
            check(parallel, ROWS // world, f"{name}, experts", ROUGH_EXPERTS, model=MIXTURE)
    return all_agree


def distance(a: torch.Tensor, b: torch.Tensor, dtype: str) -> float:
    """Return the largest difference of two weights; for bf16, the root mean square difference.

    In bf16, rounding flips the sign of individual Adam updates.
    """
    error = a.float() - b.float()
    return float(error.abs().max() if dtype == "float32" else error.square().mean().sqrt())


def main() -> None:
    CommandParser(__doc__).parse_args()
    rank, world = setup.rank_and_world()
    if "WORLD_SIZE" not in os.environ:  # started without torchrun: restart with two ranks
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        os.execv(sys.executable, [sys.executable, "-m", *command])
    with user_errors(rank, world):
        if ROWS % world:
            raise ValueError(f"{ROWS} rows cannot be split over {world} ranks; use 2, 4 or 8")
        with setup.ranks() as device:
            all_agree = compare(device)
    setup.exit_process(0 if all_agree else 1)


if __name__ == "__main__":
    main()
