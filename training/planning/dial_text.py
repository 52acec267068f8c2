"""Format a chosen plan: shape, batches, rates, memory, hours, money, disk, loss, largest costs."""

import textwrap
from collections.abc import Iterable
from typing import Any

from training.planning.cards import GPUS
from training.planning.cost import LAW_RANGE, forecast_loss
from training.planning.cpu_plan import CpuChoice, save_seconds
from training.planning.dial import Choice, size_text
from training.planning.dial_fit import phase_seconds
from training.planning.memory import memory
from training.planning.plan_files import save_interval
from training.planning.probe import Probe
from training.planning.roofline import StepBound, efficiency, step_bound

BYTES_PER_TOKEN = 4.0  # of text, about: docs/performance.md
CLEANED = 1.5e6  # bytes of text per second that one core prepares: docs/performance.md


def gpu_text(choice: Choice, report: dict[str, Any], price: float | None) -> str:
    """Describe a plan for GPUs. report: forecast() of the written plan. price: per GPU and hour."""
    request, run = choice.request, choice.fit.run
    model, data, gpu = run.model, run.data, GPUS[request.gpu]
    total, disk = report["total"], report["disk"]
    factors = efficiency()
    low, high = (total["bound_hours"] * factor for factor in (factors.low, factors.high))
    tuning = {
        stage: tokens * choice.fit.seconds_per_token / 3600
        for stage, tokens in choice.tuning_tokens.items()
    }
    measuring = report["evaluations_total"]["hours"]
    hours = total["hours"] + sum(tuning.values()) + measuring
    parts = [f"{phase['phase']} {phase['hours']:.3g}" for phase in report["phases"]]
    parts += [f"{stage.upper()} {value:.2g}" for stage, value in tuning.items()]
    parts.append(f"evaluations {measuring:.2g}")
    text = sum(choice.downloads.values()) * BYTES_PER_TOKEN
    rows = f"{data.micro_batch_size} rows of {data.sequence_length:,}"
    accumulated = data.rows // data.micro_batch_size // request.gpus
    phases = ", ".join(f"{name} {count:,}" for name, count in choice.steps.items())
    lines = [
        f"  model       {_model_text(choice)}",
        f"  GPUs        {request.gpus} x {gpu.title}",
        f"  tokens      {size_text(choice.tokens)}, {choice.tokens / model.num_parameters:.0f} per "
        f"parameter; steps: {phases}",
        f"  batch       {data.tokens_per_step:,} tokens: {accumulated} x {rows} per GPU",
        f"  settings    {run.parallel.strategy}, activation checkpointing "
        f"{run.parallel.activation_checkpointing}; AdamW, peak rate {choice.lr:.2e}",
        *_memory_lines(choice, report),
        f"  hours       {hours:.3g} of {request.hours:g}: {', '.join(parts)}",
        f"              pretraining is the bound, {total['bound_hours']:.3g} hours, x "
        f"{factors.factor:.2f}; published runs: x {factors.low:.2f} to x {factors.high:.2f}, so "
        f"{low:.3g} to {high:.3g}",
        f"  checkpoints {_saves_text(choice)}",
    ]
    if price is not None:
        rate = request.gpus * price
        rest = hours - total["hours"]
        lines.append(
            f"  money       {rate * hours:,.2f} at {price:g} per GPU hour; over that range "
            f"{rate * (low + rest):,.2f} to {rate * (high + rest):,.2f}"
        )
    lines += [
        f"  disk        {sum(disk[name] for name in ('checkpoints', 'tokens', 'text')) / 1e9:.0f} "
        f"GB: checkpoints {disk['checkpoints'] / 1e9:.0f}, tokens {disk['tokens'] / 1e9:.1f}, text "
        f"{disk['text'] / 1e9:.0f} before compression",
        f"  data        {_data_text(choice)}",
        f"              preparing them takes about {text / CLEANED / 3600:.2g} core hours, which "
        "are not in the hours",
        f"  loss        {_loss_text(model.num_parameters, choice.tokens)}",
        *(f"  note        {note}" for note in choice.notes),
    ]
    bound = bound_lines(step_bound(run, request.gpus, gpu))
    return "\n".join([*_wrapped(lines), "", *bound])


def _wrapped(lines: Iterable[str]) -> list[str]:
    """Wrap lines that consist of a label and text at 100 columns."""
    indent = " " * 14
    return [
        row
        for line in lines
        for row in textwrap.wrap(line, 100, subsequent_indent=indent, break_on_hyphens=False)
    ]


def bound_lines(bound: StepBound, count: int = 5) -> list[str]:
    """Return the table of a step's largest costs; the times are lower bounds."""
    lines = [
        f"Largest costs of a step, of at least {1000 * bound.seconds:,.1f} ms: a lower bound on "
        "time, every operation",
        "at the peak or the full bandwidth of the vendor's datasheet",
        "",
        "  operation                      ms       FLOPs   GB moved   GB sent   limited by",
    ]
    for operation, seconds in bound.largest(count):
        flops = operation.flops + operation.extra_flops
        limit = "bandwidth" if flops / bound.gpu.flops < seconds else "peak"
        lines.append(
            f"  {operation.name:<24} {1000 * seconds:>8,.1f}   {flops:>9.2e}   "
            f"{operation.bytes / 1e9:>8,.1f}   {operation.sent / 1e9:>7,.2f}   "
            f"{bound.gpu.over if operation.sent else limit}"
        )
    return lines


def cpu_text(choice: CpuChoice, probe: Probe, parameters: int, minutes: float) -> str:
    """Describe a plan for this machine's CPU."""
    seconds = sum(choice.seconds.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in choice.seconds.items())
    steps = ", ".join(f"{name} {count:,}" for name, count in choice.steps.items())
    return "\n".join(
        _wrapped(
            [
                f"  model       {parameters / 1e6:.1f}M parameters, the quickstart's",
                f"  machine     {probe.cores} cores: {probe.tokens_per_s:,.0f} tokens/s in "
                f"{probe.steps} measured steps of {probe.step_s:.3f} s",
                f"              bound of a step {probe.bound_s:.3f} s at {probe.flops / 1e9:,.0f} "
                f"GFLOP/s and {probe.bandwidth / 1e9:.1f} GB/s, both measured: x "
                f"{probe.step_s / probe.bound_s:.2f}",
                f"  tokens      {choice.tokens / 1e6:.2f}M, {choice.tokens / parameters:.2f} per "
                "parameter",
                f"  steps       {steps}",
                f"  minutes     {seconds / 60:.1f} of {minutes:g}; seconds: {parts}",
                f"  checkpoints about every {save_seconds(choice):.0f} seconds of the base phase, "
                "which a crash can cost, and the restart",
                "  loss        no forecast: outside of the range of the law",
                *(f"  note        {note}" for note in choice.notes),
            ]
        )
    )


def _model_text(choice: Choice) -> str:
    model = choice.fit.run.model
    return (
        f"{size_text(model.num_parameters)} parameters: {model.num_hidden_layers} layers of width "
        f"{model.hidden_size:,}, {model.num_attention_heads} heads of {model.resolved_head_dim} "
        f"({model.num_key_value_heads} of keys and values)"
    )


def _memory_lines(choice: Choice, report: dict[str, Any]) -> list[str]:
    """Return memory and micro-batch of each phase and stage, per GPU."""
    gpus, tuning = choice.request.gpus, choice.fit.tuning
    needs = {phase["phase"]: phase["memory"]["total"] for phase in report["phases"]}
    needs |= {stage: memory(run, gpus).total for stage, run in tuning.items()}
    parts = ", ".join(f"{name} {need / 1e9:.1f}" for name, need in needs.items())
    lines = [
        f"  memory      {max(needs.values()) / 1e9:.1f} of {report['gpu_memory'] / 1e9:.1f} GB per "
        f"GPU: {parts}; computed, not measured"
    ]
    runs = {"long_context": choice.fit.long_run, **tuning}
    for name, run in runs.items():
        if run:
            rows, level = run.data.micro_batch_size, run.parallel.activation_checkpointing
            pairs = f" ({rows // 2} pairs of answers)" if name == "dpo" else ""
            lines.append(
                f"              {name}: {rows} x {run.data.sequence_length:,} tokens at once"
                f"{pairs}, activation checkpointing {level}"
            )
    if "dpo" in tuning:
        lines.append(
            "              the reference model of DPO computes its log-probabilities before the "
            "policy is built, and needs less"
        )
    return lines


def _saves_text(choice: Choice) -> str:
    """Return the interval of checkpoints and the cost of a crash."""
    run, gpus = choice.fit.run, choice.request.gpus
    seconds = phase_seconds(run, gpus, GPUS[choice.request.gpu])
    every = save_interval(seconds, choice.steps["base"])
    return (
        f"every {every:,} steps, about {every * seconds / 60:.0f} minutes of the base phase, which "
        "a crash can cost, and the restart"
    )


def _data_text(choice: Choice) -> str:
    amounts = (f"{name} {_exact(tokens)}" for name, tokens in choice.downloads.items())
    return f"{', '.join(amounts)} tokens to download"


def _exact(tokens: float) -> str:
    """Format a rounded number of tokens with all its digits."""
    return f"{tokens / 1e9:g}B" if tokens >= 1e9 else f"{tokens / 1e6:g}M"


def _loss_text(parameters: int, tokens: float) -> str:
    """Return the loss forecast; says whether it is within the range of its law."""
    loss, error = forecast_loss(parameters, tokens)
    sizes = {"parameters": parameters, "tokens": tokens}
    known = all(low <= sizes[name] <= high for name, (low, high) in LAW_RANGE.items())
    where = (
        "" if known else "; extrapolated: outside of the law's 70M-16B parameters, 5B-500B tokens"
    )
    return f"{loss:.2f} +- {error:.2f} nats per token (Hoffmann et al.){where}"
