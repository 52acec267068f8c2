"""Quick cases of benchmarks/faults.py; its checks detect wrong resumes.

One case runs scripts.launch. All processes are forked from one that has imported all.
"""

import json
import os
import socket
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from conftest import ROOT, one_thread
from forked import Forked, forkserver

from benchmarks import fault_runs, faulty_train
from benchmarks.fault_runs import (
    Ended,
    Failed,
    compare,
    kill,
    lost_and_repeated,
    trained_on,
)
from benchmarks.faults import CASES, Lab, examine, make_lab


def one_rank(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run one rank with torchrun's environment."""
    os.environ |= environment
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = ["train.py", *arguments]
    os.chdir(ROOT)
    faulty_train.main()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOCK_PATIENCE", "1.0")  # of the second of two commands
        context = forkserver()

        def launch(
            arguments: list[str], ranks: int, fault: faulty_train.Fault, record: Path
        ) -> Ended:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            common = {
                "FAULT": json.dumps(fault),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            output = f"{record}.output"
            processes = [
                context.Process(
                    target=one_rank, args=(arguments, {**common, "RANK": str(rank)}, output)
                )
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            end = time.monotonic() + 60
            while any(process.is_alive() for process in processes):
                time.sleep(0.01)
                if time.monotonic() > end:
                    break
                if any(
                    process.exitcode for process in processes
                ):  # as torchrun does: a failed rank ends the others
                    for process in processes:
                        process.terminate()
            statuses = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
                process.join()
            if None in statuses:
                raise Failed(
                    f"nothing came of {record} in a minute: {Path(output).read_text()[-500:]}"
                )
            return Ended(
                next((status for status in statuses if status), 0), Path(output).read_text()
            )

        yield make_lab(tmp_path_factory.mktemp("faults"), launch, Forked, quick=True, imports=0.05)


@pytest.mark.parametrize("name", [name for name in CASES if name != "sigterm"])
def test_a_run_survives(lab, name):
    row = examine(lab, name)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.ok, row.markdown()


def test_a_signal_to_one_rank_under_the_launcher(lab):
    def launch(arguments: list[str], ranks: int, fault: faulty_train.Fault, record: Path) -> Ended:
        if "actions" not in fault:
            return lab.launch(arguments, ranks, fault, record)
        command = [sys.executable, "-m", "scripts.launch", f"--nproc_per_node={ranks}"]
        environment = {**one_thread(), "FAULT": json.dumps(fault)}
        done = forked.run([*command, "-m", "benchmarks.faulty_train", *arguments], env=environment)
        return Ended(done.returncode, done.stdout + done.stderr)

    row = examine(replace(lab, launch=launch), "sigterm")
    assert row.ok and row.launches == 2, row.markdown()


# The checks themselves


def line(update: int, rank: int, *rows: str) -> dict:
    return {
        "update": update,
        "rank": rank,
        "world": 2,
        "batch_index": update - 1,
        "rows": list(rows),
    }


STRAIGHT = [[line(update, rank, f"{update}{rank}") for rank in (1, 0) for update in range(1, 5)]]


def test_a_replay_replaces_and_a_gap_stays():
    expected = trained_on(STRAIGHT)
    assert expected == {update: [f"{update}0", f"{update}1"] for update in range(1, 5)}
    # Rank 1 died first.
    half = [
        row for row in STRAIGHT[0] if row["update"] <= 3 and (row["update"], row["rank"]) != (3, 1)
    ]
    assert trained_on([half, [row for row in STRAIGHT[0] if row["update"] > 2]]) == expected
    assert lost_and_repeated(
        trained_on([half, [row for row in STRAIGHT[0] if row["update"] > 3]]), expected
    ) == (1, 0)
    gap = trained_on(
        [
            [row for row in half if row["update"] < 2],
            [row for row in STRAIGHT[0] if row["update"] > 2],
        ]
    )
    assert lost_and_repeated(gap, expected) == (2, 0)
    late = [
        {**row, "rows": [f"{row['update'] - 1}{row['rank']}"]}
        for row in STRAIGHT[0]
        if row["update"] > 2
    ]
    # Update 3 read the batch of update 2 again.
    assert lost_and_repeated(trained_on([half, late]), expected) == (
        2,
        2,
    )


def test_a_resume_at_the_wrong_place_or_with_other_weights_is_found(lab, monkeypatch):
    """The checks reject a resume one batch too late and a resume with changed weights."""
    plain = lab.plain()
    run = lab.run("misled")
    assert run.again(kill("step", 7, everyone=True)).status
    from training.checkpoint_files import read_manifest

    folder = run.step_folders()[-1]
    position, manifest = (
        json.loads((folder / "state" / "trainer.json").read_text()),
        deepcopy(read_manifest(folder)),
    )
    position["batch_index"] += 1
    (folder / "state" / "trainer.json").write_text(json.dumps(position))
    manifest["files"]["state/trainer.json"] = fault_runs.hashlib.sha256(
        (folder / "state" / "trainer.json").read_bytes()
    ).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    verdict = compare(run.finish(), plain)
    step = fault_runs.ROWS * fault_runs.LENGTH
    # One step skipped, one past the end read.
    assert (verdict.tokens_lost, verdict.tokens_repeated) == (
        step,
        step,
    )
    assert not (
        verdict.stream_equal or verdict.curve_equal or verdict.state_equal or verdict.holds(1.0)
    )
