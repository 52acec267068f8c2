"""Tokens a second of inference/generation.py and of transformers' generate on the same folder, in turns; with and without the cache.

bare_products: one step's matrix products alone, in torch's layout and in inference/packed_weights.py's: no step can take less.

python -m benchmarks.generation --checkpoint DIR --output benchmarks/results/generation.json
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cli import user_errors
from inference.generation import generate
from inference.packed_weights import LinearOps, head, packed, plain
from models.hf import load_hf, save_hf
from models.nanollama import ModelConfig, NanoLlama

TINY = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=5,
    num_attention_heads=4,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="*",
        default=[],
        help="Hugging Face folders; a tiny model comes first",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[32])
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256],
        help="new tokens, with and without the cache",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="our step of one token as a compiled graph"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch, for both"
    )
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
        "bare_products": [],
        "with_and_without_cache": [],
    }
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        tiny = NanoLlama(TINY, seed=0)
        save_hf(Path(scratch) / "tiny", tiny.config, tiny.state_dict(), torch.float32)
        for folder in (Path(scratch) / "tiny", *args.checkpoint):
            for dtype in args.dtype:
                for row in against(folder, DTYPES[dtype], args):
                    result[
                        "bare_products" if "milliseconds" in row else "against_transformers"
                    ].append(row)
                    print(json.dumps(row), flush=True)
                    save(result, args.output)
        result["with_and_without_cache"] = by_length(tiny.to(args.device), args.lengths, args.runs)
        print(json.dumps(result["with_and_without_cache"]), flush=True)
        save(result, args.output)


def save(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def against(folder: Path, dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch, length of prompt and count of new tokens one row of figures; before them the bare products."""
    from transformers import AutoModelForCausalLM

    model = load_hf(folder, dtype, args.device)
    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    other.generation_config.eos_token_id = None  # neither ends a row nor is forbidden
    for batch in args.batch:
        yield {
            "model": folder.name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            **bare(model, batch),
        }
        for prompt in args.prompt_tokens:
            for new in args.new_tokens:
                yield {
                    "model": folder.name,
                    **compare(model, other, dtype, (batch, prompt, new), args),
                }


def bare(model: NanoLlama, batch: int) -> dict[str, Any]:
    """CPU milliseconds of all matrix products of one step, and what they read of weights in GB a second."""
    ways = {"torch": plain(model), "packed": packed(model, batch)}
    dtype, device = head(model).dtype, head(model).device
    size, inner = model.config.hidden_size, model.config.intermediate_size
    attended = model.config.num_attention_heads * model.config.resolved_head_dim
    x, y, z = (
        torch.ones(batch, width, dtype=dtype, device=device) for width in (size, attended, inner)
    )

    def run(matrices: LinearOps) -> None:
        for layer in matrices.layers:
            layer.qkv(x), layer.out(y), layer.gate_up(x), layer.down(z)
        matrices.head(x)

    with torch.inference_mode():
        seconds = {
            way: statistics.median(timed(lambda: run(of))[1] for _ in range(20))
            for way, of in ways.items()
        }
    bytes_read = dtype.itemsize * sum(
        p.numel() for name, p in model.named_parameters() if "norm" not in name
    )
    bytes_read -= 0 if model.lm_head is None else dtype.itemsize * model.embed_tokens.weight.numel()
    return {
        "milliseconds": {way: round(1000 * time, 1) for way, time in seconds.items()},
        "gb_per_s": {way: round(bytes_read / time / 1e9, 1) for way, time in seconds.items()},
    }


def compare(
    model: NanoLlama, other: Any, dtype: torch.dtype, shape: tuple[int, int, int], args: Any
) -> dict[str, Any]:
    """New tokens a second, prompts included in the time, greedy; the ways take turns. equal: rows with the same tokens."""
    batch, prompt, new = shape
    prompts = torch.randint(
        3, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)
    )
    ids, lists = prompts.to(args.device), prompts.tolist()

    def theirs(new: int) -> list:
        how = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        return other.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, prompt:].tolist()

    ways: dict[str, Callable[[int], list]] = {
        "ours": lambda new: [
            row.tokens for row in generate(model, lists, new, compile=args.compile)
        ],
        "transformers": theirs,
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    tokens: dict[str, list] = {}
    for run in ways.values():
        run(8)  # a warm-up
    for _ in range(args.runs):
        for way, run in ways.items():
            seconds[way].append(timed(lambda: tokens.update({way: run(new)})))
    wall, cpu = (
        {way: statistics.median(time[i] for time in times) for way, times in seconds.items()}
        for i in (0, 1)
    )
    return {
        "parameters": model.config.num_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "tokens_per_s": {way: round(batch * new / time, 1) for way, time in wall.items()},
        "ratio": round(wall["transformers"] / wall["ours"], 2),
        "cpu_seconds": {way: round(time, 3) for way, time in cpu.items()},
        "cpu_ratio": round(cpu["transformers"] / cpu["ours"], 2),
        "equal": sum(
            mine == its for mine, its in zip(tokens["ours"], tokens["transformers"], strict=True)
        ),
    }


def by_length(model: NanoLlama, lengths: list[int], runs: int) -> list[dict[str, Any]]:
    """CPU seconds to write so many tokens greedily after a prompt of 8, with the cache and by reading all anew for each token."""
    prompt, found = list(range(8)), []
    for length in lengths:
        ways = {
            "with": lambda n: generate(model, [prompt], n),
            "without": lambda n: reread(model, prompt, n),
        }
        seconds = {
            way: statistics.median(timed(lambda: run(length))[1] for _ in range(runs))
            for way, run in ways.items()
        }
        found.append(
            {
                "new_tokens": length,
                "cpu_seconds": {way: round(value, 4) for way, value in seconds.items()},
            }
        )
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
