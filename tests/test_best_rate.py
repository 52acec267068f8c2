"""Best learning rates by width: planted optima come back, and the grid's edge is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from lab.best_rate import best_rate, by_width, fit_rule

RATES = [2.0**power for power in range(-7, 1)]


def losses(best: float) -> dict[float, float]:
    return {rate: 3 + 0.02 * math.log2(rate / best) ** 2 for rate in RATES}


def test_a_parabola_has_its_minimum_where_it_was_planted():
    assert best_rate(losses(0.1)) == pytest.approx(0.1, rel=1e-6)


def test_the_best_rate_at_the_edge_of_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"width 64, seed 0: 1, the highest of 8 rates, is the"):
        fit_rule({(64, 0): losses(4)})
    with pytest.raises(ValueError, match=r"the lowest of 8 rates"):
        best_rate(losses(0.001))


def test_a_power_law_of_the_width_is_recovered_with_the_interval_of_the_line():
    noise = np.random.default_rng(0).normal(0, 0.1, size=(3, 4))
    planted = {
        (width, seed): losses(0.4 * width**-0.5 * 2 ** noise[row, seed])
        for row, width in enumerate((64, 128, 256))
        for seed in range(4)
    }
    rule = fit_rule(planted)
    assert rule.exponent.low < -0.5 < rule.exponent.high
    x = np.log2([width for width, _ in planted])
    y = np.log2([0.4 * width**-0.5 for width, _ in planted]) + noise.ravel()
    line = stats.linregress(x, y)
    assert rule.exponent.mean == pytest.approx(line.slope, abs=1e-5)
    # The line's interval at 0 on the x axis is that of the intercept.
    half = stats.t.ppf(0.975, len(x) - 2) * line.intercept_stderr
    at = rule.at(1)
    assert math.log2(at.low) == pytest.approx(line.intercept - half, abs=1e-4)
    assert math.log2(at.high) == pytest.approx(line.intercept + half, abs=1e-4)
    assert rule.at(128).low < 0.4 * 128**-0.5 < rule.at(128).high
    assert {width: rate.n for width, rate in by_width(rule).items()} == {64: 4, 128: 4, 256: 4}


def test_one_width_gives_no_rule():
    with pytest.raises(ValueError, match="2 best rates are too few"):
        fit_rule({(64, 0): losses(0.1), (64, 1): losses(0.1)})
