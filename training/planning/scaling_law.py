"""Scaling law of small runs, L(N, D) = E + A / N^alpha + B / D^beta, with intervals.

The form is that of Hoffmann et al. 2022 (arXiv:2203.15556, approach 3): Huber loss on the log of
the loss, several starting points. Sizes within one decade do not determine five parameters, so
the fit adds a weak prior, and every interval includes the prior's uncertainty: each draw resamples
the runs and moves the prior's centre by its own standard deviation (randomize-then-optimize,
Bardsley et al. 2014, doi:10.1137/140964023). A quantity that the runs do not determine keeps the
width of the prior; `ScalingLaw.prior_share` is each parameter's width relative to the prior.

N counts non-embedding parameters that a token uses, D training tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from files import read_json
from models.nanollama import ModelConfig

Array = NDArray[np.float64]
Interval = tuple[float, float]

PARAMETERS = ("E", "size", "data", "alpha", "beta")  # size, data: the terms at the reference
# Centre and standard deviation of each parameter's log; the first three are relative to the lowest
# measured loss. The centres of the exponents are those of arXiv:2404.10102; one standard deviation
# is a factor of 1.65, so 95 % of the prior for them lies between 0.13 and 0.96.
PRIOR_CENTRE = np.log([0.4, 0.3, 0.3, 0.3478, 0.3658])
PRIOR_SD = np.array([0.6, 1.5, 1.5, 0.5, 0.5])
# Starting points: factors of the prior's centre: a low and a high floor, small and large exponents.
STARTS = np.array(
    [
        (floor, 1.0, 1.0, alpha, beta)
        for floor in (0.5, 1.5)
        for alpha in (0.6, 1.7)
        for beta in (0.6, 1.7)
    ]
)
HUBER = 1.345  # in standard deviations of a run: 95 % efficiency for normal noise
MIN_SEED_SD = 1e-3  # of the log loss: Hoffmann's delta
MIN_SIZES, MIN_BUDGETS, MIN_CELLS, MIN_SEEDS = 5, 2, 8, 2
DRAWS = 400
CONFIDENCE = 0.95
STEPS = 60  # of Levenberg-Marquardt


class Run(NamedTuple):
    """One finished run."""

    name: str
    seed: int
    parameters: int  # non-embedding, used by a token
    tokens: int
    loss: float

    @property
    def cell(self) -> tuple[int, int]:
        """Return (size, tokens); runs of a cell differ only in their seed."""
        return self.parameters, self.tokens

    @property
    def compute(self) -> float:
        """Training FLOPs, 6 N D."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. Rows of `draws` are fits to resampled runs: [draws, 5], as PARAMETERS."""

    reference: tuple[float, float]  # N and D at which the terms "size" and "data" are given
    best: Array
    draws: Array
    seed_sd: float  # of one run's log loss
    misfit_sd: float  # sd of a cell's mean log loss around the law, beyond seed noise
    parameters: Interval  # smallest and largest N of the runs
    tokens: Interval  # smallest and largest D of the runs
    metric: str = "val/loss"

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the expected loss of a run."""
        return float(np.exp(_log_loss(np.log(self.best), *self._relative(parameters, tokens))))

    def interval(self, parameters: float, tokens: float, seeds: int | None = None) -> Interval:
        """Return the 95 % interval of the expected loss.

        seeds: return the interval of a measured mean over this many seeds, with the runs' noise.
        """
        logs = _log_loss(np.log(self.draws), *self._relative(parameters, tokens))
        if seeds is not None:
            noise = math.hypot(self.seed_sd / math.sqrt(seeds), self.misfit_sd)
            # One fixed sample per draw, so that the interval depends only on the law.
            logs = logs + noise * np.random.default_rng(1).standard_normal(logs.shape)
        return _quantiles(np.exp(logs))

    def factors(self, parameters: float, tokens: float) -> Interval:
        """Return N and D divided by the largest of the runs; at most 1 within the runs."""
        return parameters / self.parameters[1], tokens / self.tokens[1]

    def parameter_intervals(self) -> dict[str, Interval]:
        """Return the 95 % intervals of PARAMETERS."""
        return {name: _quantiles(self.draws[:, i]) for i, name in enumerate(PARAMETERS)}

    @property
    def prior_share(self) -> dict[str, float]:
        """Return each parameter's spread relative to its prior; 1: the runs do not determine it."""
        spread = np.log(self.draws).std(axis=0) / PRIOR_SD
        return dict(zip(PARAMETERS, spread.tolist(), strict=True))

    @property
    def constants(self) -> dict[str, float]:
        """Return E, A, B, alpha and beta in the usual form of published laws."""
        e, size, data, alpha, beta = map(float, self.best)
        n, d = self.reference
        return {"E": e, "A": size * n**alpha, "B": data * d**beta, "alpha": alpha, "beta": beta}

    def as_json(self) -> dict[str, Any]:
        """Return the law as plain values; from_json reads them."""
        return {
            "metric": self.metric,
            "reference": list(self.reference),
            "best": [float(f"{value:.6g}") for value in self.best],
            "draws": [[float(f"{value:.5g}") for value in draw] for draw in self.draws],
            "seed_sd": self.seed_sd,
            "misfit_sd": self.misfit_sd,
            "parameters": list(self.parameters),
            "tokens": list(self.tokens),
        }

    def _relative(self, parameters: float, tokens: float) -> tuple[float, float]:
        return math.log(parameters / self.reference[0]), math.log(tokens / self.reference[1])


def law_from_json(values: dict[str, Any]) -> ScalingLaw:
    """Return the law that as_json wrote; ValueError if the values are invalid."""
    try:
        best, draws = (np.array(values[key], dtype=np.float64) for key in ("best", "draws"))
        ranges = [values[key] for key in ("reference", "parameters", "tokens")]
        pairs = [(float(first), float(second)) for first, second in ranges]
        law = ScalingLaw(
            pairs[0],
            best,
            draws,
            float(values["seed_sd"]),
            float(values["misfit_sd"]),
            pairs[1],
            pairs[2],
            str(values["metric"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is not a law of scripts.forecast ({error!r})") from None
    numbers = np.concatenate([best.ravel(), draws.ravel(), np.ravel(pairs)])
    if best.shape != (5,) or draws.ndim != 2 or draws.shape[1] != 5 or not len(draws):
        raise ValueError(f"its law has parameters of shape {draws.shape}, not [draws, 5]")
    noise = np.array([law.seed_sd, law.misfit_sd])
    if not (np.isfinite(numbers).all() and (numbers > 0).all() and (noise >= 0).all()):
        raise ValueError("its law has a value that is not a positive number")
    return law


def load_law(path: Path) -> ScalingLaw:
    """Read the law of a forecast.json; ValueError if the file is missing or invalid."""
    try:
        return law_from_json(read_json(path).get("law") or {})
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; write it with scripts.forecast") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write it again with scripts.forecast") from error


def non_embedding_parameters(model: ModelConfig) -> int:
    """Return the parameters that a token uses, without embedding and output head."""
    tables = 1 if model.tie_word_embeddings else 2
    return model.num_active_parameters - tables * model.vocab_size * model.hidden_size


def check_runs(runs: Sequence[Run]) -> None:
    """ValueError if the runs are too few to fit the law."""
    cells = {run.cell for run in runs}
    counts = {
        "sizes": (len({run.parameters for run in runs}), MIN_SIZES),
        "token budgets": (len({run.tokens for run in runs}), MIN_BUDGETS),
        "pairs of size and budget": (len(cells), MIN_CELLS),
        "seeds per pair": (len(runs) // max(1, len(cells)), MIN_SEEDS),
    }
    for name, (count, minimum) in counts.items():
        if count < minimum:
            raise ValueError(
                f"the fit has {count} {name} and needs at least {minimum}; run more of the "
                "experiment (configs/lab/scaling.yaml has enough)"
            )
    if bad := [run.name for run in runs if not (math.isfinite(run.loss) and run.loss > 0)]:
        raise ValueError(f"the loss of {bad[0]} is not a positive number; leave the run out")


def fit(runs: Sequence[Run], draws: int = DRAWS, metric: str = "val/loss") -> ScalingLaw:
    """Fit the law to runs, with `draws` resampled fits. ValueError if the runs are too few."""
    check_runs(runs)
    pairs = np.array([run.cell for run in runs], dtype=np.float64)
    losses = np.log([[run.loss for run in runs]])
    [law] = fit_many(pairs[:, 0], pairs[:, 1], losses, draws, metric)
    return law


def fit_many(
    parameters: Array,
    tokens: Array,
    log_losses: Array,
    draws: int = DRAWS,
    metric: str = "val/loss",
) -> list[ScalingLaw]:
    """Fit several sets of losses of the same runs at once.

    parameters, tokens: [runs]. log_losses: [sets, runs].
    """
    pairs = np.stack([parameters, tokens], axis=1)
    cells = np.unique(pairs, axis=0, return_inverse=True)[1].ravel()
    log_parameters, log_tokens = np.log(parameters), np.log(tokens)
    count = cells.max() + 1
    sizes = np.bincount(cells)
    members = np.eye(count)[cells]  # [runs, cells]
    reference = log_parameters.mean(), log_tokens.mean()
    n, d = log_parameters - reference[0], log_tokens - reference[1]
    means = log_losses @ members / sizes
    within = ((log_losses - means[:, cells]) ** 2).sum(1) / (len(cells) - count)
    seed_sd = np.maximum(np.sqrt(within), MIN_SEED_SD)  # [sets]
    centre = np.tile(PRIOR_CENTRE, (len(log_losses), 1))
    centre[:, :3] += log_losses.min(1, keepdims=True)
    best = _best_of_starts(n, d, log_losses, seed_sd, centre)
    residuals = means - _log_loss(best[:, None], n, d) @ members / sizes
    # Residuals of a fit with five parameters are too small by (cells - 5) / cells.
    around = (residuals**2).sum(1) / max(1, count - len(PARAMETERS))
    misfit_sd = np.sqrt(np.maximum(0, around - seed_sd**2 / sizes.mean()))
    drawn = np.empty((draws, *best.shape))
    if draws:
        weights, centres = _resample(cells, centre, draws)
        losses, starts = (np.tile(values, (draws, 1)) for values in (log_losses, best))
        drawn, _ = _minimize(n, d, losses, weights, np.tile(seed_sd, draws), centres, starts)
        drawn = drawn.reshape(draws, *best.shape)
    return [
        ScalingLaw(
            (math.exp(reference[0]), math.exp(reference[1])),
            np.exp(best[i]),
            np.exp(drawn[:, i]),
            float(seed_sd[i]),
            float(misfit_sd[i]),
            (float(parameters.min()), float(parameters.max())),
            (float(tokens.min()), float(tokens.max())),
            metric,
        )
        for i in range(len(log_losses))
    ]


def _resample(cells: NDArray[Any], centre: Array, draws: int) -> tuple[Array, Array]:
    """Return weights of runs [draws * sets, runs] and prior centres [draws * sets, 5].

    Draws cells with replacement, and seeds within each cell with replacement.
    """
    rng = np.random.default_rng(0)
    total, sizes = draws * len(centre), np.bincount(cells)
    weights = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), total)
    seeds = np.empty((total, len(cells)))
    for cell, size in enumerate(sizes):
        seeds[:, cells == cell] = rng.multinomial(size, np.full(size, 1 / size), total)
    centres = np.tile(centre, (draws, 1))
    return weights[:, cells] * seeds, centres + PRIOR_SD * rng.standard_normal(centres.shape)


def _best_of_starts(n: Array, d: Array, log_losses: Array, seed_sd: Array, centre: Array) -> Array:
    """Minimize from several starting points and return the best solutions, [sets, 5]."""
    weights = np.ones_like(log_losses)
    solutions, values = [], []
    for shift in STARTS:
        start = centre + np.log(shift)
        solution, value = _minimize(n, d, log_losses, weights, seed_sd, centre, start)
        solutions.append(solution)
        values.append(value)
    chosen = np.argmin(values, axis=0)
    return np.stack(solutions)[chosen, np.arange(len(chosen))]


def _log_loss(theta: Array, n: Array | float, d: Array | float) -> Array:
    """Return the log of the law.

    theta: [..., 5], logs of PARAMETERS. n, d: logs of N and D relative to their reference.
    """
    e, size, data, alpha, beta = np.moveaxis(theta, -1, 0)
    terms = (e, size - np.exp(alpha) * n, data - np.exp(beta) * d)
    return np.logaddexp(np.logaddexp(terms[0], terms[1]), terms[2])


def _objective(residuals: Array, weights: Array, theta: Array, centre: Array) -> Array:
    """Return the weighted Huber loss of standardized residuals plus the prior's penalty."""
    size = np.abs(residuals)
    huber = np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
    return (weights * huber).sum(1) + 0.5 * (((theta - centre) / PRIOR_SD) ** 2).sum(1)


def _minimize(
    n: Array,
    d: Array,
    log_losses: Array,
    weights: Array,
    seed_sd: Array,
    centre: Array,
    start: Array,
) -> tuple[Array, Array]:
    """Minimize the objective of many problems at once by Levenberg-Marquardt.

    n, d: [runs]. log_losses, weights: [problems, runs]. seed_sd: [problems]. centre, start:
    [problems, 5]. Returns solutions [problems, 5] and objectives [problems].
    """
    theta, scale = start.copy(), seed_sd[:, None]
    precision = np.diag(PRIOR_SD**-2.0)
    damping = np.ones(len(theta))

    def residuals_of(theta: Array) -> Array:
        return (_log_loss(theta[:, None], n, d) - log_losses) / scale

    residuals = residuals_of(theta)
    value = _objective(residuals, weights, theta, centre)
    for _ in range(STEPS):
        e, size, data, alpha, beta = theta.T[:, :, None]
        a, b = np.exp(alpha) * n, np.exp(beta) * d
        terms = np.stack([e + 0 * n, size - a, data - b], axis=-1)
        shares = np.exp(terms - _log_loss(theta[:, None], n, d)[..., None])
        jacobian = np.concatenate([shares, -shares[..., 1:] * np.stack([a, b], axis=-1)], axis=-1)
        jacobian /= scale[..., None]
        # Weights of iteratively reweighted least squares.
        robust = weights * np.minimum(1, HUBER / np.maximum(np.abs(residuals), 1e-12))
        weighted = jacobian * robust[..., None]
        curvature = np.einsum("prk,prl->pkl", weighted, jacobian) + precision
        gradient = np.einsum("prk,pr->pk", weighted, residuals) + (theta - centre) / PRIOR_SD**2
        diagonal = np.einsum("pkk->pk", curvature)
        damped = curvature + np.einsum("p,pk,kl->pkl", damping, diagonal, np.eye(5))
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        proposal = theta - step
        moved = residuals_of(proposal)
        moved_value = _objective(moved, weights, proposal, centre)
        better = moved_value < value
        theta = np.where(better[:, None], proposal, theta)
        residuals = np.where(better[:, None], moved, residuals)
        value = np.where(better, moved_value, value)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
        if np.abs(step).max() < 1e-7:
            break
    return theta, value


def _quantiles(values: Array) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def forecast_phases(law: ScalingLaw, source: str, parameters: int, report: dict[str, Any]) -> None:
    """Add the law's forecast to each phase of a report of training/planning/cost.py.

    parameters: of the plan's model, see non_embedding_parameters. source: file of the law.
    """
    tokens = 0
    for phase in report["phases"]:
        tokens += phase["tokens"]
        size_factor, token_factor = law.factors(parameters, tokens)
        low, high = law.interval(parameters, tokens)
        phase["scaling_law"] = {
            "source": source,
            "metric": law.metric,
            "parameters": parameters,
            "tokens": tokens,
            "loss": law.loss(parameters, tokens),
            "interval": [low, high],
            "parameters_factor": size_factor,
            "tokens_factor": token_factor,
        }
