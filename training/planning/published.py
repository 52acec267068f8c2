"""Targets of a plan against published scores of models of similar size and tokens.

The scores come from different harnesses, prompts and numbers of shots, which change a model's score
by several points. docs/forecast.md lists the models and their sources.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from training.planning.plan import Target

# Plans outside these sizes are not compared.
COMPARABLE = {"parameters": (0.7e9, 2e9), "tokens": (20e9, 60e9)}
PERPLEXITY = "all.perplexity"


class Published(NamedTuple):
    """Scores of models within COMPARABLE unless the note says otherwise."""

    low: float
    high: float
    note: str = ""


# Metric of a target -> published scores without special data. docs/forecast.md has the sources.
PUBLISHED = {
    "hellaswag.acc_norm": Published(0.384, 0.60, "55 to 60 on filtered web text"),
    "arc.challenge_acc_norm": Published(0.242, 0.394, "39 on FineWeb-Edu"),
    "mmlu.acc": Published(0.247, 0.27, "39 with its auxiliary training questions"),
    "truthfulqa.mc2": Published(0.358, 0.421, "after 150B and 4,000B tokens"),
    "gsm8k.flexible": Published(0.009, 0.01, "13 after SFT with its training questions"),
}


def target_outlook(
    targets: Iterable[Target], parameters: int, tokens: float, loss: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Return one entry per target with published scores; [] for a plan of another size.

    parameters, tokens: at the end of pretraining. loss: the forecast of the last phase by
    Hoffmann's law (training/planning/cost.py), for the perplexity target.
    """
    seen = {"parameters": parameters, "tokens": tokens}
    if not all(low <= seen[name] <= high for name, (low, high) in COMPARABLE.items()):
        return []
    outlook = []
    for target in targets:
        if target.metric == PERPLEXITY and loss:
            value = loss["perplexity"]
            published = Published(value, value, "Hoffmann's law, its text and tokenizer")
            plausible = value <= target.success
        elif target.metric in PUBLISHED:
            published = PUBLISHED[target.metric]
            plausible = target.success <= published.high
        else:
            continue
        outlook.append(
            {
                "title": target.title,
                "success": target.success,
                "percent": target.percent,
                **published._asdict(),
                "plausible": plausible,
            }
        )
    return outlook
