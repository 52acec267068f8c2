"""What the commands share: a user's mistake ends in one clear sentence and exit status 2, never in a traceback."""

import argparse
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
PATHS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # nothing there, or a file where a folder is due


def at_least(least: int) -> Callable[[str], int]:
    """What reads a flag's whole number, and refuses a smaller one."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; the least is {least}")
        return value

    return number


@contextmanager
def user_errors(rank: int = 0, world: int = 1) -> Iterator[None]:
    """Print ValueErrors raised by our own code, and errors of the disk, as "error: ..."; all else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is whole", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(130)
        sys.exit(130)
    except (ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(frame.filename).resolve()
        said = (frame.line or "").startswith("raise")  # not a ValueError that Python itself raised in our code
        ours = isinstance(error, ValueError) and said and path.is_relative_to(ROOT) and "site-packages" not in path.parts
        disk = isinstance(error, OSError) and error.errno in DISK + PATHS
        if not (ours or disk):
            raise
        if rank:
            time.sleep(2)  # rank 0 mostly meets the same and says it; its end then ends this one before it speaks too
        print(f"error: {error}", file=sys.stderr, flush=True)
        if world > 1:
            os._exit(2)  # another rank may wait for this one in a collective: leave without a farewell
        sys.exit(2)
