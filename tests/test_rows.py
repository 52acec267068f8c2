"""SFT, DPO, evaluation and exported templates read rows alike; no row changes silently."""

import copy
import json
import random
from argparse import Namespace

import pytest
from transformers import AutoTokenizer

from data.chat.conversations import Skipped, read_conversations
from data.chat.messages import FLAGS, MEDIA, REFUSED, THOUGHTS, read_message
from data.chat.pair_batches import Pairs
from data.chat.preferences import PairSource, PreferenceConfig
from data.chat.preferences import describe as describe_pairs
from data.chat.preferences import prepare as prepare_pairs
from data.chat.rendering import TRAINING_TEMPLATE, Chat
from data.chat.sft import ChatConfig, ChatSource, Conversations, describe
from data.chat.sft import prepare as prepare_sft
from data.chat.tokenizer import save_chat_tokenizer
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from evals import eval_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([], 258), folder / "bytes")
    save_chat_tokenizer(folder / "chat", folder / "bytes")
    return folder / "chat"


@pytest.fixture(scope="module")
def chat(folder) -> Chat:
    return Chat.from_folder(folder)


def user(content="Q"):
    return {"role": "user", "content": content}


def says(content="A", **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name, argument, **keys):
    return {"function": {"name": name, "arguments": json.dumps({"x": argument})}, **keys}


def result(content, **keys):
    return {"role": "tool", "content": content, **keys}


def decode(chat, ids):
    return chat.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sft(folder, tmp_path, rows, form="messages", **options):
    """Each prepared conversation as (text, trained text), and the report."""
    source = {"rows": ChatSource(write(tmp_path / "rows.jsonl", rows), form)}
    config = ChatConfig(
        source, str(tmp_path / "sft"), **{"val_fraction": 0.0, "max_bad": 0.99, **options}
    )
    conversations = Conversations(prepare_sft(config, source, folder, 2000)["rows"], "train")
    chat, texts = Chat.from_folder(folder), []
    for start, end in zip(conversations.starts[:-1], conversations.starts[1:], strict=True):
        ids, trained = conversations.ids[start:end], conversations.trained[start:end]
        texts.append((decode(chat, ids), decode(chat, ids[trained])))
    return texts, conversations.report


def dpo(folder, tmp_path, rows, form="messages", **options):
    """Each prepared pair as (prompt, chosen, rejected), and the report."""
    source = {"pairs": PairSource(write(tmp_path / "pairs.jsonl", rows), form)}
    config = PreferenceConfig(
        source, str(tmp_path / "dpo"), **{"val_fraction": 0.0, "max_bad": 0.99, **options}
    )
    pairs = Pairs(prepare_pairs(config, source, folder, 2000)["pairs"], "train")
    chat, texts = Chat.from_folder(folder), []
    for index in range(pairs.documents // 2):
        (chosen, rejected), prompt = pairs.read(index)
        texts.append(
            tuple(
                decode(chat, ids) for ids in (chosen[:prompt], chosen[prompt:], rejected[prompt:])
            )
        )
    return texts, pairs.report


def ends(text):
    return f"{text}<|im_end|>"


GOOD = {"messages": [user("good"), says("good")]}
PAIR = {"prompt": "good", "chosen": "good", "rejected": "bad"}
THOUGHT = ends("<|start_thought|>six<|end_thought|>42")
CALLED = ends('See<|tool_call|>{"name": "f", "arguments": {"x": "é"}}')
REPLIES = [  # an assistant turn and its trained text
    *((says("42", **{key: "six"}), THOUGHT) for key in THOUGHTS),
    (says("42", reasoning="six", reasoning_content="six"), THOUGHT),
    (says("42", reasoning="six", reasoning_details=[{"text": "six"}]), THOUGHT),
    (says("42", reasoning_content=[{"type": "text", "text": "six"}]), THOUGHT),
    (says("42", thought="", reasoning="six", thinking=None), THOUGHT),
    (says([{"type": "text", "text": "4"}, {"text": "2"}], reasoning="six"), THOUGHT),
    (says([{"type": "output_text", "text": "42", "annotations": []}], thinking="six"), THOUGHT),
    (says("See", function_call={"name": "f", "arguments": '{"x":"\\u00e9"}'}), CALLED),
    (
        says(
            "See",
            tool_calls=[{"id": "1", "type": "function", **call("f", "é")}],
            function_call=None,
        ),
        CALLED,
    ),
    (
        says(
            "See",
            tool_calls=[{"function": {"name": "f", "arguments": {"x": "é"}}}],
            refusal=None,
            audio=None,
        ),
        CALLED,
    ),
    (
        says(None, tool_calls=[call("f", 1)]),
        ends('<|tool_call|>{"name": "f", "arguments": {"x": 1}}'),
    ),
    *((says("42", **{key: on}), ends("42")) for key in FLAGS for on in (1, True, None)),
    (says("42", weight=1.0, train=True, images=[], tools=None, prefix=False), ends("42")),
]


@pytest.mark.parametrize(("reply", "trained"), REPLIES, ids=lambda value: str(value)[:70])
def test_a_reply_is_the_same_text_in_sft_dpo_evaluation_and_template(
    chat, folder, tmp_path, reply, trained
):
    [(text, trained_text)], report = sft(folder, tmp_path, [{"messages": [user(), reply]}])
    assert trained_text == trained and not report["bad"]
    [(prompt, chosen, rejected)], _ = dpo(
        folder, tmp_path, [{"prompt": "Q", "chosen": [reply], "rejected": "no"}]
    )
    assert (prompt + chosen, chosen, rejected) == (text, trained, ends("no"))
    pairs = [
        {"chosen": [user(), says("no")], "rejected": [user(), reply]},
        {"prompt": [user()], "chosen": "no", "rejected": [reply]},
    ]
    assert [pair[2] for pair in dpo(folder, tmp_path, pairs)[0]] == [trained] * 2
    checks = [{"turn": 1, "type": "number", "wrong": [copy.deepcopy(reply)]}]
    row = {"id": "r", "source": "s/math", "messages": [user(), reply], "checks": checks}
    data = write(
        tmp_path / "q.heldout.jsonl",
        [row, {"id": "p", "prompt": "Q", "chosen": [reply], "rejected": "no"}],
    )
    question, pair = eval_chat.build(Namespace(checkpoint=folder, data=data, limit=None)).items
    for item in (question, pair):
        example = item.row["example"]
        before, right = example["messages"][:1], example["messages"][1]
        size = len(chat.prompt(before))
        assert (
            chat.tokenizer.decode(
                list(eval_chat.reply_ids(chat, example, before, right, size)), False
            )
            == trained
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training = (folder / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    messages = [user(), reply]
    if "\\u" not in str(reply):  # an escape in a call's JSON text is rendered as it is
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "\n"
        options = {
            "chat_template": training,
            "return_dict": True,
            "return_assistant_tokens_mask": True,
        }
        rendered = tokenizer.apply_chat_template(messages, **options)
        masked = [
            index
            for index, on in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
            if on
        ]
        assert chat.tokenizer.decode(masked, skip_special_tokens=False) == trained


UNTRAINED = [(key, off) for key in FLAGS for off in (0, False, 0.0)]


@pytest.mark.parametrize(("key", "off"), UNTRAINED, ids=lambda value: str(value))
def test_a_turn_of_weight_0_is_not_trained(chat, folder, tmp_path, key, off):
    turns = [
        user(),
        says("WRONG", **{key: off}),
        user("No."),
        says("right", **{key: 1}),
        user("?"),
        says("last", **{key: off}),
    ]
    shared = [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
        for turn in turns
    ]
    shared = [
        {**turn, **({key: turn_copy[key]} if key in turn_copy else {})}
        for turn, turn_copy in zip(shared, turns, strict=True)
    ]
    for row, form in (({"messages": turns}, "messages"), ({"conversations": shared}, "sharegpt")):
        [(text, trained)], report = sft(folder, tmp_path, [row], form)
        assert trained == ends("right") and "WRONG" in text and not report["bad"]
        assert report["counts"]["assistant turns without loss (weight 0)"] == 2
        assert "2 assistant turns without loss (weight 0)" in describe("rows", report)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    training = (folder / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    rendered = tokenizer.apply_chat_template(turns, chat_template=training, **options)
    encoded = chat.encode([chat.clean({"messages": turns})])[0]
    assert (
        rendered["input_ids"] == encoded.ids.tolist()
        and rendered["assistant_masks"] == encoded.trained.astype(int).tolist()
    )
    nothing = {"messages": [user(), says("x", **{key: off})]}
    texts, report = sft(folder, tmp_path, [GOOD, nothing])
    assert (
        len(texts) == 1
        and report["counts"]["no assistant turn has a loss (weight 0)"] == 1
        and not report["bad"]
    )
    cut = {"messages": [user(), says("x", **{key: off}), user(), says("y" * 3000)]}
    texts, report = sft(folder, tmp_path, [GOOD, cut])
    assert len(texts) == 1 and "no assistant turn ends within" in report["named"][0]
    pairs = [
        {"prompt": turns[:3], "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": [turns[1]], "rejected": "b"},
    ]
    [(prompt, chosen, _)], report = dpo(folder, tmp_path, pairs)
    assert (
        "WRONG" in prompt
        and chosen == ends("a")
        and report["bad"] == {"an answer without loss (weight 0)": 1}
    )


def test_rows_of_weight_0_are_dropped_and_counted(folder, tmp_path):
    alpaca = {"instruction": "Q", "output": "A"}
    for form, good in (
        ("messages", GOOD),
        ("alpaca", alpaca),
        ("gsm8k", {"question": "Q", "answer": "a\n#### 4"}),
    ):
        rows = [
            good,
            {**good, "weight": 0},
            {**good, "train": False},
            {**good, "weight": 1},
            {**good, "weight": 0.5},
        ]
        texts, report = sft(folder, tmp_path, rows, form)
        assert len(texts) == 2 and report["counts"]["no assistant turn has a loss (weight 0)"] == 2
        assert [line.split(": ")[0] for line in report["named"]] == ["rows.jsonl:5"]
    pairs, report = dpo(folder, tmp_path, [PAIR, {**PAIR, "weight": 0}, {**PAIR, "weight": 0.5}])
    assert len(pairs) == 1 and report["dropped"] == {"no assistant turn has a loss (weight 0)": 1}
    assert sum(report["bad"].values()) == 1


CALLS = [call("read", "a", id="a"), call("read", "b", id="b")]
PLAIN = [call("f", 1), call("g", 2)]
ORDER = [  # calls, responses, and contents in the trained order
    (CALLS, [result("B", tool_call_id="b"), result("A", tool_call_id="a")], "AB"),
    (CALLS, [result("A", tool_call_id="a", name="read"), result("B", tool_call_id="b")], "AB"),
    (
        [call("f", 1, id=1), call("f", 2, id=2)],
        [result("B", tool_call_id=2), result("A", tool_call_id=1)],
        "AB",
    ),
    (PLAIN, [result("A"), result("B")], "AB"),
    (PLAIN, [result("B", name="g"), result("A", name="f")], "AB"),
    (PLAIN, [{**result("B", name="g"), "role": "function"}, result("A", name="f")], "AB"),
    (
        [*PLAIN, call("f", 3)],
        [result("A", name="f"), result("C", name="f"), result("B", name="g")],
        "ABC",
    ),
]


@pytest.mark.parametrize(("calls", "responses", "expected"), ORDER)
def test_tool_responses_are_in_the_order_of_their_calls(
    folder, tmp_path, calls, responses, expected
):
    turns = [user(), says(None, tool_calls=calls), *responses, says("done")]
    [(text, _)], report = sft(folder, tmp_path, [{"messages": turns}])
    answers = [part.partition("<|im_end|>")[0] for part in text.split("<|tool_response|>")[1:]]
    assert "".join(answers) == expected and not report["bad"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("chat_template.jinja", TRAINING_TEMPLATE):
        template = (folder / name).read_text(encoding="utf-8")
        assert (
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            == text + "\n"
        )
    [(prompt, chosen, _)], _ = dpo(
        folder, tmp_path, [{"prompt": turns[:-1], "chosen": "done", "rejected": "no"}]
    )
    assert prompt + chosen == text
    row = {
        "id": "r",
        "source": "s/t",
        "messages": turns,
        "checks": [{"turn": len(turns) - 1, "type": "text", "wrong": []}],
    }
    [item] = eval_chat.read_items(write(tmp_path / "q.jsonl", [row]), None)
    contents = [
        message["content"]
        for message in item.row["example"]["messages"]
        if message["role"] == "tool"
    ]
    assert "".join(contents) == expected


ONE = [call("f", 1, id="a")]
UNMATCHED = [
    (CALLS, [result("B", tool_call_id="b")], "a tool call without a response"),
    (CALLS, [], "a tool call without a response"),
    (PLAIN, [result("A")], "a tool call without a response"),
    (ONE, [result("Z", tool_call_id="z")], "unknown tool_call_id"),
    ([call("f", 1)], [result("Z", tool_call_id="z")], "unknown tool_call_id"),
    (ONE, [result("A")], "lacks tool_call_id"),
    (
        CALLS,
        [result("A", tool_call_id="a"), result("A", tool_call_id="a")],
        "the same tool_call_id",
    ),
    (
        [*ONE, *ONE],
        [result("A", tool_call_id="a"), result("A", tool_call_id="b")],
        "two tool calls with the same id",
    ),
    (
        [*ONE, call("f", 2)],
        [result("A", tool_call_id="a"), result("B")],
        "only some of the tool calls have an id",
    ),
    ([call("f", 1)], [result("A"), result("B")], "more tool messages than tool calls"),
    (ONE, [result("A", tool_call_id="a", name="g")], "names another function"),
    (ONE, [result("A", tool_call_id=["a"])], "'tool_call_id' must be text"),
    ([call("f", 1)], [result("A", name="g")], "a tool call without a response"),
]


@pytest.mark.parametrize(
    ("calls", "responses", "message"), UNMATCHED, ids=[message for *_, message in UNMATCHED]
)
def test_responses_that_match_no_call_are_faults_by_line(
    folder, tmp_path, calls, responses, message
):
    after = [says("done")] if responses else [user("and?"), says("done")]
    turns = [user(), says("", tool_calls=calls), *responses, *after]
    texts, report = sft(folder, tmp_path, [GOOD, {"messages": turns}])
    assert len(texts) == 1 and [line.split(": ")[0] for line in report["named"]] == ["rows.jsonl:2"]
    assert message in report["named"][0]
    pairs, report = dpo(
        folder, tmp_path, [PAIR, {"prompt": turns[:-1], "chosen": "a", "rejected": "b"}]
    )
    assert (
        len(pairs) == 1
        and report["named"][0].startswith("pairs.jsonl:2: ")
        and message in report["named"][0]
    )
    row = {
        "id": "r",
        "source": "s/t",
        "messages": turns,
        "checks": [{"turn": len(turns) - 1, "type": "text", "wrong": []}],
    }
    with pytest.raises(ValueError, match=rf"q.jsonl:1: .*{message}"):
        eval_chat.read_items(write(tmp_path / "q.jsonl", [row]), None)


def test_calls_may_stay_open_at_the_end_only(folder, tmp_path):
    [(_, trained)], _ = sft(folder, tmp_path, [{"messages": [user(), says("", tool_calls=CALLS)]}])
    assert trained.count("<|tool_call|>") == 2


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is on it?"}
FAULTY = [
    ([user([TEXT, IMAGE]), says()], "a part of type 'image_url'"),
    ([user([{**TEXT, "image_url": {"url": "x"}}]), says()], "a part that has 'image_url'"),
    ([user([{"type": "input_audio", "input_audio": {}}]), says()], "a part of type 'input_audio'"),
    ([user(), says([{"type": "thinking", "thinking": "hm"}, TEXT])], "a part of type 'thinking'"),
    ([user(["a"]), says()], "content must be text"),
    ([user({"text": "a"}), says()], "content must be text"),
    ([user([]), says()], "a user message is empty"),
    ([user(None), says()], "a user message is empty"),
    ([user(), says(None)], "an assistant message is empty"),
    ([user(), says("x", reasoning={"effort": "high"})], "reasoning must be text"),
    (
        [user(), says("x", reasoning="a", thinking="b")],
        "different texts under reasoning and thinking",
    ),
    ([user(), says("x", reasoning_details=[{"text": "a"}])], "the key 'reasoning_details'"),
    (
        [{**user(), "reasoning_content": "hm"}, says()],
        "the key 'reasoning_content' in a turn of the role 'user'",
    ),
    ([{**user(), "tool_calls": ONE}, says()], "the key 'tool_calls' in a turn of the role 'user'"),
    (
        [user(), says("x", tool_call_id="a")],
        "the key 'tool_call_id' in a turn of the role 'assistant'",
    ),
    ([{**user(), "weight": 1}, says()], "a user turn with a loss"),
    ([user(), says("x", weight=0.5)], "'weight' must be 0 or 1"),
    ([user(), says("x", weight="0")], "'weight' must be 0 or 1"),
    ([user(), says("x", loss_mask=[0, 1])], "'loss_mask' must be 0 or 1"),
    ([user(), says("x", weight=0, train=True)], "weight and train disagree"),
    ([user(), says("x", mask=0)], "the key 'mask'"),
    (
        [user(), says("x", tool_calls=ONE, function_call=ONE[0]["function"])],
        "both tool_calls and function_call",
    ),
    ([user(), says("x", function_call={"name": "f", "arguments": "{"})], "a tool call must be"),
    ([user(), says("x", function_call="auto")], "a tool call must be"),
    ([user(), says("x", tool_calls=[{"type": "custom", **call("f", 1)}])], "of a type other than"),
    *(([user(), says("x", **{key: ["y"]})], f"the key '{key}'") for key in REFUSED),
]


@pytest.mark.parametrize(("turns", "message"), FAULTY, ids=[message for _, message in FAULTY])
def test_keys_that_cannot_be_honoured_are_refused_by_name(folder, tmp_path, turns, message):
    texts, report = sft(folder, tmp_path, [GOOD, {"messages": turns}])
    assert (
        len(texts) == 1
        and report["named"][0].startswith("rows.jsonl:2: ")
        and message in report["named"][0]
    )
    if message != "an assistant message is empty":  # DPO drops and counts empty answers
        pairs, report = dpo(
            folder, tmp_path, [PAIR, {"prompt": turns[:1], "chosen": turns[1:], "rejected": "b"}]
        )
        assert len(pairs) == 1 and message in report["named"][0]
    row = {"prompt": turns[:1], "chosen": turns[1:], "rejected": "b", "id": "p"}
    if "empty" not in message:
        with pytest.raises(ValueError, match=r"q\.jsonl:1: "):
            eval_chat.read_items(write(tmp_path / "q.jsonl", [row]), None)


def test_the_template_refuses_images_in_transformers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(Exception, match="Only text parts"):
        tokenizer.apply_chat_template([user([TEXT, IMAGE])], tokenize=False)


def test_other_keys_and_columns_are_counted_and_printed(folder, tmp_path):
    turns = [
        {**user([{**TEXT, "cache_control": {"a": 1}}]), "name": "Ann"},
        says("A", annotations=[], emotion="calm", tokens=0),
    ]
    turns[1]["tool_calls"] = [{**call("f", 1), "index": 0}]
    keys = {
        "content.cache_control": 2,
        "name": 2,
        "tool_calls.index": 2,
        "emotion": 2,
        "tokens": 2,
        "column topic": 1,
    }
    _, report = sft(
        folder, tmp_path, [{"messages": turns, "topic": "x", "empty": None}, {"messages": turns}]
    )
    assert report["ignored"] == keys
    assert "rows: ignored keys: content.cache_control x 2, name x 2," in "\n".join(
        describe("rows", report)
    )
    shared = {
        "conversations": [
            {"from": "human", "value": "Q", "name": "Ann"},
            {"from": "gpt", "value": "A", "model": "m"},
        ]
    }
    assert sft(folder, tmp_path, [shared], "sharegpt")[1]["ignored"] == {"name": 1, "model": 1}
    tree = {"message_id": "1", "text": "Q", "role": "prompter", "lang": "en", "mood": "good"}
    rows = [
        tree,
        {"message_id": "2", "parent_id": "1", "text": "A", "role": "assistant", "rank": 0},
    ]
    assert sft(folder, tmp_path, rows, "oasst")[1]["ignored"] == {"mood": 1}
    pair = {
        "prompt": turns[:1],
        "chosen": [says("a", model="x")],
        "rejected": [says("b", model="y")],
        "score_chosen": 3.0,
    }
    _, report = dpo(folder, tmp_path, [pair])
    assert report["ignored"] == {
        "content.cache_control": 1,
        "name": 1,
        "model": 2,
        "column score_chosen": 1,
    }
    assert "pairs: ignored keys: model x 2" in "\n".join(describe_pairs("pairs", report))
    row = {"chosen": [*turns[:1], says("a")], "rejected": [*turns[:1], says("b")]}
    assert dpo(folder, tmp_path, [row])[1]["ignored"] == {"content.cache_control": 1, "name": 1}


def test_columns_that_change_the_meaning_are_read_or_refused(folder, tmp_path):
    turns, schema = GOOD["messages"], {"name": "f", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": schema}
    shared = {
        "conversations": [{"from": "human", "value": "good"}, {"from": "gpt", "value": "good"}]
    }
    alpaca, pair = (
        {"instruction": "good", "output": "good"},
        {"prompt": "good", "chosen": "good", "rejected": "bad"},
    )
    texts = []
    tools = (
        {"tools": [wrapped]},
        {"tools": json.dumps([wrapped])},
        {"tools": [json.dumps(wrapped)]},
        {"functions": [schema]},
    )
    for columns in tools:
        for form, row in (
            ("messages", {"messages": turns}),
            ("sharegpt", shared),
            ("alpaca", alpaca),
        ):
            texts += [
                text
                for text, _ in sft(
                    folder, tmp_path, [{**row, **columns, "system": "Be kind."}], form
                )[0]
            ]
        [(prompt, chosen, _)], _ = dpo(
            folder, tmp_path, [{**pair, **columns, "system": "Be kind."}]
        )
        texts.append(prompt + chosen)
    assert (
        len(texts) == 16
        and len(set(texts)) == 1
        and "Be kind." in texts[0]
        and '"name": "f"' in texts[0]
    )
    hh = {
        key: f"\n\nHuman: good\n\nAssistant: {answer}"
        for key, answer in (("chosen", "good"), ("rejected", "bad"))
    }
    [(prompt, *_)], _ = dpo(folder, tmp_path, [{**hh, "system": "Be kind."}], "hh")
    assert "Be kind." in prompt
    [(_, trained)], _ = sft(folder, tmp_path, [{**alpaca, "reasoning_content": "hm"}], "alpaca")
    assert trained == ends("<|start_thought|>hm<|end_thought|>good")
    for column in MEDIA:
        assert (
            f"the column '{column}'"
            in sft(folder, tmp_path, [GOOD, {**GOOD, column: ["x.png"]}])[1]["named"][0]
        )
        assert (
            f"the column '{column}'"
            in dpo(folder, tmp_path, [PAIR, {**PAIR, column: ["x.png"]}])[1]["named"][0]
        )
    changed_row = {
        "messages": [{"role": "developer", "content": "Be rude."}, *turns],
        "system": "Be kind.",
    }
    assert "the column system differs" in sft(folder, tmp_path, [GOOD, changed_row])[1]["named"][0]
    [(text, _)], _ = sft(
        folder, tmp_path, [{"messages": changed_row["messages"]}], system="Be kind."
    )
    assert "system\nBe rude.<|im_end|>" in text and "kind" not in text


def test_a_prompt_beside_whole_answers_is_not_lost(folder, tmp_path):
    chosen, rejected = (
        [user("Hi"), says("Hello"), user("Why?"), says("A")],
        [user("Hi"), says("Hello"), user("Why?"), says("B")],
    )
    row = {"chosen": chosen, "rejected": rejected}
    system = {"role": "system", "content": "Be kind."}
    rows = [
        {**row, "prompt": "Why?"},
        {**row, "prompt": [system, *chosen[:3]]},
        {**row, "prompt": "Other?"},
    ]
    (first, second), report = dpo(folder, tmp_path, rows)
    assert "kind" not in first[0] and "Be kind." in second[0] and first[1:] == second[1:]
    assert report["named"] == [
        "pairs.jsonl:3: prompt has turns that chosen and rejected do not begin with; remove them"
    ]


def test_nulls_of_a_table_are_absent_keys(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [
        {"function": {"name": name, "arguments": {key: 1}}}
        for name, key in (("f", "x"), ("g", "y"))
    ]
    rows = [
        {
            "messages": [user(), says("A", reasoning="hm"), user(), says("B", weight=0)],
            "tools": None,
        }
    ]
    rows += [
        {
            "messages": [user(), {**says(None), "tool_calls": calls}],
            "tools": [{"type": "function", "strict": True}],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = {"rows": ChatSource(str(tmp_path / "rows.parquet"))}
    config = ChatConfig(source, str(tmp_path / "cache"), val_fraction=0.0, max_bad=0.0)
    prepared = Conversations(prepare_sft(config, source, folder, 2000)["rows"], "train")
    chat = Chat.from_folder(folder)
    trained = decode(chat, prepared.ids[prepared.trained])
    assert trained == (
        ends("<|start_thought|>hm<|end_thought|>A")
        + ends(
            '<|tool_call|>{"name": "f", "arguments": {"x": 1}}<|tool_call|>{"name": "g", '
            '"arguments": {"y": 1}}'
        )
    )
    assert not prepared.report["ignored"]


PIECES = [
    "",
    " ",
    "\n",
    "é",
    '"',
    "\\",
    '\\"',
    "{",
    "a: b",
    "c,d",
    "<|im_",
    "end|>",
    "<|im_end|>",
    "<|endoftext|>",
    "\t",
    "x",
]


def raw_conversation(rng):
    """Return a raw conversation: content lists, null, thought keys, ids, weights.

    Tool responses may be out of order.
    """

    def text():
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 5)))

    def content(some):
        row = some + text()
        if rng.random() < 0.5:
            return row
        middle = rng.randint(0, len(row))
        return [
            {"type": "text", "text": row[:middle]},
            {"type": "text", "text": row[middle:], "image_url": None},
        ]

    def arguments():
        value = {text(): [text(), 1.5, None, {"k": text()}]}
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return rng.choice(
            [value, compact, json.dumps(value, ensure_ascii=False, indent=2), "", "{}", None]
        )

    role = rng.choice(["system", "developer"])
    turns = (
        [{"role": role, "content": rng.choice([content("s"), None])}] if rng.random() < 0.5 else []
    )
    for _ in range(rng.randint(1, 2)):
        turns.append(user(content("q")))
        kind = rng.choice(["ids", "names", "order", "legacy", "none"])
        calls = [
            {"function": {"name": rng.choice("fgh") + text(), "arguments": arguments()}}
            for _ in range(3)
        ]
        if kind == "legacy":
            turns.append(says(rng.choice([None, content("")]), function_call=calls[0]["function"]))
            turns.append(
                {"role": "function", "name": calls[0]["function"]["name"], "content": content("r")}
            )
        elif kind != "none":
            ids = [
                {"id": f"call_{i}", "type": "function"} if kind == "ids" else {} for i in range(3)
            ]
            turns.append(
                says(
                    rng.choice([None, content("")]),
                    tool_calls=[{**one, **i} for one, i in zip(calls, ids, strict=True)],
                )
            )
            responses = [
                result(content("r"), **({"tool_call_id": i["id"]} if i else {})) for i in ids
            ]
            if kind == "names":
                responses = [
                    {**r, "name": c["function"]["name"]}
                    for r, c in zip(responses, calls, strict=True)
                ]
            if kind != "order":
                rng.shuffle(responses)
            turns += responses
        thought = {rng.choice(THOUGHTS): content("")} if rng.random() < 0.5 else {}
        turns.append(
            says(
                content("a"),
                **thought,
                **rng.choice([{}, {"weight": 0}, {"train": True}, {"loss": None}]),
            )
        )
    tools = (
        [{"type": "function", "function": {"name": "f", "description": text()}}]
        if rng.random() < 0.5
        else None
    )
    return {"messages": turns, "tools": tools}


def test_raw_rows_have_one_rendering_and_one_mask(chat, folder):
    """Our ids and mask equal those of the exported templates on raw rows."""
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(3)
    training = (folder / TRAINING_TEMPLATE).read_text(encoding="utf-8")
    for _ in range(300):
        raw = raw_conversation(rng)
        original = copy.deepcopy(raw)
        cleaned = chat.clean(raw)
        assert raw == original and chat.clean(cleaned) == cleaned
        [encoded] = chat.encode([cleaned])
        assert tokenizer.apply_chat_template(
            raw["messages"], tools=raw["tools"], tokenize=False
        ) == chat.render(cleaned)
        options = {"tools": raw["tools"], "return_dict": True, "return_assistant_tokens_mask": True}
        theirs = tokenizer.apply_chat_template(raw["messages"], chat_template=training, **options)
        assert theirs["input_ids"] == encoded.ids.tolist()
        assert theirs["assistant_masks"] == encoded.trained.astype(int).tolist()


def test_reading_a_message_twice_changes_nothing():
    rng = random.Random(4)
    for _ in range(100):
        for message in raw_conversation(rng)["messages"]:
            read, ignored = read_message(message)
            assert read_message(read) == (read, []) and ignored == []


def test_faults_of_all_forms_are_rows_not_errors(tmp_path):
    """For any JSON value under any key, a reader returns a conversation or a named fault."""
    values = [
        None,
        0,
        1.5,
        "",
        "x",
        [],
        {},
        [None],
        [{}],
        {"a": [1]},
        True,
        "{",
        [[]],
        [{"type": "text"}],
    ]
    keys = [
        "role",
        "content",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "name",
        "reasoning",
        "weight",
        "images",
        "new",
    ]
    rows = [{"messages": [user(), {**says(), key: value}]} for key in keys for value in values]
    rows += [
        {"messages": [user(), says("", tool_calls=[{**call("f", 1), key: v}])]}
        for key in ("id", "type", "function")
        for v in values
    ]
    rows += [
        {**GOOD, key: value}
        for key in ("tools", "functions", "system", "weight", "images")
        for value in values
    ]
    results = list(read_conversations(write(tmp_path / "rows.jsonl", rows), "messages"))
    assert len(results) == len(rows) and any(isinstance(one, Skipped) for one in results)


def test_neutralised_texts_and_text_around_calls_are_counted(folder, tmp_path):
    forged = [user("a<|im_end|>b"), says("c")]
    (_, (text, _)), report = sft(folder, tmp_path, [GOOD, {"messages": forged}])
    assert (
        "a< |im_end|>b" in text
        and report["counts"]["with special tokens in their text, neutralised"] == 1
    )
    assert "1 with special tokens in their text, neutralised" in describe("rows", report)[0]
    _, report = dpo(
        folder, tmp_path, [PAIR, {"prompt": forged[:1], "chosen": "c", "rejected": "d"}]
    )
    assert (
        "; 1 with special tokens in their text, neutralised" in describe_pairs("pairs", report)[0]
    )
    instruction = (
        "toolformer: enabled\ntoolformer access: news\nThe news.\nnews(query)\nWhat is new?"
    )
    rows = [
        {"instruction": instruction, "output": output}
        for output in ("It is news('x').", "news('x').")
    ]
    assert sft(folder, tmp_path, rows, "toolformer")[1]["ignored"] == {"text around the calls": 1}


def test_a_source_of_which_nothing_is_left_says_why(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no usable conversation .1 no assistant turn has a loss"
    ):
        sft(folder, tmp_path, [{"messages": [user(), says("x", weight=0)]}])


def test_rows_of_the_hub_mean_what_rows_of_files_mean(folder, tmp_path, monkeypatch):
    """Hub tables have the union of all rows' keys; missing ones are null."""
    import datasets

    empty = dict.fromkeys(
        ["weight", "reasoning_content", "tool_calls", "tool_call_id", "name", "refusal", "train"]
    )
    turns = [user(), says(None, tool_calls=CALLS), *ORDER[0][1], says("x", reasoning_content="hm")]
    row = {"messages": [{**empty, **turn} for turn in turns], "tools": None, "weight": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: iter([row]))
    [conversation_read] = read_conversations("hf://owner/name", "messages")
    write(tmp_path / "rows.jsonl", [{"messages": turns}])
    [same] = read_conversations(str(tmp_path / "rows.jsonl"), "messages")
    assert (
        conversation_read["messages"] == same["messages"]
        and conversation_read["ignored"] == same["ignored"] == []
    )
