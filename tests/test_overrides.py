"""Overrides keep text as typed and one value per key; plan commands keep spaces in arguments."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import forked
import pytest
from conftest import ROOT

from data.pipeline.recipe import Recipe
from training.settings import load_settings, read_yaml


@dataclass(frozen=True)
class Part:
    path: str = ""
    note: str | None = "unset"
    size: int = 1
    rate: float | None = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    output_dir: str | None = None
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)


ODD = [
    *(
        "exp #2",
        "a: b",
        "2024",
        "1e5",
        "yes",
        "[x]",
        "{a: 1}",
        "~",
        "- a",
        "*.x",
        "&a",
        "a=b",
        " a ",
        "!x",
    ),
    "'q'",
    '"q"',
]


@pytest.mark.parametrize("text", [*ODD, "null"])
def test_text_is_taken_as_typed(text, tmp_path):
    (tmp_path / "c.yaml").write_text("{}")

    def read_one(*overrides: str, **flags: object) -> Whole:
        return load_settings(
            Whole, tmp_path / "c.yaml", list(overrides), {"output_dir": None, **flags}
        )

    assert read_one(output_dir=text).output_dir == text
    assert load_settings(
        Whole, tmp_path / "c.yaml", [], {"part.note": text, "part.path": text}
    ).part == Part(text, text)
    config = read_one(f"part.path={text}", f"parts.x.path={text}", f"rules.a={text}")
    assert (config.part.path, config.parts["x"].path, config.rules["a"]) == (text, text, text)
    assert read_one(f"part.note={text}").part.note == (None if text == "null" else text)


def test_other_settings_are_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    config = load_settings(
        Whole,
        tmp_path / "c.yaml",
        ["part={size: 3, names: [a, b]}", "part.rate=null"],
        {"part.size": 4},
    )
    assert config.part == Part(size=4, rate=None, names=("a", "b"))
    assert load_settings(Whole, tmp_path / "c.yaml", [], {"part.rate": "null"}).part.rate is None
    with pytest.raises(ValueError, match="did you mean 'path'"):
        load_settings(Whole, tmp_path / "c.yaml", ["part.pth=x"])
    with pytest.raises(ValueError, match=r"the value of 'part.size=\[' is not YAML"):
        load_settings(Whole, tmp_path / "c.yaml", ["part.size=["])


def test_the_command_writes_where_it_was_told(settings, tmp_path):
    out = tmp_path / "exp #2: [x]"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs" / "test_mode.yaml"),
    ]
    more = ["--output_dir", str(out), f"log_dir={tmp_path / 'logs #1'}"]
    overrides = [
        text for text in settings(steps=2) if not text.startswith(("output_dir", "log_dir"))
    ]
    done = forked.run([*command, *more, *overrides], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "step_2" / "config.json").is_file() and (
        tmp_path / "logs #1" / "metrics.jsonl"
    ).is_file()


def test_the_words_of_a_plan_keep_their_spaces():
    from types import SimpleNamespace

    from training.planning.pipeline import Pipeline

    driver = Pipeline.__new__(Pipeline)
    driver.scheduled_phases = [SimpleNamespace(run=SimpleNamespace(run="my run"))]
    command = (
        "python -m x --checkpoint {checkpoint} --out 'a b/{run}.json' --set {{outtype}} "
        "--into {output}/{run}"
    )
    path, output = Path("/a dir/it's #1"), '$HOME/*/"q"'
    assert driver._fill(command, checkpoint=path, output=output) == [
        *("python", "-m", "x", "--checkpoint", str(path), "--out", "a b/my run.json"),
        *("--set", "{outtype}", "--into", f"{output}/my run"),
    ]
    assert shlex.split(shlex.join(driver._fill(command, checkpoint=path, output=output)))[4] == str(
        path
    )


def test_a_yaml_file_with_two_equal_keys_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("store: s\nsources:\n  c4: {}\n  c4: {min_chars: 5}\n")
    with pytest.raises(
        ValueError, match=r"r\.yaml is not YAML: it has the key 'c4' twice \(line 4\); remove one"
    ):
        read_yaml(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("store: s\nsources: {c4: {}}\n")
    with pytest.raises(ValueError, match=r"it has the key 'a' twice"):
        load_settings(Recipe, tmp_path / "r.yaml", ["sources={a: {}, a: {}}"])
    (tmp_path / "r.yaml").write_text("a: &x {b: 1}\nc: {<<: *x, b: 2}\n")
    assert read_yaml(tmp_path / "r.yaml") == {"a": {"b": 1}, "c": {"b": 2}}
    (tmp_path / "r.yaml").write_bytes("store: \u00fc".encode("utf-16"))
    with pytest.raises(ValueError, match=r"r\.yaml is not UTF-8 text"):
        read_yaml(tmp_path / "r.yaml")
