"""Gates of a plan that the dial chose: limits on the text of its goal, scaled to the model."""

import math
from typing import Any

from data.corpus.sources import HUB_SOURCES
from training.planning.cost import LAW_RANGE, forecast_loss
from training.planning.dial import Choice
from training.planning.dial_data import CODE, WEB, source_tokens

# Limits of the gates: bits per byte / its forecast, within the range of the law and outside of it.
# Before the decay, a model has about 5 % more. All three are our judgement.
GO, NO_GO = 1.08, 1.2
FAR_GO, FAR_NO_GO = 1.2, 1.4
BEFORE_DECAY = 1.05
# From this size on, HellaSwag is above its chance of 0.25: GPT-2 124M has 0.31.
HELLASWAG_FROM = {"parameters": 100e6, "tokens": 2e9}
# From this size on, HumanEval is above its chance of 0, by our judgement: PolyCoder 160M solves 2.1
# %, CodeParrot 110M 3.8 % (arXiv:2202.13169; table of hf.co/spaces/codeparrot). It has 164 items.
HUMANEVAL_FROM = {"parameters": 160e6, "tokens": 10e9}


def forecast_bits(parameters: int, tokens: float) -> float:
    """Forecast bits per byte of web text after a decay, by the loss law; a guess outside its range.

    The law counts nats per token; HUB_SOURCES gives the bytes per token of fineweb_edu.
    """
    nats, _ = forecast_loss(parameters, tokens)
    return nats / math.log(2) / HUB_SOURCES[WEB].bytes_per_token


def read_tokens(choice: Choice, step: int) -> dict[str, float]:
    """Return source -> tokens that the phases read of it before `step`."""
    phase_tokens, begin = {}, 0
    for phase, steps in choice.steps.items():
        done = min(steps, max(0, step - begin))
        phase_tokens[phase] = done * choice.fit.run.data.tokens_per_step
        begin += steps
    return source_tokens(choice.request.goal, phase_tokens)


def milestone_gates(choice: Choice, step: int) -> list[dict[str, Any]]:
    """Return the gates at a step: bits per byte on the goal's source, and benchmarks above chance.

    A source's forecast counts only its own tokens. Python has fewer bits per byte than web text, so
    the forecast for web text limits both. In a plan for code, web text has the wide limits, because
    the law was not fitted on such mixtures.
    """
    parameters, read = choice.fit.run.model.num_parameters, read_tokens(choice, step)
    is_code, decayed = choice.request.goal == "code", step == sum(choice.steps.values())
    gates = []
    for name in (CODE, WEB) if is_code else (WEB,):
        go, no_go = (GO, NO_GO) if _is_known(parameters, read[name]) else (FAR_GO, FAR_NO_GO)
        if is_code and name == WEB:
            go, no_go = FAR_GO, FAR_NO_GO
        bits = forecast_bits(parameters, read[name]) * (1 if decayed else BEFORE_DECAY)
        limits = {"go": round(bits * go, 3), "no_go": round(bits * no_go, 3)}
        gates.append({"metric": f"{name}.bits_per_byte", **limits})
    if _reaches(HELLASWAG_FROM, parameters, read[WEB]):
        gates.append({"metric": "hellaswag.acc_norm", "go": 0.27, "no_go": 0.25})
    if decayed and runs_humaneval(choice):
        gates.append({"metric": "code.humaneval_pass@1", "go": 0.01, "no_go": 0.0})
    return gates


def runs_humaneval(choice: Choice) -> bool:
    """Return True if the final model of a plan for code should solve items of HumanEval."""
    read = read_tokens(choice, sum(choice.steps.values()))
    return _reaches(HUMANEVAL_FROM, choice.fit.run.model.num_parameters, read.get(CODE, 0.0))


def _is_known(parameters: int, tokens: float) -> bool:
    """Return True if the loss law was fitted on this size and this number of tokens."""
    low, high = LAW_RANGE["parameters"]
    return low <= parameters <= high and tokens >= LAW_RANGE["tokens"][0]


def _reaches(least: dict[str, float], parameters: int, tokens: float) -> bool:
    return parameters >= least["parameters"] and tokens >= least["tokens"]


def stage_gates(go: float, no_go: float) -> list[dict[str, Any]]:
    """Return gates that limit forgetting in a stage, as in configs/plan_1b.yaml."""
    return [
        {"metric": "all.bits_per_byte", "against": "before", "go": go, "no_go": no_go},
        {"metric": "hellaswag.acc_norm", "against": "before", "go": -0.02, "no_go": -0.05},
    ]
