"""Chat in a terminal: flags for sampling and tools, and coloured output."""

import argparse
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cli import add_boolean
from data.chat.trained_chat import offered
from inference.chat_formats import ChatFormat
from inference.chat_session import ChatSession
from inference.open_model import trained_chat
from inference.runners import Runner
from inference.sampling import Sampling

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # no escape sequences from a model
STYLE = {
    "thought": "\033[2m",
    "content": "",
    "call": "\033[36m",
    "result": "\033[32m",
    "note": "\033[33m",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the system prompt, tools and sampling."""
    parser.add_argument("--system", default="", help="the system prompt")
    add_boolean(parser, "--no_tools", "run no tools")
    parser.add_argument(
        "--tools",
        nargs="+",
        metavar="NAME",
        help="tools to offer, or all (default: those of chat training)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy decoding")
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all"
    )
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)


def open_session(
    chat: ChatFormat, runner: Runner, args: argparse.Namespace, model: Path
) -> ChatSession:
    """Start a conversation with the flags' settings; tools default to those of chat training."""
    if args.no_tools and args.tools:
        raise ValueError("--tools and --no_tools exclude each other; give one of them")
    sampling = sampling_of(args)

    def complete(prompt: list[int]) -> Iterator[int]:
        new = min(args.max_new_tokens, runner.context - len(prompt))
        if new < 1:
            raise ValueError(
                f"the conversation's {len(prompt)} tokens fill the context of {runner.context}; "
                "start a new one (/reset) or write less"
            )
        return runner.generate(prompt, new, sampling, args.seed, chat.stop_ids)

    tools = [] if args.no_tools else offered(trained_chat(model), args.tools)
    return ChatSession(chat, complete, args.system, tools)


def run_conversation(session: ChatSession, prompts: list[str] | None) -> None:
    """Answer the prompts, or each line the user types.

    A ValueError ends the turn of a typed line, and the conversation of given prompts.
    """
    start = list(session.messages)
    for text in prompts or typed_lines():
        if text == "/reset":
            session.messages = list(start)
        elif text.strip():
            if prompts:
                print(f"> {text}")
            try:
                print_turn(session.ask(text))
            except ValueError as error:
                if prompts:
                    raise
                print(f"[note] {error}", flush=True)


def typed_lines() -> Iterator[str]:
    """Yield the lines that the user types, until /quit or the end of input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        yield line


def print_turn(pieces: Iterator[tuple[str, str]]) -> None:
    """Print the (kind, text) pieces of a turn as they arrive; Ctrl-C discards the turn."""
    colour = sys.stdout.isatty()
    last = ""
    try:
        for kind, text in pieces:
            if kind != last or kind in ("call", "result", "note"):
                label = "" if kind == "content" else f"[{kind}] "
                print("\n" * bool(last) + (STYLE[kind] if colour else "") + label, end="")
            print(CONTROL.sub("\ufffd", text), end="", flush=True)
            last = kind
            if kind != "content" and colour:
                print("\033[0m" + STYLE[kind], end="")
    except KeyboardInterrupt:
        print("\n[stopped; the turn is discarded]", end="")
    print("\033[0m" if colour else "")
