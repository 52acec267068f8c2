"""Headless Chromium for the demo's tests, and a proxy that replaces all other hosts."""

import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-sync",
    "--disable-quic",
]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
OWN = re.compile(
    r"(https?://)?(?!fonts)[\w.-]*(google\.com|googleapis\.com|gvt1\.com|gstatic\.com)[:/]"
)


@pytest.fixture(scope="module")
def foreign() -> Iterator[Any]:
    """A proxy that replaces all other hosts; .asked records the requests to them."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)  # type: ignore[attr-defined]
            self.send_error(404)

        do_CONNECT = do_POST = do_HEAD = do_OPTIONS = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(foreign) -> Iterator[Any]:
    """A headless Chromium; without one, the tests that use it are skipped."""
    pytest.importorskip("gradio", reason="no gradio: pip install -r requirements-demo.txt")
    driver = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -r requirements-parity.txt"
    )
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not program:
        pytest.skip("no Chromium: apt-get install chromium")
    # Requests to other hosts go to the proxy.
    proxy = f"--proxy-server=127.0.0.1:{foreign.server_port}"
    with driver.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=program, headless=True, args=[*FLAGS, proxy]
        )
        yield chromium
        chromium.close()


def asked_by_page(foreign: Any) -> list[str]:
    """Return requests to other hosts, without Chromium's to Google; font requests count."""
    return [asked for asked in foreign.asked if not OWN.match(asked)]


class Window:
    """A browser window on the demo."""

    def __init__(self, browser, url: str, login: str = "", **options: Any):
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(120_000)  # a loaded machine is slow
        self.asked: set[str] = set()
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        self.url = url
        self.page.goto(url, wait_until="domcontentloaded")
        for word in ("wrong", login) if login else ():
            self.page.get_by_label("username").fill("any")
            self.page.get_by_label("password").fill(word)
            self.page.get_by_role("button", name="Login").click()
            if word == "wrong":
                self.page.get_by_text("Incorrect Credentials").wait_for()
        self.box = self.page.get_by_placeholder("Message")
        self.box.wait_for()

    def ask(self, text: str, wait_for: str = "") -> None:
        self.box.fill(text)
        self.box.press("Enter")
        if wait_for:
            self.see(wait_for)
            self.idle()

    def see(self, text: str) -> None:
        self.page.get_by_text(text).last.wait_for()

    def idle(self) -> None:
        self.page.locator("#box .submit-button").wait_for()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def clear(self) -> None:
        """Press Clear and wait until the conversation is empty."""
        self.press("Clear")
        self.page.locator(".message.user").first.wait_for(state="detached")

    def said(self, of: str) -> list[str]:
        return self.page.locator(f".message.{of}").all_inner_texts()

    def meter(self) -> tuple[int, int]:
        """Return the displayed tokens of the context and of the turn."""
        match = re.search(
            r"context ([\d,]+) / 4,096\s+([\d,]+) tokens",
            self.page.locator(".meter").first.inner_text(),
        )
        assert match
        return int(match[1].replace(",", "")), int(match[2].replace(",", ""))

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_: Any) -> None:
        self.page.close()
