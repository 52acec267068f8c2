"""Talk to a model in the terminal: a checkpoint by our own generation, a GGUF file by llama.cpp.

python -m scripts.chat --model gguf/nanollama-1b-q4_k_m.gguf                 # or a checkpoint folder; /reset and /quit
python -m scripts.chat --model checkpoints/nanollama_1b/sft --prompt "What is 17 * 23?" "And half of it?"
python -m scripts.chat --model gguf/nanollama-1b-q4_k_m.gguf --serve 8080    # llama.cpp's server, with OpenAI's interface

Thoughts are dim; tools (arithmetic, dates, units, facts about countries) really run, unless --no_tools.
A model with another chat template than ours speaks in that, without tools; one that has none continues what you type.
"""

import argparse
import io
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from cli import CommandParser, add_boolean, user_errors
from data.chat.bounded_template import BoundedTemplate
from data.chat.trained_chat import TrainedChat, name_of, offered, parse, read_trained_chat
from inference.chat_formats import Continuation, TemplateChat, open_chat
from inference.chat_session import Session, Talk
from inference.gguf_tokenizer import (
    TRAINED,
    field,
    file_templates,
    json_of,
    open_gguf,
    tokenizer_folder,
)
from inference.llamacpp import probe
from inference.runners import GgufRunner, Runner, TorchRunner
from inference.sampling import Sampling
from models.hf import newest_step

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not command the terminal
STYLE = {
    "thought": "\033[2m",
    "content": "",
    "call": "\033[36m",
    "result": "\033[32m",
    "note": "\033[33m",
}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--model", required=True, type=newest_step, help="a .gguf file or a checkpoint folder"
    )
    parser.add_argument(
        "--prompt", nargs="+", help="ask this and end; several are turns of one conversation"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of one reply")
    parser.add_argument(
        "--context",
        type=int,
        help="tokens of the conversation (default: those of the training rows)",
    )
    add_flags(parser)
    parser.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="on 127.0.0.1 instead of talking here; 0: any free port",
    )
    parser.add_argument(
        "--api_key",
        metavar="NAME",
        help="with --serve: the environment variable that holds the key of clients",
    )
    parser.add_argument(
        "--allow_origin",
        nargs="+",
        default=[],
        metavar="URL",
        help="with --serve: web pages that may use the server, e.g. http://localhost:3000 (default: none)",
    )
    args = parser.parse_args()
    with user_errors():
        if args.serve is not None:
            serve(args.model, args.serve, args.context, args.api_key, args.allow_origin)
            return
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {args.max_new_tokens} must be at least 1")
        chat, runner = load(args.model, args.context)
        session = begin(chat, runner, args, args.model)
        if trained_chat(args.model) and session.tools:
            names = ", ".join(name_of(tool) for tool in session.tools)
            print(f"context {runner.context:,}, tools: {names}; --context and --tools change them")
        if isinstance(chat, TemplateChat | Continuation):
            print(
                "a base model: it continues what you type"
                if isinstance(chat, Continuation)
                else "its own template: no tools"
            )
        talk(session, args.prompt)


def talk(session: Session, prompts: list[str] | None) -> None:
    """Answer prompts, or what is typed, where a mistake ends a turn and not the conversation."""
    kept = list(session.messages)
    for text in prompts or typed():
        if text == "/reset":
            session.messages = list(kept)
        elif text.strip():
            if prompts:
                print(f"> {text}")
            try:
                show(session.ask(text))
            except ValueError as error:
                if prompts:
                    raise
                print(f"[note] {error}", flush=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How a model speaks in a conversation, and how tokens are drawn."""
    parser.add_argument("--system", default="", help="a system prompt")
    add_boolean(parser, "--no_tools", "run no tools")
    parser.add_argument(
        "--tools",
        nargs="+",
        metavar="NAME",
        help="tools to offer, or all (default: as the model was trained)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the likeliest token"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="draw from the k likeliest tokens, 0 from all"
    )
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)


def begin(chat: Talk, runner: Runner, args: argparse.Namespace, model: Path) -> Session:
    """A conversation by the flags; what they leave open is as the model was trained."""
    if args.no_tools and args.tools:
        raise ValueError("--tools and --no_tools exclude each other; give one of them")
    sampling = sampling_of(args)

    def speak(prompt: list[int]) -> Iterator[int]:
        new = min(args.max_new_tokens, runner.context - len(prompt))
        if new < 1:
            raise ValueError(
                f"{len(prompt)} tokens fill the context of {runner.context}; begin anew (/reset) or write less"
            )
        return runner.speak(prompt, new, sampling, args.seed, chat.stop_ids)

    return Session(
        chat, speak, args.system, [] if args.no_tools else offered(trained_chat(model), args.tools)
    )


def load(path: Path, context: int | None) -> tuple[Talk, Runner]:
    """How to talk to the model of a GGUF file or of a folder, and the model; ValueError says what it is not."""
    check_context(context)
    if path.suffix == ".gguf":
        return open_chat(path), GgufRunner(path, context or trained_context(path))
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is neither a GGUF file (*.gguf) nor a checkpoint: it holds no config.json"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_chat(path), TorchRunner(path, device, context or trained_context(path))


def trained_chat(model: Path) -> TrainedChat | None:
    """What the conversations of a folder's or file's model were like in training; None where that is unknown."""
    return read_trained_chat(tokenizer_folder(model))


def trained_context(model: Path) -> int | None:
    """Tokens of the rows that a chat model was trained on; None: as many as the model can take."""
    trained = trained_chat(model)
    return trained.context if trained else None


def check_context(context: int | None) -> None:
    if context is not None and context < 1:
        raise ValueError(f"--context {context} must be at least 1")


def typed() -> Iterator[str]:
    """Lines that the user types, until /quit or the end of input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip() in ("/quit", "/exit"):
            return
        yield line


def show(pieces: Iterator[tuple[str, str]]) -> None:
    """Print a turn as it comes; Ctrl-C ends the turn and forgets it."""
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
        print("\n[stopped; the turn is forgotten]", end="")
    print("\033[0m" if colour else "")


def serve(
    path: Path, port: int, context: int | None, key_name: str | None, origins: list[str]
) -> None:
    """Serve a GGUF file by llama.cpp behind inference/gateway.py, until a signal ends it."""
    from inference.gateway import Gateway, special_tokens

    reader = open_gguf(path)
    special = special_tokens(reader)
    check_context(context)
    probe(path)
    trained = parse(json_of(field(reader, TRAINED)))
    for template in file_templates(reader).values():
        BoundedTemplate(template).render(
            [{"role": "user", "content": "Hello"}]
        )  # llama.cpp renders it without bounds
    key = os.environ.get(key_name, "").strip() if key_name else ""
    if key_name and not key:
        raise ValueError(
            f"--api_key {key_name}: the environment variable {key_name} is not set or empty"
        )
    try:
        import xllamacpp
    except ImportError:
        raise ValueError("--serve needs xllamacpp; pip install xllamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = (
        str(path),
        context or (trained.context if trained else 0),
        1,
    )
    params.model_alias, params.ui, params.endpoint_slots, params.cors_origins = (
        {path.name},
        False,
        False,
        "",
    )
    port = free_port("127.0.0.1", port)
    ends = [signal.SIGINT, signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # in the server's threads too
    with tempfile.TemporaryDirectory(
        prefix="nanollama-serve-"
    ) as folder:  # only this user can enter it
        params.hostnames = [f"{folder}/llama.sock"]
        try:
            server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"llama.cpp cannot serve {path}: {error}") from error
        gateway = Gateway(
            port, server.listening_address.removeprefix("unix://"), special, key, origins
        )
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        print(
            f"http://127.0.0.1:{port}/v1 answers as OpenAI's interface; Ctrl-C ends it", flush=True
        )
        signal.sigwait(ends)


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0; ValueError where it is taken or not ours to take."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"{host}:{port} cannot be opened ({error}); give another port, or 0 for any free one"
            ) from None
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
