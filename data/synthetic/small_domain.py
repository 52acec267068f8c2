"""Generate conversations for a model of a few million parameters: one small domain, one tool.

The domain: capital, region, coast and hemisphere of the 30 most populous countries of the Factbook
that have these facts; calculations with two numbers of two digits, for which the assistant calls
the calculator; the assistant itself; and questions about anything else, to which it says that it
does not know. Training conversations mix
these kinds of turns, all with the calculator available, as in a chat.

A held-out question about a country is a new wording: its fact appears in training in other words. A
held-out sum or out-of-domain question does not appear in training in any wording.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from data.chat.factbook import Country, article
from data.chat.tools import TOOLS, run_tool
from data.synthetic.facts import ASK, answer_type, other_values, say_fact
from data.synthetic.identity import identity
from data.synthetic.questions import (
    Check,
    Example,
    Message,
    assistant,
    call,
    check,
    example,
    is_heldout,
    single_turn,
    user,
)
from data.synthetic.tool_use import near_results

ATTRIBUTES = ("capital", "region", "landlocked", "hemisphere")
COUNTRIES = 30
TURNS = 6  # maximum questions of a conversation
# Weights of country_question, sum_question, elsewhere, identity. Copying numbers into a call is the
# hardest to learn (docs/log.md).
WEIGHTS = (4, 4, 1, 1)
CALCULATOR = [tool for tool in TOOLS if tool["function"]["name"] == "calculator"]
# The expression is last: a small model learns to copy over a fixed distance first.
SUMS = (
    "What is {e}?",
    "How much is {e}?",
    "Can you work out {e}?",
    "Please tell me, what is {e}?",
    "Do you know {e}?",
)
UNKNOWN = "I don't know."
OFFER = "Ask me about a country, or a calculation."
# Questions outside the domain, with their subjects.
THINGS = {
    "person": "my mother, the king, Shakespeare, Einstein, Mozart, a nurse, the president, "
    "Picasso, my teacher, Cleopatra, the queen, a pilot, Newton, Napoleon, my brother, the mayor",
    "work": "Hamlet, the Mona Lisa, that song, the telephone, the Bible, this poem, Don Quixote, "
    "the film, the piano, Faust, the book, the radio, this game, the opera, the wheel",
    "food": "rice, bread, soup, a cake, fish, coffee, tea, pizza, an omelette, beans, cheese, "
    "pancakes, salad, a pie, noodles, jam",
    "animal": "a cat, a dog, an elephant, a whale, an owl, a spider, a horse, a snake, a bee, "
    "a shark, a mouse, a wolf, a frog, a camel, a bear, a duck",
    "object": "a car, my phone, a laptop, the door, a bicycle, my watch, the window, a chair, "
    "a camera, the lamp, my shoes, the printer, a tent, the oven, a boat, my keys",
    "topic": "love, music, football, history, the weather, chemistry, money, sleep, gravity, "
    "politics, art, the sea, time, chess, health, the news",
}
ELSEWHERE = {
    "person": (
        "Who was {x}?",
        "When was {x} born?",
        "How old is {x}?",
        "Where does {x} live?",
        "What did {x} say yesterday?",
        "Is {x} famous?",
        "How tall is {x}?",
        "What does {x} like to eat?",
    ),
    "work": (
        "Who wrote {x}?",
        "Who made {x}?",
        "When was {x} invented?",
        "What is {x} about?",
        "How old is {x}?",
        "Why is {x} famous?",
        "Do you like {x}?",
    ),
    "food": (
        "How do I cook {x}?",
        "Is {x} good for me?",
        "How long does {x} take to make?",
        "What goes well with {x}?",
        "Give me a recipe for {x}.",
        "Where can I buy {x}?",
        "How much sugar is in {x}?",
    ),
    "animal": (
        "What does {x} eat?",
        "How long does {x} live?",
        "How fast can {x} run?",
        "Where does {x} sleep?",
        "Can {x} swim?",
        "Why does {x} make that noise?",
        "Tell me something about {x}.",
    ),
    "object": (
        "How do I repair {x}?",
        "What does {x} cost?",
        "Where is {x}?",
        "Which colour has {x}?",
        "How does {x} work?",
        "Should I sell {x}?",
        "What is the best way to clean {x}?",
    ),
    "topic": (
        "What is {x}?",
        "Tell me about {x}.",
        "Explain {x} to me.",
        "Write a poem about {x}.",
        "What do you think of {x}?",
        "Why do people care about {x}?",
        "Tell me a joke about {x}.",
        "What will {x} be like tomorrow?",
    ),
}


def domain(countries: Mapping[str, Country]) -> list[Country]:
    """Return the most populous countries that have all facts, most populous first."""
    complete = [c for c in countries.values() if {*ATTRIBUTES, "population"} <= set(c.facts)]
    people = {c.name: int(c.facts["population"].split()[0].replace(",", "")) for c in complete}
    return sorted(complete, key=lambda c: -people[c.name])[:COUNTRIES]


def country_question(
    rng: Random, chosen: Sequence[Country], countries: Mapping[str, Country]
) -> Example:
    """Return a question about a chosen country. Its key has the wording, see the module."""
    country, attribute = rng.choice(chosen), rng.choice(ATTRIBUTES)
    wording = rng.choice(ASK[attribute])
    question = wording.format(c=article(country.name))
    value = country.facts[attribute]
    wrong = other_values(rng, countries, country, attribute, 30)
    return single_turn(
        "factbook",
        f"wording {country.name} {attribute} {wording}",
        question[0].upper() + question[1:],
        (answer_type(attribute), value),
        [value, *wrong[:3]],
        lambda value: assistant(say_fact(country.name, attribute, value)),
        wrong if answer_type(attribute) == "text" else (),
    )


def sum_question(rng: Random) -> Example:
    """Return a calculation, the calculator's call, its result and the answer."""
    left, right, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-*")
    text = f"{left} {sign} {right}"
    other_sign = rng.choice([other for other in "+-*" if other != sign])
    variants = [f"{left} {sign} {right - 1}", f"{left} {other_sign} {right}"]
    calls = [call("calculator", {"expression": each}) for each in (text, *variants)]
    result = run_tool("calculator", {"expression": text})
    wrong = [assistant(f"The answer is {near}.") for near in near_results(result)]
    messages = [
        user(rng.choice(SUMS).format(e=text)),
        calls[0],
        {"role": "tool", "content": result},
        assistant(f"The answer is {result}."),
    ]
    named = {"name": "calculator", "arguments": {"expression": text}}
    checks = [check(1, "call", named, calls[1:]), check(3, "number", result, wrong)]
    return example("tools", f"sum {text}", messages, checks)


def elsewhere(rng: Random, chosen: Sequence[Country]) -> Example:
    """Return a question outside the domain. The key is its wording, without the subject."""
    kind = rng.choice(tuple(ELSEWHERE))
    wording, things = rng.choice(ELSEWHERE[kind]), THINGS[kind].split(", ")
    guess = rng.choice(chosen).facts["capital"]
    wrong = [assistant(f"The answer is {guess}."), call("calculator", {"expression": "2 + 2"})]
    return example(
        "elsewhere",
        f"elsewhere {kind} {wording}",
        [user(wording.format(x=rng.choice(things))), assistant(f"{UNKNOWN} {OFFER}")],
        [check(1, "text", UNKNOWN.rstrip("."), wrong)],
    )


def makers(countries: Mapping[str, Country], name: str) -> dict[str, Callable[[Random], Example]]:
    """Return functions that make single questions with the calculator available.

    They are in the order of WEIGHTS. name: the assistant's name.
    """
    chosen = domain(countries)

    def with_tool(make: Callable[[Random], Example]) -> Callable[[Random], Example]:
        return lambda rng: make(rng) | {"tools": CALCULATOR}

    return {
        "factbook": with_tool(lambda rng: country_question(rng, chosen, countries)),
        "tools": with_tool(sum_question),
        "elsewhere": with_tool(lambda rng: elsewhere(rng, chosen)),
        "identity": with_tool(lambda rng: identity(rng, name)),
    }


def conversation(rng: Random, make: Sequence[Callable[[Random], Example]], split: str) -> Example:
    """Return a conversation of 1 to TURNS questions of one split. make: see `makers`."""
    messages: list[Message] = []
    checks: list[Check] = []
    keys: list[str] = []
    for _ in range(rng.randint(1, TURNS)):
        while True:
            question = rng.choices(make, WEIGHTS)[0](rng)
            if is_heldout(question["key"]) == (split == "heldout"):
                break
        checks += [{**c, "turn": c["turn"] + len(messages)} for c in question["checks"]]
        messages += question["messages"]
        keys.append(question["key"])
    return example("conversation", " | ".join(keys), messages, checks, CALCULATOR)
