"""Fault cases of train.py: kills, changed rank count, damaged files, signals, NaN and clocks."""

import os
import random
import shutil
from collections.abc import Callable
from functools import partial

from benchmarks.fault_lab import Lab, Row, row
from benchmarks.fault_runs import (
    EVERY,
    LENGTH,
    ROWS,
    Failed,
    Run,
    compare,
    kill,
    recorded,
    settings,
)
from benchmarks.faulty_train import Action
from data.dataloader import PackedDataLoader
from data.store import open_shards
from files import step_folders
from training.checkpoint_files import step_of

LOSS_TOLERANCE = 1e-5  # the rank count changes the order of summation


# Kills


def moments(lab: Lab, everyone: bool, steps: int) -> tuple[Run, int]:
    """Kill a run at random points, the last ones near the end of the phase: (run, kills)."""
    run = lab.run(f"kill-{'all' if everyone else 'one'}", steps)
    random_ = random.Random(lab.seed + everyone)
    kinds = ["start"] * 5 + ["step"] * 6 + ["save"] * 6
    random_.shuffle(kinds)
    quick = ["save", "end"] if everyone else ["start", "step"]
    kinds = quick if lab.quick else [*kinds, "last save", "last save", "end"]
    for number, kind in enumerate(kinds):
        rank, newest = random_.randrange(2), run.newest()
        if kind == "start":
            at, of, delay = (
                random_.choice(("start", "start", "build")),
                0,
                random_.uniform(0, lab.imports),
            )
        elif kind == "step":
            of = min(newest + random_.randint(1, 6), max(newest + 1, steps - 6))
            at, delay = random_.choice(("batch", "step")), random_.uniform(0, 0.04)
        elif kind == "save":
            of = min(newest + EVERY * random_.randint(1, 3), max(newest + EVERY, steps - 6))
            at, delay = random_.choice(("save", "state", "saved")), random_.uniform(0, 0.02)
        else:
            at, of, delay = (
                ("end", 0, 0.0)
                if kind == "end"
                else (random_.choice(("save", "state")), steps, 0.0)
            )
        if at == "build":
            delay = random_.uniform(0, 0.2)
        if run.again(kill(at, of, rank, everyone, delay)).status == 0:
            raise Failed(f"kill {number + 1} came too late: {kind} {at} {of} {delay:.3f}")
    return run.finish(), len(kinds)


def kill_ranks(lab: Lab, everyone: bool) -> Row:
    steps = 12 if lab.quick else 60
    run, times = moments(lab, everyone, steps)
    half = sum(bool(kill["half"]) for kill in run.killed)
    whom = "all ranks and the launcher" if everyone else "one rank of two"
    spread = ", ".join(
        f"{sum(kill['at'] in points for kill in run.killed)} {kind}"
        for kind, points in KINDS.items()
    )
    done = f"{times} times at random: {spread}"
    return row(
        run,
        compare(run, lab.plain(steps)),
        f"SIGKILL of {whom}",
        done,
        f"{half} left an incomplete checkpoint, removed",
    )


KINDS = {
    "in start-up": ("start", "build"),
    "in steps": ("batch", "step"),
    "in saves": ("save", "state", "saved"),
    "after the last step": ("end",),
}


def three_in_an_epoch(lab: Lab) -> Row:
    """Kill within an epoch of six steps: each row must appear exactly once per epoch."""
    data = (
        f"data={{store: {lab.store}, mix: {{short: 1}}, sequence_length: {LENGTH}, "
        f"tokens_per_step: {ROWS * LENGTH}, micro_batch_size: 2}}"
    )

    def make(name: str) -> Run:
        return lab.run(name, 14, data)

    run = make("epoch").survive(
        kill("step", 2, 1), kill("step", 4, everyone=True), kill("batch", 5, 0)
    )
    shards = open_shards(lab.store, {"short": 1.0}, "train", 128)
    stream, epoch = (
        recorded(run),
        len(PackedDataLoader(shards, {"short": 1.0}, LENGTH, ROWS, ROWS, 0).packed[0]),
    )
    read = [row for update in sorted(stream) for row in stream[update]]
    epochs = [read[first : first + epoch] for first in range(0, 2 * epoch, epoch)]
    once = (
        epoch == 6 * ROWS
        and all(len(set(rows)) == epoch for rows in epochs)
        and set(epochs[0]) == set(epochs[1])
    )
    verdict = compare(run, lab.straight("straight-epochs", make))
    result = row(
        run, verdict, "three kills in one epoch", "SIGKILL at steps 2, 4 and 6 of an epoch of 6", ""
    )
    result.ok &= once
    result.note = f"each of {epoch} rows {'once' if once else 'NOT ONCE'} in both epochs"
    return result


def kill_in_save(lab: Lab) -> Row:
    """Kill at each point of a background save, from the start of its thread to the rename."""
    every = [
        (at, rank, everyone)
        for at in ("save", "state")
        for rank, everyone in ((0, True), (0, False), (1, False))
    ]
    every += [(at, 0, everyone) for at in ("publish", "rename") for everyone in (True, False)]
    stages = [("state", 0, True), ("rename", 0, True)] if lab.quick else every
    run = lab.run("kill-in-save")
    for at, rank, everyone in stages:
        newest = run.newest()
        fault = kill(at, newest + EVERY if newest < 8 else 10, rank, everyone)
        if run.again(fault).status == 0 or run.newest() != newest:
            raise Failed(f"a save that was killed at {at!r} was published")
    half = sum(bool(kill["half"]) for kill in run.finish().killed)
    words = {
        "save": "at the thread's start",
        "state": "checksums",
        "publish": "the manifest",
        "rename": "the rename",
    }
    named = [
        words[at] if at == "save" else f"before {words[at]}"
        for at in dict.fromkeys(at for at, _, _ in stages)
    ]
    done = f"{len(stages)} times: {', '.join(named)}"
    return row(
        run,
        compare(run, lab.plain()),
        "SIGKILL during a background save",
        done,
        f"{half} left an incomplete checkpoint",
    )


def kill_at_border(lab: Lab) -> Row:
    def make(name: str) -> Run:
        folder = lab.folder / name
        more = [
            f"resume_from={folder / 'one'}",
            "schedule={warmup_steps: 2, total_steps: 12, decay_steps: 4}",
        ]
        more += [
            "data.mix={dummy: 0.3, more: 0.7}",
            "rope_theta=500000",
            "allow_theta_jump=true",
            "validation.every=0",
        ]
        first = settings(lab.store, folder, 6, "one", more[1], *lab.overrides)
        second = settings(lab.store, folder, 6, "two", *more, *lab.overrides)
        return Run(folder, [first, second], lab.launch)

    run = make("border")
    if run.again(kill("saved", 6, everyone=True)).status == 0 or run.newest() != 6:
        raise Failed("not killed between the phase's last checkpoint and its exit")
    if run.again().status:
        raise Failed(
            f"the complete phase did not exit with status 0: {run.ended[-1].output[-300:]}"
        )
    faults = (kill("build", 0, everyone=True), kill("step", 7, 1), kill("rename", 8, everyone=True))
    for fault in faults[2:] if lab.quick else faults:
        if run.again(fault).status == 0 or run.newest():
            raise Failed(f"the second phase was not killed before its first checkpoint: {fault}")
    verdict = compare(run.finish(), lab.straight("straight-border", make))
    done = "after the phase's last checkpoint; " + (
        "" if lab.quick else "at the next phase's start and first step; "
    )
    done = f"{len(run.killed)} times: {done}in its first save"
    return row(
        run, verdict, "SIGKILL between two phases", done, "data, mixture and rope theta change"
    )


# Changed ranks and files


def change_ranks(lab: Lab) -> Row:
    run = lab.run("ranks")
    for ranks, fault in ((2, kill("step", 5, everyone=True)), (1, kill("step", 9, everyone=True))):
        if run.again(fault, ranks).status == 0:
            raise Failed("the run was not killed")
    verdict = compare(run.finish(2), lab.plain())
    done = "SIGKILL at steps 5 and 9, then resumed with the other rank count"
    return row(
        run,
        verdict,
        "2 -> 1 -> 2 ranks",
        done,
        f"tolerance {LOSS_TOLERANCE:g}",
        LOSS_TOLERANCE,
    )


def flip_bytes(lab: Lab) -> Row:
    run = lab.run("flipped")
    messages = []
    names = (
        ("state/__1_0.distcp",)
        if lab.quick
        else ("state/__1_0.distcp", "model.safetensors", "state/trainer.json")
    )
    for number, name in enumerate(names):
        if run.again(kill("step", 7 + number, everyone=True)).status == 0:
            raise Failed("the run was not killed")
        newest = step_folders(run.folder / "one")[-1]
        content = bytearray((newest / name).read_bytes())
        for offset in (len(content) // 3, len(content) // 2):
            content[offset] ^= 1
        (newest / name).write_bytes(content)
        messages.append(
            (
                f"{newest.name} is damaged ({name} has changed)",
                f"resumes at step {step_of(newest) - EVERY}",
            )
        )
    run.finish()
    output = "".join(ended.output for ended in run.ended)
    if not all(text in output for pair in messages for text in pair) or not list(
        run.folder.glob("one/step_*.damaged")
    ):
        raise Failed(f"damaged checkpoint not set aside, or previous one not used: {messages}")
    done = f"{len(names)} times: {', '.join(names)}"
    return row(
        run,
        compare(run, lab.plain()),
        "two flipped bytes in the newest checkpoint",
        done,
        "set aside, the previous one used",
    )


def full_disk(lab: Lab) -> Row:
    run = lab.run("full")
    cases = (
        [(1, 4, "state")] if lab.quick else [(1, 4, "state"), (0, 8, "weights"), (0, 12, "state")]
    )
    for rank, step, what in cases:
        ended = run.again({"full": {"rank": rank, "step": step, "what": what}})
        message = f"the checkpoint of step {step} was not saved: No space left on device"
        if ended.status != 2 or message not in ended.output or run.newest() != step - EVERY:
            raise Failed(f"status {ended.status}, newest {run.newest()}: {ended.output[-300:]}")
    done = (
        f"{len(cases)} times: in the background, on one rank; status 2 and an error message on all"
    )
    return row(
        run.finish(),
        compare(run, lab.plain()),
        "no space left during a save",
        done,
        "injected ENOSPC, not a full disk",
    )


def hide_shard(lab: Lab) -> Row:
    store = lab.folder / "store-of-shard"
    shutil.copytree(lab.store, store)
    shard = store / "tokens" / "more" / "train-00001.bin"
    run = lab.run("shard", store=store)
    gone: Action = {"at": "step", "of": 3, "rank": 0, "do": "hide", "path": str(shard)}
    if (
        run.again({"actions": [gone, *kill("step", 7, everyone=True)["actions"]]}).status == 0
        or shard.exists()
    ):
        raise Failed("the shard was not hidden, or the run was not killed")
    before = run.newest()
    ended = run.again()
    message = f"the shard {shard} is missing or truncated; restore it"
    if before < 4 or ended.status != 2 or message not in ended.output or run.newest() != before:
        raise Failed(
            f"status {ended.status}, newest {before}, then {run.newest()}: {ended.output[-300:]}"
        )
    shard.with_name(shard.name + ".hidden").rename(shard)
    done = "once, at step 3; SIGKILL at step 7; restored after an attempt"
    note = "the run continues; a new start names the file and changes nothing"
    return row(run.finish(), compare(run, lab.plain()), "a deleted shard", done, note)


# Signals, numbers, clocks


def sigterm(lab: Lab) -> Row:
    run = lab.run("sigterm")
    for rank, step in ((1, 3),) if lab.quick else ((1, 2), (0, 6), (1, 9)):
        ended = run.again(
            {"actions": [{"at": "step", "of": step, "rank": rank, "do": "terminate"}]}
        )
        if (
            ended.status != 143
            or "stopped by a signal and saved" not in ended.output
            or not step <= run.newest() <= step + 1
        ):
            raise Failed(f"status {ended.status}, newest {run.newest()}: {ended.output[-300:]}")
    times = run.launches
    note = "all ranks save that step or the next, status 143; no validation at that step"
    return row(
        run.finish(),
        compare(run, lab.plain()),
        "SIGTERM to one rank",
        "once, rank 1" if times == 1 else f"{times} times, rank 1, 0 and 1",
        note,
    )


def nan(lab: Lab) -> Row:
    def make(name: str) -> Run:
        return lab.run(name, always={"excluded_batches": [5]})

    rows: list[Row] = []
    for what in ("gradient",) if lab.quick else ("gradient", "loss"):
        run = lab.run(
            f"nan-{what}" if rows else "nan",
            always={"nan": {"rank": 1, "batch_index": 5, "what": what}},
        ).finish()
        if not any("step 6 (batch index 5) was skipped" in ended.output for ended in run.ended):
            raise Failed("the bad step was applied")
        rows.append(
            row(
                run,
                compare(run, lab.straight("straight-without-5", make), skipped=True),
                "NaN in one rank's batch",
                "",
                "",
            )
        )
    first = rows[0]
    first.ok = all(result.ok for result in rows)
    first.done = "batch 5 on rank 1, in its gradients" + (
        "; in a second run in its loss" if len(rows) > 1 else ""
    )
    first.note = "skipped on all ranks; compared with a run that excludes batch 5"
    return first


def clocks(lab: Lab) -> Row:
    run = lab.run("clocks")
    first = {
        "clocks": [3600.0, -86400.0],
        "jump": {"at": 4, "by": -7200.0},
        **kill("step", 7, everyone=True),
    }
    if run.again(first).status == 0:  # type: ignore[arg-type]
        raise Failed("the run was not killed")
    for age, path in enumerate(run.step_folders()):  # the newest checkpoint looks the oldest
        for entry in (*path.rglob("*"), path):
            os.utime(entry, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    newest = run.newest()
    if (
        run.again({"clocks": [-86400.0, 7200.0]}).status
        or f"resumes at step {newest}" not in run.ended[-1].output
    ):
        raise Failed(f"it did not resume at step {newest}: {run.ended[-1].output[-300:]}")
    done = "2 launches: 25 h apart, back by 2 h at step 4, SIGKILL at 7, then 26 h apart"
    note = "checkpoints' file times reversed in between; shifts Python's clocks, not the kernel's"
    return row(run, compare(run, lab.plain()), "clock skew between ranks", done, note)


CASES: dict[str, Callable[[Lab], Row]] = {
    "kill_one": partial(kill_ranks, everyone=False),
    "kill_all": partial(kill_ranks, everyone=True),
    "three_in_an_epoch": three_in_an_epoch,
    "kill_in_save": kill_in_save,
    "kill_at_border": kill_at_border,
    "change_ranks": change_ranks,
    "flip_bytes": flip_bytes,
    "full_disk": full_disk,
    "sigterm": sigterm,
    "nan": nan,
    "hide_shard": hide_shard,
    "clocks": clocks,
}
