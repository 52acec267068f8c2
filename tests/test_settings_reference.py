"""The reference of settings: docs/settings.md is current, each setting is described."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import pytest
from conftest import ROOT, complaint_of

import train
import train_dpo
import train_gpt
import train_sft
from ranges import NonEmptyText, PositiveFloat, PositiveInt, at_least, one_of
from scripts import settings_reference
from training.settings import NoEffect, _setting_type
from training.settings_reference import help_text, page, sections

KINDS = settings_reference.kinds()


@dataclass(frozen=True)
class Inner:
    """An inner section. It has
    two lines.

    This paragraph is not in the reference.
    """

    rate: PositiveFloat = 1e-8  # of change


@dataclass(frozen=True)
class Entry:
    """One entry."""

    path: NonEmptyText  # a file | folder of <run>


@dataclass(frozen=True)
class Base:
    """A config."""

    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {"unused": NoEffect("has no effect")}

    # Above,
    # in two lines.
    count: PositiveInt | None = None
    unused: int = 0  # refused
    mode: Annotated[str, one_of("a", "b")] = "a"  # a: the default
    pairs: tuple[tuple[Annotated[float, at_least(0, below=1)], ...], ...] = (
        (0.5,),
    )  # after several lines
    weights: dict[str, PositiveFloat] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)  # not for readers


@dataclass(frozen=True)
class Derived(Base):
    """A config with more."""

    mode: Annotated[str, one_of("a", "b")] = "b"
    # Entries by name.
    entries: dict[str, Entry] = field(default_factory=dict)
    maybe: Inner | None = None  # default: none
    on: bool | None = None  # type: ignore[assignment]


def settings_of(kind: type) -> dict[str, tuple[str, ...]]:
    return {setting.name: setting[1:] for part in sections(kind) for setting in part.settings}


def test_comments_types_defaults_and_ranges_are_read():
    assert settings_of(Derived) == {
        "count": ("whole number or null", "null", "at least 1", "Above, in two lines."),
        "mode": ("text", '"b"', "a, b", "a: the default"),  # the comment of the base class
        "pairs": (
            "list of lists of numbers",
            "[[0.5]]",
            "at least 0 and below 1",
            "after several lines",
        ),
        "weights": ("map of names to numbers", "{}", "above 0", ""),
        "on": ("true, false or null", "null", "", ""),
        "inner.rate": ("number", "1e-08", "above 0", "of change"),
        "entries.NAME.path": ("text", "required", "not empty", "a file | folder of <run>"),
        "maybe.rate": ("number", "1e-08", "above 0", "of change"),
    }
    meanings = {part.name: part.meaning for part in sections(Derived)}
    assert meanings["inner"] == "An inner section. It has two lines."
    assert meanings["entries.NAME"] == "Entries by name. One entry."
    assert meanings["maybe"] == "Default: none. An inner section. It has two lines."


def test_a_page_shows_only_the_differences_of_other_commands():
    text = page({"one.py": Base, "two.py": Derived})
    one, two = text.split("## two.py")
    assert "| `count` | whole number or null | `null` | at least 1 | Above, in two lines. |" in one
    assert "`unused`" not in text and "`inner.rate`" in one and "`inner.rate`" not in two
    assert '| `mode` | text | `"b"` | a, b | a: the default. |' in two and "`count`" not in two
    assert "| required | not empty | A file \\| folder of \\<run>. |" in two
    other = page({"two.py": Derived, "one.py": Base}).split("## one.py")[1]
    assert "Not settings of this command: `entries.NAME.path`, `maybe.rate`, `on`." in other


@pytest.mark.parametrize("command", KINDS)
def test_every_setting_exists_and_is_described(command):
    kind, described = KINDS[command], settings_of(KINDS[command])
    assert len(described) > 60
    unclear = {name for name, setting in described.items() if len(setting[-1].split()) < 2}
    assert unclear == set(), "give these fields a comment"
    assert {name for name in described if _setting_type(kind, name) is None} == set()
    fields = {f.name for f in dataclasses.fields(kind)} - getattr(kind, "NO_EFFECT", {}).keys()
    assert {name.split(".")[0] for name in described} == fields


def test_the_page_is_current():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == page(KINDS), "run python -m scripts.settings_reference"


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path / "new" / "settings.md")])
    settings_reference.main()
    assert (tmp_path / "new" / "settings.md").read_text(encoding="utf-8") == page(KINDS)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'new' / 'settings.md'}\n"


# --help_settings


def shown(module, words: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert not exit_info.value.code
    return capsys.readouterr().out


def test_help_shows_a_section_a_setting_or_all(capsys, monkeypatch):
    text = shown(train, ["--help-settings", "optim"], capsys, monkeypatch)
    assert text.startswith("optim: The optimizer's settings.\n  optim.name = ")
    assert "  optim.lr = 0.001    (number: above 0)\n      Learning rate" in text
    assert "optim.groups.NAME.lr" in text and "schedule" not in text.replace("the schedule", "")
    assert max(map(len, text.splitlines())) <= 100
    one = shown(train, ["--help_settings=optim.lr", "steps=3"], capsys, monkeypatch)
    assert one.splitlines()[1].startswith("  optim.lr") and len(one.splitlines()) == 3
    assert shown(train, ["--help_settings", "learning-rate"], capsys, monkeypatch) == one
    everything = shown(train, ["steps=3", "--help_settings"], capsys, monkeypatch)
    assert (
        everything.startswith("Settings outside of sections\n  run = ")
        and text.strip() in everything
    )
    assert "chat.sources.NAME.path = required" in shown(
        train_sft, ["--help_settings", "chat.sources"], capsys, monkeypatch
    )
    assert "data.pairs_per_step" in shown(
        train_dpo, ["--help_settings", "data"], capsys, monkeypatch
    )
    assert "target_loss" in shown(train_gpt, ["--help_settings"], capsys, monkeypatch)
    assert "model." not in help_text(train_sft.SFTConfig, "data")


def test_a_wrong_section_is_answered_with_a_near_one(capsys, monkeypatch):
    message = complaint_of(train.main, ["--help_settings", "optm"], capsys, monkeypatch)
    assert message.startswith("error: no section or setting optm; did you mean optim? ")
    message = complaint_of(train.main, ["--help_settings", "zzzz"], capsys, monkeypatch)
    assert message.startswith("error: no section or setting zzzz; the sections are model, ")


@pytest.mark.parametrize(
    ("module", "words", "advice"),
    [
        (train, "--lr 1e-3", "--lr; write the setting optim.lr=VALUE; "),
        (train, "--optim.lr 1e-3", "--optim.lr; write the setting optim.lr=VALUE; "),
        (train, "--optim.lrr 1e-3", "--optim.lrr; write the setting optim.lr=VALUE; "),
        (train, "--seed=3", "--seed; write the setting seed=VALUE; "),
        (
            train,
            "--per-device-train-batch-size 4",
            "--per-device-train-batch-size; write the setting data.micro_batch_size=VALUE (rows); ",
        ),
        (train, "--model x", "--model; model is a section; --help_settings model lists its "),
        (train, "--stepz 4", "--stepz; did you mean --steps? "),
        (train, "--wandb x", "--wandb; did you mean --wandb_project? "),
        (train_sft, "--neftune_alpha 5", "--neftune_alpha; write the setting chat.neftune_alpha="),
    ],
)
def test_a_setting_given_as_a_flag_is_answered(module, words, advice, capsys, monkeypatch):
    message = complaint_of(module.main, words.split(), capsys, monkeypatch)
    assert message.startswith(f"error: unknown flag {advice}")


def test_the_former_flags_of_training_set_the_same(capsys, monkeypatch):
    for words in (["--num_steps", "0"], ["--num-steps=0"], ["--steps", "0"]):
        for module in (train, train_sft, train_dpo, train_gpt):
            message = complaint_of(module.main, words, capsys, monkeypatch)
            assert message.startswith("error: steps=0 must be at least 1"), module
    message = complaint_of(train_sft.main, ["--init-from", "nowhere"], capsys, monkeypatch)
    assert "nowhere" in message

    def load(config, overrides, flags):
        raise ValueError(f"{config}, {overrides}, {flags['init_from']}")

    monkeypatch.setattr(train, "load", load)
    words = ["--config", "c", "--base-model", "m", "seed=1"]
    message = complaint_of(train.main, words, capsys, monkeypatch)
    assert message == "error: c, ['seed=1'], m\n"
