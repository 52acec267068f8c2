"""Companions of exported GGUF files: Ollama's Modelfile, a note for LM Studio, the model card."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.chat.template import is_our_template
from evals.engines import folder_hash
from evals.report.build import measured
from evals.report.page import change
from evals.report.stages import leaves
from evals.report.trained import phases_of, read_history, settings
from export.gguf_plan import architecture, read_config
from files import write_text
from models.hf_experts import model_type
from models.nanollama import ModelConfig

MARK = "written by scripts/export_gguf.py"
OLLAMA = '''\
TEMPLATE """<|endoftext|>{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}You can call these tools:{{ range .Tools }}
{{ . }}{{ end }}{{ end }}<|im_end|>
{{ end }}{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Thinking }}<|start_thought|>{{ .Thinking }}<|end_thought|>{{ end }}\
{{ .Content }}{{ range .ToolCalls -}}
<|tool_call|>{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}\
{{ if not $last }}<|im_end|>
{{ end }}{{ else if eq .Role "tool" }}<|im_start|>tool
<|tool_response|>{{ .Content }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|im_start|>"
'''
OLLAMA_TEMPLATE = OLLAMA.split('"""')[1]
PHASE_HEAD = ("phase", "steps", "tokens", "sequence length", "peak lr", "mixture")
SCORE_HEAD = ("task", "metric", "value", "shots", "n")
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def write_companions(
    folder: Path,
    targets: dict[str, Path],
    name: str,
    template: str | None,
    logs: Path | None,
    results: Path | None,
) -> Iterator[str]:
    """Write Modelfile, LM_STUDIO.md and README.md beside the last target; yield a line for each.

    A file of that name without MARK is left alone. logs, results: default to those of the run.
    """
    last, run = list(targets.values())[-1], run_name(folder)
    logs, results = logs or Path("logs") / run, results or Path("results") / run
    texts = {
        "Modelfile": modelfile(last.name, template),
        "LM_STUDIO.md": lm_studio(last.name, template),
        "README.md": model_card(folder, targets, name, template, logs, results),
    }
    for file, text in texts.items():
        path = last.parent / file
        if path.is_file() and MARK not in path.read_text(errors="replace", encoding="utf-8"):
            yield f"{path} was not written by this command; left unchanged"
            continue
        write_text(path, text)
        yield f"{path} written"


def run_name(folder: Path) -> str:
    """Return the run of a checkpoint: the folder below checkpoints/, else the folder's name."""
    return next(
        (parent.name for parent in folder.resolve().parents if parent.parent.name == "checkpoints"),
        folder.name,
    )


def modelfile(file: str, template: str | None) -> str:
    """Return Ollama's Modelfile; template: the GGUF file's Jinja template, or None.

    Ollama uses Go templates, so our template is written out as one.
    """
    head = (
        f"# {MARK}; ollama create nanollama -f Modelfile && ollama run nanollama\nFROM ./{file}\n"
    )
    if not template:
        return head + 'TEMPLATE """{{ .Prompt }}"""\n'
    if not is_our_template(template):
        return head + (
            "# The GGUF file contains the model's own chat template. If Ollama does not "
            "support it, write it here as a Go template: TEMPLATE ...\n"
        )
    sampling = "".join(f"PARAMETER {name} {value}\n" for name, value in SAMPLING.items())
    return head + OLLAMA + sampling


def lm_studio(file: str, template: str | None) -> str:
    """Return the instructions for importing the file into LM Studio."""
    lines = [
        f"<!-- {MARK} -->",
        "# In LM Studio",
        "",
        f"`lms import {file}`, or put it into `~/.lmstudio/models/<you>/<model>/{file}`.",
    ]
    if is_our_template(template):
        lines += [
            "The file contains the chat template. In the model's settings, under reasoning "
            "parsing, set the start string",
            "`<|start_thought|>` and the end string `<|end_thought|>` to fold thoughts apart from "
            "answers.",
        ]
    elif template:
        lines += ["The file contains the model's own chat template."]
    else:
        lines += ["This is a base model: it continues text and has no chat template."]
    return "\n".join(lines) + "\n"


class RunRecord(NamedTuple):
    """What the logs say of a checkpoint's training."""

    phases: dict[str, dict[str, Any]]  # pretraining phases and stages -> settings, steps, tokens
    tuned: list[dict[str, Any]]  # stages after pretraining
    events: list[dict[str, Any]]
    stores: dict[Path, None]  # data stores of pretraining, in order


def read_run(logs: Path, folder: Path) -> RunRecord:
    """Read the logs of a run up to a checkpoint; an empty record without logs."""
    tuned, rows, events = read_history(logs, folder)
    phases = {phase["name"]: _config(logs, phase) for phase in phases_of(rows)}
    phases |= {
        stage["name"]: _config(logs / stage["name"], stage["phases"][-1])
        for stage in tuned
        if stage["phases"]
    }
    stores = dict.fromkeys(
        Path(phase["data"]["store"])
        for phase in phases.values()
        if phase.get("data", {}).get("store")
    )
    return RunRecord(phases, tuned, events, stores)


def model_card(
    folder: Path,
    targets: dict[str, Path],
    name: str,
    template: str | None,
    logs: Path,
    results: Path,
) -> str:
    """Return the card from config.json, the run's logs up to this checkpoint and its results.

    A section whose input is missing says so.
    """
    config = read_config(folder)
    run = read_run(logs, folder)
    smallest = min(targets.values(), key=lambda path: path.stat().st_size)
    usage = (
        f"python -m scripts.chat --checkpoint {smallest.name}"
        if template
        else f'llama-cli -m {smallest.name} -no-cnv -p "Once"'
    )
    digest = folder_hash(folder)
    scores = score_rows(measured(results, digest)[0])
    environment = next((_json(path) for path in sorted(logs.glob("*.environment.json"))[-1:]), {})
    versions = ", ".join(
        f"{package} {environment[package]}"
        for package in ("python", "torch")
        if environment.get(package)
    )
    stage_head = ("stage", "started from", "data", "validation loss", "pairs preferred, %")
    data_head = ("store", "source", "documents", "kept", "tokens", "origin", "sha256")
    sections = [
        f"---\nlicense: other\ntags: [gguf, nanollama]\n---\n<!-- {MARK} -->\n# {name}\n",
        f"{describe(config, template)}\n",
        f"Exported from the checkpoint `{folder}`, sha256 `{digest}`.\n",
        f"## Files\n\n{markdown_table(('file', 'type', 'MB'), _files(targets))}",
        "## Use\n\n```\n"
        f"{usage}\nollama create nanollama -f Modelfile && ollama run nanollama\n```\n",
        f"## Training\n\n{markdown_table(PHASE_HEAD, training_rows(run.phases)) or _none(logs)}",
        markdown_table(stage_head, _tuning(run.tuned)),
        f"Trained with {versions}.\n" if versions else "",
        f"## Data\n\n{markdown_table(data_head, _data(run.stores)) or _none('a data report')}",
        f"## Contamination\n\n{_contamination(run.stores) or _none('a contamination report')}",
        f"## Gates\n\n{_gates(run.events) or _none('decisions')}",
        f"## Scores\n\n{markdown_table(SCORE_HEAD, scores) or _none(f'its results in {results}')}",
        "## Licence\n\nThe owner's choice: put it here and above, with the terms of the training "
        "data.\n",
    ]
    return "\n".join(section for section in sections if section)


def describe(config: ModelConfig, template: str | None) -> str:
    """Return the model's size, architecture and chat support as text."""
    kind = architecture(config) + " (Llama with normalised q and k)" * (
        architecture(config) == "qwen3"
    )
    scaling = f", {config.rope_scaling}" if config.rope_scaling else ""
    return (
        f"{config.num_parameters / 1e6:,.1f}M parameters{_active(config)}, architecture {kind}, "
        f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary "
        f"{config.vocab_size:,}, context {config.max_position_embeddings:,}, rope theta "
        f"{config.rope_theta:,.0f}{scaling}. {_chat_support(template)}"
    )


def _active(config: ModelConfig) -> str:
    """Return the active parameters and the experts of a mixture as text; "" for a dense model."""
    if config.kind == "dense":
        return ""
    form = {"mixtral": "as in Mixtral", "qwen3_moe": "as in Qwen3 MoE"}
    return (
        f" ({config.num_active_parameters / 1e6:,.1f}M active: {config.moe.top_k} of "
        f"{config.moe.experts} experts per token, each of width {config.expert_size:,}, "
        f"{form.get(model_type(config), 'in a form that only NanoLlama reads')})"
    )


def _chat_support(template: str | None) -> str:
    if is_our_template(template):
        return "A chat model with NanoLlama's chat template."
    if template:
        return "A chat model with the chat template of its checkpoint, which the files contain."
    return "A base model without a chat template."


def _none(source: Any) -> str:
    return f"Not found: {source}.\n"


def _config(logs: Path, phase: dict[str, Any]) -> dict[str, Any]:
    """Return a phase's settings, with the steps and tokens of the log."""
    logged = {"steps": phase["end"] - phase["begin"], "tokens": phase["tokens"]}
    return {**settings(logs / f"{phase['name']}.config.yaml"), **logged}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def markdown_table(head: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    """Return a Markdown table; "" without rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return (
        "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines]) + "\n"
        if lines
        else ""
    )


def _files(targets: dict[str, Path]) -> Iterator[tuple[Any, ...]]:
    for outtype, path in targets.items():
        yield path.name, outtype, f"{path.stat().st_size / 1e6:.1f}"


def training_rows(phases: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield phase, steps, tokens, sequence length, peak learning rate and mixture."""
    for phase, run in phases.items():
        data = run.get("data", {})
        rate = run.get("optim", {}).get("lr")
        mix = ", ".join(f"{name} {share:g}" for name, share in (data.get("mix") or {}).items())
        yield (
            phase,
            f"{run['steps']:,}",
            f"{run['tokens']:,}" if run["tokens"] else "?",
            data.get("sequence_length"),
            rate,
            mix,
        )


def _tuning(stages: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for stage in stages:
        data = ", ".join(f"{name}: {path}" for name, path in stage["sources"].items())
        val_losses = [row["loss"] for row in stage["held_out"]]
        preferred = [100 * row["share"] for row in stage["preferred"]]
        losses, shares = change(val_losses, 3), change(preferred, 1)
        yield stage["name"], stage["started_from"], data, losses, shares


def _data(stores: dict[Path, None]) -> Iterator[tuple[Any, ...]]:
    for store in stores:
        report = _json(store / "report.json")
        hashes = report.get("inputs", {}).get("documents", {})
        for source, counts in report.get("sources", {}).items():
            values = [counts.get(name) for name in ("documents", "kept", "train_tokens")]
            numbers = (f"{number:,}" if isinstance(number, int) else "" for number in values)
            origin = _json(store / "documents" / source / "manifest.json").get("origin", "")
            yield store, source, *numbers, origin, hashes.get(source, "")[:16]


def _contamination(stores: dict[Path, None]) -> str:
    texts = [
        (store / "contamination.md").read_text(encoding="utf-8")
        for store in stores
        if (store / "contamination.md").is_file()
    ]
    return "\n".join(text.split("\n\n")[0] + "\n" for text in texts)


def _gates(events: list[dict[str, Any]]) -> str:
    return "".join(f"- {event.get('text')}\n" for event in events if event.get("event") == "gate")


def score_rows(evaluations: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield task, metric, value with standard error, shots and n."""
    for task, result in sorted(evaluations.items()):
        for name, estimate in leaves(result["metrics"]):
            if estimate["value"] is not None and not name.endswith("tokens"):
                error = f" ± {estimate['stderr']:.2g}" if estimate["stderr"] is not None else ""
                n = estimate.get("n") or result.get("n", "")
                yield task, name, f"{estimate['value']:.4g}{error}", result.get("shots", ""), n
