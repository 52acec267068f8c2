"""Ranges of settings: every numeric config field has one; other values give a one-line error."""

import argparse
import ast
import dataclasses
import json
import math
import shutil
import typing
from typing import Annotated

import pytest
import torch
import yaml
from conftest import ROOT

from cli import PORT, int_at_least, within
from data.manifest import read_json
from data.pipeline.recipe import Recipe
from evals.engines import check_checkpoint
from evals.report.targets import read_targets
from evals.suite_config import Suite
from lab.experiment import Experiment
from models.hf import load_hf, read_hf_config, save_hf, weight_files
from models.nanollama import ModelConfig, NanoLlama
from ranges import NonEmpty, Range, above, check, check_fields, hints, shown
from train_dpo import PreferenceRun
from train_sft import SFTConfig
from training.config import RunConfig
from training.planning.gates import Gate
from training.planning.plan import Plan
from training.settings import load_settings, read_yaml
from yaml_file import MAX_BYTES, parse_yaml

COMMANDS = (RunConfig, SFTConfig, PreferenceRun, Plan, Recipe, Suite, Experiment)
OUTSIDE = (math.nan, math.inf, -math.inf, 2**63, -(2**63), 10**400)
HUGE = "9" * 5000


def inner_types(hint):
    """Return the types inside a type, without ranges and containers."""
    if typing.get_origin(hint) is Annotated or not typing.get_args(hint):
        return [hint]
    return [inner for part in typing.get_args(hint) for inner in inner_types(part)]


def configs() -> list[type]:
    """Return every dataclass that a config file is read into."""
    classes: list[type] = []
    queue: list = list(COMMANDS)
    while queue:
        kind = queue.pop()
        if dataclasses.is_dataclass(kind) and kind not in classes:
            classes.append(kind)
            queue += [
                inner
                for field in dataclasses.fields(kind)
                for inner in inner_types(hints(kind)[field.name])
            ]
    return classes


def numbers():
    """Yield (dataclass, field, type, range or None) of each config number, also in containers."""
    for kind in configs():
        for field in dataclasses.fields(kind):
            for inner in inner_types(hints(kind)[field.name]):
                base = typing.get_args(inner)[0] if typing.get_origin(inner) is Annotated else inner
                if base in (int, float):
                    ranges = [
                        rule
                        for rule in getattr(inner, "__metadata__", ())
                        if isinstance(rule, Range)
                    ]
                    yield kind, field.name, base, ranges[0] if ranges else None


NUMBERS = list(numbers())
ENDS = [(kind, name, base, allowed) for kind, name, base, allowed in NUMBERS if allowed]


def test_every_number_of_every_config_declares_a_range():
    assert {kind.__name__ for kind in configs()} >= {
        *(
            "ModelConfig",
            "OptimConfig",
            "ScheduleConfig",
            "FaultConfig",
            "ParallelConfig",
            "CheckpointConfig",
        ),
        *(
            "StartupConfig",
            "LogConfig",
            "AlertConfig",
            "EmailConfig",
            "DPOConfig",
            "ChatConfig",
            "ChatSource",
        ),
        *(
            "PairSource",
            "Gate",
            "Target",
            "Milestone",
            "CleanConfig",
            "DedupConfig",
            "ExecutorConfig",
            "TokenizerConfig",
        ),
    }
    assert len(NUMBERS) > 80
    assert [
        f"{kind.__name__}.{name}" for kind, name, _, allowed in NUMBERS if allowed is None
    ] == []


def test_a_field_without_a_range_would_be_found(monkeypatch):
    @dataclasses.dataclass
    class Wrong:
        size: int = 3
        parts: dict[str, float] = dataclasses.field(default_factory=dict)

    monkeypatch.setattr("test_ranges.COMMANDS", (Wrong,))
    assert [(name, allowed) for _, name, _, allowed in numbers()] == [
        ("size", None),
        ("parts", None),
    ]


@pytest.mark.parametrize(
    ("kind", "name", "base", "allowed"),
    ENDS,
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_both_ends_of_every_range(kind, name, base, allowed):
    hint = Annotated[base, allowed]
    for end, is_open, outward in (
        (allowed.minimum, allowed.open_minimum, -1),
        (allowed.maximum, allowed.open_maximum, 1),
    ):
        if math.isfinite(end):
            step = 1 if base is int else max(abs(end), 1) * 1e-9
            inside = end - outward * step if is_open else end
            beyond = end if is_open else end + outward * step
            check(base(inside), hint, name)
            with pytest.raises(ValueError, match=rf"{name}=.* must "):
                check(base(beyond), hint, name)
    for value in OUTSIDE if base is float else OUTSIDE[3:]:
        with pytest.raises(ValueError, match=rf"{name}=.* must (be|not be) "):
            check(value, hint, name)
    for value in (True, "1", None, [1], 1.5 if base is int else "x"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a (whole|finite) number"):
            check(value, hint, name)


def made(kind: type, **values):
    """Create a config dataclass with placeholders for required fields."""
    required = {
        field.name: {
            "mvp": 1.0,
            "success": 2.0,
            "stretch": 3.0,
            "go": 1.0,
            "no_go": 2.0,
            "at": 1,
            "step": 1,
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 1,
            "share": 0.5,
        }.get(field.name, "x")
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return kind(**required | values)


@pytest.mark.parametrize(
    ("kind", "name", "base", "allowed"),
    ENDS,
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_code_that_makes_a_config_meets_the_range_too(kind, name, base, allowed):
    hint = hints(kind)[name]
    outer = typing.get_origin(hint)
    value = math.nan if base is float else -(2**63)
    argument = {"x": value} if outer is dict else (value,) if outer is tuple else value
    with pytest.raises(ValueError, match=rf"{name}\S*=\S+ must "):
        made(kind, **{name: argument})


def test_ranges_say_what_they_allow():
    messages = [
        *(
            str(Range(0)),
            str(Range(0, open_minimum=True)),
            str(Range(1, 3)),
            str(Range(0, 1, open_maximum=True)),
            str(Range()),
        ),
        str(Range(0, 2**63, open_maximum=True)),
    ]
    assert messages == [
        *("must not be negative", "must be above 0", "must be at least 1 and at most 3"),
        *(
            "must be at least 0 and below 1",
            "must be a finite number",
            "must be at least 0 and below 2**63",
        ),
    ]
    assert " " not in NonEmpty() and "a" in NonEmpty()
    assert len(shown("x" * 9999)) < 100 and "too large" in shown(10**5000)
    with pytest.raises(ValueError, match=r"model\.vocab_size=0 must be at least 1"):
        ModelConfig(vocab_size=0)


MODEL = [
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings", "rms_norm_eps"),
]


@pytest.mark.parametrize(
    ("kind", "file", "override", "message"),
    [
        *(
            (RunConfig, "base_1b", f"model.{name}={value}", f"model.{name}=.* must")
            for name in MODEL
            for value in (0, -1, ".nan")
        ),
        *(
            (RunConfig, "base_1b", f"rope_theta={value}", "rope_theta.*=.* must")
            for value in (0, -1, ".inf", "[1, 0]", "[.nan, 1]")
        ),
        (RunConfig, "base_1b", "until=-1", "until=-1 must be at least 1"),
        (RunConfig, "base_1b", f"steps={HUGE}", "holds a value that YAML cannot read"),
        (RunConfig, "base_1b", f"steps='{HUGE}'", "steps='999.* must be a whole number"),
        (
            RunConfig,
            "base_1b",
            f"steps=0x{HUGE}",
            "steps=a value that is too large to show must be a whole number",
        ),
        (RunConfig, "base_1b", f"steps={'9' * 400}", "steps=999.* must be a whole number"),
        (RunConfig, "base_1b", f"steps={2**63}", r"steps=\d+ must be below 2\*\*63"),
        (RunConfig, "base_1b", "optim.lr=1e999", "optim.lr='1e999' must be a finite number"),
        (RunConfig, "base_1b", "optim.eps=-1e-8", "optim.eps=-1e-08 must be above 0"),
        (RunConfig, "base_1b", "data.mix={a: .inf}", "data.mix.a=inf must be a finite number"),
        (RunConfig, "base_1b", "data.mix={a: -1}", "data.mix.a=-1 must be above 0"),
        (RunConfig, "base_1b", "data.mix={a: 0, b: 0}", "data.mix.a=0 must be above 0"),
        (
            RunConfig,
            "base_1b",
            "data.mix={no: 1}",
            "data.mix has the entry False.* put it in quotes",
        ),
        (RunConfig, "base_1b", "data.mix=[a]", r"data.mix=\['a'\] must be settings"),
        (RunConfig, "base_1b", "data.store=", "data.store='' must not be empty"),
        (RunConfig, "base_1b", "data.store=a\0b", "has a NUL character"),
        (RunConfig, "base_1b", "data.store=a\ud800", "is not UTF-8 text"),
        (
            RunConfig,
            "base_1b",
            "checkpoint.milestones=[0]",
            r"checkpoint.milestones\[0\]=0 must be at least 1",
        ),
        (RunConfig, "base_1b", "checkpoint.milestones=3", "checkpoint.milestones=3 must be a list"),
        (RunConfig, "base_1b", "steps=2024-13-45", "holds a value that YAML cannot read .month"),
        (RunConfig, "base_1b", "steps=[1]", r"steps=\[1\] must be a whole number"),
        (RunConfig, "base_1b", "parallel.fp8=1", "parallel.fp8=1 must be true or false"),
        (
            RunConfig,
            "base_1b",
            "parallel.timeout_s=1e300",
            "parallel.timeout_s=1e[+]300 must be above 0 and at most",
        ),
        (SFTConfig, "sft", "chat.max_bad=1", "chat.max_bad=1 must be at least 0 and below 1"),
        (
            PreferenceRun,
            "dpo",
            "dpo.label_smoothing=0.5",
            "dpo.label_smoothing=0.5 must be at least 0 and below 0.5",
        ),
        (
            PreferenceRun,
            "dpo",
            "data.pairs_per_step=-2",
            "data.pairs_per_step=-2 must be at least 1",
        ),
        (Recipe, "data/nanollama_1b", "dedup.buckets=0", "dedup.buckets=0 must be at least 1"),
        (
            Recipe,
            "data/nanollama_1b",
            "val_fraction=1",
            "val_fraction=1 must be at least 0 and below 1",
        ),
        (
            Recipe,
            "data/nanollama_1b",
            "tokenizer.vocab_size=0",
            "tokenizer.vocab_size=0 must be at least 1",
        ),
    ],
    ids=lambda value: (
        str(value)[:40].replace("\0", "0").encode("ascii", "replace").decode()
        if isinstance(value, str)
        else None
    ),
)
def test_wrong_values_end_in_one_sentence(kind, file, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(kind, ROOT / "configs" / f"{file}.yaml", [override])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_large_integers_in_quotes_are_exact():
    value = 2**53 + 1
    assert (
        load_settings(RunConfig, ROOT / "configs/base_1b.yaml", [f"seed='{value}'"]).seed == value
    )


PLAN = {"name": "p", "evals": {"e": "true"}, "phases": [{"config": "c.yaml"}]}
GATE = {"metric": "m", "go": 1, "no_go": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"restarts": -1}, "restarts=-1 must not be negative"),
        ({"phases": []}, "phases is empty"),
        ({"phases": [{"config": ""}]}, r"phases\[0\].config='' must not be empty"),
        ({"phases": [3]}, r"phases\[0\]=3 must hold settings"),
        ({"phases": {"config": "c"}}, "phases=.* must be a list"),
        (
            {"phases": [{"config": "c", "milestones": [{"step": 0}]}]},
            r"milestones\[0\].step=0 must be at least 1",
        ),
        (
            {
                "phases": [
                    {
                        "config": "c",
                        "milestones": [{"step": 1, "gates": [{**GATE, "go": math.nan}]}],
                    }
                ]
            },
            "go=nan must be a finite",
        ),
        (
            {
                "phases": [
                    {
                        "config": "c",
                        "milestones": [{"step": 1, "gates": [{**GATE, "no_go": math.inf}]}],
                    }
                ]
            },
            "no_go=inf must be",
        ),
        (
            {
                "targets": [
                    {"metric": "m", "title": "t", "mvp": 1, "success": math.nan, "stretch": 3}
                ]
            },
            "success=nan must be",
        ),
        ({"evals": {"e": ["a"]}}, r"evals.e=\['a'\] must be text"),
        ({"name": " "}, "name=' ' must not be empty"),
    ],
)
def test_wrong_plans_end_in_one_sentence(tmp_path, change, message):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**PLAN, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_settings(Plan, tmp_path / "p.yaml")
    with pytest.raises(ValueError, match="must be a finite number"):
        Gate("m", math.nan, 1.0)


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
MERGES = "\n".join(
    ["m0: &m0 {k: 1, l: 2}"]
    + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 20)}]}}" for i in range(1, 9)]
)
DOCUMENTS = {
    "alias bomb": (BOMB, "with its aliases expanded"),
    "merge bomb": (MERGES, "merges give more than"),
    "cycle": ("a: &a [*a]", "refers to itself"),
    "cycle of mappings": ("a: &a {b: *a}", "refers to itself"),
    "nesting": ("a: " + "[" * 60 + "]" * 60, "nested more than"),
    "deep nesting": ("a: " + "[" * 5000 + "]" * 5000, "nested more than"),
    "list": ("- 1\n- 2\n", "must hold settings, as key: value; it holds"),
    "empty list": ("[]", "must hold settings"),
    "scalar": ("false", "must hold settings"),
    "tab": ("a:\n\tb: 1\n", "is not YAML"),
    "two keys": ("steps: 1\nsteps: 2\n", "has the key 'steps' twice"),
    "huge integer": (f"steps: {HUGE}", "cannot read"),
    "tag": ("steps: !!python/object/apply:os.system [true]", "is not YAML"),
    "empty integer": ("steps: !!int ''", "cannot read"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "extends a list": ("extends: [a, b]", "must be the path of one config"),
    "NUL": ("a: \0", "is not YAML"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_damaged_and_hostile_yaml_ends_in_one_sentence(tmp_path, name):
    text, message = DOCUMENTS[name]
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (read_yaml, lambda file: load_settings(RunConfig, file)):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_yaml_of_other_encodings_sizes_and_kinds(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("steps: 3 # é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.yaml is not UTF-8 text"):
        read_yaml(path)
    path.write_bytes("﻿steps: 3\n".encode())
    assert read_yaml(path) == {"steps": 3}
    path.write_text("a: " + "x" * MAX_BYTES, encoding="utf-8")
    with pytest.raises(ValueError, match="a config has at most"):
        read_yaml(path)
    for i in range(120):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n", encoding="utf-8")
    with pytest.raises(ValueError, match="extends more than 100 configs"):
        read_yaml(tmp_path / "0.yaml")
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: 2}") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"d": 1, "e": 2},
    }
    path.write_text("log_dir: ''\n", encoding="utf-8")
    assert load_settings(RunConfig, path).log_dir is None  # as an empty override


@pytest.mark.parametrize(
    "text",
    [
        *(
            "- 1",
            "targets: 3",
            "targets: [3]",
            "targets: [{metric: m}]",
            BOMB,
            f"a: {HUGE}",
            "a: [",
            "a: \0",
        ),
        *(
            f"targets: [{{metric: m, title: t, mvp: {value}, success: 2, stretch: 3}}]"
            for value in ("x", ".nan", "[1]", "true")
        ),
        "targets: [{metric: [m], title: t, mvp: 1, success: 2, stretch: 3}]",
    ],
    ids=range(13),
)
def test_the_report_reads_targets_of_a_wrong_plan_in_one_sentence(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.yaml"):
        read_targets(tmp_path / "plan.yaml")


TINY = ModelConfig(64, 32, 64, 1, 2, 2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_hf(path, TINY, NanoLlama(TINY, seed=0).state_dict(), torch.float32)
    return path


WRONG = (0, -1, 1.5, "64", True, [64], {"a": 1}, 10**30)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
)
def test_wrong_sizes_in_config_json_name_the_file_and_the_key(folder, tmp_path, key):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for value in WRONG:
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"config\.json.*{key}"):
            read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta=0 must be above 0"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "rope_theta=nan must be a finite number"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
        ({"rope_parameters": []}, None),
        ({"rope_parameters": [1]}, "must be objects"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "must be a multiple of"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"dtype": ["float32"]}, None),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)
def test_wrong_values_in_config_json(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    if message:
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            read_hf_config(tmp_path)
    else:
        read_hf_config(tmp_path)
        shutil.copy(folder / "model.safetensors", tmp_path)
        if "dtype" in change:
            with pytest.raises(ValueError, match="dtype"):
                load_hf(tmp_path, dtype=None)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '[["vocab_size", 3]]',
        "3",
        "null",
        "{",
        "[" * 100_000,
        f'{{"a": {HUGE}}}',
        "é".encode("latin-1"),
    ],
)
def test_json_files_that_hold_no_object(tmp_path, text):
    content = text if isinstance(text, bytes) else text.encode()
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(content)
    for read in (read_hf_config, weight_files, lambda path: read_json(path / "config.json")):
        with pytest.raises(
            ValueError, match=r"json is damaged: it must be a JSON object"
        ) as caught:
            read(tmp_path)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../b"}},
        {"weight_map": {"a": ["b"]}},
    ],
)
def test_wrong_weight_maps(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json is damaged: its weight_map"):
        weight_files(tmp_path)


def test_an_adapter_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter, not a model; merge it into its base"):
        read_hf_config(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter, not a model; merge it into its base"):
        check_checkpoint(tmp_path)


def test_check_fields_reaches_lists_and_mappings():
    @dataclasses.dataclass
    class Several:
        mix: dict[str, Annotated[float, Range(0)]]
        steps: tuple[Annotated[int, Range(1)], ...]
        rate: Annotated[float, Range(0)] | None = None

    check_fields(Several({"a": 1.0}, (1, 2)))
    for wrong, message in (
        (Several({"a": -1.0}, ()), "mix.a=-1 must not be negative"),
        (Several({}, (3, 0)), r"steps\[1\]=0 must be at least 1"),
        (Several({}, (), math.inf), "part.rate=inf must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fields(wrong, "part")


CHECKED_LATER = {  # flags of a plain number: (file or None for any, flag) -> its check
    **{
        (None, flag): "the config's range"
        for flag in ("--steps", "--num_steps", "--batch_size", "--learning_rate", "--beta")
    },
    **{
        ("scripts/chat.py", flag): "Sampling"
        for flag in ("--temperature", "--top_k", "--top_p", "--min_p")
    },
    ("scripts/chat.py", "--repetition_penalty"): "Sampling",
    **{
        ("scripts/chat.py", flag): "the command, in a sentence"
        for flag in ("--context", "--max_new_tokens", "--serve")
    },
    (None, "--seed"): "any integer will do",
}
WITH_CONFIG = ("train.py", "training/fine_tuning.py", "train_dpo.py", "train_gpt.py")


def plain_numbers(path: str) -> list[str]:
    """Return flags of a file that accept any int or float."""
    flags = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            types = [
                ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "type"
            ]
            flags += [ast.literal_eval(node.args[0])] * bool({"int", "float"} & set(types))
    return flags


def test_every_flag_of_a_number_has_a_range():
    paths = [
        *WITH_CONFIG,
        "demo_ui.py",
        *(
            f"{part}/{path.name}"
            for part in ("scripts", "evals")
            for path in (ROOT / part).glob("*.py")
        ),
    ]
    unchecked = [
        f"{path} {flag}"
        for path in paths
        for flag in plain_numbers(path)
        if (path, flag) not in CHECKED_LATER
        and not ((None, flag) in CHECKED_LATER and (path in WITH_CONFIG or flag == "--seed"))
    ]
    assert unchecked == []
    assert "--steps" in plain_numbers("train.py")


@pytest.mark.parametrize(
    ("read", "right", "wrong"),
    [
        (int_at_least(1), "1", ("0", "-1", str(2**63), "1.5", "x", HUGE, "nan")),
        (within(float, above(0, maximum=1)), "1", ("0", "-1", "1.01", "nan", "inf", "1e999", "x")),
        (within(float, Range(0)), "0", ("-1e-9", "nan", "inf")),
        (PORT, "65535", ("65536", "-1", "1.5")),
    ],
    ids=range(4),
)
def test_flags_of_numbers(read, right, wrong, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=read)
    assert parser.parse_args(["--number", right]).number == float(right)
    for text in wrong:
        with pytest.raises(SystemExit) as exit_info:
            parser.parse_args([f"--number={text}"])
        assert exit_info.value.code == 2 and "argument --number: " in capsys.readouterr().err
