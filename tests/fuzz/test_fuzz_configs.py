"""Configs of training, SFT, DPO, plans, data recipes and suites: YAML text and overrides."""

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT
from hypothesis import strategies as st

from data.pipeline.recipe import Recipe
from evals.cost import command_tokens
from evals.suite_config import Suite
from fuzz.mutate import (
    EXTREMES,
    LEAVES,
    byte_changes,
    change_bytes,
    change_json,
    dump,
    json_changes,
    paths_of,
)
from fuzz.sandbox import fuzz
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.config import RunConfig, to_dict
from training.planning.cost import forecast, readable_tokens
from training.planning.forecast_text import forecast_text
from training.planning.memory import memory
from training.planning.plan import Plan
from training.schedulers import WSDScheduler
from training.settings import load_settings

CONFIGS: dict[str, type] = {
    "configs/test_mode.yaml": RunConfig,
    "configs/phase1_pretrain.yaml": RunConfig,
    "configs/quickstart/sft.yaml": SFTConfig,
    "configs/sft.yaml": SFTConfig,
    "configs/quickstart/dpo.yaml": PreferenceRun,
    "configs/quickstart/plan.yaml": Plan,
    "configs/data/quickstart.yaml": Recipe,
    "configs/quickstart/suite.yaml": Suite,
}


@cache
def text_of(name: str) -> bytes:
    return (ROOT / name).read_bytes()


@cache
def content_of(name: str) -> Any:
    content = yaml.safe_load(text_of(name))
    if "extends" in content:
        content["extends"] = str(ROOT / Path(name).parent / content["extends"])
    return content


def fields_of(kind: Any, prefix: str = "") -> list[str]:
    """Return dotted names of all settings of a dataclass."""
    names = []
    for field in dataclasses.fields(kind):
        names.append(prefix + field.name)
        default = (
            field.default_factory if field.default_factory is not dataclasses.MISSING else None
        )
        if dataclasses.is_dataclass(default):
            names += fields_of(default, f"{prefix}{field.name}.")
    return names


@cache
def settings_of(name: str) -> list[str]:
    keys = {".".join(map(str, path)) for path in paths_of(content_of(name))}
    return sorted(keys | set(fields_of(CONFIGS[name])))


@cache
def changed(name: str) -> st.SearchStrategy[Any]:
    texts = [
        "yes",
        "1_0",
        "0x10",
        "{a: 1}",
        "[1",
        "&a [*a]",
        "=",
        "2026-01-01",
        *(dump(leaf)[:6000] for leaf in LEAVES),
    ]
    values = st.sampled_from(texts)
    numbers = (
        st.sampled_from(EXTREMES).map(dump) | st.integers(-3, 2**40).map(str) | st.floats().map(str)
    )
    override = st.tuples(st.sampled_from(settings_of(name)), numbers | values).map("=".join)
    words = tuple(setting.rpartition(".")[2] for setting in settings_of(name))
    return st.tuples(
        st.just(name),
        st.just([]) | st.just([]) | byte_changes(len(text_of(name))),
        json_changes(content_of(name), words, most=2),
        st.lists(override, max_size=2) | st.lists(override | st.text(max_size=8), max_size=1),
    )


@fuzz(st.sampled_from(sorted(CONFIGS)).flatmap(changed), share=0.27, accepted=(0.1, 0.7))
def test_configs(case: tuple[str, list, list, list[str]], folder: Path) -> None:
    name, of_text, of_content, overrides = case
    kind, path = CONFIGS[name], folder / "config.yaml"
    if of_text:
        content = change_bytes(text_of(name), of_text).replace(
            b"extends: ", b"extends: " + bytes(ROOT / "configs") + b"/"
        )
    else:
        content = dump(change_json(content_of(name), of_content)).encode()  # JSON is YAML
    path.write_bytes(content)
    config: Any = load_settings(kind, path, overrides)
    if isinstance(config, RunConfig):
        use_run(config, folder)
    elif isinstance(config, Plan):
        report = forecast(config, "h100", None, 0.45, None, readable_tokens, command_tokens)
        assert forecast_text(report)


def use_run(run: RunConfig, folder: Path) -> None:
    """Use a run as commands do before they need data: saved config, learning rates, memory."""
    saved_config = folder / "kept.yaml"
    saved_config.write_text(yaml.safe_dump(to_dict(run), sort_keys=False), encoding="utf-8")
    assert load_settings(type(run), saved_config) == run
    rate = WSDScheduler(run.schedule, run.optim.lr)
    assert all(
        math.isfinite(rate(step))
        for step in (0, run.schedule.warmup_steps, run.steps - 1, run.steps)
    )
    assert memory(run, 1).total > 0
