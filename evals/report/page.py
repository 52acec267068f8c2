"""Renders the report as one self-contained HTML page without scripts or external resources."""

from html import escape
from pathlib import Path
from typing import Any

from evals.report.charts import bar, heatmap, line_chart, load_chart, loss_chart
from evals.report.targets import HEAD, cells

Columns = dict[str, tuple[str, float | None]]


def page(report: dict[str, Any], columns: Columns) -> str:
    """Render the report that evals.report.build collected.

    columns: table column -> (heading, score of guessing in percent).
    """
    sections = [
        _header(report, columns),
        _targets(report),
        _benchmarks(report, columns),
        _gates(report),
        _stages(report),
        _loss(report),
        _routing(report),
        _tuning(report),
        _held_out(report),
        _needle(report),
        _samples(report),
        _contamination(report),
        _table(report, columns),
        _environment(report),
    ]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(report['name'])}</title><style>{css}</style></head>"
        f"<body><main>{''.join(sections)}"
        f"<footer>Created {escape(report['made'])} by <code>python -m evals.report</code>. "
        "All values are in <code>benchmark_results.json</code>.</footer></main></body></html>\n"
    )


def _header(report: dict[str, Any], columns: Columns) -> str:
    training = report["training"] or {}
    gates = training.get("gates") or []
    chip = _chip(gates[-1]["outcome"]) if gates else ""
    tiles = [(_short(report["parameters"]), "parameters")]
    if report.get("active_parameters"):
        tiles.append((_short(report["active_parameters"]), "parameters per token"))
    if training:
        prefix = "pretraining " if training["tuning"] else ""
        tiles += [
            (_short(training["tokens"] or 0), f"{prefix}tokens"),
            (f"{training['steps']:,}", f"{prefix}steps"),
        ]
        tiles += [(f"{stage['steps']:,}", f"{stage['name']} steps") for stage in training["tuning"]]
    perplexity = report["evaluations"].get("perplexity", {}).get("metrics", {})
    bits = perplexity.get("all", {}).get("bits_per_byte", {})
    if bits.get("value") is not None:
        tiles.append((f"{bits['value']:.3f}", "bits per byte, held-out text"))
    first = list(report["scores"].items())[:2]
    tiles += [
        (f"{score['value']:.1f}", f"{columns[name][0]}, {score['n']:,} items")
        for name, score in first
    ]
    tiles_html = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>'
        for value, label in tiles
    )
    return (
        f'<header><div class="title"><h1>{escape(report["name"])}</h1>{chip}</div>'
        f"<p>{escape(report['checkpoint'])} · {escape(report['made'])}</p></header>"
        f'<div class="tiles">{tiles_html}</div>'
    )


def _targets(report: dict[str, Any]) -> str:
    """The results table: scores beside the plan's targets."""
    if not report["targets"]:
        return ""
    rows = [cells(row) for row in report["targets"]]
    notes = _list({row["title"]: row["note"] for row in report["targets"] if row["note"]})
    details = f"<details><summary>Sources of the targets</summary>{notes}</details>"
    note = "Status is the highest tier reached. ≥: higher is better; ≤: lower is better."
    return _section("Results", note, _rows(list(HEAD), rows) + details)


def _benchmarks(report: dict[str, Any], columns: Columns) -> str:
    bars = []
    for name, score in report["scores"].items():
        heading, chance = columns[name]
        refs = [
            (f"{model['name']} {model['tokens']}", model["scores"][name]["value"])
            for model in report["published"]["models"]
            if model["kind"] == "base" and name in model["scores"]
        ]
        about = f"{score['shots']}-shot, {score['n']:,} items"
        top = 10.0 if name == "mt_bench" else 100.0
        bars.append(
            bar(heading, about, score["value"], score["stderr"], top, chance=chance, refs=refs)
        )
    bars += _other_metrics(report)
    missing = "".join(
        f"<p>Not measured: <b>{escape(name)}</b>, {escape(reason)}</p>"
        for name, reason in report["not_measured"].items()
    )
    if not bars and not missing:
        return ""
    legend = (
        '<div class="legend"><span><i></i>this model</span>'
        '<span><i class="whisker"></i>95 % interval</span>'
        '<span><i class="chance"></i>chance</span>'
        '<span><i class="tick"></i>published base models, 0.5 to 1.7B</span></div>'
    )
    note = "Percent. The table below gives shots and harness of the published models."
    return _section("Benchmarks", note, f'<div class="bars">{"".join(bars)}</div>{legend}{missing}')


def _other_metrics(report: dict[str, Any]) -> list[str]:
    """Bars of rates without a table column: cloze scores, ARC easy, tool use, ..."""
    bars = []
    listed = {(score["task"], score["metric"]) for score in report["scores"].values()}
    for task, result in report["evaluations"].items():
        for name, metric in result["metrics"].items():
            is_rate = (
                isinstance(metric, dict)
                and metric.get("stderr") is not None
                and 0 <= metric["value"] <= 1
            )
            if is_rate and (task, name) not in listed and task != "needle":
                about = f"{result.get('shots', 0)}-shot, {count(result, name):,} items"
                label = f"{task} {name.replace('_', ' ')}"
                bars.append(bar(label, about, 100 * metric["value"], 100 * metric["stderr"], 100.0))
    return bars


def count(result: dict[str, Any], metric: str) -> int:
    """Number of items with a metric; all items if the results file does not state it."""
    return result["metrics"][metric].get("n") or result["n"]


def _gates(report: dict[str, Any]) -> str:
    training = report["training"] or {}
    gates = (training.get("gates") or []) + (training.get("forecasts") or [])
    cards = []
    for gate in sorted(gates, key=lambda gate: gate["time"]):
        references = gate.get("references") or [None] * len(gate["gates"])
        rows = "".join(
            _verdict(*row) for row in zip(gate["gates"], gate["values"], references, strict=True)
        )
        remark = gate["advice"] or "" if gate["outcome"] != "go" else ""
        if gate["accepted"]:
            remark = f"Accepted: {gate['accepted']}"
        if number := gate.get("averages"):
            remark = f"Average of {number} checkpoints: a forecast of the decay, not a decision."
        cards.append(
            f'<div class="decision {escape(gate["outcome"])}">{_chip(gate["outcome"])} '
            f"<b>{_milestone(gate['step'])}</b> "
            f"<small>{escape(gate['time'][:16].replace('T', ' '))}</small><ul>{rows}</ul>"
            f"<p>{escape(remark)}</p></div>"
        )
    note = "Decisions at milestones, by predefined thresholds."
    return _section("Gates", note, f'<div class="gates">{"".join(cards)}</div>') if cards else ""


def _verdict(gate: dict[str, Any], value: float | None, reference: float | None) -> str:
    """One gate of a decision: value, thresholds, and the change if the gate judges a change."""
    text, sign = "not measured" if value is None else f"{value:.3f}", ""
    if against := gate.get("against"):
        change = "unknown" if value is None or reference is None else f"{value - reference:+.3f}"
        text, sign = f"{text}, change against {against}: {change}", "+"
    relation = "≤" if gate["go"] < gate["no_go"] else "≥"
    limits = f"go {relation} {gate['go']:{sign}}, no-go beyond {gate['no_go']:{sign}}"
    return (
        f"<li><b>{escape(gate['metric'])}</b> {escape(text)} <small>{escape(limits)}</small></li>"
    )


def _milestone(step: int | str) -> str:
    """A milestone's step, or the name of a stage after pretraining."""
    return f"step {step:,}" if isinstance(step, int) else f"after {escape(step)}"


def _stages(report: dict[str, Any]) -> str:
    """Metrics measured at more than one stage: pretraining, SFT, DPO."""
    stages = report["stages"]
    names = dict.fromkeys(name for metrics in stages.values() for name in metrics)
    rows = [
        [name, *(_estimate(metrics.get(name)) for metrics in stages.values())]
        for name in names
        if sum(name in metrics for metrics in stages.values()) > 1
    ]
    note = "The same items at every stage; ± is one standard error. Base models see plain lines."
    heads = ["", *(name.replace("_", " ") for name in stages)]
    return _section("Stage by stage", note, _rows(heads, rows)) if rows else ""


def _loss(report: dict[str, Any]) -> str:
    training = report["training"]
    if not training:
        return ""
    names = {"skipped": "skipped updates", "rollback": "rollbacks", "stuck": "times stuck"}
    names |= {"starved": "starved experts"}
    incidents = (
        ", ".join(f"{count} {names[kind]}" for kind, count in training["incidents"].items())
        or "no skipped updates or rollbacks"
    )
    note = f"Nats per token, by step. {training['hours']:.2f} hours in steps; {incidents}."
    return _section("Training loss", note, loss_chart(training))


def _routing(report: dict[str, Any]) -> str:
    """Load of the experts, maximum violation and router entropy of each stage with experts."""
    training = report["training"] or {}
    parts = []
    for stage in (training, *training.get("tuning", ())):
        if not (routing := stage.get("routing")):
            continue
        title = f"<h3>{escape(stage['name'])}</h3>" if "name" in stage else ""
        curves = (
            line_chart("maximum violation", routing["steps"], routing["max_violation"]),
            line_chart("router entropy, nats", routing["steps"], routing["entropy"]),
        )
        starved = "".join(f"<p>{escape(text.strip())}</p>" for text in stage["starved"])
        parts.append(title + load_chart(routing["steps"], routing["load"]) + "".join(curves))
        parts.append(starved)
    note = (
        "Share of tokens of each expert (rows) by layer and step; 1 is an equal share. Maximum "
        "violation: the largest share of a layer, minus 1, as a mean over layers."
    )
    return _section("Experts", note, "".join(parts)) if parts else ""


def _tuning(report: dict[str, Any]) -> str:
    """Mid-training, SFT and DPO: data, losses and loss curves of each stage."""
    stages = (report["training"] or {}).get("tuning") or []
    rows, charts = [], []
    for stage in stages:
        mix = ", ".join(f"{name} {share:g}" for name, share in stage["mix"].items())
        held_out = [point["loss"] for point in stage["held_out"]]
        preferred = [100 * point["share"] for point in stage["preferred"]]
        rows.append(
            [
                stage["name"],
                f"{stage['steps']:,}",
                f"{stage['tokens'] or 0:,}",
                "-" if stage["lr"] is None else f"{stage['lr']:g}",
                mix or "-",
                change(held_out, 3),
                change(preferred, 1),
                f"{stage['hours']:.2f}",
            ]
        )
        charts.append(
            f"<h3>{escape(stage['name'])}</h3>{loss_chart(stage)}" if stage["steps"] else ""
        )
    head = [
        "stage",
        "steps",
        "tokens",
        "peak learning rate",
        "data (share)",
        "validation loss",
        "preference accuracy, %",
        "hours in steps",
    ]
    note = "Training stages after pretraining. Losses and accuracies: first → last measurement."
    return _section("After pretraining", note, _rows(head, rows) + "".join(charts)) if rows else ""


def change(values: list[float], digits: int) -> str:
    """First and last value of a series, as text."""
    if not values:
        return "-"
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " → ".join(
        f"{value:.{digits}f}" if isinstance(value, (int, float)) else str(value) for value in ends
    )


def _held_out(report: dict[str, Any]) -> str:
    metrics = report["evaluations"].get("perplexity", {}).get("metrics", {})
    bits = {
        name: value
        for name, estimates in metrics.items()
        if (value := estimates["bits_per_byte"]["value"]) is not None
    }
    if not bits:
        return ""
    top = max(4.0, max(bits.values()))
    bars = [
        bar(
            name,
            f"perplexity {metrics[name]['perplexity']['value']:,.1f}{_tokens(metrics[name])}",
            value,
            None,
            top,
            digits=3,
        )
        for name, value in sorted(bits.items(), key=lambda pair: (pair[0] == "all", pair[1]))
    ]
    note = "Bits per byte of held-out text; lower is better. Comparable across tokenizers."
    return _section("Held-out text", note, f'<div class="bars">{"".join(bars)}</div>')


def _tokens(metrics: dict[str, Any]) -> str:
    tokens = metrics.get("tokens", {}).get("value")
    return "" if tokens is None else f", {tokens:,.0f} tokens"


def _needle(report: dict[str, Any]) -> str:
    grids = report.get("needle") or {}
    maps = "".join(
        heatmap(
            f"{kind}, {grid['n']:,} tests" if "n" in grid else kind,
            grid["lengths"],
            grid["depths"],
            grid["cells"],
        )
        for kind, grid in grids.items()
    )
    note = "Share of numbers retrieved, by depth (rows) and context length in tokens (columns)."
    return _section("Needle in a haystack", note, maps) if maps else ""


def _samples(report: dict[str, Any]) -> str:
    cards = []
    for sample in report["samples"]:
        decoding = f"temperature {sample['temperature']}" if sample["temperature"] else "greedy"
        text = sample["text"] or "(the prompt does not fit the context)"
        cards.append(
            f'<div class="sample"><small>{decoding}</small>'
            f"<b>{escape(sample['prompt'])}</b>{escape(text)}</div>"
        )
    body = f'<div class="samples">{"".join(cards)}</div>'
    return _section("Samples", "Prompts are grey. Samples are not selected.", body) if cards else ""


def _contamination(report: dict[str, Any]) -> str:
    contamination = report["contamination"]
    if not contamination:
        return ""
    rows = []
    for name, counts in contamination["sets"].items():
        cells = [f"{counts[key]:,}" for key in ("items", "too_short", "items_hit", "documents_hit")]
        clean = [
            _clean(result)
            for task, result in report["evaluations"].items()
            if task == name and result.get("clean")
        ]
        rows.append([name, *cells, clean[0] if clean else "-"])
    head = [
        "test set",
        "items",
        "too short to search",
        "items found",
        "documents removed or cut",
        "score, all → clean items",
    ]
    note = f"Benchmark items found in the training text; source: {contamination['file']}."
    return _section("Contamination", note, _rows(head, rows))


def _clean(result: dict[str, Any]) -> str:
    name = next(iter(result["metrics"]))
    clean = result["clean"]["metrics"].get(name)
    if not clean:
        return "-"
    n = f" (n {count(result, name):,} → {clean['n']:,})" if clean.get("n") else ""
    return f"{name} {100 * result['metrics'][name]['value']:.1f} → {100 * clean['value']:.1f}{n}"


def _table(report: dict[str, Any], columns: Columns) -> str:
    head = [
        "model",
        "tokens",
        *(heading for heading, _ in columns.values()),
        "harness",
        "metric",
        "source",
    ]
    sources = report["published"]["sources"]
    tokens = _short(report["training"]["tokens"] or 0) if report["training"] else "?"
    scores = [_score(report["scores"].get(name)) for name in columns]
    rows = [[escape(report["name"]), tokens, *scores, "ours, as lm-eval 0.4.13", "", "this run"]]
    for model in report["published"]["models"]:
        source = sources[model["from"]["source"]]
        link = f'<a rel="noreferrer" href="{escape(source["url"])}">{escape(source["title"])}</a>'
        cells = [_score(model["scores"].get(name)) for name in columns]
        origin = [escape(str(model["from"]["harness"])), escape(model["from"]["metric"]), link]
        rows.append([escape(model["name"]), escape(model["tokens"]), *cells, *origin])
    note = "Small print: shots and our n. Compare only rows with equal harness, metric and shots."
    first, *others = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = f'<tr class="own">{first}</tr>' + "".join(f"<tr>{row}</tr>" for row in others)
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    return _section(
        "Beside published models",
        note,
        f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>',
    )


def _environment(report: dict[str, Any]) -> str:
    training = report["training"] or {}
    pairs = {f"measured with {name}": value for name, value in report["environment"].items()}
    pairs |= {
        f"trained with {name}": value for name, value in training.get("environment", {}).items()
    }
    for store, corpus in (training.get("corpus") or {}).items():
        origins = ", ".join(f"{name}: {origin}" for name, origin in corpus["origins"].items())
        pairs |= {f"corpus {store}": f"sha256 {corpus['sha256'][:16]}; {origins}"}
    shapes = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    )
    pairs |= {
        name: report["config"].get(name)
        for name in (*shapes, "vocab_size", "max_position_embeddings")
    }
    experts = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    pairs |= {name: report["config"][name] for name in experts if name in report["config"]}
    files = {
        f"{task} results": f"{result['file']}, prompts {result.get('prompt_hash', '-')[:16]}"
        for task, result in report["evaluations"].items()
    }
    hashes = {"checkpoint": report["checkpoint_hash"], **report["hashes"]}
    details = f"<details><summary>Hashes and files</summary>{_list({**hashes, **files})}</details>"
    return _section("Environment", "", _list(pairs) + details)


def _list(pairs: dict[str, Any]) -> str:
    entries = (
        f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>"
        for name, value in pairs.items()
    )
    return f"<dl>{''.join(entries)}</dl>"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    value = f"{score['value']:.1f}" if "n" in score else f"{score['value']:g}"
    n = f", n {score['n']:,}" if score.get("n") is not None else ""
    return f"{value} <small>{escape(str(score['shots']) + n)}</small>"


def _estimate(estimate: dict[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    n = f", n {estimate['n']:,}" if estimate.get("n") else ""
    n = f", {estimate['tokens']:,.0f} tokens" if estimate.get("tokens") else n
    return (
        f"{estimate['value']:.3f}"
        + (f" ± {estimate['stderr']:.3f}" if estimate["stderr"] is not None else "")
        + n
    )


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _chip(outcome: str) -> str:
    return f'<span class="chip {escape(outcome)}">{escape(outcome.upper())}</span>'


def _short(number: float) -> str:
    """A number with a suffix: 1,100,048,384 as 1.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
