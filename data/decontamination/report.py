"""Report benchmark items found in training text, as JSON and as Markdown."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from data.decontamination.index import EXCERPT, Hit, Index

MAX_LISTED_IDS = 50  # training ids in a report


def to_json(index: Index, hits: Iterable[Hit]) -> dict[str, Any]:
    """Return a summary of the hits as JSON values.

    {"documents": {train_id: [hit, ...]}, "too_short": {test_set: [id, ...]}, "settings": {...}}
    """
    documents: dict[str, list[dict]] = {}
    for hit in hits:
        entry = hit._asdict()
        documents.setdefault(entry.pop("train_id"), []).append({**entry, "span": list(hit.span)})
    return {
        "documents": documents,
        "too_short": index.too_short,
        "settings": {**asdict(index.settings), "test_sets": index.sizes},
    }


def report(index: Index, summary: dict[str, Any], examples: int = 3) -> str:
    """Format to_json's summary as Markdown: table of test sets, examples, document ids."""
    entries = [(train_id, hit) for train_id, hits in summary["documents"].items() for hit in hits]
    lines = [
        "| test set | items | checked | too short | items hit | training documents hit | rules |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in index.sizes.items():
        set_hits = [(train_id, hit) for train_id, hit in entries if hit["test_set"] == name]
        short = len(index.too_short[name])
        rules = Counter(hit["rule"] for _, hit in set_hits)
        counts = (
            size,
            size - short,
            short,
            len({hit["test_id"] for _, hit in set_hits}),
            len({train_id for train_id, _ in set_hits}),
        )
        by_rule = ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common()) or "-"
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} | {by_rule} |")
    items = index.items if entries else []
    texts = {(index.names[number], test_id): text for number, test_id, text in items}
    for name in index.sizes:
        set_hits = sorted(
            ((train_id, hit) for train_id, hit in entries if hit["test_set"] == name),
            key=lambda pair: -pair[1]["score"],
        )
        if set_hits:
            lines += [
                "",
                f"### {name}",
                "",
                "| training document | score | in training | test item | in the test set |",
                "|---|---|---|---|---|",
            ]
        for train_id, hit in set_hits[:: max(1, len(set_hits) // examples)][:examples]:
            cells = (
                train_id,
                f"{hit['score']:.2f} {hit['rule']}",
                hit["excerpt"],
                hit["test_id"],
                texts[name, hit["test_id"]][:EXCERPT],
            )
            escaped = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
    for name in index.sizes:
        ids = sorted({train_id for train_id, hit in entries if hit["test_set"] == name})
        if ids:
            more = f" and {len(ids) - MAX_LISTED_IDS:,} more" if len(ids) > MAX_LISTED_IDS else ""
            listed = ", ".join(ids[:MAX_LISTED_IDS])
            lines += [
                "",
                f"Training documents that contain items of {name} ({len(ids):,}): {listed}{more}",
            ]
    return "\n".join(lines)
