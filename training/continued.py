"""Continued pretraining: settings that a run takes from its model folder, init_from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from files import read_json
from models.hf import read_hf_config, resolve_checkpoint
from models.nanollama import ModelConfig
from models.rope import RopeScaling

# Model settings in which the run may differ from the folder; source_checks.py checks positions
# and experts.
MAY_DIFFER = ("max_position_embeddings", "rope_scaling", "initializer_range", "moe")
WARMUP = 0.01  # share of the steps (arXiv:2403.08763); matters little (arXiv:2308.04014)


def settings_from_base(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings, by dotted name, that `values` may omit because init_from determines them.

    They are the model section, rope_theta, and a schedule over the steps of the run: warm-up, then
    decay. init_from itself becomes the newest step folder of a phase folder. {} without init_from.
    ValueError if the model section contradicts the folder.
    """
    base, given = values.get("init_from"), values.get("model") or {}
    if not base or not isinstance(given, dict):
        return {}
    folder = resolve_checkpoint(str(base))
    if given and not (folder / "config.json").is_file():
        return {}  # an earlier phase of a plan writes it later
    config = read_hf_config(folder)
    model: dict[str, Any] = asdict(config)
    model["vocab_size"] = rows_needed(folder, config.vocab_size)
    theta = model.pop("rope_theta")
    for name, value in given.items():
        if name in model and name not in MAY_DIFFER and not _equal(value, model[name]):
            raise ValueError(
                f"{folder} was trained with model.{name}={model[name]}, but the config has "
                f"{value}; remove model.{name}, which the folder sets"
            )
        if name == "moe" and isinstance(value, dict):
            model["moe"] |= value
        elif name not in model or name in MAY_DIFFER:
            model[name] = value
    derived = {"model": json.dumps(model), "init_from": str(folder), **_schedule(values)}
    if values.get("rope_theta") is None:
        _check_context(folder, config, model)
        derived["rope_theta"] = theta
    return derived


def is_scaling_of(init_from: str | None, scaling: RopeScaling, context: int) -> bool:
    """Return True if a run has the rope scaling and the context of its model folder."""
    if not init_from or not (Path(init_from) / "config.json").is_file():
        return False
    config = read_hf_config(Path(init_from))
    return (config.rope_scaling, config.max_position_embeddings) == (scaling, context)


def rows_needed(folder: Path, rows: int) -> int:
    """Return the embedding rows for a folder's tokenizer.json: `rows`, or more for added tokens.

    ValueError if other tokens lack a row: the folder has another model's tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return rows
    content = read_json(path)
    try:
        added = {token["id"] for token in content.get("added_tokens", ())}
        vocabulary = content["model"]["vocab"]
        known = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max((index for index in known if index not in added), default=-1)
        needed = max((*added, largest), default=-1) + 1
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it is not a tokenizer") from error
    if largest >= rows:
        raise ValueError(
            f"{path} has the id {largest}, but the embedding has {rows} rows; use the model's own "
            "tokenizer"
        )
    return max(rows, needed)


def _equal(value: Any, expected: Any) -> bool:
    """Return True if a config value, which may be text such as 1e-5, equals the folder's."""
    if isinstance(expected, float) and not isinstance(value, bool):
        try:
            return abs(float(value) - expected) <= 1e-6 * abs(expected)  # rounded in the folder
        except (TypeError, ValueError):
            return False
    return bool(value == expected)


def _check_context(folder: Path, config: ModelConfig, model: dict[str, Any]) -> None:
    """ValueError if the context grows beyond the folder's without rope scaling."""
    context = model["max_position_embeddings"]
    known = config.max_position_embeddings
    if model["rope_scaling"] is None and isinstance(context, int) and context > known:
        raise ValueError(
            f"model.max_position_embeddings={context} exceeds the {known} positions of {folder}; "
            "lower it, or extend the context with model.rope_scaling or rope_theta "
            "(docs/long_context.md)"
        )


def _schedule(values: dict[str, Any]) -> dict[str, Any]:
    """Return the lengths that the schedule section omits, for a schedule over the run's steps."""
    schedule, steps = values.get("schedule") or {}, values.get("steps")
    if not isinstance(schedule, dict) or values.get("resume_from") or steps is None:
        return {}
    try:
        total = int(schedule.get("total_steps", steps))
        warmup = int(schedule.get("warmup_steps", max(1, round(WARMUP * total))))
    except (TypeError, ValueError):
        return {}  # the setting's own check reports the error
    lengths = {"total_steps": total, "warmup_steps": warmup, "decay_steps": total - warmup}
    return {f"schedule.{name}": n for name, n in lengths.items() if name not in schedule and n >= 0}
