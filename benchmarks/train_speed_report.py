"""Figures of benchmarks/train_speed.py: tokens per second, memory, MFU, ratios; table and JSON."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.meter import PEAK_FLOPS, flops_per_token
from training.planning.memory import CONTEXT, memory

GOALS = {
    4096: (50e3, 66e3, 78e3),
    8192: (40e3, 52e3, 60e3),
    16_384: (28e3, 37e3, 42e3),
}  # tokens/s of the 1.1B model on one H100: floor, goal, fp8
CONVENTION = (
    "share of 989 TFLOP/s, the dense bf16 peak of an H100 or H200 (other GPUs: training/meter.py); "
    "mfu_palm: 6 per matmul parameter + 12 * layers * width * length FLOPs per token; "
    "mfu_causal: attention halved. Recomputed activations do not count."
)


def shape_of(run: RunConfig) -> dict[str, Any]:
    names = ("sequence_length", "tokens_per_step", "micro_batch_size")
    return {**{name: getattr(run.data, name) for name in names}, "dtype": run.parallel.dtype}


def result_of(group: Any, run: RunConfig) -> dict[str, Any]:
    """Return the figures of a contender, or why it was not measured."""
    about = {
        "contender": group.spec,
        "ranks": group.ranks,
        "threads": group.threads,
        "micro_batch_size": group.rows,
    }
    if group.failure or not group.warm:
        return {**about, "not_measured": group.failure}
    rounds = [statistics.median(measured["seconds"][1:]) for measured in group.rounds]
    seconds = statistics.median(
        second for measured in group.rounds for second in measured["seconds"][1:]
    )
    rate, device = run.data.tokens_per_step / seconds, group.rounds[-1]["device"]
    result = {
        **about,
        "device": device,
        "step_s": seconds,
        "tokens_per_s": rate,
        "memory_gb": group.rounds[-1]["memory_gb"],
        "rounds_s": rounds,
        "warm_up_losses": group.warm["losses"],
    }
    if busy := [second for measured in group.rounds for second in measured["cpu_s"][1:]]:
        result["cpu_s"] = statistics.median(busy)
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in device), None)
    if peak:
        length = run.data.sequence_length
        for name, counted in (("mfu_palm", length), ("mfu_causal", length / 2)):
            result[name] = rate / group.ranks * flops_per_token(run.model, counted) / peak
        if group.name.startswith("ours"):
            run = replace(run, data=replace(run.data, micro_batch_size=group.rows))
            # torch's figure does not include the CUDA context.
            result["planner_gb"] = (memory(run, group.ranks).total - CONTEXT) / 1e9
    if group.traced:
        result["profile"] = group.traced["profile"]
    return result


def compare(case: dict[str, Any], tolerance: float) -> None:
    """Add the ratio to the first measured contender, and whether the losses agree with it."""
    measured = [result for result in case["contenders"] if "step_s" in result]
    for result in measured:
        first = measured[0]
        pairs = list(zip(first["warm_up_losses"], result["warm_up_losses"], strict=True))
        result["loss_apart"] = max(abs(a - b) / abs(a) for a, b in pairs)
        # None: the document mask changes the loss by design.
        masked = "documents" in result["contender"]
        result["same_loss"] = None if masked else result["loss_apart"] <= tolerance
        result["first_is_faster_by"] = statistics.median(
            b / a for a, b in zip(first["rounds_s"], result["rounds_s"], strict=True)
        )


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores of {name}"


def table(case: dict[str, Any]) -> str:
    """Return a case as text, with the goals of the 1.1B model on one H100."""
    about = (
        f"{case['parameters']:,} parameters, rows of {case['sequence_length']:,}, "
        f"{case['tokens_per_step']:,} tokens per step, {case['dtype']}"
    )
    lines = [f"{' '.join(case['settings']) or 'as configured'}: {about}"]
    heads = (
        ("tokens/s", 10),
        ("ms/step", 9),
        ("CPU ms", 8),
        ("GB/rank", 7),
        ("MFU palm", 8),
        ("causal", 7),
        ("1st/this", 8),
        ("loss", 8),
    )
    lines.append(f"{'contender':20} " + " ".join(f"{name:>{width}}" for name, width in heads))
    for result in case["contenders"]:
        if "not_measured" in result:
            lines.append(f"{result['contender']:20} not measured: {result['not_measured']}")
            continue
        mfu = [
            f"{result[name]:.1%}" if name in result else "-" for name in ("mfu_palm", "mfu_causal")
        ]
        loss = {True: "same", False: "DIFFERS", None: "masked"}[result["same_loss"]]
        lines.append(
            f"{result['contender']:20} {result['tokens_per_s']:>10,.0f} "
            f"{1e3 * result['step_s']:>9.1f} "
            f"{1e3 * result.get('cpu_s', 0):>8.1f} {result['memory_gb']:>7.2f} "
            f"{mfu[0]:>8} {mfu[1]:>7} {result['first_is_faster_by']:>8.2f} {loss:>9}"
            + (f"  planner {result['planner_gb']:.1f} GB" if "planner_gb" in result else "")
        )
        for row in result.get("profile", ()):
            lines.append(
                f"    {row['share']:>6.1%} {row['ms']:>8.2f} ms {row['calls']:>7.1f} calls  "
                f"{row['operator']}"
            )
    if case["parameters"] > 1e9 and case["sequence_length"] in GOALS:
        floor, goal, fp8 = GOALS[case["sequence_length"]]
        lines.append(
            f"for ours on one H100: floor {floor:,.0f}, goal {goal:,.0f}, "
            f"with fp8 {fp8:,.0f} tokens/s"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    packages = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "liger-kernel",
        "litgpt",
        "lightning",
        "numpy",
    ):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return packages


def succeeded(case: dict[str, Any]) -> bool:
    """Whether ours was measured wherever requested, and all losses agree."""
    results = case["contenders"]
    missed = [
        result
        for result in results
        if "not_measured" in result and result["contender"].startswith("ours")
    ]
    return (
        not missed
        and any("step_s" in result for result in results)
        and all(result.get("same_loss") is not False for result in results)
    )


def write(path: Path, cases: list[dict[str, Any]]) -> None:
    """Write the cases measured up to now; called after every case."""
    command = "python -m benchmarks.train_speed " + shlex.join(sys.argv[1:])
    goals = {
        str(length): dict(zip(("floor", "goal", "fp8_goal"), three, strict=True))
        for length, three in GOALS.items()
    }
    about = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": cpu_name(),
        "versions": versions(),
    }
    about |= {"mfu": CONVENTION, "goals_tokens_per_s_1b_h100": goals}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
