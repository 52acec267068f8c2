"""Several nodes: replicas, two launchers, Slurm, hangs, restarts; traces and memory."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import ROOT, VOCAB, command, one_thread, read_metrics, train_here
from test_training import losses, same_state, wait_for, wait_for_a_step

from models.nanollama import NanoLlama, TransformerBlock
from training.config import load
from training.fsdp_utils import ParallelConfig, wrap_model_fsdp
from training.ops import profiling
from training.ops.watchdog import LOST, HangWatchdog, exit_if_peer_lost

STEPS = 12


@pytest.fixture(scope="module")
def make(text_store, tmp_path_factory):
    """make(name, ...): overrides for a tiny run on text_store, in a folder of that name."""
    root = tmp_path_factory.mktemp("nodes")

    def make(name: str, *more: str, total: int = STEPS) -> list[str]:
        return [
            f"data.store={text_store}",
            "data.mix={first: 0.6, second: 0.4}",
            "data.micro_batch_size=2",
            f"model.vocab_size={VOCAB}",
            "model.num_hidden_layers=1",
            f"schedule={{warmup_steps: 2, total_steps: {total}, decay_steps: 4}}",
            "parallel.dtype=float32",
            "validation.every=0",
            "checkpoint={every: 3, keep: 9}",
            f"steps={total}",
            f"output_dir={root / name}",
            f"log_dir={root / name}-logs",
            *more,
        ]

    make.root = root  # type: ignore[attr-defined]
    return make


@pytest.fixture(scope="module")
def two_ranks(make) -> list[float]:
    """Losses of an uninterrupted run: one launcher, two ranks."""
    done = forked.run(command(make("two"), 2), env=one_thread())
    assert done.returncode == 0, done.stderr
    return losses(make.root / "two-logs")


FOUR = """
import json, sys
from train import pretrain
from training import setup
from training.config import load
rank, world = setup.rank_and_world()
with setup.ranks() as device:
    for overrides in json.loads(sys.argv[1]):
        assert pretrain(load("configs/test_mode.yaml", overrides), rank, world, device, False) == 0
setup.exit_process(0)
"""


@pytest.fixture(scope="module")
def two_by_two(make) -> Path:
    """Runs of four ranks, two replicas of two shards: folders z2 and z3, by strategy."""
    script = make.root / "four.py"
    script.write_text(FOUR)
    hsdp = "parallel.replicas=2"
    runs = [make(f"z{n}", hsdp, f"parallel.strategy=zero{n}") for n in (2, 3)]
    launch = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--nproc_per_node=4",
        str(script),
        json.dumps(runs),
    ]
    done = forked.run(launch, env={**one_thread(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return make.root


def test_replicas_of_shards_compute_what_one_rank_computes(make, two_by_two):
    assert train_here(make("one"))
    one = losses(two_by_two / "one-logs")
    assert len(one) == STEPS and one[0] - one[-1] > 0.1
    for name in ("z2", "z3"):
        assert losses(two_by_two / f"{name}-logs") == pytest.approx(one, abs=1e-5), name


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        (
            {"replicas": 3},
            4,
            r"parallel.replicas=3 does not divide 4 rank\(s\); use one of 1, 2, 4",
        ),
        ({"replicas": 8}, 4, r"does not divide 4 rank\(s\)"),
        ({"replicas": 0}, 4, "must be at least 1"),
        ({"timeout_s": 0}, 4, "timeout_s=0 must be above 0"),
        (
            {"replicas": 2, "strategy": "ddp"},
            4,
            "every rank is a replica; remove it, or use parallel.strategy=zero2",
        ),
    ],
)
def test_wrong_replicas_are_refused(monkeypatch, settings, world, message):
    monkeypatch.setattr("training.fsdp_utils.get_world_size", lambda: world)
    model = NanoLlama(load(ROOT / "configs" / "test_mode.yaml").model, seed=0)
    with pytest.raises(ValueError, match=message):
        wrap_model_fsdp(model, ParallelConfig(**settings), torch.device("cpu"))


SRUN = """#!/bin/bash
# Leaves the command of each "node" and its environment to the test, which forks it.
while [[ $1 == --* ]]; do shift; done
env -0 > "$JOB/environment"
printf '%s\\0' "$@" > "$JOB/command.tmp"
mv "$JOB/command.tmp" "$JOB/command"
for (( i = 0; i < 9000; i++ )); do
    [[ -f $JOB/status ]] && exit "$(< "$JOB/status")"
    sleep 0.02
done
exit 99
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


def test_the_slurm_script_on_two_nodes_goes_on_from_two_by_two(
    make, two_by_two, two_ranks, tmp_path
):
    """Two one-rank launchers meet by c10d and resume a four-rank checkpoint.

    They train like one launcher with two ranks.
    """
    batch = ROOT / "scripts" / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(batch)]).returncode == 0
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "RANKS_PER_NODE": "1",
    }
    environment = {
        **one_thread(),
        **job,
        "SLURM_JOB_NUM_NODES": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SCONTROL_LOG": str(tmp_path / "log"),
        "JOB": str(tmp_path),
    }
    resume = ["--resume_from", str(two_by_two / "z3" / "step_3")]
    arguments = ["--config", "configs/test_mode.yaml", *resume, *make("slurm")]
    script = subprocess.Popen(["bash", str(batch), *arguments], env=environment)
    try:
        wait_for(tmp_path / "command", 60)
        words, variables = (
            (tmp_path / name).read_text().rstrip("\0").split("\0")
            for name in ("command", "environment")
        )
        nodes = [
            forked.Process(
                words, env=dict(line.split("=", 1) for line in [*variables, f"SLURM_PROCID={node}"])
            )
            for node in (0, 1)
        ]
        output = "".join("".join(node.communicate(timeout=120)) for node in nodes)
        statuses = [node.returncode for node in nodes]
        (tmp_path / "status.tmp").write_text(str(max(statuses)))
        (tmp_path / "status.tmp").rename(tmp_path / "status")
        script.wait(60)
    finally:
        script.kill()
    assert statuses == [0, 0] and script.returncode == 0, output
    assert "2 cpu rank(s)" in output and f"from {two_by_two / 'z3' / 'step_3'}" in output
    rows = read_metrics(make.root / "slurm-logs")
    assert [row["step"] for row in rows] == list(range(4, STEPS + 1))
    assert [row["loss"] for row in rows] == pytest.approx(two_ranks[3:], abs=1e-5)
    # It received no stop signal, so it does not queue itself again.
    assert not (tmp_path / "log").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_sigterm_to_one_of_two_launchers_saves_on_all(make):
    port, overrides = free_port(), make("agents", "checkpoint.every=100000", total=100_000)
    flags = [
        "--nnodes=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=two",
    ]
    launch = command(overrides, 1)
    agents = [
        forked.Process([*launch[:3], *flags, *launch[3:]], env=one_thread()) for _ in range(2)
    ]
    wait_for_a_step(make.root / "agents-logs")
    agents[1].send_signal(signal.SIGTERM)
    output = "".join(agent.communicate(timeout=60)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [143, 143] and "2 cpu rank(s)" in output
    assert output.count("stopped by a signal and saved") == 1
    assert (
        make.root
        / "agents"
        / f"step_{len(read_metrics(make.root / 'agents-logs'))}"
        / "manifest.json"
    ).exists()


def test_a_rank_that_stops_responding_is_named_and_ends_the_run(make, rank=1):
    overrides = make(
        f"hang{rank}", "parallel.timeout_s=2", "checkpoint.every=100000", total=100_000
    )
    with forked.Process(command(overrides, 2), env=one_thread()) as process:
        wait_for_a_step(make.root / f"hang{rank}-logs")
        stopped = children(process)[rank]
        os.kill(stopped, signal.SIGSTOP)
        end = time.monotonic() + 60
        while "\nerror:" not in "\n" + process.stderr() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1.5)
        os.kill(stopped, signal.SIGKILL)  # torchrun does so too, 30 s after SIGTERM
        lines = iter(process.communicate(timeout=60)[1].splitlines())
        sentence = next(line for line in lines if line.startswith("error:"))
        rest = "\n".join(lines)
    assert "did not end within 2 s" in sentence and f"rank {rank} does not respond" in sentence
    assert "Traceback" not in rest and process.returncode == LOST
    folder = make.root / f"hang{rank}-logs" / "hang"
    assert "training/loop.py" in (folder / f"stacks_{1 - rank}.txt").read_text()
    assert (folder / f"collectives_{1 - rank}").stat().st_size > 100


def children(process: forked.Process) -> list[int]:
    """Return the processes of the ranks, in order."""
    listing = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    return sorted(int(pid) for pid in listing)


def test_the_cause_is_who_is_gone_else_who_is_behind_else_what_is_between():
    def cause(silent, *doing):
        return HangWatchdog._cause(None, silent, [text.split(" ", 1) for text in doing])

    computes, reads = "the computation", "reading the data"
    assert cause([1, 2], f"7 {computes}", f"7 {reads}", f"7 {reads}").startswith(
        "ranks 1, 2 do not respond"
    )
    assert "rank 1 is behind, in reading the data of step 7" in cause(
        [], f"7 {computes}", f"7 {reads}"
    )
    assert "rank 0 is behind, in the computation of step 9" in cause(
        [], f"9 {computes}", f"10 {reads}"
    )
    assert "every rank is alive" in cause([], f"7 {computes}", f"7 {computes}")


def test_a_lost_connection_is_told_from_other_errors(monkeypatch, capsys):
    monkeypatch.setattr("training.ops.watchdog.time.sleep", lambda seconds: None)
    monkeypatch.setattr(
        "training.ops.watchdog.os._exit", lambda status: (_ for _ in ()).throw(SystemExit(status))
    )
    for error in (
        RuntimeError("shape mismatch"),
        ValueError("Timed out"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        exit_if_peer_lost(error, 0)
    with pytest.raises(SystemExit, match=str(LOST)):
        exit_if_peer_lost(
            RuntimeError(
                "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
            ),
            0,
        )
    assert "error: rank 0 lost its connection to another rank" in capsys.readouterr().err


def test_a_killed_rank_is_started_again_by_itself_and_goes_on_bit_for_bit(make, two_ranks):
    launch = command(make("killed"), 2)
    launch.insert(3, "--max-restarts=1")
    with forked.Process(launch, env=one_thread()) as process:
        wait_for(make.root / "killed" / "step_3" / "manifest.json")
        os.kill(children(process)[1], signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (
        "starts from scratch" in output
        and "resumes at step" in output
        and "Traceback" not in errors
    )
    assert losses(make.root / "killed-logs") == two_ranks
    assert same_state(
        make.root / "killed" / f"step_{STEPS}", make.root / "two" / f"step_{STEPS}", make.root
    )


@pytest.mark.parametrize(
    "kernel, rows, ways", [("auto", 2, [[1]]), ("auto", 4, [[1, 2]]), ("varlen", 2, [[1], [2]])]
)
def test_a_dry_run_shows_kernels_that_take_starts_of_documents_two_counts_of_them(
    kernel, rows, ways, monkeypatch
):
    """torch.compile builds a second graph when the count changes; no timed step includes it."""
    seen = []
    monkeypatch.setattr(
        profiling,
        "backward",
        lambda run, model, step, _: seen.append([b.doc_ids.unique().numel() for b in step.batches]),
    )
    monkeypatch.setattr(profiling.dist, "get_world_size", lambda: 1)
    data = SimpleNamespace(micro_batch_size=2, sequence_length=8, rows=rows)
    run = SimpleNamespace(
        data=data,
        model=SimpleNamespace(kind="dense"),
        parallel=ParallelConfig(attention=kernel),
        optim=SimpleNamespace(z_weight=0.0),
    )
    state = SimpleNamespace(
        model=torch.nn.Linear(1, 1), optimizer=torch.optim.SGD([torch.zeros(1)])
    )
    assert profiling.dry_run(run, state, torch.device("cpu")) == 0 and seen == ways


def test_a_dry_run_changes_nothing(make, monkeypatch):
    assert train_here(make("dry"))
    shapes = []
    real = profiling.backward

    def watched(run, model, step, objective):
        shapes.extend(tuple(batch.tokens.shape) for batch in step.batches)
        return real(run, model, step, objective)

    with monkeypatch.context() as patched:
        patched.setattr(profiling, "backward", watched)
        assert train_here(make("dry-seen"))
    assert shapes == [(2, 64), (2, 64)]
    monkeypatch.setattr(profiling, "dry_run", lambda *_: 0.0)
    assert train_here(make("wet"))
    assert (
        losses(make.root / "dry-logs")
        == losses(make.root / "wet-logs")
        == losses(make.root / "dry-seen-logs")
    )
    assert same_state(
        make.root / "dry" / f"step_{STEPS}", make.root / "wet" / f"step_{STEPS}", make.root
    )


def test_no_memory_before_the_first_step_says_which_setting_to_change(make, monkeypatch):
    forward = TransformerBlock.forward

    def hungry(self, x, *rest):
        if self.training and x.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, x, *rest)

    monkeypatch.setattr(TransformerBlock, "forward", hungry)
    with pytest.raises(ValueError) as caught:
        train_here(make("hungry"))
    message = str(caught.value)
    assert (
        "rank 0 is out of memory with micro-batches of 2 rows of 64 tokens: set "
        "data.micro_batch_size=1" in message
    )
    assert "parallel.activation_checkpointing=selective" in message and "\n" not in message
    assert not (make.root / "hungry-logs" / "metrics.jsonl").exists()
    assert train_here(make("fed", "data.micro_batch_size=1"))  # the advice helps


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["data.micro_batch_size=4"], 2, "set data.micro_batch_size=2 "),
        (
            ["data.micro_batch_size=3", "data.tokens_per_step=384"],
            1,
            "set data.micro_batch_size=2 ",
        ),
        (
            ["data.micro_batch_size=1", "parallel.activation_checkpointing=selective"],
            1,
            "set parallel.activation_checkpointing=full",
        ),
        (
            ["data.micro_batch_size=1", "parallel.activation_checkpointing=full"],
            2,
            "set parallel.strategy=zero3",
        ),
        (
            [
                "data.micro_batch_size=1",
                "parallel.activation_checkpointing=full",
                "parallel.strategy=zero3",
            ],
            2,
            "more GPUs",
        ),
    ],
)
def test_advice_when_memory_runs_out(overrides, world, message):
    assert message in profiling.advice(load(ROOT / "configs" / "test_mode.yaml", overrides), world)


HUNGRY = """
import os, torch, train
from models.nanollama import TransformerBlock
forward, calls = TransformerBlock.forward, []
def hungry(self, *inputs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 20:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, *inputs)
TransformerBlock.forward = hungry
train.main()
"""


def test_no_memory_on_one_rank_ends_all_in_one_sentence(make, tmp_path):
    script = tmp_path / "hungry.py"
    script.write_text(HUNGRY)
    launch = [
        str(script) if part.endswith("train.py") else part for part in command(make("other"), 2)
    ]
    done = forked.run(launch, env={**one_thread(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "error: rank 1 is out of memory" in done.stderr
    assert "Traceback" not in done.stderr and read_metrics(make.root / "other-logs")


def test_a_trace_is_written_and_training_is_as_without(make, capfd, monkeypatch):
    import train

    rows = "data.micro_batch_size=8"  # one micro-batch: a short trace
    assert train_here(make("plain", rows))
    monkeypatch.setattr(
        train,
        "pretrain",
        lambda *arguments, pretrain=train.pretrain, **_: pretrain(*arguments[:4], False, True),
    )
    assert train_here(make("profiled", rows))
    assert losses(make.root / "profiled-logs") == losses(make.root / "plain-logs")
    printed = capfd.readouterr().out
    assert "ms/step" in printed and "aten::mm" in printed
    [path] = (make.root / "profiled-logs" / "profile").glob("*.rank0.trace.json.gz")
    names = [
        event.get("name", "")
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ]
    assert (
        len({name for name in names if name.startswith("ProfilerStep#")}) == profiling.ACTIVE
        and "aten::mm" in names
    )
    with pytest.raises(ValueError, match=r"--profile needs 6 steps, but .* has 3 left"):
        train_here(make("short", "until=3"))
