"""Compare Muon with AdamW: the time of a step, and the tokens to reach a loss.

    python -m benchmarks.muon cost --config configs/quickstart/base.yaml
    torchrun --nproc_per_node=2 -m benchmarks.muon cost --device cuda \\
        --config configs/phase1_pretrain.yaml
    python -m benchmarks.muon tokens --output benchmarks/results/muon.json    # CPU: 15 minutes

cost: one model, random tokens; after each backward pass all optimizers step on the same gradients.
Medians over --steps, of AdamW, Muon, Muon with bfloat16 Newton-Schulz, and NorMuon with it.
tokens: sweeps both learning rates by factors of 2 until the best one has worse neighbours on both
sides. Then trains Muon on fewer tokens, each run with its own schedule, and interpolates the tokens
it needs for AdamW's best validation loss. Finished runs in --output with the same settings are
reused. The text is the quickstart's on a CPU, if prepared; otherwise Python's standard library,
byte by byte.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks.side_by_side import modules
from cli import ROOT, CommandParser, user_errors
from data.manifest import read_json
from data.shards import ShardWriter
from data.store import DUMMY
from training import setup
from training.config import RunConfig, load
from training.fsdp_utils import set_last_micro_batch
from training.meter import flops_per_token
from training.muon import newton_schulz_flops
from training.optimizers import build_optimizer
from training.planning.memory import hidden_shapes, micro_batches

SMALL = [  # 1.6M parameters and few tokens: nine or more runs on two busy CPU cores
    "model.hidden_size=128",
    "model.intermediate_size=352",
    "model.num_hidden_layers=3",
    "model.initializer_range=0.07",
    "data.tokens_per_step=1024",
    "data.micro_batch_size=4",
    "optim.groups={}",
]


LARGER = [  # 27M parameters, 16,384 tokens per step: about a minute per run on a GPU
    "model.hidden_size=512",
    "model.intermediate_size=1408",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=2",
    "model.initializer_range=0.04",
    "data.tokens_per_step=16384",
    "data.micro_batch_size=64",
]


def shape_and_text(device: torch.device, folder: Path) -> list[str]:
    """Return the overrides of model and data; write a store of Python's library if none exists."""
    shape = LARGER if device.type == "cuda" else SMALL
    if device.type != "cuda" and (ROOT / "data" / "store" / "quickstart" / "tokens").is_dir():
        return shape
    with ShardWriter(folder / "tokens" / DUMMY, 257, DUMMY, inputs={}) as shards:
        for i, module in enumerate(modules()):
            shards.add("val" if i % 20 == 0 else "train", [256, *module])
    return [*shape, "model.vocab_size=257", f"data.store={folder}", f"data.mix={{{DUMMY}: 1.0}}"]


def flops(run: RunConfig) -> dict[str, float]:
    """Return the FLOPs of one step: the model's (training/meter.py) and all Newton-Schulz ones."""
    model = flops_per_token(run.model, run.data.sequence_length) * run.data.tokens_per_step
    newton_schulz = sum(map(newton_schulz_flops, hidden_shapes(run.model)))
    return {"model": model, "newton_schulz": newton_schulz, "share": newton_schulz / model}


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cost(run: RunConfig, device: torch.device, world: int, steps: int) -> dict[str, Any]:
    """Return the median seconds of a step's forward and backward passes, and of each update.

    step_ratio: time of a whole step divided by that with AdamW.
    """
    state = setup.build(run, device)
    settings: dict[str, dict[str, Any]] = {
        "adamw": {"name": "adamw"},
        "muon": {"name": "muon"},
        "muon_bfloat16": {"name": "muon", "muon_dtype": "bfloat16"},
        "normuon_bfloat16": {"name": "muon", "muon_dtype": "bfloat16", "normuon_beta2": 0.95},
    }
    optimizers = {
        name: build_optimizer(state.model, replace(run.optim, lr=1e-5, **changes))
        for name, changes in settings.items()
    }
    size, count = (run.data.micro_batch_size, run.data.sequence_length), micro_batches(run, world)

    def passes() -> None:
        for i in range(count):
            set_last_micro_batch(state.model, i == count - 1, run.parallel.strategy)
            tokens = torch.randint(run.model.vocab_size, size, device=device)
            (state.model(tokens, tokens).nll.sum() / run.data.tokens_per_step).backward()

    times: dict[str, list[float]] = {name: [] for name in ("passes", *optimizers)}
    for step in range(steps + 2):  # the first two compile and allocate
        measured = {"passes": seconds(passes, device)}
        measured |= {
            name: seconds(optimizer.step, device) for name, optimizer in optimizers.items()
        }
        state.optimizer.zero_grad()
        if step >= 2:
            for name, value in measured.items():
                times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    step_s = median["passes"] + median["adamw"]
    ratios = {name: (median["passes"] + median[name]) / step_s for name in optimizers}
    for name, seconds_of in median.items():
        ratio = f", step {ratios[name]:.3f} of AdamW's" if name in ratios else ""
        print(f"{name} {seconds_of:.4f} s{ratio}", flush=True)
    return {"seconds": median, "step_ratio": ratios, "steps": steps}


def validation_loss(
    settings: list[str], device: torch.device, name: str, lr: float, steps: int
) -> float:
    """Return nats per token after `steps` steps: 10 of warm-up, decay over the last 40 %."""
    with tempfile.TemporaryDirectory() as folder:
        schedule = (
            f"schedule={{warmup_steps: {min(10, steps // 5)}, total_steps: {steps}, "
            f"decay_steps: {steps * 2 // 5}, min_lr: 0.0}}"
        )
        folders = [
            f"output_dir={folder}/checkpoints",
            f"log_dir={folder}/logs",
            "checkpoint={every: 100000, keep: 1}",
        ]
        optim = [
            f"optim.name={name}",
            f"optim.lr={lr}",
            "validation={every: 100000, rows: 48, batch_size: 8}",
        ]
        run = load(
            "configs/quickstart/base.yaml",
            [*settings, schedule, *folders, *optim, f"steps={steps}"],
        )
        train.pretrain(run, 0, 1, device, test=False)
        lines = (Path(folder) / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["val/loss"]


def tokens(
    settings: list[str],
    device: torch.device,
    steps: int,
    runs: list[dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Return every run's validation loss, and the tokens Muon needs for AdamW's best one.

    runs: finished runs, extended in place. keep: called with the results after each run.
    """

    def loss(name: str, lr: float, steps: int) -> float:
        for done in runs:
            if (done["optimizer"], done["lr"], done["steps"]) == (name, lr, steps):
                return done["loss"]
        start = time.perf_counter()
        value = validation_loss(settings, device, name, lr, steps)
        runs.append(
            {
                "optimizer": name,
                "lr": lr,
                "steps": steps,
                "loss": value,
                "seconds": time.perf_counter() - start,
            }
        )
        keep({"runs": runs})
        print(
            f"{name}, lr {lr:g}, {steps} steps: validation loss {value:.4f}",
            file=sys.stderr,
            flush=True,
        )
        return value

    best = {}
    for name in ("adamw", "muon"):
        rates = [1e-3, 2e-3, 4e-3]
        while True:
            best[name] = min(rates, key=lambda lr: loss(name, lr, steps))
            if best[name] == rates[0]:
                rates.insert(0, rates[0] / 2)
            elif best[name] == rates[-1]:
                rates.append(rates[-1] * 2)
            else:
                break
    target = loss("adamw", best["adamw"], steps)
    curve = [(steps, loss("muon", best["muon"], steps))]
    if curve[0][1] < target:
        curve.insert(0, (steps // 2, loss("muon", best["muon"], steps // 2)))
        if curve[0][1] > target:
            # One more run, where a line in the logarithm of tokens meets the target.
            share = (curve[0][1] - target) / (curve[0][1] - curve[1][1])
            between = round(steps / 2 * 2**share)
            curve.insert(1, (between, loss("muon", best["muon"], between)))
    ratio = None
    for (few, above), (many, below) in pairwise(curve):
        if below < target <= above:  # interpolate the loss in the logarithm of tokens
            share = (above - target) / (above - below)
            ratio = math.exp(math.log(few) + share * math.log(many / few)) / steps
    if ratio is None:
        needed = (
            "AdamW's best is not reached"
            if curve[-1][1] >= target
            else f"at most {curve[0][0] / steps:.2f} of the tokens"
        )
    else:
        needed = f"{ratio:.2f} of the tokens"
    print(
        f"AdamW's best, lr {best['adamw']:g}: {target:.4f}; "
        f"Muon, lr {best['muon']:g}: {curve[-1][1]:.4f}; to that loss: {needed}"
    )
    return {
        "runs": runs,
        "best_lr": best,
        "target": target,
        "muon_at_best_lr": curve,
        "token_ratio": ratio,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("part", choices=("cost", "tokens"))
    parser.add_argument("--config", default="configs/quickstart/base.yaml", help="for cost")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="fail on any other device")
    parser.add_argument(
        "--steps",
        type=int,
        help="cost: measured steps (default 10); tokens: steps of a full run (default 192)",
    )
    parser.add_argument("--output", type=Path, help="add the results to this JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    rank, world = setup.rank_and_world()
    torch.set_num_threads(1)  # on shared cores, threads that wait for each other distort times
    with user_errors(rank, world), setup.ranks() as device:
        if args.device and device.type != args.device:
            raise ValueError(
                f"this would run on {device.type}, not on {args.device}; "
                "hide GPUs with CUDA_VISIBLE_DEVICES="
            )
        report = read_json(args.output) if args.output else {}
        about = {
            "command": f"python -m benchmarks.muon {' '.join(sys.argv[1:])}",
            **setup.environment(device),
        }

        def keep(results: dict[str, Any]) -> None:
            if args.output and rank == 0:
                report[args.part] = about | results
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

        if args.part == "cost":
            run = load(args.config, args.overrides)
            keep({"flops_of_a_step": flops(run), **cost(run, device, world, args.steps or 10)})
        else:
            with tempfile.TemporaryDirectory() as folder:
                settings = [*shape_and_text(device, Path(folder)), *args.overrides]
                named = {"settings": [setting for setting in settings if folder not in setting]}
                before = report.get("tokens", {})
                done = before.get("runs", []) if before.get("settings") == named["settings"] else []
                keep_runs = lambda more: keep(named | more)  # noqa: E731
                keep_runs(tokens(settings, device, args.steps or 192, done, keep_runs))


if __name__ == "__main__":
    main()
