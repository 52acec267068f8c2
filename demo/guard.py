"""What the demo's web server accepts from a browser, and what its page may load: nothing from other hosts."""

import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any

MAX_BODY = 2 * 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # addresses
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # names in the Host header
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)  # Gradio's own scripts are inline and compile templates
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",  # Chromium resolves the hosts of links otherwise
}
EXACT: tuple[str, ...] = (
    "/",
    "/config",
    "/login",
    "/logout",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/user",
    "/token",
)
EXACT += (
    "/login_check",
    "/app_id",
    "/heartbeat",
    "/startup-events",
    "/reset",
    "/cancel",
    "/queue/join",
    "/queue/data",
)
EXACT += ("/info", "/run/predict")
FOLDERS = ("/assets/", "/static/", "/svelte/", "/heartbeat/")
CALLS = ("/queue/join", "/run/predict")
Message = dict[str, Any]


class Guard:
    """ASGI middleware. Refuses foreign hosts, foreign origins, large bodies, uploads and all paths that the page does not use."""

    def __init__(self, app: Any, hosts: Collection[str] = LOCAL, same_origin: bool = True):
        """hosts: names in the Host header, empty for any. same_origin: compare the Origin header with the Host header."""
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
            for _ in range(1000):  # a browser that is still sending sees the answer, not a reset
                if not (await receive()).get("more_body"):
                    break
            await send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [(b"content-type", b"text/plain")],
                }
            )
            await send({"type": "http.response.body", "body": b"refused"})
            return

        if scope["path"].endswith(CALLS):
            parts = []
            while (part := await receive())["type"] == "http.request":
                parts.append(part.get("body", b""))
                if not part.get("more_body"):
                    break
            else:
                return  # the browser has left
            body, original = b"".join(parts), receive
            if not _is_plain(body):
                await send(
                    {
                        "type": "http.response.start",
                        "status": 403,
                        "headers": [(b"content-type", b"text/plain")],
                    }
                )
                await send({"type": "http.response.body", "body": b"refused"})
                return
            rest = [{"type": "http.request", "body": body}]

            async def receive() -> Message:
                return rest.pop() if rest else await original()

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value)
                    for name, value in message["headers"]
                    if name.lower().decode() not in HEADERS
                ]
                message = {
                    **message,
                    "headers": [*kept, *((n.encode(), v.encode()) for n, v in HEADERS.items())],
                }
            await send(message)

        await self.app(scope, receive, secured)

    def _refusal(self, scope: Message) -> int:
        """The status that a request is refused with, 0 for none."""
        given: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host, origin = given.get("host", [""]), given.get("origin", [])
        name = host[0] if host[0].endswith("]") else host[0].rsplit(":", 1)[0]
        if len(host) != 1 or (self.hosts and name.lower() not in self.hosts):
            return 403
        if self.same_origin and any(one.partition("://")[2] != host[0] for one in origin):
            return 403
        path = scope["path"].removeprefix("/gradio_api") or "/"
        if path.rstrip("/") not in EXACT and path not in EXACT and not path.startswith(FOLDERS):
            return 403
        sizes = given.get("content-length", [])
        if "transfer-encoding" in given or (scope["method"] == "POST" and len(sizes) != 1):
            return 411
        return 413 if sizes and (not sizes[0].isdigit() or int(sizes[0]) > MAX_BODY) else 0


def _is_plain(body: bytes) -> bool:
    """Whether all inputs of a call are texts and numbers. Gradio downloads an address in an object."""
    try:
        inputs = json.loads(body).get("data")
    except (ValueError, AttributeError, RecursionError):
        return False
    return isinstance(inputs, list) and not any(isinstance(value, dict | list) for value in inputs)
