"""Compare variants: final values, differences to the baseline, and steps to reach a target."""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.experiment import Compare
from lab.measurements import AXES, Measurement, Point
from lab.statistics import (
    Estimate,
    crossing,
    estimate,
    p_below,
    p_below_with_sigma,
    paired_difference,
)


@dataclass(frozen=True)
class VariantResult:
    """The figures of one variant over its seeds."""

    name: str
    seeds: list[int]
    final: dict[str, Estimate]  # metric -> last value
    difference: dict[str, Estimate | None]  # metric -> value minus baseline, paired by seed
    p_target: float | None  # one-sided t-test against the target
    p_sigma: float | None  # z-test with the declared sigma
    reached: dict[str, dict[int, float | None]]  # axis -> seed -> where it reached the target
    ratio: dict[str, Estimate | None]  # axis -> position / baseline's position, paired by seed
    previous: str | None  # the variant before, if Compare.chain is set
    previous_ratio: dict[str, Estimate | None]  # like `ratio`, relative to `previous`
    seconds: Estimate  # training seconds per run
    steps: int
    tokens: int

    def position(self, axis: str) -> Estimate | None:
        """Return the mean position of the target; None unless every seed reached it."""
        values = [value for value in self.reached[axis].values() if value is not None]
        complete = values and len(values) == len(self.seeds)
        return estimate(values) if complete else None


@dataclass(frozen=True)
class Comparison:
    """All variants of an experiment that have finished runs."""

    compare: Compare
    target: float | None
    variants: list[VariantResult]
    runs: dict[str, list[Measurement]]  # variant -> its finished runs

    @property
    def target_is_baseline(self) -> bool:
        return self.compare.target is None

    @property
    def baseline(self) -> VariantResult | None:
        names = {variant.name: variant for variant in self.variants}
        return names.get(self.compare.baseline)


def compare_variants(compare: Compare, measurements: Sequence[Measurement]) -> Comparison:
    """Compare the finished runs of an experiment. ValueError without any."""
    if not measurements:
        raise ValueError("no run has finished with the present settings; run the experiment first")
    runs: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        runs.setdefault(measurement.variant, []).append(measurement)
    baseline = runs.get(compare.baseline, [])
    target = compare.target
    if target is None and baseline:
        target = estimate([run.final[compare.metric] for run in baseline]).mean
    results: list[VariantResult] = []
    for name, group in runs.items():
        previous = results[-1] if compare.chain and results else None
        results.append(_result(compare, name, group, baseline, target, previous))
    return Comparison(compare, target, results, runs)


def _result(
    compare: Compare,
    name: str,
    runs: list[Measurement],
    baseline: list[Measurement],
    target: float | None,
    previous: VariantResult | None,
) -> VariantResult:
    values = {metric: {run.seed: run.final[metric] for run in runs} for metric in compare.metrics}
    base = {metric: {run.seed: run.final[metric] for run in baseline} for metric in compare.metrics}
    is_baseline = name == compare.baseline
    finals = list(values[compare.metric].values())
    higher, sigma = compare.higher_is_better, compare.sigma
    tested = target if compare.target is not None else None  # not against a measured mean
    reached = _reached(compare, runs, target)
    base_reached = _reached(compare, baseline, target)
    return VariantResult(
        name=name,
        seeds=sorted(values[compare.metric]),
        final={metric: estimate(list(values[metric].values())) for metric in values},
        difference={
            metric: None if is_baseline else paired_difference(values[metric], base[metric])
            for metric in values
        },
        p_target=None if tested is None else p_below(finals, tested, higher),
        p_sigma=(
            None
            if tested is None or sigma is None
            else p_below_with_sigma(finals, tested, sigma, higher)
        ),
        reached=reached,
        ratio={
            axis: None if is_baseline else _ratio(reached[axis], base_reached[axis])
            for axis in AXES
        },
        previous=None if previous is None else previous.name,
        previous_ratio={
            axis: None if previous is None else _ratio(reached[axis], previous.reached[axis])
            for axis in AXES
        },
        seconds=estimate([run.seconds for run in runs]),
        steps=runs[0].steps,
        tokens=runs[0].tokens,
    )


def _reached(
    compare: Compare, runs: list[Measurement], target: float | None
) -> dict[str, dict[int, float | None]]:
    """Return where each run reaches the target. The baseline reaches its final value at its end."""
    at_end = compare.target is None
    return {
        axis: {
            run.seed: _position(run.curves[compare.metric], axis, target, compare)
            if not (at_end and run.variant == compare.baseline)
            else float(getattr(run, axis))
            for run in runs
        }
        for axis in AXES
    }


def _position(
    points: list[Point], axis: str, target: float | None, compare: Compare
) -> float | None:
    if target is None:
        return None
    positions = [getattr(point, axis) for point in points]
    values = [point.value for point in points]
    return crossing(positions, values, target, compare.higher_is_better)


def _ratio(reached: dict[int, float | None], baseline: dict[int, float | None]) -> Estimate | None:
    """Return the ratio of positions, paired by seed; None if a common seed has no position."""
    pairs = [(reached[seed], baseline[seed]) for seed in sorted(reached.keys() & baseline.keys())]
    ratios = [
        position / reference for position, reference in pairs if position is not None and reference
    ]
    return estimate(ratios) if ratios and len(ratios) == len(pairs) else None
