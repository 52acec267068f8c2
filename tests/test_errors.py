"""A user's mistake ends in one sentence and a non-zero status; nothing is lost."""

import errno
import json
import shutil
import sys

import forked
import pytest
from conftest import ROOT, VOCAB, complaint_of, one_thread, read_metrics, train_here, train_ranks
from safetensors import SafetensorError

import train
from cli import user_errors
from evals.run import eval_parser
from files import file_hash


def complaint(capfd, monkeypatch, arguments: list[str]) -> str:
    """Return the error of train.py's main."""
    return complaint_of(
        train.main,
        ["--config", ROOT / "configs" / "test_mode.yaml", *arguments],
        capfd,
        monkeypatch,
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=3", "optim.lrr is not a setting; did you mean 'lr'?"),
        ("data.sequence_length=128", "exceeds the model's context"),
        (
            "data.micro_batch_size=3",
            "8 rows per step do not divide over 1 rank(s) with micro-batches of 3",
        ),
        ("model.vocab_size=500", f"has {VOCAB} tokens but model.vocab_size=500"),
        ("data.mix={third: 1}", "has no such source; available: first, second"),
        ("data.store=nowhere", "no data store found at nowhere"),
        ("init_from=nowhere", "checkpoint nowhere does not exist"),
        ("resume_from=nowhere", "nowhere has no complete checkpoint"),
        ("log.wandb_project=x", "wandb is not installed"),
        ("parallel.compile=true", "torch.compile needs a compiler: install gcc"),
        ("parallel.activation_checkpointing=some", "is not one of none, selective, full"),
    ],
)
def test_one_sentence(settings, capfd, monkeypatch, override, expected):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert expected in complaint(capfd, monkeypatch, settings(override))


def test_a_missing_config_and_a_short_test(capfd, monkeypatch):
    assert "did you mean" in complaint(
        capfd, monkeypatch, ["--config", str(ROOT / "configs" / "test_mod.yaml")]
    )
    assert "--steps 5 is too few" in complaint(capfd, monkeypatch, ["--test_mode", "--steps", "5"])


def test_a_missing_shard(settings, text_store, tmp_path, capfd, monkeypatch):
    shutil.copytree(text_store, tmp_path / "store")
    (tmp_path / "store" / "tokens" / "first" / "train-00000.bin").unlink()
    message = complaint(capfd, monkeypatch, settings(f"data.store={tmp_path / 'store'}"))
    assert (
        "train-00000.bin is missing or truncated; restore it or run python -m scripts.prepare_data"
        in message
    )


def test_a_tokenizer_that_changed_under_the_shards_or_the_checkpoint(
    settings, text_store, tmp_path, capfd, monkeypatch
):
    assert train_here(settings(steps=1))
    shutil.copytree(text_store, tmp_path / "store")
    path = tmp_path / "store" / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "NFC"}}))
    message = complaint(capfd, monkeypatch, settings(f"data.store={tmp_path / 'store'}"))
    assert "do not match the store's tokenizer" in message
    for name in ("first", "second"):
        manifest = tmp_path / "store" / "tokens" / name / "manifest.json"
        content = json.loads(manifest.read_text())

        manifest.write_text(json.dumps({**content, "tokenizer": file_hash(path)}))
    message = complaint(capfd, monkeypatch, settings(f"data.store={tmp_path / 'store'}"))
    assert "was trained with another tokenizer" in message


def test_resuming_what_is_not_the_same_run(settings, capfd, monkeypatch, tmp_path):
    assert train_here(settings(steps=3))
    assert "the data, their mixture or the batch size changed" in complaint(
        capfd, monkeypatch, settings("seed=2")
    )
    changed = settings("seed=2", "data.accept_changed=true", steps=3)
    message = complaint(capfd, monkeypatch, changed)
    assert "changed since one was completed in" in message and "checkpoints/one away" in message
    message = complaint(capfd, monkeypatch, settings("model.num_hidden_layers=3"))
    assert "num_hidden_layers=2, but the config has 3" in message
    message = complaint(capfd, monkeypatch, settings("model.kind=moe"))
    assert "has model.kind=dense, but the config has moe" in message
    mixture = {"phase": "mixture", "steps": 2}
    logs = f"log_dir={tmp_path / 'logs_of_the_mixture'}"
    assert train_here(settings("model.kind=moe", logs, **mixture))
    message = complaint(capfd, monkeypatch, settings(logs, **mixture))
    assert "has model.kind=moe, but the config has dense" in message
    assert train_here(settings("data.tokens_per_step=256", "data.accept_changed=true", steps=4))
    resume = f"resume_from={tmp_path / 'checkpoints' / 'one'}"
    assert train_here(settings(resume, phase="two", steps=2))
    # The first phase is extended afterwards.
    longer = settings("data.tokens_per_step=256", steps=5)
    message = complaint(capfd, monkeypatch, longer)
    assert "one would start at step 4 and remove later metrics from" in message
    logs = tmp_path / "logs"
    rows = len(read_metrics(logs))
    assert train_here([*longer, f"log_dir={tmp_path / 'logs_of_more_steps'}"])
    assert len(read_metrics(logs)) == rows == 6
    message = complaint(capfd, monkeypatch, settings(resume, phase="two", steps=4))
    assert "did not start from" in message and "move" in message


def test_a_phase_begins_where_the_one_before_ends_and_never_after_the_schedule(
    settings, tmp_path, capfd, monkeypatch
):
    assert (
        "ends at step 13, but the learning-rate schedule ends at schedule.total_steps=12"
        in complaint(capfd, monkeypatch, settings(steps=13))
    )
    assert train_here(settings(steps=3))
    trainer = tmp_path / "checkpoints" / "one" / "step_3" / "state" / "trainer.json"
    # As if a signal had stopped the run.
    trainer.write_text(trainer.read_text().replace('"phase_end": 3', '"phase_end": 6'))
    manifest = trainer.parent.parent / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["files"]["state/trainer.json"] = file_hash(trainer)
    manifest.write_text(json.dumps(sums))
    folder = tmp_path / "checkpoints" / "one"
    message = complaint(capfd, monkeypatch, settings(f"resume_from={folder}", phase="two", steps=2))
    assert (
        "is step 3 of one, which ends at step 6; finish that phase, or branch off in a run of its "
        f"own: resume_from={folder / 'step_3'} start_step=3 run=NAME" in message
    )
    monkeypatch.chdir(tmp_path)
    branch = [f"resume_from={folder / 'step_3'}", "start_step=3", "run=NAME"]
    branch += ["output_dir=null", "log_dir=null"]
    assert train_here(settings(*branch, phase="two", steps=2))
    assert train_here(settings()) and len(read_metrics(tmp_path / "logs")) == 6


def test_ranks_that_do_not_fit_the_batch_end_without_a_traceback(settings):
    done = train_ranks(settings("data.tokens_per_step=192", "data.micro_batch_size=1"), ranks=2)
    assert (
        done.returncode == 2
        and done.stderr.count("error: 3 rows per step do not divide over 2 rank(s)") == 1
    )
    assert "Traceback" not in done.stderr


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    settings, tmp_path, capfd, monkeypatch
):
    """ENOSPC during a save leaves the older checkpoint and no partial folder."""
    assert train_here(settings(steps=3))
    folder = tmp_path / "checkpoints" / "one"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_safetensors(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("models.hf.save_file", full_safetensors)
        assert "could not be written" in complaint(capfd, patched, settings(steps=6))
    for target in (
        "training.checkpoint.save_hf",
        "torch.distributed.checkpoint.filesystem._write_item",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, full)
            assert "No space left on device" in complaint(capfd, patched, settings(steps=6))
        assert sorted(path.name for path in folder.glob("step_*")) == ["step_3"]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        assert "free some space or lower checkpoint.keep" in complaint(
            capfd, patched, settings(steps=6)
        )
    assert train_here(settings(steps=6))
    assert [row["step"] for row in read_metrics(tmp_path / "logs")] == [1, 2, 3, 4, 5, 6]


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"), user_errors():
        int("x")  # Python's ValueError has no advice for the user
    with pytest.raises(KeyError), user_errors():
        {}["x"]


def test_a_path_that_cannot_be_made_is_named(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for path, exist_ok in (
        (tmp_path / "file" / "folder", False),
        (tmp_path / "file", True),
        (tmp_path / "none" / "x", True),
    ):
        with pytest.raises(SystemExit) as exit_info, user_errors():
            path.mkdir(exist_ok=exist_ok)
        assert (
            exit_info.value.code == 2
            and "error: [Errno" in (message := capfd.readouterr().err)
            and str(path) in message
        )


@pytest.mark.parametrize("flag", ["--limit=0", "--limit=-1", "--batch_size=0", "--shots=-1"])
def test_numbers_that_are_too_small_are_refused(flag, capfd):
    with pytest.raises(SystemExit):
        eval_parser("x").parse_args(["--checkpoint", "x", flag])
    name, number = flag.split("=")
    limit = "must not be negative" if name == "--shots" else "must be at least 1"
    assert f"argument {name}: {number} {limit}" in capfd.readouterr().err


def test_evaluation_and_plan_commands_complain_in_one_line(tmp_path, text_store):
    recipe = ["--config", "configs/data/quickstart.yaml", f"store={tmp_path}"]
    cases = [
        (
            ["evals.eval_perplexity", "--checkpoint", str(tmp_path), "--dataset", str(text_store)],
            "is not a checkpoint",
        ),
        (["scripts.pipeline", "--plan", "nowhere.yaml"], "config file nowhere.yaml not found"),
        (
            ["scripts.test_generation", "--checkpoint", str(tmp_path), "--prompt", "x"],
            "is not a checkpoint",
        ),
        (["scripts.plot_run", str(tmp_path)], "has no metrics yet"),
        (["scripts.prepare_data", *recipe], "has no tokenizer.json"),
        (["scripts.train_tokenizer", *recipe], "run python -m scripts.download_data first"),
    ]
    for (module, *rest), expected in cases:
        done = forked.run([sys.executable, "-m", module, *rest], env=one_thread())
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, (
            module,
            done.stderr,
        )


def test_a_wrong_flag_ends_in_one_sentence():
    plain = [
        str(path.relative_to(ROOT))
        for path in [
            *ROOT.glob("*.py"),
            *(ROOT / "scripts").glob("*.py"),
            *(ROOT / "evals").rglob("*.py"),
        ]
        if "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")
    ]
    assert plain == []  # commands use CommandParser
    done = forked.run([sys.executable, "-m", "scripts.plan", "plan.yaml", "--gpus", "-1"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("error: argument --gpus: -1 ")
        and "--help lists the flags" in done.stderr
    )
