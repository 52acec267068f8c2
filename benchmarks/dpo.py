"""Measure DPO steps of ours and TRL's DPOTrainer: pairs per second, memory, cost of the reference.

    pip install -r requirements.txt -r requirements-parity.txt
    python -m benchmarks.dpo --output benchmarks/results/dpo.json    # a tiny model on a CPU
    python -m benchmarks.dpo --shape 1b --rounds 2    # 1.1B x 2,048 tokens in bf16, for a GPU

Both use the same pairs and weights. Each contender is a process; they take turns. The tokens are
random. Pairs of the tiny shape have hh-rlhf's lengths, those of the other up to a full row. Ours
reads batches through the loader and computes every metric. TRL uses its Trainer's defaults,
with our dtype and the same gradient checkpointing.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import machine, wait, write
from cli import CommandParser
from data import manifest
from data.chat.pair_batches import PairLoader, Pairs
from data.chat.preferences import ARRAYS
from data.dataloader import Prefetcher
from models.hf import read_hf_config, save_hf
from models.nanollama import ModelConfig, NanoLlama
from training import setup
from training.config import DataConfig, RunConfig
from training.fsdp_utils import ParallelConfig
from training.loop import backward, reduce
from training.optimizers import OptimConfig
from training.preference_losses import DPOConfig, preference
from training.reference import ReferenceLogps, build_reference, frozen_logps, sharded

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "length": 512,
        "pairs": 48,
        "batch": 4,
        "steps": 2,
        "dtype": "float32",
        "checkpointing": "none",
    },
    "1b": {
        "length": 2048,
        "pairs": 64,
        "batch": 4,
        "steps": 4,
        "dtype": "bfloat16",
        "checkpointing": "full",
    },
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CONTENDERS = ("ours", "ours_cpu_reference", "trl", "trl_precomputed")


def lengths_of(shape: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return the tokens of a prompt and two answers: hh-rlhf's log-normal, or uniform."""
    if shape == "tiny":
        prompt, first, second = (
            np.exp(rng.normal(np.log(median), spread))
            for median, spread in ((110, 0.8), (40, 0.8), (40, 0.8))
        )
        return (
            int(np.clip(prompt, 8, 256)),
            int(np.clip(first, 2, 250)),
            int(np.clip(second, 2, 250)),
        )
    return int(rng.integers(100, 1000)), int(rng.integers(50, 1000)), int(rng.integers(50, 1000))


def write_case(folder: Path, shape: str) -> None:
    """Write a model with random weights, prepared pairs and shape.json."""
    sizes, rng = SHAPES[shape], np.random.default_rng(0)
    config = (
        ModelConfig(**TINY, vocab_size=8192, max_position_embeddings=512)
        if shape == "tiny"
        else ModelConfig()
    )
    save_hf(
        folder / "model",
        config,
        NanoLlama(config, seed=0).state_dict(),
        torch.float32,
        bos=0,
        eos=1,
        pad=2,
    )
    ids, prompts = [], []
    for _ in range(sizes["pairs"]):
        prompt, *answers = lengths_of(shape, rng)
        prompt_ids = rng.integers(3, config.vocab_size, prompt)
        ids += [
            np.concatenate([prompt_ids, rng.integers(3, config.vocab_size, size)]).astype(np.uint32)
            for size in answers
        ]
        prompts.append(prompt)
    (folder / "pairs").mkdir()
    arrays = (
        np.concatenate(ids),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
        np.array(prompts),
    )
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / "pairs" / f"train.{name}.npy", array)
    manifest.write(folder / "pairs", {"report": {}, "sha256": {"train": "random"}})
    (folder / "shape.json").write_text(json.dumps(sizes), encoding="utf-8")


Pace = Callable[[], None]  # called after each step


def ours(folder: Path, device: torch.device, begin: Callable[[dict], Pace], reference: str) -> None:
    """Run the steps of training/loop.py."""
    shape, pairs = (
        json.loads((folder / "shape.json").read_text(encoding="utf-8")),
        {"pairs": Pairs(folder / "pairs", "train")},
    )
    run = RunConfig(
        model=read_hf_config(folder / "model"),
        init_from=str(folder / "model"),
        data=DataConfig(
            sequence_length=shape["length"], tokens_per_step=2 * shape["batch"] * shape["length"]
        ),
        parallel=ParallelConfig(
            dtype=shape["dtype"], activation_checkpointing=shape["checkpointing"]
        ),
        optim=OptimConfig(lr=1e-6, weight_decay=0.0, beta2=0.999),
    )
    loader = PairLoader(
        *(pairs, {"pairs": 1.0}, shape["length"], shape["batch"], shape["batch"], 0),
        multiple=64 if device.type == "cuda" else 1,
    )
    notes: dict[str, float] = {}
    start = clock(device)
    if reference == "cpu":
        frozen = build_reference(folder / "model", run.model)
        loader.reference = lambda names, batch: frozen_logps(frozen, batch)
    else:
        path, sizes = folder / "reference.safetensors", {"train/pairs": shape["pairs"]}
        cache = ReferenceLogps(path, {}, sizes)

        def make_reference() -> torch.nn.Module:
            return sharded(build_reference(folder / "model", run.model), run, device)

        count = cache.compute(
            make_reference, {"train": loader.steps(shape["pairs"] // shape["batch"])}
        )
        wait(device)
        seconds = clock(device) - start
        notes = {
            "reference_s_a_pair": seconds / max(1, count),
            "reference_peak_gb": peak_gb(device),
        }
        loader.reference = partial(cache.lookup, "train")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    state = setup.build(run, device)
    state.model.train()
    read, objective, batch_index = Prefetcher(loader, device), preference(DPOConfig()), 0
    done = begin(notes)
    while True:
        step = read.at(batch_index)
        sums, _ = backward(run, state.model, step, objective)
        reduce(sums, step.loss_denominator)
        state.optimizer.step()
        state.optimizer.zero_grad()
        batch_index += 1
        done()


def trl(
    folder: Path, device: torch.device, begin: Callable[[dict], Pace], precomputed: bool
) -> None:
    """Run DPOTrainer.train() on the same token ids."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, logging
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    logging.set_verbosity_error()
    disable_progress_bars()
    shape, pairs = (
        json.loads((folder / "shape.json").read_text(encoding="utf-8")),
        Pairs(folder / "pairs", "train"),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a")),
        pad_token="c",
        eos_token="b",
    )
    bf16 = shape["dtype"] == "bfloat16"
    load = partial(
        AutoModelForCausalLM.from_pretrained, folder / "model", attn_implementation="sdpa"
    )
    args = TRLConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=shape["batch"],
        max_steps=100_000,
        max_length=shape["length"] + 1,
        precompute_ref_log_probs=precomputed,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=shape["checkpointing"] == "full",
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    rows = []
    for index in range(shape["pairs"]):
        (chosen, rejected), prompt = pairs.read(index)
        ids = {
            "prompt_ids": chosen[:prompt],
            "chosen_ids": chosen[prompt:],
            "rejected_ids": rejected[prompt:],
        }
        rows.append({name: array.tolist() for name, array in ids.items()})

    class Ids(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    class Paced(TrainerCallback):
        def on_train_begin(self, *_, **__):
            wait(device)
            seconds = clock(device) - start
            notes = {"reference_s_a_pair": seconds / shape["pairs"]} if precomputed else {}
            self.done = begin(notes)

        def on_step_end(self, *_, **__):
            self.done()

    model, frozen = load(dtype=torch.float32), load(dtype=torch.bfloat16 if bf16 else torch.float32)
    start = clock(device)
    trainer = Ids(
        model, frozen, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.add_callback(Paced())
    trainer.train()


def clock(device: torch.device) -> float:
    """Return seconds; on a CPU the process's CPU time over its threads."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def peak_gb(device: torch.device) -> float:
    """Return the peak of GPU memory, or of this process's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def worker(name: str, folder: Path) -> None:
    """Run one contender: read a number of steps, run them, print seconds and peak memory."""
    output = sys.stdout
    sys.stdout = sys.stderr
    left, start = 0, 0.0
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # CPU time would count threads that wait for each other
    with setup.ranks() as device:

        def turn(notes: dict[str, float]) -> None:
            nonlocal left, start
            print(
                json.dumps({**notes, "s": clock(device) - start, "peak_gb": peak_gb(device)}),
                file=output,
                flush=True,
            )
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            left, start = int(line), clock(device)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                wait(device)
                turn({})

        def begin(notes: dict[str, float]) -> Pace:
            turn(notes)
            return done

        if name.startswith("ours"):
            ours(folder, device, begin, "cpu" if "cpu" in name else "precomputed")
        else:
            trl(folder, device, begin, "precomputed" in name)


def start(name: str, folder: Path) -> subprocess.Popen:
    code = (
        "from pathlib import Path; from benchmarks.dpo import worker; "
        f"worker({name!r}, Path({str(folder)!r}))"
    )
    log = open(folder / f"{name}.log", "w", encoding="utf-8")  # noqa: SIM115
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
    )


def answer(process: subprocess.Popen) -> dict[str, float]:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError("ended")
    return json.loads(line)


def turns(process: subprocess.Popen, steps: int) -> dict[str, float]:
    assert process.stdin
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return answer(process)


def measure(
    names: list[str], shape: str, rounds: int, folder: Path, alone: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each contender's figures. alone: one after another, if two exceed the GPU's memory."""
    write_case(folder, shape)
    steps, batch = SHAPES[shape]["steps"], SHAPES[shape]["batch"]
    for group in [[name] for name in names] if alone else [names]:
        processes = {name: start(name, folder) for name in group}
        measured: dict[str, dict[str, Any]] = {}
        for name, process in processes.items():
            try:
                measured[name] = {"startup": answer(process), "rounds": []}
            except RuntimeError:
                lines = (folder / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
                yield (
                    name,
                    {"not measured": lines[-1][:300] if lines else "ended without a message"},
                )
        for _ in range(rounds + 1):  # the first round is a warm-up
            for name in measured:
                measured[name]["rounds"].append(turns(processes[name], steps))
        for process in processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
        for name, figures in measured.items():
            rate = statistics.median(steps * batch / each["s"] for each in figures["rounds"][1:])
            reference = {
                key: value
                for key, value in figures["startup"].items()
                if key.startswith("reference")
            }
            memory = {
                "peak_gb": figures["rounds"][-1]["peak_gb"],
                "peak_gb_before_steps": figures["startup"]["peak_gb"],
            }
            yield name, {"pairs_per_s": rate, **memory, **reference}


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        **machine(device, "trl", "transformers"),
        "shape": {"name": args.shape, **SHAPES[args.shape]},
        "contenders": {},
    }
    result["unit"] = (
        "pairs per second of GPU time" if device.type == "cuda" else "pairs per second of CPU time"
    )
    with tempfile.TemporaryDirectory() as name:
        for contender, figures in measure(
            args.contenders, args.shape, args.rounds, Path(name), device.type == "cuda"
        ):
            result["contenders"][contender] = figures
            print(f"{contender:>20}  {figures}", flush=True)
    contenders = result["contenders"]
    for peer in ("trl", "trl_precomputed"):
        if "pairs_per_s" in contenders.get("ours", {}) and "pairs_per_s" in contenders.get(
            peer, {}
        ):
            ratio = {
                key: contenders["ours"][key] / contenders[peer][key]
                for key in ("pairs_per_s", "peak_gb")
            }
            result[f"ours over {peer}"] = ratio
            print(
                f"ours over {peer}: {ratio['pairs_per_s']:.2f} x the pairs per second, "
                f"{ratio['peak_gb']:.2f} x the memory"
            )
    write(args.output, result)


if __name__ == "__main__":
    main()
