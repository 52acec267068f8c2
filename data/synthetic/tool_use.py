"""Generate conversations in which the assistant calls a tool, reads its result and answers."""

from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data.chat.factbook import Country, article
from data.chat.tools import TEMPERATURES, TOOLS, UNITS, run_tool, unit_name
from data.synthetic.facts import ASK, SAY, answer_type, fact_key, known, other_values, say_fact
from data.synthetic.mathematics import expression_key
from data.synthetic.questions import Example, assistant, call, check, example, user

CALCULATE = (
    "What is {e}?",
    "Compute {e}.",
    "Please calculate {e} for me.",
    "How much is {e}?",
    "I need the value of {e}.",
    "{e} = ?",
    "Can you work out {e}?",
)
WEEKDAY = (
    "Which day of the week is {d}?",
    "What weekday was or will be {d}?",
    "On what day of the week does {d} fall?",
    "Tell me the weekday of {d}.",
)
BETWEEN = (
    "How many days is it from {d} to {e}?",
    "How many days after {d} comes {e}?",
    "Count the days from {d} until {e}.",
    "If I start on {d}, in how many days is {e}?",
)
LATER = (
    "Which date is {n} days after {d}?",
    "What date is it {n} days after {d}?",
    "Add {n} days to {d}.",
    "I pay {n} days after {d}. On which date is that?",
)
CONVERT = (
    "How many {to} are {v} {unit}?",
    "Convert {v} {unit} to {to}.",
    "What is {v} {unit} in {to}?",
    "Express {v} {unit} in {to}, please.",
    "{v} {unit} is how many {to}?",
)
NO_TOOL = (
    ("Thank you!", "You are welcome!"),
    ("Thanks, that helps.", "I am glad it helps."),
    ("Good morning!", "Good morning! What can I do for you?"),
    ("Hello!", "Hello! What can I do for you?"),
    ("Good night.", "Good night!"),
    ("Goodbye!", "Goodbye!"),
    ("That is all for today.", "All right. Until next time!"),
    ("Great, well done.", "Thank you!"),
)
WANT = ("I need the tool {tool}.", "The tool {tool} gives this exactly.", "Let me call {tool}.")
BY_NAME = {tool["function"]["name"]: tool for tool in TOOLS}


class ToolQuestion(NamedTuple):
    """A question, the tool call that answers it, and the reply to the result."""

    key: str
    question: str
    tool: str
    arguments: dict[str, Any]
    wrong: list[tuple[str, dict[str, Any]]]  # other calls
    kind: str  # type of the answer, see questions.check
    say: Callable[[str], str]
    others: Callable[[str], list[str]]  # wrong results


def tool_use(rng: Random, countries: Mapping[str, Country], easy: bool, wheels: Path) -> Example:
    """Return a question for one tool.

    easy: no other tool is offered, numbers are small, calls succeed.
    """
    plans = [_calculate, _calculate, _weekday, _between, _later, _convert]
    chance = rng.random()
    if chance < 0.08 and not easy:
        return _no_tool(rng)
    if chance < 0.14 and not easy:
        plan = _failing(rng)
    else:
        make = rng.choice([*plans, None])
        plan = _look_up(rng, countries, easy) if make is None else make(rng, easy)
    result = run_tool(plan.tool, plan.arguments, wheels)
    thought = "" if easy else rng.choice((*WANT, "")).format(tool=plan.tool)
    calls = [
        call(name, arguments, thought)
        for name, arguments in [(plan.tool, plan.arguments), *plan.wrong]
    ]
    messages = [user(plan.question), calls[0], {"role": "tool", "content": result}]
    if result.startswith("error: "):
        kind, answer, others = "text", result[7:], []
        reply, wrong = f"That did not work: {answer}.", []
    else:
        kind, answer, others = plan.kind, _value(result, plan.kind), plan.others(result)
        reply = plan.say(result)
        wrong = [assistant(plan.say(wrong_result)) for wrong_result in others]
    named = {"name": plan.tool, "arguments": plan.arguments}
    checks = [
        check(1, "call", named, calls[1:]),
        check(3, kind, answer, wrong, others if kind == "text" else ()),
    ]
    return example(
        "tools", plan.key, [*messages, assistant(reply)], checks, _offered(rng, plan.tool, easy)
    )


def _value(result: str, kind: str) -> str:
    """Return the answer in a result: a fraction's rounded value, a quantity with its unit."""
    return result.partition("(about ")[2].rstrip(")") or result if kind == "number" else result


def _offered(rng: Random, tool: str, easy: bool) -> list[dict]:
    others = [name for name in BY_NAME if name != tool]
    names = [tool] if easy else [tool, *rng.sample(others, rng.randint(1, len(others)))]
    rng.shuffle(names)
    return [BY_NAME[name] for name in names]


def _no_tool(rng: Random) -> Example:
    """Return a conversation that offers tools but needs none."""
    question, reply = rng.choice(NO_TOOL)
    wrong = [call("calculator", {"expression": "1 + 1"}), call("weekday", {"date": "2000-01-01"})]
    messages = [user(question), assistant(reply)]
    offered = _offered(rng, rng.choice(list(BY_NAME)), easy=False)
    return example(
        "tools", f"no tool {question}", messages, [check(1, "text", reply, wrong)], offered
    )


def _failing(rng: Random) -> ToolQuestion:
    """Return a correct call whose result is an error."""
    number = rng.randint(1, 999)
    year, month = rng.randint(1900, 2099), rng.choice(("02-30", "04-31", "06-31", "09-31", "11-31"))
    if rng.random() < 0.5:
        expression = f"{number} / 0"
        return _plan(
            "calculator",
            rng.choice(CALCULATE).format(e=expression),
            {"expression": expression},
            f"math {expression}",
        )
    day = f"{year}-{month}"
    return _plan("weekday", rng.choice(WEEKDAY).format(d=day), {"date": day}, f"weekday {day}")


def _plan(
    tool: str, question: str, arguments: dict[str, Any], key: str, **rest: Any
) -> ToolQuestion:
    usual: dict[str, Any] = {
        "wrong": [],
        "kind": "number",
        "say": lambda r: f"The answer is {r}.",
        "others": lambda r: [],
    }
    return ToolQuestion(
        **{**usual, "key": key, "question": question, "tool": tool, "arguments": arguments, **rest}
    )


def near_results(result: str) -> list[str]:
    """Return wrong results: one digit changed, or off by one in the last digit."""
    number = result.split()[0]
    digits = [i for i, character in enumerate(number) if character.isdigit()]
    changed = []
    for i, add in ((digits[-1], 1), (digits[0], 1), (digits[len(digits) // 2], 5)):
        digit = str((int(number[i]) + add) % 10) if i else str(int(number[i]) % 9 + 1)
        changed.append(number[:i] + digit + number[i + 1 :] + result[len(number) :])
    return list(
        dict.fromkeys(near for near in changed if near != result and not near.startswith("-0"))
    )


def _calculate(rng: Random, easy: bool) -> ToolQuestion:
    count = 1 if easy else rng.randint(1, 3)
    largest = 99 if easy else 10 ** rng.randint(1, 4)
    numbers = [rng.randint(2, largest) for _ in range(count + 1)]
    signs = [rng.choice("+-*" if easy else "+-*/") for _ in range(count)]
    text = str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        text = f"({text})" if not easy and rng.random() < 0.15 and text != str(numbers[0]) else text
        text = f"{text} {sign} {number}"
    wrong_sign = text.replace(signs[-1], rng.choice([s for s in "+-*" if s != signs[-1]]))
    wrong = [
        text.replace(str(numbers[-1]), str(numbers[-1] + 1)),
        wrong_sign,
        text[: -len(str(numbers[-1])) - 3],
    ]
    return _plan(
        "calculator",
        rng.choice(CALCULATE).format(e=text),
        {"expression": text},
        f"math {text}" if "(" in text else expression_key(numbers, signs),
        wrong=[
            ("calculator", {"expression": variant})
            for variant in dict.fromkeys(wrong)
            if variant != text
        ],
        others=lambda result: [near for near in near_results(result) if "/" not in result],
    )


def _day(rng: Random) -> date:
    return date(1900, 1, 1) + timedelta(days=rng.randrange(73_000))


def _weekday(rng: Random, easy: bool) -> ToolQuestion:
    day = _day(rng)
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    rng.shuffle(days)
    wrong_days = [
        day + timedelta(days=1),
        day - timedelta(days=30),
        day.replace(year=day.year + 1, day=1),
    ]
    return _plan(
        "weekday",
        rng.choice(WEEKDAY).format(d=day),
        {"date": str(day)},
        f"weekday {day}",
        wrong=[
            ("weekday", {"date": str(wrong_day)}) for wrong_day in wrong_days if wrong_day != day
        ],
        kind="text",
        say=lambda result: f"{day} is a {result}.",
        others=lambda result: [name for name in days if name != result],
    )


def _between(rng: Random, easy: bool) -> ToolQuestion:
    start = _day(rng)
    end = start + timedelta(days=rng.randint(2, 60 if easy else 5000))
    right = {"start": str(start), "end": str(end)}
    swapped = {"start": str(end), "end": str(start)}
    return _plan(
        "days_between",
        rng.choice(BETWEEN).format(d=start, e=end),
        right,
        f"days {start} {end}",
        wrong=[
            ("days_between", swapped),
            ("days_between", {**right, "end": str(end + timedelta(days=1))}),
        ],
        say=lambda result: f"It is {result} days.",
        others=near_results,
    )


def _later(rng: Random, easy: bool) -> ToolQuestion:
    day, days = _day(rng), rng.randint(2, 60 if easy else 2000)
    right = {"date": str(day), "days": days}
    return _plan(
        "add_days",
        rng.choice(LATER).format(d=day, n=days),
        right,
        f"later {day} {days}",
        wrong=[
            ("add_days", {**right, "days": days + 1}),
            ("add_days", {**right, "date": str(day + timedelta(days=1))}),
        ],
        kind="text",
        say=lambda result: f"That is {result}.",
        others=lambda result: [
            str(date.fromisoformat(result) + timedelta(days=n)) for n in (-1, 1, 31)
        ],
    )


def _convert(rng: Random, easy: bool) -> ToolQuestion:
    kinds = [list(units) for units in UNITS.values()] + [list(TEMPERATURES)]
    unit, to = rng.sample(rng.choice(kinds), 2)
    value = rng.randint(2, 99) if easy or rng.random() < 0.6 else rng.randint(200, 99_999) / 100
    right = {"value": value, "unit": unit, "to": to}
    named = {"v": str(value), "unit": unit_name(unit, str(value)), "to": unit_name(to, "2")}
    strange = unit_name(next(u for units in kinds for u in units if u not in (unit, to)), "2")
    return _plan(
        "convert",
        rng.choice(CONVERT).format(**named),
        right,
        f"convert {value} {unit} {to}",
        wrong=[
            ("convert", {**right, "unit": to, "to": unit}),
            ("convert", {**right, "value": value + 1}),
        ],
        say=lambda result: f"{value} {named['unit']} are {result}.",
        others=lambda result: [*near_results(result)[:2], _wrong_unit(result, strange)],
    )


def _wrong_unit(result: str, unit: str) -> str:
    return f"{result.split()[0]} {unit}"


def _look_up(rng: Random, countries: Mapping[str, Country], easy: bool) -> ToolQuestion:
    attribute = rng.choice(tuple(SAY))
    choice = known(countries, attribute)
    country = rng.choice(choice)
    question = rng.choice(ASK[attribute]).format(c=article(country.name))
    right = {"country": country.name, "attribute": attribute}
    wrong_attribute = rng.choice([a for a in SAY if a != attribute])
    stranger = rng.choice([c.name for c in choice if c is not country])
    return _plan(
        "lookup",
        question[0].upper() + question[1:],
        right,
        fact_key(country.name, attribute),
        wrong=[
            ("lookup", {**right, "attribute": wrong_attribute}),
            ("lookup", {**right, "country": stranger}),
        ],
        kind=answer_type(attribute),
        say=lambda result: say_fact(country.name, attribute, result),
        others=lambda result: other_values(rng, countries, country, attribute),
    )
