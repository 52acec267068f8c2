"""Child process of evals/sandbox.py: sets limits, blocks side effects and runs one program.

Reads {"program", "nonce", "cpu_s", "memory", "file_bytes"} from stdin. Writes the nonce to the
original stdout if the program ends without an exception, else the exception. A program that exits
early has no nonce and fails. Imports only the standard library, because it runs with `python -I`.
"""

import json
import os
import resource
import sys

BLOCKED = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "os.fork",
    "os.kill",
    "pty.",
    "ftplib.",
)
BLOCKED_EVENTS = {"os.system", "os.startfile", "os.chdir", "os.fchdir", "ctypes.dlopen"}
FILE_EVENTS = {
    *(
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
    ),
    *(
        "os.utime",
        "os.setxattr",
        "os.removexattr",
        "os.chflags",
        "os.lockf",
        "shutil.rmtree",
        "shutil.move",
    ),
}
MAX_FILES = 100  # files opened for writing per run; bounds disk usage
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(folder):
    """An audit hook that refuses network, processes and writes outside `folder`.

    Python cannot remove audit hooks.
    """
    realpath, join, separator = os.path.realpath, os.path.join, os.sep
    opened = 0

    def inside(path):
        path = os.fsdecode(path) if isinstance(path, bytes) else path
        return not isinstance(path, str) or (realpath(join(folder, path)) + separator).startswith(
            folder + separator
        )

    def hook(event, arguments):
        nonlocal opened
        if event == "open":
            path, _, flags = arguments
            if not flags & WRITES or path == os.devnull:
                return
            opened += 1
            if not inside(path):
                raise PermissionError(f"writing {path} is not allowed")
            if opened > MAX_FILES:
                raise PermissionError(f"opening more than {MAX_FILES} files is not allowed")
        elif event in FILE_EVENTS:
            if not all(inside(path) for path in arguments):
                raise PermissionError(f"{event} is not allowed outside the scratch folder")
        elif (event in BLOCKED_EVENTS and arguments[:1] != (None,)) or event.startswith(BLOCKED):
            raise PermissionError(f"{event} is not allowed")

    return hook


def main():
    request = json.load(sys.stdin)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limits = {
        resource.RLIMIT_CPU: request["cpu_s"],
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "darwin":  # a process on a Mac reserves more addresses than that
        del limits[resource.RLIMIT_AS]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.argv = [""]
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    sys.addaudithook(guard(os.path.realpath(os.getcwd())))
    try:
        code = compile(request["program"], "<program>", "exec")
        exec(code, {})  # as in code_eval, __name__ is not "__main__"
        result = {"nonce": request["nonce"]}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"[:200]}
    os.write(report, b"\n" + json.dumps(result).encode())
    os._exit(0)


main()
