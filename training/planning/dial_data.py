"""Data of a plan that the dial chose: sources, mixtures, available tokens and downloads."""

import math
from collections.abc import Mapping

from data.corpus.sources import HUB_SOURCES
from training.planning.cost import MAX_EPOCHS

LONG_SHARE, DECAY_SHARE = 0.05, 0.2  # of the tokens; 10-20 % of decay is enough (arXiv:2405.18392)
DOWNLOAD_MARGIN = 1.1  # downloaded / trained tokens: filters and validation remove some
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
# Late phases keep web text: replay prevents forgetting (arXiv:2603.04964).
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
    """Return each phase's share of the tokens. long_rows: 0 without a long-context phase."""
    long = {"long_context": LONG_SHARE} if long_rows else {}
    return {"base": 1 - DECAY_SHARE - sum(long.values()), **long, "gold": DECAY_SHARE}


def source_tokens(goal: str, phase_tokens: Mapping[str, float]) -> dict[str, float]:
    """Return source -> tokens that the phases read of it. phase_tokens: phase -> its tokens."""
    read: dict[str, float] = {}
    for phase, tokens in phase_tokens.items():
        for name, weight in MIXES[goal][phase].items():
            read[name] = read.get(name, 0.0) + weight * tokens
    return read


def source_shares(goal: str, long_rows: int) -> dict[str, float]:
    """Return each source's share of the tokens of all phases."""
    return source_tokens(goal, phase_shares(long_rows))


def available_tokens(goal: str, long_rows: int) -> float:
    """Return the maximum tokens of a plan, at MAX_EPOCHS epochs of the rarest source."""
    shares = source_shares(goal, long_rows)
    return min(MAX_EPOCHS * AVAILABLE[name] / share for name, share in shares.items())


def download_tokens(goal: str, phase_tokens: Mapping[str, float]) -> dict[str, float]:
    """Return source -> tokens to download for the phases, with a margin. phase_tokens: of each.

    A source has at most its available tokens. Amounts are rounded up to three digits, so the
    printed figures are exact.
    """
    read = source_tokens(goal, phase_tokens)
    return {
        name: min(round_up(DOWNLOAD_MARGIN * tokens, 3), AVAILABLE[name])
        for name, tokens in read.items()
    }


def gated_text(goal: str, long_rows: int) -> str:
    """Return the steps that gated sources need before the download; "" without gated sources."""
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
    """Round up to `digits` significant digits."""
    rounded = float(f"{number:.{digits - 1}e}")
    return rounded if rounded >= number else float(f"{rounded + _unit(number, digits):.12g}")


def round_down(number: float, digits: int = 2) -> float:
    """Round down to `digits` significant digits."""
    rounded = float(f"{number:.{digits - 1}e}")
    return rounded if rounded <= number else float(f"{rounded - _unit(number, digits):.12g}")


def _unit(number: float, digits: int) -> float:
    """Return the value of the last of `digits` significant digits."""
    return 10.0 ** (math.floor(math.log10(number)) - digits + 1)
