"""What goes beside exported files: Ollama's Modelfile, a note for LM Studio, and a model card of what the run left behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.chat.template import is_our_template
from evals.engines import folder_hash
from evals.report.build import leaves, measured
from evals.report.page import change
from evals.report.trained import phases_of, settings, story
from export.gguf import architecture, read_config

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
{{ if .Thinking }}<|start_thought|>{{ .Thinking }}<|end_thought|>{{ end }}{{ .Content }}{{ range .ToolCalls -}}
<|tool_call|>{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}{{ if not $last }}<|im_end|>
{{ end }}{{ else if eq .Role "tool" }}<|im_start|>tool
<|tool_response|>{{ .Content }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|im_start|>"
'''


def modelfile(file: str, template: str | None) -> str:
    """Ollama's Modelfile with our template in Go's language. template: the one in the GGUF file."""
    head = (
        f"# {MARK}; ollama create nanollama -f Modelfile && ollama run nanollama\nFROM ./{file}\n"
    )
    if not template:
        return head + 'TEMPLATE """{{ .Prompt }}"""\n'
    if not is_our_template(template):
        note = "The model's own chat template is in the file. Ollama uses it if it knows it; else write it here in Go's language:"
        return head + f"# {note} TEMPLATE ...\n"
    return head + OLLAMA + "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\n"


def lm_studio(file: str, template: str | None) -> str:
    """How to bring the file into LM Studio."""
    lines = [
        f"<!-- {MARK} -->",
        "# In LM Studio",
        "",
        f"`lms import {file}`, or put it into `~/.lmstudio/models/<you>/<model>/{file}`.",
    ]
    if is_our_template(template):
        lines += [
            "The chat template is in the file. In the model's settings, under reasoning parsing, the start string is",
            "`<|start_thought|>` and the end string `<|end_thought|>`; then thoughts are folded apart from answers.",
        ]
    elif template:
        lines += ["The model's own chat template is in the file."]
    else:
        lines += ["This is a base model: it continues text, and has no chat template."]
    return "\n".join(lines) + "\n"


def model_card(
    folder: Path,
    targets: dict[str, Path],
    name: str,
    template: str | None,
    logs: Path,
    results: Path,
) -> str:
    """The card, from config.json, logs/<run> up to this checkpoint and its own results. It says what is not there."""
    config = read_config(folder)
    tuned, rows, events = story(logs, folder)
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
    kind = architecture(config) + " (Llama with normalised q and k)" * (
        architecture(config) == "qwen3"
    )
    smallest = min(targets.values(), key=lambda path: path.stat().st_size)
    usage = (
        f"python -m scripts.chat --model {smallest.name}"
        if template
        else f'llama-cli -m {smallest.name} -no-cnv -p "Once"'
    )
    digest = folder_hash(folder)
    scores = _scores(measured(results, digest)[0])
    made_with = next((_json(path) for path in sorted(logs.glob("*.environment.json"))[-1:]), {})
    versions = ", ".join(
        f"{part} {made_with[part]}" for part in ("python", "torch") if made_with.get(part)
    )
    data_head = ("store", "source", "documents", "kept", "tokens", "origin", "sha256")
    parts = [
        f"---\nlicense: other\ntags: [gguf, nanollama]\n---\n<!-- {MARK} -->\n# {name}\n",
        f"{config.num_parameters / 1e6:,.1f}M parameters, architecture {kind}, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}, rope theta "
        f"{config.rope_theta:,.0f}. {_talks(template)}\n",
        f"Made from the checkpoint `{folder}`, sha256 `{digest}`.\n",
        f"## Files\n\n{_rows(('file', 'type', 'MB'), _files(targets))}",
        f"## Use\n\n```\n{usage}\nollama create nanollama -f Modelfile && ollama run nanollama\n```\n",
        f"## Training\n\n{_rows(('phase', 'steps', 'tokens', 'row', 'peak lr', 'mixture'), _training(phases)) or _none(logs)}",
        _rows(
            ("stage", "started from", "data", "held-out loss", "pairs preferred, %"), _tuning(tuned)
        ),
        f"Trained with {versions}.\n" if versions else "",
        f"## Data\n\n{_rows(data_head, _data(stores)) or _none('a data report')}",
        f"## Contamination\n\n{_contamination(stores) or _none('a contamination report')}",
        f"## Gates\n\n{_gates(events) or _none('decisions')}",
        f"## Scores\n\n{_rows(('task', 'metric', 'value', 'shots', 'n'), scores) or _none(f'its results in {results}')}",
        "## Licence\n\nThe owner's choice: put it here and above, with the terms of the data it was trained on.\n",
    ]
    return "\n".join(part for part in parts if part)


def _talks(template: str | None) -> str:
    """How to talk to the model."""
    if is_our_template(template):
        return "Speaks in a chat template of its own."
    if template:
        return "Speaks in the chat template that its checkpoint came with; it is in the files."
    return "A base model, without chat."


def _none(what: Any) -> str:
    return f"Not found: {what}.\n"


def _config(logs: Path, phase: dict[str, Any]) -> dict[str, Any]:
    """The settings of a phase, with the steps that were made and the tokens that they read."""
    made = {"steps": phase["end"] - phase["begin"], "tokens": phase["tokens"]}
    return {**settings(logs / f"{phase['name']}.config.yaml"), **made}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(head: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    """A markdown table, empty where there are no rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return (
        "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines]) + "\n"
        if lines
        else ""
    )


def _files(targets: dict[str, Path]) -> Iterator[tuple[Any, ...]]:
    for outtype, path in targets.items():
        yield path.name, outtype, f"{path.stat().st_size / 1e6:.1f}"


def _training(phases: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
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
        held_out = [measured["loss"] for measured in stage["held_out"]]
        preferred = [100 * measured["share"] for measured in stage["preferred"]]
        yield stage["name"], stage["started_from"], data, change(held_out, 3), change(preferred, 1)


def _data(stores: dict[Path, None]) -> Iterator[tuple[Any, ...]]:
    for store in stores:
        report = _json(store / "report.json")
        hashes = report.get("inputs", {}).get("documents", {})
        for source, counts in report.get("sources", {}).items():
            found = (counts.get(name) for name in ("documents", "kept", "train_tokens"))
            numbers = (f"{number:,}" if isinstance(number, int) else "" for number in found)
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


def _scores(evaluations: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for task, result in sorted(evaluations.items()):
        for name, estimate in leaves(result["metrics"]):
            if estimate["value"] is not None and not name.endswith("tokens"):
                error = f" ± {estimate['stderr']:.2g}" if estimate["stderr"] is not None else ""
                n = estimate.get("n") or result.get("n", "")
                yield task, name, f"{estimate['value']:.4g}{error}", result.get("shots", ""), n
