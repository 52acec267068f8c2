"""Tokens a second of models/generation.py and of transformers' generate on the same folder, in turns; with and without the cache.

python -m benchmarks.generation --checkpoint DIR --output benchmarks/results/generation.json
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from entrypoint import user_errors
from models.generation import generate, head
from models.hf import load_hf, save_hf
from models.nanollama import ModelConfig, NanoLlama

TINY = ModelConfig(vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[], help="Hugging Face folders; a tiny model comes first")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256], help="new tokens, with and without the cache")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="our step of one token as a compiled graph")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.generation", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": gpu or f"{platform.machine()} CPU, {args.threads} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "against_transformers": [],
        "with_and_without_cache": [],
    }
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        tiny = NanoLlama(TINY, seed=0)
        save_hf(Path(scratch) / "tiny", tiny.config, tiny.state_dict(), torch.float32)
        for folder in (Path(scratch) / "tiny", *args.checkpoint):
            for dtype in args.dtype:
                for batch in args.batch:
                    result["against_transformers"].append(row := against(folder, DTYPES[dtype], batch, args))
                    print(json.dumps(row), flush=True)
        result["with_and_without_cache"] = by_length(tiny.to(args.device), args.lengths, args.runs)
        print(json.dumps(result["with_and_without_cache"]), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=2) + "\n")


def against(folder: Path, dtype: torch.dtype, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """New tokens a second, prompts included in the time, greedy; the ways take turns. equal: rows with the same tokens."""
    from transformers import AutoModelForCausalLM

    model = load_hf(folder, dtype, args.device)
    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    prompts = torch.randint(3, model.config.vocab_size, (batch, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    ids, lists = prompts.to(args.device), prompts.tolist()
    how = {"do_sample": False, "min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "pad_token_id": 0}
    ways: dict[str, Callable[[], list]] = {
        "ours": lambda: [row.tokens for row in generate(model, lists, args.new_tokens, compile=args.compile)],
        "transformers": lambda: other.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.shape[1] :].tolist(),
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    tokens = {way: run() for way, run in ways.items()}  # and a warm-up
    for _ in range(args.runs):
        for way, run in ways.items():
            seconds[way].append(timed(run))
    wall, cpu = ({way: statistics.median(time[i] for time in times) for way, times in seconds.items()} for i in (0, 1))
    return {
        "model": folder.name,
        "parameters": model.config.num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens_per_s": {way: round(batch * args.new_tokens / time, 1) for way, time in wall.items()},
        "ratio": round(wall["transformers"] / wall["ours"], 2),
        "cpu_seconds": {way: round(time, 3) for way, time in cpu.items()},
        "cpu_ratio": round(cpu["transformers"] / cpu["ours"], 2),
        "equal": sum(ours == theirs for ours, theirs in zip(*tokens.values(), strict=True)),
    }


def by_length(model: NanoLlama, lengths: list[int], runs: int) -> list[dict[str, Any]]:
    """CPU seconds to write so many tokens greedily after a prompt of 8, with the cache and by reading all anew for each token."""
    prompt, found = list(range(8)), []
    for length in lengths:
        ways = {"with": lambda n: generate(model, [prompt], n), "without": lambda n: reread(model, prompt, n)}
        seconds = {way: statistics.median(timed(lambda: run(length))[1] for _ in range(runs)) for way, run in ways.items()}
        found.append({"new_tokens": length, "cpu_seconds": {way: round(value, 4) for way, value in seconds.items()}})
    return found


@torch.no_grad()
def reread(model: NanoLlama, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt], device=head(model).device)
    for _ in range(count):
        logits = model(tokens)
        assert isinstance(logits, torch.Tensor)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt) :].tolist()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time, which other programs disturb less; a GPU is done by then."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    main()
