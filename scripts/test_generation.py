"""Let a checkpoint continue some text, word by word.

python -m scripts.test_generation --checkpoint checkpoints/quickstart/gold/step_1000 --prompt "The capital of"
"""

import argparse
import json
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from entrypoint import user_errors
from models.hf import load_hf
from models.sampling import Sampling
from models.text import stream_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a step folder, or any Hugging Face folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="one text or several")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest tokens, 0 from all")
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--stop", nargs="+", default=[], help="end before any of these texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with user_errors():
        if not (args.checkpoint / "config.json").is_file():
            raise ValueError(f"{args.checkpoint} is no checkpoint: it holds no config.json")
        sampling = Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)
        tokenizer = load_tokenizer(args.checkpoint)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_hf(args.checkpoint, dtype=torch.float32 if device == "cpu" else None, device=device)
        room = model.config.max_position_embeddings - args.max_new_tokens
        bos, ends = borders(args.checkpoint)
        for prompt in args.prompt:
            ids = [*bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
            if len(ids) > room:
                raise ValueError(f"the prompt has {len(ids)} tokens, more than {room}; shorten it or --max_new_tokens")
            how = {"stop_strings": args.stop, "stop_tokens": ends, "sampling": sampling, "seed": args.seed}
            print(f"> {prompt}\033[1m", end="", flush=True)
            for _, piece in stream_text(model, [ids], args.max_new_tokens, tokenizer.decode, **how):
                print(piece, end="", flush=True)
            print("\033[0m\n")


def borders(folder: Path) -> tuple[list[int], list[int]]:
    """The token that begins a text, if any, and those that end one, by a folder's config files."""
    files = (folder / "config.json", folder / "generation_config.json")
    config = {name: value for path in files if path.is_file() for name, value in json.loads(path.read_text()).items()}
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    return [] if bos is None else [bos], eos if isinstance(eos, list) else [] if eos is None else [eos]


if __name__ == "__main__":
    main()
