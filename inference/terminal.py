"""Chat in a terminal: flags for sampling and tools, commands, history, and coloured output."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli import add_boolean
from data.chat.trained_chat import offered
from inference.chat_formats import ChatFormat
from inference.chat_session import ChatSession
from inference.open_model import trained_chat
from inference.runners import Runner
from inference.sampling import Sampling

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # also escape sequences
STYLE = {
    "thought": "\033[2m",
    "content": "",
    "call": "\033[36m",
    "result": "\033[32m",
    "note": "\033[33m",
}
COMMANDS = {
    "/help": "list the commands",
    "/reset": "start a new conversation",
    "/undo": "remove the last turn",
    "/retry": "answer the last message again, with another seed",
    "/save FILE": "write the conversation to a new .jsonl file, as one row of chat training",
    "/quit": "end the chat; also /exit or Ctrl-D",
}
HELP = "\n".join(
    f"{name:<12}{about}"
    for name, about in {
        **COMMANDS,
        "//TEXT": "send a message that begins with a slash: /TEXT",
        "Ctrl-C": "stop a reply and discard its turn",
    }.items()
)
HISTORY_LINES = 1000  # of earlier sessions


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


def run_conversation(
    session: ChatSession,
    args: argparse.Namespace,
    prompts: Sequence[str] | None = None,
    history: Path | None = None,
) -> None:
    """Answer the prompts, or each line the user types.

    args: those of add_flags. history: file with the lines of earlier sessions. A ValueError ends
    only the turn of a typed line, but the whole conversation of given prompts.
    """
    conversation = Conversation(session, args)
    if not prompts:
        talk(conversation, history)
        return
    for text in prompts:
        print(f"> {text}")
        if not conversation.take(text):
            return


class Conversation:
    """Answers messages and commands. args.seed: of the next reply."""

    def __init__(self, session: ChatSession, args: argparse.Namespace):
        self.session, self.args = session, args
        self.start = list(session.messages)
        self.discarded = ""  # the last message, if its turn was discarded

    def take(self, line: str) -> bool:
        """Answer a message or run a command; return False after /quit.

        ValueError if it cannot. KeyboardInterrupt discards the turn.
        """
        text = line.strip()
        if not text.startswith("/"):
            if text:
                self._answer(line)
            return True
        if text.startswith("//"):
            self._answer(line.replace("//", "/", 1))
            return True
        command, _, argument = text.partition(" ")
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            self.session.messages, self.discarded = list(self.start), ""
            print("new conversation")
        elif command == "/undo":
            print(f"removed: {shown(self._undo()[0]['content'])}")
        elif command == "/retry":
            self._retry()
        elif command == "/save":
            print(f"written to {save(self.session, argument.strip())}")
        elif command not in ("/quit", "/exit"):
            names = ", ".join(COMMANDS)
            raise ValueError(
                f"there is no command {shown(command)}; the commands are {names}. To send a "
                "message that begins with a slash, type two"
            )
        return command not in ("/quit", "/exit")

    def _answer(self, text: str) -> None:
        before, self.discarded = len(self.session.messages), text
        print_turn(self.session.ask(text))
        if len(self.session.messages) > before:
            self.discarded = ""

    def _undo(self) -> list[dict[str, Any]]:
        """Remove the messages of the last turn and return them."""
        messages = self.session.messages
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError("the conversation has no turn yet; type a message")
        turn = messages[users[-1] :]
        del messages[users[-1] :]
        self.discarded = ""
        return turn

    def _retry(self) -> None:
        """Answer the last message again; if that fails, keep the answer it had."""
        text, turn = self.discarded, list[dict[str, Any]]()
        if not text:
            turn = self._undo()
            text = turn[0]["content"]
        self.args.seed += 1
        try:
            self._answer(text)
        finally:
            if self.discarded and turn:
                self.session.messages += turn
                self.discarded = ""


def talk(conversation: Conversation, history: Path | None) -> None:
    """Process the user's lines until /quit, Ctrl-D, or Ctrl-C twice at the prompt."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8
    remember = edit_lines(history)
    if sys.stdin.isatty():
        print("/help lists the commands")
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            print("Ctrl-C again, Ctrl-D or /quit ends the chat")
            continue
        interrupted = False
        remember()
        try:
            if not conversation.take(line):
                return
        except KeyboardInterrupt:
            print("[stopped; the turn is discarded; /retry asks again]", flush=True)
        except ValueError as error:
            print(f"[note] {error}", flush=True)


def edit_lines(history: Path | None) -> Callable[[], None]:
    """Edit typed lines by readline, if this is a terminal and Python has it.

    Reads the lines of earlier sessions. Returns a function that appends the newest line to the
    file; a file that cannot be read or written is ignored.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: None
    try:
        import readline
    except ImportError:
        return lambda: None
    if history is None:
        return lambda: None
    path = history
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # only this user reads it
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    count = readline.get_current_history_length()

    def remember() -> None:
        nonlocal count
        new = readline.get_current_history_length() - count  # 0 after an empty or repeated line
        if new > 0:
            count += new
            with suppress(OSError):
                readline.append_history_file(new, path)

    return remember


def save(session: ChatSession, name: str) -> Path:
    """Write the conversation to a new .jsonl file, as one row that SFT can read."""
    if not name:
        raise ValueError("/save needs the name of a file, as in /save talk.jsonl")
    path = Path(os.path.expanduser(name))
    if path.suffix != ".jsonl":
        raise ValueError(f"/save {shown(name)}: the name must end in .jsonl")
    if not any(message["role"] == "assistant" for message in session.messages):
        raise ValueError("the conversation has no reply to save; type a message")
    tools = {"tools": session.tools} if session.tools else {}
    row = json.dumps({"messages": session.messages, **tools}, ensure_ascii=False)
    try:
        with open(path, "x", encoding="utf-8", errors="replace") as file:
            file.write(row + "\n")
    except FileExistsError:
        raise ValueError(f"{path} exists; give the name of a new file") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give another name"
        ) from None
    return path


def shown(text: str) -> str:
    """Shorten a text to one line."""
    line = CONTROL.sub("\ufffd", " ".join(text.split()))
    return line if len(line) <= 60 else f"{line[:60]}..."


def print_turn(pieces: Iterator[tuple[str, str]]) -> None:
    """Print the (kind, text) pieces of a turn as they arrive. Ctrl-C: KeyboardInterrupt."""
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
    finally:
        if close := getattr(pieces, "close", None):
            close()  # now, so that an interrupted turn leaves no messages
        print("\033[0m" if colour else "", flush=True)
