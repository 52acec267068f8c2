"""How far a measurement is: a bar on a terminal, a line every half minute in a log file."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log file
LINE = "{desc}{n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left, {rate_fmt}"


class _Lines:
    """Turns what tqdm draws over itself into lines of their own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(total: int, unit: str, show: bool, name: str = "", initial: int = 0) -> tqdm:
    """A progress bar on stderr to update; silent unless `show`. unit: singular."""
    given = {"total": total, "initial": initial, "unit": unit, "disable": not show}
    if sys.stderr.isatty():
        return tqdm(desc=name or None, **given)
    how = {"mininterval": SECONDS, "miniters": 1, "bar_format": LINE}
    return tqdm(desc=name and f"{name}: ", file=_Lines(sys.stderr), **given, **how)
