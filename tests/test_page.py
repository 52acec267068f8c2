"""The demo's page: no requests to other hosts, text shown as written, no other clients."""
# ruff: noqa: F811

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from browsing import Window, asked_by_page, browser, foreign  # noqa: F401  (fixtures)

import demo_ui
from demo.page import build
from demo.talk import GenerationSettings, Turn
from evals.report import page as evals_page


class Scripted:
    """A model that replies with the given parts."""

    context, is_base, tools = 1000, False, ()

    def __init__(self, name: str, parts: list[tuple[str, str]]):
        self.name, self.parts, self.heard = name, parts, []

    def answer(
        self, turn: Turn, before: Any, how: GenerationSettings, stopped: Any
    ) -> Iterator[None]:
        self.heard.append((turn.text, how.system))
        for kind, text in self.parts:
            for piece in (
                re.findall(r".{1,40}", text, re.DOTALL)
                if kind in ("thought", "content")
                else [text]
            ):
                turn.add(kind, piece)
                yield


@contextmanager
def shown(browser, monkeypatch, *voices: Any) -> Iterator[Window]:
    """Open a browser window on a demo of these models."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    page = build(voices)
    try:
        with Window(
            browser, demo_ui.launch(page, "127.0.0.1", demo_ui.free_port("127.0.0.1", 0))
        ) as window:
            yield window
    finally:
        page.close()


ASKS = """![]({0}/a.png)
<img src="{0}/b.png" srcset="{0}/c.png 2x"> <svg><image href="{0}/d.svg"/></svg> \
<video poster="{0}/e" src={0}/f></video>
<link rel="stylesheet" href="{0}/g.css"><link rel=preconnect href="{0}">\
<style>@import "{0}/h.css";</style>
<iframe src="{0}/i"></iframe><object data="{0}/j"></object><embed src="{0}/k">\
<input type=image src="{0}/l">
<p style="background:url({0}/m)">x</p><meta http-equiv=refresh content="0;url={0}/n">\
<base href="{0}/">
<script src="{0}/o.js"></script><img src=x onerror="fetch('{0}/p')"></script>\
<script>fetch("{0}/q")</script>

![x][r] `open

<img src={0}/s> `

[r]: {0}/t.png

```mermaid
flowchart TD
    A@{{ img: "{0}/u.png", label: "x" }} --> B["<img src='{0}/v.png'>"]
```

$$\\includegraphics{{{0}/w.png}} \\href{{{0}/x}}{{y}}$$

| ![]({0}/y.png) |
|---|
| <img src={0}/z.png> |
"""


def test_nothing_that_is_shown_asks_another_host(browser, foreign, monkeypatch):
    kinds = ("thought", "content", "call", "result", "note")
    hosts = [f"http://{kind}.foreign.example" for kind in (*kinds, "user", "name")]
    parts = [
        (kind, ASKS.format(host))
        for kind, host in zip(("thought", "content", "call", "result", "note"), hosts, strict=False)
    ]
    parts += [("call", "short()"), ("result", "![](http://203.0.113.7/a)")]
    name = f"</title></script><img src={hosts[6]}/a.png>![]({hosts[6]}/b.png).gguf"
    with shown(
        browser, monkeypatch, Scripted(name, parts), Scripted("x", [("content", "Yes.")])
    ) as window:
        control = browser.new_page()
        control.set_content("<img src=http://control.foreign.example/a.png>", wait_until="load")
        control.close()
        # Other requests would be recorded.
        assert asked_by_page(foreign) == ["http://control.foreign.example/a.png"]
        foreign.asked.clear()
        window.ask(ASKS.format(hosts[5]), "Yes.")
        for fold in window.page.locator(".thought-group > .title").all():
            fold.click()
        window.page.wait_for_timeout(1500)
        assert asked_by_page(foreign) == [] and window.asked == {window.url.split("/")[2]}
        window.see("content.foreign.example/b.png")
        assert not window.page.locator("img[src*=foreign], .mermaid svg, iframe").count()


def test_text_is_shown_as_it_was_written(browser, monkeypatch):
    written = (
        "2*3*4, f(x)*g(x)*h, 2**3**4, __init__, 3~5 and 6~7, a < b > c, <b>x</b>, &lt;, "
        "`2*3*4 <b>` and \u00b1*\u00b1*x"
    )
    code = "    def f(a):\n        return a*2*3 < 4 and '&lt;'"
    typed = f"  {written}\n\n    # no heading\n1. - *x* _y_ $$z$$ [a](b) !"
    model = Scripted("m", [("content", f"{written} **bold**\n```python\n{code}\n```")])
    with shown(browser, monkeypatch, model) as window:
        window.ask(typed, "bold")
        assert model.heard[-1][0] == typed and window.said("user")[-1] == typed.replace("\t", " ")
        answer = window.said("bot")[-1]
        assert written.replace("`", "") in answer and "**bold**" not in answer
        assert window.page.locator(".message.bot pre code").inner_text().strip("\n") == code
        window.page.get_by_label("Edit").click()
        box = window.page.locator(".edit-textarea")
        assert box.input_value() == typed
        box.fill(f"{typed}*")
        window.page.get_by_label("Submit").click()
        window.page.locator(".message.user", has_text=f"{typed}*"[-8:]).wait_for()
        window.idle()
        assert model.heard[-1][0] == f"{typed}*"


def test_half_an_emoji_does_not_end_the_conversation(browser, monkeypatch):
    half, both = "\ud83d", "\U0001f600"
    parts = [
        ("thought", half),
        ("content", f"a{half}"),
        ("call", half),
        ("result", half),
        ("note", half),
        ("content", "done"),
    ]
    model = Scripted("m", parts)
    with shown(browser, monkeypatch, model) as window:
        for number, (text, heard) in enumerate(
            ((f"x{half}y", "x\ufffdy"), (half, "\ufffd"), (f"{both}z", f"{both}z"))
        ):
            window.page.evaluate(
                """text => { const box = document.querySelector("#box textarea"); \
box.value = JSON.parse(text);
                box.dispatchEvent(new Event("input")); }""",
                json.dumps(text),
            )
            window.box.press("Enter")
            window.page.locator(".message.user").nth(number).wait_for()
            window.idle()
            assert model.heard[-1][0] == heard
        window.clear()
        window.ask("again", "done")


def test_the_demo_refuses_uploads_other_hosts_and_other_pages(browser, monkeypatch):
    with shown(browser, monkeypatch, Scripted("m", [("content", "Yes.")])) as window:
        host = window.url.split("/")[2]

        def ask(
            path: str, method: str = "GET", body: bytes | None = None, **headers: str
        ) -> tuple[int, Any]:
            connection = http.client.HTTPConnection(host, timeout=20)
            connection.request(
                method,
                path,
                body,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return answer.status, answer.headers

        form = (
            b'--x\r\nContent-Disposition: form-data; name="files"; '
            b'filename="f"\r\n\r\nabc\r\n--x--\r\n'
        )
        for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload/"):
            assert ask(path, "POST", form, Content_Type="multipart/form-data; boundary=x")[0] == 403
        for path in (
            "/gradio_api/file=README.md",
            "/gradio_api/proxy=http://a.hf.space/",
            "/gradio_api/call/x",
            "/docs",
        ):
            assert ask(path)[0] == 403, path
        status, headers = ask("/")
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert (
            ask("/", Host="rebound.example")[0]
            == ask("/config", Host=f"rebound.example:{host[-5:]}")[0]
            == 403
        )
        assert ask("/gradio_api/queue/join", "POST", b"{}", Origin="http://pages.example")[0] == 403
        assert ask("/gradio_api/queue/join", "POST", b"a" * 3_000_000)[0] == 413
        file = {"path": "http://file.foreign.example/", "meta": {"_type": "gradio.FileData"}}
        call = {"fn_index": 0, "data": [None, file, "", True, 1, 1, 0, 5, -1], "session_hash": "a"}
        assert (
            ask(
                "/gradio_api/queue/join",
                "POST",
                json.dumps(call).encode(),
                Content_Type="application/json",
            )[0]
            == 403
        )
        window.ask("still there?", "Yes.")


def test_a_report_asks_no_other_host(browser, foreign, tmp_path):
    hostile = ASKS.format("http://report.foreign.example")
    sample = {"prompt": hostile, "text": hostile, "temperature": 0}
    kinds = ("thought", "content", "call", "result", "note", hostile)
    chat = {**sample, "turn": [{"kind": kind, "text": hostile} for kind in kinds]}
    gate = {
        "outcome": f'"></span>{hostile}',
        "step": hostile,
        "gates": [],
        "values": [],
        "advice": hostile,
        "accepted": hostile,
    }
    training = {
        "gates": [{**gate, "time": hostile}],
        "tuning": [],
        "tokens": 1,
        "steps": 1,
        "hours": 0.0,
        "incidents": {},
    }
    training |= {
        "phases": [],
        "curve": [(0, 1.0), (1, 1.0)],
        "smooth": [(0, 1.0)],
        "held_out": [],
        "environment": {},
    }
    report = dict.fromkeys(("name", "checkpoint", "made", "checkpoint_hash"), hostile) | {
        "parameters": 1,
        "training": training,
    }
    report |= {
        "published": {"models": [], "sources": {}},
        "samples": [sample, chat],
        "not_measured": {hostile: hostile},
    }
    report |= {
        "targets": [],
        "contamination": None,
        "environment": {hostile: hostile},
        "config": {"model_type": hostile},
    }
    report |= {name: {} for name in ("evaluations", "scores", "stages", "hashes")}
    path = tmp_path / "report.html"
    foreign.asked.clear()
    for policy in (True, False):  # the policy is the second barrier; the first is escaping
        text = evals_page.page(report, {})
        assert "Content-Security-Policy" in text
        path.write_text(
            text if policy else text.replace("Content-Security-Policy", "x"), encoding="utf-8"
        )
        window = browser.new_page()
        window.goto(path.as_uri(), wait_until="load")
        window.wait_for_timeout(500)
        assert (
            window.locator("img, iframe, script, link, object").count() == 0
            and asked_by_page(foreign) == []
        )
        window.close()
