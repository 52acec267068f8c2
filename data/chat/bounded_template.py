"""Render an untrusted chat template as transformers does, in a subprocess with resource limits.

Jinja's sandbox protects Python's internals but allows endless loops and gigabytes of output. The
subprocess reads and writes JSON lines. A timeout kills it; the next conversation starts a new one.
"""

import json
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from files import parse_object

MAX_SECONDS = 5  # per conversation
MAX_START_SECONDS = 60  # to start Python and import jinja2
MAX_MEMORY = 1 << 29  # bytes of the subprocess's address space
MAX_OUTPUT = 1 << 22  # characters of a rendered conversation
MAX_TEMPLATE = 1 << 20  # characters


class BoundedTemplate:
    """A chat template rendered with bounded time, memory and output. Thread-safe."""

    def __init__(self, template: str):
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            raise ValueError(
                f"the model's chat template must be text of at most {MAX_TEMPLATE:,} characters"
            )
        self.template = template
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> str:
        """Return the text of a conversation with the generation prompt.

        variables: additional template variables, such as bos_token. ValueError if the template
        raises an exception or exceeds a limit.
        """
        present = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        context = {
            "messages": present,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **variables,
        }
        with self.lock:
            answer = self._ask(context)
        if "text" not in answer:
            raise ValueError(
                f"the model's chat template rejects this conversation: {answer['error']}"
            )
        return str(answer["text"])

    def _ask(self, context: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "data.chat.bounded_template"]
            root = Path(__file__).resolve().parent.parent.parent
            self.process = subprocess.Popen(
                command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            weakref.finalize(self, _end, self.process)
            if self._line(MAX_START_SECONDS) is None:
                return self._failed("the rendering process does not start")
            if not self._send({"template": self.template}) or self._line(MAX_SECONDS) is None:
                return self._failed(
                    f"compiling it takes more than {MAX_SECONDS} s or too much memory"
                )
        if not self._send(context):
            return self._failed("its process ended")
        line = self._line(MAX_SECONDS)
        if line is None:
            return self._failed(f"it takes more than {MAX_SECONDS} s or too much memory")
        return parse_object(line)

    def _send(self, content: dict[str, Any]) -> bool:
        assert self.process and self.process.stdin
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _line(self, seconds: float) -> bytes | None:
        """Return a line of the process; None if it ended, timed out or wrote too long a line."""
        assert self.process and self.process.stdout
        stdout, end, line = self.process.stdout, time.monotonic() + seconds, bytearray()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, end - time.monotonic()))
            block = stdout.read1(1 << 20) if ready else b""  # type: ignore[attr-defined]
            if not block or len(line) > 16 * MAX_OUTPUT:
                return None
            line += block
        return bytes(line)

    def _failed(self, reason: str) -> dict[str, Any]:
        if self.process:
            _end(self.process)
        self.process = None
        return {"error": reason}


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with suppress(BrokenPipeError):
                stream.close()


def compile_template(source: str) -> Any:
    """Compile a template in the environment that transformers 5 uses for chat templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Render only the content of {% generation %}, which marks trained text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(
                line
            )

        def _content(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace cannot have the attribute {name!r}"
                )

    class Dictionary:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(text: str) -> str:
        return datetime.now().strftime(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    known = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    environment.globals.update(known)
    return environment.from_string(source)


def _rendered(template: Any, context: dict[str, Any]) -> dict[str, str]:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**context):
            size += len(piece)
            if size > MAX_OUTPUT:
                return {"error": f"it writes more than {MAX_OUTPUT:,} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "its recursion is too deep"}
    except Exception as error:  # another model's template may raise anything
        return {"error": (str(error).split("\n")[0] or type(error).__name__)[:300]}


def _answer_lines() -> None:
    """Run the subprocess: read the template, then render conversations until input ends."""
    if sys.platform != "darwin":  # a process on macOS reserves more address space
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # only the parent handles Ctrl-C; its end closes this process's input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even within C code
    compile_template("")
    print("started", flush=True)
    problem, template = "", None
    source = parse_object(sys.stdin.buffer.readline())["template"]
    signal.alarm(MAX_SECONDS + 1)
    try:
        template = compile_template(source)
    except Exception as error:
        problem = f"it is not a Jinja template ({str(error)[:200]})".replace("\n", " ")
    print("compiled", flush=True)
    signal.alarm(0)
    for line in sys.stdin.buffer:
        signal.alarm(MAX_SECONDS + 1)
        answer = _rendered(template, parse_object(line)) if template else {"error": problem}
        print(json.dumps(answer), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    _answer_lines()
