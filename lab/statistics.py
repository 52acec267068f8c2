"""Statistics over seeds: intervals, paired differences, tests, and crossings of a target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of n values with its 95 % t-interval. One value has neither sd nor interval."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # of a two-sided t-test that the mean is 0; for differences only

    @property
    def excludes_zero(self) -> bool:
        """Return True if the interval excludes 0; False without an interval."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    def text(self, digits: int = 4, sign: str = "") -> str:
        """E.g. "2.3120 [2.3031, 2.3209]", or "2.3120 (n=1, no interval)"."""
        if not math.isfinite(self.mean):
            return "not finite (diverged or not measured)"
        mean = f"{self.mean:{sign},.{digits}f}"
        if self.low is None or self.high is None:
            return f"{mean} (n={self.n}, no interval)"
        if self.low == self.high:
            return f"{mean} (all {self.n} equal)"
        return f"{mean} [{self.low:{sign},.{digits}f}, {self.high:{sign},.{digits}f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, sd and 95 % t-interval; ValueError without values."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("there are no values to average; run at least one seed")
    mean = float(array.mean())
    if len(array) == 1 or not np.isfinite(array).all():
        return Estimate(len(array), mean)
    sd = float(array.std(ddof=1))
    if sd < 1e-12 * np.abs(array).max():  # equal values: removes the rounding error of the mean
        sd = 0.0
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)) * sd / math.sqrt(len(array))
    return Estimate(len(array), mean, sd, mean - half, mean + half)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Estimate | None:
    """Return values - baseline over the common seeds, with interval and p; None without any.

    p: two-sided paired t-test. Differences that are all equal have p 0, or 1 if they are 0.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    result = estimate([values[seed] - baseline[seed] for seed in seeds])
    if result.sd is None:
        return result
    if result.sd == 0:
        p = float(result.mean == 0)
    else:
        pairs = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
        p = float(stats.ttest_rel(*pairs).pvalue)
    return Estimate(result.n, result.mean, result.sd, result.low, result.high, p)


def p_below(values: Sequence[float], target: float, higher: bool = False) -> float | None:
    """Return p of a one-sided t-test that the mean is below the target; None below 2 values.

    This is the rule of the speedrun's records: ttest_1samp(losses, target, alternative="less").
    higher: test that the mean lies above it.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    if estimate(values).sd == 0:
        better = values[0] > target if higher else values[0] < target
        return 0.0 if better else 1.0
    side = "greater" if higher else "less"
    return float(stats.ttest_1samp(values, target, alternative=side).pvalue)


def p_below_with_sigma(
    values: Sequence[float], target: float, sigma: float, higher: bool = False
) -> float:
    """Return p of a one-sided z-test against the target, with the declared sd `sigma` of a run.

    This is the rule of the speedrun's track 3, where sigma is 0.0013 and p must be below 0.001. It
    also works for one value.
    """
    z = (float(np.mean(values)) - target) * math.sqrt(len(values)) / sigma
    return float(stats.norm.cdf(-z if higher else z))


def crossing(
    positions: Sequence[float], values: Sequence[float], target: float, higher: bool = False
) -> float | None:
    """Return where a curve first reaches the target, by linear interpolation; None if never.

    positions: tokens, steps or seconds of the values, in rising order. A curve that begins beyond
    the target crosses it at its first position. Values that are not finite never reach it.
    """
    before: tuple[float, float] | None = None
    for position, value in zip(positions, values, strict=True):
        gap = value - target if higher else target - value
        if gap >= 0:
            if before is None or math.isinf(gap):
                return position
            earlier, earlier_gap = before
            return earlier + (position - earlier) * earlier_gap / (earlier_gap - gap)
        before = (position, gap) if math.isfinite(gap) else None
    return None
