"""Best learning rate of a parameter group by width, and the rule that carries it to other widths.

`scripts/best_rate.py` is the command.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from lab.scaling import CURVES, read_runs
from lab.statistics import CONFIDENCE, Estimate, estimate
from training.config import RunConfig
from training.settings import load_settings


class Optimum(NamedTuple):
    """The best rate of one width and seed."""

    width: int
    seed: int
    rate: float


class Rule(NamedTuple):
    """rate = constant * width ** exponent, fitted to optima of several widths and seeds."""

    optima: list[Optimum]
    exponent: Estimate
    log2_constant: float

    def at(self, width: int) -> Estimate:
        """Return the best rate at a width with the 95 % interval of the fitted line."""
        x = np.log2([optimum.width for optimum in self.optima])
        y = np.log2([optimum.rate for optimum in self.optima])
        distance = math.log2(width) - x.mean()
        middle = self.log2_constant + self.exponent.mean * math.log2(width)
        free = len(x) - 2
        residual = y - self.log2_constant - self.exponent.mean * x
        variance = (residual @ residual) / free
        spread = math.sqrt(variance * (1 / len(x) + distance**2 / ((x - x.mean()) ** 2).sum()))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, free)) * spread
        return Estimate(len(x), 2**middle, None, 2 ** (middle - half), 2 ** (middle + half))


def read_losses(folder: Path, group: str, metric: str) -> dict[tuple[int, int], dict[float, float]]:
    """Return (width, seed) -> rate of the group -> final value of the metric.

    folder: logs/lab/NAME or a record folder. The rate is optim.lr times the group's factor.
    """
    losses: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
    for run in read_runs(folder, metric):
        if (folder / CURVES).is_file():
            path = folder / "configs" / f"{run.name}.yaml"
        else:
            path = sorted((folder / f"{run.name}-{run.seed}").glob("*.config.yaml"))[-1]
        config = load_settings(RunConfig, path)
        factor = config.optim.groups[group].lr if group in config.optim.groups else 1.0
        losses[config.model.hidden_size, run.seed][config.optim.lr * factor] = run.loss
    return losses


def best_rate(losses: dict[float, float]) -> float:
    """Return the minimum of the parabola through the best rate and its neighbours, in log2(rate).

    ValueError if the best rate is the lowest or the highest.
    """
    rates = sorted(losses)
    middle = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if middle in (0, len(rates) - 1):
        raise ValueError(
            f"{rates[middle]:g}, the {'highest' if middle else 'lowest'} of {len(rates)} rates, is "
            "the best; add rates beyond it to the experiment"
        )
    near = rates[middle - 1 : middle + 2]
    curvature, slope, _ = np.polyfit(np.log2(near), [losses[rate] for rate in near], 2)
    return float(2 ** (-slope / (2 * curvature)))


def fit_rule(losses: dict[tuple[int, int], dict[float, float]]) -> Rule:
    """Fit a power law of the width to the best rate of each width and seed.

    ValueError below two widths or three optima.
    """
    optima = []
    for (width, seed), values in sorted(losses.items()):
        try:
            optima.append(Optimum(width, seed, best_rate(values)))
        except ValueError as error:
            raise ValueError(f"width {width}, seed {seed}: {error}") from error
    if len({optimum.width for optimum in optima}) < 2 or len(optima) < 3:
        raise ValueError(
            f"{len(optima)} best rates are too few for a rule; it needs two widths and three runs"
        )
    x = np.log2([optimum.width for optimum in optima])
    y = np.log2([optimum.rate for optimum in optima])
    line = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)) * line.stderr
    exponent = Estimate(len(x), line.slope, None, line.slope - half, line.slope + half, line.pvalue)
    return Rule(optima, exponent, float(line.intercept))


def by_width(rule: Rule) -> dict[int, Estimate]:
    """Return the geometric mean of the best rates of each width, with its interval over seeds."""
    rates = defaultdict(list)
    for optimum in rule.optima:
        rates[optimum.width].append(math.log2(optimum.rate))
    return {width: _power(estimate(values)) for width, values in rates.items()}


def _power(log2: Estimate) -> Estimate:
    low, high = (None if bound is None else 2**bound for bound in (log2.low, log2.high))
    return Estimate(log2.n, 2**log2.mean, None, low, high)
