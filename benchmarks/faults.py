"""Inject faults into tiny runs and plans; compare with undisturbed runs (docs/faults.md).

    python -m benchmarks.faults --output benchmarks/results/faults.json --docs docs/faults.md
    python -m benchmarks.faults --only sigterm nan --quick
    python -m benchmarks.faults --only kill_sft --keep \\
        --output benchmarks/results/faults.json --docs docs/faults.md    # keep other rows

Each case runs commands on the CPU, injects its fault, repeats the same command until it completes,
and compares the result with an undisturbed run. All cases take about 12 minutes on 2 cores.
Exits with status 1 if a case fails.
"""

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
from cli import CommandParser, user_errors
from files import read_object, write_json, write_text

CASES: dict[str, Callable[[Lab], Row]] = {
    **fault_train.CASES,
    **fault_pipeline.CASES,
    **fault_stages.CASES,
}


def examine(lab: Lab, name: str) -> Row:
    """Run one case; a failure also returns a row."""
    start = time.monotonic()
    try:
        result = CASES[name](lab)
    except fault_stages.NoMount as error:
        result = Row(
            name, name, "", True, ("not run here", "", "", ""), str(error), 0, skipped=str(error)
        )
    except Failed as error:
        result = Row(name, name, "", False, ("NO", "", "", ""), " ".join(str(error).split()), 0)
    result.name, result.seconds = name, round(time.monotonic() - start, 1)
    result.date = datetime.now(UTC).date().isoformat()
    result.versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(
        f"{'ok    ' if result.ok else 'FAILED'} {result.seconds:5.0f} s  {result.markdown()}",
        flush=True,
    )
    return result


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
    """Merge new rows with a results file's rows of other cases, in the order of CASES."""
    content = read_object(path) or {}
    previous = {}
    for old in content.get("rows", []):
        versions = f"Python {content['python']}, torch {content['torch']}"
        dated = {"date": content["date"], "versions": versions, **old, "cells": tuple(old["cells"])}
        previous[old["name"]] = Row(**dated)
    merged_rows = previous | {row.name: row for row in rows}
    return [merged_rows[name] for name in CASES if name in merged_rows]


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="NAME",
        help=", ".join(CASES),
    )
    parser.add_argument("--quick", action="store_true", help="inject fewer faults per case")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="cases in parallel")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--docs", type=Path, help="write the table here as Markdown")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows of other cases in --output"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
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
        "seconds": f"{time.monotonic() - start:.0f}",
    }
    print("\n" + table(rows))
    if args.output:
        write_json(args.output, {**about, "rows": [asdict(row) for row in rows]})
    if args.docs:
        write_text(args.docs, page(rows, about))
    raise SystemExit(0 if all(row.ok for row in rows) else 1)


if __name__ == "__main__":
    main()
