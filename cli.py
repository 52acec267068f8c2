"""What the commands share: a user's mistake ends in one clear sentence and exit status 2, never in a traceback."""

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
from typing import Any, NoReturn

from files import FULL, is_full
from ranges import MAX_INT, Range, shown

ROOT = Path(__file__).resolve().parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
GONE = (errno.EPIPE, errno.EIO)  # of an output whose reader has ended, or whose terminal was closed
PATHS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)  # nothing there, or a file where a folder is due


class CommandParser(argparse.ArgumentParser):
    """The parser of a command: `about` as written in --help, one sentence on standard error for a wrong flag."""

    def __init__(self, about: str | None):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; the least is {least}")
        if value >= MAX_INT:
            raise argparse.ArgumentTypeError(f"{shown(value)} must be below 2**63")
        return value

    return number


def within(kind: type, allowed: Range) -> Callable[[str], Any]:
    """The type of a flag that takes a number, int or float, in a range."""

    def number(text: str) -> Any:
        if (value := kind(text)) not in allowed:
            raise argparse.ArgumentTypeError(f"{shown(value)} {allowed}")
        return value

    return number


PORT = within(int, Range(0, 65_535))  # the type of a flag that takes a TCP port


def boolean(text: str) -> bool:
    """The value of a boolean flag; ArgumentTypeError for anything but true, false, yes, no, on, off, 1 and 0."""
    if (word := text.lower()) in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_boolean(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    """Add a flag that is false by default and takes an optional value: --cot, --cot True, --cot=0.

    Only for commands without positional arguments: one that follows the flag would be read as its value.
    """
    optional: dict[str, Any] = {
        "nargs": "?",
        "const": True,
        "default": False,
        "metavar": "true|false",
    }
    parser.add_argument(name, type=boolean, help=about, **optional)


class Output(io.FileIO):
    """A file descriptor to write to; once its reader is gone, os.devnull takes its place.

    A full disk under a redirected output drops what does not fit: a log must not end a run. `dropped` counts its bytes.
    """

    dropped = 0

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in FULL:
                self.dropped += memoryview(data).nbytes
                return memoryview(data).nbytes
            if error.errno not in GONE:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # also for C libraries and for processes started from here on
        os.close(null)
        return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let a closed pipe or terminal on stdout or stderr end the output, not the program.

    Holds for print, tqdm, warnings and the flush at exit. Streams that something else has replaced
    (pytest, a notebook) stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if (
            stream is None
            or stream is not getattr(sys, f"__{name}__")
            or not hasattr(stream, "buffer")
        ):
            continue
        buffered = hasattr(stream.buffer, "raw")  # not with python -u or PYTHONUNBUFFERED
        if isinstance(stream.buffer.raw if buffered else stream.buffer, Output):
            continue
        raw = Output(stream.fileno(), "wb", closefd=False)
        with suppress(OSError):  # what was printed before, for a reader that is gone already
            stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(raw) if buffered else raw,
            stream.encoding,
            "backslashreplace",  # any locale takes any text, and half a character ends nothing
            newline="\n",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)


def _check_dropped() -> None:
    """OSError, once the work is done, if a full disk took less than the whole output."""
    dropped = 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        dropped += raw.dropped if isinstance(raw, Output) else 0
    if dropped:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: the work is done, but {dropped:,} bytes of its output are lost",
        )


@contextmanager
def user_errors(rank: int = 0, world: int = 1) -> Iterator[None]:
    """Print ValueErrors raised by our own code, and errors of the disk, as "error: ..."; all else keeps its traceback."""
    outlive_readers()
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
        said = (frame.line or "").startswith(
            "raise"
        )  # not a ValueError that Python itself raised in our code
        ours = (
            isinstance(error, ValueError)
            and said
            and path.is_relative_to(ROOT)
            and "site-packages" not in path.parts
        )
        disk = isinstance(error, OSError) and error.errno in DISK + PATHS
        full = is_full(error)
        if not (ours or disk or full):
            raise
        if rank:
            time.sleep(
                2
            )  # rank 0 mostly meets the same and says it; its end then ends this one before it speaks too
        text = " ".join(str(error).split())
        if full and not (ours or disk):
            text = (
                f"the disk is full ({text[:200]}); free some space, then run the same command again"
            )
        line = (
            text if full else " ".join(str(error).splitlines())
        )  # names of files may hold line breaks
        print(f"error: {line}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(
                2
            )  # another rank may wait for this one in a collective: leave without a farewell
        sys.exit(2)
