"""Chat evaluation: a model with correct replies scores 1, one with wrong replies scores 0."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.chat.rendering import Chat
from data.chat.tokenizer import save_chat_tokenizer
from data.synthetic import generate as synthetic
from data.tokenizers.bpe import save_tokenizer, train_tokenizer
from evals import eval_chat
from evals.harness import Cache, Choose, Generation, Scored, results, run_items


class Knowing:
    """A model that generates and prefers the correct reply if `right`, else a wrong one."""

    name, hash, dtype, context = "knowing", "0" * 64, "float32", 10**6

    def __init__(self, items, chat: Chat | None, right: bool):
        self.replies, self.right, self.chat = {}, right, chat
        for item in items:
            example, check = item.row["example"], item.row["example"]["checks"][item.row["check"]]
            before = example["messages"][: check["turn"]]
            key = (
                tuple(chat.prompt(before, example.get("tools")))
                if chat
                else eval_chat.plain_lines(before) + "Assistant:"
            )
            replies = [example["messages"][check["turn"]], *check["wrong"]]
            self.replies[key] = eval_chat._content(
                replies[0] if right or len(replies) == 1 else replies[1]
            )

    def answer(self, requests):
        for i, request in enumerate(requests):
            if isinstance(request, Choose):
                best = 0 if self.right else len(request.options) - 1
                yield [
                    (
                        i,
                        [
                            Scored(-1.0 if k == best else -2.0 * len(o), len(o), False)
                            for k, o in enumerate(request.options)
                        ],
                    )
                ]
            else:
                yield [(i, Generation(self.replies[request.prompt], 5, True))]


@pytest.mark.parametrize("with_template", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_scores(tmp_path: Path, with_template: bool, right: bool):
    rows = synthetic.generate_math_examples(
        30, 0, "heldout"
    ) + synthetic.generate_identity_examples(20, 0, "heldout")
    data = tmp_path / "all.heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = None
    if with_template:
        save_tokenizer(train_tokenizer([data.read_text()], 300), tmp_path / "base")
        chat = save_chat_tokenizer(tmp_path / "model", tmp_path / "base")
        assert isinstance(chat.tokenizer, Tokenizer)
    evaluation = eval_chat.build(
        Namespace(checkpoint=tmp_path / "model", data=str(tmp_path), limit=None)
    )
    model = Knowing(evaluation.items, chat, right)
    scores = results(
        evaluation, run_items(evaluation.items, evaluation.score, model, Cache()), model
    )
    metrics = {name: estimate["value"] for name, estimate in scores["metrics"].items()}
    assert metrics["acc"] == metrics["choice"] == float(right)
    assert set(scores["subjects"]) == {"math", "identity"} and 0.2 < metrics["choice_chance"] < 0.5


def test_replies_end_with_the_stop_token(tmp_path: Path):
    save_tokenizer(train_tokenizer(["What is 2 + 2? The answer is 4."], 270), tmp_path / "base")
    chat = save_chat_tokenizer(tmp_path / "model", tmp_path / "base")
    before = [{"role": "user", "content": "2 + 2?"}]
    prompt = chat.prompt(before)
    ids = eval_chat.reply_ids(chat, {}, before, {"role": "assistant", "content": "4."}, len(prompt))
    assert chat.tokenizer.decode(list(ids), skip_special_tokens=False) == "4.<|im_end|>"


def test_mistakes_are_named(tmp_path: Path):
    (tmp_path / "a.heldout.jsonl").write_text("{")
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "empty"):
        with pytest.raises(ValueError, match="generate_chat_data"):
            eval_chat.read_items(str(path), None)


def test_a_row_ends_where_its_line_does(tmp_path: Path):
    [row] = synthetic.generate_preference_pairs(1, 0, "heldout", easy=True)
    row["prompt"][-1]["content"] += "\u2028 \u0085"  # ends of lines to str.splitlines
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert [item.id for item in eval_chat.read_items(str(tmp_path / "pairs.jsonl"), None)] == [
        row["id"]
    ]


def test_pairs_are_a_task_of_their_own(tmp_path: Path):
    rows = synthetic.generate_preference_pairs(20, 0, "heldout", easy=True)
    (tmp_path / "pairs.heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "pairs.heldout.jsonl")
    for right in (False, True):
        evaluation = eval_chat.build(
            Namespace(checkpoint=tmp_path / "model", data=data, limit=None)
        )
        model = Knowing(evaluation.items, None, right)
        scores = results(
            evaluation, run_items(evaluation.items, evaluation.score, model, Cache()), model
        )
        assert scores["task"] == "pairs" and scores["n"] == 20
        assert {name: estimate["value"] for name, estimate in scores["metrics"].items()} == {
            "preferred": float(right)
        }
    with pytest.raises(ValueError, match="no questions"):
        eval_chat.read_items(str(tmp_path), None)  # a folder's questions are not its pairs
