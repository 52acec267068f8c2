"""Preference pairs: formats of rows, dropped rows, truncated prompts, layout in batches."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_word

from benchmarks import parity_dpo
from data.chat.pair_batches import PairLoader, Pairs, ValidationPairs, assign_to_rows, make_batch
from data.chat.preferences import (
    Dropped,
    PairSource,
    PreferenceConfig,
    clean_pair,
    parse_hh,
    parse_messages,
    prepare,
)
from data.chat.rendering import Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.packing import IGNORE
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from models.hf import load_hf
from training.preference_losses import answer_logps


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([], 258), folder / "bytes")
    save_chat_tokenizer(folder / "chat", folder / "bytes")
    return folder / "chat"


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


ASKED = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def test_a_transcript_is_cut_at_the_last_assistant_in_common():
    pair = parse_hh(hh(ASKED + " Because I can", ASKED + " Because.\n\nHuman said so"))
    assert pair.prompt == [user(" Hi"), says(" Hello"), user(" Why?")]
    assert (pair.chosen, pair.rejected) == (
        says("Because I can"),
        says("Because.\n\nHuman said so"),
    )
    first = "\n\nHuman: Is 'Human: x' a turn?\n\nAssistant:"
    pair = parse_hh(hh(first + " No, Human: is not", first + " Yes"))
    assert pair.prompt == [user(" Is 'Human: x' a turn?")] and pair.chosen == says(
        "No, Human: is not"
    )


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (hh(ASKED + " Yes", ASKED + " Yes "), Dropped, "the same"),
        (
            hh("\n\nHuman: A\n\nAssistant: x", "\n\nHuman: B\n\nAssistant: x"),
            ValueError,
            "no common prompt",
        ),
        (
            hh(ASKED + " Yes\n\nHuman: So?\n\nAssistant: So.", ASKED + " No"),
            ValueError,
            "several turns",
        ),
        (
            hh("Some text" + ASKED + " a", "Some text" + ASKED + " b"),
            ValueError,
            "does not begin with Human",
        ),
    ],
)
def test_transcripts_that_are_no_pair(row, kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_hh(row)
    assert caught.type is kind


def test_messages_with_and_without_their_prompt_in_front(tokenizer):
    """UltraFeedback has both forms; the prompt is a list of messages or plain text."""
    prompt = [user("Hi"), says("Hello"), user("Why?")]
    full_row = {"prompt": "Why?", "chosen": [*prompt, says("A")], "rejected": [*prompt, says("B")]}
    assert parse_messages(full_row) == parse_messages(
        {"prompt": prompt, "chosen": [says("A")], "rejected": [says("B")]}
    )
    assert parse_messages({"prompt": "Why?", "chosen": "A", "rejected": "B"}).prompt == [
        user("Why?")
    ]
    for row, expected in (
        ({"prompt": [], "chosen": "A", "rejected": "B"}, "no common prompt"),
        (
            {"chosen": [user("x"), says("A")], "rejected": [user("y"), says("A")]},
            "no common prompt",
        ),
        (
            {
                "chosen": [user("x"), says("A"), user("z"), says("B")],
                "rejected": [user("x"), says("C")],
            },
            "several turns",
        ),
        ({"prompt": "x", "chosen": 3, "rejected": "y"}, "must be text or lists"),
    ):
        with pytest.raises(ValueError, match=expected):
            parse_messages(row)
    chat = Chat.from_folder(tokenizer)
    for row, expected in (
        ({"prompt": "x", "chosen": " A", "rejected": "A\n"}, "the same"),
        ({"prompt": "x", "chosen": "A", "rejected": " \n"}, "an empty answer"),
        ({"prompt": [says("x")], "chosen": "A", "rejected": "B"}, "'assistant' follows no message"),
        ({"prompt": "x", "chosen": [user("A")], "rejected": [user("B")]}, "no common prompt"),
    ):
        with pytest.raises(ValueError, match=expected):
            clean_pair(chat, parse_messages(row))


def prepared(tokenizer, tmp_path, rows, length, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    config = PreferenceConfig(
        {"own": PairSource(str(path))}, str(tmp_path / "cache"), **{"val_fraction": 0.0, **options}
    )
    folder = prepare(config, ["own"], tokenizer, length)["own"]
    return Pairs(folder, "train"), Pairs(folder, "val")


def test_prompts_are_cut_at_a_turn_and_answers_never(tokenizer, tmp_path):
    system, turns = (
        {"role": "system", "content": "Be brief."},
        [user("a" * 40), says("b" * 40), user("c" * 20)],
    )
    rows = [
        {"prompt": [system, *turns], "chosen": "d" * 30, "rejected": "e"},
        {"prompt": turns, "chosen": "f", "rejected": "g"},
        {"prompt": "h", "chosen": "i" * 300, "rejected": "j"},
        {"prompt": "k", "chosen": "l", "rejected": "l"},
        {"prompt": "m", "chosen": "n", "rejected": ""},
    ]
    pairs, _ = prepared(tokenizer, tmp_path, rows, 120)
    assert pairs.report["dropped"] == {
        "chosen and rejected are the same": 1,
        "an empty answer": 1,
        "a pair that does not fit": 1,
    }
    assert pairs.report["pairs"] == {"train": 2, "val": 0} and pairs.report["cut"] == 2
    chat = Chat.from_folder(tokenizer)
    (chosen, rejected), prompt = pairs.read(0)
    full_prompt = chat.render(chat.clean({"messages": [system, user("c" * 20), says("d" * 30)]}))
    assert chat.tokenizer.decode(
        chosen.tolist(), skip_special_tokens=False
    ) == full_prompt.removesuffix("\n")
    assert (
        chat.tokenizer.decode(chosen[prompt:].tolist(), skip_special_tokens=False)
        == "d" * 30 + "<|im_end|>"
    )
    assert (
        chat.tokenizer.decode(rejected[prompt:].tolist(), skip_special_tokens=False)
        == "e<|im_end|>"
    )
    assert (
        chosen[:prompt].tolist()
        == rejected[:prompt].tolist()
        == chat.prompt([system, user("c" * 20)])
    )


def test_too_many_faults_and_nothing_left_are_refused(tokenizer, tmp_path):
    good = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    with pytest.raises(
        ValueError,
        match=r"10.0% of 10 pairs are malformed \(1 x invalid JSON; the first is rows.jsonl:10",
    ):
        prepared(tokenizer, tmp_path, [*good, "{broken\n"], 100)
    pairs, _ = prepared(tokenizer, tmp_path, [*good, "{broken\n"], 100, max_bad=0.2)
    assert pairs.report["pairs"]["train"] == 9
    same = [{"prompt": "p", "chosen": "a", "rejected": "a"}]
    with pytest.raises(
        ValueError, match=r"has no usable pair .1 x chosen and rejected are the same"
    ):
        prepared(tokenizer, tmp_path, same, 100)
    with pytest.raises(ValueError, match="unknown format of preference pairs"):
        PairSource("x", format="hhh")


def test_a_prompt_is_on_one_side_of_the_split(tokenizer, tmp_path):
    rows = [{"prompt": f"p{i % 30}", "chosen": f"a{i}", "rejected": "b"} for i in range(120)]
    train, val = prepared(tokenizer, tmp_path, rows, 100, val_fraction=0.3)
    prompts = [
        {tuple(part.read(i)[0][0][: part.read(i)[1]]) for i in range(part.documents // 2)}
        for part in (train, val)
    ]
    assert (
        train.documents + val.documents == 240
        and prompts[0]
        and prompts[1]
        and not prompts[0] & prompts[1]
    )


def test_layout_holds_every_document_once_in_rows_that_fit():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 100) for _ in range(2 * rng.randint(1, 8))]
        multiple = rng.choice([1, 8])
        rows, length = assign_to_rows(lengths, 100, multiple)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= length <= 100
        assert length % multiple == 0 or length == 100
        assert len(rows) * length <= 1.5 * sum(lengths) + 2 * max(lengths) + 8 * len(rows)
    assert (
        assign_to_rows([50, 50, 50, 50], 100)[1] == 50
    )  # rows are not longer than the longest pair


def many(tokenizer, tmp_path):
    rng = random.Random(1)
    word = partial(random_word, rng)
    rows = [{"prompt": word(30), "chosen": word(60), "rejected": word(60)} for _ in range(50)]
    return prepared(tokenizer, tmp_path, rows, 200, val_fraction=0.3)


def test_a_step_is_a_pure_function_of_its_place_and_split_over_ranks(tokenizer, tmp_path):
    train, val = many(tokenizer, tmp_path)
    count = train.documents // 2
    shape = ({"own": train}, {"own": 1.0}, 200, 4)
    one = PairLoader(*shape, 4, seed=3)
    parts = [PairLoader(*shape, 1, seed=3, rank=rank, world=2) for rank in (0, 1)]
    seen = []
    for place in range(count):  # four epochs
        full_step, shares = one.at(place), [part.at(place) for part in parts]
        assert (
            full_step.loss_denominator == 4
            and {share.loss_denominator for share in shares} == {4}
            and {share.tokens for share in shares} == {full_step.tokens}
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.at(place).batches[0], full_step.batches[0], strict=True)
        )
        batches = [batch for share in shares for batch in share.batches]
        assert len(batches) == 4
        answers = [ids for batch in batches for ids in answers_of(batch)[:1]] + [
            ids for batch in batches for ids in answers_of(batch)[1:]
        ]
        assert answers == answers_of(full_step.batches[0])
        seen += [tuple(ids) for ids in answers[:4]]
    expected = [tuple(train.read(i)[0][0][train.read(i)[1] :]) for i in range(count)]
    for epoch in range(4):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == sorted(expected)
    with pytest.raises(ValueError, match="4 pairs per step do not divide over 1 rank"):
        PairLoader(*shape, 3, seed=3)
    validation = [ValidationPairs({"own": val}, 7, 2, 200, rank, 2) for rank in (0, 1)]
    batches = [part.batches()["own"] for part in validation]
    assert [number for _, number in batches] == [7, 7] and len(batches[0][0]) == len(
        batches[1][0]
    ) == 2
    assert sum(float(batch.counted.sum()) for part, _ in batches for batch in part) == 7
    named = [
        name
        for part in validation
        for _, make in part.steps()
        for names, _ in make()
        for name in names
    ]
    # Each pair once: padding rows have no name.
    assert sorted(named) == [("own", index) for index in range(7)]


def answers_of(batch):
    """Return the trained ids of each document."""
    flat = torch.cat([batch.targets.flatten(), torch.tensor([IGNORE])])
    return [[int(i) for i in flat[places] if i != IGNORE] for places in batch.answer_positions]


def test_log_probabilities_equal_those_of_each_answer_alone(tmp_path):
    """Packed rows equal transformers on one document; documents do not influence each other."""
    from transformers import LlamaForCausalLM

    pairs = parity_dpo.write_case(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    batch = make_batch(pairs, [("pairs", i) for i in (2, 0, 3, 1)], 1.0, parity_dpo.LENGTH)
    assert len(batch.tokens) < 8  # packed
    model = load_hf(tmp_path / "policy")
    ours = answer_logps(model, batch)
    for document, logp in enumerate(ours.tolist()):
        read, prompt = pairs["pairs"].read((2, 0, 3, 1)[document % 4])
        ids = torch.from_numpy(read[document // 4])[None]
        with torch.no_grad():
            alone = (
                theirs(ids)
                .logits.log_softmax(-1)[0, prompt - 1 : -1]
                .gather(1, ids[0, prompt:, None])
                .sum()
            )
        assert logp == pytest.approx(float(alone), rel=1e-5)
    row, column = np.unravel_index(int(batch.answer_positions[0, 0]), batch.targets.shape)
    changed = answer_logps(
        model,
        batch._replace(
            tokens=batch.tokens.index_put(
                (torch.tensor(row), torch.tensor(column)), torch.tensor(9)
            )
        ),
    )
    assert torch.equal(changed[1:], ours[1:]) and changed[0] != ours[0]
