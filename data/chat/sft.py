"""Conversations made ready for training: checked, decontaminated, encoded, cut to length, kept on the disk, packed into rows.

One folder a source, keyed by a hash of all that it depends on, so that a second start reads it at once. Rows are packed
best-fit; each conversation is a document of its own. The mixture is by trained tokens.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data import manifest
from data.chat.conversations import Conversation, input_files, read_conversations
from data.chat.messages import NEUTRALISED, NOT_TRAINED, ignored_line
from data.chat.rendering import Chat, Encoded, jinja_template
from data.chat.trained_chat import Seen
from data.corpus.readers import Skipped
from data.packing import IGNORE, make_plan
from data.pipeline.recipe import Split
from ranges import FilledText, Fraction, NonNegativeFloat, above, at_least, check_fields

VERSION = 4  # goes up when the same inputs give other rows
BATCH = 2000  # conversations encoded at once
CHECKED = 100  # one conversation in so many is held against the template's own rendering
NAMED = 20  # faults of a source that are named
PARTS = ("ids", "trained", "starts")
Limit = Annotated[int, at_least(1, hint="leave it out to take all")]


@dataclass(frozen=True)
class ChatSource:
    """Where conversations come from."""

    path: FilledText  # file, folder, glob, or hf://owner/name@revision
    format: str = "messages"  # or sharegpt, alpaca, oasst, metamath, gsm8k, toolformer
    language: str | None = None  # of oasst, take only trees in it
    split: str = "train"  # of a hub data set
    config: str | None = None  # of a hub data set, where it has several
    limit: Limit | None = None  # take no more conversations than that

    def __post_init__(self) -> None:
        check_fields(self, "source")


@dataclass(frozen=True)
class ChatConfig:
    """What SFT reads. data.mix has the weight of each source, by trained tokens."""

    sources: dict[str, ChatSource]
    cache: FilledText = "data/store/sft"  # where prepared conversations are kept
    held_out: Fraction = 0.02  # share of conversations, by a hash of the id
    max_bad: Fraction = 0.01  # share of a source that may be faulty; above it the run is refused
    decontaminate: tuple[
        str, ...
    ] = ()  # test sets; conversations that hold or are like an item are dropped
    testsets: FilledText = "data/store/wheels"  # where downloaded test sets are kept
    system: str | None = None  # a system prompt for conversations without one
    # Passes over all rows of all sources, instead of steps; --num_steps overrides it.
    epochs: Annotated[float, above(0, most=1e6)] | None = None
    neftune_alpha: NonNegativeFloat = 0.0  # noise on embeddings (arXiv:2310.05914); 5 is usual
    samples: tuple[str, ...] = (
        "What is 12 + 7?",
        "What is the capital of France?",
    )  # answered at each validation

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "chat.sources names no source; give at least one, as name: {path, format}"
            )
        check_fields(self, "chat")


class Conversations:
    """One split of a prepared source."""

    def __init__(self, folder: Path, split: str):
        content = manifest.read(folder)
        assert content is not None, folder
        self.folder, self.report = folder, content["report"]
        self.ids, self.trained, self.starts = (
            np.load(folder / f"{split}.{part}.npy", mmap_mode="r") for part in PARTS
        )
        self.documents = len(self.starts) - 1
        self.fingerprint: str = content["sha256"][split]

    def __len__(self) -> int:
        """Tokens, each conversation's last one left out, which is only a target."""
        return len(self.ids) - self.documents

    def pack(self, length: int, seed: int) -> "ConversationRows":
        return ConversationRows(self, length, seed)


class ConversationRows:
    """Rows of whole conversations, packed best-fit; what is left of a row is padding (packing.Rows)."""

    def __init__(self, source: Conversations, length: int, seed: int):
        self.source, self.length = source, length
        starts = np.asarray(source.starts)
        self.plan = make_plan(starts[:-1], np.diff(starts) - 1, length, seed)
        before = np.concatenate(
            [[0], np.cumsum(source.trained)]
        )  # trained tokens before each token
        self.first = np.asarray(self.plan.rows)
        sizes = self.plan.lengths.astype(np.int64)
        of_piece = before[self.plan.starts + sizes + 1] - before[self.plan.starts + 1]
        self.trained = np.add.reduceat(of_piece, self.first[:-1])
        self.filled = np.add.reduceat(sizes, self.first[:-1])
        self.share = float(self.trained.mean()) / length
        padding = 1 - float(self.filled.mean()) / length
        self.report = f"{len(self)} best-fit rows, {padding:.2%} padding, {int(self.trained.sum()):,} trained tokens"

    def __len__(self) -> int:
        return len(self.filled)

    def targets(self, index: int) -> int:
        return int(self.trained[index])

    def tokens(self, index: int) -> int:
        return int(self.filled[index])

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        at = count = 0
        pieces = slice(*self.first[index : index + 2].tolist())
        for start, size in zip(
            self.plan.starts[pieces].tolist(), self.plan.lengths[pieces].tolist(), strict=True
        ):
            ids, end = self.source.ids[start : start + size + 1].astype(np.int64), at + size
            tokens[at:end], doc_ids[at:end] = ids[:-1], count
            targets[at:end] = np.where(
                self.source.trained[start + 1 : start + size + 1], ids[1:], IGNORE
            )
            at, count = end, count + 1
        tokens[at:], targets[at:], doc_ids[at:] = 0, IGNORE, count


def prepare(
    config: ChatConfig, mix: Collection[str], tokenizer: Path, length: int
) -> dict[str, Path]:
    """Folders of the prepared sources in the mixture, made where they are not there yet. tokenizer: a chat tokenizer's folder.

    ValueError where a source has too many faults or nothing that can be trained on.
    """
    if not mix:
        raise ValueError(f"data.mix names no source; chat.sources has {', '.join(config.sources)}")
    for name in mix:
        if name not in config.sources:
            raise ValueError(
                f"data.mix.{name}: chat.sources has no such source; it has {', '.join(config.sources)}"
            )
    chat = Chat.from_folder(tokenizer)
    return {
        name: _prepare_source(
            name, config, chat, manifest.file_hash(tokenizer / "tokenizer.json"), length
        )
        for name in mix
    }


def _prepare_source(name: str, config: ChatConfig, chat: Chat, tokenizer: str, length: int) -> Path:
    source = config.sources[name]
    paths = input_files(source.path)
    files = {file: manifest.file_hash(path) for file, path in paths.items()}
    own_tests = {
        test: manifest.file_hash(Path(test))
        for test in config.decontaminate
        if Path(test).is_file()
    }
    inputs: dict[str, Any] = {
        "version": VERSION,
        "source": {**vars(source), "path": source.path if not files else None, "files": files},
        "tokenizer": tokenizer,
        "template": jinja_template(training=True),
        "bos": chat.bos,
        "length": length,
        "system": config.system,
        "held_out": config.held_out,
        "decontaminate": [list(config.decontaminate), own_tests],
    }
    prepare = partial(_write_source, name=name, config=config, chat=chat, length=length)
    folder, report = manifest.keep(
        Path(config.cache), name, inputs, PARTS, prepare, () if source.limit else paths.values()
    )
    _check_limit(name, report, config)
    return folder


def _check_limit(name: str, report: dict[str, Any], config: ChatConfig) -> None:
    """ValueError where a prepared source has too many faults, or no conversation."""
    bad = sum(report["bad"].values())
    share = bad / max(1, bad + report["conversations"])
    if share > config.max_bad:
        kinds = [f"{count} x {reason}" for reason, count in report["bad"].items()]
        reasons = ", ".join(
            [*kinds[:5], *([f"{len(kinds) - 5} other faults"] if len(kinds) > 5 else [])]
        )
        raise ValueError(
            f"{name}: {share:.1%} of {bad + report['conversations']:,} conversations are faulty ({reasons}; the first is "
            f"{report['named'][0]}); mend {config.sources[name].path} or raise chat.max_bad={config.max_bad:g}"
        )
    if not report["splits"]["train"]["conversations"] and (
        held := report["splits"]["val"]["conversations"]
    ):
        raise ValueError(
            f"{name}: all {held:,} conversations are held out, by chat.held_out={config.held_out:g}; lower it or add data"
        )
    if not report["splits"]["train"]["conversations"]:
        path, counts = config.sources[name].path, report["counts"].items()
        reasons = (
            ", ".join(f"{count:,} {kind}" for kind, count in counts if count) or "it holds none"
        )
        raise ValueError(
            f"{name}: no conversation of {path} is left to train on ({reasons}); check its path and format"
        )


def _write_source(
    folder: Path, name: str, config: ChatConfig, chat: Chat, length: int
) -> dict[str, Any]:
    """Read, check, decontaminate, encode and cut a source into the files of `folder`; returns its report."""
    source, counts = config.sources[name], Counter[str]()
    bad, named, ignored, seen = Counter[str](), list[str](), Counter[str](), Seen()

    def fault(reason: str, where: str) -> None:
        bad[reason] += 1
        if len(named) < NAMED:
            named.append(f"{where}: {reason}")

    def cleaned() -> Iterator[Conversation]:
        for found in read_conversations(
            source.path, source.format, source.language, source.split, source.config
        ):
            if isinstance(found, Skipped) and not found.where:
                counts[found.reason] += 1
            elif isinstance(found, Skipped):
                fault(found.reason, found.where)
            else:
                try:
                    conversation = {**found, **chat.clean(_with_system(found, config.system))}
                except ValueError as error:
                    fault(str(error), found["where"])
                    continue
                replies = [m for m in conversation["messages"] if m["role"] == "assistant"]
                if all("weight" in reply for reply in replies):
                    counts[NOT_TRAINED] += 1
                    continue
                ignored.update(found["ignored"])
                counts["assistant turns without loss (weight 0)"] += sum(
                    "weight" in reply for reply in replies
                )
                counts[NEUTRALISED] += chat.holds_special([found["messages"], found.get("tools")])
                yield conversation

    conversations = list(islice(cleaned(), source.limit))
    kept = _decontaminated(conversations, config)
    counts["contaminated"] = len(conversations) - len(kept)
    split = Split(config.held_out)
    parts: dict[str, list[Encoded]] = {"train": [], "val": []}
    for start in range(0, len(kept), BATCH):
        batch = kept[start : start + BATCH]
        for number, (conversation, encoded) in enumerate(
            zip(batch, chat.encode(batch), strict=True)
        ):
            if number % CHECKED == 0:
                check_against_template(chat, conversation, encoded)
            ends = [end for end in encoded.ends if encoded.trained[end - 1]]
            fitting = [end for end in ends if end - 1 <= length]
            if not fitting:
                fault(f"no assistant turn ends within {length} tokens", conversation["where"])
                continue
            seen.add(conversation["messages"], conversation["tools"])
            end = fitting[-1]
            counts["cut"] += end < ends[-1]
            counts["tokens cut off"] += max(0, ends[-1] - end)
            part = parts[split.of(str(conversation.get("group") or conversation["id"]))]
            part.append(Encoded(encoded.ids[:end], encoded.trained[:end], []))
    report: dict[str, Any] = {
        "conversations": sum(map(len, parts.values())),
        "splits": {which: _write_split(folder, which, rows) for which, rows in parts.items()},
        "counts": dict(counts),
        "bad": dict(bad.most_common()),
        "named": named,
        "ignored": dict(ignored.most_common()),
        "seen": seen.report(),
    }
    return report


def _write_split(folder: Path, split: str, rows: list[Encoded]) -> dict[str, int]:
    ids = np.concatenate([np.empty(0, np.uint32), *(row.ids for row in rows)])
    trained = np.concatenate([np.empty(0, bool), *(row.trained for row in rows)])
    starts = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
    manifest.save_arrays(folder, split, dict(zip(PARTS, (ids, trained, starts), strict=True)))
    return {"conversations": len(rows), "tokens": len(ids), "trained": int(trained.sum())}


def check_against_template(chat: Chat, conversation: Conversation, encoded: Encoded) -> None:
    """ValueError unless the ids equal what the tokenizer makes of the template's own rendering."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, tools = [conversation["messages"]], conversation["tools"] or None
    rendered = render_jinja_template(
        messages, tools=tools, chat_template=jinja_template(), bos_token=chat.bos or ""
    )
    text = rendered[0][0]
    assert text == chat.render(conversation), conversation["where"]
    chat.tokenizer.encode_special_tokens = False
    ids = chat.tokenizer.encode(text, add_special_tokens=False).ids
    chat.tokenizer.encode_special_tokens = True
    if ids != encoded.ids.tolist():
        raise ValueError(
            f"the base model's tokenizer merges text over the template's borders (in {conversation['where']}); "
            "take a model with a byte-level BPE"
        )


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    messages = conversation.get("messages")
    if (
        not system
        or not isinstance(messages, list)
        or not messages
        or not isinstance(messages[0], dict)
    ):
        return conversation
    first = [] if messages[0].get("role") == "system" else [{"role": "system", "content": system}]
    return {**conversation, "messages": [*first, *messages]}


def _decontaminated(conversations: list[Conversation], config: ChatConfig) -> list[Conversation]:
    """Without those that hold an item of a test set, or in which a user's turn is like one as a whole."""
    if not config.decontaminate:
        return conversations
    from data.decontamination.index import Settings, build_index
    from data.decontamination.scan import similar_rows
    from data.decontamination.test_sets import load_testset

    sets = {name: load_testset(name, Path(config.testsets)) for name in config.decontaminate}
    whole = ((str(i), "\n".join(_texts(c))) for i, c in enumerate(conversations))
    hit = {found.train_id for found in build_index(sets, Settings()).scan(whole)}
    asked = (
        (str(i), m["content"])
        for i, c in enumerate(conversations)
        for m in c["messages"]
        if m["role"] == "user"
    )
    hit |= {found.train_id for found in similar_rows(asked, sets, Settings())}
    return [conversation for i, conversation in enumerate(conversations) if str(i) not in hit]


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation["messages"]:
        yield from (message[part] for part in ("thought", "content") if message.get(part))


def describe(name: str, report: dict[str, Any]) -> list[str]:
    """Lines on what became of a source."""
    splits, counts = (
        report["splits"],
        {key: value for key, value in report["counts"].items() if value},
    )
    line = (
        f"{name}: {splits['train']['conversations']:,} conversations, {splits['train']['trained']:,} of "
        f"{splits['train']['tokens']:,} tokens trained; {splits['val']['conversations']:,} held out"
    )
    lines = ["; ".join([line, *(f"{value:,} {key}" for key, value in counts.items())])]
    lines += ignored_line(name, report["ignored"])
    for where in report["named"][:3]:
        lines.append(f"warning: {name}: left out {where}")
    bad = sum(report["bad"].values())
    return [*lines, f"warning: {name}: {bad} faulty rows left out in all"] if bad > 3 else lines
