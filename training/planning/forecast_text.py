"""Format a forecast of training/planning/cost.py as text."""

import textwrap
from typing import Any

from training.planning.eval_cost import WRITING_MFU

HOW_TO_READ = """How to read this
  FLOPs   6 per matmul parameter that a token uses, plus attention. PaLM's convention counts
          attention without the causal mask; the causal convention counts half of that. The MFU
          uses PaLM's. Recomputed activations do not count as FLOPs: they lower the MFU.
  time    Without --mfu: the least time of each operation of a step at the GPU's peak and
          bandwidth (a bound), times the factor by which published runs are slower.
          See docs/new_plan.md.
  memory  Computed from shapes and compared with runs on a CPU; not measured on a GPU.
          1 GB is 10^9 bytes.
  loss    L = E + A / N^alpha + B / D^beta for N parameters and D tokens,
          {law}: values and
          (standard errors) of Besiroglu et al. 2024, arXiv:2404.10102, for the runs of
          Hoffmann et al. 2022, arXiv:2203.15556. In nats per token of their tokenizer on their
          text, after learning-rate decay; for a stable phase, the loss after a decay from its end.
          The error treats the standard errors as independent, which is too wide for their runs.
          It ignores that our text and tokenizer differ: tokens with 10 % fewer bytes have about
          10 % less loss. Use it to compare plans, not as a threshold. For a mixture of experts,
          N counts active parameters: the forecast is that of a dense model of equal FLOPs."""


def forecast_text(report: dict[str, Any]) -> str:
    """Return a forecast as text: phases, evaluations, totals, notes and warnings."""
    memory, peak = report["gpu_memory"] / 1e9, report["gpu_peak_flops"] / 1e12
    total = report["total"]
    lines = [
        f"{report['plan']}: {report['parameters_text']}, {total['steps']:,} steps, "
        f"{_count(total['tokens'])} tokens on {report['gpus']} x {report['gpu']} "
        f"({memory:.1f} GB, {peak:.0f} TFLOP/s dense bf16 each)",
    ]
    for phase in report["phases"]:
        lines += ["", *_phase(phase, memory)]
    if report["evaluations"]:
        lines += ["", *_evaluation_lines(report["evaluations"])]
    disk = {name: size / 1e9 for name, size in report["disk"].items()}
    law = ", ".join(
        f"{name} {constant['value']:g} ({constant['standard_error']:g})"
        for name, constant in report["loss_law"].items()
    )
    lines += [
        "",
        "Whole plan",
        "  data        "
        + ", ".join(f"{name} {_count(tokens)}" for name, tokens in report["sources"].items()),
        f"  FLOPs       {total['flops']:.2e}",
        f"  time        {_time(total)} {_speed(report)}",
        f"              and {_time(report['evaluations_total'])} for evaluations",
        f"  disk        checkpoints {disk['checkpoints']:.0f} GB, each {disk['checkpoint']:.2f}; "
        f"tokens {disk['tokens']:.0f} GB; text about {disk['text']:.0f} GB, uncompressed",
        "",
        *_target_lines(report.get("targets") or []),
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
        if source["start_epoch"]:
            epochs += f"; continues at epoch {source['start_epoch']:.2f}"
            if source["unread_from"] is not None:
                epochs += ", within the text of earlier phases"
        elif source["read_before"]:
            epochs += "; starts again at its first row"
        elif source["selected_anew"]:
            epochs += "; selects documents anew, so it may repeat text of earlier phases"
        if source["unread_from"] is not None:
            epochs += f" (data.start_epoch.{name}={source['unread_from']:.8g} continues)"
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
        *_scaling_law_lines(phase.get("scaling_law")),
    ]


def _scaling_law_lines(law: dict[str, Any] | None) -> list[str]:
    """Return the forecast of training/planning/scaling_law.py, if there is one."""
    if law is None:
        return []
    low, high = law["interval"]
    return [
        f"  own runs    {law['loss']:.2f} [{low:.2f}, {high:.2f}] {law['metric']} by the law of "
        f"{law['source']},",
        f"              extrapolated {law['parameters_factor']:,.0f} x in parameters and "
        f"{law['tokens_factor']:,.0f} x in tokens",
    ]


def _target_lines(targets: list[dict[str, Any]]) -> list[str]:
    """Return the plan's targets beside published scores (training/planning/published.py)."""
    if not targets:
        return []
    lines = ["Targets, and published scores of models of similar size and tokens"]
    for target in targets:
        scale, unit = (100, " %") if target["percent"] else (1, "")
        success, low, high = (scale * target[key] for key in ("success", "low", "high"))
        scores = f"{low:.1f} to {high:.1f}{unit}" if high > low else f"{low:.1f}{unit}"
        verdict = "plausible" if target["plausible"] else "not plausible without special data"
        note = f"; {target['note']}" if target["note"] else ""
        lines.append(f"  {target['title']} {success:g}{unit}: {verdict} ({scores}{note})")
    return [*lines, "  Sources and limits: docs/forecast.md", ""]


def _evaluation_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return the tokens and time of the evaluations at each milestone and stage."""
    lines = [
        "Evaluations (estimates, without loading models and without judges)",
        f"  prompts at the MFU of training; answers at {WRITING_MFU:.0%} of peak FLOP/s, "
        "each of --max_new_tokens tokens",
    ]
    for entry in entries:
        evals = entry["evals"]
        known = [
            f"{row['name']} {_count(row['read'])} read" + _written(row["written"])
            for row in evals
            if row["known"]
        ]
        unknown = [row["name"] for row in evals if not row["known"]]
        lines.append(
            f"  {entry['where']}: {60 * entry['hours']:.1f} minutes, {entry['flops']:.2e} FLOPs"
        )
        # Non-breaking spaces: lines break between evaluations only.
        text = ", ".join(counts.replace(" ", "\xa0") for counts in known)
        wrapped = textwrap.wrap(
            text, 100, initial_indent="    tokens: ", subsequent_indent=" " * 12
        )
        lines += [line.replace("\xa0", " ") for line in wrapped]
        if unknown:
            lines.append(f"    not counted: {', '.join(unknown)}")
    return lines


def _written(tokens: float) -> str:
    return f" and {_count(tokens)} written" if tokens else ""


def _speed(report: dict[str, Any]) -> str:
    factors, bound = report["efficiency"], report["total"]["bound_hours"]
    if not factors:
        return f"at an assumed MFU of {report['mfu']:.0%}"
    low, high = bound * factors["low"], bound * factors["high"]
    return (
        f"(range {low:.1f} to {high:.1f}): the bound, {bound:.1f} hours, times "
        f"{factors['factor']:.2f}; MFU {report['mfu']:.0%}"
    )


def _count(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:.2f}M"


def _time(row: dict[str, Any]) -> str:
    cost = "" if row["cost"] is None else f", costs {row['cost']:,.0f}"
    return f"{row['hours']:.1f} hours{cost}"
