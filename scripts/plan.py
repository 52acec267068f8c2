"""What a plan will cost, before it runs: no GPU and no data needed.

python -m scripts.plan configs/plan_1b.yaml --gpu h100 --gpus 2
python -m scripts.plan configs/plan_1b.yaml --gpu a100-40 --gpus 8 --mfu 0.5 --price 1.5 --json

Exit status 2 where a phase does not fit into the GPU's memory; the last line then says which setting would make it fit.
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
from ranges import Range, above
from scripts import run_evals
from training.config import RunConfig
from training.planning.cost import GPUS, check, forecast
from training.planning.eval_cost import WRITING_MFU, Tokens
from training.planning.plan import load_plan

HOW_TO_READ = """How to read this
  FLOPs   6 a matmul parameter and token, plus attention. PaLM's convention counts attention as if nothing were masked, the
          causal one half of that; MFU and hours follow PaLM's. Recomputed activations count as no work: they lower the MFU.
  memory  Counted from shapes and compared with runs on a CPU; not measured on a GPU yet. 1 GB is 10^9 bytes.
  loss    L = E + A / N^alpha + B / D^beta of N parameters and D tokens,
          {law}: values and (standard errors) of
          Besiroglu et al. 2024, arXiv:2404.10102, for the runs of Hoffmann et al. 2022, arXiv:2203.15556. Nats a token
          of their tokenizer on their text, after the learning rate has decayed: in a stable phase, what a decay
          from there would reach. The error takes the standard errors as independent, which is too wide for the law on its own
          runs; it leaves out that our text and tokens are others, and a token of 10 % fewer bytes has about 10 % less loss.
          Use it to compare plans, not as a threshold."""


def readable(run: RunConfig) -> dict[str, int]:
    """Training tokens that a phase can read of each source its store has."""
    found = {}
    for name in run.data.mix:
        folder = Path(run.data.store) / "tokens" / name
        if manifest.read(folder) is not None:
            shards = TokenShards(folder, "train")
            least = run.data.min_document_tokens.get(name)
            found[name] = len(shards if least is None else LongDocuments(shards, least))
    return found


def reads(command: str, run: RunConfig, sources: int) -> tuple[int, dict[str, list[Tokens] | None]]:
    """Processes of an evaluation command, and the tokens that each of its evaluations reads and writes.

    None for an evaluation that evals/cost.py does not know, and for a command that is not of this repository.
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
    """Name -> flags of the evaluations that a command runs; ValueError where it is not an evaluation or has wrong flags."""
    words = shlex.split(command)
    modules = [(i, word) for i, (flag, word) in enumerate(pairwise(words), 1) if flag == "-m"]
    place, module = next(
        (m for m in modules if m[1].startswith(("evals.eval_", "scripts.run_evals"))), (0, "")
    )
    flags = words[place + 1 :]
    try:
        with redirect_stderr(io.StringIO()):
            if module == "scripts.run_evals":
                args = run_evals._flags().parse_args(flags)
                suite, _ = run_evals.open_suite(args.suite)
                return {name: parse(name, text, args, None) for name, text in suite.evals.items()}
            if module:
                return {
                    module.removeprefix("evals.eval_"): import_module(module)
                    .parser()
                    .parse_args(flags)
                }
    except (
        SystemExit,
        ImportError,
        AttributeError,
    ) as error:  # AttributeError: an evaluation without parser()
        raise ValueError(f"the flags of {command} are not understood") from error
    raise ValueError(f"{command} is not an evaluation")


def show(report: dict[str, Any]) -> str:
    """The forecast as text."""
    memory, peak, total = (
        report["gpu_memory"] / 1e9,
        report["gpu_peak_flops"] / 1e12,
        report["total"],
    )
    lines = [
        f"{report['plan']}: {report['parameters']:,} parameters, {total['steps']:,} steps, {_count(total['tokens'])} tokens "
        f"on {report['gpus']} x {report['gpu']} ({memory:.1f} GB, {peak:.0f} TFLOP/s dense bf16 each)",
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
        f"  time        {_time(total)} at an MFU of {report['mfu']:.0%}, which is assumed, not measured",
        f"              and for its evaluations {_time(report['evaluations_total'])}",
        f"  disk        checkpoints {disk['checkpoints']:.0f} GB, each {disk['checkpoint']:.2f}; tokens {disk['tokens']:.0f} GB; "
        f"text about {disk['text']:.0f} GB, uncompressed",
        "",
        HOW_TO_READ.format(law=law),
    ]
    if report["warnings"]:
        lines += ["", *(f"warning: {text}" for text in report["warnings"])]
    return "\n".join(lines)


def _phase(phase: dict[str, Any], memory: float) -> list[str]:
    need, flops, loss = (
        phase["memory"],
        phase["flops_per_token"],
        "no forecast: outside the law's 70M-16B parameters and 5B-500B tokens",
    )
    if law := phase["loss"]:
        loss = f"{law['nats_per_token']:.2f} +- {law['error']:.2f} nats a token, perplexity {law['perplexity']:.1f}"
    lines = [
        f"{phase['phase']}: steps {phase['begin']:,} to {phase['end']:,}, {_count(phase['tokens'])} tokens in rows of "
        f"{phase['sequence_length']:,}, {phase['micro_batches']} x {phase['micro_batch_size']} rows a GPU and step"
    ]
    for name, source in phase["sources"].items():
        long = (
            f" in documents of {source['least_document']:,} tokens or more"
            if source["least_document"]
            else ""
        )
        if source["epochs"] is None:
            what = "to be downloaded for one epoch"
        else:
            what = f"{source['epochs']:.2f} epochs of the {_count(source['readable'])} there are"
            what += f", {source['epochs_so_far']:.2f} with the phases before"
        lines.append(f"  data        {name}: {_count(source['tokens'])} tokens{long}; {what}")
    moments = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need["moments"].items())
    parts = [f"{name} {size / 1e9:.2f}" for name, size in need["parts"].items()]
    how = f"{phase['strategy']}, activation checkpointing {phase['activation_checkpointing']}"
    return [
        *lines,
        f"  rate        {phase['lr'][0]:.2e} to {phase['lr'][1]:.2e}",
        f"  rope theta  {phase['rope_theta'][0]:,.0f} to {phase['rope_theta'][1]:,.0f}",
        f"  FLOPs       {flops['palm']:.3g} a token (causal {flops['causal']:.3g}), {phase['flops']:.2e} in all",
        f"  memory      {need['total'] / 1e9:.1f} of {memory:.1f} GB a GPU, {how}",
        f"              at the {need['moment']}: {', '.join(parts[:4])},",
        f"              {', '.join(parts[4:])}",
        f"              in GB at other moments: {moments}",
        f"  time        {_time(phase)}",
        f"  loss        {loss}",
    ]


def _evaluation_lines(entries: list[dict[str, Any]]) -> list[str]:
    """What is read at each milestone and stage, how long that takes, and what is not counted."""
    lines = [
        "Evaluations (estimates, without loading models and without judges)",
        f"  prompts at the MFU of training; answers at {WRITING_MFU:.0%} of the peak, each as long as --max_tokens lets it be",
    ]
    for entry in entries:
        evals = entry["evals"]
        parts = [
            f"{e['name']} {_count(e['read'])} read" + _written(e["written"])
            for e in evals
            if e["known"]
        ]
        unknown = [e["name"] for e in evals if not e["known"]]
        lines.append(
            f"  {entry['where']}: {60 * entry['hours']:.1f} minutes, {entry['flops']:.2e} FLOPs"
        )
        text = ", ".join(
            part.replace(" ", "\xa0") for part in parts
        )  # lines break between evaluations
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


def _time(part: dict[str, Any]) -> str:
    return f"{part['hours']:.1f} hours" + (
        "" if part["cost"] is None else f", costs {part['cost']:,.0f}"
    )


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--gpus", type=at_least(1), help="default: the plan's ranks")
    parser.add_argument(
        "--mfu",
        type=within(float, above(0, most=1)),
        default=0.45,
        help="share of the peak that training reaches; assumed (default 0.45)",
    )
    parser.add_argument(
        "--price", type=within(float, Range(0)), help="of one GPU for an hour, in any currency"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON; bytes, FLOPs and hours"
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
