"""Faults put into tiny runs and plans, and whether all that they leave equals undisturbed ones: docs/faults.md.

    python -m benchmarks.faults --output benchmarks/results/faults.json --docs docs/faults.md    # about 12 minutes on 2 cores
    python -m benchmarks.faults --only sigterm nan --quick
    python -m benchmarks.faults --only kill_sft --output ... --docs ... --keep    # other rows stay, with their dates

Each case gives commands on the CPU, puts the fault into them, gives the same command line again until
it is complete, and compares with a run that nothing happened to. Exit status 1 where a case fails.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import fault_pipeline, fault_stages, fault_train
from benchmarks.fault_lab import Lab, Row, cpu, page, table
from benchmarks.fault_runs import (
    Failed,
    Launch,
    launch_here,
    write_store,
)
from benchmarks.fault_sites import Sites, Start, start_here
from cli import user_errors
from files import read_object, write_json, write_text

CASES: dict[str, Callable[[Lab], Row]] = {
    **fault_train.CASES,
    **fault_pipeline.CASES,
    **fault_stages.CASES,
}


def examine(lab: Lab, name: str) -> Row:
    """One case; one that does not survive is a row too."""
    began = time.monotonic()
    try:
        found = CASES[name](lab)
    except fault_stages.NoMount as error:
        found = Row(
            name, name, "", True, ("not run here", "", "", ""), str(error), 0, skipped=str(error)
        )
    except Failed as error:
        found = Row(name, name, "", False, ("NO", "", "", ""), " ".join(str(error).split()), 0)
    found.name, found.seconds = name, round(time.monotonic() - began, 1)
    found.date = datetime.now(UTC).date().isoformat()
    found.versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(
        f"{'ok    ' if found.ok else 'FAILED'} {found.seconds:5.0f} s  {found.markdown()}",
        flush=True,
    )
    return found


def make_lab(
    folder: Path,
    launch: Launch = launch_here,
    start: Start = start_here,
    quick: bool = False,
    seed: int = 4,
    imports: float = 4.0,
) -> Lab:
    lab = Lab(folder, launch, Sites(folder / "sites", start, quick), quick, seed, imports)
    write_store(lab.store, seed)
    return lab


def merged(rows: list[Row], path: Path) -> list[Row]:
    """New rows, and those of other cases that a file of results holds, in the order of CASES."""
    content = read_object(path) or {}
    kept = {}
    for old in content.get("rows", []):
        versions = f"Python {content['python']}, torch {content['torch']}"
        dated = {"date": content["date"], "versions": versions, **old, "cells": tuple(old["cells"])}
        kept[old["name"]] = Row(**dated)
    known = kept | {row.name: row for row in rows}
    return [known[name] for name in CASES if name in known]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=", ".join(CASES),
    )
    parser.add_argument("--quick", action="store_true", help="fewer times each")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--docs", type=Path, help="write the table here as Markdown")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows of other cases in --output"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with (
        user_errors(),
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        lab = make_lab(Path(folder), quick=args.quick, seed=args.seed)
        rows = list(pool.map(lambda name: examine(lab, name), args.only))
        if args.keep and args.output:
            rows = merged(rows, args.output)
    about = {
        "command": " ".join(["python -m benchmarks.faults", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores of {cpu()}, shared with other work",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": str(args.seed),
        "seconds": f"{time.monotonic() - began:.0f}",
    }
    print("\n" + table(rows))
    if args.output:
        write_json(args.output, {**about, "rows": [asdict(row) for row in rows]})
    if args.docs:
        write_text(args.docs, page(rows, about))
    raise SystemExit(0 if all(row.ok for row in rows) else 1)


if __name__ == "__main__":
    main()
