"""Inject faults at file operations of any Python command, without changes to the command.

`install` adds an audit hook. The environment variable FAULT_POINTS holds, as JSON, the folder where
processes register, and the points (program, operation, path, action). `write_hook` writes a
sitecustomize.py that installs the hook in every Python process of an environment.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypedDict, cast

VARIABLE = "FAULT_POINTS"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILLER = "filler"


class Point(TypedDict, total=False):
    """A fault at the n-th matching operation of a process; acts once per command.

    on: start (the hook is installed), read or write (a file is opened), rename (path: new name).
    path, program: fnmatch patterns; a program is the word after python or python -m, with its rank
    after a dot: train.py.0.
    do: signal, limit (the kernel ends the process when it writes past `size` bytes of a file),
    delete (`folder`), fill (the disk of `folder`, except `size` bytes), wait (until the file
    `folder` exists).
    whom: programs to signal; default: this process. delay: seconds before a signal.
    pause: seconds that the operation waits after a signal.
    """

    on: str
    path: str
    program: str
    nth: int
    do: str
    whom: str
    number: int
    size: int
    delay: float
    pause: float
    folder: str


def point(on: str, path: str = "*", do: str = "signal", **more: Any) -> Point:
    """Return a Point from its fields."""
    return cast(Point, {"on": on, "path": path, "do": do, **more})


class Hook:
    """The points of this process, and its entry in the register folder."""

    def __init__(self, folder: Path, points: list[Point], program: str):
        self.folder, self.points, self.program = folder, points, program
        self.seen = [0] * len(points)
        self.busy = threading.local()

    def register(self) -> None:
        """Register this process under its program's name; replace an entry from before exec."""
        for path in self.folder.glob(f"{os.getpid()}.*"):
            path.unlink()
        (self.folder / f"{os.getpid()}.{self.program}").touch()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self.busy, "active", False):
            return
        self.busy.active = True
        try:
            if event == "os.rename":
                self.reach("rename", arguments[1])
            else:
                self.reach("write" if arguments[2] & WRITING else "read", arguments[0])
        finally:
            self.busy.active = False

    def reach(self, on: str, path: Any) -> None:
        if isinstance(path, int):  # a file descriptor
            return
        text = os.fsdecode(path)
        for index, point in enumerate(self.points):
            if point["on"] != on or not fnmatch(text, point.get("path", "*")):
                continue
            if not fnmatch(self.program, point.get("program", "*")):
                continue
            self.seen[index] += 1
            if self.seen[index] == point.get("nth", 1):
                with suppress(FileExistsError):  # another process acted first
                    os.close(
                        os.open(
                            self.folder / f"point-{index}", os.O_CREAT | os.O_EXCL | os.O_WRONLY
                        )
                    )
                    self.act(point)

    def act(self, point: Point) -> None:
        if point["do"] == "limit":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (point["size"], resource.RLIM_INFINITY))
            # signal.signal works in the main thread only.
            ctypes.CDLL(None).signal(signal.SIGXFSZ, 0)
        elif point["do"] == "delete":
            # Renamed first: another thread may create a file in it meanwhile.
            shutil.rmtree(Path(point["folder"]).rename(f"{point['folder']}.deleted"))
        elif point["do"] == "fill":
            fill(Path(point["folder"]), point["size"])
        elif point["do"] == "wait":
            while not Path(point["folder"]).exists():
                time.sleep(0.01)
        elif delay := point.get("delay", 0.0):
            timer = threading.Timer(delay, self.signal, [point])
            timer.daemon = True
            timer.start()
        else:
            self.signal(point)
            time.sleep(point.get("pause", 0.0))

    def signal(self, point: Point) -> None:
        targets = pids(self.folder, point["whom"]) if "whom" in point else [os.getpid()]
        # This process last.
        for process in sorted(targets, key=lambda process: process == os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process, point.get("number", signal.SIGKILL))


def fill(folder: Path, free: int) -> None:
    """Fill the disk of a folder, except `free` bytes."""
    space = os.statvfs(folder)
    (folder / FILLER).write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free)))


def pids(folder: Path, program: str = "*") -> list[int]:
    """Return the running processes registered in a folder under a matching name."""
    entries = [path.name.partition(".") for path in folder.glob("[0-9]*.*")]
    return [int(pid) for pid, _, name in entries if fnmatch(name, program) and runs(int(pid))]


def runs(process: int) -> bool:
    """Return True if the process runs; a zombie does not."""
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except (OSError, IndexError):
        return False


def program_name(argv: list[str], rank: str | None) -> str:
    """Return e.g. train.py.0, scripts.pipeline, or "worker" for a multiprocessing process."""
    words = [word for word in argv[1:] if word not in ("-B", "-u")]
    name = (
        words[1]
        if words[:1] == ["-m"] and len(words) > 1
        else Path(words[0]).name
        if words
        else "python"
    )
    if words[:1] == ["-c"]:
        name = "worker"
    return f"{name}.{rank}" if rank is not None else name


_hook: Hook | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _hook and event in ("open", "os.rename"):
        _hook.audit(event, arguments)


def _forked() -> None:
    if _hook:
        _hook.register()


def install(argv: list[str] | None = None) -> None:
    """Install this process's points from the environment. argv: the interpreter's command line."""
    global _hook
    value = os.environ.get(VARIABLE)
    if not value:
        return
    content = json.loads(value)
    if _hook is None:
        os.register_at_fork(after_in_child=_forked)
        sys.addaudithook(_audit)
    program = program_name(argv or sys.orig_argv, os.environ.get("RANK"))
    _hook = Hook(Path(content["folder"]), content["points"], program)
    _hook.register()
    _hook.reach("start", program)


def write_hook(folder: Path) -> None:
    """Write a sitecustomize.py into a folder, for PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "from benchmarks.fault_points import install\n\ninstall()\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
