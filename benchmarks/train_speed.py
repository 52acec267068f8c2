"""Tokens a second, memory and MFU of whole training steps, ours and others', on the same weights, batches and precision.

    python -m benchmarks.train_speed                                        # CPU: the quickstart model, against peers
    python -m benchmarks.train_speed --config configs/phase1_pretrain.yaml --contenders ours plain \
        --vary data.sequence_length=4096,8192,16384 parallel.activation_checkpointing=none,selective
    torchrun --nproc_per_node=2 -m benchmarks.train_speed --config ...      # ours alone, on the ranks that torchrun made

A contender is NAME[:RANKS[:ROWS]], ROWS being its micro-batch; RANKS processes share the cores. All of one case are started
together and take turns (--one_by_one: a GPU has no room for that), so that a busy machine is busy for all. Losses must agree
while warming up, where compiling happens too. A step's time is the median of all rounds; ratios are medians over rounds.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.peers import CONTENDERS, Done, Work, missing
from cli import user_errors
from data.shards import ShardWriter
from data.store import DUMMY
from training import setup
from training.config import RunConfig, load
from training.meter import PEAK_FLOPS, flops_per_token
from training.planning.cost import CONTEXT, memory

GOALS = {
    4096: (50e3, 66e3, 78e3),
    8192: (40e3, 52e3, 60e3),
    16_384: (28e3, 37e3, 42e3),
}  # 1.1B, one H100: floor, goal, fp8
CONVENTION = (
    "share of 989 TFLOP/s, the dense bf16 peak of an H100 or H200 (other GPUs: training/meter.py); mfu_palm: 6 a matmul "
    "parameter + 12 * layers * width * length FLOPs a token; mfu_causal: attention halved. Recomputing counts as no work."
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss, between contenders, while warming up
CPU_PEERS = [
    "ours:2",
    "ours:1",
    "ours_documents:2",
    "hf:1",
    "hf:1:8",
    "hf:2",
    "plain:1",
    "plain:2",
    "litgpt:1",
    "liger:1",
]


# ---- one rank of one contender


class Pace:
    """Called after each step; when a round is over it reports, and waits for the next command: `go STEPS` or nothing more."""

    def __init__(
        self,
        device: torch.device,
        commands: Iterator[str],
        report: Callable[[dict], None],
        trace: bool = False,
    ):
        self.device, self.commands, self.report, self.trace = device, commands, report, trace
        self.profiler: torch.profiler.profile | None = None

    def begin(self) -> None:
        command = next(self.commands, "").split()
        if len(command) < 2 or command[0] != "go":
            raise Done
        self.left, self.losses, self.marks, self.busy = int(command[1]), [], [], []
        if self.trace and len(command) > 2:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        self._mark()

    def _mark(self) -> None:
        if self.device.type == "cuda":  # on the GPU's own clock, without waiting for it
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
            self.busy.append(time.process_time())

    def __call__(self, loss: torch.Tensor | float) -> None:
        self._mark()
        self.losses.append(loss)
        self.left -= 1
        if self.left:
            return
        pairs, busy = (
            itertools.pairwise(self.marks),
            [b - a for a, b in itertools.pairwise(self.busy)],
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in pairs]
            held = torch.cuda.max_memory_allocated(self.device) / 1e9
        else:
            times = [b - a for a, b in pairs]
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found: dict[str, Any] = {
            "seconds": times,
            "losses": [float(loss) for loss in self.losses],
            "memory_gb": held,
            "cpu_s": busy,
        }
        if self.profiler:
            self.profiler.stop()
            found["profile"] = operators(self.profiler, len(times), self.device.type == "cuda")
            self.profiler = None
        self.report(found)
        self.begin()


def operators(
    profiler: torch.profiler.profile, steps: int, cuda: bool, rows: int = 20
) -> list[dict[str, Any]]:
    """The operators that take longest by their own time: ms and calls a step, share of all."""
    events = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e)
        for e in profiler.key_averages()
    ]
    total = sum(time for time, _ in events) or 1
    events.sort(key=lambda pair: -pair[0])
    return [
        {
            "operator": e.key[:80],
            "ms": spent / 1e3 / steps,
            "calls": e.count / steps,
            "share": spent / total,
        }
        for spent, e in events[:rows]
    ]


def take_part(
    name: str, run: RunConfig, steps: int, pace_of: Callable[[torch.device], Pace]
) -> None:
    """Be the rank that the environment says, of a contender, until no more steps are asked for."""
    rank, world = setup.rank_and_world()
    with setup.ranks() as device:
        pace = pace_of(device)
        try:
            pace.begin()
            CONTENDERS[name](Work(run, device, rank, world, steps, pace))
        except Done:
            return
        raise RuntimeError(f"{name} ended by itself")


def worker(name: str, config: str, overrides: list[str], steps: int, trace: bool) -> None:
    """A process that Group started: commands come on stdin, reports go to stdout, one a line."""
    out = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed
    report = os.fdopen(out, "w", buffering=1, encoding="utf-8")

    def pace_of(device: torch.device) -> Pace:
        about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        }
        return Pace(
            device,
            iter(sys.stdin),
            lambda found: print(json.dumps({**found, **about}), file=report),
            trace,
        )

    take_part(name, load(config, overrides), steps, pace_of)
    setup.leave(0)


# ---- all contenders of one case


class Group:
    """The processes of one contender."""

    def __init__(
        self,
        spec: str,
        run: RunConfig,
        config: str,
        overrides: list[str],
        steps: int,
        trace: bool,
        folder: Path,
    ):
        self.spec = spec
        self.name, ranks, rows = ([*spec.split(":"), "", ""])[:3]
        self.ranks = int(ranks or 1)
        share = run.data.rows // self.ranks
        self.rows = int(rows or min(run.data.micro_batch_size, share))
        self.threads = max(1, (os.cpu_count() or 1) // self.ranks)
        self.warm: dict[str, Any] | None = None  # what the warm-up reported
        self.rounds: list[dict[str, Any]] = []
        self.traced: dict[str, Any] | None = None
        self.why: str | None = None
        more = [
            f"data.micro_batch_size={self.rows}",
            f"output_dir={folder / 'checkpoints'}",
            f"log_dir={folder / spec}",
        ]
        command = [
            sys.executable,
            "-m",
            "benchmarks.train_speed",
            "--worker",
            self.name,
            "--config",
            config,
        ]
        command += ["--total", str(steps), *(["--trace"] if trace else []), *overrides, *more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.errors, self.processes = open(folder / f"{spec}.err", "w+", encoding="utf-8"), []  # noqa: SIM115
        for rank in range(self.ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            given = {name: str(value) for name, value in (place if self.ranks > 1 else {}).items()}
            given |= {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
            pipe = subprocess.PIPE
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=self.errors,
                    text=True,
                    bufsize=1,
                    env={**os.environ, **given},
                    encoding="utf-8",
                )
            )

    def go(self, steps: int, trace: bool = False) -> dict[str, Any] | None:
        """Take steps; what each rank reports, put together. None where a process is gone: why then says how."""
        try:
            for process in self.processes:
                assert process.stdin
                process.stdin.write(f"go {steps}{' trace' if trace else ''}\n")
            reports = [
                json.loads(process.stdout.readline())
                for process in self.processes
                if process.stdout
            ]
        except (BrokenPipeError, json.JSONDecodeError):
            self.errors.seek(0)
            said = [line.strip() for line in self.errors if line.strip()] or [
                "a process ended without a word"
            ]
            memory = any("out of memory" in line.lower() for line in said)
            self.why = (
                "out of memory"
                if memory
                else next((x for x in reversed(said) if "Error" in x), said[-1])[:300]
            )
            self.stop()
            return None
        losses = [
            statistics.fmean(values)
            for values in zip(*(report["losses"] for report in reports), strict=True)
        ]
        busy = [
            sum(values) for values in zip(*(report["cpu_s"] for report in reports), strict=True)
        ]
        return {
            **reports[0],
            "losses": losses,
            "cpu_s": busy,
            "memory_gb": max(report["memory_gb"] for report in reports),
        }

    def stop(self) -> None:
        for process in self.processes:
            if process.stdin:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def prepare(run: RunConfig, steps: int, folder: Path) -> list[str]:
    """Overrides for a run of `steps` steps that saves nothing, on the config's own store or, without it, on random tokens."""
    own = all((Path(run.data.store) / "tokens" / name).is_dir() for name in run.data.mix) and bool(
        run.data.mix
    )
    given = [
        f"steps={steps + 1}",
        f"rope_theta={run.model.rope_theta}",
        "until=null",
        "resume_from=null",
        f"schedule={{warmup_steps: 20, total_steps: {steps + 21}, decay_steps: 0}}",
        "optim.z_weight=0",
        "checkpoint={every: 1000000000}",
        "validation.every=0",
        "startup.steps=0",
        "log={every: 1000000000}",
        f"data.store={Path(run.data.store).absolute() if own else folder / 'store'}",
    ]
    if own:
        return given
    length, rng = run.data.sequence_length, np.random.default_rng(run.seed)
    median, left = (
        600 if length <= 4096 else length // 4,
        (steps + 2) * run.data.tokens_per_step + length + 1,
    )
    with ShardWriter(
        folder / "store" / "tokens" / DUMMY, run.model.vocab_size, DUMMY, inputs={}
    ) as shards:
        while left > 0:
            document = int(np.clip(rng.lognormal(np.log(median), 1.05), 20, 200_000))
            shards.add("train", rng.integers(1, run.model.vocab_size, document, dtype=np.uint16))
            left -= document
    return [*given, f"data.mix={{{DUMMY}: 1.0}}", "data.min_document_tokens={}"]


def case(config: str, given: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one setting of the config."""
    steps_of_round = (
        -(-args.steps // args.rounds) + 1
    )  # the first of a round is not counted: caches are cold
    total = args.warmup + args.rounds * steps_of_round + (steps_of_round if args.profile else 0)
    run, cuda = load(config, given), torch.cuda.is_available()
    found: dict[str, Any] = {
        "settings": given,
        "parameters": run.model.num_parameters,
        **shape_of(run),
        "contenders": [],
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        overrides = [*given, *prepare(run, total, folder)]
        groups, absent = [], {}
        for spec in args.contenders:
            why = missing(spec.split(":")[0], "cuda" if cuda else "cpu")
            if why:
                absent[spec] = why
            else:
                groups.append(
                    (
                        spec,
                        lambda spec=spec: Group(
                            spec, run, config, overrides, total, args.profile, folder
                        ),
                    )
                )
        for turn in [[group] for group in groups] if args.one_by_one or cuda else [groups]:
            ready = [start() for _, start in turn]
            try:
                take_turns(ready, args, steps_of_round)
            finally:
                for group in ready:
                    group.stop()
            found["contenders"] += [result_of(group, run) for group in ready]
    found["contenders"] += [
        {"contender": spec, "not_measured": why} for spec, why in absent.items()
    ]
    compare(found, TOLERANCE[run.parallel.dtype if run.parallel.dtype in TOLERANCE else "bfloat16"])
    return found


def take_turns(groups: list[Group], args: argparse.Namespace, steps: int) -> None:
    for group in groups:
        group.warm = group.go(args.warmup)
    for number in range(args.rounds):
        for group in groups if number % 2 == 0 else reversed(groups):
            if not group.why and (round_ := group.go(steps)):
                group.rounds.append(round_)
    for group in groups:
        if args.profile and not group.why:
            group.traced = group.go(steps, trace=True)


def shape_of(run: RunConfig) -> dict[str, Any]:
    names = ("sequence_length", "tokens_per_step", "micro_batch_size")
    return {**{name: getattr(run.data, name) for name in names}, "dtype": run.parallel.dtype}


def result_of(group: Any, run: RunConfig) -> dict[str, Any]:
    """The figures of a contender, or why there are none."""
    about = {
        "contender": group.spec,
        "ranks": group.ranks,
        "threads": group.threads,
        "micro_batch_size": group.rows,
    }
    if group.why or not group.warm:
        return {**about, "not_measured": group.why}
    rounds = [statistics.median(found["seconds"][1:]) for found in group.rounds]
    seconds = statistics.median(second for found in group.rounds for second in found["seconds"][1:])
    rate, device = run.data.tokens_per_step / seconds, group.rounds[-1]["device"]
    result = {
        **about,
        "device": device,
        "step_s": seconds,
        "tokens_per_s": rate,
        "memory_gb": group.rounds[-1]["memory_gb"],
        "rounds_s": rounds,
        "warm_up_losses": group.warm["losses"],
    }
    if busy := [second for found in group.rounds for second in found["cpu_s"][1:]]:
        result["cpu_s"] = statistics.median(busy)
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in device), None)
    if peak:
        length = run.data.sequence_length
        for name, counted in (("mfu_palm", length), ("mfu_causal", length / 2)):
            result[name] = rate / group.ranks * flops_per_token(run.model, counted) / peak
        if group.name.startswith("ours"):
            own = replace(run, data=replace(run.data, micro_batch_size=group.rows))
            result["planner_gb"] = (
                memory(own, group.ranks).total - CONTEXT
            ) / 1e9  # torch does not count its context either
    if group.traced:
        result["profile"] = group.traced["profile"]
    return result


def compare(found: dict[str, Any], tolerance: float) -> None:
    """Ratios to the first contender that was measured, and whether losses agree with it."""
    measured = [result for result in found["contenders"] if "step_s" in result]
    for result in measured:
        first = measured[0]
        pairs = list(zip(first["warm_up_losses"], result["warm_up_losses"], strict=True))
        result["loss_apart"] = max(abs(a - b) / abs(a) for a, b in pairs)
        # its attention sees less, by design
        result["same_loss"] = (
            result["loss_apart"] <= tolerance if "documents" not in result["contender"] else None
        )
        result["first_is_faster_by"] = statistics.median(
            b / a for a, b in zip(first["rounds_s"], result["rounds_s"], strict=True)
        )


# ---- the command


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores of {name}"


def table(found: dict[str, Any]) -> str:
    """A case as text; goals stand beside the figures where the issue has any: 1.1B on one GPU."""
    what = f"{found['parameters']:,} parameters, rows of {found['sequence_length']:,}, {found['tokens_per_step']:,} tokens a step"
    lines = [f"{' '.join(found['settings']) or 'as configured'}: {what}, {found['dtype']}"]
    heads = (
        ("tokens/s", 10),
        ("ms/step", 9),
        ("CPU ms", 8),
        ("GB/rank", 7),
        ("MFU palm", 8),
        ("causal", 7),
        ("1st/this", 8),
        ("loss", 8),
    )
    lines.append(f"{'contender':20} " + " ".join(f"{name:>{width}}" for name, width in heads))
    for result in found["contenders"]:
        if "not_measured" in result:
            lines.append(f"{result['contender']:20} not measured: {result['not_measured']}")
            continue
        mfu = [
            f"{result[name]:.1%}" if name in result else "-" for name in ("mfu_palm", "mfu_causal")
        ]
        loss = {True: "same", False: "DIFFERS", None: "masked"}[result["same_loss"]]
        lines.append(
            f"{result['contender']:20} {result['tokens_per_s']:>10,.0f} {1e3 * result['step_s']:>9.1f} "
            f"{1e3 * result.get('cpu_s', 0):>8.1f} {result['memory_gb']:>7.2f} "
            f"{mfu[0]:>8} {mfu[1]:>7} {result['first_is_faster_by']:>8.2f} {loss:>9}"
            + (f"  planner {result['planner_gb']:.1f} GB" if "planner_gb" in result else "")
        )
        for row in result.get("profile", ()):
            lines.append(
                f"    {row['share']:>6.1%} {row['ms']:>8.2f} ms {row['calls']:>7.1f} calls  {row['operator']}"
            )
    if found["parameters"] > 1e9 and found["sequence_length"] in GOALS:
        floor, goal, fp8 = GOALS[found["sequence_length"]]
        lines.append(
            f"for ours on one H100: floor {floor:,.0f}, goal {goal:,.0f}, with fp8 {fp8:,.0f} tokens/s"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "liger-kernel",
        "litgpt",
        "lightning",
        "numpy",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def grid(vary: list[str]) -> list[list[str]]:
    """["a=1,2", "b=x"] -> [["a=1", "b=x"], ["a=2", "b=x"]]."""
    for option in vary:
        if "=" not in option:
            raise ValueError(
                f"--vary {option} must be a setting and its values, section.key=one,two"
            )
    return [
        list(one)
        for one in itertools.product(
            *([f"{o.split('=')[0]}={v}" for v in o.split("=")[1].split(",")] for o in vary)
        )
    ]


def on_these_ranks(args: argparse.Namespace, world: int) -> None:
    """Under torchrun: ours, each rank a process that is here already; rank 0 writes a case of that one contender."""
    name, *more_of_it = args.contenders
    if more_of_it or not name.startswith("ours") or ":" in name or args.vary or args.profile:
        raise ValueError(
            "under torchrun this measures --contenders ours or ours_documents alone, without --vary and --profile"
        )
    steps = -(-args.steps // args.rounds) + 1
    total = args.warmup + args.rounds * steps
    run = load(args.config, args.overrides)
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        more = [*prepare(run, total, folder), f"output_dir={folder}", f"log_dir={folder / 'log'}"]
        run = load(args.config, [*args.overrides, *more])
        commands = iter([f"go {args.warmup}", *[f"go {steps}"] * args.rounds])
        take_part(name, run, total, lambda device: Pace(device, commands, reports.append))
    if setup.rank_and_world()[0] == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
        rounds = [report | {"device": device} for report in reports[1:]]
        group = SimpleNamespace(
            spec=f"{name}:{world}", name=name, ranks=world, threads=torch.get_num_threads()
        )
        group.rows, group.why, group.warm, group.rounds, group.traced = (
            run.data.micro_batch_size,
            None,
            reports[0],
            rounds,
            None,
        )
        about = {"settings": args.overrides, "parameters": run.model.num_parameters}
        found = {**about, **shape_of(run), "contenders": [result_of(group, run)]}
        compare(found, 0.0)
        print(table(found))
        if args.output:
            write(args.output, [found])
    setup.leave(0)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; ValueError for a contender there is not. Settings may stand after any flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart/base.yaml")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME[:RANKS[:ROWS]]",
        help=", ".join([*CONTENDERS, "torchtitan"]),
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="section.key=a,b",
        help="a case for each combination",
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps before any is timed")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps that are timed, over all rounds"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--one_by_one", action="store_true", help="one contender at a time (always so on a GPU)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="then trace one more round, and say which operators take longest",
    )
    parser.add_argument("--output", type=Path, help="JSON with all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--total", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(given)
    words = args.contenders or []
    args.overrides += [word for word in words if "=" in word]
    args.contenders = [word for word in words if "=" not in word]
    if not args.contenders and setup.rank_and_world()[1] > 1:
        args.contenders = ["ours_documents"]
    if not args.contenders:
        args.contenders = (
            ["ours", "ours_documents", "hf", "plain"] if torch.cuda.is_available() else CPU_PEERS
        )
    for spec in args.contenders:
        name, *numbers = spec.split(":")
        if name not in (*CONTENDERS, "torchtitan"):
            raise ValueError(
                f"--contenders {spec} is not one of {', '.join([*CONTENDERS, 'torchtitan'])}"
            )
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(
                f"--contenders {spec} must be NAME, NAME:RANKS or NAME:RANKS:ROWS, with numbers of at least 1"
            )
    if min(args.warmup, args.steps, args.rounds) < 1:
        raise ValueError("--warmup, --steps and --rounds must be at least 1")
    return args


def main() -> None:
    with user_errors():
        args = parse()
    if args.worker:
        worker(args.worker, args.config, args.overrides, args.total, args.trace)
    with user_errors():
        _, world = setup.rank_and_world()
        if world > 1:
            on_these_ranks(args, world)
        cases = []
        for options in grid(args.vary):
            cases.append(case(args.config, [*args.overrides, *options], args))
            print(table(cases[-1]), "", sep="\n", flush=True)
            if args.output:
                write(args.output, cases)
    raise SystemExit(0 if all(map(whole, cases)) else 1)


def whole(found: dict[str, Any]) -> bool:
    """Was something measured, ours wherever it was asked for, and do all losses agree?"""
    results = found["contenders"]
    missed = [
        result
        for result in results
        if "not_measured" in result and result["contender"].startswith("ours")
    ]
    return (
        not missed
        and any("step_s" in r for r in results)
        and all(r.get("same_loss") is not False for r in results)
    )


def write(path: Path, cases: list[dict[str, Any]]) -> None:
    """All that is known so far: a command that is cut short leaves its whole cases."""
    command = "python -m benchmarks.train_speed " + shlex.join(sys.argv[1:])
    goals = {
        str(length): dict(zip(("floor", "goal", "fp8_goal"), three, strict=True))
        for length, three in GOALS.items()
    }
    about = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": cpu_name(),
        "versions": versions(),
    }
    about |= {"mfu": CONVENTION, "goals_tokens_per_s_1b_h100": goals}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
