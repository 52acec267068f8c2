"""Generate arithmetic word problems of one to three steps, with the computed steps as a thought."""

import operator
from fractions import Fraction
from random import Random

from data.synthetic.questions import Example, Message, assistant, single_turn

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

NAMES = (
    *(
        "Ana",
        "Ben",
        "Chloe",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Hugo",
        "Ines",
        "Jonas",
        "Kira",
        "Leo",
        "Maya",
        "Noah",
    ),
    *("Olga", "Paul", "Rosa", "Sami", "Tara", "Umar", "Vera", "Will", "Yuki", "Zoe"),
)
THINGS = (
    *(
        "apples",
        "books",
        "coins",
        "stamps",
        "cards",
        "shells",
        "pencils",
        "marbles",
        "cookies",
        "stickers",
        "eggs",
        "balls",
    ),
    *("flowers", "keys", "tickets", "lemons", "nails", "plates", "photos", "stones"),
)
PLACES = ("box", "bag", "basket", "drawer", "jar", "shelf")
# Steps, evaluated from left to right, and the question
STORIES = (
    ("a + b", "What is {a} + {b}?"),
    ("a + b", "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"),
    (
        "a + b",
        "There are {a} {things} in one {place} and {b} in another. "
        "How many {things} are there in all?",
    ),
    ("a + b", "{name} found {a} {things} on Monday and {b} on Tuesday. How many is that together?"),
    (
        "a + b",
        "A {place} holds {a} {things}. {name} puts in {b} more. "
        "How many {things} does it hold then?",
    ),
    ("a - b", "What is {a} - {b}?"),
    ("a - b", "{name} had {a} {things} and gave away {b}. How many {things} are left?"),
    ("a - b", "Of {a} {things} in a {place}, {b} are broken. How many are whole?"),
    ("a - b", "{name} has {a} {things}, {other} has {b}. How many more does {name} have?"),
    ("a - b", "{name} needs {a} {things} and already has {b}. How many are missing?"),
    ("a * b", "What is {a} * {b}?"),
    ("a * b", "There are {a} rows with {b} {things} each. How many {things} are there?"),
    ("a * b", "{name} buys {a} packs of {b} {things}. How many {things} is that?"),
    ("a * b", "Each {place} holds {b} {things}. How many {things} fit in {a} of them?"),
    ("a / b", "What is {a} / {b}?"),
    (
        "a / b",
        "{name} shares {a} {things} equally among {b} friends. How many does each friend get?",
    ),
    ("a / b", "{a} {things} are laid out in rows of {b}. How many rows are there?"),
)
LONGER_STORIES = (
    (
        "a * b + c",
        "{name} has {a} packs of {b} {things} and {c} loose ones. "
        "How many {things} does {name} have?",
    ),
    (
        "a * b + c",
        "A hall has {a} rows of {b} seats, and {c} more seats at the back. "
        "How many people can sit there?",
    ),
    (
        "a * b - c",
        "{name} bought {a} packs of {b} {things} and lost {c} of them. How many {things} are left?",
    ),
    (
        "a * b - c",
        "{a} {things} at {b} cents each are paid for, less a discount of {c} cents. "
        "How many cents is that?",
    ),
    ("a + b - c", "{name} had {a} {things}, got {b} from {other} and used {c}. How many remain?"),
    (
        "a - b - c",
        "A bus sets out with {a} people; {b} get off at the first stop and {c} at the next. "
        "How many stay on?",
    ),
    (
        "a + b / c",
        "{name} and {other} share {a} and {b} {things} equally among {c} children. "
        "How many does each get?",
    ),
    (
        "a * b / c",
        "{a} boxes of {b} {things} are divided equally among {c} shops. "
        "How many {things} does a shop get?",
    ),
    (
        "a * b * c",
        "A school has {a} floors with {b} rooms on each, and {c} desks in every room. "
        "How many desks are there?",
    ),
    (
        "a * b + c - d",
        "{name} sells {a} baskets of {b} {things}, then {c} more; {d} come back. "
        "How many stay sold?",
    ),
)


def story(rng: Random, easy: bool) -> Example:
    """Return a question and its answer. easy: one step, numbers up to 12."""
    steps, text = rng.choice(STORIES if easy or rng.random() < 0.4 else LONGER_STORIES)
    letters, operators = steps.split()[::2], steps.split()[1::2]
    numbers = _numbers(rng, operators, 12 if easy else rng.choice((20, 100, 1000)))
    name, second_name = rng.sample(NAMES, 2)
    words = {
        "name": name,
        "other": second_name,
        "things": rng.choice(THINGS),
        "place": rng.choice(PLACES),
    }
    values = dict(zip(letters, numbers, strict=True))
    lines, result = work(numbers, operators)
    before = lines[-1].rpartition(" = ")[0]

    def say(value: int) -> Message:
        return assistant(
            f"The answer is {value}.", thought="\n".join([*lines[:-1], f"{before} = {value}"])
        )

    key = expression_key(numbers, operators)
    options = [result, *wrong_numbers(rng, result, numbers)]
    return single_turn(
        "math", key, text.format(**values, **words), ("number", str(result)), options, say
    )


def _numbers(rng: Random, operators: list[str], largest: int) -> list[int]:
    """Return numbers for which every step gives an integer in [0, 1,000,000)."""
    while True:
        first = rng.randint(2, largest * (largest if operators[0] == "/" else 1))
        numbers = [
            first,
            *(rng.randint(2, largest if sign in "+-" else min(largest, 40)) for sign in operators),
        ]
        value, fits = Fraction(first), True
        for sign, number in zip(operators, numbers[1:], strict=True):
            value = OPERATIONS[sign](value, Fraction(number))
            fits = fits and value.denominator == 1 and 0 <= value < 10**6
        if fits:
            return numbers


def work(numbers: list[int], operators: list[str]) -> tuple[list[str], int]:
    """Return the steps as lines, with products of larger numbers split, and the result."""
    lines, value = [], numbers[0]
    for sign, number in zip(operators, numbers[1:], strict=True):
        result = int(OPERATIONS[sign](Fraction(value), number))
        tens = number // 10 * 10
        if sign == "*" and value > 12 and number > 12 and number != tens:
            lines.append(f"{value} * {tens} = {value * tens}")
            lines.append(f"{value} * {number - tens} = {value * (number - tens)}")
            lines.append(f"{value * tens} + {value * (number - tens)} = {result}")
        else:
            lines.append(f"{value} {sign} {number} = {result}")
        value = result
    return lines, value


def expression_key(numbers: list[int], operators: list[str]) -> str:
    """Return the key of an expression; equal for 3 + 7 and 7 + 3."""
    if operators[0] in "+*":
        numbers = sorted(numbers[:2]) + numbers[2:]
    return "math " + " ".join(
        [str(numbers[0]), *(f"{sign} {n}" for sign, n in zip(operators, numbers[1:], strict=True))]
    )


def wrong_numbers(rng: Random, right: int, numbers: list[int], count: int = 3) -> list[int]:
    """Return wrong answers >= 0: near the right one, or of another operation.

    Answers of the right one's length come first.
    """
    near = [right - 2, right - 1, right + 1, right + 2, right + 10, right - 10]
    slips = [sum(numbers[:2]), abs(numbers[0] - numbers[1]), numbers[0] * numbers[1]]
    candidates = sorted({n for n in near + slips if n >= 0 and n != right})
    rng.shuffle(candidates)
    candidates.sort(key=lambda n: len(str(n)) != len(str(right)))
    return candidates[:count]
