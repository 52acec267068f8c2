"""Generate text with a checkpoint: a continuation from a base model, a reply from a chat model.

python -m scripts.test_generation --checkpoint checkpoints/quickstart/gold \\
    --prompt "The capital of"
python -m scripts.test_generation --checkpoint checkpoints/quickstart/sft \\
    --prompt "What is 17 * 23?"

Each prompt to a chat model starts a new conversation. Thoughts, tool calls and the answer are
printed separately. Tools are executed, unless --no_tools. --raw continues the prompt as plain text.
"""

import argparse
import sys

import torch

from cli import CommandParser, add_boolean, int_at_least, user_errors
from data.chat.folder_templates import template_of
from data.tokenizers.bpe import load_tokenizer
from inference.chat_formats import bos_and_stop_ids, open_chat_format
from inference.open_model import trained_context
from inference.runners import TorchRunner
from inference.streaming import stream_text
from inference.terminal import add_flags, open_session, print_turn, sampling_of
from machine import default_device
from models.hf import check_model_folder, load_hf, resolve_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=resolve_checkpoint,
        help="a step or phase folder, or a Hugging Face folder",
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    add_boolean(parser, "--raw", "continue the prompt as plain text, even with a chat model")
    parser.add_argument(
        "--max_new_tokens",
        type=int_at_least(1),
        help="token limit (default: 60; 512 for a chat reply)",
    )
    parser.add_argument(
        "--stop", nargs="+", default=[], help="stop strings of a plain-text continuation"
    )
    add_flags(parser)
    args = parser.parse_args()
    with user_errors():
        check_model_folder(args.checkpoint)
        chats = template_of(args.checkpoint) and not args.raw
        if args.max_new_tokens is None:
            args.max_new_tokens = 512 if chats else 60
        if chats:
            print_replies(args)
        else:
            print_continuations(args)


def print_replies(args: argparse.Namespace) -> None:
    """Answer each prompt in a new conversation."""
    if args.stop:
        raise ValueError("--stop applies to plain text only; omit it or add --raw")
    try:
        chat = open_chat_format(args.checkpoint)
    except ValueError as error:
        raise ValueError(f"{error}; or add --raw, to continue plain text") from error
    device = default_device()
    runner = TorchRunner(args.checkpoint, device, trained_context(args.checkpoint))
    for prompt in args.prompt:
        print(f"> {prompt}")
        print_turn(open_session(chat, runner, args, args.checkpoint).ask(prompt))
        print()


def print_continuations(args: argparse.Namespace) -> None:
    """Continue each prompt as plain text."""
    tokenizer = load_tokenizer(args.checkpoint)
    device = default_device()
    dtype = torch.float32 if device == "cpu" else None
    model = load_hf(args.checkpoint, dtype=dtype, device=device)
    context = model.config.max_position_embeddings
    bos, stop_tokens = bos_and_stop_ids(args.checkpoint)
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for prompt in args.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("--prompt is not valid UTF-8; save or type it as UTF-8") from None
        ids = [*bos, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        if len(ids) + args.max_new_tokens > context:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and --max_new_tokens {args.max_new_tokens} "
                f"exceed the model's context of {context}; shorten one"
            )
        print(f"> {prompt}{bold}", end="", flush=True)
        for _, piece in stream_text(
            model,
            [ids],
            args.max_new_tokens,
            tokenizer.decode,
            stop_strings=args.stop,
            stop_tokens=stop_tokens,
            sampling=sampling_of(args),
            seed=args.seed,
        ):
            print(piece, end="", flush=True)
        print(f"{plain}\n")


if __name__ == "__main__":
    main()
