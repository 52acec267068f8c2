"""Generate questions about countries: facts, comparisons, neighbours and reading comprehension."""

from collections.abc import Mapping
from itertools import islice
from random import Random

from data.chat.factbook import REGIONS, Country, article
from data.synthetic.questions import Example, Message, assistant, single_turn

ASK = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "Name the capital of {c}.",
        "What is {c}'s capital city?",
        "The government of {c} sits in which capital?",
    ),
    "region": (
        "In which part of the world is {c}?",
        "Which region does {c} belong to?",
        "Where in the world is {c}?",
        "{c}: which region is that?",
        "To which part of the world would you count {c}?",
    ),
    "population": (
        "How many people live in {c}?",
        "What is the population of {c}?",
        "How large is the population of {c}?",
    ),
    "area": (
        "What is the area of {c}?",
        "How large is {c}?",
        "How many square kilometres does {c} cover?",
    ),
    "domain": (
        "What is the internet domain of {c}?",
        "How do web addresses of {c} end?",
        "Which internet country code belongs to {c}?",
    ),
    "elevation": (
        "How high is the highest point of {c}?",
        "What is the greatest elevation in {c}?",
        "How many metres above the sea is the highest place in {c}?",
    ),
    "landlocked": (
        "Is {c} landlocked?",
        "Is {c} a landlocked country?",
        "Is {c} cut off from the sea?",
    ),
    "hemisphere": (
        "In which hemisphere is the middle of {c}?",
        "Is the middle of {c} in the northern or the southern hemisphere?",
        "On which side of the equator is the middle of {c}, in which hemisphere?",
    ),
}
SAY = {
    "capital": "The capital of {c} is {v}.",
    "region": "{c} is in {v}.",
    "population": "The population of {c} is {v}.",
    "area": "The area of {c} is {v}.",
    "domain": "The internet domain of {c} is {v}.",
    "elevation": "The highest point of {c} is at {v}.",
    "hemisphere": "The middle of {c} is in the {v} hemisphere.",
}
BORDER = (
    "Does {a} border {b}?",
    "Do {a} and {b} share a land border?",
    "Is {b} a neighbour of {a}?",
    "Can one walk from {a} straight into {b}?",
)
IN_REGION = (
    "Is {c} in {r}?",
    "Does {c} belong to {r}?",
    "Is {c} a country of {r}?",
    "Would I find {c} in {r}?",
)
LARGER = (
    "Which is larger, {a} or {b}?",
    "Which country has the larger area, {a} or {b}?",
    "Does {a} or {b} cover more ground?",
    "By area, is {a} or {b} the larger one?",
)
READ = (
    "{text} {question}",
    "Read this: {text} Now answer: {question}",
    "{question} Use this text: {text}",
    "I read the following. {text} So, {question}",
)
EASY_TO_READ = ("capital", "region", "domain", "hemisphere")
NUMBERS = ("population", "area", "elevation")


def fact_key(country: str, attribute: str) -> str:
    return f"fact {country} {attribute}"


def pair_key(about: str, a: str, b: str) -> str:
    """Return the key of a question about two countries, independent of their order."""
    return " ".join(["fact", *sorted((a, b)), about])


def about_countries(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    """Return a question of a random kind. easy: answers are few, short or part of the question."""
    kinds = (region, in_region, landlocked, hemisphere, border, larger)
    make = rng.choice([*kinds, reading] if easy else [*kinds, reading, single, single, single])
    return make(rng, countries, easy)


def known(countries: Mapping[str, Country], attribute: str) -> list[Country]:
    """Return the countries with a value that their name does not reveal (Monaco's capital)."""
    return [
        c for c in countries.values() if attribute in c.facts and _apart(c.name, c.facts[attribute])
    ]


def _any(rng: Random, countries: Mapping[str, Country], attribute: str) -> Country:
    return rng.choice(known(countries, attribute))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def say_fact(country: str, attribute: str, value: str) -> str:
    """Return an attribute's value as a sentence."""
    if attribute == "landlocked":
        return landlocked_text(country, value)
    return _sentence(SAY[attribute].format(c=article(country), v=value))


def landlocked_text(country: str, value: str) -> str:
    name = article(country)
    return f"Yes, {name} is landlocked." if value == "yes" else f"No, {name} is not landlocked."


def other_values(
    rng: Random, countries: Mapping[str, Country], country: Country, attribute: str, count: int = 3
) -> list[str]:
    """Return distinct other values of an attribute, first from countries of the same region."""
    others = [c for c in countries.values() if attribute in c.facts]
    rng.shuffle(others)
    others.sort(key=lambda c: c.facts.get("region") != country.facts.get("region"))
    values = dict.fromkeys(c.facts[attribute] for c in others)
    return list(islice((value for value in values if value != country.facts.get(attribute)), count))


def answer_type(attribute: str) -> str:
    return "number" if attribute in NUMBERS else "yes_no" if attribute == "landlocked" else "text"


def _about(
    rng: Random, countries: Mapping[str, Country], country: Country, attribute: str, text: str = ""
) -> Example:
    """Return a question on one attribute of a country. text: a passage that contains the answer."""
    question = rng.choice(ASK[attribute]).format(c=article(country.name))
    question = rng.choice(READ).format(text=text, question=question) if text else question
    value = country.facts[attribute]
    others = (
        list(REGIONS.values())
        if attribute == "region"
        else other_values(rng, countries, country, attribute, 30)
    )
    wrong = [v for v in others if v != value]
    if attribute == "region":
        rng.shuffle(wrong)

    def say(value: str) -> Message:
        return assistant(say_fact(country.name, attribute, value))

    kind = answer_type(attribute)
    return single_turn(
        "factbook",
        fact_key(country.name, attribute),
        _sentence(question),
        (kind, value.split()[0] if kind == "number" else value),
        [value, *wrong[:3]],
        say,
        wrong if kind == "text" else (),
    )


def _apart(a: str, b: str) -> bool:
    """Return True if neither text contains the other, unlike Asia and Southeast Asia."""
    return a.lower() not in b.lower() and b.lower() not in a.lower()


def single(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    attribute = rng.choice(("capital", "capital", "population", "area", "domain", "elevation"))
    return _about(rng, countries, _any(rng, countries, attribute), attribute)


def region(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    return _about(rng, countries, _any(rng, countries, "region"), "region")


def hemisphere(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    value = rng.choice(("northern", "southern"))
    return _about(rng, countries, _with(rng, countries, "hemisphere", value), "hemisphere")


def landlocked(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    return _about(
        rng, countries, _with(rng, countries, "landlocked", rng.choice(("yes", "no"))), "landlocked"
    )


def _with(rng: Random, countries: Mapping[str, Country], attribute: str, value: str) -> Country:
    """Draw a country with this value, which balances the answers."""
    return rng.choice(
        [country for country in countries.values() if country.facts.get(attribute) == value]
    )


def in_region(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    country = _any(rng, countries, "region")
    right = country.facts["region"]
    yes = rng.random() < 0.5
    candidate = right if yes else rng.choice([r for r in REGIONS.values() if _apart(r, right)])
    name = article(country.name)

    def say(word: str) -> Message:
        return assistant(
            f"Yes, {name} is in {candidate}."
            if word == "yes"
            else f"No, {name} is not in {candidate}."
        )

    answers = ["yes", "no"] if yes else ["no", "yes"]
    question = rng.choice(IN_REGION).format(c=name, r=candidate)
    return single_turn(
        "factbook", fact_key(country.name, "region"), question, ("yes_no", answers[0]), answers, say
    )


def border(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    plain = [country for country in countries.values() if country.neighbours is not None]
    country = rng.choice([country for country in plain if country.neighbours])
    neighbours = country.neighbours or frozenset()
    yes = rng.random() < 0.5
    if yes:
        second = rng.choice(sorted(neighbours))
    else:
        near = rng.random() < 0.5
        strangers = [c.name for c in plain if c is not country and c.name not in neighbours]
        same = [
            name
            for name in strangers
            if countries[name].facts.get("region") == country.facts.get("region")
        ]
        second = rng.choice(same if near and same else strangers)
    a, b = rng.sample((country.name, second), 2)

    def say(word: str) -> Message:
        does = "Yes, {} borders {}." if word == "yes" else "No, {} does not border {}."
        return assistant(does.format(article(a), article(b)))

    answers = ["yes", "no"] if yes else ["no", "yes"]
    question = _sentence(rng.choice(BORDER).format(a=article(a), b=article(b)))
    return single_turn(
        "factbook", pair_key("border", a, b), question, ("yes_no", answers[0]), answers, say
    )


def area_of(country: Country) -> int:
    """Return a country's area in square kilometres."""
    return int(country.facts["area"].split()[0].replace(",", ""))


def larger(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    """Ask which of two countries is larger; one is at least twice as large."""
    while True:
        a, b = _any(rng, countries, "area"), _any(rng, countries, "area")
        if max(area_of(a), area_of(b)) >= 2 * min(area_of(a), area_of(b)) and _apart(
            a.name, b.name
        ):
            break
    right, wrong = (a, b) if area_of(a) > area_of(b) else (b, a)

    def say(country: Country) -> Message:
        return assistant(f"The larger one is {article(country.name)}.")

    question = _sentence(rng.choice(LARGER).format(a=article(a.name), b=article(b.name)))
    key = pair_key("area", a.name, b.name)
    return single_turn(
        "factbook", key, question, ("text", right.name), [right, wrong], say, [wrong.name]
    )


def reading(rng: Random, countries: Mapping[str, Country], easy: bool) -> Example:
    """Return a question with a passage that has the answer and other facts of the same country."""
    attributes = EASY_TO_READ if easy else tuple(SAY)
    attribute = rng.choice(attributes)
    country = _any(rng, countries, attribute)
    included = [a for a in attributes if a in country.facts and a != attribute]
    included = [attribute, *rng.sample(included, min(len(included), rng.randint(0, 2)))]
    rng.shuffle(included)
    text = " ".join(say_fact(country.name, a, country.facts[a]) for a in included)
    return _about(rng, countries, country, attribute, text)
