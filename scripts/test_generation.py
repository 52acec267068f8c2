"""Let a checkpoint continue some text, through transformers: what loads here loads everywhere.

python -m scripts.test_generation --checkpoint checkpoints/quickstart/gold/step_1000 --prompt "The capital of"
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from entrypoint import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a step folder, or any Hugging Face folder")
    parser.add_argument("--prompt", required=True, nargs="+", help="one text or several")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with user_errors():
        if not (args.checkpoint / "config.json").is_file():
            raise ValueError(f"{args.checkpoint} is no checkpoint: it holds no config.json")
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # seconds to import: after the checks

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        model: Any = AutoModelForCausalLM.from_pretrained(args.checkpoint)
        room = model.config.max_position_embeddings - args.max_new_tokens
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
        for prompt in args.prompt:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
            if ids.shape[1] > room:
                raise ValueError(f"the prompt has {ids.shape[1]} tokens, more than {room}; shorten it or --max_new_tokens")
            torch.manual_seed(args.seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, **sampling)
            print(f"> {prompt}\033[1m{tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}\033[0m\n")


if __name__ == "__main__":
    main()
