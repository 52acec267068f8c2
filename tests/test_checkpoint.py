"""Checkpoints: kills, full disks, damage, retention and saves in the background."""

import errno
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, read_metrics, train_here
from torch.distributed.checkpoint.state_dict import get_state_dict

import train
from files import step_folders
from models.hf import load_hf
from scripts import verify_checkpoint
from training import checkpoint, setup
from training.checkpoint import CheckpointConfig, Checkpointer, load_state
from training.checkpoint_files import find_damage, has_state
from training.config import load
from training.ops import watchdog

pytestmark = pytest.mark.one_layer

FULL = OSError(errno.ENOSPC, "No space left on device")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stem != "run"
    }


@pytest.fixture
def started(settings):
    """started("checkpoint.keep=1") -> (state, checkpointer), in a group of one rank."""
    with setup.ranks() as device:

        def make(*overrides: str):
            run = load(ROOT / "configs" / "test_mode.yaml", settings(*overrides))
            state = setup.build(run, device)
            state.phase_end = 1000
            return state, Checkpointer(run.checkpoints, run.checkpoint, torch.bfloat16, None, {})

        yield make


def change(state) -> None:
    """Change a state in place, as a training step does."""
    state.step += 1
    with torch.no_grad():
        for parameter in state.model.parameters():
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(state.step)
            )
            parameter.to_local().add_(noise, alpha=0.01)  # a single rank holds all shards
            parameter.grad = parameter.detach().clone()
    state.optimizer.step()
    state.optimizer.zero_grad()


def tensors(state) -> list[torch.Tensor]:
    model, optimizer = get_state_dict(state.model, state.optimizer)
    moments = [value for values in optimizer["state"].values() for value in values.values()]
    return [
        value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
        for value in [*model.values(), *moments]
    ]


# Processes start in milliseconds: they are forked from one that has imported everything.


@pytest.fixture(scope="module")
def spawn():
    """spawn(function, *arguments) -> a started process in its own session."""

    def start(function, *arguments):
        process = forked.forkserver().Process(target=function, args=arguments)
        process.start()
        return process

    return start


def one_rank(
    overrides: list[str],
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    sabotage=None,
    stderr: str = "",
) -> None:
    """Run train.py's main as one of several ranks, with torchrun's environment."""
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if stderr:
        sys.stderr = open(f"{stderr}.{rank}", "w")  # noqa: SIM115
    if sabotage:
        sabotage(rank)
    sys.argv = ["train.py", "--config", str(ROOT / "configs" / "test_mode.yaml"), *overrides]
    os.chdir(ROOT)
    train.main()


@contextmanager
def ranks_of(spawn, overrides: list[str], ranks: int, sabotage=None, stderr: str = ""):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        spawn(one_rank, overrides, rank, ranks, port, sabotage, stderr) for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def run_ranks(
    spawn, overrides: list[str], ranks: int, seconds: float = 60, **popen_options
) -> list[int | None]:
    """Run that many ranks; return their exit statuses."""
    with ranks_of(spawn, overrides, ranks, **popen_options) as processes:
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in processes]


# In the background


def test_what_is_saved_in_the_background_is_what_a_save_that_waits_writes(settings, tmp_path):
    for name in ("true", "false"):
        where = [f"output_dir={tmp_path / name}", f"log_dir={tmp_path / 'logs' / name}"]
        assert train_here(
            settings(f"checkpoint={{every: 1, keep: 9, asynchronous: {name}}}", *where, steps=3)
        )
    background, waited = content(tmp_path / "true"), content(tmp_path / "false")
    assert len([name for name in background if name.endswith(".distcp")]) == 3
    assert background == waited


def test_saves_back_to_back_hold_what_was_there_when_they_began(started, tmp_path):
    state, checkpointer = started("checkpoint={asynchronous: true, keep: 9}")
    then = {}
    for _ in range(5):
        change(state)
        checkpointer.save(state)
        then[state.step] = tensors(state)
        change(state)  # while it is written
    checkpointer.wait()
    assert [path.name for path in step_folders(checkpointer.folder)] == [
        f"step_{step}" for step in then
    ]
    for step, expected in then.items():
        fresh, _ = started(f"seed={step}")
        load_state(checkpointer.folder / f"step_{step}", fresh)
        assert all(torch.equal(a, b) for a, b in zip(tensors(fresh), expected, strict=True))
        exported = load_hf(checkpointer.folder / f"step_{step}", dtype=None).state_dict()
        assert torch.equal(
            exported["norm.weight"],
            expected[list(fresh.model.state_dict()).index("norm.weight")].bfloat16(),
        )


def test_two_ranks_save_in_the_background_and_any_number_goes_on(spawn, settings, tmp_path):
    def overrides(name: str, steps: int, asynchronous: str = "true") -> list[str]:
        where = [f"output_dir={tmp_path / name}", f"log_dir={tmp_path / name / 'logs'}"]
        settings_of_run = [
            f"checkpoint={{every: 2, keep: 2, asynchronous: {asynchronous}}}",
            "validation.every=0",
        ]
        return settings(*settings_of_run, *where, steps=steps)

    assert run_ranks(spawn, overrides("waited", 8, "false"), 2) == [0, 0]
    for steps in (3, 8):
        assert run_ranks(spawn, overrides("background", steps), 2) == [0, 0]
    assert losses(tmp_path / "background" / "logs") == losses(tmp_path / "waited" / "logs")
    one, two = (content(tmp_path / name / "step_8") for name in ("background", "waited"))
    assert "state/__1_0.distcp" in one and one == two
    for name, ranks in (("background", 1), ("waited", 2)):
        assert (
            run_ranks(
                spawn,
                [*overrides(name, 9), "data.accept_changed=true"],
                ranks,
            )
            == [0] * ranks
        )
    rows = [losses(tmp_path / name / "logs")[-1] for name in ("background", "waited")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)


# Killed


def test_killed_at_many_moments_there_is_always_a_whole_one_and_it_goes_on_bit_for_bit(
    spawn, settings, tmp_path
):
    steps = 28  # benchmarks/faults.py kills twice twenty times

    def overrides(name: str) -> list[str]:
        where = [f"output_dir={tmp_path / name}", f"log_dir={tmp_path / 'logs' / name}"]
        settings_of_run = [
            "checkpoint={every: 1, keep: 1, asynchronous: true}",
            "validation={every: 50, rows: 4}",
        ]
        return settings(*settings_of_run, f"schedule.total_steps={steps}", *where, steps=steps)

    began = time.monotonic()
    assert run_ranks(spawn, overrides("straight"), 1) == [0]
    pace = (time.monotonic() - began) / steps
    moments, while_saving, kills = random.Random(4), 0, 0
    folder, metrics = tmp_path / "killed", tmp_path / "logs" / "killed" / "metrics.jsonl"
    while kills < 5:
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = spawn(one_rank, overrides("killed"))
        while not step_folders(folder) or metrics.stat().st_mtime_ns == before:  # it trains
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 2 * pace))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        while_saving += any(path.suffix == ".tmp" for path in folder.iterdir())
        assert step_folders(folder) and all(
            find_damage(path) is None and has_state(path) for path in step_folders(folder)
        )
    assert while_saving and not (folder / f"step_{steps}").exists()
    assert run_ranks(spawn, overrides("killed"), 1) == [0]
    assert not [path for path in folder.iterdir() if ".damaged" in path.name]
    assert losses(tmp_path / "logs" / "killed") == losses(tmp_path / "logs" / "straight")
    assert content(folder / f"step_{steps}") == content(tmp_path / "straight" / f"step_{steps}")


def test_killed_between_the_renames_of_a_step_that_is_saved_again(started):
    state, checkpointer = started("checkpoint.keep=1")
    change(state)
    for place in (1, 2):  # the same step again, as for a signal after a skipped step
        state.batch_index = place
        checkpointer.save(state)
    assert [path.name for path in checkpointer.folder.iterdir()] == ["step_1"]
    (checkpointer.folder / "step_1").rename(checkpointer.folder / "step_1.replaced")
    (checkpointer.folder / "step_1.tmp").mkdir()
    assert checkpointer.newest() == checkpointer.folder / "step_1"
    assert load_state(checkpointer.folder / "step_1", state)["batch_index"] == 2
    assert [path.name for path in checkpointer.folder.iterdir()] == ["step_1"]


def kill_rank_1_in_its_second_save(rank: int) -> None:
    watchdog.GRACE = 0.1
    written = checkpoint._checksums
    calls = []

    def checksums(folder, group):
        calls.append(folder)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return written(folder, group)

    checkpoint._checksums = checksums


def test_a_dead_rank_ends_the_others_and_publishes_nothing(spawn, settings, tmp_path):
    overrides = settings("checkpoint={every: 3, asynchronous: true}", steps=12)
    began = time.monotonic()
    statuses = run_ranks(
        spawn,
        overrides,
        2,
        30,
        sabotage=kill_rank_1_in_its_second_save,
        stderr=str(tmp_path / "stderr"),
    )
    assert time.monotonic() - began < 25
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None)
    folders = step_folders(tmp_path / "checkpoints" / "one")
    assert [path.name for path in folders] == ["step_3"] and find_damage(folders[0]) is None


# A full disk


def full(*_, **__):
    raise FULL


@pytest.mark.parametrize(
    "target", ["training.checkpoint.save_hf", "torch.distributed.checkpoint.filesystem._write_item"]
)
def test_a_disk_that_fills_up_in_the_background_ends_the_run_at_the_next_step(
    settings, tmp_path, capfd, monkeypatch, target
):
    where = settings(
        "checkpoint={every: 10, asynchronous: true}",
        "schedule.total_steps=30",
        "validation.every=0",
        steps=30,
    )
    assert train_here([*where, "steps=10"])
    monkeypatch.setattr(target, full)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--config", str(ROOT / "configs" / "test_mode.yaml"), *where]
    )
    with pytest.raises(SystemExit) as exit_info:
        train.main()
    error = capfd.readouterr().err
    assert exit_info.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert (
        "the checkpoint of step 20 was not saved: No space left on device; repeat the command "
        "to resume" in error
    )
    assert 20 <= len(read_metrics(tmp_path / "logs")) < 30
    assert [path.name for path in (tmp_path / "checkpoints" / "one").glob("step_*")] == ["step_10"]
    monkeypatch.undo()
    assert train_here(where) and len(read_metrics(tmp_path / "logs")) == 30


def fill_the_disk_of_rank_1(rank: int) -> None:
    if rank == 1:
        torch.distributed.checkpoint.filesystem._write_item = full


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_what_fails_on_one_rank_fails_on_all(spawn, settings, tmp_path, asynchronous):
    overrides = settings(f"checkpoint={{every: 3, asynchronous: {asynchronous}}}", steps=12)
    assert run_ranks(
        spawn, overrides, 2, sabotage=fill_the_disk_of_rank_1, stderr=str(tmp_path / "stderr")
    ) == [2, 2]
    for rank in (0, 1):
        message = (tmp_path / f"stderr.{rank}").read_text()
        assert "No space left on device" in message and message.count("\n") == 1
    assert list((tmp_path / "checkpoints" / "one").glob("step_*")) == []


def test_a_save_that_failed_for_another_reason_is_told_too(started, monkeypatch):
    state, checkpointer = started("checkpoint.asynchronous=true")
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: 1 / 0)
    checkpointer.save(state)
    while not checkpointer.failed:
        time.sleep(0.01)
    with pytest.raises(
        RuntimeError, match=r"step 0 was not saved: ZeroDivisionError: division by zero"
    ):
        checkpointer.wait()
    assert not checkpointer.failed and list(checkpointer.folder.iterdir()) == []
    monkeypatch.undo()
    with checkpointer:
        checkpointer.save(state)
    assert checkpointer.newest() == checkpointer.folder / "step_0"


# Retention

W = "weights"  # only


@pytest.mark.parametrize(
    ("settings_of", "metrics", "milestones", "expected"),
    [
        ("keep: 1", [None] * 4, (), {4: "all"}),
        ("keep: 2", [None] * 4, (), {3: "all", 4: "all"}),
        ("keep: 1", [5, 4, 3, 2], (), {4: "all"}),  # the best is the newest
        ("keep: 1", [5, 1, 3, 2], (), {2: W, 4: "all"}),
        (
            "keep: 2",
            [5, 1, 3, 2],
            (),
            {2: W, 3: "all", 4: "all"},
        ),  # weights-only checkpoints do not count as the last
        ("keep: 3", [5, 1, 3, 2], (), {2: "all", 3: "all", 4: "all"}),
        ("keep: 1", [5, 3, 4, 2, 4], (), {4: W, 5: "all"}),  # the former best is removed
        ("keep: 1", [5, float("nan"), None, 6], (), {1: W, 4: "all"}),
        ("keep: 1, keep_best: false", [1, 2, 3, 4], (), {4: "all"}),
        ("keep: 1", [4, 3, 2, 5], (2,), {2: "all", 3: W, 4: "all"}),
        (
            "keep: 1",
            [4, 1, 2, 5],
            (2,),
            {2: "all", 4: "all"},
        ),  # the best is a milestone: all of it stays
        ("keep: 1", [None] * 4, (1, 3), {1: "all", 3: "all", 4: "all"}),
    ],
)
def test_what_is_kept(started, settings_of, metrics, milestones, expected):
    state, checkpointer = started(f"checkpoint={{{settings_of}, asynchronous: true}}")
    for step, metric in enumerate(metrics, 1):
        state.step = step
        checkpointer.save(state, metric, milestone=step in milestones)
    checkpointer.wait()
    kept_steps = {
        int(path.name[5:]): "all" if (path / "state").is_dir() else W
        for path in checkpointer.folder.iterdir()
    }
    assert kept_steps == expected
    for path in step_folders(checkpointer.folder):
        assert find_damage(path) is None and has_state(path) == (
            expected[int(path.name[5:])] == "all"
        )


def test_weights_alone_are_never_gone_on_from(started, settings, tmp_path, capsys):
    state, checkpointer = started("checkpoint={keep: 1}")
    for metric in (1.0, 2.0):
        change(state)
        checkpointer.save(state, metric)
    best = checkpointer.folder / "step_1"
    assert not has_state(best) and find_damage(best) is None
    assert load_hf(best).config.vocab_size == state.model.config.vocab_size
    with pytest.raises(
        ValueError, match="has no state/ to resume from; load only its weights with init_from="
    ):
        load_state(best, state)
    (best / "state").mkdir()  # as after a kill during the removal of state/
    (best / "state" / "trainer.json").write_text("{}")
    assert not has_state(best) and find_damage(best) is None
    (checkpointer.folder / "step_2" / "model.safetensors").unlink()
    assert checkpointer.newest() is None
    assert "step_2 is damaged (model.safetensors is missing)" in capsys.readouterr().out
    run = load(
        ROOT / "configs" / "test_mode.yaml",
        settings(f"resume_from={checkpointer.folder}", phase="two"),
    )
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        setup.restore_or_init(
            run, state, Checkpointer(tmp_path / "two", run.checkpoint, torch.float32, None, {}), ""
        )
    change(state)
    checkpointer.save(state, 3.0)
    assert not (best / "state").exists() and has_state(checkpointer.folder / "step_3")


def test_a_checkpoint_that_is_still_read_does_not_stop_the_run(started, monkeypatch):
    state, checkpointer = started("checkpoint={keep: 1}")
    monkeypatch.setattr(os, "rmdir", partial(full))
    for _ in range(3):
        change(state)
        checkpointer.save(state)
    assert checkpointer.newest() == checkpointer.folder / "step_3"
    monkeypatch.undo()
    change(state)
    checkpointer.save(state)
    assert [path.name for path in checkpointer.folder.iterdir()] == ["step_4"]


# Integrity


def verify(capsys, monkeypatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["verify_checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        verify_checkpoint.main()
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out + captured.err


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(data)


def test_two_flipped_bytes_are_found_and_the_run_goes_on_from_the_one_before(
    settings, tmp_path, capfd, monkeypatch
):
    overrides = settings("checkpoint={every: 2, keep: 3, asynchronous: true}")
    assert train_here(
        [*overrides, f"output_dir={tmp_path / 'straight'}", f"log_dir={tmp_path / 'apart'}"]
    )
    assert train_here(overrides)
    expected, folder = losses(tmp_path / "logs"), tmp_path / "checkpoints" / "one"
    assert verify(capfd, monkeypatch, tmp_path / "checkpoints")[0] == 0
    flip(folder / "step_6" / "state" / "__0_0.distcp", 5_000, 77_777)
    status, output = verify(capfd, monkeypatch, tmp_path / "checkpoints")
    assert status == 1 and output.count("complete, ") == 2
    assert "step_6: DAMAGED: state/__0_0.distcp has changed" in output
    assert train_here(overrides)
    assert "step_6 is damaged (state/__0_0.distcp has changed)" in capfd.readouterr().out
    assert losses(tmp_path / "logs") == expected
    assert content(folder / "step_6") == content(tmp_path / "straight" / "step_6")


def test_verify_compares_bit_for_bit(started, tmp_path, capsys, monkeypatch):
    state, checkpointer = started("checkpoint={keep: 9}", f"output_dir={tmp_path / 'a'}")
    _, others = started("checkpoint={keep: 9}", f"output_dir={tmp_path / 'b'}")
    change(state)
    for place in (checkpointer, others):
        place.save(state, 1.5)
    step_folder, reference = (folder / "step_1" for folder in (checkpointer.folder, others.folder))
    status, output = verify(capsys, monkeypatch, step_folder, "--against", reference)
    assert (
        status == 0
        and "validation loss 1.5000" in output
        and output.endswith("identical, bit for bit\n")
    )
    name, moments = next(
        (n, state.optimizer.state[p]) for n, p in state.model.named_parameters() if p.ndim == 1
    )
    moments["exp_avg"][:] = -moments["exp_avg"]
    state.batch_index = 7
    others.save(state, 1.5)
    status, output = verify(capsys, monkeypatch, step_folder, "--against", reference)
    assert status == 1 and output.count("DIFFERENT") == 2
    assert (
        f"state: optimizer.state.{name}.exp_avg\n" in output
        and "trainer.json: batch_index is 0 and 7" in output
    )
    assert verify(capsys, monkeypatch, tmp_path / "c")[0] == 2
    assert verify(capsys, monkeypatch, tmp_path / "a", "--against", tmp_path / "b")[0] == 2


def test_verify_finds_what_checksums_cannot(started, capsys, monkeypatch):
    state, checkpointer = started()
    state.step = 3
    checkpointer.save(state)
    (checkpointer.folder / "step_3").rename(checkpointer.folder / "step_4")
    status, output = verify(capsys, monkeypatch, checkpointer.folder)
    assert status == 1 and "step_4: DAMAGED: state/trainer.json belongs to step 3" in output
    (checkpointer.folder / "step_4" / "manifest.json").write_text("{")
    status, output = verify(capsys, monkeypatch, checkpointer.folder / "step_4")
    assert status == 1 and "no readable manifest.json" in output


def test_sums_are_sha256_and_those_of_earlier_versions_still_hold(started):
    from hashlib import blake2b, sha256

    state, checkpointer = started()
    checkpointer.save(state)
    folder = checkpointer.folder / "step_0"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: data for name, data in content(folder).items() if name != "manifest.json"}
    assert manifest["files"] == {name: sha256(data).hexdigest() for name, data in files.items()}
    earlier = {
        "files": {name: blake2b(data, digest_size=16).hexdigest() for name, data in files.items()}
    }
    (folder / "manifest.json").write_text(json.dumps(earlier))
    assert checkpointer.newest() == folder
    state.step = 1
    checkpointer.config = CheckpointConfig(keep=1)
    checkpointer.save(state)
    flip(checkpointer.folder / "step_1" / "config.json", 3)
    assert find_damage(checkpointer.folder / "step_1") == "config.json has changed"


def test_every_file_is_hashed_once_and_the_bytes_are_spread(tmp_path, monkeypatch):
    """Check which files each of two ranks hashes; only the exchange between ranks is simulated."""
    sizes = {"a": 900, "b": 880, "c": 300, "d": 10, "e": 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    shares = []
    for rank in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr(dist, "get_world_size", lambda: 2)
            patched.setattr(dist, "get_rank", lambda rank=rank: rank)
            patched.setattr(checkpoint, "run_on_rank0", lambda work, group: work())
            patched.setattr(checkpoint, "run_on_every_rank", lambda work, group: work())
            patched.setattr(
                dist,
                "all_gather_object",
                lambda out, own, group: out.__setitem__(slice(None), [own, {}]),
            )
            shares.append(checkpoint._checksums(tmp_path, None))
    assert sorted([*shares[0], *shares[1]]) == sorted(sizes)
    assert [sum(sizes[name] for name in share) for share in shares] == [911, 1180]
