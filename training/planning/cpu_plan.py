"""A plan for this machine without a GPU: the quickstart, made as long as the minutes allow.

The seconds of its stages are those of a quickstart of 2026-11-30 (docs/quickstart.md), scaled to
the tokens per second of a training step in docs/performance.md. On another machine both change by
the same factor, about.
"""

import math
import re
from functools import cache
from typing import Any, NamedTuple

from training.config import load
from training.planning.cost import MAX_EPOCHS, readable_tokens
from training.planning.dial_data import GOALS
from training.planning.plan_files import Files, continue_sources, save_interval
from training.planning.probe import Probe
from training.settings import ROOT, read_yaml
from yaml_file import read_yaml_file

QUICKSTART = ROOT / "configs" / "quickstart"
# The quickstart's own folders; its suite of evaluations serves all plans.
FOLDERS = re.compile(r"\b(configs|checkpoints|logs|results)/quickstart\b(?!/suite)")
REFERENCE = 7_039.0  # tokens per second of training steps on the machine of the seconds below

# Seconds of the quickstart's stages on that machine, and of a command's start and validation.
DATA_SECONDS = 35.0  # corpus, tokenizer, shards, conversations; 0 if the store exists
START_SECONDS = 10.0  # of a training command
STAGE_SECONDS = {
    "chat": {"scores after gold": 15.0, "scores after SFT": 18.0, "scores after DPO": 19.0},
    "base": {"scores after gold": 9.0},
    "code": {"scores after gold": 9.0},
}
END_SECONDS = 8.0  # GGUF files, chat, loss curve, report
# Cost of a token relative to one of the base phase: rows of 1,024, SFT, and a DPO pair.
LONG_TOKEN, SFT_TOKEN, DPO_PAIR = 1.44, 1.78, 468.0

LEAST_SCALE = 0.25  # of the quickstart's steps; fewer do not learn anything visible
MAX_DATA_EPOCHS = 16  # repeated tokens lose all value by then, about (arXiv:2305.16264)
MAX_TUNING = 3.0  # times the quickstart's steps of SFT and DPO; more repeat the same answers
# Training tokens of the packaged sources (data/store/quickstart, Python 3.11, sympy 1.14).
CORPUS = {
    "wikipedia": 1_054_683,
    "factbook": 1_271_192,
    "code": 3_357_144,
    "maths": 1_554_034,
    "stem": 487_078,
}
CODE_MIXES = {
    "base": {"code": 0.6, "wikipedia": 0.2, "factbook": 0.2},
    "long_context": {"code": 0.7, "factbook": 0.3},
    "gold": {"code": 0.6, "maths": 0.2, "stem": 0.2},
}
# The commands of the quickstart's plan, in the order of its `seconds`.
COMMANDS = (
    *("corpus", "tokenizer", "shards", "conversations", "base", "long_context", "gold"),
    *("suite", "chat", "sft", "suite after sft", "chat after sft", "pairs after sft"),
    *("dpo", "suite after dpo", "chat after dpo", "pairs after dpo"),
    *("gguf", "llama.cpp", "curve", "report"),
)
FOR_CHAT = ("conversations", "chat", "sft", "dpo", "llama.cpp")  # and what comes after a stage
EASIER = -0.08  # exponent of a gate's bits per byte in the scale: our judgement
CODE_GATE = {"metric": "code.bits_per_byte", "go": 3.0, "no_go": 3.4}


class CpuChoice(NamedTuple):
    """A quickstart of other lengths. Steps are optimizer updates."""

    goal: str
    steps: dict[str, int]  # of phases and stages
    tokens: int  # of pretraining
    seconds: dict[str, float]  # forecast, by part
    notes: tuple[str, ...]


@cache
def _config(name: str) -> dict[str, Any]:
    return read_yaml(QUICKSTART / f"{name}.yaml")


def stage_names(goal: str) -> tuple[str, ...]:
    """Phases and stages of a plan."""
    tuning = ("sft", "dpo") if goal == "chat" else ()
    return ("base", "long_context", "gold", *tuning)


def scaled_steps(scale: float, goal: str) -> dict[str, int]:
    """Steps of each phase and stage. SFT and DPO grow with the root of the scale, up to a limit."""
    steps = {}
    for name in stage_names(goal):
        tuning = min(MAX_TUNING, math.sqrt(scale))
        factor = tuning if name in ("sft", "dpo") else scale
        steps[name] = max(4, round(_config(name)["steps"] * factor))
    return steps


def forecast_seconds(
    steps: dict[str, int], goal: str, probe: Probe, prepared: bool
) -> dict[str, float]:
    """Seconds of each part of a plan on the probed machine. prepared: the data store exists."""
    slower = REFERENCE / probe.tokens_per_s
    tokens = _config("base")["data"]["tokens_per_step"]
    cost = {
        "base": tokens,
        "long_context": tokens * LONG_TOKEN,
        "gold": tokens,
        "sft": _config("sft")["data"]["tokens_per_step"] * SFT_TOKEN,
        "dpo": _config("dpo")["data"]["pairs_per_step"] * DPO_PAIR,
    }
    training = {
        name: count * cost[name] / probe.tokens_per_s + START_SECONDS * slower
        for name, count in steps.items()
    }
    data = 0.0 if prepared else DATA_SECONDS * slower
    scores = {name: seconds * slower for name, seconds in STAGE_SECONDS[goal].items()}
    return {"data": data, **training, **scores, "export and report": END_SECONDS * slower}


def choose_cpu(minutes: float, goal: str, probe: Probe, prepared: bool) -> CpuChoice:
    """The longest plan within the minutes; ValueError names the nearest that works."""
    if goal not in GOALS:
        raise ValueError(f"unknown --goal {goal}; available: {', '.join(GOALS)}")

    def seconds(scale: float) -> float:
        parts = forecast_seconds(scaled_steps(scale, goal), goal, probe, prepared)
        return sum(parts.values())

    longest = max_scale(goal)
    if 60 * minutes < seconds(LEAST_SCALE):
        least = math.ceil(10 * seconds(LEAST_SCALE) / 60) / 10
        raise ValueError(
            f"{minutes:g} minutes are too few for any model on this machine, which trains "
            f"{probe.tokens_per_s:,.0f} tokens/s; use --minutes {least:g}"
        )
    if 60 * minutes > seconds(longest) + 60:
        most = math.floor(seconds(longest) / 60)
        raise ValueError(
            f"{minutes:g} minutes are more than {MAX_DATA_EPOCHS} epochs of the packaged text; use "
            f"--minutes {most}, or a GPU with text from the hub"
        )
    low, high = LEAST_SCALE, longest
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= 60 * minutes else (low, middle)
    steps = scaled_steps(low, goal)
    parts = forecast_seconds(steps, goal, probe, prepared)
    tokens_per_step = _config("base")["data"]["tokens_per_step"]
    tokens = sum(steps[name] for name in stage_names("base")) * tokens_per_step
    notes = []
    epochs = {name: count / CORPUS[name] for name, count in source_tokens(steps, goal).items()}
    rarest = max(epochs, key=lambda name: epochs[name])
    if epochs[rarest] > MAX_EPOCHS:
        notes.append(
            f"{rarest} is read for {epochs[rarest]:.1f} epochs; above {MAX_EPOCHS}, repeated "
            "tokens lose value (arXiv:2305.16264)"
        )
    return CpuChoice(goal, steps, tokens, parts, tuple(notes))


def mixes(goal: str) -> dict[str, dict[str, float]]:
    """Mixture of each phase."""
    if goal == "code":
        return CODE_MIXES
    return {name: _config(name)["data"]["mix"] for name in CODE_MIXES}


def source_tokens(steps: dict[str, int], goal: str) -> dict[str, float]:
    """Tokens that all phases read of each source."""
    tokens: dict[str, float] = {}
    step = _config("base")["data"]["tokens_per_step"]
    for phase, mix in mixes(goal).items():
        for name, weight in mix.items():
            read = steps[phase] * step * weight / sum(mix.values())
            tokens[name] = tokens.get(name, 0.0) + read
    return tokens


def max_scale(goal: str) -> float:
    """Scale at which a source is read for MAX_DATA_EPOCHS epochs."""
    tokens = source_tokens(scaled_steps(1.0, goal), goal)
    return min(MAX_DATA_EPOCHS * CORPUS[name] / count for name, count in tokens.items())


def cpu_files(choice: CpuChoice, name: str) -> Files:
    """The files of a plan, by name in configs/<name>/. The store is the quickstart's."""
    steps, files, begin = choice.steps, {}, 0
    total = sum(steps[phase] for phase in stage_names("base"))
    for stage in stage_names(choice.goal):
        content = read_yaml_file(QUICKSTART / f"{stage}.yaml")
        content |= {"steps": steps[stage]}
        if "run" in content:
            content["run"] = name
        if "start_step" in content:
            content["start_step"] = begin
        if stage in CODE_MIXES:
            begin += steps[stage]
            content["data"]["mix"] = mixes(choice.goal)[stage]
        else:
            content["checkpoint"]["every"] = _save_interval(choice, stage)
            content["validation"]["every"] = steps[stage]
        files[f"{stage}.yaml"] = content
    # The prepared store has other amounts than CORPUS under another version of Python.
    stored = CORPUS | readable_tokens(load(QUICKSTART / "base.yaml"))
    continue_sources([files[f"{phase}.yaml"] for phase in CODE_MIXES], stored)
    base = files["base.yaml"]
    decay = base["schedule"]["decay_steps"] / base["schedule"]["total_steps"]
    base["schedule"] |= {
        "warmup_steps": min(base["schedule"]["warmup_steps"], max(1, steps["base"] // 4)),
        "total_steps": total,
        "decay_steps": round(decay * total),
    }
    base["checkpoint"]["every"] = _save_interval(choice, "base")
    base["validation"]["every"] = max(4, steps["base"] // 2)
    base["startup"]["steps"] = min(base["startup"]["steps"], steps["base"])
    files["plan.yaml"] = _plan(choice, name, total)
    return files


def _save_interval(choice: CpuChoice, name: str) -> int:
    """Steps between the checkpoints of a phase or stage."""
    return save_interval(choice.seconds[name] / choice.steps[name], choice.steps[name])


def save_seconds(choice: CpuChoice) -> float:
    """Forecast seconds between checkpoints of the base phase, which a crash can cost."""
    return _save_interval(choice, "base") * choice.seconds["base"] / choice.steps["base"]


def _plan(choice: CpuChoice, name: str, total: int) -> dict[str, Any]:
    """The quickstart's plan with other names, the milestone at the last step, and its gates."""
    plan: dict[str, Any] = _renamed(read_yaml_file(QUICKSTART / "plan.yaml"), name)
    milestone = plan["phases"][-1]["milestones"][0]
    milestone |= {"step": total, "advice": f"look at logs/{name}/loss.png"}
    scale = choice.steps["base"] / _config("base")["steps"]
    gates = [CODE_GATE] if choice.goal == "code" else milestone["gates"]
    milestone["gates"] = [
        {**gate, "go": round(gate["go"] * scale**EASIER, 2)}
        | {"no_go": round(gate["no_go"] * max(1.0, scale**EASIER), 2)}
        for gate in gates
    ]
    if choice.goal != "chat":
        milestone["evals"] = ["suite"]
        plan["evals"] = {"suite": plan["evals"]["suite"]}
        del plan["stages"]
        plan["before"] = _without(plan["before"], "scripts.generate_chat_data")
        plan["after"] = _without(plan["after"], "scripts.chat")
    plan["seconds"] = _command_seconds(choice, plan["seconds"])
    return plan


def _command_seconds(choice: CpuChoice, quickstart: list[float]) -> list[float]:
    """Forecast of each command: training's from the choice, the others' as in the quickstart."""
    named = dict(zip(COMMANDS, quickstart, strict=True))
    if choice.goal != "chat":
        named = {n: s for n, s in named.items() if n not in FOR_CHAT and " after " not in n}
    end = sum(named[name] for name in ("gguf", "curve", "report"))
    pace = choice.seconds["export and report"] / end
    return [round(choice.seconds.get(name, pace * s), 1) for name, s in named.items()]


def _without(commands: dict[str, str], word: str) -> dict[str, str]:
    return {title: command for title, command in commands.items() if word not in command}


def _renamed(value: Any, name: str) -> Any:
    """Replace the quickstart's folders and names by those of `name`, but not its data store."""
    if isinstance(value, dict):
        return {_renamed(key, name): _renamed(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    if value == "quickstart":
        return name
    text = FOLDERS.sub(rf"\1/{name}", value).replace("nanollama-quickstart-", f"{name}-")
    return text.replace("--name quickstart", f"--name {name}")
