"""Rows of an own evaluation: answers, columns, prompts, matching, decontamination."""

import csv
import json
from pathlib import Path

import pytest
from test_own_eval import ANSWERS, CHOICES, CONFIG, TEXTS, flags, redefine, write_case

from data.decontamination.test_sets import fingerprint, load_test_sets
from evals import eval_own
from evals.local_rows import write_rows
from evals.multiple_choice import FewShotSampler
from evals.run import evaluate

assert CONFIG  # of the fixture `checkpoint`


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    return write_case(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("answer", "setting", "gold"),
    [
        (2, None, 2),
        ("2", None, 2),
        ("c", None, 2),
        ("blue", None, 1),
        (2, "position", 1),
        ("2", "position", 1),
        ("B", "letter", 1),
        ("blue", "text", 1),
        (0, "index", 0),
    ],
)
def test_an_answer_is_an_index_a_position_a_letter_or_a_choice(place, answer, setting, gold):
    row = {"question": "?", "choices": ["red", "blue", "green"], "answer": answer}
    write_rows(Path("choices.jsonl"), [row])
    redefine("mine", columns={}, **({"answer_is": setting} if setting else {}))
    assert eval_own.build(flags("mine.yaml")).items[0].row["gold"] == gold


def test_columns_of_other_schemas_and_a_table(place):
    arc = {"id": "x1", "question": "Why?", "choices": {"text": ["a b", "c d"], "label": ["A", "B"]}}
    write_rows(Path("choices.jsonl"), [{**arc, "answerKey": "B", "passage": "It rained."}])
    columns = {"choices": "choices.text", "answer": "answerKey"}
    template = "{passage} {question} {not this}\nA:"
    redefine("mine", columns=columns, template=template)
    [item] = eval_own.build(flags("mine.yaml")).items
    assert item.id == "x1" and item.row["options"] == ["a b", "c d"] and item.row["gold"] == 1
    assert item.row["context"] == "It rained. Why? {not this}\nA:"
    with open("table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["goal", "one", "two", "label"], ['Say "hi", twice', "yes", "no", "1"]])
    redefine(
        "mine",
        path="table.csv",
        template=None,
        columns={"question": "goal", "choices": ["one", "two"], "answer": "label"},
    )
    [item] = eval_own.build(flags("mine.yaml")).items
    assert item.row == {
        "context": 'Question: Say "hi", twice\nAnswer:',
        "options": ["yes", "no"],
        "gold": 1,
        "metrics": ("acc", "acc_norm"),
    }
    Path("array.json").write_text(json.dumps(CHOICES))
    assert len(eval_own.build(flags("facts.yaml", data="answers.jsonl")).items) == 6


def test_subjects_have_results_of_their_own(place, model):
    redefine(
        "mine", columns={"question": "q", "choices": "options", "answer": "key", "subject": "topic"}
    )
    content = evaluate(eval_own.build(flags("mine.yaml")), model, None)
    assert content["subjects"]["cats"]["n"] == content["subjects"]["rain"]["n"] == 5


@pytest.mark.parametrize(
    ("metric", "text", "answer", "expected"),
    [
        ("exact_match", " The Eiffel Tower.", "eiffel tower", True),
        ("exact_match", "Eiffel", "eiffel tower", False),
        ("number_match", "It is $1,200.50 in all.", "1200.5", True),
        ("number_match", "3 apples and 12 pears", "12", True),
        ("number_match", "3 apples and 12 pears", "3", False),
        ("number_match", "from 10-12", "12", True),
        ("number_match", "about -7...", "-7", True),
        ("number_match", "none", "7", False),
        ("contains", "I think the cat sat.", "The cat", True),
        ("contains", "concatenate", "cat", False),
    ],
)
def test_answers_match(metric, text, answer, expected):
    assert eval_own.MATCHES[metric](text, answer) is expected


def test_solved_examples_never_include_the_question_itself(place):
    redefine("mine", shots=9)  # all others
    for item, row in zip(eval_own.build(flags("mine.yaml")).items, CHOICES, strict=True):
        questions = [line[10:] for line in item.row["context"].split("\n") if "Question: " in line]
        others = [other["q"] for other in CHOICES if other is not row]
        assert questions[-1] == row["q"] and sorted(questions[:-1]) == sorted(others)
    redefine("mine", shots=10)
    with pytest.raises(ValueError, match="--shots 11 needs 11 solved examples; the data have 10"):
        eval_own.build(flags("mine.yaml"))


def test_equal_examples_are_all_excluded():
    sampler = FewShotSampler(["a"] * 6 + ["b", "c"], 2, seed=0)
    assert all(sorted(sampler.sample("a")) == ["b", "c"] for _ in range(20))


def test_prompts_in_the_chat_template(place, checkpoint, text_store):
    from data.chat.tokenizer import save_chat_tokenizer

    chat = save_chat_tokenizer(place / "chat", checkpoint)
    redefine("facts", chat=True, shots=1)
    item = eval_own.build(flags("facts.yaml", place / "chat")).items[0]
    text = chat.tokenizer.decode(list(item.row["prompt"]), skip_special_tokens=False)
    assert text.endswith(
        f"<|im_start|>user\n{ANSWERS[0]['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.count("<|im_start|>user") == 2 and item.row["stop"] == []


# ---- decontamination


def test_decontamination_takes_the_definition(place, model):
    from data.decontamination.scan import Settings, decontaminate

    question = "which of these small animals sat on the mat while the rain fell over the hills"
    rows = [{"q": question, "options": ["a cat", "a dog"], "key": 0, "topic": "cats"}, *CHOICES]
    write_rows(Path("choices.jsonl"), rows)
    evaluation = eval_own.build(flags("mine.yaml"))
    sets = load_test_sets(["mine.yaml", "prose.yaml"], Path("nowhere"))
    assert [item.id for item in sets["mine"]] == [item.id for item in evaluation.items]
    assert sets["mine"][0].variants[1:] == (f"{question}\na cat", f"{question}\na cat\na dog")
    assert sets["prose"][1].variants == (TEXTS[1]["body"],)
    write_rows(Path("train.jsonl"), [{"text": f"A quiz: {question}?"}, {"text": "Nothing here."}])
    decontaminate(["train.jsonl"], ["mine.yaml"], Path("ids.json"), Path("nowhere"), Settings())
    content = evaluate(evaluation, model, None, Path("ids.json"))
    assert content["clean"]["contaminated"] == ["1"] and content["clean"]["n"] == 10
    before = fingerprint("mine.yaml")
    write_rows(Path("choices.jsonl"), rows[1:])
    assert fingerprint("mine.yaml") != before  # the store is then prepared again
    redefine("prose", name="mmlu")
    for sets, fault in (
        (["mine.yaml", "mine.yaml"], "two test sets have the name mine"),
        (["prose.yaml"], "name=mmlu is a known test set"),
        (["lost.yaml"], "lost.yaml does not exist"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_test_sets(sets, Path("nowhere"))
