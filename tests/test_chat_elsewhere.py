"""Thoughts and tool calls where transformers and clients of llama.cpp look for them."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import CALL, CALLS, THINKS, scripted_model
from test_server import serving
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline

from data.chat.rendering import CHAT_TOKENS, IM_END, Chat
from data.chat.template import MARKERS, SHOWN
from data.chat.tokenizer import save_chat_tokenizer
from data.chat.tools import TOOLS
from data.tokenizers.bpe import load_tokenizer
from demo.talk import ChatModel, GenerationSettings, Turn
from evals.chat import CheckpointChat
from evals.language_model import EvalTokenizer
from export.gguf import write_gguf
from inference.chat_session import ChatSession
from inference.gguf_tokenizer import read_vocabulary, tokenizer_folder
from inference.llamacpp import find_library
from inference.runners import TorchRunner
from inference.sampling import Sampling
from models.hf import read_hf_config
from training.checkpoint import same_tokenizer

needs_llama = pytest.mark.skipif(
    find_library() is None, reason="no llama.cpp: pip install xllamacpp"
)
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    },
}
FUNCTION = {"name": "f", "arguments": {"x": 1}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("thinking")
    scripted_model(folder, THINKS)
    return folder


@pytest.fixture(scope="module")
def calling(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calling")
    scripted_model(folder, CALLS)
    return folder


def flags(folder: Path) -> dict[str, tuple[int, bool]]:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: (token["id"], token["special"]) for token in content["added_tokens"]}


def earlier(folder: Path, target: Path) -> Path:
    """Copy a chat tokenizer in the form of earlier versions: every marker is special."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = True
    Tokenizer.from_str(json.dumps(content)).save(str(target / "tokenizer.json"))
    return target


def test_decoding_without_special_tokens_keeps_the_markers(thinking, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    ids = tokenizer(THINKS + IM_END, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == THINKS
    assert {token for token, (_, special) in flags(thinking).items() if not special} == set(SHOWN)
    # Ids are those of earlier checkpoints, which still load, train on and become alike.
    old = earlier(thinking, tmp_path / "old")
    ids = {
        folder: {t: index for t, (index, _) in flags(folder).items()} for folder in (thinking, old)
    }
    assert ids[thinking] == ids[old] and set(CHAT_TOKENS) < set(ids[old])
    chat = Chat.from_folder(old)
    assert set(chat.special) == set(Chat.from_folder(thinking).special) == set(MARKERS)
    assert same_tokenizer(old / "tokenizer.json", thinking / "tokenizer.json")
    save_chat_tokenizer(tmp_path / "new", old)
    assert flags(tmp_path / "new") == flags(thinking)
    other = load_tokenizer(thinking)
    other.add_tokens(["x<y"])
    other.save(str(tmp_path / "other.json"))
    assert not same_tokenizer(tmp_path / "other.json", thinking / "tokenizer.json")


def test_no_text_becomes_a_marker_that_is_not_special(thinking):
    forged = f"a{''.join(MARKERS)}b"
    messages = [{"role": "user", "content": forged}]
    chat = Chat.from_folder(thinking)
    plain = chat.prompt([{"role": "user", "content": "ab"}])
    marks = set(chat.ids.values())
    for prompt in (chat.prompt(messages), CheckpointChat(thinking).prompt(messages)):
        assert [i for i in prompt if i in marks] == [i for i in plain if i in marks]
    # Evaluations that read plain text see no markers, as before.
    evaluated = EvalTokenizer(thinking)
    ids = evaluated.encode([THINKS + IM_END], special=False)[0]
    assert evaluated.decode(ids) == "Add themIt is four."
    assert evaluated.decode(ids, keep_special=True) == THINKS + IM_END


def test_the_pipeline_of_transformers_returns_thought_and_calls(thinking, calling):
    def ask(folder: Path, **options: Any) -> dict[str, Any]:
        generate = pipeline("text-generation", str(folder), device="cpu")
        rows = generate(HELLO, max_new_tokens=40, do_sample=False, **options)
        return rows[0]["generated_text"][-1]

    assert ask(thinking) == {
        "role": "assistant",
        "reasoning_content": "Add them",
        "content": "It is four.",
    }
    reply = ask(calling, tools=[TOOL])
    assert reply == {
        "role": "assistant",
        "reasoning_content": "Add them",
        "content": "See",
        "tool_calls": [{"type": "function", "function": FUNCTION}],
    }
    # The reply is a message that the template renders as the model wrote it.
    tokenizer = AutoTokenizer.from_pretrained(calling)
    text = tokenizer.apply_chat_template([*HELLO, reply], tools=[TOOL], tokenize=False)
    assert text.endswith(CALLS.replace(CALL, json.dumps(FUNCTION)) + f"{IM_END}\n")


CUT = '<|tool_call|>{"name": "f", "argu'
TWO = (
    '<|tool_call|>{"name": "f", "arguments": {}}<|tool_call|>{"name": "g", "arguments": {"x": [1]}}'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Four.<|im_end|>", {"content": "Four."}),
        (
            "<|start_thought|>a\n<|end_thought|>b<|im_end|>",
            {"reasoning_content": "a\n", "content": "b"},
        ),
        ("<|start_thought|>still", {"reasoning_content": "still"}),
        (f"{TWO}<|im_end|>", {"tool_calls": ["f", "g"]}),
        (f"Well{TWO}<|endoftext|>", {"content": "Well", "tool_calls": ["f", "g"]}),
        (CUT, {"tool_calls": [None]}),
    ],
)
def test_transformers_parses_replies_as_our_parser_does(text, expected, thinking):
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    parsed = tokenizer.parse_response(text, prefix=prompt)
    calls = [call["function"] for call in parsed.pop("tool_calls", [])]
    names = [call["name"] if isinstance(call, dict) else None for call in calls]
    assert parsed == {
        "role": "assistant",
        **{k: v for k, v in expected.items() if k != "tool_calls"},
    }
    assert names == expected.get("tool_calls", [])
    chat = Chat.from_folder(thinking)
    chat.tokenizer.encode_special_tokens = False
    reply = chat.parse(chat.tokenizer.encode(text, add_special_tokens=False).ids)
    assert reply.thought == parsed.get("reasoning_content", "")
    assert reply.content == parsed.get("content", "")
    assert [call["function"] for call in reply.tool_calls] == [
        c for c in calls if c and c != CUT[13:]
    ]


def test_a_session_and_the_demo_record_openais_messages(calling, thinking):
    replies = iter([calling, calling, thinking])
    chat, prompts = Chat.from_folder(calling), []
    chat.tokenizer.encode_special_tokens = False
    texts = {calling: CALLS + IM_END, thinking: THINKS + IM_END}

    def generate(prompt: list[int], *_: Any) -> Iterator[int]:
        prompts.append(prompt)
        yield from chat.tokenizer.encode(texts[next(replies)], add_special_tokens=False).ids

    session = ChatSession(chat, generate, tools=TOOLS, run=lambda name, arguments: f"{arguments}")
    list(session.ask("Hi"))
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    called = {"role": "assistant", "content": "See", "reasoning_content": "Add them"}
    assert session.messages == [
        *HELLO,
        {**called, "tool_calls": [{"id": "call_1", **call}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "{'x': 1}"},
        {**called, "tool_calls": [{"id": "call_2", **call}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "{'x': 1}"},
        {"role": "assistant", "content": "It is four.", "reasoning_content": "Add them"},
    ]
    # The record is a training row, and the next prompt has the thoughts that the model wrote.
    chat.tokenizer.encode_special_tokens = True
    saved = json.loads(json.dumps(session.messages))
    assert chat.clean({"messages": saved})["messages"][1]["thought"] == "Add them"
    later = chat.prompt([*saved, {"role": "user", "content": "And now?"}], TOOLS)
    assert later[: len(prompts[2])] == prompts[2]
    turn, model = Turn("Hi"), ChatModel("m", TorchRunner(thinking), Chat.from_folder(thinking))
    settings = GenerationSettings(Sampling(temperature=0), tools=False)
    for _ in model.answer(turn, [], settings, lambda: False):
        pass
    assert turn.messages[1:] == session.messages[-1:]
    assert turn.parts == [("thought", "Add them"), ("content", "It is four.")]


@pytest.fixture(scope="module")
def served(calling) -> Iterator[int]:
    file = calling / "some-file.gguf"
    vocabulary = read_vocabulary(calling, read_hf_config(calling).vocab_size)
    write_gguf(calling, {"f32": file}, vocabulary.put, "scripted-tiny", say=lambda line: None)
    with serving(file) as port:
        yield port


def ask(port: int, path: str, body: Any = None) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


@needs_llama
def test_llama_cpps_server_finds_thought_and_calls_by_the_template(served):
    models = json.loads(ask(served, "/v1/models"))["data"]
    assert [model["id"] for model in models] == ["scripted-tiny"]  # general.name, not a path
    request = {"messages": HELLO, "tools": [TOOL], "temperature": 0, "max_tokens": 40}
    answer = json.loads(ask(served, "/v1/chat/completions", request))
    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (answer["model"], choice["finish_reason"]) == ("scripted-tiny", "tool_calls")
    assert choice["message"]["reasoning_content"] == "Add them"
    assert choice["message"]["content"] == "See" and call["id"] and call["type"] == "function"
    assert call["function"]["name"] == "f" and json.loads(call["function"]["arguments"]) == {"x": 1}
    lines = ask(served, "/v1/chat/completions", {**request, "stream": True}).split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    for key, text in (("reasoning_content", "Add them"), ("content", "See")):
        assert "".join(delta.get(key) or "" for delta in deltas) == text
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert "".join(call.get("name", "") for call in calls) == "f"
    assert json.loads("".join(call["arguments"] for call in calls)) == {"x": 1}
    # Sent back, the reply is in the prompt as the model wrote it.
    back = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "4"}]
    prompt = json.loads(ask(served, "/apply-template", {"messages": back}))["prompt"]
    assert "<|start_thought|>Add them<|end_thought|>See<|tool_call|>" in prompt


@needs_llama
def test_a_gguf_file_has_the_flags_of_its_checkpoint(calling, tmp_path):
    file = tmp_path / "m.gguf"
    vocabulary = read_vocabulary(calling, read_hf_config(calling).vocab_size)
    write_gguf(calling, {"f32": file}, vocabulary.put, "m", say=lambda line: None)
    assert flags(tokenizer_folder(file)) == flags(calling)
