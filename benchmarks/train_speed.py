"""Measure tokens per second, memory and MFU of training steps, ours and others'.

    python -m benchmarks.train_speed                              # CPU: quickstart model and peers
    python -m benchmarks.train_speed --config configs/phase1_pretrain.yaml \\
        --contenders ours plain \\
        --vary data.sequence_length=4096,8192,16384 parallel.activation_checkpointing=none,selective
    torchrun --nproc_per_node=2 -m benchmarks.train_speed    # ours alone

All contenders use the same weights, batches and precision. A contender is NAME[:RANKS[:ROWS]]: its
number of processes, which share the cores, and its micro-batch size. On a CPU the contenders of a
case take turns, which spreads other load evenly; on a GPU, or with --one_by_one, they run one after
another. Losses of the warm-up, which includes compilation, must agree. A step's time is the median
over all rounds; ratios are medians over rounds.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.peers import CONTENDERS, missing
from benchmarks.train_speed_ranks import Group, Pace, run_rank, worker
from benchmarks.train_speed_report import (
    compare,
    cpu_name,
    result_of,
    shape_of,
    succeeded,
    table,
    write,
)
from cli import CommandParser, user_errors
from data.shards import ShardWriter
from data.store import DUMMY
from training import setup
from training.config import RunConfig, load

TOLERANCE = {
    "float32": 1e-4,
    "bfloat16": 2e-2,
}  # of the warm-up losses between contenders, relative
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


def prepare(run: RunConfig, steps: int, folder: Path) -> list[str]:
    """Return overrides for `steps` steps without saves, on the config's store or random tokens."""
    has_store = all(
        (Path(run.data.store) / "tokens" / name).is_dir() for name in run.data.mix
    ) and bool(run.data.mix)
    settings = [
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
        f"data.store={Path(run.data.store).absolute() if has_store else folder / 'store'}",
    ]
    if has_store:
        return settings
    length, rng = run.data.sequence_length, np.random.default_rng(run.seed)
    median = 600 if length <= 4096 else length // 4
    remaining = (steps + 2) * run.data.tokens_per_step + length + 1
    with ShardWriter(
        folder / "store" / "tokens" / DUMMY, run.model.vocab_size, DUMMY, inputs={}
    ) as shards:
        while remaining > 0:
            document = int(np.clip(rng.lognormal(np.log(median), 1.05), 20, 200_000))
            shards.add("train", rng.integers(1, run.model.vocab_size, document, dtype=np.uint16))
            remaining -= document
    return [*settings, f"data.mix={{{DUMMY}: 1.0}}", "data.min_document_tokens={}"]


def measure_case(config: str, settings: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Measure all contenders with one set of overrides."""
    # The first step of a round is not counted, as caches are cold.
    steps_of_round = -(-args.steps // args.rounds) + 1
    total = args.warmup + args.rounds * steps_of_round + (steps_of_round if args.profile else 0)
    run, cuda = load(config, settings), torch.cuda.is_available()
    case: dict[str, Any] = {
        "settings": settings,
        "parameters": run.model.num_parameters,
        **shape_of(run),
        "contenders": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [*settings, *prepare(run, total, folder)]
        groups, absent = [], {}
        for spec in args.contenders:
            reason = missing(spec.split(":")[0], "cuda" if cuda else "cpu")
            if reason:
                absent[spec] = reason
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
            case["contenders"] += [result_of(group, run) for group in ready]
    case["contenders"] += [
        {"contender": spec, "not_measured": reason} for spec, reason in absent.items()
    ]
    compare(case, TOLERANCE[run.parallel.dtype if run.parallel.dtype in TOLERANCE else "bfloat16"])
    return case


def take_turns(groups: list[Group], args: argparse.Namespace, steps: int) -> None:
    """Run the rounds of all groups in turns, which spreads the machine's other load evenly."""
    for group in groups:
        group.warm = group.go(args.warmup)
    for number in range(args.rounds):
        for group in groups if number % 2 == 0 else reversed(groups):
            if not group.failure and (measurements := group.go(steps)):
                group.rounds.append(measurements)
    for group in groups:
        if args.profile and not group.failure:
            group.traced = group.go(steps, trace=True)


def grid(vary: list[str]) -> list[list[str]]:
    """Return all combinations: ["a=1,2", "b=x"] -> [["a=1", "b=x"], ["a=2", "b=x"]]."""
    for option in vary:
        if "=" not in option:
            raise ValueError(
                f"--vary {option} must be a setting and its values, section.key=one,two"
            )
    axes = []
    for option in vary:
        name, values = option.split("=")[:2]
        axes.append([f"{name}={value}" for value in values.split(",")])
    return [list(settings) for settings in itertools.product(*axes)]


def on_these_ranks(args: argparse.Namespace, world: int) -> None:
    """Measure ours on the ranks that torchrun started; rank 0 prints and writes the case."""
    name, *others = args.contenders
    if others or not name.startswith("ours") or ":" in name or args.vary or args.profile:
        raise ValueError(
            "under torchrun this measures --contenders ours or ours_documents alone, "
            "without --vary and --profile"
        )
    steps = -(-args.steps // args.rounds) + 1
    total = args.warmup + args.rounds * steps
    run = load(args.config, args.overrides)
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folders = [f"output_dir={folder}", f"log_dir={folder / 'log'}"]
        run = load(args.config, [*args.overrides, *prepare(run, total, folder), *folders])
        commands = iter([f"go {args.warmup}", *[f"go {steps}"] * args.rounds])
        run_rank(name, run, total, lambda device: Pace(device, commands, reports.append))
    if setup.rank_and_world()[0] == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
        rounds = [report | {"device": device} for report in reports[1:]]
        group = SimpleNamespace(
            spec=f"{name}:{world}",
            name=name,
            ranks=world,
            threads=torch.get_num_threads(),
            rows=run.data.micro_batch_size,
            failure=None,
            warm=reports[0],
            rounds=rounds,
            traced=None,
        )
        about = {"settings": args.overrides, "parameters": run.model.num_parameters}
        case = {**about, **shape_of(run), "contenders": [result_of(group, run)]}
        compare(case, 0.0)
        print(table(case))
        if args.output:
            write(args.output, [case])
    setup.exit_process(0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise ValueError for an unknown contender.

    Overrides may follow any flag.
    """
    parser = CommandParser(__doc__)
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
        help="measure every combination",
    )
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, over all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--one_by_one", action="store_true", help="one contender at a time (always on a GPU)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace one more round and list the slowest operators",
    )
    parser.add_argument("--output", type=Path, help="JSON with all figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--total", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
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
                f"--contenders {spec} must be NAME, NAME:RANKS or NAME:RANKS:ROWS, "
                "with numbers of at least 1"
            )
    if min(args.warmup, args.steps, args.rounds) < 1:
        raise ValueError("--warmup, --steps and --rounds must be at least 1")
    return args


def main() -> None:
    with user_errors():
        args = parse()
    if args.worker:
        worker(args.worker, args.config, args.overrides, args.total, args.trace)
    rank, world = setup.rank_and_world()
    with user_errors(rank, world):
        if world > 1:
            on_these_ranks(args, world)
        cases = []
        for options in grid(args.vary):
            cases.append(measure_case(args.config, [*args.overrides, *options], args))
            print(table(cases[-1]), "", sep="\n", flush=True)
            if args.output:
                write(args.output, cases)
    raise SystemExit(0 if all(map(succeeded, cases)) else 1)


if __name__ == "__main__":
    main()
