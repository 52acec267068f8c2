"""Full disks, lost log folders, missing git, locales, few cores: a run survives or explains."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ROOT,
    VOCAB,
    command,
    complaint_of,
    one_thread,
    read_metrics,
    save_tiny,
    tiny_config,
    train_here,
)
from safetensors.torch import save_file

import machine
import train
import train_dpo
import train_sft
from benchmarks.fault_points import runs
from cli import user_errors
from data import manifest
from data.chat.tokenizer import cache_chat_tokenizer
from files import is_full, read_lines, remove_stale, temporary, write_json
from training import setup
from training.faults import FaultState
from training.logger import Log, LogConfig, append_event, log_in
from training.reference import ReferenceLogps

KB = 1024
TEXT = "Größe — 你好 🙂"


class Disk:
    """A separate file system of a few megabytes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, free: int) -> None:
        """Fill the disk; leave so many bytes free."""
        filler = self.folder / "filler"
        filler.unlink(missing_ok=True)
        space = os.statvfs(self.folder)
        filler.write_bytes(b"x" * max(0, space.f_bavail * space.f_frsize - free))


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(
            "this machine does not allow to mount a tmpfs, so there is no disk that can really "
            "be full"
        )
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def quota(monkeypatch):
    """The file system reports more space than the user's quota, so free-space checks pass."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))


def complaint(
    capfd, monkeypatch, overrides: list[str], main=train.main, config: str = "test_mode.yaml"
) -> str:
    return complaint_of(
        main, ["--config", ROOT / "configs" / config, *overrides], capfd, monkeypatch
    )


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


# a full disk


@pytest.mark.parametrize("logs_too", [False, True])
def test_a_really_full_disk_ends_training_in_one_sentence(
    settings, disk, quota, capfd, monkeypatch, logs_too
):
    """safetensors, torch, JSON or the log meets ENOSPC; the older checkpoint stays and resumes."""
    where = [
        f"output_dir={disk.folder / 'out'}",
        *([f"log_dir={disk.folder / 'logs'}"] if logs_too else []),
    ]
    assert train_here(settings(*where, steps=3))
    size = sum(path.stat().st_size for path in (disk.folder / "out" / "step_3").rglob("*"))
    for part in (0.01, 0.3, 0.6, 0.95):
        disk.leave(int(part * size))
        message = complaint(capfd, monkeypatch, settings(*where, steps=6))
        assert (
            "No space left on device" in message and "free some space" in message
        ) or "is the disk full?" in message, part
        assert steps(disk.folder / "out") == ["step_3"]
    (disk.folder / "filler").unlink()
    assert train_here(settings(*where, steps=6))
    logs = disk.folder / "logs" if logs_too else disk.folder.parent / "logs"
    assert [row["step"] for row in read_metrics(logs)] == [1, 2, 3, 4, 5, 6]


def test_libraries_that_report_a_full_disk_in_words_are_understood(
    disk, tmp_path, text_store, capfd
):
    """numpy, safetensors, tokenizers and torch.save have errors of their own.

    Errors with other causes keep their traceback.
    """
    from data.tokenizers.bpe import load_tokenizer

    tokenizer, big = load_tokenizer(text_store / "tokenizer"), torch.zeros(1 << 20)
    writers = {
        "numpy": lambda path: np.save(path, big.numpy()),
        "safetensors": lambda path: save_file({"x": big}, path),
        "torch": lambda path: torch.save({"x": big}, path),
        "tokenizers": lambda path: tokenizer.save(str(path)),
        "json": lambda path: write_json(path, ["x" * 99] * 9999),
    }
    for name, write in writers.items():
        disk.leave(4 * KB)
        with pytest.raises(Exception) as caught:
            write(disk.folder / f"{name}.npy")
        assert is_full(caught.value), (name, caught.value)
        with pytest.raises(SystemExit) as end, user_errors():
            raise caught.value
        errors = capfd.readouterr().err
        assert end.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (
            name,
            errors,
        )
        assert "No space left" in errors or "the disk is full" in errors
        for leftover_file in disk.folder.glob(f"{name}*"):
            leftover_file.unlink()
    assert not is_full(OSError(errno.EIO, "Input/output error")) and not is_full(
        RuntimeError("unexpected pos 3")
    )


@pytest.fixture
def chats(tmp_path, text_store):
    """Write a base model and rows; return overrides(kind, cache folder) for SFT or DPO."""
    save_tiny(tmp_path / "base", tiny_config(max_position_embeddings=512), text_store)
    texts = [f"{TEXT} {i} " * 5 for i in range(1500)]
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]}
        for text in texts
    ]
    pairs = [{"prompt": "x", "chosen": text, "rejected": text[::-1]} for text in texts]
    for name, content in (("rows", rows), ("pairs", pairs)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def overrides(kind: str, cache: Path) -> list[str]:
        section, file, size = "chat", "rows", "tokens_per_step: 1024"
        if kind == "dpo":
            section, file, size = "preferences", "pairs", "pairs_per_step: 2"
        return [
            f"{section}.sources={{own: {{path: {tmp_path / file}.jsonl}}}}",
            *(f"{section}.cache={cache}", f"{section}.val_fraction=0.1"),
            *(["chat.decontaminate=[]", "chat.samples=[]"] if kind == "sft" else []),
            f"data={{mix: {{own: 1}}, sequence_length: 512, micro_batch_size: 2, {size}}}",
            *(f"init_from={tmp_path / 'base'}", "steps=2", "parallel.dtype=float32"),
            *("checkpoint={every: 2, asynchronous: false}", "validation={every: 2, rows: 2}"),
            *(f"output_dir={tmp_path / kind}", f"log_dir={tmp_path / kind / 'logs'}"),
        ]

    return overrides


@pytest.mark.parametrize(("kind", "main"), [("sft", train_sft.main), ("dpo", train_dpo.main)])
def test_prepared_rows_that_do_not_fit_are_refused_and_leave_nothing(
    chats, disk, capfd, monkeypatch, kind, main
):
    cache = disk.folder / "cache"
    settings = chats(kind, cache)
    disk.leave(0)
    # The chat tokenizer comes first.
    message = complaint(capfd, monkeypatch, settings, main, f"{kind}.yaml")
    assert "No space left" in message or "the disk is full" in message
    disk.leave(300 * KB)
    message = complaint(capfd, monkeypatch, settings, main, f"{kind}.yaml")
    assert "GB free; free some space" in message and (
        "the prepared source own needs" in message or "split needs" in message
    )
    with monkeypatch.context() as patched:  # a quota: nothing tells before
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
        message = complaint(capfd, patched, settings, main, f"{kind}.yaml")
    assert "the prepared rows of own were not saved; free some space there" in message
    assert [path.name for path in cache.iterdir() if not path.name.startswith("tokenizer-")] == []
    (disk.folder / "filler").unlink()
    monkeypatch.setattr(
        sys, "argv", ["x", "--config", str(ROOT / "configs" / f"{kind}.yaml"), *settings]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_reference_log_probabilities_that_do_not_fit(disk, quota):
    path = disk.folder / "reference.safetensors"
    with setup.ranks():
        logps = ReferenceLogps(path, {"weights": "x"}, {"train/own": 1 << 20})
        disk.leave(8 * KB)
        with pytest.raises(
            OSError, match=r"reference.safetensors was not written; free some space there"
        ):
            logps._save({})
        assert sorted(entry.name for entry in disk.folder.iterdir()) == ["filler"]
        disk.leave(KB)
    with pytest.raises(OSError, match="GB free"):
        manifest.check_free_space(disk.folder, 10**15, "it")


def test_prepare_data_on_a_full_disk_goes_on_when_there_is_room(disk, text_store, tmp_path):
    store = disk.folder / "store"
    shutil.copytree(text_store / "documents", store / "documents")
    shutil.copytree(text_store / "tokenizer", store / "tokenizer")
    recipe = {
        "store": str(store),
        "tokenizer": {"vocab_size": VOCAB},
        "sources": {"first": {}, "second": {}},
    }
    recipe["decontaminate"] = {"test_sets": []}
    recipe["executor"] = {"workers": 1}
    write_json(tmp_path / "recipe.yaml", recipe)
    words = [
        sys.executable,
        "-m",
        "scripts.prepare_data",
        "--config",
        str(tmp_path / "recipe.yaml"),
    ]
    disk.leave(400 * KB)
    done = forked.run(words, env=one_thread())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "No space left on device" in last
        and "Free some space, then run the same command" in last
    )
    assert not (store / "tokens").exists()
    (disk.folder / "filler").unlink()
    done = forked.run(words, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert (store / "tokens" / "first" / "manifest.json").is_file()


TO_FULL = """
import os, runpy, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_output_to_a_full_disk_does_not_end_the_work(settings, tmp_path):
    """With stdout on /dev/full, the run finishes and saves; its last line reports lost output."""
    train = [str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "test_mode.yaml")]
    words = [sys.executable, "-c", TO_FULL, *train, *settings(steps=3)]
    done = forked.run(words, env=one_thread())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "No space left on device: the command has finished, but" in done.stderr
    assert steps(tmp_path / "checkpoints" / "one") == ["step_3"]


def test_the_last_flush_of_an_interpreter_to_a_full_disk_is_reported():
    code = "from cli import user_errors\nwith user_errors(): print('x' * 99)"
    with open("/dev/full", "w", encoding="utf-8") as full:
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"No space left on device: the command has finished, but 100 bytes" in done.stderr


# the log folder


def test_a_removed_log_folder_is_made_again_and_training_goes_on(
    settings, tmp_path, capfd, monkeypatch
):
    metrics = Log.metrics

    def losing(self, values, *more):
        if values["step"] == 4:
            shutil.rmtree(self.folder)
        metrics(self, values, *more)

    monkeypatch.setattr(Log, "metrics", losing)
    assert train_here(settings())
    assert [row["step"] for row in read_metrics(tmp_path / "logs")] == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / "checkpoints" / "one") == ["step_3", "step_6"]
    assert "was removed during the run; it was written again" in capfd.readouterr().out
    assert [event["event"] for event in read_lines(tmp_path / "logs" / "events.jsonl")] == ["ended"]


METRICS = {
    "loss": 1.0,
    "lr": 0.1,
    "grad_norm": 1.0,
    "tokens_per_s": 1.0,
    "phase": "p",
    "end": 99,
    "note": "x" * 300,
}


def test_a_log_that_cannot_be_written_waits_in_memory(tmp_path, disk, capfd):
    """A full disk raises nothing and leaves no partial line; rows are written later, in order."""
    folder = disk.folder / "logs"
    with Log(folder, LogConfig(), True, {"run": "r"}) as log:
        log.open(0, 99, "p")
        log.metrics({"step": 1, **METRICS})
        disk.leave(0)
        for step in range(2, 60):
            log.metrics({"step": step, **METRICS})
        log.event("skipped", "a step was not applied", step=59)
        assert len(read_lines(folder / "metrics.jsonl")) < 59
        assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert (
            capfd.readouterr().out.count(
                "is not writable (No space left on device); training continues"
            )
            == 1
        )
        (disk.folder / "filler").unlink()
        log.metrics({"step": 60, **METRICS})
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == list(range(1, 61))
    assert [event["event"] for event in read_lines(folder / "events.jsonl")] == ["skipped"]
    assert (folder / "training_log.md").read_text(encoding="utf-8").count("**skipped**") == 1


def test_rows_that_never_reach_the_disk_are_counted_at_the_end(tmp_path, disk, capfd):
    with Log(disk.folder / "logs", LogConfig(), True, {"run": "r"}) as log:
        log.open(0, 99, "p")
        disk.leave(0)
        for step in range(1, 60):
            log.metrics({"step": step, **METRICS})
        written = len(read_lines(disk.folder / "logs" / "metrics.jsonl"))
    assert (
        f"warning: {59 - written} rows and events from step {written + 1} on are missing from"
        in capfd.readouterr().out
    )


def test_samples_that_cannot_be_written_do_not_end_training(chats, tmp_path, capfd, monkeypatch):
    settings = [*chats("sft", tmp_path / "cache"), "chat.samples=[x]", "validation.before=true"]
    (tmp_path / "sft" / "logs" / "samples.md").mkdir(parents=True)
    monkeypatch.setattr(
        sys, "argv", ["x", "--config", str(ROOT / "configs" / "sft.yaml"), *settings]
    )
    with pytest.raises(SystemExit) as end:
        train_sft.main()
    assert (
        end.value.code == 0
        and "samples.md cannot be written (Is a directory)" in capfd.readouterr().out
    )
    assert steps(tmp_path / "sft") == ["step_2"]


def test_an_event_outside_training_still_complains(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError):
        append_event(tmp_path / "file", "gate")


# git, keys, cores


def test_without_git_everything_trains(settings, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert shutil.which("git") is None
    assert train_here(settings(steps=1))
    environment = json.loads(
        (tmp_path / "logs" / "one.environment.json").read_text(encoding="utf-8")
    )
    assert environment["git"] is None and environment["git_clean"] is None
    assert (tmp_path / "logs" / "git_commit_hash.txt").read_text(
        encoding="utf-8"
    ) == "no git checkout\n"


def test_a_wandb_that_cannot_be_used_is_a_sentence_before_the_model(
    settings, tmp_path, capfd, monkeypatch
):
    """A fake wandb answers as wandb 0.31 without a key; train.py calls it before building."""
    package = tmp_path / "fake" / "wandb"
    package.mkdir(parents=True)
    common = (
        "from types import SimpleNamespace\n"
        "def Settings(silent=False):\n    return SimpleNamespace(mode='online')\n"
        "def setup(settings=None):\n    return SimpleNamespace(settings=Settings())\n"
        "def termsetup(settings, logger):\n    pass\n"
        "def login(prompt=True):\n"
    )
    refuses = (
        "    if prompt:\n        raise RuntimeError('No API key configured. Use `wandb login` "
        "to log in.')\n    return False\n"
    )
    (package / "__init__.py").write_text(common + refuses, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(setup, "build", lambda *_, **__: pytest.fail("the model was built"))
    message = complaint(capfd, monkeypatch, settings("log.wandb_project=x"))
    assert (
        "W&B cannot be used (No API key configured" in message
        and "set WANDB_API_KEY, or set WANDB_MODE=offline" in message
    )
    assert not (tmp_path / "checkpoints").exists()
    (package / "__init__.py").write_text(common + "    return True\n", encoding="utf-8")
    del sys.modules["wandb"]  # the fake one, here and below
    log_in(LogConfig(wandb_project="x"))
    log_in(LogConfig())
    del sys.modules["wandb"]


@pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed; pip install -r requirements.txt"
)
def test_the_real_wandb_without_a_key_and_offline(tmp_path):
    code = "from training.logger import LogConfig, log_in\nfrom cli import user_errors\n"
    code += "with user_errors(): log_in(LogConfig(wandb_project='x')); print('ready')"
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    for more, status in (({}, 2), ({"WANDB_MODE": "offline"}, 0)):
        env = {**known, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), **more}
        done = forked.run([sys.executable, "-c", code], env=env)
        assert done.returncode == status and ("W&B cannot be used" in done.stderr) == bool(status)


def test_cores_are_those_of_the_affinity_and_the_cgroup(tmp_path, monkeypatch):
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    cases = [  # (/proc/self/cgroup, files below /sys/fs/cgroup, cores)
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, 64),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        (
            "4:cpu,cpuacct:/d\n",
            {
                "cpu,cpuacct/d/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, 64),
        ("", {}, 64),
    ]
    for cgroup, files, expected in cases:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        (tmp_path / "own").write_text(cgroup, encoding="utf-8")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content + "\n", encoding="utf-8")
        assert machine.cpus() == expected, (cgroup, files)


def test_threads_that_the_user_set_are_not_overridden(tmp_path, monkeypatch):
    from training.planning.pipeline import Pipeline
    from training.planning.plan import Plan, PlanPhase
    from training.planning.progress import Progress

    class Told:
        stopped = 0

        def run(self, program, environment) -> int:
            self.environment = environment
            return 0

    pipeline = Pipeline.__new__(Pipeline)
    pipeline.progress = Progress(Plan("x", (PlanPhase("configs/test_mode.yaml"),)), [])
    pipeline.supervisor = Told()
    pipeline.environment = os.environ
    for threads, expected in (("7", "7"), (None, str(machine.cpus()))):
        monkeypatch.setenv("OMP_NUM_THREADS", threads) if threads else monkeypatch.delenv(
            "OMP_NUM_THREADS"
        )
        pipeline.run_command("x", ["python", "-m", "scripts.plot_run"])
        assert pipeline.supervisor.environment["OMP_NUM_THREADS"] == expected


# other data, names, leftovers


def test_data_that_changed_on_purpose_are_not_one_long_spike(settings, tmp_path, capfd):
    """New data restarts the spike check, whose windows hold losses of the old data; logged."""
    strict = [
        "faults={window: 4, spike_sigma: 1e-9, bad_in_a_row: 2, max_rollbacks: 0}",
        "checkpoint.every=6",
    ]
    assert train_here(settings("faults={window: 4}", "checkpoint.every=6", steps=6))
    capfd.readouterr()
    changed = settings(
        "data.mix={first: 1}", "seed=9", "data.accept_changed=true", *strict, steps=9
    )
    assert train_here(changed)
    assert "the loss may jump; spike detection starts again after 4 steps" in capfd.readouterr().out
    events = read_lines(tmp_path / "logs" / "events.jsonl")
    assert not [event for event in events if event["event"] == "skipped"]
    fault_state = FaultState(
        losses=[1.0],
        norms=[2.0],
        bad_batches=[3],
        excluded_batches=[4],
        skipped=5,
        rollbacks=1,
        lr_scale=0.5,
        no_go="x",
    )
    assert fault_state.for_new_data() == FaultState(skipped=5, rollbacks=1, lr_scale=0.5, no_go="x")


@pytest.mark.parametrize("name", ["..", ".", "../x", "../..", "/x", "a/b", ""])
def test_a_run_or_a_source_whose_name_leaves_its_folder_is_refused(
    settings, tmp_path, capfd, monkeypatch, name
):
    for key in ("run", "phase"):
        assert "must be a plain folder name" in complaint(
            capfd, monkeypatch, settings(f"{key}={name}")
        )
    with pytest.raises(ValueError, match="must be a plain folder name"):
        manifest.load_or_prepare(tmp_path / "cache", name, {}, (), lambda folder: {})
    assert not (tmp_path / "cache").exists()


def test_only_leftovers_of_checkpoints_are_ever_removed(settings, tmp_path):
    """Partial step folders are removed from output_dir; draft.tmp/ and other user files stay."""
    folder = tmp_path / "checkpoints" / "one"
    user_files = ("draft.tmp", "step_by_step.tmp", "step_1b.replaced", "step_.tmp")
    ours = ("step_2.tmp", "step_7.tmp")
    for name in (*user_files, *ours):
        (folder / name).mkdir(parents=True)
        (folder / name / "text").write_text("mine", encoding="utf-8")
    (folder / "step_9.tmp").write_text("a file", encoding="utf-8")
    assert train_here(settings(steps=3))
    assert sorted(
        path.name for path in folder.iterdir() if path.suffix in (".tmp", ".replaced")
    ) == sorted([*user_files, "step_9.tmp"])


def test_temporary_files_of_processes_that_ended_are_swept(tmp_path):
    code = "from files import temporary\nfrom pathlib import Path\nimport sys\n"
    code += (
        "part = temporary(Path(sys.argv[1]) / 'rows-0123')\npart.mkdir()\n"
        "(part / 'x').write_text('x', encoding='utf-8')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    running = temporary(tmp_path / "mine")
    running.write_text("x", encoding="utf-8")
    elsewhere = (".rows.other-host.1.tmp", ".note.tmp", "draft.tmp", ".x.1.tmp")
    for name in elsewhere:
        (tmp_path / name).mkdir()
    assert len(list(tmp_path.iterdir())) == 6
    assert [path.name.startswith(".rows-0123.") for path in remove_stale(tmp_path)] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*elsewhere, running.name])


KILLED = """
import os, signal, sys
from pathlib import Path
from data import manifest
def prepare(folder):
    (folder / "x").write_text("x", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
manifest.load_or_prepare(Path(sys.argv[1]), "own", {}, (), prepare)
"""


def test_what_a_killed_preparation_leaves_is_swept_by_the_next_one(tmp_path, text_store):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert len(list(tmp_path.glob(".own-*.tmp"))) == 1
    save_tiny(tmp_path / "base", tiny_config(), text_store)
    cache_chat_tokenizer(tmp_path / "base", tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


DRIVER = """
import os, sys
from pathlib import Path
from training.ops.supervisor import Supervisor
Supervisor(Path(sys.argv[1]), 0, print).run(sys.argv[2:], os.environ)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_driver_leaves_no_stage_training(settings, tmp_path, ranks):
    """After SIGKILL of the driver, launcher and ranks save and end; so does a lone process.

    The rerun keeps every row of metrics.jsonl.
    """
    overrides = settings(
        "schedule.total_steps=100000", "checkpoint.every=100000", "validation.every=0", steps=90000
    )
    line = command(overrides, ranks)
    line = line if ranks > 1 else [sys.executable, *line[line.index(str(ROOT / "train.py")) :]]
    words = [sys.executable, "-c", DRIVER, str(tmp_path / "logs"), *line]
    driver = forked.Process(words, env=one_thread())
    try:
        logs = tmp_path / "logs" / "metrics.jsonl"
        wait_for(lambda: logs.is_file() and len(read_lines(logs)) > 3)
        stage = descendants(driver.pid)
        assert len(stage) == (3 if ranks == 2 else 1)  # a launcher and two ranks
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_for(lambda: not any(runs(process) for process in stage))
    rows = [row["step"] for row in read_metrics(tmp_path / "logs")]
    assert rows == list(range(1, len(rows) + 1))
    assert steps(tmp_path / "checkpoints" / "one") == [f"step_{len(rows)}"]


def wait_for(ready, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def descendants(process: int) -> list[int]:
    """Return the processes that a process and its descendants have started and not yet reaped."""
    lists = Path(f"/proc/{process}/task").glob("*/children")  # one of each thread
    children = [int(child) for path in lists for child in path.read_text("utf-8").split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


# locales


@pytest.fixture(scope="module")
def locales(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Environments of non-UTF-8 locales; locales that localedef cannot create are missing."""
    folder = tmp_path_factory.mktemp("locales")
    environments = {"ASCII": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}}
    for language, charset in (("en_US", "ISO-8859-1"), ("zh_CN", "GBK")):
        name = f"{language}.{charset}"
        if shutil.which("localedef"):
            subprocess.run(
                ["localedef", "-i", language, "-f", charset, str(folder / name)],
                capture_output=True,
            )
        if (folder / name).is_dir():
            environments[charset] = {"LOCPATH": str(folder), "LC_ALL": name}
    return {name: {"PYTHONUTF8": "0", **env} for name, env in environments.items()}


IN_ORDER = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    sys.argv = words[words[0] == "-m":]
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_files_and_output_are_the_same_in_an_ascii_locale(locales, chats, tmp_path):
    """Run SFT on text in many scripts, print and save its samples, and write its report page.

    ASCII fails wherever the locale's encoding is used for such text; others may decode it wrongly.
    """
    env = {**one_thread(), "PYTHONPATH": str(ROOT), **locales["ASCII"]}
    config = yaml.safe_load((ROOT / "configs" / "sft.yaml").read_text(encoding="utf-8"))
    config["chat"]["samples"] = [TEXT]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    sft = [
        str(ROOT / "train_sft.py"),
        "--config",
        str(tmp_path / "own.yaml"),
        *chats("sft", tmp_path / "cache"),
    ]
    sft.remove("chat.samples=[]")
    step = tmp_path / "sft" / "step_2"
    commands = [
        sft,
        [
            "-m",
            "scripts.test_generation",
            "--checkpoint",
            str(tmp_path / "base"),
            "--prompt",
            "x",
            "--max_new_tokens",
            "4",
        ],
        ["-m", "scripts.verify_checkpoint", str(step)],
        ["-m", "scripts.plot_run", str(tmp_path / "sft" / "logs")],
    ]
    words = [sys.executable, "-c", IN_ORDER, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-800:]
    assert f"> {TEXT}" in (tmp_path / "sft" / "logs" / "samples.md").read_text(encoding="utf-8")
    assert "·" in (tmp_path / "sft" / "logs" / "training_log.md").read_text(encoding="utf-8")


ROUND_TRIP = f"""
import locale, sys
from pathlib import Path
from cli import user_errors
from files import read_object, write_json, write_text
from yaml_file import read_yaml_file
folder, text = Path(sys.argv[1]), {TEXT!a}
with user_errors():
    assert locale.getencoding() == sys.argv[2]
    write_text(folder / "x.yaml", "key: " + text)
    write_json(folder / "x.json", {{"key": text}})
    assert read_yaml_file(folder / "x.yaml") == read_object(folder / "x.json") == {{"key": text}}
    print(text)
"""


@pytest.mark.parametrize("name", ["ISO-8859-1", "GBK"])
def test_yaml_and_json_files_are_the_same_in_other_locales(name, locales, tmp_path):
    if name not in locales:
        pytest.skip(f"localedef cannot make a locale of {name} here")
    words = [sys.executable, "-c", ROUND_TRIP, str(tmp_path), name]
    done = subprocess.run(words, capture_output=True, cwd=ROOT, env={**os.environ, **locales[name]})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.yaml").read_text(encoding="utf-8") == f"key: {TEXT}"


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "gb18030", "utf-8"])
def test_printing_never_fails_on_a_character(encoding):
    """Characters that the output encoding lacks, and lone surrogates, are escaped."""
    code = f"from cli import user_errors\nwith user_errors(): print({TEXT!r}, chr(0xD83D))"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and b"\\ud83d" in done.stdout, done.stderr
    assert done.stdout.decode(encoding).startswith("Gr")
