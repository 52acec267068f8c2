"""The page: chats side by side, one box to type in, settings below. What is said in them is talk.py's."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from html import escape
from typing import Any

from data.chat.trained_chat import name_of
from demo.markup import markdown, plain
from demo.talk import ChatModel, GenerationSettings, Turn, in_turns
from inference.sampling import Sampling
from inference.streaming import whole_characters

EVERY = 0.05  # seconds between two pictures of a turn that is being said
SHORT = 60  # characters of a tool's result that are seen without unfolding it
HEIGHT = "calc(100dvh - 315px)"  # the rest of the page then fits the window
HEIGHT_OF_TWO = f"clamp(260px, (100vw - 700px) * 10, {HEIGHT})"  # lower on a phone, where they stand one above the other
CSS = """
.gradio-container .fillable { max-width: 900px !important; margin: 0 auto !important; padding: min(24px, 2vw) !important; }
.gradio-container:has(.beside) .fillable { max-width: 1500px !important; }
.meter { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 10px; font-size: 0.8rem; opacity: 0.8; }
.meter progress { width: 90px; height: 8px; }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; }
.heading b { font-size: 1.15rem; }
.heading span { opacity: 0.7; font-size: 0.85rem; }
.message.user .md p { white-space: pre-wrap; }
.thought-group > .title p { margin: 0 !important; overflow-wrap: anywhere; }
"""


@dataclass
class Visit:
    """What one browser window has said and heard."""

    turns: list[list[Turn]] = field(default_factory=list)  # of each turn, one for each model
    stopped: bool = False


def bubbles(turns: Sequence[Turn], live: bool = False) -> list[dict[str, Any]]:
    """Turns as messages of gr.Chatbot; thoughts, and tools with their results, can be folded."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown.append({"role": "user", "content": _text(plain(turn.text))})
        calls: list[dict[str, Any]] = []  # without a result yet
        for number, (kind, text) in enumerate(turn.parts):
            growing = live and turn is turns[-1] and number == len(turn.parts) - 1
            if kind == "result" and calls:
                call = calls.pop(0)
                about = call["metadata"]
                about["title"] += (
                    f" \u2192 {plain(text)}" if len(text) <= SHORT and "\n" not in text else ""
                )
                call["content"], about["status"] = _text(_fenced(whole_characters(text))), "done"
            elif kind in ("thought", "call"):
                title = "Thought" if kind == "thought" else f"Tool: {plain(text)}"
                content = _text(markdown(text) if kind == "thought" else "")
                status = "pending" if growing else "done"
                shown.append(
                    {
                        "role": "assistant",
                        "content": content,
                        "metadata": {"title": title, "status": status},
                    }
                )
                calls += [shown[-1]] if kind == "call" else []
            elif text:
                content = _text(f"\u26a0 *{plain(text)}*" if kind == "note" else markdown(text))
                shown.append({"role": "assistant", "content": content})
        if live and turn is turns[-1] and not turn.parts:
            shown.append({"role": "assistant", "content": "\u2026"})
    return shown


def _text(content: str) -> dict[str, str]:
    """Content that Gradio takes as it is; it removes the indentation of a bare string."""
    return {"type": "text", "text": content}


def _fenced(text: str) -> str:
    fence = "`" * max(
        3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0)
    )
    return f"{fence}\n{text}\n{fence}"


def meter(turn: Turn | None, context: int) -> str:
    """HTML: how full the context is, how fast the model spoke, and the seed that says the same again."""
    held = turn.held if turn else 0
    words = [f"context {held:,} / {context:,}"]
    if turn and turn.tokens:
        words.append(f"{turn.tokens:,} tokens")
        words += [f"{turn.later / turn.seconds:,.1f} tokens/s"] if turn.seconds else []
        words += [f"first after {turn.first:.2f} s", f"seed {turn.seed}"]
    spans = "".join(f"<span>{escape(word)}</span>" for word in words)
    return f'<div class="meter"><progress value="{held}" max="{context}"></progress>{spans}</div>'


def build(voices: Sequence[ChatModel]) -> Any:
    """gr.Blocks of the demo; the models speak to one visitor at a time."""
    import gradio as gr

    busy = threading.Lock()  # a visitor who leaves may have a turn that has not ended yet
    smallest = min(voice.context for voice in voices)

    def picture(visit: Visit, live: bool = False) -> list[Any]:
        """Values of each model's chat and meter."""
        shown: list[Any] = []
        for number, voice in enumerate(voices):
            turns = [row[number] for row in visit.turns]
            shown += [bubbles(turns, live), meter(turns[-1] if turns else None, voice.context)]
        return shown

    def typing(running: bool, **more: Any) -> Any:
        return gr.Textbox(submit_btn=not running, stop_btn=running, **more)

    def answer(visit: Visit, text: str, *settings: Any) -> Iterator[list[Any]]:
        """The next turn, in pictures of the whole page."""
        if not text.strip():
            yield [gr.Textbox(), *picture(visit)]
            return
        system, tools, temperature, top_p, top_k, new, seed = settings
        text, system = whole_characters(text), whole_characters(system or "")
        visit.stopped = False
        seed = int(seed) if seed is not None and seed >= 0 else random.randrange(2**31)
        how = GenerationSettings(
            Sampling(1.0, temperature, int(top_k), top_p), int(new), seed, system, tools
        )
        row = [Turn(text) for _ in voices]
        visit.turns.append(row)
        yield [typing(True, value=""), *picture(visit, live=True)]
        before = [
            [earlier[number] for earlier in visit.turns[:-1]] for number in range(len(voices))
        ]
        said = [
            voice.answer(row[i], before[i], how, lambda: visit.stopped)
            for i, voice in enumerate(voices)
        ]
        try:
            with busy, closing(in_turns(said)) as steps:
                last = 0.0
                for _ in steps:
                    if time.monotonic() - last > EVERY:
                        yield [gr.Textbox(), *picture(visit, live=True)]
                        last = time.monotonic()
        except Exception:
            visit.turns = [other for other in visit.turns if other is not row]
            yield [typing(False), *picture(visit)]
            raise
        yield [typing(False), *picture(visit)]

    def again(visit: Visit, *settings: Any) -> Iterator[list[Any]]:
        text = visit.turns.pop()[0].text if visit.turns else ""
        yield from answer(visit, text, *settings)

    def editor(chat: int) -> Any:
        def edited(visit: Visit, event: gr.EditData, *settings: Any) -> Iterator[list[Any]]:
            """A user's message in one of the chats reads otherwise now; what came after it goes."""
            index = event.index if isinstance(event.index, int) else event.index[0]
            shown = bubbles([row[chat] for row in visit.turns])[: index + 1]
            del visit.turns[sum(bubble["role"] == "user" for bubble in shown) - 1 :]
            yield from answer(visit, event.value, *settings)

        return edited

    def stop(visit: Visit) -> None:
        visit.stopped = True

    def clear(visit: Visit) -> list[Any]:
        visit.stopped = True
        visit.turns.clear()
        return [
            typing(False),
            *picture(visit),
        ]  # the box keeps what the visitor has typed meanwhile

    with gr.Blocks(title="NanoLlama", analytics_enabled=False, fill_width=True) as page:
        visit = gr.State(Visit())
        gr.HTML(f'<div class="heading"><b>NanoLlama</b><span>{escape(about(voices))}</span></div>')
        columns: list[Any] = []
        with gr.Row(elem_classes="beside" if len(voices) > 1 else None):
            for voice in voices:
                with gr.Column(min_width=320):
                    chat = gr.Chatbot(
                        label=voice.name,
                        show_label=len(voices) > 1,
                        editable="user",
                        height=HEIGHT if len(voices) == 1 else HEIGHT_OF_TWO,
                        min_height=260,
                        buttons=["copy"],
                        feedback_options=None,
                        placeholder="Type the beginning of a text"
                        if voice.is_base
                        else "Ask something",
                    )
                    columns += [chat, gr.HTML(meter(None, voice.context))]
        box = gr.Textbox(
            show_label=False,
            placeholder="Message",
            submit_btn=True,
            autofocus=True,
            max_lines=8,
            elem_id="box",
        )
        with gr.Row():
            retry = gr.Button("Retry", size="sm", min_width=80)
            empty = gr.Button("Clear", size="sm", min_width=80)
        with gr.Accordion("Settings", open=False):
            settings = [
                gr.Textbox(label="System prompt", lines=2, max_lines=8),
                gr.Checkbox(True, label=tools_label(voices)),
                gr.Slider(0, 2, 0.7, step=0.05, label="Temperature (0: the likeliest token)"),
                gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p"),
                gr.Slider(0, 200, 0, step=1, label="Top-k (0: all)"),
                gr.Slider(
                    1, smallest, min(512, smallest), step=1, label="Tokens of a reply at most"
                ),
                gr.Number(-1, precision=0, label="Seed (-1: another each time)"),
            ]
        outputs = [box, *columns]
        asks: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        box.submit(answer, [visit, box, *settings], outputs, **asks)
        retry.click(again, [visit, *settings], outputs, **asks)
        for number, chat in enumerate(columns[::2]):
            chat.edit(editor(number), [visit, *settings], outputs, **asks)
            chat.clear(clear, [visit], outputs, **quick)
        box.stop(stop, [visit], None, **quick)
        empty.click(clear, [visit], outputs, **quick)
    return page


def tools_label(voices: Sequence[ChatModel]) -> str:
    """Names of the tools that the models are offered."""
    names = dict.fromkeys(name_of(tool) for voice in voices for tool in voice.tools)
    return f"Tools: {', '.join(names) or 'none'}"


def about(voices: Sequence[ChatModel]) -> str:
    names = " and ".join(voice.name for voice in voices)
    base = [voice for voice in voices if voice.is_base]
    return f"{names}; a base model continues what you type" if base else names
