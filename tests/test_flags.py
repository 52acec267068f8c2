"""Flags of all commands: spellings, near misses, one meaning per name; examples of --help."""

import ast
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import test_house
from conftest import ROOT
from test_plan_commands import command_lines, parse

from cli import SPELLINGS, CommandParser, flag_value, plain, spellings
from evals.cost import command_tokens
from evals.report.deliverables import PlanOutputs
from training.checkpoint import CheckpointConfig
from training.config import load
from training.planning.plan import load_plan, scheduled_phases
from training.planning.stages import stage_settings
from training.settings import read_yaml

COMMANDS = [
    path
    for folder in ("", "scripts", "evals", "evals/report", "benchmarks", "data")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    and path.name not in ("__main__.py", "faulty_train.py")  # of evals.report; part of faults.py
]
# Flags that are another spelling of some flag, but a flag of their own in these commands.
OWN = {
    "--base_model": {"train_sft.py", "train_dpo.py", "preview.py", "push_to_hub.py"},
    "--init_from": {"train.py"},
    "--max_tokens": {"download_data.py", "new_recipe.py"},  # a limit of text, not of generation
    "--model": {"verify_checkpoint.py"},
    "--experiment_name": {"live_plot.py"},
}
WRITTEN = ("--output", "--output_dir")
NAMES = ("--name", "--output_dir")  # flags whose value an example may invent
STEP = re.compile(r"quickstart/(\w+)/step_(\d+)")
FOLDERS = re.compile(r"(checkpoints|logs|results|gguf|runs|data)/")
TEXTS = [  # without history, the table of spellings, and the user's timeline
    *(path for path in test_house.FILES if path != ROOT / "cli.py"),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "run.sh")),
    *(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ("api", "log", "timeline")),
    *(path for name in ("scripts", "benchmarks") for path in (ROOT / name).rglob("*.s[hb]*")),
]
WORD = re.compile(
    r"""(?P<end>\n\s*\n|\(\n|`|"{3}|"\s*[,)\]}]|^\ *(?:-\ )?(?:"[^"\n]*"|[\w\ -]+):(?=\s))
    |\b(?P<command>(?:scripts|evals|benchmarks)\.\w+|[\w/]+\.py)\b
    |(?<![\w-])(?P<flag>--[A-Za-z][\w-]*)""",
    re.MULTILINE | re.VERBOSE,
)
ADDED = re.compile(r'\badd_\w+\(\s*(?:parser, )?"(--\w+)"')
IMPORTED = re.compile(r"^from ([\w.]+) import", re.MULTILINE)
OTHERS = {name for names in SPELLINGS.values() for name in names.split()}
OTHER = re.compile("|".join(OTHERS).replace("_", "[-_]"))


def make_parser(positional: str | None = "plan", overrides: bool = False) -> CommandParser:
    parser = CommandParser("About.")
    if positional:
        parser.add_argument(positional)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--output_dir")
    parser.add_argument("--checkpoint")
    parser.add_argument("--prompt", nargs="+")
    if overrides:
        parser.add_argument("overrides", nargs="*")
    return parser


def complaint(parser: CommandParser, words: str, capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(shlex.split(words))
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and err.endswith("--help lists the flags\n")
    return err


# spellings


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("p --max_new_tokens 3", "max_new_tokens", 3),
        ("p --max-new-tokens 3", "max_new_tokens", 3),
        ("p --max-new_tokens=3", "max_new_tokens", 3),
        ("--max_tokens 3 p", "max_new_tokens", 3),
        ("p --max-tokens=3", "max_new_tokens", 3),
        ("p --output x", "output_dir", "x"),
        ("p --model x", "checkpoint", "x"),
        ("p --output=a=b", "output_dir", "a=b"),
        ("p --prompt '--hello world' '--a=b c'", "prompt", ["--hello world", "--a=b c"]),
        ("--plan q --prompt a b", "plan", "q"),
        ("--prompt a b --plan=q", "plan", "q"),
        ("--output_dir x -- --plan", "plan", "--plan"),
    ],
)
def test_other_spellings_set_the_same_argument(words, name, value):
    assert getattr(make_parser().parse_args(shlex.split(words)), name) == value


def test_spellings_between_overrides():
    parser = make_parser("config", overrides=True)
    for words in ("c a=1 --max-tokens 3 b=2", "--config c a=1 --max_tokens=3 b=2"):
        args = parser.parse_intermixed_args(words.split())
        assert (args.config, args.overrides) == ("c", ["a=1", "b=2"])
        assert args.max_new_tokens == 3
    args = make_parser(None, overrides=True).parse_intermixed_args(["a=1", "--", "--b"])
    assert args.overrides == ["a=1", "--b"]


def test_a_flag_of_its_own_is_not_another_spelling():
    parser = make_parser()
    parser.add_argument("--max_tokens", type=float)
    parser.add_argument("--model", action="store_true")
    args = parser.parse_args(["p", "--max_tokens", "1e9", "--model", "--checkpoint", "x"])
    assert (args.max_tokens, args.max_new_tokens) == (1e9, None)
    assert args.model is True and args.checkpoint == "x"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("p --max_tokns 3", "unknown flag --max_tokns; did you mean --max_new_tokens? "),
        ("p --max-new-token=3", "unknown flag --max-new-token; did you mean --max_new_tokens? "),
        ("p --check x", "unknown flag --check; did you mean --checkpoint? "),  # no abbreviations
        ("p -checkpoint x", "unknown flag -checkpoint; did you mean --checkpoint? "),
        ("p --promt='Who are you'", "unknown flag --promt; did you mean --prompt? "),
        ("--paln p", "unknown flag --paln; did you mean --plan? "),
        ("p --nothing 1", "unknown flag --nothing; "),
        ("p --plan", "argument --plan: expected one argument; "),
        ("", "the following arguments are required: plan; "),
    ],
)
def test_a_near_miss_is_answered_with_the_flag(words, advice, capsys):
    assert complaint(make_parser(), words, capsys).startswith(f"error: {advice}")


def test_every_spelling_is_in_the_docs_and_has_one_meaning():
    rows = {}
    for row in re.findall(r"^\| `--.*\|$", (ROOT / "docs/api.md").read_text("utf-8"), re.M):
        flag, *others = re.findall(r"`(--\w+)`", row)
        rows[flag] = tuple(others)
    assert rows == {flag: spellings(flag)[1:] for flag in SPELLINGS}
    others = [name for names in SPELLINGS.values() for name in names.split()]
    assert len(others) == len(set(others))


# commands inside plans


def test_commands_of_a_plan_may_use_any_spelling():
    for command in ("x --output a", "x --output_dir a", "x --output-dir=a --b"):
        assert flag_value(command.split(), "--output_dir") == "a"
    assert flag_value(["x", "--output_dir"], "--output_dir") is None
    assert flag_value(["x", "--output", "a"], "--logs") is None
    plan = load_plan(ROOT / "configs/quickstart/plan.yaml")
    outputs = PlanOutputs(plan, Path("plan.yaml"), Path("c"), Path("f"), run="quickstart")
    gguf = "checkpoints/quickstart/gguf/nanollama-quickstart-{outtype}.gguf"
    assert outputs.flag("scripts.export_gguf", "--output", "") == gguf
    assert outputs.flag("evals.report", "--output_dir", "") == "results/quickstart"
    assert outputs.flag("evals.report", "--prompt", "none") == "none"


def test_the_forecast_reads_the_former_flag_of_an_evaluation():
    run = load(ROOT / "configs/quickstart/base.yaml")
    tokens = [
        command_tokens(f"python -m evals.eval_gsm8k --checkpoint x {flag} 7", run, 1)[1]
        for flag in ("--max_tokens", "--max-new-tokens", "--max_new_tokens")
    ]
    assert tokens[0] == tokens[1] == tokens[2] and tokens[0]["gsm8k"]


# commands in texts


def command_file(name: str) -> Path | None:
    """Return the file of a command given as train.py or scripts.chat; None for another name."""
    stem = name.removesuffix(".py").replace(".", "/")
    package = ROOT / stem / "__main__.py"
    if package.is_file():
        return package
    return path if (path := ROOT / f"{stem}.py") in COMMANDS else None


@cache
def added_flags(path: Path) -> set[str]:
    return set(ADDED.findall(path.read_text(encoding="utf-8")))


@cache
def declared(command: Path) -> list[set[str]]:
    """Return the flags that a command's file adds, then those of each module that it imports."""
    modules = IMPORTED.findall(command.read_text(encoding="utf-8"))
    paths = [command, *(ROOT / f"{name.replace('.', '/')}.py" for name in modules)]
    return [added_flags(path) for path in paths if path.is_file()]


@cache
def undeclared() -> set[str]:
    """Return the spellings that are not a flag of any command."""
    return OTHERS.difference(*map(added_flags, test_house.FILES))


def is_former(flag: str, command: Path | None) -> bool:
    """Does the command have this flag under another name? None: does no command have this flag?"""
    for flags in declared(command) if command else ():
        if any(flag in spellings(name) for name in flags):
            return flag not in flags
    return flag in undeclared()


def former_flags(text: str, command: Path | None = None) -> list[str]:
    """Return the flags in the commands of a text that are other spellings of the command's flags.

    command: the file of the command whose flags the text has outside of commands.
    """
    result, current = list[str](), command
    for match in WORD.finditer(text):
        if match["end"]:
            current = command
        elif match["command"]:
            current = command_file(match["command"]) or current
        elif is_former(f"--{plain(match['flag'])}", current):
            result.append(f"{current.stem if current else 'text'} {match['flag']}")
    return result


def test_commands_in_texts_use_the_flags_that_help_lists():
    result = {}
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        if not OTHER.search(text):  # saves the time of the rest
            continue
        if path.suffix not in (".py", ".yaml"):  # a line is a command
            text = text.replace("\\\n", " ").replace("\n", "\n\n")
        # Flags of a suite, and in advice, are those of evaluations.
        command = ROOT / "evals" / "run.py" if path.suffix == ".yaml" else None
        if flags := former_flags(text, command):
            result[str(path.relative_to(ROOT))] = flags
    assert len(TEXTS) > 400
    assert result == {}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("python -m scripts.download_data --max_tokens 9 --output x", "download_data --output"),
        ("python -m scripts.export_gguf --output x --output-file y", "export_gguf --output-file"),
        ("{launch} -m evals.eval_gsm8k --output x --max_tokens 9", "eval_gsm8k --max_tokens"),
        ("python -m evals.report\n  --output x", "__main__ --output"),
        ('"python data/fineweb.py "\nf"--output {x}"\n)\n"--output"', "fineweb --output"),
        ("torchrun train.py --base_model x `--base_model`", "train --base_model"),
        ("scripts.launch -m scripts.chat --model x\n\nlm_eval --model x", "chat --model"),
        ("a: train_gpt.py --name x\nb: scripts.live_plot --name x", "live_plot --name"),
        ("scripts.verify_checkpoint --model; train_sft.py --lr 1 --steps 2", "train_sft --lr"),
        ('raise ValueError("use another --outfile")', "text --outfile"),
    ],
)
def test_other_spellings_in_texts_are_found(text, flags):
    assert former_flags(text) == [flags]


# examples of --help


def examples(path: Path) -> list[str]:
    return command_lines(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def quickstart_folders() -> set[str]:
    """Folders that `make quickstart` writes, read from its plan."""
    plan = load_plan(ROOT / "configs/quickstart/plan.yaml")
    runs = [load(ROOT / phase.config) for phase in plan.phases]
    folders = {str(folder) for run in runs for folder in (run.checkpoints, run.logs)}
    folders |= {stage.output_dir for stage in plan.stages}
    for command in [*plan.before.values(), *plan.after.values()]:
        value = flag_value(shlex.split(command), "--output_dir") or flag_value(
            shlex.split(command), "--output"
        )
        if value:
            folders.add(value if not Path(value).suffix else str(Path(value).parent))
    return folders


def quickstart_steps() -> dict[str, set[int]]:
    """Return phase or stage of the quickstart -> steps of the checkpoints that it keeps."""
    plan = load_plan(ROOT / "configs/quickstart/plan.yaml")
    trained = {
        scheduled.run.phase: (scheduled.begin, scheduled.end, scheduled.run.checkpoint)
        for scheduled in scheduled_phases(plan)
    }
    for stage in plan.stages:
        [settings] = stage_settings(stage).values()
        checkpoint = CheckpointConfig(**settings["checkpoint"])
        trained[stage.name] = 0, settings["steps"], checkpoint
    result = {}
    for name, (begin, end, kept) in trained.items():
        saved = [
            step for step in range(begin + 1, end + 1) if step % kept.every == 0 or step == end
        ]
        result[name] = set(saved[-kept.keep :])
    return result


def missing_steps(text: str) -> list[str]:
    """Return step folders of the quickstart in a text that the quickstart does not keep."""
    kept = quickstart_steps()
    return [match[0] for match in STEP.finditer(text) if int(match[2]) not in kept[match[1]]]


def unexplained(text: str) -> list[str]:
    """Return my_run and my_model in a docstring's examples, if the text does not explain them.

    Other names with my_ are files that the reader writes, in a format that the docstring has.
    """
    names = set()
    for command in command_lines(text):
        words = shlex.split(command)
        inputs = [word for flag, word in pairwise(words) if flag not in NAMES]
        names |= {
            name for word in inputs for name in re.findall(r"\bmy_(?:\w+_)?(?:run|model)\b", word)
        }
    plain_text = " ".join(text.split())
    return sorted(
        name for name in names if not re.search(rf"{name}(\.yaml)? stands for", plain_text)
    )


def missing_inputs(commands: list[str]) -> list[str]:
    """Return paths in commands that neither the quickstart nor the commands write."""
    words = [shlex.split(command) for command in commands]
    written = quickstart_folders()
    written |= {value for line in words for flag in WRITTEN if (value := flag_value(line, flag))}
    for word in {word for line in words for word in line if word.startswith("configs/lab/")}:
        name = read_yaml(ROOT / word)["name"]  # scripts.experiment and scripts.forecast write:
        written |= {f"logs/lab/{name}", f"results/forecast/{name}"}
    paths = {word.partition(":")[0] for line in words for word in line if FOLDERS.match(word)}
    return sorted(
        path
        for path in paths
        if not (ROOT / path).is_file() and "my_" not in path and not _is_near(path, written)
    )


def _is_near(path: str, folders: set[str]) -> bool:
    """Is the path one of the folders, or above or below one?"""
    pairs = [(Path(path), Path(folder)) for folder in folders]
    return any(one.is_relative_to(other) or other.is_relative_to(one) for one, other in pairs)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_of_help_parse_and_name_what_the_quickstart_writes(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    parsers = []
    original = CommandParser.parse_known_args

    def record(self, *args, **kwargs):
        parsers.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CommandParser, "parse_known_args", record)
    commands = examples(path)
    assert commands, f"{path.name} --help has no example"
    for command in commands:
        parse(command, monkeypatch)
    assert missing_inputs(commands) == []
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert unexplained(about) == []
    others = OTHERS - SPELLINGS.keys()
    text = " ".join(commands)
    allowed = {flag for flag, names in OWN.items() for name in names if Path(name).stem in text}
    for parser in parsers:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert not [flag for flag in flags if re.search(r"\w-", flag)]
        assert {flag for flag in flags if flag in others or flag in OWN} <= allowed


def test_texts_name_step_folders_that_the_quickstart_keeps(monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = {}
    for path in TEXTS:
        if STEP.search(text := path.read_text(encoding="utf-8")):
            wrong[str(path.relative_to(ROOT))] = missing_steps(text)
    assert len(wrong) >= 4 and not any(wrong.values()), wrong
    assert quickstart_steps()["sft"] == {250, 500} and quickstart_steps()["gold"] == {400}
    assert missing_steps("checkpoints/quickstart/gold/step_260") == ["quickstart/gold/step_260"]


def test_wrong_examples_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    for example in ("x.py --init_from my_model", "-m scripts.x my_other_run/step_2 --against y"):
        [name] = unexplained(f"Text.\n\npython {example}\n")
        assert name in ("my_model", "my_other_run")
    assert unexplained("python x.py --name my_run --a my_model\n\nmy_model stands for it.") == []
    text = "Text.\n\npython -m scripts.plot_run \\\n    logs/nowhere   # why\nand python x\n"
    assert [line.split()[-1] for line in command_lines(text)] == ["logs/nowhere"]
    assert missing_inputs(command_lines(text)) == ["logs/nowhere"]
    good = ["python -m scripts.plot_run logs/quickstart", "x --checkpoint checkpoints/my_run/sft"]
    assert missing_inputs([*good, "x data/new --output data/new"]) == []
    assert {"checkpoints/quickstart/dpo", "checkpoints/quickstart/gguf"} <= quickstart_folders()
