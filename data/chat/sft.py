"""Prepare conversations for SFT: check, decontaminate, encode, truncate, cache and pack them.

Each source has a cache folder named by a hash of its inputs. Rows are packed best-fit with each
conversation as a document. Mixture weights count trained tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import numpy as np

from data import manifest
from data.chat.conversations import (
    Conversation,
    check_mix,
    describe_source,
    read_conversations,
)
from data.chat.messages import NEUTRALISED, NOT_TRAINED, ignored_line
from data.chat.rendering import Chat, Encoded, jinja_template
from data.chat.rows import input_files
from data.chat.trained_chat import ChatStatistics
from data.corpus.readers import Skipped
from data.corpus.sources import CONVERSATIONS, resolve_rows
from data.packing import IGNORE, make_plan
from data.pipeline.recipe import Split
from ranges import Fraction, NonEmptyText, NonNegativeFloat, above, at_least, check_fields

if TYPE_CHECKING:
    from data.decontamination.index import Index
    from data.decontamination.test_sets import Item

VERSION = 4  # increment when the same inputs give different rows
BATCH = 2000  # conversations encoded at once
CHECK_INTERVAL = 100  # one conversation per interval is compared with the template's rendering
MAX_NAMED = 20  # malformed rows that a source's report lists
ARRAYS = ("ids", "trained", "starts")
TestSets: TypeAlias = "tuple[dict[str, list[Item]], Index]"  # by name, and their index
Limit = Annotated[int, at_least(1, hint="leave it out to take all")]


@dataclass(frozen=True)
class ChatSource:
    """A source of conversations."""

    # File, folder, glob, hf://owner/name@revision, or a name of sources.py:CONVERSATIONS
    path: NonEmptyText
    # Format of the rows: messages, sharegpt, alpaca, oasst, metamath, gsm8k or toolformer
    format: str = "messages"
    language: str | None = None  # for oasst: the language of the trees
    split: str = "train"  # split of a hub data set
    config: str | None = None  # config of a hub data set with several
    limit: Limit | None = None  # maximum number of conversations

    def __post_init__(self) -> None:
        check_fields(self, "source")
        resolve_rows(self, CONVERSATIONS)


@dataclass(frozen=True)
class ChatConfig:
    """Data of SFT. data.mix has each source's weight as a share of trained tokens."""

    sources: dict[str, ChatSource]  # data.mix gives their weights
    cache: NonEmptyText = "data/store/sft"  # folder of prepared conversations
    val_fraction: Fraction = 0.02  # validation share of conversations, by a hash of the id
    max_bad: Fraction = 0.01  # maximum share of malformed rows in a source
    # Test sets; conversations that contain or resemble an item are dropped
    decontaminate: tuple[str, ...] = ()
    testsets: NonEmptyText = "data/store/wheels"  # folder of downloaded test sets
    system: str | None = None  # system prompt for conversations without one
    # Passes over all rows of all sources, instead of steps; --steps overrides it
    epochs: Annotated[float, above(0, maximum=1e6)] | None = None
    neftune_alpha: NonNegativeFloat = 0.0  # noise on embeddings (arXiv:2310.05914); 5 is usual
    # Prompts to answer at each validation
    samples: tuple[str, ...] = ("What is 12 + 7?", "What is the capital of France?")

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("chat.sources is empty; list at least one, as name: {path, format}")
        check_fields(self, "chat")


class Conversations:
    """One split of a prepared source."""

    def __init__(self, folder: Path, split: str):
        content = manifest.read(folder)
        assert content is not None, folder
        self.folder, self.report = folder, content["report"]
        self.ids, self.trained, self.starts = (
            np.load(folder / f"{split}.{array}.npy", mmap_mode="r") for array in ARRAYS
        )
        self.documents = len(self.starts) - 1
        self.fingerprint: str = content["sha256"][split]

    def __len__(self) -> int:
        """Return the number of input tokens; each conversation's last token is only a target."""
        return len(self.ids) - self.documents

    def pack(self, length: int, seed: int) -> "ConversationRows":
        return ConversationRows(self, length, seed)


class ConversationRows:
    """Rows of uncut conversations, packed best-fit with padding (implements packing.Rows)."""

    def __init__(self, source: Conversations, length: int, seed: int):
        self.source, self.length = source, length
        starts = np.asarray(source.starts)
        self.plan = make_plan(starts[:-1], np.diff(starts) - 1, length, seed)
        trained_before = np.concatenate([[0], np.cumsum(source.trained)])  # each token
        self.first = np.asarray(self.plan.rows)
        sizes, starts = self.plan.lengths.astype(np.int64), self.plan.starts
        piece_trained = trained_before[starts + sizes + 1] - trained_before[starts + 1]
        self.trained = np.add.reduceat(piece_trained, self.first[:-1])
        self.row_tokens = np.add.reduceat(sizes, self.first[:-1])
        self.share = float(self.trained.mean()) / length
        padding = 1 - float(self.row_tokens.mean()) / length
        self.report = (
            f"{len(self)} best-fit rows, {padding:.2%} padding, "
            f"{int(self.trained.sum()):,} trained tokens"
        )

    def __len__(self) -> int:
        return len(self.row_tokens)

    def targets(self, index: int) -> int:
        return int(self.trained[index])

    def tokens(self, index: int) -> int:
        return int(self.row_tokens[index])

    def fill(
        self, index: int, tokens: np.ndarray, targets: np.ndarray, doc_ids: np.ndarray
    ) -> None:
        begin = count = 0
        pieces = slice(*self.first[index : index + 2].tolist())
        for start, size in zip(
            self.plan.starts[pieces].tolist(), self.plan.lengths[pieces].tolist(), strict=True
        ):
            ids, end = self.source.ids[start : start + size + 1].astype(np.int64), begin + size
            trained = self.source.trained[start + 1 : start + size + 1]
            tokens[begin:end], doc_ids[begin:end] = ids[:-1], count
            targets[begin:end] = np.where(trained, ids[1:], IGNORE)
            begin, count = end, count + 1
        tokens[begin:], targets[begin:], doc_ids[begin:] = 0, IGNORE, count


def prepare(
    config: ChatConfig, mix: Collection[str], tokenizer: Path, length: int
) -> dict[str, Path]:
    """Prepare a mixture's sources, unless cached; return their folders.

    tokenizer: folder of a chat tokenizer. ValueError if a source has too many malformed rows or no
    training conversation.
    """
    check_mix(mix, config.sources, "chat.sources")
    chat = Chat.from_folder(tokenizer)
    tokenizer_hash = manifest.file_hash(tokenizer / "tokenizer.json")
    load_test_sets = cache(partial(_test_sets, config))  # loaded once, when needed
    return {
        name: _prepare_source(name, config, chat, tokenizer_hash, length, load_test_sets)
        for name in mix
    }


def _prepare_source(
    name: str,
    config: ChatConfig,
    chat: Chat,
    tokenizer: str,
    length: int,
    load_test_sets: Callable[[], TestSets],
) -> Path:
    source = config.sources[name]
    paths = input_files(source.path)
    test_files = _test_files(config)
    inputs: dict[str, Any] = {
        "version": VERSION,
        "source": describe_source(source, paths),
        "tokenizer": tokenizer,
        "template": jinja_template(training=True),
        "bos": chat.bos,
        "length": length,
        "system": config.system,
        "held_out": config.val_fraction,
        "decontaminate": [list(config.decontaminate), test_files],
    }
    prepare = partial(
        _write_source,
        name=name,
        config=config,
        chat=chat,
        length=length,
        load_test_sets=load_test_sets,
    )
    folder, report = manifest.load_or_prepare(
        Path(config.cache), name, inputs, ARRAYS, prepare, () if source.limit else paths.values()
    )
    _check_limit(name, report, config)
    return folder


def _check_limit(name: str, report: dict[str, Any], config: ChatConfig) -> None:
    """ValueError for too many malformed rows or no training conversation."""
    bad = sum(report["bad"].values())
    share = bad / max(1, bad + report["conversations"])
    if share > config.max_bad:
        kinds = [f"{count} x {reason.split('; ')[0]}" for reason, count in report["bad"].items()]
        more = [f"{len(kinds) - 5} other faults"] if len(kinds) > 5 else []
        raise ValueError(
            f"{name}: {share:.1%} of {bad + report['conversations']:,} conversations are malformed "
            f"({', '.join([*kinds[:5], *more])}; the first is {report['named'][0]}); "
            f"fix {config.sources[name].path} or raise chat.max_bad={config.max_bad:g}"
        )
    training = report["splits"]["train"]["conversations"]
    validation = report["splits"]["val"]["conversations"]
    if validation and not training:
        raise ValueError(
            f"{name}: all {validation:,} conversations are in the validation split; "
            f"lower chat.val_fraction={config.val_fraction:g} or add data"
        )
    if not training:
        path, counts = config.sources[name].path, report["counts"].items()
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in counts if count)
        raise ValueError(
            f"{name}: {path} has no usable conversation ({reasons or 'it is empty'}); "
            "check its path and format"
        )


def _write_source(
    folder: Path,
    name: str,
    config: ChatConfig,
    chat: Chat,
    length: int,
    load_test_sets: Callable[[], TestSets],
) -> dict[str, Any]:
    """Read, check, decontaminate, encode and truncate a source; return its report."""
    source, counts = config.sources[name], Counter[str]()
    bad, named, ignored, seen = Counter[str](), list[str](), Counter[str](), ChatStatistics()

    def fault(reason: str, where: str) -> None:
        bad[reason] += 1
        if len(named) < MAX_NAMED:
            named.append(f"{where}: {reason}")

    def cleaned() -> Iterator[Conversation]:
        for row in read_conversations(
            source.path, source.format, source.language, source.split, source.config
        ):
            if isinstance(row, Skipped) and not row.where:
                counts[row.reason] += 1
            elif isinstance(row, Skipped):
                fault(row.reason, row.where)
            else:
                try:
                    conversation = {**row, **chat.clean(_with_system(row, config.system))}
                except ValueError as error:
                    fault(str(error), row["where"])
                    continue
                replies = [m for m in conversation["messages"] if m["role"] == "assistant"]
                if all("weight" in reply for reply in replies):
                    counts[NOT_TRAINED] += 1
                    continue
                ignored.update(row["ignored"])
                counts["assistant turns without loss (weight 0)"] += sum(
                    "weight" in reply for reply in replies
                )
                counts[NEUTRALISED] += chat.has_special([row["messages"], row.get("tools")])
                yield conversation

    conversations = list(islice(cleaned(), source.limit))
    uncontaminated = (
        _decontaminated(conversations, *load_test_sets()) if config.decontaminate else conversations
    )
    counts["contaminated"] = len(conversations) - len(uncontaminated)
    split = Split(config.val_fraction)
    splits: dict[str, list[Encoded]] = {"train": [], "val": []}
    for start in range(0, len(uncontaminated), BATCH):
        batch = uncontaminated[start : start + BATCH]
        for number, (conversation, encoded) in enumerate(
            zip(batch, chat.encode(batch), strict=True)
        ):
            if number % CHECK_INTERVAL == 0:
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
            rows = splits[split.of(str(conversation.get("group") or conversation["id"]))]
            rows.append(Encoded(encoded.ids[:end], encoded.trained[:end], []))
    report: dict[str, Any] = {
        "conversations": sum(map(len, splits.values())),
        "splits": {name: _write_split(folder, name, rows) for name, rows in splits.items()},
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
    manifest.save_arrays(folder, split, dict(zip(ARRAYS, (ids, trained, starts), strict=True)))
    return {"conversations": len(rows), "tokens": len(ids), "trained": int(trained.sum())}


def check_against_template(chat: Chat, conversation: Conversation, encoded: Encoded) -> None:
    """ValueError if the ids differ from the encoded rendering of the Jinja template."""
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
            "the base model's tokenizer merges text across the template's segments (in "
            f"{conversation['where']}); use a model with a byte-level BPE"
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


def _test_files(config: ChatConfig) -> dict[str, str]:
    """Return fingerprints of the test sets that are local files."""
    paths = [test for test in config.decontaminate if Path(test).is_file()]
    if not paths:
        return {}
    from data.decontamination.test_sets import fingerprint

    return {path: fingerprint(path) for path in paths}


def _test_sets(config: ChatConfig) -> TestSets:
    """Load and index the test sets of config.decontaminate."""
    from data.decontamination.index import build_index
    from data.decontamination.test_sets import load_test_sets

    sets = load_test_sets(config.decontaminate, Path(config.testsets))
    return sets, build_index(sets)


def _decontaminated(
    conversations: list[Conversation], sets: dict[str, list["Item"]], index: "Index"
) -> list[Conversation]:
    """Return the conversations that contain no test item and no user turn that resembles one."""
    from data.decontamination.scan import similar_rows

    documents = ((str(i), "\n".join(_texts(c))) for i, c in enumerate(conversations))
    contaminated = {hit.train_id for hit in index.scan(documents)}
    questions = (
        (str(i), m["content"])
        for i, c in enumerate(conversations)
        for m in c["messages"]
        if m["role"] == "user"
    )
    contaminated |= {hit.train_id for hit in similar_rows(questions, sets, index.settings)}
    return [c for i, c in enumerate(conversations) if str(i) not in contaminated]


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation["messages"]:
        yield from (message[key] for key in ("thought", "content") if message.get(key))


def describe(name: str, report: dict[str, Any]) -> list[str]:
    """Return the console lines about a prepared source."""
    training, validation = report["splits"]["train"], report["splits"]["val"]
    line = (
        f"{name}: {training['conversations']:,} conversations, {training['trained']:,} of "
        f"{training['tokens']:,} tokens trained; {validation['conversations']:,} for validation"
    )
    counts = [f"{value:,} {key}" for key, value in report["counts"].items() if value]
    lines = ["; ".join([line, *counts]), *ignored_line(name, report["ignored"])]
    lines += [f"warning: {name}: skipped {where}" for where in report["named"][:3]]
    bad = sum(report["bad"].values())
    return [*lines, f"warning: {name}: skipped {bad} malformed rows in total"] if bad > 3 else lines
