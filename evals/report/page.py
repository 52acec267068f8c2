"""The report as one HTML page: no scripts, nothing loaded from anywhere, light and dark, on a phone and on paper."""

from html import escape
from pathlib import Path
from typing import Any

from evals.report.charts import bar, heatmap, loss_chart
from evals.report.targets import HEAD, cells

Columns = dict[str, tuple[str, float | None]]


def page(report: dict[str, Any], columns: Columns) -> str:
    """The page of what evals.report.build gathered. columns: of the table -> (heading, chance in percent)."""
    parts = [
        _header(report, columns),
        _targets(report),
        _benchmarks(report, columns),
        _gates(report),
        _stages(report),
        _loss(report),
        _tuning(report),
        _held_out(report),
        _needle(report),
        _samples(report),
        _contamination(report),
        _table(report, columns),
        _about(report),
    ]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><meta name="color-scheme" content="light dark"/>'
        f"<title>{escape(report['name'])}</title><style>{css}</style></head><body><main>{''.join(parts)}"
        f"<footer>Made {escape(report['made'])} by <code>python -m evals.report</code>; every figure here is in "
        "<code>benchmark_results.json</code>.</footer></main></body></html>\n"
    )


def _header(report: dict[str, Any], columns: Columns) -> str:
    training = report["training"] or {}
    gates = training.get("gates") or []
    chip = _chip(gates[-1]["outcome"]) if gates else ""
    tiles = [(_short(report["parameters"]), "parameters")]
    if training:
        of = "pretraining " if training["tuning"] else ""
        tiles += [
            (_short(training["tokens"] or 0), f"{of}tokens"),
            (f"{training['steps']:,}", f"{of}steps"),
        ]
        tiles += [(f"{stage['steps']:,}", f"{stage['name']} steps") for stage in training["tuning"]]
    whole = (
        report["evaluations"]
        .get("perplexity", {})
        .get("metrics", {})
        .get("all", {})
        .get("bits_per_byte", {})
    )
    if whole.get("value") is not None:
        tiles.append((f"{whole['value']:.3f}", "bits a byte, unseen text"))
    first = list(report["scores"].items())[:2]
    tiles += [
        (f"{score['value']:.1f}", f"{columns[name][0]}, {score['n']:,} items")
        for name, score in first
    ]
    made = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>'
        for value, what in tiles
    )
    return (
        f'<header><div class="title"><h1>{escape(report["name"])}</h1>{chip}</div>'
        f'<p>{escape(report["checkpoint"])} · {escape(report["made"])}</p></header><div class="tiles">{made}</div>'
    )


def _targets(report: dict[str, Any]) -> str:
    """The results table: each score beside the plan's targets."""
    if not report["targets"]:
        return ""
    rows = [cells(row) for row in report["targets"]]
    notes = _list({row["title"]: row["note"] for row in report["targets"] if row["note"]})
    more = f"<details><summary>Where the targets come from</summary>{notes}</details>"
    note = "Status is the highest tier that the value reaches; ≥ and ≤ say which way is better."
    return _section("Results", note, _rows(list(HEAD), rows) + more)


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
        f"<p>Not measured: <b>{escape(n)}</b>, {escape(why)}</p>"
        for n, why in report["not_measured"].items()
    )
    if not bars and not missing:
        return ""
    legend = (
        '<div class="legend"><span><i></i>this model</span><span><i class="whisker"></i>95 % interval</span>'
        '<span><i class="chance"></i>chance</span><span><i class="tick"></i>published base models, 0.5 to 1.7B</span></div>'
    )
    note = "Percent. Published models differ in shots and harness: the table below says which."
    return _section("Benchmarks", note, f'<div class="bars">{"".join(bars)}</div>{legend}{missing}')


def _other_metrics(report: dict[str, Any]) -> list[str]:
    """Bars of rates that no column of the table quotes: cloze scores, ARC easy, tool use, ..."""
    bars = []
    quoted = {(score["task"], score["metric"]) for score in report["scores"].values()}
    for task, result in report["evaluations"].items():
        for name, metric in result["metrics"].items():
            rate = (
                isinstance(metric, dict)
                and metric.get("stderr") is not None
                and 0 <= metric["value"] <= 1
            )
            if rate and (task, name) not in quoted and task != "needle":
                about = f"{result.get('shots', 0)}-shot, {count(result, name):,} items"
                label = f"{task} {name.replace('_', ' ')}"
                bars.append(bar(label, about, 100 * metric["value"], 100 * metric["stderr"], 100.0))
    return bars


def count(result: dict[str, Any], metric: str) -> int:
    """Items that have a metric; all of the evaluation where its file does not say."""
    return result["metrics"][metric].get("n") or result["n"]


def _gates(report: dict[str, Any]) -> str:
    gates = (report["training"] or {}).get("gates") or []
    cards = []
    for gate in gates:
        references = gate.get("references") or [None] * len(gate["gates"])
        rows = "".join(
            _verdict(*row) for row in zip(gate["gates"], gate["values"], references, strict=True)
        )
        advice = gate["advice"] if gate["outcome"] != "go" else ""
        said = (
            f"<p>Accepted: {escape(gate['accepted'])}</p>"
            if gate["accepted"]
            else f"<p>{escape(advice or '')}</p>"
        )
        cards.append(
            f'<div class="decision {escape(gate["outcome"])}">{_chip(gate["outcome"])} <b>{_where(gate["step"])}</b> '
            f"<small>{escape(gate['time'][:16].replace('T', ' '))}</small><ul>{rows}</ul>{said}</div>"
        )
    note = "What was decided at milestones, by thresholds that were set before."
    return _section("Gates", note, f'<div class="gates">{"".join(cards)}</div>') if cards else ""


def _verdict(gate: dict[str, Any], value: float | None, reference: float | None) -> str:
    """One gate of a decision: the value, the change where the gate judges that, and the thresholds."""
    said, sign = (
        "not measured" if value is None else f"{value:.3f}",
        "+" if gate.get("against") else "",
    )
    if against := gate.get("against"):
        change = "unknown" if value is None or reference is None else f"{value - reference:+.3f}"
        said += f", change against {against}: {change}"
    limits = f"go {'≤' if gate['go'] < gate['no_go'] else '≥'} {gate['go']:{sign}}, no-go beyond {gate['no_go']:{sign}}"
    return (
        f"<li><b>{escape(gate['metric'])}</b> {escape(said)} <small>{escape(limits)}</small></li>"
    )


def _where(step: int | str) -> str:
    """A milestone's step, or the stage after the phases that was judged."""
    return f"step {step:,}" if isinstance(step, int) else f"after {escape(step)}"


def _stages(report: dict[str, Any]) -> str:
    """What was measured more than once, as the model went on: pretraining, SFT, DPO."""
    places = report["stages"]
    names = dict.fromkeys(name for place in places.values() for name in place)
    rows = [
        [name, *(_estimate(place.get(name)) for place in places.values())]
        for name in names
        if sum(name in place for place in places.values()) > 1
    ]
    note = (
        "The same items each time; ± is one standard error. A base model is asked in plain lines."
    )
    heads = ["", *(name.replace("_", " ") for name in places)]
    return _section("Stage by stage", note, _rows(heads, rows)) if rows else ""


def _loss(report: dict[str, Any]) -> str:
    training = report["training"]
    if not training:
        return ""
    names = {"skipped": "updates skipped", "rollback": "roll-backs", "stuck": "times stuck"}
    incidents = (
        ", ".join(f"{count} {names[kind]}" for kind, count in training["incidents"].items())
        or "no skipped update, no roll-back"
    )
    note = f"Nats a token, by step. {training['hours']:.2f} hours in steps; {incidents}."
    return _section("Training loss", note, loss_chart(training))


def _tuning(report: dict[str, Any]) -> str:
    """Mid-training, SFT and DPO: what each trained on, and its losses."""
    stages = (report["training"] or {}).get("tuning") or []
    rows, charts = [], []
    for stage in stages:
        mix = ", ".join(f"{name} {share:g}" for name, share in stage["mix"].items())
        held_out = [found["loss"] for found in stage["held_out"]]
        preferred = [100 * found["share"] for found in stage["preferred"]]
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
        "peak rate",
        "data (share)",
        "held-out loss",
        "pairs preferred, %",
        "hours in steps",
    ]
    note = "What the base model was trained on after pretraining. Each figure is the first and the last measured."
    return _section("After pretraining", note, _rows(head, rows) + "".join(charts)) if rows else ""


def change(values: list[float], digits: int) -> str:
    """First and last of a series, as text."""
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
        for name, found in metrics.items()
        if (value := found["bits_per_byte"]["value"]) is not None
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
    note = (
        "Bits per byte of text that was never trained on; lower is better, whatever the tokenizer."
    )
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
    note = "Share of hidden numbers found, by depth (down) and context length in tokens (across)."
    return _section("Needle in a haystack", note, maps) if maps else ""


def _samples(report: dict[str, Any]) -> str:
    cards = "".join(
        f'<div class="sample"><small>{"temperature " + str(s["temperature"]) if s["temperature"] else "greedy"}</small>'
        f"<b>{escape(s['prompt'])}</b>{escape(s['text'] or '(the prompt does not fit the context)')}</div>"
        for s in report["samples"]
    )
    return (
        _section(
            "In its own words",
            "Grey is the prompt. Nothing was picked.",
            f'<div class="samples">{cards}</div>',
        )
        if cards
        else ""
    )


def _contamination(report: dict[str, Any]) -> str:
    found = report["contamination"]
    if not found:
        return ""
    rows = []
    for name, counts in found["sets"].items():
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
        "too short to look for",
        "items found",
        "documents removed or cut",
        "score, all → clean items",
    ]
    note = f"What of the test sets was found in the training text, by {found['file']}."
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
    own = [_score(report["scores"].get(name)) for name in columns]
    rows = [
        "".join(
            f"<td>{cell}</td>"
            for cell in [
                escape(report["name"]),
                tokens,
                *own,
                "ours, as lm-eval 0.4.13",
                "",
                "this run",
            ]
        )
    ]
    for model in report["published"]["models"]:
        source = sources[model["from"]["source"]]
        link = f'<a rel="noreferrer" href="{escape(source["url"])}">{escape(source["title"])}</a>'
        cells = [_score(model["scores"].get(name)) for name in columns]
        by = [escape(str(model["from"]["harness"])), escape(model["from"]["metric"]), link]
        rows.append(
            "".join(
                f"<td>{cell}</td>"
                for cell in [escape(model["name"]), escape(model["tokens"]), *cells, *by]
            )
        )
    note = "Small figures are shots, and our n. Compare rows only where harness, metric and shots agree."
    body = f'<tr class="own">{rows[0]}</tr>' + "".join(f"<tr>{row}</tr>" for row in rows[1:])
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    return _section(
        "Beside published models",
        note,
        f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>',
    )


def _about(report: dict[str, Any]) -> str:
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
    files = {
        f"{task} results": f"{found['file']}, prompts {found.get('prompt_hash', '-')[:16]}"
        for task, found in report["evaluations"].items()
    }
    hashes = {"checkpoint": report["checkpoint_hash"], **report["hashes"]}
    listed = (
        _list(pairs)
        + "<details><summary>Hashes and files</summary>"
        + _list({**hashes, **files})
        + "</details>"
    )
    return _section("Environment", "", listed)


def _list(pairs: dict[str, Any]) -> str:
    return (
        "<dl>"
        + "".join(
            f"<dt>{escape(k)}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in pairs.items()
        )
        + "</dl>"
    )


def _rows(head: list[str], rows: list[list[str]]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _score(score: dict[str, Any] | None) -> str:
    value = (
        "" if score is None else f"{score['value']:.1f}" if "n" in score else f"{score['value']:g}"
    )
    n = f", n {score['n']:,}" if score and score.get("n") is not None else ""
    return "-" if score is None else f"{value} <small>{escape(str(score['shots']) + n)}</small>"


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
    """1,100,048,384 as 1.10B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
