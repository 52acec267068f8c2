"""Prepare preference pairs for DPO: a prompt with a chosen and a rejected answer, as token ids.

Pairs without a training signal (equal, empty or too long answers) are dropped and counted.
Malformed rows are reported; too many are an error. Prompts are truncated from the left at turn
boundaries; answers are never truncated.
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
from data.chat.conversations import check_mix, describe_source
from data.chat.messages import (
    NEUTRALISED,
    NOT_TRAINED,
    ROW_FLAGS,
    Message,
    ignored_line,
    is_trained,
    read_message,
    read_row,
    row_tools,
    with_row_system,
)
from data.chat.rendering import Chat, Encoded, jinja_template
from data.chat.rows import Row, input_files, read_rows
from data.chat.trained_chat import ChatStatistics
from data.corpus.readers import Skipped
from data.corpus.sources import PAIRS, resolve_rows
from data.pipeline.recipe import Split
from ranges import Fraction, NonEmptyText, at_least, check_fields

VERSION = 3  # increment when the same inputs give different pairs
BATCH = 1000  # pairs encoded at once
MAX_NAMED = 20  # malformed rows that a source's report lists
ARRAYS = ("ids", "starts", "prompts")
Limit = Annotated[int, at_least(1, hint="leave it out to take all")]
FORMATS = ("messages", "hh")
COLUMNS = {  # columns of each format; generated pairs have source and key
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
    """A source of pairs.

    format "messages": {"prompt", "chosen", "rejected"}, each text or messages; chosen and rejected
    may begin with the prompt, as in UltraFeedback. "hh": {"chosen", "rejected"}, transcripts of
    Anthropic's hh-rlhf.
    """

    # File, folder, glob, hf://owner/name@revision, or a name of sources.py:PAIRS
    path: NonEmptyText
    format: str = "messages"  # format of the rows: messages or hh
    split: str = "train"  # split of a hub data set; UltraFeedback binarized has train_prefs
    config: str | None = None  # config of a hub data set with several
    limit: Limit | None = None  # maximum number of pairs

    def __post_init__(self) -> None:
        check_fields(self, "source")
        resolve_rows(self, PAIRS)
        if self.format not in FORMATS:
            raise ValueError(
                f"unknown format of preference pairs {self.format!r}; known: {', '.join(FORMATS)}"
            )


@dataclass(frozen=True)
class PreferenceConfig:
    """Data of DPO. data.mix has each source's weight as a share of pairs."""

    sources: dict[str, PairSource]  # data.mix gives their weights
    cache: NonEmptyText = "data/store/preferences"  # folder of prepared pairs
    val_fraction: Fraction = 0.02  # validation share of pairs, by a hash of the prompt
    max_bad: Fraction = 0.02  # maximum share of malformed rows in a source
    system: str | None = None  # system prompt for prompts without one

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "preferences.sources is empty; list at least one, as name: {path, format}"
            )
        check_fields(self, "preferences")


class Pair(NamedTuple):
    """A prompt that ends with a user or tool message, and two assistant messages."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Message]
    ignored: tuple[str, ...] = ()  # unused keys and columns of its row


class Dropped(ValueError):
    """A well-formed row without a training signal."""


class EncodedPair(NamedTuple):
    """Token ids of a pair."""

    chosen: np.ndarray  # uint32, prompt and answer up to its <|im_end|>
    rejected: np.ndarray
    prompt: int  # tokens of the common prompt, including the assistant's header


def parse_hh(row: dict[str, Any]) -> Pair:
    """Parse a row of hh-rlhf; the prompt is the common prefix up to the last "Assistant:"."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen.strip() == rejected.strip():
        raise Dropped(SAME)
    prefix = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (of text, not paths)
    end = prefix.rfind(ASSISTANT)
    if end < 0:
        raise ValueError("no common prompt; chosen and rejected must begin with the same turns")
    first, second = (text[end + len(ASSISTANT) :].strip() for text in (chosen, rejected))
    if any(mark in answer for answer in (first, second) for mark in (HUMAN, ASSISTANT)):
        raise ValueError("an answer of several turns; keep one")
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
    """Parse a row of the format "messages".

    Both answers may begin with the prompt; their common prefix is then the prompt.
    """
    (chosen, chosen_keys), (rejected, rejected_keys) = (
        _messages(row[name], "assistant") for name in ("chosen", "rejected")
    )
    prompt, prompt_keys = _messages(row.get("prompt") or [], "user")
    if chosen == rejected:
        raise Dropped(SAME)
    if chosen and rejected and chosen[0]["role"] != "assistant":
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prefix, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = _with_prompt(prompt, prefix) if prefix else []
        rejected_keys = rejected_keys[shared:]
    else:
        chosen_keys = [*prompt_keys, *chosen_keys]
    if not prompt:
        raise ValueError("no common prompt; chosen and rejected must begin with the same turns")
    if len(chosen) != 1 or len(rejected) != 1:
        raise ValueError("an answer of several turns; keep one" if chosen and rejected else EMPTY)
    ignored = tuple(key for keys in (*chosen_keys, *rejected_keys) for key in keys)
    return Pair(prompt, chosen[0], rejected[0], [], ignored)


PARSERS = {"messages": parse_messages, "hh": parse_hh}


def _messages(value: object, role: str) -> tuple[list[Message], list[list[str]]]:
    """Return messages and the ignored keys of each; text becomes one message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}], [[]]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("prompt, chosen and rejected must be text or lists of messages")
    results = [read_message(message) for message in value]
    return [message for message, _ in results], [keys for _, keys in results]


def _with_prompt(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """Return the common prefix of both answers, after a system turn of `prompt`.

    ValueError if `prompt` has turns outside the prefix.
    """
    system = [message for message in prompt[:1] if message["role"] == "system"]
    if system and shared and shared[0]["role"] != "system":
        shared = [*system, *shared]
    texts = [(message["role"], message["content"].strip()) for message in shared]
    if any((message["role"], message["content"].strip()) not in texts for message in prompt):
        raise ValueError("prompt has turns that chosen and rejected do not begin with; remove them")
    return shared


def clean_pair(chat: Chat, pair: Pair, system: str | None = None) -> Pair:
    """Return a pair with messages normalised by chat.clean.

    Dropped if it has no training signal, ValueError if it is malformed.
    """
    prompt = pair.prompt
    if system and prompt and prompt[0].get("role") != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    for answer in (pair.chosen, pair.rejected):
        if answer.get("role") != "assistant":
            raise ValueError("an answer must be a message of role 'assistant'")
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
    """Remove the oldest user turn and its replies; None if it is the only user turn."""
    system = pair.prompt[: pair.prompt[0]["role"] == "system"]
    users = [i for i, message in enumerate(pair.prompt) if message["role"] == "user"]
    return pair._replace(prompt=[*system, *pair.prompt[users[1] :]]) if len(users) > 1 else None


def encode_pairs(
    chat: Chat, pairs: list[Pair], length: int
) -> list[tuple[EncodedPair | None, bool]]:
    """Encode clean pairs; return each as (pair or None, True if its prompt was truncated).

    None: longer than `length`, not counting the answer's last token, which is only a target.
    """
    rows = [
        {"messages": [*p.prompt, answer], "tools": p.tools}
        for p in pairs
        for answer in (p.chosen, p.rejected)
    ]
    encoded = [_answer(row) for row in chat.encode(rows)]
    results: list[tuple[EncodedPair | None, bool]] = []
    for pair, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True):
        if max(len(chosen[0]), len(rejected[0])) - 1 <= length:
            assert (
                chosen[1] == rejected[1]
                and (chosen[0][: chosen[1]] == rejected[0][: chosen[1]]).all()
            ), pair
            results.append((EncodedPair(chosen[0], rejected[0], chosen[1]), False))
        else:
            shorter = shorten(pair)
            encoded_pair = encode_pairs(chat, [shorter], length)[0][0] if shorter else None
            results.append((encoded_pair, True))
    return results


def _answer(row: Encoded) -> tuple[np.ndarray, int]:
    """Return the ids up to the last answer's end, and the index of its first token."""
    before = row.ends[-2] if len(row.ends) > 1 else 0
    return row.ids[: row.ends[-1]], before + int(row.trained[before:].argmax())


def prepare(
    config: PreferenceConfig, mix: Collection[str], tokenizer: Path, length: int
) -> dict[str, Path]:
    """Prepare a mixture's sources, unless cached; return their folders.

    tokenizer: folder of a chat tokenizer. ValueError if a source has too many malformed rows or no
    training pair.
    """
    check_mix(mix, config.sources, "preferences.sources")
    chat = Chat.from_folder(tokenizer)
    tokenizer_hash = manifest.file_hash(tokenizer / "tokenizer.json")
    return {name: _prepare_source(name, config, chat, tokenizer_hash, length) for name in mix}


def _prepare_source(
    name: str, config: PreferenceConfig, chat: Chat, tokenizer: str, length: int
) -> Path:
    source = config.sources[name]
    paths = input_files(source.path)
    inputs: dict[str, Any] = {
        "version": VERSION,
        "source": describe_source(source, paths),
        "tokenizer": tokenizer,
        "template": hashlib.sha256(jinja_template(training=True).encode()).hexdigest(),
        "length": length,
        "system": config.system,
        "held_out": config.val_fraction,
    }
    prepare = partial(_write_source, config=config, source=source, chat=chat, length=length)
    folder, report = manifest.load_or_prepare(
        Path(config.cache), name, inputs, ARRAYS, prepare, () if source.limit else paths.values()
    )
    _check(name, report, config)
    return folder


def _check(name: str, report: dict[str, Any], config: PreferenceConfig) -> None:
    """ValueError if a prepared source has too many malformed rows or no training pair."""
    path, pairs = config.sources[name].path, sum(report["pairs"].values())
    bad = sum(report["bad"].values())
    if bad > config.max_bad * report["rows"]:
        faults = {reason.split("; ")[0]: count for reason, count in report["bad"].items()}
        reasons = ", ".join(f"{count} x {fault}" for fault, count in faults.items())
        raise ValueError(
            f"{name}: {bad / report['rows']:.1%} of {report['rows']:,} pairs are malformed "
            f"({reasons}; the first is {report['named'][0]}); fix {path} or raise "
            f"preferences.max_bad={config.max_bad:g}"
        )
    if pairs and not report["pairs"]["train"]:
        raise ValueError(
            f"{name}: all {pairs:,} pairs are in the validation split; "
            f"lower preferences.val_fraction={config.val_fraction:g} or add data"
        )
    if not report["pairs"]["train"]:
        dropped = [f"{count} x {reason}" for reason, count in report["dropped"].items()]
        raise ValueError(
            f"{name}: {path} has no usable pair ({', '.join(dropped) or 'it is empty'}); "
            "check its path, format and length"
        )


def _write_source(
    folder: Path, config: PreferenceConfig, source: PairSource, chat: Chat, length: int
) -> dict[str, Any]:
    """Read, check, encode and truncate a source into `folder`; returns its report."""
    dropped, bad, ignored, named = Counter[str](), Counter[str](), Counter[str](), list[str]()
    split = Split(config.val_fraction)
    splits = {"train": list[EncodedPair](), "val": list[EncodedPair]()}
    rows = cut = neutralised = 0
    seen = ChatStatistics()

    def pairs() -> Iterator[Pair]:
        nonlocal rows, neutralised
        for row in islice(read_rows(source.path, source.split, source.config), source.limit):
            rows += 1
            try:
                pair = parse_row(row, source.format)
                cleaned = clean_pair(chat, pair, config.system)
                ignored.update(pair.ignored)
                neutralised += chat.has_special(pair[:4])
                yield cleaned
            except Dropped as error:
                dropped[str(error)] += 1
            except ValueError as error:
                bad[str(error)] += 1
                if len(named) < MAX_NAMED:
                    named.append(f"{row.where}: {error}")

    remaining = pairs()
    while batch := list(islice(remaining, BATCH)):
        results = encode_pairs(chat, batch, length)
        for pair, (encoded, shortened) in zip(batch, results, strict=True):
            if encoded is None:
                dropped[LONG] += 1
                continue
            cut += shortened
            seen.add([*pair.prompt, pair.chosen], pair.tools)
            splits[split.of(json.dumps([pair.prompt, pair.tools], sort_keys=True))].append(encoded)
    for name, encoded_pairs in splits.items():
        _write_split(folder, name, encoded_pairs)
    return {
        "rows": rows,
        "pairs": {name: len(encoded_pairs) for name, encoded_pairs in splits.items()},
        "cut": cut,
        "neutralised": neutralised,
        "dropped": dict(dropped.most_common()),
        "bad": dict(bad.most_common()),
        "named": named,
        "ignored": dict(ignored.most_common()),
        "seen": seen.report(),
    }


def parse_row(row: Row | Skipped, format: str) -> Pair:
    """Parse a row as a pair.

    Dropped if it has no training signal, ValueError if it is malformed.
    """
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
        raise ValueError(f"not in {format} format ({type(error).__name__}: {error})") from None


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
    """Return the console lines about a prepared source."""
    pairs, dropped = report["pairs"], report["dropped"].items()
    line = f"{name}: {pairs['train']:,} training and {pairs['val']:,} validation pairs"
    line += f"; {report['cut']:,} prompts truncated" if report["cut"] else ""
    line += f"; {report['neutralised']:,} {NEUTRALISED}" if report["neutralised"] else ""
    line += "".join(f"; dropped {count:,}: {reason}" for reason, count in dropped)
    lines = [line, *ignored_line(name, report["ignored"])]
    lines += [f"warning: {name}: skipped {where}" for where in report["named"][:3]]
    bad = sum(report["bad"].values())
    return [*lines, f"warning: {name}: skipped {bad} malformed rows in total"] if bad > 3 else lines
