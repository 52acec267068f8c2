"""The demo's Gradio page: chats side by side, one input box, settings."""

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
from demo.talk import ChatModel, GenerationSettings, Turn, round_robin
from inference.sampling import Sampling
from inference.streaming import replace_surrogates

REFRESH_SECONDS = 0.05  # interval of page updates during generation
SHORT = 60  # maximum characters of a tool result in the title of its folded block
HEIGHT = "calc(100dvh - 315px)"  # leaves room for the rest of the page
# Two chats get less height on a phone, which shows one above the other.
HEIGHT_OF_TWO = f"clamp(260px, (100vw - 700px) * 10, {HEIGHT})"
CSS = """
.gradio-container .fillable {
  max-width: 900px !important; margin: 0 auto !important; padding: min(24px, 2vw) !important;
}
.gradio-container:has(.beside) .fillable { max-width: 1500px !important; }
.meter {
  display: flex; flex-wrap: wrap; align-items: center; gap: 2px 10px;
  font-size: 0.8rem; opacity: 0.8;
}
.meter progress { width: 90px; height: 8px; }
.heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px; }
.heading b { font-size: 1.15rem; }
.heading span { opacity: 0.7; font-size: 0.85rem; }
.message.user .md p { white-space: pre-wrap; }
.thought-group > .title p { margin: 0 !important; overflow-wrap: anywhere; }
"""


@dataclass
class Visit:
    """Conversation state of one browser window."""

    turns: list[list[Turn]] = field(default_factory=list)  # [turn][model]
    stopped: bool = False


def bubbles(turns: Sequence[Turn], live: bool = False) -> list[dict[str, Any]]:
    """Convert turns to gr.Chatbot messages; thoughts and tool calls are foldable."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        shown.append({"role": "user", "content": _text(plain(turn.text))})
        calls: list[dict[str, Any]] = []  # tool calls without a result
        for number, (kind, text) in enumerate(turn.parts):
            growing = live and turn is turns[-1] and number == len(turn.parts) - 1
            if kind == "result" and calls:
                call = calls.pop(0)
                if len(text) <= SHORT and "\n" not in text:
                    call["metadata"]["title"] += f" \u2192 {plain(text)}"
                call["metadata"]["status"] = "done"
                call["content"] = _text(_fenced(replace_surrogates(text)))
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
    """Wrap text for Gradio, which removes the indentation of a bare string."""
    return {"type": "text", "text": content}


def _fenced(text: str) -> str:
    longest = max((len(word) for word in text.split() if set(word) == {"`"}), default=0)
    fence = "`" * max(3, 1 + longest)
    return f"{fence}\n{text}\n{fence}"


def meter(turn: Turn | None, context: int) -> str:
    """Return HTML with context usage, generation speed and the seed that reproduces the turn."""
    used = turn.context_tokens if turn else 0
    facts = [f"context {used:,} / {context:,}"]
    if turn and turn.tokens:
        facts.append(f"{turn.tokens:,} tokens")
        if turn.decode_seconds:
            facts.append(f"{turn.decode_tokens / turn.decode_seconds:,.1f} tokens/s")
        facts += [f"first after {turn.prefill_seconds:.2f} s", f"seed {turn.seed}"]
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return f'<div class="meter"><progress value="{used}" max="{context}"></progress>{spans}</div>'


def build(models: Sequence[ChatModel]) -> Any:
    """Build the page (gr.Blocks). The models serve one visitor at a time."""
    import gradio as gr

    busy = threading.Lock()  # a turn may still be running after its visitor has left
    smallest = min(model.context for model in models)

    def chat_values(visit: Visit, live: bool = False) -> list[Any]:
        """Return the values of each model's chat and meter."""
        values: list[Any] = []
        for number, model in enumerate(models):
            turns = [row[number] for row in visit.turns]
            values += [bubbles(turns, live), meter(turns[-1] if turns else None, model.context)]
        return values

    def input_box(running: bool, **properties: Any) -> Any:
        return gr.Textbox(submit_btn=not running, stop_btn=running, **properties)

    def answer(visit: Visit, text: str, *settings: Any) -> Iterator[list[Any]]:
        """Run a turn; yield the values of the page's outputs."""
        if not text.strip():
            yield [gr.Textbox(), *chat_values(visit)]
            return
        system, tools, temperature, top_p, top_k, max_new_tokens, seed = settings
        text, system = replace_surrogates(text), replace_surrogates(system or "")
        visit.stopped = False
        seed = int(seed) if seed is not None and seed >= 0 else random.randrange(2**31)
        sampling = Sampling(1.0, temperature, int(top_k), top_p)
        generation = GenerationSettings(sampling, int(max_new_tokens), seed, system, tools)
        row = [Turn(text) for _ in models]
        visit.turns.append(row)
        yield [input_box(True, value=""), *chat_values(visit, live=True)]
        before = [
            [earlier[number] for earlier in visit.turns[:-1]] for number in range(len(models))
        ]
        answers = [
            model.answer(row[i], before[i], generation, lambda: visit.stopped)
            for i, model in enumerate(models)
        ]
        try:
            with busy, closing(round_robin(answers)) as steps:
                last = 0.0
                for _ in steps:
                    if time.monotonic() - last > REFRESH_SECONDS:
                        yield [gr.Textbox(), *chat_values(visit, live=True)]
                        last = time.monotonic()
        except Exception:
            visit.turns = [turns for turns in visit.turns if turns is not row]
            yield [input_box(False), *chat_values(visit)]
            raise
        yield [input_box(False), *chat_values(visit)]

    def regenerate(visit: Visit, *settings: Any) -> Iterator[list[Any]]:
        text = visit.turns.pop()[0].text if visit.turns else ""
        yield from answer(visit, text, *settings)

    def editor(chat: int) -> Any:
        def edited(visit: Visit, event: gr.EditData, *settings: Any) -> Iterator[list[Any]]:
            """Answer an edited message; later turns are removed."""
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
        return [input_box(False), *chat_values(visit)]  # without a value, the box keeps its text

    with gr.Blocks(title="NanoLlama", analytics_enabled=False, fill_width=True) as page:
        visit = gr.State(Visit())
        gr.HTML(
            f'<div class="heading"><b>NanoLlama</b><span>{escape(heading(models))}</span></div>'
        )
        columns: list[Any] = []
        with gr.Row(elem_classes="beside" if len(models) > 1 else None):
            for model in models:
                with gr.Column(min_width=320):
                    chat = gr.Chatbot(
                        label=model.name,
                        show_label=len(models) > 1,
                        editable="user",
                        height=HEIGHT if len(models) == 1 else HEIGHT_OF_TWO,
                        min_height=260,
                        buttons=["copy"],
                        feedback_options=None,
                        placeholder="Type the beginning of a text"
                        if model.is_base
                        else "Ask something",
                    )
                    columns += [chat, gr.HTML(meter(None, model.context))]
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
                gr.Checkbox(True, label=tools_label(models)),
                gr.Slider(0, 2, 0.7, step=0.05, label="Temperature (0: greedy)"),
                gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p"),
                gr.Slider(0, 200, 0, step=1, label="Top-k (0: all)"),
                gr.Slider(
                    1, smallest, min(512, smallest), step=1, label="Maximum tokens per reply"
                ),
                gr.Number(-1, precision=0, label="Seed (-1: random)"),
            ]
        outputs = [box, *columns]
        generating: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        immediate: dict[str, Any] = {
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        box.submit(answer, [visit, box, *settings], outputs, **generating)
        retry.click(regenerate, [visit, *settings], outputs, **generating)
        for number, chat in enumerate(columns[::2]):
            chat.edit(editor(number), [visit, *settings], outputs, **generating)
            chat.clear(clear, [visit], outputs, **immediate)
        box.stop(stop, [visit], None, **immediate)
        empty.click(clear, [visit], outputs, **immediate)
    return page


def tools_label(models: Sequence[ChatModel]) -> str:
    """Return the label of the tools switch: the names of all offered tools."""
    names = dict.fromkeys(name_of(tool) for model in models for tool in model.tools)
    return f"Tools: {', '.join(names) or 'none'}"


def heading(models: Sequence[ChatModel]) -> str:
    """Return the page heading: the models' names, and a remark on base models."""
    names = " and ".join(model.name for model in models)
    has_base = any(model.is_base for model in models)
    return f"{names}; a base model continues your text" if has_base else names
