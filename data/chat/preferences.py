"""Preference pairs made ready for training: one prompt, a chosen and a rejected answer to it, as token ids kept on the disk.

What cannot be learned from (equal answers, empty ones, such as do not fit) is dropped and counted; malformed rows are named, and
too many of them refused. Prompts are cut from the left at a turn's border; an answer is never cut.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from data import manifest
from data.chat.conversations import Row, input_files, read_rows
from data.chat.messages import (
    NEUTRALISED,
    NOT_TRAINED,
    ROW_FLAGS,
    ignored_line,
    is_trained,
    read_message,
    read_row,
    row_tools,
    with_row_system,
)
from data.chat.rendering import Chat, Encoded, jinja_template
from data.chat.trained_chat import Seen
from data.corpus.readers import Skipped
from data.pipeline.recipe import Split
from ranges import FilledText, Fraction, at_least, check_fields

VERSION = 3  # goes up when the same inputs give other pairs
BATCH = 1000  # pairs encoded at once
NAMED = 20  # faults of a source that are named
PARTS = ("ids", "starts", "prompts")
Limit = Annotated[int, at_least(1, hint="leave it out to take all")]
FORMS = ("messages", "hh")
COLUMNS = {  # columns that each form reads; source and key are of generated pairs
    "messages": ("prompt", "chosen", "rejected", "source", "key"),
    "hh": ("chosen", "rejected"),
}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SAME, EMPTY, LONG = (
    "chosen and rejected are the same",
    "an empty answer",
    "a pair that does not fit",
)


@dataclass(frozen=True)
class PairSource:
    """Where pairs come from.

    form "messages": {"prompt": text or messages, "chosen", "rejected": text or messages}, where chosen and rejected may begin
    with the prompt, as UltraFeedback's do. "hh": {"chosen", "rejected": transcripts} of Anthropic's hh-rlhf.
    """

    path: FilledText  # file, folder, glob, or hf://owner/name@revision
    format: str = "messages"
    split: str = "train"  # of a hub data set; UltraFeedback binarized has train_prefs
    config: str | None = None  # of a hub data set, where it has several
    limit: Limit | None = None  # take no more pairs than that

    def __post_init__(self) -> None:
        check_fields(self, "source")
        if self.format not in FORMS:
            raise ValueError(
                f"{self.format!r} is no form of preference pairs; there are {', '.join(FORMS)}"
            )


@dataclass(frozen=True)
class PreferenceConfig:
    """What DPO reads. data.mix has the weight of each source, by pairs."""

    sources: dict[str, PairSource]
    cache: FilledText = "data/store/preferences"  # where prepared pairs are kept
    held_out: Fraction = 0.02  # share of pairs, by a hash of the prompt
    max_bad: Fraction = 0.02  # share of a source that may be malformed; above it the run is refused
    system: str | None = None  # a system prompt for prompts without one

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "preferences.sources names no source; give at least one, as name: {path, format}"
            )
        check_fields(self, "preferences")


class Pair(NamedTuple):
    """messages end with a user or a tool; chosen and rejected are an assistant's messages."""

    prompt: list[dict[str, Any]]
    chosen: dict[str, Any]
    rejected: dict[str, Any]
    tools: list[dict[str, Any]]
    ignored: tuple[str, ...] = ()  # keys and columns of its row that are not read


class Dropped(ValueError):
    """A well-formed row that there is nothing to learn from."""


class EncodedPair(NamedTuple):
    chosen: np.ndarray  # uint32, prompt and answer up to its <|im_end|>
    rejected: np.ndarray
    prompt: int  # tokens that both begin with, the assistant's header included


def parse_hh(row: dict[str, Any]) -> Pair:
    """A row of hh-rlhf: the prompt is the common beginning of both transcripts, cut back to the last "Assistant:"."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen.strip() == rejected.strip():
        raise Dropped(SAME)
    end = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT)  # noqa: RUF071 (of text, not paths)
    if end < 0:
        raise ValueError("no common prompt")
    first, second = (text[end + len(ASSISTANT) :].strip() for text in (chosen, rejected))
    if any(mark in answer for answer in (first, second) for mark in (HUMAN, ASSISTANT)):
        raise ValueError("an answer of several turns")
    before, *turns = re.split(r"\n\n(Human|Assistant):", chosen[:end])
    if before.strip() or not turns:
        raise ValueError("a transcript that does not begin with Human:")
    roles = {"Human": "user", "Assistant": "assistant"}
    prompt = [
        {"role": roles[role], "content": text}
        for role, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    return Pair(
        prompt,
        {"role": "assistant", "content": first},
        {"role": "assistant", "content": second},
        [],
    )


def parse_messages(row: dict[str, Any]) -> Pair:
    """A row of the form "messages"; the prompt may be what chosen and rejected begin with."""
    (chosen, keys), (rejected, others) = (
        _messages(row[name], "assistant") for name in ("chosen", "rejected")
    )
    given, unread = _messages(row.get("prompt") or [], "user")
    if chosen == rejected:
        raise Dropped(SAME)
    if chosen and rejected and chosen[0]["role"] != "assistant":
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt, others = _with_prompt(given, prompt) if prompt else [], others[shared:]
    else:
        prompt, keys = given, [*unread, *keys]
    if not prompt:
        raise ValueError("no common prompt")
    if len(chosen) != 1 or len(rejected) != 1:
        raise ValueError("an answer of several turns" if chosen and rejected else EMPTY)
    ignored = (*(key for of_message in (*keys, *others) for key in of_message),)
    return Pair(prompt, chosen[0], rejected[0], [], ignored)


PARSERS = {"messages": parse_messages, "hh": parse_hh}


def _messages(value: Any, role: str) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Messages, and of each the keys that are not read; text is one message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}], [[]]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("an answer or a prompt that is neither text nor messages")
    read = [read_message(message) for message in value]
    return [message for message, _ in read], [keys for _, keys in read]


def _with_prompt(
    prompt: list[dict[str, Any]], shared: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The turns that both answers begin with, after a system turn of `prompt`.

    ValueError if `prompt` holds other turns.
    """
    system = [message for message in prompt[:1] if message["role"] == "system"]
    if system and shared and shared[0]["role"] != "system":
        shared = [*system, *shared]
    texts = [(message["role"], message["content"].strip()) for message in shared]
    if any((message["role"], message["content"].strip()) not in texts for message in prompt):
        raise ValueError("a prompt that is not among the turns before the answers")
    return shared


def clean_pair(chat: Chat, pair: Pair, system: str | None = None) -> Pair:
    """The pair with all messages as chat.clean leaves them; Dropped or ValueError says what is wrong with it."""
    prompt = pair.prompt
    if system and prompt and prompt[0].get("role") != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    for answer in (pair.chosen, pair.rejected):
        if answer.get("role") != "assistant":
            raise ValueError("an answer that is not the assistant's")
        if "weight" in answer:
            raise ValueError("an answer without loss (weight 0)")
        content = answer.get("content")
        if not (answer.get("tool_calls") or answer.get("thought")) and (
            not content or not str(content).strip()
        ):
            raise Dropped(EMPTY)
    cleaned = [
        chat.clean({"messages": [*prompt, answer], "tools": pair.tools})
        for answer in (pair.chosen, pair.rejected)
    ]
    (*prompt, chosen), rejected = cleaned[0]["messages"], cleaned[1]["messages"][-1]
    if chosen == rejected:
        raise Dropped(SAME)
    return Pair(prompt, chosen, rejected, cleaned[0]["tools"], pair.ignored)


def shorten(pair: Pair) -> Pair | None:
    """The pair without the oldest turns of its prompt, up to the next user's; None where only the last is left."""
    system = pair.prompt[: pair.prompt[0]["role"] == "system"]
    users = [i for i, message in enumerate(pair.prompt) if message["role"] == "user"]
    return pair._replace(prompt=[*system, *pair.prompt[users[1] :]]) if len(users) > 1 else None


def encode_pairs(
    chat: Chat, pairs: list[Pair], length: int
) -> list[tuple[EncodedPair | None, bool]]:
    """Clean pairs as ids, None where one does not fit into `length` tokens, and whether its prompt was cut.

    The last token of an answer is only a target, and not counted.
    """
    rows = [
        {"messages": [*p.prompt, answer], "tools": p.tools}
        for p in pairs
        for answer in (p.chosen, p.rejected)
    ]
    encoded = [_answer(row) for row in chat.encode(rows)]
    found: list[tuple[EncodedPair | None, bool]] = []
    for pair, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True):
        if max(len(chosen[0]), len(rejected[0])) - 1 <= length:
            assert (
                chosen[1] == rejected[1]
                and (chosen[0][: chosen[1]] == rejected[0][: chosen[1]]).all()
            ), pair
            found.append((EncodedPair(chosen[0], rejected[0], chosen[1]), False))
        else:
            shorter = shorten(pair)
            found.append(
                (encode_pairs(chat, [shorter], length)[0][0], True) if shorter else (None, True)
            )
    return found


def _answer(row: Encoded) -> tuple[np.ndarray, int]:
    """Ids up to the end of the last answer, and where in them it begins."""
    before = row.ends[-2] if len(row.ends) > 1 else 0
    return row.ids[: row.ends[-1]], before + int(row.trained[before:].argmax())


def prepare(
    config: PreferenceConfig, mix: Collection[str], tokenizer: Path, length: int
) -> dict[str, Path]:
    """Folders of the prepared sources in the mixture, made where they are not there yet. tokenizer: a chat tokenizer's folder.

    ValueError where a source has too many faults or nothing that can be trained on.
    """
    if not mix:
        raise ValueError(
            f"data.mix names no source; preferences.sources has {', '.join(config.sources)}"
        )
    for name in mix:
        if name not in config.sources:
            raise ValueError(
                f"data.mix.{name}: preferences.sources has no such source; it has {', '.join(config.sources)}"
            )
    chat, made_by = Chat.from_folder(tokenizer), manifest.file_hash(tokenizer / "tokenizer.json")
    return {name: _prepare_source(name, config, chat, made_by, length) for name in mix}


def _prepare_source(
    name: str, config: PreferenceConfig, chat: Chat, tokenizer: str, length: int
) -> Path:
    source = config.sources[name]
    paths = input_files(source.path)
    files = {file: manifest.file_hash(path) for file, path in paths.items()}
    inputs: dict[str, Any] = {
        "version": VERSION,
        "source": {**vars(source), "path": None if files else source.path, "files": files},
        "tokenizer": tokenizer,
        "template": hashlib.sha256(jinja_template(training=True).encode()).hexdigest(),
        "length": length,
        "system": config.system,
        "held_out": config.held_out,
    }
    prepare = partial(_write_source, config=config, source=source, chat=chat, length=length)
    folder, report = manifest.keep(
        Path(config.cache), name, inputs, PARTS, prepare, () if source.limit else paths.values()
    )
    _check(name, report, config)
    return folder


def _check(name: str, report: dict[str, Any], config: PreferenceConfig) -> None:
    """ValueError where a prepared source has too many faults, or no pair."""
    path, bad, pairs = (
        config.sources[name].path,
        sum(report["bad"].values()),
        sum(report["pairs"].values()),
    )
    if bad > config.max_bad * report["rows"]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report["bad"].items())
        raise ValueError(
            f"{name}: {bad / report['rows']:.1%} of {report['rows']:,} pairs are faulty ({reasons}; the first is "
            f"{report['named'][0]}); mend {path} or raise preferences.max_bad={config.max_bad:g}"
        )
    if pairs and not report["pairs"]["train"]:
        raise ValueError(
            f"{name}: all {pairs:,} pairs are held out, by preferences.held_out={config.held_out:g}; lower it or add data"
        )
    if not report["pairs"]["train"]:
        reasons = (
            ", ".join(f"{count} x {reason}" for reason, count in report["dropped"].items())
            or "it is empty"
        )
        raise ValueError(
            f"{name}: no pair of {path} is left to train on ({reasons}); check its path, format and length"
        )


def _write_source(
    folder: Path, config: PreferenceConfig, source: PairSource, chat: Chat, length: int
) -> dict[str, Any]:
    """Read, check, encode and cut a source into the files of `folder`; returns its report."""
    dropped, bad, ignored, named = Counter[str](), Counter[str](), Counter[str](), list[str]()
    split, parts = (
        Split(config.held_out),
        {"train": list[EncodedPair](), "val": list[EncodedPair]()},
    )
    rows = cut = neutralised = 0
    seen = Seen()

    def pairs() -> Iterator[Pair]:
        nonlocal rows, neutralised
        for row in islice(read_rows(source.path, source.split, source.config), source.limit):
            rows += 1
            try:
                pair = parse_row(row, source.format)
                cleaned = clean_pair(chat, pair, config.system)
                ignored.update(pair.ignored)
                neutralised += chat.holds_special(pair[:4])
                yield cleaned
            except Dropped as error:
                dropped[str(error)] += 1
            except ValueError as error:
                bad[str(error)] += 1
                if len(named) < NAMED:
                    named.append(f"{row.where}: {error}")

    left = pairs()
    while batch := list(islice(left, BATCH)):
        for pair, (encoded, shortened) in zip(
            batch, encode_pairs(chat, batch, length), strict=True
        ):
            if encoded is None:
                dropped[LONG] += 1
                continue
            cut += shortened
            seen.add([*pair.prompt, pair.chosen], pair.tools)
            parts[split.of(json.dumps([pair.prompt, pair.tools], sort_keys=True))].append(encoded)
    for which, encoded_pairs in parts.items():
        _write_split(folder, which, encoded_pairs)
    return {
        "rows": rows,
        "pairs": {which: len(encoded_pairs) for which, encoded_pairs in parts.items()},
        "cut": cut,
        "neutralised": neutralised,
        "dropped": dict(dropped.most_common()),
        "bad": dict(bad.most_common()),
        "named": named,
        "ignored": dict(ignored.most_common()),
        "seen": seen.report(),
    }


def parse_row(row: Row | Skipped, format: str) -> Pair:
    """Dropped or ValueError where it is no pair to learn from."""
    if isinstance(row, Skipped):
        raise ValueError(row.reason)
    try:
        if not is_trained(row.value, ROW_FLAGS):
            raise Dropped(NOT_TRAINED)
        columns = read_row(row.value, COLUMNS[format])
        pair = PARSERS[format](row.value)
        prompt, tools = with_row_system(row.value, pair.prompt), row_tools(row.value) or []
        return pair._replace(prompt=prompt, tools=tools, ignored=(*pair.ignored, *columns))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not of the form {format} ({type(error).__name__}: {error})") from None


def _write_split(folder: Path, split: str, pairs: list[EncodedPair]) -> None:
    ids = [ids for pair in pairs for ids in (pair.chosen, pair.rejected)]
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    prompts = np.array([pair.prompt for pair in pairs], dtype=np.int64)
    arrays = {
        "ids": np.concatenate([np.empty(0, np.uint32), *ids]),
        "starts": starts,
        "prompts": prompts,
    }
    manifest.save_arrays(folder, split, arrays)


def describe(name: str, report: dict[str, Any]) -> list[str]:
    """Lines on what became of a source."""
    pairs, dropped = (
        report["pairs"],
        "".join(f"; dropped {count:,}: {reason}" for reason, count in report["dropped"].items()),
    )
    cut = f"; {report['cut']:,} prompts cut" if report["cut"] else ""
    cut += f"; {report['neutralised']:,} {NEUTRALISED}" if report["neutralised"] else ""
    lines = [f"{name}: {pairs['train']:,} pairs, {pairs['val']:,} held out{cut}{dropped}"]
    lines += ignored_line(name, report["ignored"])
    lines += [f"warning: {name}: left out {where}" for where in report["named"][:3]]
    bad = sum(report["bad"].values())
    return [*lines, f"warning: {name}: {bad} faulty rows left out in all"] if bad > 3 else lines
