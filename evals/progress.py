"""Progress display: a bar on a terminal, a line every 30 seconds in a log file."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 30.0  # between lines in a log file
LINE = "{desc}{n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left, {rate_fmt}"


class _Lines:
    """Stream for tqdm that writes each update as a separate line."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(total: int, unit: str, show: bool, name: str = "", initial: int = 0) -> tqdm:
    """A tqdm bar on stderr; silent unless `show`. unit: singular."""
    settings = {"total": total, "initial": initial, "unit": unit, "disable": not show}
    if sys.stderr.isatty():
        return tqdm(desc=name or None, **settings)
    settings |= {"mininterval": SECONDS, "miniters": 1, "bar_format": LINE}
    return tqdm(desc=name and f"{name}: ", file=_Lines(sys.stderr), **settings)
