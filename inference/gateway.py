"""HTTP gateway to llama.cpp's server: checks clients, cleans requests, relays responses.

llama.cpp listens on a Unix socket that only this process opens. Every request passes these checks:
host name (DNS rebinding), origin (other web pages), API key, path, size, JSON, text. Text in a
request never becomes a special token.
"""

import hmac
import http.client
import json
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data.chat.rendering import MAX_DEPTH, neutralise
from data.chat.template import SHOWN
from inference.gguf_tokenizer import CONTROL, field

MAX_BODY = 8 * 2**20  # bytes
MAX_WAITING = 256  # connections with an incomplete request; the oldest is closed first
MAX_ACTIVE = 64  # requests that llama.cpp runs or queues
MAX_SCHEMA = 2**15  # bytes of one field's JSON schemas
MAX_REPEATS = 1000
REPEATS = ("minItems", "maxItems", "minLength", "maxLength")
READ_S = 20  # seconds for a request to arrive, and for each piece of a response to be sent
HOSTS = ("127.0.0.1", "localhost", "[::1]")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PLAIN = ("/tokenize", "/detokenize")  # endpoints whose text is not part of a prompt
CHAT = (
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/completions",
    "/completion",
)
REFERENCE = re.compile(r"#/(\$defs|definitions)/[\w.-]+")
ALLOWED = {
    "GET": ("/health", "/v1/health", "/v1/models", "/models"),
    "POST": (*CHAT, "/apply-template", *PLAIN),
}


class Upstream(http.client.HTTPConnection):
    """A connection to llama.cpp's Unix socket."""

    def __init__(self, path: str):
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class Gateway(ThreadingHTTPServer):
    """The listening server. Slow connections are closed after READ_S and never block others."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int,
        upstream: str,
        special: Sequence[str],
        key: str = "",
        origins: Collection[str] = (),
    ):
        """upstream: path of llama.cpp's socket. special: tokens forbidden in text.

        origins: web origins with access.
        """
        self.upstream, self.special, self.key, self.origins = upstream, special, key, origins
        self.active = threading.BoundedSemaphore(MAX_ACTIVE)
        self.waiting: dict[socket.socket, float] = {}  # connection -> deadline, oldest first
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def expect(self, connection: socket.socket) -> None:
        """Start the deadline of a connection's next request or body."""
        with self.lock:
            self.waiting.pop(connection, None)
            self.waiting[connection] = time.monotonic() + READ_S
            late = [next(iter(self.waiting))] if len(self.waiting) > MAX_WAITING else []
        self._cut(late)

    def received(self, connection: socket.socket) -> None:
        """End the deadline."""
        with self.lock:
            self.waiting.pop(connection, None)

    def service_actions(self) -> None:
        """Close connections whose deadline has passed; called every half second."""
        now = time.monotonic()
        with self.lock:
            late = [connection for connection, deadline in self.waiting.items() if deadline < now]
        self._cut(late)

    def _cut(self, late: Sequence[socket.socket]) -> None:
        for connection in late:
            self.received(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread then reads end of file

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnected; report other errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handles one client connection."""

    server: Gateway
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "NanoLlama", ""
    timeout = READ_S
    answered = False

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        self.answered = False
        self.server.expect(self.connection)
        try:
            super().handle_one_request()
        finally:
            self.server.received(self.connection)

    def handle_expect_100(self) -> bool:
        return self._admitted() and super().handle_expect_100()

    def do_GET(self) -> None:
        if self._admitted():
            self.server.received(self.connection)
            self._forward(None)

    def do_POST(self) -> None:
        if not self._admitted():
            return
        length = int(self.headers["Content-Length"])
        self.server.expect(self.connection)
        body = self.rfile.read(length)
        self.server.received(self.connection)
        if len(body) < length:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError("the body must be a JSON object")
            cleaned = request if path in PLAIN else clean_request(request, self.server.special)
            body = json.dumps(cleaned, allow_nan=False).encode()
        except json.JSONDecodeError as error:
            self._refuse(400, f"the body is not JSON: {error}")
        except UnicodeError:
            self._refuse(400, "the body must be valid Unicode")
        except RecursionError:
            self._refuse(400, "the body is nested too deeply")
        except ValueError as error:
            self._refuse(400, f"{error}")
        else:
            self._forward(body)

    def do_OPTIONS(self) -> None:
        """Answer the CORS preflight request of an allowed origin."""
        if self._admitted():
            self.send_response(204)
            self._common_headers()
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _admitted(self) -> bool:
        """Check a request's headers; send an error and return False if a check fails."""
        hosts, path = self.headers.get_all("Host") or [], self.path.partition("?")[0]
        has_port = len(hosts) == 1 and not hosts[0].endswith("]")
        name = hosts[0].rsplit(":", 1)[0] if has_port else "".join(hosts)
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        foreign = origin not in (None, f"http://{hosts[0]}") if hosts else True
        foreign = (
            foreign or site in ("cross-site", "same-site")
        ) and origin not in self.server.origins
        sizes = self.headers.get_all("Content-Length") or []
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        unauthorized = self.server.key and not hmac.compare_digest(
            key.encode("latin-1", "replace"), self.server.key.encode()
        )
        if name.lower() not in HOSTS:
            self._refuse(403, f"the Host header must name this machine: {', '.join(HOSTS)}")
        elif foreign:
            self._refuse(
                403, "web pages of another origin have no access; allow one with --allow_origin"
            )
        elif self.command == "OPTIONS":
            return bool(origin) or self._refuse(405, "OPTIONS needs an Origin header")
        elif unauthorized and path not in ("/health", "/v1/health"):
            self._refuse(401, "the API key is missing or wrong")
        elif path not in ALLOWED.get(self.command, ()):
            self._refuse(404, f"no such endpoint: {self.command} {path[:100]}")
        elif self.headers.get("Transfer-Encoding") or len(sizes) > 1:
            self._refuse(411, "a request needs one Content-Length and no Transfer-Encoding")
        elif self.command == "POST" and not (sizes and sizes[0].isascii() and sizes[0].isdigit()):
            self._refuse(411, "a POST request needs a Content-Length")
        elif sizes and (
            len(sizes[0]) > 12 or int(sizes[0]) > (MAX_BODY if self.command == "POST" else 0)
        ):
            self._refuse(413, f"the body is larger than {MAX_BODY:,} bytes")
        else:
            return True
        return False

    def _refuse(self, status: int, message: str) -> bool:
        """Send an error in OpenAI's format and close the connection; return False."""
        if not self.answered:
            self.answered = True
            self.close_connection = True
            body = json.dumps(
                {"error": {"message": message, "type": "invalid_request_error", "code": status}}
            ).encode()
            self.send_response(status)
            self._common_headers()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.server.expect(self.connection)
            with suppress(OSError):  # else a client that still sends gets a reset
                self.connection.shutdown(socket.SHUT_WR)
                while self.rfile.read1(2**16):
                    pass
        return False

    def _common_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        if (origin := self.headers.get("Origin")) in self.server.origins:
            self.send_header("Access-Control-Allow-Origin", str(origin))
            self.send_header("Vary", "Origin")

    def _forward(self, body: bytes | None) -> None:
        """Relay a request to llama.cpp and its response; if one side closes, close both."""
        if not self.server.active.acquire(blocking=False):
            self._refuse(503, f"{MAX_ACTIVE} requests are already waiting; try again later")
            return
        upstream = Upstream(self.server.upstream)
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            upstream.request(self.command, self.path.partition("?")[0], body, headers)
            if self._client_waits(upstream.sock):
                self._relay(upstream.getresponse())
        except http.client.HTTPException as error:
            self._refuse(502, f"llama.cpp did not answer: {error!r}")
        finally:
            upstream.close()
            self.server.active.release()

    def _client_waits(self, answer: socket.socket) -> bool:
        """Wait for llama.cpp's response; return False if the client disconnects first."""
        with selectors.DefaultSelector() as selector:
            selector.register(answer, selectors.EVENT_READ)
            selector.register(self.connection, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if answer in ready:
                    return True
                if not self.connection.recv(1, socket.MSG_PEEK):
                    self.close_connection = True
                    return False
                selector.unregister(self.connection)  # the data is the client's next request

    def _relay(self, response: http.client.HTTPResponse) -> None:
        length = response.getheader("Content-Length")
        self.answered = True
        self.send_response(response.status)
        self._common_headers()
        self.send_header("Content-Type", response.getheader("Content-Type") or "application/json")
        self.send_header(
            *(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", length))
        )
        self.end_headers()
        while piece := response.read1(2**16):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if length is None else piece)
        if length is None:
            self.wfile.write(b"0\r\n\r\n")


def special_tokens(reader: Any) -> list[str]:
    """Return the tokens that text must not contain: control tokens and our markers."""
    tokens, types = (
        field(reader, f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type")
    )
    return [
        token
        for token, kind in zip(tokens, types, strict=False)
        if kind == CONTROL or token in SHOWN
    ]


def clean_request(request: dict[str, Any], special: Sequence[str]) -> dict[str, Any]:
    """Neutralise special tokens in a request's text; ValueError for content that is not text."""
    messages = request.get("messages", [])
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") in ROLES for m in messages
    ):
        raise ValueError(f"messages must be objects with one of the roles {', '.join(ROLES)}")
    request = (
        {**request, "messages": [_message(message) for message in messages]}
        if messages
        else request
    )
    if unsafe := [name for name in request if name.startswith("grammar") and request[name]]:
        raise ValueError(f"{unsafe[0]} is not accepted; use response_format with a JSON schema")
    for name in ("tools", "functions", "response_format", "json_schema"):
        _check_schema(request.get(name))
    unchanged = {key: request[key] for key in ("stop", "model") if key in request}
    return {**_neutralised(request, special), **unchanged}


def _check_schema(schema: Any) -> None:
    """ValueError for a schema that crashes or stalls llama.cpp: recursive, deep or very large."""
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise ValueError(f"a JSON schema is larger than {MAX_SCHEMA:,} bytes")
    graph: dict[str, set[str]] = {}
    for node in _objects(schema):
        if any(isinstance(size := node.get(name), int) and size > MAX_REPEATS for name in REPEATS):
            raise ValueError(
                f"{', '.join(REPEATS)} of a JSON schema must be at most {MAX_REPEATS:,}"
            )
        if len(str(node.get("pattern", ""))) > MAX_REPEATS:
            raise ValueError(
                f"a pattern of a JSON schema must have at most {MAX_REPEATS:,} characters"
            )
        for kind in ("$defs", "definitions"):
            if isinstance(definitions := node.get(kind), dict):
                for name, body in definitions.items():
                    graph.setdefault(f"#/{kind}/{name}", set()).update(_references(body))
    _references(schema)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        raise ValueError("recursive JSON schemas are not supported") from None


def _references(schema: Any) -> set[str]:
    """Return the definitions that a JSON schema refers to."""
    targets = [node["$ref"] for node in _objects(schema) if "$ref" in node]
    for target in targets:
        if not (isinstance(target, str) and REFERENCE.fullmatch(target)):
            raise ValueError(
                f"$ref must name a definition, e.g. #/$defs/name, not {str(target)[:100]!r}"
            )
    return set(targets)


def _objects(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield all objects in a JSON value."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a JSON schema is nested more than {MAX_DEPTH} deep")
    children: Iterable[Any] = value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield value
        children = value.values()
    for child in children:
        yield from _objects(child, depth + 1)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Join content parts and decode tool arguments, so that no token is split or escaped."""
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(piece, dict) and isinstance(piece.get("text"), str) for piece in content
        ):
            raise ValueError("content must be text; images, audio and files are not accepted")
        message["content"] = "".join(piece["text"] for piece in content)
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(json.JSONDecodeError):
                call["function"] = {**function, "arguments": json.loads(function["arguments"])}
    return message


def _neutralised(value: Any, special: Sequence[str]) -> Any:
    if isinstance(value, str):
        value.encode()
        return neutralise(value, special)
    if isinstance(value, dict):
        return {
            neutralise(key, special): _neutralised(item, special) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_neutralised(item, special) for item in value]
    if isinstance(value, int | float) and not abs(value) <= 2**53:
        raise ValueError("a number is out of range")
    return value
