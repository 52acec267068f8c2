"""Small plans for fault injection, and their comparison with an undisturbed plan.

A site is a working folder with texts, conversations, pairs, configs and a plan: data, pretraining,
a milestone with a gate, mid-training, SFT, DPO and GGUF export. Its paths are relative: equal work
writes equal bytes in each site.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fault_points import VARIABLE, Point, pids, write_hook
from benchmarks.fault_runs import HELD_OUT, ROOT, Ended, Failed
from data.manifest import file_hash
from files import read_lines, read_object, step_folders
from training.checkpoint_files import find_damage

PHASE_STEPS, STAGE_STEPS, MILESTONE = 12, {"midtrain": 6, "sft": 6, "dpo": 6}, 4
LOGS = {"one": "logs/tiny", **{name: f"logs/tiny/{name}" for name in STAGE_STEPS}}
STEPS = {"one": PHASE_STEPS, **STAGE_STEPS}
# Columns that differ between equal runs; "end" is the step at which the command pauses.
TIMES = ("step_s", "tokens_per_s", "data/wait_frac", "memory_gb", "mfu", "end")
FOLDERS = {
    "data": "store/tokens",
    "tokenizer": "store/tokenizer",
    "documents": "store/documents",
    "gguf": "gguf",
}
TOKENS = 512  # per step
VERIFIED = ".verified.json"  # files that record the times of other files
LEFTOVERS = re.compile(r"\.tmp|\.part$")  # in names of temporary files and folders
PATIENCE = 600.0  # timeout of a command, e.g. a full plan, seconds
GONE_AFTER = 30.0  # timeout for the end of all processes of a command, seconds

# Command, working folder, environment, output -> process.
Start = Callable[[list[str], Path, dict[str, str], Path], Any]


def start_here(
    command: list[str], folder: Path, environment: dict[str, str], output: Path
) -> subprocess.Popen:
    """Start a Python command. command: the words after `python`."""
    with open(output, "w", encoding="utf-8") as file:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        variables = {**os.environ, **environment}
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=variables, start_new_session=True, **streams
        )


@dataclass
class Site:
    """A working folder and the commands run in it."""

    folder: Path
    start: Start
    commands: int = 0
    ended: list[Ended] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)  # what ended each command

    @property
    def register(self) -> Path:
        """The folder in which the newest command's processes register."""
        return self.folder / "faults" / f"{self.commands:03}"

    def begin(self, command: str, *points: Point) -> Any:
        """Start a command, the words after `python`, without waiting for it."""
        self.commands += 1
        self.register.mkdir(parents=True)
        hook = self.folder / "faults" / "hook"
        write_hook(hook)
        paths = os.pathsep.join([str(hook), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        config = json.dumps({"folder": str(self.register), "points": points})
        environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", VARIABLE: config}
        return self.start(command.split(), self.folder, environment, self.register / "output.txt")

    def end(self, process: Any, settle: bool = True) -> Ended:
        """Wait for a command. settle: also wait for its processes; Failed if one stays."""
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = None
        output = (self.register / "output.txt").read_text(encoding="utf-8", errors="replace")
        self.ended.append(Ended(-1 if status is None else status, output))
        if status is None:
            kill_all(self.register)
            raise Failed(f"a command did not end within {PATIENCE:.0f} s: {output[-500:]}")
        if settle:
            self.settle(self.register)
        return self.ended[-1]

    def settle(self, register: Path) -> None:
        """Wait until all processes of a command have ended."""
        end = time.monotonic() + GONE_AFTER
        while left := pids(register):
            if time.monotonic() > end:
                names = [
                    path.name
                    for path in register.iterdir()
                    if path.name.partition(".")[0] in map(str, left)
                ]
                kill_all(register)
                raise Failed(f"processes did not end: {', '.join(names)}")
            time.sleep(0.02)

    def settle_all(self) -> None:
        for register in sorted((self.folder / "faults").glob("[0-9]*")):
            self.settle(register)

    def run(self, command: str, *points: Point, settle: bool = True) -> Ended:
        """Run a command and wait for it."""
        return self.end(self.begin(command, *points), settle)

    def run_faulty(self, command: str, *points: Point, settle: bool = True) -> Ended:
        """Run a command that must fail after all its points have acted."""
        ended = self.run(command, *points, settle=settle)
        acted = len(list(self.register.glob("point-*")))
        if ended.status == 0 or acted < len(points):
            summary = f"status {ended.status}, {acted} of {len(points)} faults acted"
            raise Failed(f"{summary}: {command}: {ended.output[-600:]}")
        self.faults.append({"command": command, "status": ended.status, "points": points})
        return ended

    def finish(self, command: str) -> Ended:
        """Run a command that must succeed."""
        ended = self.run(command)
        if ended.status:
            raise Failed(f"status {ended.status} without a fault: {command}: {ended.output[-800:]}")
        return ended

    def newest(self, phase: str) -> Path | None:
        folders = step_folders(self.folder / "checkpoints" / "tiny" / phase)
        return folders[-1] if folders else None


def kill_all(register: Path) -> None:
    for process in pids(register):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


# The plan of a site


def write_site(folder: Path, quick: bool) -> None:
    """Write texts, conversations, pairs, configs and the plan, with equal bytes each time."""
    rng = random.Random(5)
    words = [
        "".join(rng.choice("aeioulnrst") for _ in range(rng.randint(2, 7))) for _ in range(300)
    ]

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count)).capitalize() + "."

    sizes = (60, 120) if quick else (200, 120)
    for name in ("first", "second"):
        rows = [
            {"id": f"{name}/{i}", "text": " ".join(text(12) for _ in range(8))}
            for i in range(sizes[0])
        ]
        _write_rows(folder / "texts" / f"{name}.jsonl", rows)
    for name, seed in (("chats", 1), ("facts", 2)):
        chats = [
            [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(6)}]
            for _ in range(sizes[1])
        ]
        _write_rows(
            folder / f"{name}.jsonl",
            [{"id": f"{seed}-{i}", "messages": turns} for i, turns in enumerate(chats)],
        )
    pairs = [
        {"id": str(i), "prompt": text(4), "chosen": text(5), "rejected": text(5)}
        for i in range(sizes[1])
    ]
    _write_rows(folder / "pairs.jsonl", pairs)
    for name, content in _configs(quick).items():
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.utime(path, (1e9, 1e9))  # the documents' manifest records it


def _configs(quick: bool) -> dict[str, Any]:
    common = {
        "run": "tiny",
        "parallel": {"dtype": "float32"},
        "validation": {"every": 2, "rows": 8},
        "startup": {"steps": 0},
    }
    common["checkpoint"] = {"every": 2, "keep": 4, "asynchronous": True}
    layers, micro_batch_size = (1, 4) if quick else (2, 2)
    model = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64}
    model |= {
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    }
    data = {"store": "store", "mix": {"first": 0.6, "second": 0.4}, "sequence_length": 64}
    one = {
        "phase": "one",
        "steps": PHASE_STEPS,
        "model": model,
        "data": {**data, "tokens_per_step": 512, "micro_batch_size": micro_batch_size},
    }
    one["schedule"] = {"warmup_steps": 2, "total_steps": PHASE_STEPS, "decay_steps": 2}
    configs: dict[str, Any] = {"one.yaml": {**common, **one}}
    for name, rows in (("midtrain", "facts"), ("sft", "chats")):
        data = {
            "mix": {rows: 1},
            "sequence_length": 128,
            "tokens_per_step": 512,
            "micro_batch_size": 2,
        }
        chat = {
            "cache": "store/sft",
            "val_fraction": 0.1,
            "samples": [],
            "sources": {rows: {"path": f"{rows}.jsonl"}},
        }
        stage = {
            "phase": name,
            "steps": STAGE_STEPS[name],
            "chat": chat,
            "data": data,
            "optim": {"lr": 1e-3},
        }
        configs[f"{name}.yaml"] = {**common, **stage}
    source = {
        "cache": "store/pairs",
        "val_fraction": 0.1,
        "sources": {"pairs": {"path": "pairs.jsonl"}},
    }
    data = {"mix": {"pairs": 1}, "sequence_length": 128, "pairs_per_step": 4, "micro_batch_size": 4}
    dpo = {
        "phase": "dpo",
        "steps": STAGE_STEPS["dpo"],
        "preferences": source,
        "data": data,
        "optim": {"lr": 1e-4},
    }
    configs["dpo.yaml"] = {**common, **dpo}
    sources = {"first": {}, "second": {}}
    recipe = {
        "store": "store",
        "tokenizer": {"vocab_size": 384},
        "sources": sources,
        "val_fraction": 0.1,
    }
    recipe |= {"decontaminate": {"test_sets": []}, "executor": {"workers": 1 if quick else 2}}
    plan = _plan()
    tuned = {key: value for key, value in plan.items() if key not in ("before", "after")}
    judged = {key: value for key, value in tuned.items() if key != "stages"}
    plans = {"plan.yaml": plan, "tuned.yaml": tuned, "judged.yaml": judged}
    return {**configs, "recipe.yaml": recipe, **plans}


DOWNLOAD = "-m scripts.download_data --dataset texts/{0}.jsonl --name {0} --output_dir store"
TOKENIZER = "-m scripts.train_tokenizer --config recipe.yaml"
PREPARE = "-m scripts.prepare_data --config recipe.yaml"
EVALUATE = (
    "-m evals.eval_perplexity --checkpoint {checkpoint} --sequence_length 64 --tokens 1000 "
    "--device cpu --output {output}"
)
TUNE = (
    "-m scripts.launch --nproc_per_node=2 {script} --config {name}.yaml --base_model {checkpoint}"
)
EXPORT = (
    "-m scripts.export_gguf --checkpoint {checkpoint} --outtype f16,q8_0 "
    "--output gguf/tiny-{{outtype}}.gguf --threads 1"
)
PLAN, TUNED, JUDGED = (
    f"-m scripts.pipeline --plan {name}.yaml" for name in ("plan", "tuned", "judged")
)
TRAIN = f"-m scripts.launch --nproc_per_node=2 {ROOT}/train.py --config one.yaml"


def tune(name: str) -> str:
    """Return a stage's command, for a site with the previous stage."""
    before = dict(zip(STAGE_STEPS, STEPS, strict=False))[name]
    return _tune(name, f"checkpoints/tiny/{before}/step_{STEPS[before]}")


def _tune(name: str, checkpoint: str) -> str:
    return TUNE.format(
        script="train_dpo.py" if name == "dpo" else "train_sft.py", name=name, checkpoint=checkpoint
    )


def _plan() -> dict[str, Any]:
    gates = [{"metric": "all.perplexity", "go": 1e6, "no_go": 1e7}]
    before = {f"Texts {name}": f"python {DOWNLOAD.format(name)}" for name in ("first", "second")}
    before |= {"Tokenizer": f"python {TOKENIZER}", "Shards": f"python {PREPARE}"}
    stages = [
        {
            "name": name,
            "output_dir": f"checkpoints/tiny/{name}",
            "commands": {name: f"python {_tune(name, '{checkpoint}')}"},
        }
        for name in STAGE_STEPS
    ]
    phases = [{"config": "one.yaml", "milestones": [{"step": MILESTONE, "gates": gates}]}]
    plan = {
        "name": "tiny",
        "ranks": 2,
        "before": before,
        "evals": {"held_out": f"python {EVALUATE}"},
        "phases": phases,
    }
    return {**plan, "stages": stages, "after": {"GGUF": f"python {EXPORT}"}}


# Comparison


def curve(site: Site, phase: str) -> list[dict[str, Any]]:
    """Return a phase's rows of metrics.jsonl, without times."""
    rows = read_lines(site.folder / LOGS[phase] / "metrics.jsonl")
    rows = [row for row in rows if row["phase"] == phase]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def checksums(site: Site, part: str) -> dict[str, str]:
    """Return path -> sha256 of the files of a phase, a stage, or one of FOLDERS."""
    folder = site.folder / FOLDERS.get(part, f"checkpoints/tiny/{part}")
    if part in STEPS:
        folder = folder / f"step_{STEPS[part]}"
        if problem := find_damage(folder):
            raise Failed(f"{folder.name} of {part} is damaged: {problem}")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if not path.name.endswith(VERIFIED)]
    return {f"{part}/{path.relative_to(folder)}": file_hash(path) for path in paths}


def judged(site: Site) -> list[Any]:
    """Return the decision at the milestone and its measurements."""
    folder = site.folder / "results" / "tiny" / f"step_{MILESTONE}"
    measured = read_object(folder / "held_out.json") or {}
    return [read_object(folder / "decision.json"), measured.get("metrics"), measured.get("of")]


@dataclass
class Comparison:
    """Comparison of a site with faults and the undisturbed site."""

    lost: int  # tokens of steps that metrics.jsonl lacks
    repeated: int  # tokens of steps that metrics.jsonl holds twice
    curve: bool | None  # all rows equal except times; None without training
    differing: list[str]  # files
    files: int
    left: list[str]  # temporary files and folders
    unmeasured: int  # steps whose held-out loss only the other site has

    @property
    def holds(self) -> bool:
        equal = self.curve is not False and not self.differing and self.files > 0
        return equal and not (self.lost or self.repeated or self.left)

    def cells(self) -> tuple[str, str, str, str]:
        tokens = "no training"
        if self.curve is not None:
            tokens = f"{self.lost} / {self.repeated}, {'same' if self.curve else 'OTHER'} batches"
        curve = {None: "", True: "equal, bitwise", False: "DIFFERENT"}[self.curve]
        if self.unmeasured:
            curve += f", {self.unmeasured} held-out loss(es) not measured"
        equal = f"equal, bitwise ({self.files} files)"
        files = f"DIFFERENT: {', '.join(self.differing[:3])}" if self.differing else equal
        return "yes", tokens, curve, f"{files}; LEFT {self.left[:3]}" if self.left else files


def compare_sites(site: Site, reference: Site, *parts: str, since: int = 0) -> Comparison:
    """Compare parts of two sites. since: ignore rows of metrics.jsonl up to this step."""
    files, differing, lost, repeated, unmeasured = 0, [], 0, 0, 0
    equal: list[bool] = []
    for part in parts:
        if part == "decision":
            files += 2
            differing += (
                ["decision"] if judged(site) != judged(reference) or None in judged(site) else []
            )
            continue
        hashes, expected_hashes = checksums(site, part), checksums(reference, part)
        files += len(expected_hashes)
        differing += sorted(
            name
            for name in hashes.keys() | expected_hashes.keys()
            if hashes.get(name) != expected_hashes.get(name)
        )
        if part in STEPS:
            rows, expected = (
                [row for row in curve(each, part) if row["step"] > since]
                for each in (site, reference)
            )
            steps, expected_steps = (
                Counter(row["step"] for row in curve_rows) for curve_rows in (rows, expected)
            )
            lost += (expected_steps - steps).total() * TOKENS
            repeated += (steps - expected_steps).total() * TOKENS
            for row, target in zip(rows, expected, strict=False):
                if HELD_OUT in target and not any(key.startswith("val/") for key in row):
                    unmeasured += 1  # a signal stopped training at this step
                    for key in [key for key in target if key.startswith("val/")]:
                        del target[key]
            equal.append(rows == expected)
    leftovers = [path for path in site.folder.rglob("*") if LEFTOVERS.search(path.name)]
    left = [str(path.relative_to(site.folder)) for path in leftovers]
    return Comparison(
        lost, repeated, all(equal) if equal else None, differing, files, left, unmeasured
    )


@dataclass
class Sites:
    """The sites of a table, and the undisturbed site that they share."""

    folder: Path
    start: Start
    quick: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    undisturbed: Site | None = None

    def reference(self) -> Site:
        """Return the undisturbed site; its plan runs once."""
        with self.lock:
            if self.undisturbed is None:
                self.undisturbed = self._new("undisturbed")
                self.undisturbed.finish(PLAN)
            elif self.undisturbed.ended[-1:] and self.undisturbed.ended[-1].status:
                raise Failed("the undisturbed plan failed")
            return self.undisturbed

    def site(self, name: str, *copied: str) -> Site:
        """Create a site with copies of some folders of the undisturbed site."""
        reference, site = self.reference(), self._new(name)
        for path in copied:
            ignored = shutil.ignore_patterns(*STAGE_STEPS) if path == "logs/tiny" else None
            shutil.copytree(reference.folder / path, site.folder / path, ignore=ignored)
        return site

    def _new(self, name: str) -> Site:
        site = Site(self.folder / name, self.start)
        write_site(site.folder, self.quick)
        return site
