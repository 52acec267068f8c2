"""Messages and forecasts of the program that the documentation quotes are those of the code."""

import ast
import re
from functools import cache

import pytest
import test_house
from conftest import ROOT
from test_habits import CODE_BLOCK, CODE_SPAN

from training.planning.dial import Request, choose, size_text

PAGE = ROOT / "docs" / "troubleshooting.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORECAST = re.compile(  # a row of README's hardware table, for GPUs
    r"^\|[^|]*\| `--gpu (?P<gpu>\w+)(?: --gpus (?P<gpus>\d+))? --hours (?P<budget>\d+) "
    r"--price (?P<price>[\d.]+)` \| (?P<size>\S+) \| (?P<tokens>[\d.]+)B "
    r"\| (?P<hours>\d+) \| (?P<cost>\d+) \|$",
    flags=re.MULTILINE,
)
LEFT_OUT = "..."  # in a quote: a value, or text that the page leaves out
VALUE = "\0"  # in a message: a value
SHORTEST = 15  # characters of a quote that identify its message


def messages(source: str) -> list[str]:
    """Return the string literals of a Python file, with VALUE for each value of an f-string."""
    strings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            values = (getattr(part, "value", VALUE) for part in node.values)
            parts = [value if isinstance(value, str) else VALUE for value in values]
            strings.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    return strings


@cache
def all_messages() -> list[str]:
    """Return the strings of the project, each longer than a word; a shell script is one string."""
    texts = [path.read_text(encoding="utf-8") for path in test_house.FILES]
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh")]
    strings = [string for text in texts for string in messages(text)]
    return [string for string in {*strings, *scripts} if len(string) >= SHORTEST]


def is_quoted_from(quote: str, message: str) -> bool:
    """True if the message has the parts of the quote between "..." in their order.

    No part may include a value.
    """
    position = 0
    for part in (part.strip() for part in quote.split(LEFT_OUT)):
        position = message.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def is_example_of(example: str, message: str) -> bool:
    """True if the example is the message with its values filled in, perhaps cut at "..."."""
    position = length = 0
    for part in message.split(VALUE):
        found = example.find(part.strip(), position)
        if found < 0:
            return example.endswith(LEFT_OUT) and length >= 2 * SHORTEST
        position, length = found + len(part.strip()), length + len(part.strip())
    return length >= 2 * SHORTEST


def quotes(page: str) -> list[str]:
    """Return the messages in the first column of a page's tables: code that has a space."""
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    return [span for cell in cells for span in CODE_SPAN.findall(cell) if " " in span]


def examples(page: str) -> list[str]:
    """Return the errors in a page's code blocks, up to the next error or the end of the block."""
    blocks = [block.strip("`\n") for block in CODE_BLOCK.findall(page)]
    errors = [text for block in blocks for text in re.split(r"^error: ", block, flags=re.M)[1:]]
    return [" ".join(text.split()) for text in errors]


def test_messages_of_the_troubleshooting_page_exist():
    quoted = quotes(PAGE.read_text(encoding="utf-8"))
    assert len(quoted) > 50
    assert [quote for quote in quoted if len(quote.replace(LEFT_OUT, "")) < SHORTEST] == []
    missing = [
        quote
        for quote in quoted
        if not any(is_quoted_from(quote, message) for message in all_messages())
    ]
    assert missing == []


def test_errors_in_code_blocks_are_messages():
    found = [(page.name, error) for page in PAGES for error in examples(page.read_text("utf-8"))]
    assert found
    wrong = [
        (name, error)
        for name, error in found
        if not any(is_example_of(error, message) for message in all_messages())
    ]
    assert wrong == []


@pytest.mark.parametrize("quote", ["... has no ...; give one", "has no config.json", "c; use it"])
def test_a_changed_message_is_missing(quote: str):
    [message, *_] = messages('raise ValueError(f"{a} has no {b.c}; " f"give one")')
    assert message == f"{VALUE} has no {VALUE}; give one"
    assert is_quoted_from(quote, message) == (quote == "... has no ...; give one")


def test_an_example_with_another_wording_is_not_the_message():
    message = f"the file {VALUE} has no tokens; give another {VALUE}"
    assert is_example_of("the file a.txt has no tokens; give another --text", message)
    assert is_example_of("the file a.txt has no tokens; give another ...", message)
    assert not is_example_of("the file a.txt is empty; give another --text", message)
    assert not is_example_of("the file a.txt ...", message)


def test_quotes_and_errors_of_a_page_are_read():
    page = "| You see | Do |\n|---|---|\n| `a b`, `c` | `d e` |\n\n```\n$ x\nerror: a\n  b\n```\n"
    assert quotes(page) == ["a b"] and examples(page) == ["a b"]


def test_the_hardware_table_has_what_new_plan_chooses(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = list(FORECAST.finditer((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(rows) == 5
    for row in rows:
        gpus, budget, price = int(row["gpus"] or 1), float(row["budget"]), float(row["price"])
        plan = choose(Request(row["gpu"], gpus, budget, "chat", None, None))
        assert size_text(plan.fit.run.model.num_parameters) == row["size"], row[0]
        assert f"{plan.tokens / 1e9:.1f}" == row["tokens"], row[0]
        hours, cost = float(row["hours"]), float(row["cost"])
        assert plan.tokens * plan.fit.seconds_per_token / 3600 <= hours <= budget, row[0]
        assert abs(cost - hours * gpus * price) <= max(0.5, gpus * price / 2), row[0]
