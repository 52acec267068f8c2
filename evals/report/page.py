"""Renders the report as one self-contained HTML page without scripts or external resources."""

from html import escape
from pathlib import Path
from typing import Any

from evals.report.charts import bar, heatmap, line_chart, load_chart, loss_chart
from evals.report.markup import (
    ERRORS,
    change_text,
    count,
    error,
    listing,
    named,
    score,
    section,
    short,
    table,
)
from evals.report.metric_names import Metric, metric_of
from evals.report.targets import HEAD, cells
from evals.report.verdicts import gates_section, stage_name, summary
from evals.text_blocks import RATIOS

Columns = dict[str, tuple[str, float | None]]
ROLES = {"thought": "thought", "call": "tool call", "result": "tool result", "note": "note"}


def page(report: dict[str, Any], columns: Columns) -> str:
    """Render the report that evals.report.build collected.

    columns: table column -> (heading, score of guessing in percent).
    """
    sections = [
        _header(report),
        _targets(report),
        _gates(report),
        _stages(report),
        _benchmarks(report, columns),
        _held_out(report),
        _needle(report),
        _samples(report),
        _curves(report),
        _tuning(report),
        _routing(report),
        _contamination(report),
        _published(report, columns),
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
        f"<body><main>{''.join(sections)}</main>"
        f"<footer>Created {escape(report['made'])} by <code>python -m evals.report</code>. "
        "All values are in <code>benchmark_results.json</code>.</footer></body></html>\n"
    )


def _header(report: dict[str, Any]) -> str:
    training = report["training"] or {}
    tiles = [(short(report["parameters"]), "parameters")]
    if report.get("active_parameters"):
        tiles.append((short(report["active_parameters"]), "parameters per token"))
    if training:
        prefix = "pretraining " if training["tuning"] else ""
        tiles += [
            (short(training["tokens"] or 0), f"{prefix}tokens"),
            (f"{training['steps']:,}", f"{prefix}steps"),
        ]
        tiles += [(f"{stage['steps']:,}", f"{stage['name']} steps") for stage in training["tuning"]]
    keys = [("perplexity", "all.bits_per_byte")]
    keys += [(s["task"], f"{s['task']}.{s['metric']}") for s in report["scores"].values()][:2]
    for task, key in keys:
        estimate = _estimate(report["evaluations"].get(task, {}), key)
        if estimate["value"] is not None:
            metric = metric_of(key)
            about = count(estimate.get("n"), estimate.get("tokens"))
            label = f"{metric.title}{error(metric, estimate.get('stderr'))}, {about}"
            tiles.append((metric.text(estimate["value"]), label))
    tiles_html = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>'
        for value, label in tiles
    )
    return (
        f"<header><h1>{escape(report['name'])}</h1>"
        f"<p>{escape(report['checkpoint'])} · {escape(report['made'])}</p>{summary(report)}"
        f'</header><div class="tiles">{tiles_html}</div><p class="note">{escape(ERRORS)}</p>'
    )


def _estimate(result: dict[str, Any], key: str) -> dict[str, Any]:
    """Value, stderr, n and tokens of a metric such as mmlu.acc or wiki.bits_per_byte."""
    task, _, name = key.rpartition(".")
    metrics = result.get("metrics", {})
    group = metrics.get(task)
    if isinstance(group, dict) and "value" not in group:  # sources of perplexity
        tokens = group.get("tokens", {}).get("value")
        return {"value": None, "stderr": None, **group.get(name, {}), "tokens": tokens}
    if name not in metrics:
        return {"value": None, "stderr": None}
    return {**metrics[name], "n": items(result, name)}


def items(result: dict[str, Any], metric: str) -> int:
    """Number of items with a metric; all items if the results file does not state it."""
    return result["metrics"][metric].get("n") or result["n"]


def _targets(report: dict[str, Any]) -> str:
    """The results table: scores beside the plan's targets."""
    if not report["targets"]:
        return ""
    rows = [[escape(cell) for cell in cells(row)] for row in report["targets"]]
    notes = listing({row["title"]: row["note"] for row in report["targets"] if row["note"]})
    details = f"<details><summary>Sources of the targets</summary>{notes}</details>"
    note = "Status is the highest tier reached. ≥: higher is better; ≤: lower is better."
    return section("Results", note, table("Scores and targets", HEAD, rows) + details)


def _gates(report: dict[str, Any]) -> str:
    return gates_section(report)


def _stages(report: dict[str, Any]) -> str:
    """Metrics of each judged stage, with the changes against the stage before and pretraining."""
    stages = report["stages"]
    names = dict.fromkeys(name for stage in stages.values() for name in stage["metrics"])
    chances = {key: value for stage in stages.values() for key, value in stage["chances"].items()}
    rows, bases = [], set()
    for name in names:
        metric = metric_of(name, chances)
        estimates = [stage["metrics"].get(name) for stage in stages.values()]
        if sum(estimate is not None for estimate in estimates) < 2:
            continue
        cells = ["" if e is None else _with_change(metric, e) for e in estimates]
        since = (estimates[-1] or {}).get("since")
        bases |= {stage_name(since["against"])} if since else set()
        rows.append([named(metric), _chance(metric), *cells, change_text(metric, since)])
    note = (
        "Below each score: the change against the column before (averages of checkpoints are "
        "compared, but not compared with). Base models see chat questions as plain lines."
    )
    heads = ["Metric", "Chance", *(escape(stage_name(name)) for name in stages)]
    heads.append(f"Last, change since {escape(''.join(bases))}")
    rows, heads = (rows, heads) if bases else ([row[:-1] for row in rows], heads[:-1])
    return section("Stage by stage", note, table("Scores by stage", heads, rows)) if rows else ""


def _with_change(metric: Metric, estimate: dict[str, Any]) -> str:
    change = change_text(metric, estimate["change"])
    return score(metric, estimate) + (f"<br/>{change}" if change else "")


def _chance(metric: Metric) -> str:
    return "-" if metric.chance is None else f"{metric.chance:.1f}"


def _benchmarks(report: dict[str, Any], columns: Columns) -> str:
    bars = []
    for name, result in report["scores"].items():
        heading, chance = columns[name]
        refs = [
            (f"{model['name']} {model['tokens']}", model["scores"][name]["value"])
            for model in report["published"]["models"]
            if model["kind"] == "base" and name in model["scores"]
        ]
        metric = metric_of(f"{result['task']}.{result['metric']}")
        estimate = {**_estimate(report["evaluations"][result["task"]], metric.key)}
        heading = f'<span title="{escape(metric.key)}">{escape(heading)}</span>'
        about = f"{metric.name.partition(', ')[2] or metric.name}, {result['shots']}-shot"
        top = 100.0 if metric.share else 10.0
        more = {"about": about, "stderr": result["stderr"], "chance": chance, "refs": refs}
        bars.append(bar(heading, score(metric, estimate), result["value"], top, **more))
    bars += _other_metrics(report)
    missing = "".join(
        f"<p>Not measured: <b>{escape(name)}</b>, {escape(reason)}</p>"
        for name, reason in report["not_measured"].items()
    )
    if not bars and not missing:
        return ""
    legend = (
        '<div class="legend"><span><i></i>this model</span>'
        '<span><i class="whisker"></i>± one standard error</span>'
        '<span><i class="chance"></i>chance</span>'
        '<span><i class="tick"></i>published base models, 0.5 to 1.7B</span></div>'
    )
    note = "Percent. The table of published models gives their shots and harness."
    body = f'<div class="bars">{"".join(bars)}</div>{legend}{missing}'
    return section("Benchmarks", note, body)


def _other_metrics(report: dict[str, Any]) -> list[str]:
    """Bars of rates without a table column: cloze scores, ARC easy, tool use, ..."""
    bars = []
    listed = {(score["task"], score["metric"]) for score in report["scores"].values()}
    for task, result in report["evaluations"].items():
        chances = {f"{task}.{name}": value for name, value in result["metrics"].items()}
        for name, chance in result.get("chance", {}).items():  # of evals/eval_own.py
            chances[f"{task}.{name}_chance"] = {"value": chance}
        for name, estimate in result["metrics"].items():
            is_rate = (
                isinstance(estimate, dict)
                and estimate.get("stderr") is not None
                and 0 <= estimate["value"] <= 1
            )
            is_listed = (task, name) in listed or task == "needle" or name in RATIOS
            if not is_rate or is_listed:
                continue
            metric = metric_of(f"{task}.{name}", chances)._replace(share=True)
            more = {"about": f"{result.get('shots') or 0}-shot", "chance": metric.chance}
            more["stderr"] = 100 * estimate["stderr"]
            value = score(metric, _estimate(result, metric.key))
            bars.append(bar(named(metric), value, 100 * estimate["value"], 100.0, **more))
    return bars


def _held_out(report: dict[str, Any]) -> str:
    """Bits per byte of each source and of the user's own texts (evals/eval_own.py, kind text)."""
    evaluations = report["evaluations"]
    held_out = evaluations.get("perplexity", {})
    own = {name: result for name, result in evaluations.items() if result.get("kind") == "text"}
    texts = [(int(name == "all"), name, held_out) for name in held_out.get("metrics", {})]
    texts += [(2, name, result) for name, result in own.items()]
    rows, others = [], ""
    for group, name, result in texts:
        bits, perplexity = (metric_of(f"{name}.{m}") for m in ("bits_per_byte", "perplexity"))
        estimate = _estimate(result, bits.key)
        about = ["your own texts"] if name in own else []
        if (value := _estimate(result, perplexity.key)["value"]) is not None:
            about.append(f"perplexity {perplexity.text(value)}")
        heading = f'<span title="{escape(bits.key)}">{escape(name)}</span>'
        if estimate["value"] is not None:
            rows.append((group, heading, bits, estimate, ", ".join(about)))
        elif name in own:  # its definition asks for other metrics only
            metric = metric_of(f"{name}.{next(iter(result['metrics']))}")
            others += f"<p>{named(metric)}: {score(metric, _estimate(result, metric.key))}</p>"
    rows.sort(key=lambda row: (row[0], row[3]["value"]))
    top = max([4.0, *(estimate["value"] for *_, estimate, _ in rows)])
    bars = "".join(
        bar(heading, score(bits, e), e["value"], top, about=about, stderr=e.get("stderr"))
        for _, heading, bits, e, about in rows
    )
    note = (
        "Bits per byte; lower is better. Comparable across tokenizers. ± covers the choice of the "
        "text, not the seed of the training run."
    )
    body = f'<div class="bars">{bars}</div>{others}'
    return section("Held-out text", note, body) if bars or others else ""


def _needle(report: dict[str, Any]) -> str:
    grids = report.get("needle") or {}
    maps = "".join(
        heatmap(
            f"{kind}, {grid['n']:,} tests" if "n" in grid else kind,
            grid["lengths"],
            grid["depths"],
            grid["cells"],
            grid.get("tests", {}),
        )
        for kind, grid in grids.items()
    )
    note = "Share of numbers retrieved, by depth (rows) and context length in tokens (columns)."
    return section("Needle in a haystack", note, maps) if maps else ""


def _samples(report: dict[str, Any]) -> str:
    cards = []
    for sample in report["samples"]:
        decoding = f"temperature {sample['temperature']}" if sample["temperature"] else "greedy"
        text = sample["text"] or "(the prompt does not fit the context)"
        body = f"<b>{escape(sample['prompt'])}</b>{escape(text)}"
        if "turn" in sample:
            user = _part("user", sample["prompt"])
            body = user + "".join(_part(part["kind"], part["text"]) for part in sample["turn"])
        cards.append(f'<div class="sample"><small>{escape(decoding)}</small>{body}</div>')
    is_chat = any("turn" in sample for sample in report["samples"])
    note = "Tools were executed." if is_chat else "Prompts are grey."
    body = f'<div class="samples">{"".join(cards)}</div>'
    return section("Samples", f"{note} Samples are not selected.", body) if cards else ""


def _part(kind: str, text: str) -> str:
    """One part of a conversation: a message, a thought to unfold, a tool call or its result."""
    kind_class = kind if kind in ROLES or kind == "user" else "assistant"
    role = f'<span class="role">{ROLES.get(kind, kind_class)}</span>'
    content = f"<p>{escape(text)}</p>"
    if kind == "thought":
        content = f"<details><summary>{role}</summary>{content}</details>"
        return f'<div class="part thought">{content}</div>'
    if kind in ("call", "result"):
        content = f"<pre><code>{escape(text)}</code></pre>"
    return f'<div class="part {kind_class}">{role}{content}</div>'


def _curves(report: dict[str, Any]) -> str:
    """Loss and learning rate of pretraining and of each stage after it."""
    training = report["training"]
    if not training:
        return ""
    names = {"skipped": "skipped updates", "rollback": "rollbacks", "stuck": "times stuck"}
    names |= {"starved": "starved experts"}
    charts = []
    for stage in (training, *training["tuning"]):
        if not stage["steps"]:
            continue
        found = stage["incidents"].items()
        incidents = ", ".join(f"{n} {names[kind]}" for kind, n in found)
        incidents = incidents or "no skipped updates or rollbacks"
        phases = ", ".join(phase["name"] for phase in stage["phases"])
        about = f"{stage['steps']:,} steps, {stage['hours']:.2f} hours in steps; {incidents}"
        title = escape(stage.get("name") or (f"pretraining: {phases}" if phases else "pretraining"))
        charts.append(f"<h3>{title} <small>{escape(about)}</small></h3>{loss_chart(stage)}")
        if rates := stage.get("learning_rate"):
            steps, values = ([pair[i] for pair in rates] for i in (0, 1))
            charts.append(line_chart("learning rate", steps, values))
    note = "Nats per token, by step. Losses of DPO are not losses per token of text."
    return section("Training curves", note, "".join(charts)) if charts else ""


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
    return section("Experts", note, "".join(parts)) if parts else ""


def _tuning(report: dict[str, Any]) -> str:
    """Mid-training, SFT and DPO: data, learning rate and losses of each stage."""
    stages = (report["training"] or {}).get("tuning") or []
    rows = []
    for stage in stages:
        mix = ", ".join(f"{name} {share:g}" for name, share in stage["mix"].items())
        held_out = [point["loss"] for point in stage["held_out"]]
        preferred = [100 * point["share"] for point in stage["preferred"]]
        row = [stage["name"], f"{stage['steps']:,}", f"{stage['tokens'] or 0:,}"]
        row += ["-" if stage["lr"] is None else f"{stage['lr']:g}", mix or "-"]
        row += [change(held_out, 3), change(preferred, 1), f"{stage['hours']:.2f}"]
        rows.append([escape(cell) for cell in row])
    head = ["Stage", "Steps", "Tokens", "Peak learning rate", "Data (share)", "Validation loss"]
    head += ["Preference accuracy (%)", "Hours in steps"]
    note = (
        "Losses and accuracies: first → last measurement on the stage's own validation rows. The "
        "log does not record their n, so they have no error; the scores above do."
    )
    body = table("Stages after pretraining", head, rows)
    return section("After pretraining", note, body) if rows else ""


def change(values: list[float], digits: int) -> str:
    """First and last value of a series, as text."""
    if not values:
        return "-"
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " → ".join(
        f"{value:.{digits}f}" if isinstance(value, (int, float)) else str(value) for value in ends
    )


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
        rows.append([escape(cell) for cell in (name, *cells, clean[0] if clean else "-")])
    head = [
        "Test set",
        "Items",
        "Too short to search",
        "Items found",
        "Documents removed or cut",
        "Score (%), all → clean items",
    ]
    note = f"Benchmark items found in the training text; source: {contamination['file']}."
    return section("Contamination", note, table("Benchmark items in the training text", head, rows))


def _clean(result: dict[str, Any]) -> str:
    name = next(iter(result["metrics"]))
    clean = result["clean"]["metrics"].get(name)
    if not clean:
        return "-"
    metric = metric_of(f"{result['task']}.{name}")
    n = f"n {items(result, name):,} → {clean['n']:,}" if clean.get("n") else "n not recorded"
    values = f"{metric.text(result['metrics'][name]['value'])} → {metric.text(clean['value'])}"
    return f"{name} {values} ({n})"


def _published(report: dict[str, Any], columns: Columns) -> str:
    """Published models with a score on a benchmark that this model was measured on."""
    models = report["published"]["models"]
    shown = [name for name in columns if name in report["scores"]] or list(columns)
    models = [model for model in models if model["scores"].keys() & set(shown)]
    if not models:
        return ""
    head = ["Model", "Tokens", *(escape(columns[name][0]) for name in shown)]
    head += ["Harness", "Metric", "Source"]
    sources = report["published"]["sources"]
    tokens = short(report["training"]["tokens"] or 0) if report["training"] else "?"
    scores = [_score(report["scores"].get(name)) for name in shown]
    rows = [[escape(report["name"]), tokens, *scores, "ours, as lm-eval 0.4.13", "", "this run"]]
    for model in models:
        source = sources[model["from"]["source"]]
        link = f'<a rel="noreferrer" href="{escape(source["url"])}">{escape(source["title"])}</a>'
        cells = [_score(model["scores"].get(name)) for name in shown]
        origin = [escape(str(model["from"]["harness"])), escape(model["from"]["metric"]), link]
        rows.append([escape(model["name"]), escape(model["tokens"]), *cells, *origin])
    chances = ["-" if columns[name][1] is None else f"{columns[name][1]:.1f}" for name in shown]
    rows.insert(1, ["chance", "", *chances, "", "", "score of guessing"])
    note = (
        "Small print: shots and our n; the sources do not state n. Compare only rows with equal "
        "harness, metric and shots. comparison_table.md has all benchmarks."
    )
    body = table("Scores of published models, percent", head, rows, own=0)
    return section("Beside published models", note, body)


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    is_ours = "n" in score
    value = f"{score['value']:.1f}" if is_ours else f"{score['value']:g}"
    shots = "shots unknown" if score["shots"] is None else f"{score['shots']}-shot"
    n = f", {count(score['n'])}" if is_ours else ""
    stderr = f" ± {score['stderr']:.1f}" if score.get("stderr") is not None else ""
    kind = "score" if is_ours else "published"
    return f'<span class="{kind}">{value}{stderr} <small>{escape(shots + n)}</small></span>'


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
    details = (
        f"<details><summary>Hashes and files</summary>{listing({**hashes, **files})}</details>"
    )
    return section("Environment", "", listing(pairs) + details)
