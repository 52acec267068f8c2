"""Replay in SFT and DPO: pretraining text from a data store, beside conversations or pairs.

Rows of packed text, trained on every token, keep a model from forgetting the text (replay when the
data change: arXiv:2403.08763). A text source is named "replay.SOURCE" in the mixture and the logs.
In DPO, the text has a separate loss, as in InstructGPT (arXiv:2203.02155, section 3.5).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from data.chat.tokenizer import chat_tokenizer
from data.dataloader import Batch, PackedDataLoader, to_device, validation_batches
from data.packing import IGNORE, Source
from data.store import open_shards
from data.tokenizers.bpe import load_tokenizer, vocabulary_size
from ranges import NonEmptyText, PositiveFloat, above, check_fields

PREFIX = "replay."


@dataclass(frozen=True)
class ReplayConfig:
    """Pretraining text beside conversations."""

    store: NonEmptyText  # folder with tokenizer/ and tokens/<source>/
    mix: dict[str, PositiveFloat]  # source -> weight of its tokens in the text
    # Share of the trained tokens; the rest is in conversations or pairs.
    share: Annotated[float, above(0, below=1, hint="remove the section for no text")]

    def __post_init__(self) -> None:
        check_fields(self, "replay")


@dataclass(frozen=True)
class PairReplayConfig(ReplayConfig):
    """Pretraining text in DPO. A pair's trained tokens are the tokens of its two answers."""

    # Weight of the text's mean nll per token, beside the mean loss of a pair.
    weight: PositiveFloat = 1.0


class TextBatch(NamedTuple):
    """Rows of text beside pairs. Padding rows have the target IGNORE."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    doc_ids: Tensor  # [B, T] int32
    # [1] fp32, weight of a token's nll: the step's loss denominator / text tokens
    weight_per_token: Tensor

    def to(self, device: torch.device) -> "TextBatch":
        return TextBatch(*(to_device(tensor, device) for tensor in self))


class ReplayRows:
    """The text of each step: rows of equal length, the same number per rank, padded if needed.

    A pure function of the batch index, like the loader. tokens: target number of text tokens per
    step. Rows have at most `length` tokens, and a multiple of 64 if `length` is above 64.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        mix: Mapping[str, float],
        tokens: float,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        count = max(1, math.ceil(tokens / length))
        self.length = min(length, max(64, 64 * round(tokens / count / 64)))
        named = {PREFIX + name: weight for name, weight in mix.items()}
        self.rows = PackedDataLoader(sources, named, self.length, count, count, seed)
        self.tokens = count * self.length  # of a step
        self.share = -(-count // world)  # rows of a rank
        self.first = rank * self.share

    def at(
        self, batch_index: int, denominator: int, batch_tokens: int
    ) -> tuple[list[TextBatch], int]:
        """Return this rank's micro-batches of a step, and the step's text tokens over all ranks.

        denominator: the step's loss denominator. batch_tokens: maximum tokens of a micro-batch; it
        has at least one row.
        """
        step = self.rows.at(batch_index)
        size = max(1, batch_tokens // self.length)
        weight = torch.tensor([denominator / step.loss_denominator])
        [batch] = step.batches
        fields = []
        for tensor, filler in ((batch.tokens, 0), (batch.targets, IGNORE), (batch.doc_ids, 0)):
            assert tensor is not None
            rows = tensor[self.first : self.first + self.share]
            padding = rows.new_full((self.share - len(rows), self.length), filler)
            fields.append(torch.cat([rows, padding]).split(size))
        batches = [
            TextBatch(tokens, targets, doc_ids, weight)
            for tokens, targets, doc_ids in zip(*fields, strict=True)
        ]
        return batches, step.tokens


def mixture(mix: Mapping[str, float], replay: ReplayConfig | None) -> dict[str, float]:
    """Return the weights of conversations and text, as shares of trained tokens.

    mix: of the conversations; returned unchanged without replay. ValueError if a source of
    conversations has the name of a text source.
    """
    if replay is None:
        return dict(mix)
    for name in mix:
        if f"{name}.".startswith(PREFIX):
            raise ValueError(f"data.mix.{name} has a name of the replayed text; rename the source")
    conversations, text = sum(mix.values()), sum(replay.mix.values())
    shares = {name: (1 - replay.share) * weight / conversations for name, weight in mix.items()}
    return shares | {PREFIX + name: replay.share * w / text for name, w in replay.mix.items()}


def open_replay(replay: ReplayConfig, split: str, tokenizer: Path) -> dict[str, Source]:
    """Open one split of the text; tokenizer: folder of the model's chat tokenizer.

    ValueError if the store lacks a source or has another tokenizer than the model. Both tokenizers
    are compared with the chat tokens added, since the base model may already have them.
    """
    folder = Path(replay.store) / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"replay.store={replay.store} has no tokenizer; give the data store of the base "
            "model's pretraining"
        )
    if chat_tokenizer(folder)[0].to_str() != load_tokenizer(tokenizer).to_str():
        raise ValueError(
            f"the text of replay.store={replay.store} has another tokenizer than the base model; "
            "give the data store of its pretraining"
        )
    vocabulary = vocabulary_size(load_tokenizer(folder))
    shards = open_shards(replay.store, replay.mix, split, vocabulary, section="replay.mix")
    return {PREFIX + name: source for name, source in shards.items()}


def add_shares(
    results: dict[str, dict[str, float]], shares: dict[str, float], text: Collection[str]
) -> None:
    """Add "trained_share" to the results of each source, and of all text under "replay".

    shares: of the trained tokens. text: names of the replayed sources.
    """
    if text:
        shares = {**shares, "replay": sum(shares[name] for name in text)}
    for name, share in shares.items():
        results.setdefault(name, {})["trained_share"] = share


def replay_validation(
    replay: ReplayConfig,
    tokenizer: Path,
    length: int,
    batch_size: int,
    rows: int,
    rank: int,
    world: int,
) -> tuple[dict[str, list[Batch]], list[str]]:
    """Return the validation batches of each source of the text, and warnings for the log.

    rows: maximum per source, of `length` tokens each. A source without a full row gets a warning
    and no batches.
    """
    batches, lines = {}, []
    for name, source in open_replay(replay, "val", tokenizer).items():
        if len(source) > length:
            batches[name] = validation_batches(source, length, batch_size, rows, rank, world)
        else:
            lines.append(
                f"warning: {name} has no validation loss: its text is below {length} tokens"
            )
    return batches, lines
