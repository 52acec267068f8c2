"""Command-line helpers: flag types, error messages, and output that survives a closed pipe.

A user error prints one sentence on standard error and exits with status 2, without a traceback.
"""

import argparse
import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import ranges
from files import FULL, is_full
from ranges import Range, shown, violation

ROOT = Path(__file__).resolve().parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
DISCONNECTED = (errno.EPIPE, errno.EIO)  # the reader has ended or the terminal was closed
PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # a missing or wrong path
Number = TypeVar("Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """Argument parser: --help shows `about` as written; a wrong flag prints one sentence."""

    def __init__(self, about: str | None):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


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
        with suppress(OSError):  # the reader may be gone already
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
            "output are lost",
        )


@contextmanager
def user_errors(rank: int = 0, world: int = 1) -> Iterator[None]:
    """Print ValueErrors raised by this project, path and disk errors as "error: ..."; exit with 2.

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
        # A ValueError of a built-in function comes from a line without `raise`.
        raised = (frame.line or "").startswith("raise")
        ours = isinstance(error, ValueError) and raised and in_project
        disk = isinstance(error, OSError) and error.errno in DISK + PATHS
        full = is_full(error)
        if not (ours or disk or full):
            raise
        if rank:
            time.sleep(2)  # rank 0 usually has the same error; its exit ends this rank first
        text = " ".join(str(error).split())
        if full and not (ours or disk):
            text = (
                f"the disk is full ({text[:200]}); free some space, then run the same command again"
            )
        line = text if full else " ".join(str(error).splitlines())  # paths may have line breaks
        print(f"error: {line}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(2)  # skips cleanup that would wait for other ranks in a collective
        sys.exit(2)
