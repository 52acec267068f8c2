"""Estimate the hours, memory, disk and loss of a plan before it runs, without GPU or data.

python -m scripts.plan configs/plan_1b.yaml --gpu h100 --gpus 2
python -m scripts.plan configs/plan_1b.yaml --gpu a100-40 --gpus 8 --mfu 0.5 --price 1.5 --json

Exit status 2 if a phase exceeds the GPU memory; the last line then names a setting that fits.
"""

import argparse
import io
import json
import re
import shlex
import textwrap
from contextlib import redirect_stderr
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from cli import CommandParser, at_least, user_errors, within
from data import manifest
from data.packing import LongDocuments
from data.shards import TokenShards
from evals.cost import workload
from evals.suite import parse
from evals.suite_config import open_suite, suite_parser
from ranges import Range, above
from training.config import RunConfig
from training.planning.cost import check, forecast
from training.planning.eval_cost import WRITING_MFU, Tokens
from training.planning.memory import GPUS
from training.planning.plan import load_plan

HOW_TO_READ = """How to read this
  FLOPs   6 per matmul parameter and token, plus attention. PaLM's convention counts attention
          without the causal mask; the causal convention counts half of that. MFU and hours use
          PaLM's. Recomputed activations do not count as FLOPs: they lower the MFU.
  memory  Computed from shapes and compared with runs on a CPU; not measured on a GPU yet.
          1 GB is 10^9 bytes.
  loss    L = E + A / N^alpha + B / D^beta for N parameters and D tokens,
          {law}: values and
          (standard errors) of Besiroglu et al. 2024, arXiv:2404.10102, for the runs of
          Hoffmann et al. 2022, arXiv:2203.15556. In nats per token of their tokenizer on their
          text, after learning-rate decay; for a stable phase, the loss after a decay from there.
          The error treats the standard errors as independent, which is too wide for their runs.
          It ignores that our text and tokenizer differ: tokens of 10 % fewer bytes have about
          10 % less loss. Use it to compare plans, not as a threshold."""


def readable(run: RunConfig) -> dict[str, int]:
    """Return source -> training tokens in the store that the phase can read."""
    tokens = {}
    for name in run.data.mix:
        folder = Path(run.data.store) / "tokens" / name
        if manifest.read(folder) is not None:
            shards = TokenShards(folder, "train")
            minimum = run.data.min_document_tokens.get(name)
            tokens[name] = len(shards if minimum is None else LongDocuments(shards, minimum))
    return tokens


def reads(command: str, run: RunConfig, sources: int) -> tuple[int, dict[str, list[Tokens] | None]]:
    """Return the processes of an evaluation command, and the tokens its evaluations read and write.

    Tokens are None for an evaluation unknown to evals/cost.py, and for foreign commands.
    """
    processes = re.search(r"--nproc[_-]per[_-]node[= ](\d+)", command)
    context = run.model.max_position_embeddings
    try:
        work = {
            name: workload(name, args, context, sources)
            for name, args in _evaluations(command).items()
        }
    except ValueError:
        work = {command: None}
    tokens = {
        name: None if parts is None else [(part.read, part.written, part.length) for part in parts]
        for name, parts in work.items()
    }
    return int(processes[1]) if processes else 1, tokens


def _evaluations(command: str) -> dict[str, argparse.Namespace]:
    """Return name -> flags of the evaluations that a command runs.

    Raises ValueError for wrong flags and for a command that is not an evaluation.
    """
    words = shlex.split(command)
    modules = [(i, word) for i, (flag, word) in enumerate(pairwise(words), 1) if flag == "-m"]
    index, module = next(
        (m for m in modules if m[1].startswith(("evals.eval_", "scripts.run_evals"))), (0, "")
    )
    flags = words[index + 1 :]
    try:
        with redirect_stderr(io.StringIO()):
            if module == "scripts.run_evals":
                args = suite_parser(None).parse_args(flags)
                suite, _ = open_suite(args.suite)
                return {name: parse(name, text, args, None) for name, text in suite.evals.items()}
            if module:
                return {
                    module.removeprefix("evals.eval_"): import_module(module)
                    .parser()
                    .parse_args(flags)
                }
    # AttributeError: the evaluation has no parser().
    except (SystemExit, ImportError, AttributeError) as error:
        raise ValueError(f"{command} has invalid flags") from error
    raise ValueError(f"{command} is not an evaluation")


def show(report: dict[str, Any]) -> str:
    """Return the forecast as text."""
    memory, peak = report["gpu_memory"] / 1e9, report["gpu_peak_flops"] / 1e12
    total = report["total"]
    lines = [
        f"{report['plan']}: {report['parameters']:,} parameters, {total['steps']:,} steps, "
        f"{_count(total['tokens'])} tokens on {report['gpus']} x {report['gpu']} "
        f"({memory:.1f} GB, {peak:.0f} TFLOP/s dense bf16 each)",
    ]
    for phase in report["phases"]:
        lines += ["", *_phase(phase, memory)]
    if report["evaluations"]:
        lines += ["", *_evaluation_lines(report["evaluations"])]
    disk = {name: size / 1e9 for name, size in report["disk"].items()}
    law = ", ".join(
        f"{name} {part['value']:g} ({part['standard_error']:g})"
        for name, part in report["loss_law"].items()
    )
    lines += [
        "",
        "Whole plan",
        "  data        "
        + ", ".join(f"{name} {_count(tokens)}" for name, tokens in report["sources"].items()),
        f"  FLOPs       {total['flops']:.2e}",
        f"  time        {_time(total)} at an assumed MFU of {report['mfu']:.0%}",
        f"              and {_time(report['evaluations_total'])} for evaluations",
        f"  disk        checkpoints {disk['checkpoints']:.0f} GB, each {disk['checkpoint']:.2f}; "
        f"tokens {disk['tokens']:.0f} GB; text about {disk['text']:.0f} GB, uncompressed",
        "",
        HOW_TO_READ.format(law=law),
    ]
    if report["warnings"]:
        lines += ["", *(f"warning: {text}" for text in report["warnings"])]
    return "\n".join(lines)


def _phase(phase: dict[str, Any], memory: float) -> list[str]:
    need, flops = phase["memory"], phase["flops_per_token"]
    loss = "no forecast: outside the law's 70M-16B parameters and 5B-500B tokens"
    if law := phase["loss"]:
        loss = (
            f"{law['nats_per_token']:.2f} +- {law['error']:.2f} nats per token, "
            f"perplexity {law['perplexity']:.1f}"
        )
    lines = [
        f"{phase['phase']}: steps {phase['begin']:,} to {phase['end']:,}, "
        f"{_count(phase['tokens'])} tokens in rows of {phase['sequence_length']:,}, "
        f"{phase['micro_batches']} x {phase['micro_batch_size']} rows per GPU and step"
    ]
    for name, source in phase["sources"].items():
        long = (
            f" in documents of {source['least_document']:,} tokens or more"
            if source["least_document"]
            else ""
        )
        if source["epochs"] is None:
            epochs = "to be downloaded for one epoch"
        else:
            epochs = f"{source['epochs']:.2f} epochs of {_count(source['readable'])} tokens"
            epochs += f", {source['epochs_so_far']:.2f} including earlier phases"
        lines.append(f"  data        {name}: {_count(source['tokens'])} tokens{long}; {epochs}")
    moments = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need["moments"].items())
    parts = [f"{name} {size / 1e9:.2f}" for name, size in need["parts"].items()]
    settings = f"{phase['strategy']}, activation checkpointing {phase['activation_checkpointing']}"
    return [
        *lines,
        f"  rate        {phase['lr'][0]:.2e} to {phase['lr'][1]:.2e}",
        f"  rope theta  {phase['rope_theta'][0]:,.0f} to {phase['rope_theta'][1]:,.0f}",
        f"  FLOPs       {flops['palm']:.3g} per token (causal {flops['causal']:.3g}), "
        f"{phase['flops']:.2e} in total",
        f"  memory      {need['total'] / 1e9:.1f} of {memory:.1f} GB per GPU, {settings}",
        f"              at the {need['moment']}: {', '.join(parts[:4])},",
        f"              {', '.join(parts[4:])}",
        f"              in GB at other moments: {moments}",
        f"  time        {_time(phase)}",
        f"  loss        {loss}",
    ]


def _evaluation_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return the tokens and time of the evaluations at each milestone and stage."""
    lines = [
        "Evaluations (estimates, without loading models and without judges)",
        f"  prompts at the MFU of training; answers at {WRITING_MFU:.0%} of peak FLOP/s, "
        "each of --max_tokens tokens",
    ]
    for entry in entries:
        evals = entry["evals"]
        parts = [
            f"{row['name']} {_count(row['read'])} read" + _written(row["written"])
            for row in evals
            if row["known"]
        ]
        unknown = [row["name"] for row in evals if not row["known"]]
        lines.append(
            f"  {entry['where']}: {60 * entry['hours']:.1f} minutes, {entry['flops']:.2e} FLOPs"
        )
        # Non-breaking spaces: lines break between evaluations only.
        text = ", ".join(part.replace(" ", "\xa0") for part in parts)
        wrapped = textwrap.wrap(
            text, 100, initial_indent="    tokens: ", subsequent_indent=" " * 12
        )
        lines += [line.replace("\xa0", " ") for line in wrapped]
        if unknown:
            lines.append(f"    not counted: {', '.join(unknown)}")
    return lines


def _written(tokens: float) -> str:
    return f" and {_count(tokens)} written" if tokens else ""


def _count(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:.2f}M"


def _time(row: dict[str, Any]) -> str:
    cost = "" if row["cost"] is None else f", costs {row['cost']:,.0f}"
    return f"{row['hours']:.1f} hours{cost}"


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=at_least(1), help="default: the plan's ranks")
    parser.add_argument(
        "--mfu",
        type=within(float, above(0, most=1)),
        default=0.45,
        help="assumed model FLOPs utilisation of training (default 0.45)",
    )
    parser.add_argument(
        "--price", type=within(float, Range(0)), help="price of one GPU hour, in any currency"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; units: bytes, FLOPs and hours"
    )
    args = parser.parse_args()
    with user_errors():
        report = forecast(
            load_plan(args.plan), args.gpu, args.gpus, args.mfu, args.price, readable, reads
        )
        print(json.dumps(report, indent=2) if args.json else show(report), flush=True)
        check(report)


if __name__ == "__main__":
    main()
