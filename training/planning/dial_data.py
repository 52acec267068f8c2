"""Text of a plan that the dial chose: sources, mixtures, how much exists, what to download."""

import math

from data.corpus.sources import HUB_SOURCES
from training.planning.cost import MAX_EPOCHS

LONG_SHARE, DECAY_SHARE = 0.05, 0.2  # of the tokens; 10-20 % of decay is enough (arXiv:2405.18392)
DOWNLOAD_MARGIN = 1.1  # downloaded / trained tokens: filters and held-out documents take the rest
GOALS = ("chat", "base", "code")

# Tokens of each source: the sample's name (fineweb_edu), its paper (open_web_math,
# arXiv:2310.06786), or what the 1.1B plan downloads; the set itself may have more.
AVAILABLE = {
    "fineweb_edu": 100e9,
    "pg19": 1.8e9,
    "the_stack_python": 8e9,
    "open_web_math": 14.7e9,
    "stackexchange": 1.1e9,
    "stem_wiki": 1.1e9,
}
WEB, CODE = "fineweb_edu", "the_stack_python"
# Web text stays in the late phases: replaying it keeps what was learned (arXiv:2603.04964).
TEXT_MIXES = {
    "base": {WEB: 1.0},
    "long_context": {WEB: 0.5, "pg19": 0.5},
    "gold": {WEB: 0.5, "open_web_math": 0.2, "stackexchange": 0.15, "stem_wiki": 0.15},
}
CODE_MIXES = {
    "base": {CODE: 0.5, WEB: 0.45, "stackexchange": 0.05},
    "long_context": {CODE: 0.5, WEB: 0.25, "pg19": 0.25},
    "gold": {CODE: 0.5, WEB: 0.25, "stackexchange": 0.15, "open_web_math": 0.1},
}
MIXES = {"chat": TEXT_MIXES, "base": TEXT_MIXES, "code": CODE_MIXES}


def phase_shares(long_rows: int) -> dict[str, float]:
    """Share of each phase in the tokens. long_rows: 0 without a long-context phase."""
    long = {"long_context": LONG_SHARE} if long_rows else {}
    return {"base": 1 - DECAY_SHARE - sum(long.values()), **long, "gold": DECAY_SHARE}


def source_shares(goal: str, long_rows: int) -> dict[str, float]:
    """Share of each source in the tokens of all phases."""
    shares: dict[str, float] = {}
    for phase, share in phase_shares(long_rows).items():
        for name, weight in MIXES[goal][phase].items():
            shares[name] = shares.get(name, 0.0) + share * weight
    return shares


def available_tokens(goal: str, long_rows: int) -> float:
    """Most tokens of a plan: no source is read for more than MAX_EPOCHS epochs."""
    shares = source_shares(goal, long_rows)
    return min(MAX_EPOCHS * AVAILABLE[name] / share for name, share in shares.items())


def download_tokens(goal: str, long_rows: int, tokens: float) -> dict[str, float]:
    """Source -> tokens to download for `tokens` trained ones, with a margin, or all there are.

    Amounts have three digits, rounded up: printed and written as they are, they cover the need.
    """
    shares = source_shares(goal, long_rows)
    wanted = {name: share * tokens * DOWNLOAD_MARGIN for name, share in shares.items()}
    return {name: min(round_up(need, 3), AVAILABLE[name]) for name, need in wanted.items()}


def gated_text(goal: str, long_rows: int) -> str:
    """What a plan of this goal needs before it can download its text; "" without gated sources."""
    gated = _gated(goal, long_rows)
    if not gated:
        return ""
    sets = ", ".join(f"https://huggingface.co/datasets/{HUB_SOURCES[name].repo}" for name in gated)
    free = " or ".join(f"--goal {other}" for other in GOALS if not _gated(other, long_rows))
    return (
        f"{', '.join(gated)} is gated: before you run the plan, log in to the hub, accept the "
        f"terms of {sets} and run `hf auth login`; a plan of {free} needs no login"
    )


def _gated(goal: str, long_rows: int) -> list[str]:
    return [name for name in source_shares(goal, long_rows) if HUB_SOURCES[name].gated]


def round_up(number: float, digits: int = 2) -> float:
    """Round up to so many digits."""
    rounded = float(f"{number:.{digits - 1}e}")
    return rounded if rounded >= number else float(f"{rounded + _unit(number, digits):.12g}")


def round_down(number: float, digits: int = 2) -> float:
    """Round down to so many digits."""
    rounded = float(f"{number:.{digits - 1}e}")
    return rounded if rounded <= number else float(f"{rounded - _unit(number, digits):.12g}")


def _unit(number: float, digits: int) -> float:
    """Value of the last of so many digits."""
    return 10.0 ** (math.floor(math.log10(number)) - digits + 1)
