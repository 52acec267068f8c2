"""Write docs/learning_path.md from the rungs of the speedrun ladder."""

import textwrap
from pathlib import Path
from typing import Any

from cli import ROOT
from files import read_object
from lab.ladder import FULL, MEDIUM, MINIATURE, Rung, read_ladder

PAGE = ROOT / "docs/learning_path.md"
SOURCE = "github.com/KellerJordan/modded-nanogpt at commit f411b3d3"
# Minutes of the record after the last rung of each milestone, 8 H100.
REACHED = (45, 31.4, 22.3, 15.2, 7.2, 4.66, 3.57, 2.933, 2.527, 2.203, 1.328)
CODE = {  # setting -> code that implements it
    "model.positions": "models/layers.py:RotaryEmbedding",
    "model.norm": "models/speedrun_layers.py:make_norm",
    "model.activation": "models/speedrun_layers.py:MLP",
    "model.embedding_skips": "models/speedrun_layers.py:Block",
    "model.softcap": "models/losses.py:LossHead",
    "model.fp8_head": "models/losses.py:LossHead",
    "model.rope_fraction": "models/speedrun_layers.py:rotary_frequencies",
    "model.yarn": "models/speedrun_layers.py:rotary_frequencies",
    "model.attention_scale": "models/speedrun_layers.py:query_factor",
    "model.smear": "models/speedrun_layers.py:Smear",
    "model.bigram_vocab_size": "models/speedrun_layers.py:BigramEmbedding",
    "model.bigram_signs": "models/speedrun_layers.py:BigramEmbedding",
    "model.qk_norm": "models/speedrun_layers.py:Attention",
    "model.attention_gate": "models/speedrun_layers.py:Attention",
    "model.value": "models/speedrun_layers.py:Attention",
    "model.key_offset": "models/speedrun_layers.py:Attention",
    "model.paired_head_layers": "models/speedrun_layers.py:Attention",
    "rope_theta": "models/layers.py:RotaryEmbedding",
    "model": "models/speedrun_gpt.py:SpeedrunGPT",
    "data": "data/bin_loader.py:BinLoader",
    "optim.name": "training/muon.py:Muon",
    "optim.muon_coefficients": "training/muon.py:COEFFICIENTS",
    "optim.normuon_beta2": "training/muon.py:normalizer",
    "optim.cautious_decay": "training/adamw.py:AdamW",
    "optim.adam_every": "training/adamw.py:AdamW",
    "optim": "training/optimizers.py:parameter_groups",
    "schedules.multi_token": "models/speedrun_layers.py:next_targets",
    "schedules": "training/curves.py:Curve",
    "schedule": "training/schedulers.py:WSDScheduler",
}
SYSTEMS = (  # (records, what changed): faster steps, the same function
    ("6, 22, 23, 24, 36", "gradient communication of Muon and Adam over 8 GPUs"),
    ("7, 25, 66", "newer versions of PyTorch"),
    ("10, 37, 57", "bf16 activations, loss and weights"),
    ("27, 59, 67, 69, 75, 76, 87", "Triton kernels: symmetric matmul, MLP, head, loss"),
    ("32, 33, 44, 56, 61, 65, 68, 71, 74, 78", "fused optimizers, asynchronous data, layouts"),
    ("47, 48, 60, 79, 86", "fused or reordered algebra: loss, output projection, NorMuon, XSA"),
)
ABSENT = (  # (record, reported, what)
    ("20, in part", "3.142 -> 2.992 min as a whole", "Adam's epsilon of 1e-10"),
    (
        "51",
        "2.128 -> 2.075 min, 55 fewer steps",
        "head tied to the embedding again, until 2/3 (53)",
    ),
    ("52", "2.075 -> 2.037 min", "slower averages and frozen transitions for scalars"),
    ("64", "1.650 -> 1.630 min", "tuned initial values of V and O"),
    ("72", "1.516 -> 1.496 min", "higher floor of the rate, schedule of document lengths"),
    ("73", "1.496 -> 1.485 min", "partitioned hyperconnections, replaced by record 77"),
    ("77", "1.446 -> 1.435 min", "one saved activation instead of hyperconnections"),
    ("80", "1.411 -> 1.406 min, 10 fewer steps", "Muon on pairs of Q and K heads"),
    (
        "81",
        "1.406 -> 1.363 min, 65 fewer steps",
        "MUDD: skips with weights that depend on the data",
    ),
    ("82", "1.363 -> 1.353 min", "XSA: a head's output without its part along its own value"),
    ("84", "1.328 -> 1.320 min", "MLP up-projection in float8"),
    ("85", "1.320 -> 1.271 min", "gates for MUDD, and heads that mix dynamically (DC-MHA)"),
    ("88", "1.256 -> 1.243 min", "prefix loss: also predict the longest prefix of the next token"),
    ("89", "1.243 -> 1.230 min", "MLP down-projection in float8"),
    ("M10 to M17", "24.12 -> 22.98 min", "second input embedding, outer optimizer, EMA on Muon"),
    ("PR 344", "1.23 -> 1.167 min", "narrower query and key heads, float8 QKV and MLP"),
    ("PR 360, open", "73.9 -> 39.9 s", "sampled softmax, wide n-gram tables, float8 everywhere"),
)


def learning_path(records: Path) -> str:
    """Return the page. Measured figures come from the newest record of each ladder, if any."""
    rungs, small = read_ladder(FULL), read_ladder(MINIATURE)
    record = _newest_record(records, "ladder_miniature")
    measured = {} if record is None else _measured(record)
    absent = [rung.name for rung in rungs if rung.name not in {other.name for other in small}]
    lines = _beginning(rungs, record)
    milestone = ""
    for rung in rungs:
        if rung.facts["Milestone"] != milestone:
            milestone = rung.facts["Milestone"]
            lines += ["", f"## {milestone}"]
        figure = measured.get(rung.name, "not measured")
        if rung.name in absent:
            figure = "none, since the change has no effect or needs a GPU"
        lines += ["", *_rung(rung, figure)]
    lines += ["", "## Track 2: 350M parameters, validation loss 2.92", "", *_medium()]
    lines += ["", *_table("Changes without a rung", ("Records", "What changed"), SYSTEMS)]
    lines += ["", *_table("Not here", ("Record", "Reported", "What"), ABSENT), ""]
    return "\n".join(lines)


def _beginning(rungs: list[Rung], record: Path | None) -> list[str]:
    source = "have not been measured"
    if record is not None:
        source = f"come from `{record.parent.name}/{record.name}`"
    text = (
        "The nanoGPT speedrun trains GPT-2 124M to a validation loss of 3.28 on FineWeb with 8 "
        "H100. Its records went from 45 to 1.23 minutes. Here each idea is one rung: a config in "
        f"`{FULL}/` that extends the one before and changes one thing. `python -m scripts.ladder "
        "--history` writes this page from the configs."
    )
    figures = (
        f"Reported minutes are those of {SOURCE}, on 8 H100. A record may contain several rungs "
        "and systems work; its last rung here has its number of steps. No rung has been measured "
        "on a GPU here. Figures of the miniature (about 6M parameters, quickstart text, on a CPU) "
        f"{source}."
    )
    milestones = dict.fromkeys(rung.facts["Milestone"].partition(". ")[2] for rung in rungs)
    rows = [
        f"| {number} | {name} | {minutes:g} |"
        for number, (name, minutes) in enumerate(zip(milestones, REACHED, strict=True), 1)
    ]
    return [
        "# Learning path of the speedrun",
        "",
        *_wrapped(text),
        "",
        *_wrapped(figures),
        "",
        "| | Milestone | Reported minutes at its end |",
        "|---|---|---:|",
        *rows,
    ]


def _rung(rung: Rung, measured: str) -> list[str]:
    """Return the section of one rung: change, reason, sources, figures, config and code."""
    facts = rung.facts
    lines = [f"### {rung.name}", "", *_wrapped(f"{facts['Change']} {facts['Why']}"), ""]
    if "Note" in facts:
        lines += [*_wrapped(f"Note: {facts['Note']}"), ""]
    items = (
        f"Record {facts['Record']}: {facts['Reported']}",
        f"Paper: {facts['Paper']}",
        f"In miniature: {measured}",
        f"Code: {', '.join(f'`{span}`' for span in code_of(rung)) or 'the defaults'}",
    )
    for item in items:
        lines += textwrap.wrap(f"- {item}", 100, subsequent_indent="  ", break_on_hyphens=False)
    body = [line for line in rung.text.splitlines() if not line.startswith(("#", "extends"))]
    return [*lines, "", "```yaml", *body, "```"]


def code_of(rung: Rung) -> list[str]:
    """Return the code that implements the rung's settings, at most 3 of file:name."""
    if rung.number == 0:
        return ["models/speedrun_config.py:GPTConfig"]
    spans: dict[str, None] = {}
    for section, values in rung.changes.items():
        for setting in values if isinstance(values, dict) else [""]:
            key = f"{section}.{setting}"
            prefixes = [prefix for prefix in CODE if key.startswith(prefix)]
            if prefixes:
                spans[CODE[max(prefixes, key=len)]] = None
    return list(spans)[:3]


def _medium() -> list[str]:
    lines = ["| Rung | Record | Reported | Change |", "|---|---|---|---|"]
    for rung in read_ladder(MEDIUM):
        facts = rung.facts
        cells = (f"`{rung.path}`", facts["Record"], facts["Reported"], facts["Change"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table(title: str, header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> list[str]:
    lines = [f"## {title}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _newest_record(records: Path, name: str) -> Path | None:
    """Return the newest folder <date>_<name> with results, or None."""
    folders = [path.parent for path in records.glob(f"*_{name}/result.json")]
    return max(folders, default=None, key=lambda folder: folder.name)


def _measured(record: Path) -> dict[str, str]:
    """Return each rung's tokens to the target and their ratios, as text."""
    result = read_object(record / "result.json") or {}
    return {variant["name"]: _figures(variant, result) for variant in result.get("variants", [])}


def _figures(variant: dict[str, Any], result: dict[str, Any]) -> str:
    position = variant["to_target"]["tokens"]
    final = variant["final"][result["metric"]]["mean"]
    if position is None:
        return f"target {result['target']:.3f} not reached by every seed; final loss {final:.3f}"
    text = f"{position['mean']:,.0f} tokens to loss {result['target']:.3f}"
    for ratio, reference in (("ratio", "the baseline"), ("previous_ratio", "the rung before")):
        if value := (variant.get(ratio) or {}).get("tokens"):
            interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
            text += f"; {value['mean']:.2f}{interval} of {reference}"
    return f"{text} (n={position['n']})"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_on_hyphens=False, break_long_words=False)
