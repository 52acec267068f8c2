"""Show the model's input: the packed rows of a config, or a file of conversations.

    python -m scripts.preview --config configs/quickstart/base.yaml
    python -m scripts.preview --config configs/quickstart/sft.yaml \\
        --base_model checkpoints/quickstart/gold
    python -m scripts.preview --config configs/quickstart/dpo.yaml \\
        --base_model checkpoints/quickstart/sft
    python -m scripts.preview --config configs/continue.yaml --base_model my_model
    python -m scripts.preview --rows my_chats.jsonl --base_model checkpoints/quickstart/gold

my_model stands for a Llama or Qwen3 folder. The config is for train.py, train_sft.py or
train_dpo.py. The training code reads, encodes, truncates and packs the data, so the rows are
exactly those of a training step. Conversations and pairs are rendered with the chat template.
Tokens with a loss are green; if the output is not a terminal or NO_COLOR is set, they are between ⟦
and ⟧. In pretraining every token has a loss. The last token of a conversation is only a target, so
it does not count as a token of the row.

Prepared conversations, pairs and packing plans are cached and reused by training; --rows caches
nothing. Set any other setting of the config with section.key=value.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch import distributed as dist

from cli import CommandParser, int_at_least, user_errors
from data.chat import preferences, sft
from data.chat.conversations import FORMATS
from data.chat.pair_batches import PairBatch, PairKey, PairLoader, Pairs
from data.chat.replay import mixture, open_replay
from data.chat.tokenizer import cache_chat_tokenizer
from data.dataloader import PackedDataLoader
from data.packing import IGNORE
from data.store import open_shards, open_tokenizer
from data.tokenizers.bpe import load_tokenizer
from inference.terminal import CONTROL
from models.hf import read_hf_config, resolve_checkpoint
from training.config import load
from training.fine_tuning import open_base
from training.schedulers import rows_of_step
from training.settings import load_settings, read_yaml

LOSS, DIM, END = "\033[32m", "\033[2m", "\033[0m"
MARKS = ("⟦", "⟧")
NO_LIMIT = 10**6  # tokens of a conversation, if no model sets a context


class Document(NamedTuple):
    """A document, conversation or answer as training sees it."""

    ids: list[int]
    trained: list[bool]  # True: the token is a target with a loss


class Row(NamedTuple):
    """A packed row."""

    documents: list[Document]
    tokens: int  # number of tokens, without padding
    padding: int
    targets: int  # number of targets with a loss


class Pair(NamedTuple):
    """A prompt with two answers."""

    source: str
    chosen: Document
    rejected: Document

    @property
    def prompt(self) -> int:
        """Return the tokens of the common prompt."""
        return self.chosen.trained.index(True)


class Shown(NamedTuple):
    """Output settings."""

    tokenizer: Tokenizer | None  # None: the data have no text
    characters: int  # maximum of a span of text; 0: all
    ids: bool  # also print token ids
    colour: bool

    def heading(self, text: str) -> None:
        print(f"{DIM}{text}{END}" if self.colour else text)

    def document(self, document: Document, marked: bool = True) -> None:
        """Print a document; marked: show which tokens have a loss."""
        pairs = list(zip(document.ids, document.trained, strict=True))
        spans = groupby(pairs, key=lambda pair: marked and pair[1])
        stretches = [(trained, [index for index, _ in span]) for trained, span in spans]
        if self.tokenizer:
            texts = [self._marked(trained, self._text(ids)) for trained, ids in stretches]
            print("".join(texts))
        if self.ids or not self.tokenizer:
            texts = [self._marked(t, self._cut(" ".join(map(str, ids)))) for t, ids in stretches]
            print(f"ids: {' '.join(texts)}")

    def _marked(self, trained: bool, text: str) -> str:
        begin, end = ((LOSS, END) if self.colour else MARKS) if trained else ("", "")
        return f"{begin}{text}{end}"

    def _text(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return self._cut(CONTROL.sub("\ufffd", text))

    def _cut(self, text: str) -> str:
        omitted = len(text) - self.characters
        if not self.characters or omitted <= 0:
            return text
        head = self.characters * 3 // 4
        tail = self.characters - head
        return f"{text[:head]} [... {omitted:,} characters ...] {text[-tail:]}"


# ---- training batches as documents


def rows_of(tokens: Tensor, targets: Tensor, doc_ids: Tensor | None, add_last: bool) -> list[Row]:
    """Split packed rows, all [B, T], into documents; padding is a document without targets.

    add_last: append the last target of a document, which is not among the row's tokens.
    """
    ids = torch.zeros_like(tokens) if doc_ids is None else doc_ids
    return [_row(*tensors, add_last) for tensors in zip(tokens, targets, ids, strict=True)]


def _row(tokens: Tensor, targets: Tensor, doc_ids: Tensor, add_last: bool) -> Row:
    lengths = torch.unique_consecutive(doc_ids, return_counts=True)[1].tolist()
    documents, begin = [], 0
    for length in lengths:
        piece = slice(begin, begin + length)
        document = document_of(tokens[piece], targets[piece], add_last)
        begin += length
        documents += [document] if any(document.trained) else []
    # Padding is the last document, if that has no target.
    padding = lengths[-1] if len(documents) < len(lengths) else 0
    return Row(documents, len(tokens) - padding, padding, int((targets != IGNORE).sum()))


def document_of(tokens: Tensor, targets: Tensor, add_last: bool) -> Document:
    """Return a document's ids and loss mask; targets [n] are the tokens after tokens [n]."""
    ids, has_loss = tokens.tolist(), (targets != IGNORE).tolist()
    if add_last and has_loss[-1]:
        return Document([*ids, int(targets[-1])], [False, *has_loss])
    # The first token gets the mask of its target, so that a row of one token has a loss.
    return Document(ids, [has_loss[0], *has_loss[:-1]])


def pairs_of(batch: PairBatch, keys: Sequence[PairKey]) -> list[Pair]:
    """Return the pairs of a batch, which has n chosen answers, then n rejected answers."""
    width, documents = batch.tokens.shape[1], []
    for positions in batch.answer_positions[:, 0].tolist():
        row, column = divmod(positions, width)
        chosen = batch.doc_ids[row] == batch.doc_ids[row, column]
        documents.append(document_of(batch.tokens[row][chosen], batch.targets[row][chosen], True))
    halves = documents[: len(keys)], documents[len(keys) :]
    return [Pair(name, *two) for (name, _), *two in zip(keys, *halves, strict=True)]


# ---- data of each kind of config


@contextmanager
def one_rank() -> Iterator[None]:
    """Create a process group of this process only, which the training code needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def pretraining(args: argparse.Namespace, shown: Shown) -> None:
    """Show a step of train.py."""
    run = load(args.config, args.overrides, {"init_from": args.base_model})
    data, vocab = run.data, run.model.vocab_size
    folder = open_tokenizer(data.store, vocab, padded=run.init_from is not None).folder
    shards = open_shards(data.store, data.mix, "train", vocab, data.min_document_tokens)
    batch = (data.sequence_length, rows_of_step(run), data.micro_batch_size, run.seed, 0, 1)
    loader = PackedDataLoader(shards, data.mix, *batch, data.packing, data.start_epoch)
    shown = shown._replace(tokenizer=load_tokenizer(folder) if folder else None)
    show_step(loader, args, shown, loader.describe(run.steps), add_last=False)


def conversations(args: argparse.Namespace, shown: Shown) -> None:
    """Show a step of train_sft.py."""
    # A stage's config class is in its entry point, which is not in a package.
    kind = import_module("train_sft").SFTConfig
    run = load_settings(kind, args.config, args.overrides, {"init_from": args.base_model})
    chat, folder, _, run = open_base(run, Path(run.chat.cache))
    data, length = run.data, run.data.sequence_length
    prepared = sft.prepare(run.chat, data.mix, folder, length)
    sources = {name: sft.Conversations(path, "train") for name, path in prepared.items()}
    text = open_replay(run.replay, "train", folder) if run.replay else {}
    mix, shape = mixture(data.mix, run.replay), (length, data.rows, data.micro_batch_size)
    loader = PackedDataLoader({**sources, **text}, mix, *shape, run.seed)
    if run.chat.epochs:
        run = replace(run, steps=loader.steps_of_epochs(run.chat.epochs, sources))
    lines = [line for name, source in sources.items() for line in sft.describe(name, source.report)]
    shown = shown._replace(tokenizer=chat.tokenizer)
    show_step(loader, args, shown, [*lines, *loader.describe(run.steps)], add_last=True)


def show_step(
    loader: PackedDataLoader,
    args: argparse.Namespace,
    shown: Shown,
    lines: Sequence[str],
    add_last: bool,
) -> None:
    """Print rows of a step, then its counts. add_last: for conversations, see rows_of."""
    rows: list[tuple[int, Row]] = []
    for batch in loader.at(args.start).batches:
        batch_rows = rows_of(batch.tokens, batch.targets, batch.doc_ids, add_last)
        rows += zip(batch.rows.tolist(), batch_rows, strict=True)
    for number, row in rows[: args.count]:
        source = loader.source_of(number)
        shown.heading(f"\n==== row {number}, source {source}: {_count([row], add_last)}")
        for index, document in enumerate(row.documents, 1):
            size = len(document.ids)
            shown.heading(f"---- document {index} of {len(row.documents)}, {size:,} tokens")
            shown.document(document, marked=add_last)
        if row.padding:
            shown.heading(f"---- padding, {row.padding:,} tokens")
    print()
    for line in lines:
        print(line)
    counts = _count([row for _, row in rows], add_last)
    print(f"step {args.start}: {len(rows):,} rows of {loader.length:,} tokens: {counts}")


def _count(rows: Sequence[Row], masked: bool) -> str:
    """Format the counts of rows; masked: also count the targets with a loss."""
    documents = sum(len(row.documents) for row in rows)
    tokens, padding, targets = (sum(getattr(row, n) for row in rows) for n in Row._fields[1:])
    text = f"{documents:,} document{'s' * (documents != 1)}, {tokens:,} tokens, {padding:,} padding"
    if not masked:
        return text
    return f"{text}; {targets:,} targets with a loss, {tokens - targets:,} without"


def _loss(documents: Sequence[Document]) -> str:
    tokens = sum(len(document.ids) for document in documents)
    trained = sum(sum(document.trained) for document in documents)
    return f"{trained:,} tokens with a loss, {tokens - trained:,} without"


def preference_pairs(args: argparse.Namespace, shown: Shown) -> None:
    """Show a step of train_dpo.py."""
    kind = import_module("train_dpo").PreferenceRun
    run = load_settings(kind, args.config, args.overrides, {"init_from": args.base_model})
    chat, folder, _, run = open_base(run, Path(run.preferences.cache))
    data = run.data
    prepared = preferences.prepare(run.preferences, data.mix, folder, data.sequence_length)
    train = {name: Pairs(path, "train") for name, path in prepared.items()}
    size = max(1, min(data.micro_batch_size // 2, data.pairs_per_step))
    shape = (data.sequence_length, data.pairs_per_step, size)
    loader = PairLoader(train, data.mix, *shape, run.seed)
    if run.replay:
        loader.add_text(open_replay(run.replay, "train", folder), run.replay)
    keys, make = next(islice(loader.steps(args.start + 1), args.start, None))
    pairs = [pair for names, batch in make() for pair in pairs_of(batch, names)]
    shown = shown._replace(tokenizer=chat.tokenizer)
    for number, pair in enumerate(pairs[: args.count], 1):
        prompt = pair.prompt
        sizes = [len(document.ids) - prompt for document in (pair.chosen, pair.rejected)]
        shown.heading(
            f"\n==== pair {number}, source {pair.source}: prompt {prompt:,} tokens, "
            f"chosen {sizes[0]:,}, rejected {sizes[1]:,}"
        )
        shown.document(Document(pair.chosen.ids[:prompt], pair.chosen.trained[:prompt]))
        for title, document in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            shown.heading(f"---- {title}")
            shown.document(Document(document.ids[prompt:], document.trained[prompt:]))
    print()
    for name, source in train.items():
        print(*preferences.describe(name, source.report), sep="\n")
    print(*loader.describe(run.steps), sep="\n")
    texts = [b for b in loader.at(args.start).batches if not isinstance(b, PairBatch)]
    rows = [row for b in texts for row in rows_of(b.tokens, b.targets, b.doc_ids, add_last=False)]
    text = f"; text: {_count(rows, masked=False)}" if rows else ""
    documents = [document for pair in pairs for document in (pair.chosen, pair.rejected)]
    print(f"step {args.start}: {len(keys):,} pairs: {_loss(documents)}{text}")


def file_of_conversations(args: argparse.Namespace, shown: Shown) -> None:
    """Show the conversations of a file in order, encoded as in train_sft.py."""
    base = resolve_checkpoint(args.base_model)
    has_model = (base / "config.json").is_file()
    context = read_hf_config(base).max_position_embeddings if has_model else NO_LIMIT
    length = args.sequence_length or context
    with tempfile.TemporaryDirectory() as scratch:
        folder = cache_chat_tokenizer(base, Path(scratch))
        config = sft.ChatConfig(
            {"rows": sft.ChatSource(args.rows, args.format)},
            cache=scratch,
            val_fraction=0.0,
            max_bad=1 - 1e-9,  # excludes a file without any conversation
        )
        try:
            prepared = sft.prepare(config, ["rows"], folder, length)["rows"]
        except ValueError as error:
            raise ValueError(str(error).partition(" or raise chat.max_bad")[0]) from error
        source = sft.Conversations(prepared, "train")
        chat = sft.Chat.from_folder(folder)
        documents = [
            Document(source.ids[begin:end].tolist(), source.trained[begin:end].tolist())
            for begin, end in zip(source.starts[:-1], source.starts[1:], strict=True)
        ]
        report = source.report
    shown = shown._replace(tokenizer=chat.tokenizer)
    chosen = documents[args.start : args.start + args.count]
    for number, document in enumerate(chosen, args.start + 1):
        size = len(document.ids)
        shown.heading(
            f"\n==== conversation {number} of {len(documents):,}: {size:,} tokens, "
            f"{_loss([document])}"
        )
        shown.document(document)
    print()
    print(*sft.describe(args.rows, report), sep="\n")
    longest = max(len(document.ids) for document in documents)
    print(f"longest: {longest:,} tokens; truncated after {length:,}; all: {_loss(documents)}")


def preview(args: argparse.Namespace) -> None:
    """Show the rows of --config or the file of --rows."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown = Shown(None, args.characters, args.ids, colour)
    if args.rows:
        if args.config or args.overrides:
            raise ValueError("--rows shows a file; give it without --config and settings")
        if not args.base_model:
            raise ValueError(
                "--rows needs --base_model: a checkpoint, or a folder with tokenizer.json"
            )
        file_of_conversations(args, shown)
        return
    if not args.config:
        raise ValueError("nothing to show; give --config or --rows")
    keys = read_yaml(Path(args.config)).keys()
    if {"kind", "path"} <= keys:
        raise ValueError(
            f"{args.config} is an evaluation; scripts.run_evals --suite {args.config} writes its "
            "prompts and the answers beside the results"
        )
    if "target_loss" in keys:
        raise ValueError(
            f"{args.config} is a config of train_gpt.py; give one of train.py, train_sft.py or "
            "train_dpo.py"
        )
    kinds: dict[str, Any] = {"chat": conversations, "preferences": preference_pairs}
    show = next((kinds[key] for key in kinds if key in keys), pretraining)
    if args.sequence_length:
        raise ValueError("--sequence_length belongs to --rows; set data.sequence_length=N instead")
    with one_rank():
        show(args, shown)


def parser() -> argparse.ArgumentParser:
    flags = CommandParser(__doc__)
    flags.add_argument("--config", help="YAML file of train.py, train_sft.py or train_dpo.py")
    flags.add_argument("--rows", help="file or folder of conversations: .jsonl, .json, .parquet")
    flags.add_argument("--format", choices=FORMATS, default="messages", help="of --rows")
    flags.add_argument(
        "--base_model",
        help="model to fine-tune or to continue, as in training; with --rows, any folder with "
        "tokenizer.json",
    )
    flags.add_argument(
        "--sequence_length",
        type=int_at_least(1),
        help="with --rows: tokens of a row (default: the model's context)",
    )
    flags.add_argument(
        "--start",
        type=int_at_least(0),
        default=0,
        help="step of the config, or conversation of --rows, to begin with (default: %(default)s)",
    )
    flags.add_argument(
        "--count",
        type=int_at_least(1),
        default=2,
        help="rows, pairs or conversations to show (default: %(default)s)",
    )
    flags.add_argument(
        "--characters",
        type=int_at_least(0),
        default=1000,
        help="characters after which text is shortened; 0: never (default: %(default)s)",
    )
    flags.add_argument("--ids", action="store_true", help="also print the token ids")
    flags.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any setting of the config"
    )
    return flags


def main() -> None:
    args = parser().parse_intermixed_args()
    with user_errors():
        preview(args)


if __name__ == "__main__":
    main()
