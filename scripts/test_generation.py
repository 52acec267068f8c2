"""Let a checkpoint continue some text, or, where it has learned to chat, answer: thoughts, tool calls and answer apart.

python -m scripts.test_generation --checkpoint checkpoints/quickstart/gold/step_1000 --prompt "The capital of"
python -m scripts.test_generation --checkpoint checkpoints/quickstart/sft/step_200 --prompt "What is 17 * 23?"

Each prompt of a chat model is a conversation of its own; tools really run, unless --no_tools. --raw continues the text instead.
"""

import argparse
import sys

import torch

from cli import CommandParser, add_boolean, at_least, user_errors
from data.chat.folder_templates import template_of
from data.tokenizers.bpe import load_tokenizer
from inference.chat_formats import borders, open_chat
from inference.runners import TorchRunner
from inference.streaming import stream_text
from models.hf import check_model_folder, load_hf, newest_step
from scripts.chat import add_flags, begin, sampling_of, show, trained_context


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=newest_step,
        help="a step or phase folder, or a Hugging Face one",
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="one text or several")
    add_boolean(parser, "--raw", "continue the text as it is, also by a chat model")
    parser.add_argument("--max_new_tokens", type=at_least(1), help="default: 60, of a reply 512")
    parser.add_argument(
        "--stop", nargs="+", default=[], help="end plain text before any of these texts"
    )
    add_flags(parser)
    args = parser.parse_args()
    with user_errors():
        check_model_folder(args.checkpoint)
        chats = template_of(args.checkpoint) and not args.raw
        args.max_new_tokens = (
            args.max_new_tokens if args.max_new_tokens is not None else 512 if chats else 60
        )
        if chats:
            converse(args)
        else:
            go_on(args)


def converse(args: argparse.Namespace) -> None:
    """Ask each prompt in a conversation of its own."""
    if args.stop:
        raise ValueError(
            "--stop is for plain text, a reply ends itself; leave it out, or add --raw"
        )
    try:
        chat = open_chat(args.checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}; or add --raw, to continue plain text") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runner = TorchRunner(args.checkpoint, device, trained_context(args.checkpoint))
    for prompt in args.prompt:
        print(f"> {prompt}")
        show(begin(chat, runner, args, args.checkpoint).ask(prompt))
        print()


def go_on(args: argparse.Namespace) -> None:
    """Continue each prompt as plain text."""
    tokenizer = load_tokenizer(args.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_hf(
        args.checkpoint, dtype=torch.float32 if device == "cpu" else None, device=device
    )
    context = model.config.max_position_embeddings
    bos, ends = borders(args.checkpoint)
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for prompt in args.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("--prompt is not valid UTF-8; save or type it as UTF-8") from None
        ids = [*bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        if len(ids) + args.max_new_tokens > context:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and --max_new_tokens {args.max_new_tokens} are more than the model's {context}; "
                "shorten one"
            )
        how = {
            "stop_strings": args.stop,
            "stop_tokens": ends,
            "sampling": sampling_of(args),
            "seed": args.seed,
        }
        print(f"> {prompt}{bold}", end="", flush=True)
        for _, piece in stream_text(model, [ids], args.max_new_tokens, tokenizer.decode, **how):
            print(piece, end="", flush=True)
        print(f"{plain}\n")


if __name__ == "__main__":
    main()
