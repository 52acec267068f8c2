"""Command-line helpers: flag types, error messages, and output that survives a closed pipe.

A user error prints one sentence on standard error and exits with status 2, without a traceback.
"""

import argparse
import difflib
import errno
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import ranges
from files import FULL, is_full
from machine import rank_and_world
from ranges import Range, shown, violation

ROOT = Path(__file__).resolve().parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
DISCONNECTED = (errno.EPIPE, errno.EIO)  # the reader has ended or the terminal was closed
PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # a missing or wrong path
Number = TypeVar("Number", int, float)


# Flag -> its aliases: former names, and the names in other programs. A command with the flag
# accepts its aliases, unless an alias is the name of another of its flags. docs/api.md lists them.
SPELLINGS = {
    "--checkpoint": "--model --ckpt",
    "--output_dir": "--output --folder --out_dir",
    "--output": "--outfile --output_file",
    "--steps": "--num_steps --max_steps",
    "--max_new_tokens": "--max_tokens",
    "--learning_rate": "--lr",
    "--sequence_length": "--length",
    "--init_from": "--base_model",
    "--base_model": "--init_from",
    "--name": "--experiment_name --run_name",
    "--experiment_name": "--name",
    "--profile": "--enable_profiling",
    "--cache": "--wheels",
    "--context": "--context_length",
    "--shots": "--num_fewshot",
}
FLAG = re.compile(r"--?[A-Za-z][\w.-]*")


class CommandParser(argparse.ArgumentParser):
    """Argument parser with aliases (SPELLINGS), no abbreviations, and one-sentence errors.

    --help shows `about` as written. Hyphens count as underscores. The first positional argument may
    be given as a flag: --plan FILE. An unknown flag is an error that names the nearest flag.
    """

    def __init__(self, about: str | None):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(_program(), description=about, formatter_class=form, allow_abbrev=False)
        # Unknown flag -> what to write instead, if the command has a setting of that name.
        self.setting_hint: Callable[[str], str | None] = lambda flag: None

    def error(self, message: str) -> NoReturn:
        end = " " if message.endswith("?") else "; "
        _let_rank0_report(rank_and_world()[0])
        self.exit(2, f"error: {message}{end}{self.prog} --help lists the flags\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of a command line; parse_args and parse_intermixed_args call this."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._in_own_spelling(words), namespace)

    def _in_own_spelling(self, words: list[str]) -> list[str]:
        """Replace aliases by this parser's flags; exit on an unknown flag.

        A positional argument that is given as a flag becomes the first word.
        """
        end = words.index("--") if "--" in words else len(words)
        leading, result, remaining = list[str](), list[str](), iter(words[:end])
        for word in remaining:
            name, equals, value = word.partition("=")
            if not FLAG.fullmatch(name) or name[:2] in self._option_string_actions:
                result.append(word)  # a value, or a short flag such as -h
            elif flag := self._flag(name):
                if flag in self._option_string_actions:
                    result.append(flag + equals + value)
                elif value := value if equals else next(remaining, ""):
                    leading = [value]
                else:
                    self.error(f"argument {flag}: expected one argument")
            elif " " in word and not self._nearest(name):
                result.append(word)  # free text, such as a prompt
            else:
                self.error(f"unknown flag {name}{self._advice(name)}")
        return [*leading, *result, *words[end:]]

    def _flag(self, name: str) -> str | None:
        """Return the flag of this parser with this name or alias; None if there is none."""
        if not name.startswith("--"):
            return None
        if (exact := f"--{plain(name)}") in self._option_string_actions:
            return exact
        return next((flag for flag in self._flags() if exact in spellings(flag)), None)

    def _flags(self) -> list[str]:
        """Return the flags that --help lists, and the flag of the first positional argument."""
        actions = self._option_string_actions.items()
        flags = [flag for flag, action in actions if action.help != argparse.SUPPRESS]
        for action in self._get_positional_actions()[:1]:
            nargs = getattr(action, "save_nargs", action.nargs)  # parse_intermixed_args changes it
            flags += [f"--{action.dest}"] * (nargs in (None, argparse.OPTIONAL))
        return flags

    def _advice(self, name: str) -> str:
        """Return the suggestion for an unknown flag: full flag, setting or similar flag."""
        nearest, hint = self._nearest(name), self.setting_hint(name)
        is_short = nearest and nearest[2:].startswith(plain(name))
        if hint and not is_short:
            return f"; {hint}"
        return f"; did you mean {nearest}?" if nearest else ""

    def _nearest(self, name: str) -> str | None:
        """Return the flag that `name` abbreviates or misspells."""
        short = plain(name)
        known = {word[2:]: flag for flag in self._flags() for word in spellings(flag)}
        longer = [word for word in known if word.startswith(short) and len(short) > 1]
        close = longer or difflib.get_close_matches(short, known, n=1, cutoff=0.7)
        return known[close[0]] if close else None


def plain(flag: str) -> str:
    """Return the name of a flag: no leading hyphens, inner hyphens as underscores."""
    return flag.lstrip("-").replace("-", "_")


def spellings(flag: str) -> tuple[str, ...]:
    """Return a flag and its aliases, with underscores."""
    return (flag, *SPELLINGS.get(flag, "").split())


def flag_value(words: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag, or of one of its aliases, among the words of a command."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if word.startswith("--") and f"--{plain(name)}" in spellings(flag):
            return value if equals else next(iter(words[i + 1 :]), None)
    return None


def _program() -> str | None:
    """Return `python -m scripts.NAME` for a module run with -m, else None (the file name)."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    is_command = name.startswith(("scripts.", "evals.", "benchmarks."))
    return f"python -m {name}" if is_command else None


def within(kind: type[Number], allowed: Range) -> Callable[[str], Number]:
    """Return a flag type: an int or float within a range."""

    def number(text: str) -> Number:
        if (value := kind(text)) not in allowed:
            raise argparse.ArgumentTypeError(f"{shown(value)} {violation(value, allowed)}")
        return value

    return number


def int_at_least(minimum: int) -> Callable[[str], int]:
    """Return a flag type: an integer of at least `minimum`."""
    return within(int, ranges.at_least(minimum))


PORT = within(int, Range(0, 65_535))  # flag type: a TCP port


def boolean(text: str) -> bool:
    """Parse the value of a boolean flag: true, yes, on, 1, false, no, off or 0."""
    if (word := text.lower()) in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_boolean(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    """Add a flag that is false by default and takes an optional value: --cot, --cot True, --cot=0.

    Use it only in commands without positional arguments: argparse would take one as the value.
    """
    optional: dict[str, Any] = {"nargs": "?", "const": True, "default": False}
    parser.add_argument(name, type=boolean, help=about, metavar="true|false", **optional)


class Output(io.FileIO):
    """An output stream that never ends a run.

    When the reader is gone, os.devnull replaces the descriptor. When the disk is full, the bytes
    are dropped and counted in `dropped`.
    """

    dropped = 0

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in FULL:
                self.dropped += memoryview(data).nbytes
                return memoryview(data).nbytes
            if error.errno not in DISCONNECTED:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # applies to C libraries and new child processes too
        os.close(null)
        return memoryview(data).nbytes


def survive_closed_pipes() -> None:
    """Keep the program running when stdout or stderr loses its pipe or terminal.

    Covers print, tqdm, warnings and the flush at exit. Streams that pytest or a notebook has
    replaced stay unchanged.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        replaced = stream is not getattr(sys, f"__{name}__")
        if stream is None or replaced or not hasattr(stream, "buffer"):
            continue
        buffered = hasattr(stream.buffer, "raw")  # False with python -u or PYTHONUNBUFFERED
        if isinstance(stream.buffer.raw if buffered else stream.buffer, Output):
            continue
        raw = Output(stream.fileno(), "wb", closefd=False)
        with suppress(OSError):  # the pipe may be closed already
            stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(raw) if buffered else raw,
            stream.encoding,
            "backslashreplace",  # text that the locale cannot encode, and lone surrogates
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)


def _check_dropped() -> None:
    """Raise OSError at the end of the work if a full disk has dropped output."""
    dropped = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        dropped += raw.dropped if isinstance(raw, Output) else 0
    if dropped:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: the command has finished, but {dropped:,} bytes of its "
            "output are lost; free some space",
        )


def print_error(text: str) -> None:
    """Write "error: TEXT" to stderr in one write, since the lines of several ranks may mix."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def _let_rank0_report(rank: int) -> None:
    """Delay the error of another rank: rank 0 usually has the same, and its exit ends this rank."""
    if rank:
        time.sleep(2)


@contextmanager
def user_errors(rank: int = 0, world: int = 1) -> Iterator[None]:
    """Print this project's ValueErrors, path errors and disk errors as "error: ..."; exit with 2.

    Ctrl-C exits with 130. Other exceptions keep their traceback.
    """
    survive_closed_pipes()
    try:
        yield
        _check_dropped()
    except KeyboardInterrupt:
        print(
            "interrupted; no half-written file was kept, so the same command can be run again",
            file=sys.stderr,
            flush=True,
        )
        if world > 1:
            os._exit(130)
        sys.exit(130)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(frame.filename).resolve()
        in_project = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        # A ValueError from a built-in function has a last line without `raise`.
        raised = (frame.line or "").startswith("raise")
        ours = isinstance(error, ValueError) and raised and in_project
        disk = isinstance(error, OSError) and error.errno in DISK + PATHS
        full = is_full(error)
        if not (ours or disk or full):
            raise
        _let_rank0_report(rank)
        text = " ".join(str(error).split())
        if full and not (ours or disk):
            text = (
                f"the disk is full ({text[:200]}); free some space, then run the same command again"
            )
        line = text if full else " ".join(str(error).splitlines())  # paths may have line breaks
        print_error(line)
        if world > 1:
            os._exit(2)  # skips cleanup that would wait for other ranks in a collective
        sys.exit(2)
