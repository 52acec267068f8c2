"""Metrics for people: name, unit, direction and chance level of each key such as hellaswag.acc."""

import re
from typing import Any, NamedTuple

from evals.text_blocks import RATIOS

COLUMNS = {  # column of published models -> (heading, task, metric, chance in percent)
    "mmlu": ("MMLU", "mmlu", "acc", 25.0),
    "gsm8k": ("GSM8K", "gsm8k", "flexible", 0.0),
    "hellaswag": ("HellaSwag", "hellaswag", "acc_norm", 25.0),
    "arc_challenge": ("ARC challenge", "arc", "challenge_acc_norm", 25.0),
    "arc_mean": ("ARC, both parts", "", "", 25.0),
    "piqa": ("PIQA", "choice", "piqa_acc_norm", 50.0),
    "winogrande": ("WinoGrande", "choice", "winogrande_acc", 50.0),
    "boolq": ("BoolQ", "choice", "boolq_acc", 50.0),
    "openbookqa": ("OpenBookQA", "choice", "openbookqa_acc_norm", 25.0),
    "sciq": ("SciQ", "choice", "sciq_acc_norm", 25.0),
    "siqa": ("SIQA", "choice", "siqa_acc", 33.3),
    "commonsense_qa": ("CommonsenseQA", "choice", "commonsense_qa_acc", 20.0),
    "lambada": ("LAMBADA", "lambada", "acc", 0.0),
    "triviaqa": ("TriviaQA", "open_qa", "triviaqa_exact_match", 0.0),
    "nq_open": ("Natural Questions", "open_qa", "nq_open_exact_match", 0.0),
    "humaneval": ("HumanEval", "code", "humaneval_pass@1", 0.0),
    "mbpp": ("MBPP", "code", "mbpp_pass@1", 0.0),
    "ifeval": ("IFEval", "ifeval", "prompt_level_strict_acc", 0.0),
    "truthfulqa": ("TruthfulQA", "truthfulqa", "mc2", None),
    "mt_bench": ("MT-bench, of 10", "mt_bench", "score", None),
}
TASKS = {  # first part of a key -> name
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "hellaswag": "HellaSwag",
    "arc": "ARC",
    "lambada": "LAMBADA",
    "ifeval": "IFEval",
    "truthfulqa": "TruthfulQA",
    "mt_bench": "MT-bench",
    "choice": "",  # the test set is in the metric's name, as piqa_acc
    "open_qa": "",
    "code": "",
    "chat": "held-out chat questions",
    "pairs": "held-out preference pairs",
    "tool_use": "tool use (BFCL)",
    "toxicity": "toxicity of replies",
    "needle": "needle in a haystack",
}
GROUPS = {  # prefix of a metric -> name
    **{name: heading for name, (heading, *_) in COLUMNS.items()},
    "challenge": "challenge",
    "easy": "easy",
    "free": "free decoding",
    "constrained": "constrained decoding",
    "prompt_level": "by prompt",
    "inst_level": "by instruction",
}
METRICS = {  # longest matching end of a key -> (name, lower is better, is a share)
    "acc": ("accuracy", False, True),
    "acc_norm": ("accuracy, normalized by length", False, True),
    "accuracy": ("accuracy", False, True),
    "strict": ("exact match, strict format", False, True),
    "flexible": ("exact match, last number", False, True),
    "strict_acc": ("all instructions followed, strict", False, True),
    "loose_acc": ("all instructions followed, loose", False, True),
    "exact_match": ("exact match", False, True),
    "number_match": ("last number equal", False, True),
    "contains": ("answer contained", False, True),
    "pass@1": ("solved at the first attempt", False, True),
    "mc1": ("MC1, true answer ranked first", False, True),
    "mc2": ("MC2, probability of true answers", False, True),
    "choice": ("right option ranked first", False, True),
    "choice_chance": ("right option ranked first, by chance", False, True),
    "preferred": ("chosen reply more likely", False, True),
    "ended": ("replies that end", False, True),
    "stopped": ("replies that end", False, True),
    "called": ("a call was attempted", False, True),
    "syntax": ("calls are valid JSON", False, True),
    "schema": ("calls fit the functions", False, True),
    "semantics": ("calls are right", False, True),
    "irrelevance": ("no call where none fits", False, True),
    "expected_max_toxicity": ("expected maximum", True, True),
    "toxicity_probability": ("share of toxic replies", True, True),
    "mean_toxicity": ("mean", True, True),
    "bits_per_byte": ("bits per byte", True, False),
    "perplexity": ("perplexity", True, False),
    "loss": ("loss, nats per token", True, False),
    "score": ("score of 10", False, False),
}
LENGTH = re.compile(r"(.*?)(?:_(\d+))?")  # a metric and the context length, as accuracy_16384
CHANCE = {task: chance for _, task, metric, chance in COLUMNS.values() if metric[:3] == "acc"}
CHANCE |= {name: column[3] for name, column in COLUMNS.items()}
CHANCE |= {"arc": 25.0, "challenge": 25.0, "easy": 25.0, "pairs": 50.0}


class Metric(NamedTuple):
    """How to show a metric."""

    key: str  # dotted, as in gates and results files
    name: str
    lower: bool  # lower is better
    share: bool  # a share from 0 to 1, shown in percent
    chance: float | None  # score of guessing in the shown unit; None: unknown or not defined

    @property
    def title(self) -> str:
        """Name with the unit and the direction."""
        unit = " (%)" if self.share else ""
        return f"{self.name}{unit}{' (lower is better)' if self.lower else ''}"

    def text(self, value: float | None, sign: str = "") -> str:
        """A value in the shown unit: 0.412 as 41.2, 2.7 bits per byte as 2.700."""
        if value is None:
            return "not measured"
        if self.share:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign},.{2 if abs(value) >= 10 else 3}f}"


def metric_of(key: str, metrics: dict[str, Any] | None = None) -> Metric:
    """The name, unit, direction and chance level of a dotted key, e.g. arc.challenge_acc_norm.

    metrics: estimates by key, for a chance level that the results state (chat.choice_chance). An
    unknown metric keeps its key as its name, higher is better, without a unit.
    """
    task, _, rest = key.rpartition(".")
    rest, length = LENGTH.fullmatch(rest).groups()  # type: ignore[union-attr]  # matches any text
    end = max((name for name in METRICS if _ends(rest, name)), key=len, default="")
    if not end:
        return Metric(key, key, lower=False, share=False, chance=None)
    label, lower, share = METRICS[end]
    groups = rest.removesuffix(end).rstrip("_")
    is_cloze = _ends(groups, "cloze")
    group = groups.removesuffix("cloze").rstrip("_") if is_cloze else groups
    about = TASKS.get(task, task)
    if task not in TASKS and end in RATIOS:
        about = "held-out text" + (f", {task}" if task != "all" else "")
    words = [about, GROUPS.get(group, group.replace("_", " ")), "cloze" if is_cloze else "", label]
    words.append(f"at {int(length):,} tokens" if length else "")
    name = ", ".join(word for word in words if word)
    has_chance = end in ("acc", "acc_norm", "preferred") or _is_column(task, rest)
    chance = CHANCE.get(group, CHANCE.get(task)) if has_chance else None
    stated = ((metrics or {}).get(f"{key}_chance") or {}).get("value")
    chance = chance if stated is None else 100 * stated
    return Metric(key, name[:1].upper() + name[1:], lower, share, chance)


def _ends(text: str, name: str) -> bool:
    return text == name or text.endswith(f"_{name}")


def _is_column(task: str, metric: str) -> bool:
    return any((task, metric) == column[1:3] for column in COLUMNS.values())
