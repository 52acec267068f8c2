"""Sample texts of a checkpoint: completions of a base model, conversations of a chat model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.chat.trained_chat import offered
from evals.engines import NanoLlamaEngine
from evals.harness import Write
from evals.language_model import LanguageModel
from inference.chat_formats import ChatFormat, CompletionFormat, open_chat_format
from inference.chat_session import ChatSession
from inference.generation import stream
from inference.open_model import trained_chat, trained_context
from inference.sampling import Sampling

TEMPERATURES = (0.0, 0.8)
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "Once upon a time, in a village by the sea,",
    "Question: If a train travels 60 miles in an hour, how far does it travel in three hours?\n"
    "Answer:",
    "The three most important inventions of the nineteenth century were",
    "def fibonacci(n):",
)
CHAT_PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "What is 17 * 23?",
    "How many kilometres are 12 miles?",
    "Write two sentences about the sea.",
)
TOO_LONG = "(the prompt does not fit the context)"


def samples(
    model: LanguageModel, checkpoint: Path, prompts: Sequence[str] | None, tokens: int
) -> list[dict[str, Any]]:
    """Greedy and sampled (temperature 0.8) texts of prompts, as prompt, temperature and text.

    prompts: user messages for a chat model that models/hf.py loads; default: PROMPTS or
    CHAT_PROMPTS. A conversation also has "turn", its parts in order: kind (thought, content, call,
    result, note) and text. Tools are executed. tokens: limit of a completion or reply.
    """
    engine = model.engine
    if not isinstance(engine, NanoLlamaEngine):
        return completions(model, prompts or PROMPTS, tokens)
    chat = open_chat_format(checkpoint)
    if isinstance(chat, CompletionFormat):
        return completions(model, prompts or PROMPTS, tokens)
    context = min(trained_context(checkpoint) or engine.context, engine.context)
    tools = offered(trained_chat(checkpoint))

    def generator(temperature: float) -> Callable[[list[int]], Iterator[int]]:
        def generate(prompt: list[int]) -> Iterator[int]:
            new = min(tokens, context - len(prompt))
            if new < 1:
                raise ValueError(TOO_LONG)
            sampling = Sampling(temperature=temperature, top_p=0.95)
            events = stream(engine.model, [prompt], new, sampling, 0, chat.stop_ids)
            return (event.token for event in events)

        return generate

    return [
        {
            "prompt": prompt,
            "temperature": temperature,
            **conversation(chat, generator(temperature), prompt, tools),
        }
        for prompt in prompts or CHAT_PROMPTS
        for temperature in TEMPERATURES
    ]


def conversation(
    chat: ChatFormat,
    generate: Callable[[list[int]], Iterator[int]],
    prompt: str,
    tools: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """One user message and the model's turn: "text", its answer, and "turn", all parts."""
    session, turn = ChatSession(chat, generate, tools=tools), list[dict[str, str]]()
    try:
        for kind, text in session.ask(prompt):
            if turn and turn[-1]["kind"] == kind and kind in ("thought", "content"):
                turn[-1]["text"] += text
            else:
                turn.append({"kind": kind, "text": text})
    except ValueError as error:  # the prompt, the template or the context
        turn.append({"kind": "note", "text": str(error)})
    answers = [part["text"] for part in turn if part["kind"] == "content"]
    return {"text": answers[-1] if answers else None, "turn": turn}


def completions(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Continuations of prompts; "text" is None if the prompt does not fit the context."""
    requests = [
        Write(prompt, max_tokens=tokens, temperature=temperature, top_p=0.95)
        for prompt in prompts
        for temperature in TEMPERATURES
    ]
    answers: dict[int, Any] = {i: answer for batch in model.answer(requests) for i, answer in batch}
    return [
        {
            "prompt": request.prompt,
            "temperature": request.temperature,
            "text": getattr(answers[i], "text", None),
        }
        for i, request in enumerate(requests)
    ]


def as_text(sample: dict[str, Any]) -> str:
    """A sample in plain text; brackets enclose what the model generated."""
    if "turn" not in sample:
        return f"{sample['prompt']}[{sample['text']}]\n(temperature {sample['temperature']})\n"
    lines = [f"user: {sample['prompt']}"]
    for part in sample["turn"]:
        generated = part["kind"] in ("thought", "content", "call")
        kind = "assistant" if part["kind"] == "content" else part["kind"]
        lines.append(f"{kind}: [{part['text']}]" if generated else f"{kind}: {part['text']}")
    return "\n".join([*lines, f"(temperature {sample['temperature']})"]) + "\n"
