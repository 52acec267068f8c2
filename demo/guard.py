"""Security of the demo's web server: request checks and headers that forbid other hosts."""

import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any

MAX_BODY = 2 * 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # names in the Host header
# Gradio's scripts are inline and compile templates, hence 'unsafe-inline' and 'unsafe-eval'.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",  # else Chromium resolves the hosts of links
}
PATHS = (
    "/",
    "/config",
    "/login",
    "/logout",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/user",
    "/token",
    "/login_check",
    "/app_id",
    "/heartbeat",
    "/startup-events",
    "/reset",
    "/cancel",
    "/queue/join",
    "/queue/data",
    "/info",
    "/run/predict",
)
FOLDERS = ("/assets/", "/static/", "/svelte/", "/heartbeat/")
CALLS = ("/queue/join", "/run/predict")
Message = dict[str, Any]


class Guard:
    """ASGI middleware: refuses other hosts and origins, large bodies, uploads and unused paths."""

    def __init__(self, app: Any, hosts: Collection[str] = LOCAL, same_origin: bool = True):
        """hosts: allowed Host headers, () for any. same_origin: Origin must match Host."""
        self.app, self.hosts, self.same_origin = app, hosts, same_origin

    async def __call__(
        self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        status = self._refusal(scope)
        if status:
            for _ in range(1000):  # read the body: a sending browser would see a reset otherwise
                if not (await receive()).get("more_body"):
                    break
            await _refuse(send, status)
            return

        if scope["path"].endswith(CALLS):
            chunks = []
            while (chunk := await receive())["type"] == "http.request":
                chunks.append(chunk.get("body", b""))
                if not chunk.get("more_body"):
                    break
            else:
                return  # the browser has disconnected
            body, original = b"".join(chunks), receive
            if not _is_plain(body):
                await _refuse(send, 403)
                return
            unread = [{"type": "http.request", "body": body}]

            async def receive() -> Message:
                return unread.pop() if unread else await original()

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (name, value)
                    for name, value in message["headers"]
                    if name.lower().decode() not in HEADERS
                ]
                headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_secured)

    def _refusal(self, scope: Message) -> int:
        """Return the HTTP status that refuses a request, 0 to accept it."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host, origins = headers.get("host", [""]), headers.get("origin", [])
        name = host[0] if host[0].endswith("]") else host[0].rsplit(":", 1)[0]
        if len(host) != 1 or (self.hosts and name.lower() not in self.hosts):
            return 403
        if self.same_origin and any(origin.partition("://")[2] != host[0] for origin in origins):
            return 403
        path = scope["path"].removeprefix("/gradio_api") or "/"
        if path.rstrip("/") not in PATHS and path not in PATHS and not path.startswith(FOLDERS):
            return 403
        sizes = headers.get("content-length", [])
        if "transfer-encoding" in headers or (scope["method"] == "POST" and len(sizes) != 1):
            return 411
        return 413 if sizes and (not sizes[0].isdigit() or int(sizes[0]) > MAX_BODY) else 0


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"refused"})


def _is_plain(body: bytes) -> bool:
    """Return True if a call's inputs are text or numbers: Gradio downloads URLs in objects."""
    try:
        inputs = json.loads(body).get("data")
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(inputs, list) and not any(isinstance(value, dict | list) for value in inputs)
