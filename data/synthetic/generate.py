"""Generate conversations with verified answers, and preference pairs from them.

Topics: arithmetic, tool use, facts about countries, the assistant's identity; and a small domain
for models of a few million parameters (data/synthetic/small_domain.py). Each generator
returns `count` distinct examples of one split, deterministic by seed. The split depends
only on the question (questions.is_heldout), so training and heldout examples never overlap.
data/synthetic/questions.py defines the format and the scoring.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from data.chat.factbook import load_countries
from data.chat.tools import WHEELS
from data.synthetic.facts import about_countries
from data.synthetic.identity import identity
from data.synthetic.mathematics import story
from data.synthetic.questions import SPLITS, Example, answer_of, is_heldout, is_right
from data.synthetic.small_domain import WEIGHTS, conversation, makers
from data.synthetic.tool_use import tool_use

__all__ = [
    "answer_of",
    "generate_factbook_examples",
    "generate_identity_examples",
    "generate_math_examples",
    "generate_preference_pairs",
    "generate_small_domain",
    "generate_tool_use_examples",
    "is_right",
]
NAME = "NanoLlama"
PATIENCE = 2000  # consecutive draws without a new example


def generate_math_examples(
    count: int, seed: int, split: str = "train", easy: bool = False
) -> list[Example]:
    """Return word problems with worked thoughts. easy: one step, numbers up to 12."""
    return _draw("math", lambda rng: story(rng, easy), count, seed, split)


def generate_tool_use_examples(
    count: int, seed: int, split: str = "train", easy: bool = False, wheels: Path = WHEELS
) -> list[Example]:
    """Return questions for a tool, with the call and the tool's actual result.

    easy: one tool offered, small numbers. wheels: folder of the World Factbook's wheel.
    """
    countries = load_countries(wheels)
    return _draw("tools", lambda rng: tool_use(rng, countries, easy, wheels), count, seed, split)


def generate_factbook_examples(
    count: int, seed: int, split: str = "train", easy: bool = False, wheels: Path = WHEELS
) -> list[Example]:
    """Return questions about countries.

    easy: answers are yes or no, a region, or part of the question.
    """
    countries = load_countries(wheels)
    return _draw("factbook", lambda rng: about_countries(rng, countries, easy), count, seed, split)


def generate_identity_examples(
    count: int, seed: int, split: str = "train", name: str = NAME
) -> list[Example]:
    """Return questions about the assistant, which is called `name`."""
    return _draw("identity", lambda rng: identity(rng, name), count, seed, split)


def generate_small_domain(
    kind: str, count: int, seed: int, split: str, wheels: Path = WHEELS, name: str = NAME
) -> list[Example]:
    """Return questions of a kind of small_domain.makers, or mixed conversations.

    kind: factbook, tools, elsewhere, identity or conversations.
    """
    make = makers(load_countries(wheels), name)
    if kind != "conversations":
        return _draw(kind, make[kind], count, seed, split)
    rng = Random(f"{kind} {split} {seed}")
    return [conversation(rng, list(make.values()), split) for _ in range(count)]


def generate_preference_pairs(
    count: int,
    seed: int,
    split: str = "train",
    easy: bool = False,
    wheels: Path = WHEELS,
    name: str = NAME,
    small_domain: bool = False,
) -> list[dict[str, Any]]:
    """Return preference pairs of a right and a subtly wrong reply.

    The wrong reply has another number, attribute, unit, call argument or assistant's name. A pair
    is {"id", "source", "prompt", "chosen", "rejected", "tools" (optional)}; prompt, chosen and
    rejected are lists of messages.
    """
    countries = load_countries(wheels)
    make: list[Callable[[Random], Example]] = [
        lambda rng: story(rng, easy),
        lambda rng: about_countries(rng, countries, easy),
        lambda rng: tool_use(rng, countries, easy, wheels),
        lambda rng: identity(rng, name),
    ]
    weights: tuple[int, ...] = (4, 4, 3, 1)
    if small_domain:
        make, weights = list(makers(countries, name).values()), WEIGHTS
    pairs = _draw(
        "pairs",
        lambda rng: rng.choices(make, weights)[0](rng),
        count,
        seed,
        split,
        needs_wrong=True,
    )
    return [_pair(example, Random(f"{seed} {example['id']}")) for example in pairs]


def _pair(example: Example, rng: Random) -> dict[str, Any]:
    check = rng.choice([check for check in example["checks"] if check["wrong"]])
    turn, messages = check["turn"], example["messages"]
    tools = {"tools": example["tools"]} if "tools" in example else {}
    reply = {
        "prompt": messages[:turn],
        "chosen": [messages[turn]],
        "rejected": [rng.choice(check["wrong"])],
    }
    return {
        "id": f"pair-{example['id']}-{turn}",
        "source": example["source"],
        "key": example["key"],
        **tools,
        **reply,
    }


def _draw(
    kind: str,
    make: Callable[[Random], Example],
    count: int,
    seed: int,
    split: str,
    needs_wrong: bool = False,
) -> list[Example]:
    """Return distinct examples of a split. needs_wrong: only examples with a wrong reply."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count={count} must be at least 0")
    rng = Random(f"{kind} {split} {seed}")
    examples: dict[str, Example] = {}  # by prompt
    idle = 0
    while len(examples) < count:
        example = make(rng)
        matches = is_heldout(example["key"]) == (split == "heldout") and (
            not needs_wrong or any(c["wrong"] for c in example["checks"])
        )
        prompt = str(example["messages"][: example["checks"][0]["turn"]])
        idle += 1
        if matches and prompt not in examples:
            examples[prompt] = example
            idle = 0
        elif idle == PATIENCE:
            raise ValueError(
                f"the {split} split has only about {len(examples)} different {kind} questions; "
                "lower the count"
            )
    return list(examples.values())
