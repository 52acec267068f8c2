"""Render a foreign chat template as transformers does, in a process of its own with bounded time, memory and output.

Jinja's sandbox keeps a template from Python's internals, but not from endless loops or gigabytes of text. The process answers
JSON lines; it is killed when a conversation takes too long, and started again for the next one.
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

MAX_SECONDS = 5  # of one conversation
MAX_START_SECONDS = 60  # of Python and jinja2
MAX_MEMORY = 1 << 29  # bytes of the process's address space
MAX_OUTPUT = 1 << 22  # characters of a rendered conversation
MAX_TEMPLATE = 1 << 20  # characters


class BoundedTemplate:
    """A chat template; `render` gives the text of a conversation. Can be used from several threads."""

    def __init__(self, template: str):
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            raise ValueError(
                f"the model's chat template is not a text of at most {MAX_TEMPLATE:,} characters"
            )
        self.template = template
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> str:
        """The text up to where the assistant's turn begins; ValueError where the template refuses, fails or exceeds a bound.

        variables: what else the template sees, such as bos_token.
        """
        present = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        given = {
            "messages": present,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            **variables,
        }
        with self.lock:
            answer = self._ask(given)
        if "text" not in answer:
            raise ValueError(
                f"the model's chat template does not take this conversation: {answer['error']}"
            )
        return str(answer["text"])

    def _ask(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, "-m", "data.chat.rendering.bounded_template"]
            root = Path(__file__).resolve().parent.parent.parent.parent
            self.process = subprocess.Popen(
                command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            weakref.finalize(self, _end, self.process)
            if self._line(MAX_START_SECONDS) is None:
                return self._failed("the process that renders it does not start")
            if not self._send({"template": self.template}) or self._line(MAX_SECONDS) is None:
                return self._failed(
                    f"compiling it takes more than {MAX_SECONDS} s, or too much memory"
                )
        if not self._send(given):
            return self._failed("its process ended")
        line = self._line(MAX_SECONDS)
        if line is None:
            return self._failed(f"it takes more than {MAX_SECONDS} s, or too much memory")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, content: dict[str, Any]) -> bool:
        assert self.process and self.process.stdin
        try:
            self.process.stdin.write(json.dumps(content).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _line(self, seconds: float) -> bytes | None:
        """A line of the process; None where it ends, says too much or does not answer in time."""
        assert self.process and self.process.stdout
        end, parts = time.monotonic() + seconds, bytearray()
        while not parts.endswith(b"\n"):
            ready = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))[
                0
            ]
            part = self.process.stdout.read1(1 << 20) if ready else b""  # type: ignore[attr-defined]
            if not part or len(parts) > 16 * MAX_OUTPUT:
                return None
            parts += part
        return bytes(parts)

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
    """A template in the environment that transformers 5 gives chat templates."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained; here it is only its content."""

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


def _rendered(template: Any, given: dict[str, Any]) -> dict[str, str]:
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(**given):
            size += len(part)
            if size > MAX_OUTPUT:
                return {"error": f"it writes more than {MAX_OUTPUT:,} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deep"}
    except Exception as error:  # a foreign template may raise anything
        return {"error": (str(error).split("\n")[0] or type(error).__name__)[:300]}


def _answer_lines() -> None:
    """What the process does: read the template, then conversations, until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, whose end closes this one's input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside of C code
    compile_template("")
    print("started", flush=True)
    problem, template = "", None
    source = json.loads(sys.stdin.buffer.readline())["template"]
    signal.alarm(MAX_SECONDS + 1)
    try:
        template = compile_template(source)
    except Exception as error:
        problem = f"it is not a Jinja template ({str(error)[:200]})".replace("\n", " ")
    print("compiled", flush=True)
    signal.alarm(0)
    for line in sys.stdin.buffer:
        signal.alarm(MAX_SECONDS + 1)
        answer = _rendered(template, json.loads(line)) if template else {"error": problem}
        print(json.dumps(answer), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    _answer_lines()
