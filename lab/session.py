"""Run the missing trials of an experiment, write the record and print its result."""

import argparse
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.experiment import Experiment
from lab.record import write_record
from lab.run import Slots, is_finished, plan_trials, run_experiment
from training.run_folder import locked


def add_session_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags --devices, --report_only and --records of conduct()."""
    parser.add_argument(
        "--devices", type=_names, default=[], help="devices to share among the runs, e.g. 0,1,2"
    )
    parser.add_argument("--report_only", action="store_true", help="write the record, run nothing")
    parser.add_argument("--records", type=Path, default=Path("records"), help="folder of records")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def conduct(
    experiment: Experiment,
    variants: Sequence[str],
    environment: Mapping[str, str],
    devices: Sequence[str],
    report_only: bool,
    command: str,
    records: Path,
) -> Path | None:
    """Run the variants, write the record of all finished runs and return its folder.

    devices: values of CUDA_VISIBLE_DEVICES that runs share; empty: one run at a time. report_only:
    run nothing. command: how to repeat the session. ValueError names runs that failed, after the
    record of the others is written.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: runs save
    failures: list[str] = []
    folder = None
    with locked(Path("logs/lab") / experiment.name):
        if not report_only:
            slots = Slots(dict(environment), devices, experiment.ranks, experiment.threads)
            failures = run_experiment(experiment, variants, experiment.seeds, slots)
        trials = plan_trials(experiment, list(experiment.variants), experiment.seeds)
        if not failures or any(is_finished(trial) for trial in trials):
            folder = write_record(experiment, trials, command, records)
            print(f"\n{_result(folder)}\nrecord: {folder / 'README.md'}")
    if failures:
        more = f" and {len(failures) - 3} more" * (len(failures) > 3)
        raise ValueError(
            f"{len(failures)} run(s) failed: {'; '.join(failures[:3])}{more}. The output is in "
            f"logs/lab/{experiment.name}/RUN/output.txt; run the same command again to retry them"
        )
    return folder


def _result(folder: Path) -> str:
    """The section "Result" of a record's README."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text.partition("## Result\n\n")[2].partition("\n\n![")[0].partition("\n## ")[0]
