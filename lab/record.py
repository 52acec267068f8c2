"""Write the record of an experiment: a folder with text, figures, settings and environment.

records/<date>_<name>/ has README.md, result.json, curves.csv, curves.png, to_target.png,
experiment.yaml, configs/<variant>.yaml and environment.json.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from files import read_object, write_json, write_text
from lab.comparison import Comparison, VariantResult, compare_variants
from lab.experiment import Experiment, Trial
from lab.measurements import AXES, Measurement, measure, metrics_folder
from lab.plots import plot_curves, plot_to_target
from lab.run import FAILED, STATE, is_finished
from lab.statistics import CONFIDENCE, Estimate
from yaml_file import read_yaml_file

MAX_DEVIATION = 0.05  # relative, of the seconds used from a budget in seconds
NOT_REPEATED = ("run", "seed", "output_dir", "log_dir")  # config keys that differ between runs


def write_record(
    experiment: Experiment, trials: Sequence[Trial], command: str, records: Path
) -> Path:
    """Write the record of all finished trials and return its folder.

    command: the command line that started the experiment. ValueError if no trial has finished.
    """
    finished = [trial for trial in trials if is_finished(trial)]
    measurements = [measure(trial, experiment.compare.metrics) for trial in finished]
    order = list(experiment.variants)
    measurements.sort(key=lambda measurement: order.index(measurement.variant))
    comparison = compare_variants(experiment.compare, measurements)
    newest = max((trial.folder / STATE).stat().st_mtime for trial in finished)
    date = datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%d")
    folder = records / f"{date}_{experiment.name}"
    states = {trial.name: read_object(trial.folder / STATE) or {} for trial in trials}
    environment = _environment(finished)
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment)
    write_json(folder / "result.json", _plain(_result(experiment, comparison)))
    write_text(folder / "curves.csv", _csv(experiment, measurements))
    settings = dataclasses.asdict(experiment)
    write_text(folder / "experiment.yaml", yaml.safe_dump(_plain(settings), sort_keys=False))
    for variant in comparison.runs:
        _write_config(folder, next(trial for trial in finished if trial.variant == variant))
    has_curve = any(run.curves[experiment.compare.metric] for run in measurements)
    if has_curve:
        plot_curves(comparison, folder / "curves.png")
    has_target = has_curve and comparison.target is not None and math.isfinite(comparison.target)
    if has_target:
        plot_to_target(comparison, folder / "to_target.png")
    notes = _notes(experiment, trials, comparison, states, environment)
    images = ["curves.png"] * has_curve + ["to_target.png"] * has_target
    text = _readme(experiment, comparison, notes, images, environment, command, date)
    write_text(folder / "README.md", text)
    return folder


def _readme(
    experiment: Experiment,
    comparison: Comparison,
    notes: list[str],
    images: list[str],
    environment: dict[str, Any],
    command: str,
    date: str,
) -> str:
    compare = experiment.compare
    seeds = ", ".join(str(seed) for seed in experiment.seeds)
    lines = [
        f"# {experiment.name}",
        "",
        f"Claim: {experiment.claim}",
        "",
        f"Last run: {date}. {len(comparison.variants)} variants, seeds {seeds}, budget per run: "
        f"{experiment.budget}. Compared: {compare.metric} "
        f"({'higher' if compare.higher_is_better else 'lower'} is better). "
        f"Intervals are {CONFIDENCE:.0%} t-intervals over seeds; n is the number of seeds.",
        "",
        "## Result",
        "",
        *(f"- {line}" for line in _verdict(comparison)),
        "",
        *_final_table(comparison),
        "",
        *(_target_table(comparison) if "to_target.png" in images else []),
        *(_chain_table(comparison) if compare.chain and "to_target.png" in images else []),
    ]
    for metric in compare.metrics[1:]:
        lines += [f"### {metric}", "", *_metric_table(comparison, metric), ""]
    for image in images:
        lines += [f"![{image}]({image})", ""]
    lines += ["## Variants", "", "| variant | config or command | changes |", "|---|---|---|"]
    for name in experiment.variants:
        changes = "; ".join(f"`{text}`" for text in experiment.variant(name).overrides) or "none"
        source = (
            experiment.command_of(name)
            if experiment.is_external(name)
            else experiment.config_of(name)
        )
        lines.append(f"| {name} | `{source}` | {changes} |")
    shared = "; ".join(f"`{text}`" for text in experiment.overrides)
    lines += ["", f"All variants: {shared or 'no further changes'}."]
    if experiment.budget.limits:
        lines[-1] += (
            " The learning-rate schedule is scaled to the steps of the budget; the resolved "
            "settings are in `configs/`."
        )
    if experiment.budget.own_steps:
        lines[-1] += (
            " Each variant trains for the steps of its config, so compare the positions of the "
            "target rather than final values."
        )
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    commits = ", ".join(environment["commits"]) or "unknown"
    lines += [
        "",
        "## Repeat",
        "",
        "```",
        command,
        "```",
        "",
        f"Commit: {commits}. {_machine(environment)}",
        "",
    ]
    return "\n".join(lines)


def _verdict(comparison: Comparison) -> list[str]:
    """Return one sentence per variant, and per test against a target."""
    compare, lines = comparison.compare, []
    baseline = comparison.baseline
    if baseline is None:
        lines.append(f"The baseline {compare.baseline} has no finished run; nothing is compared.")
    else:
        value = baseline.final[compare.metric]
        lines.append(f"Baseline {baseline.name}: {compare.metric} {value.text()}, n={value.n}.")
    for variant in comparison.variants:
        if (difference := variant.difference[compare.metric]) is not None:
            lines.append(f"{variant.name}: {judgement(difference, compare.higher_is_better)}")
        elif baseline is not None and variant is not baseline:
            lines.append(f"{variant.name}: has no seed in common with the baseline.")
        lines += _tests(variant, comparison)
    return lines + _by_chance(len(comparison.variants) - (baseline is not None))


def _by_chance(comparisons: int) -> list[str]:
    """Return a sentence on the intervals expected to exclude zero by chance, if there are many."""
    if comparisons <= 5:
        return []
    return [
        f"With {comparisons} comparisons at {CONFIDENCE:.0%}, about "
        f"{comparisons * (1 - CONFIDENCE):.1f} would exclude zero by chance alone."
    ]


def judgement(difference: Estimate, higher_is_better: bool = False) -> str:
    """Describe a difference to the baseline, e.g. "better by 0.0312 [0.02, 0.04], ..."."""
    if not math.isfinite(difference.mean):
        return "diverged or was not measured with at least one seed."
    sign = "+"
    if difference.low is None:
        return (
            f"differs by {difference.mean:+.4f} with one common seed; without an interval it "
            "cannot be distinguished from noise."
        )
    evidence = f"{difference.text(sign=sign)}, paired by seed, n={difference.n}"
    evidence += f", p={_p(difference.p)}" if difference.p is not None else ""
    if difference.sd == 0 and difference.mean == 0:
        return f"has the same values as the baseline ({evidence})."
    if not difference.excludes_zero:
        return f"no difference beyond noise: {evidence}."
    better = (difference.mean > 0) == higher_is_better
    return f"{'better' if better else 'worse'} than the baseline: {evidence}."


def _tests(variant: VariantResult, comparison: Comparison) -> list[str]:
    """Return sentences on the tests against a numeric target."""
    if comparison.compare.target is None:
        return []
    side = "above" if comparison.compare.higher_is_better else "below"
    n = len(variant.seeds)
    lines = []
    if variant.p_target is None:
        lines.append(
            f"{variant.name}: a t-test against the target {comparison.target:g} needs 2 or more "
            f"finite values; n={n}."
        )
    else:
        lines.append(
            f"{variant.name}: mean {side} the target {comparison.target:g} with "
            f"p={_p(variant.p_target)} (one-sided t-test, n={n})."
        )
    if variant.p_sigma is not None:
        lines.append(
            f"{variant.name}: mean {side} the target with p={_p(variant.p_sigma)} (z-test with the "
            f"declared sd {comparison.compare.sigma:g}, n={n})."
        )
    return lines


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _final_table(comparison: Comparison) -> list[str]:
    metric = comparison.compare.metric
    lines = [
        f"| variant | n | final {metric} | sd | difference to baseline | p | steps | tokens | "
        "seconds of training per run |",
        "|---|---:|---|---:|---|---:|---:|---:|---|",
    ]
    for variant in comparison.variants:
        value, difference = variant.final[metric], variant.difference[metric]
        cells = [
            variant.name,
            str(len(variant.seeds)),
            value.text(),
            "-" if value.sd is None else f"{value.sd:.4f}",
            "-" if difference is None else difference.text(sign="+"),
            "-" if difference is None else _p(difference.p),
            f"{variant.steps:,}",
            f"{variant.tokens:,}",
            variant.seconds.text(1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _metric_table(comparison: Comparison, metric: str) -> list[str]:
    lines = [
        "| variant | n | final value | difference to baseline | p |",
        "|---|---:|---|---|---:|",
    ]
    for variant in comparison.variants:
        value, difference = variant.final[metric], variant.difference[metric]
        cells = [variant.name, str(value.n), value.text()]
        cells += ["-", "-"] if difference is None else [difference.text(sign="+"), _p(difference.p)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _target_table(comparison: Comparison) -> list[str]:
    """Return the table of tokens, steps and seconds to the target, and ratios to the baseline."""
    origin = (
        f"the baseline's mean final value; the baseline ({comparison.compare.baseline}) reaches it "
        "at its end by definition"
        if comparison.target_is_baseline
        else "given"
    )
    lines = [
        f"Target: {comparison.compare.metric} {comparison.target:.4f} ({origin}). Positions are "
        "interpolated linearly between validations.",
        "",
        "| variant | " + " | ".join(f"{axis} to target | ratio" for axis in AXES) + " |",
        "|---|" + "---|" * (2 * len(AXES)),
    ]
    for variant in comparison.variants:
        cells = [variant.name]
        for axis in AXES:
            position, ratio = variant.position(axis), variant.ratio[axis]
            cells.append(
                _unreached(variant, axis, comparison)
                if position is None
                else position.text(1 if axis == "seconds" else 0)
            )
            cells.append("-" if ratio is None else ratio.text(3))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _chain_table(comparison: Comparison) -> list[str]:
    """Return the table of each variant's ratio to the previous variant, per axis."""
    header = " | ".join(f"{axis}: ratio" for axis in AXES)
    lines = [
        "### Each variant against the one before",
        "",
        f"| variant | the one before | {header} | verdict by tokens |",
        "|---|---|" + "---|" * (len(AXES) + 1),
    ]
    groups: dict[str, list[str]] = {}
    for variant in comparison.variants:
        if variant.previous is None:
            continue
        ratios = [variant.previous_ratio[axis] for axis in AXES]
        verdict = step_verdict(variant.previous_ratio["tokens"])
        groups.setdefault(verdict, []).append(variant.name)
        cells = ["-" if ratio is None else ratio.text(3) for ratio in ratios]
        lines.append(f"| {variant.name} | {variant.previous} | {' | '.join(cells)} | {verdict} |")
    summary = [f"- {verdict}: {', '.join(names)}." for verdict, names in groups.items()]
    chance = [f"- {sentence}" for sentence in _by_chance(len(comparison.variants) - 1)]
    return [*lines, "", *summary, *chance, ""]


def step_verdict(ratio: Estimate | None) -> str:
    """Judge a ratio of tokens to target, by whether its interval contains 1."""
    if ratio is None:
        return "not compared, since a run did not reach the target"
    if ratio.low is None or ratio.high is None:
        return "one seed, cannot be distinguished from noise"
    if ratio.low <= 1 <= ratio.high:
        return "no difference beyond noise"
    return "helps (fewer tokens)" if ratio.high < 1 else "does not help (more tokens)"


def _unreached(variant: VariantResult, axis: str, comparison: Comparison) -> str:
    missing = [seed for seed, value in variant.reached[axis].items() if value is None]
    values = {
        run.seed: run.final[comparison.compare.metric] for run in comparison.runs[variant.name]
    }
    got = ", ".join(f"{values[seed]:.4f}" for seed in missing)
    return f"not reached by {len(missing)} of {len(variant.seeds)} runs (final: {got})"


def _notes(
    experiment: Experiment,
    trials: Sequence[Trial],
    comparison: Comparison,
    states: dict[str, dict[str, Any]],
    environment: dict[str, Any],
) -> list[str]:
    """Return notes on the result: missing runs, deviations from the budget, changed code."""
    notes = []
    missing = [trial for trial in trials if not is_finished(trial)]
    done = {trial.name for trial in trials} - {trial.name for trial in missing}
    expected = [f"{name}-{seed}" for seed in experiment.seeds for name in experiment.variants]
    if absent := [name for name in expected if name not in done]:
        notes.append(f"Not finished, so not in the tables: {', '.join(absent)}.")
    for trial in missing:
        state = states[trial.name]
        if state.get("status") == FAILED and state.get("identity") == trial.identity:
            last = state["error"].splitlines()[-1]
            notes.append(f"{trial.name} failed with exit status {state['exit_status']}: `{last}`")
    for runs in comparison.runs.values():
        for run in runs:
            notes += _budget_note(experiment, run)
            if run.curves[comparison.compare.metric] and not math.isfinite(
                run.final[comparison.compare.metric]
            ):
                notes.append(f"{run.variant}-{run.seed} diverged.")
    for metric in comparison.compare.metrics[1:]:
        lacking = [
            f"{run.variant}-{run.seed}"
            for runs in comparison.runs.values()
            for run in runs
            if math.isnan(run.final[metric]) and not run.curves[metric]
        ]
        if lacking:
            notes.append(f"{metric} was not measured by {', '.join(lacking)}.")
    codes = {code for state in states.values() for code in state.get("codes", [])}
    if len(codes) > 1:
        notes.append(
            f"The runs used {len(codes)} versions of the code, so a difference may come from it; "
            "delete the run folders and run again to exclude that."
        )
    if environment["commits"] and not environment["clean"]:
        notes.append("Some runs had uncommitted changes, so the commit does not reproduce them.")
    return notes


def _budget_note(experiment: Experiment, run: Measurement) -> list[str]:
    budget = experiment.budget.seconds
    if not budget or abs(run.seconds / budget - 1) <= MAX_DEVIATION:
        return []
    return [
        f"{run.variant}-{run.seed} used {run.seconds:.1f} s of training, "
        f"{run.seconds / budget - 1:+.0%} against the budget of {budget:g} s: its pilots ran at "
        "another speed."
    ]


def _environment(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the environment of the first run, with the commits of all runs."""
    environments = [
        content
        for trial in trials
        for path in sorted(metrics_folder(trial).glob("*.environment.json"))
        if (content := read_object(path))
    ]
    commits = sorted({content["git"] for content in environments if content.get("git")})
    clean = bool(environments) and all(content.get("git_clean") for content in environments)
    return {**(environments[0] if environments else {}), "commits": commits, "clean": clean}


def _machine(environment: dict[str, Any]) -> str:
    """Return versions and hardware as one sentence."""
    if "python" not in environment:
        return "The commands did not record their environment."
    return (
        f"Python {environment['python']}, torch {environment['torch']}, {environment['device']}, "
        f"{environment['ranks']} rank(s), {environment['threads']} thread(s), "
        f"{environment['machine']}."
    )


def _write_config(folder: Path, trial: Trial) -> None:
    """Copy the resolved config of a variant; for a plan, the configs of all phases."""
    configs = {}
    for path in sorted(metrics_folder(trial).glob("*.config.yaml")):
        values = read_yaml_file(path)
        configs[path.name.removesuffix(".config.yaml")] = {
            key: value for key, value in values.items() if key not in NOT_REPEATED
        }
    content: Any = next(iter(configs.values())) if len(configs) == 1 else configs
    text = yaml.safe_dump(content or {"command": list(trial.words)}, sort_keys=False)
    write_text(folder / "configs" / f"{trial.variant}.yaml", text)


def _csv(experiment: Experiment, measurements: Sequence[Measurement]) -> str:
    """Return the validations of all runs as CSV, one line each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "metric", "step", "tokens", "seconds", "value"])
    for run in measurements:
        for metric in experiment.compare.metrics:
            for point in run.curves[metric]:
                numbers = [f"{point.steps:g}", f"{point.tokens:.0f}", f"{point.seconds:.3f}"]
                writer.writerow([run.variant, run.seed, metric, *numbers, f"{point.value:.6f}"])
    return text.getvalue()


def _result(experiment: Experiment, comparison: Comparison) -> dict[str, Any]:
    return {
        "name": experiment.name,
        "claim": experiment.claim,
        "metric": comparison.compare.metric,
        "target": comparison.target,
        "verdict": _verdict(comparison),
        "variants": [
            {
                **dataclasses.asdict(variant),
                "to_target": {axis: variant.position(axis) for axis in AXES},
            }
            for variant in comparison.variants
        ],
    }


def _plain(value: Any) -> Any:
    """Values for JSON and YAML: estimates and tuples as such, NaN as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
