"""Check that a run continues a checkpoint or a model folder with the settings it was trained with.

ValueError names the setting, tokenizer or learning rate that differs.
"""

import math
from pathlib import Path
from typing import Any

from models.hf import read_config
from models.speedrun_config import GPTConfig
from training.checkpoint import same_tokenizer
from training.config import PHASES_DIFFER, RunConfig, fixed, scaling_of
from training.schedulers import ScheduleConfig, WSDScheduler

# Model settings that may differ from init_from's: visible in shapes, training-only or scheduled.
MAY_DIFFER = (
    *("vocab_size", "intermediate_size", "kind", "moe", "init", "zero_init", "fp8_head"),
    *("multi_token_weights", "softcap", "long_window", "short_window"),
)


def check_rate(run: RunConfig, position: dict[str, Any]) -> None:
    """ValueError if this run would raise the learning rate after its decay had begun."""
    saved, step = dict(position.get("rate") or {}), position["step"]
    if not saved or run.schedule.allow_rise:
        return
    known = {
        name: value for name, value in saved.items() if name in ScheduleConfig.__dataclass_fields__
    }
    try:
        stable = known["total_steps"] - known["decay_steps"]
        used = WSDScheduler(ScheduleConfig(**known), saved["peak"])(step - 1)  # of the last update
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "the learning-rate schedule in the checkpoint's trainer.json is damaged; use another "
            "copy of the checkpoint"
        ) from error
    planned = WSDScheduler(run.schedule, run.optim.lr)(step)
    if step > stable and planned > 1.01 * used:
        advice = (
            "to train longer, choose another output_dir and start again"
            if run.SHAPE_FROM_BASE
            else "to train longer, continue from a checkpoint before the decay (scripts.pipeline "
            "--extend does)"
        )
        raise ValueError(
            f"the learning rate would rise from {used:.1e} to {planned:.1e} at step {step}, after "
            f"its decay had begun; {advice}, or set schedule.allow_rise=true"
        )


def check_theta(run: RunConfig, source: Path, expected: float) -> None:
    """ValueError if `source` was last trained with another rope theta than `expected`."""
    trained = read_config(source).rope_theta
    if not run.allow_theta_jump and not math.isclose(trained, expected, rel_tol=1e-6):
        raise ValueError(
            f"rope theta would jump: {source} was trained with {trained:,.0f}, but "
            f"rope_theta={run.theta_text} is {expected:,.0f} there; set rope_theta to "
            f"{trained:.10g}, or to [{trained:.10g}, last] to change it over the phase, or set "
            "allow_theta_jump=true"
        )


def rope_scaling_change(run: RunConfig, source: Path, allowed: bool) -> str:
    """Describe how model.rope_scaling changes after `source`, or ""; ValueError if not allowed."""
    before, after = (scaling_of(model) or "none" for model in (read_config(source), run.model))
    if before == after:
        return ""
    if not allowed:
        flag = "" if run.allow_rope_scaling_change else ", or set allow_rope_scaling_change=true"
        raise ValueError(
            f"model.rope_scaling would change: {source} was trained with {before}, but the config "
            f"has {after}; make them equal{flag}"
        )
    return f"; model.rope_scaling changes from {before} to {after}"


def check_fits(run: RunConfig, source: Path, tokenizer: Path | None) -> None:
    """ValueError if a checkpoint has another shape or tokenizer than the run.

    The fields of PHASES_DIFFER may differ.
    """
    saved = read_config(source)
    if isinstance(saved, GPTConfig) != isinstance(run.model, GPTConfig):
        command = "train_gpt.py" if isinstance(saved, GPTConfig) else "train.py"
        raise ValueError(
            f"{source} holds another kind of model, which {command} trains; "
            "continue it with that command"
        )
    for name, value in vars(run.model).items():
        if name not in PHASES_DIFFER and (before := fixed(saved, name)) != fixed(run.model, name):
            raise ValueError(
                f"{source} has model.{name}={before}, but the config has {value}; "
                "make them equal, or choose another output_dir"
            )
    check_tokenizer(source, tokenizer)


def check_function(run: RunConfig, base: Path) -> None:
    """ValueError if a setting that weight shapes do not show differs from `base`."""
    saved = read_config(base)
    settings = {
        f"model.{name}": (value, getattr(run.model, name))
        for name, value in vars(saved).items()
        if name not in (*PHASES_DIFFER, *MAY_DIFFER) and hasattr(run.model, name)
    }
    if saved.kind == "moe":
        settings["model.moe.top_k"] = saved.moe.top_k, run.model.moe.top_k
    for key, (before, value) in settings.items():
        if before != value:
            raise ValueError(
                f"{base} was trained with {key}={before}, but the config has {value}; set {key}="
                f"{before}"
            )


def check_tokenizer(source: Path, tokenizer: Path | None) -> None:
    """ValueError if a model folder and the data have different tokenizers."""
    path = source / "tokenizer.json"
    if not tokenizer or not path.is_file():
        return
    if not same_tokenizer(path, tokenizer / "tokenizer.json"):
        raise ValueError(
            f"{source} was trained with another tokenizer than {tokenizer}; use data tokenized "
            "with its tokenizer (tokenizer.folder in the recipe), or start from another checkpoint"
        )
